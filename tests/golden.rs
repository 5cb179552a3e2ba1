//! The reference engine against PyTorch: cases whose results and gradients autograd computed in float64.
//!
//! Each file of `tests/golden` is a case in the command line's file contract, with the results beside the inputs;
//! `tests/golden/make.py` writes them and says how.

use fused_attention::{
    Attention, Branch, Causal, Element, Gradient, Gradients, Segment, Tensor, TensorRef, reference::Dense,
};
use safetensors::{Dtype, SafeTensors};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// Largest difference allowed, relative to the largest expected element of the same tensor.
///
/// Both sides start from the same f32 inputs, scale and softcap and compute in f64, so they differ by the order of
/// their sums alone: at most some hundred roundings of 2^-53 each, weighted by logits of at most 2^4 and by what
/// cancels in `dP - delta`. That is 2e-13 at the worst and 1e-15 as measured; one rounding to f32, 6e-8, is far above.
const BOUND: f64 = 1e-12;

#[test]
fn forward_agrees_with_pytorch() {
    for_each_case(|case, attention| {
        let computed = attention.forward_f64().unwrap_or_else(|error| panic!("{}: {error}", case.name));
        let rows = computed.lse.values.len() / attention.branches.len();
        let mut compared = case.compare("out", &computed.out.values);
        for (branch, lse) in computed.lse.values.chunks(rows).enumerate() {
            compared += case.compare(&format!("lse.{branch}"), lse);
        }
        compared
    });
}

#[test]
fn backward_agrees_with_pytorch() {
    for_each_case(|case, attention| {
        let gradients = case.gradients(attention);
        let wanted = (gradients.iter())
            .fold(Gradients::new(), |wanted, (name, gradient)| wanted.want(*gradient, case.view(name).desc()));
        let computed =
            attention.backward_f64(case.view("dout"), &wanted).unwrap_or_else(|error| panic!("{}: {error}", case.name));
        let compare = |(name, gradient): &(String, Gradient)| {
            let Dense { extents, values } = &computed[gradient];
            let extents: Vec<usize> = extents.iter().copied().filter(|&extent| extent != 1).collect();
            let shape: Vec<usize> = case.tensors[name].shape.iter().copied().filter(|&extent| extent != 1).collect();
            assert_eq!(extents, shape, "{}: d{name}", case.name);
            case.compare(&format!("d{name}"), values)
        };
        gradients.iter().map(compare).sum()
    });
}

/// Calls `check` with every case; it answers how many elements it compared.
fn for_each_case(check: impl Fn(&Case, &Attention<TensorRef<'_>>) -> usize) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let files = folder.read_dir().expect("tests/golden is a folder").map(|entry| entry.expect("readable").path());
    let mut paths: Vec<_> = files.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{} holds no case", folder.display());
    for path in paths {
        let case = Case::read(&path);
        let compared = check(&case, &case.attention());
        assert!(compared > 0, "{}: nothing was compared", case.name);
    }
}

/// One file.
struct Case {
    name: String,
    options: HashMap<String, String>,
    tensors: BTreeMap<String, Stored>,
}

struct Stored {
    shape: Vec<usize>,
    data: Data,
}

enum Data {
    F32(Vec<f32>),
    F64(Vec<f64>),
    U32(Vec<u32>),
    Bool(Vec<bool>),
}

impl Case {
    fn read(path: &Path) -> Case {
        let bytes = std::fs::read(path).expect("the file can be read");
        let file = SafeTensors::deserialize(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let (_, header) = SafeTensors::read_metadata(&bytes).expect("it was just read");
        let tensors = file.iter().map(|(name, tensor)| {
            let raw = tensor.data();
            let data = match tensor.dtype() {
                Dtype::F32 => Data::F32(elements(raw, f32::from_le_bytes)),
                Dtype::F64 => Data::F64(elements(raw, f64::from_le_bytes)),
                Dtype::U32 => Data::U32(elements(raw, u32::from_le_bytes)),
                Dtype::BOOL => Data::Bool(elements(raw, |[byte]| byte != 0)),
                other => panic!("{}: {name} holds {other:?}", path.display()),
            };
            (name.to_owned(), Stored { shape: tensor.shape().to_vec(), data })
        });
        let case = Case {
            name: path.file_stem().expect("a file has a name").to_string_lossy().into_owned(),
            options: header.metadata().clone().unwrap_or_default(),
            tensors: tensors.collect(),
        };
        case.assert_names();
        case
    }

    /// Every tensor and option of the file has a name that this test reads: nothing is passed over.
    fn assert_names(&self) {
        let segments = 0..self.segments();
        let indexed = |names: &[&str]| -> Vec<String> {
            segments.clone().flat_map(|i| names.iter().map(move |name| format!("{name}.{i}"))).collect()
        };
        let inputs = [vec!["q".to_owned()], indexed(&["k", "v", "bias", "key_len", "gate", "region"])].concat();
        let results = indexed(&["expected.lse"]).into_iter().chain(inputs.iter().map(|i| format!("expected.d{i}")));
        let tensors: Vec<String> =
            results.chain(inputs.clone()).chain(["dout".to_owned(), "expected.out".to_owned()]).collect();
        let options = [vec!["softmax_scale".to_owned(), "softcap".to_owned()], indexed(&["causal", "window", "join"])];
        for name in self.tensors.keys() {
            assert!(tensors.contains(name), "{}: the name {name} means nothing", self.name);
        }
        for name in self.options.keys() {
            assert!(options.concat().contains(name), "{}: the option {name} means nothing", self.name);
        }
    }

    fn segments(&self) -> usize {
        self.tensors.keys().filter(|name| name.starts_with("k.")).count()
    }

    /// Whether a segment begins a branch.
    fn begins(&self, segment: usize) -> bool {
        self.options.get(&format!("join.{segment}")).is_none_or(|join| join != "true")
    }

    fn attention(&self) -> Attention<TensorRef<'_>> {
        let number = |name: &str| self.options.get(name).map(|text| text.parse::<f32>().expect("a number"));
        let mut attention = Attention::new(self.view("q"));
        attention.softmax_scale = number("softmax_scale");
        attention.softcap = number("softcap");
        for i in 0..self.segments() {
            let segment = self.segment(i);
            if self.begins(i) {
                let mut branch = Branch::from(segment);
                if let Some(gate) = self.input(&format!("gate.{i}")) {
                    branch = branch.gate_tensor(gate);
                }
                branch.region = self.input(&format!("region.{i}"));
                attention = attention.branch(branch);
            } else {
                attention.branches.last_mut().expect("the first segment joins none").segments.push(segment);
            }
        }
        attention
    }

    fn segment(&self, i: usize) -> Segment<TensorRef<'_>> {
        let option = |name: &str| self.options.get(&format!("{name}.{i}"));
        let mut segment = Segment::new(self.view(&format!("k.{i}")), self.view(&format!("v.{i}")));
        segment.bias = self.input(&format!("bias.{i}"));
        segment.key_len = self.input(&format!("key_len.{i}"));
        segment.causal = match option("causal").map(String::as_str) {
            None => Causal::None,
            Some("top-left") => Causal::TopLeft,
            Some("bottom-right") => Causal::BottomRight,
            Some(other) => panic!("{}: causal.{i} is {other}", self.name),
        };
        if let Some(window) = option("window") {
            let (left, right) = window.split_once(',').expect("left,right");
            // -1 is no u32, hence open.
            let reach = |text: &str| u32::try_from(text.parse::<i64>().expect("an integer")).ok();
            segment = segment.window(reach(left), reach(right));
        }
        segment
    }

    /// The gradient of every float input, with the name of the input.
    fn gradients(&self, attention: &Attention<TensorRef<'_>>) -> Vec<(String, Gradient)> {
        let mut all = vec![("q".to_owned(), Gradient::Q)];
        let mut i = 0;
        for (b, branch) in attention.branches.iter().enumerate() {
            all.extend([(format!("gate.{i}"), Gradient::Gate(b)), (format!("region.{i}"), Gradient::Region(b))]);
            for _ in &branch.segments {
                let bias = (format!("bias.{i}"), Gradient::Bias(i));
                all.extend([(format!("k.{i}"), Gradient::K(i)), (format!("v.{i}"), Gradient::V(i)), bias]);
                i += 1;
            }
        }
        all.retain(|(name, _)| matches!(self.tensors.get(name), Some(Stored { data: Data::F32(_), .. })));
        all
    }

    fn input(&self, name: &str) -> Option<TensorRef<'_>> {
        self.tensors.contains_key(name).then(|| self.view(name))
    }

    fn view(&self, name: &str) -> TensorRef<'_> {
        let Stored { shape, data } =
            self.tensors.get(name).unwrap_or_else(|| panic!("{}: {name} is missing", self.name));
        match data {
            Data::F32(data) => view(data, shape),
            Data::U32(data) => view(data, shape),
            Data::Bool(data) => view(data, shape),
            Data::F64(_) => panic!("{}: {name} is no input", self.name),
        }
    }

    /// Holds `computed` against the expected tensor of this name; answers the number of elements.
    fn compare(&self, name: &str, computed: &[f64]) -> usize {
        let stored = self.tensors.get(&format!("expected.{name}"));
        let Some(Stored { data: Data::F64(expected), .. }) = stored else {
            panic!("{}: there is no expected {name}, or not in f64", self.name);
        };
        assert_eq!(computed.len(), expected.len(), "{}: elements of {name}", self.name);
        let largest = expected.iter().map(|x| x.abs()).filter(|x| x.is_finite()).fold(0.0, f64::max);
        for (at, (&got, &want)) in computed.iter().zip(expected).enumerate() {
            // Equality is for rows without a key, whose lse is -inf.
            let error = if got == want { 0.0 } else { (got - want).abs() };
            assert!(
                error <= BOUND * largest,
                "{}: {name}[{at}] is {got}, PyTorch has {want}; that is {:.1e} of the largest",
                self.name,
                error / largest,
            );
        }
        expected.len()
    }
}

fn elements<T, const N: usize>(raw: &[u8], decode: impl Fn([u8; N]) -> T) -> Vec<T> {
    raw.chunks_exact(N).map(|bytes| decode(bytes.try_into().expect("a chunk has N bytes"))).collect()
}

fn view<'a, T: Element>(data: &'a [T], shape: &[usize]) -> TensorRef<'a> {
    match *shape {
        [] => TensorRef::contiguous(data, []),
        [a] => TensorRef::contiguous(data, [a]),
        [a, b] => TensorRef::contiguous(data, [a, b]),
        [a, b, c, d] => TensorRef::contiguous(data, [a, b, c, d]),
        _ => panic!("no input has the shape {shape:?}"),
    }
}
