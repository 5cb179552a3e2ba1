//! What an attention layer computes: text alone, or text and the images of adapters.

use super::prompt::{ImagePrompt, ImagePrompts};
use super::scale::LayerScale;
use super::unet::AttnLayer;
use crate::nn::linear;
use candle_core::{Error, Result, Tensor};
use fused_attention::{Attention, Branch, Segment};
use std::collections::BTreeMap;
use std::fmt;

/// The inputs of a layer, projected by the UNet's own `to_q`, `to_k` and `to_v`.
#[derive(Clone, Copy, Debug)]
pub struct AttnCall<'a> {
    /// `[batch, seq_q, hidden]`
    pub q: &'a Tensor,
    /// `[1 or batch, seq_kv, hidden]`
    pub k: &'a Tensor,
    /// As `k`.
    pub v: &'a Tensor,
    /// Added to the logits of the text, or a U8 mask: `[1 or batch, 1 or heads, 1 or seq_q, 1 or seq_kv]`. Images have none.
    pub mask: Option<&'a Tensor>,
    /// The images of each adapter.
    pub prompts: &'a ImagePrompts,
}

/// A processor of one's own.
///
/// It says what is computed, as a request to the operator; how is the backend's part. It can therefore neither choose a
/// backend nor be lost with one.
pub trait AttnProcessor: fmt::Debug + Send + Sync {
    /// Its name in the table of processors.
    fn name(&self) -> String;

    /// What is computed for a layer: queries `[batch, seq_q, heads, head_dim]` over branches.
    ///
    /// # Errors
    /// Inputs that do not fit.
    fn request(&self, layer: &AttnLayer, call: &AttnCall<'_>) -> Result<Attention<Tensor>>;

    /// Everything that would be lost with it, by name.
    fn weights(&self) -> Vec<(String, Tensor)> {
        Vec::new()
    }
}

/// What one layer computes.
#[derive(Debug)]
pub enum Processor {
    /// Attention of the queries over `k` and `v`, nothing else.
    Plain,
    /// The same, and a branch for each image prompt of each adapter.
    IpAdapter(IpAdapterProcessor),
    /// One of the user's.
    Custom(Box<dyn AttnProcessor>),
}

impl Processor {
    /// Its name in the table of processors.
    pub fn name(&self) -> String {
        match self {
            Processor::Plain => "Plain".into(),
            Processor::IpAdapter(_) => "IpAdapter".into(),
            Processor::Custom(custom) => custom.name(),
        }
    }

    /// Everything that would be lost with it, by name.
    pub fn weights(&self) -> Vec<(String, Tensor)> {
        match self {
            Processor::Plain => Vec::new(),
            Processor::Custom(custom) => custom.weights(),
            Processor::IpAdapter(IpAdapterProcessor { adapters }) => {
                let named = |(name, KvProjection { to_k_ip, to_v_ip }): (&String, &KvProjection)| {
                    [("to_k_ip", to_k_ip), ("to_v_ip", to_v_ip)].map(|(part, t)| (format!("{name}.{part}"), t.clone()))
                };
                adapters.iter().flat_map(named).collect()
            }
        }
    }
}

/// The projections of an adapter in one layer, both `[hidden, cross_attention_dim]`.
#[derive(Clone, Debug)]
pub struct KvProjection {
    /// From image tokens to keys.
    pub to_k_ip: Tensor,
    /// From image tokens to values.
    pub to_v_ip: Tensor,
}

/// The adapters of one layer, in the order of their names.
#[derive(Debug, Default)]
pub struct IpAdapterProcessor {
    pub(crate) adapters: BTreeMap<String, KvProjection>,
}

/// Text alone.
pub(crate) fn plain(layer: &AttnLayer, call: &AttnCall<'_>) -> Result<Attention<Tensor>> {
    let mut text = Segment::new(by_head(call.k, layer)?, by_head(call.v, layer)?);
    text.bias = call.mask.cloned();
    Ok(Attention::new(by_head(call.q, layer)?).branch(text.into()))
}

impl IpAdapterProcessor {
    /// Text, then each adapter's images, `scale` giving the adapter's factor in this layer.
    pub(crate) fn request<'s>(
        &self,
        layer: &AttnLayer,
        call: &AttnCall<'_>,
        scale: impl Fn(&str) -> &'s LayerScale,
    ) -> Result<Attention<Tensor>> {
        let mut request = plain(layer, call)?;
        for (name, projection) in &self.adapters {
            let prompt = call.prompts.0.get(name).ok_or_else(|| {
                Error::msg(format!(
                    "adapter {name} is loaded, but there is no image prompt for it; give one or remove it"
                ))
            })?;
            let seq_q = call.q.dim(1)?;
            let branches = projection.branches(layer, prompt, scale(name), seq_q);
            request
                .branches
                .extend(branches.map_err(|error| error.context(format!("adapter {name}, {}", layer.name)))?);
        }
        Ok(request)
    }
}

impl KvProjection {
    /// One branch for all images, or with masks one for each.
    fn branches(
        &self,
        layer: &AttnLayer,
        prompt: &ImagePrompt,
        scale: &LayerScale,
        seq_q: usize,
    ) -> Result<Vec<Branch<Tensor>>> {
        let (images, tokens) = (prompt.images(), prompt.tokens().dim(2)?);
        let regions = prompt.regions(seq_q)?;
        let scales = match (scale, &regions) {
            (LayerScale::PerImage(scales), None) => {
                let fault = format!("{} scales, one for each image, need masks; give masks or one scale", scales.len());
                return Err(Error::msg(fault));
            }
            (LayerScale::PerImage(scales), Some(_)) if scales.len() != images => {
                return Err(Error::msg(format!(
                    "there are {} scales for {images} images; give one each",
                    scales.len()
                )));
            }
            (LayerScale::PerImage(scales), Some(_)) => scales.clone(),
            (LayerScale::All(scale), _) => vec![*scale; images],
        };
        if scale.is_zero() {
            return Ok(Vec::new());
        }
        let all = prompt.tokens().flatten(1, 2)?;
        let (k, v) = (by_head(&linear(&all, &self.to_k_ip)?, layer)?, by_head(&linear(&all, &self.to_v_ip)?, layer)?);
        let Some(regions) = regions else {
            return Ok(vec![Branch::new(k, v).gate(scales[0])]);
        };
        let of_image = |(image, region): (usize, Tensor)| {
            let part = |rows: &Tensor| rows.narrow(1, image * tokens, tokens);
            Ok(Branch::new(part(&k)?, part(&v)?).gate(scales[image]).region(region))
        };
        regions.into_iter().enumerate().filter(|(image, _)| scales[*image] != 0.0).map(of_image).collect()
    }
}

/// `[batch, seq, hidden]` as `[batch, seq, heads, head_dim]`.
fn by_head(rows: &Tensor, layer: &AttnLayer) -> Result<Tensor> {
    let (batch, seq, hidden) = rows.dims3()?;
    if hidden != layer.hidden || layer.heads == 0 || !hidden.is_multiple_of(layer.heads) {
        let (name, expected, heads) = (&layer.name, layer.hidden, layer.heads);
        return Err(Error::msg(format!("{name} has {expected} channels in {heads} heads; these rows have {hidden}")));
    }
    rows.reshape((batch, seq, layer.heads, hidden / layer.heads))
}
