//! The shared case list through the command line's files: every engine of this build against the oracle, forward and
//! backward.

#[path = "../../tests/cases/mod.rs"]
mod cases;
mod common;

use cases::{BranchCase, Case, Data, GateCase, HostTensor, Layout, all, bound, bound_of_draws, naive, naive_draws};
use common::{File, Folder, Said, call, call_in, stand_in_driver, text};
use fused_attention::{Causal, DType, Engine, Gradient, Gradients, TensorDesc, Window};
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

/// An engine, and which GPU it emulates.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Machine {
    engine: Engine,
    arch: Option<&'static str>,
}

const HOPPER: &str = "sm_90a";

impl Machine {
    fn name(self) -> String {
        format!("{} {}", self.engine.name(), self.arch.unwrap_or_default())
    }

    fn arguments(self) -> Vec<&'static str> {
        let mut arguments = vec!["--engine", self.engine.name()];
        arguments.extend(self.arch.iter().flat_map(|arch| ["--arch", *arch]));
        arguments
    }

    /// What it wrote and said, or what it said instead.
    fn run(self, bytes: &[u8]) -> Result<(Vec<u8>, Said), Said> {
        let folder = Folder::new();
        let (input, output) = (folder.write(bytes), folder.path("out.safetensors"));
        let arguments = [&["run", text(&input), text(&output), "--json"], &self.arguments()[..]].concat();
        let said = match stand_in_driver() {
            Some(folder) if self.engine == Engine::Cuda => call_in(&arguments, &[("LD_LIBRARY_PATH", folder)]),
            _ => call(&arguments),
        };
        match std::fs::read(output) {
            Ok(written) if said.status == 0 => Ok((written, said)),
            Err(_) if said.status != 0 => Err(said),
            read => panic!("{self:?}: status {}, yet the output {read:?}: {}", said.status, said.stderr),
        }
    }
}

/// Machines to test.
static MACHINES: LazyLock<Vec<Machine>> = LazyLock::new(|| {
    let machine = |engine| Machine { engine, arch: None };
    let mut machines = vec![machine(Engine::Reference), machine(Engine::Cpu)];
    if cfg!(feature = "emulated") {
        machines.extend(["sm_80", HOPPER].map(|arch| Machine { engine: Engine::Emulated, arch: Some(arch) }));
    }
    match stand_in_driver() {
        Some(_) => machines.push(machine(Engine::Cuda)),
        // Not eprintln: the test harness would swallow it.
        None => {
            drop(writeln!(std::io::stderr(), "LEFT OUT: the cuda engine through files: no kernels, or no emulator"))
        }
    }
    machines
});

/// Whether an engine has a kernel for a case that comes in a file: its tensors are dense there, whatever the case's layout.
fn has_kernel(case: &Case, engine: Engine) -> bool {
    Case { layout: Layout::Bshd, ..case.clone() }.has_kernel(engine)
}

/// Whether a kernel for sm_90 takes the case, of which the file has the tensors dense: kernels/README.md and docs/kernels.md in short.
fn for_hopper(case: &Case) -> bool {
    let width = case.head_dim.max(case.value_dim);
    let keys = |branch: &BranchCase| branch.segments.iter().map(|segment| segment.seq_kv.next_multiple_of(16)).sum();
    let longest: usize = case.branches.iter().map(keys).max().unwrap_or(0);
    let positions = case.segments().any(|s| s.causal != Causal::None || s.window != Window::default());
    let any_logits = case.softcap.is_some()
        || case.softmax_scale.is_some_and(|scale| scale <= 0.0)
        || case.segments().any(|segment| segment.bias.is_some());
    // Branches of few keys whose logits have a cap, a bias or a position rule stay with the short kernel for sm_80.
    let short_for_all = longest <= 96 && width <= 160;
    let tensor_maps = case.segments().count() <= 8;
    let streams = if any_logits { width <= 160 } else { width <= 160 || case.branches.len() == 1 };
    let keeps = !any_logits && !positions && longest <= 112;
    tensor_maps && (keeps || streams && !(short_for_all && (any_logits || positions)))
}

/// What the command line says about the kernel that ran on the emulated Hopper.
fn hopper_failures(case: &Case, bytes: &[u8], said: &Said) -> Vec<String> {
    let mut failures = Vec::new();
    let said: serde_json::Value = serde_json::from_str(&said.stdout).expect("it is JSON");
    let kernel = said["kernel"].as_str().expect("a kernel is named");
    let architecture = if for_hopper(case) { "_sm90_" } else { "_sm80_" };
    if !kernel.contains(architecture) {
        failures.push(format!("{}: {kernel}, not one of {architecture}", case.name));
    }
    let folder = Folder::new();
    let plan = call(&["plan", text(&folder.write(bytes)), "--engine", "emulated", "--arch", HOPPER]);
    if !plan.stdout.contains(&format!("kernel         {kernel}\n")) {
        failures.push(format!("{}: {kernel} ran, planned was {}", case.name, plan.stdout));
    }
    let hopper = ["short", "medium", "streaming", "fine", "biased"].map(|name| format!("forward_{name}_sm90"));
    for other in &hopper {
        let lines = plan.stdout.lines().filter_map(|line| line.strip_prefix("not taken      ")?.strip_prefix(other));
        let reasons: Vec<&str> = lines.filter_map(|line| line.strip_prefix(": ")).collect();
        let ran = kernel.starts_with(&format!("{other}_"));
        // What is told of one that was passed over must be so: of a kernel for sm_80 in its place, more than an order.
        if ran != reasons.is_empty() || reasons.iter().any(|reason| reason.trim().is_empty()) {
            failures.push(format!("{}: {kernel} ran; of {other} it says {reasons:?}", case.name));
        }
        if kernel.starts_with("forward_streaming_sm80") && reasons.iter().any(|reason| reason.ends_with("comes first"))
        {
            failures.push(format!("{}: {other} would take it, yet {kernel} ran", case.name));
        }
    }
    failures
}

fn failures(case: &Case) -> Vec<String> {
    let data = Data::new(case, 7);
    let oracle = data.attention().forward_f64().expect("every case is a legal problem");
    let naive = naive(&data);
    let bytes = file(&data).bytes();
    let mut failures = Vec::new();
    for &machine in MACHINES.iter() {
        let (engine, name) = (machine.engine, machine.name());
        // A block of the kernels for sm_90 has 384 threads or more: tens of thousands of them take minutes.
        if machine.arch == Some(HOPPER) && case.batch * case.heads > 10_000 {
            drop(writeln!(std::io::stderr(), "LEFT OUT: {name} {}: too many blocks to emulate", case.name));
            continue;
        }
        let written = match machine.run(&bytes) {
            Ok((written, said)) if has_kernel(case, engine) => {
                if machine.arch == Some(HOPPER) {
                    failures.extend(hopper_failures(case, &bytes, &said));
                }
                written
            }
            Err(said) if !has_kernel(case, engine) => {
                let reason = format!("forward: the {} engine cannot run this: ", engine.name());
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
    for machine in MACHINES.iter() {
        let run = cases.iter().filter(|case| has_kernel(case, machine.engine)).count();
        assert!(run >= 60, "{} has kernels for {run} cases", machine.name());
    }
    let of_hopper = |case: &&Case| has_kernel(case, Engine::Emulated) && for_hopper(case);
    let of_hopper = cases.iter().filter(of_hopper).count();
    assert!(of_hopper >= 50, "kernels for sm_90 take {of_hopper} cases");
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
    // dq, dk and dv each, and more where there are branches, biases or weights.
    assert!(compared > 3 * cases.len(), "{compared} gradients of {} cases", cases.len());
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
    let written = Machine { engine: Engine::Reference, arch: None }.run(&input);
    let (written, _) = written.unwrap_or_else(|said| panic!("{}: {}", data.case.name, said.stderr));
    for (gradient, name, _) in &wanted {
        let expected: Vec<f32> = oracle[gradient].values.iter().map(|&value| value as f32).collect();
        assert_eq!(values(&written, name), expected, "{} {name}", data.case.name);
    }
    let naive = naive_draws(data, None);
    // Gradients come from the same kernels on every GPU.
    let others = |machine: &&Machine| machine.engine != Engine::Reference && machine.arch != Some(HOPPER);
    for machine in MACHINES.iter().filter(others) {
        let name = machine.name();
        let written = match (machine.run(&input), has_kernel(&data.case, machine.engine)) {
            (Ok((written, _)), true) => written,
            (Err(said), false) if said.status == 3 && said.stderr.contains("backward: ") => continue,
            (Ok(_), false) => panic!("{name} {}: it ran, with no kernel for it", data.case.name),
            (Err(said), _) => panic!("{name} {}: status {}, {}", data.case.name, said.status, said.stderr),
        };
        for (gradient, name, _) in &wanted {
            let check = bound_of_draws(DType::F32, &values(&written, name), &naive[gradient], &oracle[gradient].values);
            assert!(check.holds(), "{} {} {name}: {check:?}", machine.name(), data.case.name);
        }
    }
    let names = SafeTensors::deserialize(&written).expect("a safetensors file").len();
    assert_eq!(names, wanted.len() + 1 + data.branches.len(), "{}: nothing else is in the file", data.case.name);
    wanted.len()
}
