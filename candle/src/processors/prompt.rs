//! Image prompts: the tokens that adapters attend to, and where in the picture.

use crate::mask::{MaskRule, resize_mask};
use candle_core::{Error, Result, Tensor};
use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;

/// The images given to one adapter.
#[derive(Debug)]
pub struct ImagePrompt {
    tokens: Tensor,
    masks: Option<Masks>,
}

#[derive(Debug)]
struct Masks {
    /// `[1 or batch, images, height, width]`
    masks: Tensor,
    rule: MaskRule,
    /// What the masks became for a number of queries: a layer's is needed at every step.
    resized: Mutex<HashMap<usize, Vec<Tensor>>>,
}

impl ImagePrompt {
    /// Images as an image projection gives them: `[1 or batch, images, tokens, cross_attention_dim]`.
    ///
    /// Without masks all images share one softmax: their tokens are one sequence of keys.
    ///
    /// # Errors
    /// A tensor of another rank.
    pub fn new(tokens: Tensor) -> Result<Self> {
        let (_, images, _, _) = (tokens.dims4())
            .map_err(|error| error.context("tokens are [1 or batch, images, tokens, cross_attention_dim]"))?;
        if images == 0 {
            return Err(Error::msg("there are no images; give at least one, or a scale of 0"));
        }
        Ok(ImagePrompt { tokens, masks: None })
    }

    /// Gives each image its mask: `[1 or batch, images, height, width]`, multiplied onto the image's own attention.
    ///
    /// Each image then has a softmax of its own, even under a mask of ones: the result differs from that without masks.
    ///
    /// # Errors
    /// Not as many masks as images.
    pub fn masks(mut self, masks: Tensor, rule: MaskRule) -> Result<Self> {
        let (_, count, _, _) =
            masks.dims4().map_err(|error| error.context("masks are [1 or batch, images, height, width]"))?;
        if count != self.images() {
            return Err(Error::msg(format!("there are {count} masks for {} images; give one each", self.images())));
        }
        self.masks = Some(Masks { masks, rule, resized: Mutex::default() });
        Ok(self)
    }

    /// How many images there are.
    pub fn images(&self) -> usize {
        self.tokens.dims()[1]
    }

    /// `[1 or batch, images, tokens, cross_attention_dim]`
    pub fn tokens(&self) -> &Tensor {
        &self.tokens
    }

    /// The mask of each image as a region, `[1 or batch, seq_q]`.
    pub(crate) fn regions(&self, seq_q: usize) -> Result<Option<Vec<Tensor>>> {
        let Some(Masks { masks, rule, resized }) = &self.masks else { return Ok(None) };
        let mut resized = resized.lock().map_err(Error::msg)?;
        if let Some(regions) = resized.get(&seq_q) {
            return Ok(Some(regions.clone()));
        }
        let of_image = |image: usize| {
            let entries = (0..masks.dims()[0]).map(|entry| resize_mask(&masks.get(entry)?.get(image)?, *rule, seq_q));
            Tensor::stack(&entries.collect::<Result<Vec<_>>>()?, 0)
        };
        let regions = (0..self.images()).map(of_image).collect::<Result<Vec<_>>>()?;
        resized.insert(seq_q, regions.clone());
        Ok(Some(regions))
    }
}

/// The image prompts of a call, by the names of their adapters.
#[derive(Debug, Default)]
pub struct ImagePrompts(pub(crate) BTreeMap<String, ImagePrompt>);

impl ImagePrompts {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds, or replaces, the images of an adapter.
    pub fn with(mut self, adapter: impl Into<String>, prompt: ImagePrompt) -> Self {
        self.0.insert(adapter.into(), prompt);
        self
    }
}
