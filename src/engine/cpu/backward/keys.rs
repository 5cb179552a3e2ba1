//! The pass over the keys of one segment: dk and dv, where the pass over the queries does not add them up.
//!
//! One task is a block of keys of one head, and all queries that read it or, where there are few blocks, a part of them.
//! Parts are added in order, and their number does not depend on the threads: neither do the bits of the result.

use super::key_sums::add_parts;
use super::rows::Rows;
use super::tiles::Tiles;
use super::{Pass, covered};
use crate::engine::cpu::aligned::Aligned;
use crate::engine::cpu::convert::Convert;
use crate::engine::cpu::logits::{Keys, Queries, row_mut};
use crate::engine::cpu::shared::Output;
use crate::plan::cpu::{padded, query_parts};
use crate::problem::elements;
use rayon::prelude::*;

/// What is asked of one segment; both gradients have the extents `[batch, seq_kv, kv_heads]`.
pub(super) struct Request<'a, T> {
    pub(super) branch: usize,
    /// Within the branch.
    pub(super) segment: usize,
    pub(super) extents: [usize; 3],
    pub(super) dk: Option<&'a Output<'a, T>>,
    pub(super) dv: Option<&'a Output<'a, T>>,
}

pub(super) fn run<T: Convert>(pass: &Pass<'_>, rows: &Rows, request: &Request<'_, T>) {
    let [batch, seq_kv, kv_heads] = request.extents;
    let group = pass.problem.branches[request.branch].segments[request.segment].group;
    let work = Work {
        pass,
        rows,
        request,
        tiles: seq_kv.div_ceil(pass.block_kv),
        group,
        blocks: pass.problem.seq_q.div_ceil(pass.block_q),
    };
    let tasks = elements(&[batch, kv_heads, work.tiles]);
    if tasks == 0 {
        return;
    }
    let parts = query_parts(tasks, elements(&[pass.problem.batch / batch.max(1), group, work.blocks]));
    let size = pass.block_kv.min(seq_kv) * (work.dk_width() + work.dv_width());
    if parts == 1 {
        (0..tasks).into_par_iter().for_each_init(
            || (Tiles::new(pass), Aligned::zeroed(size)),
            |(tiles, sums), task| {
                sums.fill(0.0);
                work.add(tiles, task, 0..work.blocks_of(task), sums);
                work.store(task, sums);
            },
        );
        return;
    }
    let mut partial = Aligned::zeroed(tasks * parts * size);
    partial.par_chunks_mut(size).enumerate().for_each_init(
        || Tiles::new(pass),
        |tiles, (index, sums)| {
            let (task, part) = (index / parts, index % parts);
            let blocks = work.blocks_of(task);
            work.add(tiles, task, part * blocks / parts..(part + 1) * blocks / parts, sums);
        },
    );
    partial.par_chunks_mut(parts * size).enumerate().for_each(|(task, partial)| {
        work.store(task, add_parts(partial, size));
    });
}

struct Work<'a, T> {
    pass: &'a Pass<'a>,
    rows: &'a Rows,
    request: &'a Request<'a, T>,
    /// Blocks of keys of one head.
    tiles: usize,
    /// Query heads per head of keys.
    group: usize,
    /// Blocks of queries of one head.
    blocks: usize,
}

impl<T: Convert> Work<'_, T> {
    fn dk_width(&self) -> usize {
        if self.request.dk.is_some() { padded(self.pass.problem.head_dim) } else { 0 }
    }

    fn dv_width(&self) -> usize {
        if self.request.dv.is_some() { padded(self.pass.problem.value_dim) } else { 0 }
    }

    /// Batch entry and head of the gradients, and first key.
    fn place(&self, task: usize) -> [usize; 3] {
        let kv_heads = self.request.extents[2];
        [task / self.tiles / kv_heads, task / self.tiles % kv_heads, task % self.tiles * self.pass.block_kv]
    }

    /// Blocks of queries that read a task's keys, of all batch entries and heads that do.
    fn blocks_of(&self, task: usize) -> usize {
        let [entry, ..] = self.place(task);
        elements(&[covered(self.request.extents[0], self.pass.problem.batch, entry).len(), self.group, self.blocks])
    }

    /// Adds what some of these blocks contribute to `sums`, dk and behind it dv.
    fn add(&self, tiles: &mut Tiles, task: usize, blocks: std::ops::Range<usize>, sums: &mut [f32]) {
        let Work { pass, rows, request, group, .. } = *self;
        let [entry, kv_head, start] = self.place(task);
        let entries = covered(request.extents[0], pass.problem.batch, entry);
        let branch = &pass.inputs.branches[request.branch];
        let (segment, bound) =
            (&pass.problem.branches[request.branch].segments[request.segment], &branch.segments[request.segment]);
        let number = pass.problem.branches[request.branch].first_segment + request.segment;
        let rows_of_tile = pass.block_kv.min(segment.seq_kv);
        let (dk, dv) = sums.split_at_mut(rows_of_tile * self.dk_width());
        let values = request.dk.is_some();

        for index in blocks {
            let (b, h) = (entries.start + index / self.blocks / group, kv_head * group + index / self.blocks % group);
            let block = index % self.blocks;
            if branch.gate(b, h) == 0.0 {
                continue;
            }
            let queries = Queries::block(pass.problem, [b, h, block], pass.block_q);
            let Some(keys) = Keys::seen(&queries, (number, segment, bound), start, pass.block_kv) else {
                continue;
            };
            tiles.load_keys::<T>(pass, &keys, values);
            let rows = &rows.of(request.branch, [b, h, block])[..queries.rows];
            tiles.load_queries::<T>(pass, &queries);
            tiles.products::<T>(&queries, &keys, values);
            tiles.differentiate(rows, (&queries, &keys), false, values);
            if request.dv.is_some() {
                tiles.add_dv(dv, &queries, &keys);
            }
            if request.dk.is_some() {
                tiles.through_the_cap(&queries, &keys);
                tiles.add_dk(dk, &queries, &keys);
            }
        }
    }

    /// Rounds the sums of one block of keys to the gradients.
    fn store(&self, task: usize, sums: &mut [f32]) {
        let Work { pass, request, .. } = *self;
        let [entry, kv_head, start] = self.place(task);
        let rows = pass.block_kv.min(request.extents[1] - start);
        let (dk, dv) = sums.split_at_mut(pass.block_kv.min(request.extents[1]) * self.dk_width());
        for c in 0..rows {
            let index = [entry, start + c, kv_head, 0];
            if let Some(output) = request.dk {
                let dk = &mut row_mut(dk, c, self.dk_width())[..pass.problem.head_dim];
                dk.iter_mut().for_each(|dk| *dk *= pass.problem.softmax_scale);
                // SAFETY: tasks partition (entry, kv_head, start..start + rows), and each is stored once.
                unsafe { output.store(index, dk) };
            }
            if let Some(output) = request.dv {
                // SAFETY: as above.
                unsafe { output.store(index, &row_mut(dv, c, self.dv_width())[..pass.problem.value_dim]) };
            }
        }
    }
}
