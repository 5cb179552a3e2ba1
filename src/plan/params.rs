//! The blocks of parameters that cross to a kernel, twin of kernels/params.h.
//!
//! Only the standard library, because the build script reads this file too: it writes every offset below into a header
//! of assertions, so that the two sides cannot differ. The meaning of each field stands in kernels/params.h.

#![allow(missing_docs, reason = "kernels/params.h documents the fields")]

use super::instances::{MAX_BRANCHES, MAX_MAPPED_SEGMENTS, MAX_SEGMENTS, MAX_SUMS};
use std::mem::offset_of;

#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct SegmentParams {
    pub k: u64,
    pub v: u64,
    pub bias: u64,
    pub key_len: u64,
    pub k_stride: [i64; 3],
    pub v_stride: [i64; 3],
    pub bias_stride: [i64; 4],
    pub key_len_stride: i64,
    pub seq_kv: i32,
    pub group: i32,
    pub causal: i32,
    pub window_left: i32,
    pub window_right: i32,
    pub bias_type: i32,
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct BranchParams {
    pub gate: u64,
    pub region: u64,
    pub gate_stride: [i64; 2],
    pub region_stride: [i64; 3],
    pub gate_value: f32,
    pub first_segment: i32,
    pub end_segment: i32,
    pub reserved: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct ForwardParams {
    pub q: u64,
    pub out: u64,
    pub lse: u64,
    pub q_stride: [i64; 3],
    pub out_stride: [i64; 3],
    pub lse_stride: [i64; 4],
    pub batch: i32,
    pub heads: i32,
    pub seq_q: i32,
    pub head_dim: i32,
    pub value_dim: i32,
    pub head_blocks: i32,
    pub branches: i32,
    pub accumulate: i32,
    pub softmax_scale: f32,
    pub softcap: f32,
    pub branch: [BranchParams; MAX_BRANCHES],
    pub segment: [SegmentParams; MAX_SEGMENTS],
}

/// `ptx::TensorMap`, as `cuTensorMapEncodeTiled` fills it.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
pub struct TensorMap(pub [u64; 16]);

#[derive(Clone, Copy)]
#[repr(C)]
pub struct MappedForwardParams {
    pub q: TensorMap,
    pub k: [TensorMap; MAX_MAPPED_SEGMENTS],
    pub v: [TensorMap; MAX_MAPPED_SEGMENTS],
    pub out: TensorMap,
    pub forward: ForwardParams,
    pub reserved: [u64; 6],
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct GradientRows {
    pub to: u64,
    pub stride: [i64; 4],
    pub f32: i32,
    pub reserved: i32,
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct SegmentGradients {
    pub dk: GradientRows,
    pub dv: GradientRows,
    pub dbias: u64,
    pub dbias_stride: [i64; 5],
    pub bias_extent: [i32; 4],
    pub bias_blocks: i32,
    pub bias_parts: i32,
    pub key_blocks: i32,
    pub key_parts: i32,
    pub key_batch: i32,
    pub reserved: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct BackwardParams {
    pub forward: ForwardParams,
    pub dout: u64,
    pub dout_stride: [i64; 3],
    pub dq: GradientRows,
    pub statistics: u64,
    pub branches: u32,
    pub g_branches: u32,
    pub segment: [SegmentGradients; MAX_SEGMENTS],
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct SumParams {
    pub parts: u64,
    pub factor: u64,
    pub to: u64,
    pub parts_stride: [i64; 4],
    pub parts_term_stride: [i64; 3],
    pub factor_stride: [i64; 4],
    pub factor_term_stride: [i64; 3],
    pub to_stride: [i64; 4],
    pub extent: [i32; 4],
    pub terms: [i32; 3],
    pub factor_value: f32,
    pub f32: i32,
    pub together: i32,
    pub blocks: i32,
    pub reserved: i32,
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct ReduceParams {
    pub sum: [SumParams; MAX_SUMS],
}

macro_rules! layout {
    ($($ty:ident { $($field:ident),* $(,)? })*) => {
        /// Struct, field and offset of everything above.
        pub const OFFSETS: &[(&str, &str, usize)] =
            &[$($((stringify!($ty), stringify!($field), offset_of!($ty, $field)),)*)*];

        /// And the structs' sizes.
        pub const SIZES: &[(&str, usize)] = &[$((stringify!($ty), size_of::<$ty>()),)*];
    };
}

layout! {
    SegmentParams {
        k, v, bias, key_len, k_stride, v_stride, bias_stride, key_len_stride, seq_kv, group, causal, window_left,
        window_right, bias_type,
    }
    BranchParams {
        gate, region, gate_stride, region_stride, gate_value, first_segment, end_segment, reserved,
    }
    ForwardParams {
        q, out, lse, q_stride, out_stride, lse_stride, batch, heads, seq_q, head_dim, value_dim, head_blocks, branches,
        accumulate, softmax_scale, softcap, branch, segment,
    }
    MappedForwardParams { q, k, v, out, forward, reserved }
    GradientRows { to, stride, f32, reserved }
    SegmentGradients {
        dk, dv, dbias, dbias_stride, bias_extent, bias_blocks, bias_parts, key_blocks, key_parts, key_batch, reserved,
    }
    BackwardParams { forward, dout, dout_stride, dq, statistics, branches, g_branches, segment }
    SumParams {
        parts, factor, to, parts_stride, parts_term_stride, factor_stride, factor_term_stride, to_stride, extent, terms,
        factor_value, f32, together, blocks, reserved,
    }
    ReduceParams { sum }
}

/// A header that fails to compile where kernels/params.h disagrees.
pub fn assertions() -> String {
    let mut header = String::from("#pragma once\n#include <cstddef>\n#include \"params.h\"\n");
    for (name, field, offset) in OFFSETS {
        header += &format!("static_assert(offsetof({name}, {field}) == {offset}, \"src/plan/params.rs\");\n");
    }
    for (name, size) in SIZES {
        header += &format!("static_assert(sizeof({name}) == {size}, \"src/plan/params.rs\");\n");
    }
    for (name, most) in [
        ("MAX_BRANCHES", MAX_BRANCHES),
        ("MAX_SEGMENTS", MAX_SEGMENTS),
        ("MAX_MAPPED_SEGMENTS", MAX_MAPPED_SEGMENTS),
        ("MAX_SUMS", MAX_SUMS),
    ] {
        header += &format!("static_assert({name} == {most}, \"src/plan/params.rs\");\n");
    }
    header
}
