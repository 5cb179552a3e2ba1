//! A program that was written for candle-flash-attn, unchanged but for the crate that the name stands for.
//!
//! `candle/tests/drop_in/program.rs` is the program. Here its `use candle_flash_attn::…` finds this crate.
//! Run: `cargo run -p fused-attention-candle --example drop_in`.

mod candle_flash_attn {
    pub use fused_attention_candle::*;
}

include!("../tests/drop_in/program.rs");
