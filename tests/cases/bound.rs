//! The error bound: relative Frobenius error at most the naive one's, largest error at most twice the naive one's, each
//! plus half a unit in the last place of the output.

use fused_attention::DType;

/// Measured errors and what they may be.
#[derive(Clone, Copy, Debug)]
pub struct Bound {
    pub frobenius: f64,
    pub frobenius_bound: f64,
    pub largest: f64,
    pub largest_bound: f64,
}

impl Bound {
    /// Written so that NaN fails.
    pub fn holds(&self) -> bool {
        self.frobenius <= self.frobenius_bound && self.largest <= self.largest_bound
    }
}

/// Judges `got` against the oracle beside the naive result; infinities must match exactly.
///
/// `dtype` is the type that `got` is stored in.
pub fn bound(dtype: DType, got: &[f32], naive: &[f32], oracle: &[f64]) -> Bound {
    bound_of_draws(dtype, got, &[naive.to_vec()], oracle)
}

/// The same beside the worst of several naive results.
pub fn bound_of_draws(dtype: DType, got: &[f32], naive: &[Vec<f32>], oracle: &[f64]) -> Bound {
    assert_eq!(got.len(), oracle.len(), "as many results as the oracle has");
    let own = Errors::of(got, oracle);
    let theirs = naive.iter().fold(Errors { frobenius: 0.0, largest: 0.0 }, |worst, naive| {
        assert_eq!(naive.len(), oracle.len(), "as many naive results as the oracle has");
        let errors = Errors::of(naive, oracle);
        assert!(!errors.frobenius.is_nan(), "a naive result that bounds nothing");
        Errors { frobenius: worst.frobenius.max(errors.frobenius), largest: worst.largest.max(errors.largest) }
    });
    let norm = oracle.iter().filter(|x| x.is_finite()).map(|x| x * x).sum::<f64>().sqrt();
    let max = oracle.iter().filter(|x| x.is_finite()).fold(0.0f64, |max, x| max.max(x.abs()));
    let half_ulp = half_ulp(dtype, max);
    let relative = |error: f64| if norm == 0.0 { error } else { error / norm };
    Bound {
        frobenius: relative(own.frobenius),
        frobenius_bound: relative(theirs.frobenius) + (-f64::from(precision(dtype).0)).exp2(),
        largest: own.largest,
        largest_bound: 2.0 * theirs.largest + half_ulp,
    }
}

struct Errors {
    frobenius: f64,
    largest: f64,
}

impl Errors {
    fn of(got: &[f32], oracle: &[f64]) -> Errors {
        let mut errors = Errors { frobenius: 0.0, largest: 0.0 };
        for (&got, &oracle) in got.iter().zip(oracle) {
            let error = match oracle.is_infinite() {
                true if f64::from(got) == oracle => 0.0,
                true => f64::NAN,
                false => (f64::from(got) - oracle).abs(),
            };
            errors.frobenius += error * error;
            // `max` would pass over NaN.
            errors.largest = if error <= errors.largest { errors.largest } else { error };
            if error.is_nan() {
                return Errors { frobenius: f64::NAN, largest: f64::NAN };
            }
        }
        errors.frobenius = errors.frobenius.sqrt();
        errors
    }
}

/// Bits of the significand, and exponent of the smallest normal number.
fn precision(dtype: DType) -> (i32, i32) {
    match dtype {
        DType::F16 => (11, -14),
        DType::BF16 => (8, -126),
        _ => (24, -126),
    }
}

fn half_ulp(dtype: DType, value: f64) -> f64 {
    let (bits, lowest) = precision(dtype);
    let exponent = if value == 0.0 { lowest } else { (value.log2().floor() as i32).max(lowest) };
    f64::from(exponent - bits).exp2()
}
