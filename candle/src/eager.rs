//! The same operator made of candle's own operations: the logits of all queries and keys are stored.
//!
//! What a model computes without a fused kernel; kept to compare with, and differentiable by candle itself. Logits and
//! probabilities have the type of q, the softmax is F32.

use candle_core::{D, DType, Device, Error, Result, Tensor};
use fused_attention::{Attention, Branch, Causal, Gate, Segment};

/// As [`attention`](crate::attention()), with candle's operations.
///
/// # Errors
/// Those of candle's operations.
pub fn eager_attention(request: &Attention<Tensor>) -> Result<Tensor> {
    if request.accumulate {
        return Err(Error::msg(
            "accumulate is set, but the result is a tensor of its own; add the two tensors instead",
        ));
    }
    let dtype = request.q.dtype();
    let q = request.q.transpose(1, 2)?.contiguous()?;
    let mut sum: Option<Tensor> = None;
    for branch in &request.branches {
        // As in the fused operator, a branch of gate 0 is not looked at.
        if matches!(branch.gate, Gate::Scalar(0.0)) {
            continue;
        }
        let out = weigh(branch, branch_out(request, branch, &q)?)?;
        sum = Some(match sum {
            None => out,
            Some(sum) => (sum + out)?,
        });
    }
    match sum {
        Some(sum) => sum.to_dtype(dtype)?.transpose(1, 2)?.contiguous(),
        None => {
            let mut shape = request.q.dims().to_vec();
            let value_dim = request.segments().next().and_then(|segment| segment.v.dims().last().copied());
            if let (Some(last), Some(value_dim)) = (shape.last_mut(), value_dim) {
                *last = value_dim;
            }
            Tensor::zeros(shape, dtype, request.q.device())
        }
    }
}

/// `softmax(…) v` of one branch, `[batch, heads, seq_q, value_dim]` F32.
fn branch_out(request: &Attention<Tensor>, branch: &Branch<Tensor>, q: &Tensor) -> Result<Tensor> {
    let (batch, heads, _, head_dim) = q.dims4()?;
    let scale = request.softmax_scale.map_or_else(|| 1.0 / (head_dim as f64).sqrt(), f64::from);
    let mut logits = Vec::with_capacity(branch.segments.len());
    let mut values = Vec::with_capacity(branch.segments.len());
    for segment in &branch.segments {
        let k = by_query_head(&segment.k, batch, heads)?;
        let mut s = (q.matmul(&k.transpose(2, 3)?.contiguous()?)? * scale)?.to_dtype(DType::F32)?;
        if let Some(softcap) = request.softcap {
            s = ((s / f64::from(softcap))?.tanh()? * f64::from(softcap))?;
        }
        logits.push(masked(s, segment)?);
        values.push(by_query_head(&segment.v, batch, heads)?);
    }
    let (logits, values) = (Tensor::cat(&logits, D::Minus1)?, Tensor::cat(&values, 2)?);
    let p = softmax(&logits)?.to_dtype(q.dtype())?;
    p.matmul(&values)?.to_dtype(DType::F32)
}

/// The softmax over the last dimension; a row of -inf alone gives 0.
fn softmax(logits: &Tensor) -> Result<Tensor> {
    if logits.dim(D::Minus1)? == 0 {
        return Ok(logits.clone());
    }
    // Any finite number does for an empty row, and the softmax does not depend on which is subtracted.
    let max = logits.max_keepdim(D::Minus1)?.maximum(f64::from(f32::MIN))?.detach();
    let exponentials = logits.broadcast_sub(&max)?.exp()?;
    let sum = exponentials.sum_keepdim(D::Minus1)?;
    let empty = sum.eq(0.0)?.to_dtype(DType::F32)?;
    exponentials.broadcast_div(&(sum + empty)?)
}

/// Keys or values as `[batch, heads, seq_kv, width]`: each of their heads serves as many adjacent query heads.
fn by_query_head(rows: &Tensor, batch: usize, heads: usize) -> Result<Tensor> {
    let (own_batch, seq, kv_heads, width) = rows.dims4()?;
    if own_batch != batch && own_batch != 1 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
        let fault = format!("keys and values of {rows:?} do not go with batch {batch} and {heads} heads");
        return Err(Error::msg(fault));
    }
    let rows = rows.transpose(1, 2)?.reshape((own_batch, kv_heads, 1, seq, width))?;
    rows.broadcast_as((batch, kv_heads, heads / kv_heads, seq, width))?
        .reshape((batch, heads, seq, width))?
        .contiguous()
}

/// Adds the bias, and puts -inf where the query must not attend.
fn masked(logits: Tensor, segment: &Segment<Tensor>) -> Result<Tensor> {
    let (_, _, seq_q, seq_kv) = logits.dims4()?;
    let mut logits = logits;
    if let Some(bias) = &segment.bias {
        logits = match bias.dtype() {
            DType::U8 => exclude(logits, bias)?,
            _ => logits.broadcast_add(&bias.to_dtype(DType::F32)?)?,
        };
    }
    let device = logits.device().clone();
    if let Some(key_len) = &segment.key_len {
        let keys = Tensor::arange(0u32, seq_kv as u32, &device)?.reshape((1, 1, 1, seq_kv))?;
        let exists = keys.broadcast_lt(&key_len.reshape((key_len.elem_count(), 1, 1, 1))?)?;
        logits = exclude(logits, &exists)?;
    }
    match positions(segment, seq_q, seq_kv, &device)? {
        Some(allowed) => exclude(logits, &allowed),
        None => Ok(logits),
    }
}

/// -inf where `allowed`, which broadcasts, is 0.
fn exclude(logits: Tensor, allowed: &Tensor) -> Result<Tensor> {
    let minus_infinity = Tensor::full(f32::NEG_INFINITY, logits.shape(), logits.device())?;
    allowed.broadcast_as(logits.shape())?.contiguous()?.where_cond(&logits, &minus_infinity)
}

/// Which keys the rules of position allow, `[1, 1, seq_q, seq_kv]`; `None` if all.
fn positions(segment: &Segment<Tensor>, seq_q: usize, seq_kv: usize, device: &Device) -> Result<Option<Tensor>> {
    let (causal, window) = (segment.causal, segment.window);
    if causal == Causal::None && window.left.is_none() && window.right.is_none() {
        return Ok(None);
    }
    let mut allowed = Vec::with_capacity(seq_q * seq_kv);
    for i in 0..seq_q as i64 {
        let centre = i + seq_kv as i64 - seq_q as i64;
        for j in 0..seq_kv as i64 {
            let by_causal = match causal {
                Causal::None => true,
                Causal::TopLeft => j <= i,
                Causal::BottomRight => j <= centre,
            };
            let by_left = window.left.is_none_or(|left| j >= centre - i64::from(left));
            let by_right = window.right.is_none_or(|right| j <= centre + i64::from(right));
            allowed.push(u8::from(by_causal && by_left && by_right));
        }
    }
    Tensor::from_vec(allowed, (1, 1, seq_q, seq_kv), device).map(Some)
}

/// Multiplies `[batch, heads, seq_q, value_dim]` by gate and region.
fn weigh(branch: &Branch<Tensor>, mut out: Tensor) -> Result<Tensor> {
    match &branch.gate {
        Gate::Scalar(gate) => out = (out * f64::from(*gate))?,
        Gate::Tensor(gate) => {
            let mut shape = gate.dims().to_vec();
            shape.resize(4, 1);
            out = out.broadcast_mul(&gate.reshape(shape)?)?;
        }
    }
    if let Some(region) = &branch.region {
        let region = if region.rank() == 2 { region.unsqueeze(1)? } else { region.clone() };
        out = out.broadcast_mul(&region.unsqueeze(D::Minus1)?)?;
    }
    Ok(out)
}
