//! A case's tensors in a GPU's memory.

use crate::cases::{Buffer, Data, HostTensor};
use fused_attention::cuda::cudarc::driver::{CudaSlice, CudaStream, DeviceRepr, DriverError};
use fused_attention::cuda::{CudaTensor, CudaTensorMut};
use fused_attention::{Attention, Error, Outputs, Plan};
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
