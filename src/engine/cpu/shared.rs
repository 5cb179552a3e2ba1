//! Rows of one output that several threads write, each its own.

use super::convert::{Convert, narrow};
use crate::engine::host::position;
use crate::problem::{DType, Strides, Tensor, TensorMut};
use std::marker::PhantomData;

/// An output tensor, indexed in the problem's order, whose rows may be taken from any thread.
pub(super) struct SharedRows<'a, T> {
    base: *mut T,
    len: usize,
    offset: usize,
    strides: Strides<4>,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: `base` is used through `row` only, whose contract forbids two threads to hold one row at a time.
unsafe impl<T: Send> Sync for SharedRows<'_, T> {}

impl<'a, T: Convert> SharedRows<'a, T> {
    pub(super) fn new(tensor: TensorMut<'a>, strides: Strides<4>) -> Self {
        let offset = tensor.offset;
        let data: &mut [T] = bytemuck::cast_slice_mut(tensor.bytes);
        SharedRows { base: data.as_mut_ptr(), len: data.len(), offset, strides, borrow: PhantomData }
    }

    /// The `width` elements that follow `index` in its last dimension.
    ///
    /// # Safety
    /// No other row that shares an element with this one may be held at the same time. Rows of different
    /// `[_, _, _]` never share one if the last stride is 1 or the row one element wide: validation refuses outputs whose
    /// elements overlap. Of `out` it makes that stride 1.
    #[expect(clippy::mut_from_ref, reason = "the contract above is what makes the rows disjoint")]
    pub(super) unsafe fn row(&self, index: [usize; 4], width: usize) -> &mut [T] {
        let at = position(self.offset, &self.strides, index);
        assert!(at < self.len && width <= self.len - at, "binding checked that every row lies in the slice");
        // SAFETY: `at + width <= len` elements lie behind `base`, all borrowed by `borrow`; the caller holds no other
        // reference to them.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(at), width) }
    }

    /// Where `rows` of `width` elements begin that follow each other in the sequence, and how far apart they are; nothing where
    /// they do not lie one behind the other. What [`SharedRows::row`] asks for holds for each of them.
    pub(super) fn rows(&self, index: [usize; 4], rows: usize, width: usize) -> Option<(*mut T, usize)> {
        let stride = usize::try_from(self.strides[1]).ok().filter(|&stride| stride >= width)?;
        let at = position(self.offset, &self.strides, index);
        let needed = rows.saturating_sub(1) * stride + width;
        assert!(at < self.len && needed <= self.len - at, "binding checked that every row lies in the slice");
        Some((self.base.wrapping_add(at), stride))
    }

    /// Where a row begins; not to be read.
    pub(super) fn address(&self, index: [usize; 4]) -> *const T {
        self.base.wrapping_add(position(self.offset, &self.strides, index))
    }
}

/// A gradient of any strides, in f32 or the type of q.
pub(super) enum Output<'a, T> {
    F32(SharedRows<'a, f32>),
    Own(SharedRows<'a, T>),
}

impl<'a, T: Convert> Output<'a, T> {
    pub(super) fn new(tensor: TensorMut<'a>, strides: Strides<4>) -> Self {
        match tensor.desc().dtype() {
            DType::F32 => Output::F32(SharedRows::new(tensor, strides)),
            _ => Output::Own(SharedRows::new(tensor, strides)),
        }
    }

    /// Rounds `values` to the elements that follow `index` in its last dimension.
    ///
    /// # Safety
    /// No other thread may read or write these elements meanwhile.
    pub(super) unsafe fn store(&self, index: [usize; 4], values: &[f32]) {
        match self {
            // SAFETY: the caller's promise is passed on.
            Output::F32(rows) => unsafe { store(rows, index, values) },
            // SAFETY: as above.
            Output::Own(rows) => unsafe { store(rows, index, values) },
        }
    }
}

/// # Safety
/// As [`Output::store`].
unsafe fn store<T: Convert>(rows: &SharedRows<'_, T>, index: [usize; 4], values: &[f32]) {
    if rows.strides[3] == 1 {
        // SAFETY: the row holds the elements that the caller answers for, and is gone when this returns.
        narrow(values, unsafe { rows.row(index, values.len()) });
    } else {
        let [b, i, h, d] = index;
        for (c, value) in values.iter().enumerate() {
            // SAFETY: as above, element by element.
            T::narrow(std::slice::from_ref(value), unsafe { rows.row([b, i, h, d + c], 1) });
        }
    }
}
