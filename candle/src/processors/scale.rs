//! How strong an adapter is: everywhere, per layer, or per block as InstantStyle has it.

use super::unet::AttnLayer;
use std::collections::BTreeMap;

/// An adapter's factor in one layer. Negative and above 1 is legal; 0 costs nothing.
#[derive(Clone, Debug, PartialEq)]
pub enum LayerScale {
    /// The same for all of its images.
    All(f32),
    /// One for each image; the images then need masks, which keep them apart.
    PerImage(Vec<f32>),
}

impl From<f32> for LayerScale {
    fn from(scale: f32) -> Self {
        LayerScale::All(scale)
    }
}

impl From<Vec<f32>> for LayerScale {
    fn from(scales: Vec<f32>) -> Self {
        LayerScale::PerImage(scales)
    }
}

impl LayerScale {
    fn numbers(&self) -> &[f32] {
        match self {
            LayerScale::All(scale) => std::slice::from_ref(scale),
            LayerScale::PerImage(scales) => scales,
        }
    }

    /// Whether the adapter does nothing here.
    pub(crate) fn is_zero(&self) -> bool {
        self.numbers().iter().all(|&scale| scale == 0.0)
    }
}

/// An adapter's factor in every layer.
#[derive(Clone, Debug, PartialEq)]
pub enum Scale {
    /// The same in all layers.
    Everywhere(LayerScale),
    /// By the layer's full name; layers that are not named get 0.
    Layers(BTreeMap<String, LayerScale>),
    /// By the attention modules of a block; blocks that are not named get 0.
    Blocks(BlockScales),
}

impl From<f32> for Scale {
    fn from(scale: f32) -> Self {
        Scale::Everywhere(scale.into())
    }
}

impl From<BlockScales> for Scale {
    fn from(scales: BlockScales) -> Self {
        Scale::Blocks(scales)
    }
}

/// What diffusers writes as `{"down": {"block_2": [0.0, 1.0]}, "up": {"block_0": [0.0, 1.0, 0.0]}}`:
///
/// ```
/// use fused_attention_candle::processors::BlockScales;
/// let style_and_layout = BlockScales::new().down(2, [0.0, 1.0]).up(0, [0.0, 1.0, 0.0]);
/// assert_eq!(style_and_layout, BlockScales::style_and_layout());
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BlockScales {
    /// Block (`down_blocks.2`), and one factor for all of its attention modules or one for each.
    blocks: BTreeMap<String, Vec<LayerScale>>,
}

impl BlockScales {
    /// 0 everywhere.
    pub fn new() -> Self {
        Self::default()
    }

    /// InstantStyle on SDXL: the style of the picture, not its layout.
    pub fn style() -> Self {
        Self::new().up(0, [0.0, 1.0, 0.0])
    }

    /// InstantStyle on SDXL: style and layout.
    pub fn style_and_layout() -> Self {
        Self::style().down(2, [0.0, 1.0])
    }

    /// Factors of the attention modules of a block on the way down; one alone counts for all of them.
    pub fn down<S: Into<LayerScale>>(self, block: usize, scales: impl IntoIterator<Item = S>) -> Self {
        self.set(format!("down_blocks.{block}"), scales)
    }

    /// Factors of the attention modules of a block on the way up; one alone counts for all of them.
    pub fn up<S: Into<LayerScale>>(self, block: usize, scales: impl IntoIterator<Item = S>) -> Self {
        self.set(format!("up_blocks.{block}"), scales)
    }

    /// Factor of the middle.
    pub fn mid(self, scale: impl Into<LayerScale>) -> Self {
        self.set("mid_block".into(), [scale])
    }

    fn set<S: Into<LayerScale>>(mut self, block: String, scales: impl IntoIterator<Item = S>) -> Self {
        self.blocks.insert(block, scales.into_iter().map(Into::into).collect());
        self
    }
}

/// The factor of each cross-attention layer, in their order, or every reason why the scale does not go with them.
pub(crate) fn expand(scale: &Scale, layers: &[&AttnLayer]) -> Result<Vec<LayerScale>, Vec<String>> {
    let mut faults = Vec::new();
    let expanded: Vec<LayerScale> = match scale {
        Scale::Everywhere(scale) => vec![scale.clone(); layers.len()],
        Scale::Layers(scales) => {
            let known = |name: &String| layers.iter().any(|layer| layer.name == *name);
            let unknown = scales.keys().filter(|name| !known(name));
            faults.extend(unknown.map(|name| format!("{name} is no cross-attention layer; see `layers()`")));
            layers.iter().map(|layer| scales.get(&layer.name).cloned().unwrap_or(LayerScale::All(0.0))).collect()
        }
        Scale::Blocks(BlockScales { blocks }) => {
            for (block, scales) in blocks {
                let modules = modules(layers, block);
                if modules == 0 {
                    faults.push(format!("{block} has no cross-attention layer; leave it out"));
                } else if scales.len() != 1 && scales.len() != modules {
                    let given = scales.len();
                    faults.push(format!(
                        "{block} has {modules} attention modules, not {given}; give 1 or {modules} scales"
                    ));
                }
            }
            let of = |layer: &&AttnLayer| {
                let (block, module) = place(&layer.name)?;
                let scales = blocks.get(block)?;
                scales.get(if scales.len() == 1 { 0 } else { module }).cloned()
            };
            layers.iter().map(|layer| of(layer).unwrap_or(LayerScale::All(0.0))).collect()
        }
    };
    for (scale, layer) in expanded.iter().zip(layers) {
        if let Some(number) = scale.numbers().iter().find(|number| !number.is_finite()) {
            faults.push(format!("the scale of {} is {number}; it must be finite", layer.name));
        }
    }
    if faults.is_empty() { Ok(expanded) } else { Err(faults) }
}

/// Block and number of the attention module of a layer.
fn place(name: &str) -> Option<(&str, usize)> {
    let (block, rest) = name.split_once(".attentions.")?;
    Some((block, rest.split('.').next()?.parse().ok()?))
}

/// How many attention modules a block has.
fn modules(layers: &[&AttnLayer], block: &str) -> usize {
    let numbers = layers.iter().filter_map(|layer| place(&layer.name));
    numbers.filter(|(of, _)| *of == block).map(|(_, module)| module + 1).max().unwrap_or(0)
}
