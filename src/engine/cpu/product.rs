//! Matrix products of tiles, which most of the cpu engine's time goes through.
//!
//! The right matrix is read as it lies, a vector register of columns at a time; the elements of the left one are spread
//! over a whole register. Neighbours in memory belong to one row of the left matrix or to one column, and both ways round
//! are there, so that no product needs a transposed copy.

use super::element::Element;
use crate::plan::cpu::GROUP;

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

/// The left matrix `A[m, k]`.
#[derive(Clone, Copy)]
pub(super) enum Left<'a, E = f32> {
    /// Panels of [`GROUP`] columns: `[ceil(k / GROUP), m, GROUP]`.
    Panels(&'a [E]),
    /// Rows of the transpose: `[k, stride]`.
    Transposed(&'a [E], usize),
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
    /// `C[m, n] = factors[n] · (A B)[m, n]`.
    Weighted(&'a [f32]),
    /// `C[m, n] += factors[n] · (A B)[m, n]`.
    WeightedAdded(&'a [f32]),
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
        if let Into::Rescaled(factors) | Into::Weighted(factors) | Into::WeightedAdded(factors) = self.into {
            assert!(n <= factors.len());
        }
        E::multiply(self);
    }
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
            let of_columns = [Into::Rescaled(&factors), Into::Weighted(&factors), Into::WeightedAdded(&factors)];
            for into in of_columns.into_iter().chain([Into::Scaled(2.0), Into::Added(4.0)]).chain(halves) {
                let mut got = c.clone();
                let (c_of, extents) = (&mut got, [m, n, k]);
                Product { left, right: &right, right_stride: n, c: c_of, stride: n, extents, into }.run();
                for (at, &got) in got.iter().enumerate() {
                    let (sum, before) = (exact(at / n, at % n), c[at]);
                    let want = match into {
                        Into::Scaled(scale) | Into::ScaledHalves(scale) => scale * sum,
                        Into::Added(scale) => before + scale * sum,
                        Into::Rescaled(factors) => factors[at % n] * before + sum,
                        Into::Weighted(factors) => factors[at % n] * sum,
                        Into::WeightedAdded(factors) => before + factors[at % n] * sum,
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
