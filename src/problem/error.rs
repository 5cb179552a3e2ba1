//! Everything that can be wrong with a request: which argument, its value, what to do.

use super::argument::Argument;
use super::dtype::DType;
use std::fmt;

/// One rule that one argument breaks.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{argument} {rule}")]
pub struct Violation {
    /// Which argument.
    pub argument: Argument,
    /// What is wrong with it.
    pub rule: Rule,
}

/// A rule and the values that break it. The text completes a sentence whose subject is the argument.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Rule {
    /// Wrong number of dimensions.
    #[error("has {got} dimensions; give it the shape {expected}")]
    Rank {
        /// Dimensions found.
        got: usize,
        /// The shape in words.
        expected: &'static str,
    },
    /// Wrong element type.
    #[error("is {got}; convert it to {expected}")]
    DType {
        /// Type found.
        got: DType,
        /// Types accepted.
        expected: DTypes,
    },
    /// An extent that must equal another argument's.
    #[error("has {dim} {got}; it must be {expected}")]
    Extent {
        /// Name of the dimension.
        dim: &'static str,
        /// Extent found.
        got: usize,
        /// Extent needed.
        expected: Extent,
    },
    /// Grouped heads that do not come out even.
    #[error("has {got} heads, which do not divide the {heads} heads of q; use a divisor of {heads}")]
    HeadGroups {
        /// Heads of the keys or values.
        got: usize,
        /// Heads of the queries.
        heads: usize,
    },
    /// An extent of zero where there must be something.
    #[error("has {dim} 0; it must be at least 1")]
    Zero {
        /// Name of the dimension.
        dim: &'static str,
    },
    /// An extent past what positions can count.
    #[error("has {dim} {got}; the largest extent is {limit}")]
    TooLarge {
        /// Name of the dimension.
        dim: &'static str,
        /// Extent found.
        got: usize,
        /// Largest extent accepted.
        limit: usize,
    },
    /// Rows that are not contiguous.
    #[error("has stride {got} in its last dimension; it must be 1: copy it to contiguous rows")]
    LastStride {
        /// Stride found.
        got: isize,
    },
    /// A span that no address covers.
    #[error("with shape {shape:?} and strides {strides:?} reaches past the address space; check both")]
    Span {
        /// Extents.
        shape: Vec<usize>,
        /// Strides.
        strides: Vec<isize>,
    },
    /// An output two of whose elements may share an address.
    #[error(
        "with shape {shape:?} and strides {strides:?} may write an address twice; sorted by size, each stride must \
         pass the reach of those below it"
    )]
    Overlap {
        /// Extents.
        shape: Vec<usize>,
        /// Strides.
        strides: Vec<isize>,
    },
    /// A slice that does not hold every element the description reaches.
    #[error("reaches {}, but its slice holds {len}; pass the whole buffer or correct shape, strides and offset",
        reach(.needed))]
    SliceTooShort {
        /// Elements needed; `None` if an index lies before the slice or past any address.
        needed: Option<usize>,
        /// Elements there.
        len: usize,
    },
    /// A workspace smaller than the plan's.
    #[error("has {len} bytes; the plan needs {needed}: pass `workspace_bytes()` of them")]
    WorkspaceTooShort {
        /// Bytes needed.
        needed: usize,
        /// Bytes there.
        len: usize,
    },
    /// A buffer at address zero.
    #[error("has elements, but its buffer is at address 0; pass a buffer")]
    Null,
    /// An address that no element of the type can have.
    #[error("starts at address {address:#x}, no multiple of the {} bytes of {dtype}; correct the offset", .dtype.size())]
    Address {
        /// Address of the element at index zero.
        address: u64,
        /// Its type.
        dtype: DType,
    },
    /// An output that may share memory with another tensor.
    #[error("may share memory with {with}; give it memory of its own")]
    Aliased {
        /// The other tensor.
        with: Argument,
    },
    /// Memory that the stream's context cannot reach.
    #[error(
        "is on GPU {got} and the stream on GPU {stream}{}; copy it there, or use a stream of its own context",
        if .got == .stream { ", in another context" } else { "" }
    )]
    Device {
        /// Ordinal of the tensor's device.
        got: usize,
        /// Ordinal of the stream's device.
        stream: usize,
    },
    /// A number that is NaN or infinite.
    #[error("is {got}; it must be finite")]
    NotFinite {
        /// Value found.
        got: f32,
    },
    /// A cap that is not positive.
    #[error("is {got}; it must be positive: leave it out to have no cap")]
    NotPositive {
        /// Value found.
        got: f32,
    },
    /// No branch, or a branch without segments.
    #[error("is an empty list; give it at least one entry")]
    Empty,
    /// A key length longer than its segment.
    #[error("is {got} for batch entry {batch}; the segment has {limit} keys")]
    KeyLen {
        /// Which batch entry.
        batch: usize,
        /// Length found.
        got: u32,
        /// Keys of the segment.
        limit: usize,
    },
    /// A gradient of an argument that is not there.
    #[error("is wanted, but its input is not part of the request; drop one or add the other")]
    NoInput,
    /// A gradient wanted twice.
    #[error("is wanted twice; ask for it once")]
    Twice,
    /// A saved `out` that holds more than the operator computed.
    #[error(
        "is given as what the forward left, but `accumulate` added it to other numbers; leave it out, or drop `accumulate`"
    )]
    SavedSum,
    /// A gradient of a bool mask.
    #[error("is wanted, but a bool mask has no gradient; drop it or pass a float bias")]
    BoolGradient,
}

fn reach(needed: &Option<usize>) -> String {
    match needed {
        Some(needed) => format!("{needed} elements"),
        None => "outside its slice".to_string(),
    }
}

/// The element types that a rule accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DTypes(pub(crate) &'static [DType]);

impl fmt::Display for DTypes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, dtype) in self.0.iter().enumerate() {
            let separator = match i {
                0 => "",
                _ if i + 1 == self.0.len() => " or ",
                _ => ", ",
            };
            write!(f, "{separator}{dtype}")?;
        }
        Ok(())
    }
}

/// The extents that a rule accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Exactly this.
    Exactly(usize),
    /// This, or 1 to broadcast.
    OrOne(usize),
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Extent::Exactly(n) | Extent::OrOne(n @ 1) => write!(f, "{n}"),
            Extent::OrOne(n) => write!(f, "1 or {n}"),
        }
    }
}

/// Every rule that a request breaks.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub struct Invalid {
    /// At least one violation.
    pub violations: Vec<Violation>,
}

impl Invalid {
    /// Adds what a caller found besides.
    pub(crate) fn merge<T>(checked: Result<T, Invalid>, more: Vec<Violation>) -> Result<T, Invalid> {
        match checked {
            Ok(checked) if more.is_empty() => Ok(checked),
            Ok(_) => Err(Invalid { violations: more }),
            Err(Invalid { mut violations }) => {
                violations.extend(more);
                Err(Invalid { violations })
            }
        }
    }
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        list(f, &self.violations)
    }
}

/// Joins messages with semicolons.
pub(crate) fn list<T: fmt::Display>(f: &mut fmt::Formatter<'_>, items: &[T]) -> fmt::Result {
    for (i, item) in items.iter().enumerate() {
        write!(f, "{}{item}", if i == 0 { "" } else { "; " })?;
    }
    Ok(())
}
