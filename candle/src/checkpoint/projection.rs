//! From what an image encoder gives to image tokens.

use super::error::KeyFault;
use super::resampler::Resampler;
use super::tensors::Extent::{Any, Known};
use super::tensors::Tensors;
use crate::nn::Affine;
use candle_core::{Error, Result, Tensor};

/// An adapter's projection of images, of one of four kinds.
#[derive(Clone, Debug)]
pub struct ImageProjection {
    kind: Kind,
    cross_attention_dim: usize,
}

#[derive(Clone, Debug)]
enum Kind {
    /// One vector, a linear layer to all tokens, a norm.
    Linear { proj: Affine, norm: Affine },
    /// Full-face: every patch on its own through linear, GELU, linear, norm.
    FullFace { first: Affine, second: Affine, norm: Affine },
    /// FaceID: one vector through linear, GELU, linear to all tokens, norm.
    FaceId { first: Affine, second: Affine, norm: Affine },
    /// Plus.
    Resampler(Box<Resampler>),
}

impl ImageProjection {
    /// Takes the keys `image_proj.…`; which are there tells the kind. Nothing if they tell none.
    pub(super) fn take(tensors: &mut Tensors, cross_attention_dim: usize) -> Option<Self> {
        let cross = Known(cross_attention_dim);
        let key = |name: &str| format!("image_proj.{name}");
        let has = |tensors: &Tensors, name: &str| tensors.shape(&key(name)).is_some();
        // How many tokens of this width a tensor's first extent makes.
        let tokens = |tensors: &Tensors, name: &str| {
            let rows = tensors.shape(&key(name)).and_then(|shape| shape.first().copied()).unwrap_or(0);
            Known(rows.div_ceil(cross_attention_dim.max(1)).max(1) * cross_attention_dim)
        };
        let kind = if has(tensors, "proj.weight") {
            let all = tokens(tensors, "proj.weight");
            let proj = tensors.linear("image_proj.proj", all, Any("image_embed_dim"));
            Kind::Linear { proj, norm: tensors.norm("image_proj.norm", cross) }
        } else if has(tensors, "proj.3.weight") {
            let width = width(tensors, "image_proj.proj.0.weight", 1);
            let first = tensors.linear("image_proj.proj.0", width, width);
            let second = tensors.linear("image_proj.proj.2", cross, width);
            Kind::FullFace { first, second, norm: tensors.norm("image_proj.proj.3", cross) }
        } else if has(tensors, "perceiver_resampler.proj_in.weight") {
            let kind = "FaceID-Plus (`perceiver_resampler`)";
            tensors.fault(KeyFault::NotYet { key: key("perceiver_resampler.proj_in.weight"), kind });
            return None;
        } else if has(tensors, "norm.weight") {
            let all = tokens(tensors, "proj.2.weight");
            let hidden = width(tensors, "image_proj.proj.0.weight", 0);
            let first = tensors.linear("image_proj.proj.0", hidden, Any("image_embed_dim"));
            let second = tensors.linear("image_proj.proj.2", all, hidden);
            Kind::FaceId { first, second, norm: tensors.norm("image_proj.norm", cross) }
        } else {
            Kind::Resampler(Box::new(Resampler::take(tensors, cross)))
        };
        Some(ImageProjection { kind, cross_attention_dim })
    }

    /// Image tokens `[batch, images, tokens, cross_attention_dim]` for an [`ImagePrompt`](crate::processors::ImagePrompt).
    ///
    /// What an image is depends on the kind: one vector, `[batch, images, image_embed_dim]`, for the linear and the FaceID
    /// one, and the encoder's tokens, `[batch, images, patches, width]`, for full-face and Plus.
    ///
    /// # Errors
    /// A tensor of another shape.
    pub fn forward(&self, images: &Tensor) -> Result<Tensor> {
        let rank = if self.takes_vectors() { 3 } else { 4 };
        if images.rank() != rank {
            let expected = ["[batch, images, image_embed_dim]", "[batch, images, patches, width]"][rank - 3];
            return Err(Error::msg(format!("images have shape {:?}; this projection takes {expected}", images.dims())));
        }
        let leading = [images.dims()[0], images.dims()[1]];
        let mlp = |first: &Affine, second: &Affine| second.linear(&first.linear(images)?.gelu_erf()?);
        let tokens = match &self.kind {
            Kind::Linear { proj, norm } => norm.layer_norm(&self.split(proj.linear(images)?, leading)?)?,
            Kind::FaceId { first, second, norm } => norm.layer_norm(&self.split(mlp(first, second)?, leading)?)?,
            Kind::FullFace { first, second, norm } => norm.layer_norm(&mlp(first, second)?)?,
            Kind::Resampler(resampler) => {
                let tokens = resampler.forward(&images.flatten(0, 1)?)?;
                let (_, count, width) = tokens.dims3()?;
                tokens.reshape((leading[0], leading[1], count, width))?
            }
        };
        Ok(tokens)
    }

    fn takes_vectors(&self) -> bool {
        matches!(self.kind, Kind::Linear { .. } | Kind::FaceId { .. })
    }

    /// One long row per image into tokens.
    fn split(&self, rows: Tensor, [batch, images]: [usize; 2]) -> Result<Tensor> {
        rows.reshape((batch, images, (), self.cross_attention_dim))
    }
}

/// The extent of a tensor that others are held against.
fn width(tensors: &Tensors, key: &str, dim: usize) -> super::tensors::Extent {
    tensors.shape(key).and_then(|shape| shape.get(dim).copied()).map_or(Any("width"), Known)
}
