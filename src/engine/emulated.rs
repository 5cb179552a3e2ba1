//! The CUDA kernels' own source on the CPU, under the emulator of simt/. For tests and the command line.
//!
//! Tensors are copied into memory of the emulated device and back, as they would be for a GPU.

use crate::plan::launch::{self, Launch};
use crate::plan::params::ForwardParams;
use crate::plan::{Plan, Reason, Refusal};
use crate::problem::{Argument, Attention, Problem, Tensor, TensorMut, TensorRef};
use simt::{Checks, Kernel, Program};
pub use simt::{Report, Stats, SyncSite};
use std::ffi::c_void;
use std::path::Path;
use std::sync::Arc;
#[cfg(feature = "cuda")]
use std::{
    collections::HashMap,
    sync::{LazyLock, Mutex, PoisonError},
};

/// How a launch is emulated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Which GPU.
    pub compute_capability: (u32, u32),
    /// Decides the order of blocks, warps and lanes.
    pub seed: u64,
    /// Only kernels of this name, as the table has it; `None` leaves the choice to the plan.
    pub kernel: Option<String>,
    /// Blocks that run at once, each on a thread of its own.
    pub workers: u32,
    /// Which form of the kernels runs.
    pub rung: Rung,
    /// A synchronisation of an earlier report to turn into a no-op, to see that something notices.
    pub without: Option<SyncSite>,
}

/// A form of the kernels that the emulator runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rung {
    /// Their source, compiled by the host's compiler.
    Source,
    /// What nvcc made of it, the PTX that this build embeds, interpreted.
    Ptx,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { compute_capability: (8, 0), kernel: None, seed: 0, workers: 1, rung: Rung::Source, without: None }
    }
}

// SAFETY: a `repr(C)` struct of integers, floats and arrays of such structs, each of a size that is a multiple of its
// alignment of 8 with no gap: the build asserts offsets and sizes against the sum of the fields.
unsafe impl bytemuck::NoUninit for ForwardParams {}

/// The folder of a `libcuda.so.1` that runs this build's kernels under emulation: with it on the library path, the engine
/// `cuda` runs where there is no GPU. On Linux only.
pub fn stand_in_driver() -> Option<&'static Path> {
    cfg!(target_os = "linux").then(|| Path::new(env!("FUSED_ATTENTION_STAND_IN_DRIVER")))
}

mod kernels {
    use super::{ForwardParams, Kernel, c_void};
    include!(concat!(env!("OUT_DIR"), "/emulated_kernels.rs"));
}

/// The row's PTX, read once.
#[cfg(feature = "cuda")]
fn program(symbol: &str) -> Result<Arc<Program>, String> {
    static READ: LazyLock<Mutex<HashMap<String, Arc<Program>>>> = LazyLock::new(Mutex::default);
    let mut read = READ.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(program) = read.get(symbol) {
        return Ok(program.clone());
    }
    let ptx = super::cuda::ptx(symbol).ok_or("this build has no PTX of the kernel; build it with nvcc")?;
    let program = Arc::new(Program::parse(&ptx, symbol)?);
    read.insert(symbol.to_string(), program.clone());
    Ok(program)
}

#[cfg(not(feature = "cuda"))]
fn program(_: &str) -> Result<Arc<Program>, String> {
    Err("built without the `cuda` feature, and so without PTX; enable it".to_string())
}

/// Memory of the emulated device: aligned as the device's allocator aligns it, and ending where the slice ends.
struct Memory {
    words: Vec<u128>,
    len: usize,
    /// Where index zero lies.
    offset: usize,
}

impl Memory {
    fn copy_of(bytes: &[u8], offset: usize) -> Self {
        let mut words = vec![0u128; bytes.len().div_ceil(size_of::<u128>())];
        bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
        Memory { words, len: bytes.len(), offset }
    }

    fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.len]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.words)[..self.len]
    }

    fn address(&self) -> u64 {
        self.words.as_ptr() as u64 + self.offset as u64
    }
}

/// Whether rows that start at index zero are aligned for 16-byte copies.
fn aligned(offset: usize, tensor: &impl Tensor) -> bool {
    (offset * tensor.desc().dtype().size()).is_multiple_of(16)
}

/// Why the emulated device did not compute.
pub(crate) enum Failure {
    Refused(Refusal),
    Fault(String),
}

/// Runs a forward problem whose slices are long enough. Without a query there is nothing to launch and no report.
pub(crate) fn forward(
    problem: &Problem,
    plan: &Plan,
    settings: &Settings,
    attention: &Attention<TensorRef<'_>>,
    out: TensorMut<'_>,
    lse: Option<TensorMut<'_>>,
) -> Result<Option<Report>, Failure> {
    let instance = plan.instance();
    let refuse = |reasons| Failure::Refused(Refusal { engine: plan.engine(), reasons });
    let (Some(device), Some(kernel)) = (&instance.device, kernels::kernel(&instance.symbol())) else {
        return Err(refuse(vec![Reason::NotBuilt("the kernel is not part of this build")]));
    };
    let rows =
        attention.tensors().filter(|(argument, _)| matches!(argument, Argument::Q | Argument::K(_) | Argument::V(_)));
    let mut misaligned: Vec<Reason> = rows
        .filter(|(_, tensor)| !aligned(tensor.offset, *tensor))
        .map(|(argument, _)| Reason::Alignment { argument })
        .collect();
    if !aligned(out.offset, &out) {
        misaligned.push(Reason::Alignment { argument: Argument::Out });
    }
    if !misaligned.is_empty() {
        return Err(refuse(misaligned));
    }

    let inputs = attention.map(|tensor| {
        let offset = tensor.offset * tensor.desc().dtype().size();
        Memory::copy_of(tensor.bytes, offset)
    });
    let mut out_memory = Memory::copy_of(out.bytes, out.offset * out.desc().dtype().size());
    let mut lse_memory = lse.as_ref().map(|lse| Memory::copy_of(lse.bytes, lse.offset * size_of::<f32>()));
    let lse_address = lse_memory.as_ref().map_or(0, Memory::address);
    let outputs = [out_memory.address(), lse_address];
    let Launch { blocks, threads, shared_bytes, params } =
        launch::forward(problem, plan, device, &inputs, |_, memory| memory.address(), outputs);
    if blocks == 0 {
        return Ok(None);
    }

    let program = match settings.rung {
        Rung::Source => None,
        Rung::Ptx => Some(program(&instance.symbol()).map_err(Failure::Fault)?),
    };
    let mut emulation = simt::Launch::new(kernel, [blocks, 1, 1], threads)
        .shared_bytes(shared_bytes)
        .seed(settings.seed)
        .workers(settings.workers)
        .checks(Checks::Full);
    for (argument, memory) in inputs.tensors() {
        emulation.input(&argument.to_string(), memory.bytes());
    }
    emulation.output("out", out_memory.bytes_mut());
    if let Some(memory) = &mut lse_memory {
        emulation.output("lse", memory.bytes_mut());
    }
    if let Some(program) = &program {
        emulation = emulation.program(program);
    }
    if let Some(site) = &settings.without {
        emulation = emulation.drop_site(site);
    }
    let report = emulation.run(&params).map_err(|fault| Failure::Fault(fault.to_string()))?;
    drop(emulation);

    out.bytes.copy_from_slice(out_memory.bytes());
    if let (Some(lse), Some(memory)) = (lse, &lse_memory) {
        lse.bytes.copy_from_slice(memory.bytes());
    }
    Ok(Some(report))
}
