//! The kernels of this build, loaded when first used: once for all contexts of a process, from any thread.

use super::driver::{Driver, Kernel, LoadedImage};
use crate::plan::{CudaDevice, Instance, Reason, Target};
use std::collections::HashMap;
use std::ffi::CString;
use std::sync::{LazyLock, PoisonError, RwLock};

/// One row of the table in one form, as the build embedded it.
struct Image {
    symbol: &'static str,
    target: Target,
    /// Raw deflate.
    deflated: &'static [u8],
}

static IMAGES: &[Image] = include!(concat!(env!("OUT_DIR"), "/images.rs"));

#[derive(Default)]
struct Loaded {
    /// By their place in the list of images.
    images: HashMap<usize, LoadedImage>,
    /// By row of the table and ordinal of the device.
    kernels: HashMap<(*const Instance, usize), Kernel>,
}

// SAFETY: the pointers are those of a static table and are only compared.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

/// The kernel of a row on a device. Only the first call for each loads anything.
pub(super) fn kernel(driver: &Driver, row: &'static Instance, device: &CudaDevice) -> Result<Kernel, Reason> {
    static LOADED: LazyLock<RwLock<Loaded>> = LazyLock::new(RwLock::default);
    let key = (std::ptr::from_ref(row), device.ordinal);
    // Nothing is left half done by a panic in between: a poisoned lock is as good as new.
    if let Some(kernel) = LOADED.read().unwrap_or_else(PoisonError::into_inner).kernels.get(&key) {
        return Ok(*kernel);
    }
    let mut loaded = LOADED.write().unwrap_or_else(PoisonError::into_inner);
    if let Some(kernel) = loaded.kernels.get(&key) {
        return Ok(*kernel);
    }
    let symbol = row.symbol();
    let of_row = || IMAGES.iter().enumerate().filter(|(_, image)| image.symbol == symbol);
    let best = Target::best(of_row().map(|(_, image)| &image.target), device.compute_capability);
    let Some((at, image)) = best.and_then(|best| of_row().find(|(_, image)| image.target == *best)) else {
        return Err(Reason::NotBuilt("the kernel is not part of this build"));
    };
    let library = match loaded.images.get(&at) {
        Some(library) => *library,
        None => {
            let library = driver.load(&image.inflate()?)?;
            loaded.images.insert(at, library);
            library
        }
    };
    let name = CString::new(symbol).map_err(|_| Reason::NotBuilt("the kernel's name is no C string"))?;
    let kernel = driver.kernel(library, &name, device.shared_memory_per_block, device.ordinal)?;
    loaded.kernels.insert(key, kernel);
    Ok(kernel)
}

/// Symbol and text of what was compiled for one GPU alone: PTX that no driver is given.
#[cfg(feature = "emulated")]
static SPECIFIC_PTX: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/specific_ptx.rs"));

/// The text of a row's PTX, if this build has it.
#[cfg(feature = "emulated")]
pub(crate) fn ptx(symbol: &str) -> Option<String> {
    let mut of_row = IMAGES.iter().filter(|image| image.symbol == symbol);
    let Some(image) = of_row.find(|image| image.target.form == crate::plan::Form::Ptx) else {
        return SPECIFIC_PTX.iter().find(|(name, _)| *name == symbol).map(|(_, text)| text.to_string());
    };
    let mut bytes = miniz_oxide::inflate::decompress_to_vec(image.deflated).ok()?;
    // For the driver the text ends with a zero byte.
    bytes.pop();
    String::from_utf8(bytes).ok()
}

impl Image {
    /// The bytes, aligned for the driver.
    fn inflate(&self) -> Result<Vec<u128>, Reason> {
        const DAMAGED: Reason = Reason::NotBuilt("the kernel's image is damaged; build again");
        let bytes = miniz_oxide::inflate::decompress_to_vec(self.deflated).map_err(|_| DAMAGED)?;
        let mut words = vec![0u128; bytes.len().div_ceil(size_of::<u128>())];
        bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(&bytes);
        Ok(words)
    }
}
