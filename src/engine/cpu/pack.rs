//! From tensors to the layouts of tiles, in f32, and back.

use crate::plan::cpu::GROUP;
use crate::problem::Float;

/// Row `row` of a tile in panels, `[ceil(width / GROUP), rows, GROUP]`.
pub(super) fn to_panels<T: Float>(from: &[T], row: usize, rows: usize, panels: &mut [f32]) {
    let (whole, rest) = from.as_chunks::<GROUP>();
    for (panel, from) in whole.iter().enumerate() {
        T::widen(from, &mut panels[(panel * rows + row) * GROUP..][..GROUP]);
    }
    if !rest.is_empty() {
        T::widen(rest, &mut panels[(whole.len() * rows + row) * GROUP..][..rest.len()]);
    }
}

/// Writes up to [`GROUP`] rows side by side, `[width, GROUP]` with `stride` between its rows, and zeros where there are
/// fewer.
pub(super) fn to_lanes<'a, T: Float>(
    rows: impl Iterator<Item = &'a [T]>,
    lanes: &mut [f32],
    width: usize,
    stride: usize,
) {
    let mut given: [&[T]; GROUP] = [&[]; GROUP];
    let count = given.iter_mut().zip(rows).map(|(given, row)| *given = row).count();
    let mut block = [[0.0; BLOCK]; GROUP];
    for n in 0..width.div_ceil(BLOCK) {
        for (row, block) in given.iter().zip(&mut block).take(count) {
            match row[n * BLOCK..].first_chunk::<BLOCK>() {
                // The compiler makes one register's load and store of it.
                Some(row) => T::widen(row, block),
                None => T::widen(&row[n * BLOCK..], &mut block[..row.len() - n * BLOCK]),
            }
        }
        for (d, lanes) in lanes.chunks_mut(stride).skip(n * BLOCK).take(BLOCK.min(width - n * BLOCK)).enumerate() {
            let turned: [f32; GROUP] = std::array::from_fn(|lane| block[lane][d]);
            lanes[..GROUP].copy_from_slice(&turned);
        }
    }
}

/// The row of lane `lane` of `[width, GROUP]`.
pub(super) fn from_lanes(lanes: &[f32], lane: usize, row: &mut [f32]) {
    for (x, lanes) in row.iter_mut().zip(lanes.chunks_exact(GROUP)) {
        *x = lanes[lane];
    }
}

/// Columns that are turned at a time.
const BLOCK: usize = 16;
