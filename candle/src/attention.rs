//! The operator on candle's tensors.

use crate::op;
use crate::operand::Operand;
use candle_core::{Error, Result, Tensor};
use fused_attention::{Attention, Branch};

/// Text and any number of image prompts in one pass: `Σ_b gate_b · region_b · softmax(q k_bᵀ / √head_dim) v_b`.
///
/// `q` is `[batch, seq_q, heads, head_dim]`, the result `[batch, seq_q, heads, value_dim]`. What a branch may hold is said
/// at [`attention`]; the first is text where there is text, but no branch is special.
///
/// ```
/// # fn main() -> candle_core::Result<()> {
/// use candle_core::{Device, Tensor};
/// use fused_attention_candle::{Branch, decoupled_cross_attention};
/// let random = |tokens| Tensor::randn(0f32, 1.0, (2, tokens, 8, 40), &Device::Cpu);
/// let mask = Tensor::rand(0f32, 1.0, (1, 64), &Device::Cpu)?; // [1 or batch, seq_q]
/// let text = Branch::new(random(77)?, random(77)?);
/// let face = Branch::new(random(16)?, random(16)?).gate(0.8).region(mask);
/// let out = decoupled_cross_attention(&random(64)?, &[text, face])?;
/// assert_eq!(out.dims(), [2, 64, 8, 40]);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As [`attention`].
pub fn decoupled_cross_attention(q: &Tensor, branches: &[Branch<Tensor>]) -> Result<Tensor> {
    let mut request = Attention::new(q.clone());
    request.branches = branches.to_vec();
    attention(&request)
}

/// Attention of one set of queries over a list of branches: `[batch, seq_q, heads, value_dim]`, type of q.
///
/// | tensor | shape | type |
/// |---|---|---|
/// | q | `[batch, seq_q, heads, head_dim]` | F16, BF16, F32 |
/// | k, v of a segment | `[1 or batch, seq_kv, kv_heads, head_dim]`, `[…, value_dim]`; `kv_heads` divides `heads` | as q |
/// | bias | `[1 or batch, 1 or heads, 1 or seq_q, 1 or seq_kv]` | F32, F16, BF16; U8: 1 where the query may attend |
/// | key_len | `[batch]`: this many leading keys exist | U32 |
/// | gate | a number, or `[]`, `[batch]`, `[batch, heads]` | F32 |
/// | region | `[1 or batch, seq_q]` or `[1 or batch, 1 or heads, seq_q]` | F32 |
///
/// Views of any strides are read where they are, their last dimension contiguous. Tensors on the CPU go to the engine
/// `cpu`, those on a GPU (feature `cuda`) onto candle's stream. Gradients reach every float tensor that is tracked, and are
/// computed for no other.
///
/// # Errors
/// Every rule that the request breaks, or every reason why the device's engine does not take it. On the CPU a mask with
/// bytes other than 0 and 1 is an error; on a GPU its bytes are not looked at and must be 0 or 1.
pub fn attention(request: &Attention<Tensor>) -> Result<Tensor> {
    Ok(op::attention(request.map(Operand::from), false)?.0)
}

/// The same, and the natural logarithm of each branch's denominator: `[branches, batch, heads, seq_q]` F32, -inf for a row
/// without keys. No gradient flows through the logarithms.
///
/// # Errors
/// As [`attention`].
pub fn attention_with_lse(request: &Attention<Tensor>) -> Result<(Tensor, Tensor)> {
    let (out, lse) = op::attention(request.map(Operand::from), true)?;
    Ok((out, lse.ok_or_else(|| Error::msg("the engine wrote no lse"))?))
}
