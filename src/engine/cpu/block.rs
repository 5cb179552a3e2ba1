//! The algorithm: one block of queries of one head over every branch.

use super::aligned::Aligned;
use super::convert::{Convert, narrow};
use super::element::{Element, Holds};
use super::group::{add_weighted, lane};
use super::kept::Kept;
use super::logits::{Keys, Queries};
use super::pack::{from_lanes, to_lanes, to_panels};
use super::parts::{self, Partial};
use super::prefetch::{AHEAD, lines};
use super::product::{Into, Left, Product};
use super::shared::SharedRows;
use super::softmax::{Lanes, OnlineSoftmax};
use super::turn::turn_raw;
use crate::engine::host::{Inputs, View};
use crate::plan::cpu::{BLOCK_KV, Division, GROUP, padded, parts_of};
use crate::problem::{BranchProblem, DType, Problem};

/// The tiles of one thread, those that products read made of `E`. Where queries are side by side, those of a group are.
///
/// Of a dimension that a product sums over, widths count elements.
pub(super) struct Scratch<E> {
    /// `[groups, head_dim, GROUP]`
    q: Aligned<E>,
    /// Tiles of keys, and of their values `[columns, padded value_dim]`.
    kept: Kept<E>,
    /// Logits of one group, then probabilities: `[columns, GROUP]`.
    s: Aligned<f32>,
    /// Unnormalised result of one branch: `[groups, value_dim, GROUP]`.
    o: Aligned<f32>,
    /// Sum of the branches: `[groups, value_dim, GROUP]`.
    out: Aligned<f32>,
    /// Of each group.
    softmax: Vec<OnlineSoftmax>,
    /// Which groups have met keys of the branch; `o` of the others is no result yet.
    begun: Vec<bool>,
    /// Which groups have a sum in `out`.
    summed: Vec<bool>,
}

impl<E: Element> Scratch<E> {
    pub(super) fn new(problem: &Problem, division: &Division) -> Self {
        let (head_dim, value_dim) = (problem.head_dim.div_ceil(E::NUMBERS), problem.value_dim);
        let queries = division.block_q.next_multiple_of(GROUP);
        let (k, v) = (BLOCK_KV * head_dim.next_multiple_of(GROUP), BLOCK_KV.div_ceil(E::NUMBERS) * padded(value_dim));
        Scratch {
            q: Aligned::zeroed(queries * head_dim),
            kept: Kept::new(problem, BLOCK_KV, &division.kept, [k, v]),
            s: Aligned::zeroed(BLOCK_KV * GROUP),
            o: Aligned::zeroed(queries * value_dim),
            out: Aligned::zeroed(queries * value_dim),
            softmax: vec![OnlineSoftmax::EMPTY; queries / GROUP],
            begun: vec![false; queries / GROUP],
            summed: vec![false; queries / GROUP],
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
    pub(super) fn forward<T: Convert, E: Holds<T>>(
        &self,
        scratch: &mut Scratch<E>,
        out: &'a SharedRows<'a, T>,
        lse: &Option<SharedRows<'_, f32>>,
    ) {
        self.load_queries::<T, E>(scratch);
        self.start(scratch, out);
        for (n, branch) in self.branches() {
            let whole = is_one_tile(branch);
            self.branch::<T, E>(scratch, n, branch, whole);
            if !whole {
                self.add_branch(scratch, n);
            }
            self.store_lse(scratch, n, lse);
        }
        self.store(scratch, out);
    }

    /// Leaves the results of one part of the keys in `partial`, branch by branch.
    pub(super) fn forward_part<T: Convert, E: Holds<T>>(&self, scratch: &mut Scratch<E>, partial: &mut [f32]) {
        self.load_queries::<T, E>(scratch);
        let size = partial.len() / self.queries.problem.branches.len();
        for (n, branch) in self.branches() {
            self.branch::<T, E>(scratch, n, branch, false);
            parts::save(&scratch.o, &scratch.softmax, &mut partial[n * size..][..size]);
        }
    }

    /// Computes the block's rows from the results of its parts, taken in order.
    pub(super) fn merge<T: Convert, E: Holds<T>>(
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
            self.add_branch(scratch, n);
            self.store_lse(scratch, n, lse);
        }
        self.store(scratch, out);
    }

    /// The branches that are evaluated.
    fn branches(&self) -> impl Iterator<Item = (usize, &'a BranchProblem)> + use<'a> {
        let Block { queries: Queries { problem, b, h, .. }, inputs, with_lse, .. } = *self;
        let open = move |n: usize| with_lse || inputs.branches[n].gate(b, h) != 0.0;
        problem.branches.iter().enumerate().filter(move |&(n, _)| open(n))
    }

    fn load_queries<T: Convert, E: Holds<T>>(&self, scratch: &mut Scratch<E>) {
        self.queries.load_lanes::<T, E>(&self.inputs.q, &mut scratch.q, self.queries.problem.head_dim);
    }

    /// What the branches are added to.
    fn start<T: Convert, E>(&self, scratch: &mut Scratch<E>, out: &SharedRows<'_, T>) {
        let Queries { problem, b, h, first, .. } = self.queries;
        let width = problem.value_dim;
        scratch.summed.fill(problem.accumulate);
        if problem.accumulate {
            for (r, count) in self.queries.slices() {
                // SAFETY: tasks partition (b, h, first..first + rows), and this task reads here, each row once.
                let rows = (r..r + count).map(|r| unsafe { &*out.row([b, first + r, h, 0], width) });
                to_lanes::<T, f32>(rows, &mut scratch.out[lane(r, width)..], width);
            }
        }
    }

    /// Computes branch `n`: adds it to the sum where `whole`, else leaves its unnormalised result in `scratch.o`; its softmax state
    /// is in `scratch.softmax` either way.
    ///
    /// A branch of one tile is whole: with its last key the softmax is complete, its weights are known before the product with the
    /// values, and their sums need no place of their own.
    fn branch<T: Convert, E: Holds<T>>(
        &self,
        scratch: &mut Scratch<E>,
        n: usize,
        branch: &'a BranchProblem,
        whole: bool,
    ) {
        let Block { queries, inputs, part: [part, parts], .. } = *self;
        let (head_dim, value_dim) = (queries.problem.head_dim.div_ceil(E::NUMBERS), queries.problem.value_dim);
        scratch.softmax.fill(OnlineSoftmax::EMPTY);
        scratch.begun.fill(false);

        let part = [part, parts.min(parts_of(branch))];
        for keys in queries.tiles_of_part(branch, &inputs.branches[n].segments, BLOCK_KV, part) {
            let [k, v] = load::<T, E>(&mut scratch.kept, &keys, queries.problem);
            for (g, group) in queries.groups().filter(|(_, group)| group.sees(&keys)) {
                let q = &scratch.q[g * head_dim * GROUP..][..head_dim * GROUP];
                group.lane_logits::<T, E>(&keys, (q, k), &mut scratch.s, None);
                let s = &mut scratch.s[..keys.columns * GROUP];
                let correction = scratch.softmax[g].step(s);
                let weight;
                let (c, into) = if whole {
                    weight = match self.weight(n, &group, &scratch.softmax[g]) {
                        Some(weight) => weight,
                        None => continue,
                    };
                    let summed = std::mem::replace(&mut scratch.summed[g], true);
                    (&mut scratch.out, if summed { Into::WeightedAdded(&weight) } else { Into::Weighted(&weight) })
                } else {
                    let begun = std::mem::replace(&mut scratch.begun[g], true);
                    (&mut scratch.o, if begun { Into::Rescaled(&correction) } else { Into::Scaled(1.0) })
                };
                Product {
                    left: Left::Transposed(v, padded(value_dim)),
                    right: E::probabilities(s),
                    right_stride: GROUP,
                    c: &mut c[g * value_dim * GROUP..][..value_dim * GROUP],
                    stride: GROUP,
                    extents: [value_dim, GROUP, keys.columns.div_ceil(E::NUMBERS)],
                    into,
                }
                .run();
            }
        }
        if whole {
            return;
        }
        for (_, o) in scratch.begun.iter().zip(scratch.o.chunks_mut(value_dim * GROUP)).filter(|(begun, _)| !**begun) {
            o.fill(0.0);
        }
    }

    /// Adds what `branch` left to the sum, with its gate and region.
    fn add_branch<E>(&self, scratch: &mut Scratch<E>, n: usize) {
        let width = self.queries.problem.value_dim * GROUP;
        for (g, group) in self.queries.groups() {
            let Some(weight) = self.weight(n, &group, &scratch.softmax[g]) else { continue };
            let (out, o) = (&mut scratch.out[g * width..][..width], &scratch.o[g * width..][..width]);
            if !std::mem::replace(&mut scratch.summed[g], true) {
                out.fill(0.0);
            }
            add_weighted(out, o, &weight);
        }
    }

    /// Factor of each query's unnormalised result of branch `n`, or nothing where its gate is closed.
    fn weight(&self, n: usize, group: &Queries<'_>, softmax: &OnlineSoftmax) -> Option<Lanes> {
        let Queries { b, h, first, rows, .. } = *group;
        let branch = &self.inputs.branches[n];
        let gate = branch.gate(b, h);
        if gate == 0.0 {
            return None;
        }
        let mut weight = [0.0; GROUP];
        for (r, weight) in weight.iter_mut().enumerate().take(rows).filter(|&(r, _)| softmax.sum[r] != 0.0) {
            // Equation 7: the weight carries the normalisation, all in f32.
            *weight = gate * branch.region(b, h, first + r) / softmax.sum[r];
        }
        Some(weight)
    }

    fn store_lse<E>(&self, scratch: &Scratch<E>, n: usize, lse: &Option<SharedRows<'_, f32>>) {
        let Some(lse) = lse else { return };
        for ((_, Queries { b, h, first, rows, .. }), softmax) in self.queries.groups().zip(&scratch.softmax) {
            for r in 0..rows {
                // SAFETY: as in `start`; an element of lse is a row of width 1.
                let lse = unsafe { lse.row([n, b, h, first + r], 1) };
                lse[0] = softmax.lse(r);
            }
        }
    }

    /// Rounds the sum to `out`.
    fn store<T: Convert, E>(&self, scratch: &mut Scratch<E>, out: &SharedRows<'_, T>) {
        let Queries { problem, b, h, first, .. } = self.queries;
        let width = problem.value_dim;
        for (sum, _) in scratch.out.chunks_mut(width * GROUP).zip(&scratch.summed).filter(|(_, summed)| !**summed) {
            sum.fill(0.0);
        }
        for (r, count) in self.queries.slices() {
            for ahead in self.queries.ahead(r, count) {
                lines(out.address([b, first + ahead, h, 0]), width);
            }
            let lanes = &scratch.out[lane(r, width)..];
            if T::DTYPE == DType::F32
                && let Some((to, stride)) = out.rows([b, first + r, h, 0], count, width)
            {
                // SAFETY: tasks partition (b, h, first..first + rows), of which these are `count` rows of f32.
                unsafe { turn_raw((lanes.as_ptr(), GROUP), (to.cast::<f32>(), stride), [width, count]) };
                continue;
            }
            // The branches are all added.
            let turned = &mut scratch.o[..count * width];
            from_lanes(lanes, turned, width);
            for (i, row) in turned.chunks(width).enumerate() {
                // SAFETY: tasks partition (b, h, first..first + rows), and this task holds one row at a time.
                narrow(row, unsafe { out.row([b, first + r + i, h, 0], width) });
            }
        }
    }
}

/// Whether all keys of a branch are in one tile.
fn is_one_tile(branch: &BranchProblem) -> bool {
    branch.segments.iter().map(|segment| segment.seq_kv.div_ceil(BLOCK_KV)).sum::<usize>() <= 1
}

/// Keys and values of a tile, converted now unless they are kept.
///
/// Reaching a row costs more than copying it, since rows of one head lie pages apart. So where neighbouring heads are in work
/// too, all of them are converted with the first one.
fn load<'s, T: Convert, E: Holds<T>>(kept: &'s mut Kept<E>, keys: &Keys<'_>, problem: &Problem) -> [&'s [E]; 2] {
    let (place, [there, _]) = kept.find(keys);
    if !there {
        let mut tiles: Vec<_> = kept.fill_beside(keys, problem.heads / keys.segment.group).collect();
        for c in 0..keys.columns {
            for (keys, [k, _]) in &mut tiles {
                to_panels(keys.row_ahead::<T>(&keys.bound.k, c, problem.head_dim), c, keys.columns, k);
            }
        }
        for c in (0..keys.columns).step_by(E::NUMBERS) {
            for (keys, [_, v]) in &mut tiles {
                let row = |c: usize| keys.row_ahead::<T>(&keys.bound.v, c, problem.value_dim);
                let next = (E::NUMBERS == 2 && c + 1 < keys.columns).then(|| row(c + 1));
                let v = &mut v[c / E::NUMBERS * padded(problem.value_dim)..][..problem.value_dim];
                E::across(row(c), next, v);
            }
        }
    }
    kept.tile(place)
}

impl Keys<'_> {
    /// Converts rows to panels.
    pub(super) fn load_panels<T: Convert, E: Holds<T>>(&self, view: &View<'_, 4>, panels: &mut [E], width: usize) {
        for c in 0..self.columns {
            to_panels(self.row_ahead::<T>(view, c, width), c, self.columns, panels);
        }
    }

    /// Row `c`, while one of those that follow is asked for.
    fn row_ahead<'v, T: Convert>(&self, view: &View<'v, 4>, c: usize, width: usize) -> &'v [T] {
        if c + AHEAD < self.columns {
            lines(self.row::<T>(view, c + AHEAD, width).as_ptr(), width);
        }
        self.row(view, c, width)
    }
}
