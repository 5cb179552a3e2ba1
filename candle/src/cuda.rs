//! The cuda engine on candle's storage: launched on the device's own stream, on buffers that candle allocates.

use crate::cpu::{gradient_dtype, lse_shape};
use crate::operand::{self, Memory, Operand, Storages, dtype_fault, rank_fault};
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::cuda_backend::{CudaDType, CudaStorageSlice};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, Error, Layout, Result, Storage, Tensor};
use fused_attention::cuda::{self, CudaTensor, CudaTensorMut};
use fused_attention::{
    Attention, Backward, DType, Device, Gradient, Gradients, Outputs, Plan, Problem, Tensor as _, TensorDesc,
};
use half::{bf16, f16};

/// `out` and, if wanted, the lse of each branch, dense.
pub(crate) struct Forward {
    pub(crate) out: CudaStorage,
    pub(crate) lse: Option<CudaStorage>,
}

impl Memory<'_> {
    /// The tensor as the cuda engine takes it, or what is wrong with it. Bytes are bool masks of 0 and 1.
    fn device(&self) -> std::result::Result<CudaTensor<'_>, String> {
        let operand::View { offset, shape, strides } = &self.view;
        let Storages::Cuda(storage) = self.storage() else {
            return Err("is not on the GPU; move all tensors of a call to one device".into());
        };
        let tensor = match &storage.slice {
            CudaStorageSlice::F32(data) => CudaTensor::from_slices(data, *offset, shape, strides),
            CudaStorageSlice::F16(data) => CudaTensor::from_slices(data, *offset, shape, strides),
            CudaStorageSlice::BF16(data) => CudaTensor::from_slices(data, *offset, shape, strides),
            CudaStorageSlice::U32(data) => CudaTensor::from_slices(data, *offset, shape, strides),
            CudaStorageSlice::U8(data) => match (<[usize; 4]>::try_from(&shape[..]), strides[..].try_into()) {
                (Ok(shape), Ok(strides)) => Some(CudaTensor::mask(data, *offset, shape, strides)),
                _ => return Err(format!("has {} dimensions; give a mask four", shape.len())),
            },
            _ => {
                use candle_core::backend::BackendStorage;
                return Err(dtype_fault(storage.dtype()));
            }
        };
        tensor.ok_or_else(|| rank_fault(shape.len()))
    }
}

pub(crate) fn forward(memory: &Attention<Memory<'_>>, device: &CudaDevice, with_lse: bool) -> Result<Forward> {
    let shape = operand::out_shape(memory);
    let tensors = operand::views(memory, Memory::device)?;
    let stream = device.cuda_stream();
    let lse_shape = lse_shape(&tensors, shape);
    let mut lse = if with_lse { Some(buffer::<f32>(device, &lse_shape)?) } else { None };
    let lse_tensor = lse.as_mut().map(|lse| CudaTensorMut::contiguous(lse, lse_shape));
    macro_rules! launch {
        ($t:ty) => {{
            let mut out = buffer::<$t>(device, &shape)?;
            let outputs = Outputs { out: CudaTensorMut::bshd(&mut out, shape), lse: lse_tensor };
            tensors.launch(&stream, outputs).map_err(Error::wrap)?;
            CudaStorage::wrap_cuda_slice(out, device.clone())
        }};
    }
    let out = match tensors.q.desc().dtype() {
        DType::F16 => launch!(f16),
        DType::BF16 => launch!(bf16),
        // The engine tells its reasons for any other type.
        _ => launch!(f32),
    };
    Ok(Forward { out, lse: lse.map(|lse| CudaStorage::wrap_cuda_slice(lse, device.clone())) })
}

/// Memory that a launch fills.
fn buffer<T: CudaDType + candle_core::cuda_backend::cudarc::driver::DeviceRepr>(
    device: &CudaDevice,
    shape: &[usize],
) -> Result<CudaSlice<T>> {
    let elements = shape.iter().try_fold(1usize, |product, &extent| product.checked_mul(extent));
    let elements = elements.ok_or_else(|| Error::msg(format!("a result of shape {shape:?} does not fit in memory")))?;
    // SAFETY: nobody reads it before the launch that writes every element of it; if that fails it is dropped.
    unsafe { device.alloc::<T>(elements) }
}

/// The wanted gradients, each of its input's shape and type.
pub(crate) fn backward(
    request: &Attention<Operand>,
    device: &CudaDevice,
    dout: &Tensor,
    saved: Option<(&Tensor, &Tensor)>,
    wanted: &[(Gradient, &Tensor)],
) -> Result<Vec<Tensor>> {
    let memory = request.map(Operand::lock);
    let tensors = operand::views(&memory, Memory::device)?;
    let dout = Operand::from(dout);
    let saved = saved.map(|(out, lse)| (Operand::from(out), Operand::from(lse)));
    let (dout, saved) = (dout.lock(), saved.as_ref().map(|(out, lse)| (out.lock(), lse.lock())));
    let named = |name: &'static str| move |fault| Error::msg(format!("{name} {fault}"));
    let mut backward = Backward::new(dout.device().map_err(named("dout"))?);
    if let Some((out, lse)) = &saved {
        backward = backward.saved(out.device().map_err(named("out"))?, lse.device().map_err(named("lse"))?);
    }

    let rows = tensors.q.desc().dtype();
    let mut buffers = Vec::with_capacity(wanted.len());
    let mut described = Gradients::new();
    for &(gradient, tensor) in wanted {
        let dtype = gradient_dtype(gradient, rows);
        let strides: Vec<isize> =
            Layout::contiguous(tensor.shape()).stride().iter().map(|&stride| stride as isize).collect();
        let desc = TensorDesc::from_slices(dtype, tensor.dims(), &strides);
        described = described.want(gradient, desc.ok_or_else(|| Error::msg(rank_fault(tensor.rank())))?);
        buffers.push(Buffer::new(device, dtype, tensor.dims())?);
    }
    let mut gradients = Gradients::new();
    for (buffer, (gradient, desc)) in buffers.iter_mut().zip(&described.wanted) {
        gradients = gradients.want(*gradient, buffer.tensor(desc)?);
    }

    let stream = device.cuda_stream();
    let problem = Problem::backward(&tensors, &backward, &described).map_err(Error::wrap)?;
    let ordinal = stream.context().ordinal();
    let gpu = cuda::devices().map_err(Error::wrap)?.into_iter().nth(ordinal);
    let gpu = gpu.ok_or_else(|| Error::msg(format!("the driver reports no GPU {ordinal}")))?;
    let plan = Plan::new(&problem, &Device::Cuda(gpu)).map_err(Error::wrap)?;
    let mut workspace = buffer::<u8>(device, &[plan.workspace_bytes().max(1)])?;
    tensors.launch_backward(&stream, backward, gradients, &mut workspace).map_err(Error::wrap)?;
    buffers
        .into_iter()
        .zip(wanted)
        .map(|(buffer, (_, tensor))| buffer.into_tensor(device, tensor.dims()).to_dtype(tensor.dtype()))
        .collect()
}

/// Dense memory for a result of some float type.
enum Buffer {
    F16(CudaSlice<f16>),
    BF16(CudaSlice<bf16>),
    F32(CudaSlice<f32>),
}

impl Buffer {
    fn new(device: &CudaDevice, dtype: DType, shape: &[usize]) -> Result<Self> {
        Ok(match dtype {
            DType::F16 => Buffer::F16(buffer(device, shape)?),
            DType::BF16 => Buffer::BF16(buffer(device, shape)?),
            _ => Buffer::F32(buffer(device, shape)?),
        })
    }

    fn tensor(&mut self, desc: &TensorDesc) -> Result<CudaTensorMut<'_>> {
        let (shape, strides) = (desc.shape(), desc.strides());
        let tensor = match self {
            Buffer::F16(data) => CudaTensorMut::from_slices(data, 0, shape, strides),
            Buffer::BF16(data) => CudaTensorMut::from_slices(data, 0, shape, strides),
            Buffer::F32(data) => CudaTensorMut::from_slices(data, 0, shape, strides),
        };
        tensor.ok_or_else(|| Error::msg(rank_fault(shape.len())))
    }

    fn into_tensor(self, device: &CudaDevice, shape: &[usize]) -> Tensor {
        let storage = match self {
            Buffer::F16(data) => CudaStorage::wrap_cuda_slice(data, device.clone()),
            Buffer::BF16(data) => CudaStorage::wrap_cuda_slice(data, device.clone()),
            Buffer::F32(data) => CudaStorage::wrap_cuda_slice(data, device.clone()),
        };
        Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
    }
}
