//! Inputs, an f64 oracle and the error bound, for all tests of this crate.
#![allow(dead_code, reason = "each test uses a part")]

#[path = "../../../tests/cases/bound.rs"]
mod bound;
pub mod golden;

use candle_core::{DType, Device, Result, Tensor};
use rand::{RngExt, SeedableRng, rngs::StdRng};

/// Normal numbers; every seed its own.
pub struct Random(StdRng);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(StdRng::seed_from_u64(seed))
    }

    pub fn numbers(&mut self, len: usize) -> Vec<f32> {
        // Box-Muller: two uniform numbers make a normal one.
        let mut normal = || {
            let (u, angle) = (1.0 - self.0.random::<f32>(), self.0.random::<f32>() * std::f32::consts::TAU);
            (-2.0 * u.ln()).sqrt() * angle.cos()
        };
        (0..len).map(|_| normal()).collect()
    }

    pub fn tensor(&mut self, shape: &[usize]) -> Tensor {
        Tensor::from_vec(self.numbers(shape.iter().product()), shape, &Device::Cpu).expect("as many numbers")
    }

    /// The same with a mean that keeps sums away from zero.
    pub fn values(&mut self, shape: &[usize]) -> Tensor {
        (self.tensor(shape) + 0.5).expect("a float tensor")
    }

    /// Ones with this probability, else zeros.
    pub fn mask(&mut self, shape: &[usize], probability: f64) -> Tensor {
        let bits = (0..shape.iter().product()).map(|_| u8::from(self.0.random_bool(probability))).collect::<Vec<_>>();
        Tensor::from_vec(bits, shape, &Device::Cpu).expect("as many bits")
    }
}

/// All elements, in f64.
pub fn elements(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor.flatten_all().and_then(|t| t.to_dtype(DType::F64)?.to_vec1());
    flat.expect("elements of a float tensor")
}

pub fn floats(tensor: &Tensor) -> Vec<f32> {
    elements(tensor).into_iter().map(|x| x as f32).collect()
}

/// The bits of a float tensor, as they are stored.
pub fn bits(tensor: &Tensor) -> Vec<u64> {
    elements(tensor).into_iter().map(f64::to_bits).collect()
}

/// `softmax(softcap(q kᵀ · scale) + bias) v` in f64: q, k, v `[batch, seq, heads, width]`, the bias a function of batch entry,
/// head, query and key, -inf where the query must not attend.
pub fn oracle(
    [q, k, v]: [&Tensor; 3],
    scale: f32,
    softcap: Option<f32>,
    bias: impl Fn(usize, usize, usize, usize) -> f64,
) -> Vec<f64> {
    let (batch, seq_q, heads, head_dim) = q.dims4().expect("four dimensions");
    let (_, seq_kv, kv_heads, _) = k.dims4().expect("four dimensions");
    let value_dim = v.dims()[3];
    let [q, k, v] = [q, k, v].map(elements);
    let mut out = vec![0.0; batch * seq_q * heads * value_dim];
    for (b, i, h) in (0..batch).flat_map(|b| (0..seq_q).flat_map(move |i| (0..heads).map(move |h| (b, i, h)))) {
        let query = &q[((b * seq_q + i) * heads + h) * head_dim..][..head_dim];
        let row = |j: usize| (b * seq_kv + j) * kv_heads + h / (heads / kv_heads);
        let logits: Vec<f64> = (0..seq_kv)
            .map(|j| {
                let product: f64 = query.iter().zip(&k[row(j) * head_dim..][..head_dim]).map(|(q, k)| q * k).sum();
                let s = product * f64::from(scale);
                softcap.map_or(s, |cap| f64::from(cap) * (s / f64::from(cap)).tanh()) + bias(b, h, i, j)
            })
            .collect();
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if max == f64::NEG_INFINITY {
            continue;
        }
        let denominator: f64 = logits.iter().map(|s| (s - max).exp()).sum();
        let out = &mut out[((b * seq_q + i) * heads + h) * value_dim..][..value_dim];
        for (j, s) in logits.iter().enumerate() {
            let p = (s - max).exp() / denominator;
            out.iter_mut().zip(&v[row(j) * value_dim..][..value_dim]).for_each(|(out, v)| *out += p * v);
        }
    }
    out
}

/// The error bound: beside a naive computation in the type of `got`, both against the oracle.
pub fn assert_close(what: &str, got: &Tensor, naive: &Tensor, oracle: &[f64]) {
    assert_eq!(got.dims(), naive.dims(), "{what}");
    let dtype = match got.dtype() {
        DType::F16 => fused_attention::DType::F16,
        DType::BF16 => fused_attention::DType::BF16,
        _ => fused_attention::DType::F32,
    };
    let bound = bound::bound(dtype, &floats(got), &floats(naive), oracle);
    assert!(bound.holds(), "{what}: {bound:?}");
}

/// Largest difference, relative to the largest element expected.
pub fn difference(got: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(got.dims(), expected.dims());
    let (got, expected) = (elements(got), elements(expected));
    let scale = expected.iter().fold(0.0, |max: f64, x| max.max(x.abs()));
    let largest =
        got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, |max, x| if x <= max { max } else { x });
    if scale == 0.0 { largest } else { largest / scale }
}

/// The message of an error that must come.
pub fn fault<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("there must be an error"),
        Err(error) => error.to_string(),
    }
}
