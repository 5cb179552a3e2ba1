//! The machine of an engine, as far as a plan must know it.

use super::Engine;

/// Where a plan is to run: an engine and what its machine can do.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Device {
    /// The naive engine; one thread.
    Reference,
    /// The processor.
    Cpu {
        /// Threads that work at once, each with its own scratch.
        threads: usize,
    },
    /// A GPU as emulated on the processor.
    Emulated {
        /// Compute capability, `(8, 0)` for sm_80.
        compute_capability: (u32, u32),
    },
    /// A GPU.
    Cuda(CudaDevice),
}

/// What a plan must know of a GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaDevice {
    /// The driver's number for it.
    pub ordinal: usize,
    /// Product name.
    pub name: String,
    /// Compute capability, `(9, 0)` for sm_90.
    pub compute_capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Shared memory that one block may ask for, in bytes.
    pub shared_memory_per_block: u32,
}

impl Device {
    /// The engine that works there.
    pub fn engine(&self) -> Engine {
        match self {
            Device::Reference => Engine::Reference,
            Device::Cpu { .. } => Engine::Cpu,
            Device::Emulated { .. } => Engine::Emulated,
            Device::Cuda(_) => Engine::Cuda,
        }
    }

    /// Compute capability, and bytes of shared memory that a block may have; nothing of a host.
    pub(crate) fn limits(&self) -> Option<((u32, u32), u32)> {
        match self {
            Device::Emulated { compute_capability } => {
                Some((*compute_capability, emulated_shared_memory(*compute_capability)))
            }
            Device::Cuda(device) => Some((device.compute_capability, device.shared_memory_per_block)),
            Device::Cpu { .. } | Device::Reference => None,
        }
    }

    /// Multiprocessors of a GPU; none of a host.
    pub(crate) fn multiprocessors(&self) -> usize {
        match self {
            // Few, so that blocks of a persistent grid have more than one tile.
            Device::Emulated { .. } => 2,
            Device::Cuda(device) => device.multiprocessors as usize,
            Device::Cpu { .. } | Device::Reference => 0,
        }
    }
}

/// Shared memory that a block of the emulated GPU may have (CUDA Programming Guide, compute capabilities).
fn emulated_shared_memory(compute_capability: (u32, u32)) -> u32 {
    match compute_capability {
        (8, 0) => 163 << 10,
        (9, 0) => 227 << 10,
        _ => 99 << 10,
    }
}
