//! Which kernel computes a problem, or every reason why none does. Needs no GPU and no data.

mod instances;
#[cfg(any(feature = "cuda", feature = "emulated"))]
pub(crate) mod launch;
#[cfg(any(feature = "cuda", feature = "emulated"))]
#[expect(dead_code, reason = "the build script reads the offsets")]
pub(crate) mod params;
mod refusal;
#[allow(dead_code, reason = "the build script reads names and the PTX architecture")]
mod target;

pub use instances::{DeviceCode, Engine, INSTANCES, Instance, MAX_BRANCHES, MAX_SEGMENTS, support_table};
pub use refusal::{CudaError, Reason, Refusal};
pub use target::{Form, Target, Toolkit};

use crate::problem::{DType, Direction, Problem, elements};
use std::fmt;

/// Where a plan is to run: an engine and what its machine can do.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Device {
    /// The naive engine; one thread.
    Reference,
    /// The processor.
    Cpu {
        /// Threads that work at once, each with its own scratch.
        threads: usize,
    },
    /// A GPU as emulated on the processor.
    Emulated {
        /// Compute capability, `(8, 0)` for sm_80.
        compute_capability: (u32, u32),
    },
    /// A GPU.
    Cuda(CudaDevice),
}

/// What a plan must know of a GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaDevice {
    /// The driver's number for it.
    pub ordinal: usize,
    /// Product name.
    pub name: String,
    /// Compute capability, `(9, 0)` for sm_90.
    pub compute_capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Shared memory that one block may ask for, in bytes.
    pub shared_memory_per_block: u32,
}

impl Device {
    /// The engine that works there.
    pub fn engine(&self) -> Engine {
        match self {
            Device::Reference => Engine::Reference,
            Device::Cpu { .. } => Engine::Cpu,
            Device::Emulated { .. } => Engine::Emulated,
            Device::Cuda(_) => Engine::Cuda,
        }
    }
}

/// How a problem will be computed.
#[derive(Clone, Debug)]
pub struct Plan {
    engine: Engine,
    instance: &'static Instance,
    /// Blocks that share the queries of one head; 0 on a host engine.
    head_blocks: usize,
    workspace_bytes: usize,
}

impl Plan {
    /// Chooses the kernel for `problem` on `device`.
    ///
    /// # Errors
    /// [`Refusal`] with every reason of the kernel that came nearest.
    pub fn new(problem: &Problem, device: &Device) -> Result<Plan, Refusal> {
        Self::among(problem, device, |_| true)
    }

    /// The same with only some rows of the table to choose from, for tests that compare kernels.
    pub(crate) fn among(
        problem: &Problem,
        device: &Device,
        admitted: impl Fn(&Instance) -> bool,
    ) -> Result<Plan, Refusal> {
        let engine = device.engine();
        let direction = problem.direction();
        let rows = || INSTANCES.iter().filter(|row| row.runs_on(engine) && row.direction == direction && admitted(row));
        for instance in rows() {
            // Most rows do not fit; that costs a call nothing but the question.
            let mut fits = true;
            table_objections(instance, engine, problem, &mut |_| fits = false);
            device_objections(instance, problem, device, &mut |_| fits = false);
            if fits {
                return Ok(Plan {
                    engine,
                    instance,
                    head_blocks: head_blocks(instance, problem, device),
                    workspace_bytes: workspace_bytes(instance, problem, device),
                });
            }
        }
        let mut nearest: Option<Vec<Reason>> = None;
        for instance in rows() {
            let mut reasons = Vec::new();
            table_objections(instance, engine, problem, &mut |reason| reasons.push(reason()));
            device_objections(instance, problem, device, &mut |reason| reasons.push(reason()));
            if nearest.as_ref().is_none_or(|known| reasons.len() < known.len()) {
                nearest = Some(reasons);
            }
        }
        Err(Refusal { engine, reasons: nearest.unwrap_or_else(|| table_reasons(engine, problem)) })
    }

    /// Engine that runs it.
    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// Name of the kernel, a row of the table.
    pub fn kernel(&self) -> &'static str {
        self.instance.kernel
    }

    /// Forward or backward.
    pub fn direction(&self) -> Direction {
        self.instance.direction
    }

    /// Blocks of the grid of device code.
    #[cfg(any(feature = "cuda", feature = "emulated"))]
    pub(crate) fn blocks(&self, problem: &Problem) -> usize {
        elements(&[self.head_blocks, problem.heads, problem.batch])
    }

    /// Name of the row of the table: the kernel and, of device code, its type and tile width.
    pub fn symbol(&self) -> String {
        self.instance.symbol()
    }

    /// The row of the table.
    #[cfg(any(feature = "cuda", feature = "emulated"))]
    pub(crate) fn instance(&self) -> &'static Instance {
        self.instance
    }

    /// Queries of one tile.
    pub(crate) fn block_q(&self) -> usize {
        self.instance.block_q
    }

    /// Keys of one tile.
    pub(crate) fn block_kv(&self) -> usize {
        self.instance.block_kv
    }

    /// Bytes of scratch, all threads together: the cpu engine keeps a tile per thread, the reference its results in f64.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace_bytes
    }

    /// Whether two runs on the same machine give the same bits.
    pub fn is_deterministic(&self) -> bool {
        self.instance.deterministic
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "engine         {}", self.engine().name())?;
        writeln!(f, "kernel         {}", self.symbol())?;
        writeln!(f, "direction      {}", self.direction().name())?;
        writeln!(f, "workspace      {} bytes", self.workspace_bytes())?;
        if let Some(code) = &self.instance.device {
            writeln!(f, "blocks         {} a head, {} threads each", self.head_blocks, code.threads)?;
        }
        write!(f, "deterministic  {}", if self.is_deterministic() { "yes" } else { "no" })
    }
}

/// Is called with each reason against an instance, which is made only if it is wanted.
type Objections<'o> = dyn FnMut(&dyn Fn() -> Reason) + 'o;

/// What an instance has against a problem, whatever the device.
fn table_objections(instance: &Instance, engine: Engine, problem: &Problem, object: &mut Objections<'_>) {
    // All rows of an engine speak with one voice: that a narrow row is passed over is no reason.
    let voice = |row: &&Instance| row.runs_on(engine) && row.direction == instance.direction;
    let rows = || INSTANCES.iter().filter(voice);
    if !instance.dtypes.contains(&problem.dtype) {
        object(&|| {
            let mut supported: Vec<DType> = rows().flat_map(|row| row.dtypes).copied().collect();
            supported.sort_by_key(|dtype| dtype.name());
            supported.dedup();
            Reason::DType { got: problem.dtype, supported }
        });
    }
    for (dim, got) in [("head_dim", problem.head_dim), ("value_dim", problem.value_dim)] {
        if got > instance.max_head_dim {
            let widest = || rows().map(|row| row.max_head_dim).max().unwrap_or(0);
            object(&|| Reason::Width { dim, got, limit: widest() });
        }
        if !got.is_multiple_of(instance.head_dim_step) {
            object(&|| Reason::Step { dim, got, step: instance.head_dim_step });
        }
    }
    if let Some(device) = &instance.device {
        for branch in problem.branches.iter().filter(|_| device.shared_bytes_per_key_tile > 0) {
            let keys = branch.segments.iter().map(|segment| segment.seq_kv.next_multiple_of(16)).sum();
            if keys > instance.block_kv {
                object(&|| Reason::RowKeys { got: keys, limit: instance.block_kv });
            }
        }
        for argument in problem.misaligned_rows(instance.head_dim_step) {
            object(&|| Reason::Alignment { argument });
        }
        let segments = problem.branches.iter().map(|branch| branch.segments.len()).sum();
        let lists = [("branches", problem.branches.len(), MAX_BRANCHES), ("segments", segments, MAX_SEGMENTS)];
        for (list, got, limit) in lists.into_iter().filter(|&(_, got, limit)| got > limit) {
            object(&|| Reason::TooMany { list, got, limit });
        }
        // The most that any kernel starts: all queries of all heads, a tile each.
        let blocks = problem.heads as u128 * problem.batch as u128 * problem.seq_q.div_ceil(instance.block_q) as u128;
        if blocks > MAX_GRID {
            object(&|| Reason::Grid { blocks });
        }
    }
}

/// Blocks that a grid may have in its first dimension.
const MAX_GRID: u128 = i32::MAX as u128;

/// What the device lacks for an instance.
fn device_objections(instance: &Instance, problem: &Problem, device: &Device, object: &mut Objections<'_>) {
    let (have, shared) = match device {
        Device::Emulated { compute_capability } => (*compute_capability, emulated_shared_memory(*compute_capability)),
        Device::Cuda(device) => (device.compute_capability, device.shared_memory_per_block),
        Device::Cpu { .. } | Device::Reference => return,
    };
    if let Some(code) = &instance.device {
        if have < code.compute_capability {
            object(&|| Reason::ComputeCapability { have, need: code.compute_capability });
        } else if let (Device::Cuda(_), Some(reason)) = (device, image_reason(code, have)) {
            object(&|| reason.clone());
        }
        let need = shared_bytes(code, problem);
        if need > shared {
            object(&|| Reason::SharedMemory { need, have: shared });
        }
    }
}

/// Whether this build holds the kernel in a form that the GPU loads.
fn image_reason(code: &DeviceCode, have: (u32, u32)) -> Option<Reason> {
    let Some(toolkit) = &TOOLKIT else { return Some(Reason::NoCompiler) };
    let compiled = toolkit.targets.iter().filter(|target| code.compute_capability <= target.capability);
    match Target::best(compiled, have) {
        Some(_) => None,
        None => Some(Reason::Architecture { have, compiled: toolkit.targets }),
    }
}

/// What this build's kernels were compiled with; nothing where no CUDA compiler was found.
#[cfg(feature = "cuda")]
pub(crate) const TOOLKIT: Option<Toolkit> = include!(concat!(env!("OUT_DIR"), "/toolkit.rs"));
#[cfg(not(feature = "cuda"))]
pub(crate) const TOOLKIT: Option<Toolkit> = None;

/// Shared memory that a block of the emulated GPU may have (CUDA Programming Guide, compute capabilities).
fn emulated_shared_memory(compute_capability: (u32, u32)) -> u32 {
    match compute_capability {
        (8, 0) => 163 << 10,
        (9, 0) => 227 << 10,
        _ => 99 << 10,
    }
}

/// Multiprocessors of the emulated GPU: few, so that blocks of a persistent grid have more than one tile.
const EMULATED_MULTIPROCESSORS: u32 = 2;

/// Bytes of dynamic shared memory of one block.
fn shared_bytes(code: &DeviceCode, problem: &Problem) -> u32 {
    let segments = problem.branches.iter().flat_map(|branch| &branch.segments);
    let key_tiles: usize = segments.map(|segment| segment.seq_kv.div_ceil(16)).sum();
    let per_key_tile = u32::try_from(key_tiles).unwrap_or(u32::MAX).saturating_mul(code.shared_bytes_per_key_tile);
    code.shared_bytes[usize::from(problem.branches.len() > 1)].saturating_add(per_key_tile)
}

/// Blocks for one head's queries: as many as it has tiles, or, where a block keeps all keys, as many as give each
/// multiprocessor two blocks, so that the keys are loaded rarely.
fn head_blocks(instance: &Instance, problem: &Problem, device: &Device) -> usize {
    let multiprocessors = match device {
        Device::Emulated { .. } => EMULATED_MULTIPROCESSORS,
        Device::Cuda(device) => device.multiprocessors,
        Device::Cpu { .. } | Device::Reference => return 0,
    };
    let tiles = problem.seq_q.div_ceil(instance.block_q);
    match &instance.device {
        Some(code) if code.shared_bytes_per_key_tile > 0 => {
            let heads = elements(&[problem.batch, problem.heads]).max(1);
            (2 * multiprocessors as usize).div_ceil(heads).clamp(1, tiles.max(1)).min(tiles)
        }
        _ => tiles,
    }
}

fn workspace_bytes(instance: &Instance, problem: &Problem, device: &Device) -> usize {
    let (head_dim, value_dim) = (problem.head_dim, problem.value_dim);
    match *device {
        Device::Cpu { threads } => {
            let queries = instance.block_q * (head_dim + 2 * value_dim + instance.block_kv + 2);
            let keys = instance.block_kv * head_dim.max(value_dim);
            ((queries + keys) * size_of::<f32>()).saturating_mul(threads)
        }
        // Probabilities and slopes of one row; the results in f64.
        Device::Reference => {
            let row = 2 * problem.seq_kv().max().unwrap_or(0);
            row.saturating_add(problem.result_elements()).saturating_mul(size_of::<f64>())
        }
        Device::Emulated { .. } | Device::Cuda(_) => 0,
    }
}

/// What the table alone says against an engine, whether or not its machine is there.
pub(crate) fn table_reasons(engine: Engine, problem: &Problem) -> Vec<Reason> {
    let direction = problem.direction();
    let rows = INSTANCES.iter().filter(|row| row.runs_on(engine) && row.direction == direction);
    let mut reasons = rows
        .map(|row| {
            let mut reasons = Vec::new();
            table_objections(row, engine, problem, &mut |reason| reasons.push(reason()));
            reasons
        })
        .min_by_key(Vec::len)
        .unwrap_or_else(|| vec![Reason::NoKernel { direction }]);
    if engine == Engine::Cuda && TOOLKIT.is_none() {
        reasons.push(Reason::NoCompiler);
    }
    reasons
}
