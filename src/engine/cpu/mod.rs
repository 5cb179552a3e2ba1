//! The engine for machines without a GPU: tiled, online softmax, all cores, sums in f32.
//!
//! One task of the forward is a block of queries of one head or, where there are few such blocks, one of the parts into
//! which their keys are split. Few queries go their own way (`decode`). Its scratch is a few tiles, whatever the sequence
//! lengths. The backward also keeps a few numbers of every row, and dk and dv of the heads in work.

mod aligned;
mod backward;
#[cfg(target_arch = "x86_64")]
mod bf16;
mod block;
mod convert;
mod decode;
mod element;
mod f32;
mod group;
mod kept;
mod logits;
mod pack;
mod parts;
mod prefetch;
mod product;
mod shared;
mod softmax;
mod tasks;
mod tile;
mod turn;

pub(crate) use backward::backward;

use super::host::Inputs;
use crate::plan::cpu::{Division, FewQueries, GROUP, division};
use crate::problem::{Problem, Results, TensorMut, with_float};
use block::{Block, Scratch};
use convert::Convert;
use element::Holds;
use logits::Queries;
use rayon::prelude::*;
use shared::SharedRows;

/// Runs a forward problem whose tensors are bound; `out` and `lse` are those the problem was made of.
pub(crate) fn forward(problem: &Problem, inputs: &Inputs<'_>, out: TensorMut<'_>, lse: Option<TensorMut<'_>>) {
    if let Some(split) = FewQueries::of(problem) {
        with_float!(problem.dtype, T => {
            let (out, lse) = shared::<T>(problem, out, lse);
            decode::forward(problem, inputs, &split, &out, &lse);
        });
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if problem.dtype == crate::problem::DType::BF16 && bf16::is_available() {
        return forward_typed::<half::bf16, bf16::Pair>(problem, inputs, out, lse);
    }
    with_float!(problem.dtype, T => forward_typed::<T, f32>(problem, inputs, out, lse));
}

/// The outputs, for all threads.
fn shared<'a, T: Convert>(
    problem: &Problem,
    out: TensorMut<'a>,
    lse: Option<TensorMut<'a>>,
) -> (SharedRows<'a, T>, Option<SharedRows<'a, f32>>) {
    let Results::Forward { out: out_strides, lse: lse_strides } = problem.results else {
        unreachable!("the plan's kernel goes forward, so the problem does")
    };
    let lse = lse.zip(lse_strides).map(|(lse, strides)| SharedRows::new(lse, strides));
    (SharedRows::new(out, out_strides), lse)
}

/// With tensors of `T` and tiles of `E`.
fn forward_typed<T: Convert, E: Holds<T>>(
    problem: &Problem,
    inputs: &Inputs<'_>,
    out: TensorMut<'_>,
    lse: Option<TensorMut<'_>>,
) {
    let (out, lse) = shared::<T>(problem, out, lse);
    let division = division(problem, rayon::current_num_threads());
    let Division { block_q, tasks, parts, .. } = division;
    let block = |task: usize, part: [usize; 2]| {
        let queries = Queries::block(problem, division.block_of(problem, task), block_q);
        Block { queries, inputs, part, with_lse: lse.is_some() }
    };
    let scratch = || Scratch::<E>::new(problem, &division);
    if parts == 1 {
        let unit = division.kept.heads * problem.seq_q.div_ceil(block_q);
        tasks::in_runs(tasks, unit, scratch, |scratch, task| block(task, [0, 1]).forward(scratch, &out, &lse));
        return;
    }
    let size = problem.branches.len() * parts::size(block_q.div_ceil(GROUP), problem.value_dim);
    let mut partial = vec![0.0; tasks * parts * size];
    partial.par_chunks_mut(size).enumerate().for_each_init(scratch, |scratch, (index, partial)| {
        block(index / parts, [index % parts, parts]).forward_part::<T, E>(scratch, partial);
    });
    partial.par_chunks(parts * size).enumerate().for_each_init(scratch, |scratch, (task, partial)| {
        block(task, [0, parts]).merge(scratch, partial, &out, &lse);
    });
}
