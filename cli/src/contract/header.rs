//! The header of a safetensors file, and the bytes that follow it.

use super::fault;
use crate::failure::{Failure, quoted};
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Thousands of segments fit. Reading JSON takes a few dozen times its length in memory: without a limit of its own,
/// a header could ask for far more than its file is large.
const LONGEST_HEADER: u64 = 1 << 20;

/// The bytes before the header, which hold its length.
const LENGTH_BYTES: u64 = 8;

/// A header whose tensors cover the data one after the other, each with the bytes that its type and shape take.
pub(crate) struct Header {
    file: File,
    /// Bytes after the header.
    data_len: u64,
    /// In the order of their data.
    pub(crate) tensors: Vec<Entry>,
    /// The strings of `__metadata__`.
    pub(crate) settings: HashMap<String, String>,
}

/// One tensor of a header.
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// Where its bytes lie in the data.
    pub(crate) start: usize,
    pub(crate) end: usize,
}

impl Header {
    /// Reads and checks the header alone.
    pub(crate) fn read(path: &Path) -> Result<Header, Failure> {
        Self::read_from(path).map_err(|failure| failure.of_file(path))
    }

    fn read_from(path: &Path) -> Result<Header, Failure> {
        let unreadable = |error: std::io::Error| Failure::bad(format_args!("cannot be read: {error}"));
        let mut file = File::open(path).map_err(unreadable)?;
        let stat = file.metadata().map_err(unreadable)?;
        if !stat.is_file() {
            return Err(Failure::bad("is not a regular file; copy it to one"));
        }
        let file_len = stat.len();
        if file_len < LENGTH_BYTES {
            return Err(Failure::bad(format_args!(
                "has {file_len} bytes; a safetensors file starts with {LENGTH_BYTES} that hold its header's length"
            )));
        }
        let mut length = [0; LENGTH_BYTES as usize];
        file.read_exact(&mut length).map_err(unreadable)?;
        let (length, rest) = (u64::from_le_bytes(length), file_len - LENGTH_BYTES);
        if length > rest {
            return Err(Failure::bad(format_args!(
                "its header should have {length} bytes, but {rest} follow: it is truncated or no safetensors file"
            )));
        }
        if length > LONGEST_HEADER {
            return Err(Failure::bad(format_args!(
                "its header has {length} bytes; the longest accepted has {LONGEST_HEADER}: split the request"
            )));
        }
        let mut text = vec![0; length as usize];
        file.read_exact(&mut text).map_err(unreadable)?;

        fault::check(&text).map_err(Failure::bad)?;
        let metadata: Metadata =
            serde_json::from_slice(&text).map_err(|error| Failure::bad(format_args!("its header: {error}")))?;
        let entry = |name: String| {
            let info = metadata.info(&name)?;
            let (start, end) = info.data_offsets;
            Some(Entry { dtype: info.dtype, shape: info.shape.clone(), start, end, name })
        };
        let tensors = metadata.offset_keys().into_iter().filter_map(entry).collect();
        let settings = metadata.metadata().clone().unwrap_or_default();
        Ok(Header { file, data_len: rest - length, tensors, settings })
    }

    /// Bytes of data that the tensors take.
    pub(crate) fn tensor_bytes(&self) -> usize {
        self.tensors.last().map_or(0, |last| last.end)
    }

    /// Reads everything after the header: all of what the tensors take and nothing more.
    pub(crate) fn read_data(&mut self) -> Result<Vec<u8>, Failure> {
        let held = self.data_len;
        let past_end = self.tensors.iter().find(|tensor| tensor.end as u64 > held);
        if let Some(Entry { name, end, .. }) = past_end {
            let name = quoted(name);
            return Err(Failure::bad(format_args!(
                "{name} ends at byte {end} of the data, but the file holds {held}: it is truncated"
            )));
        }
        let extra = held - self.tensor_bytes() as u64;
        if extra > 0 {
            let last = self.tensors.last().map_or("its header".to_string(), |last| quoted(&last.name));
            return Err(Failure::bad(format_args!("has {extra} bytes after {last}, the last tensor; cut them off")));
        }
        let mut data = Vec::new();
        let unreadable = |error: std::io::Error| Failure::bad(format_args!("cannot be read: {error}"));
        data.try_reserve_exact(self.tensor_bytes()).map_err(|_| {
            Failure::bad(format_args!("its data takes {held} bytes, more than there is memory; split the request"))
        })?;
        // A file that grows or shrinks meanwhile: no more than what was counted, and less is noticed by the slices.
        (&mut self.file).take(held).read_to_end(&mut data).map_err(unreadable)?;
        Ok(data)
    }
}
