//! Names of arguments, one numbering for errors, plans and the command line's files.

use std::fmt;

/// Names an argument as the command line's files do: `q`, `k.1`, `gate.0`, `dk.1`.
///
/// Segments are counted across all branches in order, from 0. What belongs to a branch carries the number of the
/// branch's first segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "each variant is the argument of the same name, numbered as said above")]
pub enum Argument {
    Q,
    K(usize),
    V(usize),
    Bias(usize),
    KeyLen(usize),
    Gate(usize),
    Region(usize),
    SoftmaxScale,
    Softcap,
    /// The list of branches itself.
    Branches,
    /// The list of segments of the branch that follows this many segments.
    Segments(usize),
    Out,
    Lse,
    Dout,
    Dq,
    Dk(usize),
    Dv(usize),
    Dbias(usize),
    Dgate(usize),
    Dregion(usize),
    /// Scratch memory of a call.
    Workspace,
}

impl Argument {
    /// Whether it is a tensor of rows of elements of one head: `q`, `k`, `v`, `out` and what is of their shape.
    #[cfg_attr(
        not(any(feature = "cuda", feature = "emulated")),
        allow(dead_code, reason = "only launches look into it")
    )]
    pub(crate) fn is_of_rows(self) -> bool {
        use Argument::*;
        matches!(self, Q | K(_) | V(_) | Out | Dout | Dq | Dk(_) | Dv(_))
    }
}

impl fmt::Display for Argument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Argument::*;
        let (name, number) = match *self {
            Q => ("q", None),
            K(i) => ("k", Some(i)),
            V(i) => ("v", Some(i)),
            Bias(i) => ("bias", Some(i)),
            KeyLen(i) => ("key_len", Some(i)),
            Gate(i) => ("gate", Some(i)),
            Region(i) => ("region", Some(i)),
            SoftmaxScale => ("softmax_scale", None),
            Softcap => ("softcap", None),
            Branches => ("branches", None),
            Segments(i) => ("segments", Some(i)),
            Out => ("out", None),
            Lse => ("lse", None),
            Dout => ("dout", None),
            Dq => ("dq", None),
            Dk(i) => ("dk", Some(i)),
            Dv(i) => ("dv", Some(i)),
            Dbias(i) => ("dbias", Some(i)),
            Dgate(i) => ("dgate", Some(i)),
            Dregion(i) => ("dregion", Some(i)),
            Workspace => ("workspace", None),
        };
        match number {
            Some(number) => write!(f, "{name}.{number}"),
            None => f.write_str(name),
        }
    }
}
