//! Times launches of a case on a GPU, with the second-level cache cold or warm. What they compute is checked first.

use super::check;
use super::graph::{Gpu, failed};
use super::suites::Case;
use crate::array::Array;
use crate::failure::Failure;
use clap::ValueEnum;
use fused_attention::cuda::RawTensor;
use fused_attention::cuda::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DriverError};
use fused_attention::{Attention, DType, Engine, Plan, Tensor, TensorDesc};
use std::sync::Arc;
use std::time::Duration;

/// What the second-level cache holds when a launch starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Cache {
    /// Nothing of it: each launch has tensors of its own, several times the cache together, before one is used again.
    Cold,
    /// All that fits: every launch has the same tensors.
    Warm,
}

impl Cache {
    pub(super) fn name(self) -> &'static str {
        match self {
            Cache::Cold => "cold",
            Cache::Warm => "warm",
        }
    }
}

/// How often the tensors between two uses of the same one would fill the cache.
const CACHES: usize = 4;
/// Copies of the tensors, at most; shapes of real models stay below.
const COPIES: usize = 2048;

/// Tensors of one launch, in a GPU's memory.
struct Copy {
    inputs: Attention<RawTensor>,
    out: RawTensor,
    out_memory: CudaSlice<u8>,
    _memory: Vec<CudaSlice<u8>>,
}

impl Copy {
    fn new(stream: &Arc<CudaStream>, inputs: &Attention<Array<'_>>, out: TensorDesc) -> Result<Self, DriverError> {
        let mut memory = Vec::new();
        let inputs = inputs.try_map(|array| {
            let bytes = stream.clone_htod(array.bytes())?;
            let address = bytes.device_ptr(stream).0;
            memory.push(bytes);
            Ok(RawTensor::new(address, array.view().desc()))
        })?;
        // Poisoned: what is not written shows.
        let elements: usize = out.shape().iter().product();
        let out_memory = stream.clone_htod(&vec![0xffu8; elements * out.dtype().size()])?;
        let out = RawTensor::new(out_memory.device_ptr(stream).0, out);
        Ok(Copy { inputs, out, out_memory, _memory: memory })
    }

    fn launch(&self, stream: &CudaStream) -> Result<Plan, Failure> {
        // SAFETY: the stream is this thread's context's; its memory is this copy's own, initialised, and given back by
        // whoever has waited for the stream.
        Ok(unsafe { self.inputs.launch_raw(0, stream.cu_stream().cast(), self.out) }?)
    }
}

/// The plan and the median time of one launch for each state of the cache.
pub(super) fn medians(
    case: &Case,
    inputs: &Attention<Array<'_>>,
    dtype: DType,
    caches: &[Cache],
    at_least: Duration,
) -> Result<(Plan, Vec<Duration>), Failure> {
    let gpu = Gpu::first()?;
    let (stream, out) = (&gpu.stream, TensorDesc::bshd(dtype, case.q_shape()));
    let mut copies = vec![Copy::new(stream, inputs, out).map_err(failed)?];
    let plan = copies[0].launch(stream)?;
    let mut written = vec![0u8; copies[0].out_memory.len()];
    stream.memcpy_dtoh(&copies[0].out_memory, &mut written).map_err(failed)?;
    stream.synchronize().map_err(failed)?;
    let written = Array::from_bytes(dtype, out.shape(), &written);
    let written = written.ok_or_else(|| Failure::bad("results are of a float type"))?;
    check::forward(case, inputs, &written, Engine::Cpu)?;

    let enough = gpu.enough(|| copies[0].launch(stream).map(drop))?;
    let bytes = inputs.tensors().map(|(_, array)| array.bytes().len()).sum::<usize>() + written.bytes().len();
    let cold = (CACHES * gpu.cache_bytes()).div_ceil(bytes).max(1);
    if cold > COPIES && caches.contains(&Cache::Cold) {
        return Err(Failure::bad(format_args!("{bytes} bytes are too few to leave the cache; ask for --cache warm")));
    }
    let mut medians = Vec::new();
    for &cache in caches {
        let wanted = if cache == Cache::Cold { cold } else { 1 };
        while copies.len() < wanted {
            copies.push(Copy::new(stream, inputs, out).map_err(failed)?);
        }
        let rounds = enough.div_ceil(wanted);
        medians.push(gpu.median(rounds * wanted, at_least, || {
            let mut launches = copies.iter().take(wanted).cycle().take(rounds * wanted);
            launches.try_for_each(|copy| copy.launch(stream).map(drop))
        })?);
    }
    Ok((plan, medians))
}
