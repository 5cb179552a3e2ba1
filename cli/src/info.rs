//! `info`: what is here to compute with.

use crate::failure::one_line;
use crate::machine::Arch;
use clap::{Args, ValueEnum};
use fused_attention::{CudaDevice, Device, Engine, INSTANCES, Instance, Reason, Target, cuda, device, support_table};
use std::fmt::Write;

#[derive(Args)]
pub(crate) struct Arguments {
    /// Prints the table of kernels as Markdown and nothing else.
    #[arg(long)]
    table: bool,
}

pub(crate) fn info(arguments: &Arguments) -> String {
    if arguments.table {
        return support_table();
    }
    // A String takes every write.
    let mut text = format!("fused-attention {}\n", env!("CARGO_PKG_VERSION"));
    if let Ok(Device::Cpu { threads }) = device(Engine::Cpu) {
        let _ = writeln!(text, "threads {threads}");
    }
    text += "\nCUDA\n";
    let _ = match cuda::toolkit() {
        Some(toolkit) => {
            let targets = distinct(toolkit.targets.iter().map(|target| target.to_string()));
            writeln!(text, "  kernels    compiled with {} for {targets}", version(toolkit.version))
        }
        None => writeln!(text, "  kernels    none: {}", one_line(&Reason::NoCompiler.to_string())),
    };
    let _ = match cuda::driver_version() {
        Ok(driver) => writeln!(text, "  driver     {}", version(driver)),
        Err(reason) => writeln!(text, "  driver     none: {}", one_line(&reason.to_string())),
    };
    match cuda::devices() {
        Ok(devices) => text += &devices.iter().map(gpu).collect::<String>(),
        Err(reason) => {
            let _ = writeln!(text, "  GPU        none: {}", one_line(&reason.to_string()));
        }
    }
    text += "\nengines\n";
    for engine in Engine::ALL {
        let state = match device(engine) {
            Ok(device) => format!("there: {}", describe(&device)),
            Err(reason) => format!("not there: {}", one_line(&reason.to_string())),
        };
        let _ = writeln!(text, "  {:<9}  {state}", engine.name());
    }
    let choice = Engine::auto();
    let _ = writeln!(text, "  {:<9}  {}", "auto", choice.engine.name());
    text += "\nkernels\n";
    text + &kernels()
}

fn version((major, minor): (u32, u32)) -> String {
    format!("CUDA {major}.{minor}")
}

/// A line for a GPU: what it is, and which form of the kernels it takes.
fn gpu(gpu: &CudaDevice) -> String {
    let targets = cuda::toolkit().map_or(&[][..], |toolkit| toolkit.targets);
    let takes = match Target::best(targets, gpu.compute_capability) {
        Some(target) => format!("takes the kernels as {target}"),
        None => "takes none of the kernels".to_string(),
    };
    let (major, minor) = gpu.compute_capability;
    format!(
        "  GPU {:<5}  {}, sm_{major}{minor}, {} multiprocessors, {} bytes of shared memory a block; {takes}\n",
        gpu.ordinal, gpu.name, gpu.multiprocessors, gpu.shared_memory_per_block
    )
}

/// A line per kernel, all its rows of the table together.
fn kernels() -> String {
    let key = |row: &Instance| (row.kernel, row.engines, row.direction);
    let width = INSTANCES.iter().map(|row| row.kernel.len()).max().unwrap_or(0);
    let mut text = String::new();
    for (n, first) in INSTANCES.iter().enumerate() {
        if INSTANCES[..n].iter().any(|row| key(row) == key(first)) {
            continue;
        }
        let rows: Vec<&Instance> = INSTANCES.iter().filter(|row| key(row) == key(first)).collect();
        let dtypes = distinct(rows.iter().flat_map(|row| row.dtypes).map(|dtype| dtype.name().to_string()));
        let head_dim = match (first.head_dim_step, rows.iter().map(|row| row.max_head_dim).max()) {
            (_, None | Some(usize::MAX)) => "any".to_string(),
            (1, Some(widest)) => format!("1 to {widest}"),
            (step, Some(widest)) => format!("multiples of {step} to {widest}"),
        };
        let tiles = rows.iter().filter(|row| row.device.is_some());
        let tiles = match distinct(tiles.map(|row| row.max_head_dim.to_string())) {
            none if none.is_empty() => none,
            widths => format!("; tile widths {widths}"),
        };
        let deterministic = if rows.iter().all(|row| row.deterministic) { "; deterministic" } else { "" };
        let engines = first.engines.iter().map(|engine| engine.name()).collect::<Vec<_>>().join(", ");
        let _ = writeln!(
            text,
            "  {:width$}  {engines:<14}  {:<8}  {dtypes}; head dim {head_dim}{tiles}{deterministic}",
            first.kernel,
            first.direction.name(),
        );
    }
    text
}

/// Every word once, in the order given.
fn distinct(words: impl Iterator<Item = String>) -> String {
    let mut known: Vec<String> = Vec::new();
    for word in words {
        if !known.contains(&word) {
            known.push(word);
        }
    }
    known.join(", ")
}

fn describe(device: &Device) -> String {
    match device {
        Device::Reference => "one thread, f64".to_string(),
        Device::Cpu { threads } => format!("{threads} threads"),
        Device::Emulated { .. } => {
            let names = distinct(Arch::value_variants().iter().map(|arch| arch.name().to_string()));
            format!("emulates the GPU that --arch names: {names}")
        }
        Device::Cuda(gpu) => gpu.name.clone(),
        _ => "there".to_string(),
    }
}
