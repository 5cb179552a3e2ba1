//! The CUDA engine: the kernels of kernels/, compiled by build.rs, launched on streams of an NVIDIA GPU.
//!
//! [`CudaTensor`] is a tensor in a buffer of cudarc's; `Attention<CudaTensor>` has [`launch`](crate::Attention::launch).
//! Below it, [`RawTensor`] is an address, and [`launch_raw`](crate::Attention::launch_raw) takes a `CUstream` of any
//! framework. Host tensors are copied to the first GPU and back ([`Attention::forward`](crate::Attention::forward)).

mod backward;
mod bind;
mod driver;
mod host_copy;
mod kernels;
mod launch;
mod raw;
mod tensor;

use crate::error::Error;
use crate::plan::CudaError;
pub use cudarc;
use cudarc::driver::DriverError;
pub(crate) use host_copy::{backward, forward};
#[cfg(feature = "emulated")]
pub(crate) use kernels::ptx;
use launch::ready;
pub(crate) use launch::supported;
pub use launch::{devices, driver_version, toolkit};
pub use raw::RawTensor;
pub use tensor::{CudaElement, CudaFloat, CudaTensor, CudaTensorMut};

/// An error of cudarc's. Its own texts ask the driver; the number's name does not.
fn failed(call: &'static str) -> impl Fn(DriverError) -> Error {
    move |error| Error::Driver { call, error: CudaError { code: error.0 as u32, name: format!("{:?}", error.0) } }
}
