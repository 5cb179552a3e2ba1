//! Denoises a photograph with attention: `cargo run --release --example denoise [-- PICTURE.png]`.
//!
//! Non-local means replaces a patch by the mean of all patches of the picture, weighted by how much they look like it:
//! `Σ_j softmax_j(-|q_i - k_j|² / h²) v_j`. Since `|q_i|²` is the same for all j, it cancels in the softmax, and what is
//! left is attention: `softmax_scale = 2/h²`, and a bias of `-|k_j|² / h²` per key. The tokens are the 5x5 patches at
//! all pixels. A value is a patch as it is, noise included; query and key are a projection of it, as in any attention
//! layer (here the low frequencies, where the picture is stronger than the noise), and a weak position encoding.
//!
//! A patch without its like keeps its noise: see the rim of the cat's eye. A second branch therefore brings keys and
//! values from a clean picture, her *other* eye, with a softmax, a gate and a region of its own, in the same call:
//! `(1 - gate · region_i) · attention over the noisy picture + gate · region_i · attention over the reference`.
//! The logits exist nowhere. It runs on a GPU where there is one, else on the processor. The clean crop serves to measure PSNR and for nothing else.

use fused_attention::{Attention, Branch, Engine, Outputs, Problem, Segment, Tensor, TensorMut, TensorRef};
use half::f16;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use std::alloc::{GlobalAlloc, Layout, System};
use std::f32::consts::{PI, TAU};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Part of a photograph by Stefan van der Walt, CC0; see data/README.md.
const PHOTO: &[u8] = include_bytes!("data/chelsea.png");
/// Standard deviation of the noise, in grey levels of 255.
const SIGMA: f32 = 25.0;
/// Patches are SIDE x SIDE pixels of 3 colours.
const SIDE: usize = 5;
const PATCH: usize = SIDE * SIDE * 3;
/// Queries and keys: brightness at the 10 lowest frequencies and two mean colours, then two coordinates.
const FEATURES: usize = 12;
const COORDINATES: usize = 2;
/// GPUs copy rows in 16-byte pieces: eight elements. What is left over is 0.
const HEAD_DIM: usize = (FEATURES + COORDINATES).next_multiple_of(8);
const VALUE_DIM: usize = PATCH.next_multiple_of(8);
/// One pixel of distance counts as much as this many grey levels.
const GREYS_PER_PIXEL: f32 = 3.5;
/// h²: the projection is orthonormal, so that each feature carries noise of variance SIGMA².
const BANDWIDTH: f32 = FEATURES as f32 * SIGMA * SIGMA;
/// Keys without noise are half as far away as noisy ones, on average over equal patches: half of h² for them.
const SHARPNESS: f32 = 2.0;
/// Share of the reference branch inside the region.
const GATE: f32 = 0.5;

fn main() -> ExitCode {
    let path = std::env::args().nth(1).unwrap_or_else(|| "denoise.png".into());
    let Err(error) = denoise(&path) else { return ExitCode::SUCCESS };
    eprintln!("denoise: {error}");
    ExitCode::FAILURE
}

fn denoise(path: &str) -> Result<(), Box<dyn std::error::Error>> {
    let clean = Picture::crop(0, 0, 148, 148)?;
    let noisy = clean.with_noise();

    let own = Tokens::new(&noisy, GREYS_PER_PIXEL, 1.0);
    // It shares no pixel with the noisy crop and has no place there: with coordinates of 0 all its keys are as far.
    let other = Tokens::new(&Picture::crop(160, 36, 120, 112)?, 0.0, SHARPNESS);
    let half = SIDE as f32 / 2.0;
    let inside: Vec<f32> = noisy.patches().map(|(x, y)| region(x as f32 + half, y as f32 + half)).collect();
    // Where the reference comes in, the picture's own branch gives way: the weights add up to one.
    let rest: Vec<f32> = inside.iter().map(|r| 1.0 - GATE * r).collect();
    let [rest, inside] = [&rest, &inside].map(|share| TensorRef::contiguous(share, [1, own.count]));

    println!("{} patches; {} of the reference", own.count, other.count);
    let attention = Attention::new(own.keys()).softmax_scale(2.0 / BANDWIDTH);
    let alone = attention.clone().branch(own.branch());
    let both = attention.branch(own.branch().region(rest)).branch(other.branch().gate(GATE).region(inside));
    let (denoised, with_reference) = (noisy.attend(alone)?, noisy.attend(both)?);

    let panels = [&noisy, &denoised, &with_reference, &clean];
    write_panels(path, panels).map_err(|error| format!("cannot write {path}: {error}"))?;
    println!("{path}: noisy | self similarity | with the reference, in the ellipse | the photograph\n");
    println!("PSNR in dB          picture   gain   ellipse   gain");
    let psnr = panels.map(|picture| [picture.psnr(&clean, |_, _| 1.0), picture.psnr(&clean, region)]);
    for (name, [all, eye]) in ["noisy", "self similarity", "with the reference"].iter().zip(psnr) {
        println!("{name:18} {all:>8.2} {:>6.2} {eye:>9.2} {:>6.2}", all - psnr[0][0], eye - psnr[0][1]);
    }
    assert!(psnr[1][0] - psnr[0][0] >= 8.5, "self similarity gains less than it did");
    assert!(psnr[2][1] - psnr[1][1] >= 0.4, "the reference gains less than it did");
    Ok(())
}

/// A picture's patches as attention takes them.
struct Tokens {
    count: usize,
    keys: Vec<f16>,
    values: Vec<f16>,
    bias: Vec<f32>,
}

impl Tokens {
    /// `sharpness` divides h² for these keys alone: softmax_scale holds for all branches, a factor of the keys for one.
    fn new(picture: &Picture, greys_per_pixel: f32, sharpness: f32) -> Self {
        let (mut keys, mut values, mut bias) = (Vec::new(), Vec::new(), Vec::new());
        for (x, y) in picture.patches() {
            let patch: Vec<f32> = (0..SIDE).flat_map(|row| picture.row(x, y + row, SIDE)).copied().collect();
            let features = project(&patch).into_iter();
            let coordinates = [x, y].map(|coordinate| coordinate as f32 * greys_per_pixel);
            // Rounded before it is squared: the bias has to cancel what the product says of the key.
            let key: Vec<f16> = features.chain(coordinates).map(f16::from_f32).collect();
            bias.push(-sharpness / BANDWIDTH * key.iter().map(|k| k.to_f32().powi(2)).sum::<f32>());
            keys.extend(row::<HEAD_DIM>(key.iter().map(|k| k.to_f32() * sharpness)));
            values.extend(row::<VALUE_DIM>(patch.into_iter()));
        }
        Tokens { count: bias.len(), keys, values, bias }
    }

    fn keys(&self) -> TensorRef<'_> {
        TensorRef::bshd(&self.keys, [1, self.count, 1, HEAD_DIM])
    }

    fn branch(&self) -> Branch<TensorRef<'_>> {
        let values = TensorRef::bshd(&self.values, [1, self.count, 1, VALUE_DIM]);
        Segment::new(self.keys(), values).bias(TensorRef::contiguous(&self.bias, [1, 1, 1, self.count])).into()
    }
}

/// A row of the storage type, zeros at its end.
fn row<const N: usize>(values: impl Iterator<Item = f32>) -> [f16; N] {
    let mut row = [f16::ZERO; N];
    row.iter_mut().zip(values).for_each(|(to, value)| *to = f16::from_f32(value));
    row
}

/// The low frequencies of a patch's brightness (its discrete cosine transform) and its mean in two colour differences.
fn project(patch: &[f32]) -> Vec<f32> {
    let cosine = |a: usize, i: usize| (PI * a as f32 * (i as f32 + 0.5) / SIDE as f32).cos();
    let wave = |a: usize, i| cosine(a, i) * ((1.0 + f32::from(a > 0)) / SIDE as f32).sqrt();
    let onto = |[r, g, b]: [f32; 3], row, column| {
        let norm = (r * r + g * g + b * b).sqrt();
        let pixels = patch.chunks_exact(3).map(|p| (r * p[0] + g * p[1] + b * p[2]) / norm).enumerate();
        pixels.map(|(at, value)| wave(row, at / SIDE) * wave(column, at % SIDE) * value).sum()
    };
    let frequencies = (0..4).flat_map(|a| (0..4 - a).map(move |b| (a, b)));
    frequencies
        .map(|(a, b)| onto([1.0; 3], a, b))
        .chain([onto([1.0, 0.0, -1.0], 0, 0), onto([1.0, -2.0, 1.0], 0, 0)])
        .collect()
}

/// Distance from the middle of the cat's eye: 1 on the ellipse.
fn radius(x: f32, y: f32) -> f32 {
    ((x - 75.0) / 46.0).hypot((y - 84.0) / 42.0)
}

/// 1 in the ellipse, 0 outside, a smooth step between them.
fn region(x: f32, y: f32) -> f32 {
    let t = ((1.15 - radius(x, y)) / 0.3).clamp(0.0, 1.0);
    t * t * (3.0 - 2.0 * t)
}

/// Rows of red, green and blue, in grey levels; noise may take them below 0 and above 255.
struct Picture {
    width: usize,
    height: usize,
    rgb: Vec<f32>,
}

impl Picture {
    /// A part of the photograph.
    fn crop(left: usize, top: usize, width: usize, height: usize) -> Result<Self, png::DecodingError> {
        let mut reader = png::Decoder::new(std::io::Cursor::new(PHOTO)).read_info()?;
        let mut bytes = vec![0; reader.output_buffer_size().unwrap_or(0)];
        let stride = reader.next_frame(&mut bytes)?.line_size;
        let rows = (top..top + height).flat_map(|y| &bytes[y * stride + left * 3..][..width * 3]);
        Ok(Picture { width, height, rgb: rows.map(|&byte| byte.into()).collect() })
    }

    fn row(&self, x: usize, y: usize, width: usize) -> &[f32] {
        &self.rgb[(y * self.width + x) * 3..][..width * 3]
    }

    /// Box and Muller's Gaussian noise, the same in every run.
    fn with_noise(&self) -> Self {
        let mut rng = StdRng::seed_from_u64(25);
        let mut normal = || (-2.0 * (1.0 - rng.random::<f32>()).ln()).sqrt() * (TAU * rng.random::<f32>()).cos();
        let rgb = self.rgb.iter().map(|value| value + SIGMA * normal()).collect();
        Picture { rgb, ..*self }
    }

    /// Upper left corners of all patches.
    fn patches(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (columns, rows) = (self.width - SIDE + 1, self.height - SIDE + 1);
        (0..rows).flat_map(move |y| (0..columns).map(move |x| (x, y)))
    }

    /// The picture of this size that attention makes: each pixel is the mean of what the patches that cover it say.
    fn attend(&self, attention: Attention<TensorRef<'_>>) -> Result<Self, fused_attention::Error> {
        let count = self.patches().count();
        let mut patches = vec![f16::ZERO; count * VALUE_DIM];
        let out = TensorMut::bshd(&mut patches, [1, count, 1, VALUE_DIM]);
        let choice = Engine::auto_for(&Problem::forward(&attention, &Outputs::new(out.desc()))?)?;
        let (start, before) = (std::time::Instant::now(), HELD.load(Relaxed));
        PEAK.store(before, Relaxed);
        let plan = attention.forward(choice.engine, out)?;
        let (seconds, peak_bytes) = (start.elapsed().as_secs_f32(), PEAK.load(Relaxed) - before);
        let [scratch, measured] = [plan.workspace_bytes(), peak_bytes].map(|bytes| bytes / 1024);
        print!("branches {}, {seconds:.1} s, {} engine, ", attention.branches.len(), plan.engine().name());
        println!("{}, scratch {scratch} KiB planned, {measured} KiB measured", plan.kernel());
        let (mut sum, mut covers) = (vec![0.0; self.rgb.len()], vec![0.0; self.rgb.len()]);
        for ((x, y), patch) in self.patches().zip(patches.chunks_exact(VALUE_DIM)) {
            for (at, value) in patch[..PATCH].iter().map(|value| value.to_f32()).enumerate() {
                let to = ((y + at / (SIDE * 3)) * self.width + x) * 3 + at % (SIDE * 3);
                (sum[to], covers[to]) = (sum[to] + value, covers[to] + 1.0);
            }
        }
        Ok(Picture { rgb: sum.iter().zip(&covers).map(|(sum, covers)| sum / covers).collect(), ..*self })
    }

    /// Peak signal-to-noise ratio in dB, with a weight per pixel.
    fn psnr(&self, clean: &Picture, weight: impl Fn(f32, f32) -> f32) -> f64 {
        let (mut error, mut total) = (0.0, 0.0);
        for (at, (value, truth)) in self.rgb.iter().zip(&clean.rgb).enumerate() {
            let [x, y] = [at / 3 % self.width, at / 3 / self.width].map(|pixel| pixel as f32 + 0.5);
            error += f64::from(weight(x, y) * (value - truth).powi(2));
            total += f64::from(weight(x, y));
        }
        10.0 * (255.0 * 255.0 * total / error).log10()
    }
}

/// Writes pictures side by side, twice as large, with white lines between them; the third shows the ellipse.
fn write_panels(path: &str, panels: [&Picture; 4]) -> Result<(), png::EncodingError> {
    let (step, height) = (panels[0].width * 2 + 6, panels[0].height * 2);
    let width = panels.len() * step - 6;
    let mut bytes = vec![255; width * height * 3];
    for (at, pixel) in bytes.chunks_exact_mut(3).enumerate() {
        let (panel, x, y) = (at % width / step, at % width % step, at / width);
        if x < step - 6 {
            let line = panel == 2 && (radius(x as f32 / 2.0, y as f32 / 2.0) - 1.0).abs() < 0.012;
            let grey = |&c: &f32| if line { (c + 255.0) / 2.0 } else { c }.round() as u8;
            pixel.iter_mut().zip(panels[panel].row(x / 2, y / 2, 1)).for_each(|(to, from)| *to = grey(from));
        }
    }
    let mut encoder = png::Encoder::new(std::fs::File::create(path)?, width as u32, height as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_compression(png::Compression::High);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&bytes)?;
    writer.finish()
}

/// The system's allocator, counting the bytes that are held and the most there were.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;
static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes on to `System` unchanged, so its guarantees hold; `realloc` is made of these two.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(HELD.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        // SAFETY: likewise, and the memory came from `System`.
        unsafe { System.dealloc(memory, layout) }
    }
}
