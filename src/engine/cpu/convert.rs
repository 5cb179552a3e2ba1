//! Registers of f32 from elements of a storage type, and back.

use crate::plan::cpu::GROUP;
use crate::problem::{DType, Float};
#[cfg(not(target_arch = "x86_64"))]
use half::{bf16, f16};
use pulp::{Arch, Simd, WithSimd};

/// A storage type whose elements become a register of f32, and the other way round.
pub(super) trait Convert: Float {
    /// Runs an operation that calls [`Convert::load`] or [`Convert::store`], compiled for the widest registers there are.
    fn dispatch<O: WithSimd>(operation: O) -> O::Output {
        Arch::new().dispatch(operation)
    }

    /// The register of the elements behind `from`, exactly.
    ///
    /// # Safety
    /// `S::F32_LANES` elements are there to read, and [`Convert::dispatch`] runs the operation.
    unsafe fn load<S: Simd>(simd: S, from: *const Self) -> S::f32s;

    /// Writes each lane's nearest element, ties to even.
    ///
    /// # Safety
    /// `S::F32_LANES` elements are there to write, and [`Convert::dispatch`] runs the operation.
    unsafe fn store<S: Simd>(simd: S, register: S::f32s, to: *mut Self);
}

/// Whether a row of `T` is converted by registers: not where it is copied, or registers have no conversion of their own.
const fn by_registers<T: Convert>() -> bool {
    cfg!(target_arch = "x86_64") && !matches!(T::DTYPE, DType::F32)
}

/// [`Float::widen`].
#[inline]
pub(super) fn widen<T: Convert>(from: &[T], to: &mut [f32]) {
    assert_eq!(from.len(), to.len());
    if by_registers::<T>() {
        T::dispatch(WidenRow(from, to));
    } else {
        T::widen(from, to);
    }
}

/// [`Float::narrow`].
#[inline]
pub(super) fn narrow<T: Convert>(from: &[f32], to: &mut [T]) {
    assert_eq!(from.len(), to.len());
    if by_registers::<T>() {
        T::dispatch(NarrowRow(from, to));
    } else {
        T::narrow(from, to);
    }
}

struct WidenRow<'a, T>(&'a [T], &'a mut [f32]);

struct NarrowRow<'a, T>(&'a [f32], &'a mut [T]);

impl<T: Convert> WithSimd for WidenRow<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (whole, rest) = S::as_mut_simd_f32s(self.1);
        let mut from = self.0.chunks_exact(S::F32_LANES);
        for (to, from) in whole.iter_mut().zip(&mut from) {
            // SAFETY: a chunk has as many elements; `dispatch` runs this.
            *to = unsafe { T::load(simd, from.as_ptr()) };
        }
        T::widen(from.remainder(), rest);
    }
}

impl<T: Convert> WithSimd for NarrowRow<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (whole, rest) = S::as_simd_f32s(self.0);
        let mut to = self.1.chunks_exact_mut(S::F32_LANES);
        for (&from, to) in whole.iter().zip(&mut to) {
            // SAFETY: a chunk has as many elements; `dispatch` runs this.
            unsafe { T::store(simd, from, to.as_mut_ptr()) };
        }
        T::narrow(rest, to.into_remainder());
    }
}

/// The register of fewer elements than it has lanes, zeros behind them.
#[inline(always)]
pub(super) fn load_part<T: Float, S: Simd>(from: &[T]) -> S::f32s {
    let mut block = [0.0; LANES];
    T::widen(from, &mut block[..from.len()]);
    S::as_simd_f32s(&block).0[0]
}

/// Lanes of the widest register.
const LANES: usize = GROUP / 2;

impl Convert for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(_: S, from: *const f32) -> S::f32s {
        // SAFETY: the caller's promise; a register is `F32_LANES` floats, read wherever they lie.
        unsafe { from.cast::<S::f32s>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(_: S, register: S::f32s, to: *mut f32) {
        // SAFETY: as above.
        unsafe { to.cast::<S::f32s>().write_unaligned(register) }
    }
}

/// A register through [`Float::widen`], for processors without a line of their own below.
///
/// # Safety
/// `S::F32_LANES` elements are there to read.
#[inline(always)]
unsafe fn load_any<T: Float, S: Simd>(from: *const T) -> S::f32s {
    // SAFETY: the caller's promise.
    load_part::<T, S>(unsafe { std::slice::from_raw_parts(from, S::F32_LANES) })
}

/// The way back, through [`Float::narrow`].
///
/// # Safety
/// `S::F32_LANES` elements are there to write, and nothing else refers to them.
#[inline(always)]
unsafe fn store_any<T: Float, S: Simd>(register: S::f32s, to: *mut T) {
    // SAFETY: the caller's promise.
    T::narrow(bytemuck::cast_slice(&[register]), unsafe { std::slice::from_raw_parts_mut(to, S::F32_LANES) });
}

/// Types without a line of their own.
#[cfg(not(target_arch = "x86_64"))]
macro_rules! any {
    ($($ty:ident),*) => {$(
        impl Convert for $ty {
            #[inline(always)]
            unsafe fn load<S: Simd>(_: S, from: *const $ty) -> S::f32s {
                // SAFETY: the caller's promise.
                unsafe { load_any::<$ty, S>(from) }
            }

            #[inline(always)]
            unsafe fn store<S: Simd>(_: S, register: S::f32s, to: *mut $ty) {
                // SAFETY: the caller's promise.
                unsafe { store_any::<$ty, S>(register, to) }
            }
        }
    )*};
}
#[cfg(not(target_arch = "x86_64"))]
any!(f16, bf16);

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Convert, load_any, store_any};
    use half::{bf16, f16};
    use pulp::x86::{V3, V4};
    use pulp::{Arch, Scalar, Simd, WithSimd};
    use std::any::TypeId;
    use std::arch::x86_64::*;

    /// Whether `S` is `V`, which the compiler knows.
    #[inline(always)]
    fn is<S: Simd, V: Simd>() -> bool {
        TypeId::of::<S>() == TypeId::of::<V>()
    }

    impl Convert for bf16 {
        #[inline(always)]
        unsafe fn load<S: Simd>(_: S, from: *const bf16) -> S::f32s {
            // SAFETY: the caller's promise; a value of `V3` or `V4` is the proof of AVX2 or AVX-512, and `S::f32s` the register
            // of its name.
            unsafe {
                if is::<S, V4>() {
                    let bits = _mm512_cvtepu16_epi32(from.cast::<__m256i>().read_unaligned());
                    std::mem::transmute_copy(&_mm512_slli_epi32::<16>(bits))
                } else if is::<S, V3>() {
                    let bits = _mm256_cvtepu16_epi32(from.cast::<__m128i>().read_unaligned());
                    std::mem::transmute_copy(&_mm256_slli_epi32::<16>(bits))
                } else {
                    load_any::<bf16, S>(from)
                }
            }
        }

        #[inline(always)]
        unsafe fn store<S: Simd>(_: S, register: S::f32s, to: *mut bf16) {
            // To the upper half, whose last bit decides a tie. Of NaN the payload's first bit is set, which says that it is quiet.
            const HALF: i32 = 0x7fff;
            const QUIET: i32 = 0x40_0000;
            // SAFETY: as above.
            unsafe {
                if is::<S, V4>() {
                    let x: __m512 = std::mem::transmute_copy(&register);
                    let bits = _mm512_castps_si512(x);
                    let last = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                    let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(HALF)), last);
                    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
                    let all = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(QUIET));
                    to.cast::<__m256i>().write_unaligned(_mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(all)));
                } else if is::<S, V3>() {
                    let x: __m256 = std::mem::transmute_copy(&register);
                    let bits = _mm256_castps_si256(x);
                    let last = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                    let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(HALF)), last);
                    let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(QUIET));
                    let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
                    let all = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan));
                    // In each half of the register twice, of which the first and the third quarter are taken.
                    let packed = _mm256_permute4x64_epi64::<0b10_00>(_mm256_packus_epi32(all, all));
                    to.cast::<__m128i>().write_unaligned(_mm256_castsi256_si128(packed));
                } else {
                    store_any::<bf16, S>(register, to);
                }
            }
        }
    }

    impl Convert for f16 {
        fn dispatch<O: WithSimd>(operation: O) -> O::Output {
            match Arch::new() {
                // SAFETY: the features are there.
                Arch::V3(simd) if is_x86_feature_detected!("f16c") => unsafe { with_f16c(simd, operation) },
                Arch::V3(_) => operation.with_simd(Scalar),
                other => other.dispatch(operation),
            }
        }

        #[inline(always)]
        unsafe fn load<S: Simd>(_: S, from: *const f16) -> S::f32s {
            // SAFETY: as above; with `V3` there is F16C as well, or `dispatch` takes no vectors.
            unsafe {
                if is::<S, V4>() {
                    std::mem::transmute_copy(&_mm512_cvtph_ps(from.cast::<__m256i>().read_unaligned()))
                } else if is::<S, V3>() {
                    std::mem::transmute_copy(&_mm256_cvtph_ps(from.cast::<__m128i>().read_unaligned()))
                } else {
                    load_any::<f16, S>(from)
                }
            }
        }

        #[inline(always)]
        unsafe fn store<S: Simd>(_: S, register: S::f32s, to: *mut f16) {
            // SAFETY: as above.
            unsafe {
                if is::<S, V4>() {
                    to.cast::<__m256i>().write_unaligned(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(
                        std::mem::transmute_copy(&register),
                    ));
                } else if is::<S, V3>() {
                    to.cast::<__m128i>().write_unaligned(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(
                        std::mem::transmute_copy(&register),
                    ));
                } else {
                    store_any::<f16, S>(register, to);
                }
            }
        }
    }

    /// As `V3::vectorize`, which knows no conversion of f16.
    #[target_feature(enable = "avx,avx2,bmi1,bmi2,fma,lzcnt,popcnt,f16c")]
    fn with_f16c<O: WithSimd>(simd: V3, operation: O) -> O::Output {
        operation.with_simd(simd)
    }
}

#[cfg(test)]
mod tests {
    use super::{Convert, LANES, NarrowRow, WidenRow, load_part};
    use half::{bf16, f16};
    use pulp::{Simd, WithSimd};

    /// Every number of 16 bits to f32 and back, and numbers between them, with ends of every length.
    fn check<T: Convert>(of_bits: impl Fn(u16) -> T, bits: impl Fn(T) -> u16) {
        let all: Vec<T> = (0..=u16::MAX).map(of_bits).collect();
        let mut wide = vec![f32::NAN; all.len()];
        for (from, to) in all.chunks(1021).zip(wide.chunks_mut(1021)) {
            T::dispatch(WidenRow(from, to));
        }
        for (&got, from) in wide.iter().zip(&all) {
            let want = from.to_f32();
            assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{got} for {want}");
        }
        // Of neighbours the middle, and what is next to it on both sides.
        let between = wide.windows(2).flat_map(|pair| {
            let middle = pair[0] / 2.0 + pair[1] / 2.0;
            [-1, 0, 1].map(|step: i32| f32::from_bits(middle.to_bits().wrapping_add_signed(step)))
        });
        let wide: Vec<f32> = between.chain(wide.iter().copied()).collect();
        let mut got = vec![all[1]; wide.len()];
        for (from, to) in wide.chunks(1019).zip(got.chunks_mut(1019)) {
            T::dispatch(NarrowRow(from, to));
        }
        let mut want = got.clone();
        T::narrow(&wide, &mut want);
        for ((&got, &want), wide) in got.iter().zip(&want).zip(&wide) {
            let same = bits(got) == bits(want) || got.to_f32().is_nan() && want.to_f32().is_nan();
            assert!(same, "{:?} for {wide}, not {:?}", got.to_f32(), want.to_f32());
        }
    }

    #[test]
    fn every_half_is_its_f32_and_every_f32_the_nearest_half() {
        check(f16::from_bits, f16::to_bits);
        check(bf16::from_bits, bf16::to_bits);
    }

    #[test]
    fn behind_a_part_are_zeros() {
        struct Part;
        impl WithSimd for Part {
            type Output = ();
            #[inline(always)]
            fn with_simd<S: Simd>(self, _: S) {
                for count in 0..S::F32_LANES {
                    let from = vec![bf16::from_f32(3.0); count];
                    let mut register = [f32::NAN; LANES];
                    S::as_mut_simd_f32s(&mut register).0[0] = load_part::<bf16, S>(&from);
                    for (lane, x) in register[..S::F32_LANES].iter().enumerate() {
                        assert_eq!(*x, if lane < count { 3.0 } else { 0.0 });
                    }
                }
            }
        }
        bf16::dispatch(Part);
    }
}
