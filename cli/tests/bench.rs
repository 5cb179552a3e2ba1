//! The bench: the rows it writes, the chart it draws, what it refuses.

mod common;

use common::{Folder, call, call_in, stand_in_driver, text};
use serde_json::Value;
use std::path::Path;

const FIELDS: [&str; 22] = [
    "b",
    "branches",
    "bytes",
    "cache",
    "case",
    "d",
    "direction",
    "dtype",
    "engine",
    "failed",
    "flops",
    "gbytes_per_s",
    "gradients",
    "h",
    "kernel",
    "median_us",
    "refused",
    "skv",
    "sq",
    "suite",
    "tflops",
    "usual",
];

fn rows(path: &Path) -> Vec<Value> {
    let rows: Value = serde_json::from_slice(&std::fs::read(path).expect("it is written")).expect("it is JSON");
    rows.as_array().expect("it is an array").clone()
}

#[test]
fn rows_and_chart() {
    let folder = Folder::new();
    let (path, svg) = (folder.path("rows.json"), folder.path("rows.svg"));
    let mut engines = vec![("cpu", None, vec![]), ("reference", Some("bf16"), vec![])];
    if cfg!(feature = "emulated") {
        engines.push(("emulated", None, vec![]));
    }
    let driver = stand_in_driver();
    if driver.is_some() {
        engines.extend([("cuda", None, vec!["cold"]), ("cuda", Some("bf16"), vec!["cold", "warm"])]);
    }
    for (engine, dtype, caches) in engines {
        let mut arguments = vec!["bench", "--engine", engine, "--suite", "tiny", "--seconds", "0"];
        arguments.extend(["--json", text(&path), "--plot", text(&svg)]);
        arguments.extend(dtype.iter().flat_map(|dtype| ["--dtype", *dtype]));
        let both = caches.join(",");
        if caches.len() > 1 {
            arguments.extend(["--cache", &both]);
        }
        let said = match driver {
            Some(folder) if engine == "cuda" => call_in(&arguments, &[("LD_LIBRARY_PATH", folder)]),
            _ => call(&arguments),
        };
        // stderr is no terminal here: no progress bar.
        assert_eq!((said.status, said.stderr.as_str()), (0, ""));

        let rows = rows(&path);
        assert_eq!(rows.len(), 4 * caches.len().max(1));
        assert_eq!(said.stdout.lines().count(), 1 + rows.len(), "{}", said.stdout);
        for (at, row) in rows.iter().enumerate() {
            let row = row.as_object().expect("it is an object");
            assert_eq!(row.keys().collect::<Vec<_>>(), FIELDS);
            for key in ["median_us", "tflops", "gbytes_per_s", "flops", "bytes"] {
                assert!(row[key].as_f64().is_some_and(|value| value > 0.0 && value.is_finite()), "{key}");
            }
            assert_eq!(
                (&row["suite"], &row["engine"], &row["direction"]),
                (&"tiny".into(), &engine.into(), &"forward".into())
            );
            assert_eq!(row["dtype"], dtype.unwrap_or("f16"));
            assert_eq!(row["cache"].as_str(), caches.get(at % caches.len().max(1)).copied());
            assert!(row["refused"].is_null() && row["failed"].is_null());
        }
        let last = rows.last().expect("there are rows");
        assert_eq!(last["skv"], serde_json::json!([7, 4, 16]));
        assert_eq!(last["branches"][1]["region"], true);
        assert_eq!((&last["b"], &last["h"], &last["sq"], &last["d"]), (&2.into(), &2.into(), &32.into(), &16.into()));
        // Two products of every query with every key, 16 wide, multiplied and added.
        let flops = 2.0 * 2.0 * (2 * 2 * 32 * (7 + 4 + 16) * 16) as f64;
        let told = last["tflops"].as_f64().unwrap_or(0.0) * last["median_us"].as_f64().unwrap_or(0.0) * 1e6;
        assert!((told - flops).abs() <= 1e-6 * flops, "{told} instead of {flops}");

        let chart = std::fs::read_to_string(&svg).expect("it is written");
        for word in ["<svg", "ip 4+16 region", "TFLOP/s", engine] {
            assert!(chart.contains(word), "{word} is not in the chart");
        }
        well_formed(&chart);
        assert_eq!(folder.names(), ["rows.json", "rows.svg"]);
    }
}

#[test]
fn training_is_timed_where_there_is_a_backward() {
    let folder = Folder::new();
    let path = folder.path("rows.json");
    for dtype in ["f16", "bf16", "f32"] {
        let said = call(
            &[
                &["bench", "--engine", "reference", "--suite", "tiny-backward", "--seconds", "0"] as &[&str],
                &["--dtype", dtype, "--json", text(&path)],
            ]
            .concat(),
        );
        assert_eq!((said.status, said.stderr.as_str()), (0, ""));
        let rows = rows(&path);
        let told = |key: &str| rows.iter().map(|row| row[key].clone()).collect::<Vec<_>>();
        assert_eq!(told("direction"), ["backward", "backward", "training step"]);
        assert_eq!(rows[0]["gradients"], serde_json::json!(["q", "k.0", "v.0", "k.1", "v.1"]));
        assert_eq!(rows[1]["gradients"], serde_json::json!(["q", "k.1", "v.1"]));
        assert_eq!(rows[2]["gradients"], serde_json::json!(["q", "k.1", "v.1", "gate.1"]));
        assert_eq!(rows[2]["kernel"], "reference_forward reference_backward");
        // Forward and backward of the text: 2 and 3 products, of the image: 2 and 5.
        assert_eq!(rows[2]["flops"], 2.0 * (2 * 2 * 80 * (7 * 5 + 4 * 7) * 16) as f64);
    }
}

#[test]
fn launches_of_a_backward_are_timed_on_the_device() {
    let Some(driver) = stand_in_driver() else { return };
    let folder = Folder::new();
    let path = folder.path("rows.json");
    let arguments = ["bench", "--engine", "cuda", "--suite", "tiny-backward", "--seconds", "0", "--json", text(&path)];
    let said = call_in(&[&arguments[..], &["--cache", "cold,warm"]].concat(), &[("LD_LIBRARY_PATH", driver)]);
    assert_eq!((said.status, said.stderr.as_str()), (0, ""));
    let rows = rows(&path);
    let told = |key: &str| rows.iter().map(|row| row[key].as_str().unwrap_or_default()).collect::<Vec<_>>();
    assert_eq!(told("cache"), ["cold", "warm"].repeat(3));
    let kernels = ["backward_short_sm80_f16_w40", "forward_short_sm80_f16_w40 backward_short_sm80_f16_w40"];
    assert_eq!(told("kernel"), [0, 0, 0, 0, 1, 1].map(|n| kernels[n]));
    assert!(rows.iter().all(|row| row["median_us"].as_f64().is_some_and(|us| us > 0.0)));
}

#[test]
fn sizes_are_chosen() {
    let folder = Folder::new();
    let path = folder.path("rows.json");
    let names = |options: &[&str]| -> Vec<String> {
        let arguments = ["bench", "--engine", "cpu", "--suite", "tiny", "--seconds", "0", "--json", text(&path)];
        let said = call(&[&arguments as &[&str], options].concat());
        assert_eq!(said.status, 0, "{}", said.stderr);
        rows(&path).iter().map(|row| row["case"].as_str().unwrap_or_default().to_string()).collect()
    };
    assert_eq!(names(&[]), ["self b1", "joint b1", "keys, logits b2", "ip 4+16 region b2"]);
    assert_eq!(names(&["--full"]).last().map(String::as_str), Some("ip 4+16 region b1"));
    assert_eq!(names(&["--filter", "b1"]), ["self b1", "joint b1", "ip 4+16 region b1"]);
    assert_eq!(names(&["--filter", "region ip"]), ["ip 4+16 region b2", "ip 4+16 region b1"]);
}

#[test]
fn limits_of_a_gpu() {
    let Some(driver) = stand_in_driver() else { return };
    let folder = Folder::new();
    let path = folder.path("limits.json");
    let arguments = ["bench", "--engine", "cuda", "--suite", "limits", "--seconds", "0", "--json", text(&path)];
    let said = call_in(&arguments, &[("LD_LIBRARY_PATH", driver)]);
    assert_eq!((said.status, said.stderr.as_str()), (0, ""));
    assert_eq!(said.stdout.lines().count(), 2, "{}", said.stdout);
    let rows = rows(&path);
    assert!(rows[0]["gbytes_per_s"].as_f64().is_some_and(|rate| rate > 0.0));
    assert!(rows.len() == 2 && rows.iter().all(|row| row["suite"] == "limits"));
}

#[test]
fn refusals() {
    let folder = Folder::new();
    let path = folder.path("rows.json");
    // Without the feature nothing is emulated; with it, not that type.
    for suite in ["tiny", "tiny-backward"] {
        let arguments = ["bench", "--engine", "emulated", "--suite", suite, "--dtype", "f32", "--json", text(&path)];
        let said = call(&arguments);
        assert_eq!((said.status, said.stdout.as_str()), (3, ""));
        assert!(said.stderr.contains("the emulated engine cannot run this"), "{}", said.stderr);
        // Refused cases are rows, so that others may be timed on them.
        let rows = rows(&path);
        assert_eq!(rows.len(), said.stderr.lines().count());
        assert!(rows.iter().all(|row| row["refused"].is_string() && row["median_us"].is_null()));
    }
    let nowhere = folder.path("no-such-folder").join("rows.json");
    for arguments in [
        &["--suite", "tiny", "--json", text(&nowhere)] as &[&str],
        &["--suite", "tiny", "--filter", "nothing"],
        &["--suite", "tiny", "--cache", "warm"],
        &["--suite", "limits"],
    ] {
        let said = call(&[&["bench", "--engine", "cpu"], arguments].concat());
        assert_eq!((said.status, said.stderr.lines().count()), (2, 1), "{}", said.stderr);
    }
}

/// Checks what makes XML: one root, every tag closed by its own, quoted attributes, no stray `<` or `&`.
fn well_formed(xml: &str) {
    let mut open: Vec<&str> = Vec::new();
    let mut rest = xml;
    let mut roots = 0;
    while let Some((text, after)) = rest.split_once('<') {
        assert!(open.last().is_some() || text.trim().is_empty(), "text outside of the root: {text}");
        for (at, _) in text.match_indices('&') {
            assert!(["&amp;", "&lt;", "&gt;", "&quot;"].iter().any(|entity| text[at..].starts_with(entity)), "{text}");
        }
        let (tag, after) = after.split_once('>').expect("a tag ends");
        rest = after;
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name));
            continue;
        }
        roots += usize::from(open.is_empty());
        let (tag, closed) = tag.strip_suffix('/').map_or((tag, false), |tag| (tag, true));
        let (name, mut attributes) = tag.split_once(' ').unwrap_or((tag, ""));
        while let Some((key, value)) = attributes.split_once("=\"") {
            assert!(key.trim().chars().all(|c| c.is_ascii_alphanumeric() || c == '-'), "{key}");
            attributes = value.split_once('"').expect("a value ends").1;
        }
        assert!(attributes.trim().is_empty(), "{attributes}");
        if !closed {
            open.push(name);
        }
    }
    assert!(open.is_empty() && roots == 1 && rest.trim().is_empty());
}
