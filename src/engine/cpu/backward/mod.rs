//! The backward: `P` is computed anew, tile by tile, and only for what is asked for.
//!
//! The pass over the queries leaves what the others need of every row, and dq; dk and dv on the way, or where heads are few in
//! passes over the keys of each segment; those over its bias give dbias. Every element of a gradient is summed in one order,
//! so that the bits do not depend on the number of threads.

mod bias;
mod factors;
mod key_sums;
mod keys;
mod queries;
mod rows;
mod steps;
mod tiles;

use super::convert::Convert;
use super::logits::{Keys, Queries};
use super::shared::Output;
use crate::engine::host::{Inputs, View};
use crate::plan::Plan;
use crate::plan::cpu::{FewQueries, query_pass};
use crate::problem::{
    Backward, Gradient, GradientProblem, Gradients, Problem, Results, TensorMut, TensorRef, with_float,
};
use rows::Rows;
use std::ops::Range;

/// Runs a backward problem whose tensors are bound; `backward` and `gradients` are those the problem was made of.
pub(crate) fn backward(
    problem: &Problem,
    plan: &Plan,
    inputs: &Inputs<'_>,
    backward: &Backward<TensorRef<'_>>,
    gradients: Gradients<TensorMut<'_>>,
) {
    with_float!(problem.dtype, T => backward_typed::<T>(problem, plan, inputs, backward, gradients));
}

fn backward_typed<T: Convert>(
    problem: &Problem,
    plan: &Plan,
    inputs: &Inputs<'_>,
    backward: &Backward<TensorRef<'_>>,
    gradients: Gradients<TensorMut<'_>>,
) {
    let Results::Backward { dout, saved, gradients: layouts } = &problem.results else {
        unreachable!("the plan's kernel goes backward, so the problem does")
    };
    let wanted: Wanted<'_, T> = Wanted {
        outputs: (layouts.iter().zip(gradients.wanted))
            .map(|(&layout, (_, tensor))| (layout, Output::new(tensor, layout.strides)))
            .collect(),
    };
    let find = |gradient: Gradient| wanted.find(gradient);

    let needs: Vec<Need> = (0..problem.branches.len()).map(|n| Need::of_branch(problem, n, layouts)).collect();
    // The saved `out` is a sum over branches, and weighted: it tells `Δ` of a single one, and `dout · O` of none. The saved
    // `lse` of few queries comes from logits that were added up in another order, whose rounding shows beside the logits here.
    let tells = needs.len() == 1 && !needs[0].dout_o && FewQueries::of(problem).is_none();
    let saved = saved.as_ref().zip(backward.saved.as_ref()).filter(|_| tells);
    let saved = saved.map(|(strides, saved)| SavedViews {
        out: View::new(&saved.out, strides.out),
        lse: View::new(&saved.lse, strides.lse),
    });
    let pass = Pass {
        problem,
        inputs,
        dout: View::new(&backward.dout, *dout),
        saved,
        block_q: plan.block_q(),
        block_kv: plan.block_kv(),
        needs,
    };

    let division = query_pass(problem, pass.block_q);
    let mut rows = Rows::new(problem, pass.block_q);
    queries::run(&pass, &mut rows, &wanted, &division);
    for (n, branch) in problem.branches.iter().enumerate() {
        for s in 0..branch.segments.len() {
            let number = branch.first_segment + s;
            if division.sums.is_empty() {
                let (dk, dv) = (find(Gradient::K(number)), find(Gradient::V(number)));
                for request in requests([n, s], dk, dv) {
                    keys::run(&pass, &rows, &request);
                }
            }
            if let Some((layout, output)) = find(Gradient::Bias(number)) {
                bias::run(&pass, &rows, [n, s], layout, output);
            }
        }
        for (layout, output) in [Gradient::Gate(n), Gradient::Region(n)].into_iter().filter_map(find) {
            factors::run(&pass, &rows, n, layout, output);
        }
    }
}

/// What is asked for.
struct Wanted<'a, T> {
    outputs: Vec<(GradientProblem, Output<'a, T>)>,
}

impl<'a, T> Wanted<'a, T> {
    fn find(&self, gradient: Gradient) -> Option<&(GradientProblem, Output<'a, T>)> {
        self.outputs.iter().find(|(layout, _)| layout.gradient == gradient)
    }
}

/// dk and dv of one segment in one pass over its keys, or in two where only one of them is shared by the batch.
fn requests<'a, T>(
    [branch, segment]: [usize; 2],
    dk: Option<&'a (GradientProblem, Output<'a, T>)>,
    dv: Option<&'a (GradientProblem, Output<'a, T>)>,
) -> impl Iterator<Item = keys::Request<'a, T>> {
    let request = move |dk: Option<&'a (GradientProblem, Output<'a, T>)>,
                        dv: Option<&'a (GradientProblem, Output<'a, T>)>| {
        let [batch, seq_kv, kv_heads, _] = dk.or(dv)?.0.extents;
        let output = |gradient: &'a (GradientProblem, Output<'a, T>)| &gradient.1;
        let (dk, dv) = (dk.map(output), dv.map(output));
        Some(keys::Request { branch, segment, extents: [batch, seq_kv, kv_heads], dk, dv })
    };
    let alike = dk.zip(dv).is_some_and(|(dk, dv)| dk.0.extents[0] == dv.0.extents[0]);
    let requests = if alike { [request(dk, dv), None] } else { [request(dk, None), request(None, dv)] };
    requests.into_iter().flatten()
}

/// What every task reads.
struct Pass<'a> {
    problem: &'a Problem,
    inputs: &'a Inputs<'a>,
    /// `[batch, seq_q, heads, value_dim]`
    dout: View<'a, 4>,
    saved: Option<SavedViews<'a>>,
    block_q: usize,
    block_kv: usize,
    /// Per branch.
    needs: Vec<Need>,
}

/// What the forward wrote.
struct SavedViews<'a> {
    /// `[batch, seq_q, heads, value_dim]`
    out: View<'a, 4>,
    /// `[branches, batch, heads, seq_q]`
    lse: View<'a, 4>,
}

impl<'a> Pass<'a> {
    /// The tiles of a branch's keys that some of the queries may attend to.
    fn tiles(&'a self, n: usize, queries: &Queries<'a>) -> impl Iterator<Item = Keys<'a>> + use<'a> {
        queries.tiles(&self.problem.branches[n], &self.inputs.branches[n].segments, self.block_kv)
    }

    /// `gate · region` of one row.
    fn weight(&self, n: usize, [b, h, i]: [usize; 3]) -> f32 {
        self.inputs.branches[n].gate(b, h) * self.inputs.branches[n].region(b, h, i)
    }
}

/// What the gradients wanted ask of a branch's rows.
#[derive(Clone, Copy, Default)]
struct Need {
    /// Maximum and denominator: dv needs no more.
    softmax: bool,
    /// `Δ`.
    delta: bool,
    /// `dout · O`, even where the gate is 0.
    dout_o: bool,
}

impl Need {
    fn of_branch(problem: &Problem, n: usize, wanted: &[GradientProblem]) -> Need {
        let branch = &problem.branches[n];
        let own =
            |number: usize| (branch.first_segment..branch.first_segment + branch.segments.len()).contains(&number);
        wanted.iter().fold(Need::default(), |need, wanted| match wanted.gradient {
            Gradient::Q => Need { softmax: true, delta: true, ..need },
            Gradient::K(number) | Gradient::Bias(number) if own(number) => Need { softmax: true, delta: true, ..need },
            Gradient::V(number) if own(number) => Need { softmax: true, ..need },
            Gradient::Gate(of) | Gradient::Region(of) if of == n => Need { softmax: true, delta: true, dout_o: true },
            _ => need,
        })
    }
}

/// The places of a dimension of `full` extent that fall onto `index` of a gradient, which has that extent or 1.
fn covered(extent: usize, full: usize, index: usize) -> Range<usize> {
    if extent == full { index..index + 1 } else { 0..full }
}

/// Batch entries and heads that fall onto one place of a gradient; none where there is no query.
fn covered_heads(
    problem: &Problem,
    [batch, heads]: [usize; 2],
    [b, h]: [usize; 2],
) -> impl Iterator<Item = (usize, usize)> + use<> {
    let batch = if problem.seq_q == 0 { 0..0 } else { covered(batch, problem.batch, b) };
    let heads = covered(heads, problem.heads, h);
    batch.flat_map(move |b| heads.clone().map(move |h| (b, h)))
}
