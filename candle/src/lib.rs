//! Fused attention for candle: `flash_attn` on CPU and GPU, with masks, biases, lse and gradients; IP-Adapters whose weights no
//! change of backend can lose.
//!
//! # In the place of candle-flash-attn
//!
//! ```diff
//! -use candle_flash_attn::flash_attn;
//! +use fused_attention_candle::flash_attn;
//! ```
//!
//! All functions of candle-flash-attn 0.11 are here with their names, arguments and conventions, on the CPU as well, in F32 as
//! well, for every head dim, and with gradients.
//!
//! ```
//! # fn main() -> candle_core::Result<()> {
//! use candle_core::{Device, Tensor, Var};
//! use fused_attention_candle::flash_attn;
//! let q = Var::randn(0f32, 1.0, (2, 64, 8, 40), &Device::Cpu)?; // [batch, seq, heads, head_dim]
//! let k = Tensor::randn(0f32, 1.0, (2, 77, 8, 40), &Device::Cpu)?;
//! let out = flash_attn(&q, &k, &k, 1.0 / 40f32.sqrt(), false)?;
//! let gradient = out.sqr()?.sum_all()?.backward()?.get(&q).cloned();
//! assert_eq!(gradient.map(|g| g.dims().to_vec()), Some(vec![2, 64, 8, 40]));
//! # Ok(())
//! # }
//! ```
//!
//! # The operator
//!
//! [`decoupled_cross_attention`] takes text and any number of image prompts, each a [`Branch`] with its own softmax, gate and
//! region, in one pass; [`attention()`] takes everything that [`Attention`] can say: several segments in one softmax, biases
//! and masks of any broadcast, key lengths, causal rules, windows, softcap. [`attention_with_lse`] also gives the logarithm
//! of each softmax's denominator, [`eager_attention`] computes the same with candle's own operations.
//!
//! Gradients reach every tracked float tensor: q, every k and v, biases, gates and regions. Candle's custom operations have three
//! inputs; where more are tracked they are concatenated into those.
//!
//! # IP-Adapters
//!
//! [`processors::AttnProcessors`] is what `unet.attn_processors` is in diffusers: attention processors by layer name, adapters,
//! scales and masks, with the backend a property of its own. [`checkpoint::IpAdapter`] reads the published files.
//!
//! # Features
//!
//! * `cuda`: tensors on a GPU, through candle's own backend, which needs nvcc to build and links CUDA. Gradients on a GPU are in
//!   F16 and BF16, as forward is; what the kernels do not take is an error with their reasons.

mod attention;
pub mod checkpoint;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod eager;
mod flash;
mod mask;
mod nn;
mod op;
mod operand;
pub mod processors;
mod varlen;

pub use attention::{attention, attention_with_lse, decoupled_cross_attention};
pub use eager::eager_attention;
pub use flash::{
    FlashAttn, flash_attn, flash_attn_alibi, flash_attn_alibi_windowed, flash_attn_alibi_windowed_softcap,
    flash_attn_windowed,
};
pub use fused_attention::{Attention, Branch, Causal, Gate, Segment, Window};
pub use mask::{MaskRule, resize_mask};
pub use varlen::{
    flash_attn_varlen, flash_attn_varlen_alibi, flash_attn_varlen_alibi_windowed,
    flash_attn_varlen_alibi_windowed_softcap, flash_attn_varlen_paged_windowed, flash_attn_varlen_windowed,
};
