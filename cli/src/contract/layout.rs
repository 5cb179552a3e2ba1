//! Which tensors make which segment, which segments make which branch.

use super::header::{Entry, Header};
use super::names;
use super::settings::{self, SegmentSettings, Settings};
use crate::array;
use crate::failure::{Failure, quoted};
use fused_attention::{Argument, Attention, Branch, DType, Gate, Rule, Segment, TensorDesc, Violation};
use safetensors::Dtype;
use std::collections::{BTreeSet, HashMap};

/// A header that keeps the contract: its names are known, its segments complete, each tensor of a legal rank and type.
pub(super) struct Layout {
    segments: Vec<SegmentSettings>,
    softmax_scale: Option<f32>,
    softcap: Option<f32>,
    /// Every tensor by its argument, as the library will see it.
    pub(super) descs: HashMap<Argument, TensorDesc>,
}

impl Layout {
    /// Reads names, ranks, types and settings.
    pub(super) fn new(header: &Header) -> Result<Layout, Failure> {
        let mut faults = Vec::new();
        let mut descs = HashMap::new();
        for entry in &header.tensors {
            match desc(entry) {
                Ok((argument, desc)) => drop(descs.insert(argument, desc)),
                // A tensor at fault is there all the same: nothing more is to be said of its absence.
                Err(Fault { text, argument }) => {
                    faults.push(text);
                    descs.extend(argument.map(|argument| (argument, TensorDesc::contiguous(DType::F32, []))));
                }
            }
        }
        let Settings { softmax_scale, softcap, segments: settings } = settings::parse(&header.settings, &mut faults);
        if !descs.contains_key(&Argument::Q) {
            faults.push("q is missing; every request has queries".to_string());
        }
        let count = segments(&descs, &mut faults);
        let known = |i: usize| count.is_none_or(|count| i < count);
        let mut strangers: Vec<usize> = settings.keys().copied().filter(|&i| !known(i)).collect();
        strangers.sort_unstable();
        faults.extend(strangers.iter().map(|i| {
            format!(
                "metadata speaks of segment {i} (causal.{i}, window.{i} or join.{i}), but k.{i} and v.{i} are missing"
            )
        }));
        let segments: Vec<SegmentSettings> =
            (0..count.unwrap_or(0)).map(|i| settings.get(&i).copied().unwrap_or_default()).collect();
        misplaced(&descs, &segments, &mut faults);
        if faults.is_empty() {
            Ok(Layout { segments, softmax_scale, softcap, descs })
        } else {
            Err(Failure::faults(&faults))
        }
    }

    /// The request, of whatever stands for a tensor.
    pub(super) fn attention<T: Copy>(&self, tensors: &HashMap<Argument, T>) -> Result<Attention<T>, Failure> {
        let get = |argument: Argument| tensors.get(&argument).copied();
        let need =
            |argument: Argument| get(argument).ok_or_else(|| Failure::bad(format_args!("{argument} is missing")));
        let mut branches: Vec<Branch<T>> = Vec::new();
        for (i, settings) in self.segments.iter().enumerate() {
            let segment = Segment {
                k: need(Argument::K(i))?,
                v: need(Argument::V(i))?,
                bias: get(Argument::Bias(i)),
                key_len: get(Argument::KeyLen(i)),
                causal: settings.causal,
                window: settings.window,
            };
            match branches.last_mut() {
                Some(branch) if settings.joins => branch.segments.push(segment),
                _ => branches.push(Branch {
                    segments: vec![segment],
                    gate: get(Argument::Gate(i)).map_or(Gate::Scalar(1.0), Gate::Tensor),
                    region: get(Argument::Region(i)),
                }),
            }
        }
        Ok(Attention {
            q: need(Argument::Q)?,
            branches,
            softmax_scale: self.softmax_scale,
            softcap: self.softcap,
            accumulate: false,
        })
    }
}

/// What is wrong with a tensor, and which it is if its name is known.
struct Fault {
    text: String,
    argument: Option<Argument>,
}

/// The tensor as the library will see it: key lengths, which may be i32 in a file, are u32 there.
fn desc(entry: &Entry) -> Result<(Argument, TensorDesc), Fault> {
    let Entry { name, dtype, shape, .. } = entry;
    let named = names::tensor(name).and_then(|argument| Some((argument, names::kind(argument)?)));
    let Some((argument, kind)) = named else {
        let known = "q, dout and, per segment i, k.i, v.i, bias.i, key_len.i, gate.i, region.i";
        return Err(Fault {
            text: format!("{} is no tensor of a request; they are {known}", quoted(name)),
            argument: None,
        });
    };
    let mut faults = Vec::new();
    let as_seen = as_seen(*dtype).filter(|_| kind.dtypes.contains(dtype));
    if as_seen.is_none() {
        faults.push(format!("{name} is {dtype}; convert it to {}", one_of(kind.dtypes)));
    }
    if !kind.ranks.contains(&shape.len()) {
        let rule = Rule::Rank { got: shape.len(), expected: kind.shape };
        faults.push(Violation { argument, rule }.to_string());
    }
    match as_seen {
        Some(dtype) if faults.is_empty() => Ok((argument, array::desc(dtype, shape))),
        _ => Err(Fault { text: faults.join("; "), argument: Some(argument) }),
    }
}

fn as_seen(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        Dtype::F32 => Some(DType::F32),
        Dtype::BOOL => Some(DType::Bool),
        Dtype::U32 | Dtype::I32 => Some(DType::U32),
        _ => None,
    }
}

fn one_of(dtypes: &[Dtype]) -> String {
    let names: Vec<String> = dtypes.iter().map(Dtype::to_string).collect();
    names.join(" or ")
}

/// Counts the segments, numbered from 0 without a gap, each with keys and values; `None` if they are not.
fn segments(descs: &HashMap<Argument, TensorDesc>, faults: &mut Vec<String>) -> Option<usize> {
    let mut numbers = BTreeSet::new();
    let mut others = BTreeSet::new();
    for argument in descs.keys() {
        match *argument {
            Argument::K(i) | Argument::V(i) => drop(numbers.insert(i)),
            Argument::Bias(i) | Argument::KeyLen(i) | Argument::Gate(i) | Argument::Region(i) => {
                others.insert((i, argument.to_string()));
            }
            _ => {}
        }
    }
    let before = faults.len();
    if numbers.is_empty() {
        faults.push("k.0 and v.0 are missing; a request has at least one segment".to_string());
    }
    for &i in &numbers {
        for (argument, other) in [(Argument::K(i), Argument::V(i)), (Argument::V(i), Argument::K(i))] {
            if !descs.contains_key(&argument) {
                faults.push(format!("{argument} is missing; {other} needs it"));
            }
        }
    }
    // Only the first gap: the next number may be as large as a file likes to say.
    if let Some((expected, i)) = numbers.iter().enumerate().find(|&(expected, &i)| expected != i) {
        faults.push(format!(
            "k.{expected} and v.{expected} are missing; segments are numbered from 0 without a gap, and segment {i} is \
             there"
        ));
    }
    for (i, name) in others.iter().filter(|(i, _)| !numbers.contains(i)) {
        faults.push(format!("{name} has no segment; k.{i} and v.{i} are missing"));
    }
    (faults.len() == before).then_some(numbers.len())
}

/// Gates and regions belong to branches: they carry the number of the branch's first segment.
fn misplaced(descs: &HashMap<Argument, TensorDesc>, segments: &[SegmentSettings], faults: &mut Vec<String>) {
    let mut first = 0;
    for (i, settings) in segments.iter().enumerate() {
        if !settings.joins {
            first = i;
            continue;
        }
        for (misplaced, right) in
            [(Argument::Gate(i), Argument::Gate(first)), (Argument::Region(i), Argument::Region(first))]
        {
            if descs.contains_key(&misplaced) {
                faults.push(format!(
                    "{misplaced} is on a segment that joins the branch of segment {first}; name it {right}"
                ));
            }
        }
    }
}
