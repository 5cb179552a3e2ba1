//! The tensors of a file by key, each to be taken once; what is wrong is collected.

use super::error::{CheckpointError, KeyFault};
use crate::nn::Affine;
use candle_core::{DType, Device, Tensor};
use std::collections::{BTreeMap, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Reads all tensors of a file under the keys of the .safetensors format.
pub(super) fn read(path: &Path, dtype: DType, device: &Device) -> Result<Tensors, CheckpointError> {
    let failed = |reason: String| CheckpointError::Read { path: path.into(), reason };
    let tensors = match path.extension().and_then(|extension| extension.to_str()) {
        Some("safetensors") => {
            candle_core::safetensors::load(path, &Device::Cpu).map_err(|error| failed(error.to_string()))?
        }
        Some("bin") => read_bin(path).map_err(failed)?,
        _ => return Err(CheckpointError::Format(path.into())),
    };
    Tensors::new(tensors, dtype, device)
}

/// `torch.save({"image_proj": {…}, "ip_adapter": {…}})`, by prefix.
fn read_bin(path: &Path) -> Result<HashMap<String, Tensor>, String> {
    let mut tensors = HashMap::new();
    for part in ["image_proj", "ip_adapter"] {
        // Candle's reader of pickles panics at some files that are none of torch's.
        let read = catch_unwind(AssertUnwindSafe(|| candle_core::pickle::read_all_with_key(path, Some(part))));
        let read = read.map_err(|_| "is no file of torch.save's that candle can read".to_string())?;
        let read = read.map_err(|error| format!("{error}; it must be a zip file as torch.save writes it since 1.6"))?;
        tensors.extend(read.into_iter().map(|(key, tensor)| (format!("{part}.{key}"), tensor)));
    }
    Ok(tensors)
}

/// Tensors by key.
pub(super) struct Tensors {
    tensors: BTreeMap<String, Tensor>,
    faults: Vec<KeyFault>,
    /// Stands for what is not as it must be; the faults are told before anything is computed.
    nothing: Tensor,
}

impl Tensors {
    pub(super) fn new(
        tensors: impl IntoIterator<Item = (String, Tensor)>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self, CheckpointError> {
        let converted = |(key, tensor): (String, Tensor)| {
            Ok::<_, candle_core::Error>((key, tensor.to_device(device)?.to_dtype(dtype)?))
        };
        let tensors = tensors.into_iter().map(converted).collect::<candle_core::Result<_>>()?;
        Ok(Tensors { tensors, faults: Vec::new(), nothing: Tensor::zeros(0, dtype, device)? })
    }

    pub(super) fn fault(&mut self, fault: KeyFault) {
        self.faults.push(fault);
    }

    pub(super) fn shape(&self, key: &str) -> Option<&[usize]> {
        self.tensors.get(key).map(Tensor::dims)
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Takes a tensor whose extents are these; a name stands for an extent that is not known, and an empty tensor for one that
    /// is not as it must be.
    pub(super) fn take(&mut self, key: &str, shape: &[Extent]) -> Tensor {
        match self.tensors.remove(key) {
            None => self.fault(KeyFault::Missing { key: key.into() }),
            Some(tensor) => {
                let dims = tensor.dims();
                let fits = dims.len() == shape.len() && shape.iter().zip(dims).all(|(extent, &got)| extent.fits(got));
                if fits {
                    return tensor;
                }
                let expected: Vec<String> = shape.iter().map(Extent::to_string).collect();
                let expected = format!("[{}]", expected.join(", "));
                self.fault(KeyFault::Shape { key: key.into(), got: dims.to_vec(), expected });
            }
        }
        self.nothing.clone()
    }

    /// `{key}.weight` and `{key}.bias` of a linear layer.
    pub(super) fn linear(&mut self, key: &str, to: Extent, from: Extent) -> Affine {
        Affine {
            weight: self.take(&format!("{key}.weight"), &[to, from]),
            bias: self.take(&format!("{key}.bias"), &[to]),
        }
    }

    /// `{key}.weight` and `{key}.bias` of a layer norm.
    pub(super) fn norm(&mut self, key: &str, width: Extent) -> Affine {
        Affine {
            weight: self.take(&format!("{key}.weight"), &[width]),
            bias: self.take(&format!("{key}.bias"), &[width]),
        }
    }

    /// Everything that was wrong, and every key that nobody took.
    pub(super) fn finish(self) -> Result<(), CheckpointError> {
        let Tensors { tensors, mut faults, .. } = self;
        faults.extend(tensors.into_keys().map(|key| KeyFault::Unknown { key }));
        if faults.is_empty() { Ok(()) } else { Err(CheckpointError::Keys(faults)) }
    }
}

/// An extent that is known, or the name of one that is not.
#[derive(Clone, Copy)]
pub(super) enum Extent {
    Known(usize),
    Any(&'static str),
}

impl Extent {
    fn fits(&self, got: usize) -> bool {
        match self {
            Extent::Known(extent) => got == *extent,
            Extent::Any(_) => got > 0,
        }
    }
}

impl std::fmt::Display for Extent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Extent::Known(extent) => write!(f, "{extent}"),
            Extent::Any(name) => f.write_str(name),
        }
    }
}
