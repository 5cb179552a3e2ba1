//! The shared case list through the command line's files: every engine that runs here against the oracle, and the
//! reference's backward.

#[path = "../../tests/cases/mod.rs"]
mod cases;
mod common;

use cases::{Case, Data, GateCase, HostTensor, all, bound, naive};
use common::{File, Folder, call};
use fused_attention::{Causal, DType, Gradient, Gradients, TensorDesc};
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::SafeTensors;

fn tensor(file: File, name: String, tensor: &HostTensor) -> File {
    let dtype = match tensor.dtype() {
        DType::F16 => "F16",
        DType::BF16 => "BF16",
        DType::F32 => "F32",
        DType::Bool => "BOOL",
        DType::U32 => "U32",
    };
    file.with(&name, dtype, &tensor.shape, tensor.dense_bytes())
}

/// The case as a file of the contract.
fn file(data: &Data) -> File {
    let case = &data.case;
    let mut file = tensor(File::new(), "q".into(), &data.q);
    if let Some(scale) = case.softmax_scale {
        file = file.setting("softmax_scale", &scale.to_string());
    }
    if let Some(softcap) = case.softcap {
        file = file.setting("softcap", &softcap.to_string());
    }
    let mut number = 0;
    for (branch, described) in data.branches.iter().zip(&case.branches) {
        if let GateCase::Scalar(gate) = described.gate {
            file = file.f32(&format!("gate.{number}"), &[], &[gate]);
        }
        if let Some(gate) = &branch.gate {
            file = tensor(file, format!("gate.{number}"), gate);
        }
        if let Some(region) = &branch.region {
            file = tensor(file, format!("region.{number}"), region);
        }
        for (s, (segment, described)) in branch.segments.iter().zip(&described.segments).enumerate() {
            file = tensor(file, format!("k.{number}"), &segment.k);
            file = tensor(file, format!("v.{number}"), &segment.v);
            if let Some(bias) = &segment.bias {
                file = tensor(file, format!("bias.{number}"), bias);
            }
            if let Some(key_len) = &segment.key_len {
                file = tensor(file, format!("key_len.{number}"), key_len);
            }
            match described.causal {
                Causal::None => {}
                Causal::TopLeft => file = file.setting(&format!("causal.{number}"), "top-left"),
                Causal::BottomRight => file = file.setting(&format!("causal.{number}"), "bottom-right"),
            }
            let side = |side: Option<u32>| side.map_or(-1, i64::from);
            let window = (side(described.window.left), side(described.window.right));
            if window != (-1, -1) {
                file = file.setting(&format!("window.{number}"), &format!("{},{}", window.0, window.1));
            }
            if s > 0 {
                file = file.setting(&format!("join.{number}"), "true");
            }
            number += 1;
        }
    }
    file
}

/// The values of one tensor of a file.
fn values(bytes: &[u8], name: &str) -> Vec<f32> {
    let file = SafeTensors::deserialize(bytes).expect("the output is a safetensors file");
    let view = file.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
    let data = view.data();
    match view.dtype() {
        safetensors::Dtype::F16 => data.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        safetensors::Dtype::BF16 => data.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        safetensors::Dtype::F32 => data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        other => panic!("{name} is {other:?}"),
    }
}

fn run(folder: &Folder, bytes: &[u8], engine: &str) -> Vec<u8> {
    let (input, output) = (folder.write(bytes), folder.path("out.safetensors"));
    let paths = [&input, &output].map(|path| path.to_str().expect("a path in UTF-8").to_string());
    let said = call(&["run", &paths[0], &paths[1], "--engine", engine]);
    assert_eq!(said.status, 0, "{engine}: {}", said.stderr);
    std::fs::read(output).expect("the output is there")
}

fn failures(case: &Case) -> Vec<String> {
    let data = Data::new(case, 7);
    let oracle = data.attention().forward_f64().expect("every case is a legal problem");
    let naive = naive(&data);
    let folder = Folder::new();
    let bytes = file(&data).bytes();
    let mut failures = Vec::new();
    for engine in ["reference", "cpu"] {
        let written = run(&folder, &bytes, engine);
        let mut checks =
            vec![("out".to_string(), bound(case.dtype, &values(&written, "out"), &naive.out, &oracle.out.values))];
        let rows = case.batch * case.heads * case.seq_q;
        for b in 0..case.branches.len() {
            let name = format!("lse.{b}");
            let (naive, oracle) = (&naive.lse[b * rows..][..rows], &oracle.lse.values[b * rows..][..rows]);
            let check = bound(DType::F32, &values(&written, &name), naive, oracle);
            checks.push((name, check));
        }
        for (what, check) in checks.iter().filter(|(_, check)| !check.holds()) {
            failures.push(format!("{engine} {} {what}: {check:?}", case.name));
        }
    }
    failures
}

#[test]
fn reference_and_cpu_agree_on_the_case_list() {
    let cases: Vec<Case> = all().into_iter().filter(Case::fits_file_contract).collect();
    assert!(cases.len() >= 60, "{} cases fit the file contract", cases.len());
    let failures: Vec<String> = cases.par_iter().flat_map_iter(failures).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn the_reference_writes_every_gradient() {
    // The dearest cases of all are left to the forward.
    let affordable = |case: &Case| {
        let keys: usize = case.segments().map(|segment| segment.seq_kv).sum();
        case.batch * case.heads * case.seq_q * keys * case.head_dim < 3_000_000
    };
    let cases: Vec<Case> = all().into_iter().filter(|case| case.fits_file_contract() && affordable(case)).collect();
    assert!(cases.len() >= 40, "{} cases are affordable", cases.len());
    let compared: usize = cases.par_iter().map(|case| compare_gradients(&Data::new(case, 8))).sum();
    assert!(compared >= 4 * cases.len(), "{compared} gradients of {} cases", cases.len());
}

/// Compares every gradient in the file with the oracle's; returns how many there were.
fn compare_gradients(data: &Data) -> usize {
    let mut wanted = vec![(Gradient::Q, "dq".to_string(), data.q.shape.clone())];
    let mut number = 0;
    for (b, branch) in data.branches.iter().enumerate() {
        if let GateCase::Scalar(_) = data.case.branches[b].gate {
            wanted.push((Gradient::Gate(b), format!("dgate.{number}"), vec![]));
        }
        let gate = branch.gate.iter().map(|gate| (Gradient::Gate(b), format!("dgate.{number}"), gate.shape.clone()));
        wanted.extend(gate);
        let region = branch.region.iter();
        wanted.extend(region.map(|region| (Gradient::Region(b), format!("dregion.{number}"), region.shape.clone())));
        for segment in &branch.segments {
            wanted.push((Gradient::K(number), format!("dk.{number}"), segment.k.shape.clone()));
            wanted.push((Gradient::V(number), format!("dv.{number}"), segment.v.shape.clone()));
            if let Some(bias) = segment.bias.as_ref().filter(|bias| bias.dtype() != DType::Bool) {
                wanted.push((Gradient::Bias(number), format!("dbias.{number}"), bias.shape.clone()));
            }
            number += 1;
        }
    }
    let gradients = wanted.iter().fold(Gradients::new(), |gradients, (gradient, _, shape)| {
        let dense: Vec<isize> =
            (0..shape.len()).map(|dim| shape[dim + 1..].iter().product::<usize>() as isize).collect();
        let desc = TensorDesc::from_slices(DType::F32, shape, &dense).expect("at most four dimensions");
        gradients.want(*gradient, desc)
    });
    let oracle = data.attention().backward_f64(data.dout.view(), &gradients).expect("a legal problem");

    let folder = Folder::new();
    let written = run(&folder, &tensor(file(data), "dout".into(), &data.dout).bytes(), "reference");
    for (gradient, name, _) in &wanted {
        let expected: Vec<f32> = oracle[gradient].values.iter().map(|&value| value as f32).collect();
        assert_eq!(values(&written, name), expected, "{} {name}", data.case.name);
    }
    let names = SafeTensors::deserialize(&written).expect("a safetensors file").len();
    assert_eq!(names, wanted.len() + 1 + data.branches.len(), "{}: nothing else is in the file", data.case.name);
    wanted.len()
}
