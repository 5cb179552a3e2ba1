//! Trains an IP-Adapter on one decoupled cross-attention layer, once with the fused operator and once with naive attention.
//!
//! As IP-Adapter does, queries, text and its projections are frozen; the image's `to_k` and `to_v` start from the text's and
//! learn, and so does the gate. What they are to learn is synthetic: an adapter of other weights made the targets, and the
//! loss is the mean square of the difference. Both paths take the same steps of Adam on the same batches. Then memory: one
//! step of the layer at 4096 queries, every allocation counted, and the largest batch that fits a budget.
//! Run: `cargo run --release --example train_adapter`.

use fused_attention::{Attention, Backward, Branch, Engine, Error, Gradient, Gradients, Outputs, TensorMut, TensorRef};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use rayon::prelude::*;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

const HEADS: usize = 8;
const HEAD_DIM: usize = 40;
/// Elements of one query or key over all heads.
const ROW: usize = HEADS * HEAD_DIM;
const TEXT: usize = 77;
const IMAGE: usize = 16;
/// Components of an image token.
const CROSS: usize = 64;
const STEPS: usize = 60;
const BUDGET: usize = 512 << 20;
const MIB: f64 = (1 << 20) as f64;

fn main() -> Result<(), Error> {
    let mut random = StdRng::seed_from_u64(7);
    let start = Adapter::random(&mut random);
    let teacher = start.changed(&mut random);
    let batches: Vec<Batch> =
        (0..3).map(|_| Batch::random(&mut random, 2, 1024, &teacher)).collect::<Result<_, Error>>()?;

    println!(
        "one layer of SD 1.5, batch 2, 1024 queries, {TEXT} + {IMAGE} keys, f32, {STEPS} steps on the processor\n"
    );
    println!("{:10}{:>12}{:>12}{:>14}", "attention", "first loss", "last loss", "median step");
    let mut last = Vec::new();
    for path in [Path::Fused, Path::Naive] {
        let (losses, mut times) = train(start.clone(), &batches, path)?;
        times.sort();
        let median = times[times.len() / 2].as_secs_f64() * 1e3;
        println!("{:10}{:>12.5}{:>12.5}{:>11.1} ms", path.name(), losses[0], losses[STEPS - 1], median);
        assert!(losses[STEPS - 1] <= losses[0] / 10.0, "{} did not learn: {losses:?}", path.name());
        last.push(losses[STEPS - 1]);
    }
    let difference = (last[0] - last[1]).abs() / last[1];
    assert!(difference <= 1e-3, "the paths end {difference} apart");

    println!("\none step at 4096 queries, beyond its inputs\n");
    println!("{:10}{:>14}{:>16}{:>26}", "attention", "batch 1", "batch 2", "largest batch in 512 MiB");
    let mut own = usize::MAX;
    for path in [Path::Fused, Path::Naive] {
        let peak = |entries: usize| -> Result<usize, Error> {
            let batch = Batch::random(&mut StdRng::seed_from_u64(8), entries, 4096, &teacher)?;
            let before = HELD.load(Relaxed);
            PEAK.store(before, Relaxed);
            start.step(&batch, path)?;
            Ok(PEAK.load(Relaxed) - before)
        };
        // The first run also allocates what threads keep.
        peak(1)?;
        let (one, two) = (peak(1)?, peak(2)?);
        let largest = 2 + (BUDGET - two) / (two - one);
        let at_largest = peak(largest)?;
        assert!(at_largest <= BUDGET + BUDGET / 50, "batch {largest} takes {at_largest} bytes");
        println!("{:10}{:>10.1} MiB{:>12.1} MiB{largest:>26}", path.name(), one as f64 / MIB, two as f64 / MIB);
        if let Path::Fused = path {
            // `out`, whose place `dout` takes, and `dq`.
            let of_queries = 2 * 4096 * ROW * size_of::<f32>();
            own = two - 2 * of_queries;
        }
    }
    // Of the naive path only what no such computation goes without: probabilities, their gradients, those of the logits.
    let arrays = 3 * 2 * HEADS * 4096 * (TEXT + IMAGE) * size_of::<f32>();
    println!(
        "\nbatch 2 without out and dq: fused {:.1} MiB, the arrays of queries by keys alone {:.1} MiB: {:.1} % less",
        own as f64 / MIB,
        arrays as f64 / MIB,
        100.0 * (1.0 - own as f64 / arrays as f64)
    );
    assert!(own <= arrays / 10);
    Ok(())
}

#[derive(Clone, Copy)]
enum Path {
    Fused,
    Naive,
}

impl Path {
    fn name(self) -> &'static str {
        match self {
            Path::Fused => "fused",
            Path::Naive => "naive",
        }
    }
}

/// Losses and times of all steps.
fn train(mut adapter: Adapter, batches: &[Batch], path: Path) -> Result<(Vec<f64>, Vec<Duration>), Error> {
    let mut adam = Adam::new(2 * CROSS * ROW + 1);
    let (mut losses, mut times) = (Vec::new(), Vec::new());
    for step in 0..STEPS {
        let start = Instant::now();
        let (loss, gradients) = adapter.step(&batches[step % batches.len()], path)?;
        times.push(start.elapsed());
        losses.push(loss);
        let weights = adapter.to_k.iter_mut().chain(&mut adapter.to_v).chain(std::slice::from_mut(&mut adapter.gate));
        adam.update(weights, &gradients);
    }
    Ok((losses, times))
}

/// Frozen inputs of the layer, and the result to be learned.
struct Batch {
    entries: usize,
    queries: usize,
    q: Vec<f32>,
    text_k: Vec<f32>,
    text_v: Vec<f32>,
    /// Image tokens, `[entries, IMAGE, CROSS]`.
    tokens: Vec<f32>,
    target: Vec<f32>,
}

impl Batch {
    fn random(random: &mut StdRng, entries: usize, queries: usize, teacher: &Adapter) -> Result<Self, Error> {
        let mut batch = Batch {
            entries,
            queries,
            q: normal(random, entries * queries * ROW, 1.2),
            text_k: normal(random, entries * TEXT * ROW, 1.0),
            text_v: normal(random, entries * TEXT * ROW, 1.0),
            tokens: normal(random, entries * IMAGE * CROSS, 1.0),
            target: vec![0.0; entries * queries * ROW],
        };
        let (k, v) = teacher.project(&batch);
        let mut target = std::mem::take(&mut batch.target);
        batch.attention(&k, &v, &teacher.gate).forward(Engine::Cpu, TensorMut::bshd(&mut target, batch.q_shape()))?;
        batch.target = target;
        Ok(batch)
    }

    fn q_shape(&self) -> [usize; 4] {
        [self.entries, self.queries, HEADS, HEAD_DIM]
    }

    fn attention<'a>(&'a self, k: &'a [f32], v: &'a [f32], gate: &'a f32) -> Attention<TensorRef<'a>> {
        let keys = |data, keys| TensorRef::bshd::<f32>(data, [self.entries, keys, HEADS, HEAD_DIM]);
        let image = Branch::new(keys(k, IMAGE), keys(v, IMAGE));
        Attention::new(TensorRef::bshd(&self.q, self.q_shape()))
            .branch(Branch::new(keys(&self.text_k, TEXT), keys(&self.text_v, TEXT)))
            .branch(image.gate_tensor(TensorRef::contiguous(std::slice::from_ref(gate), [])))
    }
}

/// What is trained: projections of image tokens to keys and values, `[CROSS, ROW]`, and the gate.
#[derive(Clone)]
struct Adapter {
    to_k: Vec<f32>,
    to_v: Vec<f32>,
    gate: f32,
}

/// What the optimizer needs of attention: gradients of the image's keys and values and of the gate.
struct OfAttention {
    dk: Vec<f32>,
    dv: Vec<f32>,
    dgate: f32,
}

impl Adapter {
    fn random(random: &mut StdRng) -> Self {
        let deviation = 1.0 / (CROSS as f32).sqrt();
        Adapter {
            to_k: normal(random, CROSS * ROW, deviation),
            to_v: normal(random, CROSS * ROW, deviation),
            gate: 0.5,
        }
    }

    /// The weights that training is to find from these.
    fn changed(&self, random: &mut StdRng) -> Self {
        let mut changed = self.clone();
        for weights in [&mut changed.to_k, &mut changed.to_v] {
            let change = normal(random, CROSS * ROW, 0.06);
            weights.iter_mut().zip(change).for_each(|(weight, change)| *weight += change);
        }
        changed.gate = 1.0;
        changed
    }

    fn project(&self, batch: &Batch) -> (Vec<f32>, Vec<f32>) {
        let project = |weights: &[f32]| {
            let mut rows = vec![0.0; batch.entries * IMAGE * ROW];
            for (row, token) in rows.chunks_mut(ROW).zip(batch.tokens.chunks(CROSS)) {
                for (&x, weights) in token.iter().zip(weights.chunks(ROW)) {
                    row.iter_mut().zip(weights).for_each(|(sum, weight)| *sum += x * weight);
                }
            }
            rows
        };
        (project(&self.to_k), project(&self.to_v))
    }

    /// The loss, and its gradients by to_k, to_v and the gate, in this order.
    fn step(&self, batch: &Batch, path: Path) -> Result<(f64, Vec<f32>), Error> {
        let (k, v) = self.project(batch);
        let (loss, of_attention) = match path {
            Path::Fused => fused_step(batch, &k, &v, &self.gate)?,
            Path::Naive => naive_step(batch, &k, &v, self.gate),
        };
        let mut gradients = vec![0.0; 2 * CROSS * ROW + 1];
        let (weights, dgate) = gradients.split_at_mut(2 * CROSS * ROW);
        for (weights, of_rows) in weights.chunks_mut(CROSS * ROW).zip([&of_attention.dk, &of_attention.dv]) {
            for (row, token) in of_rows.chunks(ROW).zip(batch.tokens.chunks(CROSS)) {
                for (&x, weights) in token.iter().zip(weights.chunks_mut(ROW)) {
                    weights.iter_mut().zip(row).for_each(|(sum, d)| *sum += x * d);
                }
            }
        }
        dgate[0] = of_attention.dgate;
        Ok((loss, gradients))
    }
}

/// The mean square of `out - target`; `out` becomes its gradient.
fn loss(out: &mut [f32], target: &[f32]) -> f64 {
    let n = out.len() as f32;
    let mut sum = 0.0f64;
    for (out, target) in out.iter_mut().zip(target) {
        let difference = *out - target;
        sum += f64::from(difference * difference);
        *out = 2.0 * difference / n;
    }
    sum / f64::from(n)
}

/// The operator, forward and backward: no gradient of the text is asked for, so none is computed.
fn fused_step(batch: &Batch, k: &[f32], v: &[f32], gate: &f32) -> Result<(f64, OfAttention), Error> {
    let attention = batch.attention(k, v, gate);
    let (shape, keys) = (batch.q_shape(), [batch.entries, IMAGE, HEADS, HEAD_DIM]);
    let mut out = vec![0.0f32; batch.q.len()];
    attention.forward(Engine::Cpu, Outputs::new(TensorMut::bshd(&mut out, shape)))?;
    let loss = loss(&mut out, &batch.target);

    let mut dq = vec![0.0f32; batch.q.len()];
    let (mut dk, mut dv, mut dgate) = (vec![0.0f32; k.len()], vec![0.0f32; v.len()], [0.0f32]);
    let gradients = Gradients::new()
        .want(Gradient::Q, TensorMut::bshd(&mut dq, shape))
        .want(Gradient::K(1), TensorMut::bshd(&mut dk, keys))
        .want(Gradient::V(1), TensorMut::bshd(&mut dv, keys))
        .want(Gradient::Gate(1), TensorMut::contiguous(&mut dgate, []));
    attention.backward(Engine::Cpu, Backward::new(TensorRef::bshd(&out, shape)), gradients)?;
    Ok((loss, OfAttention { dk, dv, dgate: dgate[0] }))
}

/// One head's rows, `[rows, HEAD_DIM]`, copied out of `[entries, rows, HEADS, HEAD_DIM]`.
fn head_of(rows: &[f32], per_entry: usize, entry: usize, head: usize) -> Vec<f32> {
    let rows = rows[entry * per_entry * ROW..].chunks(ROW).take(per_entry);
    rows.flat_map(|row| &row[head * HEAD_DIM..][..HEAD_DIM]).copied().collect()
}

/// `a [n, d]` times the transpose of `b [m, d]`.
fn times_transposed(a: &[f32], b: &[f32], d: usize) -> Vec<f32> {
    let m = b.len() / d;
    let transposed: Vec<f32> = (0..d).flat_map(|i| b.iter().skip(i).step_by(d)).copied().collect();
    let mut c = vec![0.0; a.len() / d * m];
    for (c, a) in c.chunks_mut(m).zip(a.chunks(d)) {
        for (&x, b) in a.iter().zip(transposed.chunks(m)) {
            c.iter_mut().zip(b).for_each(|(c, b)| *c += x * b);
        }
    }
    c
}

/// `c [n, d] += factor · a [n, m] b [m, d]`.
fn add_product(c: &mut [f32], factor: f32, a: &[f32], b: &[f32], m: usize) {
    let d = b.len() / m;
    for (c, a) in c.chunks_mut(d).zip(a.chunks(m)) {
        for (&x, b) in a.iter().zip(b.chunks(d)) {
            c.iter_mut().zip(b).for_each(|(c, b)| *c += factor * x * b);
        }
    }
}

/// `c [m, d] += factor · transpose of a [n, m] times b [n, d]`.
fn add_transposed_product(c: &mut [f32], factor: f32, a: &[f32], b: &[f32], m: usize) {
    let d = c.len() / m;
    for (a, b) in a.chunks(m).zip(b.chunks(d)) {
        for (&x, c) in a.iter().zip(c.chunks_mut(d)) {
            c.iter_mut().zip(b).for_each(|(c, b)| *c += factor * x * b);
        }
    }
}

/// One head of one batch entry: its inputs, the probabilities that the backward needs, and results.
struct Head {
    entry: usize,
    head: usize,
    q: Vec<f32>,
    k: [Vec<f32>; 2],
    v: [Vec<f32>; 2],
    p: [Vec<f32>; 2],
}

/// Attention as frameworks compute it without a fused kernel: the probabilities of all heads stay in memory from the forward
/// to the backward, where their gradients and those of the logits join them. All heads at once, over all cores.
fn naive_step(batch: &Batch, k: &[f32], v: &[f32], gate: f32) -> (f64, OfAttention) {
    let (gates, scale) = ([1.0, gate], 1.0 / (HEAD_DIM as f32).sqrt());
    let numbers: Vec<(usize, usize)> = (0..batch.entries).flat_map(|e| (0..HEADS).map(move |h| (e, h))).collect();
    let heads: Vec<Head> = (numbers.par_iter())
        .map(|&(entry, head)| {
            let rows =
                |text: &[f32], image: &[f32]| [head_of(text, TEXT, entry, head), head_of(image, IMAGE, entry, head)];
            let (q, k, v) =
                (head_of(&batch.q, batch.queries, entry, head), rows(&batch.text_k, k), rows(&batch.text_v, v));
            let p = [0, 1].map(|b| {
                let mut p = times_transposed(&q, &k[b], HEAD_DIM);
                p.chunks_mut(k[b].len() / HEAD_DIM).for_each(|row| {
                    let max = row.iter().fold(f32::NEG_INFINITY, |max, &s| max.max(s));
                    row.iter_mut().for_each(|s| *s = ((*s - max) * scale).exp());
                    let sum: f32 = row.iter().sum();
                    row.iter_mut().for_each(|p| *p /= sum);
                });
                p
            });
            Head { entry, head, q, k, v, p }
        })
        .collect();

    let mut out = vec![0.0; batch.q.len()];
    let parts: Vec<Vec<f32>> = (heads.par_iter())
        .map(|head| {
            let mut part = vec![0.0; batch.queries * HEAD_DIM];
            for ((gate, p), v) in gates.iter().zip(&head.p).zip(&head.v) {
                add_product(&mut part, *gate, p, v, v.len() / HEAD_DIM);
            }
            part
        })
        .collect();
    scatter(&mut out, &heads, &parts, batch.queries);
    drop(parts);
    let loss = loss(&mut out, &batch.target);

    let dp: Vec<(Vec<f32>, [Vec<f32>; 2])> = (heads.par_iter())
        .map(|head| {
            let dout = head_of(&out, batch.queries, head.entry, head.head);
            let dp = [0, 1].map(|b| times_transposed(&dout, &head.v[b], HEAD_DIM));
            (dout, dp)
        })
        .collect();
    let ds: Vec<([Vec<f32>; 2], f32)> = (heads.par_iter().zip(&dp))
        .map(|(head, (_, dp))| {
            let mut dgate = 0.0;
            let ds = [0, 1].map(|b| {
                let keys = head.k[b].len() / HEAD_DIM;
                let mut ds = vec![0.0; dp[b].len()];
                for ((ds, p), dp) in ds.chunks_mut(keys).zip(head.p[b].chunks(keys)).zip(dp[b].chunks(keys)) {
                    let g: f32 = p.iter().zip(dp).map(|(p, dp)| p * dp).sum();
                    ds.iter_mut().zip(p).zip(dp).for_each(|((ds, p), dp)| *ds = gates[b] * p * (dp - g));
                    if b == 1 {
                        dgate += g;
                    }
                }
                ds
            });
            (ds, dgate)
        })
        .collect();
    let results: Vec<[Vec<f32>; 3]> = (heads.par_iter().zip(&dp).zip(&ds))
        .map(|((head, (dout, _)), (ds, _))| {
            let mut dq = vec![0.0; head.q.len()];
            for (ds, k) in ds.iter().zip(&head.k) {
                add_product(&mut dq, scale, ds, k, k.len() / HEAD_DIM);
            }
            let (mut dk, mut dv) = (vec![0.0; IMAGE * HEAD_DIM], vec![0.0; IMAGE * HEAD_DIM]);
            add_transposed_product(&mut dk, scale, &ds[1], &head.q, IMAGE);
            add_transposed_product(&mut dv, gate, &head.p[1], dout, IMAGE);
            [dq, dk, dv]
        })
        .collect();
    let mut gathered = [vec![0.0; batch.q.len()], vec![0.0; k.len()], vec![0.0; v.len()]];
    for (n, (to, rows)) in gathered.iter_mut().zip([batch.queries, IMAGE, IMAGE]).enumerate() {
        let parts: Vec<&Vec<f32>> = results.iter().map(|parts| &parts[n]).collect();
        scatter(to, &heads, &parts, rows);
    }
    let [_dq, dk, dv] = gathered;
    (loss, OfAttention { dk, dv, dgate: ds.iter().map(|(_, dgate)| dgate).sum() })
}

/// Rows of each head back to `[entries, rows, HEADS, HEAD_DIM]`.
fn scatter(to: &mut [f32], heads: &[Head], parts: &[impl AsRef<[f32]>], rows: usize) {
    for (head, part) in heads.iter().zip(parts) {
        let to = to[head.entry * rows * ROW..].chunks_mut(ROW).take(rows);
        for (to, from) in to.zip(part.as_ref().chunks(HEAD_DIM)) {
            to[head.head * HEAD_DIM..][..HEAD_DIM].copy_from_slice(from);
        }
    }
}

/// Adam (arXiv:1412.6980, algorithm 1) with its usual decay rates.
struct Adam {
    first: Vec<f32>,
    second: Vec<f32>,
    steps: i32,
}

impl Adam {
    const RATE: f32 = 0.01;

    fn new(weights: usize) -> Self {
        Adam { first: vec![0.0; weights], second: vec![0.0; weights], steps: 0 }
    }

    fn update<'w>(&mut self, weights: impl Iterator<Item = &'w mut f32>, gradients: &[f32]) {
        self.steps += 1;
        let unbias = |decay: f32| 1.0 / (1.0 - decay.powi(self.steps));
        let (by_first, by_second) = (unbias(0.9), unbias(0.999));
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((weight, &gradient), (first, second)) in weights.zip(gradients).zip(moments) {
            *first += 0.1 * (gradient - *first);
            *second += 0.001 * (gradient * gradient - *second);
            *weight -= Self::RATE * *first * by_first / ((*second * by_second).sqrt() + 1e-8);
        }
    }
}

/// Box-Muller: two uniform numbers make a normal one.
fn normal(random: &mut StdRng, elements: usize, deviation: f32) -> Vec<f32> {
    let mut pair = || (1.0 - random.random::<f32>(), random.random::<f32>() * std::f32::consts::TAU);
    let number = |(u, angle): (f32, f32)| deviation * (-2.0 * u.ln()).sqrt() * angle.cos();
    (0..elements).map(|_| number(pair())).collect()
}

/// Counts what the program holds, and the most that it held.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system allocator unchanged; the counters touch no memory of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(HELD.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;
