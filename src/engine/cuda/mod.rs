//! The CUDA engine: so far the driver and its devices, found at run time.

#[cfg(feature = "cuda")]
mod driver;

use crate::plan::{CudaDevice, Reason};

/// The GPUs that the driver reports.
///
/// # Errors
/// Why there are none: this build has no CUDA engine, no driver library, a driver that fails, or no GPU.
#[cfg(feature = "cuda")]
pub fn devices() -> Result<Vec<CudaDevice>, Reason> {
    driver::devices()
}

/// The GPUs that the driver reports.
///
/// # Errors
/// This build has no CUDA engine.
#[cfg(not(feature = "cuda"))]
pub fn devices() -> Result<Vec<CudaDevice>, Reason> {
    Err(Reason::NotBuilt("built without the `cuda` feature; enable it"))
}
