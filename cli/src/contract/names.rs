//! The names of the contract, and what each tensor may be.

use fused_attention::Argument;
use safetensors::Dtype;

/// What a tensor of the contract may be; the library holds shapes against each other.
pub(super) struct Kind {
    pub(super) ranks: &'static [usize],
    pub(super) shape: &'static str,
    pub(super) dtypes: &'static [Dtype],
}

const FLOATS: &[Dtype] = &[Dtype::F16, Dtype::BF16, Dtype::F32];

/// The argument that a tensor's name stands for: the name that the library's messages give it.
pub(super) fn tensor(name: &str) -> Option<Argument> {
    match name {
        "q" => Some(Argument::Q),
        "dout" => Some(Argument::Dout),
        _ => {
            let (kind, number) = numbered(name)?;
            Some(match kind {
                "k" => Argument::K(number),
                "v" => Argument::V(number),
                "bias" => Argument::Bias(number),
                "key_len" => Argument::KeyLen(number),
                "gate" => Argument::Gate(number),
                "region" => Argument::Region(number),
                _ => return None,
            })
        }
    }
}

/// What the tensor of a name may be; `None` for a name that no tensor of a request has.
pub(super) fn kind(argument: Argument) -> Option<Kind> {
    let (ranks, shape, dtypes): (&[usize], _, &[Dtype]) = match argument {
        Argument::Q => (&[4], "[batch, seq_q, heads, head_dim]", FLOATS),
        Argument::Dout => (&[4], "[batch, seq_q, heads, value_dim]", FLOATS),
        Argument::K(_) => (&[4], "[1 or batch, seq_kv, kv_heads, head_dim]", FLOATS),
        Argument::V(_) => (&[4], "[1 or batch, seq_kv, kv_heads, value_dim]", FLOATS),
        Argument::Bias(_) => (
            &[4],
            "[1 or batch, 1 or heads, 1 or seq_q, 1 or seq_kv]",
            &[Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::BOOL],
        ),
        Argument::KeyLen(_) => (&[1], "[batch]", &[Dtype::I32, Dtype::U32]),
        Argument::Gate(_) => (&[0, 1, 2], "[], [batch] or [batch, heads]", &[Dtype::F32]),
        Argument::Region(_) => (&[2], "[1 or batch, seq_q]", &[Dtype::F32]),
        _ => return None,
    };
    Some(Kind { ranks, shape, dtypes })
}

/// Splits `k.3` into `k` and 3. One number has one spelling: `k.03` and `k.+3` are other names.
pub(super) fn numbered(name: &str) -> Option<(&str, usize)> {
    let (kind, digits) = name.split_once('.')?;
    let number: usize = digits.parse().ok()?;
    (number.to_string() == digits).then_some((kind, number))
}
