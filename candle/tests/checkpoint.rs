//! Files that are no adapter for a UNet, and what files of FaceID carry beside one.

mod common;

use candle_core::{DType, Device, Tensor};
use common::golden::path;
use fused_attention_candle::checkpoint::{CheckpointError, IpAdapter, KeyFault};
use fused_attention_candle::processors::{AttnProcessors, UnetConfig};
use std::collections::BTreeMap;

fn small() -> UnetConfig {
    UnetConfig { channels: vec![8, 16, 16, 24], heads: vec![2; 4], cross_attention_dim: 12, ..UnetConfig::sd15() }
}

fn processors(config: &UnetConfig) -> AttnProcessors {
    AttnProcessors::new(config.layers())
}

/// The tensors of an adapter for a UNet, all zeros and all one number in memory.
fn tensors(config: &UnetConfig) -> BTreeMap<String, Tensor> {
    let zeros = |shape: &[usize]| Tensor::zeros(1, DType::F32, &Device::Cpu).and_then(|t| t.broadcast_as(shape));
    let cross = config.cross_attention_dim;
    let mut tensors = BTreeMap::new();
    let mut add = |key: String, shape: &[usize]| tensors.insert(key, zeros(shape).expect("a shape"));
    for (number, layer) in config.layers().iter().enumerate().filter(|(_, layer)| layer.cross_attention_dim.is_some()) {
        add(format!("ip_adapter.{number}.to_k_ip.weight"), &[layer.hidden, cross]);
        add(format!("ip_adapter.{number}.to_v_ip.weight"), &[layer.hidden, cross]);
    }
    add("image_proj.proj.weight".into(), &[4 * cross, 1024]);
    add("image_proj.proj.bias".into(), &[4 * cross]);
    add("image_proj.norm.weight".into(), &[cross]);
    add("image_proj.norm.bias".into(), &[cross]);
    tensors
}

fn read(tensors: BTreeMap<String, Tensor>, config: &UnetConfig) -> Result<IpAdapter, CheckpointError> {
    // Kept in their type, so that the one number in memory stays one.
    IpAdapter::from_tensors(tensors, &processors(config), DType::F32, &Device::Cpu)
}

fn faults(result: Result<IpAdapter, CheckpointError>) -> Vec<KeyFault> {
    match result {
        Err(CheckpointError::Keys(faults)) => faults,
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("the adapter must be refused"),
    }
}

#[test]
fn the_published_shapes_are_taken() {
    for (config, layers) in [(UnetConfig::sd15(), 16), (UnetConfig::sdxl(), 70)] {
        let adapter = read(tensors(&config), &config).expect("an adapter");
        assert_eq!(adapter.weights.layers().len(), layers);
        assert!(adapter.lora.is_none());
        let mut processors = processors(&config);
        processors.load_adapter("x", &adapter).expect("it fits");
        assert_eq!(processors.cross_layers().len(), layers);
    }
}

#[test]
fn every_missing_wrong_and_unknown_key_is_told() {
    let config = small();
    let mut wrong = tensors(&config);
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).expect("a shape");
    wrong.remove("ip_adapter.31.to_v_ip.weight");
    wrong.insert("ip_adapter.1.to_k_ip.weight".into(), zeros(&[8, 768]));
    wrong.insert("ip_adapter.33.to_k_ip.weight".into(), zeros(&[8, 12]));
    wrong.insert("image_proj.proj.weight".into(), zeros(&[50, 20]));
    wrong.insert("image_proj.norm.bias".into(), zeros(&[12, 1]));
    let shape = |key: &str, got: &[usize], expected: &str| KeyFault::Shape {
        key: key.into(),
        got: got.to_vec(),
        expected: expected.into(),
    };
    let mut found = faults(read(wrong, &config));
    let mut expected = vec![
        shape("ip_adapter.1.to_k_ip.weight", &[8, 768], "[8, 12]"),
        KeyFault::Missing { key: "ip_adapter.31.to_v_ip.weight".into() },
        shape("image_proj.proj.weight", &[50, 20], "[60, image_embed_dim]"),
        shape("image_proj.proj.bias", &[48], "[60]"),
        shape("image_proj.norm.bias", &[12, 1], "[12]"),
        KeyFault::Unknown { key: "ip_adapter.33.to_k_ip.weight".into() },
    ];
    found.sort_by_key(KeyFault::to_string);
    expected.sort_by_key(KeyFault::to_string);
    assert_eq!(found, expected);
    let message = faults(read(tensors(&UnetConfig::sdxl()), &UnetConfig::sd15()))[0].to_string();
    assert_eq!(message, "ip_adapter.1.to_k_ip.weight has shape [640, 2048]; it must be [320, 768]");
}

#[test]
fn what_is_not_there_yet_says_so() {
    let config = small();
    let mut plus = tensors(&config);
    plus.retain(|key, _| key.starts_with("ip_adapter."));
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).expect("a shape");
    plus.insert("image_proj.perceiver_resampler.proj_in.weight".into(), zeros(&[8, 8]));
    let message = read(plus, &config).expect_err("a kind that is not there").to_string();
    assert!(message.contains("belongs to FaceID-Plus (`perceiver_resampler`), which is not there yet"), "{message}");

    let mut none = tensors(&config);
    none.retain(|key, _| key.starts_with("ip_adapter."));
    let message = read(none, &config).expect_err("no projection").to_string();
    assert!(message.contains("image_proj.latents is missing"), "{message}");
    assert!(message.contains("image_proj.layers.0.0.to_q.weight is missing"), "{message}");
}

#[test]
fn files_that_are_none_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name);
    let unet = processors(&small());
    let read = |path: &std::path::Path| {
        IpAdapter::read(path, &unet, DType::F32, &Device::Cpu).expect_err("no adapter").to_string()
    };
    assert!(read(&at("adapter.ckpt")).contains("its name must end in .safetensors or .bin"));
    assert!(read(&at("missing.safetensors")).contains("missing.safetensors"));
    let whole = [std::fs::read(path("adapter.bin")), std::fs::read(path("adapter.safetensors"))];
    let [bin, safetensors] = whole.map(|bytes| bytes.expect("a golden file"));
    for (name, bytes) in [("a.bin", &bin), ("a.safetensors", &safetensors)] {
        for end in (0..bytes.len()).step_by(bytes.len() / 23) {
            std::fs::write(at(name), &bytes[..end]).expect("written");
            assert!(read(&at(name)).contains(name), "{name} cut at {end}");
        }
        std::fs::write(at(name), b"not a file of either kind, but long enough to have a header").expect("written");
        assert!(read(&at(name)).contains(name));
    }
}

#[test]
fn types_and_devices_are_those_asked_for() {
    let unet = processors(&small());
    for file in ["adapter.bin", "adapter.safetensors"] {
        let adapter = IpAdapter::read(path(file), &unet, DType::BF16, &Device::Cpu).expect("an adapter");
        assert!(adapter.weights.layers().values().all(|p| p.to_k_ip.dtype() == DType::BF16));
    }
}

#[test]
fn the_lora_of_face_id_is_taken_or_the_adapter_refused() {
    let config = small();
    let mut tensors = tensors(&config);
    let random = |seed: u64, shape: &[usize]| common::Random::new(seed).tensor(shape);
    for (number, layer) in config.layers().iter().enumerate() {
        for (part, from) in [
            ("q", layer.hidden),
            ("k", layer.cross_attention_dim.unwrap_or(layer.hidden)),
            ("v", layer.cross_attention_dim.unwrap_or(layer.hidden)),
            ("out", layer.hidden),
        ] {
            let key = |end: &str| format!("ip_adapter.{number}.to_{part}_lora.{end}.weight");
            tensors.insert(key("down"), random(number as u64, &[3, from]));
            tensors.insert(key("up"), random(100 + number as u64, &[layer.hidden, 3]));
        }
    }
    let mut incomplete = tensors.clone();
    incomplete.remove("ip_adapter.0.to_out_lora.up.weight");
    incomplete.insert("ip_adapter.1.to_k_lora.down.weight".into(), random(0, &[3, 8]));
    let messages: Vec<String> = faults(read(incomplete, &config)).iter().map(KeyFault::to_string).collect();
    assert_eq!(
        messages,
        [
            "ip_adapter.0.to_out_lora.up.weight is missing",
            "ip_adapter.1.to_k_lora.down.weight has shape [3, 8]; it must be [3, 12]",
        ]
    );

    let mut adapter = read(tensors, &config).expect("an adapter");
    let mut processors = processors(&config);
    let message = common::fault(processors.load_adapter("face", &adapter));
    assert!(message.contains("the adapter has LoRA weights for the UNet's own projections"), "{message}");
    let lora = adapter.lora.take().expect("LoRA");
    processors.load_adapter("face", &adapter).expect("it is loaded without");
    assert_eq!(lora.layers.len(), config.layers().len());
    let layer = &lora.layers["mid_block.attentions.0.transformer_blocks.0.attn2.processor"];
    let delta = layer.to_k.delta().expect("a product");
    assert_eq!(delta.dims(), [24, 12]);
    let expected = random(131, &[24, 3]).matmul(&random(31, &[3, 12])).expect("a product");
    assert_eq!(common::bits(&delta), common::bits(&expected));
}
