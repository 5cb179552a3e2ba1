//! Host tensors bound to a problem: every index the problem allows is in bounds of its slice.

use crate::problem::{
    Argument, Attention, DType, Gate, Invalid, Problem, Rule, Strides, Tensor, TensorMut, TensorRef, Violation,
};
use half::{bf16, f16};

/// The inputs of a problem, in the structure of the problem.
pub(crate) struct Inputs<'a> {
    /// `[batch, seq_q, heads, head_dim]`
    pub(crate) q: View<'a, 4>,
    pub(crate) branches: Vec<BranchInputs<'a>>,
}

pub(crate) struct BranchInputs<'a> {
    gate: Gate<View<'a, 2>>,
    region: Option<View<'a, 3>>,
    pub(crate) segments: Vec<SegmentInputs<'a>>,
}

pub(crate) struct SegmentInputs<'a> {
    /// `[batch, seq_kv, kv_heads, head_dim]`
    pub(crate) k: View<'a, 4>,
    /// `[batch, seq_kv, kv_heads, value_dim]`
    pub(crate) v: View<'a, 4>,
    /// `[batch, heads, seq_q, seq_kv]`
    pub(crate) bias: Option<View<'a, 4>>,
    key_len: Option<View<'a, 1>>,
    seq_kv: usize,
}

/// A tensor to read, indexed in the problem's order.
#[derive(Clone, Copy)]
pub(crate) struct View<'a, const N: usize> {
    bytes: &'a [u8],
    dtype: DType,
    offset: usize,
    strides: Strides<N>,
}

impl<'a, const N: usize> View<'a, N> {
    pub(crate) fn new(tensor: &TensorRef<'a>, strides: Strides<N>) -> Self {
        View { bytes: tensor.bytes, dtype: tensor.desc().dtype(), offset: tensor.offset, strides }
    }

    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    /// The step of one index.
    pub(crate) fn stride(&self, dimension: usize) -> isize {
        self.strides[dimension]
    }

    /// Position in the slice of the element at `index`.
    pub(crate) fn position(&self, index: [usize; N]) -> usize {
        position(self.offset, &self.strides, index)
    }

    /// The whole slice; `T` must be of the view's type.
    pub(crate) fn data<T: bytemuck::AnyBitPattern>(&self) -> &'a [T] {
        bytemuck::cast_slice(self.bytes)
    }

    /// The element at `index`, exactly; `false` is 0 and `true` is 1.
    pub(crate) fn get(&self, index: [usize; N]) -> f64 {
        let mut element = [0.0];
        self.widen(self.position(index), 0, &mut element);
        element[0]
    }

    /// The elements from position `start` on, `step` apart, exactly.
    fn widen(&self, start: usize, step: isize, to: &mut [f64]) {
        match self.dtype {
            DType::F16 => self.convert(start, step, to, f16::to_f64),
            DType::BF16 => self.convert(start, step, to, bf16::to_f64),
            DType::F32 => self.convert::<f32>(start, step, to, f64::from),
            DType::Bool => self.convert::<u8>(start, step, to, f64::from),
            DType::U32 => self.convert::<u32>(start, step, to, f64::from),
        }
    }

    fn convert<T: bytemuck::AnyBitPattern>(&self, start: usize, step: isize, to: &mut [f64], f: impl Fn(T) -> f64) {
        let data = self.data::<T>();
        for (d, to) in to.iter_mut().enumerate() {
            *to = f(data[start.wrapping_add_signed((d as isize).wrapping_mul(step))]);
        }
    }
}

impl View<'_, 4> {
    /// The `width` elements from `[x, y, z, 0]` on, exactly.
    pub(crate) fn row(&self, [x, y, z]: [usize; 3], width: usize) -> Vec<f64> {
        let mut row = vec![0.0; width];
        self.widen(self.position([x, y, z, 0]), self.stride(3), &mut row);
        row
    }
}

/// `offset + index · strides`. Wrapping: the sum is in range although a partial sum may not be.
pub(crate) fn position<const N: usize>(offset: usize, strides: &Strides<N>, index: [usize; N]) -> usize {
    (index.iter().zip(strides))
        .fold(offset, |at, (&i, &stride)| at.wrapping_add_signed((i as isize).wrapping_mul(stride)))
}

impl BranchInputs<'_> {
    /// Gate of one head.
    pub(crate) fn gate(&self, b: usize, h: usize) -> f32 {
        match &self.gate {
            Gate::Scalar(gate) => *gate,
            Gate::Tensor(gate) => gate.get([b, h]) as f32,
        }
    }

    /// Region of one query, 1 where there is none.
    pub(crate) fn region(&self, b: usize, h: usize, i: usize) -> f32 {
        self.region.map_or(1.0, |region| region.get([b, h, i]) as f32)
    }
}

impl SegmentInputs<'_> {
    /// Keys that exist for a batch entry.
    pub(crate) fn key_len(&self, b: usize) -> usize {
        self.key_len.map_or(self.seq_kv, |len| len.get([b]) as usize)
    }
}

/// Tensors whose slices do not hold every element that their description reaches.
pub(crate) fn short_slices(attention: &Attention<TensorRef<'_>>) -> Vec<Violation> {
    short_inputs(attention.tensors()).collect()
}

pub(crate) fn short_inputs<'a>(
    tensors: impl Iterator<Item = (Argument, &'a TensorRef<'a>)>,
) -> impl Iterator<Item = Violation> {
    tensors.filter_map(|(argument, tensor)| short_slice(argument, tensor.needed_len(), tensor.len()))
}

/// The same for one output.
pub(crate) fn short_output(argument: Argument, tensor: &TensorMut<'_>) -> Option<Violation> {
    short_slice(argument, tensor.needed_len(), tensor.len())
}

pub(crate) fn short_slice(argument: Argument, needed: Option<usize>, len: usize) -> Option<Violation> {
    let long_enough = needed.is_some_and(|needed| needed <= len);
    (!long_enough).then_some(Violation { argument, rule: Rule::SliceTooShort { needed, len } })
}

/// Binds inputs whose slices are known to be long enough.
///
/// # Errors
/// A key length past its segment.
pub(crate) fn bind<'a>(attention: &Attention<TensorRef<'a>>, problem: &Problem) -> Result<Inputs<'a>, Invalid> {
    let mut violations = Vec::new();
    let mut branches = Vec::with_capacity(problem.branches.len());
    for (branch, layout) in attention.branches.iter().zip(&problem.branches) {
        let mut segments = Vec::with_capacity(layout.segments.len());
        for (i, (segment, layout_s)) in branch.segments.iter().zip(&layout.segments).enumerate() {
            let bound = SegmentInputs {
                k: View::new(&segment.k, layout_s.k),
                v: View::new(&segment.v, layout_s.v),
                bias: segment.bias.as_ref().zip(layout_s.bias).map(|(t, (_, s))| View::new(t, s)),
                key_len: segment.key_len.as_ref().zip(layout_s.key_len).map(|(t, s)| View::new(t, s)),
                seq_kv: layout_s.seq_kv,
            };
            let batch = if bound.key_len.is_some() { problem.batch } else { 0 };
            for b in (0..batch).filter(|&b| bound.key_len(b) > layout_s.seq_kv) {
                let rule = Rule::KeyLen { batch: b, got: bound.key_len(b) as u32, limit: layout_s.seq_kv };
                violations.push(Violation { argument: Argument::KeyLen(layout.first_segment + i), rule });
            }
            segments.push(bound);
        }
        let gate = match (&branch.gate, layout.gate) {
            (Gate::Tensor(gate), Gate::Tensor(strides)) => Gate::Tensor(View::new(gate, strides)),
            (_, Gate::Scalar(gate)) => Gate::Scalar(gate),
            (Gate::Scalar(gate), _) => Gate::Scalar(*gate),
        };
        let region = branch.region.as_ref().zip(layout.region).map(|(t, s)| View::new(t, s));
        branches.push(BranchInputs { gate, region, segments });
    }
    if violations.is_empty() {
        Ok(Inputs { q: View::new(&attention.q, problem.q), branches })
    } else {
        Err(Invalid { violations })
    }
}
