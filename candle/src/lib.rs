//! Fused attention for candle.

mod attention;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod eager;
mod flash;
mod op;
mod operand;
mod varlen;

pub use attention::{attention, attention_with_lse, decoupled_cross_attention};
pub use eager::eager_attention;
pub use flash::{
    FlashAttn, flash_attn, flash_attn_alibi, flash_attn_alibi_windowed, flash_attn_alibi_windowed_softcap,
    flash_attn_windowed,
};
pub use fused_attention::{Attention, Branch, Causal, Gate, Segment, Window};
pub use varlen::{
    flash_attn_varlen, flash_attn_varlen_alibi, flash_attn_varlen_alibi_windowed,
    flash_attn_varlen_alibi_windowed_softcap, flash_attn_varlen_paged_windowed, flash_attn_varlen_windowed,
};
