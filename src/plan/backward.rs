//! How the launches of a backward on a GPU divide the work: which blocks share the keys or the bias of a segment, where the
//! parts they leave lie in the workspace, and which sums make gradients of them.
//!
//! A gradient that one block computes whole goes straight where it is wanted. Where several blocks share one, or an input
//! broadcasts over batch entries that are computed apart, each leaves its part in f32, and a last launch adds the parts in a
//! fixed order: no atomics, and two runs give the same bits.

use super::Instance;
use crate::problem::{
    BranchProblem, Gate, Gradient, GradientProblem, List, Problem, Results, SegmentProblem, Strides, elements,
};
use smallvec::SmallVec;

/// What the launches need to know beyond the problem. Offsets are in bytes of the workspace.
#[derive(Clone, Debug, Default)]
pub(crate) struct Division {
    /// Of shift, inverse and g of every query and branch, `[3, branches, batch, heads, seq_q]`, where they are kept.
    pub(crate) statistics: Option<usize>,
    /// Bit n: something of branch n is wanted.
    pub(crate) branches: u32,
    /// Bit n: g of branch n is wanted.
    pub(crate) g_branches: u32,
    pub(crate) segments: List<SegmentDivision>,
    /// Sums of parts; those of the second list may read what the first one's write.
    pub(crate) sums: [SmallVec<[Sum; 4]>; 2],
    pub(crate) workspace_bytes: usize,
}

/// One segment's share.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SegmentDivision {
    pub(crate) dk: Option<Rows>,
    pub(crate) dv: Option<Rows>,
    /// Blocks of the launch of the keys' side, of which so many share a tile of keys.
    pub(crate) key_blocks: usize,
    pub(crate) key_parts: usize,
    /// Batch entries that tiles of keys are counted in: all, or one that stands for all.
    pub(crate) key_batch: usize,
    pub(crate) dbias: Option<Bias>,
    pub(crate) bias_blocks: usize,
    pub(crate) bias_parts: usize,
}

/// Where something is written.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// The gradient of this number among those wanted.
    Gradient(usize),
    Workspace(usize),
}

/// Where rows of dk or dv go. Strides of part, batch entry, key and head, in elements.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    pub(crate) to: Place,
    pub(crate) stride: [i64; 4],
}

/// Where dbias goes. Strides of the part and of the dimensions of the bias.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bias {
    pub(crate) to: Place,
    pub(crate) stride: [i64; 5],
    pub(crate) extent: [usize; 4],
}

/// One sum over parts, as `SumParams` in kernels/params.h has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sum {
    /// Offset in the workspace.
    pub(crate) parts: usize,
    pub(crate) factor: Factor,
    pub(crate) to: Place,
    pub(crate) extent: [usize; 4],
    pub(crate) terms: [usize; 3],
    pub(crate) parts_stride: [i64; 4],
    pub(crate) parts_term_stride: [i64; 3],
    pub(crate) factor_stride: [i64; 4],
    pub(crate) factor_term_stride: [i64; 3],
    pub(crate) to_stride: [i64; 4],
    /// Whether the threads of a block share the last of the terms.
    pub(crate) together: bool,
}

/// What each part of a sum is multiplied by.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Factor {
    One,
    /// Of the branch of this number.
    Gate(usize),
    Region(usize),
}

/// Statistics of one query: shift, inverse and g.
const STATISTICS: usize = 3;
/// Where rows of parts may start.
const ALIGNMENT: usize = 16;

impl Division {
    /// For the kernels that begin with `lead`; `keys` and `bias` are those that follow it, `multiprocessors` what there is to be
    /// kept busy, `head_blocks` the blocks that share the queries of a head.
    pub(crate) fn new(
        problem: &Problem,
        [keys, bias]: [Option<&Instance>; 2],
        head_blocks: usize,
        multiprocessors: usize,
    ) -> Division {
        let Results::Backward { gradients, .. } = &problem.results else { return Division::default() };
        if gradients.is_empty() {
            return Division::default();
        }
        let mut division = Division::default();
        let wanted = Wanted { problem, gradients };
        for gradient in gradients {
            match gradient.gradient {
                Gradient::Q => division.branches = u32::MAX,
                Gradient::K(n) | Gradient::V(n) | Gradient::Bias(n) => {
                    let before = |branch: &&BranchProblem| branch.first_segment + branch.segments.len() <= n;
                    division.branches |= 1 << problem.branches.iter().take_while(before).count();
                }
                Gradient::Gate(branch) | Gradient::Region(branch) => {
                    division.branches |= 1 << branch;
                    division.g_branches |= 1 << branch;
                }
            }
        }
        let any_bias = gradients.iter().any(|gradient| matches!(gradient.gradient, Gradient::Bias(_)));
        // A kernel that has all keys of a query at once keeps them to itself.
        if keys.is_some() || any_bias || division.g_branches != 0 {
            let numbers = [STATISTICS, problem.branches.len(), problem.batch, problem.heads, problem.seq_q];
            division.statistics = Some(division.reserve(elements(&numbers)));
        }
        match keys {
            Some(keys) => division.divide_keys(&wanted, keys, 2 * multiprocessors),
            None => division.one_part_a_block(&wanted, head_blocks),
        }
        if let Some(bias) = bias {
            division.divide_bias(&wanted, bias, 2 * multiprocessors);
        }
        division.sum_g(&wanted);
        division
    }

    /// Room for so many f32.
    fn reserve(&mut self, count: usize) -> usize {
        let offset = self.workspace_bytes;
        self.workspace_bytes += (count * size_of::<f32>()).next_multiple_of(ALIGNMENT);
        offset
    }

    /// Tiles of keys, each with as many blocks as it takes to have `busy` of them in all.
    fn divide_keys(&mut self, wanted: &Wanted<'_>, keys: &Instance, busy: usize) {
        let problem = wanted.problem;
        let tiles = |n: usize, segment: &SegmentProblem| -> (usize, usize) {
            let (dk, dv) = (wanted.find(Gradient::K(n)), wanted.find(Gradient::V(n)));
            if dk.is_none() && dv.is_none() {
                return (0, 0);
            }
            // One batch entry stands for all if both keys and values, and what is wanted of them, are the same for all.
            let shared = |strides: &Strides<4>, gradient: &Option<(usize, &GradientProblem)>| {
                strides[0] == 0 && gradient.is_none_or(|(_, gradient)| gradient.extents[0] == 1)
            };
            let batch = if shared(&segment.k, &dk) && shared(&segment.v, &dv) { 1 } else { problem.batch };
            let heads = problem.heads / segment.group.max(1);
            (elements(&[batch, heads, segment.seq_kv.div_ceil(keys.block_kv)]), batch)
        };
        let all: usize = wanted.segments().map(|(n, segment)| tiles(n, segment).0).sum();
        for (n, segment) in wanted.segments() {
            let (tiles, key_batch) = tiles(n, segment);
            let mut divided = SegmentDivision { key_batch, ..SegmentDivision::default() };
            if tiles > 0 {
                let batches = if key_batch == 1 { problem.batch } else { 1 };
                let queries = elements(&[batches, segment.group, problem.seq_q.div_ceil(keys.block_q)]);
                divided.key_parts = busy.div_ceil(all).min(queries).max(1);
                divided.key_blocks = tiles * divided.key_parts;
            }
            self.key_rows(wanted, n, segment, &mut divided);
            self.segments.push(divided);
        }
    }

    /// Each block of queries has a part of the gradients of all keys of its head.
    fn one_part_a_block(&mut self, wanted: &Wanted<'_>, head_blocks: usize) {
        for (n, segment) in wanted.segments() {
            let key_parts = segment.group * head_blocks;
            let mut divided =
                SegmentDivision { key_batch: wanted.problem.batch, key_parts, ..SegmentDivision::default() };
            self.key_rows(wanted, n, segment, &mut divided);
            self.segments.push(divided);
        }
    }

    /// Where dk and dv of a segment go.
    fn key_rows(&mut self, wanted: &Wanted<'_>, n: usize, segment: &SegmentProblem, divided: &mut SegmentDivision) {
        divided.dk = self.rows(wanted, Gradient::K(n), segment, divided);
        divided.dv = self.rows(wanted, Gradient::V(n), segment, divided);
    }

    fn rows(
        &mut self,
        wanted: &Wanted<'_>,
        gradient: Gradient,
        segment: &SegmentProblem,
        divided: &SegmentDivision,
    ) -> Option<Rows> {
        let (number, gradient) = wanted.find(gradient)?;
        let (parts, key_batch) = (divided.key_parts, divided.key_batch);
        let [batch, _, heads, width] = gradient.extents;
        let seq_kv = segment.seq_kv;
        let [to_batch, to_seq, to_head, to_dim] = wide(gradient.strides);
        if parts == 1 && batch == key_batch {
            return Some(Rows { to: Place::Gradient(number), stride: [0, to_batch, to_seq, to_head] });
        }
        // [key_batch, parts, seq_kv, heads, width]; of a gradient that broadcasts, the batch entries are further parts.
        let [row, key] = [width, heads * width].map(|stride| stride as i64);
        let part = elements(&[seq_kv, heads, width]);
        let batch_stride = (parts * part) as i64;
        let offset = self.reserve(elements(&[key_batch, parts, part]));
        let folded = batch != key_batch;
        self.sums[0].push(Sum {
            parts: offset,
            extent: [batch, seq_kv, heads, width],
            parts_stride: [if folded { 0 } else { batch_stride }, key, row, 1],
            terms: [1, if folded { key_batch } else { 1 }, parts],
            parts_term_stride: [0, batch_stride, part as i64],
            to_stride: [to_batch, to_seq, to_head, to_dim],
            ..Sum::to(Place::Gradient(number))
        });
        Some(Rows { to: Place::Workspace(offset), stride: [part as i64, batch_stride, key, row] })
    }

    /// Tiles of each bias's own index space, each with as many blocks as it takes to have `busy` of them in all.
    fn divide_bias(&mut self, wanted: &Wanted<'_>, bias: &Instance, busy: usize) {
        let Problem { batch, seq_q, heads, .. } = *wanted.problem;
        let tiles = |extent: [usize; 4]| {
            elements(&[extent[0], extent[1], extent[2].div_ceil(bias.block_q), extent[3].div_ceil(bias.block_kv)])
        };
        let of = |n: usize| wanted.find(Gradient::Bias(n));
        let all: usize = wanted.segments().filter_map(|(n, ..)| of(n)).map(|(_, bias)| tiles(bias.extents)).sum();
        for (n, segment) in wanted.segments() {
            let Some((number, gradient)) = of(n) else { continue };
            let extent = gradient.extents;
            let each = |dim: usize, all: usize| if extent[dim] == 1 { all } else { 1 };
            let (queries, keys) = (seq_q.div_ceil(bias.block_q), segment.seq_kv.div_ceil(bias.block_kv));
            let units = elements(&[each(0, batch), each(1, heads), each(2, queries), each(3, keys)]);
            let parts = busy.div_ceil(all.max(1)).min(units).max(1);
            let to_stride = wide(gradient.strides);
            let count = elements(&extent);
            let (to, stride) = if parts == 1 {
                (Place::Gradient(number), to_stride)
            } else {
                let offset = self.reserve(elements(&[parts, count]));
                let dense = dense(extent);
                self.sums[0].push(Sum {
                    parts: offset,
                    extent,
                    parts_stride: dense,
                    terms: [1, 1, parts],
                    parts_term_stride: [0, 0, count as i64],
                    to_stride,
                    ..Sum::to(Place::Gradient(number))
                });
                (Place::Workspace(offset), dense)
            };
            let [b, h, i, j] = stride;
            let divided = &mut self.segments[n];
            divided.bias_parts = parts;
            divided.bias_blocks = tiles(extent) * parts;
            divided.dbias = Some(Bias { to, stride: [count as i64, b, h, i, j], extent });
        }
    }

    /// The gradients of gates and regions, from g (docs/math.md, equation 8).
    fn sum_g(&mut self, wanted: &Wanted<'_>) {
        let Problem { batch, seq_q, heads, .. } = *wanted.problem;
        let Some(statistics) = self.statistics else { return };
        let [of_batch, of_head] = [heads * seq_q, seq_q].map(|stride| stride as i64);
        for (number, gradient) in wanted.gradients.iter().enumerate() {
            let g = |branch: usize| {
                let rows = [(STATISTICS - 1) * wanted.problem.branches.len() + branch, batch, heads, seq_q];
                statistics + elements(&rows) * size_of::<f32>()
            };
            let [batches, head_count, ..] = gradient.extents;
            let kept = [batches == batch, head_count == heads];
            // Along what is kept an index, along what is summed a term.
            let index = |dim: usize, stride: i64| if kept[dim] { stride } else { 0 };
            let terms = [1, if kept[0] { 1 } else { batch }, if kept[1] { 1 } else { heads }];
            match gradient.gradient {
                Gradient::Gate(n) => {
                    let branch = &wanted.problem.branches[n];
                    let [to_batch, to_head, ..] = wide(gradient.strides);
                    let region = branch.region.map_or([0; 3], wide);
                    let over_queries = Sum {
                        parts: g(n),
                        factor: if branch.region.is_some() { Factor::Region(n) } else { Factor::One },
                        extent: [batch, heads, 1, 1],
                        parts_stride: [of_batch, of_head, 0, 0],
                        terms: [1, 1, seq_q],
                        parts_term_stride: [0, 0, 1],
                        factor_stride: [region[0], region[1], 0, 0],
                        factor_term_stride: [0, 0, region[2]],
                        to_stride: [to_batch, to_head, 0, 0],
                        together: true,
                        ..Sum::to(Place::Gradient(number))
                    };
                    if kept == [true, true] {
                        self.sums[0].push(over_queries);
                        continue;
                    }
                    let offset = self.reserve(elements(&[batch, heads]));
                    let dense = [heads as i64, 1];
                    let to_stride = [dense[0], dense[1], 0, 0];
                    self.sums[0].push(Sum { to: Place::Workspace(offset), to_stride, ..over_queries });
                    self.sums[1].push(Sum {
                        parts: offset,
                        extent: gradient.extents,
                        parts_stride: [index(0, dense[0]), index(1, dense[1]), 0, 0],
                        terms,
                        parts_term_stride: [0, dense[0], dense[1]],
                        to_stride: [to_batch, to_head, 0, 0],
                        ..Sum::to(Place::Gradient(number))
                    });
                }
                Gradient::Region(n) => {
                    let gate = match wanted.problem.branches[n].gate {
                        Gate::Tensor(strides) => wide(strides),
                        Gate::Scalar(_) => [0; 2],
                    };
                    self.sums[0].push(Sum {
                        parts: g(n),
                        factor: Factor::Gate(n),
                        extent: gradient.extents,
                        parts_stride: [index(0, of_batch), index(1, of_head), 1, 0],
                        terms,
                        parts_term_stride: [0, of_batch, of_head],
                        factor_stride: [index(0, gate[0]), index(1, gate[1]), 0, 0],
                        factor_term_stride: [0, gate[0], gate[1]],
                        to_stride: wide(gradient.strides),
                        ..Sum::to(Place::Gradient(number))
                    });
                }
                Gradient::Q | Gradient::K(_) | Gradient::V(_) | Gradient::Bias(_) => {}
            }
        }
    }
}

impl Sum {
    /// Of no part yet.
    fn to(to: Place) -> Sum {
        Sum {
            parts: 0,
            factor: Factor::One,
            to,
            extent: [1; 4],
            terms: [1; 3],
            parts_stride: [0; 4],
            parts_term_stride: [0; 3],
            factor_stride: [0; 4],
            factor_term_stride: [0; 3],
            to_stride: [0; 4],
            together: false,
        }
    }

    /// Blocks of `threads` threads that compute it.
    pub(crate) fn blocks(&self, threads: usize) -> usize {
        let count = elements(&self.extent);
        if self.together { count } else { count.div_ceil(threads) }
    }
}

/// The gradients asked for, to be found by name.
struct Wanted<'p> {
    problem: &'p Problem,
    gradients: &'p [GradientProblem],
}

impl<'p> Wanted<'p> {
    fn find(&self, gradient: Gradient) -> Option<(usize, &'p GradientProblem)> {
        self.gradients.iter().enumerate().find(|(_, wanted)| wanted.gradient == gradient)
    }

    /// Every segment with its number.
    fn segments(&self) -> impl Iterator<Item = (usize, &'p SegmentProblem)> + use<'p> {
        self.problem.segments().enumerate()
    }
}

fn wide<const N: usize>(strides: Strides<N>) -> [i64; N] {
    strides.map(|stride| stride as i64)
}

/// Strides of a dense array.
fn dense([_, b, c, d]: [usize; 4]) -> [i64; 4] {
    [b * c * d, c * d, d, 1].map(|stride| stride as i64)
}
