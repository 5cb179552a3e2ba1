//! Validation survives any input: every rule has its error, and what passes can be computed without leaving a buffer.

mod cases;

use cases::HostTensor;
use fused_attention::{
    Argument, Attention, AttentionDesc, Backward, Branch, Causal, DType, Device, Engine, Extent, Gate, Gradient,
    Gradients, Invalid, MAX_EXTENT, Outputs, Plan, Problem, Rule, Segment, TensorDesc, TensorMut, TensorRef,
};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

// ---- one test per rule ------------------------------------------------------------------------------------------------

const B: usize = 2;
const SQ: usize = 5;
const H: usize = 6;
const D: usize = 8;
const SKV: usize = 7;

fn rows(seq: usize, heads: usize) -> TensorDesc {
    TensorDesc::bshd(DType::F16, [B, seq, heads, D])
}

fn text() -> Segment<TensorDesc> {
    Segment::new(rows(SKV, H), rows(SKV, H))
}

fn legal() -> AttentionDesc {
    Attention::new(rows(SQ, H)).branch(text().into()).branch(Branch::new(rows(3, 2), rows(3, 2)))
}

fn out() -> Outputs<TensorDesc> {
    Outputs::new(rows(SQ, H)).lse(TensorDesc::contiguous(DType::F32, [2, B, H, SQ]))
}

/// The single violation of a request that differs from a legal one in one place.
fn violation(attention: &AttentionDesc, outputs: &Outputs<TensorDesc>) -> (Argument, Rule) {
    one(Problem::forward(attention, outputs))
}

fn one(checked: Result<Problem, Invalid>) -> (Argument, Rule) {
    let mut violations = checked.expect_err("an illegal request").violations;
    assert_eq!(violations.len(), 1, "{violations:?}");
    let violation = violations.remove(0);
    (violation.argument, violation.rule)
}

fn with(change: impl FnOnce(&mut AttentionDesc)) -> (Argument, Rule) {
    let mut attention = legal();
    change(&mut attention);
    violation(&attention, &out())
}

#[test]
fn the_base_request_is_legal() {
    Problem::forward(&legal(), &out()).expect("the tests change one thing in it");
}

#[test]
fn rank() {
    let (argument, rule) = with(|a| a.branches[1].segments[0].k = TensorDesc::contiguous(DType::F16, [B, 3, D]));
    assert_eq!(argument, Argument::K(1));
    assert!(matches!(rule, Rule::Rank { got: 3, .. }));
    assert_eq!(rule.to_string(), "has 3 dimensions; give it the shape [1 or batch, seq_kv, kv_heads, head_dim]");

    let (argument, rule) = with(|a| a.q = TensorDesc::contiguous(DType::F16, [SQ, D]));
    assert_eq!((argument, matches!(rule, Rule::Rank { got: 2, .. })), (Argument::Q, true));
}

#[test]
fn dtype() {
    let (argument, rule) = with(|a| a.branches[0].segments[0].v = TensorDesc::bshd(DType::BF16, [B, SKV, H, D]));
    assert_eq!((argument, rule.to_string().as_str()), (Argument::V(0), "is bf16; convert it to f16"));

    let (argument, rule) =
        with(|a| a.branches[0].segments[0].bias = Some(TensorDesc::contiguous(DType::U32, [1, 1, SQ, SKV])));
    assert_eq!(argument, Argument::Bias(0));
    assert_eq!(rule.to_string(), "is u32; convert it to f32, f16, bf16 or bool");

    let mut attention = legal();
    attention.q = TensorDesc::bshd(DType::Bool, [B, SQ, H, D]);
    let (argument, _) = violation(&attention, &out());
    assert_eq!(argument, Argument::Q);
}

#[test]
fn extent() {
    let (argument, rule) = with(|a| a.branches[1].segments[0].k = TensorDesc::bshd(DType::F16, [3, 3, 2, D]));
    assert_eq!(argument, Argument::K(1));
    assert_eq!(rule, Rule::Extent { dim: "batch", got: 3, expected: Extent::OrOne(B) });
    assert_eq!(rule.to_string(), "has batch 3; it must be 1 or 2");

    let (argument, rule) = violation(&legal(), &Outputs::new(TensorDesc::bshd(DType::F16, [B, SQ, H, D + 1])));
    assert_eq!((argument, rule.to_string().as_str()), (Argument::Out, "has value_dim 9; it must be 8"));
}

#[test]
fn head_groups() {
    let (argument, rule) = with(|a| {
        a.branches[1].segments[0] = Segment::new(rows(3, 4), rows(3, 4));
    });
    assert_eq!((argument, rule), (Argument::K(1), Rule::HeadGroups { got: 4, heads: H }));
}

#[test]
fn zero_width() {
    let empty = |seq, heads| TensorDesc::bshd(DType::F16, [B, seq, heads, 0]);
    let attention = Attention::new(empty(SQ, H)).branch(Branch::new(empty(SKV, H), rows(SKV, H)));
    let violations = Problem::forward(&attention, &Outputs::new(rows(SQ, H))).expect_err("no width").violations;
    assert!(violations.iter().all(|v| v.rule == Rule::Zero { dim: "head_dim" }), "{violations:?}");
}

#[test]
fn too_large() {
    let wide = TensorDesc::strided(DType::F16, [B, 1 << 60, H, D], [0, 0, 0, 1]);
    let attention = Attention::new(rows(SQ, H)).branch(Branch::new(wide, wide));
    let violations = Problem::forward(&attention, &Outputs::new(rows(SQ, H))).expect_err("too long").violations;
    assert_eq!(violations.len(), 2);
    assert_eq!(violations[0].rule, Rule::TooLarge { dim: "seq_kv", got: 1 << 60, limit: MAX_EXTENT });
}

#[test]
fn last_stride() {
    let strides = [(SQ * H * D * 2) as isize, (H * D * 2) as isize, (D * 2) as isize, 2];
    let (argument, rule) = with(|a| a.q = TensorDesc::strided(DType::F16, [B, SQ, H, D], strides));
    assert_eq!((argument, rule), (Argument::Q, Rule::LastStride { got: 2 }));
}

#[test]
fn span() {
    let (argument, rule) =
        with(|a| a.q = TensorDesc::strided(DType::F16, [B, SQ, H, D], [isize::MAX, isize::MIN, isize::MAX, 1]));
    assert!(matches!((argument, rule), (Argument::Q, Rule::Span { .. })));
}

#[test]
fn overlap() {
    let strides = [(SQ * H * D) as isize, 0, D as isize, 1];
    let (argument, rule) = violation(&legal(), &Outputs::new(TensorDesc::strided(DType::F16, [B, SQ, H, D], strides)));
    assert!(matches!((argument, rule), (Argument::Out, Rule::Overlap { .. })));
    // Heads that reach into the next query.
    let strides = [(SQ * H * D) as isize, (H * D - 1) as isize, D as isize, 1];
    let (argument, rule) = violation(&legal(), &Outputs::new(TensorDesc::strided(DType::F16, [B, SQ, H, D], strides)));
    assert!(matches!((argument, rule), (Argument::Out, Rule::Overlap { .. })));
}

#[test]
fn not_finite() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        assert!(matches!(with(|a| a.softmax_scale = Some(value)), (Argument::SoftmaxScale, Rule::NotFinite { .. })));
        assert!(matches!(with(|a| a.softcap = Some(value)), (Argument::Softcap, Rule::NotFinite { .. })));
        assert!(matches!(
            with(|a| a.branches[1].gate = Gate::Scalar(value)),
            (Argument::Gate(1), Rule::NotFinite { .. })
        ));
    }
}

#[test]
fn not_positive() {
    for value in [0.0, -0.0, -2.0] {
        assert!(matches!(with(|a| a.softcap = Some(value)), (Argument::Softcap, Rule::NotPositive { .. })));
    }
}

#[test]
fn empty_lists() {
    let mut outputs = out();
    outputs.lse = None;
    let mut attention = legal();
    attention.branches.clear();
    assert_eq!(violation(&attention, &outputs), (Argument::Branches, Rule::Empty));
    let (argument, rule) = with(|a| a.branches[1].segments.clear());
    assert_eq!((argument, rule), (Argument::Segments(1), Rule::Empty));
}

#[test]
fn gates_and_regions() {
    let f32s = |shape: [usize; 2]| TensorDesc::contiguous(DType::F32, shape);
    let (argument, rule) = with(|a| a.branches[0].gate = Gate::Tensor(f32s([B, 1])));
    assert_eq!((argument, rule.to_string().as_str()), (Argument::Gate(0), "has heads 1; it must be 6"));
    let (argument, rule) = with(|a| a.branches[0].region = Some(f32s([B, 1])));
    assert_eq!((argument, rule.to_string().as_str()), (Argument::Region(0), "has seq_q 1; it must be 5"));
    let (argument, _) = with(|a| a.branches[1].region = Some(TensorDesc::contiguous(DType::F16, [1, SQ])));
    assert_eq!(argument, Argument::Region(1));
}

#[test]
fn gradients() {
    let f32s = |shape: [usize; 4]| TensorDesc::contiguous(DType::F32, shape);
    let mut attention = legal();
    attention.branches[0].segments[0].bias = Some(TensorDesc::contiguous(DType::Bool, [1, 1, SQ, SKV]));
    let check = |gradient, desc| {
        one(Problem::backward(&attention, &Backward::new(rows(SQ, H)), &Gradients::new().want(gradient, desc)))
    };
    assert_eq!(check(Gradient::Bias(0), f32s([1, 1, SQ, SKV])), (Argument::Dbias(0), Rule::BoolGradient));
    assert_eq!(check(Gradient::Region(1), f32s([1, 1, 1, 1])), (Argument::Dregion(1), Rule::NoInput));
    assert_eq!(check(Gradient::K(9), f32s([1, 1, 1, 1])), (Argument::Dk(9), Rule::NoInput));
    assert_eq!(check(Gradient::Gate(usize::MAX), f32s([1; 4])).1, Rule::NoInput);
    let (argument, rule) = check(Gradient::V(1), f32s([B, 3, H, D]));
    assert_eq!(argument, Argument::Dv(1));
    assert_eq!(rule, Rule::Extent { dim: "extent 2", got: H, expected: Extent::Exactly(2) });
    let (argument, rule) = check(Gradient::Q, TensorDesc::bshd(DType::BF16, [B, SQ, H, D]));
    assert_eq!((argument, rule.to_string().as_str()), (Argument::Dq, "is bf16; convert it to f32 or f16"));

    let twice = Gradients::new().want(Gradient::Q, rows(SQ, H)).want(Gradient::Q, rows(SQ, H));
    assert_eq!(one(Problem::backward(&attention, &Backward::new(rows(SQ, H)), &twice)), (Argument::Dq, Rule::Twice));
}

#[test]
fn what_the_forward_saved() {
    let check = |accumulate: bool, out: TensorDesc, lse: TensorDesc| {
        let mut attention = legal();
        attention.accumulate = accumulate;
        one(Problem::backward(&attention, &Backward::new(rows(SQ, H)).saved(out, lse), &Gradients::<TensorDesc>::new()))
    };
    let (out, lse) = (rows(SQ, H), TensorDesc::contiguous(DType::F32, [2, B, H, SQ]));
    assert_eq!(check(true, out, lse), (Argument::Out, Rule::SavedSum));
    let (argument, rule) = check(false, rows(SQ + 1, H), lse);
    assert_eq!((argument, rule.to_string().as_str()), (Argument::Out, "has seq_q 6; it must be 5"));
    let (argument, rule) = check(false, TensorDesc::bshd(DType::F32, [B, SQ, H, D]), lse);
    assert_eq!((argument, rule.to_string().as_str()), (Argument::Out, "is f32; convert it to f16"));
    let (argument, rule) = check(false, out, TensorDesc::contiguous(DType::F32, [1, B, H, SQ]));
    assert_eq!((argument, rule.to_string().as_str()), (Argument::Lse, "has branches 1; it must be 2"));
    let (argument, rule) = check(false, out, TensorDesc::contiguous(DType::F16, [2, B, H, SQ]));
    assert_eq!((argument, rule.to_string().as_str()), (Argument::Lse, "is f16; convert it to f32"));
    let (argument, rule) = check(false, out, TensorDesc::contiguous(DType::F32, [B, H, SQ]));
    assert_eq!((argument, matches!(rule, Rule::Rank { got: 3, .. })), (Argument::Lse, true));
}

#[test]
fn slices_and_key_lengths() {
    let (q, kv) = (vec![0.5f32; B * SQ * H * D], vec![0.5f32; B * SKV * H * D]);
    let lens = [7u32, 8];
    let k = TensorRef::bshd(&kv, [B, SKV, H, D]);
    let segment = Segment::new(k, k).key_len(TensorRef::contiguous(&lens, [B]));
    let attention = Attention::new(TensorRef::bshd(&q, [B, SQ, H, D])).branch(segment.into());
    let mut out = vec![0.0f32; B * SQ * H * D];
    let error = attention.forward(Engine::Cpu, TensorMut::bshd(&mut out, [B, SQ, H, D])).expect_err("8 keys of 7");
    assert_eq!(error.to_string(), "key_len.0 is 8 for batch entry 1; the segment has 7 keys");

    let mut attention = attention;
    attention.branches[0].segments[0].key_len = None;
    let error = attention.forward(Engine::Cpu, TensorMut::bshd(&mut out[1..], [B, SQ, H, D])).expect_err("short");
    let told = "out reaches 480 elements, but its slice holds 479; pass the whole buffer or correct shape, strides and \
                offset";
    assert_eq!(error.to_string(), told);

    attention.q = TensorRef::strided(&q, 0, [B, SQ, H, D], [(SQ * H * D) as isize, -((H * D) as isize), D as isize, 1]);
    let error = attention.forward(Engine::Cpu, TensorMut::bshd(&mut out, [B, SQ, H, D])).expect_err("before the start");
    assert!(error.to_string().starts_with("q reaches outside its slice"), "{error}");
}

#[test]
fn every_violation_is_listed() {
    let mut attention = legal();
    attention.softmax_scale = Some(f32::NAN);
    attention.softcap = Some(-1.0);
    attention.branches[0].segments[0].k = TensorDesc::bshd(DType::F32, [B, SKV, H, D]);
    attention.branches[1].region = Some(TensorDesc::contiguous(DType::F32, [1, SQ + 1]));
    let invalid = Problem::forward(&attention, &out()).expect_err("four mistakes");
    assert_eq!(invalid.violations.len(), 4, "{invalid}");
}

#[test]
fn widths_past_the_cpu_kernels_are_refused_with_both_reasons() {
    let wide = TensorDesc::bshd(DType::F32, [1, 1, 1, 20_000]);
    let attention = Attention::new(wide).branch(Branch::new(wide, wide));
    let problem = Problem::forward(&attention, &Outputs::new(wide)).expect("a legal problem");
    let gradients = Gradients::new().want(Gradient::Q, wide);
    let backward = Problem::backward(&attention, &Backward::new(wide), &gradients).expect("a legal problem");
    for problem in [problem, backward] {
        let refusal = Plan::new(&problem, &Device::Cpu { threads: 2 }).expect_err("too wide");
        assert_eq!(refusal.reasons.len(), 2, "{refusal}");
        Plan::new(&problem, &Device::Reference).expect("the reference takes any width");
    }
}

#[test]
fn nothing_to_do_is_done_at_once() {
    let huge = MAX_EXTENT;
    let nothing: [f32; 0] = [];
    for shape in [[huge, 0, huge, 8], [huge, huge, 0, 8], [0, huge, huge, 8]] {
        let [b, sq, h, d] = shape;
        let q = TensorRef::strided(&nothing, 0, shape, [0, 0, 0, 1]);
        let kv_heads = h.min(1);
        let k = TensorRef::strided(&nothing, 0, [b, 0, kv_heads, d], [0, 0, 0, 1]);
        let attention = Attention::new(q).branch(Branch::new(k, k)).branch(Branch::new(k, k)).branch(Branch::new(k, k));
        for engine in [Engine::Cpu, Engine::Reference] {
            let (mut out, mut lse) = (nothing, nothing);
            let out = TensorMut::strided(&mut out, 0, shape, [0, 0, 0, 1]);
            let lse = TensorMut::strided(&mut lse, 0, [3, b, h, sq], [0, 0, 0, 0]);
            attention.forward(engine, Outputs::new(out).lse(lse)).expect("nothing to do");

            let (mut dq, mut dgate) = (nothing, [f32::NAN]);
            let wanted = Gradients::new()
                .want(Gradient::Q, TensorMut::strided(&mut dq, 0, shape, [0, 0, 0, 1]))
                .want(Gradient::Gate(1), TensorMut::contiguous(&mut dgate, []));
            let dout = TensorRef::strided(&nothing, 0, shape, [0, 0, 0, 1]);
            attention.backward(engine, dout, wanted).expect("nothing to do");
            assert_eq!(dgate, [0.0]);
        }
    }
}

// ---- any input --------------------------------------------------------------------------------------------------------

/// A legal request in a random memory layout, then a few random mistakes in it.
struct Request {
    attention: AttentionDesc,
    outputs: Outputs<TensorDesc>,
    dout: TensorDesc,
    gradients: Gradients<TensorDesc>,
}

const DTYPES: [DType; 5] = [DType::F16, DType::BF16, DType::F32, DType::Bool, DType::U32];
const EXTENTS: [usize; 9] = [0, 1, 2, 3, 65_536, MAX_EXTENT, MAX_EXTENT + 1, 1 << 60, usize::MAX];
const STRIDES: [isize; 9] = [0, 1, -1, 2, 1 << 31, 1 << 60, -(1 << 62), isize::MAX, isize::MIN];
const FLOATS: [f32; 8] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -1.0, 1e-38, f32::MAX, 0.5];

fn pick<T: Copy>(rng: &mut StdRng, from: &[T]) -> T {
    from[rng.random_range(0..from.len())]
}

/// Dimensions in random order in memory, with gaps, some of them backwards; the last one contiguous if `rows`.
fn layout(rng: &mut StdRng, dtype: DType, shape: &[usize], rows: bool) -> TensorDesc {
    let mut order: Vec<usize> = (0..shape.len()).collect();
    let fixed = if rows && !shape.is_empty() { order.pop() } else { None };
    for i in (1..order.len()).rev() {
        order.swap(i, rng.random_range(0..=i));
    }
    let mut strides = vec![0isize; shape.len()];
    let mut next = 1;
    for dim in fixed.into_iter().chain(order) {
        strides[dim] = next;
        next = next * shape[dim].max(1) as isize + pick(rng, &[0, 1, 2]);
        if Some(dim) != fixed && rng.random_range(0..6) == 0 {
            strides[dim] = -strides[dim];
        }
    }
    TensorDesc::from_slices(dtype, shape, &strides).expect("at most four dimensions")
}

impl Request {
    fn legal(rng: &mut StdRng) -> Request {
        let dtype = pick(rng, &DTYPES[..3]);
        let (b, sq, h) = (pick(rng, &[0, 1, 2, 3]), rng.random_range(0..6), pick(rng, &[0, 1, 2, 6]));
        let (d, dv) = (rng.random_range(1..9), rng.random_range(1..9));
        let one_or = |rng: &mut StdRng, extent: usize| if rng.random() { 1 } else { extent };
        let mut attention = Attention::new(layout(rng, dtype, &[b, sq, h, d], true));
        for _ in 0..rng.random_range(1..4) {
            let mut segments = (0..rng.random_range(1..3)).map(|_| {
                let (kb, skv) = (one_or(rng, b), rng.random_range(0..7));
                let groups: Vec<usize> = [1, 2, 3, 6].into_iter().filter(|n| h.is_multiple_of(*n)).collect();
                let kh = if h == 0 { pick(rng, &[0, 1]) } else { pick(rng, &groups) };
                let k = layout(rng, dtype, &[kb, skv, kh, d], true);
                let v = layout(rng, dtype, &[kb, skv, kh, dv], true);
                let mut segment = Segment::new(k, v);
                if rng.random() {
                    let shape = [one_or(rng, b), one_or(rng, h), one_or(rng, sq), one_or(rng, skv)];
                    let bias = pick(rng, &DTYPES[..4]);
                    segment = segment.bias(layout(rng, bias, &shape, false));
                }
                if rng.random() {
                    segment = segment.key_len(layout(rng, DType::U32, &[b], false));
                }
                segment = segment.causal(pick(rng, &[Causal::None, Causal::TopLeft, Causal::BottomRight]));
                let side = |rng: &mut StdRng| pick(rng, &[None, Some(0), Some(2), Some(u32::MAX)]);
                segment.window(side(rng), side(rng))
            });
            let mut branch = Branch::from(segments.next().expect("at least one"));
            branch = segments.collect::<Vec<_>>().into_iter().fold(branch, Branch::join);
            branch = match rng.random_range(0..4) {
                0 => branch.gate(pick(rng, &[0.0, -2.0, 1e-4, 3000.0])),
                1 => branch.gate_tensor(layout(rng, DType::F32, &[], false)),
                2 => branch.gate_tensor(layout(rng, DType::F32, &[b], false)),
                _ => branch.gate_tensor(layout(rng, DType::F32, &[b, h], false)),
            };
            branch.region = match rng.random_range(0..3) {
                0 => None,
                1 => Some([one_or(rng, b), sq].to_vec()),
                _ => Some([one_or(rng, b), one_or(rng, h), sq].to_vec()),
            }
            .map(|shape| layout(rng, DType::F32, &shape, false));
            attention = attention.branch(branch);
        }
        let mut outputs = Outputs::new(layout(rng, dtype, &[b, sq, h, dv], true));
        if rng.random() {
            outputs = outputs.lse(layout(rng, DType::F32, &[attention.branches.len(), b, h, sq], false));
        }
        let dout = layout(rng, dtype, &[b, sq, h, dv], true);
        let mut gradients = Gradients::new().want(Gradient::Q, layout(rng, DType::F32, &[b, sq, h, d], false));
        let v = attention.branches[0].segments[0].v;
        gradients = gradients.want(Gradient::V(0), layout(rng, DType::F32, v.shape(), false));
        if let Some(region) = attention.branches[0].region {
            gradients = gradients.want(Gradient::Region(0), layout(rng, DType::F32, region.shape(), false));
        }
        Request { attention, outputs, dout, gradients }
    }

    /// One random mistake, which may happen to be none.
    fn spoil(&mut self, rng: &mut StdRng) {
        let scalar = pick(rng, &FLOATS);
        match rng.random_range(0..12) {
            0 => self.attention.softmax_scale = Some(scalar),
            1 => self.attention.softcap = Some(scalar),
            2 => self.attention.branches.iter_mut().for_each(|branch| branch.gate = Gate::Scalar(scalar)),
            3 => {
                let branches = &mut self.attention.branches;
                match rng.random_range(0..3) {
                    0 => branches.clear(),
                    1 => branches.iter_mut().for_each(|branch| branch.segments.clear()),
                    _ => branches.reverse(),
                }
            }
            4 => self.gradients.wanted.push((Gradient::K(rng.random_range(0..9)), self.dout)),
            _ => {
                let mut tensors = self.tensors_mut();
                let which = rng.random_range(0..tensors.len());
                spoil_tensor(rng, tensors[which]);
            }
        }
    }

    fn tensors_mut(&mut self) -> Vec<&mut TensorDesc> {
        let mut tensors = vec![&mut self.attention.q, &mut self.outputs.out, &mut self.dout];
        tensors.extend(self.outputs.lse.iter_mut());
        tensors.extend(self.gradients.wanted.iter_mut().map(|(_, desc)| desc));
        for branch in &mut self.attention.branches {
            if let Gate::Tensor(gate) = &mut branch.gate {
                tensors.push(gate);
            }
            tensors.extend(branch.region.iter_mut());
            for segment in &mut branch.segments {
                tensors.extend([&mut segment.k, &mut segment.v]);
                tensors.extend(segment.bias.iter_mut().chain(segment.key_len.iter_mut()));
            }
        }
        tensors
    }
}

fn spoil_tensor(rng: &mut StdRng, tensor: &mut TensorDesc) {
    let (mut dtype, mut shape, mut strides) = (tensor.dtype(), tensor.shape().to_vec(), tensor.strides().to_vec());
    match rng.random_range(0..5) {
        0 => dtype = pick(rng, &DTYPES),
        1 => {
            shape.truncate(rng.random_range(0..4));
        }
        2 if !shape.is_empty() => {
            let dim = rng.random_range(0..shape.len());
            shape[dim] = pick(rng, &EXTENTS);
        }
        3 if !shape.is_empty() => {
            let dim = rng.random_range(0..shape.len());
            strides[dim] = pick(rng, &STRIDES);
        }
        _ => {
            for (extent, stride) in shape.iter_mut().zip(&mut strides) {
                (*extent, *stride) = (pick(rng, &EXTENTS), pick(rng, &STRIDES));
            }
        }
    }
    strides.truncate(shape.len());
    *tensor = TensorDesc::from_slices(dtype, &shape, &strides).expect("at most four dimensions");
}

/// Whether every tensor is small enough to be made.
fn is_small(request: &mut Request) -> bool {
    request.tensors_mut().iter().all(|tensor| {
        let reach: u128 = (tensor.shape().iter().zip(tensor.strides()))
            .map(|(&extent, &stride)| (extent as u128).saturating_sub(1).saturating_mul(stride.unsigned_abs() as u128))
            .fold(0, u128::saturating_add);
        reach < 10_000 && tensor.shape().iter().all(|&extent| extent < 10_000)
    })
}

/// Gives every tensor a buffer that ends where the description does, and runs the request.
fn run(request: &Request, rng: &mut StdRng) {
    let shortest = request.attention.segments().map(|segment| segment.k.shape()[1]).min().unwrap_or(0);
    let mut draw = |tensor: &TensorDesc| {
        // A number below `shortest + 1` is a legal key length once it is cut to an integer.
        let limit = if tensor.dtype() == DType::U32 { shortest as f32 + 1.0 } else { 2.0 };
        HostTensor::exact(tensor, 0, || rng.random::<f32>() * limit)
    };
    let owned = request.attention.map(&mut draw);
    let dout = draw(&request.dout);
    let bound = owned.map(HostTensor::view);
    for engine in [Engine::Cpu, Engine::Reference] {
        let mut out = HostTensor::exact(&request.outputs.out, 7, || f32::NAN);
        let mut lse = request.outputs.lse.map(|lse| HostTensor::exact(&lse, 7, || f32::NAN));
        let outputs = Outputs { out: out.view_mut(), lse: lse.as_mut().map(HostTensor::view_mut) };
        bound.forward(engine, outputs).expect("validated before");
        assert!(out.gaps_untouched() && lse.iter().all(HostTensor::gaps_untouched));
        // A scale of f32::MAX overflows the logits: NaN is right there.
        if bound.softmax_scale.is_none() {
            assert!(out.values().iter().all(|x| !x.is_nan()), "every element is written and none is NaN");
            assert!(lse.iter().all(|lse| lse.values().iter().all(|x| !x.is_nan())));
        }

        let mut gradients: Vec<(Gradient, HostTensor)> = (request.gradients.wanted.iter())
            .map(|(gradient, desc)| (*gradient, HostTensor::exact(desc, 7, || f32::NAN)))
            .collect();
        let wanted = gradients.iter_mut().map(|(gradient, tensor)| (*gradient, tensor.view_mut())).collect();
        bound.backward(engine, dout.view(), Gradients { wanted }).expect("validated before");
        assert!(gradients.iter().all(|(_, gradient)| gradient.gaps_untouched()));
        // So does a gate of f32::MAX the gradients that it is a factor of.
        let overflows = bound.branches.iter().any(|branch| matches!(branch.gate, Gate::Scalar(f32::MAX)));
        if bound.softmax_scale.is_none() && !overflows {
            let all = gradients.iter().flat_map(|(_, gradient)| gradient.values());
            assert!(all.into_iter().all(|x| !x.is_nan()), "every element is written and none is NaN");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_request_is_judged_without_panic(seed in any::<u64>(), mistakes in 0usize..4) {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut request = Request::legal(&mut rng);
        if mistakes == 0 {
            prop_assert!(Problem::forward(&request.attention, &request.outputs).is_ok());
            prop_assert!(Problem::backward(&request.attention, &Backward::new(request.dout), &request.gradients).is_ok());
        }
        (0..mistakes).for_each(|_| request.spoil(&mut rng));

        let backward = Problem::backward(&request.attention, &Backward::new(request.dout), &request.gradients);
        let forward = Problem::forward(&request.attention, &request.outputs);
        for problem in [&forward, &backward].into_iter().flatten() {
            for device in [Device::Reference, Device::Cpu { threads: 3 }, Device::Emulated { compute_capability: (8, 0) }] {
                match Plan::new(problem, &device) {
                    Ok(plan) => prop_assert!(!plan.to_string().is_empty()),
                    Err(refusal) => prop_assert!(!refusal.reasons.is_empty()),
                }
            }
            prop_assert!(problem.forward_flops().is_finite());
        }
        for invalid in [&forward, &backward].into_iter().filter_map(|checked| checked.as_ref().err()) {
            prop_assert!(!invalid.to_string().is_empty());
        }
        // Running is a hundred times dearer than judging.
        if forward.is_ok() && backward.is_ok() && seed % 16 == 0 && is_small(&mut request) {
            run(&request, &mut rng);
        }
    }
}
