//! Dense tensors whose type and shape are known at run time, and their views for the library.

use bytemuck::AnyBitPattern;
use fused_attention::{DType, Element, Float, TensorDesc, TensorMut, TensorRef};
use half::{bf16, f16};
use std::borrow::Cow;

/// A dense tensor that borrows a file's bytes or owns its elements.
#[derive(Clone, Debug)]
pub struct Array<'a> {
    data: Data<'a>,
    shape: Vec<usize>,
}

#[derive(Clone, Debug)]
enum Data<'a> {
    F16(Cow<'a, [f16]>),
    BF16(Cow<'a, [bf16]>),
    F32(Cow<'a, [f32]>),
    U32(Cow<'a, [u32]>),
    Bool(Cow<'a, [bool]>),
}

/// Does one thing for each element type: `each!(data, elements => …)`.
macro_rules! each {
    ($data:expr, $elements:ident => $body:expr) => {
        match $data {
            Data::F16($elements) => $body,
            Data::BF16($elements) => $body,
            Data::F32($elements) => $body,
            Data::U32($elements) => $body,
            Data::Bool($elements) => $body,
        }
    };
}

impl<'a> Array<'a> {
    /// Elements as a file stores them; `None` for a bool that is neither 0 nor 1.
    ///
    /// The bytes are borrowed unless they lie at an address that the type does not allow.
    pub(crate) fn from_bytes(dtype: DType, shape: &[usize], bytes: &'a [u8]) -> Option<Self> {
        let data = match dtype {
            DType::F16 => Data::F16(elements(bytes)),
            DType::BF16 => Data::BF16(elements(bytes)),
            DType::F32 => Data::F32(elements(bytes)),
            DType::U32 => Data::U32(elements(bytes)),
            DType::Bool => Data::Bool(Cow::Borrowed(bytemuck::checked::try_cast_slice(bytes).ok()?)),
        };
        Some(Array { data, shape: shape.to_vec() })
    }

    /// The same with elements of its own.
    pub(crate) fn into_owned(self) -> Array<'static> {
        let data = match self.data {
            Data::F16(elements) => Data::F16(elements.into_owned().into()),
            Data::BF16(elements) => Data::BF16(elements.into_owned().into()),
            Data::F32(elements) => Data::F32(elements.into_owned().into()),
            Data::U32(elements) => Data::U32(elements.into_owned().into()),
            Data::Bool(elements) => Data::Bool(elements.into_owned().into()),
        };
        Array { data, shape: self.shape }
    }

    /// Zeros, to be written. Nothing but a float is ever written.
    pub(crate) fn zeros(dtype: DType, shape: &[usize]) -> Array<'static> {
        let len = shape.iter().product();
        let data = match dtype {
            DType::F16 => Data::F16(vec![f16::ZERO; len].into()),
            DType::BF16 => Data::BF16(vec![bf16::ZERO; len].into()),
            DType::F32 | DType::U32 | DType::Bool => Data::F32(vec![0.0; len].into()),
        };
        Array { data, shape: shape.to_vec() }
    }

    /// Numbers rounded to a float type.
    pub(crate) fn rounded(dtype: DType, shape: &[usize], numbers: impl Iterator<Item = f32>) -> Array<'static> {
        let data = match dtype {
            DType::F16 => Data::F16(numbers.map(f16::from_f32).collect()),
            DType::BF16 => Data::BF16(numbers.map(bf16::from_f32).collect()),
            DType::F32 | DType::U32 | DType::Bool => Data::F32(numbers.collect()),
        };
        Array { data, shape: shape.to_vec() }
    }

    pub(crate) fn bools(shape: &[usize], values: impl Iterator<Item = bool>) -> Array<'static> {
        Array { data: Data::Bool(values.collect()), shape: shape.to_vec() }
    }

    pub(crate) fn dtype(&self) -> DType {
        match self.data {
            Data::F16(_) => DType::F16,
            Data::BF16(_) => DType::BF16,
            Data::F32(_) => DType::F32,
            Data::U32(_) => DType::U32,
            Data::Bool(_) => DType::Bool,
        }
    }

    pub(crate) fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        each!(&self.data, elements => bytemuck::cast_slice(elements))
    }

    /// The elements of key lengths.
    pub(crate) fn as_u32(&self) -> Option<&[u32]> {
        match &self.data {
            Data::U32(elements) => Some(elements),
            _ => None,
        }
    }

    pub(crate) fn view(&self) -> TensorRef<'_> {
        each!(&self.data, elements => view(elements, &self.shape))
    }

    /// The elements of a float tensor; none of another.
    pub(crate) fn values(&self) -> Vec<f32> {
        match &self.data {
            Data::F16(elements) => elements.iter().map(|x| x.to_f32()).collect(),
            Data::BF16(elements) => elements.iter().map(|x| x.to_f32()).collect(),
            Data::F32(elements) => elements.to_vec(),
            Data::U32(_) | Data::Bool(_) => Vec::new(),
        }
    }

    /// The first `count` indices along a dimension.
    pub(crate) fn leading(&self, dim: usize, count: usize) -> TensorRef<'_> {
        let strides: Vec<isize> =
            (0..self.shape.len()).map(|dim| self.shape[dim + 1..].iter().product::<usize>() as isize).collect();
        let mut shape = self.shape.clone();
        shape.iter_mut().skip(dim).take(1).for_each(|extent| *extent = count.min(*extent));
        each!(&self.data, elements => TensorRef::from_slices(elements, 0, &shape, &strides)).unwrap_or(self.view())
    }

    /// The same, to be written; `None` for a type that is no float.
    pub(crate) fn view_mut(&mut self) -> Option<TensorMut<'_>> {
        match &mut self.data {
            Data::F16(elements) => Some(view_mut(elements.to_mut(), &self.shape)),
            Data::BF16(elements) => Some(view_mut(elements.to_mut(), &self.shape)),
            Data::F32(elements) => Some(view_mut(elements.to_mut(), &self.shape)),
            Data::U32(_) | Data::Bool(_) => None,
        }
    }
}

fn elements<T: AnyBitPattern + bytemuck::NoUninit>(bytes: &[u8]) -> Cow<'_, [T]> {
    match bytemuck::try_cast_slice(bytes) {
        Ok(elements) => Cow::Borrowed(elements),
        Err(_) => Cow::Owned(bytemuck::pod_collect_to_vec(bytes)),
    }
}

/// A dense description. The library's shapes are arrays, hence the match; the contract lets no fifth dimension in.
pub(crate) fn desc(dtype: DType, shape: &[usize]) -> TensorDesc {
    match *shape {
        [] => TensorDesc::contiguous(dtype, []),
        [a] => TensorDesc::contiguous(dtype, [a]),
        [a, b] => TensorDesc::contiguous(dtype, [a, b]),
        [a, b, c] => TensorDesc::contiguous(dtype, [a, b, c]),
        [a, b, c, d, ..] => TensorDesc::contiguous(dtype, [a, b, c, d]),
    }
}

fn view<'a, T: Element>(data: &'a [T], shape: &[usize]) -> TensorRef<'a> {
    match *shape {
        [] => TensorRef::contiguous(data, []),
        [a] => TensorRef::contiguous(data, [a]),
        [a, b] => TensorRef::contiguous(data, [a, b]),
        [a, b, c] => TensorRef::contiguous(data, [a, b, c]),
        [a, b, c, d, ..] => TensorRef::contiguous(data, [a, b, c, d]),
    }
}

fn view_mut<'a, T: Float>(data: &'a mut [T], shape: &[usize]) -> TensorMut<'a> {
    match *shape {
        [] => TensorMut::contiguous(data, []),
        [a] => TensorMut::contiguous(data, [a]),
        [a, b] => TensorMut::contiguous(data, [a, b]),
        [a, b, c] => TensorMut::contiguous(data, [a, b, c]),
        [a, b, c, d, ..] => TensorMut::contiguous(data, [a, b, c, d]),
    }
}
