//! The public calls.

#[cfg(feature = "cuda")]
use crate::engine::cuda;
#[cfg(feature = "emulated")]
use crate::engine::emulated::{self, Settings};
use crate::engine::reference::{self, Dense};
use crate::engine::{cpu, host, plan};
use crate::error::Error;
#[cfg(feature = "emulated")]
use crate::plan::{Device, Instance};
use crate::plan::{Engine, Plan, Reason, Refusal};
use crate::problem::{
    Argument, Attention, Backward, Float, Gradient, GradientProblem, Gradients, Invalid, Outputs, Problem, Results,
    Strides, Tensor, TensorDesc, TensorMut, TensorRef, with_float,
};
use std::collections::HashMap;

impl Attention<TensorRef<'_>> {
    /// Computes `out`, and `lse` if asked for, from tensors in host memory.
    ///
    /// Nothing of size `seq_q × seq_kv` is allocated: the scratch is [`Plan::workspace_bytes`]. On [`Engine::Cuda`] every
    /// tensor is copied to the first GPU and the results back, which takes longer than most calls; what is there already,
    /// launch from there ([`CudaTensor`](crate::cuda::CudaTensor)). The answer is the plan that was carried out.
    ///
    /// # Errors
    /// [`Error::Invalid`] with every rule the request breaks, [`Error::Refused`] with every reason the engine has not to
    /// run it, [`Error::Driver`] with the call of the CUDA driver that failed. Nothing is written then.
    pub fn forward<'o>(&self, engine: Engine, outputs: impl Into<Outputs<TensorMut<'o>>>) -> Result<Plan, Error> {
        #[cfg(feature = "emulated")]
        if engine == Engine::Emulated {
            return Ok(self.forward_emulated(&Settings::default(), outputs)?.0);
        }
        let Outputs { out, lse } = outputs.into();
        let (problem, inputs) = self.forward_problem(&out, lse.as_ref())?;
        let plan = plan(engine, &problem)?;
        match engine {
            Engine::Cpu => cpu::forward(&problem, &inputs, out, lse),
            Engine::Reference => store_forward(&problem, reference::forward(&problem, &inputs), out, lse),
            #[cfg(feature = "cuda")]
            Engine::Cuda => return cuda::forward(self, out, lse),
            #[cfg(not(feature = "cuda"))]
            Engine::Cuda => return Err(not_from_host(&plan).into()),
            Engine::Emulated => return Err(not_from_host(&plan).into()),
        }
        Ok(plan)
    }

    /// Runs the CUDA kernel's source under emulation: the plan that was carried out and what the emulator counted, or no
    /// report where there was nothing to launch.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and [`Error::Fault`] where the kernel breaks a rule of the device.
    #[cfg(feature = "emulated")]
    pub fn forward_emulated<'o>(
        &self,
        settings: &Settings,
        outputs: impl Into<Outputs<TensorMut<'o>>>,
    ) -> Result<(Plan, Option<emulated::Report>), Error> {
        let Outputs { out, lse } = outputs.into();
        let (problem, _) = self.forward_problem(&out, lse.as_ref())?;
        let device = Device::Emulated { compute_capability: settings.compute_capability };
        let admitted = |row: &Instance| settings.kernel.as_ref().is_none_or(|kernel| row.kernel == kernel);
        let plan = Plan::among(&problem, &device, admitted)?;
        let report = emulated::forward(&problem, &plan, settings, self, out, lse)?;
        Ok((plan, report))
    }

    /// The checked problem, its inputs bound.
    fn forward_problem(
        &self,
        out: &TensorMut<'_>,
        lse: Option<&TensorMut<'_>>,
    ) -> Result<(Problem, host::Inputs<'_>), Error> {
        let described = Outputs { out: out.desc(), lse: lse.map(Tensor::desc) };
        let mut short = host::short_slices(self);
        short.extend(host::short_output(Argument::Out, out));
        short.extend(lse.and_then(|lse| host::short_output(Argument::Lse, lse)));
        let problem = Invalid::merge(Problem::forward(&self.desc(), &described), short)?;
        let inputs = host::bind(self, &problem)?;
        Ok((problem, inputs))
    }

    /// Computes the gradients asked for from `dout`, the gradient of `out`.
    ///
    /// Nothing of size `seq_q × seq_kv` is allocated here either: the scratch is [`Plan::workspace_bytes`], which has a few
    /// numbers for every query and some sums for every key. The bits of a gradient do not depend on the number of threads,
    /// nor, on the host's engines, on which others are asked for.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn backward<'i>(
        &self,
        engine: Engine,
        backward: impl Into<Backward<TensorRef<'i>>>,
        gradients: Gradients<TensorMut<'_>>,
    ) -> Result<Plan, Error> {
        #[cfg(feature = "emulated")]
        if engine == Engine::Emulated {
            return Ok(self.backward_emulated(&Settings::default(), backward, gradients)?.0);
        }
        let backward = backward.into();
        let (problem, inputs) = self.backward_problem(&backward, &gradients)?;
        #[cfg(feature = "cuda")]
        if engine == Engine::Cuda {
            return cuda::backward(self, &problem, &backward, gradients.wanted);
        }
        let plan = plan(engine, &problem)?;
        match engine {
            Engine::Cpu => cpu::backward(&problem, &plan, &inputs, &backward, gradients),
            Engine::Reference => store_backward(&problem, &inputs, &backward.dout, gradients),
            Engine::Cuda | Engine::Emulated => return Err(not_from_host(&plan).into()),
        }
        Ok(plan)
    }

    /// Runs the backward kernels' source under emulation, over a workspace of NaN: the plan that was carried out and what the
    /// emulator counted of each of its launches.
    ///
    /// # Errors
    /// As [`backward`](Self::backward), and [`Error::Fault`] where a kernel breaks a rule of the device.
    #[cfg(feature = "emulated")]
    pub fn backward_emulated<'i>(
        &self,
        settings: &Settings,
        backward: impl Into<Backward<TensorRef<'i>>>,
        gradients: Gradients<TensorMut<'_>>,
    ) -> Result<(Plan, Vec<emulated::Report>), Error> {
        let backward = backward.into();
        let (problem, _) = self.backward_problem(&backward, &gradients)?;
        let device = Device::Emulated { compute_capability: settings.compute_capability };
        let admitted = |row: &Instance| settings.kernel.as_ref().is_none_or(|kernel| row.kernel == kernel);
        let plan = Plan::among(&problem, &device, admitted)?;
        let reports = emulated::backward(&problem, &plan, settings, self, &backward, gradients.wanted)?;
        Ok((plan, reports))
    }

    /// The checked problem, its inputs bound.
    fn backward_problem(
        &self,
        backward: &Backward<TensorRef<'_>>,
        gradients: &Gradients<TensorMut<'_>>,
    ) -> Result<(Problem, host::Inputs<'_>), Error> {
        let mut short = host::short_slices(self);
        short.extend(host::short_inputs(backward.tensors()));
        for (gradient, tensor) in &gradients.wanted {
            short.extend(host::short_output(gradient.argument(|b| self.first_segment(b)), tensor));
        }
        let problem = Invalid::merge(Problem::backward(self, backward, gradients), short)?;
        let inputs = host::bind(self, &problem)?;
        Ok((problem, inputs))
    }

    /// The forward of the reference without the rounding at the store: what an error is measured against.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_f64(&self) -> Result<reference::Forward, Error> {
        let out = Outputs::new(self.out_desc());
        let problem = Invalid::merge(Problem::forward(&self.desc(), &out), host::short_slices(self))?;
        Ok(reference::forward(&problem, &host::bind(self, &problem)?))
    }

    /// The backward of the reference without the rounding at the store.
    ///
    /// Gates come as `[batch, heads, 1, 1]`, regions as `[batch, heads, seq_q, 1]`, with extent 1 where the input has no
    /// such dimension.
    ///
    /// # Errors
    /// As [`backward`](Self::backward).
    pub fn backward_f64(
        &self,
        dout: TensorRef<'_>,
        wanted: &Gradients<TensorDesc>,
    ) -> Result<HashMap<Gradient, Dense>, Error> {
        let mut short = host::short_slices(self);
        short.extend(host::short_slice(Argument::Dout, dout.needed_len(), dout.len()));
        let problem = Invalid::merge(Problem::backward(&self.desc(), &Backward::new(dout), wanted), short)?;
        let inputs = host::bind(self, &problem)?;
        let no_gradients: &[GradientProblem] = &[];
        let (strides, wanted) = match &problem.results {
            Results::Backward { dout, gradients, .. } => (*dout, gradients.as_slice()),
            Results::Forward { .. } => ([0; 4], no_gradients),
        };
        Ok(reference::backward(&problem, &inputs, &host::View::new(&dout, strides), wanted))
    }

    /// What a dense `out` looks like, as far as the request tells.
    fn out_desc(&self) -> TensorDesc {
        let q = self.q.desc();
        let mut shape = [0; 4];
        shape.iter_mut().zip(q.shape()).for_each(|(to, &from)| *to = from);
        let value_dim = self.segments().next().and_then(|segment| segment.v.desc().shape().last().copied());
        shape[3] = value_dim.unwrap_or(shape[3]);
        TensorDesc::contiguous(q.dtype(), shape)
    }
}

/// A row of the table that these calls cannot carry out must never be computed by another engine in its place.
fn not_from_host(plan: &Plan) -> Refusal {
    Refusal { engine: plan.engine(), reasons: vec![Reason::NoKernel { direction: plan.direction() }] }
}

fn store_forward(problem: &Problem, computed: reference::Forward, out: TensorMut<'_>, lse: Option<TensorMut<'_>>) {
    if let Results::Forward { out: out_strides, lse: lse_strides } = problem.results {
        store(out, out_strides, &computed.out, problem.accumulate);
        if let (Some(lse), Some(strides)) = (lse, lse_strides) {
            store(lse, strides, &computed.lse, false);
        }
    }
}

fn store_backward(
    problem: &Problem,
    inputs: &host::Inputs<'_>,
    dout: &TensorRef<'_>,
    gradients: Gradients<TensorMut<'_>>,
) {
    if let Results::Backward { dout: strides, gradients: wanted, .. } = &problem.results {
        let computed = reference::backward(problem, inputs, &host::View::new(dout, *strides), wanted);
        for ((gradient, tensor), layout) in gradients.wanted.into_iter().zip(wanted) {
            store(tensor, layout.strides, &computed[&gradient], false);
        }
    }
}

/// Rounds a dense array to the tensor's type, once, after adding what the tensor holds if `accumulate`.
fn store(tensor: TensorMut<'_>, strides: Strides<4>, dense: &Dense, accumulate: bool) {
    with_float!(tensor.desc().dtype(), T => store_typed::<T>(tensor, strides, dense, accumulate));
}

fn store_typed<T: Float>(tensor: TensorMut<'_>, strides: Strides<4>, dense: &Dense, accumulate: bool) {
    let data: &mut [T] = bytemuck::cast_slice_mut(tensor.bytes);
    let [_, n1, n2, n3] = dense.extents;
    for (at, &value) in dense.values.iter().enumerate() {
        let index = [at / n3 / n2 / n1, at / n3 / n2 % n1, at / n3 % n2, at % n3];
        let element = &mut data[host::position(tensor.offset, &strides, index)];
        let before = if accumulate { f64::from(element.to_f32()) } else { 0.0 };
        *element = T::from_f64(before + value);
    }
}
