use candle_core::{DType, Device, Result, Tensor};
use candle_flash_attn::{flash_attn, flash_attn_alibi_windowed_softcap, flash_attn_varlen, flash_attn_windowed};

/// A layer of a language model: grouped heads, causal, the last 24 keys, logits capped.
fn local_layer(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let scale = 1.0 / (q.dim(3)? as f32).sqrt();
    flash_attn_alibi_windowed_softcap(q, k, v, None, scale, Some(24), Some(0), 30.0)
}

fn main() -> Result<()> {
    let device = Device::cuda_if_available(0)?;
    let random = |seq: usize, heads: usize| {
        Tensor::randn(0f32, 1.0, (2, seq, heads, 64), &device)?.to_dtype(DType::F16)
    };
    let (q, k, v) = (random(40, 8)?, random(40, 2)?, random(40, 2)?);
    let full = flash_attn(&q, &k, &v, 0.125, true)?;
    let local = flash_attn_windowed(&q, &k, &v, 0.125, Some(24), Some(0))?;
    let capped = local_layer(&q, &k, &v)?;
    // The first rows see no more keys through the window than without it.
    let head = |t: &Tensor| t.narrow(1, 0, 20)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
    assert_eq!(head(&full)?, head(&local)?);
    assert_eq!(capped.dims(), full.dims());

    let lens = Tensor::new(&[0u32, 40, 80], &device)?;
    let pack = |t: &Tensor| t.flatten_to(1);
    let packed = flash_attn_varlen(&pack(&q)?, &pack(&k)?, &pack(&v)?, &lens, &lens, 40, 40, 0.125, true)?;
    let rows = |t: &Tensor| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
    assert_eq!(rows(&packed)?, rows(&full)?);
    println!("{full}");
    Ok(())
}
