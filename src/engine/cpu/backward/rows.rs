//! What the passes must know of every query row of every branch: the softmax's state and `Δ`.

use crate::problem::{Problem, elements};

/// One query's row of one branch. The default stands for a row without keys or a branch that is not evaluated: all its
/// probabilities are 0.
///
/// What enters `P (dP - Δ)` is f64: where one key has nearly all the weight, `dP` and `Δ` cancel, and f32 would leave no
/// more digits than the naive computation has.
#[derive(Clone, Copy, Default)]
pub(super) struct Row {
    /// `P = exp(S - max) · factor`: the maximum and 1 / denominator, or a saved lse and 1.
    pub(super) max: f32,
    /// `gate · region`.
    pub(super) weight: f32,
    /// See `max`.
    pub(super) factor: f64,
    /// `Δ` of equation 9.
    pub(super) delta: f64,
    /// `dout · O` of equation 8; not there where it was not asked for.
    pub(super) dout_o: f64,
}

/// All rows, those of one block of queries together: `[batch, heads, blocks, branches, rows]`.
///
/// A task of the pass over the queries owns one block of it, whatever the number of branches.
pub(super) struct Rows {
    rows: Vec<Row>,
    block_q: usize,
    /// Rows of a block, less than `block_q` where no block is full.
    block_rows: usize,
    branches: usize,
    heads: usize,
    blocks: usize,
}

impl Rows {
    pub(super) fn new(problem: &Problem, block_q: usize) -> Self {
        let Problem { batch, heads, seq_q, .. } = *problem;
        let (branches, blocks, block_rows) = (problem.branches.len(), seq_q.div_ceil(block_q), block_q.min(seq_q));
        let rows = vec![Row::default(); elements(&[batch, heads, blocks, branches, block_rows])];
        Rows { rows, block_q, block_rows, branches, heads, blocks }
    }

    /// Batch entry, head and number of every block, and its rows, `[branches, rows]`.
    pub(super) fn blocks(&mut self) -> impl Iterator<Item = ([usize; 3], &mut [Row])> {
        let Rows { heads, blocks, .. } = *self;
        let size = (self.branches * self.block_rows).max(1);
        (self.rows.chunks_mut(size).enumerate())
            .map(move |(task, rows)| ([task / blocks / heads, task / blocks % heads, task % blocks], rows))
    }

    /// The rows of branch `n` of one block.
    pub(super) fn of(&self, n: usize, [b, h, block]: [usize; 3]) -> &[Row] {
        let start = (((b * self.heads + h) * self.blocks + block) * self.branches + n) * self.block_rows;
        &self.rows[start..][..self.block_rows]
    }

    /// One row.
    pub(super) fn get(&self, n: usize, [b, h, i]: [usize; 3]) -> &Row {
        &self.of(n, [b, h, i / self.block_q])[i % self.block_q]
    }
}
