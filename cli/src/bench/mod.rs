//! `bench`: how long the shapes of real models take.

mod gpu;
mod measure;
mod plot;
mod suites;
mod table;

use crate::contract::{check_target, write_atomically};
use crate::failure::Failure;
use crate::machine::{Machine, MachineArguments};
use crate::run::refused;
use clap::{Args, ValueEnum};
use fused_attention::DType;
use indicatif::{ProgressBar, ProgressStyle};
use measure::Row;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;
use suites::{CASES, Case, SUITES, TINY};

/// Runs of a case that count, at least.
const REPEATS: usize = 3;

#[derive(Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    machine: MachineArguments,
    /// sd15, sdxl, flux, wan, ip-adapter, backward, or all of them.
    #[arg(long, value_parser = parse_suite)]
    suite: String,
    /// Writes the rows to a file as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draws the rows as a bar chart.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// How long each case runs, three runs at least.
    #[arg(long, value_name = "S", default_value = "2", value_parser = parse_seconds)]
    seconds: Duration,
    /// Type of q, k, v and out.
    #[arg(long, value_enum, default_value = "f16")]
    dtype: FloatName,
}

/// The types that q may have, as an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum FloatName {
    F16,
    Bf16,
    F32,
}

impl From<FloatName> for DType {
    fn from(name: FloatName) -> Self {
        match name {
            FloatName::F16 => DType::F16,
            FloatName::Bf16 => DType::BF16,
            FloatName::F32 => DType::F32,
        }
    }
}

fn parse_suite(name: &str) -> Result<String, String> {
    if name == "all" || name == TINY || SUITES.contains(&name) {
        Ok(name.to_string())
    } else {
        Err(format!("the suites are {}, all", SUITES.join(", ")))
    }
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "give it a number of seconds".to_string())?;
    Duration::try_from_secs_f64(seconds).map_err(|_| "give it a number of seconds, 0 or more".to_string())
}

/// Times the cases of a suite. One that the engine refuses ends the command before anything is timed; among all
/// suites, refused ones are told and left out as long as one runs.
pub(crate) fn bench(arguments: &Arguments, err: &mut dyn Write) -> Result<String, Failure> {
    let (machine, dtype) = (Machine::try_from(&arguments.machine)?, DType::from(arguments.dtype));
    for path in arguments.json.iter().chain(&arguments.plot) {
        check_target(path)?;
    }

    let asked = |case: &&Case| case.suite == arguments.suite || arguments.suite == "all" && case.suite != TINY;
    let (mut cases, mut refusals) = (Vec::new(), Vec::new());
    for case in CASES.iter().filter(asked) {
        match case.plan(machine, dtype)? {
            Ok(_) => cases.push(case),
            Err(refusal) => refusals.push(refused(&format!("{} {}", case.suite, case.name), &refusal)),
        }
    }
    if !refusals.is_empty() && (cases.is_empty() || arguments.suite != "all") {
        return Err(Failure::Refused(refusals));
    }
    for refusal in refusals {
        let _ = writeln!(err, "left out: {refusal}");
    }

    let rows = measure_all(&cases, machine, dtype, arguments.seconds)?;
    if let Some(path) = &arguments.json {
        let rows: Vec<_> = rows.iter().map(json).collect();
        write_atomically(path, format!("{:#}\n", serde_json::Value::from(rows)).as_bytes())?;
    }
    if let Some(path) = &arguments.plot {
        let title = format!("fused-attention {}: {}", arguments.suite, machine.engine().name());
        write_atomically(path, plot::svg(&title, &rows).as_bytes())?;
    }
    Ok(table::aligned(&rows))
}

fn measure_all(
    cases: &[&'static Case],
    machine: Machine,
    dtype: DType,
    seconds: Duration,
) -> Result<Vec<Row>, Failure> {
    // Draws to stderr, and nothing where that is no terminal.
    let progress = ProgressBar::new(cases.len() as u64);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len}  {msg}  {elapsed}") {
        progress.set_style(style);
    }
    progress.enable_steady_tick(Duration::from_millis(200));
    let mut rows = Vec::with_capacity(cases.len());
    for case in cases {
        progress.set_message(format!("{} {}", case.suite, case.name));
        rows.push(case.measure(machine, dtype, seconds)?);
        progress.inc(1);
    }
    progress.finish_and_clear();
    Ok(rows)
}

fn json(row: &Row) -> serde_json::Value {
    serde_json::json!({
        "suite": row.case.suite,
        "case": row.case.name,
        "engine": row.engine.name(),
        "kernel": row.kernel,
        "direction": row.direction,
        "dtype": row.dtype.name(),
        "b": row.case.batch,
        "h": row.case.heads,
        "sq": row.case.seq_q,
        "skv": row.case.keys(),
        "d": row.case.head_dim,
        "median_us": row.median_us,
        "tflops": row.tflops,
        "gbytes_per_s": row.gbytes_per_s,
    })
}
