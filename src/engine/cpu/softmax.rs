//! The online softmax of a group of queries, one in each lane (docs/math.md, equations 4 to 6).

use crate::plan::cpu::GROUP;
use pulp::{Arch, Simd, WithSimd};

/// As many registers as `$like` has, each computed before a next step begins.
macro_rules! each {
    ($like:expr, $i:ident => $value:expr) => {{
        let mut all = $like;
        for $i in 0..all.len() {
            all[$i] = $value;
        }
        all
    }};
}

/// A number of each query of a group.
pub(super) type Lanes = [f32; GROUP];

/// Running maxima and denominators of a group.
#[derive(Clone, Copy)]
pub(super) struct OnlineSoftmax {
    pub(super) max: Lanes,
    pub(super) sum: Lanes,
}

impl OnlineSoftmax {
    pub(super) const EMPTY: OnlineSoftmax = OnlineSoftmax { max: [f32::NEG_INFINITY; GROUP], sum: [0.0; GROUP] };

    /// Turns logits, `[keys, GROUP]`, into unnormalised probabilities in place and returns the factors of everything summed
    /// before. A query without any key so far keeps its maximum of -inf, and its probabilities are 0; NaN stays NaN.
    pub(super) fn step(&mut self, logits: &mut [f32]) -> Lanes {
        let mut correction = [1.0; GROUP];
        Arch::new().dispatch(Step { logits, state: self, correction: &mut correction });
        correction
    }

    /// Natural logarithm of a query's denominator, -inf without any key.
    pub(super) fn lse(&self, lane: usize) -> f32 {
        if self.sum[lane] == 0.0 { f32::NEG_INFINITY } else { self.max[lane] + self.sum[lane].ln() }
    }
}

struct Step<'a> {
    logits: &'a mut [f32],
    state: &'a mut OnlineSoftmax,
    correction: &'a mut Lanes,
}

impl WithSimd for Step<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (logits, _) = S::as_mut_simd_f32s(self.logits);
        let (maxima, _) = S::as_mut_simd_f32s(&mut self.state.max);
        let (sums, _) = S::as_mut_simd_f32s(&mut self.state.sum);
        let (corrections, _) = S::as_mut_simd_f32s(self.correction);
        let registers = const { GROUP / S::F32_LANES };
        for j in 0..registers {
            let (mut max, mut min) = ([simd.splat_f32s(f32::NEG_INFINITY); 4], [simd.splat_f32s(f32::INFINITY); 2]);
            let rows = logits.chunks_exact(4 * registers);
            for row in rows.remainder().chunks_exact(registers) {
                // The order matters on x86: of a NaN and a number this takes the number, which NaN must not hide.
                max[0] = simd.max_f32s(row[j], max[0]);
                min[0] = simd.min_f32s(row[j], min[0]);
            }
            for rows in rows {
                for i in 0..4 {
                    max[i] = simd.max_f32s(rows[i * registers + j], max[i]);
                    min[i % 2] = simd.min_f32s(rows[i * registers + j], min[i % 2]);
                }
            }
            let max = max.into_iter().fold(maxima[j], |a, b| simd.max_f32s(a, b));
            let reference = finite::<S>(simd, max);
            let least = simd.sub_f32s(simd.min_f32s(min[0], min[1]), reference);
            let negligible = simd.less_than_f32s(least, simd.splat_f32s(NEGLIGIBLE));
            let sum = if simd.first_true_m32s(negligible) == S::F32_LANES {
                add_exponentials::<S, false>(simd, logits, j, reference)
            } else {
                add_exponentials::<S, true>(simd, logits, j, reference)
            };
            let [correction] = exp::<S, true, 1>(simd, [simd.sub_f32s(maxima[j], reference)]);
            sums[j] = simd.mul_add_e_f32s(sums[j], correction, sum);
            maxima[j] = max;
            corrections[j] = correction;
        }
    }
}

/// Replaces each logit in register `j` of its row by `exp(s - max)`, and returns their sum; with `TEST` some may be negligible.
///
/// Four at a time, for their steps to wait for the processor instead of each other.
#[inline(always)]
fn add_exponentials<S: Simd, const TEST: bool>(simd: S, logits: &mut [S::f32s], j: usize, max: S::f32s) -> S::f32s {
    let registers = const { GROUP / S::F32_LANES };
    // Two sums, not more: the constants of `exp` take the registers.
    let mut sum = [simd.splat_f32s(0.0); 2];
    let mut fours = logits.chunks_exact_mut(4 * registers);
    for rows in &mut fours {
        let e = exp::<S, TEST, 4>(simd, each!([max; 4], i => simd.sub_f32s(rows[i * registers + j], max)));
        for i in 0..4 {
            rows[i * registers + j] = e[i];
            sum[i % 2] = simd.add_f32s(sum[i % 2], e[i]);
        }
    }
    for row in fours.into_remainder().chunks_exact_mut(registers) {
        let [e] = exp::<S, TEST, 1>(simd, [simd.sub_f32s(row[j], max)]);
        row[j] = e;
        sum[0] = simd.add_f32s(sum[0], e);
    }
    simd.add_f32s(sum[0], sum[1])
}

/// `exp(s - max)` of each logit of one query, in place.
pub(super) fn exponentials(logits: &mut [f32], max: f32) {
    Arch::new().dispatch(Exponentials { logits, max });
}

struct Exponentials<'a> {
    logits: &'a mut [f32],
    max: f32,
}

impl WithSimd for Exponentials<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let max = simd.splat_f32s(self.max);
        let (whole, rest) = S::as_mut_simd_f32s(self.logits);
        for s in whole {
            [*s] = exp::<S, true, 1>(simd, [simd.sub_f32s(*s, max)]);
        }
        let [s] = exp::<S, true, 1>(simd, [simd.sub_f32s(simd.partial_load_f32s(rest), max)]);
        simd.partial_store_f32s(rest, s);
    }
}

/// Takes -inf, the maximum of no keys, for 0: every logit there is -inf, and so is its difference to 0.
#[inline(always)]
fn finite<S: Simd>(simd: S, max: S::f32s) -> S::f32s {
    let empty = simd.less_than_f32s(max, simd.splat_f32s(f32::MIN));
    simd.select_f32s(empty, simd.splat_f32s(0.0), max)
}

/// Logits this far below the row's maximum have no weight: e^-80 is 2^-115, out of sight of f32 sums by 2^90. Kept, such
/// weights and their products with values would be subnormal numbers, on which processors are slow: a peaked softmax
/// took four times as long (benches/NOTEBOOK.md).
const NEGLIGIBLE: f32 = -80.0;

/// `exp(x)` for x up to 80, to within 1 unit in the last place, NaN of NaN; 0 below [`NEGLIGIBLE`] with `TEST`, without which
/// no x may be there.
///
/// Cody and Waite: x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts of which the first times n is exact; e^r =
/// 1 + r + r² q(r), q of degree 4 fitted for the least relative error of the whole, 3e-9.
#[inline(always)]
pub(super) fn exp<S: Simd, const TEST: bool, const N: usize>(simd: S, x: [S::f32s; N]) -> [S::f32s; N] {
    const LN2: [f32; 2] = [355.0 / 512.0, -2.121_944_4e-4];
    const Q: [f32; 5] = [0.499_999_94, 0.166_665_21, 0.041_668_39, 0.008_368_745, 0.001_381_453_9];
    /// Added to a small number it leaves the nearest integer in the lowest bits, with the exponent's bias on top.
    const ROUND: f32 = 12_582_912.0 + 127.0;

    let [log2_e, round] = [std::f32::consts::LOG2_E, ROUND].map(|c| simd.splat_f32s(c));
    let (ln2, q) = (LN2.map(|c| simd.splat_f32s(-c)), Q.map(|c| simd.splat_f32s(c)));
    let shifted = each!(x, i => simd.mul_add_e_f32s(x[i], log2_e, round));
    let n = each!(x, i => simd.sub_f32s(shifted[i], round));
    let r = each!(x, i => simd.mul_add_e_f32s(n[i], ln2[0], x[i]));
    let r = each!(x, i => simd.mul_add_e_f32s(n[i], ln2[1], r[i]));
    let r2 = each!(x, i => simd.mul_f32s(r[i], r[i]));
    // Estrin's order: two halves that do not wait for each other.
    let high = each!(x, i => simd.mul_add_e_f32s(r[i], q[3], q[2]));
    let high = each!(x, i => simd.mul_add_e_f32s(r2[i], q[4], high[i]));
    let low = each!(x, i => simd.mul_add_e_f32s(r[i], q[1], q[0]));
    let sum = each!(x, i => simd.mul_add_e_f32s(r2[i], high[i], low[i]));
    let e = each!(x, i => simd.mul_add_e_f32s(r2[i], sum[i], r[i]));
    let e = each!(x, i => {
        let bits = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted[i]), simd.splat_u32s(23));
        let power = simd.transmute_f32s_u32s(bits);
        simd.mul_add_e_f32s(e[i], power, power)
    });
    if TEST {
        let negligible = simd.splat_f32s(NEGLIGIBLE);
        each!(x, i => simd.select_f32s(simd.less_than_f32s(x[i], negligible), simd.splat_f32s(0.0), e[i]))
    } else {
        e
    }
}

#[cfg(test)]
mod tests {
    use super::{NEGLIGIBLE, OnlineSoftmax, exponentials};
    use crate::plan::cpu::GROUP;

    #[test]
    fn exponentials_are_good_to_one_unit_in_the_last_place() {
        let step = 9e-5;
        let mut x: Vec<f32> = (0..1_000_003).map(|n| (f64::from(NEGLIGIBLE) + step * f64::from(n)) as f32).collect();
        let exact: Vec<f64> = x.iter().map(|&x| f64::from(x).exp()).collect();
        exponentials(&mut x, 0.0);
        let units = x.iter().zip(exact).map(|(&got, exact)| {
            let unit = 2f64.powi(exact.log2().floor() as i32 - 23);
            (f64::from(got) - exact).abs() / unit
        });
        let worst = units.fold(0.0, |worst: f64, units| if units <= worst { worst } else { units });
        assert!(worst <= 1.0, "{worst} units in the last place");
    }

    #[test]
    fn exponentials_of_what_is_no_ordinary_number() {
        let mut x = [0.0, -0.0, NEGLIGIBLE * 1.0001, -1e30, f32::MIN, f32::NEG_INFINITY, f32::NAN];
        exponentials(&mut x, 0.0);
        assert_eq!(x[..6], [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
        assert!(x[6].is_nan());
    }

    #[test]
    fn a_step_keeps_empty_lanes_empty_and_nan_to_its_lane() {
        let mut logits: Vec<f32> = (0..5 * GROUP).map(|n| (n % 7) as f32 - 2.0).collect();
        for row in logits.chunks_mut(GROUP) {
            row[3] = f32::NEG_INFINITY;
        }
        logits[2 * GROUP + 9] = f32::NAN;
        let mut softmax = OnlineSoftmax::EMPTY;
        softmax.step(&mut logits);
        for lane in 0..GROUP {
            match lane {
                3 => assert_eq!((softmax.sum[3], softmax.lse(3)), (0.0, f32::NEG_INFINITY)),
                9 => assert!(softmax.sum[9].is_nan()),
                lane => assert!(softmax.sum[lane] >= 1.0 && softmax.lse(lane).is_finite()),
            }
        }
    }
}
