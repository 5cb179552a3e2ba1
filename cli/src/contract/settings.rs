//! The metadata strings of the contract.

use super::names::numbered;
use crate::failure::quoted;
use fused_attention::{Causal, Window};
use std::collections::HashMap;

/// What the metadata of a file says.
#[derive(Debug, Default)]
pub(super) struct Settings {
    pub(super) softmax_scale: Option<f32>,
    pub(super) softcap: Option<f32>,
    pub(super) segments: HashMap<usize, SegmentSettings>,
}

/// What it says of one segment.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct SegmentSettings {
    pub(super) causal: Causal,
    pub(super) window: Window,
    /// Whether the segment shares the softmax of the one before it.
    pub(super) joins: bool,
}

/// Reads every setting; the faults come in the order of their names, so that the same file gives the same line.
pub(super) fn parse(metadata: &HashMap<String, String>, faults: &mut Vec<String>) -> Settings {
    let mut settings = Settings::default();
    let mut entries: Vec<(&String, &String)> = metadata.iter().collect();
    entries.sort();
    for (name, value) in entries {
        if let Err(fault) = set(&mut settings, name, value) {
            faults.push(fault);
        }
    }
    settings
}

fn set(settings: &mut Settings, name: &str, value: &str) -> Result<(), String> {
    match (name, numbered(name)) {
        // The customary note of who wrote the file.
        ("format", _) => {}
        ("softmax_scale", _) => settings.softmax_scale = Some(number(name, value)?),
        ("softcap", _) => settings.softcap = Some(number(name, value)?),
        (_, Some(("causal", i))) => {
            segment(settings, i).causal = match value {
                "top-left" => Causal::TopLeft,
                "bottom-right" => Causal::BottomRight,
                _ => return Err(bad(name, value, "give it `top-left` or `bottom-right`, or leave it out")),
            };
        }
        (_, Some(("window", i))) => {
            let reaches = value.split_once(',').and_then(|(left, right)| Some((reach(left)?, reach(right)?)));
            let remedy = "give it `left,right` in keys, -1 for an open side";
            let (left, right) = reaches.ok_or_else(|| bad(name, value, remedy))?;
            segment(settings, i).window = Window { left, right };
        }
        (_, Some(("join", 0))) => {
            return Err(format!("{name} is {}, but no segment comes before the first; leave it out", quoted(value)));
        }
        (_, Some(("join", i))) if value == "true" => segment(settings, i).joins = true,
        (_, Some(("join", _))) => return Err(bad(name, value, "give it `true` or leave it out")),
        _ => {
            return Err(format!(
                "metadata {} is no setting; they are softmax_scale, softcap and, per segment i, causal.i, window.i, \
                 join.i",
                quoted(name)
            ));
        }
    }
    Ok(())
}

fn segment(settings: &mut Settings, number: usize) -> &mut SegmentSettings {
    settings.segments.entry(number).or_default()
}

/// Whether the number makes sense is the library's to say, infinities and NaN included.
fn number(name: &str, value: &str) -> Result<f32, String> {
    value.parse().map_err(|_| bad(name, value, "give it a decimal number"))
}

/// One side of a window: `Some(None)` is open.
fn reach(text: &str) -> Option<Option<u32>> {
    if text == "-1" { Some(None) } else { text.parse().ok().map(Some) }
}

fn bad(name: &str, value: &str, remedy: &str) -> String {
    format!("{name} is {}; {remedy}", quoted(value))
}
