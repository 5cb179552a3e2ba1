//! Every cross-attention layer of a UNet in order, with two IP-Adapters on random weights, fused and unfused.
//!
//! Stable Diffusion 1.5 (16 layers) or SDXL (70) at 512 × 512, batch 2 for classifier-free guidance, F32 on the CPU: 77 tokens
//! of text, an adapter of 16 tokens and one of 4 with a mask. What is timed is what a processor does: the adapters' projections,
//! then attention. Unfused means candle's own operations, one softmax after the other, as diffusers has it.
//! Run: `cargo run --release -p fused-attention-candle --example ip_adapter_unet -- sd15`, or `sdxl`.

use candle_core::{DType, Device, Error, Result, Tensor};
use fused_attention_candle::MaskRule;
use fused_attention_candle::processors::*;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

const BATCH: usize = 2;
/// Side of the latent of a picture of 512 × 512.
const LATENT: usize = 64;
const TEXT: usize = 77;
const RUNS: usize = 3;
/// Largest difference of the two ways, relative to the largest element: sums of f32 in two orders.
const BOUND: f32 = 1e-5;
const MIB: f64 = 1024.0 * 1024.0;

fn main() -> Result<()> {
    let model = std::env::args().nth(1).unwrap_or_else(|| "sd15".into());
    let config = match model.as_str() {
        "sd15" => UnetConfig::sd15(),
        "sdxl" => UnetConfig::sdxl(),
        other => return Err(Error::msg(format!("{other} is no model of this example; give sd15 or sdxl"))),
    };
    let mut processors = AttnProcessors::new(config.layers());
    processors.add_adapter("face", &weights(&processors)?)?;
    processors.add_adapter("style", &weights(&processors)?)?;
    processors.set_scale("face", 0.8)?;
    processors.set_scale("style", 0.5)?;
    let tokens = |count: usize| random(&[BATCH, 1, count, config.cross_attention_dim]);
    let disc = |y: i32, x: i32| u8::from((y - 256).pow(2) + (x - 256).pow(2) < 150 * 150);
    let disc = Tensor::from_iter((0..512).flat_map(|y| (0..512).map(move |x| disc(y, x))), &Device::Cpu)?;
    let style = ImagePrompt::new(tokens(4)?)?.masks(disc.reshape((1, 1, 512, 512))?, MaskRule::Diffusers)?;
    let prompts = ImagePrompts::new().with("face", ImagePrompt::new(tokens(16)?)?).with("style", style);

    let head = |name: &str| format!("{:>24}", format!("{name}: time, memory"));
    println!("{:54}{:>8}{:>9}{}{}", "layer", "queries", "heads", head("fused"), head("unfused"));
    let mut total = [Cost::default(); 2];
    let names: Vec<AttnLayer> = processors.cross_layers().into_iter().cloned().collect();
    for layer in &names {
        let queries = (LATENT >> halvings(&layer.name, config.channels.len())).pow(2);
        let costs = run(&mut processors, layer, queries, &prompts)?;
        let [fused, unfused] = costs;
        let heads = format!("{} × {}", layer.heads, layer.hidden / layer.heads);
        println!("{:54}{queries:>8}{heads:>9}{fused:>24}{unfused:>24}", layer.name.trim_end_matches(".processor"));
        for (total, cost) in total.iter_mut().zip(costs) {
            *total = Cost { ms: total.ms + cost.ms, peak: total.peak.max(cost.peak) };
        }
    }
    println!("{:71}{:>24}{:>24}", format!("{} layers: sum of times, largest memory", names.len()), total[0], total[1]);
    println!(
        "unfused takes {:.2} × the time and {:.1} × the memory",
        total[1].ms / total[0].ms,
        total[1].peak / total[0].peak
    );
    Ok(())
}

/// Median time, and what was allocated at most beyond what there was before, the result included.
#[derive(Clone, Copy, Default)]
struct Cost {
    ms: f64,
    peak: f64,
}

impl std::fmt::Display for Cost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&format!("{:.2} ms {:>6.1} MiB", self.ms, self.peak / MIB))
    }
}

/// One layer with both backends in turn; their results must agree.
fn run(
    processors: &mut AttnProcessors,
    layer: &AttnLayer,
    queries: usize,
    prompts: &ImagePrompts,
) -> Result<[Cost; 2]> {
    let [q, k, v] = [queries, TEXT, TEXT].map(|tokens| random(&[BATCH, tokens, layer.hidden]));
    let (q, k, v) = (q?, k?, v?);
    let mut times = [Vec::new(), Vec::new()];
    let mut peaks = [0.0f64; 2];
    // The first turn resizes the mask and fills caches, and is not counted.
    for turn in 0..=RUNS {
        let mut outs = Vec::new();
        for (way, backend) in [Backend::Fused, Backend::Eager].into_iter().enumerate() {
            processors.set_backend(backend);
            let before = Counting::reset_peak();
            let start = Instant::now();
            outs.push(processors.attend(&layer.name, &AttnCall { q: &q, k: &k, v: &v, mask: None, prompts })?);
            if turn > 0 {
                times[way].push(start.elapsed().as_secs_f64() * 1e3);
                peaks[way] = peaks[way].max((PEAK.load(Relaxed) - before) as f64);
            }
        }
        let largest = |x: Tensor| x.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
        let difference = largest((&outs[0] - &outs[1])?)? / largest(outs[1].clone())?;
        assert!(difference <= BOUND, "{}: {difference}", layer.name);
    }
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[RUNS / 2]
    };
    let [fused, unfused] = times.map(median);
    Ok([Cost { ms: fused, peak: peaks[0] }, Cost { ms: unfused, peak: peaks[1] }])
}

/// How often the latent has been halved where a layer stands, in a UNet of this many blocks.
fn halvings(name: &str, blocks: usize) -> usize {
    let number = |prefix: &str| name.strip_prefix(prefix)?.split('.').next()?.parse::<usize>().ok();
    match (number("down_blocks."), number("up_blocks.")) {
        (Some(block), _) => block,
        (_, Some(block)) => blocks - 1 - block,
        _ => blocks - 1,
    }
}

/// Random projections for every layer; they keep the size of what they project.
fn weights(processors: &AttnProcessors) -> Result<AdapterWeights> {
    let layers = processors.cross_layers().into_iter().map(|layer| {
        let cross = layer.cross_attention_dim.unwrap_or(layer.hidden);
        let to = || random(&[layer.hidden, cross])? * (1.0 / (cross as f64).sqrt());
        Ok((layer.name.clone(), KvProjection { to_k_ip: to()?, to_v_ip: to()? }))
    });
    Ok(AdapterWeights::new(layers.collect::<Result<Vec<_>>>()?))
}

fn random(shape: &[usize]) -> Result<Tensor> {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu)?.to_dtype(DType::F32)
}

/// The system's allocator, and how much it has given at most.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;
static CURRENT: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

impl Counting {
    /// What is allocated now.
    fn reset_peak() -> usize {
        let current = CURRENT.load(Relaxed);
        PEAK.store(current, Relaxed);
        current
    }
}

// SAFETY: every call is passed on to the system's allocator as it came; counting touches no memory of the caller's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let current = CURRENT.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(current, Relaxed);
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        CURRENT.fetch_sub(layout.size(), Relaxed);
        // SAFETY: passed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let current = CURRENT.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(current, Relaxed);
        // SAFETY: passed on.
        unsafe { System.alloc_zeroed(layout) }
    }
}
