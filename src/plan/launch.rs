//! A problem and the addresses of its tensors, as the block of parameters that a forward kernel reads.

use super::Plan;
use super::instances::DeviceCode;
use super::params::{BranchParams, ForwardParams, SegmentParams};
use super::shared_bytes;
use crate::problem::{Argument, Attention, Causal, DType, Gate, Problem, Results, Strides};

/// What is launched: as many blocks, threads and bytes of shared memory as the kernel's row and the problem ask for.
pub(crate) struct Launch {
    pub(crate) blocks: u32,
    pub(crate) threads: u32,
    pub(crate) shared_bytes: u32,
    pub(crate) params: ForwardParams,
}

/// Fills the parameter block. Addresses are those of the elements at index zero, told by `address` for each tensor once;
/// that of `lse` is 0 where it is not wanted.
pub(crate) fn forward<'t, T>(
    problem: &Problem,
    plan: &Plan,
    device: &DeviceCode,
    tensors: &'t Attention<T>,
    mut address: impl FnMut(Argument, &'t T) -> u64,
    [out, lse]: [u64; 2],
) -> Launch {
    let (out_strides, lse_strides) = match problem.results {
        Results::Forward { out, lse } => (out, lse.unwrap_or_default()),
        Results::Backward { dout, .. } => (dout, [0; 4]),
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
                window_left: side(segment.window.left),
                window_right: side(segment.window.right),
                bias_type: bias_type(segment.bias.map(|(dtype, _)| dtype)),
            };
        }
    }
    Launch {
        blocks: plan.blocks(problem) as u32,
        threads: device.threads,
        shared_bytes: shared_bytes(device, problem),
        params,
    }
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

/// No position differs by more than `i32::MAX`, so a wider window is an open one.
fn side(side: Option<u32>) -> i32 {
    side.and_then(|side| i32::try_from(side).ok()).unwrap_or(-1)
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
