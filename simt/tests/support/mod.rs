//! What the test files share: declaring kernels, finding lines in their sources, a small generator of inputs.

#![allow(dead_code)] // each test file uses its part

use bytemuck::{Pod, Zeroable};
use simt::{Fault, FaultKind, Kernel, Launch, Report, TensorMap};

/// Declares entry points of tests/kernels as constants of the same name.
macro_rules! kernels {
    ($params:ty: $($name:ident)*) => {
        mod entry {
            unsafe extern "C" { $(pub fn $name(params: *const std::ffi::c_void);)* }
        }
        $(
            #[allow(non_upper_case_globals)]
            // SAFETY: tests/kernels exports it for these parameters; only correct kernels are run unchecked.
            const $name: simt::Kernel<$params> = unsafe { simt::Kernel::new(entry::$name) };
        )*
    };
}
pub(crate) use kernels;

/// tests/kernels/buffers.h
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Buffers {
    pub input: u64,
    pub out: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct MappedBuffers {
    pub from: TensorMap,
    pub to: TensorMap,
    pub input: u64,
    pub out: u64,
    pub unused: [u64; 6],
}

/// A launch over one input and one output, as the small kernels take it.
pub struct Small<'a> {
    pub kernel: Kernel<Buffers>,
    pub input: &'a [u32],
    pub out: &'a mut [u32],
    pub blocks: u32,
    pub threads: u32,
    pub shared_bytes: u32,
    pub seed: u64,
    pub workers: u32,
}

impl<'a> Small<'a> {
    /// One block of 128 threads with 4096 bytes of shared memory.
    pub fn new(kernel: Kernel<Buffers>, input: &'a [u32], out: &'a mut [u32]) -> Self {
        Self { kernel, input, out, blocks: 1, threads: 128, shared_bytes: 4096, seed: 1, workers: 1 }
    }

    pub fn run(self) -> Result<Report, Fault> {
        let mut launch = Launch::new(self.kernel, [self.blocks, 1, 1], self.threads)
            .shared_bytes(self.shared_bytes)
            .seed(self.seed)
            .workers(self.workers);
        let params = Buffers { input: launch.input("in", self.input), out: launch.output("out", self.out) };
        launch.run(&params)
    }
}

/// Runs a small kernel over 0, 1, 2, … and returns its output.
pub fn outputs(kernel: Kernel<Buffers>, words: usize) -> Vec<u32> {
    let input: Vec<u32> = (0..512).collect();
    let mut out = vec![0; words];
    Small::new(kernel, &input, &mut out).run().unwrap_or_else(|fault| panic!("{fault}"));
    out
}

/// The report of a small kernel that must fail.
pub fn fault_of(kernel: Kernel<Buffers>) -> Fault {
    let input: Vec<u32> = (0..512).collect();
    let mut out = vec![0; 512];
    Small::new(kernel, &input, &mut out).run().expect_err("a fault")
}

/// The report is of this kind and names the source lines that carry these marks, in any order.
#[track_caller]
pub fn assert_fault(fault: &Fault, kind: FaultKind, file: &str, marks: &[&str]) {
    assert_eq!(fault.kind, kind, "{fault}");
    for mark in marks {
        let place = line_of(file, mark);
        // The place ends where the number does.
        let named = fault
            .message
            .match_indices(&place)
            .any(|(i, _)| !fault.message[i + place.len()..].starts_with(|c: char| c.is_ascii_digit()));
        assert!(named, "`{place}` ({mark}) is not in the report: {fault}");
    }
}

/// "file:line" of the only line of tests/kernels/`file` with this mark.
pub fn line_of(file: &str, mark: &str) -> String {
    let path = format!("{}/tests/kernels/{file}", env!("CARGO_MANIFEST_DIR"));
    let source = std::fs::read_to_string(path).expect("the kernel's source");
    let mut lines = source.lines().zip(1..).filter(|(line, _)| line.contains(mark)).map(|(_, number)| number);
    let number = lines.next().unwrap_or_else(|| panic!("no line with `{mark}` in {file}"));
    assert_eq!(lines.next(), None, "`{mark}` stands twice in {file}");
    format!("{file}:{number}")
}

/// A small deterministic generator (xorshift64*), enough for inputs.
pub struct Numbers(pub u64);

impl Numbers {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A whole number from -limit to limit.
    pub fn small(&mut self, limit: i64) -> f32 {
        ((self.next() >> 33) as i64 % (2 * limit + 1) - limit) as f32
    }
}

/// Small whole numbers, which f16 and bf16 hold exactly, as bits.
pub fn f16_bits(whole: f32) -> u16 {
    if whole == 0.0 {
        return 0;
    }
    let bits = whole.to_bits();
    ((bits >> 16 & 0x8000) | (((bits >> 23 & 0xff) + 15 - 127) << 10) | (bits >> 13 & 0x3ff)) as u16
}

pub fn bf16_bits(whole: f32) -> u16 {
    (whole.to_bits() >> 16) as u16
}
