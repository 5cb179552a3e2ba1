//! How soon the blocks of a grid end where each multiprocessor has one at a time: one wave of them after the other.

use super::Plan;
use crate::problem::Problem;

/// Blocks of each of `heads` heads that share its `tiles` tiles of queries, so that `multiprocessors`, with one block at a time,
/// end soonest. A wave of blocks takes as long as loading the keys, which counts as one tile, and the tiles of the warpgroup
/// that has most.
pub(super) fn soonest(heads: usize, tiles: usize, multiprocessors: usize, warpgroups: usize) -> usize {
    const WAVES: usize = 4;
    let multiprocessors = multiprocessors.max(1);
    // As many as fill one, two, … waves; of more blocks than that each has one tile to begin with.
    let filling = (1..=WAVES).map(|waves| (waves * multiprocessors / heads).clamp(1, tiles.max(1)).min(tiles));
    let cost = |blocks: usize| {
        let waves = heads.saturating_mul(blocks).div_ceil(multiprocessors);
        waves.saturating_mul(1 + tiles.div_ceil(blocks.max(1)).div_ceil(warpgroups))
    };
    filling.min_by_key(|&blocks| (cost(blocks), blocks)).unwrap_or(0)
}

/// Whether `finer`, the plan in blocks of fewer queries, ends sooner by more than it loses: its keys and values come more often, and
/// one warpgroup less computes while others wait, which counts as an eighth of its time (benches/NOTEBOOK.md).
pub(super) fn is_sooner(finer: &Plan, plan: &Plan, problem: &Problem) -> bool {
    let [finer, coarse] = [finer, plan].map(|plan| time(plan, problem));
    finer.saturating_mul(9) < coarse.saturating_mul(8)
}

/// Time of the waves of a plan whose blocks meet all keys, in queries that meet a tile of them.
fn time(plan: &Plan, problem: &Problem) -> usize {
    /// What a block takes before its first product and after its last: 2 us, by the rate at which products run.
    const START: usize = 300;
    let blocks: usize = plan.launches.iter().map(|launch| launch.blocks).sum();
    let tiles: usize = problem.segments().map(|segment| segment.seq_kv.div_ceil(plan.block_kv())).sum();
    let waves = blocks.div_ceil(plan.multiprocessors.max(1));
    waves.saturating_mul(plan.block_q().saturating_mul(tiles).saturating_add(START))
}
