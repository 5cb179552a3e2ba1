//! Rows of one output that several threads write, each its own.

use crate::engine::host::position;
use crate::problem::{Float, Strides, TensorMut};
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

impl<'a, T: Float> SharedRows<'a, T> {
    pub(super) fn new(tensor: TensorMut<'a>, strides: Strides<4>) -> Self {
        let offset = tensor.offset;
        let data: &mut [T] = bytemuck::cast_slice_mut(tensor.bytes);
        SharedRows { base: data.as_mut_ptr(), len: data.len(), offset, strides, borrow: PhantomData }
    }

    /// The `width` elements that follow `index` in its last dimension.
    ///
    /// # Safety
    /// No other row that shares an element with this one may be held at the same time. Rows of different
    /// `[_, _, _]` never share one: validation refuses outputs whose elements overlap, and makes the last stride 1
    /// where a row is wider than one element.
    #[expect(clippy::mut_from_ref, reason = "the contract above is what makes the rows disjoint")]
    pub(super) unsafe fn row(&self, index: [usize; 4], width: usize) -> &mut [T] {
        let at = position(self.offset, &self.strides, index);
        assert!(at < self.len && width <= self.len - at, "binding checked that every row lies in the slice");
        // SAFETY: `at + width <= len` elements lie behind `base`, all borrowed by `borrow`; the caller holds no other
        // reference to them.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(at), width) }
    }
}
