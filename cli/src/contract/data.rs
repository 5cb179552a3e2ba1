//! The tensors of a file as typed arrays: what only their values can be wrong about.

use super::header::{Entry, Header};
use super::names;
use super::request::Request;
use crate::array::Array;
use crate::failure::Failure;
use fused_attention::{Argument, DType, Rule, Violation};
use safetensors::Dtype;
use std::collections::HashMap;

/// Views the bytes that follow a header as the tensors of its request.
pub(crate) fn read_arrays<'a>(
    header: &Header,
    request: &Request,
    data: &'a [u8],
) -> Result<HashMap<Argument, Array<'a>>, Failure> {
    let mut faults = Vec::new();
    let mut arrays = HashMap::new();
    for entry in &header.tensors {
        let Some(argument) = names::tensor(&entry.name) else { continue };
        let read = read(entry, argument, request, data);
        match read.and_then(|array| check_key_len(argument, &array, request).map(|()| array)) {
            Ok(array) => drop(arrays.insert(argument, array)),
            Err(fault) => faults.push(fault),
        }
    }
    if faults.is_empty() { Ok(arrays) } else { Err(Failure::faults(&faults)) }
}

fn read<'a>(entry: &Entry, argument: Argument, request: &Request, data: &'a [u8]) -> Result<Array<'a>, String> {
    let Entry { name, dtype, shape, start, end } = entry;
    let bytes =
        data.get(*start..*end).ok_or_else(|| format!("{name} is cut short: the file changed as it was read"))?;
    if *dtype == Dtype::I32
        && let Some((b, length)) = bytes.chunks_exact(4).map(le_i32).enumerate().find(|(_, length)| *length < 0)
    {
        return Err(format!("{name} is {length} for batch entry {b}; a length is at least 0"));
    }
    // A length that is not negative has the same bits in both types.
    let dtype = request.descs().get(&argument).map_or(DType::F32, |desc| desc.dtype());
    Array::from_bytes(dtype, shape, bytes).ok_or_else(|| {
        let found = bytes.iter().enumerate().find(|(_, byte)| **byte > 1);
        let (at, byte) = found.unwrap_or((0, &0));
        format!("{name} holds {byte} at element {at}; a bool is 0 or 1")
    })
}

fn le_i32(bytes: &[u8]) -> i32 {
    bytes.iter().rev().fold(0u32, |number, &byte| number << 8 | u32::from(byte)) as i32
}

/// The library finds a key length past its segment when it runs. Found here, it is told even where the engine would
/// refuse to run.
fn check_key_len(argument: Argument, array: &Array<'_>, request: &Request) -> Result<(), String> {
    let (Argument::KeyLen(i), Some(lengths)) = (argument, array.as_u32()) else { return Ok(()) };
    let limit = request.forward.seq_kv().nth(i).unwrap_or(0);
    let too_long = lengths.iter().enumerate().find(|(_, length)| **length as usize > limit);
    match too_long {
        Some((batch, &got)) => Err(Violation { argument, rule: Rule::KeyLen { batch, got, limit } }.to_string()),
        None => Ok(()),
    }
}
