//! One cross-attention layer of SDXL with two IP-Adapters: text and both images in one call, against separate passes.
//!
//! The layer is that of a 1024 × 1024 image: 4096 queries, 10 heads of 64, f16, batch 2 for classifier-free guidance.
//! The second adapter is limited to a disc with a soft edge. One call is timed against what diffusers does: one
//! attention per prompt, then `out + scale * (image * mask)`, each operation rounded to f16 and written to memory. Both
//! are measured against the f64 oracle on a sample of queries. Run: `cargo run --release --example ip_adapter`.

use fused_attention::{Attention, Branch, Engine, Error, Float, Outputs, Problem, Tensor, TensorMut, TensorRef};
use half::f16;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use rayon::prelude::*;
use std::time::Instant;

const BATCH: usize = 2;
const LATENT: usize = 64;
const SEQ_Q: usize = LATENT * LATENT;
const HEADS: usize = 10;
const HEAD_DIM: usize = 64;
/// Keys of the text and of each image.
const SEQ_KV: [usize; 3] = [77, 16, 16];
const GATES: [f32; 3] = [1.0, 0.8, 0.5];
/// Elements of one query over all heads, and of all queries.
const ROW: usize = HEADS * HEAD_DIM;
const ELEMENTS: usize = BATCH * SEQ_Q * ROW;
/// Every how many queries one is checked; odd, so that each lies in another column of the image.
const SAMPLE_STEP: usize = 97;
const SAMPLES: usize = SEQ_Q.div_ceil(SAMPLE_STEP);
const RUNS: usize = 9;

fn main() -> Result<(), Error> {
    let layer = Layer::random(&mut StdRng::seed_from_u64(1));
    let whole = layer.attention(1, SEQ_Q);

    let (mut fused, mut separate) = (vec![f16::NAN; ELEMENTS], vec![f16::NAN; ELEMENTS]);
    // The same engine for both. Of a GPU the times include the copies there and back, and the separate passes make their
    // elementwise operations on the processor, with more copies: benches/ has times of launches alone.
    let out = tensor(&mut fused).desc();
    let engine = Engine::auto_for(&Problem::forward(&whole, &Outputs::new(out))?)?.engine;
    let (mut fused_ms, mut separate_ms, mut scratch) = (Vec::new(), Vec::new(), 0);
    for _ in 0..RUNS {
        let start = Instant::now();
        scratch = whole.forward(engine, tensor(&mut fused))?.workspace_bytes();
        fused_ms.push(start.elapsed().as_secs_f64() * 1e3);
        let start = Instant::now();
        layer.separate_passes(engine, &whole, &mut separate)?;
        separate_ms.push(start.elapsed().as_secs_f64() * 1e3);
    }

    // Queries do not depend on one another: the oracle may see every 97th alone, through strides.
    let oracle = layer.attention(SAMPLE_STEP, SAMPLES).forward_f64()?.out.values;
    let [fused_error, separate_error, naive_error] =
        [sample(&fused), sample(&separate), layer.naive()].map(|got| Errors::of(&got, &oracle));

    println!(
        "{} engine\n{:16}{:>11}{:>16}{:>16}{:>17}",
        engine.name(),
        "path",
        "median",
        "intermediates",
        "largest error",
        "relative error"
    );
    let row = |path: &str, mut runs: Vec<f64>, bytes: usize, error: &Errors| {
        runs.sort_by(f64::total_cmp);
        let (ms, mib) = (runs[RUNS / 2], bytes as f64 / f64::from(1 << 20));
        println!("{path:16}{ms:>8.1} ms{mib:>12.1} MiB{:>16.2e}{:>17.2e}", error.largest, error.relative);
    };
    row("fused", fused_ms, scratch, &fused_error);
    // Three outputs of attention, one product with the mask, two with a scale and all sums but the last.
    row("separate passes", separate_ms, scratch + 7 * ELEMENTS * size_of::<f16>(), &separate_error);

    // The oracle is exact, so any error is the engine's own. A naive computation that stores logits and probabilities
    // in f16 sets the scale: the relative error may be the naive one's, the largest, which is one element's luck, twice
    // that. Half a unit in the last place on top is the one rounding that no f16 result escapes: 2^-11 of the value.
    let half_ulp = 0.5f64.powi(11);
    let largest = oracle.iter().map(|x| x.abs()).fold(0.0, f64::max);
    assert!(fused_error.relative <= naive_error.relative + half_ulp);
    assert!(fused_error.largest <= 2.0 * naive_error.largest + half_ulp * largest);
    println!("\nwithin the bound of a naive computation in f16 ({:.2e} relative)", naive_error.relative);
    Ok(())
}

/// The layer's inputs: queries, the keys and values of each branch, and where the second image applies.
struct Layer {
    q: Vec<f16>,
    keys: Vec<Vec<f16>>,
    values: Vec<Vec<f16>>,
    region: Vec<f32>,
}

impl Layer {
    /// Projections of normalised activations are about normal; these give logits of deviation 1.4, a softmax that has
    /// preferences but no single winner.
    fn random(random: &mut StdRng) -> Self {
        let mut normal = |elements: usize, deviation: f32| -> Vec<f16> {
            // Box-Muller: two uniform numbers make a normal one.
            let mut pair = || (1.0 - random.random::<f32>(), random.random::<f32>() * std::f32::consts::TAU);
            let number = |(u, angle): (f32, f32)| deviation * (-2.0 * u.ln()).sqrt() * angle.cos();
            (0..elements).map(|_| f16::from_f32(number(pair()))).collect()
        };
        let from_centre = |x: usize| x as f32 + 0.5 - LATENT as f32 / 2.0;
        let radius = |i: usize| from_centre(i / LATENT).hypot(from_centre(i % LATENT));
        Layer {
            q: normal(ELEMENTS, 1.2),
            keys: SEQ_KV.map(|seq_kv| normal(BATCH * seq_kv * ROW, 1.2)).into(),
            values: SEQ_KV.map(|seq_kv| normal(BATCH * seq_kv * ROW, 0.7)).into(),
            region: (0..SEQ_Q).map(|i| 1.0 / (1.0 + ((radius(i) - 20.0) / 2.0).exp())).collect(),
        }
    }

    /// The layer over `count` queries, `step` apart.
    fn attention(&self, step: usize, count: usize) -> Attention<TensorRef<'_>> {
        let strides = [SEQ_Q * ROW, step * ROW, HEAD_DIM, 1].map(|stride| stride as isize);
        let q = TensorRef::strided(&self.q, 0, [BATCH, count, HEADS, HEAD_DIM], strides);
        let region = TensorRef::strided(&self.region, 0, [1, count], [0, step as isize]);
        let [text, first, second] = [0, 1, 2].map(|n| {
            let shape = [BATCH, SEQ_KV[n], HEADS, HEAD_DIM];
            Branch::new(TensorRef::bshd(&self.keys[n], shape), TensorRef::bshd(&self.values[n], shape)).gate(GATES[n])
        });
        Attention::new(q).branch(text).branch(first).branch(second.region(region))
    }

    /// What diffusers' IPAdapterAttnProcessor2_0 computes, with its roundings.
    fn separate_passes(&self, engine: Engine, whole: &Attention<TensorRef<'_>>, out: &mut [f16]) -> Result<(), Error> {
        let pass = |n: usize, out: &mut [f16]| {
            let segment = whole.branches[n].segments[0].clone();
            Attention::new(whole.q).branch(segment.into()).forward(engine, tensor(out))
        };
        pass(0, out)?;
        let mut image = vec![f16::ZERO; out.len()];
        for n in [1, 2] {
            pass(n, &mut image)?;
            if whole.branches[n].region.is_some() {
                let mask: Vec<f32> = self.region.iter().map(|&x| f16::from_f32(x).to_f32()).collect();
                each_query(&mut image, |query, x| x.iter_mut().for_each(|x| *x *= mask[query % SEQ_Q]));
            }
            each_query(&mut image, |_, x| x.iter_mut().for_each(|x| *x *= GATES[n]));
            each_query(out, |query, sum| {
                let mut wide = [0.0; ROW];
                f16::widen(&image[query * ROW..][..ROW], &mut wide);
                sum.iter_mut().zip(wide).for_each(|(sum, x)| *sum += x);
            });
        }
        Ok(())
    }

    /// The sampled queries with logits and probabilities stored in f16, products accumulated in f32.
    fn naive(&self) -> Vec<f16> {
        let stored = |x: f32| f16::from_f32(x).to_f32();
        let mut out = Vec::new();
        for (b, i) in (0..BATCH).flat_map(|b| (0..SEQ_Q).step_by(SAMPLE_STEP).map(move |i| (b, i))) {
            for h in 0..HEADS {
                let at = |rows: &[f16], row: usize, d: usize| rows[row * ROW + h * HEAD_DIM + d].to_f32();
                let mut sum = [0.0; HEAD_DIM];
                for n in 0..SEQ_KV.len() {
                    let keys = b * SEQ_KV[n]..(b + 1) * SEQ_KV[n];
                    let product = |d, j| at(&self.q, b * SEQ_Q + i, d) * at(&self.keys[n], j, d);
                    let product = |j| (0..HEAD_DIM).map(|d| product(d, j)).sum::<f32>();
                    let logits = keys.clone().map(|j| stored(product(j) / (HEAD_DIM as f32).sqrt()));
                    let mut p: Vec<f32> = logits.map(f32::exp).collect();
                    let denominator: f32 = p.iter().sum();
                    p.iter_mut().for_each(|p| *p = stored(*p / denominator));
                    let weight = GATES[n] * if n == 2 { self.region[i] } else { 1.0 };
                    for (d, sum) in sum.iter_mut().enumerate() {
                        let terms = p.iter().zip(keys.clone()).map(|(p, j)| p * at(&self.values[n], j, d));
                        *sum += weight * terms.sum::<f32>();
                    }
                }
                out.extend(sum.map(f16::from_f32));
            }
        }
        out
    }
}

/// `out` of the whole layer.
fn tensor(out: &mut [f16]) -> TensorMut<'_> {
    TensorMut::bshd(out, [BATCH, SEQ_Q, HEADS, HEAD_DIM])
}

/// An elementwise operation on f16 storage: f32 inside, one rounding per element.
fn each_query(out: &mut [f16], operation: impl Fn(usize, &mut [f32; ROW]) + Sync) {
    out.par_chunks_mut(ROW).enumerate().for_each(|(query, out)| {
        let mut wide = [0.0; ROW];
        f16::widen(out, &mut wide);
        operation(query, &mut wide);
        f16::narrow(&wide, out);
    });
}

/// The queries that are checked.
fn sample(out: &[f16]) -> Vec<f16> {
    out.chunks(SEQ_Q * ROW).flat_map(|entry| entry.chunks(ROW).step_by(SAMPLE_STEP)).flatten().copied().collect()
}

/// Distance from the oracle: the largest of one element, and the Frobenius norm relative to the oracle's.
struct Errors {
    largest: f64,
    relative: f64,
}

impl Errors {
    fn of(got: &[f16], oracle: &[f64]) -> Self {
        assert_eq!(got.len(), oracle.len());
        let differences = || got.iter().zip(oracle).map(|(got, want)| (got.to_f64() - want).abs());
        let squares: f64 = differences().map(|x| x * x).sum();
        // The relative error is NaN if any element is.
        let relative = (squares / oracle.iter().map(|x| x * x).sum::<f64>()).sqrt();
        Errors { largest: differences().fold(0.0, f64::max), relative }
    }
}
