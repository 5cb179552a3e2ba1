//! `plan`: which kernel would compute a file, from its header alone.

use crate::contract::{Header, Request};
use crate::failure::Failure;
use crate::machine::{Arch, EngineName, Machine};
use crate::run::refused;
use clap::Args;
use std::path::PathBuf;

#[derive(Args)]
pub(crate) struct Arguments {
    /// Safetensors file as `run` takes it. Its data is not read and may be missing.
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// Only this engine; without it, all of them.
    #[arg(long, value_enum)]
    engine: Option<EngineName>,
    /// Which GPU is emulated, sm_80 unless told.
    #[arg(long, value_enum)]
    arch: Option<Arch>,
}

/// Prints the plans of the engines asked for. It is a refusal if none of them runs the whole request.
pub(crate) fn plan(arguments: &Arguments) -> Result<String, Failure> {
    let machines = match arguments.engine {
        Some(engine) => vec![Machine::new(engine, arguments.arch)?],
        None => Machine::all(arguments.arch),
    };
    let header = Header::read(&arguments.input)?;
    let request = Request::new(&header).map_err(|failure| failure.of_file(&arguments.input))?;

    let mut sections = Vec::new();
    let mut runs = false;
    for machine in machines {
        let mut all = true;
        for (direction, problem) in [("forward", Some(&request.forward)), ("backward", request.backward.as_ref())] {
            match problem.map(|problem| machine.plan(problem)) {
                Some(Ok(plan)) => sections.push(plan.to_string()),
                Some(Err(refusal)) => {
                    all = false;
                    sections.push(refused(direction, &refusal));
                }
                None => {}
            }
        }
        runs |= all;
    }
    if runs { Ok(sections.join("\n\n") + "\n") } else { Err(Failure::Refused(sections)) }
}
