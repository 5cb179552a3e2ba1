//! The CUDA kernels' own source on the CPU, under the emulator of simt/. For tests and the command line.
//!
//! Tensors are copied into memory of the emulated device and back, as they would be for a GPU.

use crate::error::Error;
use crate::plan::params::{BackwardParams, ForwardParams, MappedForwardParams, ReduceParams, TensorMap};
use crate::plan::{Plan, Reason, Refusal, launch};
use crate::problem::{Argument, Attention, Backward, Gradient, Problem, Tensor, TensorMut, TensorRef};
use simt::{Checks, Kernel, Program, Swizzle};
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
    /// A synchronisation of an earlier report to turn into a no-op, to see that something notices, and the number of the
    /// launch it is of.
    pub without: Option<(usize, SyncSite)>,
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
// SAFETY: as above, with an alignment of 64.
unsafe impl bytemuck::NoUninit for MappedForwardParams {}
// SAFETY: as above.
unsafe impl bytemuck::NoUninit for BackwardParams {}
// SAFETY: as above.
unsafe impl bytemuck::NoUninit for ReduceParams {}

/// The folder of a `libcuda.so.1` that runs this build's kernels under emulation: with it on the library path, the engine
/// `cuda` runs where there is no GPU. On Linux only.
pub fn stand_in_driver() -> Option<&'static Path> {
    cfg!(target_os = "linux").then(|| Path::new(env!("FUSED_ATTENTION_STAND_IN_DRIVER")))
}

/// A kernel of the table, by the block of parameters that it takes.
#[expect(clippy::enum_variant_names, reason = "the names of the structs")]
enum AnyKernel {
    ForwardParams(Kernel<ForwardParams>),
    MappedForwardParams(Kernel<MappedForwardParams>),
    BackwardParams(Kernel<BackwardParams>),
    ReduceParams(Kernel<ReduceParams>),
}

mod kernels {
    use super::{AnyKernel, Kernel, c_void};
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
    fn of(tensor: &TensorRef<'_>) -> Self {
        let bytes = tensor.bytes;
        let mut words = vec![0u128; bytes.len().div_ceil(size_of::<u128>())];
        bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
        Memory { words, len: bytes.len(), offset: offset_of(tensor, tensor.offset) }
    }

    /// All bits set: NaN in every float type.
    fn poisoned(len: usize) -> Self {
        Memory { words: vec![u128::MAX; len.div_ceil(size_of::<u128>())], len, offset: 0 }
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

/// Why the emulated device does not compute: nothing of it is there, or rows are not aligned for 16-byte copies.
fn objections(plan: &Plan, tensors: &[(Argument, usize)]) -> Result<(), Refusal> {
    let refuse = |reasons| Err(Refusal { engine: plan.engine(), reasons });
    if plan.launched().iter().any(|launched| kernels::kernel(&launched.instance.symbol()).is_none()) {
        return refuse(vec![Reason::NotBuilt("the kernel is not part of this build")]);
    }
    let rows = tensors.iter().filter(|(argument, offset)| argument.is_of_rows() && !offset.is_multiple_of(16));
    let misaligned: Vec<Reason> = rows.map(|&(argument, _)| Reason::Alignment { argument }).collect();
    if misaligned.is_empty() { Ok(()) } else { refuse(misaligned) }
}

/// Where index zero of a tensor lies in its slice, in bytes.
fn offset_of(tensor: &impl Tensor, offset: usize) -> usize {
    offset * tensor.desc().dtype().size()
}

/// Runs a forward problem whose slices are long enough. Without a query there is nothing to launch and no report.
pub(crate) fn forward(
    problem: &Problem,
    plan: &Plan,
    settings: &Settings,
    attention: &Attention<TensorRef<'_>>,
    out: TensorMut<'_>,
    lse: Option<TensorMut<'_>>,
) -> Result<Option<Report>, Error> {
    let mut offsets: Vec<(Argument, usize)> =
        attention.tensors().map(|(argument, tensor)| (argument, offset_of(tensor, tensor.offset))).collect();
    offsets.push((Argument::Out, offset_of(&out, out.offset)));
    objections(plan, &offsets)?;

    let inputs = attention.map(Memory::of);
    let mut out_memory = Memory::of(&out.as_ref());
    let mut lse_memory = lse.as_ref().map(|lse| Memory::of(&lse.as_ref()));
    let outputs = [out_memory.address(), lse_memory.as_ref().map_or(0, Memory::address)];
    let params = launch::forward(problem, plan, &inputs, |_, memory| memory.address(), outputs);
    let mapped = (plan.has_tensor_maps() && !plan.launched().is_empty()).then(|| {
        let rule = |message| Error::Fault { kernel: plan.symbol(), message };
        launch::mapped(params, plan, tensor_map).map(Box::new).map_err(rule)
    });
    let mapped = mapped.transpose()?;
    let mut report = None;
    for number in 0..plan.launched().len() {
        let mut device = DeviceMemory::default();
        inputs.tensors().for_each(|(argument, memory)| device.input(argument, memory));
        device.output(Argument::Out, &mut out_memory);
        lse_memory.iter_mut().for_each(|memory| device.output(Argument::Lse, memory));
        let block = mapped.as_ref().map_or(Block::Forward(&params), |mapped| Block::MappedForward(mapped));
        report = Some(run(plan, number, problem, settings, block, device)?);
    }
    out.bytes.copy_from_slice(out_memory.bytes());
    if let (Some(lse), Some(memory)) = (lse, &lse_memory) {
        lse.bytes.copy_from_slice(memory.bytes());
    }
    Ok(report)
}

/// A tensor map of the emulator's.
fn tensor_map(of: &launch::MapOf) -> Result<TensorMap, String> {
    let map = simt::TensorMap::encode(of.address, of.extents, of.strides, of.boxed, Swizzle::Bytes128)?;
    Ok(TensorMap(bytemuck::cast(map)))
}

/// Runs a backward problem whose slices are long enough: a report for each launch.
pub(crate) fn backward(
    problem: &Problem,
    plan: &Plan,
    settings: &Settings,
    attention: &Attention<TensorRef<'_>>,
    backward: &Backward<TensorRef<'_>>,
    gradients: Vec<(Gradient, TensorMut<'_>)>,
) -> Result<Vec<Report>, Error> {
    let argument = |gradient: Gradient| gradient.argument(|branch| attention.first_segment(branch));
    let read = attention.tensors().chain(backward.tensors());
    let mut offsets: Vec<(Argument, usize)> =
        read.map(|(argument, tensor)| (argument, offset_of(tensor, tensor.offset))).collect();
    offsets.extend(gradients.iter().map(|(name, tensor)| (argument(*name), offset_of(tensor, tensor.offset))));
    objections(plan, &offsets)?;

    let inputs = attention.map(Memory::of);
    let given = backward.map(Memory::of);
    let mut written: Vec<Memory> = gradients.iter().map(|(_, tensor)| Memory::of(&tensor.as_ref())).collect();
    let mut workspace = Memory::poisoned(plan.workspace_bytes());
    let saved = given.saved.as_ref().map_or([0; 2], |saved| [saved.out.address(), saved.lse.address()]);
    let forward = launch::forward(problem, plan, &inputs, |_, memory| memory.address(), saved);
    let addresses: Vec<u64> = written.iter().map(Memory::address).collect();
    let blocks = launch::Backward::new(problem, plan, forward, given.dout.address(), &addresses, workspace.address());
    let mut reports = Vec::new();
    for (number, launched) in plan.launched().iter().enumerate() {
        let mut device = DeviceMemory::default();
        inputs.tensors().chain(given.tensors()).for_each(|(argument, memory)| device.input(argument, memory));
        for ((gradient, _), memory) in gradients.iter().zip(&mut written) {
            device.output(argument(*gradient), memory);
        }
        device.output(Argument::Workspace, &mut workspace);
        let sums = launched.sums.map(|_| blocks.sums(launched));
        let block = sums.as_ref().map_or(Block::Backward(&blocks.params), Block::Reduce);
        reports.push(run(plan, number, problem, settings, block, device)?);
    }
    for ((_, tensor), memory) in gradients.into_iter().zip(&written) {
        tensor.bytes.copy_from_slice(memory.bytes());
    }
    Ok(reports)
}

/// The block of parameters of a launch.
enum Block<'p> {
    Forward(&'p ForwardParams),
    MappedForward(&'p MappedForwardParams),
    Backward(&'p BackwardParams),
    Reduce(&'p ReduceParams),
}

/// The buffers of a launch.
#[derive(Default)]
struct DeviceMemory<'m> {
    read: Vec<(String, &'m [u8])>,
    written: Vec<(String, &'m mut [u8])>,
}

impl<'m> DeviceMemory<'m> {
    fn input(&mut self, argument: Argument, memory: &'m Memory) {
        self.read.push((argument.to_string(), memory.bytes()));
    }

    fn output(&mut self, argument: Argument, memory: &'m mut Memory) {
        self.written.push((argument.to_string(), memory.bytes_mut()));
    }
}

/// Runs the plan's launch of this number.
fn run(
    plan: &Plan,
    number: usize,
    problem: &Problem,
    settings: &Settings,
    block: Block<'_>,
    memory: DeviceMemory<'_>,
) -> Result<Report, Error> {
    let launched = &plan.launched()[number];
    let shape = launched.shape(problem);
    let symbol = launched.instance.symbol();
    let site = settings.without.as_ref().filter(|(launch, _)| *launch == number).map(|(_, site)| site);
    let report = match (kernels::kernel(&symbol), block) {
        (Some(AnyKernel::ForwardParams(kernel)), Block::Forward(params)) => {
            emulate(kernel, params, shape, &symbol, settings, site, memory)
        }
        (Some(AnyKernel::MappedForwardParams(kernel)), Block::MappedForward(params)) => {
            emulate(kernel, params, shape, &symbol, settings, site, memory)
        }
        (Some(AnyKernel::BackwardParams(kernel)), Block::Backward(params)) => {
            emulate(kernel, params, shape, &symbol, settings, site, memory)
        }
        (Some(AnyKernel::ReduceParams(kernel)), Block::Reduce(params)) => {
            emulate(kernel, params, shape, &symbol, settings, site, memory)
        }
        _ => Err("the kernel takes another block of parameters".to_string()),
    };
    report.map_err(|message| Error::Fault { kernel: symbol, message })
}

fn emulate<P: bytemuck::NoUninit>(
    kernel: Kernel<P>,
    params: &P,
    [blocks, threads, shared_bytes]: [u32; 3],
    symbol: &str,
    settings: &Settings,
    without: Option<&SyncSite>,
    memory: DeviceMemory<'_>,
) -> Result<Report, String> {
    let program = match settings.rung {
        Rung::Source => None,
        Rung::Ptx => Some(program(symbol)?),
    };
    let mut emulation = simt::Launch::new(kernel, [blocks, 1, 1], threads)
        .shared_bytes(shared_bytes)
        .seed(settings.seed)
        .workers(settings.workers)
        .checks(Checks::Full);
    for (name, bytes) in memory.read {
        emulation.input(&name, bytes);
    }
    for (name, bytes) in memory.written {
        emulation.output(&name, bytes);
    }
    if let Some(program) = &program {
        emulation = emulation.program(program);
    }
    if let Some(site) = without {
        emulation = emulation.drop_site(site);
    }
    emulation.run(params).map_err(|fault| fault.to_string())
}
