//! The pass over the queries: the state of every row, dq, and on the way dk and dv where the plan lets it.
//!
//! One task is some blocks of queries of one unit of heads (src/plan/cpu.rs). Of each branch a block sees the keys twice, once
//! for the softmax and `Δ` (docs/math.md, equations 2 to 9) and once for the gradients. A branch whose keys fit one tile, or
//! whose state was saved, is seen once.

use super::key_sums;
use super::rows::{Row, Rows};
use super::steps::Sums;
use super::tiles::Tiles;
use super::{Pass, SavedViews, Wanted};
use crate::engine::cpu::aligned::Aligned;
use crate::engine::cpu::convert::{Convert, widen};
use crate::engine::cpu::logits::Queries;
use crate::engine::cpu::pack::from_lanes;
use crate::engine::cpu::softmax::OnlineSoftmax;
use crate::engine::cpu::tile::dot;
use crate::plan::cpu::{GROUP, QueryPass, padded};
use crate::problem::{DType, Gradient};
use rayon::prelude::*;

struct Scratch {
    tiles: Tiles,
    /// Sum of the branches: `[groups, head_dim, GROUP]`.
    dq: Aligned<f32>,
    /// Of each group.
    softmax: Vec<OnlineSoftmax>,
    sums: Vec<Sums>,
    /// A row of the saved `out`, or those of dq of a group.
    rows: Vec<f32>,
    /// dk and dv of a unit, where its blocks are one part.
    keys: Aligned<f32>,
}

/// The blocks of one part of a unit: where they are, and their rows.
struct Task<'a> {
    unit: usize,
    blocks: Vec<([usize; 3], &'a mut [Row])>,
    /// dk and dv of the part, where it is one of several.
    keys: &'a mut [f32],
}

/// Fills `rows` and stores dq, and the gradients that `division` adds up.
pub(super) fn run<T: Convert>(pass: &Pass<'_>, rows: &mut Rows, wanted: &Wanted<'_, T>, division: &QueryPass) {
    let Pass { problem, block_q, .. } = *pass;
    let QueryPass { parts, numbers, .. } = *division;
    let scratch = || Scratch {
        tiles: Tiles::new(pass),
        dq: Aligned::zeroed(block_q * problem.head_dim),
        softmax: vec![OnlineSoftmax::EMPTY; block_q / GROUP],
        sums: vec![Sums::EMPTY; block_q / GROUP],
        rows: vec![0.0; problem.value_dim.max(problem.head_dim * GROUP)],
        keys: Aligned::zeroed(if parts == 1 { numbers } else { 0 }),
    };
    let mut partial = Aligned::zeroed(if parts == 1 { 0 } else { division.units * parts * numbers });
    tasks(division, rows, &mut partial).into_par_iter().for_each_init(scratch, |scratch, task| {
        let mut own = std::mem::take(&mut scratch.keys);
        let keys = if parts == 1 { &mut *own } else { task.keys };
        keys.fill(0.0);
        for (place, rows) in task.blocks {
            let queries = Queries::block(problem, place, block_q);
            Block { pass, queries, wanted, division }.run(scratch, rows, keys);
        }
        if parts == 1 {
            key_sums::store(pass, division, task.unit, keys, wanted);
        }
        scratch.keys = own;
    });
    if parts > 1 && numbers > 0 {
        partial.par_chunks_mut(parts * numbers).enumerate().for_each(|(unit, partial)| {
            key_sums::store(pass, division, unit, key_sums::add_parts(partial, numbers), wanted);
        });
    }
}

/// Deals the blocks of every unit to its parts in turn, so that where rows see more keys the later they are, parts are alike.
fn tasks<'a>(division: &QueryPass, rows: &'a mut Rows, mut partial: &'a mut [f32]) -> Vec<Task<'a>> {
    let QueryPass { units, parts, numbers, .. } = *division;
    let mut tasks = Vec::with_capacity(units * parts);
    for task in 0..units * parts {
        let keys = partial.split_off_mut(..if parts == 1 { 0 } else { numbers }).unwrap_or_default();
        tasks.push(Task { unit: task / parts, blocks: Vec::new(), keys });
    }
    let mut seen = vec![0; units];
    for (place, rows) in rows.blocks() {
        let unit = division.unit_of(place);
        tasks[unit * parts + seen[unit] % parts].blocks.push((place, rows));
        seen[unit] += 1;
    }
    tasks
}

struct Block<'a, T> {
    pass: &'a Pass<'a>,
    queries: Queries<'a>,
    wanted: &'a Wanted<'a, T>,
    division: &'a QueryPass,
}

impl<T: Convert> Block<'_, T> {
    fn run(&self, scratch: &mut Scratch, rows: &mut [Row], keys: &mut [f32]) {
        let Block { pass, queries, wanted, .. } = *self;
        let Queries { problem, b, h, .. } = queries;
        scratch.tiles.load_queries::<T>(pass, &queries);
        scratch.dq.fill(0.0);
        let branches = rows.chunks_mut(rows.len() / problem.branches.len());
        for (n, rows) in branches.enumerate() {
            let need = pass.needs[n];
            let closed = pass.inputs.branches[n].gate(b, h) == 0.0;
            if !need.softmax || (closed && !need.dout_o) {
                continue;
            }
            let rows = &mut rows[..queries.rows];
            let tiles = if self.saved_rows(scratch, rows) { 0 } else { self.sweep(scratch, n, rows) };
            if !closed {
                self.add_gradients(scratch, n, rows, tiles == 1, keys);
            }
        }
        if let Some((_, dq)) = wanted.find(Gradient::Q) {
            let width = problem.head_dim;
            for (g, Queries { first, rows, .. }) in queries.groups() {
                let dq_rows = &mut scratch.rows[..rows * width];
                from_lanes(&scratch.dq[g * width * GROUP..][..width * GROUP], dq_rows, width);
                dq_rows.iter_mut().for_each(|dq| *dq *= problem.softmax_scale);
                for (r, row) in dq_rows.chunks(width).enumerate() {
                    // SAFETY: tasks partition the blocks, and these (b, h, first..first + rows).
                    unsafe { dq.store([b, first + r, h, 0], row) };
                }
            }
        }
    }

    /// Takes the rows' state from what the forward saved, if that spares a sweep and tells enough. A branch of one tile is
    /// seen once either way, and `Δ` from its products lacks the rounding of `out`.
    fn saved_rows(&self, scratch: &mut Scratch, rows: &mut [Row]) -> bool {
        let Block { pass, queries: Queries { problem, b, h, first, .. }, .. } = *self;
        let Some(SavedViews { out, lse }) = &pass.saved else { return false };
        if pass.tiles(0, &self.queries).nth(1).is_none() {
            return false;
        }
        let lse_of = |r: usize| lse.get([0, b, h, first + r]) as f32;
        if !(0..rows.len()).all(|r| lse_of(r) == f32::NEG_INFINITY || lse_of(r).abs() <= largest_lse::<T>()) {
            return false;
        }
        let width = problem.value_dim;
        for (r, row) in rows.iter_mut().enumerate().filter(|&(r, _)| lse_of(r) != f32::NEG_INFINITY) {
            let start = out.position([b, first + r, h, 0]);
            widen(&out.data::<T>()[start..][..width], &mut scratch.rows[..width]);
            let dout = &scratch.tiles.dout_rows[r * padded(width)..][..width];
            // Equation 12 of a single branch.
            let delta = dot(dout, &scratch.rows[..width]);
            *row = Row { max: lse_of(r), weight: pass.weight(0, [b, h, first + r]), factor: 1.0, delta, dout_o: 0.0 };
        }
        true
    }

    /// Goes over a branch's keys for the rows' state. Returns the number of tiles; the exponentials and `dout · v` of the
    /// last are left in place.
    fn sweep(&self, scratch: &mut Scratch, n: usize, rows: &mut [Row]) -> usize {
        let Block { pass, queries, .. } = *self;
        let Scratch { tiles, softmax, sums, .. } = scratch;
        let values = pass.needs[n].delta;
        softmax.fill(OnlineSoftmax::EMPTY);
        sums.fill(Sums::EMPTY);
        let mut count = 0;
        for keys in pass.tiles(n, &queries) {
            tiles.load_keys::<T>(pass, &keys, values);
            tiles.products::<T>(&queries, &keys, values);
            tiles.step(softmax, sums, (&queries, &keys), values);
            count += 1;
        }
        for (r, row) in rows.iter_mut().enumerate() {
            let (g, lane) = (r / GROUP, r % GROUP);
            let [sum, dout_o] = sums[g].of(lane);
            if sum != 0.0 {
                let weight = pass.weight(n, [queries.b, queries.h, queries.first + r]);
                let (max, dout_o) = (softmax[g].max[lane], dout_o / sum);
                *row = Row { max, weight, factor: 1.0 / sum, delta: f64::from(weight) * dout_o, dout_o };
            }
        }
        count
    }

    /// Adds a branch's share of dq, and of dk and dv that are added up here; `kept` says that the tiles hold the branch's only
    /// keys, as `sweep` left them.
    fn add_gradients(&self, scratch: &mut Scratch, n: usize, rows: &[Row], kept: bool, sums: &mut [f32]) {
        let Block { pass, queries, wanted, division } = *self;
        let Scratch { tiles, dq, .. } = scratch;
        let with_dq = wanted.find(Gradient::Q).is_some();
        for keys in pass.tiles(n, &queries) {
            let [dk, dv] = [Gradient::K(keys.number), Gradient::V(keys.number)]
                .map(|gradient| division.rows(gradient, [queries.b, queries.h], keys.start, keys.columns));
            let values = with_dq || dk.is_some();
            if !values && dv.is_none() {
                continue;
            }
            if !kept {
                tiles.load_keys::<T>(pass, &keys, values);
                tiles.products::<T>(&queries, &keys, values);
            }
            tiles.differentiate(rows, (&queries, &keys), kept, values);
            if let Some(dv) = dv {
                tiles.add_dv(&mut sums[dv], &queries, &keys);
            }
            if values {
                tiles.through_the_cap(&queries, &keys);
            }
            if with_dq {
                tiles.add_dq(dq, &queries, &keys);
            }
            if let Some(dk) = dk {
                tiles.add_dk(&mut sums[dk], &queries, &keys);
            }
        }
    }
}

/// The largest saved lse that still tells the probabilities: `exp(S - lse)` is off by the rounding of the lse, 2^-24 of
/// its size. Of a mask at the lowest finite number nothing but the mask is left.
fn largest_lse<T: Convert>() -> f32 {
    match T::DTYPE {
        DType::F32 => 16.0,
        DType::F16 => 1024.0,
        _ => 8192.0,
    }
}
