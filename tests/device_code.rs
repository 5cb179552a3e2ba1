//! Every row of device code as the build compiled it: no warning, no spill, no stack, nothing serialised, PTX that the
//! oldest driver promised can load, no more bytes than promised. docs/kernels.md shows what each row takes.
#![cfg(feature = "cuda")]

use fused_attention::{Form, INSTANCES, Instance, Target, cuda};
use std::env;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// Of CUDA 13.0, which drivers of the 580 series are.
const NEWEST_PTX: (u32, u32) = (9, 0);

/// Of one thread, and of one multiprocessor.
const MOST_REGISTERS: u32 = 255;
const REGISTERS: u32 = 65536;

/// Of all rows for one target, as they are embedded.
const MOST_EMBEDDED: u64 = 8 << 20;

/// A row that nvcc compiled to machine code.
struct Compiled {
    symbol: String,
    target: String,
    shared_bytes: [u32; 2],
    /// That the table leaves a thread.
    most_registers: u32,
    registers: u32,
    stack_bytes: u32,
    spill_bytes: u32,
    machine_code_bytes: u64,
    faults: Vec<String>,
}

/// What the build wrote beside the image of a row for a target.
struct Files {
    symbol: String,
    target: Target,
    ptx: PathBuf,
    /// Of the others.
    stem: PathBuf,
}

impl Files {
    /// Of every row for every target, and how long compiling them took.
    fn all() -> (String, Vec<Files>) {
        let list = fs::read_to_string(concat!(env!("OUT_DIR"), "/images.list")).expect("the build wrote the list");
        let mut lines = list.lines();
        let took = lines.next().unwrap_or_default().to_string();
        let file = |line: &str| {
            let mut words = line.split('\t');
            let mut word = || words.next().expect("symbol, target, two paths").to_string();
            let (symbol, target, ptx, stem) = (word(), word(), word(), word());
            Files { symbol, target: Target::parse(&target).expect("a target"), ptx: ptx.into(), stem: stem.into() }
        };
        (took, lines.map(file).collect())
    }

    fn path(&self, ending: &str) -> PathBuf {
        let mut path = self.stem.clone().into_os_string();
        path.push(format!(".{ending}"));
        path.into()
    }
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn every_row_compiles_clean() {
    let Some(toolkit) = cuda::toolkit() else {
        assert!(!set("FUSED_ATTENTION_REQUIRE_KERNELS"), "built without nvcc; run scripts/get-nvcc");
        return left_out("device code as nvcc compiles it: the build found none; run scripts/get-nvcc");
    };
    let (took, files) = Files::all();
    let rows: Vec<&Instance> = INSTANCES.iter().filter(|row| row.device.is_some()).collect();
    assert!(!rows.is_empty(), "the table has no device code");
    let mut compiled = Vec::new();
    for target in toolkit.targets {
        let of_target = || files.iter().filter(|file| file.target == *target);
        let taken = rows.iter().filter(|row| row.device.as_ref().is_some_and(|code| code.compiles_for(target)));
        let mut symbols: Vec<String> = taken.map(|row| row.symbol()).collect();
        let mut there: Vec<String> = of_target().map(|file| file.symbol.clone()).collect();
        symbols.sort();
        there.sort();
        assert_eq!(there, symbols, "{target}");
        let embedded: u64 = of_target().map(|file| fs::metadata(file.path("z")).expect("the image").len()).sum();
        println!("{target}: {} rows, {embedded} bytes embedded", there.len());
        assert!(embedded <= MOST_EMBEDDED, "{target} takes {embedded} bytes");
        if target.form != Form::Ptx {
            let in_order = rows.iter().flat_map(|row| of_target().filter(|file| file.symbol == row.symbol()));
            compiled.extend(in_order.map(|file| Compiled::new(file, &rows)));
        }
    }
    for row in &compiled {
        println!("{:>3} registers  {:>6} bytes  {} {}", row.registers, row.machine_code_bytes, row.symbol, row.target);
    }
    println!("compiled by nvcc {}.{} in {took}", toolkit.version.0, toolkit.version.1);
    let faults: Vec<&str> = compiled.iter().flat_map(|row| &row.faults).map(String::as_str).collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    check_page(toolkit.version, toolkit.targets, &compiled);
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

impl Compiled {
    fn new(file: &Files, rows: &[&Instance]) -> Self {
        let row = rows.iter().find(|row| row.symbol() == file.symbol).expect("a row of the table");
        let code = row.device.as_ref().expect("a row of device code");
        let mut compiled = Compiled {
            symbol: file.symbol.clone(),
            target: file.target.to_string(),
            shared_bytes: code.shared_bytes,
            most_registers: MOST_REGISTERS.min(REGISTERS / (code.threads * code.resident_blocks)),
            registers: 0,
            stack_bytes: 0,
            spill_bytes: 0,
            machine_code_bytes: 0,
            faults: Vec::new(),
        };
        let cubin = fs::read(file.path("cubin")).expect("the build kept the machine code");
        compiled.inspect(&text(&file.path("log")), &text(&file.ptx), &cubin);
        compiled
    }

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
        self.registers = figure(" registers", self.most_registers);
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
fn check_page(version: (u32, u32), targets: &[Target], compiled: &[Compiled]) {
    const START: &str = "<!-- kernels: scripts/update-docs -->\n";
    const END: &str = "<!-- end of kernels -->";
    let script = fs::read_to_string(root().join("scripts/get-nvcc")).expect("the script is there");
    let pinned = script.lines().find_map(|line| line.strip_prefix("VERSION=")).expect("it pins a version");
    let targets: Vec<String> = targets.iter().map(Target::to_string).collect();
    if !pinned.starts_with(&format!("{}.{}.", version.0, version.1)) || targets != ["sm_80", "compute_80", "sm_90a"] {
        assert!(
            !set("UPDATE_DOCS"),
            "docs/kernels.md is nvcc {pinned}'s for the default targets: set NVCC=.cuda/bin/nvcc"
        );
        return left_out(&format!("docs/kernels.md: it is of nvcc {pinned} and the default targets"));
    }

    let mut table = String::from(
        "| kernel | target | registers | shared bytes, one branch / several | stack bytes | spilled bytes | machine code bytes |\n\
         |---|---|---|---|---|---|---|\n",
    );
    for row in compiled {
        let Compiled { symbol, target, registers, shared_bytes: [one, several], stack_bytes, spill_bytes, .. } = row;
        let _ = writeln!(
            table,
            "| `{symbol}` | {target} | {registers} | {one} / {several} | {stack_bytes} | {spill_bytes} | {} |",
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
        // Not assert_eq, whose message would be both tables.
        assert!(page[start..end] == table, "docs/kernels.md is stale: run scripts/update-docs");
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
        target: "sm_80".to_string(),
        shared_bytes: [0; 2],
        most_registers: 170,
        registers: 0,
        stack_bytes: 0,
        spill_bytes: 0,
        machine_code_bytes: 0,
        faults: Vec::new(),
    };
    row.inspect(SAID, ".version 9.1\n.target sm_80\n", b"no cubin");
    assert_eq!((row.registers, row.stack_bytes, row.spill_bytes), (255, 16, 20));
    for fault in [
        "C7510",
        "ptxas warning",
        "255 registers",
        "16 bytes stack",
        "8 bytes spill stores",
        "12 bytes spill",
        "4096",
        "(9, 1)",
    ] {
        assert!(row.faults.iter().any(|told| told.contains(fault)), "{fault} is not in {:?}", row.faults);
    }
    assert_eq!(row.faults.len(), 9, "{:?}", row.faults);
    assert_eq!(ptx_version(".version 8.7\n"), Some((8, 7)));
    assert_eq!((ptx_version(""), before(SAID, " parsecs")), (None, None));
}
