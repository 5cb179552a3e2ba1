//! The table of kernel instances: the only list of what can run.
//!
//! Dispatch looks up in it, the build compiles device code from it, and the README's support table is printed from it. Only the
//! standard library, the words of problem/dtype.rs and the shapes of rows (sm80.rs, sm90.rs), because the build script reads this
//! file too.

use super::sm80;
use super::sm90::{self, Tiles};
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
    /// Whether a plan may start with it; the others follow one that does.
    pub leads: bool,
    /// What is particular to device code.
    pub device: Option<DeviceCode>,
}

/// One translation unit of device code.
#[derive(Debug)]
pub struct DeviceCode {
    /// Oldest compute capability that runs it.
    pub compute_capability: (u32, u32),
    /// Whether no other runs it.
    pub specific: bool,
    /// Threads of a block.
    pub threads: u32,
    /// Blocks that have room on a multiprocessor at once, as far as registers go: a thread has its share and no more.
    pub resident_blocks: u32,
    /// Bytes of dynamic shared memory with one branch, and with several.
    pub shared_bytes: [u32; 2],
    /// And for every 16 keys, if all keys stay in shared memory; a branch then has at most `block_kv` of them, padded.
    pub shared_bytes_per_key_tile: u32,
    /// Fewest of such sixteens that shared memory is taken for.
    pub least_key_tiles: usize,
    /// And for every 16 of those keys with gradients that are wanted.
    pub shared_bytes_per_gradient_tile: u32,
    /// Whether it takes biases and masks, and scales that are not positive.
    pub biased: bool,
    /// Whether it takes a softcap.
    pub softcap: bool,
    /// Whether it copies by tensor maps, which not every tensor has.
    pub tensor_maps: bool,
    /// Whether it stores by one as well.
    pub stores_by_map: bool,
    /// Whether it takes causal rules and windows.
    pub positions: bool,
    /// Segments that it takes, of all branches together.
    pub max_segments: usize,
    /// Kernels that complete its work in launches of their own, in this order, each where there is something for it to do: the
    /// row of the same type that is wide enough.
    pub followers: &'static [&'static str],
    /// Kernel that does the same in blocks of fewer queries, where it has a row of the same type and width; where these end sooner,
    /// a plan starts with it.
    pub finer: Option<&'static str>,
    #[allow(dead_code, reason = "the build makes source of it")]
    pub(super) entry: EntryPoint,
}

impl DeviceCode {
    /// Bytes of dynamic shared memory of a block, for the sum of all segments' keys in sixteens, rounded up, and for those that have
    /// gradients.
    pub fn shared_bytes_for(&self, branches: usize, key_tiles: usize, gradient_tiles: usize) -> u32 {
        let bytes = |tiles: usize, each: u32| u32::try_from(tiles).unwrap_or(u32::MAX).saturating_mul(each);
        self.shared_bytes[usize::from(branches > 1)]
            .saturating_add(bytes(key_tiles.max(self.least_key_tiles), self.shared_bytes_per_key_tile))
            .saturating_add(bytes(gradient_tiles, self.shared_bytes_per_gradient_tile))
    }
}

/// How a row's entry point is made of its file.
#[derive(Debug)]
#[allow(dead_code, reason = "the build makes source of it")]
pub(super) struct EntryPoint {
    /// The function that one block runs, and the struct of kernels/params.h that it takes.
    pub(super) function: &'static str,
    pub(super) params: &'static str,
    /// The struct of its constants. The element is the first parameter; of kernels with tiles the second is their width and the
    /// third the rows of those that pass through shared memory.
    pub(super) config: &'static str,
    pub(super) rows: Option<usize>,
    /// The fourth and fifth parameter: warpgroups that multiply, and stages.
    pub(super) warpgroups: Option<[usize; 2]>,
}

/// Branches of one launch of device code, and segments of all of them together; kernels/params.h has the same numbers.
pub const MAX_BRANCHES: usize = 32;
/// See [`MAX_BRANCHES`].
pub const MAX_SEGMENTS: usize = 32;
/// Segments of one launch of a kernel that copies by tensor maps.
pub const MAX_MAPPED_SEGMENTS: usize = 8;
/// Sums of one launch of the kernel that adds up parts.
pub const MAX_SUMS: usize = 32;

const FLOATS: &[DType] = &[DType::F16, DType::BF16, DType::F32];

/// Every kernel there is. Of the rows that take a problem the first one runs it: keys that stay in shared memory before
/// keys that stream through it, fewer such keys before more, what one GPU alone has before what all have, plain logits
/// before any, narrow tiles before wide ones. Or it is the row in finer blocks that the first one names, where that ends sooner.
pub static INSTANCES: &[Instance] = &[
    sm90::forward_short(sm80::F16, 40, Tiles { block_kv: 112, consumers: 3, stages: 6 }),
    sm90::forward_short(sm80::F16, 64, Tiles { block_kv: 112, consumers: 3, stages: 6 }),
    sm90::forward_short(sm80::F16, 80, Tiles { block_kv: 112, consumers: 3, stages: 6 }),
    sm90::forward_short(sm80::F16, 96, Tiles { block_kv: 112, consumers: 3, stages: 6 }),
    sm90::forward_short(sm80::F16, 128, Tiles { block_kv: 112, consumers: 3, stages: 6 }),
    sm90::forward_short(sm80::F16, 160, Tiles { block_kv: 112, consumers: 2, stages: 4 }),
    sm90::forward_short(sm80::F16, 256, Tiles { block_kv: 112, consumers: 2, stages: 3 }),
    sm90::forward_short(sm80::BF16, 40, Tiles { block_kv: 112, consumers: 3, stages: 6 }),
    sm90::forward_short(sm80::BF16, 64, Tiles { block_kv: 112, consumers: 3, stages: 6 }),
    sm90::forward_short(sm80::BF16, 80, Tiles { block_kv: 112, consumers: 3, stages: 6 }),
    sm90::forward_short(sm80::BF16, 96, Tiles { block_kv: 112, consumers: 3, stages: 6 }),
    sm90::forward_short(sm80::BF16, 128, Tiles { block_kv: 112, consumers: 3, stages: 6 }),
    sm90::forward_short(sm80::BF16, 160, Tiles { block_kv: 112, consumers: 2, stages: 4 }),
    sm90::forward_short(sm80::BF16, 256, Tiles { block_kv: 112, consumers: 2, stages: 3 }),
    sm90::forward_medium(sm80::F16, 40, Tiles { block_kv: 272, consumers: 2, stages: 4 }),
    sm90::forward_medium(sm80::F16, 64, Tiles { block_kv: 272, consumers: 2, stages: 4 }),
    sm90::forward_medium(sm80::F16, 80, Tiles { block_kv: 272, consumers: 2, stages: 3 }),
    sm90::forward_medium(sm80::F16, 96, Tiles { block_kv: 272, consumers: 2, stages: 3 }),
    sm90::forward_medium(sm80::F16, 128, Tiles { block_kv: 272, consumers: 2, stages: 3 }),
    sm90::forward_medium(sm80::BF16, 40, Tiles { block_kv: 272, consumers: 2, stages: 4 }),
    sm90::forward_medium(sm80::BF16, 64, Tiles { block_kv: 272, consumers: 2, stages: 4 }),
    sm90::forward_medium(sm80::BF16, 80, Tiles { block_kv: 272, consumers: 2, stages: 3 }),
    sm90::forward_medium(sm80::BF16, 96, Tiles { block_kv: 272, consumers: 2, stages: 3 }),
    sm90::forward_medium(sm80::BF16, 128, Tiles { block_kv: 272, consumers: 2, stages: 3 }),
    sm80::forward_short(sm80::F16, 40, 96),
    sm80::forward_short(sm80::F16, 64, 96),
    sm80::forward_short(sm80::F16, 80, 96),
    sm80::forward_short(sm80::F16, 96, 96),
    sm80::forward_short(sm80::F16, 128, 96),
    sm80::forward_short(sm80::F16, 160, 96),
    sm80::forward_short(sm80::BF16, 40, 96),
    sm80::forward_short(sm80::BF16, 64, 96),
    sm80::forward_short(sm80::BF16, 80, 96),
    sm80::forward_short(sm80::BF16, 96, 96),
    sm80::forward_short(sm80::BF16, 128, 96),
    sm80::forward_short(sm80::BF16, 160, 96),
    sm90::forward_streaming(sm80::F16, 40, Tiles { block_kv: 128, consumers: 3, stages: 4 }),
    sm90::forward_streaming(sm80::F16, 64, Tiles { block_kv: 128, consumers: 3, stages: 4 }),
    sm90::forward_streaming(sm80::F16, 80, Tiles { block_kv: 128, consumers: 2, stages: 2 }),
    sm90::forward_streaming(sm80::F16, 96, Tiles { block_kv: 128, consumers: 2, stages: 2 }),
    sm90::forward_streaming(sm80::F16, 128, Tiles { block_kv: 128, consumers: 2, stages: 2 }),
    sm90::forward_streaming(sm80::F16, 160, Tiles { block_kv: 64, consumers: 2, stages: 2 }),
    sm90::forward_streaming(sm80::F16, 256, Tiles { block_kv: 80, consumers: 2, stages: 2 }),
    sm90::forward_streaming(sm80::BF16, 40, Tiles { block_kv: 128, consumers: 3, stages: 4 }),
    sm90::forward_streaming(sm80::BF16, 64, Tiles { block_kv: 128, consumers: 3, stages: 4 }),
    sm90::forward_streaming(sm80::BF16, 80, Tiles { block_kv: 128, consumers: 2, stages: 2 }),
    sm90::forward_streaming(sm80::BF16, 96, Tiles { block_kv: 128, consumers: 2, stages: 2 }),
    sm90::forward_streaming(sm80::BF16, 128, Tiles { block_kv: 128, consumers: 2, stages: 2 }),
    sm90::forward_streaming(sm80::BF16, 160, Tiles { block_kv: 64, consumers: 2, stages: 2 }),
    sm90::forward_streaming(sm80::BF16, 256, Tiles { block_kv: 80, consumers: 2, stages: 2 }),
    sm90::forward_fine(sm80::F16, 40, Tiles { block_kv: 128, consumers: 2, stages: 4 }),
    sm90::forward_fine(sm80::F16, 64, Tiles { block_kv: 128, consumers: 2, stages: 4 }),
    sm90::forward_fine(sm80::BF16, 40, Tiles { block_kv: 128, consumers: 2, stages: 4 }),
    sm90::forward_fine(sm80::BF16, 64, Tiles { block_kv: 128, consumers: 2, stages: 4 }),
    sm90::forward_biased(sm80::F16, 40, Tiles { block_kv: 128, consumers: 2, stages: 4 }),
    sm90::forward_biased(sm80::F16, 64, Tiles { block_kv: 128, consumers: 2, stages: 4 }),
    sm90::forward_biased(sm80::F16, 80, Tiles { block_kv: 128, consumers: 2, stages: 2 }),
    sm90::forward_biased(sm80::F16, 96, Tiles { block_kv: 96, consumers: 2, stages: 2 }),
    sm90::forward_biased(sm80::F16, 128, Tiles { block_kv: 96, consumers: 2, stages: 2 }),
    sm90::forward_biased(sm80::F16, 160, Tiles { block_kv: 64, consumers: 2, stages: 2 }),
    sm90::forward_biased(sm80::BF16, 40, Tiles { block_kv: 128, consumers: 2, stages: 4 }),
    sm90::forward_biased(sm80::BF16, 64, Tiles { block_kv: 128, consumers: 2, stages: 4 }),
    sm90::forward_biased(sm80::BF16, 80, Tiles { block_kv: 128, consumers: 2, stages: 2 }),
    sm90::forward_biased(sm80::BF16, 96, Tiles { block_kv: 96, consumers: 2, stages: 2 }),
    sm90::forward_biased(sm80::BF16, 128, Tiles { block_kv: 96, consumers: 2, stages: 2 }),
    sm90::forward_biased(sm80::BF16, 160, Tiles { block_kv: 64, consumers: 2, stages: 2 }),
    sm80::forward_streaming(sm80::F16, 40, 64),
    sm80::forward_streaming(sm80::F16, 64, 64),
    sm80::forward_streaming(sm80::F16, 80, 64),
    sm80::forward_streaming(sm80::F16, 96, 64),
    sm80::forward_streaming(sm80::F16, 128, 32),
    sm80::forward_streaming(sm80::F16, 160, 32),
    sm80::forward_streaming(sm80::F16, 256, 16),
    sm80::forward_streaming(sm80::BF16, 40, 64),
    sm80::forward_streaming(sm80::BF16, 64, 64),
    sm80::forward_streaming(sm80::BF16, 80, 64),
    sm80::forward_streaming(sm80::BF16, 96, 64),
    sm80::forward_streaming(sm80::BF16, 128, 32),
    sm80::forward_streaming(sm80::BF16, 160, 32),
    sm80::forward_streaming(sm80::BF16, 256, 16),
    sm80::backward_short(sm80::F16, 40, 96),
    sm80::backward_short(sm80::F16, 64, 96),
    sm80::backward_short(sm80::F16, 80, 96),
    sm80::backward_short(sm80::F16, 96, 96),
    sm80::backward_short(sm80::F16, 128, 96),
    sm80::backward_short(sm80::F16, 160, 80),
    sm80::backward_short(sm80::BF16, 40, 96),
    sm80::backward_short(sm80::BF16, 64, 96),
    sm80::backward_short(sm80::BF16, 80, 96),
    sm80::backward_short(sm80::BF16, 96, 96),
    sm80::backward_short(sm80::BF16, 128, 96),
    sm80::backward_short(sm80::BF16, 160, 80),
    sm80::backward_queries(sm80::F16, 40, 64),
    sm80::backward_queries(sm80::F16, 64, 64),
    sm80::backward_queries(sm80::F16, 80, 64),
    sm80::backward_queries(sm80::F16, 96, 64),
    sm80::backward_queries(sm80::F16, 128, 32),
    sm80::backward_queries(sm80::F16, 160, 32),
    sm80::backward_queries(sm80::F16, 256, 16),
    sm80::backward_queries(sm80::BF16, 40, 64),
    sm80::backward_queries(sm80::BF16, 64, 64),
    sm80::backward_queries(sm80::BF16, 80, 64),
    sm80::backward_queries(sm80::BF16, 96, 64),
    sm80::backward_queries(sm80::BF16, 128, 32),
    sm80::backward_queries(sm80::BF16, 160, 32),
    sm80::backward_queries(sm80::BF16, 256, 16),
    sm80::backward_keys(sm80::F16, 40, 64),
    sm80::backward_keys(sm80::F16, 64, 64),
    sm80::backward_keys(sm80::F16, 80, 32),
    sm80::backward_keys(sm80::F16, 96, 32),
    sm80::backward_keys(sm80::F16, 128, 16),
    sm80::backward_keys(sm80::F16, 160, 32),
    sm80::backward_keys(sm80::F16, 256, 16),
    sm80::backward_keys(sm80::BF16, 40, 64),
    sm80::backward_keys(sm80::BF16, 64, 64),
    sm80::backward_keys(sm80::BF16, 80, 32),
    sm80::backward_keys(sm80::BF16, 96, 32),
    sm80::backward_keys(sm80::BF16, 128, 16),
    sm80::backward_keys(sm80::BF16, 160, 32),
    sm80::backward_keys(sm80::BF16, 256, 16),
    sm80::backward_bias(sm80::F16, 40, 64),
    sm80::backward_bias(sm80::F16, 64, 64),
    sm80::backward_bias(sm80::F16, 80, 64),
    sm80::backward_bias(sm80::F16, 96, 64),
    sm80::backward_bias(sm80::F16, 128, 32),
    sm80::backward_bias(sm80::F16, 160, 32),
    sm80::backward_bias(sm80::F16, 256, 16),
    sm80::backward_bias(sm80::BF16, 40, 64),
    sm80::backward_bias(sm80::BF16, 64, 64),
    sm80::backward_bias(sm80::BF16, 80, 64),
    sm80::backward_bias(sm80::BF16, 96, 64),
    sm80::backward_bias(sm80::BF16, 128, 32),
    sm80::backward_bias(sm80::BF16, 160, 32),
    sm80::backward_bias(sm80::BF16, 256, 16),
    sm80::backward_reduce(sm80::F16),
    sm80::backward_reduce(sm80::BF16),
    Instance {
        kernel: "cpu_forward_streaming",
        engines: &[Engine::Cpu],
        direction: Direction::Forward,
        dtypes: FLOATS,
        head_dim_step: 1,
        // Keeps the scratch of one thread under 64 MB.
        max_head_dim: 16384,
        block_q: 256,
        block_kv: 128,
        deterministic: true,
        leads: true,
        device: None,
    },
    Instance {
        kernel: "cpu_backward_streaming",
        engines: &[Engine::Cpu],
        direction: Direction::Backward,
        dtypes: FLOATS,
        head_dim_step: 1,
        // As in the forward.
        max_head_dim: 16384,
        block_q: 128,
        block_kv: 128,
        deterministic: true,
        leads: true,
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
        leads: true,
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
        leads: true,
        device: None,
    },
];

impl Instance {
    /// Whether `engine` runs it.
    pub fn runs_on(&self, engine: Engine) -> bool {
        self.engines.contains(&engine)
    }

    /// Rows of an engine that a plan may start with.
    pub(super) fn leading(engine: Engine, direction: Direction) -> impl Iterator<Item = &'static Instance> {
        let fits = move |row: &&Instance| row.runs_on(engine) && row.direction == direction && row.leads;
        INSTANCES.iter().filter(fits)
    }

    /// Rows that complete its work, each in a launch of its own.
    pub(super) fn followers(&self) -> impl Iterator<Item = &'static Instance> {
        let kernels = self.device.as_ref().map_or(&[] as &[&str], |code| code.followers);
        kernels.iter().filter_map(|kernel| self.follower(kernel))
    }

    /// The one of this kernel, if it follows.
    pub(super) fn follower(&self, kernel: &str) -> Option<&'static Instance> {
        let follows = self.device.as_ref().is_some_and(|code| code.followers.contains(&kernel));
        let fits = |row: &&Instance| {
            row.kernel == kernel && row.dtypes == self.dtypes && row.max_head_dim >= self.max_head_dim
        };
        INSTANCES.iter().find(fits).filter(|_| follows)
    }

    /// The row that does the same in finer blocks.
    pub(super) fn finer(&self) -> Option<&'static Instance> {
        let kernel = self.device.as_ref()?.finer?;
        let same = |row: &&Instance| (row.dtypes, row.max_head_dim) == (self.dtypes, self.max_head_dim);
        INSTANCES.iter().filter(same).find(|row| row.kernel == kernel)
    }

    /// Name of the row, unique in the table; of device code also the name of its entry point.
    pub fn symbol(&self) -> String {
        match self.device {
            Some(_) => format!("{}_{}_w{}", self.kernel, self.dtypes[0].name(), self.max_head_dim),
            None => self.kernel.to_string(),
        }
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
