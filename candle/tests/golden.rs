//! Against diffusers: layers with adapters, the numbering of files, image projections, mask rules, block scales.
//!
//! `candle/tests/golden/make.py` writes the files and says how.

mod common;

use candle_core::{DType, Device, Result, Tensor};
use common::golden::{file, norm, numbers, path, weight};
use common::{assert_close, difference, elements};
use fused_attention_candle::checkpoint::IpAdapter;
use fused_attention_candle::processors::*;
use fused_attention_candle::{MaskRule, resize_mask};
use std::collections::BTreeMap;

/// One layer with adapters, as `make.py` lists them.
struct Case {
    name: &'static str,
    hidden: usize,
    heads: usize,
    cross: usize,
    batch: usize,
    queries: usize,
    text: usize,
    /// Tokens, images, scale, and whether there are masks.
    adapters: Vec<(usize, usize, LayerScale, bool)>,
    text_mask: bool,
}

fn cases() -> Vec<Case> {
    let case = |name, (hidden, heads, cross), batch, queries, text, adapters, text_mask| Case {
        name,
        hidden,
        heads,
        cross,
        batch,
        queries,
        text,
        adapters,
        text_mask,
    };
    let per_image = |scales: &[f32]| LayerScale::from(scales.to_vec());
    vec![
        case("one-adapter", (320, 8, 768), 2, 7, 9, vec![(4, 1, 0.75.into(), false)], false),
        case(
            "two-adapters",
            (64, 4, 48),
            2,
            15,
            7,
            vec![(16, 2, 0.625.into(), false), (4, 1, (-0.375).into(), false)],
            false,
        ),
        case(
            "masks",
            (320, 8, 768),
            1,
            24,
            5,
            vec![(4, 2, per_image(&[0.5, 1.25]), true), (3, 1, 0.5.into(), true)],
            false,
        ),
        case("masks-one-scale", (64, 4, 48), 1, 35, 5, vec![(5, 3, 0.875.into(), true)], false),
        case("text-mask", (48, 3, 40), 2, 10, 11, vec![(6, 1, 1.5.into(), false)], true),
        case(
            "zero-scales",
            (48, 3, 40),
            1,
            20,
            6,
            vec![(4, 2, per_image(&[0.0, 0.5]), true), (4, 1, 0.0.into(), true)],
            false,
        ),
    ]
}

const LAYER: &str = "mid_block.attentions.0.transformer_blocks.0.attn2.processor";

impl Case {
    fn run(&self, seed: u64, backend: Backend) -> Result<Tensor> {
        let Case { hidden, heads, cross, batch, .. } = *self;
        let layer = AttnLayer { name: LAYER.into(), hidden, heads, cross_attention_dim: Some(cross) };
        let mut processors = AttnProcessors::new([layer]);
        processors.set_backend(backend);
        let mut prompts = ImagePrompts::new();
        for (n, (tokens, images, scale, masked)) in self.adapters.iter().enumerate() {
            let (name, n) = (format!("adapter-{n}"), n as u64);
            let to_k_ip = weight(seed + 10 + 2 * n, hidden, cross);
            let projection = KvProjection { to_k_ip, to_v_ip: weight(seed + 11 + 2 * n, hidden, cross) };
            processors.add_adapter(&name, &AdapterWeights::new([(LAYER.to_string(), projection)]))?;
            processors.set_scale(&name, Scale::Everywhere(scale.clone()))?;
            let mut prompt = ImagePrompt::new(numbers(seed + 110 + n, &[batch, *images, *tokens, cross], 1.0))?;
            if *masked {
                let mask = numbers(seed + 120 + n, &[1, *images, 20, 28], 1.0).gt(0.0)?;
                prompt = prompt.masks(mask, MaskRule::Diffusers)?;
            }
            prompts = prompts.with(name, prompt);
        }
        let x = numbers(seed + 100, &[batch, self.queries, hidden], 1.0);
        let text = numbers(seed + 101, &[batch, self.text, cross], 1.0);
        let [q, k, v] = project(seed, &x, &text)?;
        let mask = (numbers(seed + 130, &[batch, 1, 1, self.text], 1.0) * 2.0)?;
        let mask = self.text_mask.then_some(&mask);
        processors.attend(LAYER, &AttnCall { q: &q, k: &k, v: &v, mask, prompts: &prompts })
    }
}

/// `to_q`, `to_k` and `to_v` of the layer with this seed.
fn project(seed: u64, x: &Tensor, text: &Tensor) -> Result<[Tensor; 3]> {
    let (hidden, cross) = (x.dim(2)?, text.dim(2)?);
    let linear = |x: &Tensor, weight: Tensor| x.broadcast_matmul(&weight.t()?);
    Ok([
        linear(x, weight(seed, hidden, hidden))?,
        linear(text, weight(seed + 1, hidden, cross))?,
        linear(text, weight(seed + 2, hidden, cross))?,
    ])
}

fn assert_golden(stored: &std::collections::HashMap<String, Tensor>, name: &str, got: &Tensor) {
    let named =
        |kind: &str| stored.get(&format!("{name}.{kind}")).unwrap_or_else(|| panic!("{name}.{kind} is not stored"));
    assert_close(name, got, named("naive"), &elements(named("oracle")));
}

#[test]
fn a_layer_with_adapters_agrees_with_diffusers() -> Result<()> {
    let stored = file("attention.safetensors");
    let cases = cases();
    assert_eq!(stored.len(), 2 * cases.len());
    for (number, case) in cases.iter().enumerate() {
        let seed = 1000 * (number as u64 + 1);
        assert_golden(&stored, case.name, &case.run(seed, Backend::Fused)?);
        // The eager backend is a naive computation of the same kind as diffusers' own: twice its error at most.
        let (eager, naive) = (case.run(seed, Backend::Eager)?, &stored[&format!("{}.naive", case.name)]);
        assert!(difference(&eager, naive) <= 4e-6, "{}", case.name);
    }
    Ok(())
}

/// The small UNet of `make.py`, with the blocks of SD1.5.
fn small_unet() -> UnetConfig {
    UnetConfig { channels: vec![8, 16, 16, 24], heads: vec![2; 4], cross_attention_dim: 12, ..UnetConfig::sd15() }
}

#[test]
fn published_files_reach_the_layers_that_diffusers_gives_them() -> Result<()> {
    let stored = file("layers.safetensors");
    let mut processors = AttnProcessors::new(small_unet().layers());
    let read = |file: &str| IpAdapter::read(path(file), &processors, DType::F32, &Device::Cpu);
    let adapters = [("a", read("adapter.safetensors")?), ("b", read("adapter.bin")?)];
    let mut prompts = ImagePrompts::new();
    for (n, ((name, adapter), scale)) in adapters.iter().zip([0.75, -0.5]).enumerate() {
        processors.load_adapter(name, adapter)?;
        processors.set_scale(name, scale)?;
        prompts = prompts.with(*name, ImagePrompt::new(numbers(22_000 + n as u64, &[1, 1, 4, 12], 1.0))?);
    }
    let text = numbers(21_000, &[1, 4, 12], 1.0);
    let mut compared = 0;
    for (index, layer) in processors.layers().enumerate().filter(|(_, layer)| layer.cross_attention_dim.is_some()) {
        let x = numbers(20_000 + index as u64, &[1, 3, layer.hidden], 1.0);
        let [q, k, v] = project(10_000 + 10 * index as u64, &x, &text)?;
        let out = processors.attend(&layer.name, &AttnCall { q: &q, k: &k, v: &v, mask: None, prompts: &prompts })?;
        assert_golden(&stored, &layer.name, &out);
        compared += 1;
    }
    assert_eq!(compared, 16);
    let images = numbers(23_000, &[2, 3, 20], 1.0);
    for (n, (_, adapter)) in adapters.iter().enumerate() {
        assert_golden(&stored, &format!("projection.{n}"), &adapter.projection.forward(&images)?);
    }
    Ok(())
}

fn named(prefix: &str, tensors: impl IntoIterator<Item = (String, Tensor)>) -> BTreeMap<String, Tensor> {
    tensors.into_iter().map(|(key, tensor)| (format!("{prefix}.{key}"), tensor)).collect()
}

fn affine(key: &str, [weight, bias]: [Tensor; 2]) -> [(String, Tensor); 2] {
    [(format!("{key}.weight"), weight), (format!("{key}.bias"), bias)]
}

fn resampler(
    seed: u64,
    embed: usize,
    hidden: usize,
    inner: usize,
    tokens: usize,
    cross: usize,
) -> BTreeMap<String, Tensor> {
    let bias = |seed, width| numbers(seed, &[width], 0.25);
    let mut keys = vec![("latents".to_string(), numbers(seed, &[1, tokens, hidden], 1.0))];
    keys.extend(affine("proj_in", [weight(seed + 1, hidden, embed), bias(seed + 2, hidden)]));
    keys.extend(affine("proj_out", [weight(seed + 3, cross, hidden), bias(seed + 4, cross)]));
    keys.extend(affine("norm_out", norm(seed + 5, cross)));
    for i in 0..4u64 {
        let s = seed + 100 * (i + 1);
        for (n, name) in ["0.norm1", "0.norm2", "1.0"].iter().enumerate() {
            keys.extend(affine(&format!("layers.{i}.{name}"), norm(s + 10 * n as u64, hidden)));
        }
        let linear = [
            ("0.to_q", weight(s + 50, inner, hidden)),
            ("0.to_kv", weight(s + 51, 2 * inner, hidden)),
            ("0.to_out", weight(s + 52, hidden, inner)),
            ("1.1", weight(s + 53, 4 * hidden, hidden)),
            ("1.3", weight(s + 54, hidden, 4 * hidden)),
        ];
        keys.extend(linear.map(|(name, tensor)| (format!("layers.{i}.{name}.weight"), tensor)));
    }
    named("image_proj", keys)
}

fn mlp(seed: u64, embed: usize, hidden: usize, rows: usize, cross: usize, norm_key: &str) -> BTreeMap<String, Tensor> {
    let bias = |seed, width| numbers(seed, &[width], 0.25);
    let first = affine("proj.0", [weight(seed, hidden, embed), bias(seed + 1, hidden)]);
    let second = affine("proj.2", [weight(seed + 2, rows, hidden), bias(seed + 3, rows)]);
    named("image_proj", first.into_iter().chain(second).chain(affine(norm_key, norm(seed + 4, cross))))
}

fn linear(seed: u64, embed: usize, tokens: usize, cross: usize) -> BTreeMap<String, Tensor> {
    let proj = [weight(seed, tokens * cross, embed), numbers(seed + 1, &[tokens * cross], 0.5)];
    named("image_proj", affine("proj", proj).into_iter().chain(affine("norm", norm(seed + 2, cross))))
}

#[test]
fn image_projections_agree_with_diffusers() -> Result<()> {
    let stored = file("projections.safetensors");
    let cases = [
        ("plus", resampler(80_000, 1280, 768, 768, 3, 768), vec![1, 2, 5, 1280], 768),
        ("full-face", mlp(81_000, 40, 40, 24, 24, "proj.3"), vec![2, 1, 6, 40], 24),
        ("face-id", mlp(82_000, 32, 64, 4 * 24, 24, "norm"), vec![2, 3, 32], 24),
        ("linear", linear(83_000, 40, 4, 24), vec![2, 3, 40], 24),
    ];
    for (number, (name, keys, shape, cross)) in cases.into_iter().enumerate() {
        // A UNet without layers: a file of the projection alone.
        let config = UnetConfig {
            channels: vec![8],
            heads: vec![2],
            depth: vec![0],
            middle_depth: 1,
            layers_per_block: 1,
            cross_attention_dim: cross,
        };
        let processors = AttnProcessors::new(config.layers());
        let to = Tensor::zeros((8, cross), DType::F32, &Device::Cpu)?;
        let ip = ["to_k_ip", "to_v_ip"].map(|part| (format!("ip_adapter.1.{part}.weight"), to.clone()));
        let adapter = IpAdapter::from_tensors(keys.into_iter().chain(ip), &processors, DType::F32, &Device::Cpu)?;
        let images = numbers(84_000 + number as u64, &shape, 1.0);
        assert_golden(&stored, name, &adapter.projection.forward(&images)?);
        let message = common::fault(adapter.projection.forward(&images.flatten_all()?));
        assert!(message.contains("this projection takes [batch, images, "), "{message}");
    }
    Ok(())
}

/// Both sides compute in f64 from the same f32 numbers; ours are stored in f32.
const MASK_BOUND: f64 = 1e-7;

#[test]
fn mask_rules_agree_with_their_originals() -> Result<()> {
    let stored = file("masks.safetensors");
    let mut counts = BTreeMap::new();
    for (name, expected) in &stored {
        let parts: Vec<&str> = name.split('.').collect();
        let sizes = |part: &str| part.split('x').map(|n| n.parse::<usize>().expect("a size")).collect::<Vec<_>>();
        let (shape, queries) = (sizes(parts[1]), expected.dims()[0]);
        let (rule, base) = match parts[0] {
            "diffusers" => (MaskRule::Diffusers, 90_000),
            "comfyui" => {
                let latent = sizes(parts[2]);
                (MaskRule::ComfyUi { latent_height: latent[0], latent_width: latent[1] }, 91_000)
            }
            "invokeai" => (MaskRule::InvokeAi, 92_000),
            "instantid" => (MaskRule::InstantId, 93_000),
            other => panic!("{other} is no rule"),
        };
        // The seed is the case's number, which the name does not tell: exactly one of them fits.
        let fits = |n: u64| -> Result<bool> {
            let mask = ((numbers(base + n, &shape, 1.0).to_dtype(DType::F64)? * 0.5)? + 0.5)?;
            let got = resize_mask(&mask.to_dtype(DType::F32)?, rule, queries)?;
            Ok(difference(&got, expected) <= MASK_BOUND)
        };
        let fitting = (0..8).map(fits).collect::<Result<Vec<_>>>()?;
        assert_eq!(fitting.iter().filter(|&&fits| fits).count(), 1, "{name}: {fitting:?}");
        *counts.entry(parts[0].to_string()).or_insert(0) += 1;
    }
    assert_eq!(counts.len(), 4);
    assert!(counts.values().all(|&count| count >= 4), "{counts:?}");
    Ok(())
}

#[test]
fn masks_that_a_rule_cannot_bring_to_the_queries_are_refused() -> Result<()> {
    let mask = |h, w| Tensor::ones((h, w), DType::F32, &Device::Cpu);
    for (h, w, rule, queries, words) in [
        (33, 47, MaskRule::InvokeAi, 400, "halving a mask of 33 × 47 gives no 400 queries"),
        (33, 47, MaskRule::InstantId, 100, "which are not 100 queries"),
        (1, 900, MaskRule::Diffusers, 30, "is too wide for 30 queries"),
        (900, 1, MaskRule::Diffusers, 3, "is too tall for 3 queries"),
        (0, 5, MaskRule::Diffusers, 30, "has no elements"),
    ] {
        let message = common::fault(resize_mask(&mask(h, w)?, rule, queries));
        assert!(message.contains(words), "{message}");
    }
    Ok(())
}

#[test]
fn layers_and_block_scales_are_those_of_diffusers() -> Result<()> {
    let text = std::fs::read_to_string(path("unets.json")).expect("a file of this folder");
    let stored: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let configs =
        [("sd15", UnetConfig::sd15(), 16), ("sd21", UnetConfig::sd21(), 16), ("sdxl", UnetConfig::sdxl(), 70)];
    for (name, config, crosses) in configs {
        let expected: Vec<AttnLayer> = stored[name]["layers"]
            .as_array()
            .expect("layers")
            .iter()
            .map(|layer| {
                let number = |key: &str| layer[key].as_u64().map(|n| n as usize);
                AttnLayer {
                    name: layer["name"].as_str().expect("a name").into(),
                    hidden: number("hidden").expect("a width"),
                    heads: number("heads").expect("heads"),
                    cross_attention_dim: number("cross"),
                }
            })
            .collect();
        assert_eq!(config.layers(), expected, "{name}");
        let mut processors = AttnProcessors::new(config.layers());
        assert_eq!(processors.cross_layers().len(), crosses);
        for (label, expected) in stored[name]["scales"].as_object().expect("scales") {
            let scale = match label.as_str() {
                "style" => BlockScales::style(),
                "style-and-layout" => BlockScales::style_and_layout(),
                _ => BlockScales::new().down(1, [0.5]).mid(0.25).up(1, [0.125, -0.5, 2.0]),
            };
            processors.set_scale("x", scale)?;
            let scales: Vec<_> =
                processors.cross_layers().iter().map(|layer| processors.scale("x", &layer.name).cloned()).collect();
            let expected: Vec<_> = expected
                .as_array()
                .expect("a list")
                .iter()
                .map(|s| Some(LayerScale::All(s.as_f64().expect("a number") as f32)))
                .collect();
            assert_eq!(scales, expected, "{name} {label}");
        }
    }
    Ok(())
}
