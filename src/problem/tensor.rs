//! Tensors: a description without data, and the two host views that add a slice to it.
//!
//! Nothing is checked here; [`Problem`](crate::Problem) and the engines' binding check everything at once, where the
//! argument's name is known.

use super::dtype::DType;
use super::element::Element;

/// The most dimensions a tensor of this crate has.
pub const MAX_RANK: usize = 4;

/// Element type, shape and strides of a tensor; no data.
///
/// Strides are in elements, may be zero (broadcast) or negative, and count from the element at index zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TensorDesc {
    dtype: DType,
    rank: usize,
    shape: [usize; MAX_RANK],
    strides: [isize; MAX_RANK],
}

impl TensorDesc {
    /// A tensor with the given strides. At most four dimensions; more do not compile.
    pub fn strided<const R: usize>(dtype: DType, shape: [usize; R], strides: [isize; R]) -> Self {
        const { assert!(R <= MAX_RANK, "a tensor has at most four dimensions") };
        let mut desc = TensorDesc { dtype, rank: R, shape: [1; MAX_RANK], strides: [0; MAX_RANK] };
        desc.shape[..R].copy_from_slice(&shape);
        desc.strides[..R].copy_from_slice(&strides);
        desc
    }

    /// The same for a number of dimensions known only at run time.
    ///
    /// `None` if there are more than [`MAX_RANK`], or not as many strides as extents.
    pub fn from_slices(dtype: DType, shape: &[usize], strides: &[isize]) -> Option<Self> {
        let rank = shape.len();
        if rank > MAX_RANK || strides.len() != rank {
            return None;
        }
        let mut desc = TensorDesc { dtype, rank, shape: [1; MAX_RANK], strides: [0; MAX_RANK] };
        desc.shape[..rank].copy_from_slice(shape);
        desc.strides[..rank].copy_from_slice(strides);
        Some(desc)
    }

    /// A dense tensor, the last dimension fastest.
    pub fn contiguous<const R: usize>(dtype: DType, shape: [usize; R]) -> Self {
        let mut strides = [0; R];
        let mut next = 1isize;
        for dim in (0..R).rev() {
            strides[dim] = next;
            // Saturates on shapes that no memory holds; validation refuses those by their span.
            next = next.saturating_mul(isize::try_from(shape[dim]).unwrap_or(isize::MAX));
        }
        Self::strided(dtype, shape, strides)
    }

    /// `[batch, seq, heads, head_dim]`, dense in this order: what a linear projection produces.
    pub fn bshd(dtype: DType, shape: [usize; 4]) -> Self {
        Self::contiguous(dtype, shape)
    }

    /// The same tensor stored as `[batch, heads, seq, head_dim]`, dense in that order; `shape` is given as stored.
    pub fn bhsd(dtype: DType, shape: [usize; 4]) -> Self {
        let mut desc = Self::contiguous(dtype, shape);
        desc.shape.swap(1, 2);
        desc.strides.swap(1, 2);
        desc
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Extents, one per dimension.
    pub fn shape(&self) -> &[usize] {
        &self.shape[..self.rank]
    }

    /// Strides in elements, one per dimension.
    pub fn strides(&self) -> &[isize] {
        &self.strides[..self.rank]
    }

    /// Whether the tensor has no element.
    pub fn is_empty(&self) -> bool {
        self.shape().contains(&0)
    }

    /// Lowest and highest element offset reached from index zero; `None` if the tensor is empty or an offset, in
    /// bytes, does not fit an address.
    pub(crate) fn span(&self) -> Option<(isize, isize)> {
        if self.is_empty() {
            return None;
        }
        let (mut low, mut high) = (0i128, 0i128);
        for (&extent, &stride) in self.shape().iter().zip(self.strides()) {
            let reach = (extent as i128 - 1).checked_mul(stride as i128)?;
            if reach < 0 {
                low = low.checked_add(reach)?;
            } else {
                high = high.checked_add(reach)?;
            }
        }
        let limit = isize::MAX as i128 / self.dtype.size() as i128;
        (high.checked_sub(low)? < limit).then_some((low as isize, high as isize))
    }

    /// How many elements a buffer must hold for every index to lie in it, index zero being its element `offset`, or
    /// `None` if one lies before its start or past any address.
    pub(crate) fn needed_len(&self, offset: usize) -> Option<usize> {
        if self.is_empty() {
            return Some(0);
        }
        let (low, high) = self.span()?;
        offset.checked_add_signed(low)?;
        offset.checked_add_signed(high)?.checked_add(1)
    }

    /// Whether every element has an address of its own.
    ///
    /// Sufficient rule: with the dimensions sorted by stride, each stride is at least the reach of those below it plus
    /// one. Interleavings that are disjoint for number-theoretic reasons only are not recognised.
    pub(crate) fn is_injective(&self) -> bool {
        let mut dims = [(0u128, 1u128); MAX_RANK];
        let spread = self.shape().iter().zip(self.strides()).filter(|&(&extent, _)| extent > 1);
        for (dim, (&extent, &stride)) in dims.iter_mut().zip(spread) {
            *dim = (stride.unsigned_abs() as u128, extent as u128);
        }
        dims.sort_unstable();
        let mut reach = 0u128;
        dims.iter().filter(|&&(_, extent)| extent > 1).all(|&(stride, extent)| {
            let disjoint = stride > reach;
            reach = reach.saturating_add(stride.saturating_mul(extent - 1));
            disjoint
        })
    }
}

/// What stands for a tensor in an [`Attention`](crate::Attention): anything that can describe itself.
pub trait Tensor {
    /// Type, shape and strides.
    fn desc(&self) -> TensorDesc;
}

impl Tensor for TensorDesc {
    fn desc(&self) -> TensorDesc {
        *self
    }
}

/// A tensor in host memory, to be read.
#[derive(Clone, Copy, Debug)]
pub struct TensorRef<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) offset: usize,
    desc: TensorDesc,
}

/// A tensor in host memory, to be written.
#[derive(Debug)]
pub struct TensorMut<'a> {
    pub(crate) bytes: &'a mut [u8],
    pub(crate) offset: usize,
    desc: TensorDesc,
}

/// Writes the constructors of both views, which differ in the mutability of the slice alone.
macro_rules! host_view {
    ($view:ident, $bound:path, $cast:path, $($mutability:tt)?) => {
        impl<'a> $view<'a> {
            /// A dense tensor, the last dimension fastest.
            pub fn contiguous<T: $bound, const R: usize>(data: &'a $($mutability)? [T], shape: [usize; R]) -> Self {
                let desc = TensorDesc::contiguous(T::DTYPE, shape);
                Self { bytes: $cast(data), offset: 0, desc }
            }

            /// `[batch, seq, heads, head_dim]`, dense in this order: what a linear projection produces.
            pub fn bshd<T: $bound>(data: &'a $($mutability)? [T], shape: [usize; 4]) -> Self {
                Self::contiguous(data, shape)
            }

            /// The same tensor stored as `[batch, heads, seq, head_dim]`; `shape` is given as stored.
            pub fn bhsd<T: $bound>(data: &'a $($mutability)? [T], shape: [usize; 4]) -> Self {
                Self { bytes: $cast(data), offset: 0, desc: TensorDesc::bhsd(T::DTYPE, shape) }
            }

            /// Any strides, in elements; index zero is `data[offset]`.
            pub fn strided<T: $bound, const R: usize>(
                data: &'a $($mutability)? [T],
                offset: usize,
                shape: [usize; R],
                strides: [isize; R],
            ) -> Self {
                Self { bytes: $cast(data), offset, desc: TensorDesc::strided(T::DTYPE, shape, strides) }
            }

            /// The same for a number of dimensions known only at run time.
            ///
            /// `None` if there are more than [`MAX_RANK`], or not as many strides as extents.
            pub fn from_slices<T: $bound>(
                data: &'a $($mutability)? [T],
                offset: usize,
                shape: &[usize],
                strides: &[isize],
            ) -> Option<Self> {
                let desc = TensorDesc::from_slices(T::DTYPE, shape, strides)?;
                Some(Self { bytes: $cast(data), offset, desc })
            }

            /// How many elements the slice must hold.
            pub(crate) fn needed_len(&self) -> Option<usize> {
                self.desc.needed_len(self.offset)
            }

            /// Elements in the slice.
            pub(crate) fn len(&self) -> usize {
                self.bytes.len() / self.desc.dtype().size()
            }
        }

        impl Tensor for $view<'_> {
            fn desc(&self) -> TensorDesc {
                self.desc
            }
        }
    };
}
host_view!(TensorRef, Element, bytemuck::cast_slice,);
host_view!(TensorMut, super::element::Float, bytemuck::cast_slice_mut, mut);

impl TensorMut<'_> {
    /// The same tensor, to be read.
    pub fn as_ref(&self) -> TensorRef<'_> {
        TensorRef { bytes: self.bytes, offset: self.offset, desc: self.desc }
    }

    /// The same tensor, borrowed for a shorter time.
    pub fn reborrow(&mut self) -> TensorMut<'_> {
        TensorMut { bytes: self.bytes, offset: self.offset, desc: self.desc }
    }
}
