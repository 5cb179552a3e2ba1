//! A case's tensors in a GPU's memory.

use crate::cases::{Buffer, Data, HostTensor};
use fused_attention::cuda::cudarc::driver::{CudaSlice, CudaStream, DeviceRepr, DriverError};
use fused_attention::cuda::{CudaTensor, CudaTensorMut};
use fused_attention::{Attention, Backward, Engine, Error, Gradient, Gradients, Outputs, Plan, Problem, Saved};
use half::{bf16, f16};
use std::sync::Arc;

enum Memory {
    F16(CudaSlice<f16>),
    BF16(CudaSlice<bf16>),
    F32(CudaSlice<f32>),
    Bool(CudaSlice<bool>),
    U32(CudaSlice<u32>),
}

/// A tensor's whole buffer on a device, poison between its rows included.
pub struct OnDevice {
    memory: Memory,
    host: HostTensor,
}

impl OnDevice {
    pub fn new(stream: &Arc<CudaStream>, host: &HostTensor) -> Result<Self, DriverError> {
        // The driver allocates nothing of size 0.
        fn upload<T: Copy + Default + DeviceRepr>(
            stream: &Arc<CudaStream>,
            data: &[T],
        ) -> Result<CudaSlice<T>, DriverError> {
            if data.is_empty() { stream.clone_htod(&[T::default()]) } else { stream.clone_htod(data) }
        }
        let memory = match &host.buffer {
            Buffer::F16(data) => Memory::F16(upload(stream, data)?),
            Buffer::BF16(data) => Memory::BF16(upload(stream, data)?),
            Buffer::F32(data) => Memory::F32(upload(stream, data)?),
            Buffer::Bool(data) => Memory::Bool(upload(stream, data)?),
            Buffer::U32(data) => Memory::U32(upload(stream, data)?),
        };
        Ok(OnDevice { memory, host: host.clone() })
    }

    pub fn tensor(&self) -> CudaTensor<'_> {
        let HostTensor { offset, shape, strides, .. } = &self.host;
        let tensor = match &self.memory {
            Memory::F16(data) => CudaTensor::from_slices(data, *offset, shape, strides),
            Memory::BF16(data) => CudaTensor::from_slices(data, *offset, shape, strides),
            Memory::F32(data) => CudaTensor::from_slices(data, *offset, shape, strides),
            Memory::Bool(data) => CudaTensor::from_slices(data, *offset, shape, strides),
            Memory::U32(data) => CudaTensor::from_slices(data, *offset, shape, strides),
        };
        tensor.expect("at most four dimensions")
    }

    pub fn tensor_mut(&mut self) -> CudaTensorMut<'_> {
        let HostTensor { offset, shape, strides, .. } = &self.host;
        let tensor = match &mut self.memory {
            Memory::F16(data) => CudaTensorMut::from_slices(data, *offset, shape, strides),
            Memory::BF16(data) => CudaTensorMut::from_slices(data, *offset, shape, strides),
            Memory::F32(data) => CudaTensorMut::from_slices(data, *offset, shape, strides),
            Memory::Bool(_) | Memory::U32(_) => unreachable!("outputs are floats"),
        };
        tensor.expect("at most four dimensions")
    }

    /// Waits for what writes it and copies it back.
    pub fn read(&self, stream: &Arc<CudaStream>) -> Result<HostTensor, DriverError> {
        let mut host = self.host.clone();
        match (&self.memory, &mut host.buffer) {
            (_, Buffer::F16(to)) if to.is_empty() => {}
            (Memory::F16(from), Buffer::F16(to)) => stream.memcpy_dtoh(from, to)?,
            (Memory::BF16(from), Buffer::BF16(to)) if !to.is_empty() => stream.memcpy_dtoh(from, to)?,
            (Memory::F32(from), Buffer::F32(to)) if !to.is_empty() => stream.memcpy_dtoh(from, to)?,
            _ => {}
        }
        stream.synchronize()?;
        Ok(host)
    }
}

/// A request in device memory, with poisoned outputs.
pub struct Request {
    pub inputs: Attention<OnDevice>,
    pub out: OnDevice,
    pub lse: OnDevice,
}

impl Request {
    /// Copies the tensors on a stream.
    pub fn new(stream: &Arc<CudaStream>, data: &Data) -> Result<Self, DriverError> {
        let (out, lse) = data.outputs();
        let inputs = data.request(|tensor| tensor);
        Ok(Request {
            inputs: inputs.try_map(|tensor| OnDevice::new(stream, tensor))?,
            out: OnDevice::new(stream, &out)?,
            lse: OnDevice::new(stream, &lse)?,
        })
    }

    pub fn launch(&mut self, stream: &Arc<CudaStream>) -> Result<Plan, Error> {
        let inputs = self.inputs.map(OnDevice::tensor);
        inputs.launch(stream, Outputs::new(self.out.tensor_mut()).lse(self.lse.tensor_mut()))
    }

    /// `out` and `lse`, after checking that nothing beside them was written.
    pub fn results(&self, stream: &Arc<CudaStream>) -> Result<(Vec<f32>, Vec<f32>), DriverError> {
        let (out, lse) = (self.out.read(stream)?, self.lse.read(stream)?);
        assert!(out.gaps_untouched() && lse.gaps_untouched(), "written beside an output");
        Ok((out.values(), lse.values()))
    }
}

/// A backward in device memory: poisoned gradients, and a workspace of NaN that is as large as the plan says.
pub struct BackwardRequest {
    inputs: Attention<OnDevice>,
    given: Backward<OnDevice>,
    gradients: Vec<(Gradient, OnDevice)>,
    pub workspace: CudaSlice<u8>,
}

impl BackwardRequest {
    /// Copies the tensors on a stream of the first GPU.
    pub fn new(
        stream: &Arc<CudaStream>,
        data: &Data,
        saved: Option<&Saved<HostTensor>>,
        gradients: Vec<(Gradient, HostTensor)>,
    ) -> Result<Self, Error> {
        let given = Backward { dout: &data.dout, saved: saved.map(|Saved { out, lse }| Saved { out, lse }) };
        let wanted = gradients.iter().map(|(gradient, tensor)| (*gradient, tensor.view())).collect();
        let problem = Problem::backward(&data.attention(), &given.map(|tensor| tensor.view()), &Gradients { wanted })?;
        let bytes = fused_attention::plan(Engine::Cuda, &problem)?.workspace_bytes();

        let failed = |error: DriverError| Error::Fault { kernel: "upload".to_string(), message: error.to_string() };
        let upload = |tensor: &HostTensor| OnDevice::new(stream, tensor).map_err(failed);
        let saved = given.saved.map(|saved| Ok::<_, Error>(Saved { out: upload(saved.out)?, lse: upload(saved.lse)? }));
        let gradients = gradients.iter().map(|(gradient, tensor)| Ok((*gradient, upload(tensor)?)));
        Ok(BackwardRequest {
            inputs: data.request(|tensor| tensor).try_map(|tensor| upload(tensor))?,
            given: Backward { dout: upload(given.dout)?, saved: saved.transpose()? },
            gradients: gradients.collect::<Result<_, Error>>()?,
            workspace: stream.clone_htod(&vec![0xffu8; bytes.max(1)]).map_err(failed)?,
        })
    }

    pub fn launch(&mut self, stream: &CudaStream) -> Result<Plan, Error> {
        let inputs = self.inputs.map(OnDevice::tensor);
        let given = self.given.map(OnDevice::tensor);
        let wanted = self.gradients.iter_mut().map(|(gradient, tensor)| (*gradient, tensor.tensor_mut())).collect();
        inputs.launch_backward(stream, given, Gradients { wanted }, &mut self.workspace)
    }

    /// What a counter counts during the call alone, all tensors being at hand.
    pub fn count_during_launch(&mut self, stream: &CudaStream, counter: impl Fn() -> u64) -> u64 {
        let inputs = self.inputs.map(OnDevice::tensor);
        let given = self.given.map(OnDevice::tensor);
        let wanted = self.gradients.iter_mut().map(|(gradient, tensor)| (*gradient, tensor.tensor_mut())).collect();
        let (gradients, before) = (Gradients { wanted }, counter());
        inputs.launch_backward(stream, given, gradients, &mut self.workspace).expect("a launch");
        counter() - before
    }

    /// The gradients, after checking that nothing beside them was written.
    pub fn results(&self, stream: &Arc<CudaStream>) -> Result<Vec<(Gradient, HostTensor)>, DriverError> {
        let read = |(gradient, tensor): &(Gradient, OnDevice)| {
            let tensor = tensor.read(stream)?;
            assert!(tensor.gaps_untouched(), "written beside {gradient:?}");
            Ok((*gradient, tensor))
        };
        self.gradients.iter().map(read).collect()
    }
}
