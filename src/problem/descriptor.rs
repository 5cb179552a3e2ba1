//! What is asked: queries over a list of branches, as plain data.
//!
//! Everything is generic over what stands for a tensor: [`TensorDesc`] to ask and plan without data, [`TensorRef`] to
//! run on host memory.
//!
//! [`TensorRef`]: crate::TensorRef

use super::argument::Argument;
use super::tensor::{Tensor, TensorDesc};
use std::convert::Infallible;

/// Attention of one set of queries over a list of branches; see the [crate documentation](crate) for the formula.
#[derive(Clone, Debug)]
pub struct Attention<T> {
    /// Queries, `[batch, seq_q, heads, head_dim]`, f16, bf16 or f32; last dimension contiguous.
    pub q: T,
    /// The branches, each its own softmax. At least one.
    pub branches: Vec<Branch<T>>,
    /// Factor of every product of a query and a key; `None` means `1 / sqrt(head_dim)`.
    pub softmax_scale: Option<f32>,
    /// Caps scaled products to `softcap · tanh(s / softcap)` before the bias; `None` means no cap.
    pub softcap: Option<f32>,
    /// Whether the result is added to what `out` holds instead of replacing it.
    pub accumulate: bool,
}

/// An [`Attention`] without data: what validation and planning need.
pub type AttentionDesc = Attention<TensorDesc>;

/// One softmax over one or more segments, scaled by a gate and, query by query, by a region.
#[derive(Clone, Debug)]
pub struct Branch<T> {
    /// The segments that share this branch's softmax. At least one.
    pub segments: Vec<Segment<T>>,
    /// Factor of this branch's result.
    pub gate: Gate<T>,
    /// Factor of this branch's result per query: `[1 or batch, seq_q]` or `[1 or batch, 1 or heads, seq_q]`, f32.
    pub region: Option<T>,
}

/// Keys and values with the rules that say which query may attend to which key.
#[derive(Clone, Debug)]
pub struct Segment<T> {
    /// Keys, `[1 or batch, seq_kv, kv_heads, head_dim]`, type of q; `kv_heads` divides q's heads.
    pub k: T,
    /// Values, `[1 or batch, seq_kv, kv_heads, value_dim]`, type of q; `value_dim` is that of `out`.
    pub v: T,
    /// Added to the logits, or, if bool, `true` where the query may attend:
    /// `[1 or batch, 1 or heads, 1 or seq_q, 1 or seq_kv]`, any strides; f32, f16, bf16 or bool.
    pub bias: Option<T>,
    /// `[batch]` u32: only this many leading keys exist; the rest are never read. At most `seq_kv`.
    pub key_len: Option<T>,
    /// Causal rule.
    pub causal: Causal,
    /// Distance rule.
    pub window: Window,
}

/// Factor of a branch's result. Negative and larger than one is legal; exactly 0 gives, to the bit, the result without
/// the branch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gate<T> {
    /// One number known on the host.
    Scalar(f32),
    /// f32 of shape `[]`, `[batch]` or `[batch, heads]`.
    Tensor(T),
}

/// Which keys a query may attend to by its position. The corner is that of the segment's shape, whatever its key
/// lengths say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Causal {
    /// All of them.
    #[default]
    None,
    /// Query `i` attends to keys `j <= i`.
    TopLeft,
    /// Query `i` attends to keys `j <= i + seq_kv - seq_q`: the last query sees the last key.
    BottomRight,
}

/// Query `i` attends to keys from `c - left` to `c + right`, both included, where `c = i + seq_kv - seq_q`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Window {
    /// Keys to the left of the centre; `None` is open.
    pub left: Option<u32>,
    /// Keys to the right of the centre; `None` is open.
    pub right: Option<u32>,
}

/// Where a forward call writes.
#[derive(Clone, Debug)]
pub struct Outputs<T> {
    /// `[batch, seq_q, heads, value_dim]`, type of q.
    pub out: T,
    /// `[branches, batch, heads, seq_q]`, f32: natural logarithm of each softmax's denominator, -inf for a row with no
    /// key. It does not depend on the gate or the region; asking for it makes a branch with gate 0 cost its products.
    pub lse: Option<T>,
}

/// What a backward call reads beside the request.
#[derive(Clone, Debug)]
pub struct Backward<T> {
    /// Gradient of `out`: `[batch, seq_q, heads, value_dim]`, type of q; last dimension contiguous.
    pub dout: T,
    /// What the forward of the same request wrote. Kernels that can go without a pass by it do; none needs it. What is
    /// computed from it has the rounding of `out`; without it nothing is lost.
    pub saved: Option<Saved<T>>,
}

/// Both results of a forward call, which must not have accumulated: `out` is then the operator's own.
#[derive(Clone, Debug)]
pub struct Saved<T> {
    /// `[batch, seq_q, heads, value_dim]`, type of q; last dimension contiguous.
    pub out: T,
    /// `[branches, batch, heads, seq_q]`, f32.
    pub lse: T,
}

/// The gradients a backward call writes: those asked for and no others. A gradient has the shape of its input.
#[derive(Clone, Debug)]
pub struct Gradients<T> {
    /// Each gradient wanted, once, with the tensor that receives it.
    pub wanted: Vec<(Gradient, T)>,
}

/// Names a gradient. Segments are counted across all branches in order, branches likewise, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Gradient {
    /// Of q, in f32 or the type of q.
    Q,
    /// Of the keys of a segment, in f32 or the type of q.
    K(usize),
    /// Of the values of a segment, in f32 or the type of q.
    V(usize),
    /// Of the bias of a segment, f32, summed over the dimensions that the bias broadcasts by an extent of 1.
    Bias(usize),
    /// Of the gate of a branch, f32, of the gate's shape (`[]` for a scalar).
    Gate(usize),
    /// Of the region of a branch, f32, of the region's shape.
    Region(usize),
}

impl Gradient {
    /// Whether it is one of rows of elements, as its input is.
    pub(crate) fn is_of_rows(self) -> bool {
        matches!(self, Gradient::Q | Gradient::K(_) | Gradient::V(_))
    }

    /// The argument that receives this gradient, `first` being the number of a branch's first segment.
    pub(crate) fn argument(self, first: impl Fn(usize) -> usize) -> Argument {
        match self {
            Gradient::Q => Argument::Dq,
            Gradient::K(i) => Argument::Dk(i),
            Gradient::V(i) => Argument::Dv(i),
            Gradient::Bias(i) => Argument::Dbias(i),
            Gradient::Gate(b) => Argument::Dgate(first(b)),
            Gradient::Region(b) => Argument::Dregion(first(b)),
        }
    }
}

impl<T> Attention<T> {
    /// Attention of `q` over no branch yet, with the default softmax scale.
    pub fn new(q: T) -> Self {
        Attention { q, branches: Vec::new(), softmax_scale: None, softcap: None, accumulate: false }
    }

    /// Adds a branch.
    pub fn branch(mut self, branch: Branch<T>) -> Self {
        self.branches.push(branch);
        self
    }

    /// Sets the factor of the products of queries and keys.
    pub fn softmax_scale(mut self, scale: f32) -> Self {
        self.softmax_scale = Some(scale);
        self
    }

    /// Caps scaled products to `±softcap`.
    pub fn softcap(mut self, softcap: f32) -> Self {
        self.softcap = Some(softcap);
        self
    }

    /// Adds the result to what `out` holds, with one rounding after the sum.
    pub fn accumulate(mut self) -> Self {
        self.accumulate = true;
        self
    }

    /// All segments, across branches, in order.
    pub fn segments(&self) -> impl Iterator<Item = &Segment<T>> {
        self.branches.iter().flat_map(|branch| &branch.segments)
    }

    /// Index of a branch's first segment; for a branch past the last, what it would be.
    pub(crate) fn first_segment(&self, branch: usize) -> usize {
        let past = branch.saturating_sub(self.branches.len());
        self.branches.iter().take(branch).map(|b| b.segments.len()).sum::<usize>().saturating_add(past)
    }

    /// Every tensor of the request with its name.
    pub fn tensors(&self) -> impl Iterator<Item = (Argument, &T)> {
        let mut end = 0;
        let branches = self.branches.iter().flat_map(move |branch| {
            let first = end;
            end += branch.segments.len();
            let gate = match &branch.gate {
                Gate::Tensor(gate) => Some((Argument::Gate(first), gate)),
                Gate::Scalar(_) => None,
            };
            let region = branch.region.iter().map(move |region| (Argument::Region(first), region));
            let segments = branch.segments.iter().enumerate();
            gate.into_iter().chain(region).chain(segments.flat_map(move |(i, segment)| segment.tensors(first + i)))
        });
        std::iter::once((Argument::Q, &self.q)).chain(branches)
    }
}

impl<T> Attention<T> {
    /// The same request with something else standing for each tensor: owned arrays become views, views descriptions.
    pub fn map<'a, U>(&'a self, mut f: impl FnMut(&'a T) -> U) -> Attention<U> {
        let Ok(mapped) = self.try_map(|tensor| Ok::<U, Infallible>(f(tensor)));
        mapped
    }

    /// As [`map`](Self::map), up to the first error.
    ///
    /// # Errors
    /// The one of `f`.
    pub fn try_map<'a, U, E>(&'a self, mut f: impl FnMut(&'a T) -> Result<U, E>) -> Result<Attention<U>, E> {
        let f = &mut f;
        let mut branches = Vec::with_capacity(self.branches.len());
        let q = f(&self.q)?;
        for branch in &self.branches {
            let gate = match &branch.gate {
                Gate::Scalar(value) => Gate::Scalar(*value),
                Gate::Tensor(tensor) => Gate::Tensor(f(tensor)?),
            };
            let region = branch.region.as_ref().map(&mut *f).transpose()?;
            let mut segments = Vec::with_capacity(branch.segments.len());
            for segment in &branch.segments {
                segments.push(Segment {
                    k: f(&segment.k)?,
                    v: f(&segment.v)?,
                    bias: segment.bias.as_ref().map(&mut *f).transpose()?,
                    key_len: segment.key_len.as_ref().map(&mut *f).transpose()?,
                    causal: segment.causal,
                    window: segment.window,
                });
            }
            branches.push(Branch { segments, gate, region });
        }
        let Attention { softmax_scale, softcap, accumulate, .. } = *self;
        Ok(Attention { q, branches, softmax_scale, softcap, accumulate })
    }
}

impl<T: Tensor> Attention<T> {
    /// The same request without data.
    pub fn desc(&self) -> AttentionDesc {
        self.map(T::desc)
    }
}

impl<T> Branch<T> {
    /// One segment of keys and values, gate 1, no region.
    pub fn new(k: T, v: T) -> Self {
        Branch { segments: vec![Segment::new(k, v)], gate: Gate::Scalar(1.0), region: None }
    }

    /// Adds a segment that shares this branch's softmax, as if its keys were appended.
    pub fn join(mut self, segment: Segment<T>) -> Self {
        self.segments.push(segment);
        self
    }

    /// Scales the branch by a number.
    pub fn gate(mut self, gate: f32) -> Self {
        self.gate = Gate::Scalar(gate);
        self
    }

    /// Scales the branch by an f32 tensor of shape `[]`, `[batch]` or `[batch, heads]`.
    pub fn gate_tensor(mut self, gate: T) -> Self {
        self.gate = Gate::Tensor(gate);
        self
    }

    /// Scales the branch query by query.
    pub fn region(mut self, region: T) -> Self {
        self.region = Some(region);
        self
    }
}

impl<T> From<Segment<T>> for Branch<T> {
    fn from(segment: Segment<T>) -> Self {
        Branch { segments: vec![segment], gate: Gate::Scalar(1.0), region: None }
    }
}

impl<T> Segment<T> {
    /// Its tensors with their names.
    fn tensors(&self, number: usize) -> impl Iterator<Item = (Argument, &T)> {
        let rows = [(Argument::K(number), &self.k), (Argument::V(number), &self.v)].into_iter();
        let bias = self.bias.iter().map(move |bias| (Argument::Bias(number), bias));
        rows.chain(bias).chain(self.key_len.iter().map(move |len| (Argument::KeyLen(number), len)))
    }

    /// Keys and values that every query may attend to.
    pub fn new(k: T, v: T) -> Self {
        Segment { k, v, bias: None, key_len: None, causal: Causal::None, window: Window::default() }
    }

    /// Adds a bias to the logits, or a bool mask.
    pub fn bias(mut self, bias: T) -> Self {
        self.bias = Some(bias);
        self
    }

    /// Limits the segment to a prefix, per batch entry.
    pub fn key_len(mut self, key_len: T) -> Self {
        self.key_len = Some(key_len);
        self
    }

    /// Sets the causal rule.
    pub fn causal(mut self, causal: Causal) -> Self {
        self.causal = causal;
        self
    }

    /// Limits each query to a window of keys.
    pub fn window(mut self, left: Option<u32>, right: Option<u32>) -> Self {
        self.window = Window { left, right };
        self
    }
}

impl<T> Outputs<T> {
    /// Only `out`.
    pub fn new(out: T) -> Self {
        Outputs { out, lse: None }
    }

    /// Also the logarithm of each branch's denominator.
    pub fn lse(mut self, lse: T) -> Self {
        self.lse = Some(lse);
        self
    }
}

impl<T: Tensor> From<T> for Outputs<T> {
    fn from(out: T) -> Self {
        Outputs::new(out)
    }
}

impl<T> Backward<T> {
    /// Only the gradient of `out`: whatever of the forward is needed is computed anew.
    pub fn new(dout: T) -> Self {
        Backward { dout, saved: None }
    }

    /// Also what the forward wrote.
    pub fn saved(mut self, out: T, lse: T) -> Self {
        self.saved = Some(Saved { out, lse });
        self
    }

    /// The same with something else standing for each tensor.
    pub fn map<'a, U>(&'a self, mut f: impl FnMut(&'a T) -> U) -> Backward<U> {
        let dout = f(&self.dout);
        Backward { dout, saved: self.saved.as_ref().map(|saved| Saved { out: f(&saved.out), lse: f(&saved.lse) }) }
    }

    /// Every tensor of it with its name.
    pub fn tensors(&self) -> impl Iterator<Item = (Argument, &T)> {
        let saved = self.saved.iter().flat_map(|saved| [(Argument::Out, &saved.out), (Argument::Lse, &saved.lse)]);
        std::iter::once((Argument::Dout, &self.dout)).chain(saved)
    }
}

impl<T: Tensor> From<T> for Backward<T> {
    fn from(dout: T) -> Self {
        Backward::new(dout)
    }
}

impl<T> Default for Gradients<T> {
    fn default() -> Self {
        Gradients { wanted: Vec::new() }
    }
}

impl<T> Gradients<T> {
    /// None wanted yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks for one gradient.
    pub fn want(mut self, gradient: Gradient, tensor: T) -> Self {
        self.wanted.push((gradient, tensor));
        self
    }
}
