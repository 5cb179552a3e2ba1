//! The tiles of one thread, and the steps from queries and keys to `dz` that every pass takes with them.

use super::Pass;
use super::rows::Row;
use crate::engine::cpu::logits::{Keys, Queries};
use crate::engine::cpu::product::{Into, Left, Product};
use crate::engine::cpu::softmax::exponentials;
use crate::engine::cpu::tile::sum;
use crate::plan::cpu::padded;
use crate::problem::{DType, Float};
use pulp::Arch;

pub(super) struct Tiles {
    /// `[block_q, padded head_dim]`
    q: Vec<f32>,
    /// `[block_q, padded value_dim]`
    pub(super) dout: Vec<f32>,
    /// `[block_kv, padded head_dim]`
    k: Vec<f32>,
    /// `[head_dim, block_kv]`
    k_transposed: Vec<f32>,
    /// `[value_dim, block_kv]`
    v_transposed: Vec<f32>,
    /// Logits, then their exponentials, then `w P`: `[block_q, block_kv]`.
    pub(super) p: Vec<f32>,
    /// `dout · v`, then `dS`, then `dz`: `[block_q, block_kv]`.
    pub(super) ds: Vec<f32>,
    /// Derivative of the softcap: `[block_q, block_kv]`, empty without one.
    slopes: Vec<f32>,
    block_kv: usize,
}

impl Tiles {
    pub(super) fn new(pass: &Pass<'_>) -> Self {
        let Pass { problem, block_q, block_kv, .. } = *pass;
        let (head_dim, value_dim) = (padded(problem.head_dim), padded(problem.value_dim));
        Tiles {
            q: vec![0.0; block_q * head_dim],
            dout: vec![0.0; block_q * value_dim],
            k: vec![0.0; block_kv * head_dim],
            k_transposed: vec![0.0; block_kv * problem.head_dim],
            v_transposed: vec![0.0; block_kv * problem.value_dim],
            p: vec![0.0; block_q * block_kv],
            ds: vec![0.0; block_q * block_kv],
            slopes: vec![0.0; if problem.softcap.is_some() { block_q * block_kv } else { 0 }],
            block_kv,
        }
    }

    /// Loads queries and their rows of `dout`.
    pub(super) fn load_queries<T: Float>(&mut self, pass: &Pass<'_>, queries: &Queries<'_>) {
        queries.load::<T>(&pass.inputs.q, &mut self.q, pass.problem.head_dim);
        queries.load::<T>(&pass.dout, &mut self.dout, pass.problem.value_dim);
    }

    /// Loads keys and, if `ds` is to follow, values.
    pub(super) fn load_keys<T: Float>(&mut self, pass: &Pass<'_>, keys: &Keys<'_>, values: bool) {
        keys.load::<T>(&keys.bound.k, &mut self.k, pass.problem.head_dim);
        keys.load_transposed::<T>(&keys.bound.k, &mut self.k_transposed, pass.problem.head_dim, self.block_kv);
        if values {
            keys.load_transposed::<T>(&keys.bound.v, &mut self.v_transposed, pass.problem.value_dim, self.block_kv);
        }
    }

    /// Leaves logits in `p` and, with `values`, `dout · v` in `ds`.
    pub(super) fn products<T: Float>(&mut self, queries: &Queries<'_>, keys: &Keys<'_>, values: bool) {
        let (head_dim, value_dim) = (queries.problem.head_dim, queries.problem.value_dim);
        let in_runs = |scale: f32| if T::DTYPE == DType::F32 { Into::ScaledRuns(scale) } else { Into::Scaled(scale) };
        let (stride, columns) = (self.block_kv, padded(keys.columns));
        Product {
            left: Left::Rows(&self.q, padded(head_dim)),
            right: &self.k_transposed,
            right_stride: stride,
            c: &mut self.p,
            stride,
            extents: [queries.rows, columns, head_dim],
            into: in_runs(queries.problem.softmax_scale),
        }
        .run();
        let slopes = (!self.slopes.is_empty()).then_some(self.slopes.as_mut_slice());
        queries.finish_logits(keys, stride, &mut self.p, slopes);
        if values {
            Product {
                left: Left::Rows(&self.dout, padded(value_dim)),
                right: &self.v_transposed,
                right_stride: stride,
                c: &mut self.ds,
                stride,
                extents: [queries.rows, columns, value_dim],
                into: in_runs(1.0),
            }
            .run();
        }
    }

    /// Turns the logits in `p` into exponentials.
    pub(super) fn exponentials(&mut self, rows: &[Row], columns: usize) {
        for (row, p) in rows.iter().zip(self.p.chunks_mut(self.block_kv)) {
            let p = &mut p[..columns];
            if row.factor == 0.0 { p.fill(0.0) } else { exponentials(p, row.max) }
        }
    }

    /// Equation 9, from exponentials and `dout · v`: leaves `w P` in `p` and, with `values`, `dS` in `ds`.
    pub(super) fn differentiate(&mut self, rows: &[Row], columns: usize, values: bool) {
        let tiles = self.p.chunks_mut(self.block_kv).zip(self.ds.chunks_mut(self.block_kv));
        for (&Row { factor, weight, delta, .. }, (p, ds)) in rows.iter().zip(tiles) {
            let (p, ds, weight) = (&mut p[..columns], &mut ds[..columns], f64::from(weight));
            // Compiled for the processor's registers, which its f64 needs most.
            Arch::new().dispatch(
                #[inline(always)]
                || {
                    for (p, ds) in p.iter_mut().zip(ds) {
                        let probability = f64::from(*p) * factor;
                        if values {
                            *ds = (probability * (weight * f64::from(*ds) - delta)) as f32;
                        }
                        *p = (probability * weight) as f32;
                    }
                },
            );
        }
    }

    /// Sums `dS` over the rows, the columns or both. Returns the rows and columns that are left.
    pub(super) fn reduce(
        &mut self,
        rows: usize,
        columns: usize,
        over_rows: bool,
        over_columns: bool,
    ) -> (usize, usize) {
        if over_rows {
            let (sums, others) = self.ds.split_at_mut(self.block_kv);
            for ds in others.chunks(self.block_kv).take(rows - 1) {
                sums[..columns].iter_mut().zip(ds).for_each(|(sum, ds)| *sum += ds);
            }
        }
        let rows = if over_rows { 1 } else { rows };
        if over_columns {
            self.ds.chunks_mut(self.block_kv).take(rows).for_each(|ds| ds[0] = sum(&ds[..columns]));
        }
        (rows, if over_columns { 1 } else { columns })
    }

    /// Equation 10: `dS` becomes `dz`.
    pub(super) fn through_the_cap(&mut self, rows: usize, columns: usize) {
        if !self.slopes.is_empty() {
            let tiles = self.ds.chunks_mut(self.block_kv).zip(self.slopes.chunks(self.block_kv));
            for (ds, slopes) in tiles.take(rows) {
                ds[..columns].iter_mut().zip(slopes).for_each(|(ds, slope)| *ds *= slope);
            }
        }
    }

    /// Equation 11 without `softmax_scale`: `dq += dz k`; rows of dq are padded.
    pub(super) fn add_dq(&self, dq: &mut [f32], queries: &Queries<'_>, keys: &Keys<'_>) {
        let width = padded(queries.problem.head_dim);
        Product {
            left: Left::Rows(&self.ds, self.block_kv),
            right: &self.k,
            right_stride: width,
            c: dq,
            stride: width,
            extents: [queries.rows, width, keys.columns],
            into: Into::Added(1.0),
        }
        .run();
    }

    /// Equation 11 without `softmax_scale`: `dk += dzᵀ q`; rows of dk are padded.
    pub(super) fn add_dk(&self, dk: &mut [f32], queries: &Queries<'_>, keys: &Keys<'_>) {
        self.add_transposed(&self.ds, &self.q, padded(queries.problem.head_dim), dk, [queries.rows, keys.columns]);
    }

    /// Equation 11: `dv += (w P)ᵀ dout`; rows of dv are padded.
    pub(super) fn add_dv(&self, dv: &mut [f32], queries: &Queries<'_>, keys: &Keys<'_>) {
        self.add_transposed(&self.p, &self.dout, padded(queries.problem.value_dim), dv, [queries.rows, keys.columns]);
    }

    fn add_transposed(&self, left: &[f32], right: &[f32], width: usize, sums: &mut [f32], [rows, columns]: [usize; 2]) {
        Product {
            left: Left::Transposed(left, self.block_kv),
            right,
            right_stride: width,
            c: sums,
            stride: width,
            extents: [columns, width, rows],
            into: Into::Added(1.0),
        }
        .run();
    }
}
