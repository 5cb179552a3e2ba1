//! What is wrong with a header, by the name of the tensor at fault.
//!
//! The safetensors crate refuses the same headers, but says of most only that one of their tensors is wrong, and takes
//! the last of several tensors of one name.

use crate::failure::quoted;
use safetensors::Dtype;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use std::collections::HashSet;
use std::fmt;

/// Passes a header that the safetensors crate will accept; else tells the first fault in one sentence.
pub(super) fn check(text: &[u8]) -> Result<(), String> {
    let Object(entries) = match serde_json::from_slice(text) {
        Ok(object) => object,
        Err(error) => return Err(format!("its header is not a JSON object of tensors: {error}")),
    };
    let mut names = HashSet::new();
    let mut tensors = Vec::new();
    for (name, value) in &entries {
        if !names.insert(name) {
            return Err(format!("{} is in the header twice; keep one", quoted(name)));
        }
        if name == "__metadata__" {
            check_settings(value)?;
        } else {
            tensors.push((name, tensor(value).map_err(|fault| format!("{} {fault}", quoted(name)))?));
        }
    }
    tensors.sort_by_key(|&(_, offsets)| offsets);
    let (mut end, mut before) = (0, None);
    for (name, offsets) in tensors {
        if offsets.0 != end {
            let before = before.map_or("nothing".to_string(), quoted);
            let how = if offsets.0 < end { "overlap" } else { "leave a gap" };
            return Err(format!(
                "{} starts at byte {} of the data, but what comes before it ({before}) ends at {end}: they {how}",
                quoted(name),
                offsets.0
            ));
        }
        (end, before) = (offsets.1, Some(name.as_str()));
    }
    Ok(())
}

fn check_settings(value: &Value) -> Result<(), String> {
    let settings = match value {
        Value::Object(settings) => settings,
        Value::Null => return Ok(()),
        other => return Err(format!("__metadata__ is {}; it must map names to strings", kind(other))),
    };
    match settings.iter().find(|(_, value)| !value.is_string()) {
        Some((name, value)) => Err(format!("metadata {} is {}; make it a string", quoted(name), kind(value))),
        None => Ok(()),
    }
}

/// Where a tensor's bytes lie, they being as many as its type and shape take. The text completes a sentence whose
/// subject is the tensor.
fn tensor(value: &Value) -> Result<(u64, u64), String> {
    let Value::Object(fields) = value else {
        return Err(format!("is {}; it must be an object with dtype, shape and data_offsets", kind(value)));
    };
    let field = |name: &str| fields.get(name).ok_or_else(|| format!("has no {name}"));
    if let Some(other) = fields.keys().find(|name| !["dtype", "shape", "data_offsets"].contains(&name.as_str())) {
        return Err(format!("has a field {}, which safetensors does not know; drop it", quoted(other)));
    }

    let given = field("dtype")?;
    let dtype: Dtype = serde_json::from_value(given.clone())
        .map_err(|_| format!("has dtype {}, which safetensors does not know", quoted(&given.to_string())))?;
    let shape = numbers(field("shape")?).map_err(|fault| format!("has a shape with {fault}"))?;
    let offsets = numbers(field("data_offsets")?).map_err(|fault| format!("has data_offsets with {fault}"))?;
    let &[start, end] = offsets.as_slice() else {
        return Err(format!("has {} data_offsets; it must have a start and an end", offsets.len()));
    };

    let bits = shape.iter().try_fold(1u64, |product, &extent| product.checked_mul(extent));
    let bits = bits.and_then(|elements| elements.checked_mul(dtype.bitsize() as u64));
    let shown = list(&shape);
    let Some(bits) = bits else {
        return Err(format!("has shape {shown}, more elements of {dtype} than can be addressed"));
    };
    if bits % 8 != 0 {
        return Err(format!("has shape {shown} of {dtype}, which does not come out at a whole byte"));
    }
    let (takes, held) = (bits / 8, end.checked_sub(start));
    match held {
        None => Err(format!("has data_offsets [{start}, {end}], an end before the start")),
        Some(held) if held != takes => Err(format!(
            "takes {takes} bytes by its shape {shown} of {dtype}, but data_offsets [{start}, {end}] hold {held}"
        )),
        Some(_) => Ok((start, end)),
    }
}

fn numbers(value: &Value) -> Result<Vec<u64>, String> {
    let Value::Array(entries) = value else {
        return Err(format!("{} in place of a list", kind(value)));
    };
    let number = |(i, entry): (usize, &Value)| {
        entry.as_u64().ok_or_else(|| format!("{} in place {i}, where a count must be", quoted(&entry.to_string())))
    };
    entries.iter().enumerate().map(number).collect()
}

/// A list, its end cut off where a line would not bear it.
fn list(extents: &[u64]) -> String {
    const LONGEST: usize = 8;
    if extents.len() <= LONGEST {
        return format!("{extents:?}");
    }
    let shown: Vec<String> = extents.iter().take(LONGEST).map(u64::to_string).collect();
    format!("[{}, …] ({} dimensions)", shown.join(", "), extents.len())
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a bool",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A JSON object as it stands, a name that occurs twice included.
struct Object(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Object;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Object(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
