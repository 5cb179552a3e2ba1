//! The pass over the bias of one segment: dbias, a tile of its own index space a task.
//!
//! What a bias broadcasts over is summed inside the task, so that nothing larger than the gradient is ever held.

use super::rows::Rows;
use super::tiles::Tiles;
use super::{Pass, covered_heads};
use crate::engine::cpu::convert::Convert;
use crate::engine::cpu::logits::{Keys, Queries};
use crate::engine::cpu::pack::from_lanes;
use crate::engine::cpu::shared::Output;
use crate::engine::cpu::tile::sum;
use crate::plan::cpu::GROUP;
use crate::problem::{GradientProblem, elements};
use rayon::prelude::*;

/// The bias of segment `s` of branch `n`.
pub(super) fn run<T: Convert>(
    pass: &Pass<'_>,
    rows: &Rows,
    [n, s]: [usize; 2],
    layout: &GradientProblem,
    dbias: &Output<'_, T>,
) {
    let Pass { block_q, block_kv, .. } = *pass;
    let [batch, heads, seq_q, seq_kv] = layout.extents;
    let (blocks, tiles) = (seq_q.div_ceil(block_q), seq_kv.div_ceil(block_kv));
    (0..elements(&[batch, heads, blocks, tiles])).into_par_iter().for_each_init(
        || (Tiles::new(pass), vec![0.0; block_q * block_kv], vec![0.0; GROUP * block_kv]),
        |(scratch, sums, rows_of_group), task| {
            let (head, block, tile) = (task / tiles / blocks, task / tiles % blocks, task % tiles);
            let [b, h] = [head / heads, head % heads];
            sums.fill(0.0);
            Work { pass, rows, n, s, layout }.add::<T>(scratch, [b, h, block, tile], sums);
            let (first, start) = (block * block_q, tile * block_kv);
            let columns = block_kv.min(seq_kv - start);
            for (g, sums) in (0..block_q.min(seq_q - first)).step_by(GROUP).zip(sums.chunks(block_kv * GROUP)) {
                let group = &mut rows_of_group[..GROUP.min(seq_q - first - g) * columns];
                from_lanes(sums, group, columns);
                for (r, row) in group.chunks(columns).enumerate() {
                    // SAFETY: tasks partition the gradient's index space, and each is stored once.
                    unsafe { dbias.store([b, h, first + g + r, start], row) };
                }
            }
        },
    );
}

struct Work<'a> {
    pass: &'a Pass<'a>,
    rows: &'a Rows,
    n: usize,
    s: usize,
    layout: &'a GradientProblem,
}

impl Work<'_> {
    /// Adds the `dS` of everything that falls onto one tile of the gradient to `sums`, `[groups, block_kv, GROUP]`; what all
    /// queries or all keys share goes to the first of them.
    fn add<T: Convert>(&self, tiles: &mut Tiles, [b, h, block, tile]: [usize; 4], sums: &mut [f32]) {
        let Work { pass, rows, n, s, layout } = *self;
        let Pass { problem, inputs, block_q, block_kv, .. } = *pass;
        let (segment, bound) = (&problem.branches[n].segments[s], &inputs.branches[n].segments[s]);
        let number = problem.branches[n].first_segment + s;
        let [batch, heads, seq_q, seq_kv] = layout.extents;
        let all_queries = seq_q != problem.seq_q;
        let all_keys = seq_kv != segment.seq_kv;
        let blocks = if all_queries { 0..problem.seq_q.div_ceil(block_q) } else { block..block + 1 };
        let starts = if all_keys { 0..segment.seq_kv.div_ceil(block_kv) } else { tile..tile + 1 };

        let heads = covered_heads(problem, [batch, heads], [b, h]);
        for (b, h) in heads.filter(|&(b, h)| inputs.branches[n].gate(b, h) != 0.0) {
            for block in blocks.clone() {
                let queries = Queries::block(problem, [b, h, block], block_q);
                let rows = &rows.of(n, [b, h, block])[..queries.rows];
                tiles.load_queries::<T>(pass, &queries);
                for start in starts.clone().map(|tile| tile * block_kv) {
                    let Some(keys) = Keys::seen(&queries, (number, segment, bound), start, block_kv) else { continue };
                    tiles.load_keys::<T>(pass, &keys, true);
                    tiles.products::<T>(&queries, &keys, true);
                    tiles.differentiate(rows, (&queries, &keys), false, true);
                    for (g, ds) in tiles.ds(&queries, &keys) {
                        let lanes = GROUP.min(queries.rows - g * GROUP);
                        let sums = &mut sums[if all_queries { 0 } else { g * block_kv * GROUP }..];
                        for (c, ds) in ds.chunks_exact(GROUP).enumerate() {
                            let sums = &mut sums[if all_keys { 0 } else { c * GROUP }..][..lanes];
                            if all_queries {
                                sums[0] += sum(&ds[..lanes]);
                            } else {
                                sums.iter_mut().zip(ds).for_each(|(sum, ds)| *sum += ds);
                            }
                        }
                    }
                }
            }
        }
    }
}
