//! Every row of device code through nvcc and ptxas: no warning, no spill, no stack, nothing serialised, PTX that the
//! oldest driver promised can load. docs/kernels.md shows what each row takes.

use fused_attention::{DeviceCode, INSTANCES};
use rayon::prelude::*;
use std::collections::HashSet;
use std::env;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// What src/plan/params.rs takes from the table.
mod instances {
    pub use fused_attention::{MAX_BRANCHES, MAX_SEGMENTS};
}
#[path = "../src/plan/params.rs"]
#[allow(dead_code, reason = "the assertions alone are wanted")]
mod params;

/// Of CUDA 13.0, which drivers of the 580 series are.
const NEWEST_PTX: (u32, u32) = (9, 0);

/// That a thread has.
const MOST_REGISTERS: u32 = 255;

/// A row that nvcc compiled.
struct Compiled {
    symbol: String,
    shared_bytes: [u32; 2],
    registers: u32,
    stack_bytes: u32,
    spill_bytes: u32,
    machine_code_bytes: u64,
    took: Duration,
    faults: Vec<String>,
}

#[test]
fn every_row_compiles_clean() {
    let Some(nvcc) = find_nvcc() else {
        assert!(!set("FUSED_ATTENTION_REQUIRE_NVCC"), "no nvcc was found; run scripts/get-nvcc");
        return left_out("device code through nvcc: none was found; run scripts/get-nvcc");
    };
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("device_code");
    fs::create_dir_all(&folder).expect("cargo's folder takes another");
    fs::write(folder.join("params_layout.h"), params::assertions()).expect("the folder takes a file");

    // Engines share device code: one row of each symbol.
    let mut known = HashSet::new();
    let rows: Vec<_> = INSTANCES
        .iter()
        .filter_map(|row| Some((row.symbol(), row.device.as_ref()?, row.translation_unit()?)))
        .filter(|(symbol, ..)| known.insert(symbol.clone()))
        .collect();
    assert!(!rows.is_empty(), "the table has no device code");
    let start = Instant::now();
    let compiled: Vec<Compiled> =
        rows.par_iter().map(|(symbol, device, source)| compile(&nvcc, &folder, symbol, device, source)).collect();
    let took = start.elapsed();

    for row in &compiled {
        println!(
            "{:>5.1} s  {:>3} registers  {:>6} bytes  {}",
            row.took.as_secs_f64(),
            row.registers,
            row.machine_code_bytes,
            row.symbol
        );
    }
    let threads = rayon::current_num_threads();
    println!("{} rows in {:.1} s, {threads} at once, with {}", rows.len(), took.as_secs_f64(), nvcc.display());
    let faults: Vec<&str> = compiled.iter().flat_map(|row| &row.faults).map(String::as_str).collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    check_page(&nvcc, &compiled);
}

/// As build.rs finds it: NVCC, then the toolkit variables, then PATH, then the usual places, then `.cuda/` here.
fn find_nvcc() -> Option<PathBuf> {
    let toolkits = ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"].into_iter().filter_map(env::var_os);
    let toolkits = toolkits.map(|home| PathBuf::from(home).join("bin"));
    let path = env::var_os("PATH").map(|path| env::split_paths(&path).collect::<Vec<_>>()).unwrap_or_default();
    let usual = ["/usr/local/cuda/bin", "/opt/cuda/bin"].map(PathBuf::from);
    let folders = toolkits.chain(path).chain(usual).chain([root().join(".cuda/bin")]);
    let found = folders.map(|folder| folder.join(format!("nvcc{}", env::consts::EXE_SUFFIX)));
    env::var_os("NVCC").map(PathBuf::from).into_iter().chain(found).find(|nvcc| nvcc.is_file())
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn set(variable: &str) -> bool {
    env::var_os(variable).is_some_and(|value| value != "0")
}

fn left_out(what: &str) {
    // Not eprintln: the test harness would swallow it.
    let _ = writeln!(std::io::stderr(), "LEFT OUT: {what}");
}

/// `80`, `90a`: what a row is compiled for. From 9.0 on, kernels use what one architecture alone has.
fn architecture(device: &DeviceCode) -> String {
    let (major, minor) = device.compute_capability;
    format!("{major}{minor}{}", if major >= 9 { "a" } else { "" })
}

fn compile(nvcc: &Path, folder: &Path, symbol: &str, device: &DeviceCode, source: &str) -> Compiled {
    // A folder of its own, empty at first, for all that --keep leaves there: the PTX on the way to machine code.
    let folder = folder.join(symbol);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).expect("the folder takes another");
    let (unit, cubin) = (folder.join(format!("{symbol}.cu")), folder.join(format!("{symbol}.cubin")));
    fs::write(&unit, source).expect("the folder takes a file");
    let architecture = architecture(device);
    let start = Instant::now();
    let output = Command::new(nvcc)
        .args(["-std=c++17", "-cubin", "-lineinfo", "-Xptxas", "-v", "--keep", "--keep-dir"])
        .arg(&folder)
        .arg(format!("-gencode=arch=compute_{architecture},code=sm_{architecture}"))
        .arg("-I")
        .arg(root().join("kernels"))
        .arg("-I")
        .arg(folder.parent().expect("a folder in a folder"))
        .arg("-o")
        .args([&cubin, &unit])
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}", nvcc.display()));
    let took = start.elapsed();
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();

    let mut row = Compiled {
        symbol: symbol.to_string(),
        shared_bytes: device.shared_bytes,
        registers: 0,
        stack_bytes: 0,
        spill_bytes: 0,
        machine_code_bytes: 0,
        took,
        faults: Vec::new(),
    };
    if !output.status.success() {
        row.faults.push(format!("{symbol}: nvcc failed\n{said}"));
        return row;
    }
    let ptx = fs::read_to_string(cubin.with_extension("ptx")).unwrap_or_default();
    row.inspect(&said, &ptx, &fs::read(&cubin).unwrap_or_default());
    row
}

impl Compiled {
    /// Reads the figures, and collects all that should not be.
    fn inspect(&mut self, said: &str, ptx: &str, cubin: &[u8]) {
        let mut faults = Vec::new();
        // C75xx is ptxas's advice that it serialised asynchronous products.
        for line in said.lines().filter(|line| {
            let lower = line.to_lowercase();
            lower.contains("warning") || lower.contains("error") || line.contains("C75")
        }) {
            faults.push(line.trim().to_string());
        }
        let mut figure = |unit: &str, most: u32| {
            let Some(figure) = before(said, unit) else {
                faults.push(format!("ptxas tells no{unit}: {said}"));
                return 0;
            };
            if figure > most {
                faults.push(format!("{figure}{unit}, at most {most}"));
            }
            figure
        };
        self.registers = figure(" registers", MOST_REGISTERS);
        self.stack_bytes = figure(" bytes stack frame", 0);
        self.spill_bytes = figure(" bytes spill stores", 0) + figure(" bytes spill loads", 0);
        // Shared memory is dynamic; ptxas names the static one only where there is some.
        if let Some(bytes) = before(said, " bytes smem") {
            faults.push(format!("{bytes} bytes of static shared memory"));
        }
        match ptx_version(ptx) {
            Some(version) if version <= NEWEST_PTX => {}
            version => faults.push(format!("PTX of version {version:?}; {NEWEST_PTX:?} is the newest that loads")),
        }
        match machine_code_bytes(cubin) {
            Some(bytes) if bytes > 0 => self.machine_code_bytes = bytes,
            _ => faults.push("no machine code in the cubin".to_string()),
        }
        self.faults.extend(faults.into_iter().map(|fault| format!("{}: {fault}", self.symbol)));
    }
}

/// The numbers before each occurrence of `unit`, added up: one for the entry point, one for each function it calls.
fn before(said: &str, unit: &str) -> Option<u32> {
    let numbers = said.match_indices(unit).filter_map(|(end, _)| {
        let digits = said[..end].rfind(|c: char| !c.is_ascii_digit()).map_or(0, |at| at + 1);
        said[digits..end].parse::<u32>().ok()
    });
    numbers.reduce(|sum, number| sum + number)
}

fn ptx_version(ptx: &str) -> Option<(u32, u32)> {
    let version = ptx.lines().find_map(|line| line.strip_prefix(".version "))?;
    let (major, minor) = version.trim().split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Bytes in the sections `.text.…` of a cubin, which is a 64-bit little-endian ELF file.
fn machine_code_bytes(cubin: &[u8]) -> Option<u64> {
    let number = |at: usize, bytes: usize| -> Option<u64> {
        let field = cubin.get(at..at.checked_add(bytes)?)?;
        Some(field.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
    };
    const HEADER_BYTES: usize = 64;
    let (headers, count, names) = (number(0x28, 8)? as usize, number(0x3c, 2)? as usize, number(0x3e, 2)? as usize);
    let names = number(headers + names * HEADER_BYTES + 0x18, 8)? as usize;
    let mut bytes = 0;
    for header in (0..count).map(|n| headers + n * HEADER_BYTES) {
        let name = cubin.get(names + number(header, 4)? as usize..)?;
        if name.starts_with(b".text.") {
            bytes += number(header + 0x20, 8)?;
        }
    }
    Some(bytes)
}

/// Compares the figures with docs/kernels.md, or writes them there.
fn check_page(nvcc: &Path, compiled: &[Compiled]) {
    const START: &str = "<!-- kernels: scripts/update-docs -->\n";
    const END: &str = "<!-- end of kernels -->";
    let script = fs::read_to_string(root().join("scripts/get-nvcc")).expect("the script is there");
    let pinned = script.lines().find_map(|line| line.strip_prefix("VERSION=")).expect("it pins a version");
    let version = Command::new(nvcc).arg("--version").output().expect("nvcc ran before").stdout;
    if !String::from_utf8_lossy(&version).contains(&format!("V{pinned}\n")) {
        assert!(!set("UPDATE_DOCS"), "docs/kernels.md is nvcc {pinned}'s: set NVCC=.cuda/bin/nvcc");
        return left_out(&format!("docs/kernels.md against {}: it is nvcc {pinned}'s", nvcc.display()));
    }

    let mut table = String::from(
        "| kernel | registers | shared bytes, one branch / several | stack bytes | spilled bytes | machine code bytes |\n\
         |---|---|---|---|---|---|\n",
    );
    for row in compiled {
        let Compiled { symbol, registers, shared_bytes: [one, several], stack_bytes, spill_bytes, .. } = row;
        let _ = writeln!(
            table,
            "| `{symbol}` | {registers} | {one} / {several} | {stack_bytes} | {spill_bytes} | {} |",
            row.machine_code_bytes
        );
    }
    let path = root().join("docs/kernels.md");
    let page = fs::read_to_string(&path).expect("the page is there");
    let start = page.find(START).expect("the page has the start marker") + START.len();
    let end = page.find(END).expect("the page has the end marker");
    if set("UPDATE_DOCS") {
        fs::write(&path, format!("{}{table}{}", &page[..start], &page[end..])).expect("the page can be written");
    } else {
        assert_eq!(&page[start..end], table, "docs/kernels.md is stale: run scripts/update-docs");
    }
}

#[test]
fn figures_are_read_right() {
    const SAID: &str = "ptxas info    : 0 bytes gmem\n\
        ptxas info    : Compiling entry function 'f' for 'sm_80'\n\
        ptxas info    : Function properties for f\n    \
        16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n\
        ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized\n\
        ptxas warning : Value of threads per SM is out of range\n\
        ptxas info    : Used 255 registers, used 1 barriers, 4096 bytes smem, 400 bytes cmem[0]\n";
    let mut row = Compiled {
        symbol: "f".to_string(),
        shared_bytes: [0; 2],
        registers: 0,
        stack_bytes: 0,
        spill_bytes: 0,
        machine_code_bytes: 0,
        took: Duration::ZERO,
        faults: Vec::new(),
    };
    row.inspect(SAID, ".version 9.1\n.target sm_80\n", b"no cubin");
    assert_eq!((row.registers, row.stack_bytes, row.spill_bytes), (255, 16, 20));
    for fault in
        ["C7510", "ptxas warning", "16 bytes stack", "8 bytes spill stores", "12 bytes spill", "4096", "(9, 1)"]
    {
        assert!(row.faults.iter().any(|told| told.contains(fault)), "{fault} is not in {:?}", row.faults);
    }
    assert_eq!(row.faults.len(), 8, "{:?}", row.faults);
    assert_eq!(ptx_version(".version 8.7\n"), Some((8, 7)));
    assert_eq!((ptx_version(""), before(SAID, " parsecs")), (None, None));
}
