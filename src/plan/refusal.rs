//! Why an engine does not run a legal problem: every reason, with its remedy.

use super::instances::Engine;
use crate::problem::{Argument, DType, Direction, list};
use std::fmt;

/// Why an engine does not run a legal problem.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub struct Refusal {
    /// The engine asked.
    pub engine: Engine,
    /// All its reasons.
    pub reasons: Vec<Reason>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the {} engine cannot run this: ", self.engine.name())?;
        list(f, &self.reasons)
    }
}

/// One reason.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Reason {
    /// The instance table has no row for this engine and direction.
    #[error("it has no {} kernel; use --engine reference or a later release", .direction.name())]
    NoKernel {
        /// Forward or backward.
        direction: Direction,
    },
    /// The kernel is not compiled for this element type.
    #[error("its kernels take {}, not {got}", join(.supported))]
    DType {
        /// Type of q.
        got: DType,
        /// Types compiled.
        supported: Vec<DType>,
    },
    /// The CUDA compiler was missing when this crate was built.
    #[error("no nvcc was found when it was built; install the CUDA toolkit, set NVCC or CUDA_HOME, and build again")]
    NoCompiler,
    /// Rows too wide for a tile.
    #[error("{dim} is {got}; its widest kernel takes {limit}")]
    Width {
        /// Which width.
        dim: &'static str,
        /// Width found.
        got: usize,
        /// Widest.
        limit: usize,
    },
    /// A width between those of whole copies.
    #[error("{dim} is {got}; its kernels take multiples of {step}")]
    Step {
        /// Which width.
        dim: &'static str,
        /// Width found.
        got: usize,
        /// What widths are multiples of.
        step: usize,
    },
    /// Rows that do not start at multiples of 16 bytes.
    #[error("{argument} has rows that do not start at multiples of 16 bytes; use strides that do, or copy it")]
    Alignment {
        /// Which tensor.
        argument: Argument,
    },
    /// A branch whose keys do not fit the registers of a kernel that keeps them all.
    #[error("a branch has {got} keys, padded; its kernel for short branches takes {limit}")]
    RowKeys {
        /// Keys of the branch, each segment padded to 16.
        got: usize,
        /// Keys that fit.
        limit: usize,
    },
    /// More branches or segments than a parameter block holds.
    #[error("the request has {got} {list}; its kernels take {limit}")]
    TooMany {
        /// Branches or segments.
        list: &'static str,
        /// How many there are.
        got: usize,
        /// How many are taken.
        limit: usize,
    },
    /// More blocks than a grid has.
    #[error("it would take {blocks} blocks, more than a grid has; split the batch")]
    Grid {
        /// Blocks needed.
        blocks: u128,
    },
    /// A GPU that is too old.
    #[error("the GPU is sm_{}{}; its kernels need sm_{}{} or newer", .have.0, .have.1, .need.0, .need.1)]
    ComputeCapability {
        /// What the GPU is.
        have: (u32, u32),
        /// What the kernel needs.
        need: (u32, u32),
    },
    /// A GPU whose blocks have too little shared memory.
    #[error("its kernel needs {need} bytes of shared memory a block; the GPU has {have}")]
    SharedMemory {
        /// What the kernel needs.
        need: u32,
        /// What a block may have.
        have: u32,
    },
    /// The engine is not part of this build.
    #[error("{0}")]
    NotBuilt(&'static str),
    /// No CUDA driver can be loaded.
    #[error("no NVIDIA driver library could be loaded ({searched}); install the driver, or use --engine cpu")]
    NoDriver {
        /// File names that were tried.
        searched: String,
    },
    /// The driver answered with an error.
    #[error("the NVIDIA driver failed at {call} with code {code}")]
    Driver {
        /// What was asked of it.
        call: &'static str,
        /// Its CUresult.
        code: u32,
    },
    /// The driver knows no GPU.
    #[error("the NVIDIA driver is there but reports no GPU; check CUDA_VISIBLE_DEVICES and nvidia-smi")]
    NoDevice,
}

fn join(dtypes: &[DType]) -> String {
    dtypes.iter().map(|dtype| dtype.name()).collect::<Vec<_>>().join(", ")
}
