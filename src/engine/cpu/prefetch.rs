//! Rows that are asked for while others are copied. The rows of one head lie far apart, where no processor guesses the next.

/// Rows between the one that is copied and the one that is asked for.
pub(super) const AHEAD: usize = 8;

/// Fetches the cache lines of `count` elements; a hint, which does nothing on other processors.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn lines<T>(start: *const T, count: usize) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    for byte in (0..count * size_of::<T>()).step_by(64) {
        // SAFETY: nothing is accessed, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(start.cast::<i8>().wrapping_add(byte)) };
    }
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn lines<T>(_: *const T, _: usize) {}
