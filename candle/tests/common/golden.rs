//! The golden files, and the numbers that `candle/tests/golden/make.py` makes from the same seeds.

use candle_core::{Device, Tensor};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

pub fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

pub fn file(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path(name), &Device::Cpu).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Uniform numbers from -scale to scale (splitmix64).
pub fn numbers(seed: u64, shape: &[usize], scale: f64) -> Tensor {
    let number = |index: u64| {
        let mut z = seed.wrapping_mul(0xD1342543DE82EF95).wrapping_add(index.wrapping_mul(0x9E3779B97F4A7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58476D1CE4E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D049BB133111EB);
        z ^= z >> 31;
        (((z >> 40) as f64 * 2f64.powi(-23) - 1.0) * scale) as f32
    };
    let elements = shape.iter().product::<usize>() as u64;
    Tensor::from_vec((1..=elements).map(number).collect::<Vec<_>>(), shape, &Device::Cpu).expect("as many numbers")
}

/// A linear layer `[rows, columns]`.
pub fn weight(seed: u64, rows: usize, columns: usize) -> Tensor {
    numbers(seed, &[rows, columns], (3.0 / columns as f64).sqrt().log2().ceil().exp2())
}

/// Weight and bias of a layer norm.
pub fn norm(seed: u64, width: usize) -> [Tensor; 2] {
    let weight = (numbers(seed, &[width], 0.25) + 1.0).expect("a float tensor");
    [weight, numbers(seed + 1, &[width], 0.25)]
}
