//! The few layers that image projections are made of.

use candle_core::{D, DType, Result, Tensor};

/// `x weightᵀ`, over the last dimension: `weight` is `[out, in]`.
pub(crate) fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let mut shape = x.dims().to_vec();
    let rows = x.elem_count() / x.dim(D::Minus1)?.max(1);
    if let Some(last) = shape.last_mut() {
        *last = weight.dim(0)?;
    }
    x.reshape((rows, x.dim(D::Minus1)?))?.matmul(&weight.t()?)?.reshape(shape)
}

/// Weight and bias of a layer norm, or of a linear layer.
#[derive(Clone, Debug)]
pub(crate) struct Affine {
    pub(crate) weight: Tensor,
    pub(crate) bias: Tensor,
}

impl Affine {
    pub(crate) fn linear(&self, x: &Tensor) -> Result<Tensor> {
        linear(x, &self.weight)?.broadcast_add(&self.bias)
    }

    /// PyTorch's `LayerNorm`, in F32 inside.
    pub(crate) fn layer_norm(&self, x: &Tensor) -> Result<Tensor> {
        const EPSILON: f64 = 1e-5;
        let wide = x.to_dtype(DType::F32)?;
        let centred = wide.broadcast_sub(&wide.mean_keepdim(D::Minus1)?)?;
        let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + EPSILON)?.sqrt()?;
        let normal = centred.broadcast_div(&deviation)?.to_dtype(x.dtype())?;
        normal.broadcast_mul(&self.weight)?.broadcast_add(&self.bias)
    }
}
