//! The algorithm: one block of queries of one head over every branch.

use super::element::{Element, Holds};
use super::group::add_weighted;
use super::logits::{Keys, Queries};
use super::pack::{from_lanes, to_lanes, to_panels};
use super::parts::{self, Partial};
use super::prefetch::Ahead;
use super::product::{Into, Left, Product};
use super::shared::SharedRows;
use super::softmax::OnlineSoftmax;
use crate::engine::host::{Inputs, View};
use crate::plan::cpu::{BLOCK_KV, GROUP, padded, parts_of};
use crate::problem::{BranchProblem, Float, Problem};

/// The tiles of one thread, those that products read made of `E`. Where queries are side by side, those of a group are.
///
/// Of a dimension that a product sums over, widths count elements.
pub(super) struct Scratch<E> {
    /// `[groups, head_dim, GROUP]`
    q: Vec<E>,
    /// Keys of one tile, in panels: `[ceil(head_dim / GROUP), columns, GROUP]`.
    k: Vec<E>,
    /// Their values: `[columns, padded value_dim]`.
    v: Vec<E>,
    /// Logits of one group, then probabilities: `[columns, GROUP]`.
    s: Vec<f32>,
    /// Unnormalised result of one branch: `[groups, value_dim, GROUP]`.
    o: Vec<f32>,
    /// Sum of the branches: `[groups, value_dim, GROUP]`.
    out: Vec<f32>,
    /// Of each group.
    softmax: Vec<OnlineSoftmax>,
}

impl<E: Element> Scratch<E> {
    pub(super) fn new(problem: &Problem, block_q: usize) -> Self {
        let (head_dim, value_dim) = (problem.head_dim.div_ceil(E::NUMBERS), problem.value_dim);
        let (queries, zero) = (block_q.next_multiple_of(GROUP), E::zeroed());
        Scratch {
            q: vec![zero; queries * head_dim],
            k: vec![zero; BLOCK_KV * head_dim.next_multiple_of(GROUP)],
            v: vec![zero; BLOCK_KV.div_ceil(E::NUMBERS) * padded(value_dim)],
            s: vec![0.0; BLOCK_KV * GROUP],
            o: vec![0.0; queries * value_dim],
            out: vec![0.0; queries * value_dim],
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
    /// The block that this thread most likely computes next.
    pub(super) next: Option<Queries<'a>>,
}

impl<'a> Block<'a> {
    /// Computes the block's rows of `out` and `lse`.
    pub(super) fn forward<T: Float, E: Holds<T>>(
        &self,
        scratch: &mut Scratch<E>,
        out: &'a SharedRows<'a, T>,
        lse: &Option<SharedRows<'_, f32>>,
    ) {
        self.load_queries::<T, E>(scratch);
        self.start(scratch, out);
        for (n, branch) in self.branches() {
            self.branch::<T, E>(scratch, n, branch, Some(out));
            self.add_branch(scratch, n, lse);
        }
        self.store(scratch, out);
    }

    /// Leaves the results of one part of the keys in `partial`, branch by branch.
    pub(super) fn forward_part<T: Float, E: Holds<T>>(&self, scratch: &mut Scratch<E>, partial: &mut [f32]) {
        self.load_queries::<T, E>(scratch);
        let size = partial.len() / self.queries.problem.branches.len();
        for (n, branch) in self.branches() {
            self.branch::<T, E>(scratch, n, branch, None);
            parts::save(&scratch.o, &scratch.softmax, &mut partial[n * size..][..size]);
        }
    }

    /// Computes the block's rows from the results of its parts, taken in order.
    pub(super) fn merge<T: Float, E: Holds<T>>(
        &self,
        scratch: &mut Scratch<E>,
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

    fn load_queries<T: Float, E: Holds<T>>(&self, scratch: &mut Scratch<E>) {
        let width = self.queries.problem.head_dim;
        let size = width.div_ceil(E::NUMBERS) * GROUP;
        for (g, group) in self.queries.groups() {
            group.load_lanes::<T, E>(&self.inputs.q, &mut scratch.q[g * size..], width);
        }
    }

    /// What the branches are added to.
    fn start<T: Float, E>(&self, scratch: &mut Scratch<E>, out: &SharedRows<'_, T>) {
        let Queries { problem, b, h, .. } = self.queries;
        let width = problem.value_dim;
        scratch.out.fill(0.0);
        if problem.accumulate {
            for (g, Queries { first, rows, .. }) in self.queries.groups() {
                // SAFETY: tasks partition (b, h, first..first + rows), and this task reads here, each row once.
                let rows = (0..rows).map(|r| unsafe { &*out.row([b, first + r, h, 0], width) });
                to_lanes::<T, f32>(rows, &mut scratch.out[g * width * GROUP..][..width * GROUP], width, GROUP);
            }
        }
    }

    /// Leaves the branch's unnormalised result in `scratch.o` and its softmax state in `scratch.softmax`. `out` is where the
    /// block's result will go.
    fn branch<T: Float, E: Holds<T>>(
        &self,
        scratch: &mut Scratch<E>,
        n: usize,
        branch: &'a BranchProblem,
        out: Option<&'a SharedRows<'a, T>>,
    ) {
        let Block { queries, inputs, part: [part, parts], .. } = *self;
        let (head_dim, value_dim) = (queries.problem.head_dim.div_ceil(E::NUMBERS), queries.problem.value_dim);
        scratch.o.fill(0.0);
        scratch.softmax.fill(OnlineSoftmax::EMPTY);

        let segments = &inputs.branches[n].segments;
        let part = [part, parts.min(parts_of(branch))];
        let mut tiles = queries.tiles_of_part(branch, segments, BLOCK_KV, part).peekable();
        while let Some(keys) = tiles.next() {
            let ahead = match tiles.peek() {
                None if n == 0 => Ahead::after(self, out),
                next => Ahead::tile(queries.problem, next.copied()),
            };
            keys.load_panels::<T, E>(&keys.bound.k, &mut scratch.k, queries.problem.head_dim);
            keys.load_values::<T, E>(&mut scratch.v, value_dim);
            for (g, group) in queries.groups() {
                ahead.fetch(g, scratch.softmax.len());
                if !group.sees(&keys) {
                    continue;
                }
                let q = &scratch.q[g * head_dim * GROUP..][..head_dim * GROUP];
                group.lane_logits::<T, E>(&keys, (q, &scratch.k), &mut scratch.s, None);
                let s = &mut scratch.s[..keys.columns * GROUP];
                let correction = scratch.softmax[g].step(s);
                Product {
                    left: Left::Transposed(&scratch.v, padded(value_dim)),
                    right: E::probabilities(s),
                    right_stride: GROUP,
                    c: &mut scratch.o[g * value_dim * GROUP..][..value_dim * GROUP],
                    stride: GROUP,
                    extents: [value_dim, GROUP, keys.columns.div_ceil(E::NUMBERS)],
                    into: Into::Rescaled(&correction),
                }
                .run();
            }
        }
    }

    /// Adds what `branch` left to the sum, with its gate and region, and stores its lse.
    fn add_branch<E>(&self, scratch: &mut Scratch<E>, n: usize, lse: &Option<SharedRows<'_, f32>>) {
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
    fn store<T: Float, E>(&self, scratch: &mut Scratch<E>, out: &SharedRows<'_, T>) {
        let width = self.queries.problem.value_dim;
        // The branches are all added.
        let row = &mut scratch.o[..width];
        for (g, Queries { b, h, first, rows, .. }) in self.queries.groups() {
            for r in 0..rows {
                from_lanes(&scratch.out[g * width * GROUP..][..width * GROUP], r, row);
                // SAFETY: tasks partition (b, h, first..first + rows), and this task holds one row at a time.
                T::narrow(row, unsafe { out.row([b, first + r, h, 0], width) });
            }
        }
    }
}

impl Keys<'_> {
    /// Converts the rows of keys to panels.
    pub(super) fn load_panels<T: Float, E: Holds<T>>(&self, view: &View<'_, 4>, panels: &mut [E], width: usize) {
        for c in 0..self.columns {
            to_panels(self.row::<T>(view, c, width), c, self.columns, panels);
        }
    }

    /// Converts the rows of values, `[columns, padded value_dim]`; columns count elements.
    fn load_values<T: Float, E: Holds<T>>(&self, tile: &mut [E], width: usize) {
        for (first, tile) in (0..self.columns).step_by(E::NUMBERS).zip(tile.chunks_exact_mut(padded(width))) {
            let next = self.columns.min(first + E::NUMBERS) > first + 1;
            let row = |c: usize| self.row::<T>(&self.bound.v, c, width);
            E::across(row(first), next.then(|| row(first + 1)), &mut tile[..width]);
        }
    }
}
