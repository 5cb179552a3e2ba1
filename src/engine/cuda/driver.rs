//! Finds the driver and reads what a plan must know of each device.
//!
//! cudarc panics when the driver library is missing, and again when one of its errors is formatted, so nothing of it is
//! touched before [`library_loads`] has answered, and errors are told by their code.

use crate::plan::{CudaDevice, Reason};
use cudarc::driver::sys::CUdevice_attribute as Attribute;
use cudarc::driver::{DriverError, result};
use std::sync::OnceLock;

const LIBRARY: &[&str] = if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so.1", "libcuda.so"] };

fn library_loads() -> bool {
    static LOADS: OnceLock<bool> = OnceLock::new();
    *LOADS.get_or_init(|| {
        LIBRARY.iter().any(|&name| {
            // SAFETY: loading the driver library runs its initialisers, which is what every CUDA program does first.
            unsafe { libloading::Library::new(name) }.is_ok()
        })
    })
}

pub(super) fn devices() -> Result<Vec<CudaDevice>, Reason> {
    if !library_loads() {
        return Err(Reason::NoDriver { searched: LIBRARY.join(", ") });
    }
    result::init().map_err(|error| failed("cuInit", error))?;
    let count = result::device::get_count().map_err(|error| failed("cuDeviceGetCount", error))?;
    if count == 0 {
        return Err(Reason::NoDevice);
    }
    (0..count).map(device).collect()
}

fn device(ordinal: i32) -> Result<CudaDevice, Reason> {
    let device = result::device::get(ordinal).map_err(|error| failed("cuDeviceGet", error))?;
    let attribute = |attribute: Attribute| -> Result<u32, Reason> {
        // SAFETY: `device` comes from cuDeviceGet.
        let value = unsafe { result::device::get_attribute(device, attribute) }
            .map_err(|error| failed("cuDeviceGetAttribute", error))?;
        Ok(u32::try_from(value).unwrap_or(0))
    };
    Ok(CudaDevice {
        ordinal: ordinal as usize,
        name: result::device::get_name(device).map_err(|error| failed("cuDeviceGetName", error))?,
        compute_capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_memory_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
    })
}

fn failed(call: &'static str, error: DriverError) -> Reason {
    Reason::Driver { call, code: error.0 as u32 }
}
