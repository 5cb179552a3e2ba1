//! A kernel as nvcc's PTX has it, to be interpreted in place of its compiled source.

use std::ffi::{CStr, CString, c_void};
use std::ptr;

use crate::ffi;

/// A kernel of a PTX module, read and ready to run: see `simt/ptx/`.
#[derive(Debug)]
pub struct Program(*const c_void);

// SAFETY: read once when it is made, and never changed.
unsafe impl Send for Program {}
// SAFETY: as above.
unsafe impl Sync for Program {}

impl Program {
    /// Reads the kernel of this name.
    ///
    /// # Errors
    /// With the line: what is wrong with the text, or what the interpreter does not know.
    pub fn parse(ptx: &str, kernel: &str) -> Result<Program, String> {
        let text = |text: &str| CString::new(text).map_err(|_| "a zero byte in the text".to_owned());
        let (ptx, kernel) = (text(ptx)?, text(kernel)?);
        let mut error = ptr::null_mut();
        // SAFETY: two C strings; `error` is set where the answer is null.
        let program = unsafe { ffi::simt_ptx_parse(ptx.as_ptr(), kernel.as_ptr(), &mut error) };
        if !program.is_null() {
            return Ok(Program(program));
        }
        // SAFETY: a C string, copied here and given back once.
        let message = unsafe { CStr::from_ptr(error) }.to_string_lossy().into_owned();
        // SAFETY: as above.
        unsafe { ffi::simt_text_free(error) };
        Err(message)
    }

    /// Bytes of the kernel's parameter block.
    pub fn param_bytes(&self) -> usize {
        // SAFETY: lives as long as this.
        unsafe { ffi::simt_ptx_param_bytes(self.0) }
    }

    pub(crate) fn as_ptr(&self) -> *const c_void {
        self.0
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made by simt_ptx_parse, and given back once; launches borrow it.
        unsafe { ffi::simt_ptx_free(self.0) };
    }
}
