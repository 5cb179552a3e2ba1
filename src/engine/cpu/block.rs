//! The algorithm: one block of queries of one head over every branch.

use super::group::add_weighted;
use super::logits::{Keys, Queries};
use super::pack::{from_lanes, to_panels};
use super::parts::{self, Partial};
use super::product::{Into, Left, Product};
use super::shared::SharedRows;
use super::softmax::OnlineSoftmax;
use crate::engine::host::{Inputs, View};
use crate::plan::cpu::{BLOCK_KV, GROUP, padded};
use crate::problem::{BranchProblem, Float, Problem};

/// The tiles of one thread. Where queries are side by side, those of a group are.
pub(super) struct Scratch {
    /// `[groups, head_dim, GROUP]`
    q: Vec<f32>,
    /// Keys of one tile, in panels: `[ceil(head_dim / GROUP), columns, GROUP]`.
    k: Vec<f32>,
    /// Their values: `[columns, padded value_dim]`.
    v: Vec<f32>,
    /// Logits of one group, then probabilities: `[columns, GROUP]`.
    s: Vec<f32>,
    /// Unnormalised result of one branch: `[groups, value_dim, GROUP]`.
    o: Vec<f32>,
    /// Sum of the branches: `[groups, value_dim, GROUP]`.
    out: Vec<f32>,
    /// One row of the result.
    row: Vec<f32>,
    /// Of each group.
    softmax: Vec<OnlineSoftmax>,
}

impl Scratch {
    pub(super) fn new(problem: &Problem, block_q: usize) -> Self {
        let (head_dim, value_dim) = (problem.head_dim, problem.value_dim);
        let queries = block_q.next_multiple_of(GROUP);
        Scratch {
            q: vec![0.0; queries * head_dim],
            k: vec![0.0; BLOCK_KV * head_dim.next_multiple_of(GROUP)],
            v: vec![0.0; BLOCK_KV * padded(value_dim)],
            s: vec![0.0; BLOCK_KV * GROUP],
            o: vec![0.0; queries * value_dim],
            out: vec![0.0; queries * value_dim],
            row: vec![0.0; value_dim],
            softmax: vec![OnlineSoftmax::EMPTY; queries / GROUP],
        }
    }
}

/// One task, or one of the parts into which the keys of a task are split.
#[derive(Clone, Copy)]
pub(super) struct Block<'a> {
    pub(super) queries: Queries<'a>,
    pub(super) inputs: &'a Inputs<'a>,
    /// Which part, and of how many.
    pub(super) part: [usize; 2],
    /// Whether lse is wanted: of a closed branch it is all that is.
    pub(super) with_lse: bool,
}

impl<'a> Block<'a> {
    /// Computes the block's rows of `out` and `lse`.
    pub(super) fn forward<T: Float>(
        &self,
        scratch: &mut Scratch,
        out: &SharedRows<'_, T>,
        lse: &Option<SharedRows<'_, f32>>,
    ) {
        self.load_queries::<T>(scratch);
        self.start(scratch, out);
        for (n, branch) in self.branches() {
            self.branch::<T>(scratch, n, branch);
            self.add_branch(scratch, n, lse);
        }
        self.store(scratch, out);
    }

    /// Leaves the results of one part of the keys in `partial`, branch by branch.
    pub(super) fn forward_part<T: Float>(&self, scratch: &mut Scratch, partial: &mut [f32]) {
        self.load_queries::<T>(scratch);
        let size = partial.len() / self.queries.problem.branches.len();
        for (n, branch) in self.branches() {
            self.branch::<T>(scratch, n, branch);
            parts::save(&scratch.o, &scratch.softmax, &mut partial[n * size..][..size]);
        }
    }

    /// Computes the block's rows from the results of its parts, taken in order.
    pub(super) fn merge<T: Float>(
        &self,
        scratch: &mut Scratch,
        parts: &[f32],
        out: &SharedRows<'_, T>,
        lse: &Option<SharedRows<'_, f32>>,
    ) {
        self.start(scratch, out);
        let groups = scratch.softmax.len();
        for (n, _) in self.branches() {
            let partial = Partial::of(parts, self.part[1], self.queries.problem.branches.len(), n, groups);
            let width = scratch.o.len() / groups;
            for (g, (o, softmax)) in scratch.o.chunks_exact_mut(width).zip(&mut scratch.softmax).enumerate() {
                *softmax = partial.merge(g, o);
            }
            self.add_branch(scratch, n, lse);
        }
        self.store(scratch, out);
    }

    /// The branches that are evaluated.
    fn branches(&self) -> impl Iterator<Item = (usize, &'a BranchProblem)> + use<'a> {
        let Block { queries: Queries { problem, b, h, .. }, inputs, with_lse, .. } = *self;
        let open = move |n: usize| with_lse || inputs.branches[n].gate(b, h) != 0.0;
        problem.branches.iter().enumerate().filter(move |&(n, _)| open(n))
    }

    fn load_queries<T: Float>(&self, scratch: &mut Scratch) {
        let width = self.queries.problem.head_dim;
        for (g, group) in self.queries.groups() {
            group.load_lanes::<T>(&self.inputs.q, &mut scratch.q[g * width * GROUP..], width);
        }
    }

    /// What the branches are added to.
    fn start<T: Float>(&self, scratch: &mut Scratch, out: &SharedRows<'_, T>) {
        let Queries { problem, b, h, first, rows } = self.queries;
        let width = problem.value_dim;
        scratch.out.fill(0.0);
        if problem.accumulate {
            for r in 0..rows {
                // SAFETY: tasks partition (b, h, first..first + rows), and this task holds one row at a time.
                T::widen(unsafe { out.row([b, first + r, h, 0], width) }, &mut scratch.row);
                let lanes = scratch.out[r / GROUP * width * GROUP..].chunks_exact_mut(GROUP);
                lanes.zip(&scratch.row).for_each(|(lanes, &x)| lanes[r % GROUP] = x);
            }
        }
    }

    /// Leaves the branch's unnormalised result in `scratch.o` and its softmax state in `scratch.softmax`.
    fn branch<T: Float>(&self, scratch: &mut Scratch, n: usize, branch: &'a BranchProblem) {
        let Block { queries, inputs, part: [part, parts], .. } = *self;
        let (head_dim, value_dim) = (queries.problem.head_dim, queries.problem.value_dim);
        scratch.o.fill(0.0);
        scratch.softmax.fill(OnlineSoftmax::EMPTY);

        let segments = &inputs.branches[n].segments;
        let count = if parts == 1 { 0 } else { queries.tiles(branch, segments, BLOCK_KV).count() };
        let own = if parts == 1 { 0..usize::MAX } else { part * count / parts..(part + 1) * count / parts };
        for keys in queries.tiles(branch, segments, BLOCK_KV).take(own.end).skip(own.start) {
            keys.load_panels::<T>(&keys.bound.k, &mut scratch.k, head_dim);
            keys.load::<T>(&keys.bound.v, &mut scratch.v, value_dim);
            for (g, group) in queries.groups().filter(|(_, group)| group.sees(&keys)) {
                let q = &scratch.q[g * head_dim * GROUP..][..head_dim * GROUP];
                group.lane_logits::<T>(&keys, (q, &scratch.k), &mut scratch.s, None);
                let s = &mut scratch.s[..keys.columns * GROUP];
                let correction = scratch.softmax[g].step(s);
                Product {
                    left: Left::Transposed(&scratch.v, padded(value_dim)),
                    right: s,
                    right_stride: GROUP,
                    c: &mut scratch.o[g * value_dim * GROUP..][..value_dim * GROUP],
                    stride: GROUP,
                    extents: [value_dim, GROUP, keys.columns],
                    into: Into::Rescaled(&correction),
                }
                .run();
            }
        }
    }

    /// Adds what `branch` left to the sum, with its gate and region, and stores its lse.
    fn add_branch(&self, scratch: &mut Scratch, n: usize, lse: &Option<SharedRows<'_, f32>>) {
        let Block { queries, inputs, .. } = *self;
        let branch = &inputs.branches[n];
        let gate = branch.gate(queries.b, queries.h);
        let width = queries.problem.value_dim * GROUP;
        for (g, Queries { b, h, first, rows, .. }) in queries.groups() {
            let softmax = &scratch.softmax[g];
            if let Some(lse) = lse {
                for r in 0..rows {
                    // SAFETY: as in `start`; an element of lse is a row of width 1.
                    let lse = unsafe { lse.row([n, b, h, first + r], 1) };
                    lse[0] = softmax.lse(r);
                }
            }
            if gate == 0.0 {
                continue;
            }
            let mut weight = [0.0; GROUP];
            for (r, weight) in weight.iter_mut().enumerate().take(rows).filter(|&(r, _)| softmax.sum[r] != 0.0) {
                // Equation 7: the weight carries the normalisation, all in f32.
                *weight = gate * branch.region(b, h, first + r) / softmax.sum[r];
            }
            add_weighted(&mut scratch.out[g * width..][..width], &scratch.o[g * width..][..width], &weight);
        }
    }

    /// Rounds the sum to `out`.
    fn store<T: Float>(&self, scratch: &mut Scratch, out: &SharedRows<'_, T>) {
        let Queries { problem, b, h, first, rows } = self.queries;
        let width = problem.value_dim;
        for r in 0..rows {
            from_lanes(&scratch.out[r / GROUP * width * GROUP..], r % GROUP, &mut scratch.row);
            // SAFETY: as in `start`.
            T::narrow(&scratch.row, unsafe { out.row([b, first + r, h, 0], width) });
        }
    }
}

impl Keys<'_> {
    /// Converts the rows of keys to panels.
    pub(super) fn load_panels<T: Float>(&self, view: &View<'_, 4>, panels: &mut [f32], width: usize) {
        for c in 0..self.columns {
            let start = view.position([self.b, self.start + c, self.head, 0]);
            to_panels(&view.data::<T>()[start..][..width], c, self.columns, panels);
        }
    }
}
