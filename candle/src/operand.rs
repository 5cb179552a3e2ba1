//! Candle's tensors as the engines see them: storage, and where in it each element is.

use candle_core::{CpuStorage, CudaStorage, DType, Device, Layout, Result, Storage, StorageRef, Tensor};
use fused_attention::{Attention, MAX_RANK, TensorRef};

/// A tensor of a request.
#[derive(Clone, Debug)]
pub(crate) struct Operand {
    pub(crate) tensor: Tensor,
    /// Where its elements are, if candle's own layout cannot say it.
    view: Option<View>,
}

/// Offset, extents and strides in elements; strides may be negative.
#[derive(Clone, Debug)]
pub(crate) struct View {
    pub(crate) offset: usize,
    pub(crate) shape: Vec<usize>,
    pub(crate) strides: Vec<isize>,
}

impl From<&Layout> for View {
    fn from(layout: &Layout) -> Self {
        // Candle keeps strides unsigned; none passes the address space.
        let strides = layout.stride().iter().map(|&stride| stride as isize).collect();
        View { offset: layout.start_offset(), shape: layout.dims().to_vec(), strides }
    }
}

impl From<&Tensor> for Operand {
    fn from(tensor: &Tensor) -> Self {
        Operand { tensor: tensor.clone(), view: None }
    }
}

impl Operand {
    /// The elements of `tensor`, which must be contiguous, under other strides. It gets no gradient.
    pub(crate) fn viewed(tensor: Tensor, view: View) -> Self {
        Operand { tensor, view: Some(view) }
    }

    /// Whether a gradient must reach it.
    pub(crate) fn is_tracked(&self) -> bool {
        self.view.is_none() && self.tensor.track_op()
    }

    /// Its memory, which nobody writes as long as the result lives.
    pub(crate) fn lock(&self) -> Memory<'_> {
        let (storage, layout) = self.tensor.storage_and_layout();
        Memory { source: Source::Locked(storage), view: self.view.clone().unwrap_or_else(|| layout.into()) }
    }
}

/// Memory of a tensor that is being read.
pub(crate) struct Memory<'a> {
    source: Source<'a>,
    pub(crate) view: View,
}

enum Source<'a> {
    Locked(StorageRef<'a>),
    Cpu(&'a CpuStorage),
    #[cfg(feature = "cuda")]
    Cuda(&'a CudaStorage),
}

/// Memory of whichever device.
pub(crate) enum Storages<'m> {
    Cpu(&'m CpuStorage),
    Cuda(#[cfg_attr(not(feature = "cuda"), expect(dead_code))] &'m CudaStorage),
    Metal,
}

impl<'a> Memory<'a> {
    pub(crate) fn cpu(storage: &'a CpuStorage, layout: &Layout) -> Self {
        Memory { source: Source::Cpu(storage), view: layout.into() }
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn cuda(storage: &'a CudaStorage, layout: &Layout) -> Self {
        Memory { source: Source::Cuda(storage), view: layout.into() }
    }

    pub(crate) fn storage(&self) -> Storages<'_> {
        match &self.source {
            Source::Locked(storage) => match &**storage {
                Storage::Cpu(storage) => Storages::Cpu(storage),
                Storage::Cuda(storage) => Storages::Cuda(storage),
                Storage::Metal(_) => Storages::Metal,
            },
            Source::Cpu(storage) => Storages::Cpu(storage),
            #[cfg(feature = "cuda")]
            Source::Cuda(storage) => Storages::Cuda(storage),
        }
    }

    /// The tensor as the cpu engine takes it, or what is wrong with it. Bytes are bool masks, whose only values are 0 and 1.
    pub(crate) fn host(&self) -> std::result::Result<TensorRef<'_>, String> {
        let View { offset, shape, strides } = &self.view;
        let Storages::Cpu(storage) = self.storage() else {
            return Err("is not in host memory; move all tensors of a call to one device".into());
        };
        let tensor = match storage {
            CpuStorage::F32(data) => TensorRef::from_slices(data, *offset, shape, strides),
            CpuStorage::F16(data) => TensorRef::from_slices(data, *offset, shape, strides),
            CpuStorage::BF16(data) => TensorRef::from_slices(data, *offset, shape, strides),
            CpuStorage::U32(data) => TensorRef::from_slices(data, *offset, shape, strides),
            CpuStorage::U8(data) => {
                let mask: &[bool] = bytemuck::checked::try_cast_slice(data).map_err(|_| {
                    "is a mask in U8 with values other than 0 and 1; compare it with 0 first".to_string()
                })?;
                TensorRef::from_slices(mask, *offset, shape, strides)
            }
            _ => return Err(dtype_fault(storage_dtype(storage))),
        };
        tensor.ok_or_else(|| rank_fault(shape.len()))
    }
}

fn storage_dtype(storage: &CpuStorage) -> DType {
    use candle_core::backend::BackendStorage;
    storage.dtype()
}

pub(crate) fn dtype_fault(dtype: DType) -> String {
    format!("is {dtype:?}; convert it to F32, F16 or BF16, a mask to U8, key lengths to U32")
}

pub(crate) fn rank_fault(rank: usize) -> String {
    format!("has {rank} dimensions; the operator's tensors have at most {MAX_RANK}")
}

/// The device of all of a request's tensors.
pub(crate) fn device(request: &Attention<Operand>) -> Result<Device> {
    let device = request.q.tensor.device();
    let location = device.location();
    let faults = request.tensors().filter(|(_, operand)| operand.tensor.device().location() != location);
    let faults: Vec<String> = faults
        .map(|(argument, operand)| {
            format!("{argument} is on {:?} and q on {location:?}; move it there", operand.tensor.device().location())
        })
        .collect();
    refuse_if(faults)?;
    Ok(device.clone())
}

/// Every fault in one error.
pub(crate) fn refuse_if(faults: Vec<String>) -> Result<()> {
    if faults.is_empty() { Ok(()) } else { Err(candle_core::Error::msg(faults.join("; "))) }
}

/// Views of all of a request's tensors, or every reason why one has none.
pub(crate) fn views<'m, 's, T>(
    memory: &'m Attention<Memory<'s>>,
    view: impl Fn(&'m Memory<'s>) -> std::result::Result<T, String>,
) -> Result<Attention<T>> {
    let faults = memory.tensors().filter_map(|(argument, m)| view(m).err().map(|fault| format!("{argument} {fault}")));
    refuse_if(faults.collect())?;
    memory.try_map(|m| view(m).map_err(candle_core::Error::msg))
}

/// `[batch, seq_q, heads, value_dim]`, as far as the request tells; what cannot be is told by the core.
pub(crate) fn out_shape(memory: &Attention<Memory<'_>>) -> [usize; 4] {
    let mut shape = [0; 4];
    shape.iter_mut().zip(&memory.q.view.shape).for_each(|(to, &from)| *to = from);
    if let Some(&value_dim) = memory.segments().next().and_then(|segment| segment.v.view.shape.last()) {
        shape[3] = value_dim;
    }
    shape
}
