//! `bench`: how long the shapes of real models take.

mod check;
mod device_call;
mod gpu;
mod graph;
mod limits;
mod measure;
mod plot;
mod request;
mod suites;
mod table;

use crate::contract::{check_target, write_atomically};
use crate::failure::Failure;
use crate::machine::{Machine, MachineArguments};
use crate::run::refused;
use clap::{Args, ValueEnum};
use fused_attention::{DType, Engine, Gradient};
use gpu::Cache;
use indicatif::{ProgressBar, ProgressStyle};
use limits::LIMITS;
use measure::{Row, Trouble};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;
use suites::{CASES, Case, SUITES, TINY};

/// Runs of a case that count, at least.
const REPEATS: usize = 3;

#[derive(Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    machine: MachineArguments,
    /// sd15, sdxl, sd3, flux, wan, ip-adapter, masked, backward, training, or all of them; limits: what the GPU itself can.
    #[arg(long, value_parser = parse_suite)]
    suite: String,
    /// Every resolution and batch size of the models, not only the usual ones.
    #[arg(long)]
    full: bool,
    /// Only cases that have all of these words in their names: "1024 self b8". Looks at every size.
    #[arg(long, value_name = "WORDS")]
    filter: Option<String>,
    /// Whether a GPU's cache holds the tensors when a launch starts, or each in turn: cold,warm; cold unless told.
    #[arg(long, value_enum, value_delimiter = ',')]
    cache: Vec<Cache>,
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
    if ["all", LIMITS].contains(&name) || TINY.contains(&name) || SUITES.contains(&name) {
        Ok(name.to_string())
    } else {
        Err(format!("the suites are {}, all, {LIMITS}", SUITES.join(", ")))
    }
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "give it a number of seconds".to_string())?;
    Duration::try_from_secs_f64(seconds).map_err(|_| "give it a number of seconds, 0 or more".to_string())
}

impl Arguments {
    fn asks_for(&self, case: &Case) -> bool {
        let suite = case.suite == self.suite || self.suite == "all" && !TINY.contains(&case.suite);
        suite && self.filter.as_ref().map_or(self.full || case.usual, |words| case.has_words(words))
    }

    /// The states of the cache to time in; none where there is no GPU.
    fn caches(&self, machine: Machine) -> Result<&[Cache], Failure> {
        match (machine.engine(), self.cache.as_slice()) {
            (Engine::Cuda, []) => Ok(&[Cache::Cold]),
            (Engine::Cuda, caches) => Ok(caches),
            (_, []) => Ok(&[]),
            (engine, _) => Err(Failure::bad(format_args!("--cache is for --engine cuda, not for {}", engine.name()))),
        }
    }
}

/// Times the cases of a suite. One that the engine refuses or fails at is a row that says so. Where the engine takes none
/// of them, and where it failed at one, the command fails, after all the others.
pub(crate) fn bench(arguments: &Arguments, out: &mut dyn Write, err: &mut dyn Write) -> Result<String, Failure> {
    let (machine, dtype) = (Machine::try_from(&arguments.machine)?, DType::from(arguments.dtype));
    let caches = arguments.caches(machine)?;
    for path in arguments.json.iter().chain(&arguments.plot) {
        check_target(path)?;
    }
    if arguments.suite == LIMITS {
        return limits(arguments, machine);
    }
    let cases: Vec<&Case> = CASES.iter().filter(|case| arguments.asks_for(case)).collect();
    if cases.is_empty() {
        return Err(Failure::bad(format_args!("no case of --suite {} has these words", arguments.suite)));
    }

    let rows = measure_all(&cases, machine, dtype, caches, arguments)?;
    if let Some(path) = &arguments.plot {
        let title = format!("fused-attention {}: {}", arguments.suite, machine.engine().name());
        write_atomically(path, plot::svg(&title, &rows).as_bytes())?;
    }
    let (mut refusals, mut failures) = (Vec::new(), Vec::new());
    for row in &rows {
        match &row.result {
            Err(Trouble::Refused(text)) => refusals.push(text.clone()),
            Err(Trouble::Failed(text)) => failures.push(text.clone()),
            Ok(_) => {}
        }
    }
    refusals.dedup();
    failures.dedup();
    let table = table::aligned(&rows);
    if failures.is_empty() && rows.iter().any(|row| row.result.is_ok()) {
        for refusal in refusals {
            let _ = writeln!(err, "left out: {refusal}");
        }
        return Ok(table);
    }
    if !failures.is_empty() {
        let _ = out.write_all(table.as_bytes());
    }
    refusals.extend(failures);
    Err(Failure::Refused(refusals))
}

fn measure_all(
    cases: &[&'static Case],
    machine: Machine,
    dtype: DType,
    caches: &[Cache],
    arguments: &Arguments,
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
        rows.extend(case.measure(machine, dtype, caches, arguments.seconds));
        // Whoever stops the command keeps what it has measured.
        if let Some(path) = &arguments.json {
            write_json(path, rows.iter().map(json).collect())?;
        }
        progress.inc(1);
    }
    progress.finish_and_clear();
    Ok(rows)
}

fn limits(arguments: &Arguments, machine: Machine) -> Result<String, Failure> {
    if machine.engine() != Engine::Cuda {
        return Err(Failure::bad(format_args!("--suite {LIMITS} is for --engine cuda")));
    }
    fused_attention::device(Engine::Cuda)
        .map_err(|reason| fused_attention::Refusal { engine: Engine::Cuda, reasons: vec![reason] })
        .map_err(|refusal| Failure::Refused(vec![refused(LIMITS, &refusal)]))?;
    let limits = limits::limits(arguments.seconds)?;
    if let Some(path) = &arguments.json {
        write_json(path, limits.iter().map(limits::Limit::json).collect())?;
    }
    Ok(limits.iter().map(limits::Limit::line).collect())
}

fn write_json(path: &Path, rows: Vec<serde_json::Value>) -> Result<(), Failure> {
    write_atomically(path, format!("{:#}\n", serde_json::Value::from(rows)).as_bytes())
}

/// A row with all that another program needs to time the same.
fn json(row: &Row) -> serde_json::Value {
    let case = row.case;
    let branches = case.branches.iter().map(|branch| {
        serde_json::json!({
            "keys": branch.keys,
            "gate": branch.gate,
            "region": branch.region,
            "bias": branch.bias.map(suites::Bias::name),
        })
    });
    let gradients = case.gradients().into_iter().map(|(gradient, _)| match gradient {
        Gradient::Q => "q".to_string(),
        Gradient::K(segment) => format!("k.{segment}"),
        Gradient::V(segment) => format!("v.{segment}"),
        Gradient::Bias(segment) => format!("bias.{segment}"),
        Gradient::Gate(branch) => format!("gate.{branch}"),
        Gradient::Region(branch) => format!("region.{branch}"),
    });
    let (refused, failed) = match &row.result {
        Ok(_) => (None, None),
        Err(Trouble::Refused(text)) => (Some(text), None),
        Err(Trouble::Failed(text)) => (None, Some(text)),
    };
    serde_json::json!({
        "suite": case.suite,
        "case": case.name,
        "usual": case.usual,
        "engine": row.engine.name(),
        "kernel": row.result.as_ref().ok().map(|measured| &measured.kernel),
        "direction": case.pass.name(),
        "dtype": row.dtype.name(),
        "b": case.batch,
        "h": case.heads,
        "sq": case.seq_q,
        "skv": case.keys(),
        "d": case.head_dim,
        "branches": branches.collect::<Vec<_>>(),
        "gradients": gradients.collect::<Vec<_>>(),
        "cache": row.cache.map(Cache::name),
        "flops": case.flops(),
        "bytes": case.compulsory_bytes(row.dtype),
        "median_us": row.median_us(),
        "tflops": row.tflops(),
        "gbytes_per_s": row.gbytes_per_s(),
        "refused": refused,
        "failed": failed,
    })
}
