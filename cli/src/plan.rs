//! `plan`: which kernel would compute a file, from its header alone.

use crate::EngineName;
use crate::contract::{Header, Request};
use crate::failure::Failure;
use crate::run::refused;
use clap::Args;
use fused_attention::Engine;
use std::path::PathBuf;

#[derive(Args)]
pub(crate) struct Arguments {
    /// Safetensors file as `run` takes it. Its data is not read and may be missing.
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// Only this engine; without it, all of them.
    #[arg(long, value_enum)]
    engine: Option<EngineName>,
}

/// Prints the plans of the engines asked for. It is a refusal if none of them runs the whole request.
pub(crate) fn plan(arguments: &Arguments) -> Result<String, Failure> {
    let header = Header::read(&arguments.input)?;
    let request = Request::new(&header).map_err(|failure| failure.of_file(&arguments.input))?;
    let engines = arguments.engine.map_or(Engine::ALL.to_vec(), |name| vec![name.into()]);

    let mut sections = Vec::new();
    let mut runs = false;
    for engine in engines {
        let mut all = true;
        for (direction, problem) in [("forward", Some(&request.forward)), ("backward", request.backward.as_ref())] {
            match problem.map(|problem| fused_attention::plan(engine, problem)) {
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
