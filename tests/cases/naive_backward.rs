//! The gradients as anybody would write them in the storage type: logits, probabilities and the gradients of both stored
//! in it, products accumulated in f32.

use super::naive::{gate_at, logits, region_at, round_to, rows};
use super::{Case, Data, HostTensor, Layout};
use fused_attention::{DType, Gradient, Saved};
use std::collections::HashMap;

/// A dense gradient in f32, before the rounding to the type of its tensor.
struct Sum {
    shape: Vec<usize>,
    values: Vec<f32>,
}

impl Sum {
    /// Adds `factor · values` to the row at `index`; an index along an extent of 1 is taken as 0.
    fn add(&mut self, index: &[usize], factor: f32, values: &[f32]) {
        let n = self.shape.iter().zip(index).fold(0, |n, (&extent, &i)| n * extent + i.min(extent - 1));
        let row = &mut self.values[n * values.len()..][..values.len()];
        row.iter_mut().zip(values).for_each(|(sum, value)| *sum += factor * value);
    }
}

/// Naive results of every gradient, of which the worst is the yardstick.
///
/// In the 16-bit types one is enough: its error is that of storing logits and probabilities. In f32 it is a few roundings,
/// and by luck next to none where a gradient is a single number; so there are four, with the components of all vectors in
/// another order.
pub fn naive_draws(data: &Data, saved: Option<&Saved<HostTensor>>) -> HashMap<Gradient, Vec<Vec<f32>>> {
    let draws = if data.case.dtype == DType::F32 { 4 } else { 1 };
    let mut all: HashMap<Gradient, Vec<Vec<f32>>> = HashMap::new();
    for draw in 0..draws {
        let by = |width: usize| width * draw / draws;
        let turn = |tensor: &mut HostTensor| {
            let mut values = tensor.values();
            let width = tensor.shape[3];
            values.chunks_mut(width).for_each(|row| row.rotate_left(by(width)));
            *tensor = HostTensor::new(tensor.dtype(), &tensor.shape, &values, Layout::Bshd);
        };
        let mut turned = data.clone();
        let segments = turned.branches.iter_mut().flat_map(|branch| &mut branch.segments);
        let keys = segments.flat_map(|segment| [&mut segment.k, &mut segment.v]);
        keys.chain([&mut turned.q, &mut turned.dout]).for_each(turn);
        let mut saved = saved.cloned();
        saved.iter_mut().for_each(|saved| turn(&mut saved.out));
        for (gradient, mut values) in naive_backward(&turned, saved.as_ref()) {
            let width = match gradient {
                Gradient::Q | Gradient::K(_) => data.case.head_dim,
                Gradient::V(_) => data.case.value_dim,
                Gradient::Bias(_) | Gradient::Gate(_) | Gradient::Region(_) => 1,
            };
            values.chunks_mut(width).for_each(|row| row.rotate_right(by(width)));
            all.entry(gradient).or_default().push(values);
        }
    }
    all
}

/// Every gradient that the case has, dense and unrounded. With one branch, what the forward saved gives `P` and `Δ`.
fn naive_backward(data: &Data, saved: Option<&Saved<HostTensor>>) -> HashMap<Gradient, Vec<f32>> {
    let Case { batch, seq_q, heads, dtype, .. } = data.case;
    let mut sums: HashMap<Gradient, Sum> = HashMap::new();
    for (gradient, shape) in data.gradients() {
        let values = vec![0.0; shape.iter().product()];
        sums.insert(gradient, Sum { shape, values });
    }
    let scale = data.case.softmax_scale.unwrap_or((1.0 / (data.case.head_dim as f64).sqrt()) as f32);
    let (q, dout) = (data.q.values(), data.dout.values());
    let keys: Vec<Vec<[Vec<f32>; 2]>> = (data.branches.iter())
        .map(|branch| branch.segments.iter().map(|segment| [segment.k.values(), segment.v.values()]).collect())
        .collect();

    let saved = saved.filter(|_| data.branches.len() == 1);
    let saved_out = saved.map_or(Vec::new(), |saved| saved.out.values());

    for (b, i, h) in (0..batch * seq_q * heads).map(|n| (n / heads / seq_q, n / heads % seq_q, n % heads)) {
        let query = rows(&data.q, &q)([b, i, h]);
        let dout = rows(&data.dout, &dout)([b, i, h]);
        let mut first = 0;
        for (n, branch) in data.branches.iter().enumerate() {
            let (p, slopes) =
                probabilities(data, &q, &keys[n], n, [b, h, i], saved.map(|saved| saved.lse.at([n, b, h, i])));
            let segment_of = |s: usize| {
                let head = h / (heads / data.case.branches[n].segments[s].kv_heads);
                (rows(&branch.segments[s].k, &keys[n][s][0]), rows(&branch.segments[s].v, &keys[n][s][1]), head)
            };
            let dp: Vec<Vec<f32>> = (p.iter().enumerate())
                .map(|(s, p)| {
                    let (_, v, head) = segment_of(s);
                    let product = |j| dout.iter().zip(v([b, j, head])).map(|(dout, v)| dout * v).sum();
                    let attended = |(j, &p): (usize, &f32)| if p == 0.0 { 0.0 } else { round_to(dtype, product(j)) };
                    p.iter().enumerate().map(attended).collect()
                })
                .collect();
            let dout_o: f32 = p.iter().flatten().zip(dp.iter().flatten()).map(|(p, dp)| p * dp).sum();

            let gate = gate_at(data, n, [b, h]);
            let region = branch.region.as_ref().map_or(1.0, |region| region_at(region, [b, h, i]));
            let place = if branch.gate.as_ref().is_some_and(|gate| gate.shape.len() == 2) { [b, h] } else { [b, 0] };
            let add = |sums: &mut HashMap<Gradient, Sum>, gradient, index: &[usize], factor, values: &[f32]| {
                if let Some(sum) = sums.get_mut(&gradient) {
                    sum.add(index, factor, values);
                }
            };
            add(&mut sums, Gradient::Gate(n), &place, region, &[dout_o]);
            let place: &[usize] =
                if branch.region.as_ref().is_some_and(|r| r.shape.len() == 3) { &[b, h, i] } else { &[b, i] };
            add(&mut sums, Gradient::Region(n), place, gate, &[dout_o]);

            let weight = gate * region;
            // A branch of its own has a result of its own, whose gradient is stored.
            let dout_of_branch: Vec<f32> = dout.iter().map(|&dout| round_product(dtype, weight, dout)).collect();
            let delta: Option<f32> = saved.map(|saved| {
                let out = rows(&saved.out, &saved_out)([b, i, h]);
                dout.iter().zip(out).map(|(dout, out)| dout * out).sum()
            });
            for s in 0..if gate == 0.0 { 0 } else { p.len() } {
                let (k, _, head) = segment_of(s);
                for (j, &p) in p[s].iter().enumerate().filter(|&(_, &p)| p != 0.0) {
                    let ds = match delta {
                        None => weight * round_to(dtype, p * (dp[s][j] - dout_o)),
                        Some(delta) => round_to(dtype, p * (weight * dp[s][j] - delta)),
                    };
                    let dz = scale * (ds * slopes[s][j]);
                    add(&mut sums, Gradient::Bias(first + s), &[b, h, i, j], 1.0, &[ds]);
                    add(&mut sums, Gradient::Q, &[b, i, h], dz, k([b, j, head]));
                    add(&mut sums, Gradient::K(first + s), &[b, j, head], dz, query);
                    add(&mut sums, Gradient::V(first + s), &[b, j, head], p, &dout_of_branch);
                }
            }
            first += p.len();
        }
    }
    sums.into_iter().map(|(gradient, sum)| (gradient, sum.values)).collect()
}

/// `weight · value` to the precision of the type, whatever its range: no weight is too small or too large for it.
fn round_product(dtype: DType, weight: f32, value: f32) -> f32 {
    let exponent = if weight == 0.0 { 0.0 } else { weight.abs().log2().floor() };
    round_to(dtype, weight * (-exponent).exp2() * value) * exponent.exp2()
}

/// Per segment of branch `n`: the probabilities of one query, as stored, and the derivatives of the softcap.
fn probabilities(
    data: &Data,
    q: &[f32],
    keys: &[[Vec<f32>; 2]],
    n: usize,
    query: [usize; 3],
    saved_lse: Option<f32>,
) -> (Vec<Vec<f32>>, Vec<Vec<f32>>) {
    let (mut p, slopes): (Vec<Vec<f32>>, Vec<Vec<f32>>) =
        (keys.iter().enumerate()).map(|(s, [k, _])| logits(data, q, k, [n, s], query)).unzip();
    let max = p.iter().flatten().copied().fold(f32::NEG_INFINITY, f32::max);
    // A maximum far from 0 leaves no digit of the denominator in the lse.
    let lse = saved_lse.filter(|lse| lse.is_finite() && lse.abs() < 1e4);
    let max = lse.unwrap_or(if max == f32::NEG_INFINITY { 0.0 } else { max });
    p.iter_mut().flatten().for_each(|s| *s = (*s - max).exp());
    let sum = if lse.is_some() { 1.0 } else { p.iter().flatten().sum::<f32>() };
    if sum != 0.0 {
        p.iter_mut().flatten().for_each(|p| *p = round_to(data.case.dtype, *p / sum));
    }
    (p, slopes)
}
