//! Operations on tiles: matrix products, one step of the online softmax, sums.

use gemm_common::Parallelism;

/// A matrix in memory: elements `row_step` apart down a column, `column_step` along a row.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_step: usize,
    column_step: usize,
}

impl<'a> Matrix<'a> {
    /// Row-major, with rows `stride` elements apart.
    pub(super) fn new(data: &'a [f32], rows: usize, columns: usize, stride: usize) -> Self {
        assert!(rows > 0 && columns > 0 && columns <= stride);
        assert!((rows - 1) * stride + columns <= data.len());
        Matrix { data, rows, columns, row_step: stride, column_step: 1 }
    }

    fn transposed(self) -> Self {
        Matrix {
            rows: self.columns,
            columns: self.rows,
            row_step: self.column_step,
            column_step: self.row_step,
            ..self
        }
    }

    /// At most `count` columns from `start` on.
    fn columns(self, start: usize, count: usize) -> Self {
        assert!(start < self.columns);
        Matrix { data: &self.data[start * self.column_step..], columns: count.min(self.columns - start), ..self }
    }
}

/// `dst[m, n] = scale · lhs[m, k] · rhs[n, k]ᵀ`, the rows of `dst` being `stride` apart.
///
/// The sum over `k` is taken in runs of `run` terms: its rounding error grows with the square root of the longer of run
/// and number of runs instead of `k`.
pub(super) fn matmul_transposed(
    dst: &mut [f32],
    stride: usize,
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
    scale: f32,
    run: usize,
) {
    assert_eq!(lhs.columns, rhs.columns);
    for start in (0..lhs.columns).step_by(run) {
        product(dst, stride, start > 0, lhs.columns(start, run), rhs.columns(start, run).transposed(), scale);
    }
}

/// `dst[m, n] += lhs[m, k] · rhs[k, n]`, the rows of `dst` being `n` apart.
pub(super) fn matmul_add(dst: &mut [f32], lhs: Matrix<'_>, rhs: Matrix<'_>) {
    product(dst, rhs.columns, true, lhs, rhs, 1.0);
}

/// `dst[m, n] += lhs[k, m]ᵀ · rhs[k, n]`, the rows of `dst` being `n` apart.
pub(super) fn transposed_matmul_add(dst: &mut [f32], lhs: Matrix<'_>, rhs: Matrix<'_>) {
    product(dst, rhs.columns, true, lhs.transposed(), rhs, 1.0);
}

/// `dst = add · dst + scale · lhs · rhs`, the rows of `dst` being `stride` apart.
fn product(dst: &mut [f32], stride: usize, add: bool, lhs: Matrix<'_>, rhs: Matrix<'_>, scale: f32) {
    let (m, n, k) = (lhs.rows, rhs.columns, lhs.columns);
    assert_eq!(k, rhs.rows);
    assert!(n <= stride && (m - 1) * stride + n <= dst.len());
    // SAFETY: `Matrix` keeps its elements inside its slice, whichever way round, and the assertion above those of `dst`,
    // which is borrowed exclusively; f32 needs no conjugation.
    unsafe {
        gemm_f32::gemm::f32::get_gemm_fn()(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            stride as isize,
            add,
            lhs.data.as_ptr(),
            lhs.column_step as isize,
            lhs.row_step as isize,
            rhs.data.as_ptr(),
            rhs.column_step as isize,
            rhs.row_step as isize,
            1.0,
            scale,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

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

    /// Natural logarithm of the denominator, -inf without any key.
    pub(super) fn lse(&self) -> f32 {
        if self.sum == 0.0 { f32::NEG_INFINITY } else { self.max + self.sum.ln() }
    }
}

/// `exp(s - max)` of each logit, in place.
pub(super) fn exponentials(logits: &mut [f32], max: f32) {
    logits.iter_mut().for_each(|s| *s = if *s - max < NEGLIGIBLE { 0.0 } else { (*s - max).exp() });
}

/// Logits this far below the row's maximum have no weight: e^-80 is 2^-115, out of sight of f32 sums by 2^90. Kept, such
/// weights and their products with values would be subnormal numbers, on which processors are slow: a peaked softmax
/// took four times as long (benches/NOTEBOOK.md).
const NEGLIGIBLE: f32 = -80.0;

/// Independent partial results, for the compiler to keep in one vector register.
const LANES: usize = 8;

fn maximum(values: &[f32]) -> f32 {
    lanes(values, f32::NEG_INFINITY, f32::max)
}

/// `Σ values`.
pub(super) fn sum(values: &[f32]) -> f32 {
    lanes(values, 0.0, |a, b| a + b)
}

/// `Σ a · b` of slices of equal length, in f64.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut partial = [0.0; LANES];
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = a.remainder().iter().zip(b.remainder());
    for (a, b) in a.clone().zip(b.clone()) {
        for (partial, (&a, &b)) in partial.iter_mut().zip(a.iter().zip(b)) {
            *partial += f64::from(a) * f64::from(b);
        }
    }
    partial.into_iter().chain(rest.map(|(&a, &b)| f64::from(a) * f64::from(b))).sum()
}

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
