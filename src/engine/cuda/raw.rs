//! Launching from bare addresses, for callers whose buffers and streams are not cudarc's.

use super::bind::{Bindings, Bound, Place, too_short};
use super::ready;
use crate::error::Error;
use crate::plan::{Plan, launch};
use crate::problem::{Argument, Attention, Invalid, Outputs, Problem, Rule, Tensor, TensorDesc, Violation};
use std::ffi::c_void;

/// A tensor in a GPU's memory, by address.
#[derive(Clone, Copy, Debug)]
pub struct RawTensor {
    /// Address of the buffer's first byte.
    pub buffer: u64,
    /// Bytes of the buffer: nothing outside of them is touched.
    pub bytes: usize,
    /// Number of the device that the buffer is on.
    pub ordinal: usize,
    /// Element of the buffer at index zero.
    pub offset: usize,
    /// Type, shape and strides.
    pub desc: TensorDesc,
}

impl RawTensor {
    /// A dense tensor that is the whole of a buffer on the first GPU.
    pub fn new(buffer: u64, desc: TensorDesc) -> Self {
        let bytes = desc.needed_len(0).unwrap_or(0).saturating_mul(desc.dtype().size());
        RawTensor { buffer, bytes, ordinal: 0, offset: 0, desc }
    }

    pub(super) fn violations(&self, argument: Argument, stream: usize) -> impl Iterator<Item = Violation> {
        let foreign = (self.ordinal != stream)
            .then_some(Violation { argument, rule: Rule::Device { got: self.ordinal, stream } });
        too_short(argument, &self.desc, self.offset, self.bytes).into_iter().chain(foreign)
    }

    pub(super) fn bound(&self, argument: Argument, written: bool) -> Bound {
        let place = Place { buffer: self.buffer, offset: self.offset };
        Bound { argument, desc: self.desc, place, written }
    }
}

impl Tensor for RawTensor {
    fn desc(&self) -> TensorDesc {
        self.desc
    }
}

impl Attention<RawTensor> {
    /// Puts the forward on `stream` of the GPU numbered `ordinal`; with the null stream, of the current context.
    ///
    /// Returns as soon as the launch is enqueued. Allocates nothing on the device and does not synchronise, so that it
    /// may be captured into a graph.
    ///
    /// # Errors
    /// As [`Attention::launch`](Self::launch). Nothing is enqueued then.
    ///
    /// # Safety
    /// * `stream` is a live `CUstream` of a context on that GPU, which stays alive until the launch has run.
    /// * Each buffer is `bytes` bytes of memory that this context can reach, alive until the launch has run.
    /// * While it runs, nobody else writes the inputs, or reads or writes the outputs.
    /// * Inputs are initialised where they are read.
    pub unsafe fn launch_raw(
        &self,
        ordinal: usize,
        stream: *mut c_void,
        outputs: impl Into<Outputs<RawTensor>>,
    ) -> Result<Plan, Error> {
        let outputs = outputs.into();
        let mut violations = Vec::new();
        for (argument, tensor) in self.tensors() {
            violations.extend(tensor.violations(argument, ordinal));
        }
        violations.extend(outputs.out.violations(Argument::Out, ordinal));
        violations.extend(outputs.lse.iter().flat_map(|lse| lse.violations(Argument::Lse, ordinal)));
        let problem = Invalid::merge(Problem::forward(self, &outputs), violations)?;

        let ready = ready(&problem, ordinal)?;
        let mut bindings = Bindings::new();
        let mut bind = |argument, tensor: &RawTensor, written| {
            let bound = tensor.bound(argument, written);
            let address = bound.place.zero(&bound.desc);
            bindings.push(bound);
            address
        };
        let out = bind(Argument::Out, &outputs.out, true);
        let lse = outputs.lse.map_or(0, |lse| bind(Argument::Lse, &lse, true));
        let read = |argument, tensor: &RawTensor| bind(argument, tensor, false);
        let params = launch::forward(&problem, &ready.plan, self, read, [out, lse]);
        ready.check(&bindings)?;
        // SAFETY: the bindings are those of the launch, and live and unshared as the caller promises.
        unsafe { ready.forward(&problem, &params, stream) }?;
        Ok(ready.plan)
    }
}
