//! The pass over the queries: the state of every row and, where it is wanted, dq.
//!
//! One task is a block of queries of one head. Of each branch it sees the keys twice, once for the softmax and `Δ`
//! (docs/math.md, equations 2 to 9) and once for dq. A branch whose keys fit one tile is seen once.

use super::rows::{Row, Rows};
use super::tiles::Tiles;
use super::{Pass, SavedViews};
use crate::engine::cpu::logits::{Queries, row_mut};
use crate::engine::cpu::shared::Output;
use crate::engine::cpu::tile::{OnlineSoftmax, dot, sum_f64};
use crate::plan::cpu::padded;
use crate::problem::{DType, Float};
use rayon::prelude::*;

struct Scratch {
    tiles: Tiles,
    /// Sum of the branches: `[block_q, padded head_dim]`.
    dq: Vec<f32>,
    softmax: Vec<OnlineSoftmax>,
    /// `Σ exp(S - max)` and `Σ exp(S - max) dout · v` so far.
    sums: Vec<[f64; 2]>,
    /// A row of the saved `out`.
    out: Vec<f32>,
}

/// Fills `rows` and stores dq.
pub(super) fn run<T: Float>(pass: &Pass<'_>, rows: &mut Rows, dq: Option<&Output<'_, T>>) {
    let Pass { problem, block_q, .. } = *pass;
    let scratch = || Scratch {
        tiles: Tiles::new(pass),
        dq: vec![0.0; block_q * padded(problem.head_dim)],
        softmax: vec![OnlineSoftmax::EMPTY; block_q],
        sums: vec![[0.0; 2]; block_q],
        out: vec![0.0; padded(problem.value_dim)],
    };
    rows.blocks().for_each_init(scratch, |scratch, (index, rows)| {
        let block = Block { pass, queries: Queries::block(problem, index, block_q) };
        block.run::<T>(scratch, rows, dq);
    });
}

struct Block<'a> {
    pass: &'a Pass<'a>,
    queries: Queries<'a>,
}

impl Block<'_> {
    fn run<T: Float>(&self, scratch: &mut Scratch, rows: &mut [Row], dq: Option<&Output<'_, T>>) {
        let Block { pass, queries } = *self;
        let Queries { problem, b, h, first, .. } = queries;
        let width = problem.head_dim;
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
            let tiles = if self.saved_rows::<T>(scratch, rows) { 0 } else { self.sweep::<T>(scratch, n, rows) };
            if dq.is_some() && !closed {
                self.add_dq::<T>(scratch, n, rows, tiles == 1);
            }
        }
        if let Some(dq) = dq {
            for r in 0..queries.rows {
                let row = &mut row_mut(&mut scratch.dq, r, padded(width))[..width];
                row.iter_mut().for_each(|dq| *dq *= problem.softmax_scale);
                // SAFETY: tasks partition (b, h, first..first + rows).
                unsafe { dq.store([b, first + r, h, 0], row) };
            }
        }
    }

    /// Takes the rows' state from what the forward saved, if that spares a sweep and tells enough. A branch of one tile is
    /// seen once either way, and `Δ` from its products lacks the rounding of `out`.
    fn saved_rows<T: Float>(&self, scratch: &mut Scratch, rows: &mut [Row]) -> bool {
        let Block { pass, queries: Queries { problem, b, h, first, .. } } = *self;
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
            Queries { first: first + r, rows: 1, ..self.queries }.load::<T>(out, &mut scratch.out, width);
            let dout = &scratch.tiles.dout[r * padded(width)..][..width];
            // Equation 12 of a single branch.
            let delta = dot(dout, &scratch.out[..width]);
            *row = Row { max: lse_of(r), weight: pass.weight(0, [b, h, first + r]), factor: 1.0, delta, dout_o: 0.0 };
        }
        true
    }

    /// Goes over a branch's keys for the rows' state. Returns the number of tiles; the exponentials and `dout · v` of the
    /// last are left in place.
    fn sweep<T: Float>(&self, scratch: &mut Scratch, n: usize, rows: &mut [Row]) -> usize {
        let Block { pass, queries } = *self;
        let Scratch { tiles, softmax, sums, .. } = scratch;
        let values = pass.needs[n].delta;
        softmax.fill(OnlineSoftmax::EMPTY);
        sums.fill([0.0; 2]);
        let mut count = 0;
        for keys in pass.tiles(n, &queries) {
            tiles.load_keys::<T>(pass, &keys, values);
            tiles.products::<T>(&queries, &keys, values);
            for (r, [sum, dout_o]) in sums.iter_mut().enumerate().take(queries.rows) {
                let p = &mut tiles.p[r * pass.block_kv..][..keys.columns];
                let correction = f64::from(softmax[r].step(p));
                *sum = correction * *sum + sum_f64(p);
                if values {
                    *dout_o = correction * *dout_o + dot(p, &tiles.ds[r * pass.block_kv..][..keys.columns]);
                }
            }
            count += 1;
        }
        for (r, (row, [sum, dout_o])) in rows.iter_mut().zip(sums).enumerate().filter(|(_, (_, [sum, _]))| *sum != 0.0)
        {
            let weight = pass.weight(n, [queries.b, queries.h, queries.first + r]);
            let dout_o = *dout_o / *sum;
            *row = Row { max: softmax[r].max, weight, factor: 1.0 / *sum, delta: f64::from(weight) * dout_o, dout_o };
        }
        count
    }

    /// Adds a branch's share of dq; `kept` says that the tiles hold its only keys, as `sweep` left them.
    fn add_dq<T: Float>(&self, scratch: &mut Scratch, n: usize, rows: &[Row], kept: bool) {
        let Block { pass, queries } = *self;
        let Scratch { tiles, dq, .. } = scratch;
        for keys in pass.tiles(n, &queries) {
            if !kept {
                tiles.load_keys::<T>(pass, &keys, true);
                tiles.products::<T>(&queries, &keys, true);
                tiles.exponentials(rows, keys.columns);
            }
            tiles.differentiate(rows, keys.columns, true);
            tiles.through_the_cap(queries.rows, keys.columns);
            tiles.add_dq(dq, &queries, &keys);
        }
    }
}

/// The largest saved lse that still tells the probabilities: `exp(S - lse)` is off by the rounding of the lse, 2^-24 of
/// its size. Of a mask at the lowest finite number nothing but the mask is left.
fn largest_lse<T: Float>() -> f32 {
    match T::DTYPE {
        DType::F32 => 16.0,
        DType::F16 => 1024.0,
        _ => 8192.0,
    }
}
