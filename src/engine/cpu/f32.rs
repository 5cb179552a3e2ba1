//! Products of f32: the micro-kernel.

use super::product::{Into, Left, Product, unrolled};
use crate::plan::cpu::GROUP;
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// Numbers of B that stay in a first-level cache of 32 KB while A and C pass by.
const CACHED: usize = 4 << 10;

/// Terms up to which a sum in halves is a single run, for accuracy.
const MOST_OF_A_RUN: usize = 3 * GROUP;

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let m = self.extents[0];
        match self.left {
            Left::Panels(a) => Tiles::<GROUP>::of(self, a, 1, m * GROUP).all(simd),
            Left::Transposed(a, stride) => Tiles::<1>::of(self, a, stride, 0).all(simd),
        }
    }
}

/// A product by its addresses, which [`Product::run`] has checked: whatever does not depend on the tile is found here, once.
///
/// Rows of A are `ROW_STEP` apart, a constant so that it costs no instruction.
struct Tiles<'a, const ROW_STEP: usize> {
    left: *const f32,
    /// From one term of A to the next.
    term: usize,
    /// From one panel of A to the next, if it has panels.
    panel: usize,
    right: *const f32,
    right_stride: usize,
    c: *mut f32,
    stride: usize,
    extents: [usize; 3],
    into: Into<'a>,
}

impl<'a, const ROW_STEP: usize> Tiles<'a, ROW_STEP> {
    #[inline(always)]
    fn of(product: Product<'a>, left: &[f32], term: usize, panel: usize) -> Self {
        let Product { right, right_stride, c, stride, extents, into, .. } = product;
        let (left, right, c) = (left.as_ptr(), right.as_ptr(), c.as_mut_ptr());
        Tiles { left, term, panel, right, right_stride, c, stride, extents, into }
    }

    #[inline(always)]
    fn all<S: Simd>(&self, simd: S) {
        // Registers that the sums leave free hold a row of B and one element of A.
        match (const { S::REGISTER_COUNT >= 32 }, self.into) {
            (true, Into::ScaledHalves(_)) => self.in_rows::<S, 6, 2>(simd),
            (true, _) => self.in_rows::<S, 12, 1>(simd),
            (false, Into::ScaledHalves(_)) => self.in_rows::<S, 3, 2>(simd),
            (false, _) => self.in_rows::<S, 6, 1>(simd),
        }
    }

    /// All of C, `ROWS` rows and two registers of columns at a time, each element as `SUMS` sums.
    ///
    /// Each row of A meets as many columns of B as stay in the first-level cache.
    #[inline(always)]
    fn in_rows<S: Simd, const ROWS: usize, const SUMS: usize>(&self, simd: S) {
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
    fn rows<S: Simd, const M: usize, const SUMS: usize>(&self, simd: S, row: usize, columns: Range<usize>) -> usize {
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
    fn tile<S: Simd, const M: usize, const N: usize, const SUMS: usize>(&self, simd: S, row: usize, column: usize) {
        let k = self.extents[2];
        let (mut left, mut right) = (self.left.wrapping_add(row * ROW_STEP), self.right.wrapping_add(column));
        // Runs begin with panels.
        let run = if SUMS > 1 && k > MOST_OF_A_RUN { 2 * GROUP } else { k };
        let (mut at, mut into) = (0, self.into);
        while at < k {
            let end = k.min(at + run);
            let mut sums = [[[simd.splat_f32s(0.0); N]; M]; SUMS];
            while at < end {
                let terms = if ROW_STEP == GROUP { GROUP.min(end - at) } else { end - at };
                // SAFETY: `Product::run` asserted that A and B have all of `k`, A with `m` rows and B with `n` columns;
                // `row + M <= m`, `column + N · lanes <= n`, and a panel has all its terms behind each other.
                unsafe {
                    let (left, right) = ((left, self.term), (right, self.right_stride));
                    add::<S, M, N, SUMS, ROW_STEP>(simd, &mut sums, left, right, terms);
                }
                left = left.wrapping_add(if ROW_STEP == GROUP { self.panel } else { terms * self.term });
                right = right.wrapping_add(terms * self.right_stride);
                at += terms;
            }
            if let [even, odd] = &mut sums[..] {
                unrolled!(M, I => {
                    for (even, &odd) in even[I].iter_mut().zip(&odd[I]) {
                        *even = simd.add_f32s(*even, odd);
                    }
                });
            }
            self.store(simd, &sums[0], row, column, into);
            if let Into::ScaledHalves(scale) = into {
                into = Into::Added(scale);
            }
        }
    }

    #[inline(always)]
    fn store<S: Simd, const M: usize, const N: usize>(
        &self,
        simd: S,
        sums: &[[S::f32s; N]; M],
        row: usize,
        column: usize,
        into: Into<'_>,
    ) {
        let c = self.c.wrapping_add(row * self.stride + column);
        let at = |i: usize, j: usize| c.wrapping_add(i * self.stride + j * S::F32_LANES).cast::<S::f32s>();
        let of_columns = |factors: &[f32]| -> [S::f32s; N] {
            let factors = factors.as_ptr().wrapping_add(column).cast::<S::f32s>();
            // SAFETY: `Product::run` asserted that there are `n` factors; `column + N · lanes <= n`.
            std::array::from_fn(|j| unsafe { factors.add(j).read_unaligned() })
        };
        macro_rules! each {
            ($c:ident, $sum:ident, $j:ident => $value:expr) => {
                unrolled!(M, I => {
                    for $j in 0..N {
                        let ($c, $sum) = (at(I, $j), sums[I][$j]);
                        // SAFETY: `Product::run` asserted that C has `m` rows of `n` columns, of which these are some.
                        unsafe { $c.write_unaligned($value) };
                    }
                })
            };
        }
        match into {
            Into::Scaled(scale) | Into::ScaledHalves(scale) => {
                let scale = simd.splat_f32s(scale);
                each!(c, sum, j => simd.mul_f32s(sum, scale));
            }
            Into::Added(scale) => {
                let scale = simd.splat_f32s(scale);
                each!(c, sum, j => simd.mul_add_e_f32s(sum, scale, c.read_unaligned()));
            }
            Into::Rescaled(factors) => {
                let factors = of_columns(factors);
                each!(c, sum, j => simd.mul_add_e_f32s(factors[j], c.read_unaligned(), sum));
            }
            Into::Weighted(factors) => {
                let factors = of_columns(factors);
                each!(c, sum, j => simd.mul_f32s(factors[j], sum));
            }
            Into::WeightedAdded(factors) => {
                let factors = of_columns(factors);
                each!(c, sum, j => simd.mul_add_e_f32s(factors[j], sum, c.read_unaligned()));
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
