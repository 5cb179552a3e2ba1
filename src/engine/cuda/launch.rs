//! One forward on a stream: which kernel, on which device, with which addresses.

use super::bind::{self, Bindings, Bound, too_short};
use super::driver::{Driver, Kernel, driver};
use super::tensor::{CudaTensor, CudaTensorMut};
use super::{failed, kernels};
use crate::error::Error;
use crate::plan::{
    CudaDevice, Device, DeviceCode, Engine, INSTANCES, Plan, Reason, Refusal, TOOLKIT, Target, Toolkit, launch,
    table_reasons,
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
    pub(super) driver: &'static Driver,
    pub(super) kernel: Kernel,
    pub(super) plan: Plan,
    pub(super) code: &'static DeviceCode,
}

/// Plans, and loads the kernel if nobody has used it yet.
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
    let Some(code) = &plan.instance().device else {
        return Err(refuse(Reason::NoKernel { direction: plan.direction() }));
    };
    let kernel = kernels::kernel(driver, plan.instance(), gpu).map_err(Error::from_driver(refuse))?;
    Ok(Ready { driver, kernel, plan, code })
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

/// Checks the addresses and puts the kernel on the stream.
///
/// # Safety
/// The bindings are the tensors whose addresses are in the parameter block. Their buffers are memory that the stream's
/// context can reach, alive until the launch has run, and nobody else writes them, or reads the outputs, meanwhile.
pub(super) unsafe fn enqueue(
    driver: &Driver,
    kernel: Kernel,
    plan: &Plan,
    launch: &launch::Launch,
    bindings: &Bindings,
    stream: *mut c_void,
) -> Result<(), Error> {
    bind::addresses(bindings)?;
    bind::row_starts(bindings, plan)?;
    if launch.blocks == 0 {
        return Ok(());
    }
    let shape = [launch.blocks, launch.threads, launch.shared_bytes];
    let refuse = |reason| Error::from(Refusal { engine: Engine::Cuda, reasons: vec![reason] });
    // SAFETY: the block is the one that the row's kernel takes: the build asserts its layout. Each tensor's buffer holds
    // every element that its description reaches; the kernel touches no others.
    unsafe { driver.launch(kernel, shape, &launch.params, stream) }.map_err(Error::from_driver(refuse))
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

        let Ready { driver, kernel, plan, code } = ready(&problem, context.ordinal())?;
        // Dropped at the end of this function, when the launch is on the stream.
        let mut guards: SmallVec<[SyncOnDrop<'_>; 20]> = SmallVec::new();
        let mut bindings = Bindings::new();
        let mut bind = |argument, desc, (place, guard): (bind::Place, _)| {
            guards.push(guard);
            let address = place.zero(&desc);
            bindings.push(Bound { argument, desc, place });
            address
        };
        let out = bind(Argument::Out, outputs.out.desc(), outputs.out.place(stream));
        let lse = outputs.lse.as_mut().map_or(0, |lse| bind(Argument::Lse, lse.desc(), lse.place(stream)));
        let read = |argument, tensor: &'t CudaTensor<'_>| bind(argument, tensor.desc(), tensor.place(stream));
        let launch = launch::forward(&problem, &plan, code, self, read, [out, lse]);
        // The null stream is that of the current context. Also tells what failed in having the stream wait.
        context.bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;
        // SAFETY: cudarc's buffers live in this context until their events have passed, which the guards record; the
        // borrows of `self` and `outputs` keep others from using them before that.
        unsafe { enqueue(driver, kernel, &plan, &launch, &bindings, stream.cu_stream().cast()) }?;
        Ok(plan)
    }
}

/// A buffer that the stream's context cannot reach.
fn foreign(argument: Argument, buffer: &CudaContext, stream: &CudaContext) -> Option<Violation> {
    let rule = Rule::Device { got: buffer.ordinal(), stream: stream.ordinal() };
    (buffer.cu_ctx() != stream.cu_ctx()).then_some(Violation { argument, rule })
}
