//! Matrix products of tiles: the micro-kernel that most of the cpu engine's time goes through.
//!
//! The right matrix is read as it lies, a vector register of columns at a time; the elements of the left one are spread
//! over a whole register. Neighbours in memory belong to one row of the left matrix or to one column, and both ways round
//! are there, so that no product needs a transposed copy.

use super::element::Element;
use crate::plan::cpu::GROUP;
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// A loop over `I` below `$count`, at most 12, as that many copies of its body: the sums stay in registers only where
/// every index is a constant.
macro_rules! unrolled {
    ($count:expr, $i:ident => $body:block) => {
        unrolled!($count, $i => $body; 0 1 2 3 4 5 6 7 8 9 10 11)
    };
    ($count:expr, $i:ident => $body:block; $($index:literal)*) => {$(
        if const { $index < $count } {
            const $i: usize = $index;
            $body
        }
    )*};
}
pub(super) use unrolled;

/// Numbers of B that stay in a first-level cache of 32 KB while A and C pass by.
const CACHED: usize = 4 << 10;

/// Terms up to which a sum in halves is a single run, for accuracy.
const MOST_OF_A_RUN: usize = 3 * GROUP;

/// The left matrix `A[m, k]`.
#[derive(Clone, Copy)]
pub(super) enum Left<'a, E = f32> {
    /// Panels of [`GROUP`] columns: `[ceil(k / GROUP), m, GROUP]`.
    Panels(&'a [E]),
    /// Rows of the transpose: `[k, stride]`.
    Transposed(&'a [E], usize),
}

impl<E> Left<'_, E> {
    /// Where the element of `row` and term `k` of `m` rows is, and how far the next row and the next term are.
    #[inline(always)]
    pub(super) fn at(&self, m: usize, row: usize, k: usize) -> (*const E, usize, usize) {
        match *self {
            Left::Panels(left) => (left[(k / GROUP * m + row) * GROUP..].as_ptr(), GROUP, 1),
            Left::Transposed(left, stride) => (left[k * stride + row..].as_ptr(), 1, stride),
        }
    }

    /// Terms of at most `terms` that [`Left::at`] has behind each other.
    #[inline(always)]
    pub(super) fn terms(&self, terms: usize) -> usize {
        if let Left::Panels(_) = self { terms.min(GROUP) } else { terms }
    }
}

/// What becomes of the product.
#[derive(Clone, Copy)]
pub(super) enum Into<'a> {
    /// `C = scale · A B`.
    Scaled(f32),
    /// The same, the sum over `k` in runs, and even and odd terms of a run apart: its rounding error grows with the square root
    /// of the number of terms that follow each other.
    ScaledHalves(f32),
    /// `C += scale · A B`.
    Added(f32),
    /// `C[m, n] = factors[n] · C[m, n] + A B`.
    Rescaled(&'a [f32]),
}

/// `C[m, n]` from `A[m, k] B[k, n]`; rows of B and C are `right_stride` and `stride` apart. Where an element is several
/// numbers, k counts elements.
pub(super) struct Product<'a, E = f32> {
    pub(super) left: Left<'a, E>,
    pub(super) right: &'a [E],
    pub(super) right_stride: usize,
    pub(super) c: &'a mut [f32],
    pub(super) stride: usize,
    /// m, n and k; n is a multiple of half a [`GROUP`].
    pub(super) extents: [usize; 3],
    pub(super) into: Into<'a>,
}

impl<E: Element> Product<'_, E> {
    pub(super) fn run(self) {
        let [m, n, k] = self.extents;
        assert!(n.is_multiple_of(GROUP / 2) && n <= self.stride && n <= self.right_stride);
        if m == 0 || n == 0 || k == 0 {
            return;
        }
        assert!((m - 1) * self.stride + n <= self.c.len());
        assert!((k - 1) * self.right_stride + n <= self.right.len());
        match self.left {
            Left::Panels(a) => assert!(k.div_ceil(GROUP) * m * GROUP <= a.len()),
            Left::Transposed(a, stride) => assert!(m <= stride && (k - 1) * stride + m <= a.len()),
        }
        if let Into::Rescaled(factors) = self.into {
            assert!(n <= factors.len());
        }
        E::multiply(self);
    }
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        // Registers that the sums leave free hold a row of B and one element of A.
        match (const { S::REGISTER_COUNT >= 32 }, self.into) {
            (true, Into::ScaledHalves(_)) => self.all::<S, 6, 2>(simd),
            (true, _) => self.all::<S, 12, 1>(simd),
            (false, Into::ScaledHalves(_)) => self.all::<S, 3, 2>(simd),
            (false, _) => self.all::<S, 6, 1>(simd),
        }
    }
}

impl Product<'_> {
    /// All of C, `ROWS` rows and two registers of columns at a time, each element as `SUMS` sums.
    ///
    /// Each row of A meets as many columns of B as stay in the first-level cache.
    #[inline(always)]
    fn all<S: Simd, const ROWS: usize, const SUMS: usize>(&mut self, simd: S) {
        let [m, n, k] = self.extents;
        let registers = const { 2 * S::F32_LANES };
        let strip = registers * (CACHED / k / registers).max(1);
        for column in (0..n).step_by(strip) {
            let columns = column..n.min(column + strip);
            let mut row = 0;
            while row < m {
                row += match m - row {
                    // Few sums wait for each other: 6 + 1, 6 + 2 and 6 + 5 rows take longer than as many in fours and threes,
                    // and of threes of two sums each 3 + 1 longer than twos.
                    7 | 8 | 11 if ROWS > 3 => self.rows::<S, 4, SUMS>(simd, row, columns.clone()),
                    4 if ROWS == 3 => self.rows::<S, 2, SUMS>(simd, row, columns.clone()),
                    rest if rest >= ROWS => self.rows::<S, ROWS, SUMS>(simd, row, columns.clone()),
                    rest if rest >= 6 => self.rows::<S, 6, SUMS>(simd, row, columns.clone()),
                    4 | 5 => self.rows::<S, 4, SUMS>(simd, row, columns.clone()),
                    3 => self.rows::<S, 3, SUMS>(simd, row, columns.clone()),
                    2 => self.rows::<S, 2, SUMS>(simd, row, columns.clone()),
                    _ => self.rows::<S, 1, SUMS>(simd, row, columns.clone()),
                };
            }
        }
    }

    /// Some columns of `M` rows. Returns `M`.
    #[inline(always)]
    fn rows<S: Simd, const M: usize, const SUMS: usize>(
        &mut self,
        simd: S,
        row: usize,
        columns: Range<usize>,
    ) -> usize {
        let mut column = columns.start;
        while column + 2 * S::F32_LANES <= columns.end {
            self.tile::<S, M, 2, SUMS>(simd, row, column);
            column += 2 * S::F32_LANES;
        }
        while column < columns.end {
            self.tile::<S, M, 1, SUMS>(simd, row, column);
            column += S::F32_LANES;
        }
        M
    }

    /// `M` rows and `N` registers of columns, summed in registers.
    #[inline(always)]
    fn tile<S: Simd, const M: usize, const N: usize, const SUMS: usize>(&mut self, simd: S, row: usize, column: usize) {
        let [m, _, k] = self.extents;
        let step = self.right_stride;
        let right = self.right[column..].as_ptr();
        // Runs begin with panels.
        let run = if SUMS > 1 && k > MOST_OF_A_RUN { 2 * GROUP } else { k };
        for start in (0..k).step_by(run) {
            let end = k.min(start + run);
            let mut sums = [[[simd.splat_f32s(0.0); N]; M]; SUMS];
            let mut at = start;
            while at < end {
                let right = (right.wrapping_add(at * step), step);
                let terms = self.left.terms(end - at);
                // SAFETY: `run` asserted that A and B have all of `k`, A with `m` rows and B with `n` columns;
                // `row + M <= m`, `column + N · lanes <= n`, and a panel has all its columns behind each other.
                unsafe {
                    match self.left.at(m, row, at) {
                        (left, GROUP, step) => add::<S, M, N, SUMS, GROUP>(simd, &mut sums, (left, step), right, terms),
                        (left, _, step) => add::<S, M, N, SUMS, 1>(simd, &mut sums, (left, step), right, terms),
                    }
                };
                at += terms;
            }
            if let [even, odd] = &mut sums[..] {
                unrolled!(M, I => {
                    for (even, &odd) in even[I].iter_mut().zip(&odd[I]) {
                        *even = simd.add_f32s(*even, odd);
                    }
                });
            }
            let into = match self.into {
                Into::ScaledHalves(scale) if start > 0 => Into::Added(scale),
                into => into,
            };
            self.store(simd, &sums[0], row, column, into);
        }
    }

    #[inline(always)]
    fn store<S: Simd, const M: usize, const N: usize>(
        &mut self,
        simd: S,
        sums: &[[S::f32s; N]; M],
        row: usize,
        column: usize,
        into: Into<'_>,
    ) {
        let c = self.c[row * self.stride + column..].as_mut_ptr();
        let at = |i: usize, j: usize| c.wrapping_add(i * self.stride + j * S::F32_LANES).cast::<S::f32s>();
        // SAFETY: `run` asserted that C has `m` rows of `n` columns, of which these are some, and as many factors.
        unsafe {
            match into {
                Into::Scaled(scale) | Into::ScaledHalves(scale) => {
                    let scale = simd.splat_f32s(scale);
                    unrolled!(M, I => {
                        for (j, &sum) in sums[I].iter().enumerate() {
                            at(I, j).write_unaligned(simd.mul_f32s(sum, scale));
                        }
                    });
                }
                Into::Added(scale) => {
                    let scale = simd.splat_f32s(scale);
                    unrolled!(M, I => {
                        for (j, &sum) in sums[I].iter().enumerate() {
                            let c = at(I, j);
                            c.write_unaligned(simd.mul_add_e_f32s(sum, scale, c.read_unaligned()));
                        }
                    });
                }
                Into::Rescaled(factors) => {
                    let factors = factors[column..].as_ptr().cast::<S::f32s>();
                    let factors: [S::f32s; N] = std::array::from_fn(|j| factors.add(j).read_unaligned());
                    unrolled!(M, I => {
                        for j in 0..N {
                            let c = at(I, j);
                            c.write_unaligned(simd.mul_add_e_f32s(factors[j], c.read_unaligned(), sums[I][j]));
                        }
                    });
                }
            }
        }
    }
}

/// `sums[0][i][j] += Σ A[i, k] B[k, j]` over `terms` of k, of which each of several sums gets every so many. Elements of A are
/// `ROW_STEP` apart down a column, a constant so that it costs no instruction; the other steps are what lies between one k and
/// the next.
///
/// # Safety
/// From `left` on there are `M` elements `ROW_STEP` apart, from `right` on `N` registers of elements, and the same at each of
/// the following `terms - 1` steps.
#[inline(always)]
unsafe fn add<S: Simd, const M: usize, const N: usize, const SUMS: usize, const ROW_STEP: usize>(
    simd: S,
    sums: &mut [[[S::f32s; N]; M]; SUMS],
    (mut left, left_step): (*const f32, usize),
    (mut right, right_step): (*const f32, usize),
    terms: usize,
) {
    for _ in 0..terms / SUMS {
        unrolled!(SUMS, X => {
            // SAFETY: the caller's promise.
            unsafe { add_term::<S, M, N, ROW_STEP>(simd, &mut sums[X], left, right) };
            left = left.wrapping_add(left_step);
            right = right.wrapping_add(right_step);
        });
    }
    if !terms.is_multiple_of(SUMS) {
        // SAFETY: the caller's promise.
        unsafe { add_term::<S, M, N, ROW_STEP>(simd, &mut sums[0], left, right) };
    }
}

/// One term of [`add`].
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn add_term<S: Simd, const M: usize, const N: usize, const ROW_STEP: usize>(
    simd: S,
    sums: &mut [[S::f32s; N]; M],
    left: *const f32,
    right: *const f32,
) {
    // SAFETY: the caller's promise; a register is `F32_LANES` floats, read wherever they lie.
    let b: [S::f32s; N] =
        std::array::from_fn(|j| unsafe { right.add(j * S::F32_LANES).cast::<S::f32s>().read_unaligned() });
    unrolled!(M, I => {
        // SAFETY: the caller's promise.
        let a = simd.splat_f32s(unsafe { *left.add(I * ROW_STEP) });
        for j in 0..N {
            sums[I][j] = simd.mul_add_e_f32s(a, b[j], sums[I][j]);
        }
    });
}

#[cfg(test)]
pub(super) mod tests {
    use super::{Into, Left, Product};
    use crate::engine::cpu::element::Element;
    use crate::plan::cpu::GROUP;

    /// Small integers, whose products and sums f32 has exactly: every order of summation gives the same bits.
    fn integers(count: usize, step: usize) -> Vec<f32> {
        (0..count).map(|n| (n * step % 13) as f32 - 6.0).collect()
    }

    /// A product of `m` rows, `n` columns and `k` elements of sum either way round, in halves too if `in_halves`; `element` makes one
    /// of [`Element::NUMBERS`] numbers.
    pub(in crate::engine::cpu) fn check<E: Element>(
        [m, n, k]: [usize; 3],
        in_halves: bool,
        element: impl Fn(&[f32]) -> E,
    ) {
        // A by rows, B by columns.
        let terms = k * E::NUMBERS;
        let (a, b, c) = (integers(m * terms, 5), integers(n * terms, 7), integers(m * n, 3));
        let of = |i: usize, x: usize| element(&a[i * terms + x * E::NUMBERS..][..E::NUMBERS]);
        let nan = element(&vec![f32::NAN; E::NUMBERS]);
        let panels: Vec<E> = (0..k.div_ceil(GROUP) * m * GROUP)
            .map(|at| (at / GROUP / m * GROUP + at % GROUP, at / GROUP % m))
            .map(|(x, i)| if x < k { of(i, x) } else { nan })
            .collect();
        let transposed: Vec<E> = (0..m * k).map(|at| of(at % m, at / m)).collect();
        let column = |j: usize, x: usize| &b[j * terms + x * E::NUMBERS..][..E::NUMBERS];
        let right: Vec<E> = (0..k * n).map(|at| element(column(at % n, at / n))).collect();
        let factors = integers(n, 11);
        let exact = |i: usize, j: usize| (0..terms).map(|x| a[i * terms + x] * b[j * terms + x]).sum::<f32>();
        let halves = in_halves.then_some(Into::ScaledHalves(2.0));
        for left in [Left::Panels(&panels), Left::Transposed(&transposed, m)] {
            for into in [Into::Scaled(2.0), Into::Added(4.0), Into::Rescaled(&factors)].into_iter().chain(halves) {
                let mut got = c.clone();
                let (c_of, extents) = (&mut got, [m, n, k]);
                Product { left, right: &right, right_stride: n, c: c_of, stride: n, extents, into }.run();
                for (at, &got) in got.iter().enumerate() {
                    let (sum, before) = (exact(at / n, at % n), c[at]);
                    let want = match into {
                        Into::Scaled(scale) | Into::ScaledHalves(scale) => scale * sum,
                        Into::Added(scale) => before + scale * sum,
                        Into::Rescaled(factors) => factors[at % n] * before + sum,
                    };
                    assert_eq!(got, want, "{m}×{n}×{k} at {at}");
                }
            }
        }
    }

    #[test]
    fn every_extent_either_way_round() {
        for m in [1, 3, 5, 12, 18, 31] {
            for (n, k) in [(16, 1), (32, 33), (48, 64), (112, 77), (16, 131)] {
                check([m, n, k], true, |numbers| numbers[0]);
            }
        }
    }
}
