//! The shapes that the benches time, of real models, and the check that comes before.

use crate::cases::{Case, Data, GateCase, RegionCase, bound, naive};
use fused_attention::DType;

/// Name, `[batch, seq_q, heads, head_dim]`, keys of the text and of each image branch.
pub const SHAPES: [(&str, [usize; 4], usize, &[usize]); 5] = [
    ("sd15_self_32x32", [1, 1024, 8, 80], 1024, &[]),
    ("sdxl_self_32x32", [1, 1024, 20, 64], 1024, &[]),
    ("sdxl_text_64x64", [1, 4096, 10, 64], 77, &[]),
    ("sdxl_ip_adapter_64x64", [2, 4096, 10, 64], 77, &[16]),
    ("sdxl_two_adapters_64x64", [2, 4096, 10, 64], 77, &[4, 16]),
];

/// A shape as a case: gates and regions on its image branches.
pub fn case(name: &str, dtype: DType, q: [usize; 4], text: usize, image: &[usize]) -> Case {
    let case = Case::decoupled(name, dtype, q, text, image);
    (1..=image.len())
        .fold(case, |case, branch| case.gate(branch, GateCase::Scalar(0.6)).region(branch, RegionCase::Shared))
}

/// Holds what `run` makes of few queries of a shape against the oracle.
pub fn assert_correct(case: &Case, run: impl FnOnce(&Data) -> Vec<f32>) {
    let data = Data::new(case, 1);
    let oracle = data.attention().forward_f64().expect("a legal problem");
    let check = bound(case.dtype, &run(&data), &naive(&data).out, &oracle.out.values);
    assert!(check.holds(), "{}: {check:?}", case.name);
}
