//! Sizes of the cpu engine: how it splits its work, and the scratch that this takes.

use super::instances::Instance;
use crate::problem::{BranchProblem, List, Problem, elements};
use std::ops::Range;

/// Width of a row of a tile that a matrix product reads a whole register at a time.
pub(crate) fn padded(width: usize) -> usize {
    width.next_multiple_of(GROUP / 2)
}

/// Keys of one tile of the forward. With 64 elements of head dim a tile of keys, one of values and the logits of a group
/// fill a third of a second-level cache of 256 KB.
pub(crate) const BLOCK_KV: usize = 128;

/// Queries that the engine has side by side in its registers: what blocks are made of, and tiles padded to.
pub(crate) const GROUP: usize = 32;

/// Queries of a block, at most: what a tile of keys is converted for at a time. Rows of one head lie pages apart, and
/// reading them is what a conversion costs. Where keys are few, a block should rather stay in the caches.
const BLOCK_Q: usize = 512;
const BLOCK_Q_FEW_KEYS: usize = 256;
const FEW_KEYS: usize = 4 * BLOCK_KV;

/// Numbers of queries and results that a block should have at most, for the same reason.
const BLOCK_NUMBERS: usize = 256 << 10;

/// Tasks that a thread should have at least, so that all are busy until the end.
const TASKS_OF_A_THREAD: usize = 8;

/// Tasks into which a forward is split at least, parts of keys counted. Not a number of the threads: how keys are split
/// decides a result's last bits, and they must not depend on the machine. How queries are split decides none.
const TASKS: usize = 64;

/// How a forward is split.
pub(crate) struct Division {
    /// Queries of a block.
    pub(crate) block_q: usize,
    /// Blocks of all heads.
    pub(crate) tasks: usize,
    /// Parts into which the keys of a block are split.
    pub(crate) parts: usize,
}

/// Parts into which keys are split where blocks of queries alone make so many tasks.
fn most_parts(tasks: usize) -> usize {
    TASKS.div_ceil(tasks.max(1))
}

/// Parts of the keys of one branch, at most. Those of one do not depend on another: a branch of gate 0 shows in no bit.
pub(crate) fn parts_of(branch: &BranchProblem) -> usize {
    let longest = branch.segments.iter().map(|segment| segment.seq_kv).max().unwrap_or(0);
    longest.div_ceil(2 * BLOCK_KV).max(1)
}

/// Queries are split first, keys where there are few queries and many keys.
pub(crate) fn division(problem: &Problem, threads: usize) -> Division {
    let Problem { batch, heads, seq_q, head_dim, value_dim, .. } = *problem;
    let tasks = |block_q: usize| elements(&[batch, heads, seq_q.div_ceil(block_q)]);
    let longest = problem.seq_kv().max().unwrap_or(0);
    let parts = most_parts(tasks(GROUP)).min(problem.branches.iter().map(parts_of).max().unwrap_or(1));
    let large = |block_q: usize| {
        block_q * (head_dim + 2 * value_dim) > BLOCK_NUMBERS || tasks(block_q) < threads * TASKS_OF_A_THREAD
    };
    let mut block_q = if longest <= FEW_KEYS { BLOCK_Q_FEW_KEYS } else { BLOCK_Q };
    while block_q > GROUP && (parts > 1 || large(block_q)) {
        block_q /= 2;
    }
    Division { block_q, tasks: tasks(block_q), parts }
}

/// Queries that are few: more are faster side by side in registers (benches/NOTEBOOK.md).
const FEW_QUERIES: usize = 8;

/// Rows of a task of few queries, at most: queries times heads.
const FEW_ROWS: usize = 32;

/// How a forward of few queries is split: into heads that share their keys, and the keys of each branch into parts.
pub(crate) struct FewQueries {
    /// Heads of a task, which read the same keys in every segment.
    pub(crate) heads: usize,
    /// Parts of each branch.
    parts: List<usize>,
}

impl FewQueries {
    pub(crate) fn of(problem: &Problem) -> Option<Self> {
        let Problem { batch, heads, seq_q, ref branches, .. } = *problem;
        if seq_q == 0 || seq_q > FEW_QUERIES {
            return None;
        }
        let most = heads.min(FEW_ROWS / seq_q);
        let shared = |branches: &[BranchProblem]| {
            let groups = |heads: usize| {
                branches.iter().flat_map(|branch| &branch.segments).all(|segment| segment.group.is_multiple_of(heads))
            };
            (1..=most).rev().find(|&shared| heads.is_multiple_of(shared) && groups(shared))
        };
        let parts = branches.iter().map(|branch| {
            let tasks = elements(&[batch, heads / shared(std::slice::from_ref(branch))?]);
            Some(most_parts(tasks).min(parts_of(branch)))
        });
        Some(FewQueries { heads: shared(branches)?, parts: parts.collect::<Option<_>>()? })
    }

    /// Parts of all branches.
    pub(crate) fn units(&self) -> usize {
        self.parts.iter().sum()
    }

    /// The units of branch `n`.
    pub(crate) fn units_of(&self, n: usize) -> Range<usize> {
        let start = self.parts[..n].iter().sum();
        start..start + self.parts[n]
    }

    /// The branch of a unit, which of its parts it is and of how many.
    pub(crate) fn unit(&self, unit: usize) -> (usize, [usize; 2]) {
        let mut part = unit;
        for (n, &parts) in self.parts.iter().enumerate() {
            if part < parts {
                return (n, [part, parts]);
            }
            part -= parts;
        }
        unreachable!("a unit is one of a branch's parts")
    }

    /// Numbers that a unit leaves: rows of results, and of each its maximum and denominator.
    pub(crate) fn unit_numbers(&self, problem: &Problem) -> usize {
        self.heads * problem.seq_q * (padded(problem.value_dim) + 2)
    }

    /// The tiles of every thread, and the results of units.
    fn bytes(&self, problem: &Problem, threads: usize) -> usize {
        let Problem { batch, heads, seq_q, head_dim, value_dim, .. } = *problem;
        let tiles = self.heads * seq_q * (padded(head_dim) + padded(value_dim) + BLOCK_KV + 3);
        let tasks =
            if self.units() == problem.branches.len() { threads } else { elements(&[batch, heads / self.heads]) };
        let results = elements(&[tasks, self.units(), self.unit_numbers(problem)]);
        tiles.saturating_mul(threads).saturating_add(results).saturating_mul(size_of::<f32>())
    }
}

/// The tiles of every thread, and the results of parts.
pub(super) fn forward_bytes(problem: &Problem, threads: usize) -> usize {
    if let Some(split) = FewQueries::of(problem) {
        return split.bytes(problem, threads);
    }
    let (head_dim, value_dim) = (problem.head_dim, problem.value_dim);
    let Division { block_q, tasks, parts } = division(problem, threads);
    let queries = block_q * (head_dim + 2 * value_dim + 2);
    let keys = BLOCK_KV * (head_dim.next_multiple_of(GROUP) + padded(value_dim) + GROUP);
    let partial =
        if parts == 1 { 0 } else { elements(&[tasks, parts, problem.branches.len(), block_q, value_dim + 2]) };
    (queries + keys).saturating_mul(threads).saturating_add(partial).saturating_mul(size_of::<f32>())
}

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

    let (keys, width) = (head_dim + value_dim, padded(head_dim) + padded(value_dim));
    let scores = if problem.softcap.is_some() { 3 } else { 2 } * block_q * block_kv;
    let tiles = block_q * width + block_kv * (padded(head_dim) + keys) + scores;
    // A task also holds the gradient that it sums, and the pass over the queries the running softmax and a row of `out`.
    let sums = (block_q * (padded(head_dim) + 6) + padded(value_dim)).max(block_kv * width).max(block_q * block_kv);

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
