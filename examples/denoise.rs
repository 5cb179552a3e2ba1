//! Denoises a photograph with attention: `cargo run --release --example denoise [-- PICTURE.png]`.
//!
//! Non-local means replaces a patch by the mean of all patches of the picture, weighted by how much they look like it:
//! `Σ_j softmax_j(-|q_i - k_j|² / h²) v_j`. Since `|q_i|²` is the same for all j, it cancels in the softmax, and what is
//! left is attention: `softmax_scale = 2/h²`, and a bias of `-|k_j|² / h²` per key. The tokens are the 5x5 patches at
//! all pixels. A value is a patch as it is, noise included; query and key are a projection of it, as in any attention
//! layer (here the low frequencies, where the picture is stronger than the noise), and a weak position encoding.
//!
//! A patch without its like keeps its noise: see the rim of the cat's eye. A second branch therefore brings keys and
//! values from a clean picture, her *other* eye, with a softmax of its own, a gate and a region, in the same call:
//!
//! ```text
//! out_i = (1 - gate · region_i) · attention over the noisy picture + gate · region_i · attention over the reference
//! ```
//!
//! The logits, 2.6 GiB, exist nowhere. The clean picture serves to measure PSNR and for nothing else.

use fused_attention::{Attention, Branch, Engine, Plan, Segment, TensorMut, TensorRef};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use std::alloc::{GlobalAlloc, Layout, System};
use std::error::Error;
use std::f32::consts::{PI, TAU};
use std::fs::File;
use std::io::Cursor;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

/// Both crops lie in this part of a photograph by Stefan van der Walt, CC0; see data/README.md.
const PHOTO: &[u8] = include_bytes!("data/chelsea.png");
/// Left, top, width, height of the crop that is denoised, and of the reference. They share no pixel.
const NOISY: [usize; 4] = [0, 0, 148, 148];
const REFERENCE: [usize; 4] = [160, 36, 120, 112];

/// Standard deviation of the noise, in grey levels of 255.
const SIGMA: f32 = 25.0;
/// Patches are SIDE x SIDE pixels of 3 colours.
const SIDE: usize = 5;
const VALUE_DIM: usize = SIDE * SIDE * 3;
/// Brightness at the 10 frequencies with `a + b` up to this, and two mean colours, describe a patch.
const MAX_FREQUENCY: usize = 3;
const FEATURES: usize = 12;
/// Then come two coordinates. One pixel of distance counts as much as this many grey levels.
const HEAD_DIM: usize = FEATURES + 2;
const GREYS_PER_PIXEL: f32 = 3.5;
/// h²: the projection is orthonormal, so that each feature carries noise of variance SIGMA².
const BANDWIDTH: f32 = FEATURES as f32 * SIGMA * SIGMA;
/// Keys without noise are half as far away as noisy ones, on average over equal patches: half of h² for them.
const SHARPNESS: f32 = 2.0;
/// Share of the reference branch inside the region, an ellipse with a soft edge: centre and radii in pixels.
const GATE: f32 = 0.5;
const ELLIPSE: [f32; 4] = [75.0, 84.0, 46.0, 42.0];

fn main() -> ExitCode {
    let path = std::env::args().nth(1).unwrap_or_else(|| "denoise.png".into());
    match denoise(&path) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("denoise: {error}");
            ExitCode::FAILURE
        }
    }
}

fn denoise(path: &str) -> Result<(), Box<dyn Error>> {
    let photo = Picture::read(PHOTO)?;
    let clean = photo.crop(NOISY);
    let noisy = clean.with_noise();

    let own = Tokens::new(&noisy, GREYS_PER_PIXEL, 1.0);
    // The reference has no place in the picture: with coordinates of 0 its keys are equally far from everywhere.
    let other = Tokens::new(&photo.crop(REFERENCE), 0.0, SHARPNESS);
    let middle = |corner: usize| (corner + SIDE / 2) as f32 + 0.5;
    let inside: Vec<f32> = noisy.patches().map(|(x, y)| region(middle(x), middle(y))).collect();
    // Where the reference comes in, the picture's own branch gives way: the weights add up to one.
    let rest: Vec<f32> = inside.iter().map(|r| 1.0 - GATE * r).collect();
    let per_query = |region| TensorRef::contiguous::<f32, 2>(region, [1, own.count]);

    let attention = Attention::new(own.keys()).softmax_scale(2.0 / BANDWIDTH);
    let (denoised, ..) = own.attend(&noisy, attention.clone().branch(own.branch()))?;
    let attention = attention
        .branch(own.branch().region(per_query(&rest)))
        .branch(other.branch().gate(GATE).region(per_query(&inside)));
    let (with_reference, plan, peak_bytes) = own.attend(&noisy, attention)?;

    let logits_bytes = own.count * (own.count + other.count) * size_of::<f32>();
    println!("tokens   {} queries, {} keys of the picture, {} of the reference", own.count, own.count, other.count);
    println!("kernel   {} of engine {}", plan.kernel(), plan.engine().name());
    println!("scratch  {} KiB planned, {} KiB measured;", plan.workspace_bytes() / 1024, peak_bytes / 1024);
    println!("         the logits alone would take {} MiB\n", logits_bytes / (1024 * 1024));

    let panels = [("noisy", &noisy), ("self similarity", &denoised), ("with the reference", &with_reference)];
    let psnr = panels.map(|(_, picture)| [picture.psnr(&clean, |_, _| 1.0), picture.psnr(&clean, region)]);
    println!("                       PSNR     gain    around the eye     gain");
    for ((name, _), [all, eye]) in panels.iter().zip(psnr) {
        let [gain, eye_gain] = [all - psnr[0][0], eye - psnr[0][1]];
        println!("{name:18} {all:>5.2} dB  {gain:>4.2} dB          {eye:>5.2} dB {eye_gain:>5.2} dB");
    }
    write_panels(path, &[&noisy, &denoised, &with_reference, &clean])?;
    println!("\n{path}: noisy | self similarity | with the reference, in the ellipse | the photograph");

    assert!(psnr[1][0] - psnr[0][0] >= 8.5, "self similarity gains less than it did");
    assert!(psnr[2][1] - psnr[1][1] >= 0.4, "the reference gains less than it did");
    Ok(())
}

/// A picture's patches as attention takes them.
struct Tokens {
    count: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
    bias: Vec<f32>,
}

impl Tokens {
    /// `sharpness` divides h² for these keys alone: softmax_scale holds for all branches, a factor of the keys for one.
    fn new(picture: &Picture, greys_per_pixel: f32, sharpness: f32) -> Self {
        let (mut keys, mut values, mut bias) = (Vec::new(), Vec::new(), Vec::new());
        for (x, y) in picture.patches() {
            let patch: Vec<f32> = (0..SIDE).flat_map(|row| picture.row(x, y + row, SIDE)).copied().collect();
            let mut key = project(&patch);
            key.extend([x, y].map(|coordinate| coordinate as f32 * greys_per_pixel));
            bias.push(-sharpness / BANDWIDTH * key.iter().map(|k| k * k).sum::<f32>());
            keys.extend(key.iter().map(|k| k * sharpness));
            values.extend(patch);
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

    /// The picture that attention makes of these queries, how it was computed, and the most bytes allocated meanwhile.
    fn attend(
        &self,
        like: &Picture,
        attention: Attention<TensorRef<'_>>,
    ) -> Result<(Picture, Plan, usize), Box<dyn Error>> {
        let mut patches = vec![0.0; self.count * VALUE_DIM];
        let out = TensorMut::bshd(&mut patches, [1, self.count, 1, VALUE_DIM]);
        let (start, before) = (Instant::now(), HELD.load(Relaxed));
        PEAK.store(before, Relaxed);
        let plan = attention.forward(Engine::Cpu, out)?;
        let peak_bytes = PEAK.load(Relaxed) - before;
        println!("time     {:.1} s for {} branch(es)", start.elapsed().as_secs_f32(), attention.branches.len());
        Ok((like.assemble(&patches), plan, peak_bytes))
    }
}

/// The low frequencies of a patch's brightness (its discrete cosine transform) and its mean in two colour differences.
fn project(patch: &[f32]) -> Vec<f32> {
    let wave = |a: usize, i: usize| {
        let norm = (1.0 + f32::from(a > 0)) / SIDE as f32;
        norm.sqrt() * (PI * a as f32 * (i as f32 + 0.5) / SIDE as f32).cos()
    };
    let onto = |[r, g, b]: [f32; 3], row, column| {
        let norm = (r * r + g * g + b * b).sqrt();
        let pixels = patch.chunks_exact(3).map(|p| (r * p[0] + g * p[1] + b * p[2]) / norm).enumerate();
        pixels.map(|(at, value)| wave(row, at / SIDE) * wave(column, at % SIDE) * value).sum()
    };
    let frequencies = (0..=MAX_FREQUENCY).flat_map(|a| (0..=MAX_FREQUENCY - a).map(move |b| (a, b)));
    let brightness = frequencies.map(|(a, b)| onto([1.0, 1.0, 1.0], a, b));
    brightness.chain([onto([1.0, 0.0, -1.0], 0, 0), onto([1.0, -2.0, 1.0], 0, 0)]).collect()
}

/// Distance from the centre of the ellipse, 1 on its line.
fn radius(x: f32, y: f32) -> f32 {
    let [centre_x, centre_y, radius_x, radius_y] = ELLIPSE;
    ((x - centre_x) / radius_x).hypot((y - centre_y) / radius_y)
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
    fn read(file: &[u8]) -> Result<Self, png::DecodingError> {
        let mut reader = png::Decoder::new(Cursor::new(file)).read_info()?;
        let mut bytes = vec![0; reader.output_buffer_size().unwrap_or(0)];
        let info = reader.next_frame(&mut bytes)?;
        let rgb = bytes.into_iter().map(f32::from).collect();
        Ok(Picture { width: info.width as usize, height: info.height as usize, rgb })
    }

    fn row(&self, x: usize, y: usize, width: usize) -> &[f32] {
        &self.rgb[(y * self.width + x) * 3..][..width * 3]
    }

    fn crop(&self, [left, top, width, height]: [usize; 4]) -> Self {
        let rgb = (top..top + height).flat_map(|y| self.row(left, y, width)).copied().collect();
        Picture { width, height, rgb }
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

    /// A picture of this size in which each pixel is the mean of what the patches that cover it say.
    fn assemble(&self, patches: &[f32]) -> Self {
        let (mut sum, mut covers) = (vec![0.0; self.rgb.len()], vec![0.0; self.rgb.len()]);
        for ((x, y), patch) in self.patches().zip(patches.chunks_exact(VALUE_DIM)) {
            for (row, line) in patch.chunks_exact(SIDE * 3).enumerate() {
                let at = ((y + row) * self.width + x) * 3;
                sum[at..].iter_mut().zip(line).for_each(|(sum, value)| *sum += value);
                covers[at..][..line.len()].iter_mut().for_each(|covers| *covers += 1.0);
            }
        }
        Picture { rgb: sum.iter().zip(&covers).map(|(sum, covers)| sum / covers).collect(), ..*self }
    }

    /// Peak signal-to-noise ratio in dB, with a weight per pixel.
    fn psnr(&self, clean: &Picture, weight: impl Fn(f32, f32) -> f32) -> f32 {
        let (mut error, mut total) = (0.0, 0.0);
        for (at, (value, truth)) in self.rgb.iter().zip(&clean.rgb).enumerate() {
            let (x, y) = (at / 3 % self.width, at / 3 / self.width);
            let weight = f64::from(weight(x as f32 + 0.5, y as f32 + 0.5));
            error += weight * f64::from(value - truth).powi(2);
            total += weight;
        }
        (10.0 * (255.0 * 255.0 * total / error).log10()) as f32
    }
}

/// Writes pictures side by side, each pixel ZOOM x ZOOM large; the third shows the ellipse.
fn write_panels(path: &str, panels: &[&Picture; 4]) -> Result<(), String> {
    const ZOOM: usize = 2;
    const SEPARATOR: usize = 6;
    let step = panels[0].width * ZOOM + SEPARATOR;
    let (width, height) = (panels.len() * step - SEPARATOR, panels[0].height * ZOOM);
    let mut bytes = vec![255; width * height * 3];
    for (at, pixel) in bytes.chunks_exact_mut(3).enumerate() {
        let (panel, x, y) = (at % width / step, at % width % step, at / width);
        let on_ellipse = (radius(x as f32 / ZOOM as f32, y as f32 / ZOOM as f32) - 1.0).abs() < 0.012;
        let light = if panel == 2 && on_ellipse { 0.5 } else { 0.0 };
        if x < step - SEPARATOR {
            let from = panels[panel].row(x / ZOOM, y / ZOOM, 1);
            pixel.iter_mut().zip(from).for_each(|(to, c)| *to = (c + light * (255.0 - c)).round() as u8);
        }
    }
    let write = || -> Result<(), png::EncodingError> {
        let mut encoder = png::Encoder::new(File::create(path)?, width as u32, height as u32);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_compression(png::Compression::High);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&bytes)?;
        writer.finish()
    };
    write().map_err(|error| format!("cannot write {path}: {error}"))
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
        // SAFETY: the caller keeps the contract of `dealloc`, and the memory came from `System`.
        unsafe { System.dealloc(memory, layout) }
    }
}
