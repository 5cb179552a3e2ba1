//! Gradients through the fused operator against candle's own autograd of the eager one: every input, alone and together.

mod common;

use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor, Var};
use common::{Random, difference, elements};
use fused_attention_candle::*;
use proptest::prelude::*;

/// Rounding of sums of a few hundred f32 products, in two orders.
const F32_BOUND: f64 = 2e-5;
/// Logits, probabilities and gradients stored in f16 on the eager side, 2^-11 each.
const F16_BOUND: f64 = 2e-2;

/// Every differentiable input of a request with two branches, one of two segments, by name.
struct Inputs {
    tensors: Vec<(&'static str, Tensor)>,
    mask: Tensor,
    key_len: Tensor,
}

const NAMES: [&str; 11] = ["q", "k.0", "v.0", "bias.0", "k.1", "v.1", "k.2", "v.2", "gate.1", "region.0", "region.1"];
const BATCH: usize = 2;
const HEADS: usize = 4;

impl Inputs {
    fn new(seed: u64, dtype: DType) -> Result<Self> {
        let mut random = Random::new(seed);
        let mut rows = |shape: &[usize]| random.values(shape).to_dtype(dtype);
        let tensors = vec![
            ("q", rows(&[BATCH, 7, HEADS, 12])?),
            ("k.0", rows(&[BATCH, 11, 2, 12])?),
            ("v.0", rows(&[BATCH, 11, 2, 9])?),
            ("k.1", rows(&[1, 5, HEADS, 12])?),
            ("v.1", rows(&[1, 5, HEADS, 9])?),
            ("k.2", rows(&[BATCH, 3, HEADS, 12])?),
            ("v.2", rows(&[BATCH, 3, HEADS, 9])?),
            ("bias.0", random.tensor(&[1, HEADS, 1, 11])),
            ("gate.1", random.tensor(&[BATCH, HEADS])),
            ("region.0", random.tensor(&[1, 7])),
            ("region.1", random.tensor(&[BATCH, 1, 7])),
        ];
        let mask = random.mask(&[BATCH, 1, 7, 5], 0.7);
        let key_len = Tensor::new(&[11u32, 6], &candle_core::Device::Cpu)?;
        Ok(Inputs { tensors, mask, key_len })
    }

    fn get(&self, name: &str) -> Tensor {
        self.tensors.iter().find(|(n, _)| *n == name).map(|(_, tensor)| tensor.clone()).expect("an input")
    }

    /// The request, `get` giving each tensor.
    fn request(&self, get: impl Fn(&str) -> Tensor) -> Attention<Tensor> {
        let text = Segment::new(get("k.0"), get("v.0"))
            .bias(get("bias.0"))
            .key_len(self.key_len.clone())
            .causal(Causal::BottomRight);
        let joined = Segment::new(get("k.1"), get("v.1"))
            .bias(self.mask.clone())
            .window(Some(4), Some(2))
            .causal(Causal::TopLeft);
        Attention::new(get("q"))
            .softmax_scale(0.4)
            .softcap(3.0)
            .branch(Branch::from(text).join(joined).gate(0.7).region(get("region.0")))
            .branch(Branch::new(get("k.2"), get("v.2")).gate_tensor(get("gate.1")).region(get("region.1")))
    }

    /// Gradients of the tracked inputs of a weighted sum over the output.
    fn gradients(
        &self,
        tracked: &[&str],
        call: impl Fn(&Attention<Tensor>) -> Result<Tensor>,
    ) -> Result<Vec<(String, Option<Tensor>)>> {
        let leaves: Vec<(&str, Var)> = (self.tensors.iter())
            .filter(|(name, _)| tracked.contains(name))
            .map(|(name, tensor)| Ok((*name, Var::from_tensor(tensor)?)))
            .collect::<Result<_>>()?;
        let get = |name: &str| match leaves.iter().find(|(leaf, _)| *leaf == name) {
            // Through an operation of candle's, so that gradients have further to go.
            Some((_, leaf)) => (leaf.as_tensor() * 1.5).expect("a float tensor"),
            None => (self.get(name) * 1.5).expect("a float tensor"),
        };
        let out = call(&self.request(get))?;
        let weights = Random::new(99).tensor(out.dims()).to_dtype(out.dtype())?;
        let grads: GradStore = (out * weights)?.to_dtype(DType::F32)?.sum_all()?.backward()?;
        Ok(leaves.iter().map(|(name, leaf)| (name.to_string(), grads.get(leaf).cloned())).collect())
    }
}

fn compare(seed: u64, dtype: DType, tracked: &[&str], bound: f64) -> Result<()> {
    let inputs = Inputs::new(seed, dtype)?;
    let request = inputs.request(|name| inputs.get(name));
    assert!(difference(&attention(&request)?, &eager_attention(&request)?) <= bound);
    let fused = inputs.gradients(tracked, attention)?;
    let eager = inputs.gradients(tracked, eager_attention)?;
    assert_eq!(fused.len(), tracked.len());
    for ((name, fused), (_, eager)) in fused.iter().zip(&eager) {
        let fused = fused.as_ref().unwrap_or_else(|| panic!("no gradient reached {name} of {tracked:?}"));
        let eager = eager.as_ref().unwrap_or_else(|| panic!("the eager way has no gradient of {name}"));
        assert_eq!(fused.dtype(), eager.dtype(), "{name}");
        assert!(elements(fused).iter().any(|&x| x != 0.0), "{name} has a gradient of zeros");
        let difference = difference(fused, eager);
        assert!(difference <= bound, "{name} of {tracked:?}: {difference:.2e}");
    }
    Ok(())
}

#[test]
fn every_input_alone() -> Result<()> {
    for (seed, name) in NAMES.iter().enumerate() {
        compare(seed as u64, DType::F32, &[name], F32_BOUND)?;
    }
    Ok(())
}

#[test]
fn all_inputs_together() -> Result<()> {
    compare(20, DType::F32, &NAMES, F32_BOUND)?;
    compare(21, DType::F16, &NAMES, F16_BOUND)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..Default::default() })]

    /// Whichever are tracked, each gets its gradient; the bits do not depend on which others are.
    #[test]
    fn any_set_of_inputs(tracked in proptest::sample::subsequence(NAMES.to_vec(), 1..=NAMES.len()), seed in 0u64..1 << 32) {
        compare(seed, DType::F32, &tracked, F32_BOUND).expect("both ways run");
        let inputs = Inputs::new(seed, DType::F32).expect("inputs");
        let together = inputs.gradients(&tracked, attention).expect("it runs");
        let alone = inputs.gradients(&tracked[..1], attention).expect("it runs");
        let named = |of: &[(String, Option<Tensor>)]| common::bits(
            of.iter().find(|(name, _)| name == tracked[0]).and_then(|(_, t)| t.as_ref()).expect("a gradient"));
        prop_assert_eq!(named(&together), named(&alone));
    }
}

#[test]
fn nothing_is_recorded_for_untracked_inputs() -> Result<()> {
    let inputs = Inputs::new(30, DType::F32)?;
    let out = attention(&inputs.request(|name| inputs.get(name)))?;
    assert!(!out.track_op());
    Ok(())
}

#[test]
fn the_functions_of_flash_attn_have_gradients() -> Result<()> {
    let mut random = Random::new(40);
    let [q, k, v] = [[2, 9, 4, 16], [2, 13, 2, 16], [2, 13, 2, 16]].map(|shape| random.values(&shape));
    let slopes = Tensor::new(&[0.5f32, 0.25, 0.125, 0.06], q.device())?;
    let weights = random.tensor(&[2, 9, 4, 16]);
    let gradients = |call: &dyn Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>| -> Result<[Tensor; 3]> {
        let [q, k, v] = [Var::from_tensor(&q)?, Var::from_tensor(&k)?, Var::from_tensor(&v)?];
        let grads = (call(&q, &k, &v)? * &weights)?.sum_all()?.backward()?;
        let get = |var: &Var| grads.get(var).cloned().expect("a gradient");
        Ok([get(&q), get(&k), get(&v)])
    };
    let bias = |i: usize, j: usize, h: usize| match j <= i + 4 {
        true => -[0.5f32, 0.25, 0.125, 0.06][h] * (i as f32 + 4.0 - j as f32),
        false => f32::NEG_INFINITY,
    };
    let index = (0..4).flat_map(|h| (0..9).flat_map(move |i| (0..13).map(move |j| (h, i, j))));
    let bias = Tensor::from_iter(index.map(|(h, i, j)| bias(i, j, h)), q.device())?.reshape((1, 4, 9, 13))?;
    let eager = gradients(&|q, k, v| {
        let segment = Segment::new(k.clone(), v.clone()).bias(bias.clone());
        eager_attention(&Attention::new(q.clone()).softmax_scale(0.3).branch(segment.into()))
    })?;
    let function = gradients(&|q, k, v| flash_attn_alibi(q, k, v, &slopes, 0.3, true))?;
    let op = gradients(&|q, k, v| {
        q.apply_op3(
            k,
            v,
            FlashAttn {
                softmax_scale: 0.3,
                alibi_slopes: Some(slopes.clone()),
                window_size_left: None,
                window_size_right: Some(0),
                softcap: None,
            },
        )
    })?;
    for n in 0..3 {
        assert!(difference(&function[n], &eager[n]) <= F32_BOUND, "{n}");
        assert!(difference(&op[n], &eager[n]) <= F32_BOUND, "{n}");
    }
    // Packed sequences: gradients pass through the parts.
    let lens = Tensor::new(&[0u32, 9], q.device())?;
    let lens_k = Tensor::new(&[0u32, 13], q.device())?;
    let single = |t: &Tensor| t.narrow(0, 1, 1)?.squeeze(0);
    let packed = gradients(&|q, k, v| {
        let second =
            flash_attn_varlen_alibi(&single(q)?, &single(k)?, &single(v)?, &slopes, &lens, &lens_k, 9, 13, 0.3, true)?;
        Tensor::stack(&[&second.zeros_like()?, &second], 0)
    })?;
    for n in 0..3 {
        let [packed, eager] = [single(&packed[n])?, single(&eager[n])?];
        assert!(difference(&packed, &eager) <= F32_BOUND, "{n}");
    }
    Ok(())
}

/// A graph may be walked again, and an input may stand in several places.
#[test]
fn shared_inputs_and_second_walks() -> Result<()> {
    let x = Var::from_tensor(&Random::new(50).tensor(&[1, 6, 2, 8]))?;
    let run = |call: &dyn Fn(&Attention<Tensor>) -> Result<Tensor>| -> Result<[Tensor; 2]> {
        let x = x.as_tensor();
        let request = Attention::new(x.clone()).branch(Branch::new(x.clone(), x.clone()));
        let loss = call(&request)?.sqr()?.sum_all()?;
        let walk = || Ok::<_, candle_core::Error>(loss.backward()?.get(x).cloned().expect("a gradient"));
        Ok([walk()?, walk()?])
    };
    let (fused, eager) = (run(&attention)?, run(&eager_attention)?);
    assert_eq!(common::bits(&fused[0]), common::bits(&fused[1]));
    assert!(difference(&fused[0], &eager[0]) <= F32_BOUND);
    Ok(())
}
