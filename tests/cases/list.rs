//! The list. Sizes are odd and differ from each other, so that swapped dimensions show.

use super::BiasValues::{EmptyRows, FiniteMin, Random};
use super::{Case, GateCase, Layout, RegionCase};
use fused_attention::Causal::{BottomRight, TopLeft};
use fused_attention::DType::{self, BF16, Bool, F16, F32};

const FLOATS: [DType; 3] = [F16, BF16, F32];

/// Every case.
pub fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    cases.extend(sizes());
    cases.extend(masks());
    cases.extend(decoupled());
    cases.extend(layouts());
    cases.extend(few_queries());
    let mut names: Vec<&str> = cases.iter().map(|case| case.name.as_str()).collect();
    names.sort_unstable();
    assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "every case has a name of its own");
    cases
}

/// Head dims, sequence lengths, scales.
fn sizes() -> Vec<Case> {
    let mut cases = Vec::new();
    for (n, head_dim) in [8, 16, 24, 40, 64, 72, 80, 96, 104, 128, 160, 192, 256, 512].into_iter().enumerate() {
        let dtype = FLOATS[n % 3];
        cases.push(Case::plain(format!("self_{dtype}_d{head_dim}"), dtype, [2, 67, 3, head_dim], 67));
        let dtype = FLOATS[(n + 1) % 3];
        cases.push(Case::plain(format!("cross_{dtype}_d{head_dim}"), dtype, [1, 70, 2, head_dim], 77));
    }
    for dtype in FLOATS {
        cases.extend([
            Case::plain(format!("one_query_{dtype}"), dtype, [3, 1, 2, 64], 133),
            Case::plain(format!("one_key_{dtype}"), dtype, [2, 65, 3, 64], 1),
            Case::plain(format!("one_query_one_key_{dtype}"), dtype, [2, 1, 3, 40], 1),
            Case::plain(format!("keys_257_{dtype}"), dtype, [1, 129, 2, 80], 257),
            Case::plain(format!("long_{dtype}"), dtype, [1, 300, 1, 64], 1031),
            Case::plain(format!("value_dim_{dtype}"), dtype, [2, 66, 3, 40], 78).value_dim(56),
            Case::plain(format!("value_wider_{dtype}"), dtype, [1, 35, 2, 16], 130).value_dim(136),
        ]);
    }
    cases.extend([
        Case::plain("odd_width_f32", F32, [1, 33, 2, 25], 37).value_dim(3),
        Case::plain("width_one_f32", F32, [2, 5, 3, 1], 7).value_dim(1),
        Case::plain("no_key_f32", F32, [2, 5, 3, 8], 0),
        Case::plain("no_query_f16", F16, [2, 0, 3, 8], 9),
        Case::plain("no_batch_f16", F16, [0, 4, 3, 8], 9),
        Case::plain("many_heads_f16", F16, [3, 2, 21_846, 8], 3),
        Case::plain("scale_f16", F16, [2, 66, 3, 64], 91).scale(0.31),
        Case::plain("scale_negative_f32", F32, [2, 66, 3, 40], 91).scale(-0.2),
        Case::plain("scale_zero_bf16", BF16, [1, 20, 3, 40], 91).scale(0.0),
        Case::plain("scale_large_f32", F32, [1, 66, 3, 64], 140).scale(4.0),
        Case::plain("softcap_f16", F16, [2, 66, 3, 64], 91).softcap(2.5),
        Case::plain("softcap_bf16_causal", BF16, [1, 66, 2, 80], 91).softcap(20.0).causal(0, BottomRight),
        Case::plain("softcap_f32_bias", F32, [1, 34, 2, 24], 91).softcap(1.5).bias(0, F32, [1, 2, 34, 91], Random),
        Case::plain("grouped_heads_f16", F16, [2, 66, 6, 64], 91).kv_heads(0, 2),
        Case::plain("one_kv_head_bf16", BF16, [2, 35, 5, 40], 70).kv_heads(0, 1),
    ]);
    cases
}

/// Biases, key lengths and position rules.
fn masks() -> Vec<Case> {
    let mut cases = Vec::new();
    let shapes = [
        [2, 3, 66, 77],
        [1, 3, 66, 77],
        [2, 1, 66, 77],
        [2, 3, 1, 77],
        [2, 1, 1, 77],
        [2, 3, 66, 1],
        [1, 1, 66, 77],
        [1, 1, 1, 1],
    ];
    for (n, shape) in shapes.into_iter().enumerate() {
        let bias = [F32, F16, BF16, Bool][n % 4];
        let dtype = FLOATS[n % 3];
        let name = format!("bias_{bias}_{}_{dtype}", shape.map(|extent| extent.to_string()).join("x"));
        cases.push(Case::plain(name, dtype, [2, 66, 3, 40], 77).bias(0, bias, shape, Random));
    }
    // Smaller than any tile: what is summed over all else comes from several blocks.
    cases.push(Case::plain("bias_of_keys_f16", F16, [2, 66, 3, 40], 33).bias(0, F32, [1, 1, 1, 33], Random));
    for bias in [F32, F16, BF16, Bool] {
        cases.push(Case::plain(format!("empty_rows_{bias}"), F16, [2, 67, 3, 64], 91).bias(
            0,
            bias,
            [1, 1, 67, 91],
            EmptyRows,
        ));
    }
    for (n, bias) in [F32, F16, BF16, Bool].into_iter().enumerate() {
        // Whole tiles of queries and keys, whose neighbours are read together.
        let case = Case::plain(format!("bias_tiles_{bias}"), [F16, BF16][n % 2], [1, 140, 2, 64], 150);
        cases.push(case.bias(0, bias, [1, 2, 140, 150], Random));
    }
    cases.extend([
        // And where they cannot be: rows of an odd length, one column or one number for all keys, tiles that start at an odd
        // key.
        Case::plain("bias_tiles_odd_f16", F16, [1, 140, 2, 64], 151).bias(0, F16, [1, 1, 140, 151], Random),
        Case::plain("bias_tiles_column_bf16", BF16, [1, 140, 2, 64], 150).bias(0, F32, [1, 2, 140, 1], Random),
        Case::plain("bias_tiles_one_f16", F16, [1, 140, 2, 64], 150).bias(0, F32, [1, 2, 1, 1], Random),
        Case::plain("bias_tiles_window_f16", F16, [1, 140, 1, 64], 400).window(0, Some(201), None).bias(
            0,
            BF16,
            [1, 1, 140, 400],
            Random,
        ),
    ]);
    for dtype in FLOATS {
        // As frameworks mask: the lowest finite number of the activations' type.
        let shape = [2, 1, 67, 91];
        cases.push(
            Case::plain(format!("finite_min_{dtype}"), dtype, [2, 67, 3, 64], 91).bias(0, dtype, shape, FiniteMin),
        );
    }
    for dtype in FLOATS {
        cases.extend([
            Case::plain(format!("causal_top_left_{dtype}"), dtype, [2, 131, 2, 64], 70).causal(0, TopLeft),
            Case::plain(format!("causal_top_left_wide_{dtype}"), dtype, [1, 70, 2, 64], 131).causal(0, TopLeft),
            Case::plain(format!("causal_bottom_right_{dtype}"), dtype, [2, 70, 2, 40], 131).causal(0, BottomRight),
            // More queries than keys: the first rows have no key.
            Case::plain(format!("causal_no_key_rows_{dtype}"), dtype, [1, 150, 2, 40], 64).causal(0, BottomRight),
            Case::plain(format!("window_{dtype}"), dtype, [1, 270, 2, 64], 270).window(0, Some(30), Some(7)),
        ]);
    }
    cases.extend([
        Case::plain("window_left_f16", F16, [1, 140, 2, 64], 300).window(0, Some(129), None),
        Case::plain("window_right_bf16", BF16, [1, 140, 2, 64], 300).window(0, None, Some(0)),
        Case::plain("window_and_bias_bf16", BF16, [1, 140, 2, 40], 200).window(0, Some(50), Some(20)).bias(
            0,
            F32,
            [1, 1, 140, 200],
            Random,
        ),
        Case::plain("window_outside_f32", F32, [1, 140, 2, 24], 20).window(0, Some(3), Some(2)),
        Case::plain("window_causal_f32", F32, [2, 131, 2, 24], 140)
            .window(0, Some(17), Some(40))
            .causal(0, BottomRight),
        Case::plain("window_top_left_f16", F16, [2, 131, 2, 24], 140).window(0, Some(17), Some(40)).causal(0, TopLeft),
        Case::plain("key_len_f16", F16, [4, 66, 2, 64], 140).key_len(0, &[140, 1, 0, 77]),
        // A key short of a tile of keys, a whole one, one more; alone, and with biases on whole tiles of queries.
        Case::plain("key_len_of_tiles_f16", F16, [4, 66, 1, 64], 140).key_len(0, &[127, 128, 129, 63]),
        Case::plain("key_len_of_tiles_bias_f16", F16, [4, 130, 1, 64], 140).key_len(0, &[127, 128, 129, 63]).bias(
            0,
            F16,
            [1, 1, 130, 140],
            Random,
        ),
        Case::plain("key_len_causal_bf16", BF16, [3, 66, 2, 40], 140).key_len(0, &[129, 20, 0]).causal(0, BottomRight),
        Case::plain("key_len_bias_window_f32", F32, [3, 66, 2, 40], 140)
            .key_len(0, &[139, 20, 100])
            .window(0, Some(50), None)
            .bias(0, F16, [3, 1, 66, 140], Random),
    ]);
    cases
}

/// Several branches and several segments.
fn decoupled() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in FLOATS {
        for tokens in [4, 16, 257] {
            cases.push(
                Case::decoupled(format!("ip_adapter_{tokens}_{dtype}"), dtype, [2, 130, 3, 64], 77, &[tokens])
                    .gate(1, GateCase::Scalar(0.6)),
            );
        }
        cases.extend([
            Case::decoupled(format!("two_adapters_{dtype}"), dtype, [2, 131, 2, 40], 77, &[4, 16])
                .gate(1, GateCase::PerBatch(vec![0.0, 0.8]))
                .gate(2, GateCase::Device(1.3))
                .region(1, RegionCase::Shared)
                .region(2, RegionCase::PerBatch),
            Case::decoupled(format!("gate_tiny_{dtype}"), dtype, [1, 66, 2, 64], 20, &[4])
                .gate(0, GateCase::Scalar(1e-4))
                .gate(1, GateCase::Scalar(-1e-4)),
            // One branch, whose weight is all that lies between `out` and what the backward takes from it. Powers of 2, by which
            // `w P` rounds as the naive `P` does: in dv it would be a matter of luck which of the two is further off.
            Case::plain(format!("weighted_{dtype}"), dtype, [2, 66, 2, 40], 150)
                .gate(0, GateCase::PerBatch(vec![0.25, -4.0])),
            Case::decoupled(format!("joint_{dtype}"), dtype, [2, 131, 2, 80], 77, &[]).join(0, 64).join(0, 5),
        ]);
    }
    cases.extend([
        Case::decoupled("gate_huge_f32", F32, [1, 66, 2, 64], 20, &[4]).gate(1, GateCase::Scalar(3000.0)),
        Case::decoupled("gate_huge_bf16", BF16, [1, 66, 2, 64], 20, &[4])
            .gate(0, GateCase::Scalar(1e-4))
            .gate(1, GateCase::Scalar(3000.0)),
        Case::decoupled("gate_huge_f16", F16, [1, 66, 2, 64], 20, &[4])
            .gate(0, GateCase::Scalar(3000.0))
            .gate(1, GateCase::Device(-3000.0)),
        Case::decoupled("gate_per_head_f16", F16, [3, 66, 5, 40], 77, &[16, 9]).gate(1, GateCase::PerHead),
        Case::decoupled("gate_zero_f16", F16, [2, 66, 3, 40], 77, &[16]).gate(1, GateCase::Scalar(0.0)),
        Case::decoupled("eight_images_bf16", BF16, [2, 35, 3, 64], 77, &[4; 8])
            .gate(3, GateCase::Scalar(-0.7))
            .region(5, RegionCase::Shared)
            .gate(8, GateCase::PerHead),
        Case::decoupled("region_per_head_f32", F32, [2, 66, 3, 40], 77, &[16]).region(1, RegionCase::PerHead),
        Case::decoupled("region_on_text_f16", F16, [2, 66, 3, 40], 77, &[16])
            .region(0, RegionCase::PerBatch)
            .region(1, RegionCase::Shared),
        Case::decoupled("region_grows_f16", F16, [1, 200, 2, 40], 77, &[16]).region(1, RegionCase::Growing),
        Case::decoupled("region_grows_long_f16", F16, [1, 200, 2, 40], 20, &[110])
            .region(0, RegionCase::Growing)
            .region(1, RegionCase::Growing),
        Case::decoupled("text_mask_f16", F16, [2, 66, 3, 64], 77, &[16])
            .bias(0, Bool, [2, 1, 1, 77], Random)
            .gate(1, GateCase::Scalar(0.5)),
        Case::decoupled("text_key_len_f16", F16, [3, 66, 3, 64], 77, &[16, 4])
            .key_len(0, &[77, 5, 0])
            .key_len(2, &[4, 0, 3])
            .gate(2, GateCase::PerBatch(vec![0.3, -1.0, 0.0])),
        Case::plain("shared_key_len_f16", F16, [3, 66, 2, 64], 150).kv_shared(0).key_len(0, &[40, 150, 0]),
        Case::decoupled("shared_image_f16", F16, [3, 66, 2, 64], 77, &[16]).kv_shared(1).gate(1, GateCase::Scalar(0.5)),
        Case::decoupled("empty_image_f32", F32, [2, 34, 2, 40], 77, &[0, 4]),
        Case::decoupled("wan_like_bf16", BF16, [1, 260, 2, 128], 512, &[257]),
        Case::decoupled("everything_f16", F16, [2, 131, 6, 72], 140, &[16, 70])
            .value_dim(88)
            .scale(0.2)
            .softcap(30.0)
            .bias(0, F32, [1, 6, 131, 140], EmptyRows)
            .key_len(0, &[140, 61])
            .kv_heads(0, 3)
            .gate(0, GateCase::PerHead)
            .gate(1, GateCase::PerBatch(vec![2.5, -0.3]))
            .region(1, RegionCase::PerBatch)
            .kv_shared(1)
            .join(2, 33)
            .bias(3, Bool, [2, 1, 131, 33], EmptyRows)
            .causal(2, TopLeft)
            .window(2, Some(90), Some(4))
            .region(2, RegionCase::Shared),
        Case::plain("joint_masks_f32", F32, [2, 66, 3, 40], 50).join(0, 40).causal(0, BottomRight).bias(
            1,
            F32,
            [2, 3, 66, 40],
            EmptyRows,
        ),
        Case::plain("joint_groups_bf16", BF16, [2, 66, 6, 40], 50).join(0, 40).kv_heads(0, 2).kv_heads(1, 3),
    ]);
    cases
}

/// The same kinds of problem in every layout of memory.
fn layouts() -> Vec<Case> {
    let mut cases = Vec::new();
    let layouts = [Layout::Bhsd, Layout::Gaps, Layout::Reversed, Layout::Expanded];
    for (n, layout) in layouts.into_iter().enumerate() {
        let dtype = FLOATS[n % 3];
        let name = format!("{layout:?}").to_lowercase();
        cases.extend([
            Case::plain(format!("layout_{name}_{dtype}"), dtype, [3, 67, 4, 40], 91)
                .value_dim(48)
                .kv_heads(0, 2)
                .kv_shared(0)
                .bias(0, F16, [1, 4, 1, 91], Random)
                .layout(layout),
            Case::decoupled(format!("layout_{name}_decoupled_{dtype}"), dtype, [2, 67, 3, 64], 77, &[16])
                .bias(0, Bool, [2, 1, 67, 77], EmptyRows)
                .key_len(1, &[3, 16])
                .gate(1, GateCase::PerHead)
                .region(1, RegionCase::PerHead)
                .layout(layout),
        ]);
    }
    cases
}

/// Queries that are few against many keys, as when a text is written token by token.
fn few_queries() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in FLOATS {
        cases.extend([
            Case::plain(format!("decode_{dtype}"), dtype, [1, 1, 8, 64], 1031).kv_heads(0, 2),
            Case::plain(format!("decode_odd_{dtype}"), dtype, [2, 3, 4, 41], 515).value_dim(27).kv_heads(0, 2),
            Case::plain(format!("few_queries_{dtype}"), dtype, [2, 7, 6, 40], 700)
                .value_dim(56)
                .kv_heads(0, 2)
                .causal(0, BottomRight),
        ]);
    }
    let layouts = [Layout::Bhsd, Layout::Gaps, Layout::Reversed, Layout::Expanded];
    for (n, layout) in layouts.into_iter().enumerate() {
        let dtype = FLOATS[n % 3];
        let name = format!("{layout:?}").to_lowercase();
        let case = Case::plain(format!("decode_{name}_{dtype}"), dtype, [2, 1, 4, 72], 390).kv_heads(0, 2);
        cases.push(case.kv_shared(0).bias(0, F16, [1, 4, 1, 390], Random).layout(layout));
    }
    cases.extend([
        Case::plain("decode_window_bf16", BF16, [2, 1, 4, 128], 900)
            .kv_heads(0, 1)
            .window(0, Some(400), None)
            .softcap(9.0),
        Case::plain("decode_key_len_f16", F16, [3, 1, 4, 64], 600).kv_heads(0, 2).key_len(0, &[600, 0, 257]),
        Case::plain("decode_mask_f16", F16, [2, 4, 4, 40], 600).bias(0, Bool, [2, 1, 4, 600], EmptyRows),
        Case::plain("decode_finite_min_f32", F32, [2, 4, 4, 40], 600).bias(0, F32, [2, 4, 4, 600], FiniteMin),
        // Pairs of heads are what shares keys in every segment.
        Case::decoupled("decode_branches_f16", F16, [2, 2, 12, 40], 600, &[300, 20])
            .join(0, 270)
            .kv_heads(0, 2)
            .kv_heads(1, 3)
            .kv_heads(2, 6)
            .kv_heads(3, 1)
            .gate(0, GateCase::PerHead)
            .gate(1, GateCase::PerBatch(vec![0.0, 0.8]))
            .region(1, RegionCase::PerHead)
            .region(2, RegionCase::Growing),
    ]);
    cases
}
