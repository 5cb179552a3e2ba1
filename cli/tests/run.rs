//! Files that are right: what comes out, name by name and bit by bit as the library called directly gives it.

mod common;

use bytemuck::NoUninit;
use common::{File, Folder, call, numbers, text};
use fused_attention::{
    Attention, Branch, Causal, Engine, Gradient, Gradients, Outputs, Segment, TensorMut, TensorRef, device,
};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use std::collections::BTreeMap;

/// What a file must hold: name, type, shape, bytes.
type Expected = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn expect<T: NoUninit>(expected: &mut Expected, name: &str, dtype: Dtype, shape: &[usize], data: &[T]) {
    expected.insert(name.to_string(), (dtype, shape.to_vec(), bytemuck::cast_slice(data).to_vec()));
}

#[track_caller]
fn outputs_are(input: &File, engine: &str, expected: &Expected) {
    let folder = Folder::new();
    let (from, to) = (folder.write(&input.bytes()), folder.path("out.safetensors"));
    let said = call(&["run", text(&from), text(&to), "--engine", engine]);
    assert_eq!((said.status, said.stderr.as_str()), (0, ""));
    let bytes = std::fs::read(to).expect("the output is there");
    let written = SafeTensors::deserialize(&bytes).expect("the output is a safetensors file");
    let names: Vec<String> = written.names().into_iter().map(String::from).collect();
    let mut sorted = names.clone();
    sorted.sort();
    assert_eq!(sorted, expected.keys().cloned().collect::<Vec<_>>());
    for (name, (dtype, shape, data)) in expected {
        let tensor = written.tensor(name).expect("the name was compared");
        assert_eq!((tensor.dtype(), tensor.shape()), (*dtype, shape.as_slice()), "{name}");
        assert!(tensor.data() == data, "{name} differs from what the library gives");
        assert!(data.iter().any(|&byte| byte != 0), "{name} is all zeros: the case says nothing");
    }
    assert_eq!(folder.names(), ["in.safetensors", "out.safetensors"]);
}

fn halves(len: usize, seed: u64) -> Vec<f16> {
    numbers(len, seed).into_iter().map(f16::from_f32).collect()
}

const B: usize = 2;
const SQ: usize = 5;
const H: usize = 4;
const D: usize = 3;
const DV: usize = 6;

/// Text of two joined segments, then an image branch with a gate per head and a shared region; f16, backward too.
#[test]
fn joined_segments_and_a_masked_branch() {
    let q = halves(B * SQ * H * D, 1);
    let dout = halves(B * SQ * H * DV, 2);
    let (k0, v0) = (halves(B * 7 * H * D, 3), halves(B * 7 * H * DV, 4));
    // Two heads of keys for four of queries, one batch entry for both.
    let (k1, v1) = (halves(4 * 2 * D, 5), halves(4 * 2 * DV, 6));
    let (k2, v2) = (halves(B * 6 * H * D, 7), halves(B * 6 * H * DV, 8));
    let bias0 = halves(H * 7, 9);
    let mask1: Vec<bool> = numbers(B * SQ * 4, 10).iter().map(|&x| x < 0.5).collect();
    let lengths0 = [7u32, 3];
    let gate = numbers(B * H, 11);
    let region = numbers(SQ, 12);

    let attention = Attention::new(TensorRef::bshd(&q, [B, SQ, H, D]))
        .branch(
            Branch::from(
                Segment::new(TensorRef::bshd(&k0, [B, 7, H, D]), TensorRef::bshd(&v0, [B, 7, H, DV]))
                    .bias(TensorRef::contiguous(&bias0, [1, H, 1, 7]))
                    .key_len(TensorRef::contiguous(&lengths0, [B]))
                    .causal(Causal::BottomRight),
            )
            .join(
                Segment::new(TensorRef::bshd(&k1, [1, 4, 2, D]), TensorRef::bshd(&v1, [1, 4, 2, DV]))
                    .bias(TensorRef::contiguous(&mask1, [B, 1, SQ, 4]))
                    .causal(Causal::TopLeft),
            ),
        )
        .branch(
            Branch::from(
                Segment::new(TensorRef::bshd(&k2, [B, 6, H, D]), TensorRef::bshd(&v2, [B, 6, H, DV]))
                    .window(Some(2), None),
            )
            .gate_tensor(TensorRef::contiguous(&gate, [B, H]))
            .region(TensorRef::contiguous(&region, [1, SQ])),
        )
        .softmax_scale(0.7)
        .softcap(9.5);

    let mut expected = Expected::new();
    let mut out = vec![f16::ZERO; B * SQ * H * DV];
    let mut lse = vec![0f32; 2 * B * H * SQ];
    let outputs =
        Outputs::new(TensorMut::bshd(&mut out, [B, SQ, H, DV])).lse(TensorMut::contiguous(&mut lse, [2, B, H, SQ]));
    attention.forward(Engine::Reference, outputs).expect("the library takes it");
    expect(&mut expected, "out", Dtype::F16, &[B, SQ, H, DV], &out);
    expect(&mut expected, "lse.0", Dtype::F32, &[B, H, SQ], &lse[..B * H * SQ]);
    expect(&mut expected, "lse.1", Dtype::F32, &[B, H, SQ], &lse[B * H * SQ..]);

    // No dbias.1: a mask has no gradient. No dgate.0 nor dregion.0: they were not given.
    let shapes: [(&str, Gradient, &[usize]); 10] = [
        ("dq", Gradient::Q, &[B, SQ, H, D]),
        ("dk.0", Gradient::K(0), &[B, 7, H, D]),
        ("dv.0", Gradient::V(0), &[B, 7, H, DV]),
        ("dbias.0", Gradient::Bias(0), &[1, H, 1, 7]),
        ("dk.1", Gradient::K(1), &[1, 4, 2, D]),
        ("dv.1", Gradient::V(1), &[1, 4, 2, DV]),
        ("dk.2", Gradient::K(2), &[B, 6, H, D]),
        ("dv.2", Gradient::V(2), &[B, 6, H, DV]),
        ("dgate.2", Gradient::Gate(1), &[B, H]),
        ("dregion.2", Gradient::Region(1), &[1, SQ]),
    ];
    let mut buffers: Vec<Vec<f32>> = shapes.iter().map(|(.., shape)| vec![0.0; shape.iter().product()]).collect();
    let mut wanted = Gradients::new();
    for ((_, gradient, shape), buffer) in shapes.iter().zip(&mut buffers) {
        let tensor = match **shape {
            [a, b] => TensorMut::contiguous(buffer, [a, b]),
            [a, b, c, d] => TensorMut::contiguous(buffer, [a, b, c, d]),
            _ => unreachable!("the list above has no other rank"),
        };
        wanted = wanted.want(*gradient, tensor);
    }
    let dout_view = TensorRef::bshd(&dout, [B, SQ, H, DV]);
    attention.backward(Engine::Reference, dout_view, wanted).expect("the library takes it");
    for ((name, _, shape), buffer) in shapes.iter().zip(&buffers) {
        expect(&mut expected, name, Dtype::F32, shape, buffer);
    }

    let lengths_u32: Vec<u8> = lengths0.iter().flat_map(|length| length.to_le_bytes()).collect();
    // The mask's odd number of bytes puts what follows at odd addresses.
    let file = |length_type| {
        File::new()
            .with("bias.1", "BOOL", &[B, 1, SQ, 4], mask1.iter().map(|&attend| attend.into()).collect())
            .with("key_len.0", length_type, &[B], lengths_u32.clone())
            .f32("gate.2", &[B, H], &gate)
            .f32("region.2", &[1, SQ], &region)
            .f16("dout", &[B, SQ, H, DV], &dout)
            .f16("q", &[B, SQ, H, D], &q)
            .f16("k.2", &[B, 6, H, D], &k2)
            .f16("v.2", &[B, 6, H, DV], &v2)
            .f16("k.0", &[B, 7, H, D], &k0)
            .f16("v.0", &[B, 7, H, DV], &v0)
            .f16("bias.0", &[1, H, 1, 7], &bias0)
            .f16("k.1", &[1, 4, 2, D], &k1)
            .f16("v.1", &[1, 4, 2, DV], &v1)
            .setting("softmax_scale", "0.7")
            .setting("softcap", "9.5")
            .setting("join.1", "true")
            .setting("causal.0", "bottom-right")
            .setting("causal.1", "top-left")
            .setting("window.2", "2,-1")
            .setting("format", "np")
    };
    outputs_are(&file("U32"), "reference", &expected);
    outputs_are(&file("I32"), "reference", &expected);
}

/// Each engine, each float type, each rank of gate; nothing optional but that.
#[test]
fn engines_types_and_gates() {
    fn check<T: fused_attention::Float>(engine: Engine, dtype: Dtype, convert: impl Fn(f32) -> T, gate_rank: usize) {
        let convert = |len, seed| numbers(len, seed).into_iter().map(&convert).collect::<Vec<T>>();
        let (q, k, v) = (convert(B * SQ * H * D, 1), convert(B * 9 * H * D, 2), convert(B * 9 * H * D, 3));
        let (k1, v1) = (convert(B * 4 * H * D, 4), convert(B * 4 * H * D, 5));
        let gate = numbers(B * H, 6);
        let region = numbers(B * SQ, 7);
        let gate_view = match gate_rank {
            0 => TensorRef::contiguous(&gate[..1], []),
            1 => TensorRef::contiguous(&gate[..B], [B]),
            _ => TensorRef::contiguous(&gate, [B, H]),
        };
        let attention = Attention::new(TensorRef::bshd(&q, [B, SQ, H, D]))
            .branch(Branch::new(TensorRef::bshd(&k, [B, 9, H, D]), TensorRef::bshd(&v, [B, 9, H, D])))
            .branch(
                Branch::new(TensorRef::bshd(&k1, [B, 4, H, D]), TensorRef::bshd(&v1, [B, 4, H, D]))
                    .gate_tensor(gate_view)
                    .region(TensorRef::contiguous(&region, [B, SQ])),
            );
        let mut out = vec![T::from_f64(0.0); B * SQ * H * D];
        let mut lse = vec![0f32; 2 * B * H * SQ];
        let outputs =
            Outputs::new(TensorMut::bshd(&mut out, [B, SQ, H, D])).lse(TensorMut::contiguous(&mut lse, [2, B, H, SQ]));
        attention.forward(engine, outputs).expect("the library takes it");

        let name = match dtype {
            Dtype::F16 => "F16",
            Dtype::BF16 => "BF16",
            _ => "F32",
        };
        let bytes = |data: &[T]| bytemuck::cast_slice(data).to_vec();
        let gate_shape = &[B, H][..gate_rank];
        let file = File::new()
            .with("q", name, &[B, SQ, H, D], bytes(&q))
            .with("k.0", name, &[B, 9, H, D], bytes(&k))
            .with("v.0", name, &[B, 9, H, D], bytes(&v))
            .with("k.1", name, &[B, 4, H, D], bytes(&k1))
            .with("v.1", name, &[B, 4, H, D], bytes(&v1))
            .f32("gate.1", gate_shape, &gate[..gate_shape.iter().product()])
            .f32("region.1", &[B, SQ], &region);
        let mut expected = Expected::new();
        expect(&mut expected, "out", dtype, &[B, SQ, H, D], &out);
        expect(&mut expected, "lse.0", Dtype::F32, &[B, H, SQ], &lse[..B * H * SQ]);
        expect(&mut expected, "lse.1", Dtype::F32, &[B, H, SQ], &lse[B * H * SQ..]);
        outputs_are(&file, engine.name(), &expected);
    }
    for engine in [Engine::Reference, Engine::Cpu] {
        for gate_rank in 0..3 {
            check(engine, Dtype::F32, |x| x, gate_rank);
            check(engine, Dtype::F16, f16::from_f32, gate_rank);
            check(engine, Dtype::BF16, bf16::from_f32, gate_rank);
        }
    }
}

/// The gradient of a gate of every rank has the gate's shape.
#[test]
fn gradients_of_gates() {
    for (shape, len) in [(&[][..], 1), (&[B][..], B), (&[B, H][..], B * H)] {
        let folder = Folder::new();
        let file =
            plain().f32("gate.0", shape, &numbers(len, 9)).f16("dout", &[B, SQ, H, D], &halves(B * SQ * H * D, 8));
        let (from, to) = (folder.write(&file.bytes()), folder.path("out.safetensors"));
        let said = call(&["run", text(&from), text(&to), "--engine", "reference"]);
        assert_eq!(said.status, 0, "{}", said.stderr);
        let bytes = std::fs::read(to).expect("the output is there");
        let written = SafeTensors::deserialize(&bytes).expect("the output is a safetensors file");
        assert_eq!(written.tensor("dgate.0").expect("it is written").shape(), shape);
    }
}

/// One branch of one segment, f16.
fn plain() -> File {
    File::new()
        .f16("q", &[B, SQ, H, D], &halves(B * SQ * H * D, 1))
        .f16("k.0", &[B, 9, H, D], &halves(B * 9 * H * D, 2))
        .f16("v.0", &[B, 9, H, D], &halves(B * 9 * H * D, 3))
}

fn with_dout() -> File {
    plain().f16("dout", &[B, SQ, H, D], &halves(B * SQ * H * D, 4))
}

#[test]
fn empty_sequences() {
    // No key: out is 0, lse -inf. No query: nothing to write but empty tensors.
    let none: [f16; 0] = [];
    let no_keys = File::new().f16("q", &[1, 2, 1, 3], &halves(6, 1)).f16("k.0", &[1, 0, 1, 3], &none).f16(
        "v.0",
        &[1, 0, 1, 3],
        &none,
    );
    let no_queries = File::new()
        .f16("q", &[1, 0, 1, 3], &none)
        .f16("dout", &[1, 0, 1, 3], &none)
        .f16("k.0", &[1, 2, 1, 3], &halves(6, 1))
        .f16("v.0", &[1, 2, 1, 3], &halves(6, 2));
    for (file, engine, out_len, lse) in [
        (&no_keys, "reference", 12, vec![f32::NEG_INFINITY; 2]),
        (&no_keys, "cpu", 12, vec![f32::NEG_INFINITY; 2]),
        (&no_queries, "reference", 0, vec![]),
        (&no_queries, "cpu", 0, vec![]),
    ] {
        let folder = Folder::new();
        let (from, to) = (folder.write(&file.bytes()), folder.path("out.safetensors"));
        let said = call(&["run", text(&from), text(&to), "--engine", engine]);
        assert_eq!(said.status, 0, "{}", said.stderr);
        let bytes = std::fs::read(to).expect("the output is there");
        let written = SafeTensors::deserialize(&bytes).expect("the output is a safetensors file");
        assert_eq!(written.tensor("out").expect("it is written").data(), vec![0; out_len]);
        let expected: Vec<u8> = lse.iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!(written.tensor("lse.0").expect("it is written").data(), expected);
    }
}

/// An engine that does not take the request: status 3, its reasons, and what stood at OUT stands there still.
#[test]
fn refusals_leave_everything_as_it_was() {
    let folder = Folder::new();
    let to = folder.path("out.safetensors");
    std::fs::write(&to, "what was there").expect("the folder takes a file");
    let mut cases = Vec::new();
    for engine in [Engine::Emulated, Engine::Cuda] {
        // On a machine that has it, it may well run.
        if let Err(reason) = device(engine) {
            cases.push((engine.name(), plain(), reason.to_string()));
            cases.push((engine.name(), with_dout(), reason.to_string()));
        }
    }
    for (engine, file, reason) in cases {
        let from = folder.write(&file.bytes());
        let said = call(&["run", text(&from), text(&to), "--engine", engine]);
        assert_eq!((said.status, said.stdout.as_str()), (3, ""), "{}", said.stderr);
        assert!(said.stderr.contains(&reason), "{reason} is not in: {}", said.stderr);
        assert_eq!(std::fs::read(&to).expect("it is there"), b"what was there");
        assert_eq!(folder.names(), ["in.safetensors", "out.safetensors"]);

        let said = call(&["plan", text(&from), "--engine", engine]);
        assert_eq!((said.status, said.stdout.as_str()), (3, ""), "{}", said.stderr);
        assert!(said.stderr.contains(&reason), "{reason} is not in: {}", said.stderr);
    }
    // Bad input goes first: a length past the keys is the file's fault, whatever the engine.
    let too_long = plain().with("key_len.0", "U32", &[B], [9u32, 10].iter().flat_map(|n| n.to_le_bytes()).collect());
    let from = folder.write(&too_long.bytes());
    let said = call(&["run", text(&from), text(&to), "--engine", "cuda"]);
    assert_eq!(said.status, 2, "{}", said.stderr);
}

/// The kernels under emulation, whichever GPU is asked for: the library's bits, and every reason where there is no kernel.
#[cfg(feature = "emulated")]
#[test]
fn emulated_kernels() {
    const D: usize = 8;
    let (q, k, v) = (halves(B * SQ * H * D, 1), halves(B * 9 * H * D, 2), halves(B * 9 * H * D, 3));
    let branch = Branch::new(TensorRef::bshd(&k, [B, 9, H, D]), TensorRef::bshd(&v, [B, 9, H, D]));
    let (mut out, mut lse) = (vec![f16::ZERO; B * SQ * H * D], vec![0f32; B * H * SQ]);
    let outputs =
        Outputs::new(TensorMut::bshd(&mut out, [B, SQ, H, D])).lse(TensorMut::contiguous(&mut lse, [1, B, H, SQ]));
    let attention = Attention::new(TensorRef::bshd(&q, [B, SQ, H, D])).branch(branch);
    let plan = attention.forward(Engine::Emulated, outputs).expect("the library takes it");

    let mut expected = Expected::new();
    expect(&mut expected, "out", Dtype::F16, &[B, SQ, H, D], &out);
    expect(&mut expected, "lse.0", Dtype::F32, &[B, H, SQ], &lse);
    let file = File::new().f16("q", &[B, SQ, H, D], &q).f16("k.0", &[B, 9, H, D], &k).f16("v.0", &[B, 9, H, D], &v);
    outputs_are(&file, "emulated", &expected);

    let folder = Folder::new();
    let (from, to) = (folder.write(&file.bytes()), folder.path("out.safetensors"));
    let (from, to) = (text(&from), text(&to));
    for arch in ["sm_80", "sm_90a"] {
        let said = call(&["run", from, to, "--engine", "emulated", "--arch", arch, "--json"]);
        assert_eq!((said.status, said.stderr.as_str()), (0, ""));
        let object: serde_json::Value = serde_json::from_str(&said.stdout).expect("it is JSON");
        let kernel = object["kernel"].as_str().expect("a kernel is named").to_string();
        assert!(fused_attention::INSTANCES.iter().any(|row| row.symbol() == kernel), "{kernel}");
        assert!(arch != "sm_80" || kernel == plan.symbol(), "{kernel}");
        std::fs::remove_file(to).expect("it was written");
        for engine in [&[][..], &["--engine", "emulated"]] {
            let said = call(&[&["plan", from, "--arch", arch], engine].concat());
            assert_eq!((said.status, said.stderr.as_str()), (0, ""));
            assert!(said.stdout.contains(&kernel), "{kernel} is not in: {}", said.stdout);
        }
    }

    // With dout the gradients come too, from kernels of their own.
    let from = folder.write(&file.f16("dout", &[B, SQ, H, D], &q).bytes());
    let said = call(&["run", text(&from), to, "--engine", "emulated", "--json"]);
    assert_eq!((said.status, said.stderr.as_str()), (0, ""));
    let object: serde_json::Value = serde_json::from_str(&said.stdout).expect("it is JSON");
    assert_eq!(object["backward_kernel"], "backward_short_sm80_f16_w40");
    std::fs::remove_file(to).expect("it was written");

    let floats = numbers(B * SQ * H * 3, 1);
    let narrow = File::new().f32("q", &[B, SQ, H, 3], &floats).f32("k.0", &[B, SQ, H, 3], &floats).f32(
        "v.0",
        &[B, SQ, H, 3],
        &floats,
    );
    // What there is no kernel for, forward and backward, is told in a line each.
    let widths = ["f32", "head_dim is 3", "value_dim is 3"];
    for (file, lines) in [(narrow.clone(), 1), (narrow.f32("dout", &[B, SQ, H, 3], &floats), 2)] {
        let from = folder.write(&file.bytes());
        let said = call(&["run", text(&from), to, "--engine", "emulated"]);
        assert_eq!((said.status, said.stdout.as_str(), said.stderr.lines().count()), (3, "", lines), "{}", said.stderr);
        for (line, direction) in said.stderr.lines().zip(["forward", "backward"]) {
            assert!(line.starts_with(&format!("{direction}: the emulated engine cannot run this")), "{line}");
            for word in widths {
                assert!(line.contains(word), "{word} is not in: {line}");
            }
        }
        assert_eq!(folder.names(), ["in.safetensors"]);
    }
}

#[test]
fn output_is_replaced_whole() {
    let folder = Folder::new();
    let (from, to) = (folder.write(&plain().bytes()), folder.path("out.safetensors"));
    std::fs::write(&to, vec![0; 1 << 20]).expect("the folder takes a file");
    let said = call(&["run", text(&from), text(&to), "--engine", "cpu"]);
    assert_eq!(said.status, 0, "{}", said.stderr);
    let bytes = std::fs::read(&to).expect("the output is there");
    assert!(SafeTensors::deserialize(&bytes).is_ok());
    // In place of its own input, too.
    let said = call(&["run", text(&from), text(&from), "--engine", "cpu"]);
    assert_eq!(said.status, 0, "{}", said.stderr);
    assert_eq!(std::fs::read(&from).expect("the output is there"), bytes);
}

#[test]
fn json_tells_engine_kernel_and_times() {
    let folder = Folder::new();
    let to = folder.path("out.safetensors");
    let forward = ["engine", "forward_ms", "kernel", "time_ms"];
    let both = ["backward_kernel", "backward_ms", "engine", "forward_ms", "kernel", "time_ms"];
    for (engine, file, keys, kernel) in [
        ("cpu", plain(), &forward[..], "cpu_forward_streaming"),
        ("cpu", with_dout(), &both[..], "cpu_forward_streaming"),
        ("reference", plain(), &forward[..], "reference_forward"),
        ("reference", with_dout(), &both[..], "reference_forward"),
    ] {
        let from = folder.write(&file.bytes());
        let said = call(&["run", text(&from), text(&to), "--engine", engine, "--json"]);
        assert_eq!((said.status, said.stdout.lines().count()), (0, 1));
        let object: serde_json::Value = serde_json::from_str(&said.stdout).expect("it is JSON");
        let object = object.as_object().expect("it is an object");
        assert_eq!(object.keys().collect::<Vec<_>>(), keys);
        assert_eq!((object["engine"].as_str(), object["kernel"].as_str()), (Some(engine), Some(kernel)));
        assert!(object["forward_ms"].as_f64().is_some_and(|ms| ms > 0.0));
    }
}

#[test]
fn usage_errors() {
    let folder = Folder::new();
    let (from, to) = (folder.write(&plain().bytes()), folder.path("out.safetensors"));
    let (from, to) = (text(&from), text(&to));
    for (arguments, word) in [
        (&["run", from, to][..], "--engine"),
        (&["run", from, "--engine", "cpu"], "<OUT>"),
        (&["run", from, to, "--engine", "gpu"], "gpu"),
        (&["run", from, to, "--engine", "cpu", "--arch", "sm_80"], "--arch sm_80 is for --engine emulated"),
        (&["run", from, to, "--engine", "cuda", "--arch", "sm_90a"], "--arch sm_90a is for --engine emulated"),
        (&["run", from, to, "--engine", "emulated", "--arch", "sm_70"], "sm_70"),
        (&["run", from, to, "--engine", "cpu", "--fast"], "--fast"),
        (&["plan", from, "--engine", "cpu", "--arch", "sm_80"], "--arch sm_80 is for --engine emulated"),
        (&["plan"], "<IN>"),
        (&["bench", "--engine", "cpu", "--suite", "tiny", "--arch", "sm_80"], "--arch sm_80 is for --engine emulated"),
        (&["bench", "--engine", "cpu", "--suite", "sd2"], "sd15"),
        (&["bench", "--engine", "cpu", "--suite", "tiny", "--seconds", "-1"], "-1"),
        (&["bench", "--engine", "cpu", "--suite", "tiny", "--seconds", "nan"], "nan"),
        (&["bench", "--engine", "cpu", "--suite", "tiny", "--dtype", "f64"], "f64"),
    ] {
        let said = call(arguments);
        assert_eq!((said.status, said.stderr.lines().count()), (2, 1), "{}", said.stderr);
        assert!(said.stderr.contains(word), "{word} is not in: {}", said.stderr);
        assert_eq!(folder.names(), ["in.safetensors"]);
    }
    assert_eq!(call(&["--help"]).status, 0);
    assert_eq!(call(&["--version"]).stdout, concat!("fused-attention ", env!("CARGO_PKG_VERSION"), "\n"));
}

#[test]
fn plan_reads_the_header_alone() {
    let folder = Folder::new();
    let bytes = with_dout().bytes();
    // The data is not there.
    let from = folder.write(&bytes[..bytes.len() - with_dout().data().len()]);
    let said = call(&["plan", text(&from)]);
    assert_eq!((said.status, said.stderr.as_str()), (0, ""));
    for word in ["reference_forward", "reference_backward", "cpu_forward_streaming", "cpu_backward_streaming"] {
        assert!(said.stdout.contains(word), "{word} is not in: {}", said.stdout);
    }
    let said = call(&["plan", text(&from), "--engine", "reference"]);
    assert_eq!(said.status, 0);
    assert!(!said.stdout.contains("cpu"), "{}", said.stdout);
}

#[test]
fn info_tells_what_is_there() {
    let said = call(&["info"]);
    assert_eq!(said.status, 0);
    let mut words = vec![env!("CARGO_PKG_VERSION").to_string(), "threads".to_string()];
    words.extend(fused_attention::INSTANCES.iter().map(|row| row.kernel.to_string()));
    // Of device code, every width.
    let device_code = fused_attention::INSTANCES.iter().filter(|row| row.device.is_some());
    words.extend(device_code.map(|row| row.max_head_dim.to_string()));
    for engine in Engine::ALL {
        words.push(engine.name().to_string());
        words.extend(device(engine).err().map(|reason| reason.to_string()));
    }
    for word in words {
        assert!(said.stdout.contains(&word), "{word} is not in: {}", said.stdout);
    }
    let kernels = fused_attention::INSTANCES.iter().map(|row| row.kernel).collect::<std::collections::BTreeSet<_>>();
    for kernel in kernels {
        assert_eq!(said.stdout.matches(&format!("  {kernel} ")).count(), 1, "one line for {kernel}: {}", said.stdout);
    }
    let compiled = fused_attention::cuda::toolkit().map_or(&[][..], |toolkit| toolkit.targets);
    assert!(compiled.iter().all(|target| said.stdout.contains(&target.to_string())), "{}", said.stdout);
    assert!(said.stdout.contains(&format!("auto       {}", Engine::auto().engine.name())), "{}", said.stdout);
    if cfg!(target_os = "linux") {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("linux has it");
        let status =
            std::process::Command::new(env!("CARGO_BIN_EXE_fused-attention")).arg("info").stdout(full).status();
        assert_eq!(status.expect("the binary starts").code(), Some(2));
    }
    assert_eq!(call(&["info", "--table"]).stdout, fused_attention::support_table());
}
