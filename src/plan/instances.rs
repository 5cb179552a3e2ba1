//! The table of kernel instances: the only list of what can run.
//!
//! Dispatch looks up in it, and the README's support table is printed from it.

use crate::problem::{DType, Direction, Problem};
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
    /// Name, unique in the table.
    pub kernel: &'static str,
    /// Engine that runs it.
    pub engine: Engine,
    /// Forward or backward.
    pub direction: Direction,
    /// Types of q, k, v and out.
    pub dtypes: &'static [DType],
    /// Largest head dim and value dim; every smaller one is taken too.
    pub max_head_dim: usize,
    /// Queries of one tile.
    pub block_q: usize,
    /// Keys of one tile.
    pub block_kv: usize,
    /// Whether two runs on one machine give the same bits.
    pub deterministic: bool,
}

const FLOATS: &[DType] = &[DType::F16, DType::BF16, DType::F32];

/// Every kernel there is.
pub const INSTANCES: &[Instance] = &[
    Instance {
        kernel: "cpu_forward_streaming",
        engine: Engine::Cpu,
        direction: Direction::Forward,
        dtypes: FLOATS,
        // Keeps the scratch of one thread under 64 MB.
        max_head_dim: 16384,
        block_q: 64,
        block_kv: 128,
        deterministic: true,
    },
    Instance {
        kernel: "reference_forward",
        engine: Engine::Reference,
        direction: Direction::Forward,
        dtypes: FLOATS,
        max_head_dim: usize::MAX,
        block_q: 1,
        block_kv: usize::MAX,
        deterministic: true,
    },
    Instance {
        kernel: "reference_backward",
        engine: Engine::Reference,
        direction: Direction::Backward,
        dtypes: FLOATS,
        max_head_dim: usize::MAX,
        block_q: 1,
        block_kv: usize::MAX,
        deterministic: true,
    },
];

impl Instance {
    /// Bytes of scratch of one thread.
    pub(crate) fn scratch_bytes(&self, problem: &Problem) -> usize {
        let (head_dim, value_dim) = (problem.head_dim, problem.value_dim);
        match self.engine {
            Engine::Cpu => {
                let queries = self.block_q * (head_dim + 2 * value_dim + self.block_kv + 2);
                let keys = self.block_kv * head_dim.max(value_dim);
                (queries + keys) * size_of::<f32>()
            }
            // Probabilities and slopes of one row; the results in f64.
            Engine::Reference => {
                let row = 2 * problem.seq_kv().max().unwrap_or(0);
                row.saturating_add(problem.result_elements()).saturating_mul(size_of::<f64>())
            }
            Engine::Emulated | Engine::Cuda => 0,
        }
    }
}

/// The table as Markdown, for the README.
pub fn support_table() -> String {
    let mut table = String::from(
        "| kernel | engine | direction | q, k, v, out | head dim | deterministic |\n|---|---|---|---|---|---|\n",
    );
    for row in INSTANCES {
        let dtypes: Vec<&str> = row.dtypes.iter().map(|dtype| dtype.name()).collect();
        let head_dim = match row.max_head_dim {
            usize::MAX => "any".to_string(),
            max => format!("1 to {max}"),
        };
        let _ = writeln!(
            table,
            "| `{}` | {} | {} | {} | {} | {} |",
            row.kernel,
            row.engine.name(),
            row.direction.name(),
            dtypes.join(", "),
            head_dim,
            if row.deterministic { "yes" } else { "no" },
        );
    }
    table
}
