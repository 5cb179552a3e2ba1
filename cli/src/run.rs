//! `run`: one request from a file, its results to another.

use crate::array::Array;
use crate::contract::{Header, Request, Results, check_target, read_arrays, write_atomically};
use crate::failure::{Failure, one_line};
use crate::machine::{Machine, MachineArguments};
use clap::Args;
use fused_attention::{
    Argument, Attention, DType, Engine, Error, Gradients, Outputs, Plan, Refusal, TensorMut, TensorRef,
};
use safetensors::tensor::{Dtype, TensorView};
use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Instant;

#[derive(Args)]
pub(crate) struct Arguments {
    /// Safetensors file with q, k.i, v.i, optional bias.i, key_len.i, gate.i, region.i, and dout to run the backward.
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// Where out, lse.b and the gradients go; written whole or not at all.
    #[arg(value_name = "OUT")]
    output: PathBuf,
    #[command(flatten)]
    machine: MachineArguments,
    /// Prints engine, kernels and times in milliseconds as one JSON object.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<String, Failure> {
    let machine = Machine::try_from(&arguments.machine)?;
    let path = &arguments.input;
    let of_input = |failure: Failure| failure.of_file(path);

    let mut header = Header::read(path)?;
    let request = Request::new(&header).map_err(of_input)?;
    let data = header.read_data().map_err(of_input)?;
    let arrays = read_arrays(&header, &request, &data).map_err(of_input)?;
    let views: HashMap<Argument, TensorRef<'_>> =
        arrays.iter().map(|(&argument, array)| (argument, array.view())).collect();
    let attention = request.attention(&views).map_err(of_input)?;
    check_target(&arguments.output)?;
    check_machine(machine, &request)?;

    let dout = views.get(&Argument::Dout).copied();
    let computed = compute(machine, &attention, dout, &request.results).map_err(of_input)?;
    write_atomically(&arguments.output, &computed.serialize(&request.results)?)?;
    Ok(computed.report(machine.engine(), arguments.json))
}

/// Asks for both plans before anything is computed, so that a backward that nobody runs costs no forward.
fn check_machine(machine: Machine, request: &Request) -> Result<(), Failure> {
    let mut refusals = Vec::new();
    for (direction, problem) in [("forward", Some(&request.forward)), ("backward", request.backward.as_ref())] {
        if let Some(Err(refusal)) = problem.map(|problem| machine.plan(problem)) {
            refusals.push(refused(direction, &refusal));
        }
    }
    if refusals.is_empty() { Ok(()) } else { Err(Failure::Refused(refusals)) }
}

/// One line that holds every reason.
pub(crate) fn refused(direction: &str, refusal: &Refusal) -> String {
    format!("{direction}: {}", one_line(&refusal.to_string()))
}

/// The results in memory.
struct Computed {
    out: Array<'static>,
    lse: Array<'static>,
    /// In the order of [`Results::gradients`].
    gradients: Vec<Array<'static>>,
    forward: Timed,
    backward: Option<Timed>,
}

struct Timed {
    plan: Plan,
    milliseconds: f64,
}

fn compute(
    machine: Machine,
    attention: &Attention<TensorRef<'_>>,
    dout: Option<TensorRef<'_>>,
    results: &Results,
) -> Result<Computed, Failure> {
    let mut out = Array::zeros(results.dtype, &results.out);
    let mut lse = Array::zeros(DType::F32, &results.lse);
    let outputs = Outputs { out: writable(&mut out)?, lse: Some(writable(&mut lse)?) };
    let forward = timed(|| machine.forward(attention, outputs))?;

    let shapes = results.gradients.iter().map(|wanted| &wanted.shape);
    let mut gradients: Vec<Array<'static>> = shapes.map(|shape| Array::zeros(DType::F32, shape)).collect();
    let backward = match dout {
        Some(dout) => {
            let mut wanted = Gradients::new();
            for (named, array) in results.gradients.iter().zip(&mut gradients) {
                wanted = wanted.want(named.gradient, writable(array)?);
            }
            Some(timed(|| machine.backward(attention, dout, wanted))?)
        }
        None => None,
    };
    Ok(Computed { out, lse, gradients, forward, backward })
}

/// Validation has let no other type than floats through to the results.
fn writable<'a>(array: &'a mut Array<'static>) -> Result<TensorMut<'a>, Failure> {
    array.view_mut().ok_or_else(|| Failure::bad("q is not of a float type"))
}

fn timed(run: impl FnOnce() -> Result<Plan, Error>) -> Result<Timed, Failure> {
    let start = Instant::now();
    let plan = run()?;
    Ok(Timed { plan, milliseconds: start.elapsed().as_secs_f64() * 1e3 })
}

impl Computed {
    /// The output file. `lse` is one array here and one tensor per branch there.
    fn serialize(&self, results: &Results) -> Result<Vec<u8>, Failure> {
        let unwritable = |error: safetensors::SafeTensorError| Failure::bad(format_args!("OUT: {error}"));
        let mut tensors = vec![("out".to_string(), view(self.out.dtype(), self.out.shape(), self.out.bytes()))];
        let [branches, shape @ ..] = results.lse;
        let per_branch = shape.iter().product::<usize>() * DType::F32.size();
        for branch in 0..branches {
            let bytes = self.lse.bytes().get(branch * per_branch..).and_then(|rest| rest.get(..per_branch));
            tensors.push((format!("lse.{branch}"), view(DType::F32, &shape, bytes.unwrap_or_default())));
        }
        for (wanted, array) in results.gradients.iter().zip(&self.gradients) {
            tensors.push((wanted.argument.to_string(), view(array.dtype(), array.shape(), array.bytes())));
        }
        let views: Result<Vec<_>, _> = tensors.into_iter().map(|(name, view)| Ok((name, view?))).collect();
        safetensors::serialize(views.map_err(unwritable)?, None).map_err(unwritable)
    }

    fn report(&self, engine: Engine, json: bool) -> String {
        let Computed { forward, backward, .. } = self;
        if json {
            let mut object = serde_json::json!({
                "engine": engine.name(),
                "kernel": forward.plan.symbol(),
                "forward_ms": forward.milliseconds,
                "time_ms": forward.milliseconds + backward.as_ref().map_or(0.0, |backward| backward.milliseconds),
            });
            if let (Some(backward), Some(object)) = (backward, object.as_object_mut()) {
                object.insert("backward_kernel".to_string(), backward.plan.symbol().into());
                object.insert("backward_ms".to_string(), backward.milliseconds.into());
            }
            return format!("{object}\n");
        }
        let line = |timed: &Timed| format!("{}  {:.3} ms\n", timed.plan.symbol(), timed.milliseconds);
        line(forward) + &backward.as_ref().map_or(String::new(), line)
    }
}

fn view<'a>(dtype: DType, shape: &[usize], bytes: &'a [u8]) -> Result<TensorView<'a>, safetensors::SafeTensorError> {
    let dtype = match dtype {
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::F32 => Dtype::F32,
        DType::Bool => Dtype::BOOL,
        DType::U32 => Dtype::U32,
    };
    TensorView::new(dtype, shape.to_vec(), bytes)
}
