//! Every rule of the operator, checked once. All violations are collected; none stops the others from being found
//! unless it makes them meaningless.

use super::argument::Argument;
use super::descriptor::{Attention, Backward, Branch, Gate, Gradient, Gradients, Outputs, Saved, Segment};
use super::dtype::DType::{self, BF16, Bool, F16, F32, U32};
use super::error::{DTypes, Extent, Invalid, Rule, Violation};
use super::tensor::{Tensor, TensorDesc};
use super::{BranchProblem, GradientProblem, List, Problem, Results, SegmentProblem, Strides};
use smallvec::SmallVec;

/// The largest extent of any dimension: positions and their differences are counted in 32-bit signed integers.
pub const MAX_EXTENT: usize = i32::MAX as usize;

const Q_SHAPE: &str = "[batch, seq_q, heads, head_dim]";
const KV_SHAPE: &str = "[1 or batch, seq_kv, kv_heads, head_dim]";
const BIAS_SHAPE: &str = "[1 or batch, 1 or heads, 1 or seq_q, 1 or seq_kv]";
const OUT_SHAPE: &str = "[batch, seq_q, heads, value_dim]";
const LSE_SHAPE: &str = "[branches, batch, heads, seq_q]";
const KEY_LEN_SHAPE: &str = "[batch]";
const GATE_SHAPE: &str = "[], [batch] or [batch, heads]";
const REGION_SHAPE: &str = "[1 or batch, seq_q] or [1 or batch, 1 or heads, seq_q]";

const FLOATS: DTypes = DTypes(&[F16, BF16, F32]);
const BIASES: DTypes = DTypes(&[F32, F16, BF16, Bool]);

pub(super) fn forward<T: Tensor, O: Tensor>(
    attention: &Attention<T>,
    outputs: &Outputs<O>,
) -> Result<Problem, Invalid> {
    let mut check = Checker::default();
    let out = outputs.out.desc();
    let sizes = check.queries(attention, &out)?;
    let branches = check.branches(attention, &sizes);

    let strides = check.rows(Argument::Out, &out, OUT_SHAPE, &sizes.out_dims(), sizes.dtype);
    check.writable(Argument::Out, &out);
    let lse = outputs.lse.as_ref().map(|lse| {
        check.writable(Argument::Lse, &lse.desc());
        check.lse(&lse.desc(), attention, &sizes)
    });
    check.finish(attention, sizes, branches, Results::Forward { out: strides, lse })
}

pub(super) fn backward<T: Tensor, O: Tensor, G: Tensor>(
    attention: &Attention<T>,
    backward: &Backward<O>,
    gradients: &Gradients<G>,
) -> Result<Problem, Invalid> {
    let mut check = Checker::default();
    let dout = &backward.dout.desc();
    let sizes = check.queries(attention, dout)?;
    let branches = check.branches(attention, &sizes);
    let dout = check.rows(Argument::Dout, dout, OUT_SHAPE, &sizes.out_dims(), sizes.dtype);
    let saved = backward.saved.as_ref().map(|saved| {
        if attention.accumulate {
            check.report(Argument::Out, Rule::SavedSum);
        }
        Saved {
            out: check.rows(Argument::Out, &saved.out.desc(), OUT_SHAPE, &sizes.out_dims(), sizes.dtype),
            lse: check.lse(&saved.lse.desc(), attention, &sizes),
        }
    });
    let gradients = check.gradients(attention, gradients);
    check.finish(attention, sizes, branches, Results::Backward { dout, saved, gradients })
}

/// The extents that the other arguments are held against.
struct Sizes {
    dtype: DType,
    batch: usize,
    seq_q: usize,
    heads: usize,
    head_dim: usize,
    value_dim: usize,
    q: Strides<4>,
}

impl Sizes {
    fn out_dims(&self) -> [(&'static str, Extent); 4] {
        [
            ("batch", Extent::Exactly(self.batch)),
            ("seq_q", Extent::Exactly(self.seq_q)),
            ("heads", Extent::Exactly(self.heads)),
            ("value_dim", Extent::Exactly(self.value_dim)),
        ]
    }
}

#[derive(Default)]
struct Checker {
    violations: Vec<Violation>,
}

impl Checker {
    fn report(&mut self, argument: Argument, rule: Rule) {
        self.violations.push(Violation { argument, rule });
    }

    /// q and the numbers; the first values fix the width of all of them and of `out`.
    ///
    /// A q of the wrong rank ends the check: no other extent can be judged without it.
    fn queries<T: Tensor>(&mut self, attention: &Attention<T>, out: &TensorDesc) -> Result<Sizes, Invalid> {
        let q = &attention.q.desc();
        self.dtype(Argument::Q, q, FLOATS);
        let strides = self.ranked::<4>(Argument::Q, q, Q_SHAPE);
        let [batch, seq_q, heads, head_dim] = extents(q);
        let values = attention.segments().map(|segment| segment.v.desc()).find(|v| v.shape().len() == 4);
        let [.., value_dim] = extents::<4>(values.as_ref().unwrap_or(out));
        self.last_stride(Argument::Q, q);
        self.addressable(Argument::Q, q, &["batch", "seq_q", "heads", "head_dim"]);
        if head_dim == 0 && q.shape().len() == 4 {
            self.report(Argument::Q, Rule::Zero { dim: "head_dim" });
        }
        if let Some(scale) = attention.softmax_scale.filter(|scale| !scale.is_finite()) {
            self.report(Argument::SoftmaxScale, Rule::NotFinite { got: scale });
        }
        if let Some(softcap) = attention.softcap {
            if !softcap.is_finite() {
                self.report(Argument::Softcap, Rule::NotFinite { got: softcap });
            } else if softcap <= 0.0 {
                self.report(Argument::Softcap, Rule::NotPositive { got: softcap });
            }
        }
        if attention.branches.is_empty() {
            self.report(Argument::Branches, Rule::Empty);
        }
        if q.shape().len() != 4 {
            return Err(Invalid { violations: std::mem::take(&mut self.violations) });
        }
        Ok(Sizes { dtype: q.dtype(), batch, seq_q, heads, head_dim, value_dim, q: strides })
    }

    fn branches<T: Tensor>(&mut self, attention: &Attention<T>, sizes: &Sizes) -> List<BranchProblem> {
        let mut first = 0;
        let mut checked = List::with_capacity(attention.branches.len());
        for branch in &attention.branches {
            checked.push(self.branch(first, branch, sizes));
            first += branch.segments.len();
        }
        checked
    }

    fn branch<T: Tensor>(&mut self, first_segment: usize, branch: &Branch<T>, sizes: &Sizes) -> BranchProblem {
        if branch.segments.is_empty() {
            self.report(Argument::Segments(first_segment), Rule::Empty);
        }
        let segments = (branch.segments.iter().enumerate())
            .map(|(i, segment)| self.segment(first_segment + i, segment, sizes))
            .collect();
        let gate = match &branch.gate {
            Gate::Scalar(gate) => {
                if !gate.is_finite() {
                    self.report(Argument::Gate(first_segment), Rule::NotFinite { got: *gate });
                }
                Gate::Scalar(*gate)
            }
            Gate::Tensor(gate) => Gate::Tensor(self.gate(Argument::Gate(first_segment), &gate.desc(), sizes)),
        };
        let region = branch.region.as_ref().map(|region| region.desc());
        let region = region.map(|region| self.region(Argument::Region(first_segment), &region, sizes));
        BranchProblem { segments, first_segment, gate, region }
    }

    fn segment<T: Tensor>(&mut self, number: usize, segment: &Segment<T>, sizes: &Sizes) -> SegmentProblem {
        let (k_desc, v_desc) = (&segment.k.desc(), &segment.v.desc());
        let ranked = if k_desc.shape().len() == 4 { k_desc } else { v_desc };
        let [_, seq_kv, kv_heads, _] = extents::<4>(ranked);
        let batch = ("batch", Extent::OrOne(sizes.batch));
        let keys = [batch, ("seq_kv", Extent::Exactly(seq_kv)), ("kv_heads", Extent::Exactly(kv_heads))];
        let [b, s, h] = keys;

        let k_dims = [b, s, h, ("head_dim", Extent::Exactly(sizes.head_dim))];
        let k = self.rows(Argument::K(number), k_desc, KV_SHAPE, &k_dims, sizes.dtype);
        let v_dims = [b, s, h, ("value_dim", Extent::Exactly(sizes.value_dim))];
        let v = self.rows(Argument::V(number), v_desc, KV_SHAPE, &v_dims, sizes.dtype);
        let even = if kv_heads == 0 { sizes.heads == 0 } else { sizes.heads.is_multiple_of(kv_heads) };
        if k_desc.shape().len() == 4 && !even {
            self.report(Argument::K(number), Rule::HeadGroups { got: kv_heads, heads: sizes.heads });
        }

        let bias = segment.bias.as_ref().map(|bias| {
            let (argument, bias) = (Argument::Bias(number), &bias.desc());
            self.dtype(argument, bias, BIASES);
            let dims = [
                batch,
                ("heads", Extent::OrOne(sizes.heads)),
                ("seq_q", Extent::OrOne(sizes.seq_q)),
                ("seq_kv", Extent::OrOne(seq_kv)),
            ];
            (bias.dtype(), self.shape(argument, bias, BIAS_SHAPE, &dims))
        });
        let key_len = segment.key_len.as_ref().map(|key_len| {
            let (argument, key_len) = (Argument::KeyLen(number), &key_len.desc());
            self.dtype(argument, key_len, DTypes(&[U32]));
            self.shape(argument, key_len, KEY_LEN_SHAPE, &[("batch", Extent::Exactly(sizes.batch))])
        });
        SegmentProblem {
            seq_kv,
            group: sizes.heads / kv_heads.max(1),
            k,
            v,
            bias,
            key_len,
            causal: segment.causal,
            window: segment.window,
        }
    }

    fn gate(&mut self, argument: Argument, gate: &TensorDesc, sizes: &Sizes) -> Strides<2> {
        self.dtype(argument, gate, DTypes(&[F32]));
        let dims = [("batch", Extent::Exactly(sizes.batch)), ("heads", Extent::Exactly(sizes.heads))];
        match gate.shape().len() {
            0 => {
                self.addressable(argument, gate, &[]);
                [0, 0]
            }
            1 => {
                let [batch] = self.shape(argument, gate, GATE_SHAPE, &[dims[0]]);
                [batch, 0]
            }
            _ => self.shape(argument, gate, GATE_SHAPE, &dims),
        }
    }

    fn region(&mut self, argument: Argument, region: &TensorDesc, sizes: &Sizes) -> Strides<3> {
        self.dtype(argument, region, DTypes(&[F32]));
        let batch = ("batch", Extent::OrOne(sizes.batch));
        let heads = ("heads", Extent::OrOne(sizes.heads));
        let seq_q = ("seq_q", Extent::Exactly(sizes.seq_q));
        if region.shape().len() == 2 {
            let [batch, seq_q] = self.shape(argument, region, REGION_SHAPE, &[batch, seq_q]);
            [batch, 0, seq_q]
        } else {
            self.shape(argument, region, REGION_SHAPE, &[batch, heads, seq_q])
        }
    }

    fn lse<T>(&mut self, lse: &TensorDesc, attention: &Attention<T>, sizes: &Sizes) -> Strides<4> {
        self.dtype(Argument::Lse, lse, DTypes(&[F32]));
        let dims = [
            ("branches", Extent::Exactly(attention.branches.len())),
            ("batch", Extent::Exactly(sizes.batch)),
            ("heads", Extent::Exactly(sizes.heads)),
            ("seq_q", Extent::Exactly(sizes.seq_q)),
        ];
        self.shape(Argument::Lse, lse, LSE_SHAPE, &dims)
    }

    fn gradients<T: Tensor, G: Tensor>(
        &mut self,
        attention: &Attention<T>,
        gradients: &Gradients<G>,
    ) -> SmallVec<[GradientProblem; 8]> {
        let first = |branch: usize| attention.first_segment(branch);
        let mut checked = SmallVec::with_capacity(gradients.wanted.len());
        for (n, (gradient, tensor)) in gradients.wanted.iter().enumerate() {
            let desc = &tensor.desc();
            let argument = gradient.argument(first);
            if gradients.wanted[..n].iter().any(|(before, _)| before == gradient) {
                self.report(argument, Rule::Twice);
            }
            let Some(input) = input_of(attention, *gradient) else {
                self.report(argument, Rule::NoInput);
                continue;
            };
            if input.dtype() == Bool {
                self.report(argument, Rule::BoolGradient);
                continue;
            }
            match (gradient, attention.q.desc().dtype()) {
                (Gradient::Q | Gradient::K(_) | Gradient::V(_), F16) => {
                    self.dtype(argument, desc, DTypes(&[F32, F16]));
                }
                (Gradient::Q | Gradient::K(_) | Gradient::V(_), BF16) => {
                    self.dtype(argument, desc, DTypes(&[F32, BF16]));
                }
                _ => self.dtype(argument, desc, DTypes(&[F32])),
            }
            self.same_shape(argument, desc, &input);
            self.writable(argument, desc);
            checked.push(canonical_gradient(*gradient, desc));
        }
        checked
    }

    fn finish<T>(
        self,
        attention: &Attention<T>,
        sizes: Sizes,
        branches: List<BranchProblem>,
        results: Results,
    ) -> Result<Problem, Invalid> {
        if !self.violations.is_empty() {
            return Err(Invalid { violations: self.violations });
        }
        let default_scale = 1.0 / (sizes.head_dim as f64).sqrt();
        Ok(Problem {
            dtype: sizes.dtype,
            batch: sizes.batch,
            seq_q: sizes.seq_q,
            heads: sizes.heads,
            head_dim: sizes.head_dim,
            value_dim: sizes.value_dim,
            softmax_scale: attention.softmax_scale.unwrap_or(default_scale as f32),
            softcap: attention.softcap,
            accumulate: attention.accumulate,
            q: sizes.q,
            branches,
            results,
        })
    }
}

/// Single rules.
impl Checker {
    /// A tensor of rows: type of q, contiguous last dimension of at least one element.
    fn rows(
        &mut self,
        argument: Argument,
        desc: &TensorDesc,
        shape: &'static str,
        dims: &[(&'static str, Extent); 4],
        dtype: DType,
    ) -> Strides<4> {
        if dtype.is_float() && desc.dtype() != dtype {
            let expected: &'static [DType] = match dtype {
                F16 => &[F16],
                BF16 => &[BF16],
                _ => &[F32],
            };
            self.report(argument, Rule::DType { got: desc.dtype(), expected: DTypes(expected) });
        }
        self.last_stride(argument, desc);
        let strides = self.shape(argument, desc, shape, dims);
        if desc.shape().len() == 4 && desc.shape()[3] == 0 {
            self.report(argument, Rule::Zero { dim: dims[3].0 });
        }
        strides
    }

    fn dtype(&mut self, argument: Argument, desc: &TensorDesc, expected: DTypes) {
        if !expected.0.contains(&desc.dtype()) {
            self.report(argument, Rule::DType { got: desc.dtype(), expected });
        }
    }

    /// Rank, extents and addresses; returns the strides, zero where the extent is 1.
    fn shape<const N: usize>(
        &mut self,
        argument: Argument,
        desc: &TensorDesc,
        shape: &'static str,
        dims: &[(&'static str, Extent); N],
    ) -> Strides<N> {
        let strides = self.ranked(argument, desc, shape);
        self.addressable(argument, desc, &dims.map(|(name, _)| name));
        if desc.shape().len() == N {
            for (&got, &(dim, expected)) in desc.shape().iter().zip(dims) {
                let legal = match expected {
                    Extent::Exactly(n) => got == n,
                    Extent::OrOne(n) => got == n || got == 1,
                };
                if !legal {
                    self.report(argument, Rule::Extent { dim, got, expected });
                }
            }
        }
        strides
    }

    fn ranked<const N: usize>(&mut self, argument: Argument, desc: &TensorDesc, shape: &'static str) -> Strides<N> {
        let got = desc.shape().len();
        if got != N {
            self.report(argument, Rule::Rank { got, expected: shape });
        }
        let mut strides = [0; N];
        for (dim, stride) in strides.iter_mut().enumerate().take(got) {
            *stride = if desc.shape()[dim] == 1 { 0 } else { desc.strides()[dim] };
        }
        strides
    }

    fn last_stride(&mut self, argument: Argument, desc: &TensorDesc) {
        if let (Some(&extent), Some(&got)) = (desc.shape().last(), desc.strides().last())
            && extent > 1
            && got != 1
        {
            self.report(argument, Rule::LastStride { got });
        }
    }

    /// Every extent can be counted and every element has an address.
    fn addressable(&mut self, argument: Argument, desc: &TensorDesc, dims: &[&'static str]) {
        let mut countable = true;
        for (&got, &dim) in desc.shape().iter().zip(dims) {
            if got > MAX_EXTENT {
                countable = false;
                self.report(argument, Rule::TooLarge { dim, got, limit: MAX_EXTENT });
            }
        }
        if countable && !desc.is_empty() && desc.span().is_none() {
            self.report(argument, Rule::Span { shape: desc.shape().into(), strides: desc.strides().into() });
        }
    }

    fn writable(&mut self, argument: Argument, desc: &TensorDesc) {
        if !desc.is_empty() && !desc.is_injective() {
            self.report(argument, Rule::Overlap { shape: desc.shape().into(), strides: desc.strides().into() });
        }
    }

    fn same_shape(&mut self, argument: Argument, desc: &TensorDesc, input: &TensorDesc) {
        const DIMS: [&str; 4] = ["extent 0", "extent 1", "extent 2", "extent 3"];
        self.addressable(argument, desc, &DIMS);
        if desc.shape().len() != input.shape().len() {
            self.report(argument, Rule::Rank { got: desc.shape().len(), expected: "of its input" });
            return;
        }
        for ((&got, &want), dim) in desc.shape().iter().zip(input.shape()).zip(DIMS) {
            if got != want {
                self.report(argument, Rule::Extent { dim, got, expected: Extent::Exactly(want) });
            }
        }
    }
}

/// The extents of a tensor, 0 in place of dimensions it lacks: those are reported by rank.
fn extents<const N: usize>(desc: &TensorDesc) -> [usize; N] {
    let mut extents = [0; N];
    for (to, &from) in extents.iter_mut().zip(desc.shape()) {
        *to = from;
    }
    extents
}

/// The input that a gradient belongs to; a scalar gate counts as an f32 tensor of shape `[]`.
fn input_of<T: Tensor>(attention: &Attention<T>, gradient: Gradient) -> Option<TensorDesc> {
    match gradient {
        Gradient::Q => Some(attention.q.desc()),
        Gradient::K(i) => attention.segments().nth(i).map(|segment| segment.k.desc()),
        Gradient::V(i) => attention.segments().nth(i).map(|segment| segment.v.desc()),
        Gradient::Bias(i) => attention.segments().nth(i)?.bias.as_ref().map(T::desc),
        Gradient::Gate(b) => attention.branches.get(b).map(|branch| match &branch.gate {
            Gate::Scalar(_) => TensorDesc::contiguous(F32, []),
            Gate::Tensor(gate) => gate.desc(),
        }),
        Gradient::Region(b) => attention.branches.get(b)?.region.as_ref().map(T::desc),
    }
}

/// Inserts the dimensions that the input's index order has and its shape lacks.
fn canonical_gradient(gradient: Gradient, desc: &TensorDesc) -> GradientProblem {
    let rank = desc.shape().len();
    // Gates are indexed [batch, heads], regions [batch, heads, seq_q]: a region of two dimensions lacks the middle one.
    let dims: &[usize] = match (gradient, rank) {
        (Gradient::Region(_), 2) => &[0, 2],
        _ => &[0, 1, 2, 3],
    };
    let mut checked = GradientProblem { gradient, dtype: desc.dtype(), extents: [1; 4], strides: [0; 4] };
    for (&dim, (&extent, &stride)) in dims.iter().zip(desc.shape().iter().zip(desc.strides())) {
        checked.extents[dim] = extent;
        checked.strides[dim] = if extent == 1 { 0 } else { stride };
    }
    checked
}
