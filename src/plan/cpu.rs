//! Sizes of the cpu engine's backward: how it splits its work, and the scratch that this takes.

use super::instances::Instance;
use crate::problem::{Problem, elements};

/// Tasks that a pass over the keys should have at least. A number of its own, not of the threads: how a sum is split
/// decides its last bits, and they must not depend on the machine.
const KEY_TASKS: usize = 32;

/// Parts into which the pass over `tiles` tiles of keys splits the `blocks` blocks of queries that each of them meets.
pub(crate) fn query_parts(tiles: usize, blocks: usize) -> usize {
    KEY_TASKS.div_ceil(tiles.max(1)).min(blocks).max(1)
}

/// Bytes of one row's state in the engine: two f32 and three f64.
const ROW_BYTES: usize = 2 * size_of::<f32>() + 3 * size_of::<f64>();

/// The engine's state of every row, the tiles of every thread, and the partial sums of the segment that has most.
pub(super) fn backward_bytes(instance: &Instance, problem: &Problem, threads: usize) -> usize {
    let Problem { batch, heads, seq_q, head_dim, value_dim, .. } = *problem;
    let Instance { block_q, block_kv, .. } = *instance;
    let blocks = seq_q.div_ceil(block_q);
    let rows = elements(&[batch, heads, blocks, problem.branches.len(), block_q.min(seq_q)]) * ROW_BYTES;

    let width = head_dim + value_dim;
    let scores = if problem.softcap.is_some() { 3 } else { 2 } * block_q * block_kv;
    let tiles = (block_q + block_kv) * width + scores;
    // A task also holds the gradient that it sums, and the pass over the queries the running softmax and a row of `out`.
    let sums = (block_q * (head_dim + 6) + value_dim).max(block_kv * width).max(block_q * block_kv);

    let kv_heads = |group: usize| heads / group.max(1);
    let segments = problem.branches.iter().flat_map(|branch| &branch.segments);
    let partial = segments.map(|segment| {
        // Keys of batch 1 make the fewest tiles and are met by the most queries: the most parts.
        [1, batch].map(|entries| {
            let tiles = elements(&[entries, kv_heads(segment.group), segment.seq_kv.div_ceil(block_kv)]);
            let parts = query_parts(tiles, elements(&[batch / entries.max(1), segment.group, blocks]));
            if parts == 1 { 0 } else { tiles * parts * block_kv.min(segment.seq_kv) * width }
        })
    });
    let partial = partial.flatten().max().unwrap_or(0);
    (tiles + sums).saturating_mul(threads).saturating_add(partial).saturating_mul(size_of::<f32>()).saturating_add(rows)
}
