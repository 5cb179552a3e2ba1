//! `plan`: which kernel would compute a file, from its header alone.

use crate::contract::{Header, Request};
use crate::failure::{Failure, one_line};
use crate::machine::{Arch, EngineName, Machine};
use crate::run::refused;
use clap::Args;
use fused_attention::{NotTaken, Plan};
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
            let Some(problem) = problem else { continue };
            match machine.plan(problem) {
                Ok(plan) => sections.push(plan.to_string() + &others(&plan, &machine.not_taken(&plan, problem))),
                Err(refusal) => {
                    all = false;
                    sections.push(refused(direction, &refusal));
                }
            }
        }
        runs |= all;
    }
    if runs { Ok(sections.join("\n\n") + "\n") } else { Err(Failure::Refused(sections)) }
}

/// A line for each reason against each kernel that the plan passed over.
fn others(plan: &Plan, not_taken: &[NotTaken]) -> String {
    let mut lines = String::new();
    for NotTaken { kernel, reasons, .. } in not_taken {
        if reasons.is_empty() {
            lines += &format!("\nnot taken      {kernel}: {} comes first", plan.kernel());
        }
        for reason in reasons {
            lines += &format!("\nnot taken      {kernel}: {}", one_line(&reason.to_string()));
        }
    }
    lines
}
