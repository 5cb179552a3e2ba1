//! Why a file is no IP-Adapter for a UNet: every key that is missing, unknown or of the wrong shape.

use std::path::PathBuf;

/// What is wrong with an adapter's file or tensors.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// A name that tells no format.
    #[error("{0}: its name must end in .safetensors or .bin")]
    Format(PathBuf),
    /// A file that cannot be read.
    #[error("{path}: {reason}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the reader says.
        reason: String,
    },
    /// Tensors that are not those of an adapter for this UNet.
    #[error("{}", .0.iter().map(KeyFault::to_string).collect::<Vec<_>>().join("; "))]
    Keys(Vec<KeyFault>),
    /// An operation on the tensors that failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl From<CheckpointError> for candle_core::Error {
    fn from(error: CheckpointError) -> Self {
        match error {
            CheckpointError::Candle(error) => error,
            error => candle_core::Error::wrap(error),
        }
    }
}

/// What is wrong with one key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyFault {
    /// A key that must be there.
    #[error("{key} is missing")]
    Missing {
        /// The key.
        key: String,
    },
    /// A tensor of another shape.
    #[error("{key} has shape {got:?}; it must be {expected}")]
    Shape {
        /// The key.
        key: String,
        /// Shape found.
        got: Vec<usize>,
        /// Shape needed, unknown extents by name.
        expected: String,
    },
    /// A key that no adapter for this UNet has.
    #[error("{key} is no key of an IP-Adapter for this UNet")]
    Unknown {
        /// The key.
        key: String,
    },
    /// An image projection of a kind that is not there yet.
    #[error("{key} belongs to {kind}, which is not there yet")]
    NotYet {
        /// The key that tells the kind.
        key: String,
        /// The kind.
        kind: &'static str,
    },
}
