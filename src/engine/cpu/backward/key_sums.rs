//! dk and dv of one unit of heads, as the pass over the queries adds them up (src/plan/cpu.rs).

use super::{Pass, Wanted};
use crate::engine::cpu::convert::Convert;
use crate::plan::cpu::{KeySums, QueryPass};
use crate::problem::Gradient;

/// Adds up parts of so many numbers, in order, in the first.
pub(super) fn add_parts(partial: &mut [f32], numbers: usize) -> &mut [f32] {
    let (sums, others) = partial.split_at_mut(numbers);
    for other in others.chunks(numbers) {
        sums.iter_mut().zip(other).for_each(|(sum, other)| *sum += other);
    }
    sums
}

/// Rounds the sums of one unit to the gradients.
pub(super) fn store<T: Convert>(
    pass: &Pass<'_>,
    division: &QueryPass,
    unit: usize,
    numbers: &mut [f32],
    wanted: &Wanted<'_, T>,
) {
    let problem = pass.problem;
    for sums in &division.sums {
        let (_, output) = wanted.find(sums.gradient).expect("what is added up is wanted");
        let KeySums { offset, entries, kv_heads, seq_kv, width, .. } = *sums;
        let (columns, scale) = match sums.gradient {
            Gradient::K(_) => (problem.head_dim, problem.softmax_scale),
            _ => (problem.value_dim, 1.0),
        };
        let [first_entry, first_head] = division.first_of(unit, sums);
        let rows = numbers[offset..][..entries * kv_heads * seq_kv * width].chunks_mut(width);
        for (index, row) in rows.enumerate() {
            let row = &mut row[..columns];
            row.iter_mut().for_each(|x| *x *= scale);
            let [entry, head, c] = [index / seq_kv / kv_heads, index / seq_kv % kv_heads, index % seq_kv];
            // SAFETY: units partition entries and heads of the gradient, and each is stored once.
            unsafe { output.store([first_entry + entry, c, first_head + head, 0], row) };
        }
    }
}
