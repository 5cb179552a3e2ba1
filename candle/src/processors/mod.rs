//! The attention processors of a UNet, as something to look at and change.
//!
//! In diffusers an attention layer's processor is both *what* it computes (text alone, or text and the images of adapters)
//! and *how* (eager, memory-efficient). Choosing how therefore replaces what, and an adapter's weights with it, unless the
//! order of calls happens to be right. Here they are two properties: a [`Processor`] holds the weights and says what is
//! computed, a [`Backend`] computes it. [`set_backend`](AttnProcessors::set_backend) has no way to reach a weight, and whatever
//! does take weights out of the registry hands them back.

mod processor;
mod prompt;
mod scale;
mod table;
mod unet;

pub use processor::{AttnCall, AttnProcessor, IpAdapterProcessor, KvProjection, Processor};
pub use prompt::{ImagePrompt, ImagePrompts};
pub use scale::{BlockScales, LayerScale, Scale};
pub use unet::{AttnLayer, UnetConfig};

use crate::checkpoint::IpAdapter;
use crate::operand::refuse_if;
use crate::{attention, eager_attention};
use candle_core::{Error, Result, Tensor};
use std::collections::BTreeMap;
use std::fmt;

/// How attention is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Backend {
    /// One pass of the fused operator over all branches; nothing of size queries × keys.
    #[default]
    Fused,
    /// Candle's own operations, logits stored.
    Eager,
}

impl Backend {
    fn run(self, request: &fused_attention::Attention<Tensor>) -> Result<Tensor> {
        match self {
            Backend::Fused => attention(request),
            Backend::Eager => eager_attention(request),
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Backend::Fused => "fused",
            Backend::Eager => "eager",
        })
    }
}

/// The attention processors of a UNet by layer: what `unet.attn_processors` is in diffusers, and the one place where adapters
/// are added, scaled and removed.
///
/// Printed, it is a table of all layers.
///
/// ```
/// # fn main() -> candle_core::Result<()> {
/// # use candle_core::{DType, Device, Tensor};
/// use fused_attention_candle::processors::*;
/// # let config = UnetConfig { channels: vec![8], heads: vec![2], depth: vec![1], middle_depth: 1, layers_per_block: 1,
/// #     cross_attention_dim: 6 };
/// # let weights = |layers: &[&AttnLayer]| AdapterWeights::new(layers.iter().map(|layer| {
/// #     let to = Tensor::ones((layer.hidden, 6), DType::F32, &Device::Cpu).unwrap();
/// #     (layer.name.clone(), KvProjection { to_k_ip: to.clone(), to_v_ip: to })
/// # }));
/// # let rows = |tokens: usize| Tensor::ones((1, tokens, 8), DType::F32, &Device::Cpu);
/// # let (q, k, v, tokens) = (rows(4)?, rows(3)?, rows(3)?, Tensor::ones((1, 1, 2, 6), DType::F32, &Device::Cpu)?);
/// let mut processors = AttnProcessors::new(config.layers());      // UnetConfig::sd15(), ::sdxl()
/// processors.add_adapter("face", &weights(&processors.cross_layers()))?; // or `load_adapter`, from a file
/// processors.set_backend(Backend::Eager);                         // no order of calls can lose the adapter
/// processors.set_scale("face", 0.8)?;
/// let prompts = ImagePrompts::new().with("face", ImagePrompt::new(tokens)?);
/// let layer = "mid_block.attentions.0.transformer_blocks.0.attn2.processor";
/// let out = processors.attend(layer, &AttnCall { q: &q, k: &k, v: &v, mask: None, prompts: &prompts })?;
/// let back = processors.remove_adapter("face")?;                  // the weights, and the scale
/// println!("{processors}");
/// # assert_eq!((out.dims(), back.weights.layers().len()), (&[1, 4, 8][..], 4));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct AttnProcessors {
    entries: Vec<Entry>,
    /// Factor of each adapter in each cross-attention layer, in their order.
    scales: BTreeMap<String, (Scale, Vec<LayerScale>)>,
}

#[derive(Debug)]
struct Entry {
    layer: AttnLayer,
    processor: Processor,
    backend: Backend,
    /// Number among the cross-attention layers.
    cross: Option<usize>,
}

/// The weights of an adapter in every cross-attention layer, by the layers' names.
#[derive(Clone, Debug)]
pub struct AdapterWeights {
    layers: BTreeMap<String, KvProjection>,
}

impl AdapterWeights {
    /// Weights by layer.
    pub fn new(layers: impl IntoIterator<Item = (String, KvProjection)>) -> Self {
        AdapterWeights { layers: layers.into_iter().collect() }
    }

    /// Weights by layer.
    pub fn layers(&self) -> &BTreeMap<String, KvProjection> {
        &self.layers
    }
}

/// What a layer had before; dropping it drops the weights it holds.
#[must_use = "it holds the processor that was there, with its weights; drop it only if they may go"]
#[derive(Debug)]
pub struct Replaced {
    /// The layer's name.
    pub layer: String,
    /// Its former processor.
    pub processor: Processor,
}

/// An adapter that was taken out; dropping it drops its weights.
#[must_use = "it holds the adapter's weights; drop it only if they may go"]
#[derive(Debug)]
pub struct RemovedAdapter {
    /// Its name.
    pub name: String,
    /// Its weights, to be added again. Layers whose processor was replaced in the meantime are not among them.
    pub weights: AdapterWeights,
    /// Its scale, if one was set.
    pub scale: Option<Scale>,
}

/// The factor of an adapter for which none was set.
const DEFAULT_SCALE: LayerScale = LayerScale::All(1.0);

impl AttnProcessors {
    /// Plain processors for these layers, all on the fused backend. Of layers with one name the first counts.
    pub fn new(layers: impl IntoIterator<Item = AttnLayer>) -> Self {
        let mut entries: Vec<Entry> = Vec::new();
        let mut crosses = 0..;
        for layer in layers {
            if entries.iter().all(|entry| entry.layer.name != layer.name) {
                let cross = layer.cross_attention_dim.and_then(|_| crosses.next());
                entries.push(Entry { layer, processor: Processor::Plain, backend: Backend::default(), cross });
            }
        }
        AttnProcessors { entries, scales: BTreeMap::new() }
    }

    /// All layers, in order.
    pub fn layers(&self) -> impl Iterator<Item = &AttnLayer> {
        self.entries.iter().map(|entry| &entry.layer)
    }

    /// The layers that adapters have weights for, in order.
    pub fn cross_layers(&self) -> Vec<&AttnLayer> {
        self.layers().filter(|layer| layer.cross_attention_dim.is_some()).collect()
    }

    /// A layer's processor.
    pub fn processor(&self, layer: &str) -> Option<&Processor> {
        self.entries.iter().find(|entry| entry.layer.name == layer).map(|entry| &entry.processor)
    }

    /// A layer's backend.
    pub fn backend(&self, layer: &str) -> Option<Backend> {
        self.entries.iter().find(|entry| entry.layer.name == layer).map(|entry| entry.backend)
    }

    /// The names of the adapters, in the order in which they are computed.
    pub fn adapters(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.entries.iter().flat_map(Entry::adapters).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// An adapter's factor in a layer; 1 if none was set.
    pub fn scale(&self, adapter: &str, layer: &str) -> Option<&LayerScale> {
        let entry = self.entries.iter().find(|entry| entry.layer.name == layer)?;
        Some(self.scale_at(adapter, entry.cross?))
    }

    fn scale_at(&self, adapter: &str, cross: usize) -> &LayerScale {
        self.scales.get(adapter).map_or(&DEFAULT_SCALE, |(_, expanded)| &expanded[cross])
    }

    /// Has all layers computed by this backend. What they compute stays.
    pub fn set_backend(&mut self, backend: Backend) {
        self.entries.iter_mut().for_each(|entry| entry.backend = backend);
    }

    /// The same for one layer.
    ///
    /// # Errors
    /// A name that no layer has.
    pub fn set_layer_backend(&mut self, layer: &str, backend: Backend) -> Result<()> {
        self.entry_mut(layer)?.backend = backend;
        Ok(())
    }

    /// Puts another processor in a layer's place and hands back the one that was there, with its weights.
    ///
    /// ```
    /// # #![deny(unused_must_use)]
    /// # use fused_attention_candle::processors::*;
    /// # fn replace(processors: &mut AttnProcessors, layer: &str) -> candle_core::Result<Replaced> {
    /// let former = processors.set_processor(layer, Processor::Plain)?;
    /// # Ok(former)
    /// # }
    /// ```
    ///
    /// What comes back must be used: with `#![deny(unused_must_use)]` this does not compile, and without it warns:
    ///
    /// ```compile_fail
    /// # #![deny(unused_must_use)]
    /// # use fused_attention_candle::processors::*;
    /// # fn replace(processors: &mut AttnProcessors, layer: &str) -> candle_core::Result<()> {
    /// processors.set_processor(layer, Processor::Plain)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// A name that no layer has.
    pub fn set_processor(&mut self, layer: &str, processor: Processor) -> Result<Replaced> {
        let entry = self.entry_mut(layer)?;
        let processor = std::mem::replace(&mut entry.processor, processor);
        Ok(Replaced { layer: layer.into(), processor })
    }

    /// Adds an adapter to every cross-attention layer. Its scale is the one last set for its name, else 1.
    ///
    /// # Errors
    /// A name that is taken, layers without weights or weights without a layer, shapes that do not fit, and layers whose
    /// processor is one of the user's: all of them at once. Nothing is changed then.
    pub fn add_adapter(&mut self, name: &str, weights: &AdapterWeights) -> Result<()> {
        let mut faults = Vec::new();
        if self.entries.iter().any(|entry| entry.adapters().any(|loaded| loaded == name)) {
            faults.push(format!("there is an adapter {name} already; remove it first or choose another name"));
        }
        for entry in self.entries.iter().filter(|entry| entry.cross.is_some()) {
            let layer = &entry.layer;
            match weights.layers.get(&layer.name) {
                None => faults.push(format!("{} has no weights in the adapter", layer.name)),
                Some(projection) => faults.extend(projection.faults(layer)),
            }
            if let Processor::Custom(custom) = &entry.processor {
                let (name, processor) = (&layer.name, custom.name());
                faults
                    .push(format!("{name} has the processor {processor}, which takes no adapters; set another first"));
            }
        }
        let unknown = weights.layers.keys().filter(|name| self.cross_layers().iter().all(|layer| layer.name != **name));
        faults.extend(unknown.map(|name| format!("{name} is no cross-attention layer here")));
        refuse_if(faults)?;
        for entry in self.entries.iter_mut().filter(|entry| entry.cross.is_some()) {
            if let Processor::Plain = entry.processor {
                entry.processor = Processor::IpAdapter(IpAdapterProcessor::default());
            }
            if let (Processor::IpAdapter(ip), Some(projection)) =
                (&mut entry.processor, weights.layers.get(&entry.layer.name))
            {
                ip.adapters.insert(name.into(), projection.clone());
            }
        }
        Ok(())
    }

    /// Adds an adapter that was read from a file.
    ///
    /// # Errors
    /// As [`add_adapter`](Self::add_adapter). An adapter whose LoRA has not been taken is refused: without it FaceID does not
    /// work, and only the owner of the UNet's projections can merge it.
    pub fn load_adapter(&mut self, name: &str, adapter: &IpAdapter) -> Result<()> {
        if adapter.lora.is_some() {
            let fault =
                "the adapter has LoRA weights for the UNet's own projections; `take()` its `lora` and merge it there";
            return Err(Error::msg(fault));
        }
        self.add_adapter(name, &adapter.weights)
    }

    /// Takes an adapter out of every layer that has it, and hands it back with its scale.
    ///
    /// # Errors
    /// A name that no adapter has.
    pub fn remove_adapter(&mut self, name: &str) -> Result<RemovedAdapter> {
        let mut layers = BTreeMap::new();
        for entry in &mut self.entries {
            if let Processor::IpAdapter(ip) = &mut entry.processor {
                if let Some(projection) = ip.adapters.remove(name) {
                    layers.insert(entry.layer.name.clone(), projection);
                }
                if ip.adapters.is_empty() {
                    entry.processor = Processor::Plain;
                }
            }
        }
        if layers.is_empty() {
            let loaded = self.adapters().join(", ");
            return Err(Error::msg(format!("there is no adapter {name}; loaded: [{loaded}]")));
        }
        let scale = self.scales.remove(name).map(|(scale, _)| scale);
        Ok(RemovedAdapter { name: name.into(), weights: AdapterWeights { layers }, scale })
    }

    /// Sets how strong an adapter is. It may be added later; that it is there is asked for when a layer is computed.
    ///
    /// # Errors
    /// Layers or blocks that are not there, counts that do not fit, numbers that are not finite: all of them at once.
    pub fn set_scale(&mut self, adapter: &str, scale: impl Into<Scale>) -> Result<()> {
        let scale = scale.into();
        match scale::expand(&scale, &self.cross_layers()) {
            Ok(expanded) => {
                self.scales.insert(adapter.into(), (scale, expanded));
                Ok(())
            }
            Err(faults) => refuse_if(faults),
        }
    }

    /// Forgets the scale set for an adapter, which is 1 again.
    pub fn reset_scale(&mut self, adapter: &str) -> Option<Scale> {
        self.scales.remove(adapter).map(|(scale, _)| scale)
    }

    /// Computes a layer: `[batch, seq_q, hidden]`, to be given to the UNet's `to_out`.
    ///
    /// # Errors
    /// A name that no layer has, tensors that do not fit, a prompt without its adapter or an adapter without its prompt, and
    /// a scale that was set for an adapter that is not there.
    pub fn attend(&self, layer: &str, call: &AttnCall<'_>) -> Result<Tensor> {
        let entry = self.entry(layer)?;
        let request = match &entry.processor {
            Processor::Plain => processor::plain(&entry.layer, call)?,
            Processor::Custom(custom) => custom.request(&entry.layer, call)?,
            Processor::IpAdapter(ip) => {
                ip.request(&entry.layer, call, |name| self.scale_at(name, entry.cross.unwrap_or_default()))?
            }
        };
        if entry.cross.is_some() {
            self.check_names(call.prompts)?;
        }
        let out = entry.backend.run(&request)?;
        let (batch, seq_q, heads, value_dim) = out.dims4()?;
        out.reshape((batch, seq_q, heads * value_dim))
    }

    /// Names that are used without an adapter.
    fn check_names(&self, prompts: &ImagePrompts) -> Result<()> {
        let adapters = self.adapters();
        let missing = |name: &&String| !adapters.contains(&name.as_str());
        let loaded = adapters.join(", ");
        let of_prompts = (prompts.0.keys().filter(missing))
            .map(|name| format!("there is an image prompt for {name}, but no such adapter; loaded: [{loaded}]"));
        let of_scales = (self.scales.keys().filter(missing))
            .map(|name| format!("there is a scale for {name}, but no such adapter; loaded: [{loaded}]"));
        refuse_if(of_prompts.chain(of_scales).collect())
    }

    fn entry(&self, layer: &str) -> Result<&Entry> {
        let found = self.entries.iter().find(|entry| entry.layer.name == layer);
        found.ok_or_else(|| Error::msg(format!("there is no attention layer {layer}; see `layers()`")))
    }

    fn entry_mut(&mut self, layer: &str) -> Result<&mut Entry> {
        let found = self.entries.iter_mut().find(|entry| entry.layer.name == layer);
        found.ok_or_else(|| Error::msg(format!("there is no attention layer {layer}; see `layers()`")))
    }
}

impl Entry {
    /// Names of the adapters with weights in this layer.
    fn adapters(&self) -> impl Iterator<Item = &str> {
        let ip = match &self.processor {
            Processor::IpAdapter(ip) => Some(ip),
            _ => None,
        };
        ip.into_iter().flat_map(|ip| ip.adapters.keys().map(String::as_str))
    }
}

impl KvProjection {
    /// What speaks against these weights in a layer.
    fn faults(&self, layer: &AttnLayer) -> Vec<String> {
        let expected = [layer.hidden, layer.cross_attention_dim.unwrap_or(0)];
        let wrong = [("to_k_ip", &self.to_k_ip), ("to_v_ip", &self.to_v_ip)].into_iter();
        wrong
            .filter(|(_, tensor)| tensor.dims() != expected)
            .map(|(part, tensor)| {
                format!("{part} of {} has shape {:?}; it must be {expected:?}", layer.name, tensor.dims())
            })
            .collect()
    }
}
