//! Few queries against many keys, as when a model writes a text: bound by the memory that keys and values come from.
//!
//! Rows of keys and values are read as they lie, once for all query heads that share them, and converted in registers. The
//! lanes are those of a row: a logit is a sum across a register, a result the sum of rows of values. One task is the queries of
//! some heads that share their keys, or one of the parts into which the keys of each of its branches are split.

use super::aligned::Aligned;
use super::convert::{Convert, load_part, narrow, widen};
use super::logits::{Keys, Queries};
use super::prefetch::lines;
use super::product::unrolled;
use super::shared::SharedRows;
use super::tile::OnlineSoftmax;
use crate::engine::host::{Inputs, View};
use crate::plan::cpu::{BLOCK_KV, FewQueries, padded};
use crate::problem::Problem;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

/// Computes `out` and `lse`.
pub(super) fn forward<T: Convert>(
    problem: &Problem,
    inputs: &Inputs<'_>,
    split: &FewQueries,
    out: &SharedRows<'_, T>,
    lse: &Option<SharedRows<'_, f32>>,
) {
    let groups = problem.heads / split.heads;
    let (tasks, units) = (problem.batch * groups, split.units());
    let task = |index: usize| Task {
        problem,
        inputs,
        b: index / groups,
        heads: [index % groups, index % groups + 1].map(|group| group * split.heads),
        with_lse: lse.is_some(),
    };
    let size = split.unit_numbers(problem);
    let scratch = || Scratch::new(problem, split);
    if units == problem.branches.len() {
        let scratch = || (scratch(), vec![0.0; units * size]);
        (0..tasks).into_par_iter().for_each_init(scratch, |(scratch, results), index| {
            for (unit, result) in results.chunks_exact_mut(size).enumerate() {
                task(index).attend::<T>(split, unit, scratch, result);
            }
            task(index).finish(split, |unit| &results[unit * size..][..size], out, lse);
        });
        return;
    }
    // Groups of heads next to each other: their rows share pages.
    let mut results = vec![0.0; tasks * units * size];
    results.par_chunks_mut(size).enumerate().for_each_init(scratch, |scratch, (index, result)| {
        let (b, unit, group) = (index / groups / units, index / groups % units, index % groups);
        task(b * groups + group).attend::<T>(split, unit, scratch, result);
    });
    (0..tasks).into_par_iter().for_each(|index| {
        let at = |unit: usize| (index / groups * units + unit) * groups + index % groups;
        task(index).finish(split, |unit| &results[at(unit) * size..][..size], out, lse);
    });
}

/// The tiles of one thread. A row is one query of one head, those of a head behind each other.
struct Scratch {
    /// `[rows, padded head_dim]`, zeros behind head_dim.
    q: Aligned<f32>,
    /// Logits, then probabilities: `[rows, BLOCK_KV]`.
    s: Aligned<f32>,
    /// Sum over the keys of one tile: `[rows, padded value_dim]`.
    tile: Aligned<f32>,
    /// Of each row.
    softmax: Vec<OnlineSoftmax>,
    /// Factors of what was summed before a tile.
    corrections: Vec<f32>,
}

impl Scratch {
    fn new(problem: &Problem, split: &FewQueries) -> Self {
        let rows = split.heads * problem.seq_q;
        Scratch {
            q: Aligned::zeroed(rows * padded(problem.head_dim)),
            s: Aligned::zeroed(rows * BLOCK_KV),
            tile: Aligned::zeroed(rows * padded(problem.value_dim)),
            softmax: vec![OnlineSoftmax::EMPTY; rows],
            corrections: vec![0.0; rows],
        }
    }
}

struct Task<'a> {
    problem: &'a Problem,
    inputs: &'a Inputs<'a>,
    b: usize,
    /// From the first to before the second.
    heads: [usize; 2],
    /// Whether lse is wanted: of a closed branch it is all that is.
    with_lse: bool,
}

impl<'a> Task<'a> {
    fn queries(&self, h: usize) -> Queries<'a> {
        Queries { problem: self.problem, b: self.b, h, first: 0, rows: self.problem.seq_q }
    }

    /// Leaves in `result` what one part of the keys of one branch gives: `[rows, padded value_dim]`, then the maximum and the
    /// denominator of each row.
    fn attend<T: Convert>(&self, split: &FewQueries, unit: usize, scratch: &mut Scratch, result: &mut [f32]) {
        let Task { problem, inputs, b, heads: [h, end], with_lse } = *self;
        let (n, part) = split.unit(unit);
        if !with_lse && (h..end).all(|h| inputs.branches[n].gate(b, h) == 0.0) {
            return;
        }
        let rows = (end - h) * problem.seq_q;
        let (o, states) = result.split_at_mut(rows * padded(problem.value_dim));
        o.fill(0.0);
        scratch.softmax.fill(OnlineSoftmax::EMPTY);
        for (r, row) in scratch.q.chunks_exact_mut(padded(problem.head_dim)).enumerate() {
            let start = inputs.q.position([b, r % problem.seq_q, h + r / problem.seq_q, 0]);
            widen(&inputs.q.data::<T>()[start..][..problem.head_dim], &mut row[..problem.head_dim]);
        }

        // All heads of the task see the same tiles.
        let (branch, segments) = (&problem.branches[n], &inputs.branches[n].segments);
        let mut tiles = self.queries(h).tiles_of_part(branch, segments, BLOCK_KV, part).peekable();
        while let Some(keys) = tiles.next() {
            let k = |keys: &Keys<'a>| Rows::<T>::new(keys, &keys.bound.k, problem.head_dim);
            let values = Rows::<T>::new(&keys, &keys.bound.v, problem.value_dim);
            T::dispatch(Logits {
                q: &scratch.q,
                keys: k(&keys),
                scale: problem.softmax_scale,
                s: &mut scratch.s,
                next: values,
            });
            for (logits, h) in scratch.s.chunks_exact_mut(problem.seq_q * BLOCK_KV).zip(h..) {
                self.queries(h).finish_logits(&keys, BLOCK_KV, logits);
            }
            let rows = scratch.s.chunks_exact_mut(BLOCK_KV).zip(&mut scratch.softmax);
            for ((s, softmax), correction) in rows.zip(&mut scratch.corrections) {
                *correction = softmax.step(&mut s[..keys.columns]);
            }
            T::dispatch(Results {
                p: &scratch.s,
                values,
                tile: &mut scratch.tile,
                corrections: &scratch.corrections,
                o,
                next: tiles.peek().map(k),
            });
        }
        for (state, softmax) in states.chunks_exact_mut(2).zip(&scratch.softmax) {
            state.copy_from_slice(&[softmax.max, softmax.sum]);
        }
    }

    /// Computes the task's rows of `out` and `lse` from the results of its units.
    fn finish<'r, T: Convert>(
        &self,
        split: &FewQueries,
        result: impl Fn(usize) -> &'r [f32],
        out: &SharedRows<'_, T>,
        lse: &Option<SharedRows<'_, f32>>,
    ) {
        let Task { problem, inputs, b, heads: [h, end], with_lse } = *self;
        let (rows, width, stride) = ((end - h) * problem.seq_q, problem.value_dim, padded(problem.value_dim));
        let mut sum = vec![0.0; width];
        for r in 0..rows {
            let (i, h) = (r % problem.seq_q, h + r / problem.seq_q);
            // SAFETY: tasks partition (b, heads, ..), and this task holds one row at a time.
            let out = unsafe { out.row([b, i, h, 0], width) };
            if problem.accumulate {
                widen(out, &mut sum);
            } else {
                sum.fill(0.0);
            }
            for (n, branch) in inputs.branches.iter().enumerate() {
                let gate = branch.gate(b, h);
                if gate == 0.0 && !with_lse {
                    continue;
                }
                let parts = || split.units_of(n).map(&result).map(|result| result.split_at(rows * stride));
                let state = |states: &[f32]| OnlineSoftmax { max: states[2 * r], sum: states[2 * r + 1] };
                let merged = parts().fold(OnlineSoftmax::EMPTY, |merged, (_, states)| merged.join(state(states)));
                if let Some(lse) = lse {
                    // SAFETY: as above; an element of lse is a row of width 1.
                    let lse = unsafe { lse.row([n, b, h, i], 1) };
                    lse[0] = merged.lse();
                }
                if gate == 0.0 || merged.sum == 0.0 {
                    continue;
                }
                // Equation 7: the weight carries the normalisation, all in f32.
                let weight = gate * branch.region(b, h, i) / merged.sum;
                for (o, states) in parts() {
                    let weight = weight * merged.factor(state(states));
                    sum.iter_mut().zip(&o[r * stride..]).for_each(|(sum, o)| *sum += weight * o);
                }
            }
            narrow(&sum, out);
        }
    }
}

/// Rows of keys or values of one tile.
#[derive(Clone, Copy)]
struct Rows<'a, T> {
    data: &'a [T],
    start: usize,
    step: isize,
    width: usize,
    count: usize,
}

impl<'a, T: Convert> Rows<'a, T> {
    fn new(keys: &Keys<'_>, view: &View<'a, 4>, width: usize) -> Self {
        let at = |c: usize| view.position([keys.b, keys.start + c, keys.head, 0]);
        let step = at(1).wrapping_sub(at(0)) as isize;
        Rows { data: view.data(), start: at(0), step, width, count: keys.columns }
    }

    #[inline(always)]
    fn row(&self, c: usize) -> &'a [T] {
        &self.data[self.start.wrapping_add_signed(c as isize * self.step)..][..self.width]
    }

    /// Asks for the rows `AHEAD` behind those from `c` on, which may be rows of `next`.
    #[inline(always)]
    fn fetch(&self, c: usize, next: Option<&Self>) {
        for c in c + AHEAD..c + AHEAD + CHUNK {
            if c < self.count {
                lines(self.row(c).as_ptr(), self.width);
            } else if let Some(next) = next.filter(|next| c - self.count < next.count) {
                lines(next.row(c - self.count).as_ptr(), next.width);
            }
        }
    }
}

/// Rows of keys or values that all queries meet one after the other: they stay in the first-level cache.
const CHUNK: usize = 8;

/// Rows that are fetched ahead.
const AHEAD: usize = 2 * CHUNK;

/// Runs `$block::<S, M, K>(first row, keys)` over all rows, `M` of them and `K` keys at a time: eight sums or eight weights
/// stay in registers whatever the rows.
macro_rules! blocks {
    ($self:ident.$block:ident($simd:ident, $rows:expr, $count:expr)) => {
        let (rows, count) = ($rows, $count);
        for first in (0..count).step_by(CHUNK) {
            let end = count.min(first + CHUNK);
            $self.fetch(first);
            let mut r = 0;
            while r < rows {
                let mut c = first;
                match rows - r {
                    1 => blocks!($self.$block::<S, 1, 8>($simd, r, c, end)),
                    2 | 3 => blocks!($self.$block::<S, 2, 4>($simd, r, c, end)),
                    _ => blocks!($self.$block::<S, 4, 2>($simd, r, c, end)),
                }
            }
        }
    };
    ($self:ident.$block:ident::<S, $m:literal, $k:literal>($simd:ident, $r:ident, $c:ident, $end:ident)) => {{
        while $c + $k <= $end {
            $self.$block::<S, $m, $k>($simd, $r, $c);
            $c += $k;
        }
        while $c < $end {
            $self.$block::<S, $m, 1>($simd, $r, $c);
            $c += 1;
        }
        $r += $m;
    }};
}

/// `s[r, c] = scale · q[r] · keys[c]`.
struct Logits<'a, T> {
    q: &'a [f32],
    keys: Rows<'a, T>,
    scale: f32,
    s: &'a mut [f32],
    /// What is read after the keys.
    next: Rows<'a, T>,
}

impl<T: Convert> WithSimd for Logits<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        blocks!(self.block(simd, self.s.len() / BLOCK_KV, self.keys.count));
    }
}

impl<T: Convert> Logits<'_, T> {
    #[inline(always)]
    fn fetch(&self, c: usize) {
        self.keys.fetch(c, Some(&self.next));
    }

    #[inline(always)]
    fn block<S: Simd, const M: usize, const K: usize>(&mut self, simd: S, r: usize, c: usize) {
        let width = self.keys.width;
        let stride = padded(width);
        let k: [&[T]; K] = std::array::from_fn(|j| self.keys.row(c + j));
        let q: [&[f32]; M] = std::array::from_fn(|i| &self.q[(r + i) * stride..][..stride]);
        let mut sums = [[simd.splat_f32s(0.0); K]; M];
        let mut d = 0;
        while d + S::F32_LANES <= width {
            // SAFETY: a row of keys has `width` elements.
            let k = unsafe { registers::<T, S, K>(simd, &k, d) };
            add_products::<S, M, K>(simd, &mut sums, &q, d, k);
            d += S::F32_LANES;
        }
        if d < width {
            add_products::<S, M, K>(simd, &mut sums, &q, d, ends::<T, S, K>(simd, &k, d));
        }
        for (i, sums) in sums.iter().enumerate() {
            for (j, &sum) in sums.iter().enumerate() {
                self.s[(r + i) * BLOCK_KV + c + j] = self.scale * simd.reduce_sum_f32s(sum);
            }
        }
    }
}

/// `o[r] = corrections[r] · o[r] + Σ_c p[r, c] values[c]`.
struct Results<'a, T> {
    p: &'a [f32],
    values: Rows<'a, T>,
    /// The sum, which is shorter than that in `o` and rounded less.
    tile: &'a mut [f32],
    corrections: &'a [f32],
    o: &'a mut [f32],
    /// What is read after the values.
    next: Option<Rows<'a, T>>,
}

impl<T: Convert> WithSimd for Results<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        self.tile.fill(0.0);
        blocks!(self.block(simd, self.corrections.len(), self.values.count));
        let stride = padded(self.values.width);
        let rows = self.o.chunks_exact_mut(stride).zip(self.tile.chunks_exact(stride));
        for ((o, tile), &correction) in rows.zip(self.corrections) {
            let correction = simd.splat_f32s(correction);
            for (o, &tile) in S::as_mut_simd_f32s(o).0.iter_mut().zip(S::as_simd_f32s(tile).0) {
                *o = simd.mul_add_e_f32s(correction, *o, tile);
            }
        }
    }
}

impl<T: Convert> Results<'_, T> {
    #[inline(always)]
    fn fetch(&self, c: usize) {
        self.values.fetch(c, self.next.as_ref());
    }

    #[inline(always)]
    fn block<S: Simd, const M: usize, const K: usize>(&mut self, simd: S, r: usize, c: usize) {
        let width = self.values.width;
        let stride = padded(width);
        let v: [&[T]; K] = std::array::from_fn(|j| self.values.row(c + j));
        let p = |i: usize, j: usize| simd.splat_f32s(self.p[(r + i) * BLOCK_KV + c + j]);
        let p: [[S::f32s; K]; M] = std::array::from_fn(|i| std::array::from_fn(|j| p(i, j)));
        let tile = &mut self.tile[r * stride..][..M * stride];
        let mut d = 0;
        while d + S::F32_LANES <= width {
            // SAFETY: a row of values has `width` elements.
            let v = unsafe { registers::<T, S, K>(simd, &v, d) };
            add_weighted::<S, M, K>(simd, &mut tile[d..], stride, &p, v);
            d += S::F32_LANES;
        }
        if d < width {
            add_weighted::<S, M, K>(simd, &mut tile[d..], stride, &p, ends::<T, S, K>(simd, &v, d));
        }
    }
}

/// The registers of the elements of some rows from `d` on.
///
/// # Safety
/// Each row has as many, and [`Convert::dispatch`] runs the operation.
#[inline(always)]
unsafe fn registers<T: Convert, S: Simd, const K: usize>(simd: S, rows: &[&[T]; K], d: usize) -> [S::f32s; K] {
    let mut registers = [simd.splat_f32s(0.0); K];
    unrolled!(K, J => {
        // SAFETY: the caller's promise.
        registers[J] = unsafe { T::load(simd, rows[J].as_ptr().add(d)) };
    });
    registers
}

/// The same where the rows end, with zeros behind them.
#[inline(always)]
fn ends<T: Convert, S: Simd, const K: usize>(simd: S, rows: &[&[T]; K], d: usize) -> [S::f32s; K] {
    let mut registers = [simd.splat_f32s(0.0); K];
    for (register, row) in registers.iter_mut().zip(rows) {
        *register = load_part::<T, S>(&row[d..]);
    }
    registers
}

/// `sums[i][j] += q[i][d..] · k[j]`, lane by lane.
#[inline(always)]
fn add_products<S: Simd, const M: usize, const K: usize>(
    simd: S,
    sums: &mut [[S::f32s; K]; M],
    q: &[&[f32]; M],
    d: usize,
    k: [S::f32s; K],
) {
    unrolled!(M, I => {
        let q = S::as_simd_f32s(&q[I][d..][..S::F32_LANES]).0[0];
        for j in 0..K {
            sums[I][j] = simd.mul_add_e_f32s(q, k[j], sums[I][j]);
        }
    });
}

/// `tile[i] += Σ_j p[i][j] · v[j]`, lane by lane, at the start of rows `stride` apart.
#[inline(always)]
fn add_weighted<S: Simd, const M: usize, const K: usize>(
    simd: S,
    tile: &mut [f32],
    stride: usize,
    p: &[[S::f32s; K]; M],
    v: [S::f32s; K],
) {
    unrolled!(M, I => {
        let tile = &mut S::as_mut_simd_f32s(&mut tile[I * stride..][..S::F32_LANES]).0[0];
        let mut sum = *tile;
        for j in 0..K {
            sum = simd.mul_add_e_f32s(p[I][j], v[j], sum);
        }
        *tile = sum;
    });
}
