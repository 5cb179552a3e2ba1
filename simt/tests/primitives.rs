//! Every primitive against its definition in the PTX ISA, written out here without the emulator's own maps.

mod support;

use simt::{Kernel, Launch, Report};
use support::{Buffers, Numbers, bf16_bits, f16_bits, kernels};

kernels! { Buffers:
    primitive_ldmatrix primitive_ldmatrix_trans primitive_mma_f16 primitive_mma_bf16 primitive_shfl primitive_cvt
    primitive_power primitive_copies primitive_indices
}

/// Runs one warp, or `threads` threads.
fn run(kernel: Kernel<Buffers>, input: &[u32], out: usize, grid: [u32; 3], block: [u32; 3]) -> (Vec<u32>, Report) {
    let mut out = vec![0; out];
    let mut launch = Launch::new(kernel, grid, 32).block(block).shared_bytes(2048);
    let params = Buffers { input: launch.input("in", input), out: launch.output("out", &mut out) };
    let report = launch.run(&params).unwrap_or_else(|fault| panic!("{fault}"));
    drop(launch);
    (out, report)
}

fn warp(kernel: Kernel<Buffers>, input: &[u32], out: usize) -> Vec<u32> {
    run(kernel, input, out, [1; 3], [32, 1, 1]).0
}

fn floats(bits: &[u32]) -> Vec<f32> {
    bits.iter().map(|&b| f32::from_bits(b)).collect()
}

fn bits(floats: &[f32]) -> Vec<u32> {
    floats.iter().map(|x| x.to_bits()).collect()
}

/// "Thread 4i + j holds elements 2j and 2j + 1 of row i", or of column i when transposed.
#[test]
fn ldmatrix() {
    // Half h of the 32 rows of 8 halves is the number h.
    let input: Vec<u32> = (0..128).map(|w| (2 * w) | ((2 * w + 1) << 16)).collect();
    for (kernel, transposed) in [(primitive_ldmatrix, false), (primitive_ldmatrix_trans, true)] {
        let out = warp(kernel, &input, 32 * 6);
        for lane in 0..32 {
            let (i, j) = (lane / 4, lane % 4);
            for matrix in 0..4 {
                let element = |row: u32, column: u32| matrix * 64 + row * 8 + column;
                let expected = if transposed {
                    element(2 * j, i) | (element(2 * j + 1, i) << 16)
                } else {
                    element(i, 2 * j) | (element(i, 2 * j + 1) << 16)
                };
                let at = (lane * 6 + matrix) as usize;
                assert_eq!(out[at], expected, "x4, lane {lane}, matrix {matrix}");
                if matrix < 2 {
                    assert_eq!(out[at + 4], expected, "x2, lane {lane}, matrix {matrix}");
                }
            }
        }
    }
}

/// The fragment layouts as the PTX ISA writes them, per element, and sums that f32 holds exactly.
#[test]
fn mma() {
    for (kernel, half) in [(primitive_mma_f16, f16_bits as fn(f32) -> u16), (primitive_mma_bf16, bf16_bits)] {
        let mut numbers = Numbers(77);
        let a: Vec<f32> = (0..16 * 16).map(|_| numbers.small(100)).collect();
        let b: Vec<f32> = (0..16 * 8).map(|_| numbers.small(100)).collect();
        let c: Vec<f32> = (0..16 * 8).map(|_| numbers.small(1000)).collect();

        // a_i: row = group for i in 0,1,4,5, else group + 8; column = 2 * thread + (i & 1), + 8 from i = 4 on.
        let place_a = |lane: usize, i: usize| (lane / 4 + i / 2 % 2 * 8, lane % 4 * 2 + i % 2 + i / 4 * 8);
        // b_i: row = 2 * thread + (i & 1), + 8 from i = 2 on; column = group.
        let place_b = |lane: usize, i: usize| (lane % 4 * 2 + i % 2 + i / 2 * 8, lane / 4);
        // c_i: row = group, + 8 from i = 2 on; column = 2 * thread + (i & 1).
        let place_c = |lane: usize, i: usize| (lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2);
        let pack = |low: f32, high: f32| u32::from(half(low)) | u32::from(half(high)) << 16;

        let mut input = Vec::new();
        for lane in 0..32 {
            let element =
                |matrix: &[f32], columns: usize, (row, column): (usize, usize)| matrix[row * columns + column];
            let at_a = |i| element(&a, 16, place_a(lane, i));
            let at_b = |i| element(&b, 8, place_b(lane, i));
            let at_c = |i| element(&c, 8, place_c(lane, i));
            input.extend((0..4).map(|r| pack(at_a(2 * r), at_a(2 * r + 1))));
            input.extend((0..2).map(|r| pack(at_b(2 * r), at_b(2 * r + 1))));
            input.extend((0..4).map(|i| at_c(i).to_bits()));
        }
        let out = warp(kernel, &input, 32 * 8);
        for lane in 0..32 {
            for i in 0..4 {
                let (row, column) = place_c(lane, i);
                // m16n8k8 takes the first registers of a and b: the first eight of k.
                for (depth, found) in [(16, out[lane * 8 + i]), (8, out[lane * 8 + 4 + i])] {
                    let sum: f32 = (0..depth).map(|k| a[row * 16 + k] * b[k * 8 + column]).sum();
                    assert_eq!(
                        f32::from_bits(found),
                        c[row * 8 + column] + sum,
                        "k {depth}, row {row}, column {column}"
                    );
                }
            }
        }
    }
}

#[test]
fn shuffles() {
    let input: Vec<f32> = (0..32).map(|lane| lane as f32 + 0.5).collect();
    let out = floats(&warp(primitive_shfl, &bits(&input), 128));
    for lane in 0..32 {
        assert_eq!(out[lane], input[lane ^ 1]);
        assert_eq!(out[32 + lane], input[lane ^ 16]);
        assert_eq!(out[64 + lane], input[lane * 7 % 32]);
        assert_eq!(out[96 + lane], input[lane * 3 % 32]);
    }
}

/// (f32, f16, bf16): ties, both ends of the range, denormals, what is no number.
const CONVERSIONS: [(f32, u16, u16); 16] = [
    (0.0, 0x0000, 0x0000),
    (-0.0, 0x8000, 0x8000),
    (1.0, 0x3c00, 0x3f80),
    (-2.5, 0xc100, 0xc020),
    (1.000_488_3, 0x3c00, 0x3f80), // half a unit of f16 above 1: to even
    (1.001_464_8, 0x3c02, 0x3f80), // one and a half: to even
    (1.003_906_3, 0x3c04, 0x3f80), // half a unit of bf16 above 1: to even
    (1.011_718_8, 0x3c0c, 0x3f82), // one and a half: to even
    (65504.0, 0x7bff, 0x4780),
    (65519.0, 0x7bff, 0x4780),
    (65520.0, 0x7c00, 0x4780),
    (5.960_464_5e-8, 0x0001, 0x3380), // 2^-24, the smallest f16
    (2.980_232_2e-8, 0x0000, 0x3300), // half of it: to even
    (6.103_515_6e-5, 0x0400, 0x3880), // 2^-14, the smallest normal f16
    (6.097_555e-5, 0x03ff, 0x3880),   // one below it
    (f32::INFINITY, 0x7c00, 0x7f80),
];

#[test]
fn conversions() {
    let mut input = Vec::new();
    for pair in CONVERSIONS.chunks(2) {
        input.extend([pair[0].0, pair[1].0]); // hi, lo
    }
    input.resize(64, f32::NAN);
    let out = warp(primitive_cvt, &bits(&input), 32 * 4);
    for (lane, pair) in CONVERSIONS.chunks(2).enumerate() {
        let [hi, lo] = [pair[0], pair[1]];
        let found = &out[lane * 4..][..4];
        assert_eq!(found[0], u32::from(lo.1) | u32::from(hi.1) << 16, "f16 of {} and {}", hi.0, lo.0);
        assert_eq!(found[1], u32::from(lo.2) | u32::from(hi.2) << 16, "bf16 of {} and {}", hi.0, lo.0);
        // Widening is exact, so it is checked by its value: of the lower f16 and the upper bf16.
        assert_eq!(f32::from_bits(found[2]), wide_f16(lo.1));
        assert_eq!(found[3], u32::from(hi.2) << 16);
    }
    assert_eq!(out[31 * 4], 0x7fff_7fff); // the canonical NaN
    assert_eq!(out[31 * 4 + 1], 0x7fff_7fff);
    assert!(f32::from_bits(out[31 * 4 + 2]).is_nan() && f32::from_bits(out[31 * 4 + 3]).is_nan());
}

/// binary16 by its definition.
fn wide_f16(bits: u16) -> f32 {
    let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
    let (exponent, mantissa) = (i32::from(bits >> 10 & 31), f32::from(bits & 0x3ff));
    match exponent {
        0 => sign * mantissa * 2f32.powi(-24),
        31 => sign * f32::INFINITY,
        _ => sign * (1.0 + mantissa / 1024.0) * 2f32.powi(exponent - 15),
    }
}

#[test]
fn powers_and_logarithms() {
    let mut input = vec![0.0, 1.0, -1.0, 10.0, -126.0, -127.0, f32::NEG_INFINITY, 128.0, 0.3, -7.7, 1e-40];
    input.resize(32, 2.0);
    let out = floats(&warp(primitive_power, &bits(&input), 96));
    for (i, &x) in input.iter().enumerate() {
        let denormal = |x: f32| x != 0.0 && x.abs() < f32::MIN_POSITIVE;
        let power = f64::from(x).exp2() as f32;
        let expected = if denormal(power) { 0.0 } else { power };
        assert!(out[i] == expected || ((out[i] - expected) / expected).abs() <= 2f32.powi(-22), "2^{x}: {}", out[i]);
        let inverse = if denormal(x) { f32::INFINITY } else { 1.0 / x };
        assert!(out[64 + i] == inverse || ((out[64 + i] - inverse) / inverse).abs() <= 2f32.powi(-23), "1 / {x}");
        if x >= 0.0 {
            let expected = if denormal(x) { f32::NEG_INFINITY } else { f64::from(x).log2() as f32 };
            assert!(
                out[32 + i] == expected || (out[32 + i] - expected).abs() <= 2f32.powi(-22),
                "log2 {x}: {}",
                out[32 + i]
            );
        }
    }
}

#[test]
fn copies() {
    let input: Vec<u32> = (0..128).map(|i| 0x1234_0000 + i).collect();
    let (out, report) = run(primitive_copies, &input, 32 * 7, [1; 3], [32, 1, 1]);
    for lane in 0..32 {
        let found = &out[lane * 7..][..7];
        assert_eq!(found[..4], input[lane * 4..][..4]);
        assert_eq!(found[4..6], [input[lane * 2], input[lane * 2 + 1] & 0xffff]);
        assert_eq!(found[6], input[lane]);
    }
    assert_eq!(report.buffer("in").read_async, 32 * (16 + 6 + 4));
    assert_eq!(report.sync_sites.iter().filter(|site| site.what == "cp.async.wait_group").count(), 3);
}

#[test]
fn indices() {
    let (grid, block) = ([3, 2, 2], [8, 4, 2]);
    let out = run(primitive_indices, &[0], 12 * 64, grid, block).0;
    for (i, &word) in (0..).zip(&out) {
        let (thread, at) = (i % 64, i / 64);
        let parts = [thread % 8, thread / 8 % 4, thread / 32, at % 3, at / 3 % 2, at / 6];
        let expected: u32 = std::iter::zip(parts, [0, 4, 8, 12, 16, 20]).map(|(part, shift)| part << shift).sum();
        assert_eq!(word, expected);
    }
}
