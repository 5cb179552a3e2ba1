//! Times calls of a case on a GPU, with the second-level cache cold or warm. What they compute is checked first.

use super::check;
use super::device_call::DeviceCall;
use super::graph::Gpu;
use super::suites::{Case, Pass};
use crate::array::Array;
use crate::failure::Failure;
use clap::ValueEnum;
use fused_attention::{Attention, DType, Engine, Plan};
use std::time::Duration;

/// What the second-level cache holds when a call starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Cache {
    /// Nothing of it: each call has tensors of its own, several times the cache together, before one is used again.
    Cold,
    /// All that fits: every call has the same tensors.
    Warm,
}

impl Cache {
    pub(super) fn name(self) -> &'static str {
        match self {
            Cache::Cold => "cold",
            Cache::Warm => "warm",
        }
    }
}

/// How often the tensors between two uses of the same one would fill the cache.
const CACHES: usize = 4;
/// Copies of the tensors, at most; shapes of real models stay below.
const COPIES: usize = 2048;

/// The plans of a call and its median time for each state of the cache.
pub(super) fn medians(
    case: &Case,
    inputs: &Attention<Array<'_>>,
    dtype: DType,
    caches: &[Cache],
    at_least: Duration,
) -> Result<(Vec<Plan>, Vec<Duration>), Failure> {
    let gpu = Gpu::first()?;
    checked(&gpu, case, inputs, dtype)?;

    let dout = (case.pass != Pass::Forward).then(|| case.dout(dtype, case.seq_q));
    let call = || DeviceCall::new(&gpu.stream, case, dtype, inputs, dout.as_ref());
    let mut calls = vec![call()?];
    let plans = calls[0].launch()?;
    let enough = gpu.enough(|| calls[0].launch().map(drop))?;
    let bytes = calls[0].bytes();
    let cold = (CACHES * gpu.cache_bytes()).div_ceil(bytes).max(1);
    if cold > COPIES && caches.contains(&Cache::Cold) {
        return Err(Failure::bad(format_args!("{bytes} bytes are too few to leave the cache; ask for --cache warm")));
    }
    let mut medians = Vec::new();
    for &cache in caches {
        let wanted = if cache == Cache::Cold { cold } else { 1 };
        while calls.len() < wanted {
            calls.push(call()?);
        }
        let rounds = enough.div_ceil(wanted);
        medians.push(gpu.median(rounds * wanted, at_least, || {
            let mut launches = calls.iter().take(wanted).cycle().take(rounds * wanted);
            launches.try_for_each(|call| call.launch().map(drop))
        })?);
    }
    Ok((plans, medians))
}

/// Results of one call against another engine.
fn checked(gpu: &Gpu, case: &Case, inputs: &Attention<Array<'_>>, dtype: DType) -> Result<(), Failure> {
    if case.pass == Pass::Forward {
        let call = DeviceCall::new(&gpu.stream, case, dtype, inputs, None)?;
        call.launch()?;
        return check::forward(case, inputs, &call.out()?, Engine::Cpu);
    }
    let dout = case.dout(dtype, check::queries(case, Engine::Reference));
    let call = DeviceCall::new(&gpu.stream, case, dtype, inputs, Some(&dout))?;
    call.launch()?;
    check::gradients(case, inputs, &dout, &call.gradients()?)
}
