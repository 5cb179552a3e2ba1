//! Which queries of one head meet which keys of one segment, and what their logits become.

use super::convert::{Convert, widen};
use super::prefetch::{AHEAD, lines};
use crate::engine::host::{SegmentInputs, View};
use crate::plan::cpu::padded;
use crate::problem::{BranchProblem, Causal, DType, Problem, SegmentProblem};
use half::{bf16, f16};
use std::ops::Range;

/// Which queries: `rows` of them from `first` on, of one head.
#[derive(Clone, Copy)]
pub(super) struct Queries<'a> {
    pub(super) problem: &'a Problem,
    pub(super) b: usize,
    pub(super) h: usize,
    pub(super) first: usize,
    pub(super) rows: usize,
}

/// Which keys: `columns` of them from `start` on, for one batch entry, of the head that the queries read.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a> {
    /// Of the segment in the problem.
    pub(super) number: usize,
    pub(super) segment: &'a SegmentProblem,
    pub(super) bound: &'a SegmentInputs<'a>,
    pub(super) b: usize,
    pub(super) head: usize,
    pub(super) start: usize,
    pub(super) columns: usize,
}

impl<'a> Queries<'a> {
    /// Block `index` of `block_q` queries of one head.
    pub(super) fn block(problem: &'a Problem, [b, h, index]: [usize; 3], block_q: usize) -> Self {
        let first = index * block_q;
        Queries { problem, b, h, first, rows: block_q.min(problem.seq_q - first) }
    }

    /// Converts the rows of a tensor indexed `[batch, seq_q, heads, _]`, padded.
    pub(super) fn load<T: Convert>(&self, view: &View<'_, 4>, tile: &mut [f32], width: usize) {
        let row = |r: usize| &view.data::<T>()[view.position([self.b, self.first + r, self.h, 0])..][..width];
        for r in 0..self.rows {
            if r + AHEAD < self.rows {
                lines(row(r + AHEAD).as_ptr(), width);
            }
            widen(row(r), &mut row_mut(tile, r, padded(width))[..width]);
        }
    }

    /// The tiles of a branch's keys, up to `block_kv` each, with a key that a query of the block may attend to.
    pub(super) fn tiles(
        self,
        branch: &'a BranchProblem,
        bound: &'a [SegmentInputs<'a>],
        block_kv: usize,
    ) -> impl Iterator<Item = Keys<'a>> {
        (branch.first_segment..).zip(branch.segments.iter().zip(bound)).flat_map(move |(number, (segment, bound))| {
            let seen = self.keys(segment, bound.key_len(self.b));
            // Where tiles begin depends on the segment alone: how queries are split must not show in a result.
            let keys = seen.start / block_kv * block_kv..seen.end;
            keys.clone().step_by(block_kv).map(move |start| Keys {
                number,
                segment,
                bound,
                b: self.b,
                head: self.h / segment.group,
                start,
                columns: block_kv.min(keys.end - start),
            })
        })
    }

    /// Those of part `part` of `parts`, each with its share of the tiles; none if there are not so many parts.
    pub(super) fn tiles_of_part(
        self,
        branch: &'a BranchProblem,
        bound: &'a [SegmentInputs<'a>],
        block_kv: usize,
        [part, parts]: [usize; 2],
    ) -> impl Iterator<Item = Keys<'a>> {
        let own = match parts {
            _ if part >= parts => 0..0,
            1 => 0..usize::MAX,
            _ => {
                let count = self.tiles(branch, bound, block_kv).count();
                part * count / parts..(part + 1) * count / parts
            }
        };
        self.tiles(branch, bound, block_kv).take(own.end).skip(own.start)
    }

    /// The keys that any query of the block may attend to; both ends of a row's keys grow with the row.
    pub(super) fn keys(&self, segment: &SegmentProblem, key_len: usize) -> Range<usize> {
        let row = |r: usize| keys_of_row(segment, self.problem.seq_q, self.first + r, key_len);
        row(0).start..row(self.rows - 1).end.max(row(0).start)
    }

    /// Equation 1 from `softmax_scale · q k` on: cap, bias and masks, -inf where a query may not attend. Rows of `logits` are
    /// `stride` apart.
    pub(super) fn finish_logits(&self, keys: &Keys<'_>, stride: usize, logits: &mut [f32]) {
        let Queries { problem, b, h, first, rows } = *self;
        let key_len = keys.bound.key_len(b);
        for r in 0..rows {
            let logits = &mut logits[r * stride..][..keys.columns];
            if let Some(softcap) = problem.softcap {
                logits.iter_mut().for_each(|s| *s = (*s / softcap).tanh() * softcap);
            }
            if let Some(bias) = &keys.bound.bias {
                add_bias(bias, [b, h, first + r, keys.start], logits);
            }
            mask_outside(logits, keys.start, keys_of_row(keys.segment, problem.seq_q, first + r, key_len));
        }
    }
}

impl<'a> Keys<'a> {
    /// The keys from `start` on, up to `block_kv`, if any of the queries may attend to one of them.
    pub(super) fn seen(
        queries: &Queries<'_>,
        (number, segment, bound): (usize, &'a SegmentProblem, &'a SegmentInputs<'a>),
        start: usize,
        block_kv: usize,
    ) -> Option<Self> {
        let key_len = bound.key_len(queries.b);
        let columns = key_len.saturating_sub(start).min(block_kv);
        let keys = queries.keys(segment, key_len);
        let seen = keys.start.max(start) < keys.end.min(start + columns);
        seen.then_some(Keys { number, segment, bound, b: queries.b, head: queries.h / segment.group, start, columns })
    }

    /// Row `c` of keys or values, as it lies.
    pub(super) fn row<'v, T: Convert>(&self, view: &View<'v, 4>, c: usize, width: usize) -> &'v [T] {
        &view.data::<T>()[view.position([self.b, self.start + c, self.head, 0])..][..width]
    }
}

/// The keys that query `i` may attend to by position: causal rule, window and key length all leave an interval.
pub(super) fn keys_of_row(segment: &SegmentProblem, seq_q: usize, i: usize, key_len: usize) -> Range<usize> {
    let i = i as i64;
    let centre = i + segment.seq_kv as i64 - seq_q as i64;
    let mut start = 0;
    let mut end = key_len as i64;
    match segment.causal {
        Causal::None => {}
        Causal::TopLeft => end = end.min(i + 1),
        Causal::BottomRight => end = end.min(centre + 1),
    }
    if let Some(left) = segment.window.left {
        start = start.max(centre - i64::from(left));
    }
    if let Some(right) = segment.window.right {
        end = end.min(centre + i64::from(right) + 1);
    }
    // An empty interval keeps its place, so that the ends stay monotone over the rows.
    start.clamp(0, key_len as i64) as usize..end.clamp(0, key_len as i64) as usize
}

/// Sets logits of keys outside `keys` to -inf; the first logit belongs to key `start`.
fn mask_outside(logits: &mut [f32], start: usize, keys: Range<usize>) {
    let before = keys.start.saturating_sub(start).min(logits.len());
    let until = keys.end.saturating_sub(start).clamp(before, logits.len());
    logits[..before].fill(f32::NEG_INFINITY);
    logits[until..].fill(f32::NEG_INFINITY);
}

/// Adds the bias of the keys that follow `index`, or applies the mask.
fn add_bias(bias: &View<'_, 4>, index: [usize; 4], logits: &mut [f32]) {
    let (start, step) = (bias.position(index), bias.stride(3));
    let at = |c: usize| start.wrapping_add_signed(c as isize * step);
    match bias.dtype() {
        DType::F32 => add_each(logits, bias.data::<f32>(), at, |b| b),
        DType::F16 => add_each(logits, bias.data::<f16>(), at, f16::to_f32),
        DType::BF16 => add_each(logits, bias.data::<bf16>(), at, bf16::to_f32),
        DType::Bool | DType::U32 => {
            let mask = bias.data::<u8>();
            for (c, s) in logits.iter_mut().enumerate() {
                if mask[at(c)] == 0 {
                    *s = f32::NEG_INFINITY;
                }
            }
        }
    }
}

fn add_each<T: Copy>(logits: &mut [f32], bias: &[T], at: impl Fn(usize) -> usize, widen: impl Fn(T) -> f32) {
    for (c, s) in logits.iter_mut().enumerate() {
        *s += widen(bias[at(c)]);
    }
}

pub(super) fn row_mut(tile: &mut [f32], row: usize, width: usize) -> &mut [f32] {
    &mut tile[row * width..][..width]
}
