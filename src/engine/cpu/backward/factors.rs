//! dgate and dregion, from `dout · O` of every row (docs/math.md, equation 8).

use super::rows::Rows;
use super::{Pass, covered_heads};
use crate::engine::cpu::convert::Convert;
use crate::engine::cpu::shared::Output;
use crate::problem::{Gradient, GradientProblem};

/// The gradient of the gate or the region of branch `n`. Sums are f64: they may run over every query there is.
pub(super) fn run<T: Convert>(
    pass: &Pass<'_>,
    rows: &Rows,
    n: usize,
    layout: &GradientProblem,
    output: &Output<'_, T>,
) {
    let (problem, branch) = (pass.problem, &pass.inputs.branches[n]);
    let is_gate = matches!(layout.gradient, Gradient::Gate(_));
    let [batch, heads, seq_q, _] = layout.extents;
    for b in 0..batch {
        for h in 0..heads {
            // A gate has no dimension of queries: its one place there sums them all.
            for i in 0..seq_q {
                let queries = if is_gate { 0..problem.seq_q } else { i..i + 1 };
                let mut sum = 0.0;
                for (b, h) in covered_heads(problem, [batch, heads], [b, h]) {
                    for i in queries.clone() {
                        let factor = if is_gate { branch.region(b, h, i) } else { branch.gate(b, h) };
                        sum += f64::from(factor) * rows.get(n, [b, h, i]).dout_o;
                    }
                }
                // SAFETY: one thread stores every element, once.
                unsafe { output.store([b, h, i, 0], &[sum as f32]) };
            }
        }
    }
}
