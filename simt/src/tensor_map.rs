//! Tensor maps for `cp.async.bulk.tensor`, under the rules of `cuTensorMapEncodeTiled`.

use std::ffi::CStr;

use bytemuck::{Pod, Zeroable};

use crate::ffi;

/// How a bulk copy permutes the 16-byte chunks of shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swizzle {
    /// Not at all.
    None,
    /// By the number of the row of 128 bytes, modulo 8.
    Bytes128,
}

/// `ptx::TensorMap`: a field of a kernel's parameter block. The contents are the emulator's own, no driver takes them.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct TensorMap([u64; 16]);

impl TensorMap {
    /// A tensor of four dimensions of 16-bit elements, innermost first: the address that [`crate::Launch::input`] gave,
    /// extents in elements, strides of the outer three in bytes, the box that one copy brings. Elements outside of the
    /// tensor arrive as zeros.
    ///
    /// # Errors
    /// The rule of `cuTensorMapEncodeTiled` that is broken.
    pub fn encode(
        address: u64,
        dimensions: [u64; 4],
        strides: [u64; 3],
        boxed: [u32; 4],
        swizzle: Swizzle,
    ) -> Result<Self, String> {
        let mut map = Self::zeroed();
        let bytes = match swizzle {
            Swizzle::None => 0,
            Swizzle::Bytes128 => 128,
        };
        let to = std::ptr::from_mut(&mut map).cast();
        // SAFETY: `map` is the 128 bytes to fill, the arrays live through the call; the address is only noted.
        let broken =
            unsafe { ffi::simt_encode_tensor_map(to, address as *const _, &dimensions, &strides, &boxed, bytes) };
        if broken.is_null() {
            return Ok(map);
        }
        // SAFETY: a rule is a literal of the emulator's.
        Err(unsafe { CStr::from_ptr(broken) }.to_string_lossy().into_owned())
    }
}
