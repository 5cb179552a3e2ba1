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

#[path = "support/mutants.rs"]
mod mutants;

use bytemuck::Zeroable;
use mutants::{MUTANTS, MUTANTS_SM90A};
use nvcc::Nvcc;
use simt::{Kernel, Launch, Program, Swizzle, TensorMap};
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use support::{Buffers, MappedBuffers, Numbers, bf16_bits, f16_bits, kernels};

kernels! { Buffers:
    primitive_ldmatrix primitive_ldmatrix_trans primitive_mma_f16 primitive_mma_bf16 primitive_shfl primitive_cvt
    primitive_power primitive_arithmetic primitive_copies primitive_synchronise primitive_atomics primitive_indices
}

mod sm90a {
    use super::support;
    support::kernels! { support::MappedBuffers:
        primitive_elect primitive_change_registers primitive_mbarriers primitive_bulk_load primitive_bulk_store
        primitive_wgmma_40_f16 primitive_wgmma_40_bf16 primitive_wgmma_64_f16 primitive_wgmma_64_bf16
        primitive_wgmma_80_f16 primitive_wgmma_80_bf16 primitive_wgmma_96_f16 primitive_wgmma_96_bf16
        primitive_wgmma_112_f16 primitive_wgmma_112_bf16 primitive_wgmma_128_f16 primitive_wgmma_128_bf16
        primitive_wgmma_144_f16 primitive_wgmma_144_bf16 primitive_wgmma_160_f16 primitive_wgmma_160_bf16
        primitive_wgmma_176_f16 primitive_wgmma_176_bf16 primitive_wgmma_256_f16 primitive_wgmma_256_bf16
    }

    /// Constants with the names that nvcc instantiates.
    macro_rules! list {
        ($($name:ident $device:literal $threads:literal)*) => {
            pub(super) const ALL: &[(&str, &str, simt::Kernel<support::MappedBuffers>, u32)] =
                &[$((stringify!($name), $device, $name, $threads)),*];
        };
    }
    list! {
        primitive_elect "elect" 32
        primitive_change_registers "change_registers" 384
        primitive_mbarriers "mbarriers" 64
        primitive_bulk_load "bulk_load" 128
        primitive_bulk_store "bulk_store" 128
        primitive_wgmma_40_f16 "wgmma<ptx::F16, 5>" 128
        primitive_wgmma_40_bf16 "wgmma<ptx::BF16, 5>" 128
        primitive_wgmma_64_f16 "wgmma<ptx::F16, 8>" 128
        primitive_wgmma_64_bf16 "wgmma<ptx::BF16, 8>" 128
        primitive_wgmma_80_f16 "wgmma<ptx::F16, 10>" 128
        primitive_wgmma_80_bf16 "wgmma<ptx::BF16, 10>" 128
        primitive_wgmma_96_f16 "wgmma<ptx::F16, 12>" 128
        primitive_wgmma_96_bf16 "wgmma<ptx::BF16, 12>" 128
        primitive_wgmma_112_f16 "wgmma<ptx::F16, 14>" 128
        primitive_wgmma_112_bf16 "wgmma<ptx::BF16, 14>" 128
        primitive_wgmma_128_f16 "wgmma<ptx::F16, 16>" 128
        primitive_wgmma_128_bf16 "wgmma<ptx::BF16, 16>" 128
        primitive_wgmma_144_f16 "wgmma<ptx::F16, 18>" 128
        primitive_wgmma_144_bf16 "wgmma<ptx::BF16, 18>" 128
        primitive_wgmma_160_f16 "wgmma<ptx::F16, 20>" 128
        primitive_wgmma_160_bf16 "wgmma<ptx::BF16, 20>" 128
        primitive_wgmma_176_f16 "wgmma<ptx::F16, 22>" 128
        primitive_wgmma_176_bf16 "wgmma<ptx::BF16, 22>" 128
        primitive_wgmma_256_f16 "wgmma<ptx::F16, 32>" 128
        primitive_wgmma_256_bf16 "wgmma<ptx::BF16, 32>" 128
    }
}

/// A kernel of tests/kernels/primitives.cuh, or of primitives_sm90a.cuh, with its inputs.
struct Primitive {
    name: &'static str,
    /// What nvcc instantiates.
    device: &'static str,
    kernel: Entry,
    input: Vec<u32>,
    out: usize,
    threads: u32,
}

#[derive(Clone, Copy)]
enum Entry {
    Plain(Kernel<Buffers>),
    Mapped(Kernel<MappedBuffers>),
}

/// One header of primitives, and what nvcc compiles it for.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Set {
    Plain,
    Sm90a,
}

impl Set {
    const ALL: [Set; 2] = [Set::Plain, Set::Sm90a];

    /// The stem of its files.
    fn stem(self) -> &'static str {
        match self {
            Set::Plain => "primitives",
            Set::Sm90a => "primitives_sm90a",
        }
    }

    fn architecture(self) -> &'static str {
        match self {
            Set::Plain => "compute_80",
            Set::Sm90a => "compute_90a",
        }
    }

    fn params(self) -> &'static str {
        match self {
            Set::Plain => "Buffers",
            Set::Sm90a => "MappedBuffers",
        }
    }
}

/// The tensor of the bulk copies, halves: its extents, innermost first, its strides in bytes, one box of it.
const TENSOR: [u64; 4] = [64, 24, 3, 2];
const STRIDES: [u64; 3] = [128, 24 * 128, 3 * 24 * 128];
const TENSOR_BOX: [u32; 4] = [64, 16, 1, 1];
const TENSOR_WORDS: usize = 64 * 24 * 3 * 2 / 2;

fn primitives() -> Vec<Primitive> {
    let mut all = plain_primitives();
    all.extend(sm90a_primitives());
    all
}

/// Those that every architecture has.
fn plain_primitives() -> Vec<Primitive> {
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
        kernel: Entry::Plain(kernel),
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

/// Those that only sm_90a has.
fn sm90a_primitives() -> Vec<Primitive> {
    let small = |half: fn(f32) -> u16| -> Vec<u32> {
        let mut numbers = Numbers(90);
        let mut half = || u32::from(half(numbers.small(9)));
        (0..5 * 2048).map(|_| half() | half() << 16).collect()
    };
    let (f16, bf16) = (small(f16_bits), small(bf16_bits));
    let primitive = |&(name, device, kernel, threads): &(&'static str, _, _, u32)| {
        let (input, out) = match device {
            "elect" => (&f16[..32], 64),
            "bulk_load" => (&f16[..TENSOR_WORDS], 3 * 512),
            "bulk_store" => (&f16[..2 * 512], TENSOR_WORDS),
            _ if device.contains("BF16") => (&bf16[..], 256),
            _ if device.contains("F16") => (&f16[..], 256),
            _ => (&f16[..threads as usize], threads as usize),
        };
        let name = name.strip_prefix("primitive_").expect("they all have it");
        Primitive { name, device, kernel: Entry::Mapped(kernel), input: input.to_vec(), out, threads }
    };
    sm90a::ALL.iter().map(primitive).collect()
}

impl Primitive {
    fn set(&self) -> Set {
        match self.kernel {
            Entry::Plain(_) => Set::Plain,
            Entry::Mapped(_) => Set::Sm90a,
        }
    }

    /// Of a launch: the tiles of a product are the most.
    fn shared_bytes(&self) -> u32 {
        match self.set() {
            Set::Plain => 2048,
            Set::Sm90a => 5 * 8192,
        }
    }

    /// What it writes, or what went wrong; from its source, or from a program.
    fn run(&self, program: Option<&Program>) -> Result<Vec<u32>, String> {
        match self.kernel {
            Entry::Plain(kernel) => self.run_as(kernel, program, |input, out| Buffers { input, out }),
            Entry::Mapped(kernel) => self.run_as(kernel, program, |input, out| {
                self.mapped(input, out, |at| {
                    TensorMap::encode(at, TENSOR, STRIDES, TENSOR_BOX, Swizzle::Bytes128).expect("a legal map")
                })
            }),
        }
    }

    fn run_as<P: bytemuck::NoUninit>(
        &self,
        kernel: Kernel<P>,
        program: Option<&Program>,
        params: impl Fn(u64, u64) -> P,
    ) -> Result<Vec<u32>, String> {
        let mut out = vec![0; self.out];
        let mut launch = Launch::new(kernel, [1; 3], self.threads).shared_bytes(self.shared_bytes());
        if let Some(program) = program {
            launch = launch.program(program);
        }
        let params = params(launch.input("in", &self.input), launch.output("out", &mut out));
        launch.run(&params).map_err(|fault| fault.to_string())?;
        drop(launch);
        Ok(out)
    }

    /// The parameter block of one with tensor maps, for the side that is a tensor.
    fn mapped(&self, input: u64, out: u64, mut encode: impl FnMut(u64) -> TensorMap) -> MappedBuffers {
        let mut map = |address, words| if words == TENSOR_WORDS { encode(address) } else { TensorMap::zeroed() };
        MappedBuffers { from: map(input, self.input.len()), to: map(out, self.out), input, out, unused: [0; 6] }
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

/// The PTX of primitives of one set, from the headers in `kernels`; or what nvcc says against them.
fn ptx(nvcc: &Nvcc, set: Set, of: &[Primitive], kernels: &Path, folder: &Path) -> Result<String, String> {
    fs::create_dir_all(folder).expect("cargo's folder takes another");
    let (stem, params) = (set.stem(), set.params());
    let mut source = format!("#include \"{stem}.cuh\"\n");
    for Primitive { name, device, threads, .. } in of.iter().filter(|primitive| primitive.set() == set) {
        let _ = writeln!(
            source,
            "extern \"C\" __global__ void __launch_bounds__({threads}, 1) \
             primitive_{name}(const __grid_constant__ {params} p) {{ {device}(p); }}"
        );
    }
    let (unit, ptx) = (folder.join(format!("{stem}.cu")), folder.join(format!("{stem}.ptx")));
    fs::write(&unit, source).expect("the folder takes a file");
    let tests = root().join("simt/tests/kernels");
    let output = nvcc.ptx(set.architecture(), &[kernels, &tests], &unit, &ptx).output().expect("nvcc runs");
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
    let all = primitives();
    let ptx = Set::ALL.map(|set| {
        let ptx = ptx(&nvcc, set, &all, &root().join("kernels"), &scratch("as_it_is"));
        ptx.unwrap_or_else(|said| panic!("{said}"))
    });
    for primitive in all {
        let ptx = &ptx[primitive.set() as usize];
        let program = Program::parse(ptx, &format!("primitive_{}", primitive.name)).expect("all of it is known");
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

/// The GPU that the stand-in driver has: the newest of the primitives'.
const STAND_IN_DEVICES: (&str, &str) = ("SIMT_DRIVER_DEVICES", "sm_90");

#[test]
fn a_driver_runs_the_primitives_and_is_recorded() {
    let Some((library, folder)) = driver() else { return left_out("recording primitives: there is no driver") };
    if folder.is_none() && std::env::var_os(STAND_IN_DEVICES.0).is_none() {
        // The stand-in asks its environment: a process of its own.
        let mut again = Command::new(std::env::current_exe().expect("a program knows its own path"));
        again.args(["--exact", "a_driver_runs_the_primitives_and_is_recorded", "--nocapture"]);
        let output = again.env(STAND_IN_DEVICES.0, STAND_IN_DEVICES.1).output().expect("it starts again");
        let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
        assert!(output.status.success() && said.contains("1 passed"), "{said}");
        return;
    }
    let gpu = gpu::Gpu::open(library).unwrap_or_else(|error| panic!("{library}: {error}"));
    let mut text = format!("# {}\n", gpu.name);
    let all = primitives();
    for set in Set::ALL {
        if set == Set::Sm90a && gpu.compute_capability != (9, 0) {
            assert!(folder.is_some(), "the stand-in is asked for {}", STAND_IN_DEVICES.1);
            left_out(&format!(
                "primitives of sm_90a: this GPU is sm_{}{}",
                gpu.compute_capability.0, gpu.compute_capability.1
            ));
            continue;
        }
        // A machine with a GPU need not have nvcc: scripts/gpu-bundle takes the PTX along.
        let mut ptx = match std::env::var_os("SIMT_PTX") {
            Some(folder) => fs::read_to_string(Path::new(&folder).join(set.stem()).with_extension("ptx"))
                .expect("the PTX can be read"),
            None => {
                let Some(nvcc) = find_nvcc() else { return };
                let ptx = ptx(&nvcc, set, &all, &root().join("kernels"), &scratch("recorded"));
                ptx.unwrap_or_else(|said| panic!("{said}"))
            }
        };
        ptx.push('\0');
        let module = gpu.load(&ptx).unwrap_or_else(|error| panic!("{library}, {}: {error}", set.stem()));
        for primitive in all.iter().filter(|primitive| primitive.set() == set) {
            let out = gpu.run(&module, primitive).unwrap_or_else(|error| panic!("{}: {error}", primitive.name));
            let words: Vec<String> = out.iter().map(|word| format!("{word:x}")).collect();
            let _ = writeln!(text, "{} {}", primitive.name, words.join(" "));
            if folder.is_none() {
                assert_eq!(recorded(&text, primitive.name), primitive.run(None).ok(), "{}", primitive.name);
            }
        }
    }
    if let Some(folder) = folder {
        fs::create_dir_all(&folder).expect("the folder can be made");
        fs::write(folder.join("primitives.txt"), text).expect("the recording can be written");
    }
}

#[test]
fn every_instruction_of_the_contract_has_a_primitive() {
    let read = |path: &str| fs::read_to_string(root().join(path)).expect("it is there");
    let kernels = ["primitives.cuh", "primitives_sm90a.cuh", "warpgroup.h"];
    let kernels = kernels.map(|name| read(&format!("simt/tests/kernels/{name}"))).concat();
    let called = |name: &str| ["(", "<"].iter().any(|next| kernels.contains(&format!("ptx::{name}{next}")));
    let contract = read("kernels/ptx/contract.h");
    let functions = contract.lines().filter_map(|line| line.strip_prefix("PTX_FUNCTION ")?.split('(').next());
    let mut names: Vec<&str> = functions.filter_map(|head| head.split([' ', '*']).next_back()).collect();
    names.sort_unstable();
    names.dedup();
    assert!(names.len() >= 45, "{names:?}");
    let missing: Vec<&str> = names.into_iter().filter(|name| !called(name)).collect();
    assert!(missing.is_empty(), "no primitive calls {missing:?}");
    // And each width that the products are compiled for.
    let asm = read("kernels/ptx/asm_sm90a.h");
    let widths: Vec<&str> =
        asm.lines().filter_map(|line| line.strip_prefix("PTX_WGMMA_BOTH(")?.split(',').next()).collect();
    assert!(widths.len() >= 10, "{widths:?}");
    for (width, element) in widths.iter().flat_map(|width| ["f16", "bf16"].map(|element| (width, element))) {
        let name = format!("wgmma_{width}_{element}");
        assert!(primitives().iter().any(|primitive| primitive.name == name), "there is no {name}");
    }
}

#[test]
fn every_mutant_of_asm_h_is_caught() {
    assert_caught("asm.h", MUTANTS, Set::Plain, plain_primitives(), 18);
}

#[test]
fn every_mutant_of_asm_sm90a_h_is_caught() {
    let mut of = sm90a_primitives();
    // Widths differ in lists alone; these two have between them what the mutants touch.
    of.retain(|primitive| {
        !primitive.name.starts_with("wgmma") || ["_40_", "_112_"].iter().any(|n| primitive.name.contains(n))
    });
    assert_caught("asm_sm90a.h", MUTANTS_SM90A, Set::Sm90a, of, 26);
}

/// Some primitive shows each mutant of a header, and so many of them by running.
fn assert_caught(header: &str, mutants: &[(&str, &str, &str)], set: Set, of: Vec<Primitive>, running: usize) {
    let Some(nvcc) = find_nvcc() else { return };
    let folder = scratch(header);
    let _ = fs::remove_dir_all(&folder);
    let original = fs::read_to_string(root().join("kernels/ptx").join(header)).expect("it is there");
    let expected: Vec<Vec<u32>> =
        of.iter().map(|primitive| primitive.run(None).expect("the source is right")).collect();
    let (mut missed, mut run) = (Vec::new(), 0);
    for (n, (what, from, to)) in mutants.iter().enumerate() {
        assert!(original.contains(from), "{what}: {header} does not say {from}");
        let kernels = folder.join(n.to_string());
        fs::create_dir_all(kernels.join("ptx")).expect("a folder");
        for name in ["contract.h", "asm.h", "asm_sm90a.h"] {
            fs::copy(root().join("kernels/ptx").join(name), kernels.join("ptx").join(name)).expect("a copy");
        }
        fs::write(kernels.join("ptx").join(header), original.replace(from, to)).expect("a file");
        let caught = match ptx(&nvcc, set, &of, &kernels, &kernels) {
            Err(_) => Some("refused by nvcc"),
            Ok(ptx) => of.iter().zip(&expected).find_map(|(primitive, expected)| {
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
    assert!(run >= running, "only {run} mutants of {header} got as far as running");
    assert!(missed.is_empty(), "nothing notices: {missed:?}");
}
