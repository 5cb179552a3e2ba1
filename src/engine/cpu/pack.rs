//! From tensors to the layouts of tiles and back.

use super::convert::Convert;
use super::element::Holds;
use super::turn::turn;
use crate::plan::cpu::GROUP;

/// Row `row` of a tile in panels, `[ceil(width / GROUP), rows, GROUP]`; panels count elements.
pub(super) fn to_panels<T, E: Holds<T>>(from: &[T], row: usize, rows: usize, panels: &mut [E]) {
    for (panel, from) in from.chunks(GROUP * E::NUMBERS).enumerate() {
        let to = &mut panels[(panel * rows + row) * GROUP..][..GROUP];
        match from.get(..GROUP * E::NUMBERS) {
            // Of known length, so that it is copied without a call.
            Some(from) => E::along(from, to),
            None => E::along(from, &mut to[..from.len().div_ceil(E::NUMBERS)]),
        }
    }
}

/// Writes up to [`TURNED`] rows side by side, the first in the first lane of `[width, GROUP]`; widths count elements.
pub(super) fn to_lanes<'a, T: Convert, E: Holds<T>>(
    rows: impl Iterator<Item = &'a [T]>,
    lanes: &mut [E],
    width: usize,
) {
    let mut given: [&[T]; TURNED] = [&[]; TURNED];
    let count = given.iter_mut().zip(rows).map(|(given, row)| *given = row).count();
    // Arranged as f32 whatever they are: elements are as large, and none is computed with.
    let mut block = [[0f32; BLOCK]; TURNED];
    for n in 0..width.div_ceil(BLOCK) {
        for (row, block) in given.iter().zip(&mut block).take(count) {
            let (row, block): (_, &mut [E]) = (&row[n * BLOCK * E::NUMBERS..], bytemuck::cast_slice_mut(block));
            match row.get(..BLOCK * E::NUMBERS) {
                // Of known length, so that the compiler needs no loop.
                Some(row) => E::along(row, block),
                None => E::along(row, &mut block[..row.len().div_ceil(E::NUMBERS)]),
            }
        }
        let columns = BLOCK.min(width - n * BLOCK);
        let lanes = bytemuck::cast_slice_mut(&mut lanes[n * BLOCK * GROUP..]);
        turn((block.as_flattened(), BLOCK), (lanes, GROUP), [count, columns]);
    }
}

/// Writes up to [`GROUP`] rows of f32 that lie `from_stride` apart side by side, `[width, GROUP]`, and zeros where there are fewer.
pub(super) fn rows_to_lanes(from: &[f32], from_stride: usize, lanes: &mut [f32], [rows, width]: [usize; 2]) {
    if rows < GROUP {
        lanes.fill(0.0);
    }
    turn((from, from_stride), (lanes, GROUP), [rows, width]);
}

/// Rows `[rows, width]` from those that lie side by side in `[width, GROUP]`.
pub(super) fn from_lanes(lanes: &[f32], rows: &mut [f32], width: usize) {
    let count = rows.len() / width.max(1);
    turn((lanes, GROUP), (rows, width), [width, count]);
}

/// Rows that are turned at a time: few, so that all of a row is read while it is at hand, and the next ones are fetched meanwhile.
pub(super) const TURNED: usize = 8;

/// Columns that are turned at a time.
const BLOCK: usize = 64;

#[cfg(test)]
mod tests {
    use super::{TURNED, from_lanes, to_lanes};
    use crate::plan::cpu::GROUP;

    #[test]
    fn rows_go_to_lanes_and_back() {
        for (rows, width) in [(1, 1), (7, 16), (19, 40), (GROUP, 77)] {
            let tensor: Vec<f32> = (0..rows * width).map(|n| n as f32 + 1.0).collect();
            let mut lanes = vec![f32::NAN; width * GROUP + 1];
            for (first, tensor) in (0..).step_by(TURNED).zip(tensor.chunks(TURNED * width)) {
                to_lanes::<f32, f32>(tensor.chunks(width), &mut lanes[first..], width);
            }
            assert!(lanes.pop().is_some_and(f32::is_nan), "what lies behind is not written");
            for (at, &got) in lanes.iter().enumerate() {
                let (d, lane) = (at / GROUP, at % GROUP);
                if lane < rows {
                    assert_eq!(got, tensor[lane * width + d], "{rows} rows of {width}: lane {lane} of {d}");
                } else {
                    assert!(got.is_nan(), "{rows} rows of {width}: lane {lane} is of no row");
                }
            }
            let mut back = vec![f32::NAN; tensor.len()];
            from_lanes(&lanes, &mut back, width);
            assert_eq!(back, tensor);
        }
    }
}
