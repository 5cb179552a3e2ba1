//! IP-Adapter files, as their authors publish them.
//!
//! A `.safetensors` file has the keys `image_proj.…` and `ip_adapter.…`; a `.bin` file is `torch.save` of two dictionaries of
//! these names. `ip_adapter.{n}.to_k_ip.weight` belongs to attention layer number `n`, counted over self- and
//! cross-attention in the order of `unet.attn_processors`: 1, 3, 5 … are the cross-attention layers.

mod error;
mod lora;
mod projection;
mod resampler;
mod tensors;

pub use error::{CheckpointError, KeyFault};
pub use lora::{FaceIdLora, LayerLora, LoraPair};
pub use projection::ImageProjection;

use crate::processors::{AdapterWeights, AttnLayer, AttnProcessors, KvProjection};
use candle_core::{DType, Device, Tensor};
use std::path::Path;
use tensors::Extent::Known;
use tensors::Tensors;

/// Everything that an adapter's file holds.
///
/// ```no_run
/// # fn main() -> candle_core::Result<()> {
/// use candle_core::{DType, Device};
/// use fused_attention_candle::{checkpoint::IpAdapter, processors::{AttnProcessors, UnetConfig}};
/// let mut processors = AttnProcessors::new(UnetConfig::sd15().layers());
/// let adapter = IpAdapter::read("ip-adapter_sd15.safetensors", &processors, DType::F16, &Device::Cpu)?;
/// processors.load_adapter("style", &adapter)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct IpAdapter {
    /// Projections to keys and values, by layer.
    pub weights: AdapterWeights,
    /// From an image encoder's result to image tokens.
    pub projection: ImageProjection,
    /// Changes of the UNet's own projections, which files of FaceID have.
    pub lora: Option<FaceIdLora>,
}

impl IpAdapter {
    /// Reads a file for the UNet with these processors, and brings its tensors to a type and a device.
    ///
    /// # Errors
    /// A file that cannot be read, or every key that is missing, unknown or of the wrong shape.
    pub fn read(
        path: impl AsRef<Path>,
        processors: &AttnProcessors,
        dtype: DType,
        device: &Device,
    ) -> Result<Self, CheckpointError> {
        Self::take(tensors::read(path.as_ref(), dtype, device)?, processors)
    }

    /// The same from tensors under the keys of the .safetensors format.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn from_tensors(
        tensors: impl IntoIterator<Item = (String, Tensor)>,
        processors: &AttnProcessors,
        dtype: DType,
        device: &Device,
    ) -> Result<Self, CheckpointError> {
        Self::take(Tensors::new(tensors, dtype, device)?, processors)
    }

    fn take(mut tensors: Tensors, processors: &AttnProcessors) -> Result<Self, CheckpointError> {
        let layers: Vec<&AttnLayer> = processors.layers().collect();
        let mut weights = Vec::new();
        for (number, layer) in layers.iter().enumerate() {
            let Some(cross) = layer.cross_attention_dim else { continue };
            let mut take = |part: &str| {
                let key = format!("ip_adapter.{number}.{part}.weight");
                tensors.take(&key, &[Known(layer.hidden), Known(cross)])
            };
            let projection = KvProjection { to_k_ip: take("to_k_ip"), to_v_ip: take("to_v_ip") };
            weights.push((layer.name.clone(), projection));
        }
        let lora = FaceIdLora::take(&mut tensors, &layers);
        let cross_attention_dim = layers.iter().find_map(|layer| layer.cross_attention_dim).unwrap_or(0);
        let projection = ImageProjection::take(&mut tensors, cross_attention_dim);
        tensors.finish()?;
        let no_projection = || CheckpointError::Keys(vec![KeyFault::Missing { key: "image_proj".into() }]);
        Ok(IpAdapter { weights: AdapterWeights::new(weights), projection: projection.ok_or_else(no_projection)?, lora })
    }
}
