//! Rows to columns.

/// `to[c, r] = from[r, c]`, whose rows are `to_stride` and `from_stride` apart.
pub(super) fn turn(
    (from, from_stride): (&[f32], usize),
    (to, to_stride): (&mut [f32], usize),
    [rows, columns]: [usize; 2],
) {
    if rows == 0 || columns == 0 {
        return;
    }
    assert!(columns <= from_stride && (rows - 1) * from_stride + columns <= from.len());
    assert!(rows <= to_stride && (columns - 1) * to_stride + rows <= to.len());
    // SAFETY: both have all their rows and columns, as asserted.
    unsafe { turn_raw((from.as_ptr(), from_stride), (to.as_mut_ptr(), to_stride), [rows, columns]) }
}

/// The same of matrices between whose rows something else may lie.
///
/// # Safety
/// All rows and columns of `from` may be read, all of `to` written, and no other thread does so meanwhile.
pub(super) unsafe fn turn_raw(
    (from, from_stride): (*const f32, usize),
    (to, to_stride): (*mut f32, usize),
    [rows, columns]: [usize; 2],
) {
    #[cfg(target_arch = "x86_64")]
    let [rows_done, columns_done] = if is_x86_feature_detected!("avx") {
        // SAFETY: the feature is there; the caller's promise.
        unsafe { x86::blocks((from, from_stride), (to, to_stride), [rows, columns]) }
    } else {
        [0, 0]
    };
    #[cfg(not(target_arch = "x86_64"))]
    let [rows_done, columns_done] = [0, 0];
    for r in 0..rows {
        for c in if r < rows_done { columns_done } else { 0 }..columns {
            // SAFETY: the caller's promise.
            unsafe { *to.add(c * to_stride + r) = *from.add(r * from_stride + c) };
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// Turns blocks of 8 × 8; returns how many rows and columns they are.
    ///
    /// # Safety
    /// Both matrices have all their rows and columns.
    #[target_feature(enable = "avx")]
    pub(super) unsafe fn blocks(
        (from, from_stride): (*const f32, usize),
        (to, to_stride): (*mut f32, usize),
        [rows, columns]: [usize; 2],
    ) -> [usize; 2] {
        for c in 0..columns / 8 {
            for r in 0..rows / 8 {
                // SAFETY: the caller's promise; the block is within both.
                unsafe {
                    let from = from.add(r * 8 * from_stride + c * 8);
                    let rows = std::array::from_fn(|i| _mm256_loadu_ps(from.add(i * from_stride)));
                    let to = to.add(c * 8 * to_stride + r * 8);
                    for (i, column) in turned(rows).into_iter().enumerate() {
                        _mm256_storeu_ps(to.add(i * to_stride), column);
                    }
                }
            }
        }
        [rows / 8 * 8, columns / 8 * 8]
    }

    /// Pairs of numbers, then of pairs, then of halves of registers.
    #[inline]
    #[target_feature(enable = "avx")]
    fn turned(r: [__m256; 8]) -> [__m256; 8] {
        let low = |a, b| _mm256_unpacklo_ps(r[a], r[b]);
        let high = |a, b| _mm256_unpackhi_ps(r[a], r[b]);
        let pairs = [low(0, 1), high(0, 1), low(2, 3), high(2, 3), low(4, 5), high(4, 5), low(6, 7), high(6, 7)];
        let first = |a: usize| _mm256_shuffle_ps::<0b01_00_01_00>(pairs[a], pairs[a + 2]);
        let second = |a: usize| _mm256_shuffle_ps::<0b11_10_11_10>(pairs[a], pairs[a + 2]);
        let fours = [first(0), second(0), first(1), second(1), first(4), second(4), first(5), second(5)];
        let lower = |a: usize| _mm256_permute2f128_ps::<0x20>(fours[a], fours[a + 4]);
        let upper = |a: usize| _mm256_permute2f128_ps::<0x31>(fours[a], fours[a + 4]);
        [lower(0), lower(1), lower(2), lower(3), upper(0), upper(1), upper(2), upper(3)]
    }
}

#[cfg(test)]
mod tests {
    use super::turn;

    #[test]
    fn every_number_comes_to_its_place_and_no_other() {
        for (rows, columns) in [(1, 1), (8, 8), (7, 16), (19, 40), (32, 77), (0, 3), (3, 0)] {
            let (from_stride, to_stride) = (columns + 2, rows + 3);
            let from: Vec<f32> = (0..(rows + 1) * from_stride).map(|n| n as f32).collect();
            let mut to = vec![f32::NAN; (columns + 1) * to_stride];
            turn((&from, from_stride), (&mut to, to_stride), [rows, columns]);
            for (n, &x) in to.iter().enumerate() {
                let (c, r) = (n / to_stride, n % to_stride);
                if c < columns && r < rows {
                    assert_eq!(x, from[r * from_stride + c], "{rows} × {columns}: row {r}, column {c}");
                } else {
                    assert!(x.is_nan(), "{rows} × {columns}: {x} at row {r}, column {c}");
                }
            }
        }
    }
}
