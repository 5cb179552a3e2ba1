//! Who computes: an engine and, of the emulated one, which GPU.

use crate::failure::Failure;
use clap::{Args, ValueEnum};
#[cfg(feature = "emulated")]
use fused_attention::emulated::Settings;
use fused_attention::{
    Attention, Backward, Device, Engine, Error, Gradients, NotTaken, Outputs, Plan, Problem, Reason, Refusal,
    TensorMut, TensorRef,
};

/// The arguments that name a machine. Not `Arguments`: clap wants the name unique among those of one command.
#[derive(Args)]
pub(crate) struct MachineArguments {
    /// Who computes.
    #[arg(long, value_enum)]
    engine: EngineName,
    /// Which GPU is emulated, sm_80 unless told; for --engine emulated.
    #[arg(long, value_enum)]
    arch: Option<Arch>,
}

/// The library's engines, as an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum EngineName {
    /// Naive, in f64.
    Reference,
    /// Tiled, on all processor cores.
    Cpu,
    /// The CUDA kernels' source, run on the processor.
    Emulated,
    /// An NVIDIA GPU.
    Cuda,
}

impl From<EngineName> for Engine {
    fn from(name: EngineName) -> Self {
        match name {
            EngineName::Reference => Engine::Reference,
            EngineName::Cpu => Engine::Cpu,
            EngineName::Emulated => Engine::Emulated,
            EngineName::Cuda => Engine::Cuda,
        }
    }
}

/// A GPU to emulate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Arch {
    #[default]
    #[value(name = "sm_80")]
    Sm80,
    #[value(name = "sm_90a")]
    Sm90a,
}

impl Arch {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Arch::Sm80 => "sm_80",
            Arch::Sm90a => "sm_90a",
        }
    }

    fn compute_capability(self) -> (u32, u32) {
        match self {
            Arch::Sm80 => (8, 0),
            Arch::Sm90a => (9, 0),
        }
    }
}

/// An engine, and the GPU that it emulates if it is the one that does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Machine {
    engine: Engine,
    arch: Arch,
}

impl Machine {
    /// An architecture is an argument of the emulated engine alone.
    pub(crate) fn new(engine: EngineName, arch: Option<Arch>) -> Result<Self, Failure> {
        let engine = Engine::from(engine);
        match arch {
            Some(arch) if engine != Engine::Emulated => Err(Failure::bad(format_args!(
                "--arch {} is for --engine emulated, not for {}; leave it out",
                arch.name(),
                engine.name()
            ))),
            _ => Ok(Machine { engine, arch: arch.unwrap_or_default() }),
        }
    }

    /// Every engine, the emulated one with `arch`.
    pub(crate) fn all(arch: Option<Arch>) -> Vec<Machine> {
        Engine::ALL.map(|engine| Machine { engine, arch: arch.unwrap_or_default() }).to_vec()
    }

    pub(crate) fn engine(self) -> Engine {
        self.engine
    }

    /// Which kernel would compute `problem`, or why none would.
    pub(crate) fn plan(self, problem: &Problem) -> Result<Plan, Refusal> {
        match self.device() {
            Ok(device) => Plan::new(problem, &device),
            Err(_) => fused_attention::plan(self.engine, problem),
        }
    }

    /// Why the other kernels of its GPU would not.
    pub(crate) fn not_taken(self, plan: &Plan, problem: &Problem) -> Vec<NotTaken> {
        self.device().map_or_else(|_| Vec::new(), |device| plan.not_taken(problem, &device))
    }

    fn device(self) -> Result<Device, Reason> {
        let device = fused_attention::device(self.engine)?;
        match device {
            Device::Emulated { .. } => Ok(Device::Emulated { compute_capability: self.arch.compute_capability() }),
            device => Ok(device),
        }
    }

    /// The emulated GPU, on all cores.
    #[cfg(feature = "emulated")]
    fn settings(self) -> Settings {
        Settings {
            compute_capability: self.arch.compute_capability(),
            workers: std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32),
            ..Default::default()
        }
    }

    pub(crate) fn forward<'o>(
        self,
        attention: &Attention<TensorRef<'_>>,
        outputs: impl Into<Outputs<TensorMut<'o>>>,
    ) -> Result<Plan, Error> {
        #[cfg(feature = "emulated")]
        if self.engine == Engine::Emulated {
            return Ok(attention.forward_emulated(&self.settings(), outputs)?.0);
        }
        attention.forward(self.engine, outputs)
    }

    pub(crate) fn backward<'i>(
        self,
        attention: &Attention<TensorRef<'_>>,
        backward: impl Into<Backward<TensorRef<'i>>>,
        gradients: Gradients<TensorMut<'_>>,
    ) -> Result<Plan, Error> {
        #[cfg(feature = "emulated")]
        if self.engine == Engine::Emulated {
            return Ok(attention.backward_emulated(&self.settings(), backward, gradients)?.0);
        }
        attention.backward(self.engine, backward, gradients)
    }
}

impl TryFrom<&MachineArguments> for Machine {
    type Error = Failure;

    fn try_from(arguments: &MachineArguments) -> Result<Self, Failure> {
        Machine::new(arguments.engine, arguments.arch)
    }
}
