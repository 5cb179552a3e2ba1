//! A legal request: everything that a header alone can be wrong about has been asked.

use super::header::Header;
use super::layout::Layout;
use super::results::Results;
use crate::failure::Failure;
use fused_attention::{Argument, Attention, Backward, Problem, TensorDesc, Violation};
use std::collections::HashMap;

/// What a request may take beside its file, so that a few bytes that speak of huge empty tensors take neither memory
/// nor time.
const FREE_BYTES: u128 = 64 << 20;
/// What it may take per byte of its file.
const BYTES_PER_BYTE: u128 = 16;

/// A header's request, legal for the operator.
pub(crate) struct Request {
    layout: Layout,
    /// What is asked of the forward.
    pub(crate) forward: Problem,
    /// What is asked of the backward, if `dout` is there.
    pub(crate) backward: Option<Problem>,
    /// What will be written.
    pub(crate) results: Results,
}

impl Request {
    /// Checks everything but the values of the tensors.
    pub(crate) fn new(header: &Header) -> Result<Request, Failure> {
        let layout = Layout::new(header)?;
        let limit = FREE_BYTES + BYTES_PER_BYTE * header.tensor_bytes() as u128;
        let attention = layout.attention(&layout.descs)?;
        let dout = layout.descs.get(&Argument::Dout);
        let results = Results::new(&attention, dout.is_some());

        let forward = Problem::forward(&attention, &results.outputs());
        let backward =
            dout.map(|dout| Problem::backward(&attention, &Backward::new(*dout), &results.wanted())).transpose();
        let (forward, backward) = match (forward, backward) {
            (Ok(forward), Ok(backward)) => (forward, backward),
            (forward, backward) => {
                let mut violations: Vec<Violation> = forward.err().map_or_else(Vec::new, |invalid| invalid.violations);
                for violation in backward.err().map_or_else(Vec::new, |invalid| invalid.violations) {
                    // Both directions judge the same inputs.
                    if !violations.contains(&violation) {
                        violations.push(violation);
                    }
                }
                let faults: Vec<String> = violations.iter().map(Violation::to_string).collect();
                return Err(Failure::faults(&faults));
            }
        };
        let needed = results.footprint();
        if needed > limit {
            return Err(Failure::bad(format_args!(
                "q and v.0 ask for out {:?} and lse {:?}: {needed} bytes of results, more than the {limit} that a file \
                 of this size may ask for; split the request",
                results.out, results.lse
            )));
        }
        Ok(Request { layout, forward, backward, results })
    }

    /// The request with its tensors.
    pub(crate) fn attention<T: Copy>(&self, tensors: &HashMap<Argument, T>) -> Result<Attention<T>, Failure> {
        self.layout.attention(tensors)
    }

    /// Every tensor of the file, as the library will see it.
    pub(super) fn descs(&self) -> &HashMap<Argument, TensorDesc> {
        &self.layout.descs
    }
}
