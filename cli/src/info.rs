//! `info`: what is here to compute with.

use crate::failure::one_line;
use clap::Args;
use fused_attention::{Device, Engine, INSTANCES, cuda, device, support_table};
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
    text += "\ndevices\n";
    match cuda::devices() {
        Ok(devices) if devices.is_empty() => text += "  none: the NVIDIA driver reports no GPU\n",
        Ok(devices) => {
            for gpu in devices {
                let (major, minor) = gpu.compute_capability;
                let _ = writeln!(
                    text,
                    "  {}: {}, sm_{major}{minor}, {} multiprocessors, {} bytes of shared memory per block",
                    gpu.ordinal, gpu.name, gpu.multiprocessors, gpu.shared_memory_per_block
                );
            }
        }
        Err(reason) => {
            let _ = writeln!(text, "  none: {}", one_line(&reason.to_string()));
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
    text += "\nkernels\n";
    let width = INSTANCES.iter().map(|row| row.kernel.len()).max().unwrap_or(0);
    for row in INSTANCES {
        let dtypes: Vec<&str> = row.dtypes.iter().map(|dtype| dtype.name()).collect();
        let head_dim = match row.max_head_dim {
            usize::MAX => "any".to_string(),
            max => format!("1 to {max}"),
        };
        let _ = writeln!(
            text,
            "  {:width$}  {:<9}  {:<8}  {}; head dim {head_dim}{}",
            row.kernel,
            row.engine.name(),
            row.direction.name(),
            dtypes.join(", "),
            if row.deterministic { "; deterministic" } else { "" },
        );
    }
    text
}

fn describe(device: &Device) -> String {
    match device {
        Device::Reference => "one thread, f64".to_string(),
        Device::Cpu { threads } => format!("{threads} threads"),
        Device::Emulated { compute_capability: (major, minor) } => format!("emulates sm_{major}{minor}"),
        Device::Cuda(gpu) => gpu.name.clone(),
        _ => "there".to_string(),
    }
}
