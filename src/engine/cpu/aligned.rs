//! Scratch that begins at a cache line, so that no register of it lies in two: a tenth of a product's time.

use super::element::Element;
use std::ops::{Deref, DerefMut};

/// Bytes of a cache line, and of the widest register.
const LINE: usize = 64;

/// A slice of elements, the first of them aligned.
#[derive(Default)]
pub(super) struct Aligned<E> {
    data: Vec<E>,
    start: usize,
    len: usize,
}

impl<E: Element> Aligned<E> {
    pub(super) fn zeroed(len: usize) -> Self {
        let elements = const { LINE / size_of::<E>() };
        // Of an allocation with room to spare, since those of a stricter alignment are not handed out zeroed.
        let data = vec![E::zeroed(); len + elements - 1];
        let past = data.as_ptr().addr() % LINE / size_of::<E>();
        Aligned { start: (elements - past) % elements, data, len }
    }
}

impl<E> Deref for Aligned<E> {
    type Target = [E];

    fn deref(&self) -> &[E] {
        &self.data[self.start..self.start + self.len]
    }
}

impl<E> DerefMut for Aligned<E> {
    fn deref_mut(&mut self) -> &mut [E] {
        &mut self.data[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::{Aligned, LINE};

    #[test]
    fn the_first_element_is_aligned_and_all_are_there() {
        for len in [0, 1, 100, 1 << 16] {
            let mut aligned = Aligned::<f32>::zeroed(len);
            assert_eq!((aligned.as_ptr().addr() % LINE, aligned.len()), (0, len));
            aligned.iter_mut().for_each(|x| *x += 1.0);
            assert!(aligned.iter().all(|&x| x == 1.0));
        }
    }
}
