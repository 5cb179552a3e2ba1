//! The engine for machines without a GPU: tiled, online softmax, all cores, f32 arithmetic.
//!
//! One task of the forward is a block of queries of one head. Its scratch is a few tiles, whatever the sequence lengths.
//! The backward also keeps a few numbers of every row.

mod backward;
mod block;
mod logits;
mod shared;
mod tile;

pub(crate) use backward::backward;

use super::host::Inputs;
use crate::plan::Plan;
use crate::problem::{Float, Problem, Results, TensorMut, elements, with_float};
use block::{Block, Scratch};
use logits::Queries;
use rayon::prelude::*;
use shared::SharedRows;

/// Runs a forward problem whose tensors are bound; `out` and `lse` are those the problem was made of.
pub(crate) fn forward(
    problem: &Problem,
    plan: &Plan,
    inputs: &Inputs<'_>,
    out: TensorMut<'_>,
    lse: Option<TensorMut<'_>>,
) {
    with_float!(problem.dtype, T => forward_typed::<T>(problem, plan, inputs, out, lse));
}

fn forward_typed<T: Float>(
    problem: &Problem,
    plan: &Plan,
    inputs: &Inputs<'_>,
    out: TensorMut<'_>,
    lse: Option<TensorMut<'_>>,
) {
    let Results::Forward { out: out_strides, lse: lse_strides } = problem.results else {
        unreachable!("the plan's kernel goes forward, so the problem does")
    };
    let out = SharedRows::<T>::new(out, out_strides);
    let lse = lse.zip(lse_strides).map(|(lse, strides)| SharedRows::<f32>::new(lse, strides));

    let Problem { batch, seq_q, heads, .. } = *problem;
    let block_q = plan.block_q();
    let blocks = seq_q.div_ceil(block_q);
    (0..elements(&[batch, heads, blocks])).into_par_iter().for_each_init(
        || Scratch::new(problem, plan),
        |scratch, task| {
            let index = [task / blocks / heads, task / blocks % heads, task % blocks];
            let queries = Queries::block(problem, index, block_q);
            Block { queries, inputs, block_kv: plan.block_kv() }.forward(scratch, &out, &lse);
        },
    );
}
