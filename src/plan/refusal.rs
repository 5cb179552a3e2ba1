//! Why an engine does not run a legal problem: every reason, with its remedy.

use super::instances::Engine;
use super::target::Target;
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
    /// Rows that do not start at multiples of 16 bytes, or whose elements are apart.
    #[error("{argument} has rows that are not dense from multiples of 16 bytes on; use strides that do so, or copy it")]
    Alignment {
        /// Which tensor.
        argument: Argument,
    },
    /// A softcap where the kernel takes none.
    #[error("softcap is given; the kernel takes none")]
    Softcap,
    /// A bias or a mask where the kernel takes none.
    #[error("segment {segment} has a bias or a mask; the kernel takes none")]
    Bias {
        /// The first segment that has one.
        segment: usize,
    },
    /// A causal rule or a window where the kernel takes none.
    #[error("segment {segment} has a causal rule or a window; the kernel takes none")]
    Positions {
        /// The first segment that has one.
        segment: usize,
    },
    /// A scale that turns the largest product into the smallest logit, or all into one.
    #[error("softmax_scale is {got}; the kernel takes positive ones")]
    Scale {
        /// The scale.
        got: f32,
    },
    /// A tensor that bulk copies cannot describe.
    #[error(
        "{argument} has no tensor map: of an extent above 1 the stride is positive, its sequence does not broadcast and is \
         shorter than 2^29, and no stride reaches 2^40 bytes"
    )]
    TensorMap {
        /// Which tensor.
        argument: Argument,
    },
    /// A branch whose keys do not fit the registers of a kernel that keeps them all.
    #[error("a branch has {got} keys, padded; the kernel takes {limit}")]
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
    /// More scratch than an address space has.
    #[error("its scratch would be {bytes} bytes, more than any allocation has; split the batch")]
    Workspace {
        /// Bytes needed, the largest number if there are more.
        bytes: usize,
    },
    /// A GPU that is too old.
    #[error("the GPU is sm_{}{}; its kernels need sm_{}{} or newer", .have.0, .have.1, .need.0, .need.1)]
    ComputeCapability {
        /// What the GPU is.
        have: (u32, u32),
        /// What the kernel needs.
        need: (u32, u32),
    },
    /// A GPU that is another than the one the kernel is for.
    #[error("the GPU is sm_{}{}; its kernel is for sm_{}{}a alone", .have.0, .have.1, .need.0, .need.1)]
    OtherGpu {
        /// What the GPU is.
        have: (u32, u32),
        /// What the kernel is for.
        need: (u32, u32),
    },
    /// A GPU for which nothing was compiled.
    #[error(
        "its kernels were compiled for {}, and none of that loads on the GPU, sm_{}{}; set FUSED_ATTENTION_ARCHS=sm_{}{} \
         and build again", targets(.compiled), .have.0, .have.1, .have.0, .have.1)]
    Architecture {
        /// What the GPU is.
        have: (u32, u32),
        /// What this build holds.
        compiled: &'static [Target],
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
    #[error("the NVIDIA driver answered {call} with {error}; see nvidia-smi and the kernel's log")]
    Driver {
        /// What was asked of it.
        call: &'static str,
        /// What it answered.
        error: CudaError,
    },
    /// A driver older than what the kernels need.
    #[error(
        "the NVIDIA driver is of CUDA {}.{}; this build's kernels need {}.{} or later: update the driver, or build with \
         an older toolkit of 12.1 or later", .have.0, .have.1, .need.0, .need.1)]
    OldDriver {
        /// The driver's version of CUDA.
        have: (u32, u32),
        /// The oldest that will do.
        need: (u32, u32),
    },
    /// A driver library that lacks a call.
    #[error("the NVIDIA driver library has no {call}; update the driver")]
    MissingCall {
        /// The call.
        call: &'static str,
    },
    /// The driver knows no GPU.
    #[error("the NVIDIA driver is there but reports no GPU; check CUDA_VISIBLE_DEVICES and nvidia-smi")]
    NoDevice,
}

/// What the CUDA driver answered: its CUresult, by number and name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name} ({code})")]
pub struct CudaError {
    /// The number.
    pub code: u32,
    /// Its name, such as `CUDA_ERROR_OUT_OF_MEMORY`.
    pub name: String,
}

fn targets(targets: &[Target]) -> String {
    targets.iter().map(Target::to_string).collect::<Vec<_>>().join(", ")
}

fn join(dtypes: &[DType]) -> String {
    dtypes.iter().map(|dtype| dtype.name()).collect::<Vec<_>>().join(", ")
}
