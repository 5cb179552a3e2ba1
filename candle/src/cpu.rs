//! The cpu engine on candle's storage.

use crate::operand::{self, Memory, Operand};
use candle_core::{CpuStorage, Device, Error, Result, Tensor};
use fused_attention::{Attention, Backward, DType, Engine, Gradient, Gradients, Outputs, Tensor as _, TensorMut};
use half::{bf16, f16};

/// `out` and, if wanted, the lse of each branch, dense.
pub(crate) struct Forward {
    pub(crate) out: CpuStorage,
    pub(crate) lse: Option<CpuStorage>,
}

/// Does the same with the Rust type of a float of the core.
macro_rules! with_float {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            DType::F16 => {
                type $t = f16;
                $body
            }
            DType::BF16 => {
                type $t = bf16;
                $body
            }
            // Of any other type the core says that it is none of the three.
            _ => {
                type $t = f32;
                $body
            }
        }
    };
}

pub(crate) fn forward(memory: &Attention<Memory<'_>>, with_lse: bool) -> Result<Forward> {
    let shape = operand::out_shape(memory);
    let tensors = operand::views(memory, Memory::host)?;
    with_float!(tensors.q.desc().dtype(), T => {
        let mut out = zeros::<T>(&shape)?;
        let lse_shape = lse_shape(&tensors, shape);
        let mut lse = if with_lse { zeros::<f32>(&lse_shape)? } else { Vec::new() };
        let mut outputs = Outputs::new(TensorMut::bshd(&mut out, shape));
        if with_lse {
            outputs = outputs.lse(TensorMut::contiguous(&mut lse, lse_shape));
        }
        tensors.forward(Engine::Cpu, outputs).map_err(Error::wrap)?;
        Ok(Forward { out: T::into_storage(out), lse: with_lse.then_some(CpuStorage::F32(lse)) })
    })
}

/// `[branches, batch, heads, seq_q]`
pub(crate) fn lse_shape<T>(request: &Attention<T>, [batch, seq_q, heads, _]: [usize; 4]) -> [usize; 4] {
    [request.branches.len(), batch, heads, seq_q]
}

/// The wanted gradients, each of its input's shape and type.
pub(crate) fn backward(
    request: &Attention<Operand>,
    dout: &Tensor,
    saved: Option<(&Tensor, &Tensor)>,
    wanted: &[(Gradient, &Tensor)],
) -> Result<Vec<Tensor>> {
    let memory = request.map(Operand::lock);
    let tensors = operand::views(&memory, Memory::host)?;
    let dout = Operand::from(dout);
    let saved = saved.map(|(out, lse)| (Operand::from(out), Operand::from(lse)));
    let (dout, saved) = (dout.lock(), saved.as_ref().map(|(out, lse)| (out.lock(), lse.lock())));
    let named = |name: &'static str| move |fault| Error::msg(format!("{name} {fault}"));
    let mut backward = Backward::new(dout.host().map_err(named("dout"))?);
    if let Some((out, lse)) = &saved {
        backward = backward.saved(out.host().map_err(named("out"))?, lse.host().map_err(named("lse"))?);
    }

    let dtype = tensors.q.desc().dtype();
    let mut buffers = Vec::with_capacity(wanted.len());
    for &(gradient, tensor) in wanted {
        buffers.push(Buffer::zeros(gradient_dtype(gradient, dtype), tensor.dims())?);
    }
    let mut gradients = Gradients::new();
    for (buffer, &(gradient, tensor)) in buffers.iter_mut().zip(wanted) {
        gradients = gradients.want(gradient, buffer.tensor(tensor.dims())?);
    }
    tensors.backward(Engine::Cpu, backward, gradients).map_err(Error::wrap)?;
    buffers
        .into_iter()
        .zip(wanted)
        .map(|(buffer, (_, tensor))| buffer.into_tensor(tensor.dims())?.to_dtype(tensor.dtype()))
        .collect()
}

/// The type that a gradient is asked for in: q's for rows, f32 for everything else.
pub(crate) fn gradient_dtype(gradient: Gradient, rows: DType) -> DType {
    match gradient {
        Gradient::Q | Gradient::K(_) | Gradient::V(_) => rows,
        Gradient::Bias(_) | Gradient::Gate(_) | Gradient::Region(_) => DType::F32,
    }
}

/// Dense memory for a result of some float type.
enum Buffer {
    F16(Vec<f16>),
    BF16(Vec<bf16>),
    F32(Vec<f32>),
}

impl Buffer {
    fn zeros(dtype: DType, shape: &[usize]) -> Result<Self> {
        Ok(match dtype {
            DType::F16 => Buffer::F16(zeros(shape)?),
            DType::BF16 => Buffer::BF16(zeros(shape)?),
            _ => Buffer::F32(zeros(shape)?),
        })
    }

    fn tensor(&mut self, shape: &[usize]) -> Result<TensorMut<'_>> {
        let mut strides = vec![1isize; shape.len()];
        for dim in (1..shape.len()).rev() {
            strides[dim - 1] = strides[dim] * shape[dim] as isize;
        }
        let view = match self {
            Buffer::F16(data) => TensorMut::from_slices(data, 0, shape, &strides),
            Buffer::BF16(data) => TensorMut::from_slices(data, 0, shape, &strides),
            Buffer::F32(data) => TensorMut::from_slices(data, 0, shape, &strides),
        };
        view.ok_or_else(|| Error::msg(operand::rank_fault(shape.len())))
    }

    fn into_tensor(self, shape: &[usize]) -> Result<Tensor> {
        match self {
            Buffer::F16(data) => Tensor::from_vec(data, shape, &Device::Cpu),
            Buffer::BF16(data) => Tensor::from_vec(data, shape, &Device::Cpu),
            Buffer::F32(data) => Tensor::from_vec(data, shape, &Device::Cpu),
        }
    }
}

trait IntoStorage: Sized {
    fn into_storage(data: Vec<Self>) -> CpuStorage;
}

macro_rules! into_storage {
    ($($ty:ty => $variant:ident),*) => {$(
        impl IntoStorage for $ty {
            fn into_storage(data: Vec<Self>) -> CpuStorage {
                CpuStorage::$variant(data)
            }
        }
    )*};
}
into_storage!(f16 => F16, bf16 => BF16, f32 => F32);

/// Zeroed memory, or an error where there is not enough.
fn zeros<T: Clone + Default>(shape: &[usize]) -> Result<Vec<T>> {
    let elements = shape.iter().try_fold(1usize, |product, &extent| product.checked_mul(extent));
    let too_large = || Error::msg(format!("a result of shape {shape:?} does not fit in memory"));
    let elements = elements.ok_or_else(too_large)?;
    let mut data = Vec::new();
    data.try_reserve_exact(elements).map_err(|_| too_large())?;
    data.resize(elements, T::default());
    Ok(data)
}
