//! Every fault of a file: status 2, one line that names what is wrong, nothing written, never a panic.

mod common;

use common::{File, Folder, call, join, numbers, text};
use half::f16;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

fn halves(len: usize, seed: u64) -> Vec<f16> {
    numbers(len, seed).into_iter().map(f16::from_f32).collect()
}

/// Two segments, every optional tensor, the backward too.
fn good() -> File {
    File::new()
        .f16("q", &[1, 3, 2, 4], &halves(24, 1))
        .f16("k.0", &[1, 5, 2, 4], &halves(40, 2))
        .f16("v.0", &[1, 5, 2, 4], &halves(40, 3))
        .f32("bias.0", &[1, 1, 3, 5], &numbers(15, 4))
        .with("key_len.0", "I32", &[1], 4i32.to_le_bytes().to_vec())
        .f16("k.1", &[1, 2, 1, 4], &halves(8, 5))
        .f16("v.1", &[1, 2, 1, 4], &halves(8, 6))
        .f32("gate.1", &[], &[0.5])
        .f32("region.1", &[1, 3], &numbers(3, 7))
        .f16("dout", &[1, 3, 2, 4], &halves(24, 8))
        .with("bias.1", "BOOL", &[1, 1, 1, 2], vec![1, 0])
        .setting("format", "pt")
        .setting("softcap", "20")
        .setting("causal.0", "bottom-right")
}

/// The binary refuses the bytes; the line holds every one of `words`.
#[track_caller]
fn refuses(bytes: &[u8], words: &[&str]) {
    let folder = Folder::new();
    let (input, output) = (folder.write(bytes), folder.path("out.safetensors"));
    let said = call(&["run", text(&input), text(&output), "--engine", "reference"]);
    let line = &said.stderr;
    assert_eq!(said.status, 2, "{line}");
    assert_eq!(line.lines().count(), 1, "{line}");
    assert!(line.ends_with('\n') && said.stdout.is_empty(), "{line}{}", said.stdout);
    for word in words {
        assert!(line.contains(word), "{word} is not in: {line}");
    }
    assert_eq!(folder.names(), ["in.safetensors"]);
}

#[test]
fn the_good_file_runs() {
    let folder = Folder::new();
    let (input, output) = (folder.write(&good().bytes()), folder.path("out.safetensors"));
    let said = call(&["run", text(&input), text(&output), "--engine", "reference"]);
    assert_eq!((said.status, said.stderr.as_str()), (0, ""));
    assert_eq!(folder.names(), ["in.safetensors", "out.safetensors"]);
}

#[test]
fn truncated_at_every_byte() {
    let bytes = good().bytes();
    let data_start = bytes.len() - good().data().len();
    for len in 0..bytes.len() {
        // Beyond the header, the line names the first tensor that is cut.
        let file = good();
        let mut end = data_start;
        let cut = file.tensors.iter().find(|entry| {
            end += entry.bytes.len();
            len >= data_start && end > len
        });
        match cut {
            Some(cut) => refuses(&bytes[..len], &[&format!("\"{}\"", cut.name), "truncated"]),
            None => refuses(&bytes[..len], &["bytes"]),
        }
    }
}

#[test]
fn the_bytes_around_the_tensors() {
    refuses(b"", &["0 bytes"]);
    let mut trailing = good().bytes();
    trailing.extend([0; 3]);
    refuses(&trailing, &["3 bytes after \"bias.1\""]);
    refuses(&join(b"{}", &[]), &["q is missing", "k.0 and v.0 are missing"]);
    for header in ["", "q", "[]", "[1,2]", "null", "\"q\"", "{\"q\":}", "{\"q\":1", "\u{feff}{}"] {
        refuses(&join(header.as_bytes(), &[]), &["header"]);
    }
    refuses(&join(b"{\"q\xff\":{}}", &[]), &["header"]);
    refuses(&join("[".repeat(10_000).as_bytes(), &[]), &["header"]);
    // A header length past the file's end, and one past any file's.
    for length in [10_000u64, 1 << 40, u64::MAX - 7, u64::MAX] {
        let mut bytes = good().bytes();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        refuses(&bytes, &[&length.to_string()]);
    }
    refuses(&join(&vec![b' '; 2 << 20], &[]), &["2097152"]);
}

/// A file whose only fault is one tensor's entry in the header.
fn entry(json: &str) -> Vec<u8> {
    join(good().header().replacen('{', &format!("{{\"k.2\":{json},"), 1).as_bytes(), &good().data())
}

#[test]
fn entries_of_the_header() {
    let name = "\"k.2\"";
    for (json, words) in [
        ("7", "is a number"),
        ("null", "is null"),
        ("{}", "has no dtype"),
        (r#"{"dtype":"F16"}"#, "has no shape"),
        (r#"{"dtype":"F16","shape":[1]}"#, "has no data_offsets"),
        (r#"{"dtype":"F17","shape":[0],"data_offsets":[0,0]}"#, "F17"),
        (r#"{"dtype":16,"shape":[0],"data_offsets":[0,0]}"#, "16"),
        (r#"{"dtype":"F16","shape":[-1],"data_offsets":[0,0]}"#, "-1"),
        (r#"{"dtype":"F16","shape":[1.5],"data_offsets":[0,0]}"#, "1.5"),
        (r#"{"dtype":"F16","shape":[1e400],"data_offsets":[0,0]}"#, "header"),
        (r#"{"dtype":"F16","shape":[99999999999999999999],"data_offsets":[0,0]}"#, "1e+20"),
        (r#"{"dtype":"F16","shape":"[1]","data_offsets":[0,0]}"#, "a string"),
        (r#"{"dtype":"F16","shape":[1],"data_offsets":[0]}"#, "1 data_offsets"),
        (r#"{"dtype":"F16","shape":[1],"data_offsets":[4,2]}"#, "end before the start"),
        (r#"{"dtype":"F16","shape":[1],"data_offsets":[0,4]}"#, "hold 4"),
        (r#"{"dtype":"F16","shape":[0],"data_offsets":[3,3]}"#, "overlap"),
        (r#"{"dtype":"F16","shape":[1],"data_offsets":[0,2]}"#, "overlap"),
        (r#"{"dtype":"F16","shape":[1],"data_offsets":[9000,9002]}"#, "leave a gap"),
        (r#"{"dtype":"F4","shape":[3],"data_offsets":[0,1]}"#, "whole byte"),
        (r#"{"dtype":"F16","shape":[1],"data_offsets":[0,2],"x":1}"#, "\"x\""),
        (r#"{"dtype":"F16","shape":[0],"data_offsets":[18446744073709551615,18446744073709551615]}"#, "gap"),
        (r#"{"dtype":"BOOL","shape":[1152921504606846976],"data_offsets":[0,2]}"#, "takes 1152921504606846976"),
        (r#"{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,2]}"#, "more elements"),
        (r#"{"dtype":"F16","shape":[1152921504606846976,1152921504606846976],"data_offsets":[0,2]}"#, "more elements"),
    ] {
        let name = if words == "header" { "" } else { name };
        refuses(&entry(json), &[name, words]);
    }
    let doubled = good().header().replacen('{', r#"{"k.0":{"dtype":"F16","shape":[0],"data_offsets":[0,0]},"#, 1);
    refuses(&join(doubled.as_bytes(), &good().data()), &["\"k.0\"", "twice"]);
    for (json, words) in [("7", "a number"), (r#"{"softcap":2}"#, "\"softcap\"")] {
        let header = format!("{{\"__metadata__\":{json}}}");
        refuses(&join(header.as_bytes(), &[]), &["metadata", words]);
    }
    // Data that ends where no address reaches: eight tensors, each of a size that is possible.
    let size = (1u64 << 61) - 4;
    let entries: Vec<String> = (0..8u64)
        .map(|i| {
            let (start, end) = (i * size, (i + 1) * size);
            format!("\"k.{i}\":{{\"dtype\":\"F32\",\"shape\":[{}],\"data_offsets\":[{start},{end}]}}", size / 4)
        })
        .collect();
    refuses(&join(format!("{{{}}}", entries.join(",")).as_bytes(), &[]), &["k.0"]);
}

#[test]
fn tensors_that_are_missing_or_too_many() {
    for name in ["q", "k.0", "v.0", "k.1", "v.1"] {
        refuses(&good().without(name).bytes(), &[&format!("{name} is missing")]);
    }
    refuses(&good().without("k.0").without("v.0").bytes(), &["k.0 and v.0 are missing", "bias.0"]);
    refuses(&good().without("k.1").without("v.1").bytes(), &["bias.1", "gate.1", "region.1"]);
    let bytes = vec![0; 4];
    for name in ["extra", "out", "lse.0", "dq", "k", "k.", "k.01", "k.+2", "K.0", "q.0", "k.0.0", "softcap", "", "k.-1"]
    {
        refuses(&good().with(name, "F32", &[1], bytes.clone()).bytes(), &[&format!("{name:?}")]);
    }
    for i in ["7", "18446744073709551615"] {
        for kind in ["k", "v", "bias", "key_len", "gate", "region"] {
            let name = format!("{kind}.{i}");
            refuses(&good().with(&name, "F32", &[1], bytes.clone()).bytes(), &[&name]);
        }
    }
    refuses(&good().with("two\nlines\u{7}", "F32", &[1], bytes.clone()).bytes(), &[r#""two\nlines\u{7}""#]);
    refuses(&good().with(&"x".repeat(100_000), "F32", &[1], bytes.clone()).bytes(), &["xxx"]);
    // On a segment that joins: the name to use is told.
    let joined = good().setting("join.1", "true");
    refuses(&joined.bytes(), &["gate.1", "gate.0", "region.1", "region.0"]);
}

#[test]
fn types_and_shapes() {
    for (name, dtype, size, shape, words) in [
        ("q", "F64", 8, &[1, 3, 2, 4][..], "F64"),
        ("q", "I64", 8, &[1, 3, 2, 4], "I64"),
        ("q", "BOOL", 1, &[1, 3, 2, 4], "BOOL"),
        ("k.1", "F32", 4, &[1, 2, 1, 4], "f32; convert it to f16"),
        ("v.1", "BF16", 2, &[1, 2, 1, 4], "bf16; convert it to f16"),
        ("k.0", "U8", 1, &[1, 5, 2, 4], "U8"),
        ("dout", "F32", 4, &[1, 3, 2, 4], "convert it to f16"),
        ("bias.0", "I32", 4, &[1, 1, 3, 5], "I32"),
        ("bias.0", "U8", 1, &[1, 1, 3, 5], "U8"),
        ("key_len.0", "I64", 8, &[1], "I64"),
        ("key_len.0", "F32", 4, &[1], "F32"),
        ("gate.1", "F16", 2, &[], "F16"),
        ("region.1", "BF16", 2, &[1, 3], "BF16"),
        ("q", "F16", 2, &[3, 2, 4], "3 dimensions"),
        ("q", "F16", 2, &[], "0 dimensions"),
        ("q", "F16", 2, &[1, 1, 3, 2, 4], "5 dimensions"),
        ("k.1", "F16", 2, &[2, 4], "2 dimensions"),
        ("v.1", "F16", 2, &[1, 1, 1, 1, 2, 1, 1, 1, 4], "9 dimensions"),
        ("bias.0", "F32", 4, &[3, 5], "2 dimensions"),
        ("key_len.0", "I32", 4, &[], "0 dimensions"),
        ("gate.1", "F32", 4, &[1, 1, 1], "3 dimensions"),
        ("region.1", "F32", 4, &[3], "1 dimensions"),
        ("region.1", "F32", 4, &[1, 2, 3], "3 dimensions"),
        ("dout", "F16", 2, &[24], "1 dimensions"),
        ("q", "F16", 2, &[1, 3, 2, 0], "head_dim 0"),
        ("k.1", "F16", 2, &[1, 2, 1, 5], "head_dim 5"),
        ("v.1", "F16", 2, &[1, 2, 1, 3], "value_dim 3"),
        ("v.1", "F16", 2, &[1, 3, 1, 4], "seq_kv 3"),
        ("k.1", "F16", 2, &[2, 2, 1, 4], "batch 2"),
        ("v.1", "F16", 2, &[1, 2, 2, 4], "kv_heads 2"),
        ("bias.0", "F32", 4, &[1, 1, 2, 5], "seq_q 2"),
        ("bias.1", "BOOL", 1, &[1, 1, 1, 3], "seq_kv 3"),
        ("key_len.0", "I32", 4, &[2], "batch 2"),
        ("gate.1", "F32", 4, &[2], "batch 2"),
        ("gate.1", "F32", 4, &[1, 3], "heads 3"),
        ("region.1", "F32", 4, &[1, 4], "seq_q 4"),
        ("dout", "F16", 2, &[1, 3, 2, 5], "value_dim 5"),
    ] {
        let changed = good().retyped(name, dtype, size, shape);
        let bare = name.trim_start_matches(char::is_alphabetic).is_empty();
        refuses(&changed.bytes(), &[if bare { &name[..1] } else { name }, words]);
    }
    // 3 heads of keys for 2 of queries.
    let groups = good().retyped("k.1", "F16", 2, &[1, 2, 3, 4]).retyped("v.1", "F16", 2, &[1, 2, 3, 4]);
    refuses(&groups.bytes(), &["k.1 has 3 heads"]);
}

#[test]
fn empty_tensors_of_huge_extents() {
    let huge = 1 << 60;
    refuses(&good().retyped("k.1", "F16", 2, &[0, huge, 1, 4]).bytes(), &["k.1", "1152921504606846976"]);
    refuses(&good().retyped("q", "F16", 2, &[huge, 3, 0, 4]).bytes(), &["q", "1152921504606846976"]);
    let most = i32::MAX as usize;
    refuses(&good().retyped("q", "F16", 2, &[most, 0, most, 4]).bytes(), &["q", "2147483647"]);
    // No key, but values so wide that out would take gigabytes.
    let wide = File::new().f16("q", &[1, 64, 2, 4], &halves(512, 1)).f16("k.0", &[1, 0, 2, 4], &[]).f16(
        "v.0",
        &[1, 0, 2, 1 << 20],
        &[],
    );
    refuses(&wide.bytes(), &["v.0", "out [1, 64, 2, 1048576]"]);
}

#[test]
fn values() {
    let lengths =
        |dtype, bytes: [u8; 4]| good().without("key_len.0").with("key_len.0", dtype, &[1], bytes.to_vec()).bytes();
    refuses(&lengths("I32", (-1i32).to_le_bytes()), &["key_len.0 is -1 for batch entry 0"]);
    refuses(&lengths("I32", i32::MIN.to_le_bytes()), &["key_len.0 is -2147483648"]);
    refuses(&lengths("I32", 6i32.to_le_bytes()), &["key_len.0 is 6", "5 keys"]);
    refuses(&lengths("U32", u32::MAX.to_le_bytes()), &["key_len.0 is 4294967295"]);
    for byte in [2, 255] {
        let mask = good().without("bias.1").with("bias.1", "BOOL", &[1, 1, 1, 2], vec![1, byte]);
        refuses(&mask.bytes(), &[&format!("bias.1 holds {byte} at element 1")]);
    }
}

#[test]
fn settings() {
    let plain = File { metadata: Vec::new(), ..good() };
    for (name, value, words) in [
        ("softmax_scale", "NaN", "NaN"),
        ("softmax_scale", "inf", "inf"),
        ("softmax_scale", "1e39", "inf"),
        ("softmax_scale", "", "\"\""),
        ("softmax_scale", "0.1 ", "0.1 "),
        ("softmax_scale", "1/8", "1/8"),
        ("softcap", "-inf", "-inf"),
        ("softcap", "nan", "NaN"),
        ("softcap", "0", "positive"),
        ("softcap", "-3", "positive"),
        ("softcap", "thirty", "thirty"),
        ("causal.0", "true", "top-left"),
        ("causal.0", "none", "top-left"),
        ("causal.2", "top-left", "k.2 and v.2 are missing"),
        ("causal.18446744073709551615", "top-left", "missing"),
        ("causal", "top-left", "no setting"),
        ("causal.00", "top-left", "no setting"),
        ("window.0", "3", "left,right"),
        ("window.0", "3,4,5", "left,right"),
        ("window.0", "3, 4", "left,right"),
        ("window.1", "-2,1", "left,right"),
        ("window.1", "1,4294967296", "left,right"),
        ("window.2", "1,1", "missing"),
        ("join.0", "true", "first"),
        ("join.1", "false", "`true`"),
        ("join.1", "True", "`true`"),
        ("join.9", "true", "missing"),
        ("softmax_scale.0", "1", "no setting"),
        ("gate.0", "1", "no setting"),
        ("scale", "1", "no setting"),
        ("two\nlines", "1", r"two\nlines"),
    ] {
        let name_shown = name.replace('\n', "\\n");
        refuses(&plain.clone().setting(name, value).bytes(), &[&name_shown, words]);
    }
}

#[test]
fn paths() {
    let folder = Folder::new();
    let (input, output) = (folder.write(&good().bytes()), folder.path("out.safetensors"));
    let (input, output) = (text(&input), text(&output));
    let nowhere = folder.path("no-such-folder").join("out.safetensors");
    let folder_itself = folder.path("");
    for (input, output, word) in [
        (text(&nowhere), output, "no-such-folder"),
        (text(&folder_itself), output, "regular file"),
        ("/dev/zero", output, "regular file"),
        (input, text(&nowhere), "no-such-folder"),
        (input, text(&folder_itself), "cannot be written"),
        (input, "", "<OUT>"),
        (input, "/", "cannot be written"),
    ] {
        let said = call(&["run", input, output, "--engine", "reference"]);
        assert_eq!(said.status, 2, "{}", said.stderr);
        assert_eq!(said.stderr.lines().count(), 1, "{}", said.stderr);
        assert!(said.stderr.contains(word), "{}", said.stderr);
        assert_eq!(folder.names(), ["in.safetensors"]);
    }
}

#[test]
fn plan_refuses_the_same_headers() {
    let folder = Folder::new();
    for bytes in [b"".to_vec(), entry("7"), good().without("q").bytes(), good().setting("softmax_scale", "nan").bytes()]
    {
        let input = folder.write(&bytes);
        let said = call(&["plan", text(&input)]);
        assert_eq!((said.status, said.stderr.lines().count()), (2, 1), "{}", said.stderr);
    }
}

/// Something that is no file would be gone once a file took its name. (Not tried on a device: root would lose it.)
#[cfg(unix)]
#[test]
fn output_takes_no_sockets_place() {
    let (folder, sockets) = (Folder::new(), Folder::new());
    let (input, socket) = (folder.write(&good().bytes()), sockets.path("socket"));
    let _listening = std::os::unix::net::UnixListener::bind(&socket).expect("the folder takes a socket");
    let said = call(&["run", text(&input), text(&socket), "--engine", "reference"]);
    assert_eq!((said.status, said.stderr.lines().count()), (2, 1), "{}", said.stderr);
    assert!(said.stderr.contains("regular file"), "{}", said.stderr);
    assert!(std::fs::metadata(&socket).is_ok_and(|socket| !socket.is_file()));
}

/// Thousands of damaged files: each runs or is refused in one line.
#[test]
fn random_damage_never_panics() {
    let folder = Folder::new();
    let output = folder.path("out.safetensors");
    let good = good().bytes();
    let header_end = good.len() - self::good().data().len();
    let mut random = StdRng::seed_from_u64(7);
    let (mut ran, mut refused) = (0, 0);
    for round in 0..6000 {
        let mut bytes = good.clone();
        for _ in 0..random.random_range(1..4) {
            // Two of three in the header, where they matter most, and there often a digit or a sign for another.
            let end = if round % 3 == 0 { bytes.len() } else { header_end };
            let at = random.random_range(0..end);
            bytes[at] = match random.random_range(0..4) {
                0 => random.random(),
                1 => b"0123456789"[random.random_range(0..10)],
                2 => b"\"{}[]:,.-qkv"[random.random_range(0..12)],
                _ => bytes[at] ^ 1 << random.random_range(0..8),
            };
        }
        let input = folder.write(&bytes);
        let mut said = Vec::new();
        let arguments = ["fused-attention", "run", text(&input), text(&output), "--engine", "reference"];
        let status = fused_attention_cli::main(arguments, &mut Vec::new(), &mut said);
        let said = String::from_utf8(said).expect("it prints UTF-8");
        match status {
            0 => ran += 1,
            2 => refused += 1,
            other => panic!("status {other} in round {round}: {said}"),
        }
        assert_eq!(said.lines().count(), usize::from(status != 0), "round {round}: {said}");
        assert_eq!(output.exists(), status == 0, "round {round}: {said}");
        if status == 0 {
            std::fs::remove_file(&output).expect("the output is there");
        }
    }
    assert!(ran > 100 && refused > 1000, "{ran} ran, {refused} were refused: the damage misses the point");
}
