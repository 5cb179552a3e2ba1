//! Every primitive of kernels/ptx/contract.h three times: as the emulator has it, as nvcc compiles kernels/ptx/asm.h for it
//! (interpreted), and as a GPU executed it once, where there is a recording of one. The bits must be the same.
//!
//! With SIMT_RECORD set to a folder (tests/recordings/GPU), the PTX runs on the machine's GPU, and the folder gets the recording.

mod support;

#[path = "support/gpu.rs"]
mod gpu;
#[path = "../../build/nvcc.rs"]
#[allow(dead_code, reason = "machine code is the build's business")]
mod nvcc;

use nvcc::Nvcc;
use simt::{Kernel, Launch, Program};
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use support::{Buffers, Numbers, bf16_bits, f16_bits, kernels};

kernels! { Buffers:
    primitive_ldmatrix primitive_ldmatrix_trans primitive_mma_f16 primitive_mma_bf16 primitive_shfl primitive_cvt
    primitive_power primitive_arithmetic primitive_copies primitive_synchronise primitive_atomics primitive_indices
}

/// A kernel of tests/kernels/primitives.cuh with its inputs.
struct Primitive {
    name: &'static str,
    /// What nvcc instantiates.
    device: &'static str,
    kernel: Kernel<Buffers>,
    input: Vec<u32>,
    out: usize,
    threads: u32,
}

const SHARED_BYTES: u32 = 2048;

fn primitives() -> Vec<Primitive> {
    let mut numbers = Numbers(2024);
    let mut words = |count: usize| -> Vec<u32> {
        (0..count).map(|_| (numbers.small(32768) as i32 as u32) << 16 ^ numbers.small(32768) as i32 as u32).collect()
    };
    let bits = words(256);
    let mut numbers = Numbers(77);
    let mut small = |half: fn(f32) -> u16| -> Vec<u32> {
        let mut lane = || -> Vec<u32> {
            let mut pair = || u32::from(half(numbers.small(100))) | u32::from(half(numbers.small(100))) << 16;
            let mut words: Vec<u32> = (0..6).map(|_| pair()).collect();
            words.extend((0..4).map(|_| numbers.small(1000).to_bits()));
            words
        };
        (0..32).flat_map(|_| lane()).collect()
    };
    let (f16, bf16) = (small(f16_bits), small(bf16_bits));
    let floats: Vec<u32> = (0..64).map(|n| ((n as f32 - 31.0) * 0.37 + 1e-3 * (n * n) as f32).to_bits()).collect();
    let primitive = |name, device, kernel, input: &[u32], out, threads| Primitive {
        name,
        device,
        kernel,
        input: input.to_vec(),
        out,
        threads,
    };
    vec![
        primitive("ldmatrix", "ldmatrix<false>", primitive_ldmatrix, &bits[..128], 192, 32),
        primitive("ldmatrix_trans", "ldmatrix<true>", primitive_ldmatrix_trans, &bits[..128], 192, 32),
        primitive("mma_f16", "mma<ptx::F16>", primitive_mma_f16, &f16, 256, 32),
        primitive("mma_bf16", "mma<ptx::BF16>", primitive_mma_bf16, &bf16, 256, 32),
        primitive("shfl", "exchange_lanes", primitive_shfl, &floats, 128, 32),
        primitive("cvt", "convert", primitive_cvt, &floats, 128, 32),
        primitive("power", "power", primitive_power, &floats, 96, 32),
        primitive("arithmetic", "arithmetic", primitive_arithmetic, &floats, 64, 32),
        primitive("copies", "copies", primitive_copies, &bits, 224, 32),
        primitive("synchronise", "synchronise", primitive_synchronise, &bits, 64, 64),
        primitive("atomics", "atomics", primitive_atomics, &bits, 66, 64),
        primitive("indices", "indices", primitive_indices, &bits, 32, 32),
    ]
}

impl Primitive {
    /// What it writes, or what went wrong; from its source, or from a program.
    fn run(&self, program: Option<&Program>) -> Result<Vec<u32>, String> {
        let mut out = vec![0; self.out];
        let mut launch = Launch::new(self.kernel, [1; 3], self.threads).shared_bytes(SHARED_BYTES);
        if let Some(program) = program {
            launch = launch.program(program);
        }
        let params = Buffers { input: launch.input("in", &self.input), out: launch.output("out", &mut out) };
        launch.run(&params).map_err(|fault| fault.to_string())?;
        drop(launch);
        Ok(out)
    }
}

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

fn left_out(what: &str) {
    // Not eprintln: the test harness would swallow it.
    let _ = writeln!(std::io::stderr(), "LEFT OUT: {what}");
}

fn find_nvcc() -> Option<Nvcc> {
    let found = Nvcc::find(root()).ok();
    let required = std::env::var_os("FUSED_ATTENTION_REQUIRE_KERNELS").is_some_and(|value| value != "0");
    assert!(found.is_some() || !required, "no nvcc; run scripts/get-nvcc");
    if found.is_none() {
        left_out("primitives as nvcc compiles them: there is no nvcc; run scripts/get-nvcc");
    }
    found
}

/// The PTX of all primitives, from the headers in `kernels`; or what nvcc says against them.
fn ptx(nvcc: &Nvcc, kernels: &Path, folder: &Path) -> Result<String, String> {
    fs::create_dir_all(folder).expect("cargo's folder takes another");
    let mut source = String::from("#include \"primitives.cuh\"\n");
    for Primitive { name, device, .. } in primitives() {
        let _ = writeln!(
            source,
            "extern \"C\" __global__ void primitive_{name}(const __grid_constant__ Buffers p) {{ {device}(p); }}"
        );
    }
    let (unit, ptx) = (folder.join("primitives.cu"), folder.join("primitives.ptx"));
    fs::write(&unit, source).expect("the folder takes a file");
    let tests = root().join("simt/tests/kernels");
    let output = nvcc.ptx("compute_80", &[kernels, &tests], &unit, &ptx).output().expect("nvcc runs");
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Ok(fs::read_to_string(ptx).expect("nvcc wrote it"))
}

fn scratch(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("conformance").join(name)
}

#[test]
fn source_and_ptx_give_the_same_bits() {
    let Some(nvcc) = find_nvcc() else { return };
    let ptx = ptx(&nvcc, &root().join("kernels"), &scratch("as_it_is")).unwrap_or_else(|said| panic!("{said}"));
    for primitive in primitives() {
        let program = Program::parse(&ptx, &format!("primitive_{}", primitive.name)).expect("all of it is known");
        let source = primitive.run(None).unwrap_or_else(|fault| panic!("{}: {fault}", primitive.name));
        assert_eq!(primitive.run(Some(&program)), Ok(source), "{}", primitive.name);
    }
}

#[test]
fn source_gives_what_gpus_gave() {
    let recordings = root().join("tests/recordings");
    let mut missing: Vec<&str> = primitives().iter().map(|primitive| primitive.name).collect();
    for entry in fs::read_dir(&recordings).into_iter().flatten().flatten() {
        let text = fs::read_to_string(entry.path().join("primitives.txt")).expect("each folder has this file");
        for primitive in primitives() {
            let Some(recorded) = recorded(&text, primitive.name) else { continue };
            missing.retain(|name| *name != primitive.name);
            let source = primitive.run(None).expect("it runs");
            let close = |(&a, &b): (&u32, &u32)| a == b || primitive.name == "power" && within_ulps(a, b, 2);
            assert!(
                source.len() == recorded.len() && source.iter().zip(&recorded).all(close),
                "{} on {}: {source:x?}, recorded {recorded:x?}",
                primitive.name,
                entry.path().display()
            );
        }
    }
    if !missing.is_empty() {
        left_out(&format!("primitives against a GPU: no recording of {}", missing.join(", ")));
    }
}

/// Whether two f32 are neighbours of neighbours: the approximations of a GPU are its own.
fn within_ulps(a: u32, b: u32, ulps: u32) -> bool {
    let nan = |bits: u32| f32::from_bits(bits).is_nan();
    nan(a) && nan(b) || a.abs_diff(b) <= ulps
}

/// `name word word …` of a recording, in hexadecimal.
fn recorded(text: &str, name: &str) -> Option<Vec<u32>> {
    let words = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    Some(words.split(' ').map(|word| u32::from_str_radix(word, 16).expect("a word")).collect())
}

/// The driver whose answers a recording would be: the machine's when one is made, else the stand-in.
fn driver() -> Option<(&'static str, Option<PathBuf>)> {
    match std::env::var_os("SIMT_RECORD") {
        Some(folder) => Some(("libcuda.so.1", Some(folder.into()))),
        None => Some((option_env!("SIMT_STAND_IN_DRIVER")?, None)),
    }
}

#[test]
fn a_driver_runs_the_primitives_and_is_recorded() {
    let Some((library, folder)) = driver() else { return left_out("recording primitives: there is no driver") };
    // A machine with a GPU need not have nvcc: scripts/gpu-bundle takes the PTX along.
    let mut ptx = match std::env::var_os("SIMT_PTX") {
        Some(path) => fs::read_to_string(path).expect("the PTX can be read"),
        None => {
            let Some(nvcc) = find_nvcc() else { return };
            ptx(&nvcc, &root().join("kernels"), &scratch("recorded")).unwrap_or_else(|said| panic!("{said}"))
        }
    };
    ptx.push('\0');
    let gpu = gpu::Gpu::open(library, &ptx).unwrap_or_else(|error| panic!("{library}: {error}"));
    let mut text = format!("# {}\n", gpu.name);
    for primitive in primitives() {
        let out = gpu.run(&primitive, SHARED_BYTES).unwrap_or_else(|error| panic!("{}: {error}", primitive.name));
        let words: Vec<String> = out.iter().map(|word| format!("{word:x}")).collect();
        let _ = writeln!(text, "{} {}", primitive.name, words.join(" "));
        if folder.is_none() {
            assert_eq!(recorded(&text, primitive.name), primitive.run(None).ok(), "{}", primitive.name);
        }
    }
    if let Some(folder) = folder {
        fs::create_dir_all(&folder).expect("the folder can be made");
        fs::write(folder.join("primitives.txt"), text).expect("the recording can be written");
    }
}

/// One line of asm.h changed: what it says, what it is made to say, and the primitives that show it.
const MUTANTS: &[(&str, &str, &str)] = &[
    ("b0 and b1 swapped", "\"r\"(a[3]), \"r\"(b0), \"r\"(b1));", "\"r\"(a[3]), \"r\"(b1), \"r\"(b0));"),
    ("a1 and a2 swapped", "\"r\"(a[0]), \"r\"(a[1]), \"r\"(a[2])", "\"r\"(a[0]), \"r\"(a[2]), \"r\"(a[1])"),
    ("the sum starts from nothing", "{%8, %9}, {%0, %1, %2, %3};", "{%8, %9}, {%3, %2, %1, %0};"),
    ("accumulators only written", ": \"+f\"(d[0]), \"+f\"(d[1])", ": \"=f\"(d[0]), \"=f\"(d[1])"),
    ("accumulators out of order", "\"+f\"(d[2]), \"+f\"(d[3])", "\"+f\"(d[3]), \"+f\"(d[2])"),
    ("bf16 taken for f16", "row.col.f32.bf16.bf16.f32", "row.col.f32.f16.f16.f32"),
    ("k8 with a swapped", "\"r\"(a[0]), \"r\"(a[1]), \"r\"(b));", "\"r\"(a[1]), \"r\"(a[0]), \"r\"(b));"),
    ("ldmatrix without trans", "x4.trans.shared.b16", "x4.shared.b16"),
    ("ldmatrix with trans", "m8n8.x2.shared.b16", "m8n8.x2.trans.shared.b16"),
    ("ldmatrix registers swapped", "\"=r\"(r[0]), \"=r\"(r[1]) :", "\"=r\"(r[1]), \"=r\"(r[0]) :"),
    ("halves swapped", "\"=r\"(result) : \"f\"(hi), \"f\"(lo)", "\"=r\"(result) : \"f\"(lo), \"f\"(hi)"),
    ("bf16 in the lower half", "\"h\"(uint16_t(0)), \"h\"(bits)", "\"h\"(bits), \"h\"(uint16_t(0))"),
    ("f16 pairs for bf16 pairs", "cvt.rn.bf16x2.f32", "cvt.rn.f16x2.f32"),
    ("the other exponential", "ex2.approx.ftz.f32 %0", "lg2.approx.ftz.f32 %0"),
    ("the smaller one", "max.f32 %0", "min.f32 %0"),
    ("a product with the sum", "fma.rn.f32 %0, %1, %2, %3", "fma.rn.f32 %0, %1, %3, %2"),
    ("idx for bfly", "shfl.sync.bfly.b32", "shfl.sync.idx.b32"),
    ("a smaller clamp", "shfl.sync.idx.b32 %0, %1, %2, 0x1f", "shfl.sync.idx.b32 %0, %1, %2, 0x0f"),
    ("the whole of 8 bytes", "[%0], [%1], 8, %2;", "[%0], [%1], 8, 8;"),
    (
        "source and size swapped",
        "4, %2;\" ::\"r\"(dst), \"l\"(src), \"r\"(src_size)",
        "4, %0;\" ::\"r\"(dst), \"l\"(src), \"r\"(src_size)",
    ),
    ("a group too many left", "cp.async.wait_group %0;\" ::\"n\"(N)", "cp.async.wait_group %0;\" ::\"n\"(N + 1)"),
    ("no commit", "asm volatile(\"cp.async.commit_group;\" ::: \"memory\");", ""),
    ("no barrier", "asm volatile(\"bar.sync 0;\" ::: \"memory\");", ""),
    ("another barrier for all", "asm volatile(\"bar.sync 0;\"", "asm volatile(\"bar.sync 1;\""),
    ("barrier and count swapped", "\"r\"(id), \"r\"(threads)", "\"r\"(threads), \"r\"(id)"),
    ("no barrier of the warp", "asm volatile(\"bar.warp.sync 0xffffffff;\" ::: \"memory\");", ""),
    ("half a warp", "bar.warp.sync 0xffffffff", "bar.warp.sync 0x0000ffff"),
    (
        "the value after the sum",
        ": \"=r\"(before) : \"l\"(address), \"r\"(value)",
        ": \"=r\"(before) : \"l\"(address + 1), \"r\"(value)",
    ),
    ("an atomic of integers", "red.relaxed.gpu.global.add.f32", "red.relaxed.gpu.global.add.u32"),
    ("a pointer left generic", "cvta.to.shared.u64 window, %1;", "mov.u64 window, %1;"),
];

#[test]
fn every_mutant_of_asm_h_is_caught() {
    let Some(nvcc) = find_nvcc() else { return };
    let folder = scratch("mutants");
    let _ = fs::remove_dir_all(&folder);
    let original = fs::read_to_string(root().join("kernels/ptx/asm.h")).expect("it is there");
    let expected: Vec<Vec<u32>> =
        primitives().iter().map(|primitive| primitive.run(None).expect("the source is right")).collect();
    let (mut missed, mut run) = (Vec::new(), 0);
    for (n, (what, from, to)) in MUTANTS.iter().enumerate() {
        assert!(original.contains(from), "{what}: asm.h does not say {from}");
        let kernels = folder.join(n.to_string());
        fs::create_dir_all(kernels.join("ptx")).expect("a folder");
        for name in ["contract.h", "asm_sm90a.h"] {
            fs::copy(root().join("kernels/ptx").join(name), kernels.join("ptx").join(name)).expect("a copy");
        }
        fs::write(kernels.join("ptx/asm.h"), original.replace(from, to)).expect("a file");
        let caught = match ptx(&nvcc, &kernels, &kernels) {
            Err(_) => Some("refused by nvcc"),
            Ok(ptx) => primitives().iter().zip(&expected).find_map(|(primitive, expected)| {
                let Ok(program) = Program::parse(&ptx, &format!("primitive_{}", primitive.name)) else {
                    return Some("refused by the interpreter");
                };
                match primitive.run(Some(&program)) {
                    Err(_) => Some("a fault"),
                    Ok(out) => (out != *expected).then_some("other bits"),
                }
            }),
        };
        println!("{what}: {}", caught.unwrap_or("not caught"));
        match caught {
            None => missed.push(*what),
            Some(by) => run += usize::from(!by.starts_with("refused")),
        }
    }
    assert!(run >= 18, "only {run} mutants got as far as running");
    assert!(missed.is_empty(), "nothing notices: {missed:?}");
}
