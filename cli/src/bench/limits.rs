//! What this GPU can do at best, to judge the suites by: copying memory, and starting a kernel that does nothing.

use super::graph::{Gpu, failed};
use super::table::{significant, time};
use crate::failure::Failure;
use fused_attention::cuda::cudarc::driver::result::{launch_kernel, memcpy_dtod_async, module};
use fused_attention::cuda::cudarc::driver::{DevicePtr, sys::CUmodule};
use std::time::Duration;

/// The suite's name for `--suite`.
pub(super) const LIMITS: &str = "limits";

/// How often what is copied would fill the second-level cache; and for a driver that tells none.
const CACHES: usize = 16;
const LEAST_BYTES: usize = 1 << 20;
const COPIES: usize = 8;
const EMPTY_LAUNCHES: usize = 256;

/// For any GPU that the kernels are for; the driver compiles it.
const EMPTY: &std::ffi::CStr =
    c".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry empty(.param .align 4 .b8 unused[4])\n{\n\tret;\n}\n";

/// One limit.
pub(super) struct Limit {
    name: String,
    how: &'static str,
    median: Duration,
    /// Read and written.
    bytes: f64,
}

/// A module that is unloaded again.
struct Module(CUmodule);

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: it was loaded and not unloaded. Nothing is to be done if that fails.
        let _ = unsafe { module::unload(self.0) };
    }
}

/// Measures them on the first GPU.
pub(super) fn limits(at_least: Duration) -> Result<Vec<Limit>, Failure> {
    let gpu = Gpu::first()?;
    let stream = gpu.stream.cu_stream();

    let bytes = (CACHES * gpu.cache_bytes()).max(LEAST_BYTES);
    let from = gpu.stream.clone_htod(&vec![1u8; bytes]).map_err(failed)?;
    let to = gpu.stream.alloc_zeros::<u8>(bytes).map_err(failed)?;
    let (source, target) = (from.device_ptr(&gpu.stream).0, to.device_ptr(&gpu.stream).0);
    // SAFETY: both buffers are of this size and live until the stream has been waited for.
    let copy = || unsafe { memcpy_dtod_async(target, source, bytes, stream) }.map_err(failed);
    copy()?;
    let median = gpu.median(COPIES, at_least, || (0..COPIES).try_for_each(|_| copy()))?;
    let mut copied = vec![0u8; bytes];
    gpu.stream.memcpy_dtoh(&to, &mut copied).map_err(failed)?;
    gpu.stream.synchronize().map_err(failed)?;
    if copied.iter().any(|&byte| byte != 1) {
        return Err(Failure::Refused(vec!["a copy on the device is not what was copied".to_string()]));
    }
    let mib = bytes >> 20;
    let copy = Limit { name: format!("copy {mib} MiB"), how: "cuMemcpyDtoDAsync", median, bytes: 2.0 * bytes as f64 };

    // SAFETY: a whole PTX file that ends with a zero; the stream's context is this thread's.
    let module = Module(unsafe { module::load_data(EMPTY.as_ptr().cast()) }.map_err(failed)?);
    // SAFETY: the module is loaded.
    let empty = unsafe { module::get_function(module.0, c"empty".to_owned()) }.map_err(failed)?;
    let launch = || {
        let mut unused = 0u32;
        let mut parameters = [std::ptr::from_mut(&mut unused).cast()];
        // SAFETY: the kernel takes these parameters and touches no memory; its module outlives the wait for the stream.
        unsafe { launch_kernel(empty, (1, 1, 1), (32, 1, 1), 0, stream, &mut parameters) }.map_err(failed)
    };
    launch()?;
    let median = gpu.median(EMPTY_LAUNCHES, at_least, || (0..EMPTY_LAUNCHES).try_for_each(|_| launch()))?;
    let empty = Limit { name: "empty kernel in a graph".to_string(), how: "empty", median, bytes: 0.0 };
    Ok(vec![copy, empty])
}

impl Limit {
    fn microseconds(&self) -> f64 {
        self.median.as_secs_f64() * 1e6
    }

    fn gbytes_per_s(&self) -> Option<f64> {
        (self.bytes > 0.0).then(|| self.bytes / self.microseconds() / 1e3)
    }

    pub(super) fn line(&self) -> String {
        let rate = self.gbytes_per_s().map_or(String::new(), |rate| format!("  {} GB/s", significant(rate)));
        format!("limits  {:24}  {}{rate}\n", self.name, time(self.microseconds()))
    }

    /// With the fields of a suite's row, as far as they mean something.
    pub(super) fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "suite": LIMITS,
            "case": self.name,
            "engine": "cuda",
            "kernel": self.how,
            "median_us": self.microseconds(),
            "gbytes_per_s": self.gbytes_per_s(),
        })
    }
}
