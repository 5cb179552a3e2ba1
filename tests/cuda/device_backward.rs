//! A case's backward in a GPU's memory.

use crate::cases::{Data, HostTensor};
use crate::device::OnDevice;
use fused_attention::cuda::cudarc::driver::{CudaSlice, CudaStream, DriverError};
use fused_attention::{Attention, Backward, Engine, Error, Gradient, Gradients, Plan, Problem, Saved};
use std::sync::Arc;

/// A backward in device memory: poisoned gradients, and a workspace of NaN that is as large as the plan says.
pub struct BackwardRequest {
    inputs: Attention<OnDevice>,
    given: Backward<OnDevice>,
    gradients: Vec<(Gradient, OnDevice)>,
    pub workspace: CudaSlice<u8>,
}

impl BackwardRequest {
    /// Copies the tensors on a stream of the first GPU.
    pub fn new(
        stream: &Arc<CudaStream>,
        data: &Data,
        saved: Option<&Saved<HostTensor>>,
        gradients: Vec<(Gradient, HostTensor)>,
    ) -> Result<Self, Error> {
        let given = Backward { dout: &data.dout, saved: saved.map(|Saved { out, lse }| Saved { out, lse }) };
        let wanted = gradients.iter().map(|(gradient, tensor)| (*gradient, tensor.view())).collect();
        let problem = Problem::backward(&data.attention(), &given.map(|tensor| tensor.view()), &Gradients { wanted })?;
        let bytes = fused_attention::plan(Engine::Cuda, &problem)?.workspace_bytes();

        let failed = |error: DriverError| Error::Fault { kernel: "upload".to_string(), message: error.to_string() };
        let upload = |tensor: &HostTensor| OnDevice::new(stream, tensor).map_err(failed);
        let saved = given.saved.map(|saved| Ok::<_, Error>(Saved { out: upload(saved.out)?, lse: upload(saved.lse)? }));
        let gradients = gradients.iter().map(|(gradient, tensor)| Ok((*gradient, upload(tensor)?)));
        Ok(BackwardRequest {
            inputs: data.request(|tensor| tensor).try_map(|tensor| upload(tensor))?,
            given: Backward { dout: upload(given.dout)?, saved: saved.transpose()? },
            gradients: gradients.collect::<Result<_, Error>>()?,
            workspace: stream.clone_htod(&vec![0xffu8; bytes.max(1)]).map_err(failed)?,
        })
    }

    pub fn launch(&mut self, stream: &CudaStream) -> Result<Plan, Error> {
        let inputs = self.inputs.map(OnDevice::tensor);
        let given = self.given.map(OnDevice::tensor);
        let wanted = self.gradients.iter_mut().map(|(gradient, tensor)| (*gradient, tensor.tensor_mut())).collect();
        inputs.launch_backward(stream, given, Gradients { wanted }, &mut self.workspace)
    }

    /// What a counter counts during the call alone, all tensors being at hand.
    pub fn count_during_launch(&mut self, stream: &CudaStream, counter: impl Fn() -> u64) -> u64 {
        let inputs = self.inputs.map(OnDevice::tensor);
        let given = self.given.map(OnDevice::tensor);
        let wanted = self.gradients.iter_mut().map(|(gradient, tensor)| (*gradient, tensor.tensor_mut())).collect();
        let (gradients, before) = (Gradients { wanted }, counter());
        inputs.launch_backward(stream, given, gradients, &mut self.workspace).expect("a launch");
        counter() - before
    }

    /// The gradients, after checking that nothing beside them was written.
    pub fn results(&self, stream: &Arc<CudaStream>) -> Result<Vec<(Gradient, HostTensor)>, DriverError> {
        let read = |(gradient, tensor): &(Gradient, OnDevice)| {
            let tensor = tensor.read(stream)?;
            assert!(tensor.gaps_untouched(), "written beside {gradient:?}");
            Ok((*gradient, tensor))
        };
        self.gradients.iter().map(read).collect()
    }
}
