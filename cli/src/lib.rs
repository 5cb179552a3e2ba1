//! The command line of fused-attention, as a function so that tests can call it.
//!
//! | command | reads | tells |
//! |---|---|---|
//! | `run` | a safetensors file by the contract | writes the results to another |
//! | `plan` | such a file's header | which kernel each engine would run, or why none |
//! | `info` | nothing | devices, engines, compiled kernels |
//! | `bench` | nothing | times of the shapes of real models |
//!
//! Exit status: 0; 2 for arguments or a file that are wrong; 3 for an engine that does not take the request, or whose
//! kernel broke a rule of the device.

mod array;
mod bench;
mod contract;
mod failure;
mod info;
mod machine;
mod plan;
mod run;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use failure::Failure;
use std::ffi::OsString;
use std::io::Write;

/// Memory-efficient attention over any number of branches: runs, plans and times it.
#[derive(Parser)]
#[command(name = "fused-attention", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Computes the attention that IN describes and writes the results to OUT.
    Run(run::Arguments),
    /// Prints which kernel would compute IN, or every reason why none would. Reads only the header.
    Plan(plan::Arguments),
    /// Prints devices, engines and compiled kernels.
    Info(info::Arguments),
    /// Times the shapes of real models.
    Bench(bench::Arguments),
}

/// Carries out one command line, program name first, and returns its exit status.
pub fn main(
    arguments: impl IntoIterator<Item = impl Into<OsString> + Clone>,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> u8 {
    let outcome = match Arguments::try_parse_from(arguments) {
        Ok(Arguments { command }) => match command {
            Command::Run(arguments) => run::run(&arguments),
            Command::Plan(arguments) => plan::plan(&arguments),
            Command::Info(arguments) => Ok(info::info(&arguments)),
            Command::Bench(arguments) => bench::bench(&arguments, out, err),
        },
        Err(error) => match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Ok(error.to_string()),
            // The whole help is the best answer to no command at all.
            ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
                let _ = write!(err, "{error}");
                return 2;
            }
            _ => Err(Failure::bad(failure::one_line(&error.to_string()))),
        },
    };
    // Whoever closed the pipe has seen what they wanted; a disk that is full has not.
    let told = outcome.and_then(|text| match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::bad(format_args!("stdout cannot be written: {error}")))
        }
        _ => Ok(()),
    });
    match told {
        Ok(()) => 0,
        Err(failure) => {
            let _ = writeln!(err, "{failure}");
            failure.status()
        }
    }
}
