//! The interpreter of PTX: instructions against their definitions in the PTX ISA, and what it refuses.

mod support;

use simt::{Kernel, Launch, Program};
use support::{Buffers, kernels};

// Never run: a launch needs an entry, and the program takes its place.
kernels! { Buffers: primitive_shfl }
const ANY: Kernel<Buffers> = primitive_shfl;

/// A module with one kernel around `body`, which finds its input in %rd1 and its output in %rd2.
fn module(body: &str) -> String {
    format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n\
         .visible .entry k(\n.param .align 8 .b8 k_param_0[16]\n)\n{{\n\
         .reg .pred %p<9>;\n.reg .b16 %h<9>;\n.reg .b32 %r<9>;\n.reg .f32 %f<9>;\n.reg .b64 %rd<9>;\n\
         ld.param.u64 %rd1, [k_param_0];\nld.param.u64 %rd2, [k_param_0+8];\n\
         ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%rd1];\n{body}\nret;\n}}\n"
    )
}

/// Runs a body on four words and returns the first two of its output. All lanes write the same.
fn run(body: &str, input: [u32; 4]) -> [u32; 2] {
    let program = Program::parse(&module(body), "k").unwrap_or_else(|error| panic!("{body}: {error}"));
    let mut out = [0u32; 2];
    let mut launch = Launch::new(ANY, [1; 3], 32).program(&program).checks(simt::Checks::Off);
    let params = Buffers { input: launch.input("in", &input), out: launch.output("out", &mut out) };
    launch.run(&params).unwrap_or_else(|fault| panic!("{body}: {fault}"));
    drop(launch);
    out
}

/// An instruction with result %r5 on operands %r1 to %r4.
fn result(instruction: &str, input: [u32; 4]) -> u32 {
    run(&format!("{instruction};\nst.global.u32 [%rd2], %r5;"), input)[0]
}

#[test]
fn integers() {
    let int = |instruction: &str, a: i32, b: i32| {
        result(&format!("{instruction} %r5, %r1, %r2"), [a as u32, b as u32, 0, 0]) as i32
    };
    assert_eq!(int("add.s32", i32::MAX, 1), i32::MIN);
    assert_eq!(int("sub.s32", i32::MIN, 1), i32::MAX);
    assert_eq!(int("mul.lo.s32", 0x10001, 0x10001), 0x20001);
    assert_eq!(int("mul.hi.s32", -2, i32::MAX), -1);
    assert_eq!(int("mul.hi.u32", -2, i32::MAX), i32::MAX - 1);
    assert_eq!((int("div.s32", -7, 2), int("rem.s32", -7, 2)), (-3, -1));
    assert_eq!(int("div.u32", -7, 2), ((-7i32 as u32) / 2) as i32);
    assert_eq!(int("div.s32", i32::MIN, -1), i32::MIN);
    assert_eq!((int("min.s32", -1, 1), int("min.u32", -1, 1), int("max.u32", -1, 1)), (-1, 1, -1));
    assert_eq!((int("and.b32", 12, 10), int("or.b32", 12, 10), int("xor.b32", 12, 10)), (8, 14, 6));
    assert_eq!((int("shl.b32", 3, 31), int("shl.b32", 3, 32), int("shl.b32", 3, 33)), (i32::MIN, 0, 0));
    assert_eq!((int("shr.s32", -8, 1), int("shr.s32", -8, 40), int("shr.u32", -8, 40)), (-4, -1, 0));
    assert_eq!(int("shr.u32", -8, 28), 15);
    assert_eq!(result("mad.lo.s32 %r5, %r1, %r2, %r3", [7, 6, 5, 0]), 47);
    assert_eq!(result("bfi.b32 %r5, %r1, %r2, 8, 12", [0xfabc, 0xffff_ffff, 0, 0]), 0xfffa_bcff);
    assert_eq!(result("bfi.b32 %r5, %r1, %r2, 0, 32", [5, 9, 0, 0]), 5);
    assert_eq!(result("not.b32 %r5, %r1", [0xf0f0, 0, 0, 0]), !0xf0f0);
    assert_eq!(
        result(
            "mul.wide.s32 %rd5, %r1, %r2; shr.s64 %rd5, %rd5, 16; cvt.u32.u64 %r5, %rd5",
            [-3i32 as u32, 1 << 20, 0, 0]
        ),
        (-48i32) as u32
    );
    assert_eq!(result("cvt.u16.u32 %h1, %r1; mul.lo.s16 %h2, %h1, %h1; cvt.u32.u16 %r5, %h2", [0xffff, 0, 0, 0]), 1);
    // 16 bits of a register are not sign-extended by a write, nor do they keep what was above.
    assert_eq!(
        result("cvt.u16.u32 %h1, %r1; sub.s16 %h2, %h1, 2; cvt.u32.u16 %r5, %h2", [0xabcd_0001, 0, 0, 0]),
        0xffff
    );
    assert_eq!(
        result("cvt.s64.s32 %rd5, %r1; shr.u64 %rd5, %rd5, 60; cvt.u32.u64 %r5, %rd5", [-1i32 as u32, 0, 0, 0]),
        15
    );
    assert_eq!(result("mov.b32 {%h1, %h2}, %r1; mov.b32 %r5, {%h2, %h1}", [0x1234_5678, 0, 0, 0]), 0x5678_1234);
    // Bytes 4 and 1 and the signs of bytes 2 and 5, counted from the first operand's lowest.
    assert_eq!(result("prmt.b32 %r5, %r1, %r2, 0xda14", [0x1280_3456, 0x789a_7cde, 0, 0]), 0x00ff_34de);
}

#[test]
fn floats() {
    let float = |instruction: &str, a: f32, b: f32| {
        let body = format!("mov.b32 %f1, %r1; mov.b32 %f2, %r2; {instruction} %f3, %f1, %f2; mov.b32 %r5, %f3");
        f32::from_bits(result(&body, [a.to_bits(), b.to_bits(), 0, 0]))
    };
    assert_eq!(
        (float("add.f32", 1.0, 2f32.powi(-24)), float("sub.f32", 1.0, 0.25), float("mul.f32", 3.0, -0.5)),
        (1.0, 0.75, -1.5)
    );
    assert_eq!(float("div.rn.f32", 1.0, 3.0), 1.0 / 3.0);
    assert_eq!((float("max.f32", f32::NAN, 1.0), float("min.f32", 1.0, f32::NAN)), (1.0, 1.0));
    assert_eq!(float("max.f32", f32::NAN, -f32::NAN).to_bits(), 0x7fff_ffff);
    assert_eq!(float("min.f32", f32::NAN, f32::NAN).to_bits(), 0x7fff_ffff);
    assert_eq!(float("max.f32", -0.0, 0.0).to_bits(), 0);
    assert_eq!(float("min.f32", 0.0, -0.0).to_bits(), 0x8000_0000);
    let fused = "mov.b32 %f1, %r1; mov.b32 %f2, %r2; mov.b32 %f3, %r3; fma.rn.f32 %f4, %f1, %f2, %f3; mov.b32 %r5, %f4";
    let [a, b, c] = [1.0 + 2f32.powi(-12), 1.0 - 2f32.powi(-12), -1.0];
    assert_eq!(
        f32::from_bits(result(fused, [a.to_bits(), b.to_bits(), c.to_bits(), 0])),
        -2f32.powi(-24),
        "one rounding"
    );
    assert_eq!(result("mov.b32 %f1, %r1; neg.f32 %f2, %f1; mov.b32 %r5, %f2", [0x7fc0_0000, 0, 0, 0]), 0xffc0_0000);
    // 0f is the bits of a number.
    assert_eq!(result("mov.f32 %f1, 0fBF800000; mov.b32 %r5, %f1", [0; 4]), (-1f32).to_bits());
}

#[test]
fn comparisons_predicates_and_branches() {
    let setp = |how: &str, a: u32, b: u32| {
        let body = format!("mov.b32 %f1, %r1; mov.b32 %f2, %r2; setp.{how} %p1, OPERANDS; selp.b32 %r5, 1, 0, %p1");
        let operands = if how.ends_with("f32") { "%f1, %f2" } else { "%r1, %r2" };
        result(&body.replace("OPERANDS", operands), [a, b, 0, 0]) == 1
    };
    let (one, two, nan) = (1f32.to_bits(), 2f32.to_bits(), f32::NAN.to_bits());
    assert!(setp("lt.f32", one, two) && !setp("lt.f32", one, nan) && setp("ltu.f32", one, nan));
    assert!(
        !setp("ne.f32", one, nan)
            && setp("neu.f32", one, nan)
            && !setp("eq.f32", nan, nan)
            && setp("equ.f32", nan, nan)
    );
    assert!(setp("ge.s32", 1, -1i32 as u32) && !setp("ge.u32", 1, -1i32 as u32) && setp("le.u32", 1, 1));
    let body = "setp.gt.s32 %p1, %r1, %r2; @%p1 bra $bigger; mov.u32 %r5, 10; bra.uni $end; $bigger: mov.u32 %r5, 20; $end: @!%p1 add.s32 %r5, %r5, 1";
    assert_eq!((result(body, [3, 2, 0, 0]), result(body, [2, 3, 0, 0])), (20, 11));
    let count = "mov.u32 %r5, 0; $again: add.s32 %r5, %r5, %r1; setp.lt.s32 %p1, %r5, %r2; @%p1 bra $again";
    assert_eq!(result(count, [3, 10, 0, 0]), 12);
    let logic = "setp.eq.s32 %p1, %r1, 1; setp.eq.s32 %p2, %r2, 1; xor.pred %p3, %p1, %p2; not.pred %p4, %p3; and.pred %p5, %p4, %p1; selp.u32 %r5, 1, 0, %p5";
    assert_eq!((result(logic, [1, 1, 0, 0]), result(logic, [0, 0, 0, 0]), result(logic, [1, 0, 0, 0])), (1, 0, 0));
}

#[test]
fn memory() {
    assert_eq!(run("st.global.v2.u32 [%rd2], {%r4, %r1};", [1, 2, 3, 4]), [4, 1]);
    assert_eq!(run("ld.global.u8 %h1, [%rd1+1]; st.global.u16 [%rd2+2], %h1;", [0xaabb_ccdd, 0, 0, 0]), [0xcc_0000, 0]);
    assert_eq!(run("ld.global.nc.b32 %r5, [%rd1+-0]; st.global.b32 [%rd2+4], %r5;", [9, 0, 0, 0]), [0, 9]);
}

#[test]
fn what_is_not_known_is_named_with_its_line() {
    for (body, part) in [
        ("frobnicate.f32 %f1, %f2;", "PTX line 16: the instruction `frobnicate.f32` is not known"),
        ("add.f32 %f1, %f2;", "`,` expected"),
        ("add.f32 %f1, %f2, %zz;", "`%zz` is neither a register nor a number"),
        ("bra $nowhere;", "there is no label $nowhere"),
        (".shared .align 4 .b8 table[16];", "the directive .shared is not known"),
        ("tanh.approx.f32 %f1, %f2;", "`tanh.approx.f32` is not known"),
    ] {
        let error = Program::parse(&module(body), "k").expect_err(body);
        assert!(error.contains(part), "{body}: {error}");
    }
    assert!(Program::parse(&module(""), "other").expect_err("no such kernel").contains("there is no kernel other"));
    // Cut off anywhere, it is an error and nothing worse.
    let whole = module("mov.b32 %r5, {%h1, %h2}; bar.sync 0; .loc 1 2 3\n");
    let end = whole.rfind('}').expect("a closing brace");
    assert!(Program::parse(&whole, "k").is_ok());
    for cut in 0..end {
        assert!(Program::parse(&whole[..cut], "k").is_err(), "{}", &whole[..cut]);
    }
}

#[test]
fn faults_name_the_line() {
    let program = Program::parse(&module("ld.global.u32 %r5, [%rd1+16];"), "k").expect("all of it is known");
    let (input, mut out) = ([0u32; 4], [0u32; 2]);
    let mut launch = Launch::new(ANY, [1; 3], 32).program(&program);
    let params = Buffers { input: launch.input("in", &input), out: launch.output("out", &mut out) };
    let fault = launch.run(&params).expect_err("past the end").to_string();
    assert!(fault.contains("PTX line 16") && fault.contains("past the end of `in`"), "{fault}");
}
