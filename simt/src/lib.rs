//! Executes CUDA kernel sources on the CPU, as the most hostile legal GPU: see README.md.
//!
//! ```text
//! let mut launch = Launch::new(FORWARD, [blocks, 1, 1], 128).shared_bytes(49152).seed(7);
//! let params = Params { q: launch.input("q", &q), out: launch.output("out", &mut out), … };
//! let report = launch.run(&params)?;              // Err: what the kernel did wrong, with its source lines
//! assert_eq!(report.stats.ldmatrix_conflicts, 0);
//! ```
//!
//! Launches share nothing: any number may run at once on different threads.

mod ffi;
mod launch;
mod program;
mod report;
mod tensor_map;

pub use launch::{Checks, Kernel, Launch};
pub use program::Program;
pub use report::{BufferStats, Fault, FaultKind, Report, Stats, SyncSite, SyncSites};
pub use tensor_map::{Swizzle, TensorMap};
