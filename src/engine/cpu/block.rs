//! The algorithm: one block of queries of one head over every branch.

use super::logits::{Queries, row_mut};
use super::shared::SharedRows;
use super::tile::{Matrix, OnlineSoftmax, matmul_add};
use crate::engine::host::Inputs;
use crate::plan::Plan;
use crate::problem::{BranchProblem, Float, Problem};

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

/// One task.
pub(super) struct Block<'a> {
    pub(super) queries: Queries<'a>,
    pub(super) inputs: &'a Inputs<'a>,
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
        let Block { queries: Queries { problem, b, h, first, rows }, inputs, .. } = *self;
        let width = problem.value_dim;
        self.queries.load::<T>(&inputs.q, &mut scratch.q, problem.head_dim);
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
        let Block { queries, inputs, block_kv } = *self;
        let Queries { problem, rows, .. } = queries;
        let (head_dim, value_dim) = (problem.head_dim, problem.value_dim);
        scratch.o[..rows * value_dim].fill(0.0);
        scratch.softmax[..rows].fill(OnlineSoftmax::EMPTY);

        for keys in queries.tiles(branch, &inputs.branches[n].segments, block_kv) {
            keys.load::<T>(&keys.bound.k, &mut scratch.kv, head_dim);
            queries.logits::<T>(&keys, (&scratch.q, &scratch.kv), block_kv, &mut scratch.s, None);
            for r in 0..rows {
                let correction = scratch.softmax[r].step(&mut scratch.s[r * block_kv..][..keys.columns]);
                if correction != 1.0 {
                    row_mut(&mut scratch.o, r, value_dim).iter_mut().for_each(|o| *o *= correction);
                }
            }

            keys.load::<T>(&keys.bound.v, &mut scratch.kv, value_dim);
            matmul_add(
                &mut scratch.o,
                Matrix::new(&scratch.s, rows, keys.columns, block_kv),
                Matrix::new(&scratch.kv, keys.columns, value_dim, value_dim),
            );
        }
    }
}
