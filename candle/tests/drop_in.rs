//! The source text of a program for candle-flash-attn, and every signature of that crate's, against this one's.

mod candle_flash_attn {
    pub use fused_attention_candle::*;
}

mod program {
    use super::candle_flash_attn;

    include!("drop_in/program.rs");

    #[test]
    fn a_program_for_candle_flash_attn_runs_as_it_is() -> Result<()> {
        main()
    }
}

use candle_core::{Result, Tensor};

type T<'a> = &'a Tensor;
type Size = Option<usize>;

/// The types of candle-flash-attn 0.11.1, written down from its source.
#[expect(clippy::type_complexity, reason = "signatures are written out to be compared")]
#[test]
fn the_signatures_are_those_of_candle_flash_attn() {
    use candle_flash_attn as f;
    let _: fn(T, T, T, f32, bool) -> Result<Tensor> = f::flash_attn;
    let _: fn(T, T, T, f32, Size, Size) -> Result<Tensor> = f::flash_attn_windowed;
    let _: fn(T, T, T, T, f32, bool) -> Result<Tensor> = f::flash_attn_alibi;
    let _: fn(T, T, T, T, f32, Size, Size) -> Result<Tensor> = f::flash_attn_alibi_windowed;
    let _: fn(T, T, T, Option<T>, f32, Size, Size, f32) -> Result<Tensor> = f::flash_attn_alibi_windowed_softcap;
    let _: fn(T, T, T, T, T, usize, usize, f32, bool) -> Result<Tensor> = f::flash_attn_varlen;
    let _: fn(T, T, T, T, T, usize, usize, f32, Size, Size) -> Result<Tensor> = f::flash_attn_varlen_windowed;
    let _: fn(T, T, T, T, T, T, usize, usize, f32, bool) -> Result<Tensor> = f::flash_attn_varlen_alibi;
    let _: fn(T, T, T, T, T, T, usize, usize, f32, Size, Size) -> Result<Tensor> = f::flash_attn_varlen_alibi_windowed;
    type Softcap = fn(T, T, T, Option<T>, T, T, usize, usize, f32, Size, Size, f32) -> Result<Tensor>;
    let _: Softcap = f::flash_attn_varlen_alibi_windowed_softcap;
    type Paged = fn(T, T, T, T, T, T, Option<T>, usize, usize, f32, Size, Size, usize, Option<f32>) -> Result<Tensor>;
    let _: Paged = f::flash_attn_varlen_paged_windowed;
    let fields = |op: f::FlashAttn| {
        let f::FlashAttn { softmax_scale, alibi_slopes, window_size_left, window_size_right, softcap } = op;
        let _: (f32, Option<Tensor>, Size, Size, Option<f32>) =
            (softmax_scale, alibi_slopes, window_size_left, window_size_right, softcap);
    };
    let _: fn(f::FlashAttn) = fields;
}
