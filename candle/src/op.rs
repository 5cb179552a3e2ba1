//! One call of the operator: on the device of its tensors, and in candle's graph of gradients.
//!
//! Candle's custom operations have at most three inputs and give gradients to those alone. The result is computed first,
//! from all tensors where they are, and then enters the graph as a custom operation of up to three *slots*. A slot is an
//! input that wants a gradient, or a concatenation of several: `Tensor::cat` hands each its part back. The concatenated
//! numbers are never read. With three tracked inputs or fewer nothing is copied, and without any nothing is recorded.

use crate::cpu;
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::operand::{self, Memory, Operand};
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, CudaStorage, CustomOp3, DType, Device, Error, Layout, Result, Shape, Storage, Tensor};
use fused_attention::{Attention, Gate, Gradient};
use std::sync::Mutex;

/// `out` `[batch, seq_q, heads, value_dim]`, in the graph, and if wanted `lse` `[branches, batch, heads, seq_q]`, outside it.
pub(crate) fn attention(request: Attention<Operand>, with_lse: bool) -> Result<(Tensor, Option<Tensor>)> {
    if request.accumulate {
        let fault = "accumulate is set, but the result is a tensor of its own; add the two tensors instead";
        return Err(Error::msg(fault));
    }
    let device = operand::device(&request)?;
    let wanted = tracked(&request);
    let shapes;
    let (out, lse) = {
        let memory = request.map(Operand::lock);
        let out_shape = operand::out_shape(&memory);
        shapes = (out_shape, cpu::lse_shape(&memory, out_shape));
        forward(&memory, &device, with_lse || !wanted.is_empty())?
    };
    let (out_shape, lse_shape) = shapes;
    let lse = lse.map(|lse| Tensor::from_storage(lse, lse_shape.as_slice(), BackpropOp::none(), false));
    let out_shape = Shape::from(out_shape.as_slice());
    if wanted.is_empty() {
        return Ok((Tensor::from_storage(out, out_shape, BackpropOp::none(), false), lse.filter(|_| with_lse)));
    }
    let slots = Slots::new(&wanted, request.q.tensor.dtype())?;
    let inputs = slots.inputs(&wanted, &request.q.tensor)?;
    let gradients = wanted.into_iter().map(|(gradient, tensor)| (gradient, tensor.clone())).collect();
    let saved_lse = lse.clone();
    let op = Recorded { computed: Mutex::new(Some((out, out_shape))), request, lse: saved_lse, gradients, slots };
    let out = inputs[0].apply_op3(&inputs[1], &inputs[2], op)?;
    Ok((out, lse.filter(|_| with_lse)))
}

fn forward(memory: &Attention<Memory<'_>>, device: &Device, with_lse: bool) -> Result<(Storage, Option<Storage>)> {
    match device {
        Device::Cpu => {
            let cpu::Forward { out, lse } = cpu::forward(memory, with_lse)?;
            Ok((Storage::Cpu(out), lse.map(Storage::Cpu)))
        }
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => {
            let cuda::Forward { out, lse } = cuda::forward(memory, device, with_lse)?;
            Ok((Storage::Cuda(out), lse.map(Storage::Cuda)))
        }
        other => Err(no_engine(other)),
    }
}

/// The wanted gradients, each of its input's shape and type.
pub(crate) fn backward(
    request: &Attention<Operand>,
    dout: &Tensor,
    saved: Option<(&Tensor, &Tensor)>,
    wanted: &[(Gradient, &Tensor)],
) -> Result<Vec<Tensor>> {
    // A gradient may come with any strides, those of a broadcast included.
    let dout = dout.contiguous()?;
    match dout.device() {
        Device::Cpu => cpu::backward(request, &dout, saved, wanted),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => cuda::backward(request, device, &dout, saved, wanted),
        other => Err(no_engine(other)),
    }
}

pub(crate) fn no_engine(device: &Device) -> Error {
    Error::msg(format!(
        "q is on {:?}, for which this build has no engine; move the tensors to the CPU, or build with `cuda` for a GPU",
        device.location()
    ))
}

/// Every input that a gradient must reach.
fn tracked(request: &Attention<Operand>) -> Vec<(Gradient, &Tensor)> {
    let mut inputs = vec![(Gradient::Q, Some(&request.q))];
    let mut number = 0;
    for (b, branch) in request.branches.iter().enumerate() {
        for segment in &branch.segments {
            inputs.push((Gradient::K(number), Some(&segment.k)));
            inputs.push((Gradient::V(number), Some(&segment.v)));
            inputs.push((Gradient::Bias(number), segment.bias.as_ref()));
            number += 1;
        }
        let gate = match &branch.gate {
            Gate::Tensor(gate) => Some(gate),
            Gate::Scalar(_) => None,
        };
        inputs.push((Gradient::Gate(b), gate));
        inputs.push((Gradient::Region(b), branch.region.as_ref()));
    }
    let tracked = inputs.into_iter().filter_map(|(gradient, operand)| Some((gradient, operand?)));
    tracked.filter(|(_, operand)| operand.is_tracked()).map(|(gradient, operand)| (gradient, &operand.tensor)).collect()
}

/// Which tracked inputs, by their number, go into which of the three inputs of the custom operation.
struct Slots([Slot; 3]);

enum Slot {
    Empty,
    Whole(usize),
    /// Flattened, brought to one type and concatenated.
    Packed(Vec<usize>, DType),
}

impl Slots {
    fn new(wanted: &[(Gradient, &Tensor)], rows: DType) -> Result<Self> {
        if wanted.len() <= 3 {
            let whole = |number| if number < wanted.len() { Slot::Whole(number) } else { Slot::Empty };
            return Ok(Slots([whole(0), whole(1), whole(2)]));
        }
        // An input without elements has a gradient without elements.
        let rest = (1..wanted.len()).filter(|&number| wanted[number].1.elem_count() > 0);
        let (rows_type, others): (Vec<usize>, Vec<usize>) = rest.partition(|&number| wanted[number].1.dtype() == rows);
        let pack = |numbers: Vec<usize>, dtype| match numbers.as_slice() {
            [] => Slot::Empty,
            &[number] => Slot::Whole(number),
            _ => Slot::Packed(numbers, dtype),
        };
        Ok(Slots([Slot::Whole(0), pack(rows_type, rows), pack(others, DType::F32)]))
    }

    /// The inputs of the custom operation; `filler` stands where none is needed.
    fn inputs(&self, wanted: &[(Gradient, &Tensor)], filler: &Tensor) -> Result<[Tensor; 3]> {
        let input = |slot: &Slot| match slot {
            Slot::Empty => Ok(filler.detach()),
            Slot::Whole(number) => Ok(wanted[*number].1.clone()),
            Slot::Packed(numbers, dtype) => {
                let flat = |&number: &usize| wanted[number].1.flatten_all()?.to_dtype(*dtype);
                Tensor::cat(&numbers.iter().map(flat).collect::<Result<Vec<_>>>()?, 0)
            }
        };
        let [a, b, c] = &self.0;
        Ok([input(a)?, input(b)?, input(c)?])
    }

    /// The gradients of those inputs.
    fn outputs(&self, gradients: &[Tensor]) -> Result<[Option<Tensor>; 3]> {
        let output = |slot: &Slot| match slot {
            Slot::Empty => Ok(None),
            Slot::Whole(number) => Ok(Some(gradients[*number].clone())),
            Slot::Packed(numbers, dtype) => {
                let flat = |&number: &usize| gradients[number].flatten_all()?.to_dtype(*dtype);
                Tensor::cat(&numbers.iter().map(flat).collect::<Result<Vec<_>>>()?, 0).map(Some)
            }
        };
        let [a, b, c] = &self.0;
        Ok([output(a)?, output(b)?, output(c)?])
    }
}

/// A result that enters the graph, with what its backward needs.
struct Recorded {
    /// Taken by the one call of `cpu_fwd` or `cuda_fwd`.
    computed: Mutex<Option<(Storage, Shape)>>,
    request: Attention<Operand>,
    lse: Option<Tensor>,
    gradients: Vec<(Gradient, Tensor)>,
    slots: Slots,
}

impl Recorded {
    fn take(&self) -> Result<(Storage, Shape)> {
        let mut computed = self.computed.lock().map_err(Error::msg)?;
        computed.take().ok_or_else(|| Error::msg("a recorded result can be taken once"))
    }
}

impl CustomOp3 for Recorded {
    fn name(&self) -> &'static str {
        "fused-attention"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        match self.take()? {
            (Storage::Cpu(out), shape) => Ok((out, shape)),
            _ => Err(Error::msg("the result is not on the device of its inputs")),
        }
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        match self.take()? {
            (Storage::Cuda(out), shape) => Ok((out, shape)),
            _ => Err(Error::msg("the result is not on the device of its inputs")),
        }
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        out: &Tensor,
        dout: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let wanted: Vec<_> = self.gradients.iter().map(|(gradient, tensor)| (*gradient, tensor)).collect();
        let saved = self.lse.as_ref().map(|lse| (out, lse));
        let [a, b, c] = self.slots.outputs(&backward(&self.request, dout, saved, &wanted)?)?;
        Ok((a, b, c))
    }
}
