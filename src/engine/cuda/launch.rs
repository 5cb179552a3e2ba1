//! A plan on a stream: which kernels, on which device, with which addresses; and the forward.

use super::bind::{self, Bindings, Bound, too_short};
use super::driver::{Driver, Kernel, driver};
use super::tensor::{CudaTensor, CudaTensorMut};
use super::{failed, kernels};
use crate::error::Error;
use crate::plan::params::ForwardParams;
use crate::plan::{
    CudaDevice, Device, Engine, INSTANCES, Plan, Reason, Refusal, TOOLKIT, Target, Toolkit, launch, table_reasons,
};
use crate::problem::{Argument, Attention, Invalid, Outputs, Problem, Rule, Tensor, Violation};
use cudarc::driver::{CudaContext, CudaStream, SyncOnDrop};
use smallvec::SmallVec;
use std::ffi::c_void;
use std::sync::OnceLock;

/// The GPUs of this process, asked for once.
fn known_devices() -> Result<&'static [Device], Reason> {
    static DEVICES: OnceLock<Vec<Device>> = OnceLock::new();
    if let Some(devices) = DEVICES.get() {
        return Ok(devices);
    }
    let found = driver()?.devices()?;
    if found.is_empty() {
        return Err(Reason::NoDevice);
    }
    Ok(DEVICES.get_or_init(|| found.into_iter().map(Device::Cuda).collect()))
}

/// The GPUs that the driver reports.
///
/// # Errors
/// Why there are none: no driver library, a driver that fails, or no GPU.
pub fn devices() -> Result<Vec<CudaDevice>, Reason> {
    let cuda = |device: &Device| match device {
        Device::Cuda(device) => Some(device.clone()),
        _ => None,
    };
    Ok(known_devices()?.iter().filter_map(cuda).collect())
}

/// The version of CUDA that the driver is of, `(13, 0)`.
///
/// # Errors
/// Why there is no driver.
pub fn driver_version() -> Result<(u32, u32), Reason> {
    Ok(driver()?.version)
}

/// What this build's kernels were compiled with and for; nothing if there was no CUDA compiler.
pub fn toolkit() -> Option<Toolkit> {
    TOOLKIT
}

/// Whether the driver and a GPU can take this build's kernels.
pub(crate) fn supported(gpu: &CudaDevice) -> Result<(), Reason> {
    let toolkit = TOOLKIT.as_ref().ok_or(Reason::NoCompiler)?;
    driver()?.supports(toolkit.version)?;
    let have = gpu.compute_capability;
    let needs = INSTANCES.iter().filter_map(|row| row.device.as_ref()).map(|code| code.compute_capability);
    match needs.min() {
        Some(need) if have < need => Err(Reason::ComputeCapability { have, need }),
        _ if Target::best(toolkit.targets, have).is_none() => {
            Err(Reason::Architecture { have, compiled: toolkit.targets })
        }
        _ => Ok(()),
    }
}

/// All that a launch needs beside addresses.
pub(super) struct Ready {
    driver: &'static Driver,
    pub(super) plan: Plan,
    /// One for each of the plan's launches.
    kernels: SmallVec<[Kernel; 4]>,
}

/// Plans, and loads the kernels that nobody has used yet.
pub(super) fn ready(problem: &Problem, ordinal: usize) -> Result<Ready, Error> {
    let refuse = |reason: Reason| {
        let mut reasons = table_reasons(Engine::Cuda, problem);
        if !reasons.contains(&reason) {
            reasons.insert(0, reason);
        }
        Error::from(Refusal { engine: Engine::Cuda, reasons })
    };
    let driver = driver().map_err(refuse)?;
    let known = known_devices().map_err(refuse)?.get(ordinal);
    let Some(device @ Device::Cuda(gpu)) = known else { return Err(refuse(Reason::NoDevice)) };
    supported(gpu).map_err(refuse)?;
    let plan = Plan::new(problem, device)?;
    let mut loaded = SmallVec::new();
    for launched in plan.launched() {
        loaded.push(kernels::kernel(driver, launched.instance, gpu).map_err(Error::from_driver(refuse))?);
    }
    Ok(Ready { driver, plan, kernels: loaded })
}

impl Error {
    /// A call of the driver that failed, or else a refusal.
    fn from_driver(refuse: impl Fn(Reason) -> Error) -> impl Fn(Reason) -> Error {
        move |reason| match reason {
            Reason::Driver { call, error } => Error::Driver { call, error },
            reason => refuse(reason),
        }
    }
}

impl Ready {
    /// Checks addresses.
    pub(super) fn check(&self, bindings: &Bindings) -> Result<(), Error> {
        bind::addresses(bindings)?;
        Ok(bind::row_starts(bindings, &self.plan)?)
    }

    /// Puts the plan's launch of this number on the stream.
    ///
    /// # Safety
    /// `params` is the block that the launch's kernel takes, made of tensors whose bindings have been checked. Their buffers
    /// are memory that the stream's context can reach, alive until the launch has run, and nobody else writes them, or reads
    /// the outputs, meanwhile.
    pub(super) unsafe fn enqueue<P>(
        &self,
        number: usize,
        problem: &Problem,
        params: &P,
        stream: *mut c_void,
    ) -> Result<(), Error> {
        let shape = self.plan.launched()[number].shape(problem);
        let refuse = |reason| Error::from(Refusal { engine: Engine::Cuda, reasons: vec![reason] });
        // SAFETY: the build asserts the block's layout. Each tensor's buffer holds every element that its description
        // reaches; the kernel touches no others.
        unsafe { self.driver.launch(self.kernels[number], shape, params, stream) }.map_err(Error::from_driver(refuse))
    }

    /// Puts a forward on the stream.
    ///
    /// # Safety
    /// As [`enqueue`](Self::enqueue).
    pub(super) unsafe fn forward(
        &self,
        problem: &Problem,
        params: &ForwardParams,
        stream: *mut c_void,
    ) -> Result<(), Error> {
        let refuse = |reason| Error::from(Refusal { engine: Engine::Cuda, reasons: vec![reason] });
        for number in 0..self.plan.launched().len() {
            if self.plan.has_tensor_maps() {
                let encode = |of: &launch::MapOf| self.driver.tensor_map(problem.dtype(), of);
                let mapped = launch::mapped(*params, &self.plan, encode).map_err(Error::from_driver(refuse))?;
                // SAFETY: passed on; such kernels take this block, whose maps are those of the same tensors.
                unsafe { self.enqueue(number, problem, &mapped, stream) }?;
            } else {
                // SAFETY: passed on; the other kernels of a forward take this block.
                unsafe { self.enqueue(number, problem, params, stream) }?;
            }
        }
        Ok(())
    }

    /// Puts the launches of a backward on the stream.
    ///
    /// # Safety
    /// As [`enqueue`](Self::enqueue).
    pub(super) unsafe fn backward(
        &self,
        problem: &Problem,
        params: &launch::Backward,
        stream: *mut c_void,
    ) -> Result<(), Error> {
        for (number, launched) in self.plan.launched().iter().enumerate() {
            // SAFETY: passed on; launches with sums are those of the kernel that takes them, the others take the block of
            // the backward.
            unsafe {
                match launched.sums {
                    Some(_) => self.enqueue(number, problem, &params.sums(launched), stream),
                    None => self.enqueue(number, problem, &params.params, stream),
                }
            }?;
        }
        Ok(())
    }
}

impl Attention<CudaTensor<'_>> {
    /// Puts the forward on a stream, and returns without waiting for it.
    ///
    /// Everything is ordered as cudarc orders its own calls: the stream waits for what writes the inputs and for what
    /// reads or writes the outputs, and later uses of those buffers wait for this one, wherever the context manages
    /// several streams. Nothing is allocated on the device and nothing synchronised, so that the call may be captured
    /// into a graph, under cudarc's rules for captures (no buffer of another stream's pending events). The first call that
    /// needs a kernel loads it.
    ///
    /// A key length on the device that is longer than its segment counts as the segment's.
    ///
    /// # Errors
    /// [`Error::Invalid`] with every rule the request breaks, buffers that are too short, on another device, or shared
    /// with an output among them; [`Error::Refused`] with every reason that speaks against the GPU or the driver;
    /// [`Error::Driver`] with the call that failed. Nothing is enqueued then.
    pub fn launch<'t, 'o>(
        &'t self,
        stream: &'t CudaStream,
        outputs: impl Into<Outputs<CudaTensorMut<'o>>>,
    ) -> Result<Plan, Error> {
        let mut outputs = outputs.into();
        let context = stream.context();
        let mut violations = Vec::new();
        for (argument, tensor) in self.tensors() {
            violations.extend(too_short(argument, &tensor.desc(), tensor.offset(), tensor.bytes()));
            violations.extend(foreign(argument, tensor.context(), context));
        }
        for (argument, tensor) in [(Argument::Out, Some(&outputs.out)), (Argument::Lse, outputs.lse.as_ref())] {
            let Some(tensor) = tensor else { continue };
            violations.extend(too_short(argument, &tensor.desc(), tensor.offset(), tensor.bytes()));
            violations.extend(foreign(argument, tensor.context(), context));
        }
        let problem = Invalid::merge(Problem::forward(self, &outputs), violations)?;

        let ready = ready(&problem, context.ordinal())?;
        // Dropped at the end of this function, when the launch is on the stream.
        let mut guards: SmallVec<[SyncOnDrop<'_>; 20]> = SmallVec::new();
        let mut bindings = Bindings::new();
        let mut bind = |argument, desc, (place, guard): (bind::Place, _), written| {
            guards.push(guard);
            let address = place.zero(&desc);
            bindings.push(Bound { argument, desc, place, written });
            address
        };
        let out = bind(Argument::Out, outputs.out.desc(), outputs.out.place(stream), true);
        let lse = outputs.lse.as_mut().map_or(0, |lse| bind(Argument::Lse, lse.desc(), lse.place(stream), true));
        let read = |argument, tensor: &'t CudaTensor<'_>| bind(argument, tensor.desc(), tensor.place(stream), false);
        let params = launch::forward(&problem, &ready.plan, self, read, [out, lse]);
        ready.check(&bindings)?;
        // The null stream is that of the current context. Also tells what failed in having the stream wait.
        context.bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;
        // SAFETY: cudarc's buffers live in this context until their events have passed, which the guards record; the
        // borrows of `self` and `outputs` keep others from using them before that.
        unsafe { ready.forward(&problem, &params, stream.cu_stream().cast()) }?;
        Ok(ready.plan)
    }
}

/// A buffer that the stream's context cannot reach.
pub(super) fn foreign(argument: Argument, buffer: &CudaContext, stream: &CudaContext) -> Option<Violation> {
    let rule = Rule::Device { got: buffer.ordinal(), stream: stream.ordinal() };
    (buffer.cu_ctx() != stream.cu_ctx()).then_some(Violation { argument, rule })
}
