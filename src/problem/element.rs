//! Element types: what a tensor may hold and how it crosses to and from f32.

use super::dtype::DType;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

mod sealed {
    pub trait Sealed {}
}

/// A Rust type that a tensor may hold: `f32`, [`half::f16`], [`half::bf16`], `bool`, `u32`.
///
/// Sealed: the engines know these types and no others.
pub trait Element: Copy + Send + Sync + bytemuck::NoUninit + sealed::Sealed {
    /// The tag of this type.
    const DTYPE: DType;
}

/// An element type in which queries, keys, values and outputs may be stored.
pub trait Float: Element + bytemuck::Pod {
    /// The value, exactly.
    fn to_f32(self) -> f32;
    /// The nearest value, ties to even, in one rounding.
    fn from_f64(value: f64) -> Self;
    /// Converts slices of equal length, exactly.
    fn widen(from: &[Self], to: &mut [f32]);
    /// Converts slices of equal length, each element to the nearest value, ties to even.
    fn narrow(from: &[f32], to: &mut [Self]);
}

macro_rules! elements {
    ($($ty:ty => $tag:ident),*) => {$(
        impl sealed::Sealed for $ty {}
        impl Element for $ty {
            const DTYPE: DType = DType::$tag;
        }
    )*};
}
elements!(f16 => F16, bf16 => BF16, f32 => F32, bool => Bool, u32 => U32);

impl Float for f32 {
    #[inline]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline]
    fn from_f64(value: f64) -> Self {
        value as f32
    }
    #[inline]
    fn widen(from: &[Self], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
    #[inline]
    fn narrow(from: &[f32], to: &mut [Self]) {
        to.copy_from_slice(from);
    }
}

macro_rules! half_floats {
    ($($ty:ident),*) => {$(
        impl Float for $ty {
            #[inline]
            fn to_f32(self) -> f32 {
                self.to_f32()
            }
            #[inline]
            fn from_f64(value: f64) -> Self {
                $ty::from_f64(value)
            }
            fn widen(from: &[Self], to: &mut [f32]) {
                from.convert_to_f32_slice(to);
            }
            fn narrow(from: &[f32], to: &mut [Self]) {
                to.convert_from_f32_slice(from);
            }
        }
    )*};
}
half_floats!(f16, bf16);

/// Calls a generic function with the Rust type of a float [`DType`]: `with_float!(dtype, T => f::<T>(…))`.
///
/// The other types are refused by validation before any engine runs, hence the last arm.
macro_rules! with_float {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F16 => {
                type $t = half::f16;
                $body
            }
            $crate::DType::BF16 => {
                type $t = half::bf16;
                $body
            }
            $crate::DType::F32 => {
                type $t = f32;
                $body
            }
            $crate::DType::Bool | $crate::DType::U32 => {
                unreachable!("validation admits f16, bf16 and f32 here")
            }
        }
    };
}
pub(crate) use with_float;
