//! The LoRA weights that FaceID files carry beside the adapter's.

use super::tensors::Extent::{Any, Known};
use super::tensors::{Extent, Tensors};
use crate::processors::AttnLayer;
use candle_core::{Result, Tensor};
use std::collections::BTreeMap;

/// Low-rank changes of the UNet's own projections, by layer: self-attention and cross-attention.
///
/// Whoever owns those projections adds [`delta`](LoraPair::delta) to their weights.
#[derive(Clone, Debug)]
pub struct FaceIdLora {
    /// By the layers' names.
    pub layers: BTreeMap<String, LayerLora>,
}

/// The changes of one layer.
#[derive(Clone, Debug)]
pub struct LayerLora {
    /// Of `to_q`.
    pub to_q: LoraPair,
    /// Of `to_k`.
    pub to_k: LoraPair,
    /// Of `to_v`.
    pub to_v: LoraPair,
    /// Of `to_out.0`.
    pub to_out: LoraPair,
}

/// One change, `up · down`.
#[derive(Clone, Debug)]
pub struct LoraPair {
    /// `[rank, in]`
    pub down: Tensor,
    /// `[out, rank]`
    pub up: Tensor,
}

impl LoraPair {
    /// What a scale of 1 adds to the projection's weight, `[out, in]`.
    ///
    /// # Errors
    /// Those of the product.
    pub fn delta(&self) -> Result<Tensor> {
        self.up.matmul(&self.down)
    }
}

impl FaceIdLora {
    /// Takes the keys `ip_adapter.{layer}.to_{q,k,v,out}_lora.{down,up}.weight`, if there are any.
    pub(super) fn take(tensors: &mut Tensors, layers: &[&AttnLayer]) -> Option<Self> {
        if !tensors.keys().any(|key| key.contains("_lora.")) {
            return None;
        }
        let mut taken = BTreeMap::new();
        for (number, layer) in layers.iter().enumerate() {
            let hidden = Known(layer.hidden);
            let text = layer.cross_attention_dim.map_or(hidden, Known);
            let mut pair = |part: &str, to: Extent, from: Extent| {
                let key = |end: &str| format!("ip_adapter.{number}.{part}_lora.{end}.weight");
                let rank = tensors.shape(&key("down")).and_then(|shape| shape.first().copied());
                let rank = rank.filter(|&rank| rank > 0).map_or(Any("rank"), Known);
                LoraPair { down: tensors.take(&key("down"), &[rank, from]), up: tensors.take(&key("up"), &[to, rank]) }
            };
            let lora = LayerLora {
                to_q: pair("to_q", hidden, hidden),
                to_k: pair("to_k", hidden, text),
                to_v: pair("to_v", hidden, text),
                to_out: pair("to_out", hidden, hidden),
            };
            taken.insert(layer.name.clone(), lora);
        }
        Some(FaceIdLora { layers: taken })
    }
}
