//! Tensors of host memory on the first GPU: copied there, computed, copied back.

use super::{failed, raw::RawTensor};
use crate::error::Error;
use crate::plan::{Engine, Plan};
use crate::problem::{
    Attention, Backward, Gradient, Gradients, Outputs, Problem, Saved, Tensor, TensorDesc, TensorMut, TensorRef,
};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DriverError};
use std::sync::Arc;

/// Runs a request whose slices are known to be long enough, on a GPU that is known to be there.
pub(crate) fn forward(
    attention: &Attention<TensorRef<'_>>,
    mut out: TensorMut<'_>,
    mut lse: Option<TensorMut<'_>>,
) -> Result<Plan, Error> {
    let context = CudaContext::new(0).map_err(failed("cuDevicePrimaryCtxRetain"))?;
    let stream = context.default_stream();
    let inputs = attention.try_map(|tensor| Copy::of(&stream, *tensor))?;
    // Outputs too: what lies between their elements stays as it is, and a sum starts from what they hold.
    let out_copy = Copy::of(&stream, out.as_ref())?;
    let lse_copy = lse.as_ref().map(|lse| Copy::of(&stream, lse.as_ref())).transpose()?;

    let outputs = Outputs { out: out_copy.tensor, lse: lse_copy.as_ref().map(|copy| copy.tensor) };
    // SAFETY: the stream is this context's, which is current. The copies are nobody else's, initialised, and alive until
    // the end of this function, which waits for the stream.
    let plan = unsafe { inputs.map(|copy| copy.tensor).launch_raw(0, stream.cu_stream().cast(), outputs) }?;

    // What the kernel did wrong is told to whoever waits for it.
    let fault = |error: DriverError| Error::Fault { kernel: plan.symbol(), message: format!("{:?}", error.0) };
    stream.synchronize().map_err(fault)?;
    out_copy.back(&stream, &mut out).map_err(failed("cuMemcpyDtoHAsync"))?;
    if let (Some(copy), Some(lse)) = (&lse_copy, &mut lse) {
        copy.back(&stream, lse).map_err(failed("cuMemcpyDtoHAsync"))?;
    }
    stream.synchronize().map_err(failed("cuStreamSynchronize"))?;
    Ok(plan)
}

/// The same for a backward. The workspace is allocated here.
pub(crate) fn backward(
    attention: &Attention<TensorRef<'_>>,
    problem: &Problem,
    backward: &Backward<TensorRef<'_>>,
    gradients: Vec<(Gradient, TensorMut<'_>)>,
) -> Result<Plan, Error> {
    let plan = crate::engine::plan(Engine::Cuda, problem)?;
    let context = CudaContext::new(0).map_err(failed("cuDevicePrimaryCtxRetain"))?;
    let stream = context.default_stream();
    let inputs = attention.try_map(|tensor| Copy::of(&stream, *tensor))?;
    let dout = Copy::of(&stream, backward.dout)?;
    let saved = backward
        .saved
        .as_ref()
        .map(|saved| Ok::<_, Error>(Saved { out: Copy::of(&stream, saved.out)?, lse: Copy::of(&stream, saved.lse)? }));
    let saved = saved.transpose()?;
    let copies = gradients.iter().map(|(_, tensor)| Copy::of(&stream, tensor.as_ref()));
    let copies = copies.collect::<Result<Vec<Copy>, Error>>()?;
    // SAFETY: bytes are valid whatever they are; the launches write before they read.
    let workspace = unsafe { stream.alloc::<u8>(plan.workspace_bytes().max(1)) }.map_err(failed("cuMemAllocAsync"))?;
    let (address, _on_one_stream) = workspace.device_ptr(&stream);

    let saved = saved.as_ref().map(|saved| Saved { out: saved.out.tensor, lse: saved.lse.tensor });
    let given = Backward { dout: dout.tensor, saved };
    let wanted = gradients.iter().zip(&copies).map(|((gradient, _), copy)| (*gradient, copy.tensor));
    let wanted = Gradients { wanted: wanted.collect() };
    let room = (address, workspace.len());
    // SAFETY: as in `forward`.
    let plan = unsafe {
        inputs.map(|copy| copy.tensor).launch_backward_raw(0, stream.cu_stream().cast(), given, &wanted, room)
    }?;
    drop(_on_one_stream);
    let fault = |error: DriverError| Error::Fault { kernel: plan.symbol(), message: format!("{:?}", error.0) };
    stream.synchronize().map_err(fault)?;
    for ((_, mut tensor), copy) in gradients.into_iter().zip(&copies) {
        copy.back(&stream, &mut tensor).map_err(failed("cuMemcpyDtoHAsync"))?;
    }
    stream.synchronize().map_err(failed("cuStreamSynchronize"))?;
    Ok(plan)
}

/// Device memory that holds what a host tensor's slice holds.
struct Copy {
    bytes: CudaSlice<u8>,
    tensor: RawTensor,
}

impl Copy {
    fn of(stream: &Arc<CudaStream>, tensor: TensorRef<'_>) -> Result<Self, Error> {
        // The driver allocates nothing of size 0.
        let source = if tensor.bytes.is_empty() { &[0] } else { tensor.bytes };
        let bytes = stream.clone_htod(source).map_err(failed("cuMemAllocAsync and cuMemcpyHtoDAsync"))?;
        let (buffer, _on_one_stream) = bytes.device_ptr(stream);
        let desc: TensorDesc = tensor.desc();
        let tensor = RawTensor { buffer, bytes: tensor.bytes.len(), ordinal: 0, offset: tensor.offset, desc };
        drop(_on_one_stream);
        Ok(Copy { bytes, tensor })
    }

    fn back(&self, stream: &Arc<CudaStream>, tensor: &mut TensorMut<'_>) -> Result<(), DriverError> {
        if tensor.bytes.is_empty() {
            return Ok(());
        }
        stream.memcpy_dtoh(&self.bytes, tensor.bytes)
    }
}
