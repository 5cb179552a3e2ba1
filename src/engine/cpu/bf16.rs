//! Products of bf16 by the processor's own instruction (AVX512-BF16), twice as many in a cycle as of f32.
//!
//! An element is two neighbours of the sum: `sum += a₀ b₀ + a₁ b₁`, products exact, sums rounded to f32, numbers below
//! 2⁻¹²⁶ taken for 0. Probabilities are rounded to bf16 for the second product, as on a GPU.

use super::element::{Element, Holds};
use super::product::{Into, Left, Product, unrolled};
use crate::plan::cpu::GROUP;
use half::bf16;
use std::arch::x86_64::*;

/// Two neighbours of a sum.
pub(super) type Pair = [bf16; 2];

/// Registers that a row of a group takes.
const REGISTERS: usize = GROUP / 16;

/// Whether the processor has the instruction, and those that arrange its operands.
pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512bw")
}

impl Element for Pair {
    const NUMBERS: usize = 2;

    fn multiply(product: Product<'_, Pair>) {
        assert!(product.extents[1] == GROUP && is_available());
        // SAFETY: the features are there.
        unsafe { multiply(product) }
    }

    fn probabilities(p: &mut [f32]) -> &[Pair] {
        assert!(is_available());
        // SAFETY: the features are there.
        unsafe { round_pairs(p) }
        let pairs = p.len().div_ceil(2 * GROUP) * GROUP;
        bytemuck::cast_slice(&p[..pairs])
    }
}

impl Holds<bf16> for Pair {
    #[inline(always)]
    fn along(row: &[bf16], to: &mut [Pair]) {
        let (pairs, rest) = row.as_chunks::<2>();
        to[..pairs.len()].copy_from_slice(pairs);
        if let [last] = rest {
            to[pairs.len()] = [*last, bf16::ZERO];
        }
    }

    #[inline(always)]
    fn across(row: &[bf16], next: Option<&[bf16]>, to: &mut [Pair]) {
        match next {
            Some(next) => to.iter_mut().zip(row.iter().zip(next)).for_each(|(to, (&a, &b))| *to = [a, b]),
            None => to.iter_mut().zip(row).for_each(|(to, &a)| *to = [a, bf16::ZERO]),
        }
    }
}

impl Left<'_, Pair> {
    /// Where the element of `row` and term `k` of `m` rows is, and how far the next row and the next term are.
    #[inline(always)]
    fn at(&self, m: usize, row: usize, k: usize) -> (*const Pair, usize, usize) {
        match *self {
            Left::Panels(left) => (left[(k / GROUP * m + row) * GROUP..].as_ptr(), GROUP, 1),
            Left::Transposed(left, stride) => (left[k * stride + row..].as_ptr(), 1, stride),
        }
    }

    /// Terms of at most `terms` that [`Left::at`] has behind each other.
    #[inline(always)]
    fn terms(&self, terms: usize) -> usize {
        if let Left::Panels(_) = self { terms.min(GROUP) } else { terms }
    }
}

/// Every two rows of `[keys, GROUP]` to one of pairs, over the front of `p`; a last row without a partner gets zeros.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn round_pairs(p: &mut [f32]) {
    // Of 16 numbers of one row and 16 of the other, one behind the other: each number beside its partner.
    let order: [u16; 32] = std::array::from_fn(|n| (n / 2 + n % 2 * 16) as u16);
    // SAFETY: 64 bytes, read wherever they lie.
    let order = unsafe { _mm512_loadu_si512(order.as_ptr().cast()) };
    for pair in 0..p.len().div_ceil(2 * GROUP) {
        for register in 0..REGISTERS {
            let at = |row: usize| row * GROUP + register * 16;
            let load = |row: usize| match p.get(at(row)..at(row) + 16) {
                // SAFETY: 16 floats, read wherever they lie.
                Some(row) => unsafe { _mm512_loadu_ps(row.as_ptr()) },
                None => _mm512_setzero_ps(),
            };
            let rounded = _mm512_cvtne2ps_pbh(load(2 * pair + 1), load(2 * pair));
            // SAFETY: both types are 64 bytes, of which every pattern is a value.
            let rounded: __m512i = unsafe { std::mem::transmute(rounded) };
            let pairs = _mm512_permutexvar_epi16(order, rounded);
            // SAFETY: 16 floats' room; the rows read by later pairs lie behind it.
            unsafe { _mm512_storeu_si512(p[at(pair)..][..16].as_mut_ptr().cast(), pairs) };
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn multiply(mut product: Product<'_, Pair>) {
    let m = product.extents[0];
    let mut row = 0;
    while row + 12 <= m {
        tile::<12>(&mut product, row);
        row += 12;
    }
    while row + 4 <= m {
        tile::<4>(&mut product, row);
        row += 4;
    }
    while row < m {
        tile::<1>(&mut product, row);
        row += 1;
    }
}

/// `M` rows of a product, summed in registers.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn tile<const M: usize>(product: &mut Product<'_, Pair>, row: usize) {
    let [m, _, k] = product.extents;
    let mut sums = [[_mm512_setzero_ps(); REGISTERS]; M];
    let mut at = 0;
    while at < k {
        let right = product.right[at * product.right_stride..].as_ptr();
        let terms = product.left.terms(k - at);
        // SAFETY: `Product::run` asserted that A and B have all of `k`, A with `m` rows and B with `GROUP` columns;
        // `row + M <= m`, and a panel has all its columns behind each other.
        unsafe { add(&mut sums, product.left.at(m, row, at), (right, product.right_stride), terms) };
        at += terms;
    }
    unrolled!(M, I => {
        let c = &mut product.c[(row + I) * product.stride..][..GROUP];
        for j in 0..REGISTERS {
            let sum = sums[I][j];
            let c = c[j * 16..][..16].as_mut_ptr();
            // SAFETY: 16 floats of c, and of the factors, which `Product::run` counted.
            unsafe {
                let of_columns = |factors: &[f32]| _mm512_loadu_ps(factors[j * 16..][..16].as_ptr());
                let result = match product.into {
                    Into::Scaled(scale) | Into::ScaledHalves(scale) => _mm512_mul_ps(sum, _mm512_set1_ps(scale)),
                    Into::Added(scale) => _mm512_fmadd_ps(sum, _mm512_set1_ps(scale), _mm512_loadu_ps(c)),
                    Into::Rescaled(factors) => _mm512_fmadd_ps(of_columns(factors), _mm512_loadu_ps(c), sum),
                    Into::Weighted(factors) => _mm512_mul_ps(of_columns(factors), sum),
                    Into::WeightedAdded(factors) => _mm512_fmadd_ps(of_columns(factors), sum, _mm512_loadu_ps(c)),
                };
                _mm512_storeu_ps(c, result);
            }
        }
    });
}

/// `sums[i][j] += Σ A[i, k] B[k, j]` over `terms` pairs. Pairs of A are `row_step` apart down a column; the other steps are what
/// lies between one pair of the sum and the next.
///
/// # Safety
/// From `left` on there are `M` pairs `row_step` apart, from `right` on a group of pairs, and the same at each of the following
/// `terms - 1` steps.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn add<const M: usize>(
    sums: &mut [[__m512; REGISTERS]; M],
    (mut left, row_step, left_step): (*const Pair, usize, usize),
    (mut right, right_step): (*const Pair, usize),
    terms: usize,
) {
    for _ in 0..terms {
        // SAFETY: the caller's promise; a register is 16 pairs, read wherever they lie.
        let b: [__m512bh; REGISTERS] =
            std::array::from_fn(|j| unsafe { right.add(j * 16).cast::<__m512bh>().read_unaligned() });
        unrolled!(M, I => {
            // SAFETY: the caller's promise; both types of a register are 64 bytes, of which every pattern is a value.
            let a: __m512bh = unsafe {
                std::mem::transmute(_mm512_set1_epi32(left.add(I * row_step).cast::<i32>().read_unaligned()))
            };
            for j in 0..REGISTERS {
                sums[I][j] = _mm512_dpbf16_ps(sums[I][j], a, b[j]);
            }
        });
        left = left.wrapping_add(left_step);
        right = right.wrapping_add(right_step);
    }
}

#[cfg(test)]
mod tests {
    use super::{Element, Pair, is_available};
    use crate::engine::cpu::product::tests::check;
    use crate::plan::cpu::GROUP;
    use half::bf16;
    use std::io::Write;

    fn is_left_out() -> bool {
        if !is_available() {
            // Not eprintln: the test harness would swallow it.
            let _ =
                writeln!(std::io::stderr(), "LEFT OUT: products of bf16: this processor has no instruction for them");
        }
        !is_available()
    }

    #[test]
    fn every_extent_either_way_round() {
        if is_left_out() {
            return;
        }
        for m in [1, 3, 5, 12, 18, 31] {
            for k in [1, 33, 64, 77] {
                check([m, GROUP, k], false, |numbers| [numbers[0], numbers[1]].map(bf16::from_f32));
            }
        }
    }

    #[test]
    fn probabilities_are_rounded_to_nearest_beside_their_partners() {
        if is_left_out() {
            return;
        }
        for rows in [1, 2, 5] {
            let p: Vec<f32> = (0..rows * GROUP).map(|n| 1.0 / (n as f32 + 1.5)).collect();
            let mut in_place = p.clone();
            let pairs = Pair::probabilities(&mut in_place);
            assert_eq!(pairs.len(), rows.div_ceil(2) * GROUP);
            for (at, got) in pairs.iter().enumerate() {
                let (row, lane) = (at / GROUP * 2, at % GROUP);
                let of = |row: usize| p.get(row * GROUP + lane).map_or(bf16::ZERO, |&p| bf16::from_f32(p));
                assert_eq!(*got, [of(row), of(row + 1)], "row {row}, lane {lane}");
            }
        }
    }
}
