//! Registers of f32 from elements of a storage type, converted where they are used.

use crate::plan::cpu::GROUP;
use crate::problem::Float;
#[cfg(not(target_arch = "x86_64"))]
use half::{bf16, f16};
use pulp::{Arch, Simd, WithSimd};

/// A storage type whose elements become a register of f32.
pub(super) trait Widen: Float {
    /// Runs an operation that calls [`Widen::load`], compiled for the widest registers there are.
    fn dispatch<O: WithSimd>(operation: O) -> O::Output {
        Arch::new().dispatch(operation)
    }

    /// The register of the elements behind `from`, exactly.
    ///
    /// # Safety
    /// `S::F32_LANES` elements are there to read, and [`Widen::dispatch`] runs the operation.
    unsafe fn load<S: Simd>(simd: S, from: *const Self) -> S::f32s;
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

impl Widen for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(_: S, from: *const f32) -> S::f32s {
        // SAFETY: the caller's promise; a register is `F32_LANES` floats, read wherever they lie.
        unsafe { from.cast::<S::f32s>().read_unaligned() }
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

#[cfg(not(target_arch = "x86_64"))]
impl Widen for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(_: S, from: *const f16) -> S::f32s {
        // SAFETY: the caller's promise.
        unsafe { load_any::<f16, S>(from) }
    }
}

#[cfg(not(target_arch = "x86_64"))]
impl Widen for bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(_: S, from: *const bf16) -> S::f32s {
        // SAFETY: the caller's promise.
        unsafe { load_any::<bf16, S>(from) }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Widen, load_any};
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

    impl Widen for bf16 {
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
    }

    impl Widen for f16 {
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
    }

    /// As `V3::vectorize`, which knows no conversion of f16.
    #[target_feature(enable = "avx,avx2,bmi1,bmi2,fma,lzcnt,popcnt,f16c")]
    fn with_f16c<O: WithSimd>(simd: V3, operation: O) -> O::Output {
        operation.with_simd(simd)
    }
}

#[cfg(test)]
mod tests {
    use super::{LANES, Widen, load_part};
    use crate::engine::cpu::softmax::Lanes;
    use half::{bf16, f16};
    use pulp::{Simd, WithSimd};

    struct Load<'a, T>(&'a [T], &'a mut Lanes);

    impl<T: Widen> WithSimd for Load<'_, T> {
        type Output = usize;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> usize {
            assert!(S::F32_LANES <= self.0.len());
            // SAFETY: so many elements are there, and `dispatch` runs this.
            S::as_mut_simd_f32s(self.1).0[0] = unsafe { T::load(simd, self.0.as_ptr()) };
            S::F32_LANES
        }
    }

    /// Every number of 16 bits, a register at a time.
    fn check<T: Widen>(of_bits: impl Fn(u16) -> T) {
        let all: Vec<T> = (0..=u16::MAX).map(of_bits).collect();
        let mut at = 0;
        while at < all.len() {
            let mut register = Lanes::default();
            let lanes = T::dispatch(Load(&all[at..], &mut register));
            for (got, from) in register.iter().zip(&all[at..][..lanes]) {
                let want = from.to_f32();
                assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{got} for {want}");
            }
            at += lanes;
        }
    }

    #[test]
    fn every_half_is_its_f32() {
        check(f16::from_bits);
        check(bf16::from_bits);
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
