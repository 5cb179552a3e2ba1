//! Which row of the table takes a problem on which GPU; no kernel runs.

use fused_attention::{Attention, AttentionDesc, Branch, DType, Device, Outputs, Plan, Problem, Segment, TensorDesc};

const SHAPE: [usize; 4] = [2, 300, 6, 64];

fn rows(seq: usize, width: usize) -> TensorDesc {
    TensorDesc::bshd(DType::F16, [SHAPE[0], seq, SHAPE[2], width])
}

fn plain(width: usize) -> AttentionDesc {
    Attention::new(rows(SHAPE[1], width)).branch(Branch::new(rows(500, width), rows(500, width)))
}

/// The row that a GPU of this compute capability runs.
fn symbol(attention: &AttentionDesc, compute_capability: (u32, u32)) -> String {
    let width = attention.q.shape()[3];
    let problem = Problem::forward(attention, &Outputs::new(rows(SHAPE[1], width))).expect("a legal problem");
    let plan = Plan::new(&problem, &Device::Emulated { compute_capability });
    plan.expect("device code takes it").symbol()
}

const HOPPER: (u32, u32) = (9, 0);

#[test]
fn only_hopper_gets_hoppers_rows() {
    for width in [40, 64, 80, 96, 128, 160, 256] {
        let streaming = |architecture: &str| format!("forward_streaming_{architecture}_f16_w{width}");
        assert_eq!(symbol(&plain(width), HOPPER), streaming("sm90"));
        for other in [(8, 0), (8, 9), (10, 0), (12, 0)] {
            assert_eq!(symbol(&plain(width), other), streaming("sm80"), "{other:?}");
        }
    }
}

#[test]
fn hopper_gives_back_what_its_rows_do_not_take() {
    let width = SHAPE[3];
    let (streaming, biased) = ("forward_streaming_sm90_f16_w64", "forward_biased_sm90_f16_w64");
    assert_eq!(symbol(&plain(width).softmax_scale(0.3), HOPPER), streaming);
    assert_eq!(symbol(&plain(width).softmax_scale(-0.3), HOPPER), biased);
    assert_eq!(symbol(&plain(width).softmax_scale(0.0), HOPPER), biased);
    assert_eq!(symbol(&plain(width).softcap(20.0), HOPPER), biased);

    let keys = |bias: TensorDesc| Segment::new(rows(500, width), rows(500, width)).bias(bias);
    let mask = TensorDesc::contiguous(DType::Bool, [1, 1, SHAPE[1], 500]);
    let with = |segment| Attention::new(rows(SHAPE[1], width)).branch(Branch::from(segment));
    assert_eq!(symbol(&with(keys(mask)), HOPPER), biased);

    // Rows of the sequence backwards; keys that are all the same row.
    let stride = (SHAPE[2] * width) as isize;
    let shape = [SHAPE[0], 500, SHAPE[2], width];
    for seq_stride in [-stride, 0] {
        let k = TensorDesc::strided(DType::F16, shape, [stride * 500, seq_stride, width as isize, 1]);
        let attention = with(Segment::new(k, rows(500, width)));
        assert_eq!(symbol(&attention, HOPPER), "forward_streaming_sm80_f16_w64", "{seq_stride}");
    }
    // Heads that share keys by a stride of 0, and one batch entry for all, have maps.
    let shared = TensorDesc::strided(DType::F16, shape, [0, width as isize, 0, 1]);
    assert_eq!(symbol(&with(Segment::new(shared, shared)), HOPPER), streaming);

    let many = (0..9).fold(Attention::new(rows(SHAPE[1], width)), |attention, _| {
        attention.branch(Branch::new(rows(200, width), rows(200, width)))
    });
    assert_eq!(symbol(&many, HOPPER), "forward_streaming_sm80_f16_w64");
    // The sum of several branches does not fit beside the widest tiles.
    let several = plain(256).branch(Branch::new(rows(200, 256), rows(200, 256)));
    assert_eq!(symbol(&several, HOPPER), "forward_streaming_sm80_f16_w256");
    let several = plain(160).branch(Branch::new(rows(200, 160), rows(200, 160)));
    assert_eq!(symbol(&several, HOPPER), "forward_streaming_sm90_f16_w160");
}
