//! The tiles of one thread, and the steps from queries and keys to `dz` that every pass takes with them.
//!
//! As in the forward, a group of queries lies side by side, one in each lane. `P` and `dz` of a group are `[columns, GROUP]`: a
//! right matrix for dq, and panels of a left one for dk and dv, so that no product needs a copy turned round.

use super::Pass;
use super::rows::Row;
use super::steps::{Differentiate, State, Sums};
use crate::engine::cpu::aligned::Aligned;
use crate::engine::cpu::convert::Convert;
use crate::engine::cpu::kept::Kept;
use crate::engine::cpu::logits::{Keys, Queries};
use crate::engine::cpu::pack::rows_to_lanes;
use crate::engine::cpu::product::{Into, Left, Product};
use crate::engine::cpu::softmax::OnlineSoftmax;
use crate::plan::cpu::{GROUP, KeptTiles, padded};
use crate::problem::DType;
use pulp::Arch;
use std::ops::Range;

pub(super) struct Tiles {
    /// `[groups, head_dim, GROUP]`
    q: Aligned<f32>,
    /// `[groups, value_dim, GROUP]`
    dout: Aligned<f32>,
    /// `[block_q, padded head_dim]`
    q_rows: Aligned<f32>,
    /// `[block_q, padded value_dim]`
    pub(super) dout_rows: Aligned<f32>,
    /// Keys and values of tiles that blocks come back to.
    kept: Kept<f32>,
    /// Which of them is the present one.
    present: usize,
    /// Logits, then their exponentials, then `w P`: `[groups, columns, GROUP]`.
    p: Aligned<f32>,
    /// `dout · v`, then `dS`, then `dz`: `[groups, columns, GROUP]`.
    ds: Aligned<f32>,
    /// Derivative of the softcap: `[groups, columns, GROUP]`, empty without one.
    slopes: Aligned<f32>,
}

/// The groups of a block that see a tile of keys: they follow each other, since both ends of a row's keys grow with the row.
fn seeing(queries: &Queries<'_>, keys: &Keys<'_>) -> Range<usize> {
    let mut groups = queries.groups().filter(|(_, group)| group.sees(keys)).map(|(g, _)| g);
    groups.next().map_or(0..0, |first| first..groups.last().unwrap_or(first) + 1)
}

impl Tiles {
    pub(super) fn new(pass: &Pass<'_>) -> Self {
        let Pass { problem, block_q, block_kv, .. } = *pass;
        let (head_dim, value_dim) = (problem.head_dim, problem.value_dim);
        let scores = block_q * block_kv;
        let panels = |width: usize| block_kv * width.next_multiple_of(GROUP);
        Tiles {
            q: Aligned::zeroed(block_q * head_dim),
            dout: Aligned::zeroed(block_q * value_dim),
            q_rows: Aligned::zeroed(block_q * padded(head_dim)),
            dout_rows: Aligned::zeroed(block_q * padded(value_dim)),
            kept: Kept::new(problem, block_kv, &KeptTiles::of(problem, block_kv, 1), [head_dim, value_dim].map(panels)),
            present: 0,
            p: Aligned::zeroed(scores),
            ds: Aligned::zeroed(scores),
            slopes: Aligned::zeroed(if problem.softcap.is_some() { scores } else { 0 }),
        }
    }

    /// Loads queries and their rows of `dout`.
    pub(super) fn load_queries<T: Convert>(&mut self, pass: &Pass<'_>, queries: &Queries<'_>) {
        let (head_dim, value_dim) = (pass.problem.head_dim, pass.problem.value_dim);
        queries.load::<T>(&pass.inputs.q, &mut self.q_rows, head_dim);
        queries.load::<T>(&pass.dout, &mut self.dout_rows, value_dim);
        for (rows, lanes, width) in
            [(&self.q_rows, &mut self.q, head_dim), (&self.dout_rows, &mut self.dout, value_dim)]
        {
            for (g, group) in queries.groups() {
                let lanes = &mut lanes[g * width * GROUP..][..width * GROUP];
                rows_to_lanes(&rows[g * GROUP * padded(width)..], padded(width), lanes, [group.rows, width]);
            }
        }
    }

    /// Loads keys and, if `ds` is to follow, values, unless they are there.
    pub(super) fn load_keys<T: Convert>(&mut self, pass: &Pass<'_>, keys: &Keys<'_>, values: bool) {
        let (place, [has_keys, has_values]) = self.kept.find(keys);
        self.present = place;
        let [k, v] = self.kept.fill(place, keys, values || has_values);
        if !has_keys {
            keys.load_panels::<T, f32>(&keys.bound.k, k, pass.problem.head_dim);
        }
        if values && !has_values {
            keys.load_panels::<T, f32>(&keys.bound.v, v, pass.problem.value_dim);
        }
    }

    /// Leaves logits in `p` and, with `values`, `dout · v` in `ds`.
    pub(super) fn products<T: Convert>(&mut self, queries: &Queries<'_>, keys: &Keys<'_>, values: bool) {
        let (head_dim, value_dim) = (queries.problem.head_dim, queries.problem.value_dim);
        let panel = keys.columns * GROUP;
        let [k, v] = self.kept.tile(self.present);
        let seeing = seeing(queries, keys);
        for (g, group) in queries.groups().filter(|(g, _)| seeing.contains(g)) {
            let slopes = (!self.slopes.is_empty()).then(|| &mut self.slopes[g * panel..][..panel]);
            let q = &self.q[g * head_dim * GROUP..][..head_dim * GROUP];
            group.lane_logits::<T, f32>(keys, (q, k), &mut self.p[g * panel..][..panel], slopes);
            if values {
                Product {
                    left: Left::Panels(v),
                    right: &self.dout[g * value_dim * GROUP..],
                    right_stride: GROUP,
                    c: &mut self.ds[g * panel..][..panel],
                    stride: GROUP,
                    extents: [keys.columns, GROUP, value_dim],
                    into: if T::DTYPE == DType::F32 { Into::ScaledHalves(1.0) } else { Into::Scaled(1.0) },
                }
                .run();
            }
        }
    }

    /// One step of the online softmax: exponentials in place of the logits in `p`; adds them, and with `values` their
    /// products with `ds`, to the sums of every group.
    pub(super) fn step(
        &mut self,
        softmax: &mut [OnlineSoftmax],
        sums: &mut [Sums],
        (queries, keys): (&Queries<'_>, &Keys<'_>),
        values: bool,
    ) {
        let panel = keys.columns * GROUP;
        for g in seeing(queries, keys) {
            let p = &mut self.p[g * panel..][..panel];
            let correction = softmax[g].step(p);
            sums[g].add(&correction, p, values.then(|| &self.ds[g * panel..][..panel]));
        }
    }

    /// Equation 9: leaves `w P` in `p` and, with `values`, `dS` in `ds`, from `dout · v` and logits, or exponentials where a
    /// `step` came between.
    pub(super) fn differentiate(
        &mut self,
        rows: &[Row],
        (queries, keys): (&Queries<'_>, &Keys<'_>),
        stepped: bool,
        values: bool,
    ) {
        let panel = keys.columns * GROUP;
        for g in seeing(queries, keys) {
            let state = &State::of(rows.chunks(GROUP).nth(g).expect("a group has rows"));
            let (p, ds) = (&mut self.p[g * panel..][..panel], &mut self.ds[g * panel..][..panel]);
            Arch::new().dispatch(Differentiate { p, ds, state, stepped, values });
        }
    }

    /// `dS` of the groups that see the keys, `[columns, GROUP]` each.
    pub(super) fn ds(&self, queries: &Queries<'_>, keys: &Keys<'_>) -> impl Iterator<Item = (usize, &[f32])> {
        let panel = keys.columns * GROUP;
        seeing(queries, keys).map(move |g| (g, &self.ds[g * panel..][..panel]))
    }

    /// Equation 10: `dS` becomes `dz`.
    pub(super) fn through_the_cap(&mut self, queries: &Queries<'_>, keys: &Keys<'_>) {
        if !self.slopes.is_empty() {
            let Range { start, end } = seeing(queries, keys);
            let panels = start * keys.columns * GROUP..end * keys.columns * GROUP;
            self.ds[panels.clone()].iter_mut().zip(&self.slopes[panels]).for_each(|(ds, slope)| *ds *= slope);
        }
    }

    /// Equation 11 without `softmax_scale`: `dq += dz k`; dq is `[groups, head_dim, GROUP]`.
    pub(super) fn add_dq(&self, dq: &mut [f32], queries: &Queries<'_>, keys: &Keys<'_>) {
        let width = queries.problem.head_dim;
        for g in seeing(queries, keys) {
            let panels = self.kept.tile(self.present)[0].chunks(keys.columns * GROUP);
            for (k, dq) in panels.zip(dq[g * width * GROUP..][..width * GROUP].chunks_mut(GROUP * GROUP)) {
                Product {
                    left: Left::Transposed(k, GROUP),
                    right: &self.ds[g * keys.columns * GROUP..],
                    right_stride: GROUP,
                    stride: GROUP,
                    extents: [dq.len() / GROUP, GROUP, keys.columns],
                    c: dq,
                    into: Into::Added(1.0),
                }
                .run();
            }
        }
    }

    /// Equation 11 without `softmax_scale`: `dk += dzᵀ q`; dk is `[columns, padded head_dim]`.
    pub(super) fn add_dk(&self, dk: &mut [f32], queries: &Queries<'_>, keys: &Keys<'_>) {
        let width = padded(queries.problem.head_dim);
        add_over_queries([&self.ds, &self.q_rows], width, dk, queries, keys);
    }

    /// Equation 11: `dv += (w P)ᵀ dout`; dv is `[columns, padded value_dim]`.
    pub(super) fn add_dv(&self, dv: &mut [f32], queries: &Queries<'_>, keys: &Keys<'_>) {
        let width = padded(queries.problem.value_dim);
        add_over_queries([&self.p, &self.dout_rows], width, dv, queries, keys);
    }
}

/// Adds the product of panels and rows, a sum over the queries that see the keys.
fn add_over_queries(
    [panels, rows]: [&[f32]; 2],
    width: usize,
    sums: &mut [f32],
    queries: &Queries<'_>,
    keys: &Keys<'_>,
) {
    let Range { start, end } = seeing(queries, keys);
    Product {
        left: Left::Panels(&panels[start * keys.columns * GROUP..]),
        right: &rows[start * GROUP * width..],
        right_stride: width,
        c: sums,
        stride: width,
        extents: [keys.columns, width, queries.rows.min(end * GROUP).saturating_sub(start * GROUP)],
        into: Into::Added(1.0),
    }
    .run();
}
