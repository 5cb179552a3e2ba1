//! The Resampler of IP-Adapter Plus: latents that attend to the image encoder's tokens and to themselves.

use super::tensors::Extent::{Any, Known};
use super::tensors::{Extent, Tensors};
use crate::attention;
use crate::nn::{Affine, linear};
use candle_core::{Result, Tensor};
use fused_attention::{Attention, Branch};

/// Elements of a head; the file does not tell them.
const HEAD_DIM: usize = 64;

#[derive(Clone, Debug)]
pub(super) struct Resampler {
    /// `[1, tokens, hidden]`
    latents: Tensor,
    proj_in: Affine,
    proj_out: Affine,
    norm_out: Affine,
    layers: Vec<Layer>,
}

#[derive(Clone, Debug)]
struct Layer {
    norm_image: Affine,
    norm_latents: Affine,
    to_q: Tensor,
    /// Keys, then values.
    to_kv: Tensor,
    to_out: Tensor,
    norm_mlp: Affine,
    mlp: [Tensor; 2],
}

impl Resampler {
    pub(super) fn take(tensors: &mut Tensors, cross: Extent) -> Self {
        let extent = |tensors: &Tensors, key: &str, dim: usize| tensors.shape(key).and_then(|s| s.get(dim).copied());
        let hidden = extent(tensors, "image_proj.latents", 2).map_or(Any("hidden"), Known);
        let mut layers = Vec::new();
        // The first layer is asked for in any case, so that a file without any is told what it lacks.
        while layers.is_empty()
            || tensors.keys().any(|key| key.starts_with(&format!("image_proj.layers.{}.", layers.len())))
        {
            let at = |rest: &str| format!("image_proj.layers.{}.{rest}", layers.len());
            // A whole number of heads.
            let rows = extent(tensors, &at("0.to_q.weight"), 0);
            let inner = rows.map_or(HEAD_DIM, |rows| rows.div_ceil(HEAD_DIM).max(1) * HEAD_DIM);
            let mlp = extent(tensors, &at("1.1.weight"), 0).map_or(Any("mlp"), Known);
            layers.push(Layer {
                norm_image: tensors.norm(&at("0.norm1"), hidden),
                norm_latents: tensors.norm(&at("0.norm2"), hidden),
                to_q: tensors.take(&at("0.to_q.weight"), &[Known(inner), hidden]),
                to_kv: tensors.take(&at("0.to_kv.weight"), &[Known(2 * inner), hidden]),
                to_out: tensors.take(&at("0.to_out.weight"), &[hidden, Known(inner)]),
                norm_mlp: tensors.norm(&at("1.0"), hidden),
                mlp: [tensors.take(&at("1.1.weight"), &[mlp, hidden]), tensors.take(&at("1.3.weight"), &[hidden, mlp])],
            });
        }
        Resampler {
            latents: tensors.take("image_proj.latents", &[Known(1), Any("tokens"), hidden]),
            proj_in: tensors.linear("image_proj.proj_in", hidden, Any("image_embed_dim")),
            proj_out: tensors.linear("image_proj.proj_out", cross, hidden),
            norm_out: tensors.norm("image_proj.norm_out", cross),
            layers,
        }
    }

    /// `[images, patches, image_embed_dim]` to `[images, tokens, cross_attention_dim]`.
    pub(super) fn forward(&self, patches: &Tensor) -> Result<Tensor> {
        let image = self.proj_in.linear(patches)?;
        let (_, tokens, hidden) = self.latents.dims3()?;
        let mut latents = self.latents.broadcast_as((patches.dim(0)?, tokens, hidden))?.contiguous()?;
        for layer in &self.layers {
            latents = (&latents + layer.attend(&image, &latents)?)?;
            let [up, down] = &layer.mlp;
            let hidden = linear(&layer.norm_mlp.layer_norm(&latents)?, up)?.gelu_erf()?;
            latents = (latents + linear(&hidden, down)?)?;
        }
        self.norm_out.layer_norm(&self.proj_out.linear(&latents)?)
    }
}

impl Layer {
    /// The latents attend to the image's tokens and to themselves.
    fn attend(&self, image: &Tensor, latents: &Tensor) -> Result<Tensor> {
        let (image, latents) = (self.norm_image.layer_norm(image)?, self.norm_latents.layer_norm(latents)?);
        let heads = self.to_q.dim(0)? / HEAD_DIM;
        let by_head = |rows: Tensor| {
            let (batch, seq, width) = rows.dims3()?;
            rows.reshape((batch, seq, width / HEAD_DIM, HEAD_DIM))
        };
        // Keys and values are a view of one projection.
        let kv = by_head(linear(&Tensor::cat(&[&image, &latents], 1)?, &self.to_kv)?)?;
        let (k, v) = (kv.narrow(2, 0, heads)?, kv.narrow(2, heads, heads)?);
        let out = attention(&Attention::new(by_head(linear(&latents, &self.to_q)?)?).branch(Branch::new(k, v)))?;
        linear(&out.flatten_from(2)?, &self.to_out)
    }
}
