//! One call of a case with its tensors in a GPU's memory: forward, backward, or both.

use super::graph::failed;
use super::request::stored;
use super::suites::{Case, Pass};
use crate::array::{Array, desc};
use crate::failure::Failure;
use fused_attention::cuda::RawTensor;
use fused_attention::cuda::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use fused_attention::{
    Attention, Backward, DType, Engine, Gradient, Gradients, Outputs, Plan, Problem, Tensor, TensorDesc,
};
use std::sync::Arc;

/// The call's own memory; results are poisoned, so that what is not written shows.
pub(super) struct DeviceCall {
    pass: Pass,
    inputs: Attention<RawTensor>,
    outputs: Outputs<RawTensor>,
    /// Nothing where the pass is the forward alone.
    backward: Option<BackwardCall>,
    memory: Memory,
}

/// What the backward takes.
struct BackwardCall {
    given: Backward<RawTensor>,
    gradients: Gradients<RawTensor>,
    /// Address and bytes.
    workspace: (u64, usize),
}

/// Buffers on the device, which live as long as the call.
struct Memory {
    stream: Arc<CudaStream>,
    buffers: Vec<CudaSlice<u8>>,
}

impl Memory {
    fn upload(&mut self, bytes: &[u8]) -> Result<u64, Failure> {
        let buffer = self.stream.clone_htod(bytes).map_err(failed)?;
        let address = buffer.device_ptr(&self.stream).0;
        self.buffers.push(buffer);
        Ok(address)
    }

    fn array(&mut self, array: &Array<'_>) -> Result<RawTensor, Failure> {
        Ok(RawTensor::new(self.upload(array.bytes())?, array.view().desc()))
    }

    fn poisoned(&mut self, desc: TensorDesc) -> Result<RawTensor, Failure> {
        let elements: usize = desc.shape().iter().product();
        Ok(RawTensor::new(self.upload(&vec![0xffu8; elements * desc.dtype().size()])?, desc))
    }

    /// What a tensor holds now.
    fn read(&self, tensor: &RawTensor) -> Result<Array<'static>, Failure> {
        let buffer = self.buffers.iter().find(|buffer| buffer.device_ptr(&self.stream).0 == tensor.buffer);
        let buffer = buffer.ok_or_else(|| Failure::bad("a tensor of another call"))?;
        let mut bytes = vec![0u8; buffer.len()];
        self.stream.memcpy_dtoh(buffer, &mut bytes).map_err(failed)?;
        self.stream.synchronize().map_err(failed)?;
        let array = Array::from_bytes(tensor.desc.dtype(), tensor.desc.shape(), &bytes);
        Ok(array.ok_or_else(|| Failure::bad("results are of a float type"))?.into_owned())
    }
}

impl DeviceCall {
    /// Copies inputs and `dout` to the device. For a backward alone the forward has run then.
    pub(super) fn new(
        stream: &Arc<CudaStream>,
        case: &Case,
        dtype: DType,
        inputs: &Attention<Array<'_>>,
        dout: Option<&Array<'_>>,
    ) -> Result<Self, Failure> {
        let mut memory = Memory { stream: stream.clone(), buffers: Vec::new() };
        let inputs = inputs.try_map(|array| memory.array(array))?;
        let mut outputs = Outputs::new(memory.poisoned(TensorDesc::bshd(dtype, case.q_shape()))?);
        let mut backward = None;
        if let Some(dout) = dout {
            let lse = memory.poisoned(TensorDesc::contiguous(DType::F32, case.lse_shape()))?;
            outputs.lse = Some(lse);
            let given = Backward::new(memory.array(dout)?).saved(outputs.out, lse);
            let wanted = case
                .gradients()
                .into_iter()
                .map(|(gradient, shape)| Ok((gradient, memory.poisoned(desc(stored(gradient, dtype), &shape))?)));
            let gradients = Gradients { wanted: wanted.collect::<Result<_, Failure>>()? };
            let problem = Problem::backward(&inputs, &given, &gradients)?;
            let bytes = fused_attention::plan(Engine::Cuda, &problem)?.workspace_bytes();
            let workspace = (memory.upload(&vec![0xffu8; bytes.max(1)])?, bytes);
            backward = Some(BackwardCall { given, gradients, workspace });
        }
        let call = DeviceCall { pass: case.pass, inputs, outputs, backward, memory };
        if call.backward.is_some() && call.pass != Pass::TrainingStep {
            call.forward()?;
        }
        Ok(call)
    }

    /// Bytes of all its buffers.
    pub(super) fn bytes(&self) -> usize {
        self.memory.buffers.iter().map(CudaSlice::len).sum()
    }

    /// Puts the call on the stream: the plans that it carries out.
    pub(super) fn launch(&self) -> Result<Vec<Plan>, Failure> {
        let mut plans = Vec::new();
        if matches!(self.pass, Pass::Forward | Pass::TrainingStep) {
            plans.push(self.forward()?);
        }
        if let Some(BackwardCall { given, gradients, workspace }) = &self.backward {
            let stream = self.memory.stream.cu_stream().cast();
            // SAFETY: as in `forward`; the workspace is this call's own, too.
            plans.push(unsafe { self.inputs.launch_backward_raw(0, stream, given.clone(), gradients, *workspace) }?);
        }
        Ok(plans)
    }

    fn forward(&self) -> Result<Plan, Failure> {
        let stream = self.memory.stream.cu_stream().cast();
        // SAFETY: the stream is this thread's context's; the memory is this call's own, initialised, and given back by
        // whoever has waited for the stream.
        Ok(unsafe { self.inputs.launch_raw(0, stream, self.outputs.clone()) }?)
    }

    pub(super) fn out(&self) -> Result<Array<'static>, Failure> {
        self.memory.read(&self.outputs.out)
    }

    /// The gradients of a backward.
    pub(super) fn gradients(&self) -> Result<Vec<(Gradient, Array<'static>)>, Failure> {
        let wanted = self.backward.iter().flat_map(|backward| &backward.gradients.wanted);
        wanted.map(|(gradient, tensor)| Ok((*gradient, self.memory.read(tensor)?))).collect()
    }
}
