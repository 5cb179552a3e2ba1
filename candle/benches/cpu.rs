//! The cpu engine beside candle's own ways to compute attention, with one candle and one set of tensors: `cargo bench -p
//! fused-attention-candle`.
//!
//! All take `[batch, seq, heads, head_dim]`, the order that projections leave. `eager` is what models write: two products of
//! matrices and `softmax_last_dim` between; the factor of the logits is put into q, where it costs least. `flash` is candle_nn's
//! attention for CPUs. Branches are one attention each, multiplied by their scale and added. A peer whose result
//! is not ours is not timed, and one must be. `RAYON_NUM_THREADS` is the number of threads of all;
//! benches/candle_record.py makes a table of the times.

use candle_core::utils::get_num_threads;
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::attention::{AttnMask, flash_attn as candle_flash};
use candle_nn::ops::softmax_last_dim;
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use fused_attention_candle::{Branch, decoupled_cross_attention, flash_attn};
use half::{bf16, f16};
use std::hint::black_box;
use std::time::Duration;

/// Name, `[batch, seq_q, heads, head_dim]`, heads of keys, keys of each branch.
const SHAPES: [(&str, [usize; 4], usize, &[usize]); 5] = [
    ("sd15_self_32x32", [1, 1024, 8, 80], 8, &[1024]),
    ("sdxl_self_32x32", [1, 1024, 20, 64], 20, &[1024]),
    ("sdxl_text_64x64", [1, 4096, 10, 64], 10, &[77]),
    ("sdxl_ip_adapter_64x64", [1, 4096, 10, 64], 10, &[77, 4]),
    ("decode_4096", [1, 1, 32, 128], 8, &[4096]),
];

/// Of the branches after the first.
const GATE: f32 = 0.6;

type Attend = fn(&Tensor, &Tensor, &Tensor, f32) -> Result<Tensor>;

struct Inputs {
    q: Tensor,
    branches: Vec<[Tensor; 2]>,
}

impl Inputs {
    fn new(dtype: DType, q: [usize; 4], kv_heads: usize, keys: &[usize]) -> Result<Self> {
        let random = |shape: [usize; 4]| Tensor::randn(0f32, 1.0, &shape, &Device::Cpu)?.to_dtype(dtype);
        let rows = |keys: usize| random([q[0], keys, kv_heads, q[3]]);
        let branches = keys.iter().map(|&keys| Ok([rows(keys)?, rows(keys)?])).collect::<Result<_>>()?;
        Ok(Inputs { q: random(q)?, branches })
    }

    fn scale(&self) -> Result<f32> {
        Ok(1.0 / (self.q.dims4()?.3 as f32).sqrt())
    }

    fn ours(&self) -> Result<Tensor> {
        if let [[k, v]] = self.branches.as_slice() {
            return flash_attn(&self.q, k, v, self.scale()?, false);
        }
        let gate = |n: usize| if n == 0 { 1.0 } else { GATE };
        let branch = |(n, [k, v]): (usize, &[Tensor; 2])| Branch::new(k.clone(), v.clone()).gate(gate(n));
        let branches: Vec<_> = self.branches.iter().enumerate().map(branch).collect();
        decoupled_cross_attention(&self.q, &branches)
    }

    /// The sum over the branches of what `attend` makes of each.
    fn theirs(&self, attend: Attend) -> Result<Tensor> {
        let mut sum = None;
        for [k, v] in &self.branches {
            let out = attend(&self.q, k, v, self.scale()?)?;
            sum = Some(match sum {
                None => out,
                Some(sum) => (sum + (out * f64::from(GATE))?)?,
            });
        }
        Ok(sum.expect("a first branch"))
    }
}

fn eager(q: &Tensor, k: &Tensor, v: &Tensor, scale: f32) -> Result<Tensor> {
    let [k, v] = [by_query_head(k, q)?, by_query_head(v, q)?];
    let q = (q.transpose(1, 2)?.contiguous()? * f64::from(scale))?;
    softmax_last_dim(&q.matmul(&k.t()?)?.to_dtype(DType::F32)?)?
        .to_dtype(q.dtype())?
        .matmul(&v)?
        .transpose(1, 2)?
        .contiguous()
}

/// `[batch, heads, seq_kv, _]`; candle's products have no groups of heads.
fn by_query_head(x: &Tensor, q: &Tensor) -> Result<Tensor> {
    let (batch, seq_kv, kv_heads, width) = x.dims4()?;
    let group = q.dims4()?.2 / kv_heads;
    let x = x.transpose(1, 2)?.unsqueeze(2)?.broadcast_as((batch, kv_heads, group, seq_kv, width))?;
    x.reshape((batch, kv_heads * group, seq_kv, width))
}

fn flash(q: &Tensor, k: &Tensor, v: &Tensor, scale: f32) -> Result<Tensor> {
    let out = match q.dtype() {
        DType::F16 => candle_flash::<f16>(q, k, v, scale, AttnMask::None, None, None),
        DType::BF16 => candle_flash::<bf16>(q, k, v, scale, AttnMask::None, None, None),
        _ => candle_flash::<f32>(q, k, v, scale, AttnMask::None, None, None),
    };
    out?.transpose(1, 2)
}

/// `|a - b| / |a|` in Frobenius norms.
fn difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    let norm = |x: Tensor| x.sqr()?.sum_all()?.to_scalar::<f64>().map(f64::sqrt);
    let a = a.to_dtype(DType::F64)?;
    Ok(norm((&a - b.to_dtype(DType::F64)?)?)? / norm(a)?)
}

/// The peers that take these inputs and agree; the others are named.
fn agreeing(inputs: &Inputs, case: &str, bound: f64) -> Vec<(&'static str, Attend)> {
    let ours = inputs.ours().expect("ours takes every shape");
    let mut peers: Vec<(&str, Attend)> = vec![("eager", eager), ("flash", flash)];
    peers.retain(|&(peer, attend)| match inputs.theirs(attend) {
        Ok(theirs) => {
            let off = difference(&ours, &theirs).expect("results of one shape");
            if off > bound {
                println!("LEFT OUT: {peer} of {case}: its result differs by {off:.1e} of the norm");
            }
            off <= bound
        }
        Err(error) => {
            println!("LEFT OUT: {peer} of {case}: {}", error.to_string().lines().next().unwrap_or_default());
            false
        }
    });
    assert!(!peers.is_empty(), "{case}: no peer agrees");
    peers
}

fn cpu(criterion: &mut Criterion) {
    for (name, q, kv_heads, keys) in SHAPES {
        // What results may differ by: `eager` rounds all that it stores to the type, and in f16 what it sums too; sums of f32
        // have their orders.
        for (dtype, word, bound) in [(DType::F32, "f32", 1e-5), (DType::F16, "f16", 3e-2), (DType::BF16, "bf16", 3e-2)]
        {
            let inputs = Inputs::new(dtype, q, kv_heads, keys).expect("tensors");
            let peers = agreeing(&inputs, &format!("{name} {word}"), bound);
            let mut group = criterion.benchmark_group(format!("{name} {word} {}", get_num_threads()));
            group.sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(800));
            group.bench_function(BenchmarkId::from_parameter("ours"), |bencher| {
                bencher.iter(|| black_box(&inputs).ours().expect("a legal request"));
            });
            for (peer, attend) in peers {
                group.bench_function(BenchmarkId::from_parameter(peer), |bencher| {
                    bencher.iter(|| black_box(&inputs).theirs(attend).expect("as before"));
                });
            }
            group.finish();
        }
    }
}

criterion_group!(benches, cpu);
criterion_main!(benches);
