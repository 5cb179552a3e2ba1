//! What a request writes: names, types and shapes.

use fused_attention::{Argument, AttentionDesc, DType, Gate, Gradient, Gradients, Outputs, TensorDesc};

use crate::array;

/// The results of a request.
pub(crate) struct Results {
    /// Type of `out`, that of q.
    pub(crate) dtype: DType,
    /// `[batch, seq_q, heads, value_dim]`
    pub(crate) out: [usize; 4],
    /// `[branches, batch, heads, seq_q]`, f32; the file holds one tensor per branch.
    pub(crate) lse: [usize; 4],
    /// Those of every input that has one, f32; empty without `dout`.
    pub(crate) gradients: Vec<Wanted>,
}

/// One gradient, of its input's shape.
pub(crate) struct Wanted {
    pub(crate) gradient: Gradient,
    /// Its name in the file.
    pub(crate) argument: Argument,
    pub(crate) shape: Vec<usize>,
}

impl Results {
    /// What the request writes; of ranks that are wrong, something that validation refuses.
    pub(super) fn new(attention: &AttentionDesc, backward: bool) -> Results {
        let extent = |desc: &TensorDesc, dim: usize| desc.shape().get(dim).copied().unwrap_or(0);
        let q = &attention.q;
        let [batch, seq_q, heads] = [0, 1, 2].map(|dim| extent(q, dim));
        let value_dim = attention.segments().next().map_or(0, |segment| extent(&segment.v, 3));
        Results {
            dtype: q.dtype(),
            out: [batch, seq_q, heads, value_dim],
            lse: [attention.branches.len(), batch, heads, seq_q],
            gradients: if backward { gradients(attention) } else { Vec::new() },
        }
    }

    /// The forward's outputs without data.
    pub(super) fn outputs(&self) -> Outputs<TensorDesc> {
        let out = TensorDesc::contiguous(self.dtype, self.out);
        Outputs::new(out).lse(TensorDesc::contiguous(DType::F32, self.lse))
    }

    /// The gradients without data.
    pub(super) fn wanted(&self) -> Gradients<TensorDesc> {
        let wanted = self.gradients.iter().map(|wanted| (wanted.gradient, array::desc(DType::F32, &wanted.shape)));
        Gradients { wanted: wanted.collect() }
    }

    /// Bytes of everything written, an extent of 0 counted as 1: whoever steps through an empty tensor's other
    /// dimensions takes as many steps.
    pub(super) fn footprint(&self) -> u128 {
        let float = DType::F32.size();
        let gradients = self.gradients.iter().map(|wanted| footprint(&wanted.shape, float));
        let forward = [footprint(&self.out, self.dtype.size()), footprint(&self.lse, float)];
        forward.into_iter().chain(gradients).fold(0, u128::saturating_add)
    }
}

/// Bytes of a tensor, an extent of 0 counted as 1.
fn footprint(shape: &[usize], size: usize) -> u128 {
    shape.iter().fold(size as u128, |product, &extent| product.saturating_mul(extent.max(1) as u128))
}

fn gradients(attention: &AttentionDesc) -> Vec<Wanted> {
    let wanted = |gradient, argument, input: &TensorDesc| Wanted { gradient, argument, shape: input.shape().to_vec() };
    let mut gradients = vec![wanted(Gradient::Q, Argument::Dq, &attention.q)];
    let mut number = 0;
    for (b, branch) in attention.branches.iter().enumerate() {
        if let Gate::Tensor(gate) = &branch.gate {
            gradients.push(wanted(Gradient::Gate(b), Argument::Dgate(number), gate));
        }
        if let Some(region) = &branch.region {
            gradients.push(wanted(Gradient::Region(b), Argument::Dregion(number), region));
        }
        for segment in &branch.segments {
            gradients.push(wanted(Gradient::K(number), Argument::Dk(number), &segment.k));
            gradients.push(wanted(Gradient::V(number), Argument::Dv(number), &segment.v));
            // A mask that says yes or no has no slope.
            if let Some(bias) = segment.bias.as_ref().filter(|bias| bias.dtype() != DType::Bool) {
                gradients.push(wanted(Gradient::Bias(number), Argument::Dbias(number), bias));
            }
            number += 1;
        }
    }
    gradients
}
