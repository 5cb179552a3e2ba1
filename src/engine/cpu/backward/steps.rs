//! What happens to every probability of a group of queries, one in each lane.
//!
//! Where one key has nearly all the weight, `dP` and `Δ` cancel: `Δ` and the sums it comes from are kept in two f32, the
//! second what rounding took from the first.

use super::rows::Row;
use crate::engine::cpu::softmax::{Lanes, exp};
use crate::plan::cpu::GROUP;
use pulp::{Arch, Simd, WithSimd};

/// `Σ exp(S - max)` and `Σ exp(S - max) dout · v` of a group so far, each in two parts.
#[derive(Clone, Copy)]
pub(super) struct Sums {
    exponentials: [Lanes; 2],
    dout_o: [Lanes; 2],
}

impl Sums {
    pub(super) const EMPTY: Sums = Sums { exponentials: [[0.0; GROUP]; 2], dout_o: [[0.0; GROUP]; 2] };

    /// Scales by `correction`, then adds a tile, `[columns, GROUP]`.
    pub(super) fn add(&mut self, correction: &Lanes, p: &[f32], dout_v: Option<&[f32]>) {
        Arch::new().dispatch(Add { sums: self, correction, p, dout_v });
    }

    /// Both sums of one lane.
    pub(super) fn of(&self, lane: usize) -> [f64; 2] {
        [self.exponentials, self.dout_o].map(|[high, low]| f64::from(high[lane]) + f64::from(low[lane]))
    }
}

struct Add<'a> {
    sums: &'a mut Sums,
    correction: &'a Lanes,
    p: &'a [f32],
    dout_v: Option<&'a [f32]>,
}

impl WithSimd for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (corrections, _) = S::as_simd_f32s(self.correction);
        let (p, _) = S::as_simd_f32s(self.p);
        let registers = const { GROUP / S::F32_LANES };
        for (j, &correction) in corrections.iter().enumerate() {
            let mut sum = Two::load(simd, &self.sums.exponentials, j).scaled(simd, correction);
            let mut dout_o = Two::load(simd, &self.sums.dout_o, j).scaled(simd, correction);
            let one = simd.splat_f32s(1.0);
            match self.dout_v {
                Some(dout_v) => {
                    let (dout_v, _) = S::as_simd_f32s(dout_v);
                    for (p, dout_v) in p.chunks_exact(registers).zip(dout_v.chunks_exact(registers)) {
                        sum = sum.plus(simd, p[j], one);
                        dout_o = dout_o.plus(simd, p[j], dout_v[j]);
                    }
                }
                None => {
                    for p in p.chunks_exact(registers) {
                        sum = sum.plus(simd, p[j], one);
                    }
                }
            }
            sum.store(simd, &mut self.sums.exponentials, j);
            dout_o.store(simd, &mut self.sums.dout_o, j);
        }
    }
}

/// A sum and what rounding took from it.
#[derive(Clone, Copy)]
struct Two<S: Simd> {
    high: S::f32s,
    low: S::f32s,
}

impl<S: Simd> Two<S> {
    #[inline(always)]
    fn load(_: S, [high, low]: &[Lanes; 2], j: usize) -> Self {
        Two { high: S::as_simd_f32s(high).0[j], low: S::as_simd_f32s(low).0[j] }
    }

    #[inline(always)]
    fn store(self, _: S, [high, low]: &mut [Lanes; 2], j: usize) {
        S::as_mut_simd_f32s(high).0[j] = self.high;
        S::as_mut_simd_f32s(low).0[j] = self.low;
    }

    /// Plus `a b`. The product's rounding error is exact where there is a fused multiply-add, the sum's everywhere (Knuth).
    #[inline(always)]
    fn plus(self, simd: S, a: S::f32s, b: S::f32s) -> Self {
        let product = simd.mul_f32s(a, b);
        let lost = simd.mul_add_e_f32s(a, b, simd.neg_f32s(product));
        let sum = simd.add_f32s(self.high, product);
        let added = simd.sub_f32s(sum, self.high);
        let before = simd.sub_f32s(self.high, simd.sub_f32s(sum, added));
        let rounding = simd.add_f32s(before, simd.sub_f32s(product, added));
        Two { high: sum, low: simd.add_f32s(self.low, simd.add_f32s(rounding, lost)) }
    }

    /// Times `factor`.
    #[inline(always)]
    fn scaled(self, simd: S, factor: S::f32s) -> Self {
        let high = simd.mul_f32s(self.high, factor);
        let lost = simd.mul_add_e_f32s(self.high, factor, simd.neg_f32s(high));
        Two { high, low: simd.mul_add_e_f32s(self.low, factor, lost) }
    }
}

/// The rows of a group as lanes; lanes without a query have no probability.
pub(super) struct State {
    max: Lanes,
    factor: Lanes,
    weight: Lanes,
    /// `Δ` in two parts.
    delta: [Lanes; 2],
}

impl State {
    pub(super) fn of(rows: &[Row]) -> Self {
        let zero = [0.0; GROUP];
        // Nothing is left of a logit below this maximum.
        let mut state = State { max: [f32::INFINITY; GROUP], factor: zero, weight: zero, delta: [zero; 2] };
        for (lane, row) in rows.iter().enumerate().filter(|(_, row)| row.factor != 0.0) {
            let high = row.delta as f32;
            state.max[lane] = row.max;
            state.factor[lane] = row.factor as f32;
            state.weight[lane] = row.weight;
            state.delta[0][lane] = high;
            state.delta[1][lane] = (row.delta - f64::from(high)) as f32;
        }
        state
    }
}

/// `P` and `dS` of a tile, see [`super::tiles::Tiles::differentiate`].
pub(super) struct Differentiate<'a> {
    pub(super) p: &'a mut [f32],
    pub(super) ds: &'a mut [f32],
    pub(super) state: &'a State,
    pub(super) stepped: bool,
    pub(super) values: bool,
}

impl WithSimd for Differentiate<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match (self.stepped, self.values) {
            (false, false) => self.each::<S, false, false>(simd),
            (false, true) => self.each::<S, false, true>(simd),
            (true, false) => self.each::<S, true, false>(simd),
            (true, true) => self.each::<S, true, true>(simd),
        }
    }
}

impl Differentiate<'_> {
    #[inline(always)]
    fn each<S: Simd, const STEPPED: bool, const VALUES: bool>(self, simd: S) {
        let registers = const { GROUP / S::F32_LANES };
        let of = |lanes: &Lanes, j: usize| S::as_simd_f32s(lanes).0[j];
        let (p, _) = S::as_mut_simd_f32s(self.p);
        let (ds, _) = S::as_mut_simd_f32s(self.ds);
        for j in 0..registers {
            let State { max, factor, weight, delta: [high, low] } = self.state;
            let row = [max, factor, weight, high, low].map(|lanes| of(lanes, j));
            // Four at a time, as in the forward's exponentials.
            let (mut fours, mut fours_ds) = (p.chunks_exact_mut(4 * registers), ds.chunks_exact_mut(4 * registers));
            for (p, ds) in (&mut fours).zip(&mut fours_ds) {
                keys::<S, STEPPED, VALUES, 4>(simd, p, ds, j, row);
            }
            let (rest, rest_ds) = (fours.into_remainder(), fours_ds.into_remainder());
            for (p, ds) in rest.chunks_exact_mut(registers).zip(rest_ds.chunks_exact_mut(registers)) {
                keys::<S, STEPPED, VALUES, 1>(simd, p, ds, j, row);
            }
        }
    }
}

/// `N` keys of the queries in register `j` of each row, whose state comes in the order of [`State`].
#[inline(always)]
fn keys<S: Simd, const STEPPED: bool, const VALUES: bool, const N: usize>(
    simd: S,
    p: &mut [S::f32s],
    ds: &mut [S::f32s],
    j: usize,
    [max, factor, weight, high, low]: [S::f32s; 5],
) {
    let registers = const { GROUP / S::F32_LANES };
    let mut e = [max; N];
    for n in 0..N {
        e[n] = p[n * registers + j];
    }
    if !STEPPED {
        for e in &mut e {
            *e = simd.sub_f32s(*e, max);
        }
        e = exp::<S, true, N>(simd, e);
    }
    for n in 0..N {
        let (p, ds) = (&mut p[n * registers + j], &mut ds[n * registers + j]);
        let probability = simd.mul_f32s(e[n], factor);
        if VALUES {
            // Fused, so that `w dout · v` loses no digit before it meets `Δ`.
            let difference = simd.mul_add_e_f32s(weight, *ds, simd.neg_f32s(high));
            *ds = simd.mul_f32s(probability, simd.sub_f32s(difference, low));
        }
        *p = simd.mul_f32s(probability, weight);
    }
}

#[cfg(test)]
mod tests {
    use super::{Differentiate, State, Sums};
    use crate::engine::cpu::backward::rows::Row;
    use crate::plan::cpu::GROUP;
    use pulp::Arch;

    #[test]
    fn sums_keep_what_rounding_takes() {
        // f32 has no 2^25 + 1: 0.5 and 1 are lost, one by one, from a plain sum.
        let large = 2f32.powi(25);
        let mut sums = Sums::EMPTY;
        let p: Vec<f32> = [large, 0.5, 0.5, 1.0].iter().flat_map(|&p| [p; GROUP]).collect();
        let dout_v: Vec<f32> = [1.0, 2.0, 1.0, -3.0].iter().flat_map(|&v| [v; GROUP]).collect();
        sums.add(&[1.0; GROUP], &p, Some(&dout_v));
        sums.add(&[0.5; GROUP], &p, Some(&dout_v));
        for lane in 0..GROUP {
            let once = [f64::from(large) + 2.0, f64::from(large) - 1.5];
            assert_eq!(sums.of(lane), once.map(|sum| 1.5 * sum), "lane {lane}");
        }
    }

    #[test]
    fn what_is_left_of_dp_and_delta_has_both_parts_of_delta() {
        // In f32 this is 1.
        let delta = 1.0 - 2f64.powi(-30);
        let rows: Vec<Row> =
            (1..=GROUP).map(|n| Row { max: 0.0, weight: 1.0, factor: 1.0 / n as f64, delta, dout_o: 0.0 }).collect();
        let state = &State::of(&rows);
        for stepped in [true, false] {
            let e = if stepped { 1.0 } else { 0.0 };
            let (mut p, mut ds) = ([e; GROUP], [1.0; GROUP]);
            Arch::new().dispatch(Differentiate { p: &mut p, ds: &mut ds, state, stepped, values: true });
            let factors = rows.iter().map(|row| row.factor as f32);
            for (lane, ((p, ds), factor)) in p.iter().zip(&ds).zip(factors).enumerate() {
                assert_eq!((*p, *ds), (factor, factor * 2f32.powi(-30)), "lane {lane}, stepped: {stepped}");
            }
        }
    }
}
