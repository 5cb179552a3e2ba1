//! Sizes of the cpu engine: how it splits its work, and the scratch that this takes.

use super::instances::Instance;
use crate::problem::{BranchProblem, Gradient, List, Problem, Results, SegmentProblem, Strides, elements};
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

/// Queries of a block, at most.
const BLOCK_Q: usize = 256;

/// Numbers of queries and results that a block should have at most, for the second-level cache.
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
    /// Tiles that a thread keeps. Blocks of these heads follow each other.
    pub(crate) kept: KeptTiles,
}

impl Division {
    /// The batch entry, head and block of queries of a task: heads whose tiles are kept next to each other, since their rows
    /// share pages, and the blocks that come back to these tiles before other heads.
    pub(crate) fn block_of(&self, problem: &Problem, task: usize) -> [usize; 3] {
        let (heads, blocks) = (problem.heads, problem.seq_q.div_ceil(self.block_q));
        let (b, task) = (task / (heads * blocks), task % (heads * blocks));
        let first = task / (self.kept.heads * blocks) * self.kept.heads;
        let (task, heads) = (task - first * blocks, self.kept.heads.min(heads - first));
        [b, first + task % heads, task / heads]
    }
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
    let parts = most_parts(tasks(GROUP)).min(problem.branches.iter().map(parts_of).max().unwrap_or(1));
    let large = |block_q: usize| {
        block_q * (head_dim + 2 * value_dim) > BLOCK_NUMBERS || tasks(block_q) < threads * TASKS_OF_A_THREAD
    };
    let mut block_q = BLOCK_Q;
    while block_q > GROUP && (parts > 1 || large(block_q)) {
        block_q /= 2;
    }
    let tasks = tasks(block_q);
    // Tiles that are made for a neighbour's sake are lost where another thread takes the neighbour: at the ends of its tasks.
    let heads = if parts > 1 { 1 } else { tasks / (2 * threads) };
    Division { block_q, tasks, parts, kept: KeptTiles::of(problem, BLOCK_KV, heads) }
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
    let Division { block_q, tasks, parts, kept } = division(problem, threads);
    let queries = block_q * (head_dim + 2 * value_dim + 2);
    let keys = kept.tiles * BLOCK_KV * (head_dim.next_multiple_of(GROUP) + padded(value_dim)) + BLOCK_KV * GROUP;
    let partial =
        if parts == 1 { 0 } else { elements(&[tasks, parts, problem.branches.len(), block_q, value_dim + 2]) };
    (queries + keys).saturating_mul(threads).saturating_add(partial).saturating_mul(size_of::<f32>())
}

/// Tasks that a backward's passes should have at least. Numbers of their own, not of the threads: how a sum is split decides its
/// last bits, and they must not depend on the machine.
const UNIT_TASKS: usize = 16;
const KEY_TASKS: usize = 32;

/// Numbers of dk and dv that a thread may hold for the heads it works on.
const SUMS_OF_A_THREAD: usize = 2 << 20;

/// Numbers of dk and dv that all parts together may hold: 16 MB, or an eighth of the logits, which a naive computation holds
/// twice, up to 64 MB.
const SUMS_OF_PARTS: usize = 4 << 20;
const MOST_SUMS_OF_PARTS: usize = 16 << 20;
const LOGITS_TO_SUMS: usize = 8;

/// Numbers of keys and values that a thread keeps converted, for the blocks that come back to them.
const KEPT_OF_A_THREAD: usize = 512 << 10;

/// Numbers of one tile of keys and values in panels.
fn tile_numbers(problem: &Problem, block_kv: usize) -> usize {
    block_kv * (problem.head_dim.next_multiple_of(GROUP) + problem.value_dim.next_multiple_of(GROUP))
}

/// The tiles of keys and values that a thread keeps.
pub(crate) struct KeptTiles {
    /// Query heads that meet them: at least one, whose tiles may be more than there is room for.
    pub(crate) heads: usize,
    /// Of all these heads, at least one.
    pub(crate) tiles: usize,
}

impl KeptTiles {
    /// Those of as many heads as there is room for, up to `most`.
    pub(crate) fn of(problem: &Problem, block_kv: usize, most: usize) -> Self {
        let room = KEPT_OF_A_THREAD / tile_numbers(problem, block_kv).max(1);
        let of_heads = |heads: usize| {
            let kept = KeptTiles { heads, tiles: 0 };
            let tiles = |segment| kept.heads_of(segment).saturating_mul(segment.seq_kv.div_ceil(block_kv));
            problem.segments().map(tiles).fold(0, usize::saturating_add)
        };
        // Upwards: there is room for few, and heads may be many.
        let heads = (1..=most.min(problem.heads)).take_while(|&heads| of_heads(heads) <= room).last().unwrap_or(1);
        KeptTiles { heads, tiles: of_heads(heads).min(room).max(1) }
    }

    /// Heads of a segment's keys that these query heads read.
    pub(crate) fn heads_of(&self, segment: &SegmentProblem) -> usize {
        self.heads.div_ceil(segment.group.max(1))
    }
}

/// How a backward goes over the queries.
///
/// Where dk and dv of whole heads fit, they are added up on the way: S and dP are then formed once. A unit is what shares keys:
/// the query heads of a group, all batch entries where a gradient has none. Where units are few, their blocks of queries are
/// split into parts.
pub(crate) struct QueryPass {
    /// Batch entries and heads of a unit.
    entries: usize,
    heads: usize,
    /// Units next to each other along the heads.
    across: usize,
    pub(crate) units: usize,
    pub(crate) parts: usize,
    /// What is added up: nothing where the passes over the keys do.
    pub(crate) sums: Vec<KeySums>,
    /// f32 of all these of one unit.
    pub(crate) numbers: usize,
}

/// dk or dv of one unit: `[entries, kv_heads, seq_kv, width]`.
pub(crate) struct KeySums {
    pub(crate) gradient: Gradient,
    /// Behind the sums before.
    pub(crate) offset: usize,
    pub(crate) entries: usize,
    pub(crate) kv_heads: usize,
    pub(crate) seq_kv: usize,
    /// Padded.
    pub(crate) width: usize,
}

/// The division of a backward into blocks of `block_q` queries.
pub(crate) fn query_pass(problem: &Problem, block_q: usize) -> QueryPass {
    let Problem { batch, heads, seq_q, head_dim, value_dim, .. } = *problem;
    let blocks = seq_q.div_ceil(block_q);
    let apart = QueryPass {
        entries: 1,
        heads: 1,
        across: heads,
        units: elements(&[batch, heads, blocks.min(1)]),
        parts: blocks.max(1),
        sums: Vec::new(),
        numbers: 0,
    };
    // Which gradients are wanted decides what is added up, not how: a gradient must have the same bits alone.
    let segments: Vec<&SegmentProblem> = problem.segments().collect();
    // Without queries gradients are 0, and may still have entries.
    if batch == 0 || segments.iter().any(|segment| segment.group == 0) {
        return apart;
    }
    let in_all = |strides: Strides<4>| batch > 1 && strides[0] == 0;
    let shared = segments.iter().any(|segment| in_all(segment.k) || in_all(segment.v));
    let entries = if shared { batch } else { 1 };
    let unit_heads = segments.iter().fold(1, |heads, segment| least_common_multiple(heads, segment.group));
    let across = heads / unit_heads;
    let units = across * if shared { 1 } else { batch };
    let parts = UNIT_TASKS.div_ceil(units.max(1)).min(elements(&[entries, unit_heads, blocks])).max(1);
    let numbers = segments.iter().flat_map(|segment| {
        [(segment.k, head_dim), (segment.v, value_dim)].map(|(strides, width)| {
            let entries = if in_all(strides) { 1 } else { entries };
            elements(&[entries, unit_heads / segment.group, segment.seq_kv, padded(width)])
        })
    });
    let numbers = numbers.fold(0, usize::saturating_add);
    let fits = if parts == 1 {
        numbers <= SUMS_OF_A_THREAD
    } else {
        let logits =
            problem.seq_kv().map(|seq_kv| elements(&[batch, heads, seq_q, seq_kv])).fold(0, usize::saturating_add);
        elements(&[units, parts, numbers]) <= (logits / LOGITS_TO_SUMS).clamp(SUMS_OF_PARTS, MOST_SUMS_OF_PARTS)
    };

    let Results::Backward { gradients, .. } = &problem.results else { return apart };
    let (mut sums, mut numbers) = (Vec::new(), 0usize);
    for layout in gradients {
        let (number, width) = match layout.gradient {
            Gradient::K(number) => (number, padded(head_dim)),
            Gradient::V(number) => (number, padded(value_dim)),
            _ => continue,
        };
        let [batch_of, seq_kv, ..] = layout.extents;
        let (entries, kv_heads) = (entries.min(batch_of), unit_heads / segments[number].group);
        sums.push(KeySums { gradient: layout.gradient, offset: numbers, entries, kv_heads, seq_kv, width });
        numbers = numbers.saturating_add(elements(&[entries, kv_heads, seq_kv, width]));
    }
    if fits && numbers > 0 {
        QueryPass { entries, heads: unit_heads, across, units, parts, sums, numbers }
    } else {
        apart
    }
}

impl QueryPass {
    /// The unit of a block of queries.
    pub(crate) fn unit_of(&self, [b, h, _]: [usize; 3]) -> usize {
        b / self.entries * self.across + h / self.heads
    }

    /// The batch entry and the head at which a unit's share of a gradient begins.
    pub(crate) fn first_of(&self, unit: usize, sums: &KeySums) -> [usize; 2] {
        [unit / self.across * sums.entries, unit % self.across * sums.kv_heads]
    }

    /// Where the rows of some keys, as the queries of one head read them, are among the sums of their unit.
    pub(crate) fn rows(
        &self,
        gradient: Gradient,
        [b, h]: [usize; 2],
        start: usize,
        columns: usize,
    ) -> Option<Range<usize>> {
        let sums = self.sums.iter().find(|sums| sums.gradient == gradient)?;
        let entry = if sums.entries == 1 { 0 } else { b % self.entries };
        let head = h % self.heads * sums.kv_heads / self.heads;
        let first = sums.offset + ((entry * sums.kv_heads + head) * sums.seq_kv + start) * sums.width;
        Some(first..first + columns * sums.width)
    }
}

fn least_common_multiple(a: usize, b: usize) -> usize {
    let (mut divisor, mut rest) = (a, b);
    while rest != 0 {
        (divisor, rest) = (rest, divisor % rest);
    }
    a / divisor * b
}

/// Parts into which the pass over `tiles` tiles of keys splits the `blocks` blocks of queries that each of them meets.
pub(crate) fn query_parts(tiles: usize, blocks: usize) -> usize {
    KEY_TASKS.div_ceil(tiles.max(1)).min(blocks).max(1)
}

/// Bytes of one row's state in the engine: two f32 and three f64.
const ROW_BYTES: usize = 2 * size_of::<f32>() + 3 * size_of::<f64>();

/// The engine's state of every row, the tiles of every thread, and the sums that are held at a time.
pub(super) fn backward_bytes(instance: &Instance, problem: &Problem, threads: usize) -> usize {
    let Problem { batch, heads, seq_q, head_dim, value_dim, .. } = *problem;
    let Instance { block_q, block_kv, .. } = *instance;
    let blocks = seq_q.div_ceil(block_q);
    let rows = elements(&[batch, heads, blocks, problem.branches.len(), block_q.min(seq_q), ROW_BYTES]);

    let width = padded(head_dim) + padded(value_dim);
    let scores = if problem.softcap.is_some() { 3 } else { 2 } * block_q * block_kv;
    let keys = KeptTiles::of(problem, block_kv, 1).tiles * tile_numbers(problem, block_kv);
    let tiles = block_q * (head_dim + value_dim + width) + keys + scores;
    let QueryPass { units, parts, sums, numbers, .. } = query_pass(problem, block_q);
    if !sums.is_empty() {
        let own = block_q * (head_dim + ROW_SUMS) + if parts == 1 { numbers } else { 0 };
        let partial = if parts == 1 { 0 } else { elements(&[units, parts, numbers]) };
        let all = (tiles + own).saturating_mul(threads).saturating_add(partial);
        return all.saturating_mul(size_of::<f32>()).saturating_add(rows);
    }

    // A task also holds the gradient that it sums, and the pass over the queries the running softmax.
    let own = (block_q * (head_dim + ROW_SUMS)).max(block_kv * width).max(block_q * block_kv);
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
    (tiles + own).saturating_mul(threads).saturating_add(partial).saturating_mul(size_of::<f32>()).saturating_add(rows)
}

/// Numbers that the pass over the queries holds of a row of its block: maximum, denominator and two sums of two parts.
const ROW_SUMS: usize = 6;

#[cfg(test)]
mod tests {
    use super::division;
    use crate::problem::{Attention, Branch, DType, Outputs, Problem, TensorDesc};
    use std::collections::BTreeSet;

    #[test]
    fn every_block_is_one_task_and_blocks_come_back_to_kept_heads() {
        for (heads, kv_heads, seq_q, seq_kv, kept) in
            [(20, 20, 1000, 1024, 4), (7, 7, 600, 1100, 3), (12, 3, 5000, 77, 12)]
        {
            let rows = |seq, heads| TensorDesc::bshd(DType::F32, [2, seq, heads, 64]);
            let branch = Branch::new(rows(seq_kv, kv_heads), rows(seq_kv, kv_heads));
            let attention = Attention::new(rows(seq_q, heads)).branch(branch);
            let problem = Problem::forward(&attention, &Outputs::new(rows(seq_q, heads))).expect("a legal problem");
            let division = division(&problem, 1);
            let blocks = seq_q.div_ceil(division.block_q);
            assert_eq!((division.kept.heads, division.tasks), (kept, 2 * heads * blocks));
            let order: Vec<[usize; 3]> = (0..division.tasks).map(|task| division.block_of(&problem, task)).collect();
            let all: BTreeSet<[usize; 3]> = order.iter().copied().collect();
            assert_eq!(all.len(), division.tasks);
            assert_eq!(all.last(), Some(&[1, heads - 1, blocks - 1]));
            for unit in order.chunk_by(|a, b| a[0] == b[0] && a[1] / kept == b[1] / kept) {
                assert_eq!(unit.len(), kept.min(heads - unit[0][1]) * blocks);
            }
        }
    }
}
