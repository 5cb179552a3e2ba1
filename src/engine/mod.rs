//! The engines. All take the same [`Problem`](crate::Problem).

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(feature = "emulated")]
pub mod emulated;
pub(crate) mod host;
pub mod reference;

use crate::plan::{Device, Engine, Plan, Reason, Refusal, table_reasons};
use crate::problem::Problem;
use std::fmt;

/// The machine on which `engine` would run here.
///
/// # Errors
/// Why there is none.
pub fn device(engine: Engine) -> Result<Device, Reason> {
    match engine {
        Engine::Reference => Ok(Device::Reference),
        Engine::Cpu => Ok(Device::Cpu { threads: rayon::current_num_threads() }),
        #[cfg(feature = "emulated")]
        Engine::Emulated => {
            Ok(Device::Emulated { compute_capability: emulated::Settings::default().compute_capability })
        }
        #[cfg(not(feature = "emulated"))]
        Engine::Emulated => {
            Err(Reason::NotBuilt("the emulator is not part of this build; enable the `emulated` feature"))
        }
        #[cfg(feature = "cuda")]
        Engine::Cuda => {
            let first = cuda::devices()?.into_iter().next().ok_or(Reason::NoDevice)?;
            cuda::supported(&first)?;
            Ok(Device::Cuda(first))
        }
        #[cfg(not(feature = "cuda"))]
        Engine::Cuda => Err(Reason::NotBuilt("built without the `cuda` feature; enable it")),
    }
}

/// What [`Engine::auto`] chose, and why.
#[derive(Clone, Debug)]
pub struct Choice {
    /// The engine to use.
    pub engine: Engine,
    /// The engines that come before it, each with all its reasons.
    pub passed_over: Vec<Refusal>,
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.engine.name())?;
        self.passed_over.iter().try_for_each(|refusal| write!(f, "; {refusal}"))
    }
}

impl Engine {
    /// The engine for this machine: `cuda` if the first GPU, its driver and this build's kernels go together, else `cpu`.
    ///
    /// Never `emulated` or `reference`, which are there to check the others. The choice tells why `cuda` was passed over.
    pub fn auto() -> Choice {
        match device(Engine::Cuda) {
            Ok(_) => Choice { engine: Engine::Cuda, passed_over: Vec::new() },
            Err(reason) => {
                let refusal = Refusal { engine: Engine::Cuda, reasons: vec![reason] };
                Choice { engine: Engine::Cpu, passed_over: vec![refusal] }
            }
        }
    }

    /// The engine for one problem, in the same order: one that has a kernel for it here.
    ///
    /// # Errors
    /// The refusal of `cpu`, if that has none either.
    pub fn auto_for(problem: &Problem) -> Result<Choice, Refusal> {
        let mut passed_over = Vec::new();
        match plan(Engine::Cuda, problem) {
            Ok(_) => return Ok(Choice { engine: Engine::Cuda, passed_over }),
            Err(refusal) => passed_over.push(refusal),
        }
        plan(Engine::Cpu, problem)?;
        Ok(Choice { engine: Engine::Cpu, passed_over })
    }
}

/// Which kernel `engine` would run here, or every reason why it would not.
///
/// # Errors
/// [`Refusal`] with the reasons of this machine and those of the instance table.
pub fn plan(engine: Engine, problem: &Problem) -> Result<Plan, Refusal> {
    match device(engine) {
        Ok(device) => Plan::new(problem, &device),
        Err(reason) => {
            let mut reasons = table_reasons(engine, problem);
            if !reasons.contains(&reason) {
                reasons.insert(0, reason);
            }
            Err(Refusal { engine, reasons })
        }
    }
}
