//! A problem and the addresses of its tensors, as the blocks of parameters that the kernels read.

use super::backward::{Division, Factor, Place, Rows, Sum};
use super::params::{
    BackwardParams, BranchParams, ForwardParams, GradientRows, MappedForwardParams, ReduceParams, SegmentGradients,
    SegmentParams, SumParams, TensorMap,
};
use super::{Launched, MAX_SUMS, Plan};
use crate::problem::{
    Argument, Attention, Causal, DType, Gate, Gradient, GradientProblem, Problem, Results, Saved, Strides,
};
use smallvec::SmallVec;

impl Launched {
    /// Blocks, threads of each and bytes of shared memory.
    pub(crate) fn shape(&self, problem: &Problem) -> [u32; 3] {
        let code = self.instance.device.as_ref();
        let (threads, shared_bytes) = code.map_or((0, 0), |code| (code.threads, code.shared_bytes_of(problem)));
        [self.blocks as u32, threads, shared_bytes]
    }
}

/// What the forward reads and writes. Addresses are those of the elements at index zero, told by `address` for each input
/// once; that of `lse` is 0 where it is not wanted.
pub(crate) fn forward<'t, T>(
    problem: &Problem,
    plan: &Plan,
    tensors: &'t Attention<T>,
    mut address: impl FnMut(Argument, &'t T) -> u64,
    [out, lse]: [u64; 2],
) -> ForwardParams {
    let (out_strides, lse_strides) = match &problem.results {
        Results::Forward { out, lse } => (*out, lse.unwrap_or_default()),
        Results::Backward { saved: Some(Saved { out, lse }), .. } => (*out, *lse),
        Results::Backward { saved: None, .. } => ([0; 4], [0; 4]),
    };
    let mut params = ForwardParams {
        q: address(Argument::Q, &tensors.q),
        out,
        lse,
        q_stride: rows(problem.q),
        out_stride: rows(out_strides),
        lse_stride: wide(lse_strides),
        batch: problem.batch as i32,
        heads: problem.heads as i32,
        seq_q: problem.seq_q as i32,
        head_dim: problem.head_dim as i32,
        value_dim: problem.value_dim as i32,
        head_blocks: plan.head_blocks as i32,
        branches: problem.branches.len() as i32,
        accumulate: i32::from(problem.accumulate),
        softmax_scale: problem.softmax_scale,
        softcap: problem.softcap.unwrap_or(0.0),
        branch: Default::default(),
        segment: Default::default(),
    };
    for ((to, branch), tensors) in params.branch.iter_mut().zip(&problem.branches).zip(&tensors.branches) {
        let first = branch.first_segment;
        let (gate, gate_value) = match &tensors.gate {
            Gate::Scalar(value) => (0, *value),
            Gate::Tensor(gate) => (address(Argument::Gate(first), gate), 0.0),
        };
        let gate_stride = if let Gate::Tensor(strides) = branch.gate { wide(strides) } else { [0; 2] };
        *to = BranchParams {
            gate,
            region: tensors.region.as_ref().map_or(0, |region| address(Argument::Region(first), region)),
            gate_stride,
            region_stride: wide(branch.region.unwrap_or_default()),
            gate_value,
            first_segment: first as i32,
            end_segment: (first + branch.segments.len()) as i32,
            reserved: 0,
        };
        for (i, (segment, tensors)) in branch.segments.iter().zip(&tensors.segments).enumerate() {
            let n = first + i;
            params.segment[n] = SegmentParams {
                k: address(Argument::K(n), &tensors.k),
                v: address(Argument::V(n), &tensors.v),
                bias: tensors.bias.as_ref().map_or(0, |bias| address(Argument::Bias(n), bias)),
                key_len: tensors.key_len.as_ref().map_or(0, |key_len| address(Argument::KeyLen(n), key_len)),
                k_stride: rows(segment.k),
                v_stride: rows(segment.v),
                bias_stride: wide(segment.bias.map_or([0; 4], |(_, strides)| strides)),
                key_len_stride: segment.key_len.map_or(0, |[stride]| stride as i64),
                seq_kv: segment.seq_kv as i32,
                group: segment.group as i32,
                causal: causal(segment.causal),
                window_left: side(segment.window.left, problem.seq_q + segment.seq_kv),
                window_right: side(segment.window.right, problem.seq_q + segment.seq_kv),
                bias_type: bias_type(segment.bias.map(|(dtype, _)| dtype)),
            };
        }
    }
    params
}

/// What a tensor map describes: 16-bit elements in four dimensions, innermost first, and the box that one copy brings, under the
/// 128-byte swizzle. Elements outside of the tensor arrive as zeros.
pub(crate) struct MapOf {
    pub(crate) address: u64,
    pub(crate) extents: [u64; 4],
    /// Of the outer three dimensions, in bytes.
    pub(crate) strides: [u64; 3],
    pub(crate) boxed: [u32; 4],
}

impl MapOf {
    /// Rows of `width` elements; extents and strides of batch, sequence and head as the parameter block has them.
    fn rows(address: u64, width: i32, extents: [i32; 3], strides: [i64; 3], boxed: usize) -> MapOf {
        // A map wants a stride even where there is only one index.
        const ANY: u64 = 16;
        let [batch, seq, head] = [0, 1, 2].map(|n| match strides[n] {
            0 => (1, ANY),
            stride => (extents[n] as u64, if extents[n] == 1 { ANY } else { stride as u64 * 2 }),
        });
        let [outer, middle, inner] = [batch, head, seq];
        MapOf {
            address,
            extents: [width as u64, inner.0, middle.0, outer.0],
            strides: [inner.1, middle.1, outer.1],
            boxed: [64, boxed as u32, 1, 1],
        }
    }
}

/// The block of a forward whose kernel copies by tensor maps, which `encode` makes.
pub(crate) fn mapped<E>(
    forward: ForwardParams,
    plan: &Plan,
    mut encode: impl FnMut(&MapOf) -> Result<TensorMap, E>,
) -> Result<MappedForwardParams, E> {
    let ForwardParams { batch, heads, head_dim, value_dim, .. } = forward;
    let q = MapOf::rows(forward.q, head_dim, [batch, forward.seq_q, heads], forward.q_stride, 64);
    let out = MapOf::rows(forward.out, value_dim, [batch, forward.seq_q, heads], forward.out_stride, 16);
    let mut params = MappedForwardParams {
        q: encode(&q)?,
        k: Default::default(),
        v: Default::default(),
        out: if plan.stores_by_map() { encode(&out)? } else { TensorMap::default() },
        forward,
        reserved: [0; 6],
    };
    for (n, segment) in forward.segment.iter().take(params.k.len()).enumerate().filter(|(_, s)| s.seq_kv > 0) {
        let extents = [batch, segment.seq_kv, heads / segment.group.max(1)];
        params.k[n] = encode(&MapOf::rows(segment.k, head_dim, extents, segment.k_stride, plan.mapped_keys()))?;
        params.v[n] = encode(&MapOf::rows(segment.v, value_dim, extents, segment.v_stride, plan.mapped_keys()))?;
    }
    Ok(params)
}

/// The blocks of a backward's launches.
pub(crate) struct Backward {
    /// Of all but the last ones.
    pub(crate) params: BackwardParams,
    division: Division,
    gradients: SmallVec<[(GradientProblem, u64); 8]>,
    workspace: u64,
}

impl Backward {
    /// `forward` is the block of the forward, with what that saved as its results or zeros; the addresses are those of `dout`, of
    /// the gradients in the problem's order, and of the workspace.
    pub(crate) fn new(
        problem: &Problem,
        plan: &Plan,
        forward: ForwardParams,
        dout: u64,
        addresses: &[u64],
        workspace: u64,
    ) -> Backward {
        let (strides, gradients) = match &problem.results {
            Results::Backward { dout, gradients, .. } => (*dout, gradients.as_slice()),
            Results::Forward { .. } => ([0; 4], &[] as &[GradientProblem]),
        };
        let division = plan.division(problem);
        let params = BackwardParams {
            forward,
            dout,
            dout_stride: rows(strides),
            dq: GradientRows::default(),
            statistics: division.statistics.map_or(0, |offset| workspace + offset as u64),
            branches: division.branches,
            g_branches: division.g_branches,
            segment: Default::default(),
        };
        let gradients: SmallVec<[(GradientProblem, u64); 8]> =
            gradients.iter().copied().zip(addresses.iter().copied()).collect();
        let mut backward = Backward { params, division, gradients, workspace };
        if let Some((wanted, to)) = backward.gradients.iter().find(|(wanted, _)| wanted.gradient == Gradient::Q) {
            let [batch, seq, head] = rows(wanted.strides);
            backward.params.dq =
                GradientRows { to: *to, stride: [0, batch, seq, head], f32: is_f32(wanted), reserved: 0 };
        }
        for (n, segment) in backward.division.segments.iter().enumerate() {
            backward.params.segment[n] = SegmentGradients {
                dk: backward.rows(segment.dk),
                dv: backward.rows(segment.dv),
                dbias: segment.dbias.map_or(0, |bias| backward.at(bias.to).0),
                dbias_stride: segment.dbias.map_or([0; 5], |bias| bias.stride),
                bias_extent: segment.dbias.map_or([0; 4], |bias| bias.extent.map(|extent| extent as i32)),
                bias_blocks: segment.bias_blocks as i32,
                bias_parts: segment.bias_parts as i32,
                key_blocks: segment.key_blocks as i32,
                key_parts: segment.key_parts as i32,
                key_batch: segment.key_batch as i32,
                reserved: 0,
            };
        }
        backward
    }

    fn rows(&self, rows: Option<Rows>) -> GradientRows {
        rows.map_or_else(GradientRows::default, |rows| {
            let (to, f32) = self.at(rows.to);
            GradientRows { to, stride: rows.stride, f32, reserved: 0 }
        })
    }

    /// The block of a launch that adds up parts.
    pub(crate) fn sums(&self, launched: &Launched) -> ReduceParams {
        let mut params = ReduceParams::default();
        let (stage, first) = launched.sums.unwrap_or_default();
        let threads = launched.instance.device.as_ref().map_or(1, |code| code.threads as usize);
        for (to, sum) in params.sum.iter_mut().zip(self.division.sums[stage].iter().skip(first).take(MAX_SUMS)) {
            *to = self.sum(sum, threads);
        }
        params
    }

    fn sum(&self, sum: &Sum, threads: usize) -> SumParams {
        let (to, f32) = self.at(sum.to);
        let (factor, factor_value) = match sum.factor {
            Factor::One => (0, 1.0),
            Factor::Gate(n) => (self.params.forward.branch[n].gate, self.params.forward.branch[n].gate_value),
            Factor::Region(n) => (self.params.forward.branch[n].region, 1.0),
        };
        SumParams {
            parts: self.workspace + sum.parts as u64,
            factor,
            to,
            parts_stride: sum.parts_stride,
            parts_term_stride: sum.parts_term_stride,
            factor_stride: sum.factor_stride,
            factor_term_stride: sum.factor_term_stride,
            to_stride: sum.to_stride,
            extent: sum.extent.map(|extent| extent as i32),
            terms: sum.terms.map(|terms| terms as i32),
            factor_value,
            f32,
            together: i32::from(sum.together),
            blocks: sum.blocks(threads) as i32,
            reserved: 0,
        }
    }

    /// Address, and whether the elements are f32.
    fn at(&self, place: Place) -> (u64, i32) {
        match place {
            Place::Workspace(offset) => (self.workspace + offset as u64, 1),
            Place::Gradient(number) => {
                let (wanted, to) = &self.gradients[number];
                (*to, is_f32(wanted))
            }
        }
    }
}

fn is_f32(wanted: &GradientProblem) -> i32 {
    i32::from(wanted.dtype == DType::F32)
}

fn wide<const N: usize>(strides: Strides<N>) -> [i64; N] {
    strides.map(|stride| stride as i64)
}

/// Strides of batch, sequence and head; the last dimension is contiguous.
fn rows([batch, seq, head, _]: Strides<4>) -> [i64; 3] {
    wide([batch, seq, head])
}

fn causal(causal: Causal) -> i32 {
    match causal {
        Causal::None => 0,
        Causal::TopLeft => 1,
        Causal::BottomRight => 2,
    }
}

/// No two positions are further apart than all of them are many, so a wider window is an open one.
fn side(side: Option<u32>, positions: usize) -> i32 {
    side.filter(|&side| (side as usize) < positions).and_then(|side| i32::try_from(side).ok()).unwrap_or(-1)
}

fn bias_type(dtype: Option<DType>) -> i32 {
    match dtype {
        None => 0,
        Some(DType::F32) => 1,
        Some(DType::F16) => 2,
        Some(DType::BF16) => 3,
        Some(DType::Bool | DType::U32) => 4,
    }
}
