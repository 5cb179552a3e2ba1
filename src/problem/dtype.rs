//! Element types and directions: the words that the table of kernels is written in. Only the standard library, because
//! the build script reads this file too.

use std::fmt;

/// The type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 half precision.
    F16,
    /// bfloat16.
    BF16,
    /// IEEE 754 single precision.
    F32,
    /// One byte, 0 or 1; as a bias, `true` means that the query may attend to the key.
    Bool,
    /// Unsigned 32-bit integer, the type of key lengths.
    U32,
}

impl DType {
    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            DType::Bool => 1,
            DType::F16 | DType::BF16 => 2,
            DType::F32 | DType::U32 => 4,
        }
    }

    /// The lower-case name: `f16`, `bf16`, `f32`, `bool`, `u32`.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::F32 => "f32",
            DType::Bool => "bool",
            DType::U32 => "u32",
        }
    }

    /// Whether queries, keys, values and outputs may have this type.
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F16 | DType::BF16 | DType::F32)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which way a call goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From q, k, v to out.
    Forward,
    /// From the gradient of out to those of the inputs.
    Backward,
}

impl Direction {
    /// `forward` or `backward`.
    pub const fn name(self) -> &'static str {
        match self {
            Direction::Forward => "forward",
            Direction::Backward => "backward",
        }
    }
}
