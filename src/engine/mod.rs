//! The engines. All take the same [`Problem`](crate::Problem).

pub(crate) mod cpu;
pub mod cuda;
#[cfg(feature = "emulated")]
pub mod emulated;
pub(crate) mod host;
pub mod reference;

use crate::plan::{Device, Engine, Reason};

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
        Engine::Cuda => {
            let mut devices = cuda::devices()?;
            if devices.is_empty() { Err(Reason::NoDevice) } else { Ok(Device::Cuda(devices.swap_remove(0))) }
        }
    }
}
