//! Times launches on a GPU: many in one CUDA graph, so that the host's part does not show, each on tensors of its own, so
//! that the cache does not hold them, between two events. What they compute is checked first.

use super::REPEATS;
use crate::array::Array;
use crate::failure::Failure;
use fused_attention::cuda::RawTensor;
use fused_attention::cuda::cudarc::driver::sys::{
    CUevent_flags as EventFlags, CUgraphInstantiate_flags as GraphFlags, CUstreamCaptureMode as Mode,
};
use fused_attention::cuda::cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DriverError};
use fused_attention::{Attention, DType, Engine, Plan, Tensor, TensorDesc};
use half::{bf16, f16};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes that the tensors of one graph take together: several times the second-level cache of any GPU.
const COLD_BYTES: usize = 256 << 20;
/// Launches of one graph, at most.
const LAUNCHES: usize = 32;
/// Queries of each head that are compared with the cpu engine.
const CHECKED: usize = 64;

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

/// The plan and the median time of one launch.
pub(super) fn median(
    inputs: &Attention<Array<'_>>,
    dtype: DType,
    shape: [usize; 4],
    at_least: Duration,
) -> Result<(Plan, Duration), Failure> {
    let context = CudaContext::new(0).map_err(failed)?;
    // SAFETY: everything here is on one stream, and waits for it before memory is given back.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().map_err(failed)?;
    let out = TensorDesc::bshd(dtype, shape);
    let bytes: usize = inputs.tensors().map(|(_, array)| array.bytes().len()).sum::<usize>()
        + shape.iter().product::<usize>() * dtype.size();
    let copies = COLD_BYTES.div_ceil(bytes.max(1)).clamp(1, LAUNCHES);
    let copies: Vec<Copy> =
        (0..copies).map(|_| Copy::new(&stream, inputs, out)).collect::<Result<_, _>>().map_err(failed)?;

    let plan = copies[0].launch(&stream)?;
    let mut written = vec![0u8; copies[0].out_memory.len()];
    stream.memcpy_dtoh(&copies[0].out_memory, &mut written).map_err(failed)?;
    stream.synchronize().map_err(failed)?;
    check(inputs, dtype, shape, &written)?;

    stream.begin_capture(Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).map_err(failed)?;
    let captured: Result<Vec<Plan>, Failure> = copies.iter().map(|copy| copy.launch(&stream)).collect();
    let graph = stream.end_capture(GraphFlags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH).map_err(failed)?;
    captured?;
    let graph = graph.ok_or_else(|| Failure::bad("the driver captured no graph"))?;
    graph.upload().map_err(failed)?;
    graph.launch().map_err(failed)?;

    let event = || context.new_event(Some(EventFlags::CU_EVENT_DEFAULT)).map_err(failed);
    let (before, after) = (event()?, event()?);
    let (start, mut times) = (Instant::now(), Vec::new());
    while times.len() < REPEATS || start.elapsed() < at_least {
        before.record(&stream).map_err(failed)?;
        graph.launch().map_err(failed)?;
        after.record(&stream).map_err(failed)?;
        let milliseconds = before.elapsed_ms(&after).map_err(failed)?;
        times.push(f64::from(milliseconds) * 1e-3 / copies.len() as f64);
    }
    stream.synchronize().map_err(failed)?;
    times.sort_unstable_by(f64::total_cmp);
    Ok((plan, Duration::from_secs_f64(times[times.len() / 2]).max(Duration::from_nanos(1))))
}

/// Compares the first queries of each head with what the cpu engine makes of them.
fn check(inputs: &Attention<Array<'_>>, dtype: DType, shape: [usize; 4], written: &[u8]) -> Result<(), Failure> {
    let [batch, seq_q, heads, dim] = shape;
    let checked = seq_q.min(CHECKED);
    let mut expected = Array::zeros(dtype, &[batch, checked, heads, dim]);
    let mut attention = inputs.map(Array::view);
    attention.q = inputs.q.leading(checked);
    for (branch, arrays) in attention.branches.iter_mut().zip(&inputs.branches) {
        branch.region = arrays.region.as_ref().map(|region| region.leading(checked));
    }
    let out = expected.view_mut().ok_or_else(|| Failure::bad("results are of a float type"))?;
    attention.forward(Engine::Cpu, out)?;

    let widen = |bytes: &[u8]| -> Vec<f32> {
        match dtype {
            DType::F16 => bytemuck::pod_collect_to_vec::<u8, f16>(bytes).iter().map(|x| x.to_f32()).collect(),
            DType::BF16 => bytemuck::pod_collect_to_vec::<u8, bf16>(bytes).iter().map(|x| x.to_f32()).collect(),
            _ => bytemuck::pod_collect_to_vec(bytes),
        }
    };
    let row = heads * dim * dtype.size();
    let first = written.chunks(seq_q * row).flat_map(|entry| &entry[..checked * row]).copied().collect::<Vec<u8>>();
    let (got, expected) = (widen(&first), widen(expected.bytes()));
    let square = |x: f32| f64::from(x) * f64::from(x);
    let error: f64 = got.iter().zip(&expected).map(|(got, want)| square(got - want)).sum();
    let norm: f64 = expected.iter().map(|&want| square(want)).sum();
    let relative = (error / norm).sqrt();
    // Two roundings of a result, and that of P for the second product.
    let most = if dtype == DType::BF16 { 1.6e-2 } else { 2e-3 };
    if relative <= most || norm == 0.0 && error == 0.0 {
        return Ok(());
    }
    Err(Failure::bad(format_args!(
        "the kernel's results are off by {relative:.1e} of the cpu engine's; at most {most:.1e}"
    )))
}

fn failed(error: DriverError) -> Failure {
    Failure::Refused(vec![format!("the CUDA driver answered {:?}", error.0)])
}
