//! Rows that are asked for while others are computed with. The rows of one head lie far apart, where no processor guesses
//! the next. It spares one or two hundredths of a call (benches/NOTEBOOK.md).

use super::block::Block;
use super::logits::{Keys, Queries};
use super::shared::SharedRows;
use crate::plan::cpu::BLOCK_KV;
use crate::problem::{Float, Problem};

/// What is needed after a tile of keys: fetched a share at a time, while the groups of queries meet the tile.
pub(super) struct Ahead<'a, T> {
    problem: &'a Problem,
    /// The next tile, of this block or of the one after it.
    keys: Option<Keys<'a>>,
    /// Where the block's own result goes.
    out: Option<(Queries<'a>, &'a SharedRows<'a, T>)>,
    /// The block after it.
    next: Option<Block<'a>>,
}

impl<'a, T: Float> Ahead<'a, T> {
    /// The next tile of a block, if any.
    pub(super) fn tile(problem: &'a Problem, keys: Option<Keys<'a>>) -> Self {
        Ahead { problem, keys, out: None, next: None }
    }

    /// What is needed after a block's last tile.
    pub(super) fn after(block: &Block<'a>, out: Option<&'a SharedRows<'a, T>>) -> Self {
        let next = block.next.map(|queries| Block { queries, ..*block });
        let keys = next.and_then(|next| {
            let (branch, bound) = (next.queries.problem.branches.first()?, next.inputs.branches.first()?);
            next.queries.tiles(branch, &bound.segments, BLOCK_KV).next()
        });
        Ahead { problem: block.queries.problem, keys, out: out.map(|out| (block.queries, out)), next }
    }

    /// The share of group `g` of `groups`.
    pub(super) fn fetch(&self, g: usize, groups: usize) {
        let share = |count: usize| g * count / groups..(g + 1) * count / groups;
        if let Some(keys) = &self.keys {
            for c in share(keys.columns) {
                lines(keys.row::<T>(&keys.bound.k, c, self.problem.head_dim).as_ptr(), self.problem.head_dim);
                lines(keys.row::<T>(&keys.bound.v, c, self.problem.value_dim).as_ptr(), self.problem.value_dim);
            }
        }
        if let Some((Queries { b, h, first, rows, .. }, out)) = self.out {
            share(rows).for_each(|r| lines(out.address([b, first + r, h, 0]), self.problem.value_dim));
        }
        if let Some(Block { queries: Queries { b, h, first, rows, .. }, inputs, .. }) = self.next {
            for r in share(rows) {
                let start = inputs.q.position([b, first + r, h, 0]);
                lines(inputs.q.data::<T>()[start..].as_ptr(), self.problem.head_dim);
            }
        }
    }
}

/// Fetches the cache lines of `count` elements; a hint, which does nothing on other processors.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn lines<T>(start: *const T, count: usize) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    for byte in (0..count * size_of::<T>()).step_by(64) {
        // SAFETY: nothing is accessed, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(start.cast::<i8>().wrapping_add(byte)) };
    }
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn lines<T>(_: *const T, _: usize) {}
