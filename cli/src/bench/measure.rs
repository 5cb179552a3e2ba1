//! Times one case: inputs, a run that is checked, runs that count, the median.

use super::check::{self, writable};
use super::gpu::Cache;
use super::request::stored;
use super::suites::{Case, Pass};
use super::{REPEATS, gpu};
use crate::array::Array;
use crate::failure::Failure;
use crate::machine::Machine;
use crate::run::refused;
use fused_attention::{Attention, Backward, DType, Engine, Gradient, Gradients, Outputs, Plan, TensorRef};
use std::time::{Duration, Instant};

/// One line of the result.
pub(super) struct Row {
    pub(super) case: &'static Case,
    pub(super) engine: Engine,
    pub(super) dtype: DType,
    /// Whether the second-level cache of a GPU held the tensors; nothing of a time that is not a GPU's own.
    pub(super) cache: Option<Cache>,
    pub(super) result: Result<Measured, Trouble>,
}

/// What a case took.
#[derive(Clone)]
pub(super) struct Measured {
    pub(super) kernel: String,
    pub(super) median: Duration,
}

/// Why there is no time.
#[derive(Clone)]
pub(super) enum Trouble {
    /// The engine does not take the case: every reason.
    Refused(String),
    /// The engine failed at it, or its results are wrong.
    Failed(String),
}

impl Row {
    pub(super) fn median_us(&self) -> Option<f64> {
        self.result.as_ref().ok().map(|measured| measured.median.as_secs_f64() * 1e6)
    }

    pub(super) fn tflops(&self) -> Option<f64> {
        self.median_us().map(|us| self.case.flops() / us / 1e6)
    }

    pub(super) fn gbytes_per_s(&self) -> Option<f64> {
        self.median_us().map(|us| self.case.compulsory_bytes(self.dtype) / us / 1e3)
    }

    pub(super) fn kernel(&self) -> &str {
        match &self.result {
            Ok(measured) => &measured.kernel,
            Err(Trouble::Refused(_)) => "refused",
            Err(Trouble::Failed(_)) => "failed",
        }
    }
}

impl Case {
    /// Times the case with random inputs: a row for each state of the cache.
    pub(super) fn measure(
        &'static self,
        machine: Machine,
        dtype: DType,
        caches: &[Cache],
        at_least: Duration,
    ) -> Vec<Row> {
        let name = format!("{} {}", self.suite, self.name);
        let result = match self.refusal(machine, dtype) {
            Ok(None) => self.times(machine, dtype, caches, at_least),
            Ok(Some(refusal)) => Err(Trouble::Refused(refused(&name, &refusal))),
            Err(failure) => Err(failure.into()),
        };
        let row = |cache, result| Row { case: self, engine: machine.engine(), dtype, cache, result };
        match result {
            Ok(times) => times.into_iter().map(|(cache, measured)| row(cache, Ok(measured))).collect(),
            Err(trouble) => {
                let trouble = match trouble {
                    Trouble::Failed(text) => Trouble::Failed(format!("{name}: {text}")),
                    refused => refused,
                };
                let caches = caches.iter().map(|&cache| Some(cache));
                let caches: Vec<_> = if caches.len() == 0 { vec![None] } else { caches.collect() };
                caches.into_iter().map(|cache| row(cache, Err(trouble.clone()))).collect()
            }
        }
    }

    fn times(
        &self,
        machine: Machine,
        dtype: DType,
        caches: &[Cache],
        at_least: Duration,
    ) -> Result<Vec<(Option<Cache>, Measured)>, Trouble> {
        let inputs = self.inputs(dtype);
        if machine.engine() == Engine::Cuda {
            let (plans, medians) = gpu::medians(self, &inputs, dtype, caches, at_least)?;
            let kernels: Vec<String> = plans.iter().map(Plan::symbol).collect();
            let measured = |median| Measured { kernel: kernels.join(" "), median };
            return Ok(caches.iter().map(|&cache| Some(cache)).zip(medians.into_iter().map(measured)).collect());
        }
        let measured = match self.pass {
            Pass::Forward => self.forward(&inputs, machine, dtype, at_least)?,
            _ => self.backward(&inputs, machine, dtype, at_least)?,
        };
        Ok(vec![(None, measured)])
    }

    fn forward(
        &self,
        inputs: &Attention<Array<'_>>,
        machine: Machine,
        dtype: DType,
        at_least: Duration,
    ) -> Result<Measured, Failure> {
        let attention = inputs.map(Array::view);
        let mut out = Array::zeros(dtype, &self.q_shape());
        let plan = machine.forward(&attention, writable(&mut out)?)?;
        if machine.engine() != Engine::Reference {
            check::forward(self, inputs, &out, Engine::Reference)?;
        }
        let median = median(at_least, || Ok(machine.forward(&attention, writable(&mut out)?).map(drop)?))?;
        Ok(Measured { kernel: plan.symbol(), median })
    }

    /// The backward, from what the forward left, or both.
    fn backward(
        &self,
        inputs: &Attention<Array<'_>>,
        machine: Machine,
        dtype: DType,
        at_least: Duration,
    ) -> Result<Measured, Failure> {
        let attention = inputs.map(Array::view);
        let mut out = Array::zeros(dtype, &self.q_shape());
        let mut lse = Array::zeros(DType::F32, &self.lse_shape());
        let arrays = self.gradients().into_iter();
        let arrays = arrays.map(|(gradient, shape)| (gradient, Array::zeros(stored(gradient, dtype), &shape)));
        let mut arrays: Vec<(Gradient, Array<'static>)> = arrays.collect();

        let first = machine.forward(&attention, Outputs::new(writable(&mut out)?).lse(writable(&mut lse)?))?;
        let checked = self.dout(dtype, check::queries(self, Engine::Reference));
        let saved = Backward::new(checked.view()).saved(out.view(), lse.view());
        let second = gradients(&attention, machine, saved, &mut arrays)?;
        if machine.engine() != Engine::Reference {
            check::gradients(self, inputs, &checked, &arrays)?;
        }

        let dout = self.dout(dtype, self.seq_q);
        let median = median(at_least, || {
            if self.pass == Pass::TrainingStep {
                machine.forward(&attention, Outputs::new(writable(&mut out)?).lse(writable(&mut lse)?))?;
            }
            let saved = Backward::new(dout.view()).saved(out.view(), lse.view());
            gradients(&attention, machine, saved, &mut arrays).map(drop)
        })?;
        let kernel = match self.pass {
            Pass::TrainingStep => format!("{} {}", first.symbol(), second.symbol()),
            _ => second.symbol(),
        };
        Ok(Measured { kernel, median })
    }
}

fn gradients(
    attention: &Attention<TensorRef<'_>>,
    machine: Machine,
    backward: Backward<TensorRef<'_>>,
    arrays: &mut [(Gradient, Array<'static>)],
) -> Result<Plan, Failure> {
    let mut wanted = Gradients::new();
    for (gradient, array) in arrays {
        wanted = wanted.want(*gradient, writable(array)?);
    }
    Ok(machine.backward(attention, backward, wanted)?)
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        Trouble::Failed(crate::failure::one_line(&failure.to_string()))
    }
}

/// Runs until there are enough of them and enough time has passed.
fn median(at_least: Duration, mut run: impl FnMut() -> Result<(), Failure>) -> Result<Duration, Failure> {
    let (start, mut times) = (Instant::now(), Vec::new());
    while times.len() < REPEATS || start.elapsed() < at_least {
        let start = Instant::now();
        run()?;
        // No clock is finer than this; without it, a time of 0 would divide.
        times.push(start.elapsed().max(Duration::from_nanos(1)));
    }
    times.sort_unstable();
    let middle = times.len() / 2;
    Ok(if times.len() % 2 == 1 { times[middle] } else { (times[middle - 1] + times[middle]) / 2 })
}
