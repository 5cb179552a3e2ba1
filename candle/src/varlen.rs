//! The functions of candle-flash-attn 0.11 for sequences of several lengths, packed one after the other.
//!
//! Each sequence is a call of its own over views of the packed tensors, so the lengths are read on the host: on a GPU that
//! waits for what computes them.

use crate::flash::FlashAttn;
use crate::op;
use crate::operand::refuse_if;
use candle_core::{DType, Error, Result, Tensor};

/// The packed sequences and the options that all of them share.
struct Packed<'a> {
    q: &'a Tensor,
    keys: Keys<'a>,
    seqlens_q: &'a Tensor,
    seqlens_k: &'a Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    op: FlashAttn,
}

/// Where the keys and values of a sequence are.
enum Keys<'a> {
    /// `[total_k, kv_heads, head_dim]`, one sequence after the other.
    Contiguous { k: &'a Tensor, v: &'a Tensor },
    /// `[blocks, page_block_size, kv_heads, head_dim]`, and which blocks each sequence has, `[batch, most blocks]`.
    Paged { k: &'a Tensor, v: &'a Tensor, blocks: Vec<Vec<u32>>, block_size: usize },
}

impl Packed<'_> {
    /// `[total_q, heads, head_dim]`
    fn run(&self) -> Result<Tensor> {
        let (total_q, _, _) = self.q.dims3()?;
        let [q, k] = [("seqlens_q", self.seqlens_q), ("seqlens_k", self.seqlens_k)].map(|(name, t)| offsets(name, t));
        let (q, k) = (q?, k?);
        self.check(&q, &k, total_q)?;
        let mut outs = Vec::with_capacity(q.len() - 1);
        for (number, (q, k)) in q.windows(2).zip(k.windows(2)).enumerate() {
            let queries = self.q.narrow(0, q[0], q[1] - q[0])?.unsqueeze(0)?;
            let (k, v) = self.keys.of(number, k[0], k[1] - k[0])?;
            let request = self.op.request(&queries, &k.unsqueeze(0)?, &v.unsqueeze(0)?, self.max_seqlen_k)?;
            outs.push(op::attention(request, false)?.0.squeeze(0)?);
        }
        if let [out] = outs.as_slice() { Ok(out.clone()) } else { Tensor::cat(&outs, 0) }
    }

    fn check(&self, q: &[usize], k: &[usize], total_q: usize) -> Result<()> {
        let mut faults = Vec::new();
        if q.len() != k.len() {
            faults.push(format!(
                "seqlens_q has {} elements and seqlens_k {}; both have one per sequence and one more",
                q.len(),
                k.len()
            ));
        }
        if q.len() < 2 {
            faults.push(format!("seqlens_q has {} elements; it needs at least 2, one sequence", q.len()));
        }
        let longest = [("q", q, self.max_seqlen_q), ("k", k, self.max_seqlen_k)];
        for (name, offsets, max) in longest {
            if offsets.first().is_some_and(|&first| first != 0) {
                faults.push(format!("seqlens_{name} starts with {}; it must start with 0", offsets[0]));
            }
            for (number, pair) in offsets.windows(2).enumerate() {
                if pair[0] > pair[1] {
                    faults.push(format!("seqlens_{name} goes down from {} to {}; it must not", pair[0], pair[1]));
                } else if pair[1] - pair[0] > max {
                    let len = pair[1] - pair[0];
                    faults.push(format!("max_seqlen_{name} is {max}, but sequence {number} has {len}; raise it"));
                }
            }
        }
        let last = q.last().copied().unwrap_or(0);
        if last != total_q {
            faults.push(format!("seqlens_q ends with {last}, but q has {total_q} rows; every row needs a sequence"));
        }
        match &self.keys {
            Keys::Contiguous { k: keys, v } => {
                let (rows, last) = (keys.dims3()?.0.min(v.dims3()?.0), k.last().copied().unwrap_or(0));
                if last > rows {
                    faults.push(format!("seqlens_k ends with {last}, but k and v have {rows} rows"));
                }
            }
            Keys::Paged { k: keys, blocks, block_size, .. } => {
                let (pages, have, _, _) = keys.dims4()?;
                if have != *block_size || *block_size == 0 {
                    faults.push(format!("page_block_size is {block_size}, but the blocks of k have {have} keys"));
                }
                if blocks.len() + 1 != k.len() {
                    let sequences = k.len().saturating_sub(1);
                    faults.push(format!(
                        "block_table has {} rows; it must have one per sequence, {sequences}",
                        blocks.len()
                    ));
                }
                for (number, (row, pair)) in blocks.iter().zip(k.windows(2)).enumerate() {
                    let needed = pair[1].saturating_sub(pair[0]).div_ceil((*block_size).max(1));
                    if needed > row.len() {
                        faults.push(format!(
                            "block_table has {} blocks for sequence {number}, which needs {needed}",
                            row.len()
                        ));
                    } else if let Some(block) = row[..needed].iter().find(|&&block| block as usize >= pages) {
                        faults
                            .push(format!("block_table names block {block} for sequence {number}; there are {pages}"));
                    }
                }
            }
        }
        refuse_if(faults)
    }
}

impl Keys<'_> {
    /// Keys and values of one sequence.
    fn of(&self, number: usize, start: usize, len: usize) -> Result<(Tensor, Tensor)> {
        match self {
            Keys::Contiguous { k, v } => Ok((k.narrow(0, start, len)?, v.narrow(0, start, len)?)),
            Keys::Paged { k, v, blocks, block_size } => {
                let used = &blocks[number][..len.div_ceil(*block_size)];
                let used = Tensor::new(used, k.device())?;
                let gather = |pages: &Tensor| pages.index_select(&used, 0)?.flatten(0, 1)?.narrow(0, 0, len);
                Ok((gather(k)?, gather(v)?))
            }
        }
    }
}

/// Cumulative lengths, on the host.
fn offsets(name: &str, tensor: &Tensor) -> Result<Vec<usize>> {
    if tensor.rank() != 1 || tensor.dtype() != DType::U32 {
        let (shape, dtype) = (tensor.shape(), tensor.dtype());
        return Err(Error::msg(format!(
            "{name} has shape {shape:?} and type {dtype:?}; it must be [sequences + 1] U32"
        )));
    }
    Ok(tensor.to_vec1::<u32>()?.into_iter().map(|offset| offset as usize).collect())
}

/// [`flash_attn`](crate::flash_attn) of packed sequences: `[total_q, heads, head_dim]`.
///
/// `q` is `[total_q, heads, head_dim]`, `k` and `v` `[total_k, kv_heads, head_dim]`. `seqlens_q` and `seqlens_k` are U32 and
/// cumulative: sequence `n` has the rows from element `n` to element `n + 1`; no sequence is longer than `max_seqlen`.
///
/// # Errors
/// As [`attention`](crate::attention()), and lengths that do not fit the tensors.
#[expect(clippy::too_many_arguments, reason = "the signature of candle-flash-attn")]
pub fn flash_attn_varlen(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    let right = causal.then_some(0);
    let op = FlashAttn {
        softmax_scale,
        alibi_slopes: None,
        window_size_left: None,
        window_size_right: right,
        softcap: None,
    };
    Packed { q, keys: Keys::Contiguous { k, v }, seqlens_q, seqlens_k, max_seqlen_q, max_seqlen_k, op }.run()
}

/// [`flash_attn_windowed`](crate::flash_attn_windowed) of packed sequences; a reach of more than `max_seqlen_k` is no limit.
///
/// # Errors
/// As [`flash_attn_varlen`].
#[expect(clippy::too_many_arguments, reason = "the signature of candle-flash-attn")]
pub fn flash_attn_varlen_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    let op = FlashAttn { softmax_scale, alibi_slopes: None, window_size_left, window_size_right, softcap: None };
    Packed { q, keys: Keys::Contiguous { k, v }, seqlens_q, seqlens_k, max_seqlen_q, max_seqlen_k, op }.run()
}

/// [`flash_attn_varlen_windowed`] over a paged cache: `k` and `v` are `[blocks, page_block_size, kv_heads, head_dim]`, and row
/// `n` of `block_table` (`[sequences, most blocks]`, U32) names the blocks of sequence `n` in order.
///
/// The blocks of a sequence are gathered, a copy of its keys and values.
///
/// # Errors
/// As [`flash_attn_varlen`]. `mm_prefix_ranges` are not there yet and refused.
#[expect(clippy::too_many_arguments, reason = "the signature of candle-flash-attn")]
pub fn flash_attn_varlen_paged_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    block_table: &Tensor,
    mm_prefix_ranges: Option<&Tensor>,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
    page_block_size: usize,
    softcap: Option<f32>,
) -> Result<Tensor> {
    if mm_prefix_ranges.is_some() {
        return Err(Error::msg("mm_prefix_ranges are not there yet; pass None, and a U8 mask to `attention` instead"));
    }
    if block_table.rank() != 2 || !matches!(block_table.dtype(), DType::U32 | DType::I32) {
        let (shape, dtype) = (block_table.shape(), block_table.dtype());
        let fault =
            format!("block_table has shape {shape:?} and type {dtype:?}; it must be [sequences, blocks] U32 or I32");
        return Err(Error::msg(fault));
    }
    let blocks = match block_table.dtype() {
        DType::U32 => block_table.to_vec2::<u32>()?,
        // A negative number, which marks an unused entry, becomes a block that no cache has.
        _ => block_table.to_vec2::<i32>()?.into_iter().map(|row| row.into_iter().map(|b| b as u32).collect()).collect(),
    };
    let keys = Keys::Paged { k, v, blocks, block_size: page_block_size };
    let op = FlashAttn { softmax_scale, alibi_slopes: None, window_size_left, window_size_right, softcap };
    Packed { q, keys, seqlens_q, seqlens_k, max_seqlen_q, max_seqlen_k, op }.run()
}

/// [`flash_attn_alibi`](crate::flash_attn_alibi) of packed sequences.
///
/// # Errors
/// As [`flash_attn_varlen`].
#[expect(clippy::too_many_arguments, reason = "the signature of candle-flash-attn")]
pub fn flash_attn_varlen_alibi(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    let (alibi_slopes, right) = (Some(alibi_slopes.clone()), causal.then_some(0));
    let op = FlashAttn { softmax_scale, alibi_slopes, window_size_left: None, window_size_right: right, softcap: None };
    Packed { q, keys: Keys::Contiguous { k, v }, seqlens_q, seqlens_k, max_seqlen_q, max_seqlen_k, op }.run()
}

/// [`flash_attn_alibi_windowed`](crate::flash_attn_alibi_windowed) of packed sequences.
///
/// # Errors
/// As [`flash_attn_varlen`].
#[expect(clippy::too_many_arguments, reason = "the signature of candle-flash-attn")]
pub fn flash_attn_varlen_alibi_windowed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: &Tensor,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
) -> Result<Tensor> {
    let alibi_slopes = Some(alibi_slopes.clone());
    let op = FlashAttn { softmax_scale, alibi_slopes, window_size_left, window_size_right, softcap: None };
    Packed { q, keys: Keys::Contiguous { k, v }, seqlens_q, seqlens_k, max_seqlen_q, max_seqlen_k, op }.run()
}

/// [`flash_attn_alibi_windowed_softcap`](crate::flash_attn_alibi_windowed_softcap) of packed sequences.
///
/// # Errors
/// As [`flash_attn_varlen`].
#[expect(clippy::too_many_arguments, reason = "the signature of candle-flash-attn")]
pub fn flash_attn_varlen_alibi_windowed_softcap(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: Option<&Tensor>,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    max_seqlen_q: usize,
    max_seqlen_k: usize,
    softmax_scale: f32,
    window_size_left: Option<usize>,
    window_size_right: Option<usize>,
    softcap: f32,
) -> Result<Tensor> {
    let alibi_slopes = alibi_slopes.cloned();
    let op = FlashAttn { softmax_scale, alibi_slopes, window_size_left, window_size_right, softcap: Some(softcap) };
    Packed { q, keys: Keys::Contiguous { k, v }, seqlens_q, seqlens_k, max_seqlen_q, max_seqlen_k, op }.run()
}
