//! Operations on the rows of tiles: one step of the online softmax, sums.

use super::softmax::exponentials;
use pulp::Arch;

/// One query's running maximum and denominator (docs/math.md, equations 4 to 6).
#[derive(Clone, Copy)]
pub(super) struct OnlineSoftmax {
    pub(super) max: f32,
    pub(super) sum: f32,
}

impl OnlineSoftmax {
    pub(super) const EMPTY: OnlineSoftmax = OnlineSoftmax { max: f32::NEG_INFINITY, sum: 0.0 };

    /// Turns logits into unnormalised probabilities in place and returns the factor of everything summed before.
    pub(super) fn step(&mut self, logits: &mut [f32]) -> f32 {
        let max = maximum(logits).max(self.max);
        if max == f32::NEG_INFINITY {
            // No key so far, or NaN logits: `maximum` passes over NaN, and the result must not.
            logits.iter_mut().filter(|s| !s.is_nan()).for_each(|s| *s = 0.0);
            self.sum += sum(logits);
            return 1.0;
        }
        exponentials(logits, max);
        let correction = (self.max - max).exp();
        self.sum = self.sum * correction + sum(logits);
        self.max = max;
        correction
    }

    /// The state after the keys of both.
    pub(super) fn join(self, other: Self) -> Self {
        let joined = OnlineSoftmax { max: self.max.max(other.max), sum: 0.0 };
        OnlineSoftmax { sum: self.sum * joined.factor(self) + other.sum * joined.factor(other), ..joined }
    }

    /// What a sum of `part`, one of the joined, is multiplied by.
    pub(super) fn factor(self, part: Self) -> f32 {
        // A part that has seen no key has its maximum at -inf, and a difference of infinities is no number.
        if self.max == part.max { 1.0 } else { (part.max - self.max).exp() }
    }

    /// Natural logarithm of the denominator, -inf without any key.
    pub(super) fn lse(self) -> f32 {
        if self.sum == 0.0 { f32::NEG_INFINITY } else { self.max + self.sum.ln() }
    }
}

/// Independent partial results, for the compiler to keep in one vector register.
const LANES: usize = 32;

fn maximum(values: &[f32]) -> f32 {
    Arch::new().dispatch(
        #[inline(always)]
        || lanes(values, f32::NEG_INFINITY, |a, b| if b > a { b } else { a }),
    )
}

/// `Σ values`.
pub(super) fn sum(values: &[f32]) -> f32 {
    Arch::new().dispatch(
        #[inline(always)]
        || lanes(values, 0.0, |a, b| a + b),
    )
}

/// `Σ a · b` of slices of equal length, in f64.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f64 {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            let mut partial = [0.0; LANES];
            let ((a, rest_a), (b, rest_b)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
            for (a, b) in a.iter().zip(b) {
                for (partial, (&a, &b)) in partial.iter_mut().zip(a.iter().zip(b)) {
                    *partial += f64::from(a) * f64::from(b);
                }
            }
            let rest = rest_a.iter().zip(rest_b).map(|(&a, &b)| f64::from(a) * f64::from(b));
            partial.into_iter().chain(rest).sum()
        },
    )
}

#[inline(always)]
fn lanes(values: &[f32], start: f32, combine: impl Fn(f32, f32) -> f32) -> f32 {
    let mut partial = [start; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (partial, &value) in partial.iter_mut().zip(chunk) {
            *partial = combine(*partial, value);
        }
    }
    partial.into_iter().chain(rest.iter().copied()).fold(start, combine)
}
