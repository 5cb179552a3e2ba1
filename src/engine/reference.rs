//! The oracle: the formulas of docs/math.md in f64, one query at a time, nothing clever.
//!
//! Results are unrounded, so that an error measured against them is the other engine's own.

use super::host::{Inputs, SegmentInputs, View};
use crate::problem::{BranchProblem, Causal, DType, Gradient, GradientProblem, Problem, SegmentProblem, elements};
use std::collections::HashMap;

/// A dense array indexed by four numbers; an index along an extent of 1 is taken as 0.
#[derive(Clone, Debug, PartialEq)]
pub struct Dense {
    /// Extents, the last fastest.
    pub extents: [usize; 4],
    /// Elements.
    pub values: Vec<f64>,
}

impl Dense {
    pub(crate) fn zeros(extents: [usize; 4]) -> Self {
        Dense { extents, values: vec![0.0; elements(&extents)] }
    }

    fn position(&self, index: [usize; 4]) -> usize {
        (index.iter().zip(self.extents))
            .fold(0, |position, (&i, extent)| position * extent + if extent == 1 { 0 } else { i })
    }

    fn at(&mut self, index: [usize; 4]) -> &mut f64 {
        let position = self.position(index);
        &mut self.values[position]
    }

    fn add_to_row(&mut self, [x, y, z]: [usize; 3], row: impl Iterator<Item = f64>) {
        let position = self.position([x, y, z, 0]);
        self.values[position..].iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
    }
}

/// What the forward computes: `out` `[batch, seq_q, heads, value_dim]` without what `out` held before, and `lse`
/// `[branches, batch, heads, seq_q]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Forward {
    /// The sum of the branches.
    pub out: Dense,
    /// Natural logarithm of each softmax's denominator.
    pub lse: Dense,
}

/// One query's softmax over one branch.
struct Row {
    /// Probability per segment and key; exactly 0 for a key that the query may not attend to.
    p: Vec<Vec<f64>>,
    /// Derivative of the logit by the scaled product, 1 without softcap.
    slope: Vec<Vec<f64>>,
    /// Logarithm of the denominator, -inf without any key.
    lse: f64,
}

pub(crate) fn forward(problem: &Problem, inputs: &Inputs<'_>) -> Forward {
    let Problem { batch, seq_q, heads, value_dim, .. } = *problem;
    let mut out = Dense::zeros([batch, seq_q, heads, value_dim]);
    let mut lse = Dense::zeros([problem.branches.len(), batch, heads, seq_q]);
    for (b, h, i) in queries(problem) {
        for (n, branch) in problem.branches.iter().enumerate() {
            let row = softmax_row(problem, inputs, n, [b, h, i]);
            *lse.at([n, b, h, i]) = row.lse;
            let bound = &inputs.branches[n];
            if bound.gate(b, h) == 0.0 {
                continue;
            }
            let weight = f64::from(bound.gate(b, h)) * f64::from(bound.region(b, h, i));
            for (s, j) in attended(&row) {
                let v = bound.segments[s].v.row([b, j, h / branch.segments[s].group], value_dim);
                out.add_to_row([b, i, h], v.iter().map(|v| weight * row.p[s][j] * v));
            }
        }
    }
    Forward { out, lse }
}

/// The gradients wanted, each of the extents its [`GradientProblem`] states.
pub(crate) fn backward(
    problem: &Problem,
    inputs: &Inputs<'_>,
    dout: &View<'_, 4>,
    wanted: &[GradientProblem],
) -> HashMap<Gradient, Dense> {
    let mut gradients: Sums = wanted.iter().map(|wanted| (wanted.gradient, Dense::zeros(wanted.extents))).collect();
    let Problem { head_dim, value_dim, .. } = *problem;
    let scale = f64::from(problem.softmax_scale);
    for (b, h, i) in queries(problem) {
        let (q, dout) = (inputs.q.row([b, i, h], head_dim), dout.row([b, i, h], value_dim));
        for (n, branch) in problem.branches.iter().enumerate() {
            let row = softmax_row(problem, inputs, n, [b, h, i]);
            let bound = &inputs.branches[n];
            let (gate, region) = (f64::from(bound.gate(b, h)), f64::from(bound.region(b, h, i)));

            // Equation 8: dout · O_b, from which both factors of the weight get their gradients.
            let dout_v = |s: usize, j: usize| -> f64 {
                let v = bound.segments[s].v.row([b, j, h / branch.segments[s].group], value_dim);
                dout.iter().zip(v).map(|(dout, v)| dout * v).sum()
            };
            let keys: Vec<(usize, usize, f64)> = attended(&row).map(|(s, j)| (s, j, dout_v(s, j))).collect();
            let dout_o: f64 = keys.iter().map(|&(s, j, dout_v)| row.p[s][j] * dout_v).sum();
            add(&mut gradients, Gradient::Gate(n), [b, h, 0, 0], region * dout_o);
            add(&mut gradients, Gradient::Region(n), [b, h, i, 0], gate * dout_o);
            if gate == 0.0 {
                continue;
            }

            for (s, j, dout_v) in keys {
                let number = branch.first_segment + s;
                let (p, head) = (row.p[s][j], h / branch.segments[s].group);
                let (k, weight) = (bound.segments[s].k.row([b, j, head], head_dim), gate * region);
                // Equations 9 to 11.
                let ds = p * weight * (dout_v - dout_o);
                let dz = ds * row.slope[s][j];
                add(&mut gradients, Gradient::Bias(number), [b, h, i, j], ds);
                add_row(&mut gradients, Gradient::Q, [b, i, h], k.iter().map(|k| scale * dz * k));
                add_row(&mut gradients, Gradient::K(number), [b, j, head], q.iter().map(|q| scale * dz * q));
                let dv = dout.iter().map(|dout| weight * p * dout);
                add_row(&mut gradients, Gradient::V(number), [b, j, head], dv);
            }
        }
    }
    gradients
}

type Sums = HashMap<Gradient, Dense>;

/// Adds to a gradient, if it is wanted.
fn add(gradients: &mut Sums, gradient: Gradient, index: [usize; 4], value: f64) {
    gradients.get_mut(&gradient).into_iter().for_each(|dense| *dense.at(index) += value);
}

/// The same for all components of a row.
fn add_row(gradients: &mut Sums, gradient: Gradient, index: [usize; 3], row: impl Iterator<Item = f64>) {
    if let Some(dense) = gradients.get_mut(&gradient) {
        dense.add_to_row(index, row);
    }
}

fn queries(problem: &Problem) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
    let Problem { batch, seq_q, heads, .. } = *problem;
    // Without a head or a query there is nothing to count batch entries for.
    let batch = if heads == 0 || seq_q == 0 { 0 } else { batch };
    (0..batch).flat_map(move |b| (0..heads).flat_map(move |h| (0..seq_q).map(move |i| (b, h, i))))
}

/// Segment and index of every key with a probability.
fn attended(row: &Row) -> impl Iterator<Item = (usize, usize)> + '_ {
    (row.p.iter().enumerate())
        .flat_map(|(s, p)| p.iter().enumerate().filter(|&(_, &p)| p != 0.0).map(move |(j, _)| (s, j)))
}

/// Equations 1 to 3.
fn softmax_row(problem: &Problem, inputs: &Inputs<'_>, n: usize, query: [usize; 3]) -> Row {
    let branch: &BranchProblem = &problem.branches[n];
    let mut p = Vec::new();
    let mut slope = Vec::new();
    for (segment, bound) in branch.segments.iter().zip(&inputs.branches[n].segments) {
        let (logits, slopes) = logits(problem, inputs, segment, bound, query);
        p.push(logits);
        slope.push(slopes);
    }
    let max = p.iter().flatten().copied().fold(f64::NEG_INFINITY, f64::max);
    let max = if max == f64::NEG_INFINITY { 0.0 } else { max };
    p.iter_mut().flatten().for_each(|s| *s = (*s - max).exp());
    let sum: f64 = p.iter().flatten().sum();
    if sum != 0.0 {
        p.iter_mut().flatten().for_each(|p| *p /= sum);
    }
    Row { p, slope, lse: max + sum.ln() }
}

/// Logits of one query over one segment, -inf where it may not attend, and their slopes.
fn logits(
    problem: &Problem,
    inputs: &Inputs<'_>,
    segment: &SegmentProblem,
    bound: &SegmentInputs<'_>,
    [b, h, i]: [usize; 3],
) -> (Vec<f64>, Vec<f64>) {
    let key_len = bound.key_len(b);
    let q = inputs.q.row([b, i, h], problem.head_dim);
    let mut logits = vec![f64::NEG_INFINITY; segment.seq_kv];
    let mut slopes = vec![0.0; segment.seq_kv];
    for j in (0..key_len).filter(|&j| may_attend(segment, problem.seq_q, i, j)) {
        let k = bound.k.row([b, j, h / segment.group], problem.head_dim);
        let product: f64 = q.iter().zip(k).map(|(q, k)| q * k).sum();
        let z = f64::from(problem.softmax_scale) * product;
        (logits[j], slopes[j]) = match problem.softcap.map(f64::from) {
            None => (z, 1.0),
            Some(cap) => (cap * (z / cap).tanh(), 1.0 - (z / cap).tanh().powi(2)),
        };
        if let Some(bias) = &bound.bias {
            let value = bias.get([b, h, i, j]);
            logits[j] += if bias.dtype() != DType::Bool {
                value
            } else if value == 0.0 {
                f64::NEG_INFINITY
            } else {
                0.0
            };
        }
    }
    (logits, slopes)
}

/// The position rules, as their definitions state them.
fn may_attend(segment: &SegmentProblem, seq_q: usize, i: usize, j: usize) -> bool {
    let (i, j) = (i as i64, j as i64);
    let centre = i + segment.seq_kv as i64 - seq_q as i64;
    let causal = match segment.causal {
        Causal::None => true,
        Causal::TopLeft => j <= i,
        Causal::BottomRight => j <= centre,
    };
    let left = segment.window.left.is_none_or(|left| j >= centre - i64::from(left));
    let right = segment.window.right.is_none_or(|right| j <= centre + i64::from(right));
    causal && left && right
}
