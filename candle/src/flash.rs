//! The functions of candle-flash-attn 0.11, with its names, arguments and conventions.
//!
//! Shapes are `[batch, seq, heads, head_dim]`; the rules of windows and ALiBi are those of the FlashAttention 2 kernels that
//! candle-flash-attn compiles: aligned to the bottom right, and a reach longer than the keys is none.

use crate::cpu;
use crate::op;
use crate::operand::{Memory, Operand, View, out_shape};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp3, DType, Error, Layout, Result, Shape, Tensor};
use fused_attention::{Attention, Gradient, Segment};

/// The operation as a custom operation of candle's: `q.apply_op3(&k, &v, FlashAttn { .. })`.
///
/// The functions below do the same and keep the softmax's denominator for the backward.
pub struct FlashAttn {
    /// Factor of every product of a query and a key.
    pub softmax_scale: f32,
    /// `[heads]` F32: query `i` adds `-slope · |i + seq_kv - seq_q - j|` to the logit of key `j`.
    pub alibi_slopes: Option<Tensor>,
    /// Keys to the left of the centre that a query sees; all if `None` or more than there are keys.
    pub window_size_left: Option<usize>,
    /// The same to the right; `Some(0)` alone is the causal rule.
    pub window_size_right: Option<usize>,
    /// Caps scaled products to `softcap · tanh(s / softcap)`; none if `None` or 0.
    pub softcap: Option<f32>,
}

impl FlashAttn {
    /// What is asked of these queries, keys and values, `reach` being the longest distance that is a limit.
    pub(crate) fn request(&self, q: &Tensor, k: &Tensor, v: &Tensor, reach: usize) -> Result<Attention<Operand>> {
        let (_, seq_q, heads, _) = q.dims4()?;
        let (_, seq_kv, _, _) = k.dims4()?;
        let [q, k, v] = [q, k, v].map(Operand::from);
        let bias = self.alibi_slopes.as_ref().map(|slopes| alibi(slopes, heads, seq_q, seq_kv)).transpose()?;
        Ok(self.assemble(q, Segment::new(k, v), bias, reach))
    }

    fn assemble<T>(&self, q: T, mut segment: Segment<T>, bias: Option<T>, reach: usize) -> Attention<T> {
        let limit = |size: Option<usize>| size.filter(|&size| size <= reach);
        let left = limit(self.window_size_left);
        // The kernels end a window that is open on the right as many keys past its centre as there are keys.
        let right = limit(self.window_size_right).or(left.map(|_| reach));
        let keys = |size: usize| u32::try_from(size).unwrap_or(u32::MAX);
        segment = segment.window(left.map(keys), right.map(keys));
        segment.bias = bias;
        let mut request = Attention::new(q).softmax_scale(self.softmax_scale).branch(segment.into());
        request.softcap = self.softcap.filter(|&softcap| softcap != 0.0);
        request
    }

    fn run(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        Ok(op::attention(self.request(q, k, v, k.dims4()?.1)?, false)?.0)
    }

    /// The bias on the device of `like`, for a call whose other tensors are bare storage.
    fn bias(&self, q: &Layout, k: &Layout) -> Result<Option<Operand>> {
        let ((_, seq_q, heads, _), (_, seq_kv, _, _)) = (q.shape().dims4()?, k.shape().dims4()?);
        self.alibi_slopes.as_ref().map(|slopes| alibi(slopes, heads, seq_q, seq_kv)).transpose()
    }

    fn of_storage<'a>(
        &self,
        [q, k, v]: [Memory<'a>; 3],
        bias: Option<&'a Operand>,
        reach: usize,
    ) -> Attention<Memory<'a>> {
        self.assemble(q, Segment::new(k, v), bias.map(Operand::lock), reach)
    }
}

/// `-slope · |i + seq_kv - seq_q - j|`, which depends on `i - j` alone: a row of `seq_q + seq_kv - 1` numbers per head, seen
/// with stride 1 along the queries and -1 along the keys.
fn alibi(slopes: &Tensor, heads: usize, seq_q: usize, seq_kv: usize) -> Result<Operand> {
    if slopes.dims() != [heads] || slopes.dtype() != DType::F32 {
        let (shape, dtype) = (slopes.shape(), slopes.dtype());
        return Err(Error::msg(format!(
            "alibi_slopes has shape {shape:?} and type {dtype:?}; it must be [{heads}] F32"
        )));
    }
    if slopes.track_op() {
        return Err(Error::msg("alibi_slopes is tracked, but gradients of slopes are not there yet; detach it"));
    }
    let len = (seq_q + seq_kv).saturating_sub(1).max(1);
    // Element `t` of a row is of the query and key with `i - j = t - (seq_kv - 1)`.
    let distance = |t: usize| -(t as f32 + 1.0 - seq_q as f32).abs();
    let row = Tensor::from_iter((0..len).map(distance), slopes.device())?;
    let table = slopes.reshape((heads, 1))?.broadcast_mul(&row.reshape((1, len))?)?.contiguous()?;
    let view = View {
        offset: seq_kv.saturating_sub(1),
        shape: vec![1, heads, seq_q, seq_kv],
        strides: vec![0, len as isize, 1, -1],
    };
    Ok(Operand::viewed(table, view))
}

impl CustomOp3 for FlashAttn {
    fn name(&self) -> &'static str {
        "flash-attn"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let bias = self.bias(q_layout, k_layout)?;
        let memory = [Memory::cpu(q, q_layout), Memory::cpu(k, k_layout), Memory::cpu(v, v_layout)];
        let request = self.of_storage(memory, bias.as_ref(), k_layout.shape().dims4()?.1);
        let shape = Shape::from(out_shape(&request).as_slice());
        Ok((cpu::forward(&request, false)?.out, shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        q_layout: &Layout,
        k: &CudaStorage,
        k_layout: &Layout,
        v: &CudaStorage,
        v_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let bias = self.bias(q_layout, k_layout)?;
        let device = q.device.clone();
        let memory = [Memory::cuda(q, q_layout), Memory::cuda(k, k_layout), Memory::cuda(v, v_layout)];
        let request = self.of_storage(memory, bias.as_ref(), k_layout.shape().dims4()?.1);
        let shape = Shape::from(out_shape(&request).as_slice());
        Ok((crate::cuda::forward(&request, &device, false)?.out, shape))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _: &Tensor,
        dout: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let request = self.request(q, k, v, k.dims4()?.1)?;
        let wanted = [(Gradient::Q, q), (Gradient::K(0), k), (Gradient::V(0), v)];
        let mut gradients = op::backward(&request, dout, None, &wanted)?.into_iter();
        Ok((gradients.next(), gradients.next(), gradients.next()))
    }
}

/// `softmax(q kᵀ · softmax_scale) v`, causal if asked for: `[batch, seq_q, heads, value_dim]`.
///
/// `q` is `[batch, seq_q, heads, head_dim]`, `k` and `v` `[batch, seq_kv, kv_heads, head_dim]`; `kv_heads` divides `heads`.
///
/// # Errors
/// As [`attention`](crate::attention()).
pub fn flash_attn(q: &Tensor, k: &Tensor, v: &Tensor, softmax_scale: f32, causal: bool) -> Result<Tensor> {
    flash_attn_windowed(q, k, v, softmax_scale, None, causal.then_some(0))
}

/// [`flash_attn`] with a window: query `i` sees keys from `c - window_size_left` to `c + window_size_right`, where
/// `c = i + seq_kv - seq_q`.
///
/// `None`, or more than there are keys, is no limit on that side; `(None, Some(0))` is the causal rule.
///
/// # Errors
/// As [`attention`](crate::attention()).
pub fn flash_attn_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    FlashAttn { softmax_scale, alibi_slopes: None, window_size_left, window_size_right, softcap: None }.run(q, k, v)
}

/// [`flash_attn`] with ALiBi: `alibi_slopes` is `[heads]` F32.
///
/// # Errors
/// As [`attention`](crate::attention()). Slopes get no gradient yet: tracked ones are refused.
pub fn flash_attn_alibi(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    flash_attn_alibi_windowed(q, k, v, alibi_slopes, softmax_scale, None, causal.then_some(0))
}

/// [`flash_attn_windowed`] with ALiBi.
///
/// # Errors
/// As [`flash_attn_alibi`].
pub fn flash_attn_alibi_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    let alibi_slopes = Some(alibi_slopes.clone());
    FlashAttn { softmax_scale, alibi_slopes, window_size_left, window_size_right, softcap: None }.run(q, k, v)
}

/// [`flash_attn_windowed`] with or without ALiBi, its scaled products capped to `±softcap`; 0 is no cap.
///
/// # Errors
/// As [`flash_attn_alibi`]; a negative cap is one.
#[expect(clippy::too_many_arguments, reason = "the signature of candle-flash-attn")]
pub fn flash_attn_alibi_windowed_softcap(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: Option<&Tensor>,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
    softcap: f32,
) -> Result<Tensor> {
    let alibi_slopes = alibi_slopes.cloned();
    let op = FlashAttn { softmax_scale, alibi_slopes, window_size_left, window_size_right, softcap: Some(softcap) };
    op.run(q, k, v)
}
