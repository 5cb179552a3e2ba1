//! Operations on the rows of tiles: one step of the online softmax, sums.

use pulp::Arch;

/// Independent partial results, for the compiler to keep in one vector register.
const LANES: usize = 32;

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
