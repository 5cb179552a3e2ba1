//! The attention layers of a UNet, named and ordered as diffusers names and orders them.

/// What makes the attention layers of a `UNet2DConditionModel`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnetConfig {
    /// Channels of each block, on the way down.
    pub channels: Vec<usize>,
    /// Heads of the attention layers of each block.
    pub heads: Vec<usize>,
    /// Transformer blocks in each of a block's attention modules; 0 for a block that has none. The middle has as many as
    /// `middle_depth`.
    pub depth: Vec<usize>,
    /// Transformer blocks in the attention module of the middle.
    pub middle_depth: usize,
    /// Residual layers of a block on the way down; one more on the way up.
    pub layers_per_block: usize,
    /// Width of the text's tokens.
    pub cross_attention_dim: usize,
}

impl UnetConfig {
    /// Stable Diffusion 1.5: 16 cross-attention layers.
    pub fn sd15() -> Self {
        UnetConfig {
            channels: vec![320, 640, 1280, 1280],
            heads: vec![8; 4],
            depth: vec![1, 1, 1, 0],
            middle_depth: 1,
            layers_per_block: 2,
            cross_attention_dim: 768,
        }
    }

    /// Stable Diffusion 2.1: as 1.5, with heads of 64 and wider text.
    pub fn sd21() -> Self {
        UnetConfig { heads: vec![5, 10, 20, 20], cross_attention_dim: 1024, ..UnetConfig::sd15() }
    }

    /// SDXL, and Kolors: 70 cross-attention layers.
    pub fn sdxl() -> Self {
        UnetConfig {
            channels: vec![320, 640, 1280],
            heads: vec![5, 10, 20],
            depth: vec![0, 2, 10],
            middle_depth: 10,
            layers_per_block: 2,
            cross_attention_dim: 2048,
        }
    }

    /// All attention layers, in the order of `unet.attn_processors`: down, up, middle; self-attention before
    /// cross-attention. Lists of different lengths give the layers that all of them describe.
    pub fn layers(&self) -> Vec<AttnLayer> {
        let mut layers = Vec::new();
        let blocks: Vec<(usize, usize, usize)> = (self.channels.iter().zip(&self.heads).zip(&self.depth))
            .map(|((&hidden, &heads), &depth)| (hidden, heads, depth))
            .collect();
        let mut module = |prefix: String, hidden: usize, heads: usize, depth: usize| {
            for block in 0..depth {
                for (attn, cross) in [("attn1", None), ("attn2", Some(self.cross_attention_dim))] {
                    let name = format!("{prefix}.transformer_blocks.{block}.{attn}.processor");
                    layers.push(AttnLayer { name, hidden, heads, cross_attention_dim: cross });
                }
            }
        };
        for (i, &(hidden, heads, depth)) in blocks.iter().enumerate() {
            for a in 0..self.layers_per_block {
                module(format!("down_blocks.{i}.attentions.{a}"), hidden, heads, depth);
            }
        }
        for (i, &(hidden, heads, depth)) in blocks.iter().rev().enumerate() {
            for a in 0..self.layers_per_block + 1 {
                module(format!("up_blocks.{i}.attentions.{a}"), hidden, heads, depth);
            }
        }
        if let Some(&(hidden, heads, _)) = blocks.last() {
            module("mid_block.attentions.0".into(), hidden, heads, self.middle_depth);
        }
        layers
    }
}

/// One attention layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttnLayer {
    /// As in diffusers: `down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor`.
    pub name: String,
    /// Channels of its queries: `heads · head_dim`.
    pub hidden: usize,
    /// Heads.
    pub heads: usize,
    /// Width of the text's tokens; `None` for self-attention.
    pub cross_attention_dim: Option<usize>,
}
