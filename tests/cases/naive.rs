//! What anybody would write in the storage type: logits and probabilities stored in it, products accumulated in f32,
//! the result rounded to it. An engine's error is judged beside the error of this.

use super::data::{BranchData, SegmentData};
use super::{Case, Data, GateCase, HostTensor, SegmentCase};
use fused_attention::{Causal, DType};
use half::{bf16, f16};

/// `out` and `lse`, dense.
pub struct Naive {
    pub out: Vec<f32>,
    pub lse: Vec<f32>,
}

pub fn round_to(dtype: DType, value: f32) -> f32 {
    match dtype {
        DType::F16 => f16::from_f32(value).to_f32(),
        DType::BF16 => bf16::from_f32(value).to_f32(),
        _ => value,
    }
}

pub fn naive(data: &Data) -> Naive {
    let Case { batch, seq_q, heads, value_dim, dtype, .. } = data.case;
    let mut naive = Naive {
        out: vec![0.0; batch * seq_q * heads * value_dim],
        lse: vec![0.0; data.branches.len() * batch * heads * seq_q],
    };
    let q = data.q.values();
    let dense = |tensor: fn(&SegmentData) -> &HostTensor| -> Vec<Vec<Vec<f32>>> {
        let branch = |branch: &BranchData| branch.segments.iter().map(|segment| tensor(segment).values()).collect();
        data.branches.iter().map(branch).collect()
    };
    let (k, v) = (dense(|segment| &segment.k), dense(|segment| &segment.v));
    for (b, i, h) in (0..batch * seq_q * heads).map(|n| (n / heads / seq_q, n / heads % seq_q, n % heads)) {
        let out = &mut naive.out[((b * seq_q + i) * heads + h) * value_dim..][..value_dim];
        for (n, branch) in data.branches.iter().enumerate() {
            let stored: Vec<Vec<f32>> =
                (0..branch.segments.len()).map(|s| logits(data, &q, &k[n][s], [n, s], [b, h, i]).0).collect();
            let max = stored.iter().flatten().copied().fold(f32::NEG_INFINITY, f32::max);
            let max = if max == f32::NEG_INFINITY { 0.0 } else { max };
            let sum: f32 = stored.iter().flatten().map(|s| (s - max).exp()).sum();
            naive.lse[((n * batch + b) * heads + h) * seq_q + i] = max + sum.ln();
            let gate = gate_at(data, n, [b, h]);
            if sum == 0.0 || gate == 0.0 {
                continue;
            }
            let weight = gate * branch.region.as_ref().map_or(1.0, |region| region_at(region, [b, h, i]));
            for (s, logits) in stored.iter().enumerate() {
                let head = h / (heads / data.case.branches[n].segments[s].kv_heads);
                let v_row = rows(&branch.segments[s].v, &v[n][s]);
                for (j, &logit) in logits.iter().enumerate().filter(|&(_, &s)| s != f32::NEG_INFINITY) {
                    let p = round_to(dtype, (logit - max).exp() / sum);
                    for (out, v) in out.iter_mut().zip(v_row([b, j, head])) {
                        *out += weight * p * v;
                    }
                }
            }
        }
        out.iter_mut().for_each(|out| *out = round_to(dtype, *out));
    }
    naive
}

/// The rows of a tensor of four dimensions, from its dense values; a batch of 1 serves all.
pub(super) fn rows<'a>(tensor: &HostTensor, dense: &'a [f32]) -> impl Fn([usize; 3]) -> &'a [f32] {
    let [batch, seq, heads, width] = [0, 1, 2, 3].map(|dim| tensor.shape[dim]);
    move |[b, s, h]| &dense[((b.min(batch - 1) * seq + s) * heads + h) * width..][..width]
}

pub(super) fn gate_at(data: &Data, n: usize, [b, h]: [usize; 2]) -> f32 {
    match (&data.case.branches[n].gate, &data.branches[n].gate) {
        (GateCase::Scalar(gate), _) => *gate,
        (_, Some(gate)) if gate.shape.len() == 1 => gate.get(b),
        (_, Some(gate)) => gate.at([b, h]),
        (_, None) => 1.0,
    }
}

pub(super) fn region_at(region: &HostTensor, [b, h, i]: [usize; 3]) -> f32 {
    if region.shape.len() == 2 { region.at([b, i]) } else { region.at([b, h, i]) }
}

/// The logits of one query over one segment, as stored, and the derivatives of the softcap.
pub(super) fn logits(
    data: &Data,
    q: &[f32],
    k: &[f32],
    [n, s]: [usize; 2],
    [b, h, i]: [usize; 3],
) -> (Vec<f32>, Vec<f32>) {
    let case = &data.case;
    let described: &SegmentCase = &case.branches[n].segments[s];
    let segment = &data.branches[n].segments[s];
    let scale = case.softmax_scale.unwrap_or((1.0 / (case.head_dim as f64).sqrt()) as f32);
    let head = h / (case.heads / described.kv_heads);
    let query = rows(&data.q, q)([b, i, h]);
    let key = rows(&segment.k, k);
    (0..described.seq_kv)
        .map(|j| {
            if !attends(case, described, b, i, j) {
                return (f32::NEG_INFINITY, 0.0);
            }
            let product: f32 = query.iter().zip(key([b, j, head])).map(|(q, k)| q * k).sum();
            let scaled = product * scale;
            let capped = case.softcap.map_or(scaled, |cap| cap * (scaled / cap).tanh());
            let slope = case.softcap.map_or(1.0, |cap| 1.0 - (scaled / cap).tanh().powi(2));
            let logit = match &segment.bias {
                Some(mask) if mask.dtype() == DType::Bool => {
                    if mask.at([b, h, i, j]) == 0.0 {
                        f32::NEG_INFINITY
                    } else {
                        round_to(case.dtype, capped)
                    }
                }
                Some(bias) => round_finite(case.dtype, capped + bias.at([b, h, i, j])),
                None => round_to(case.dtype, capped),
            };
            (logit, slope)
        })
        .unzip()
}

/// Rounds, but keeps a finite logit finite: a mask at the lowest f32 must not become -inf in f16.
fn round_finite(dtype: DType, value: f32) -> f32 {
    let rounded = round_to(dtype, value);
    if rounded.is_infinite() && value.is_finite() { value } else { rounded }
}

fn attends(case: &Case, segment: &SegmentCase, b: usize, i: usize, j: usize) -> bool {
    let (i, j) = (i as i64, j as i64);
    let corner = segment.seq_kv as i64 - case.seq_q as i64;
    let exists = segment.key_len.as_ref().is_none_or(|len| j < i64::from(len[b]));
    let causal = match segment.causal {
        Causal::None => true,
        Causal::TopLeft => i >= j,
        Causal::BottomRight => i + corner >= j,
    };
    let from = segment.window.left.map_or(i64::MIN, |left| i + corner - i64::from(left));
    let to = segment.window.right.map_or(i64::MAX, |right| i + corner + i64::from(right));
    exists && causal && (from..=to).contains(&j)
}
