//! What is asked, and whether it is legal.
//!
//! [`Attention`] is plain data that may be nonsense. A [`Problem`] can only be had by passing every rule, so that
//! planning and the engines need not ask again.

mod argument;
mod descriptor;
mod dtype;
mod element;
mod error;
mod tensor;
mod validate;

pub use argument::Argument;
pub use descriptor::{
    Attention, AttentionDesc, Backward, Branch, Causal, Gate, Gradient, Gradients, Outputs, Saved, Segment, Window,
};
pub use dtype::{DType, Direction};
pub(crate) use element::with_float;
pub use element::{Element, Float};
pub(crate) use error::list;
pub use error::{DTypes, Extent, Invalid, Rule, Violation};
pub use tensor::{MAX_RANK, Tensor, TensorDesc, TensorMut, TensorRef};
pub use validate::MAX_EXTENT;

use smallvec::SmallVec;

/// How many elements extents make, the largest number where they are more: strides of 0 allow any.
pub(crate) fn elements(extents: &[usize]) -> usize {
    extents.iter().fold(1, |product, &extent| product.saturating_mul(extent))
}

/// A computable problem: holding one means that every rule of [`Problem::forward`] or [`Problem::backward`] is true.
///
/// Strides are those of the descriptors, brought to one order of indices and zero along every dimension of extent 1,
/// so that broadcasting needs no further case.
#[derive(Clone, Debug)]
pub struct Problem {
    pub(crate) dtype: DType,
    pub(crate) batch: usize,
    pub(crate) seq_q: usize,
    pub(crate) heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) value_dim: usize,
    pub(crate) softmax_scale: f32,
    pub(crate) softcap: Option<f32>,
    pub(crate) accumulate: bool,
    /// `[batch, seq_q, heads, head_dim]`
    pub(crate) q: Strides<4>,
    pub(crate) branches: List<BranchProblem>,
    pub(crate) results: Results,
}

/// Up to four branches stand in the problem itself: a call with text and three adapters allocates nothing.
pub(crate) type List<T> = SmallVec<[T; 4]>;

/// Strides in elements, zero along broadcast dimensions.
pub(crate) type Strides<const N: usize> = [isize; N];

#[derive(Clone, Debug)]
pub(crate) struct BranchProblem {
    pub(crate) segments: SmallVec<[SegmentProblem; 1]>,
    /// Index of the first segment, counted across branches.
    pub(crate) first_segment: usize,
    /// Scalar, or strides `[batch, heads]`.
    pub(crate) gate: Gate<Strides<2>>,
    /// `[batch, heads, seq_q]`
    pub(crate) region: Option<Strides<3>>,
}

#[derive(Clone, Debug)]
pub(crate) struct SegmentProblem {
    pub(crate) seq_kv: usize,
    /// Query heads per head of keys.
    pub(crate) group: usize,
    /// `[batch, seq_kv, kv_heads, head_dim]`
    pub(crate) k: Strides<4>,
    /// `[batch, seq_kv, kv_heads, value_dim]`
    pub(crate) v: Strides<4>,
    /// Type and `[batch, heads, seq_q, seq_kv]`
    pub(crate) bias: Option<(DType, Strides<4>)>,
    /// `[batch]`
    pub(crate) key_len: Option<Strides<1>>,
    pub(crate) causal: Causal,
    pub(crate) window: Window,
}

impl SegmentProblem {
    /// Whether positions decide which keys a query may attend to.
    pub(crate) fn has_position_rule(&self) -> bool {
        self.causal != Causal::None || self.window != Window::default()
    }
}

#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "a launch allocates nothing")]
pub(crate) enum Results {
    Forward {
        /// `[batch, seq_q, heads, value_dim]`
        out: Strides<4>,
        /// `[branches, batch, heads, seq_q]`
        lse: Option<Strides<4>>,
    },
    Backward {
        /// `[batch, seq_q, heads, value_dim]`
        dout: Strides<4>,
        saved: Option<Saved<Strides<4>>>,
        gradients: SmallVec<[GradientProblem; 8]>,
    },
}

/// A gradient in the index order of its input, missing dimensions inserted with extent 1.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GradientProblem {
    pub(crate) gradient: Gradient,
    #[cfg_attr(
        not(any(feature = "cuda", feature = "emulated")),
        allow(dead_code, reason = "only launches look into it")
    )]
    pub(crate) dtype: DType,
    pub(crate) extents: [usize; 4],
    pub(crate) strides: Strides<4>,
}

impl Problem {
    /// Checks a forward request.
    ///
    /// # Errors
    /// [`Invalid`] with every rule that is broken.
    pub fn forward<T: Tensor, O: Tensor>(attention: &Attention<T>, outputs: &Outputs<O>) -> Result<Problem, Invalid> {
        validate::forward(attention, outputs)
    }

    /// Checks a backward request: the attention, what is given beside it and the gradients wanted.
    ///
    /// # Errors
    /// [`Invalid`] with every rule that is broken.
    pub fn backward<T: Tensor, O: Tensor, G: Tensor>(
        attention: &Attention<T>,
        backward: &Backward<O>,
        gradients: &Gradients<G>,
    ) -> Result<Problem, Invalid> {
        validate::backward(attention, backward, gradients)
    }

    /// Forward or backward.
    pub fn direction(&self) -> Direction {
        match self.results {
            Results::Forward { .. } => Direction::Forward,
            Results::Backward { .. } => Direction::Backward,
        }
    }

    /// Type of q, k, v and out.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Batch entries.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Queries per batch entry.
    pub fn seq_q(&self) -> usize {
        self.seq_q
    }

    /// Query heads.
    pub fn heads(&self) -> usize {
        self.heads
    }

    /// Elements of a query or key.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Elements of a value.
    pub fn value_dim(&self) -> usize {
        self.value_dim
    }

    /// Keys of every segment, in order across branches.
    pub fn seq_kv(&self) -> impl Iterator<Item = usize> {
        self.segments().map(|segment| segment.seq_kv)
    }

    /// Every segment, across branches.
    pub(crate) fn segments(&self) -> impl Iterator<Item = &SegmentProblem> + use<'_> {
        self.branches.iter().flat_map(|branch| &branch.segments)
    }

    /// Tensors of rows with a row that does not start at a multiple of `step` elements from the first.
    pub(crate) fn misaligned_rows(&self, step: usize) -> impl Iterator<Item = Argument> {
        let keys = self
            .segments()
            .enumerate()
            .flat_map(|(i, segment)| [(Argument::K(i), segment.k), (Argument::V(i), segment.v)]);
        let mut results: SmallVec<[(Argument, Strides<4>); 8]> = SmallVec::new();
        match &self.results {
            Results::Forward { out, .. } => results.push((Argument::Out, *out)),
            Results::Backward { dout, saved, gradients } => {
                results.push((Argument::Dout, *dout));
                results.extend(saved.as_ref().map(|saved| (Argument::Out, saved.out)));
                let of_rows = gradients.iter().filter(|wanted| wanted.gradient.is_of_rows());
                results.extend(of_rows.map(|wanted| (wanted.gradient.argument(|_| 0), wanted.strides)));
            }
        }
        // Gradients alone may have rows whose elements are apart.
        let aligned = move |strides: &Strides<4>| {
            strides[3] <= 1 && strides[..3].iter().all(|stride| stride.unsigned_abs().is_multiple_of(step))
        };
        let rows = [(Argument::Q, self.q)].into_iter().chain(keys).chain(results);
        rows.filter(move |(_, strides)| !aligned(strides)).map(|(argument, _)| argument)
    }

    /// Queries, keys and values, and out if asked for, that no tensor map describes: a map has no negative strides, none of
    /// 2^40 bytes or more, and here no broadcast along the sequence, whose positions stay below 2^29.
    pub(crate) fn unmapped_rows(&self, with_out: bool) -> impl Iterator<Item = Argument> {
        const MOST_POSITIONS: usize = 1 << 29;
        let keys = self.segments().enumerate().flat_map(|(i, segment)| {
            let heads = self.heads / segment.group.max(1);
            [(Argument::K(i), segment.seq_kv, heads, segment.k), (Argument::V(i), segment.seq_kv, heads, segment.v)]
        });
        let size = self.dtype.size();
        let mapped = move |seq: usize, heads: usize, [batch_stride, seq_stride, head_stride, _]: Strides<4>| {
            let dimensions = [(self.batch, batch_stride), (seq, seq_stride), (heads, head_stride)];
            let strides = dimensions.into_iter().filter(|&(extent, _)| extent > 1).map(|(_, stride)| stride);
            let fits = |stride: isize| stride >= 0 && (stride as u64).saturating_mul(size as u64) < 1 << 40;
            seq < MOST_POSITIONS && (seq <= 1 || seq_stride != 0) && strides.into_iter().all(fits)
        };
        let out = match &self.results {
            Results::Forward { out, .. } if with_out => Some((Argument::Out, self.seq_q, self.heads, *out)),
            _ => None,
        };
        let rows = [(Argument::Q, self.seq_q, self.heads, self.q)].into_iter().chain(keys).chain(out);
        rows.filter(move |&(_, seq, heads, strides)| !mapped(seq, heads, strides)).map(|(argument, ..)| argument)
    }

    /// Elements of everything that is written.
    pub(crate) fn result_elements(&self) -> usize {
        let rows = elements(&[self.batch, self.heads, self.seq_q]);
        match &self.results {
            Results::Forward { lse, .. } => {
                rows * (self.value_dim + if lse.is_some() { self.branches.len() } else { 0 })
            }
            Results::Backward { gradients, .. } => gradients.iter().map(|gradient| elements(&gradient.extents)).sum(),
        }
    }

    /// Multiplications and additions of the dense forward products, masks not taken into account.
    pub fn forward_flops(&self) -> f64 {
        let keys: f64 = self.seq_kv().map(|n| n as f64).sum();
        let queries = self.batch as f64 * self.heads as f64 * self.seq_q as f64;
        2.0 * queries * keys * (self.head_dim + self.value_dim) as f64
    }
}
