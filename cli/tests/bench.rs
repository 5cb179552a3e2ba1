//! The bench: the rows it writes, the chart it draws, what it refuses.

mod common;

use common::{Folder, call, call_in, stand_in_driver, text};

#[test]
fn rows_and_chart() {
    let folder = Folder::new();
    let (json, svg) = (folder.path("rows.json"), folder.path("rows.svg"));
    let mut engines = vec![("cpu", None), ("reference", Some("bf16"))];
    if cfg!(feature = "emulated") {
        engines.push(("emulated", None));
    }
    let driver = stand_in_driver();
    if driver.is_some() {
        engines.extend([("cuda", None), ("cuda", Some("bf16"))]);
    }
    for (engine, dtype) in engines {
        let mut arguments = vec!["bench", "--engine", engine, "--suite", "tiny", "--seconds", "0"];
        arguments.extend(["--json", text(&json), "--plot", text(&svg)]);
        arguments.extend(dtype.iter().flat_map(|dtype| ["--dtype", *dtype]));
        let said = match driver {
            Some(folder) if engine == "cuda" => call_in(&arguments, &[("LD_LIBRARY_PATH", folder)]),
            _ => call(&arguments),
        };
        // stderr is no terminal here: no progress bar.
        assert_eq!((said.status, said.stderr.as_str()), (0, ""));

        let rows: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&json).expect("it is written")).expect("it is JSON");
        let rows = rows.as_array().expect("it is an array");
        assert_eq!(rows.len(), 3);
        assert_eq!(said.stdout.lines().count(), 1 + rows.len(), "{}", said.stdout);
        for row in rows {
            let row = row.as_object().expect("it is an object");
            let keys: Vec<&str> = row.keys().map(String::as_str).collect();
            let mut expected = ["suite", "case", "engine", "kernel", "direction", "dtype", "b", "h", "sq", "skv", "d"]
                .into_iter()
                .chain(["median_us", "tflops", "gbytes_per_s"])
                .collect::<Vec<_>>();
            expected.sort_unstable();
            assert_eq!(keys, expected);
            for key in ["median_us", "tflops", "gbytes_per_s"] {
                assert!(row[key].as_f64().is_some_and(|value| value > 0.0 && value.is_finite()), "{key}");
            }
            assert_eq!(
                (&row["suite"], &row["engine"], &row["direction"]),
                (&"tiny".into(), &engine.into(), &"forward".into())
            );
            assert_eq!(row["dtype"], dtype.unwrap_or("f16"));
        }
        let last = &rows[2];
        assert_eq!(last["skv"], serde_json::json!([7, 4, 16]));
        assert_eq!((&last["b"], &last["h"], &last["sq"], &last["d"]), (&2.into(), &2.into(), &32.into(), &16.into()));
        // Two products of every query with every key, 16 wide, multiplied and added.
        let flops = 2.0 * 2.0 * (2 * 2 * 32 * (7 + 4 + 16) * 16) as f64;
        let told = last["tflops"].as_f64().unwrap_or(0.0) * last["median_us"].as_f64().unwrap_or(0.0) * 1e6;
        assert!((told - flops).abs() <= 1e-6 * flops, "{told} instead of {flops}");

        let chart = std::fs::read_to_string(&svg).expect("it is written");
        for word in ["<svg", "ip 4+16 masked", "TFLOP/s", engine] {
            assert!(chart.contains(word), "{word} is not in the chart");
        }
        well_formed(&chart);
        assert_eq!(folder.names(), ["rows.json", "rows.svg"]);
    }
}

#[test]
fn refusals() {
    let folder = Folder::new();
    let json = folder.path("rows.json");
    // Without the feature nothing is emulated; with it, not that type.
    for (engine, suite, words) in
        [("cpu", "backward", "has no backward kernel"), ("emulated", "tiny", "the emulated engine cannot run this")]
    {
        let said = call(&["bench", "--engine", engine, "--suite", suite, "--dtype", "f32", "--json", text(&json)]);
        assert_eq!((said.status, said.stdout.as_str()), (3, ""));
        assert!(said.stderr.contains(words), "{}", said.stderr);
        assert!(folder.names().is_empty());
    }
    let nowhere = folder.path("no-such-folder").join("rows.json");
    let said = call(&["bench", "--engine", "cpu", "--suite", "tiny", "--json", text(&nowhere)]);
    assert_eq!((said.status, said.stderr.lines().count()), (2, 1));
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
