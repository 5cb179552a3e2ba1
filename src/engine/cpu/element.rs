//! What the tiles of the forward are made of: f32, or pairs of bf16 where the processor multiplies those.

use super::convert::{Convert, widen};
use super::product::Product;
use bytemuck::Pod;
use pulp::Arch;

/// One element of a tile that a matrix product reads, as large as an f32.
pub(super) trait Element: Pod {
    /// Numbers in an element: neighbours along the sum of a product.
    const NUMBERS: usize;

    /// Computes a product whose extents have been checked.
    fn multiply(product: Product<'_, Self>);

    /// Probabilities `[keys, GROUP]` as the right matrix of a product that sums over the keys, in place.
    fn probabilities(p: &mut [f32]) -> &[Self];
}

/// How elements are made from a storage type.
pub(super) trait Holds<T>: Element {
    /// Converts a row whose numbers are summed over, with a zero behind it where its last element is not full.
    fn along(row: &[T], to: &mut [Self]);

    /// Converts rows of equal length that are summed over from one to the other: `row` and, where an element has two numbers,
    /// `next`, or zeros for it.
    fn across(row: &[T], next: Option<&[T]>, to: &mut [Self]);
}

impl Element for f32 {
    const NUMBERS: usize = 1;

    fn multiply(product: Product<'_, f32>) {
        Arch::new().dispatch(product);
    }

    fn probabilities(p: &mut [f32]) -> &[f32] {
        p
    }
}

impl<T: Convert> Holds<T> for f32 {
    #[inline(always)]
    fn along(row: &[T], to: &mut [f32]) {
        widen(row, to);
    }

    #[inline(always)]
    fn across(row: &[T], _: Option<&[T]>, to: &mut [f32]) {
        widen(row, to);
    }
}
