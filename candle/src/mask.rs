//! From a mask of a picture to a weight for every query: the four rules in use.

use candle_core::{DType, Device, Error, Result, Tensor};

/// How an adapter's mask is brought to the number of queries of a layer.
///
/// They do not agree: choose the one that the adapter's settings were found with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MaskRule {
    /// diffusers, `IPAdapterMaskProcessor.downsample`: bicubic to `h × w`, where `h = ⌊√(seq_q · H / W)⌋`, one more if it does
    /// not divide `seq_q`, and `w = ⌊seq_q / h⌋`; then zeros appended up to `seq_q`. Values may pass 0 and 1.
    Diffusers,
    /// ComfyUI IPAdapter plus: bilinear, to a shape found in the same way from that of the latent; then zeros on both
    /// ends.
    ComfyUi {
        /// Height of the latent that the UNet is given.
        latent_height: usize,
        /// Width of it.
        latent_width: usize,
    },
    /// InvokeAI: the largest of every 2 × 2, until there are `seq_q`; the mask must have the shape of the latent.
    InvokeAi,
    /// InstantID: the nearest element, both sides divided by `√(H · W / seq_q)` and rounded down.
    InstantId,
}

/// A mask `[height, width]` of any type as `[seq_q]` F32, on the device of the mask.
///
/// # Errors
/// A mask without elements, or one that the rule does not bring to `seq_q`.
pub fn resize_mask(mask: &Tensor, rule: MaskRule, seq_q: usize) -> Result<Tensor> {
    let (height, width) = mask.dims2()?;
    let values = mask.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let picture = Picture { height, width, values: values.into_iter().map(f64::from).collect() };
    let weights = picture.resize(rule, seq_q).map_err(Error::msg)?;
    Tensor::from_vec(weights, seq_q, &Device::Cpu)?.to_device(mask.device())
}

/// Values row by row.
struct Picture {
    height: usize,
    width: usize,
    values: Vec<f64>,
}

impl Picture {
    fn resize(self, rule: MaskRule, seq_q: usize) -> std::result::Result<Vec<f32>, String> {
        if self.height == 0 || self.width == 0 {
            return Err(format!("a mask of {} × {} has no elements", self.height, self.width));
        }
        let weights = match rule {
            MaskRule::Diffusers => {
                let ratio = self.width as f64 / self.height as f64;
                let (height, width) = self.grid((seq_q as f64 / ratio).sqrt(), seq_q)?;
                let mut weights = self.bicubic(height, width);
                weights.resize(seq_q, 0.0);
                weights
            }
            MaskRule::ComfyUi { latent_height, latent_width } => {
                let (rows, columns) = (latent_height as f64, latent_width as f64);
                let (height, width) = self.grid(rows / (rows * columns / seq_q as f64).sqrt(), seq_q)?;
                centred(self.bilinear(height, width), seq_q)
            }
            MaskRule::InvokeAi => self.halved(seq_q)?,
            MaskRule::InstantId => self.nearest(seq_q)?,
        };
        Ok(weights.into_iter().map(|x| x as f32).collect())
    }

    /// The shape of a layer's queries from a height that is not whole; it has `seq_q` elements at most.
    fn grid(&self, height: f64, seq_q: usize) -> std::result::Result<(usize, usize), String> {
        let height = height as usize;
        if height == 0 {
            let (h, w) = (self.height, self.width);
            return Err(format!("a mask of {h} × {w} is too wide for {seq_q} queries: its height becomes 0"));
        }
        let height = height + usize::from(!seq_q.is_multiple_of(height));
        if height > seq_q {
            let (h, w) = (self.height, self.width);
            return Err(format!("a mask of {h} × {w} is too tall for {seq_q} queries: its width becomes 0"));
        }
        Ok((height, seq_q / height))
    }

    /// Samples between pixel centres, `at` giving the first tap and the weights of a position on an axis.
    fn separable<const TAPS: usize>(
        &self,
        height: usize,
        width: usize,
        at: impl Fn(usize, usize, usize) -> (isize, [f64; TAPS]),
    ) -> Vec<f64> {
        let clamp = |index: isize, len: usize| index.clamp(0, len as isize - 1) as usize;
        let columns: Vec<_> = (0..width).map(|x| at(x, width, self.width)).collect();
        let mut out = Vec::with_capacity(height * width);
        for (top, rows) in (0..height).map(|y| at(y, height, self.height)) {
            for (left, weights) in &columns {
                let row = |tap: usize| {
                    let start = clamp(top + tap as isize, self.height) * self.width;
                    let value = |(tap, weight): (usize, &f64)| {
                        weight * self.values[start + clamp(left + tap as isize, self.width)]
                    };
                    weights.iter().enumerate().map(value).sum::<f64>()
                };
                out.push(rows.iter().enumerate().map(|(tap, weight)| weight * row(tap)).sum());
            }
        }
        out
    }

    /// Cubic convolution with a = -0.75 (Keys, "Cubic convolution interpolation for digital image processing", 1981).
    fn bicubic(&self, height: usize, width: usize) -> Vec<f64> {
        const A: f64 = -0.75;
        let near = |d: f64| ((A + 2.0) * d - (A + 3.0)) * d * d + 1.0;
        let far = |d: f64| ((A * d - 5.0 * A) * d + 8.0 * A) * d - 4.0 * A;
        self.separable(height, width, |index, to, from| {
            let centre = (index as f64 + 0.5) * from as f64 / to as f64 - 0.5;
            let t = centre - centre.floor();
            (centre.floor() as isize - 1, [far(1.0 + t), near(t), near(1.0 - t), far(2.0 - t)])
        })
    }

    fn bilinear(&self, height: usize, width: usize) -> Vec<f64> {
        self.separable(height, width, |index, to, from| {
            let centre = ((index as f64 + 0.5) * from as f64 / to as f64 - 0.5).max(0.0);
            let t = centre - centre.floor();
            (centre.floor() as isize, [1.0 - t, t])
        })
    }

    fn halved(mut self, seq_q: usize) -> std::result::Result<Vec<f64>, String> {
        let (height, width) = (self.height, self.width);
        while self.height * self.width > seq_q && self.height * self.width > 1 {
            let (h, w) = (self.height.div_ceil(2), self.width.div_ceil(2));
            let largest = |y: usize, x: usize| {
                let rows = 2 * y..(2 * y + 2).min(self.height);
                let pixels = rows.flat_map(|y| (2 * x..(2 * x + 2).min(self.width)).map(move |x| (y, x)));
                pixels.map(|(y, x)| self.values[y * self.width + x]).fold(f64::NEG_INFINITY, f64::max)
            };
            let values = (0..h).flat_map(|y| (0..w).map(move |x| (y, x))).map(|(y, x)| largest(y, x)).collect();
            self = Picture { height: h, width: w, values };
        }
        if self.height * self.width != seq_q {
            return Err(format!(
                "halving a mask of {height} × {width} gives no {seq_q} queries; give it the shape of the latent"
            ));
        }
        Ok(self.values)
    }

    fn nearest(&self, seq_q: usize) -> std::result::Result<Vec<f64>, String> {
        let scale = 1.0 / (self.height as f64 * self.width as f64 / seq_q as f64).sqrt();
        let [height, width] = [self.height, self.width].map(|extent| (extent as f64 * scale) as usize);
        if height * width != seq_q {
            let (h, w) = (self.height, self.width);
            return Err(format!("a mask of {h} × {w} becomes {height} × {width}, which are not {seq_q} queries"));
        }
        // Positions are found in f32, as PyTorch finds them.
        let step = (1.0 / scale) as f32;
        let source = |index: usize, extent: usize| ((index as f32 * step) as usize).min(extent - 1);
        let pixels = (0..height).flat_map(|y| (0..width).map(move |x| (y, x)));
        Ok(pixels.map(|(y, x)| self.values[source(y, self.height) * self.width + source(x, self.width)]).collect())
    }
}

/// Puts zeros on both ends.
fn centred(weights: Vec<f64>, seq_q: usize) -> Vec<f64> {
    let missing = seq_q - weights.len();
    let mut padded = vec![0.0; missing / 2];
    padded.extend(weights);
    padded.resize(seq_q, 0.0);
    padded
}
