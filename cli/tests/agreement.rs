//! The shared case list through the command line's files: every engine of this build against the oracle, forward and
//! backward.

#[path = "../../tests/cases/mod.rs"]
mod cases;
mod common;

use cases::{Case, Data, GateCase, HostTensor, Layout, all, bound, bound_of_draws, naive, naive_draws};
use common::{File, Folder, Said, call, call_in, stand_in_driver, text};
use fused_attention::{Causal, DType, Engine, Gradient, Gradients, TensorDesc};
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::SafeTensors;
use std::io::Write;
use std::sync::LazyLock;

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

/// What the engine wrote, or what it said instead.
fn run(bytes: &[u8], engine: Engine) -> Result<Vec<u8>, Said> {
    let folder = Folder::new();
    let (input, output) = (folder.write(bytes), folder.path("out.safetensors"));
    let mut arguments = vec!["run", text(&input), text(&output), "--engine", engine.name()];
    if engine == Engine::Emulated {
        arguments.extend(["--arch", "sm_80"]);
    }
    let said = match stand_in_driver() {
        Some(folder) if engine == Engine::Cuda => call_in(&arguments, &[("LD_LIBRARY_PATH", folder)]),
        _ => call(&arguments),
    };
    match std::fs::read(output) {
        Ok(written) if said.status == 0 => Ok(written),
        Err(_) if said.status != 0 => Err(said),
        read => panic!("{engine:?}: status {}, yet the output {read:?}: {}", said.status, said.stderr),
    }
}

/// Engines to test.
static ENGINES: LazyLock<Vec<Engine>> = LazyLock::new(|| {
    let mut engines = vec![Engine::Reference, Engine::Cpu];
    if cfg!(feature = "emulated") {
        engines.push(Engine::Emulated);
    }
    match stand_in_driver() {
        Some(_) => engines.push(Engine::Cuda),
        // Not eprintln: the test harness would swallow it.
        None => {
            drop(writeln!(std::io::stderr(), "LEFT OUT: the cuda engine through files: no kernels, or no emulator"))
        }
    }
    engines
});

/// Whether an engine has a kernel for a case that comes in a file: its tensors are dense there, whatever the case's layout.
fn has_kernel(case: &Case, engine: Engine) -> bool {
    Case { layout: Layout::Bshd, ..case.clone() }.has_kernel(engine)
}

fn failures(case: &Case) -> Vec<String> {
    let data = Data::new(case, 7);
    let oracle = data.attention().forward_f64().expect("every case is a legal problem");
    let naive = naive(&data);
    let bytes = file(&data).bytes();
    let mut failures = Vec::new();
    for &engine in ENGINES.iter() {
        let name = engine.name();
        let written = match run(&bytes, engine) {
            Ok(written) if has_kernel(case, engine) => written,
            Err(said) if !has_kernel(case, engine) => {
                let reason = format!("forward: the {name} engine cannot run this: ");
                let told = said.stderr.strip_prefix(&reason).is_some_and(|why| !why.trim().is_empty());
                if said.status != 3 || !told {
                    failures.push(format!("{name} {}: status {}, {}", case.name, said.status, said.stderr));
                }
                continue;
            }
            Ok(_) => {
                failures.push(format!("{name} {}: it ran, with no kernel for it", case.name));
                continue;
            }
            Err(said) => {
                failures.push(format!("{name} {}: status {}, {}", case.name, said.status, said.stderr));
                continue;
            }
        };
        let mut checks =
            vec![("out".to_string(), bound(case.dtype, &values(&written, "out"), &naive.out, &oracle.out.values))];
        let rows = case.batch * case.heads * case.seq_q;
        for b in 0..case.branches.len() {
            let lse = format!("lse.{b}");
            let (naive, oracle) = (&naive.lse[b * rows..][..rows], &oracle.lse.values[b * rows..][..rows]);
            let check = bound(DType::F32, &values(&written, &lse), naive, oracle);
            checks.push((lse, check));
        }
        for (what, check) in checks.iter().filter(|(_, check)| !check.holds()) {
            failures.push(format!("{name} {} {what}: {check:?}", case.name));
        }
    }
    failures
}

#[test]
fn every_engine_agrees_on_the_case_list() {
    let cases: Vec<Case> = all().into_iter().filter(Case::fits_file_contract).collect();
    assert!(cases.len() >= 60, "{} cases fit the file contract", cases.len());
    for &engine in ENGINES.iter() {
        let run = cases.iter().filter(|case| has_kernel(case, engine)).count();
        assert!(run >= 60, "the {} engine has kernels for {run} cases", engine.name());
    }
    let failures: Vec<String> = cases.par_iter().flat_map_iter(failures).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn every_engine_writes_every_gradient() {
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

    let input = tensor(file(data), "dout".into(), &data.dout).bytes();
    let written = run(&input, Engine::Reference).unwrap_or_else(|said| panic!("{}: {}", data.case.name, said.stderr));
    for (gradient, name, _) in &wanted {
        let expected: Vec<f32> = oracle[gradient].values.iter().map(|&value| value as f32).collect();
        assert_eq!(values(&written, name), expected, "{} {name}", data.case.name);
    }
    let naive = naive_draws(data, None);
    for &engine in ENGINES.iter().filter(|&&engine| engine != Engine::Reference) {
        let written = match (run(&input, engine), has_kernel(&data.case, engine)) {
            (Ok(written), true) => written,
            (Err(said), false) if said.status == 3 && said.stderr.contains("backward: ") => continue,
            (Ok(_), false) => panic!("{} {}: it ran, with no kernel for it", engine.name(), data.case.name),
            (Err(said), _) => panic!("{} {}: status {}, {}", engine.name(), data.case.name, said.status, said.stderr),
        };
        for (gradient, name, _) in &wanted {
            let check = bound_of_draws(DType::F32, &values(&written, name), &naive[gradient], &oracle[gradient].values);
            assert!(check.holds(), "{} {} {name}: {check:?}", engine.name(), data.case.name);
        }
    }
    let names = SafeTensors::deserialize(&written).expect("a safetensors file").len();
    assert_eq!(names, wanted.len() + 1 + data.branches.len(), "{}: nothing else is in the file", data.case.name);
    wanted.len()
}
