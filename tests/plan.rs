//! Which row of the table takes a problem on which GPU; no kernel runs.

use fused_attention::{
    Attention, AttentionDesc, Backward, Branch, Causal, DType, Device, Gradient, Gradients, Outputs, Plan, Problem,
    Reason, Segment, TensorDesc,
};
#[cfg(feature = "cuda")]
use std::io::Write;

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
fn hopper_keeps_few_keys() {
    let decoupled = |width, tokens: &[usize]| {
        tokens.iter().fold(Attention::new(rows(SHAPE[1], width)), |attention, &tokens| {
            attention.branch(Branch::new(rows(tokens, width), rows(tokens, width)))
        })
    };
    for width in [40, 64, 80, 96, 128, 160, 256] {
        for tokens in [&[77usize, 4] as &[usize], &[77, 16], &[77, 4, 16], &[112]] {
            let expected = format!("forward_short_sm90_f16_w{width}");
            assert_eq!(symbol(&decoupled(width, tokens), HOPPER), expected, "{tokens:?}");
        }
        // What shared memory of the widest holds is up to 112 keys.
        let expected = if width < 256 { "forward_short_sm90" } else { "forward_streaming_sm80" };
        assert_eq!(symbol(&decoupled(width, &[77, 77]), HOPPER), format!("{expected}_f16_w{width}"));
        let expected = match width {
            0..=128 => "forward_medium_sm90",
            160 => "forward_streaming_sm90",
            _ => "forward_streaming_sm80",
        };
        assert_eq!(symbol(&decoupled(width, &[77, 257]), HOPPER), format!("{expected}_f16_w{width}"));
    }
    // What they do not take, the short kernel of all GPUs does.
    let with = |segment| Attention::new(rows(SHAPE[1], 64)).branch(Branch::from(segment));
    let keys = || Segment::new(rows(77, 64), rows(77, 64));
    for segment in [
        keys().causal(Causal::TopLeft),
        keys().window(Some(3), None),
        keys().bias(TensorDesc::contiguous(DType::F16, [1, 1, SHAPE[1], 77])),
    ] {
        assert_eq!(symbol(&with(segment), HOPPER), "forward_short_sm80_f16_w64");
    }
    assert_eq!(symbol(&decoupled(64, &[77, 4]).softcap(20.0), HOPPER), "forward_short_sm80_f16_w64");
    // Results that no tensor map describes.
    let attention = decoupled(64, &[77, 4]);
    let strides = [(SHAPE[1] * SHAPE[2] * 64) as isize, -((SHAPE[2] * 64) as isize), 64, 1];
    let out = TensorDesc::strided(DType::F16, [SHAPE[0], SHAPE[1], SHAPE[2], 64], strides);
    let problem = Problem::forward(&attention, &Outputs::new(out)).expect("a legal problem");
    let plan = Plan::new(&problem, &Device::Emulated { compute_capability: HOPPER }).expect("device code takes it");
    assert_eq!(plan.symbol(), "forward_short_sm80_f16_w64");
}

/// 132 multiprocessors, each with one block at a time.
#[cfg(feature = "cuda")]
fn h200() -> Device {
    Device::Cuda(fused_attention::CudaDevice {
        ordinal: 0,
        name: "a GPU".to_string(),
        compute_capability: HOPPER,
        multiprocessors: 132,
        shared_memory_per_block: 227 << 10,
    })
}

/// Whether plans for a GPU find kernels in this build.
#[cfg(feature = "cuda")]
fn has_kernels() -> bool {
    let has_kernels = fused_attention::cuda::toolkit().is_some();
    if !has_kernels {
        // Not eprintln: the test harness would swallow it.
        let _ = writeln!(std::io::stderr(), "LEFT OUT: blocks on a GPU: the build found no nvcc; run scripts/get-nvcc");
    }
    has_kernels
}

#[cfg(feature = "cuda")]
#[test]
fn blocks_are_finer_where_they_end_sooner() {
    if !has_kernels() {
        return;
    }
    for ([batch, seq, heads, width], expected) in [
        // Two waves of 192 queries each, and two of 128;
        ([1, 4096, 8, 40], "forward_fine_sm90_f16_w40"),
        // four and five, of 3.3 and 4.8 that are full;
        ([2, 4096, 10, 64], "forward_fine_sm90_f16_w64"),
        // three and four: a ninth less, which finer blocks may lose;
        ([2, 4096, 8, 40], "forward_streaming_sm90_f16_w40"),
        // two and three, one and two;
        ([1, 4096, 10, 64], "forward_streaming_sm90_f16_w64"),
        ([1, 1024, 20, 64], "forward_streaming_sm90_f16_w64"),
        // many;
        ([8, 4096, 10, 64], "forward_streaming_sm90_f16_w64"),
        // a width whose blocks are of 128 in any case.
        ([1, 4096, 8, 80], "forward_streaming_sm90_f16_w80"),
    ] {
        let all = TensorDesc::bshd(DType::F16, [batch, seq, heads, width]);
        let attention = Attention::new(all).branch(Branch::new(all, all));
        let problem = Problem::forward(&attention, &Outputs::new(all)).expect("a legal problem");
        let plan = Plan::new(&problem, &h200()).expect("device code takes it");
        assert_eq!(plan.symbol(), expected, "{batch} x {seq} x {heads} x {width}");
    }
}

#[cfg(feature = "cuda")]
#[test]
fn few_queries_take_one_wave() {
    let head_blocks = |[batch, seq_q, heads]: [usize; 3]| {
        let of = |seq: usize| TensorDesc::bshd(DType::F16, [batch, seq, heads, 64]);
        let attention = Attention::new(of(seq_q)).branch(Branch::new(of(77), of(77))).branch(Branch::new(of(4), of(4)));
        let problem = Problem::forward(&attention, &Outputs::new(of(seq_q))).expect("a legal problem");
        let plan = Plan::new(&problem, &h200()).expect("device code takes it");
        let line = plan.to_string().lines().find_map(|line| Some(line.strip_prefix("blocks")?.trim().to_string()));
        let line = line.expect("a plan for a GPU tells its blocks");
        line.split(' ').next().and_then(|blocks| blocks.parse::<usize>().ok()).expect("a number")
    };
    if !has_kernels() {
        return;
    }
    for (shape, expected) in [
        // Every tile a block of its own,
        ([1, 64, 8], 1),
        ([2, 256, 8], 4),
        // one wave of blocks with several,
        ([2, 1024, 8], 8),
        ([2, 4096, 8], 8),
        ([1, 4096, 10], 13),
        // and where heads alone are more than a wave, three waves of halves of a head.
        ([8, 4096, 20], 2),
    ] {
        assert_eq!(head_blocks(shape), expected, "{shape:?}");
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

#[test]
fn a_plan_tells_why_it_passed_over_the_others() {
    let (width, few) = (160, 77);
    let keys = Segment::new(rows(few, width), rows(few, width)).causal(Causal::TopLeft);
    let attention = Attention::new(rows(SHAPE[1], width)).branch(Branch::from(keys));
    let problem = Problem::forward(&attention, &Outputs::new(rows(SHAPE[1], width))).expect("a legal problem");
    let of = |compute_capability| {
        let device = Device::Emulated { compute_capability };
        let plan = Plan::new(&problem, &device).expect("device code takes it");
        assert_eq!(plan.kernel(), "forward_short_sm80");
        let told = plan.not_taken(&problem, &device).into_iter();
        told.map(|other| (other.kernel, other.reasons)).collect::<Vec<(&str, Vec<Reason>)>>()
    };
    let positions = || Reason::Positions { segment: 0 };
    let wide = |limit| ["head_dim", "value_dim"].map(|dim| Reason::Width { dim, got: width, limit });
    let expected = vec![
        ("forward_short_sm90", vec![positions()]),
        ("forward_medium_sm90", [&wide(128)[..], &[positions()]].concat()),
        // They take it as well, and stand behind it in the table.
        ("forward_streaming_sm90", vec![]),
        ("forward_fine_sm90", wide(64).into()),
        ("forward_biased_sm90", vec![]),
        ("forward_streaming_sm80", vec![]),
    ];
    assert_eq!(of(HOPPER), expected.clone());
    assert_eq!(of((8, 0)), expected[5..], "kernels for another GPU are not told of");
}

/// Strides of 0 make any extents of a few numbers: such a problem is planned or refused.
#[test]
fn extents_beyond_any_memory_are_judged() {
    const MOST: usize = fused_attention::MAX_EXTENT;
    let one = |seq: usize| TensorDesc::strided(DType::F16, [MOST, seq, MOST, 8], [0, 0, 0, 1]);
    for (seq_q, seq_kv) in [(MOST, MOST), (MOST, 0), (1, MOST), (70, MOST)] {
        let gate = TensorDesc::contiguous(DType::F32, []);
        let branch = || Branch::new(one(seq_kv), one(seq_kv)).gate_tensor(gate);
        let attention = Attention::new(one(seq_q)).branch(branch()).branch(branch());
        let wanted = Gradients::new().want(Gradient::Gate(0), gate).want(Gradient::Gate(1), gate);
        let problem = Problem::backward(&attention, &Backward::new(one(seq_q)), &wanted).expect("a legal problem");
        let refusal = Plan::new(&problem, &Device::Cpu { threads: 2 }).expect_err("numbers of every row");
        assert!(matches!(refusal.reasons[..], [Reason::Workspace { .. }]), "{refusal}");
        let emulated = [(8, 0), HOPPER].map(|compute_capability| Device::Emulated { compute_capability });
        for device in emulated.iter().chain([&Device::Reference]) {
            match Plan::new(&problem, device) {
                Ok(plan) => assert!(!plan.to_string().is_empty()),
                Err(refusal) => assert!(!refusal.reasons.is_empty()),
            }
        }
    }
}
