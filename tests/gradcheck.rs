//! The reference backward against finite differences of the reference forward, element by element.
//!
//! The loss is `Σ dout · out`. Inputs are f32, so an element can only be moved by a step that f32 holds: all finite
//! inputs are multiples of 2^-12 below 2^2, and `x ± STEP`, `x ± STEP/2` are exact. Two central differences are
//! extrapolated to one whose error is of fourth order in the step.

use fused_attention::{
    Attention, Branch, Causal, Element, Gate, Gradient, Gradients, Segment, Tensor, TensorRef, reference::Dense,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use std::collections::HashMap;

/// 2^-10.
const STEP: f32 = 1.0 / 1024.0;

/// Largest `Σ |dout · out|` of a case; the bound below is derived from it.
const MAX_LOSS: f64 = 64.0;

/// Largest difference allowed between a gradient and its finite difference.
///
/// Rounding: each loss is off by at most 2^-47 of `MAX_LOSS` (some 2^6 roundings of 2^-53 on the way from a product to
/// the sum), that is 2^-41, and the extrapolation `(4 D(h/2) - D(h)) / 3` passes on three times that over h: 1.4e-9.
/// Truncation: `h^4 / 480` of the loss's fifth derivative, 2e-15 times some 10^3.
const BOUND: f64 = 2e-9;

const BATCH: usize = 2;
const SEQ_Q: usize = 3;
const HEADS: usize = 4;
const HEAD_DIM: usize = 3;
const VALUE_DIM: usize = 2;
const SEQ_KV: usize = 5;

#[test]
fn heads_and_batches_that_share_keys() {
    for kv_batch in [1, BATCH] {
        for kv_heads in [1, 2, HEADS] {
            let mut random = Random::new();
            let branch = Branch::from(random.segment([kv_batch, SEQ_KV, kv_heads]));
            check(&format!("k of batch {kv_batch}, heads {kv_heads}"), &random.attention([branch]));
        }
    }
}

#[test]
fn softmax_scale_and_softcap() {
    for (scale, softcap) in [(Some(1.5), None), (Some(-0.5), None), (None, Some(1.25)), (Some(1.5), Some(2.0))] {
        let mut random = Random::new();
        let bias = random.floats([1, HEADS, SEQ_Q, SEQ_KV]);
        let branch = random.segment([BATCH, SEQ_KV, 2]).bias(bias).into();
        let attention = Attention { softmax_scale: scale, softcap, ..random.attention([branch]) };
        check(&format!("softmax_scale {scale:?}, softcap {softcap:?}"), &attention);
    }
}

#[test]
fn causal() {
    for seq_kv in [SEQ_Q - 1, SEQ_Q, SEQ_Q + 2] {
        for causal in [Causal::TopLeft, Causal::BottomRight] {
            let mut random = Random::new();
            let segment = random.segment([BATCH, seq_kv, 2]).causal(causal);
            let empty =
                check(&format!("{causal:?} over {seq_kv} keys"), &random.attention([segment.into()])).empty_rows;
            let short = causal == Causal::BottomRight && seq_kv < SEQ_Q;
            assert_eq!(empty, if short { BATCH * HEADS } else { 0 });
        }
    }
}

#[test]
fn window() {
    for (left, right) in [(Some(1), None), (None, Some(0)), (Some(1), Some(1)), (Some(0), Some(0))] {
        for seq_kv in [1, SEQ_Q, SEQ_KV] {
            for causal in [Causal::None, Causal::TopLeft, Causal::BottomRight] {
                let mut random = Random::new();
                let segment = random.segment([BATCH, seq_kv, 2]).window(left, right).causal(causal);
                let name = format!("window {left:?} {right:?}, {causal:?} over {seq_kv} keys");
                check(&name, &random.attention([segment.into()]));
            }
        }
    }
}

#[test]
fn keys_past_key_len_are_never_read() {
    let mut random = Random::new();
    let Segment { k, v, .. } = random.segment([BATCH, SEQ_KV, 2]);
    let past = |at: &[usize]| at[0] == 0 || at[1] >= 3;
    let segment = Segment::new(k.set(past, f32::NAN), v.set(past, f32::NAN)).key_len(Array::key_len([0, 3]));
    let checked = check("key_len", &random.attention([segment.into()]));
    assert_eq!(checked.empty_rows, HEADS * SEQ_Q);
    checked.assert_zero(Gradient::K(0), past);
    checked.assert_zero(Gradient::V(0), past);
}

#[test]
fn bool_masks_with_empty_rows() {
    for shape in [[BATCH, HEADS, SEQ_Q, SEQ_KV], [BATCH, 1, SEQ_Q, SEQ_KV], [1, HEADS, SEQ_Q, SEQ_KV]] {
        let mut random = Random::new();
        let mask = random.mask(shape).forbid(|at| at[2] == 1);
        let segment = random.segment([BATCH, SEQ_KV, 2]).bias(mask);
        let empty = check(&format!("mask {shape:?}"), &random.attention([segment.into()])).empty_rows;
        assert!(empty >= BATCH * HEADS);
    }
}

#[test]
fn bias_of_every_shape() {
    for choice in 0..16 {
        let extent = |dim: usize, full: usize| if choice >> dim & 1 == 0 { full } else { 1 };
        let shape = [extent(0, BATCH), extent(1, HEADS), extent(2, SEQ_Q), extent(3, SEQ_KV)];
        let mut random = Random::new();
        let bias = random.floats(shape);
        let segment = random.segment([BATCH, SEQ_KV, 2]).bias(bias);
        check(&format!("bias {shape:?}"), &random.attention([segment.into()]));
    }
}

#[test]
fn bias_of_minus_infinity_takes_no_gradient() {
    let mut random = Random::new();
    let masked = |at: &[usize]| at[2] == 2 || (at[1] + at[3]).is_multiple_of(3);
    let bias = random.floats([1, HEADS, SEQ_Q, SEQ_KV]).set(masked, f32::NEG_INFINITY);
    let segment = random.segment([BATCH, SEQ_KV, 2]).bias(bias);
    let checked = check("bias with -inf", &random.attention([segment.into()]));
    assert_eq!(checked.empty_rows, BATCH * HEADS);
    checked.assert_zero(Gradient::Bias(0), masked);
}

#[test]
fn gate_on_the_host() {
    for gate in [0.75, -1.25, 2.5, 0.0] {
        let mut random = Random::new();
        let text = Branch::from(random.segment([BATCH, SEQ_KV, 2]));
        let image = Branch::from(random.segment([1, 2, HEADS])).gate(gate);
        let checked = check(&format!("gate {gate}"), &random.attention([text, image]));
        checked.assert_some_nonzero(Gradient::Gate(1));
        if gate == 0.0 {
            checked.assert_zero(Gradient::K(1), |_| true);
            checked.assert_zero(Gradient::V(1), |_| true);
        }
    }
}

#[test]
fn gate_tensors() {
    let shapes: [&[usize]; 3] = [&[], &[BATCH], &[BATCH, HEADS]];
    for shape in shapes {
        for closed in [false, true] {
            let mut random = Random::new();
            let text = Branch::from(random.segment([BATCH, SEQ_KV, 2]));
            let mut gate = random.floats(shape);
            if closed {
                gate = gate.set(|at| at.last().is_none_or(|&i| i == 0), 0.0);
            }
            let image = Branch::from(random.segment([BATCH, 2, HEADS])).gate_tensor(gate);
            let checked = check(&format!("gate {shape:?}, closed {closed}"), &random.attention([text, image]));
            checked.assert_some_nonzero(Gradient::Gate(1));
            if closed {
                // Whose gate is 0: everyone's, the first batch entry's, or the first head's of each entry.
                let closed = |at: &[usize]| [true, at[0] == 0, at[2] == 0][shape.len()];
                checked.assert_zero(Gradient::K(1), closed);
                checked.assert_zero(Gradient::V(1), closed);
            }
        }
    }
}

#[test]
fn region_of_every_shape() {
    let shapes: [&[usize]; 6] =
        [&[1, SEQ_Q], &[BATCH, SEQ_Q], &[1, 1, SEQ_Q], &[1, HEADS, SEQ_Q], &[BATCH, 1, SEQ_Q], &[BATCH, HEADS, SEQ_Q]];
    for shape in shapes {
        let mut random = Random::new();
        let region = random.floats(shape).set(|at| at.last() == Some(&1), 0.0);
        let gate = random.floats([BATCH]);
        let text = Branch::from(random.segment([BATCH, SEQ_KV, 2]));
        let image = Branch::from(random.segment([1, 2, 1])).gate_tensor(gate).region(region);
        let checked = check(&format!("region {shape:?}"), &random.attention([text, image]));
        checked.assert_some_nonzero(Gradient::Region(1));
    }
}

#[test]
fn joined_segments() {
    let mut random = Random::new();
    let bias = random.floats([1, HEADS, 1, 2]);
    let mask = random.mask([BATCH, 1, SEQ_Q, 3]).forbid(|at| at[2] == 0);
    let joint = Branch::from(random.segment([BATCH, 2, 2]).bias(bias).causal(Causal::BottomRight))
        .join(random.segment([1, 3, 1]).bias(mask))
        .join(random.segment([BATCH, 0, HEADS]));
    let after = Branch::from(random.segment([BATCH, 2, 1])).gate(-0.5);
    check("joined", &random.attention([joint, after]));
}

#[test]
fn everything_at_once() {
    check("everything", &everything());
}

#[test]
fn a_gradient_does_not_depend_on_which_others_are_asked_for() {
    let attention = everything();
    let dout = Random::new().floats([BATCH, SEQ_Q, HEADS, VALUE_DIM]);
    let all = gradients_of(&attention);
    let together = backward(&attention, &dout, &all);
    for gradient in all {
        assert_eq!(backward(&attention, &dout, &[gradient])[&gradient], together[&gradient], "{gradient:?}");
    }
}

/// An IP-Adapter with every option somewhere: text, a shared image, and an image that some rows may not see at all.
fn everything() -> Attention<Array> {
    let mut random = Random::new();
    let bias = random.floats([BATCH, 1, SEQ_Q, 1]);
    let text = Branch::from(random.segment([BATCH, SEQ_KV, 2]).bias(bias).window(Some(2), Some(1)))
        .join(random.segment([1, 2, 1]).causal(Causal::TopLeft));
    let (gate, region) = (random.floats([BATCH, HEADS]), random.floats([1, SEQ_Q]));
    let first = Branch::from(random.segment([1, 3, HEADS])).gate_tensor(gate).region(region);
    let mask = random.mask([1, 1, SEQ_Q, 4]).forbid(|at| at[2] == 1);
    let region = random.floats([BATCH, HEADS, SEQ_Q]);
    let second = random.segment([BATCH, 4, 2]).bias(mask).key_len(Array::key_len([4, 2]));
    let second = Branch::from(second).gate(-1.5).region(region);
    random.attention([text, first, second]).softmax_scale(0.75).softcap(1.5)
}

/// What a case's gradients were, once found right.
struct Checked {
    gradients: HashMap<Gradient, Dense>,
    /// Rows with no key in any branch.
    empty_rows: usize,
}

/// Holds every gradient of every element against its finite difference.
fn check(name: &str, attention: &Attention<Array>) -> Checked {
    let dout = Random(StdRng::seed_from_u64(1)).floats([BATCH, SEQ_Q, HEADS, VALUE_DIM]);
    let gradients = backward(attention, &dout, &gradients_of(attention));
    let magnitude: f64 = terms(attention, &dout).map(f64::abs).sum();
    assert!(magnitude <= MAX_LOSS, "{name}: a loss of {magnitude} is more than the bound allows for");

    let mut moved = attention.clone();
    for (&gradient, dense) in &gradients {
        for (at, &got) in dense.values.iter().enumerate() {
            let original = *element(&mut moved, gradient, at);
            let mut difference = |step: f32| -> f64 {
                let mut loss = |x: f32| -> f64 {
                    *element(&mut moved, gradient, at) = x;
                    terms(&moved, &dout).sum()
                };
                (loss(original + step) - loss(original - step)) / (2.0 * f64::from(step))
            };
            let want = (4.0 * difference(STEP / 2.0) - difference(STEP)) / 3.0;
            *element(&mut moved, gradient, at) = original;
            assert!((got - want).abs() <= BOUND, "{name}: {gradient:?}[{at}] is {got}, the difference quotient {want}");
        }
    }
    let empty = empty_rows(attention);
    let checked = Checked { gradients, empty_rows: empty.len() };
    if !empty.is_empty() {
        checked.assert_zero(Gradient::Q, |at| empty.contains(&[at[0], at[2], at[1]]));
    }
    checked
}

impl Checked {
    /// The gradient is exactly 0 wherever `at` holds, which is somewhere.
    fn assert_zero(&self, gradient: Gradient, at: impl Fn(&[usize]) -> bool) {
        let Dense { extents, values } = &self.gradients[&gradient];
        let there: Vec<usize> = (0..values.len()).filter(|&position| at(&index(position, extents))).collect();
        assert!(!there.is_empty(), "{gradient:?} has no such element");
        for position in there {
            assert!(values[position] == 0.0, "{gradient:?}[{position}] is {}, not 0", values[position]);
        }
    }

    fn assert_some_nonzero(&self, gradient: Gradient) {
        assert!(self.gradients[&gradient].values.iter().any(|&value| value.abs() > 1e-3), "{gradient:?} vanishes");
    }
}

fn backward(attention: &Attention<Array>, dout: &Array, wanted: &[Gradient]) -> HashMap<Gradient, Dense> {
    let mut inputs = attention.clone();
    let mut asked = Gradients::new();
    for &gradient in wanted {
        let (shape, data) = input(&mut inputs, gradient).expect("a gradient of floats");
        asked = asked.want(gradient, view(data, &shape).desc());
    }
    attention.map(Array::view).backward_f64(dout.view(), &asked).expect("the case is legal")
}

/// `dout · out`, element by element.
fn terms<'a>(attention: &Attention<Array>, dout: &'a Array) -> impl Iterator<Item = f64> + 'a {
    let out = attention.map(Array::view).forward_f64().expect("the case is legal").out.values;
    let Data::F32(dout) = &dout.data else { panic!("dout is f32") };
    out.into_iter().zip(dout).map(|(out, &dout)| out * f64::from(dout))
}

/// Batch, head and query of every row without a key in any branch.
fn empty_rows(attention: &Attention<Array>) -> Vec<[usize; 3]> {
    let lse = attention.map(Array::view).forward_f64().expect("the case is legal").lse;
    let rows = lse.values.len() / attention.branches.len();
    let is_empty = |row: &usize| lse.values.iter().skip(*row).step_by(rows).all(|&lse| lse == f64::NEG_INFINITY);
    (0..rows).filter(is_empty).map(|row| [row / SEQ_Q / HEADS, row / SEQ_Q % HEADS, row % SEQ_Q]).collect()
}

/// Every gradient that the case has.
fn gradients_of(attention: &Attention<Array>) -> Vec<Gradient> {
    let mut inputs = attention.clone();
    let mut all = vec![Gradient::Q];
    all.extend((0..attention.segments().count()).flat_map(|i| [Gradient::K(i), Gradient::V(i), Gradient::Bias(i)]));
    all.extend((0..attention.branches.len()).flat_map(|b| [Gradient::Gate(b), Gradient::Region(b)]));
    all.retain(|&gradient| input(&mut inputs, gradient).is_some());
    all
}

/// Shape and elements of what a gradient is of, if the case has it as floats; a gate on the host has the shape `[]`.
fn input(attention: &mut Attention<Array>, gradient: Gradient) -> Option<(Vec<usize>, &mut [f32])> {
    let branches = &mut attention.branches;
    let array = match gradient {
        Gradient::Q => &mut attention.q,
        Gradient::Gate(b) => match &mut branches[b].gate {
            Gate::Tensor(gate) => gate,
            Gate::Scalar(gate) => return Some((Vec::new(), std::slice::from_mut(gate))),
        },
        Gradient::Region(b) => branches[b].region.as_mut()?,
        Gradient::K(i) | Gradient::V(i) | Gradient::Bias(i) => {
            let segment = branches.iter_mut().flat_map(|branch| &mut branch.segments).nth(i)?;
            match gradient {
                Gradient::K(_) => &mut segment.k,
                Gradient::V(_) => &mut segment.v,
                _ => segment.bias.as_mut()?,
            }
        }
    };
    match &mut array.data {
        Data::F32(data) => Some((array.shape.clone(), data)),
        Data::U32(_) | Data::Bool(_) => None,
    }
}

fn element(attention: &mut Attention<Array>, gradient: Gradient, at: usize) -> &mut f32 {
    let (_, data) = input(attention, gradient).expect("a gradient of floats");
    &mut data[at]
}

/// A tensor and its elements.
#[derive(Clone, Debug)]
struct Array {
    shape: Vec<usize>,
    data: Data,
}

#[derive(Clone, Debug)]
enum Data {
    F32(Vec<f32>),
    U32(Vec<u32>),
    Bool(Vec<bool>),
}

impl Array {
    fn view(&self) -> TensorRef<'_> {
        match &self.data {
            Data::F32(data) => view(data, &self.shape),
            Data::U32(data) => view(data, &self.shape),
            Data::Bool(data) => view(data, &self.shape),
        }
    }

    fn key_len(lengths: [u32; BATCH]) -> Array {
        Array { shape: vec![BATCH], data: Data::U32(lengths.to_vec()) }
    }

    /// Writes floats wherever `at` holds.
    fn set(mut self, at: impl Fn(&[usize]) -> bool, value: f32) -> Array {
        let Data::F32(data) = &mut self.data else { panic!("the array holds no floats") };
        let there = |&(position, _): &(usize, &mut f32)| at(&index(position, &self.shape));
        data.iter_mut().enumerate().filter(there).for_each(|(_, x)| *x = value);
        self
    }

    /// Forbids every key wherever `at` holds.
    fn forbid(mut self, at: impl Fn(&[usize]) -> bool) -> Array {
        let Data::Bool(data) = &mut self.data else { panic!("the array is no mask") };
        let there = |&(position, _): &(usize, &mut bool)| at(&index(position, &self.shape));
        data.iter_mut().enumerate().filter(there).for_each(|(_, may_attend)| *may_attend = false);
        self
    }
}

/// Index of an element of a dense array by its position.
fn index(mut position: usize, extents: &[usize]) -> Vec<usize> {
    let mut index = vec![0; extents.len()];
    for (i, &extent) in index.iter_mut().zip(extents).rev() {
        *i = position % extent;
        position /= extent;
    }
    index
}

fn view<'a, T: Element>(data: &'a [T], shape: &[usize]) -> TensorRef<'a> {
    match *shape {
        [] => TensorRef::contiguous(data, []),
        [a] => TensorRef::contiguous(data, [a]),
        [a, b] => TensorRef::contiguous(data, [a, b]),
        [a, b, c] => TensorRef::contiguous(data, [a, b, c]),
        [a, b, c, d] => TensorRef::contiguous(data, [a, b, c, d]),
        _ => panic!("no input has the shape {shape:?}"),
    }
}

/// The inputs of one case, the same at every run.
struct Random(StdRng);

impl Random {
    fn new() -> Self {
        Random(StdRng::seed_from_u64(20))
    }

    /// Multiples of 2^-12 from -1.5 to 1.5.
    fn floats(&mut self, shape: impl AsRef<[usize]>) -> Array {
        let shape = shape.as_ref().to_vec();
        let elements = shape.iter().product();
        let data = (0..elements).map(|_| self.0.random_range(-6144i16..=6144)).map(|n| f32::from(n) / 4096.0);
        Array { data: Data::F32(data.collect()), shape }
    }

    fn mask(&mut self, shape: [usize; 4]) -> Array {
        let data = (0..shape.iter().product()).map(|_| self.0.random_bool(0.6));
        Array { data: Data::Bool(data.collect()), shape: shape.to_vec() }
    }

    /// Keys and values of `[batch, seq_kv, kv_heads]`.
    fn segment(&mut self, [batch, seq_kv, kv_heads]: [usize; 3]) -> Segment<Array> {
        let k = self.floats([batch, seq_kv, kv_heads, HEAD_DIM]);
        Segment::new(k, self.floats([batch, seq_kv, kv_heads, VALUE_DIM]))
    }

    fn attention(&mut self, branches: impl IntoIterator<Item = Branch<Array>>) -> Attention<Array> {
        let q = self.floats([BATCH, SEQ_Q, HEADS, HEAD_DIM]);
        branches.into_iter().fold(Attention::new(q), Attention::branch)
    }
}
