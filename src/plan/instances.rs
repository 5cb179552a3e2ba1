//! The table of kernel instances: the only list of what can run.
//!
//! Dispatch looks up in it, the build compiles device code from it, and the README's support table is printed from it.
//! Only the standard library and the words of problem/dtype.rs, because the build script reads this file too.

use crate::problem::{DType, Direction};
use std::fmt::Write;

/// Who computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Engine {
    /// Naive, in f64: the oracle that the others are held against.
    Reference,
    /// Tiled, on all processor cores.
    Cpu,
    /// The CUDA kernels' source, run on the CPU; for tests and the command line.
    Emulated,
    /// An NVIDIA GPU.
    Cuda,
}

impl Engine {
    /// All engines.
    pub const ALL: [Engine; 4] = [Engine::Reference, Engine::Cpu, Engine::Emulated, Engine::Cuda];

    /// The name on the command line: `reference`, `cpu`, `emulated`, `cuda`.
    pub const fn name(self) -> &'static str {
        match self {
            Engine::Reference => "reference",
            Engine::Cpu => "cpu",
            Engine::Emulated => "emulated",
            Engine::Cuda => "cuda",
        }
    }
}

/// One kernel and what it takes.
#[derive(Debug)]
pub struct Instance {
    /// Name of the algorithm; for device code also of its file in kernels/.
    pub kernel: &'static str,
    /// Engines that run it.
    pub engines: &'static [Engine],
    /// Forward or backward.
    pub direction: Direction,
    /// Types of q, k, v and out.
    pub dtypes: &'static [DType],
    /// Head dim and value dim are multiples of this.
    pub head_dim_step: usize,
    /// Largest head dim and value dim.
    pub max_head_dim: usize,
    /// Queries of one tile.
    pub block_q: usize,
    /// Keys of one tile.
    pub block_kv: usize,
    /// Whether two runs on one machine give the same bits.
    pub deterministic: bool,
    /// What is particular to device code.
    pub device: Option<DeviceCode>,
}

/// One translation unit of device code.
#[derive(Debug)]
pub struct DeviceCode {
    /// Oldest compute capability that runs it.
    pub compute_capability: (u32, u32),
    /// Threads of a block.
    pub threads: u32,
    /// Blocks that have room on a multiprocessor at once, as far as registers go: a thread has its share and no more.
    pub resident_blocks: u32,
    /// Bytes of dynamic shared memory with one branch, and with several.
    pub shared_bytes: [u32; 2],
    /// And for every 16 keys, if all keys stay in shared memory; a branch then has at most `block_kv` of them, padded.
    pub shared_bytes_per_key_tile: u32,
    /// The kernel's struct of constants, and its function.
    template: [&'static str; 2],
}

/// Branches of one launch of device code, and segments of all of them together; kernels/params.h has the same numbers.
pub const MAX_BRANCHES: usize = 32;
/// See [`MAX_BRANCHES`].
pub const MAX_SEGMENTS: usize = 32;

const FLOATS: &[DType] = &[DType::F16, DType::BF16, DType::F32];

/// Queries of a block in both kernels for sm_80: four warps of 16.
const BLOCK_Q: usize = 64;

/// A row of kernels/forward_streaming_sm80.cuh: tiles of `width` elements and `block_kv` keys.
const fn streaming_sm80(dtypes: &'static [DType], width: usize, block_kv: usize) -> Instance {
    // Two stages of keys and values in 16-bit elements; Q beside them; the sum of the branches in f32, in the place of Q up
    // to a width of 160, behind it above.
    let (stages, q, sum) = (2 * 2 * block_kv * width * 2, BLOCK_Q * width * 2, BLOCK_Q * width * 4);
    let several = if width <= 160 { stages + sum } else { stages + q + sum };
    Instance {
        kernel: "forward_streaming_sm80",
        block_kv,
        device: Some(DeviceCode {
            compute_capability: (8, 0),
            threads: 128,
            resident_blocks: resident_blocks(width),
            shared_bytes: [(stages + q) as u32, several as u32],
            shared_bytes_per_key_tile: 0,
            template: ["StreamingConfig", "forward_streaming"],
        }),
        ..sm80(dtypes, width)
    }
}

/// A row of kernels/forward_short_sm80.cuh: tiles of `width` elements, branches of at most `row_keys` keys.
const fn short_sm80(dtypes: &'static [DType], width: usize, row_keys: usize) -> Instance {
    // A ring of two stages of queries; keys and values, 16 rows each.
    let (ring, key_tile) = (2 * BLOCK_Q * width * 2, 2 * 16 * width * 2);
    Instance {
        kernel: "forward_short_sm80",
        block_kv: row_keys,
        device: Some(DeviceCode {
            compute_capability: (8, 0),
            threads: 128,
            resident_blocks: resident_blocks(width),
            shared_bytes: [ring as u32; 2],
            shared_bytes_per_key_tile: key_tile as u32,
            template: ["ShortConfig", "forward_short"],
        }),
        ..sm80(dtypes, width)
    }
}

/// Narrow tiles leave registers for a third block; without the bound ptxas takes a few more, or spills to reach it.
const fn resident_blocks(width: usize) -> u32 {
    if width <= 64 { 3 } else { 2 }
}

/// What both have in common.
const fn sm80(dtypes: &'static [DType], width: usize) -> Instance {
    Instance {
        kernel: "",
        engines: &[Engine::Cuda, Engine::Emulated],
        direction: Direction::Forward,
        dtypes,
        head_dim_step: 8,
        max_head_dim: width,
        block_q: BLOCK_Q,
        block_kv: 0,
        deterministic: true,
        device: None,
    }
}

const F16: &[DType] = &[DType::F16];
const BF16: &[DType] = &[DType::BF16];

/// Every kernel there is. Of the rows that take a problem the first one runs it: keys that stay in shared memory before
/// keys that stream through it, narrow tiles before wide ones.
pub const INSTANCES: &[Instance] = &[
    short_sm80(F16, 40, 96),
    short_sm80(F16, 64, 96),
    short_sm80(F16, 80, 96),
    short_sm80(F16, 96, 96),
    short_sm80(F16, 128, 96),
    short_sm80(F16, 160, 96),
    short_sm80(BF16, 40, 96),
    short_sm80(BF16, 64, 96),
    short_sm80(BF16, 80, 96),
    short_sm80(BF16, 96, 96),
    short_sm80(BF16, 128, 96),
    short_sm80(BF16, 160, 96),
    streaming_sm80(F16, 40, 64),
    streaming_sm80(F16, 64, 64),
    streaming_sm80(F16, 80, 64),
    streaming_sm80(F16, 96, 64),
    streaming_sm80(F16, 128, 32),
    streaming_sm80(F16, 160, 32),
    streaming_sm80(F16, 256, 16),
    streaming_sm80(BF16, 40, 64),
    streaming_sm80(BF16, 64, 64),
    streaming_sm80(BF16, 80, 64),
    streaming_sm80(BF16, 96, 64),
    streaming_sm80(BF16, 128, 32),
    streaming_sm80(BF16, 160, 32),
    streaming_sm80(BF16, 256, 16),
    Instance {
        kernel: "cpu_forward_streaming",
        engines: &[Engine::Cpu],
        direction: Direction::Forward,
        dtypes: FLOATS,
        head_dim_step: 1,
        // Keeps the scratch of one thread under 64 MB.
        max_head_dim: 16384,
        block_q: 64,
        block_kv: 128,
        deterministic: true,
        device: None,
    },
    Instance {
        kernel: "reference_forward",
        engines: &[Engine::Reference],
        direction: Direction::Forward,
        dtypes: FLOATS,
        head_dim_step: 1,
        max_head_dim: usize::MAX,
        block_q: 1,
        block_kv: usize::MAX,
        deterministic: true,
        device: None,
    },
    Instance {
        kernel: "reference_backward",
        engines: &[Engine::Reference],
        direction: Direction::Backward,
        dtypes: FLOATS,
        head_dim_step: 1,
        max_head_dim: usize::MAX,
        block_q: 1,
        block_kv: usize::MAX,
        deterministic: true,
        device: None,
    },
];

impl Instance {
    /// Whether `engine` runs it.
    pub fn runs_on(&self, engine: Engine) -> bool {
        self.engines.contains(&engine)
    }

    /// Name of the row, unique in the table; of device code also the name of its entry point.
    pub fn symbol(&self) -> String {
        match self.device {
            Some(_) => format!("{}_{}_w{}", self.kernel, self.dtypes[0].name(), self.max_head_dim),
            None => self.kernel.to_string(),
        }
    }

    /// The source of a row of device code: one entry point, and the table's numbers asserted against the kernel's.
    pub fn translation_unit(&self) -> Option<String> {
        let device = self.device.as_ref()?;
        let Instance { kernel, block_q, block_kv, max_head_dim: width, .. } = self;
        let element = if matches!(self.dtypes[0], DType::F16) { "HalfElement" } else { "Bfloat16Element" };
        let (symbol, threads, [config, function]) = (self.symbol(), device.threads, device.template);
        let blocks = device.resident_blocks;
        let ([one, several], per_tile) = (device.shared_bytes, device.shared_bytes_per_key_tile);
        Some(format!(
            "#include \"{kernel}.cuh\"\n\
             #include \"params_layout.h\"\n\
             using Config = {config}<{element}, {width}, {block_kv}>;\n\
             static_assert(Config::BLOCK_Q == {block_q} && Config::THREADS == {threads}, \"src/plan/instances.rs\");\n\
             static_assert(Config::shared_bytes(1, 0) == {one}, \"src/plan/instances.rs\");\n\
             static_assert(Config::shared_bytes(2, 0) == {several}, \"src/plan/instances.rs\");\n\
             static_assert(Config::shared_bytes(1, 1) == {one} + {per_tile}, \"src/plan/instances.rs\");\n\
             extern \"C\" __global__ void __launch_bounds__({threads}, {blocks}) {symbol}(const __grid_constant__ ForwardParams p) {{\n  \
             {function}<Config>(p);\n\
             }}\n"
        ))
    }
}

/// The table as Markdown, for the README: one line per kernel, whatever its widths.
pub fn support_table() -> String {
    let mut table = String::from(
        "| kernel | engine | direction | q, k, v, out | head dim | tile widths | deterministic |\n\
         |---|---|---|---|---|---|---|\n",
    );
    let mut kernels: Vec<&str> = INSTANCES.iter().map(|row| row.kernel).collect();
    kernels.dedup();
    for kernel in kernels {
        let rows: Vec<&Instance> = INSTANCES.iter().filter(|row| row.kernel == kernel).collect();
        let mut dtypes: Vec<&str> = rows.iter().flat_map(|row| row.dtypes).map(|dtype| dtype.name()).collect();
        dtypes.dedup();
        let widest = rows.iter().map(|row| row.max_head_dim).max().unwrap_or(0);
        let head_dim = match (rows[0].head_dim_step, widest) {
            (_, usize::MAX) => "any".to_string(),
            (1, widest) => format!("1 to {widest}"),
            (step, widest) => format!("multiples of {step} to {widest}"),
        };
        let mut widths: Vec<String> = Vec::new();
        for row in rows.iter().filter(|row| row.device.is_some()) {
            let width = row.max_head_dim.to_string();
            if !widths.contains(&width) {
                widths.push(width);
            }
        }
        let _ = writeln!(
            table,
            "| `{kernel}` | {} | {} | {} | {head_dim} | {} | {} |",
            rows[0].engines.iter().map(|engine| engine.name()).collect::<Vec<_>>().join(", "),
            rows[0].direction.name(),
            dtypes.join(", "),
            if widths.is_empty() { "–".to_string() } else { widths.join(", ") },
            if rows.iter().all(|row| row.deterministic) { "yes" } else { "no" },
        );
    }
    table
}
