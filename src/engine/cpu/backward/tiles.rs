//! The tiles of one thread, and the steps from queries and keys to `dz` that every pass takes with them.

use super::Pass;
use super::rows::Row;
use crate::engine::cpu::logits::{Keys, Queries, run_length};
use crate::engine::cpu::tile::{Matrix, exponentials, matmul_add, matmul_transposed, sum, transposed_matmul_add};
use crate::problem::Float;

pub(super) struct Tiles {
    /// `[block_q, head_dim]`
    q: Vec<f32>,
    /// `[block_q, value_dim]`
    pub(super) dout: Vec<f32>,
    /// `[block_kv, head_dim]`
    k: Vec<f32>,
    /// `[block_kv, value_dim]`
    v: Vec<f32>,
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
        Tiles {
            q: vec![0.0; block_q * problem.head_dim],
            dout: vec![0.0; block_q * problem.value_dim],
            k: vec![0.0; block_kv * problem.head_dim],
            v: vec![0.0; block_kv * problem.value_dim],
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
        if values {
            keys.load::<T>(&keys.bound.v, &mut self.v, pass.problem.value_dim);
        }
    }

    /// Leaves logits in `p` and, with `values`, `dout · v` in `ds`.
    pub(super) fn products<T: Float>(&mut self, queries: &Queries<'_>, keys: &Keys<'_>, values: bool) {
        let (slopes, value_dim) = (&mut self.slopes, queries.problem.value_dim);
        let slopes = (!slopes.is_empty()).then_some(slopes.as_mut_slice());
        queries.logits::<T>(keys, (&self.q, &self.k), self.block_kv, &mut self.p, slopes);
        if values {
            matmul_transposed(
                &mut self.ds,
                self.block_kv,
                Matrix::new(&self.dout, queries.rows, value_dim, value_dim),
                Matrix::new(&self.v, keys.columns, value_dim, value_dim),
                1.0,
                run_length::<T>(value_dim),
            );
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
            if values {
                let ds = ds.iter_mut().zip(&*p);
                ds.for_each(|(ds, &p)| *ds = (f64::from(p) * factor * (weight * f64::from(*ds) - delta)) as f32);
            }
            p.iter_mut().for_each(|p| *p = (f64::from(*p) * factor * weight) as f32);
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

    /// Equation 11 without `softmax_scale`: `dq += dz k`.
    pub(super) fn add_dq(&self, dq: &mut [f32], queries: &Queries<'_>, keys: &Keys<'_>) {
        let head_dim = queries.problem.head_dim;
        let dz = Matrix::new(&self.ds, queries.rows, keys.columns, self.block_kv);
        matmul_add(dq, dz, Matrix::new(&self.k, keys.columns, head_dim, head_dim));
    }

    /// Equation 11 without `softmax_scale`: `dk += dzᵀ q`.
    pub(super) fn add_dk(&self, dk: &mut [f32], queries: &Queries<'_>, keys: &Keys<'_>) {
        let head_dim = queries.problem.head_dim;
        let dz = Matrix::new(&self.ds, queries.rows, keys.columns, self.block_kv);
        transposed_matmul_add(dk, dz, Matrix::new(&self.q, queries.rows, head_dim, head_dim));
    }

    /// Equation 11: `dv += (w P)ᵀ dout`.
    pub(super) fn add_dv(&self, dv: &mut [f32], queries: &Queries<'_>, keys: &Keys<'_>) {
        let value_dim = queries.problem.value_dim;
        let p = Matrix::new(&self.p, queries.rows, keys.columns, self.block_kv);
        transposed_matmul_add(dv, p, Matrix::new(&self.dout, queries.rows, value_dim, value_dim));
    }
}
