//! Tiles of keys and values that stay converted while blocks of queries come back to them.

use super::aligned::Aligned;
use super::element::Element;
use super::logits::Keys;
use crate::plan::cpu::KeptTiles;
use crate::problem::Problem;

/// What is in a place: number of the segment, batch entry, head, first key and number of keys, and whether values are too.
type Content = ([usize; 5], bool);

/// The tiles of one thread. Each tile of the heads in work has a place of its own; where there are not so many, the last ones
/// share one.
pub(super) struct Kept<E> {
    /// `[places, k + v]`: one allocation, for the allocator to keep.
    tiles: Aligned<E>,
    /// Elements of a tile's keys and of its values.
    sizes: [usize; 2],
    content: Vec<Content>,
    block_kv: usize,
    /// Of every segment the place of its first tile, and how many heads of keys have places.
    segments: Vec<[usize; 2]>,
}

impl<E: Element> Kept<E> {
    /// `sizes` are the elements of a tile's keys and of its values.
    pub(super) fn new(problem: &Problem, block_kv: usize, kept: &KeptTiles, sizes: [usize; 2]) -> Self {
        let mut first = 0;
        let segments = problem.segments().map(|segment| {
            let (before, heads) = (first, kept.heads_of(segment));
            first += heads * segment.seq_kv.div_ceil(block_kv);
            [before, heads]
        });
        Kept {
            segments: segments.collect(),
            tiles: Aligned::zeroed(kept.tiles * (sizes[0] + sizes[1])),
            sizes,
            content: vec![([usize::MAX; 5], false); kept.tiles],
            block_kv,
        }
    }

    /// The place of a tile, and what of it is there: keys, values.
    pub(super) fn find(&self, keys: &Keys<'_>) -> (usize, [bool; 2]) {
        let [first, heads] = self.segments[keys.number];
        let tiles = keys.segment.seq_kv.div_ceil(self.block_kv);
        let place = first + keys.head % heads * tiles + keys.start / self.block_kv;
        let place = place.min(self.content.len() - 1);
        let (content, values) = self.content[place];
        let there = content == content_of(keys);
        (place, [there, there && values])
    }

    /// The tile of a place, to be filled.
    pub(super) fn fill(&mut self, place: usize, keys: &Keys<'_>, values: bool) -> [&mut [E]; 2] {
        self.content[place] = (content_of(keys), values);
        let [k, v] = self.sizes;
        let (k, v) = self.tiles[place * (k + v)..][..k + v].split_at_mut(k);
        [k, v]
    }

    /// Keys and values of a place.
    pub(super) fn tile(&self, place: usize) -> [&[E]; 2] {
        let [k, v] = self.sizes;
        let (k, v) = self.tiles[place * (k + v)..][..k + v].split_at(k);
        [k, v]
    }

    /// The tiles of the same keys of all heads in work, to be filled with keys and values.
    pub(super) fn fill_beside<'a>(
        &mut self,
        keys: &Keys<'a>,
        kv_heads: usize,
    ) -> impl Iterator<Item = (Keys<'a>, [&mut [E]; 2])> {
        let (keys, [_, heads], [k, v]) = (*keys, self.segments[keys.number], self.sizes);
        let first = Keys { head: keys.head - keys.head % heads, ..keys };
        let (place, step) = (self.find(&first).0, keys.segment.seq_kv.div_ceil(self.block_kv));
        let tiles = self.tiles.chunks_exact_mut(k + v).zip(&mut self.content).skip(place).step_by(step);
        (first.head..kv_heads.min(first.head + heads)).zip(tiles).map(move |(head, (tile, content))| {
            let keys = Keys { head, ..keys };
            *content = (content_of(&keys), true);
            (keys, tile.split_at_mut(k).into())
        })
    }
}

fn content_of(keys: &Keys<'_>) -> [usize; 5] {
    [keys.number, keys.b, keys.head, keys.start, keys.columns]
}
