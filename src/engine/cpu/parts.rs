//! Results of parts of a branch's keys, and their sum.

use super::softmax::{Lanes, OnlineSoftmax};
use crate::plan::cpu::GROUP;

/// Numbers that one branch of a part takes: those of `o`, then maxima and denominators of each group.
pub(super) fn size(groups: usize, value_dim: usize) -> usize {
    groups * GROUP * (value_dim + 2)
}

/// Writes what a part left of one branch.
pub(super) fn save(o: &[f32], softmax: &[OnlineSoftmax], partial: &mut [f32]) {
    let (numbers, states) = partial.split_at_mut(o.len());
    numbers.copy_from_slice(o);
    for (state, softmax) in states.chunks_exact_mut(2 * GROUP).zip(softmax) {
        state[..GROUP].copy_from_slice(&softmax.max);
        state[GROUP..].copy_from_slice(&softmax.sum);
    }
}

/// The parts of one branch, in order.
pub(super) struct Partial<'a> {
    parts: Vec<(&'a [f32], &'a [f32])>,
    groups: usize,
}

impl<'a> Partial<'a> {
    /// Branch `n` of `branches` in the results of all `parts`.
    pub(super) fn of(partial: &'a [f32], parts: usize, branches: usize, n: usize, groups: usize) -> Self {
        let size = partial.len() / parts / branches;
        let of_branch = partial.chunks_exact(size).skip(n).step_by(branches);
        Partial { parts: of_branch.map(|part| part.split_at(size - 2 * GROUP * groups)).collect(), groups }
    }

    /// Adds up group `g`: its unnormalised result to `o`, its state returned.
    pub(super) fn merge(&self, g: usize, o: &mut [f32]) -> OnlineSoftmax {
        let states = || self.parts.iter().map(|(_, states)| states[g * 2 * GROUP..][..2 * GROUP].split_at(GROUP));
        let mut merged = OnlineSoftmax::EMPTY;
        for (max, _) in states() {
            merged.max.iter_mut().zip(max).for_each(|(merged, &max)| *merged = max.max(*merged));
        }
        o.fill(0.0);
        for ((max, sum), (numbers, _)) in states().zip(&self.parts) {
            let factor: Lanes = std::array::from_fn(|lane| match merged.max[lane] {
                // No part has seen a key, and a difference of infinities is no number.
                f32::NEG_INFINITY => 0.0,
                merged => (max[lane] - merged).exp(),
            });
            for (merged, (sum, factor)) in merged.sum.iter_mut().zip(sum.iter().zip(&factor)) {
                *merged += sum * factor;
            }
            let numbers = &numbers[g * numbers.len() / self.groups..][..o.len()];
            for (o, numbers) in o.chunks_exact_mut(GROUP).zip(numbers.chunks_exact(GROUP)) {
                o.iter_mut().zip(numbers.iter().zip(&factor)).for_each(|(o, (x, factor))| *o += x * factor);
            }
        }
        merged
    }
}
