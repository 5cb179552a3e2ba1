//! emulator/c_abi.h in Rust.

use std::ffi::{c_char, c_void};

#[repr(C)]
pub struct Buffer {
    pub data: *mut c_void,
    pub bytes: usize,
    pub writable: u8,
    pub name: *const c_char,
}

#[repr(C)]
pub struct Launch {
    pub entry: unsafe extern "C" fn(*const c_void),
    pub program: *const c_void,
    pub params: *const c_void,
    pub params_bytes: usize,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub shared_bytes: u32,
    pub workers: u32,
    pub seed: u64,
    pub registers: u32,
    pub checks: u8,
    pub buffers: *const Buffer,
    pub buffer_count: usize,
    pub dropped: *const u32,
    pub dropped_count: usize,
}

#[repr(C)]
pub struct Site {
    pub pc: u32,
    pub what: *const c_char,
    pub executed: u64,
}

/// `SimtResult`, known only by address.
#[repr(C)]
pub struct Outcome {
    _opaque: [u8; 0],
}

unsafe extern "C" {
    pub fn simt_run(launch: *const Launch) -> *mut Outcome;
    pub fn simt_result_fault(result: *const Outcome, message: *mut *const c_char) -> i32;
    pub fn simt_result_stats(result: *const Outcome) -> *const crate::Stats;
    pub fn simt_result_buffers(result: *const Outcome, count: *mut usize) -> *const crate::BufferStats;
    pub fn simt_result_sites(result: *const Outcome, count: *mut usize) -> *const Site;
    pub fn simt_result_free(result: *mut Outcome);
    pub fn simt_encode_tensor_map(
        map: *mut c_void,
        base: *const c_void,
        dimensions: *const [u64; 4],
        strides: *const [u64; 3],
        boxed: *const [u32; 4],
        swizzle_bytes: u32,
    ) -> *const c_char;
    pub fn simt_locations(pcs: *const u32, count: usize) -> *mut c_char;
    pub fn simt_text_free(text: *mut c_char);
    pub fn simt_ptx_parse(text: *const c_char, kernel: *const c_char, error: *mut *mut c_char) -> *const c_void;
    pub fn simt_ptx_param_bytes(program: *const c_void) -> usize;
    pub fn simt_ptx_free(program: *const c_void);
}
