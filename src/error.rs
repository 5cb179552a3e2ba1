//! The error of the public calls.

use crate::plan::{CudaError, Refusal};
use crate::problem::Invalid;

/// Why a call did nothing.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The request breaks rules of the operator: no engine could run it.
    #[error("{0}")]
    Invalid(#[from] Invalid),
    /// The request is legal, but the engine asked for does not take it.
    #[error("{0}")]
    Refused(#[from] Refusal),
    /// The CUDA driver failed a call. Nothing was launched, unless the call is one that waits for a kernel.
    #[error("the CUDA driver answered {call} with {error}")]
    Driver {
        /// What was asked of it.
        call: &'static str,
        /// What it answered.
        error: CudaError,
    },
    /// A kernel broke a rule of the device under emulation, or the device failed. Outputs may be written in part.
    #[error("kernel {kernel} failed: {message}")]
    Fault {
        /// The row of the table of instances.
        kernel: String,
        /// What happened, with source lines.
        message: String,
    },
}
