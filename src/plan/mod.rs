//! Which kernel computes a problem, or every reason why none does. Needs no GPU and no data.

mod instances;

pub use instances::{Engine, INSTANCES, Instance, support_table};

use crate::problem::{DType, Direction, Problem, list};
use std::fmt;

/// Where a plan is to run: an engine and what its machine can do.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Device {
    /// The naive engine; one thread.
    Reference,
    /// The processor.
    Cpu {
        /// Threads that work at once, each with its own scratch.
        threads: usize,
    },
    /// A GPU as emulated on the processor.
    Emulated {
        /// Compute capability, `(8, 0)` for sm_80.
        compute_capability: (u32, u32),
    },
    /// A GPU.
    Cuda(CudaDevice),
}

/// What a plan must know of a GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaDevice {
    /// The driver's number for it.
    pub ordinal: usize,
    /// Product name.
    pub name: String,
    /// Compute capability, `(9, 0)` for sm_90.
    pub compute_capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Shared memory that one block may ask for, in bytes.
    pub shared_memory_per_block: u32,
}

impl Device {
    /// The engine that works there.
    pub fn engine(&self) -> Engine {
        match self {
            Device::Reference => Engine::Reference,
            Device::Cpu { .. } => Engine::Cpu,
            Device::Emulated { .. } => Engine::Emulated,
            Device::Cuda(_) => Engine::Cuda,
        }
    }
}

/// How a problem will be computed.
#[derive(Clone, Debug)]
pub struct Plan {
    instance: &'static Instance,
    workspace_bytes: usize,
}

impl Plan {
    /// Chooses the kernel for `problem` on `device`.
    ///
    /// # Errors
    /// [`Refusal`] with every reason of the kernel that came nearest.
    pub fn new(problem: &Problem, device: &Device) -> Result<Plan, Refusal> {
        let (engine, direction) = (device.engine(), problem.direction());
        let instance = INSTANCES
            .iter()
            .find(|row| row.engine == engine && row.direction == direction && reasons_against(row, problem).is_empty());
        match instance {
            Some(instance) => {
                let threads = if let Device::Cpu { threads } = *device { threads } else { 1 };
                let workspace_bytes = instance.scratch_bytes(problem).saturating_mul(threads);
                Ok(Plan { instance, workspace_bytes })
            }
            None => Err(Refusal { engine, reasons: table_reasons(engine, problem) }),
        }
    }

    /// Engine that runs it.
    pub fn engine(&self) -> Engine {
        self.instance.engine
    }

    /// Name of the kernel, a row of the table.
    pub fn kernel(&self) -> &'static str {
        self.instance.kernel
    }

    /// Forward or backward.
    pub fn direction(&self) -> Direction {
        self.instance.direction
    }

    /// Queries of one tile.
    pub(crate) fn block_q(&self) -> usize {
        self.instance.block_q
    }

    /// Keys of one tile.
    pub(crate) fn block_kv(&self) -> usize {
        self.instance.block_kv
    }

    /// Bytes of scratch, all threads together: the cpu engine keeps a tile per thread, the reference its results in f64.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace_bytes
    }

    /// Whether two runs on the same machine give the same bits.
    pub fn is_deterministic(&self) -> bool {
        self.instance.deterministic
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "engine         {}", self.engine().name())?;
        writeln!(f, "kernel         {}", self.kernel())?;
        writeln!(f, "direction      {}", self.direction().name())?;
        writeln!(f, "workspace      {} bytes", self.workspace_bytes())?;
        write!(f, "deterministic  {}", if self.is_deterministic() { "yes" } else { "no" })
    }
}

fn reasons_against(instance: &Instance, problem: &Problem) -> Vec<Reason> {
    let mut reasons = Vec::new();
    if !instance.dtypes.contains(&problem.dtype) {
        reasons.push(Reason::DType { got: problem.dtype, supported: instance.dtypes });
    }
    for (dim, got) in [("head_dim", problem.head_dim), ("value_dim", problem.value_dim)] {
        if got > instance.max_head_dim {
            reasons.push(Reason::Width { dim, got, limit: instance.max_head_dim });
        }
    }
    reasons
}

/// What the table alone says against an engine, whether or not its machine is there.
pub(crate) fn table_reasons(engine: Engine, problem: &Problem) -> Vec<Reason> {
    let direction = problem.direction();
    let rows = INSTANCES.iter().filter(|row| row.engine == engine && row.direction == direction);
    let mut reasons = rows
        .map(|row| reasons_against(row, problem))
        .min_by_key(Vec::len)
        .unwrap_or_else(|| vec![Reason::NoKernel { direction }]);
    if engine == Engine::Cuda && cfg!(not(nvcc)) {
        reasons.push(Reason::NoCompiler);
    }
    reasons
}

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
    #[error("its kernels take {supported:?}, not {got:?}")]
    DType {
        /// Type of q.
        got: DType,
        /// Types compiled.
        supported: &'static [DType],
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
