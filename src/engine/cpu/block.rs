//! The algorithm: one block of queries of one head over every branch.

use super::shared::SharedRows;
use super::tile::{Matrix, OnlineSoftmax, matmul_add, matmul_transposed};
use crate::engine::host::{Inputs, View};
use crate::plan::Plan;
use crate::problem::{BranchProblem, Causal, DType, Float, Problem, SegmentProblem};
use half::{bf16, f16};
use std::ops::Range;

/// The tiles of one thread.
pub(super) struct Scratch {
    /// `[block_q, head_dim]`
    q: Vec<f32>,
    /// Keys, then values, of one tile: `[block_kv, head_dim]`, `[block_kv, value_dim]`.
    kv: Vec<f32>,
    /// Logits, then probabilities: `[block_q, block_kv]`.
    s: Vec<f32>,
    /// Unnormalised result of one branch: `[block_q, value_dim]`.
    o: Vec<f32>,
    /// Sum of the branches: `[block_q, value_dim]`.
    out: Vec<f32>,
    softmax: Vec<OnlineSoftmax>,
}

impl Scratch {
    pub(super) fn new(problem: &Problem, plan: &Plan) -> Self {
        let (block_q, block_kv) = (plan.block_q(), plan.block_kv());
        let (head_dim, value_dim) = (problem.head_dim, problem.value_dim);
        Scratch {
            q: vec![0.0; block_q * head_dim],
            kv: vec![0.0; block_kv * head_dim.max(value_dim)],
            s: vec![0.0; block_q * block_kv],
            o: vec![0.0; block_q * value_dim],
            out: vec![0.0; block_q * value_dim],
            softmax: vec![OnlineSoftmax::EMPTY; block_q],
        }
    }
}

/// Which queries: `rows` of them from `first` on.
pub(super) struct Block<'a> {
    pub(super) problem: &'a Problem,
    pub(super) inputs: &'a Inputs<'a>,
    pub(super) b: usize,
    pub(super) h: usize,
    pub(super) first: usize,
    pub(super) rows: usize,
    pub(super) block_kv: usize,
}

impl Block<'_> {
    /// Computes the block's rows of `out` and `lse`.
    pub(super) fn forward<T: Float>(
        &self,
        scratch: &mut Scratch,
        out: &SharedRows<'_, T>,
        lse: &Option<SharedRows<'_, f32>>,
    ) {
        let Block { problem, inputs, b, h, first, rows, .. } = *self;
        let width = problem.value_dim;
        for r in 0..rows {
            load_row::<T, _>(&inputs.q, [b, first + r, h, 0], row_mut(&mut scratch.q, r, problem.head_dim));
        }
        for r in 0..rows {
            let sum = row_mut(&mut scratch.out, r, width);
            if problem.accumulate {
                // SAFETY: tasks partition (b, h, first..first + rows), and this task holds one row at a time.
                T::widen(unsafe { out.row([b, first + r, h, 0], width) }, sum);
            } else {
                sum.fill(0.0);
            }
        }

        for (n, branch) in problem.branches.iter().enumerate() {
            let gate = inputs.branches[n].gate(b, h);
            if gate == 0.0 && lse.is_none() {
                continue;
            }
            self.branch::<T>(scratch, n, branch);
            for r in 0..rows {
                let softmax = scratch.softmax[r];
                if let Some(lse) = lse {
                    // SAFETY: as above; an element of lse is a row of width 1.
                    let lse = unsafe { lse.row([n, b, h, first + r], 1) };
                    lse[0] = softmax.lse();
                }
                if gate != 0.0 && softmax.sum != 0.0 {
                    // Equation 7: the weight carries the normalisation, all in f32.
                    let weight = gate * inputs.branches[n].region(b, h, first + r) / softmax.sum;
                    let o = &scratch.o[r * width..][..width];
                    row_mut(&mut scratch.out, r, width).iter_mut().zip(o).for_each(|(out, o)| *out += weight * o);
                }
            }
        }

        for r in 0..rows {
            // SAFETY: as above.
            T::narrow(&scratch.out[r * width..][..width], unsafe { out.row([b, first + r, h, 0], width) });
        }
    }

    /// Leaves the branch's unnormalised result in `scratch.o` and its softmax state in `scratch.softmax`.
    fn branch<T: Float>(&self, scratch: &mut Scratch, n: usize, branch: &BranchProblem) {
        let Block { problem, b, h, rows, .. } = *self;
        let (head_dim, value_dim) = (problem.head_dim, problem.value_dim);
        scratch.o[..rows * value_dim].fill(0.0);
        scratch.softmax[..rows].fill(OnlineSoftmax::EMPTY);

        for (segment, bound) in branch.segments.iter().zip(&self.inputs.branches[n].segments) {
            let key_len = bound.key_len(b);
            let kv_head = h / segment.group;
            let keys = self.keys_of_block(segment, key_len);
            for start in keys.clone().step_by(self.block_kv) {
                let columns = self.block_kv.min(keys.end - start);
                let key_rows = |view: &View<'_, 4>, tile: &mut [f32], width: usize| {
                    for c in 0..columns {
                        load_row::<T, _>(view, [b, start + c, kv_head, 0], row_mut(tile, c, width));
                    }
                };

                key_rows(&bound.k, &mut scratch.kv, head_dim);
                matmul_transposed(
                    &mut scratch.s,
                    self.block_kv,
                    Matrix::new(&scratch.q, rows, head_dim, head_dim),
                    Matrix::new(&scratch.kv, columns, head_dim, head_dim),
                    problem.softmax_scale,
                    run_length::<T>(head_dim),
                );
                for r in 0..rows {
                    let logits = &mut scratch.s[r * self.block_kv..][..columns];
                    if let Some(softcap) = problem.softcap {
                        logits.iter_mut().for_each(|s| *s = softcap * (*s / softcap).tanh());
                    }
                    if let Some(bias) = &bound.bias {
                        add_bias(bias, [b, h, self.first + r, start], logits);
                    }
                    mask_outside(logits, start, keys_of_row(segment, problem.seq_q, self.first + r, key_len));
                    let correction = scratch.softmax[r].step(logits);
                    if correction != 1.0 {
                        row_mut(&mut scratch.o, r, value_dim).iter_mut().for_each(|o| *o *= correction);
                    }
                }

                key_rows(&bound.v, &mut scratch.kv, value_dim);
                matmul_add(
                    &mut scratch.o,
                    Matrix::new(&scratch.s, rows, columns, self.block_kv),
                    Matrix::new(&scratch.kv, columns, value_dim, value_dim),
                );
            }
        }
    }

    /// The keys that any query of the block may attend to; both ends of a row's keys grow with the row.
    fn keys_of_block(&self, segment: &SegmentProblem, key_len: usize) -> Range<usize> {
        let row = |r: usize| keys_of_row(segment, self.problem.seq_q, self.first + r, key_len);
        row(0).start..row(self.rows - 1).end.max(row(0).start)
    }
}

/// Terms of a product summed in one run. In f32 the logits' rounding is what the result's error comes from, and runs of
/// about 32 take a third of it away for a tenth of the time (benches/NOTEBOOK.md); in f16 and bf16 it is below what the
/// inputs resolve.
fn run_length<T: Float>(head_dim: usize) -> usize {
    if T::DTYPE == DType::F32 { head_dim.div_ceil(head_dim.div_ceil(32)) } else { head_dim }
}

/// The keys that query `i` may attend to by position: causal rule, window and key length all leave an interval.
fn keys_of_row(segment: &SegmentProblem, seq_q: usize, i: usize, key_len: usize) -> Range<usize> {
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
    let (start, step) = (bias.position(index), bias.last_stride());
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

/// Converts the row of elements that follows `index` in its last dimension.
fn load_row<T: Float, const N: usize>(view: &View<'_, N>, index: [usize; N], row: &mut [f32]) {
    let start = view.position(index);
    T::widen(&view.data::<T>()[start..][..row.len()], row);
}

fn row_mut(tile: &mut [f32], row: usize, width: usize) -> &mut [f32] {
    &mut tile[row * width..][..width]
}
