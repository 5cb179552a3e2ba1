//! The registry: no order of calls changes what is computed, nothing holds weights in secret, everything is refused by name.

mod common;

use candle_core::{DType, Device, Result, Tensor, Var};
use common::{Random, bits, fault};
use fused_attention_candle::processors::*;
use fused_attention_candle::{Attention, MaskRule};
use proptest::prelude::*;

fn unet() -> UnetConfig {
    UnetConfig {
        channels: vec![8, 12],
        heads: vec![2, 3],
        depth: vec![1, 2],
        middle_depth: 1,
        layers_per_block: 2,
        cross_attention_dim: 10,
    }
}

fn weights(seed: u64) -> AdapterWeights {
    let mut random = Random::new(seed);
    let layers = unet().layers().into_iter().filter(|layer| layer.cross_attention_dim.is_some());
    AdapterWeights::new(layers.map(|layer| {
        let mut to = || random.tensor(&[layer.hidden, 10]);
        (layer.name.clone(), KvProjection { to_k_ip: to(), to_v_ip: to() })
    }))
}

const ADAPTERS: [&str; 3] = ["b-style", "a-face", "c-light"];

/// Tokens of each adapter; the second has two images with masks.
fn prompt(adapter: usize) -> Result<ImagePrompt> {
    let mut random = Random::new(500 + adapter as u64);
    let images = [1, 2, 3][adapter];
    let prompt = ImagePrompt::new(random.tensor(&[2, images, 4, 10]))?;
    match adapter {
        1 => prompt.masks(random.mask(&[1, images, 6, 8], 0.5), MaskRule::Diffusers),
        _ => Ok(prompt),
    }
}

/// Every layer's output, with the prompts of the adapters that are there.
fn outputs(processors: &AttnProcessors) -> Result<Vec<Vec<u64>>> {
    let mut prompts = ImagePrompts::new();
    for (number, name) in ADAPTERS.iter().enumerate().filter(|(_, name)| processors.adapters().contains(name)) {
        prompts = prompts.with(*name, prompt(number)?);
    }
    let run = |(number, layer): (usize, &AttnLayer)| {
        let mut random = Random::new(900 + number as u64);
        let [q, k, v] = [12, 5, 5].map(|tokens| random.tensor(&[2, tokens, layer.hidden]));
        let out = processors.attend(&layer.name, &AttnCall { q: &q, k: &k, v: &v, mask: None, prompts: &prompts })?;
        assert_eq!(out.dims(), [2, 12, layer.hidden]);
        Ok(bits(&out))
    };
    processors.layers().enumerate().map(run).collect()
}

#[derive(Clone, Debug)]
enum Step {
    Add(usize),
    Remove(usize),
    SetScale(usize, usize),
    SetBackend(Backend),
    /// Takes a layer's processor out and puts it back.
    Swap(usize),
}

fn scales() -> [Scale; 4] {
    let cross = unet().layers().into_iter().filter(|layer| layer.cross_attention_dim.is_some());
    let layers = cross.enumerate().map(|(n, layer)| (layer.name, LayerScale::All(0.1 * n as f32 - 0.2)));
    [
        0.7.into(),
        BlockScales::new().down(1, [0.0, 1.0]).up(0, [0.5, 0.0, -0.5]).into(),
        Scale::Layers(layers.collect()),
        0.0.into(),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..3usize).prop_map(Step::Add),
        (0..3usize).prop_map(Step::Remove),
        (0..3usize, 0..4usize).prop_map(|(adapter, scale)| Step::SetScale(adapter, scale)),
        prop_oneof![Just(Backend::Fused), Just(Backend::Eager)].prop_map(Step::SetBackend),
        (0..64usize).prop_map(Step::Swap),
    ]
}

/// What a history ends in: scale of each adapter that is there, and the backend.
#[derive(Clone, Debug, Default, PartialEq)]
struct End {
    loaded: [bool; 3],
    scale: [Option<usize>; 3],
    backend: Backend,
}

impl End {
    fn apply(&mut self, processors: &mut AttnProcessors, step: &Step) -> Result<()> {
        match *step {
            Step::Add(adapter) => {
                let added = processors.add_adapter(ADAPTERS[adapter], &weights(adapter as u64));
                assert_eq!(added.is_ok(), !self.loaded[adapter], "an adapter is added once");
                self.loaded[adapter] = true;
            }
            Step::Remove(adapter) => {
                let removed = processors.remove_adapter(ADAPTERS[adapter]);
                assert_eq!(removed.is_ok(), self.loaded[adapter], "what is there is removed");
                if let Ok(removed) = removed {
                    let expected = weights(adapter as u64);
                    assert_eq!(removed.weights.layers().len(), expected.layers().len());
                    for (name, projection) in expected.layers() {
                        let back = &removed.weights.layers()[name];
                        assert_eq!(bits(&back.to_k_ip), bits(&projection.to_k_ip));
                        assert_eq!(bits(&back.to_v_ip), bits(&projection.to_v_ip));
                    }
                    assert_eq!(removed.scale, self.scale[adapter].map(|scale| scales()[scale].clone()));
                    (self.loaded[adapter], self.scale[adapter]) = (false, None);
                }
            }
            Step::SetScale(adapter, scale) => {
                processors.set_scale(ADAPTERS[adapter], scales()[scale].clone())?;
                self.scale[adapter] = Some(scale);
            }
            Step::SetBackend(backend) => {
                processors.set_backend(backend);
                self.backend = backend;
            }
            Step::Swap(number) => {
                let names: Vec<String> = processors.layers().map(|layer| layer.name.clone()).collect();
                let name = &names[number % names.len()];
                let taken = processors.set_processor(name, Processor::Plain)?;
                let held = taken.processor.weights().len();
                let nothing = processors.set_processor(name, taken.processor)?;
                assert!(nothing.processor.weights().is_empty());
                assert_eq!(processors.processor(name).map(|p| p.weights().len()), Some(held));
            }
        }
        Ok(())
    }

    /// The same end in the shortest way: adapters by number, then scales, then the backend.
    fn directly(&self) -> Result<AttnProcessors> {
        let mut processors = AttnProcessors::new(unet().layers());
        for adapter in (0..3).filter(|&adapter| self.loaded[adapter]) {
            processors.add_adapter(ADAPTERS[adapter], &weights(adapter as u64))?;
        }
        for (adapter, scale) in self.scale.iter().enumerate() {
            if let Some(scale) = scale {
                processors.set_scale(ADAPTERS[adapter], scales()[*scale].clone())?;
            }
        }
        processors.set_backend(self.backend);
        Ok(processors)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..Default::default() })]

    /// Whatever was called in whatever order: what is computed depends on where it ends alone, to the bit.
    #[test]
    fn no_history_changes_the_result(steps in proptest::collection::vec(step(), 0..14)) {
        let mut processors = AttnProcessors::new(unet().layers());
        let mut end = End::default();
        for step in &steps {
            end.apply(&mut processors, step).expect("a legal step");
        }
        // A scale of an adapter that is not there is refused when a layer is computed.
        for adapter in (0..3).filter(|&adapter| end.scale[adapter].is_some() && !end.loaded[adapter]) {
            let message = outputs(&processors).map(|_| ()).expect_err("a scale without its adapter").to_string();
            prop_assert!(message.contains(ADAPTERS[adapter]), "{}", message);
        }
        for adapter in (0..3).filter(|&adapter| !end.loaded[adapter]) {
            processors.reset_scale(ADAPTERS[adapter]);
            end.scale[adapter] = None;
        }
        let direct = end.directly().expect("the same end");
        prop_assert_eq!(processors.to_string(), direct.to_string());
        prop_assert_eq!(outputs(&processors).expect("outputs"), outputs(&direct).expect("outputs"));
    }
}

/// The six orders of the three calls from whose order the weights of diffusers' adapters depend.
#[test]
fn load_scale_and_backend_in_any_order() -> Result<()> {
    let calls: [fn(&mut AttnProcessors) -> Result<()>; 3] = [
        |p| p.add_adapter("a-face", &weights(1)),
        |p| p.set_scale("a-face", 0.35),
        |p| {
            p.set_backend(Backend::Eager);
            p.set_backend(Backend::Fused);
            Ok(())
        },
    ];
    let mut results = Vec::new();
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let mut processors = AttnProcessors::new(unet().layers());
        order.iter().try_for_each(|&call| calls[call](&mut processors))?;
        results.push((processors.to_string(), outputs(&processors)?));
    }
    assert!(results.iter().all(|result| *result == results[0]));
    let without = outputs(&AttnProcessors::new(unet().layers()))?;
    let same = results[0].1.iter().zip(&without).filter(|(with, without)| with == without).count();
    assert_eq!(same, unet().layers().len() / 2, "the adapter changes every cross-attention layer and no other");
    Ok(())
}

#[test]
fn a_scale_of_zero_is_no_adapter_to_the_bit() -> Result<()> {
    let mut processors = AttnProcessors::new(unet().layers());
    let without = outputs(&processors)?;
    processors.add_adapter("a-face", &weights(1))?;
    processors.set_scale("a-face", 0.0)?;
    for backend in [Backend::Eager, Backend::Fused] {
        processors.set_backend(backend);
        let mut plain = AttnProcessors::new(unet().layers());
        plain.set_backend(backend);
        assert_eq!(outputs(&processors)?, outputs(&plain)?);
    }
    assert_eq!(outputs(&processors)?, without);
    Ok(())
}

#[test]
fn the_table_tells_every_layer() -> Result<()> {
    let mut processors = AttnProcessors::new(unet().layers());
    processors.add_adapter("a-face", &weights(1))?;
    processors.set_scale("a-face", BlockScales::new().down(1, [0.25]))?;
    processors.set_scale("late", 0.5)?;
    let layer = "down_blocks.1.attentions.0.transformer_blocks.1.attn2.processor";
    processors.set_layer_backend(layer, Backend::Eager)?;
    let table = processors.to_string();
    let row =
        |name: &str| table.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{table}")).to_string();
    let words = |line: String| line.split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(table.lines().count(), 1 + unet().layers().len() + 1);
    assert_eq!(words(row("layer")), "layer processor backend adapters weights loaded");
    assert_eq!(words(row(layer)), format!("{layer} IpAdapter eager a-face × 0.25 2 tensors, 0.9 KiB"));
    let other = "mid_block.attentions.0.transformer_blocks.0.attn2.processor";
    assert_eq!(words(row(other)), format!("{other} IpAdapter fused a-face × 0 2 tensors, 0.9 KiB"));
    let own = "mid_block.attentions.0.transformer_blocks.0.attn1.processor";
    assert_eq!(words(row(own)), format!("{own} Plain fused – –"));
    assert!(table.ends_with("a scale is set for late, which is not loaded\n"), "{table}");
    Ok(())
}

/// Doubles the queries.
#[derive(Debug)]
struct Doubled(Tensor);

impl AttnProcessor for Doubled {
    fn name(&self) -> String {
        "Doubled".into()
    }

    fn request(&self, layer: &AttnLayer, call: &AttnCall<'_>) -> Result<Attention<Tensor>> {
        let by_head = |t: &Tensor| t.reshape((2, t.dim(1)?, layer.heads, layer.hidden / layer.heads));
        let q = by_head(&(call.q * 2.0)?)?;
        Ok(Attention::new(q).branch(fused_attention_candle::Branch::new(by_head(call.k)?, by_head(call.v)?)))
    }

    fn weights(&self) -> Vec<(String, Tensor)> {
        vec![("own".into(), self.0.clone())]
    }
}

#[test]
fn a_processor_of_ones_own_survives_every_backend_and_is_handed_back() -> Result<()> {
    let mut processors = AttnProcessors::new(unet().layers());
    let layer = "mid_block.attentions.0.transformer_blocks.0.attn2.processor";
    let own = Random::new(7).tensor(&[3, 5]);
    let former = processors.set_processor(layer, Processor::Custom(Box::new(Doubled(own.clone()))))?;
    assert!(former.processor.weights().is_empty());
    let at = processors.layers().position(|l| l.name == layer).expect("a layer");
    let with = outputs(&processors)?;
    processors.set_backend(Backend::Eager);
    processors.set_backend(Backend::Fused);
    assert_eq!(outputs(&processors)?[at], with[at]);
    assert_ne!(with[at], outputs(&AttnProcessors::new(unet().layers()))?[at]);

    let message = fault(processors.add_adapter("a-face", &weights(1)));
    assert!(message.contains(&format!("{layer} has the processor Doubled, which takes no adapters")), "{message}");
    assert!(processors.adapters().is_empty(), "a refused adapter leaves nothing behind");
    let back = processors.set_processor(layer, Processor::Plain)?;
    assert_eq!(bits(&back.processor.weights()[0].1), bits(&own));
    processors.add_adapter("a-face", &weights(1))
}

#[test]
fn refusals_name_what_is_wrong_and_change_nothing() -> Result<()> {
    let mut processors = AttnProcessors::new(unet().layers());
    processors.add_adapter("a-face", &weights(1))?;
    let before = (processors.to_string(), outputs(&processors)?);
    let refused = |message: String, words: &str| assert!(message.contains(words), "{message}");

    refused(fault(processors.add_adapter("a-face", &weights(2))), "there is an adapter a-face already");
    let layer = "mid_block.attentions.0.transformer_blocks.0.attn2.processor";
    let mut layers = weights(2).layers().clone();
    layers.remove(layer);
    layers.insert("nowhere".into(), weights(2).layers()[layer].clone());
    let wrong = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor";
    layers.insert(wrong.into(), weights(2).layers()[layer].clone());
    let message = fault(processors.add_adapter("x", &AdapterWeights::new(layers)));
    refused(message.clone(), &format!("{layer} has no weights in the adapter"));
    refused(message.clone(), &format!("to_k_ip of {wrong} has shape [12, 10]; it must be [8, 10]"));
    refused(message.clone(), &format!("to_v_ip of {wrong} has shape"));
    refused(message, "nowhere is no cross-attention layer here");

    refused(fault(processors.remove_adapter("x")), "there is no adapter x; loaded: [a-face]");
    refused(fault(processors.set_processor("x", Processor::Plain)), "there is no attention layer x");
    refused(fault(processors.set_layer_backend("x", Backend::Eager)), "there is no attention layer x");
    let blocks = BlockScales::new().down(0, [0.1, 0.2, 0.3]).down(7, [1.0]).mid(f32::NAN);
    let message = fault(processors.set_scale("a-face", blocks));
    refused(message.clone(), "down_blocks.0 has 2 attention modules, not 3");
    refused(message.clone(), "down_blocks.7 has no cross-attention layer");
    refused(message, &format!("the scale of {layer} is NaN; it must be finite"));
    let named = Scale::Layers([("up".to_string(), 1.0.into())].into());
    refused(fault(processors.set_scale("a-face", named)), "up is no cross-attention layer");

    let mut random = Random::new(3);
    let [q, k, tokens] = [random.tensor(&[2, 12, 12]), random.tensor(&[2, 5, 12]), random.tensor(&[2, 2, 4, 10])];
    let attend = |processors: &AttnProcessors, prompts: &ImagePrompts, q: &Tensor| {
        processors.attend(layer, &AttnCall { q, k: &k, v: &k, mask: None, prompts }).map(|_| ())
    };
    let prompts = || Ok::<_, candle_core::Error>(ImagePrompts::new().with("a-face", ImagePrompt::new(tokens.clone())?));
    refused(
        fault(attend(&processors, &ImagePrompts::new(), &q)),
        "a-face is loaded, but there is no image prompt for it",
    );
    let stranger = prompts()?.with("b", ImagePrompt::new(tokens.clone())?);
    refused(fault(attend(&processors, &stranger, &q)), "there is an image prompt for b, but no such adapter");
    refused(
        fault(attend(&processors, &prompts()?, &k.narrow(2, 0, 10)?)),
        "has 12 channels in 3 heads; these rows have 10",
    );
    refused(
        fault(processors.attend("x", &AttnCall { q: &q, k: &k, v: &k, mask: None, prompts: &prompts()? })),
        "layer x",
    );
    refused(fault(ImagePrompt::new(tokens.get(0)?)), "tokens are [1 or batch, images, tokens");
    refused(fault(ImagePrompt::new(tokens.narrow(1, 0, 0)?)), "there are no images");
    let masks = random.mask(&[1, 3, 4, 4], 0.5);
    refused(
        fault(ImagePrompt::new(tokens.clone())?.masks(masks, MaskRule::Diffusers)),
        "there are 3 masks for 2 images",
    );
    assert_eq!((processors.to_string(), outputs(&processors)?), before);

    processors.set_scale("a-face", Scale::Everywhere(vec![0.5, 0.6].into()))?;
    refused(fault(attend(&processors, &prompts()?, &q)), "2 scales, one for each image, need masks");
    processors.set_scale("a-face", Scale::Everywhere(vec![0.5, 0.6, 0.7].into()))?;
    let masks = random.mask(&[1, 2, 4, 4], 0.5);
    let masked = ImagePrompt::new(tokens)?.masks(masks, MaskRule::Diffusers)?;
    let message = fault(attend(&processors, &ImagePrompts::new().with("a-face", masked), &q));
    refused(message, "there are 3 scales for 2 images");
    Ok(())
}

/// Training: gradients reach an adapter's weights through the registry, and the text's keys get none that nobody asked for.
#[test]
fn an_adapter_can_be_trained() -> Result<()> {
    let layer = AttnLayer { name: "x.attn2.processor".into(), hidden: 12, heads: 3, cross_attention_dim: Some(10) };
    let mut random = Random::new(11);
    let leaves = [Var::from_tensor(&random.tensor(&[12, 10]))?, Var::from_tensor(&random.tensor(&[12, 10]))?];
    let [to_k_ip, to_v_ip] = [leaves[0].as_tensor().clone(), leaves[1].as_tensor().clone()];
    let weights = AdapterWeights::new([(layer.name.clone(), KvProjection { to_k_ip, to_v_ip })]);
    let [q, k, v] = [7, 5, 5].map(|tokens| random.tensor(&[2, tokens, 12]));
    let prompts = ImagePrompts::new().with("a", ImagePrompt::new(random.tensor(&[1, 2, 4, 10]))?);
    let mut gradients = Vec::new();
    for backend in [Backend::Fused, Backend::Eager] {
        let mut processors = AttnProcessors::new([layer.clone()]);
        processors.add_adapter("a", &weights)?;
        processors.set_backend(backend);
        let call = AttnCall { q: &q, k: &k, v: &v, mask: None, prompts: &prompts };
        let grads = processors.attend(&layer.name, &call)?.sqr()?.sum_all()?.backward()?;
        assert!(grads.get(&k).is_none());
        gradients.push(leaves.iter().map(|leaf| grads.get(leaf).cloned().expect("a gradient")).collect::<Vec<_>>());
    }
    for (fused, eager) in gradients[0].iter().zip(&gradients[1]) {
        assert!(common::difference(fused, eager) <= 2e-5);
    }
    Ok(())
}

#[test]
fn half_precision_layers_keep_their_type() -> Result<()> {
    let mut processors = AttnProcessors::new(unet().layers());
    let single = weights(1);
    let half = single.layers().iter().map(|(name, p)| {
        let to = |t: &Tensor| t.to_dtype(DType::F16);
        Ok((name.clone(), KvProjection { to_k_ip: to(&p.to_k_ip)?, to_v_ip: to(&p.to_v_ip)? }))
    });
    processors.add_adapter("a-face", &AdapterWeights::new(half.collect::<Result<Vec<_>>>()?))?;
    let layer = "mid_block.attentions.0.transformer_blocks.0.attn2.processor";
    let rows = |tokens: usize| Tensor::randn(0f32, 1.0, (2, tokens, 12), &Device::Cpu)?.to_dtype(DType::F16);
    let tokens = Tensor::randn(0f32, 1.0, (1, 1, 4, 10), &Device::Cpu)?.to_dtype(DType::F16)?;
    let prompts = ImagePrompts::new().with("a-face", ImagePrompt::new(tokens)?);
    let [q, k] = [rows(9)?, rows(5)?];
    let call = AttnCall { q: &q, k: &k, v: &k, mask: None, prompts: &prompts };
    for backend in [Backend::Fused, Backend::Eager] {
        processors.set_backend(backend);
        assert_eq!(processors.attend(layer, &call)?.dtype(), DType::F16);
    }
    Ok(())
}
