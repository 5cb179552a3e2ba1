//! A group of queries of one head, one in each lane of the vector registers, against some keys of one segment.

use super::convert::Convert;
use super::element::Holds;
use super::logits::{Keys, Queries, keys_of_row};
use super::pack::{TURNED, to_lanes};
use super::prefetch::{AHEAD, lines};
use super::product::{Into, Left, Product};
use super::softmax::Lanes;
use super::turn::turn;
use crate::engine::host::View;
use crate::plan::cpu::GROUP;
use crate::problem::DType;
use half::{bf16, f16};
use pulp::{Arch, Simd, WithSimd};
use std::ops::Range;

/// Where the lane of query `r` of a block begins in `[groups, width, GROUP]`.
pub(super) fn lane(r: usize, width: usize) -> usize {
    r / GROUP * GROUP * width + r % GROUP
}

impl<'a> Queries<'a> {
    /// Groups of these queries, up to [`GROUP`] each.
    pub(super) fn groups(self) -> impl Iterator<Item = (usize, Queries<'a>)> {
        let group =
            move |g: usize| Queries { first: self.first + g * GROUP, rows: GROUP.min(self.rows - g * GROUP), ..self };
        (0..self.rows.div_ceil(GROUP)).map(move |g| (g, group(g)))
    }

    /// These queries, up to [`TURNED`] at a time: the first one's number, and how many.
    pub(super) fn slices(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let rows = self.rows;
        (0..rows).step_by(TURNED).map(move |first| (first, TURNED.min(rows - first)))
    }

    /// The queries to be asked for while `count` of them from `first` on are at hand.
    pub(super) fn ahead(&self, first: usize, count: usize) -> Range<usize> {
        let within = |r: usize| (r + AHEAD).min(self.rows);
        within(first)..within(first + count)
    }

    /// Converts the rows of a tensor indexed `[batch, seq_q, heads, _]`, each to a lane of its group's `[width, GROUP]` elements;
    /// lanes of no query are 0.
    pub(super) fn load_lanes<T: Convert, E: Holds<T>>(&self, view: &View<'_, 4>, lanes: &mut [E], width: usize) {
        let (start, stride) = (view.position([self.b, self.first, self.h, 0]), view.stride(1));
        let row = |r: usize| &view.data::<T>()[start.wrapping_add_signed(r as isize * stride)..][..width];
        let elements = width.div_ceil(E::NUMBERS);
        if !self.rows.is_multiple_of(GROUP) {
            lanes[self.rows / GROUP * GROUP * elements..][..GROUP * elements].fill(E::zeroed());
        }
        for (first, count) in self.slices() {
            for ahead in self.ahead(first, count) {
                lines(row(ahead).as_ptr(), width);
            }
            let lanes = &mut lanes[lane(first, elements)..];
            if T::DTYPE == DType::F32 && stride >= width as isize {
                let from = &view.data::<f32>()[start + first * stride as usize..];
                turn((from, stride as usize), (bytemuck::cast_slice_mut(lanes), GROUP), [count, width]);
            } else {
                to_lanes((first..first + count).map(row), lanes, elements);
            }
        }
    }

    /// Whether any of the queries may attend to any of the keys.
    pub(super) fn sees(&self, keys: &Keys<'_>) -> bool {
        let seen = self.keys(keys.segment, keys.bound.key_len(self.b));
        seen.start.max(keys.start) < seen.end.min(keys.start + keys.columns)
    }

    /// Equation 1: logits `[keys, GROUP]` from queries `[head_dim, GROUP]` and keys in panels, -inf where a query may not
    /// attend. `slopes`, if there are any, gets the derivative of the softcap (equation 10).
    pub(super) fn lane_logits<T: Convert, E: Holds<T>>(
        &self,
        keys: &Keys<'_>,
        (q, k): (&[E], &[E]),
        logits: &mut [f32],
        slopes: Option<&mut [f32]>,
    ) {
        let problem = self.problem;
        let scale = problem.softmax_scale;
        // In f16 and bf16 the rounding of the sums is below what the inputs resolve.
        let into = if T::DTYPE == DType::F32 { Into::ScaledHalves(scale) } else { Into::Scaled(scale) };
        let logits = &mut logits[..keys.columns * GROUP];
        Product {
            left: Left::Panels(k),
            right: q,
            right_stride: GROUP,
            c: logits,
            stride: GROUP,
            extents: [keys.columns, GROUP, problem.head_dim.div_ceil(E::NUMBERS)],
            into,
        }
        .run();
        if let Some(softcap) = problem.softcap {
            logits.iter_mut().for_each(|s| *s = (*s / softcap).tanh());
            if let Some(slopes) = slopes {
                slopes.iter_mut().zip(&*logits).for_each(|(slope, tanh)| *slope = 1.0 - tanh * tanh);
            }
            logits.iter_mut().for_each(|s| *s *= softcap);
        }
        if let Some(bias) = &keys.bound.bias {
            self.add_bias(bias, keys, logits);
        }
        self.mask(keys, logits);
    }

    /// Sets logits to -inf where a query may not attend by position.
    fn mask(&self, keys: &Keys<'_>, logits: &mut [f32]) {
        let key_len = keys.bound.key_len(self.b);
        let of_row = |r: usize| keys_of_row(keys.segment, self.problem.seq_q, self.first + r, key_len);
        let within = |key: usize| key.saturating_sub(keys.start).min(keys.columns);
        // Both ends of a row's keys grow with the row.
        if within(of_row(self.rows - 1).start) == 0 && within(of_row(0).end) == keys.columns {
            return;
        }
        let (mut start, mut end) = ([0.0; GROUP], [0.0; GROUP]);
        for (r, (start, end)) in start.iter_mut().zip(&mut end).enumerate().take(self.rows) {
            let keys = of_row(r);
            (*start, *end) = (within(keys.start) as f32, within(keys.end) as f32);
        }
        Arch::new().dispatch(Mask { logits, start: &start, end: &end });
    }

    /// Adds the bias of every query and key, or applies the mask.
    fn add_bias(&self, bias: &View<'_, 4>, keys: &Keys<'_>, logits: &mut [f32]) {
        let step = bias.stride(3);
        for r in 0..self.rows {
            let start = bias.position([self.b, self.h, self.first + r, keys.start]);
            let at = |c: usize| start.wrapping_add_signed(c as isize * step);
            let lane = logits[r..].iter_mut().step_by(GROUP);
            match bias.dtype() {
                DType::F32 => add_each(lane, bias.data::<f32>(), at, |b| b),
                DType::F16 => add_each(lane, bias.data::<f16>(), at, f16::to_f32),
                DType::BF16 => add_each(lane, bias.data::<bf16>(), at, bf16::to_f32),
                DType::Bool | DType::U32 => {
                    let mask = bias.data::<u8>();
                    for (c, s) in lane.enumerate() {
                        if mask[at(c)] == 0 {
                            *s = f32::NEG_INFINITY;
                        }
                    }
                }
            }
        }
    }
}

fn add_each<'a, T: Copy>(
    logits: impl Iterator<Item = &'a mut f32>,
    bias: &[T],
    at: impl Fn(usize) -> usize,
    widen: impl Fn(T) -> f32,
) {
    for (c, s) in logits.enumerate() {
        *s += widen(bias[at(c)]);
    }
}

/// Keeps of each query's logits those from `start` to `end`.
struct Mask<'a> {
    logits: &'a mut [f32],
    start: &'a Lanes,
    end: &'a Lanes,
}

impl WithSimd for Mask<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let ((start, _), (end, _)) = (S::as_simd_f32s(self.start), S::as_simd_f32s(self.end));
        let nothing = simd.splat_f32s(f32::NEG_INFINITY);
        for (c, row) in self.logits.chunks_exact_mut(GROUP).enumerate() {
            let c = simd.splat_f32s(c as f32);
            for (s, (&start, &end)) in S::as_mut_simd_f32s(row).0.iter_mut().zip(start.iter().zip(end)) {
                let kept = simd.select_f32s(simd.less_than_f32s(c, end), *s, nothing);
                *s = simd.select_f32s(simd.less_than_f32s(c, start), nothing, kept);
            }
        }
    }
}

/// `out[d, lane] += weight[lane] · o[d, lane]`.
pub(super) fn add_weighted(out: &mut [f32], o: &[f32], weight: &Lanes) {
    Arch::new().dispatch(AddWeighted { out, o, weight });
}

struct AddWeighted<'a> {
    out: &'a mut [f32],
    o: &'a [f32],
    weight: &'a Lanes,
}

impl WithSimd for AddWeighted<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (weight, _) = S::as_simd_f32s(self.weight);
        for (out, o) in self.out.chunks_exact_mut(GROUP).zip(self.o.chunks_exact(GROUP)) {
            let (out, o) = (S::as_mut_simd_f32s(out).0, S::as_simd_f32s(o).0);
            for (out, (&o, &weight)) in out.iter_mut().zip(o.iter().zip(weight)) {
                *out = simd.mul_add_e_f32s(o, weight, *out);
            }
        }
    }
}
