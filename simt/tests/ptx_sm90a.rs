//! The interpreter of PTX: each instruction that only sm_90a has, sound, with one mistake, and in a form that is not known.

mod support;

use simt::{Fault, FaultKind, Kernel, Launch, Program, Swizzle, TensorMap};
use support::{MappedBuffers, bf16_bits, f16_bits, kernels};

// Never run: a launch needs an entry, and the program takes its place.
kernels! { MappedBuffers: primitive_bulk_load }
const ANY: Kernel<MappedBuffers> = primitive_bulk_load;

/// Rows of 64 halves: of the input, of the output, and of one box. A box is 8 KB.
const ROWS: usize = 320;
const STORED_ROWS: usize = 128;
const BOX: [u32; 4] = [64, 64, 1, 1];
const BOX_BYTES: u32 = 8192;

/// The mbarrier's offset in shared memory, behind as many boxes as the input has.
const BARRIER: u32 = 5 * BOX_BYTES;

/// A module with one kernel around `body`, which finds its thread in %r1, its shared memory in %r2, its input in %rd1, its output in
/// %rd2, and the tensor maps of both in %rd3 and %rd4.
fn module(body: &str) -> String {
    format!(
        ".version 8.0\n.target sm_90a\n.address_size 64\n.extern .shared .align 1024 .b8 memory[];\n\
         .visible .entry k(\n.param .align 64 .b8 k_param_0[320]\n)\n{{\n\
         .reg .pred %p<9>;\n.reg .b32 %r<9>;\n.reg .f32 %f<9>;\n.reg .b32 %a<4>;\n.reg .f32 %d<128>;\n.reg .b64 %rd<9>;\n\
         ld.param.u64 %rd1, [k_param_0+256];\nld.param.u64 %rd2, [k_param_0+264];\n\
         mov.b64 %rd3, k_param_0;\nadd.s64 %rd4, %rd3, 128;\n\
         mov.u32 %r1, %tid.x;\nmov.u32 %r2, memory;\n{body}\nret;\n}}\n"
    )
}

/// Runs a body over halves `input`, and returns the words of its output.
fn run(body: &str, threads: u32, input: &[u16], words: usize) -> Result<Vec<u32>, Fault> {
    let program = Program::parse(&module(body), "k").unwrap_or_else(|error| panic!("{error} in {body}"));
    let mut out = vec![0u128; words.div_ceil(4)];
    let mut launch = Launch::new(ANY, [1; 3], threads).program(&program).shared_bytes(BARRIER + 64);
    let (from, to) = (launch.input("in", input), launch.output("out", &mut out));
    let map = |address, rows: usize| {
        let whole = rows as u64 * 128;
        TensorMap::encode(address, [64, rows as u64, 1, 1], [128, whole, whole], BOX, Swizzle::Bytes128)
    };
    let params = MappedBuffers {
        from: map(from, ROWS).expect("a legal map"),
        to: map(to, STORED_ROWS).expect("a legal map"),
        input: from,
        out: to,
        unused: [0; 6],
    };
    launch.run(&params)?;
    drop(launch);
    Ok(bytemuck::cast_slice(&out)[..words].to_vec())
}

/// Without an input that matters.
fn sound(body: &str, threads: u32, words: usize) -> Vec<u32> {
    let input = halves();
    run(body, threads, &input, words).unwrap_or_else(|fault| panic!("{body}: {fault}"))
}

#[track_caller]
fn wrong(body: &str, threads: u32, kind: FaultKind) -> String {
    let Err(fault) = run(body, threads, &halves(), STORED_ROWS * 32) else { panic!("nothing is wrong with {body}") };
    assert_eq!(fault.kind, kind, "{fault} in {body}");
    assert!(fault.message.contains("PTX line"), "{fault} in {body}");
    fault.message
}

/// The same body with one part of it changed.
#[track_caller]
fn changed(body: &str, from: &str, to: &str) -> String {
    assert_eq!(body.matches(from).count(), 1, "`{from}` in {body}");
    body.replace(from, to)
}

/// Small whole numbers that differ from row to row and column to column.
fn value(element: usize) -> i32 {
    (element * 7 % 11 + element / 64 * 3 % 5) as i32 - 7
}

fn halves() -> Vec<u16> {
    (0..ROWS * 64).map(|element| f16_bits(value(element) as f32)).collect()
}

#[test]
fn elect() {
    // How many lanes are elected, and how many of them a second time.
    let body = "elect.sync _|%p1, 0xffffffff; elect.sync _|%p2, 0xffffffff; and.pred %p3, %p1, %p2;\n\
                @%p1 atom.relaxed.gpu.global.add.u32 %r5, [%rd2], 1;\n\
                @%p3 atom.relaxed.gpu.global.add.u32 %r5, [%rd2+4], 1;";
    assert_eq!(sound(body, 32, 2), [1, 1]);
    assert_eq!(sound(body, 128, 2), [4, 4], "one of each warp");
    wrong("elect.sync _|%p1, 0x0000ffff;", 32, FaultKind::Unsupported);
    wrong("setp.lt.u32 %p2, %r1, 16;\n@%p2 elect.sync _|%p1, 0xffffffff;", 32, FaultKind::Divergence);
}

#[test]
fn setmaxnreg() {
    let body = "setp.lt.u32 %p1, %r1, 128;\n@%p1 bra $less;\nsetmaxnreg.inc.sync.aligned.u32 232;\nbra $end;\n\
                $less: setmaxnreg.dec.sync.aligned.u32 40;\n$end:";
    sound(body, 384, 0);
    // Nobody gives what the others take.
    let message = wrong(&changed(body, "setmaxnreg.dec.sync.aligned.u32 40;", ""), 384, FaultKind::Deadlock);
    assert!(message.contains("setmaxnreg.inc"), "{message}");
    wrong("setmaxnreg.dec.sync.aligned.u32 44;", 384, FaultKind::Registers);
    wrong("setmaxnreg.dec.sync.aligned.u32 16;", 384, FaultKind::Registers);
    wrong("setmaxnreg.dec.sync.aligned.u32 232;", 384, FaultKind::Registers);
    wrong("setmaxnreg.inc.sync.aligned.u32 40;", 384, FaultKind::Registers);
}

/// Every thread of two warps writes a word and reads the opposite one, twice, with one mbarrier between.
const EXCHANGE: &str = "setp.eq.u32 %p1, %r1, 0;\n@%p1 mbarrier.init.shared::cta.b64 [%r2+40960], 64;\nbar.sync 0;\n\
    shl.b32 %r3, %r1, 2;\nadd.s32 %r3, %r3, %r2;\nxor.b32 %r4, %r1, 63;\nshl.b32 %r4, %r4, 2;\nadd.s32 %r4, %r4, %r2;\n\
    st.shared.u32 [%r3], %r1;\nmbarrier.arrive.shared::cta.b64 _, [%r2+40960];\n\
    $first: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2+40960], 0;\n@!%p2 bra $first;\n\
    ld.shared.u32 %r5, [%r4];\nmbarrier.arrive.shared::cta.b64 _, [%r2+40960];\n\
    $second: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2+40960], 1;\n@!%p2 bra $second;\n\
    st.shared.u32 [%r3], %r5;\nbar.sync 0;\nld.shared.u32 %r6, [%r4];\n\
    mul.wide.u32 %rd5, %r1, 4;\nadd.s64 %rd5, %rd5, %rd2;\nshl.b32 %r6, %r6, 8;\nor.b32 %r6, %r6, %r5;\nst.global.u32 [%rd5], %r6;";

#[test]
fn mbarriers() {
    let out = sound(EXCHANGE, 64, 64);
    for (thread, &word) in out.iter().enumerate() {
        assert_eq!(word as usize, (63 - thread) | (thread << 8), "thread {thread}");
    }
    wrong(&changed(EXCHANGE, "[%r2+40960], 64;", "[%r2+40960], 65;"), 64, FaultKind::Deadlock);
    wrong(&changed(EXCHANGE, "[%r2+40960], 64;", "[%r2+40960], 63;"), 64, FaultKind::Uninitialised);
    // The phase before the first counts as completed.
    wrong(&changed(EXCHANGE, "[%r2+40960], 0;", "[%r2+40960], 1;"), 64, FaultKind::Uninitialised);
    wrong(&changed(EXCHANGE, "[%r2+40960], 1;", "[%r2+40960], 0;"), 64, FaultKind::Race);
    wrong(&changed(EXCHANGE, "@%p1 mbarrier.init.shared::cta.b64 [%r2+40960], 64;", ""), 64, FaultKind::Mbarrier);
    // The answer is a predicate that says whether to go on.
    wrong(&changed(EXCHANGE, "@!%p2 bra $second;", ""), 64, FaultKind::Race);
    // An offset is part of the address.
    wrong(&changed(EXCHANGE, "_, [%r2+40960];\n$first", "_, [%r2+40968];\n$first"), 64, FaultKind::Mbarrier);
}

/// One thread brings `boxes` boxes, everyone waits for them.
fn bring(boxes: u32) -> String {
    let mut text = String::from(
        "setp.eq.u32 %p1, %r1, 0;\nadd.s32 %r3, %r2, 40960;\n@!%p1 bra $brought;\n\
         mbarrier.init.shared::cta.b64 [%r3], 1;\nfence.mbarrier_init.release.cluster;\n",
    );
    text += &format!("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], {};\n", boxes * BOX_BYTES);
    for n in 0..boxes {
        text += &format!(
            "add.s32 %r4, %r2, {};\ncp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes \
             [%r4], [%rd3, {{0, {}, 0, 0}}], [%r3];\n",
            n * BOX_BYTES,
            n * 64
        );
    }
    text + "$brought: bar.sync 0;\n$wait: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], 0;\n@!%p2 bra $wait;\n"
}

/// Every thread's words of a box as it lies in shared memory, to the output.
const DUMP: &str = "mov.u32 %r5, %r1;\n$word: shl.b32 %r6, %r5, 2;\ncvt.u64.u32 %rd5, %r6;\nadd.s64 %rd5, %rd5, %rd2;\n\
    add.s32 %r6, %r6, %r2;\nld.shared.u32 %r7, [%r6];\nst.global.u32 [%rd5], %r7;\nadd.s32 %r5, %r5, 128;\n\
    setp.lt.u32 %p3, %r5, 2048;\n@%p3 bra $word;";

/// Where the 128-byte swizzle puts an element of a box.
fn place(row: usize, column: usize) -> usize {
    row * 64 + ((column / 8) ^ (row % 8)) * 8 + column % 8
}

fn element(words: &[u32], at: usize) -> u16 {
    (words[at / 2] >> (at % 2 * 16)) as u16
}

#[test]
fn bulk_loads() {
    let body = bring(1) + DUMP;
    let expect = |body: &str, first_row: i32, first_column: i32| {
        let out = sound(body, 128, 2048);
        for (row, column) in (0..64).flat_map(|row| (0..64).map(move |column| (row, column))) {
            let (y, x) = (row as i32 + first_row, column as i32 + first_column);
            let inside = (0..ROWS as i32).contains(&y) && (0..64).contains(&x);
            let expected = if inside { f16_bits(value((y * 64 + x) as usize) as f32) } else { 0 };
            assert_eq!(element(&out, place(row, column)), expected, "row {row} column {column} of {body}");
        }
    };
    expect(&body, 0, 0);
    // Coordinates are innermost first, and registers as well as numbers.
    expect(&changed(&body, "{0, 0, 0, 0}", "{8, 300, 0, 0}"), 300, 8);
    let registers = changed(&body, "{0, 0, 0, 0}", "{%r7, %r8, 0, 0}");
    expect(&format!("mov.u32 %r7, 16;\nmov.u32 %r8, -3;\n{registers}"), -3, 16);

    wrong(&changed(&body, "fence.mbarrier_init.release.cluster;\n", ""), 128, FaultKind::Proxy);
    for bytes in [BOX_BYTES - 16, BOX_BYTES + 16] {
        wrong(&changed(&body, "[%r3], 8192;", &format!("[%r3], {bytes};")), 128, FaultKind::Deadlock);
    }
    wrong(&changed(&body, "@!%p2 bra $wait;\n", ""), 128, FaultKind::PendingCopy);
    wrong(&changed(&body, "add.s32 %r4, %r2, 0;", "add.s32 %r4, %r2, 128;"), 128, FaultKind::Misaligned);
    let no_map = changed(&body, "[%r4], [%rd3,", "[%r4], [%rd5,");
    wrong(&format!("add.s64 %rd5, %rd3, 64;\n{no_map}"), 128, FaultKind::Unsupported);
    // Written plainly before, and nothing tells the async proxy.
    let written = format!("st.shared.u32 [%r2], %r1;\n{body}");
    wrong(&written.replacen("setp.eq.u32 %p1, %r1, 0;", "setp.eq.u32 %p1, %r1, 127;", 1), 128, FaultKind::Race);
    let one = format!("setp.eq.u32 %p1, %r1, 0;\n@%p1 st.shared.u32 [%r2], %r1;\n{body}");
    wrong(&one, 128, FaultKind::Proxy);
    let fenced =
        format!("setp.eq.u32 %p1, %r1, 0;\n@%p1 st.shared.u32 [%r2], %r1;\nfence.proxy.async.shared::cta;\n{body}");
    expect(&fenced, 0, 0);
}

/// A box of words counted through, swizzled or not as they lie, goes to rows 3 to 66 of the output, and another one after it.
const STORE: &str = "mov.u32 %r8, 0;\n$again: mov.u32 %r5, %r1;\n\
    $word: shl.b32 %r6, %r5, 2;\nadd.s32 %r6, %r6, %r2;\nadd.s32 %r7, %r5, %r8;\nst.shared.u32 [%r6], %r7;\n\
    add.s32 %r5, %r5, 128;\nsetp.lt.u32 %p3, %r5, 2048;\n@%p3 bra $word;\n\
    fence.proxy.async.shared::cta;\nbar.sync 0;\nsetp.eq.u32 %p1, %r1, 0;\n@!%p1 bra $stored;\n\
    shr.u32 %r4, %r8, 9;\nadd.s32 %r4, %r4, 3;\n\
    cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%rd4, {8, %r4, 0, 0}], [%r2];\n\
    cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;\n\
    $stored: bar.sync 0;\nadd.s32 %r8, %r8, 32768;\nsetp.lt.u32 %p4, %r8, 65536;\n@%p4 bra $again;";

#[test]
fn bulk_stores() {
    let out = sound(STORE, 128, STORED_ROWS * 32);
    for (row, column) in (0..STORED_ROWS).flat_map(|row| (0..64).map(move |column| (row, column))) {
        let word = |tile: usize| {
            let at = place(row - 3 - 64 * tile, column - 8);
            let word = (at / 2 + 32768 * tile) as u32;
            (word >> (at % 2 * 16)) as u16
        };
        let expected = match row {
            _ if column < 8 => 0,
            3..67 => word(0),
            67.. => word(1),
            _ => 0,
        };
        assert_eq!(element(&out, row * 64 + column), expected, "row {row} column {column}");
    }
    let (commit, wait) = ("cp.async.bulk.commit_group;\n", "cp.async.bulk.wait_group.read 0;\n");
    wrong(&changed(STORE, "fence.proxy.async.shared::cta;\n", ""), 128, FaultKind::Proxy);
    for without in [commit, wait] {
        wrong(&changed(STORE, without, ""), 128, FaultKind::PendingCopy);
    }
    // One group may be left unread: this one.
    wrong(&changed(STORE, wait, "cp.async.bulk.wait_group.read 1;\n"), 128, FaultKind::PendingCopy);
    // Only once around: the tile is not written again, but the thread ends.
    let once = changed(STORE, "@%p4 bra $again;", "");
    sound(&once, 128, STORED_ROWS * 32);
    assert!(wrong(&changed(&once, commit, ""), 128, FaultKind::CopyAtExit).contains("never committed"));
    wrong(&changed(&once, wait, ""), 128, FaultKind::CopyAtExit);
    wrong(&changed(STORE, "[%r2];", "[%r1];"), 128, FaultKind::SharedBounds);
    wrong(&changed(STORE, "[%rd4, {8", "[%rd3, {8"), 128, FaultKind::ReadOnly);
}

/// {first, …, last} of so many registers.
fn registers(name: &str, count: usize) -> String {
    let names: Vec<String> = (0..count).map(|n| format!("%{name}{n}")).collect();
    format!("{{{}}}", names.join(", "))
}

/// D[64, N] += A[64, 16] · B[16, N] once, where D is 1 everywhere before: A from the input's first rows, or the thread's words of the
/// input in registers; B from the rows that follow, K-major or MN-major.
fn product(columns: usize, element: &str, a_in_registers: bool) -> String {
    let count = columns / 2;
    let mut text = bring(5);
    for n in 0..count {
        text += &format!("mov.f32 %d{n}, 0f3F800000;\n");
    }
    // Start, 8192 bytes to the next 64 columns of an MN-major operand, 1024 to the next eight rows, the swizzle.
    text += "shr.u32 %r5, %r2, 4;\nand.b32 %r5, %r5, 16383;\ncvt.u64.u32 %rd5, %r5;\nadd.s64 %rd5, %rd5, 0x4000004002000000;\n\
             add.s64 %rd6, %rd5, 512;\nsetp.eq.u32 %p3, %r1, %r1;\n\
             mul.wide.u32 %rd7, %r1, 16;\nadd.s64 %rd7, %rd7, %rd1;\nld.global.v4.u32 {%a0, %a1, %a2, %a3}, [%rd7];\n";
    let (a, majors) = if a_in_registers { ("{%a0, %a1, %a2, %a3}", "1") } else { ("%rd5", "0, 0") };
    text += &format!(
        "wgmma.fence.sync.aligned;\nwgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{element}.{element} {}, {a}, %rd6, %p3, \
         1, 1, {majors};\nwgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n",
        registers("d", count)
    );
    text += &format!("mul.wide.u32 %rd8, %r1, {};\nadd.s64 %rd8, %rd8, %rd2;\n", 4 * count);
    for n in 0..count {
        text += &format!("st.global.f32 [%rd8+{}], %d{n};\n", 4 * n);
    }
    text
}

#[test]
fn products_of_every_width() {
    for (element, bits) in [("f16", f16_bits as fn(f32) -> u16), ("bf16", bf16_bits)] {
        let input: Vec<u16> = (0..ROWS * 64).map(|element| bits(value(element) as f32)).collect();
        for (columns, a_in_registers) in (8..=256).step_by(8).flat_map(|columns| [(columns, false), (columns, true)]) {
            let body = product(columns, element, a_in_registers);
            let out = run(&body, 128, &input, 64 * columns).unwrap_or_else(|fault| panic!("{body}: {fault}"));
            for (at, &bits) in out.iter().enumerate() {
                // "Register Fragments for wgmma.mma_async.m64nNk16".
                let (thread, n) = (at / (columns / 2), at % (columns / 2));
                let row = thread / 32 * 16 + thread % 32 / 4 + n / 2 % 2 * 8;
                let column = n / 4 * 8 + thread % 4 * 2 + n % 2;
                let a = |k: usize| match a_in_registers {
                    false => value(row * 64 + k),
                    // Register i of a lane has rows of i % 2 and columns of i / 2, in pairs.
                    true => {
                        let lane = row / 16 * 32 + row % 8 * 4 + k % 8 / 2;
                        value(lane * 8 + (k / 8 * 2 + row % 16 / 8) * 2 + k % 2)
                    }
                };
                let b = |k: usize| match a_in_registers {
                    false => value((64 + column) * 64 + k),
                    true => value((64 + column / 64 * 64 + k) * 64 + column % 64),
                };
                let exact: i32 = 1 + (0..16).map(|k| a(k) * b(k)).sum::<i32>();
                assert_eq!(
                    f32::from_bits(bits),
                    exact as f32,
                    "row {row} column {column} n{columns} {element} {a_in_registers}"
                );
            }
        }
    }
}

#[test]
fn products_out_of_order() {
    for a_in_registers in [false, true] {
        let body = product(64, "f16", a_in_registers);
        let (fence, commit, wait) =
            ("wgmma.fence.sync.aligned;\n", "wgmma.commit_group.sync.aligned;\n", "wgmma.wait_group.sync.aligned 0;\n");
        for without in [fence, commit, wait] {
            wrong(&changed(&body, without, ""), 128, FaultKind::Wgmma);
        }
        wrong(&changed(&body, wait, "wgmma.wait_group.sync.aligned 1;\n"), 128, FaultKind::Wgmma);
        // Not added to what was there.
        let fresh = changed(&body, "setp.eq.u32 %p3,", "setp.ne.u32 %p3,");
        let difference = |(with, without): (&u32, &u32)| f32::from_bits(*with) - f32::from_bits(*without);
        let (with, without) = (sound(&body, 128, 4096), sound(&fresh, 128, 4096));
        assert!(with.iter().zip(&without).map(difference).all(|difference| difference == 1.0));
        // Descriptors: another swizzle, a tile between two rows of it, other strides.
        wrong(&changed(&body, "0x4000004002000000", "0x8000004002000000"), 128, FaultKind::Unsupported);
        wrong(&changed(&body, "%rd6, %rd5, 512;", "%rd6, %rd5, 520;"), 128, FaultKind::Misaligned);
        assert_ne!(sound(&changed(&body, "0x4000004002000000", "0x4000002002000000"), 128, 4096), with, "eight rows");
        if a_in_registers {
            let wide = product(128, "f16", true);
            let nearer = changed(&wide, "0x4000004002000000", "0x4000004001000000");
            assert_ne!(sound(&nearer, 128, 8192), sound(&wide, 128, 8192), "the next 64 columns");
        }
        // Signs and majors.
        let (majors, others) = match a_in_registers {
            false => (", 1, 1, 0, 0;", &[", -1, 1, 0, 0;", ", 1, -1, 0, 0;", ", 1, 1, 1, 0;", ", 1, 1, 0, 1;"][..]),
            true => (", 1, 1, 1;", &[", -1, 1, 1;", ", 1, -1, 1;", ", 1, 1, 0;"][..]),
        };
        for other in others {
            wrong(&changed(&body, majors, other), 128, FaultKind::Unsupported);
        }
        // Half a warp.
        wrong(
            &changed(&body, fence, &format!("mov.u32 %r6, %laneid;\nsetp.lt.u32 %p4, %r6, 16;\n@%p4 {fence}")),
            128,
            FaultKind::Divergence,
        );
    }
}

#[test]
fn what_is_not_known_is_named() {
    let load = "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes";
    let store = "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group";
    let wgmma = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16";
    let not_known = |name: &str| format!("the instruction `{name}` is not known");
    let cases = [
        ("elect.sync %r3|%p1, 0xffffffff;".into(), "`_` expected, not `%r3` in `elect.sync`".into()),
        ("elect.sync _, 0xffffffff;".into(), "`|` expected, not `,` in `elect.sync`".into()),
        (
            "setmaxnreg.dec.sync.aligned.u32 %r1;".into(),
            "a number expected in `setmaxnreg.dec.sync.aligned.u32`".into(),
        ),
        ("setmaxnreg.dec.aligned.u32 40;".into(), not_known("setmaxnreg.dec.aligned.u32")),
        ("mbarrier.init.b64 [%r2], 1;".into(), not_known("mbarrier.init.b64")),
        ("mbarrier.inval.shared::cta.b64 [%r2];".into(), not_known("mbarrier.inval.shared::cta.b64")),
        ("mbarrier.arrive.shared::cta.b64 %rd5, [%r2];".into(), "`_` expected, not `%rd5` in `mbarrier.arrive".into()),
        ("mbarrier.arrive.shared::cta.b64 _, [%r2], 2;".into(), "`;` expected, not `,` in `mbarrier.arrive".into()),
        (
            "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r2];".into(),
            not_known("mbarrier.arrive.release.cluster.shared::cluster.b64"),
        ),
        (
            "mbarrier.arrive.noComplete.shared::cta.b64 _, [%r2], 1;".into(),
            not_known("mbarrier.arrive.noComplete.shared::cta.b64"),
        ),
        (
            "mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r2], 0;".into(),
            not_known("mbarrier.test_wait.parity.shared::cta.b64"),
        ),
        ("mbarrier.try_wait.shared::cta.b64 %p1, [%r2], %rd5;".into(), not_known("mbarrier.try_wait.shared::cta.b64")),
        (
            "mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r2], 0, 9;".into(),
            "`;` expected, not `,` in `mbarrier.try_wait".into(),
        ),
        ("fence.proxy.async;".into(), not_known("fence.proxy.async")),
        ("fence.proxy.async.global;".into(), not_known("fence.proxy.async.global")),
        ("fence.mbarrier_init.release.cta;".into(), not_known("fence.mbarrier_init.release.cta")),
        (format!("{load} [%r2], [%rd3, {{0, 0, 0}}], [%r3];"), format!("`,` expected, not `}}` in `{load}`")),
        (format!("{load} [%r2], [%rd3, {{0, 0, 0, 0, 0}}], [%r3];"), format!("`}}` expected, not `,` in `{load}`")),
        (format!("{load} [%r2], [%rd3], [%r3];"), format!("`,` expected, not `]` in `{load}`")),
        (
            format!("{load} [%r2+16], [%rd3, {{0, 0, 0, 0}}], [%r3];"),
            format!("an offset where none is modelled in `{load}`"),
        ),
        (
            format!("{load}.multicast::cluster [%r2], [%rd3, {{0, 0, 0, 0}}], [%r3], %h1;"),
            not_known(&format!("{load}.multicast::cluster")),
        ),
        (load.replace("4d", "5d") + " [%r2], [%rd3, {0, 0, 0, 0, 0}], [%r3];", not_known(&load.replace("4d", "5d"))),
        (
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd1], 16, [%r3];".into(),
            not_known("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"),
        ),
        (format!("{store} [%rd4, {{0, 0}}], [%r2];"), format!("`,` expected, not `}}` in `{store}`")),
        (
            format!("{store}.L2::cache_hint [%rd4, {{0, 0, 0, 0}}], [%r2], %rd5;"),
            not_known(&format!("{store}.L2::cache_hint")),
        ),
        (
            "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.bulk_group [%rd4, {0, 0, 0, 0}], [%r2];".into(),
            not_known("cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.bulk_group"),
        ),
        ("cp.async.bulk.wait_group 0;".into(), not_known("cp.async.bulk.wait_group")),
        ("cp.async.bulk.wait_group.read %r1;".into(), "a number expected in `cp.async.bulk.wait_group.read`".into()),
        ("wgmma.wait_group.sync.aligned;".into(), "a number expected in `wgmma.wait_group.sync.aligned`".into()),
        ("wgmma.fence.aligned;".into(), not_known("wgmma.fence.aligned")),
        (
            format!("{wgmma} {{%d0, %d1, %d2}}, %rd5, %rd6, %p3, 1, 1, 0, 0;"),
            format!("`,` expected, not `}}` in `{wgmma}`"),
        ),
        (
            format!("{wgmma} {{%d0, %d1, %d2, %d3, %d4}}, %rd5, %rd6, %p3, 1, 1, 0, 0;"),
            format!("`}}` expected, not `,` in `{wgmma}`"),
        ),
        (
            format!("{wgmma} {{%d0, %d1, %d2, %d3}}, {{%a0, %a1, %a2}}, %rd6, %p3, 1, 1, 1;"),
            format!("`,` expected, not `}}` in `{wgmma} of registers`"),
        ),
        (
            format!("{wgmma} {{%d0, %d1, %d2, %d3}}, %rd5, %rd6, %p3, 1, 1;"),
            format!("`,` expected, not `;` in `{wgmma}`"),
        ),
        (wgmma.replace("n8", "n12") + " {%d0};", not_known(&wgmma.replace("n8", "n12"))),
        (wgmma.replace("n8", "n264") + " {%d0};", not_known(&wgmma.replace("n8", "n264"))),
        (
            wgmma.replace("k16.f32.f16.f16", "k8.f32.tf32.tf32") + " {%d0};",
            not_known(&wgmma.replace("k16.f32.f16.f16", "k8.f32.tf32.tf32")),
        ),
        (wgmma.replace(".f32.", ".f16.") + " {%d0};", not_known(&wgmma.replace(".f32.", ".f16."))),
        (
            wgmma.replace("mma_async", "mma_async.sp") + " {%d0};",
            not_known(&wgmma.replace("mma_async", "mma_async.sp")),
        ),
    ];
    for (body, part) in cases {
        let error = Program::parse(&module(&body), "k").expect_err(&body);
        assert!(error.contains("PTX line 2") && error.contains(&part), "{body}: {error}, not {part}");
    }
}
