//! The backward on a stream: from buffers of cudarc's, or from bare addresses.

use super::bind::{Bindings, Bound, Place, too_short};
use super::launch::foreign;
use super::raw::RawTensor;
use super::tensor::{CudaTensor, CudaTensorMut};
use super::{failed, ready};
use crate::error::Error;
use crate::plan::{Plan, launch};
use crate::problem::{
    Argument, Attention, Backward, DType, Gradients, Invalid, Problem, Rule, Tensor, TensorDesc, Violation,
};
use cudarc::driver::{CudaStream, DevicePtrMut, SyncOnDrop};
use smallvec::SmallVec;
use std::ffi::c_void;

impl Attention<CudaTensor<'_>> {
    /// Puts the backward on a stream, and returns without waiting for it.
    ///
    /// `workspace` holds at least the plan's [`workspace_bytes`](Plan::workspace_bytes), from an address that is a multiple of
    /// 16 on; what is in it does not matter before and has no meaning afterwards. Ask
    /// [`plan`](crate::plan()) or [`Plan::new`] for it; a plan of the same shapes and the same GPU always needs the same.
    ///
    /// Order, captures and key lengths are as [`launch`](Self::launch) has them.
    ///
    /// # Errors
    /// As [`launch`](Self::launch); a workspace that is too short is one of the rules broken.
    pub fn launch_backward<'t>(
        &'t self,
        stream: &'t CudaStream,
        backward: impl Into<Backward<CudaTensor<'t>>>,
        mut gradients: Gradients<CudaTensorMut<'_>>,
        workspace: &mut impl DevicePtrMut<u8>,
    ) -> Result<Plan, Error> {
        let backward = backward.into();
        let context = stream.context();
        let first = |branch: usize| self.first_segment(branch);
        let mut violations = Vec::new();
        for (argument, tensor) in self.tensors().chain(backward.tensors()) {
            violations.extend(too_short(argument, &tensor.desc(), tensor.offset(), tensor.bytes()));
            violations.extend(foreign(argument, tensor.context(), context));
        }
        for (gradient, tensor) in &gradients.wanted {
            let argument = gradient.argument(first);
            violations.extend(too_short(argument, &tensor.desc(), tensor.offset(), tensor.bytes()));
            violations.extend(foreign(argument, tensor.context(), context));
        }
        violations.extend(foreign(Argument::Workspace, workspace.stream().context(), context));
        let problem = Invalid::merge(Problem::backward(self, &backward, &gradients), violations)?;
        let ready = ready(&problem, context.ordinal())?;
        let needed = ready.plan.workspace_bytes();
        workspace_holds(needed, workspace.num_bytes())?;

        // Dropped at the end of this function, when the launches are on the stream.
        let mut guards: SmallVec<[SyncOnDrop<'_>; 32]> = SmallVec::new();
        let mut bindings = Bindings::new();
        let mut bind = |argument, desc, (place, guard): (Place, _), written| {
            guards.push(guard);
            let address = place.zero(&desc);
            bindings.push(Bound { argument, desc, place, written });
            address
        };
        let workspace = if needed == 0 {
            0
        } else {
            let (buffer, guard) = workspace.device_ptr_mut(stream);
            bind(Argument::Workspace, workspace_desc(needed), (Place { buffer, offset: 0 }, guard), true)
        };
        let addresses: SmallVec<[u64; 8]> = (gradients.wanted.iter_mut())
            .map(|(gradient, tensor)| bind(gradient.argument(first), tensor.desc(), tensor.place(stream), true))
            .collect();
        let dout = bind(Argument::Dout, backward.dout.desc(), backward.dout.place(stream), false);
        let saved = backward.saved.as_ref().map_or([0; 2], |saved| {
            [(Argument::Out, &saved.out), (Argument::Lse, &saved.lse)]
                .map(|(argument, tensor)| bind(argument, tensor.desc(), tensor.place(stream), false))
        });
        let read = |argument, tensor: &'t CudaTensor<'_>| bind(argument, tensor.desc(), tensor.place(stream), false);
        let forward = launch::forward(&problem, &ready.plan, self, read, saved);
        let params = launch::Backward::new(&problem, &ready.plan, forward, dout, &addresses, workspace);
        ready.check(&bindings)?;
        // The null stream is that of the current context. Also tells what failed in having the stream wait.
        context.bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;
        // SAFETY: cudarc's buffers live in this context until their events have passed, which the guards record; the
        // borrows of `self`, `backward`, `gradients` and `workspace` keep others from using them before that.
        unsafe { ready.backward(&problem, &params, stream.cu_stream().cast()) }?;
        Ok(ready.plan)
    }
}

impl Attention<RawTensor> {
    /// Puts the backward on `stream` of the GPU numbered `ordinal`; with the null stream, of the current context.
    ///
    /// The workspace is `bytes` bytes from `address` on, at least the plan's
    /// [`workspace_bytes`](Plan::workspace_bytes), the address a multiple of 16. Returns as soon as the launches are enqueued.
    ///
    /// # Errors
    /// As [`launch_backward`](Attention::launch_backward).
    ///
    /// # Safety
    /// As [`launch_raw`](Self::launch_raw). The gradients and the workspace are written, everything else is read.
    pub unsafe fn launch_backward_raw(
        &self,
        ordinal: usize,
        stream: *mut c_void,
        backward: impl Into<Backward<RawTensor>>,
        gradients: &Gradients<RawTensor>,
        (workspace, bytes): (u64, usize),
    ) -> Result<Plan, Error> {
        let backward = backward.into();
        let first = |branch: usize| self.first_segment(branch);
        let mut violations = Vec::new();
        for (argument, tensor) in self.tensors().chain(backward.tensors()) {
            violations.extend(tensor.violations(argument, ordinal));
        }
        for (gradient, tensor) in &gradients.wanted {
            violations.extend(tensor.violations(gradient.argument(first), ordinal));
        }
        let problem = Invalid::merge(Problem::backward(self, &backward, gradients), violations)?;
        let ready = ready(&problem, ordinal)?;
        let needed = ready.plan.workspace_bytes();
        workspace_holds(needed, bytes)?;

        let mut bindings = Bindings::new();
        let mut bind = |argument, tensor: &RawTensor, written| {
            let bound = tensor.bound(argument, written);
            let address = bound.place.zero(&bound.desc);
            bindings.push(bound);
            address
        };
        if needed > 0 {
            bind(Argument::Workspace, &RawTensor::new(workspace, workspace_desc(needed)), true);
        }
        let addresses: SmallVec<[u64; 8]> =
            gradients.wanted.iter().map(|(gradient, tensor)| bind(gradient.argument(first), tensor, true)).collect();
        let dout = bind(Argument::Dout, &backward.dout, false);
        let saved = backward
            .saved
            .as_ref()
            .map_or([0; 2], |saved| [bind(Argument::Out, &saved.out, false), bind(Argument::Lse, &saved.lse, false)]);
        let read = |argument, tensor: &RawTensor| bind(argument, tensor, false);
        let forward = launch::forward(&problem, &ready.plan, self, read, saved);
        let params = launch::Backward::new(&problem, &ready.plan, forward, dout, &addresses, workspace);
        ready.check(&bindings)?;
        // SAFETY: the bindings are those of the launches, and live and unshared as the caller promises.
        unsafe { ready.backward(&problem, &params, stream) }?;
        Ok(ready.plan)
    }
}

fn workspace_holds(needed: usize, len: usize) -> Result<(), Invalid> {
    if needed <= len {
        return Ok(());
    }
    let rule = Rule::WorkspaceTooShort { needed, len };
    Err(Invalid { violations: vec![Violation { argument: Argument::Workspace, rule }] })
}

/// The part of a workspace that is used.
fn workspace_desc(bytes: usize) -> TensorDesc {
    TensorDesc::contiguous(DType::F32, [bytes / size_of::<f32>()])
}
