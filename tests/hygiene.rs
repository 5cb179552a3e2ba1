//! What the sources promise about themselves: generated parts are fresh, paths named in the documents exist, files stay
//! readable in one sitting, dependencies keep the stated Rust version.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Every file below a folder.
fn files(folder: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(root().join(folder)) else { return found };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() {
            let below = path.strip_prefix(root()).expect("below the root").to_string_lossy().into_owned();
            found.extend(files(&below));
        } else {
            found.push(path);
        }
    }
    found
}

#[test]
fn the_readme_shows_the_support_table() {
    const START: &str = "<!-- support table: scripts/update-docs -->\n";
    const END: &str = "<!-- end of support table -->";
    let readme = read("README.md");
    let start = readme.find(START).expect("the README has the start marker") + START.len();
    let end = readme.find(END).expect("the README has the end marker");
    let table = fused_attention::support_table();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        let updated = format!("{}{table}{}", &readme[..start], &readme[end..]);
        fs::write(root().join("README.md"), updated).expect("the README can be written");
    } else {
        assert_eq!(&readme[start..end], table, "the support table is stale: run scripts/update-docs");
    }
}

#[test]
fn paths_in_the_documents_exist() {
    const FOLDERS: [&str; 11] = [
        "src/",
        "kernels/",
        "tests/",
        "benches/",
        "examples/",
        "scripts/",
        "docs/",
        "cli/",
        "candle/",
        "simt/",
        ".ci/",
    ];
    let mut missing = Vec::new();
    for document in ["README.md", "ARCHITECTURE.md", "docs/recipes.md", "docs/math.md", "kernels/README.md"] {
        for word in read(document).split(|c: char| c.is_whitespace() || "()[]`,;:\"'<>*".contains(c)) {
            let path = word.trim_end_matches('.').split('#').next().unwrap_or_default();
            let is_path = FOLDERS.iter().any(|folder| path.starts_with(folder) && path.len() > folder.len());
            if is_path && !path.contains(['{', '…']) && !root().join(path).exists() {
                missing.push(format!("{document} names {path}"));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn every_equation_cited_is_on_the_page() {
    let page = read("docs/math.md");
    for file in files("src") {
        let source = fs::read_to_string(&file).expect("a source is text");
        let cited = source.match_indices("quation").filter_map(|(at, word)| {
            let rest = source[at + word.len()..].trim_start_matches('s').trim_start();
            rest.split(|c: char| !c.is_ascii_digit()).next()?.parse::<u32>().ok()
        });
        for number in cited {
            assert!(page.contains(&format!("({number})")), "{}: equation {number}", file.display());
        }
    }
}

/// The storey of a file of device code, from the ground up.
fn storey(path: &str) -> usize {
    match path {
        _ if path.starts_with("kernels/ptx/") => 0,
        "kernels/params.h" => 1,
        _ if path.starts_with("kernels/tile/") => 2,
        _ => 3,
    }
}

#[test]
fn device_code_keeps_its_storeys() {
    let mut broken = Vec::new();
    let sources = files("kernels").into_iter().filter(|file| file.extension().is_some_and(|end| end != "md"));
    for file in sources {
        let path = file.strip_prefix(root()).expect("below the root").to_string_lossy().replace('\\', "/");
        let source = fs::read_to_string(&file).expect("a source is text");
        let lines: Vec<&str> = source.lines().collect();
        for (at, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap_or_default().trim();
            let mut report = |what: &str| broken.push(format!("{path}:{}: {what}", at + 1));
            if storey(&path) > 0 && (code.contains("asm ") || code.starts_with("#if")) {
                report("asm and #if stand in kernels/ptx only");
            }
            if let Some(included) = code.strip_prefix("#include \"").map(|rest| rest.trim_end_matches('"')) {
                let folder = Path::new(&path).parent().expect("a file has a folder");
                let target = match included.strip_prefix("../") {
                    Some(rest) => folder.parent().expect("below kernels").join(rest),
                    None => folder.join(included),
                };
                if storey(&target.to_string_lossy()) > storey(&path) {
                    report("includes point down");
                }
            }
            let is_barrier = ["ptx::barrier_cta()", "ptx::bar_sync(", "ptx::bar_warp_sync()"];
            let explained = at > 0 && (lines[at - 1].trim().starts_with("//") || lines[at - 1].contains("wait_group"));
            if storey(&path) > 1 && is_barrier.iter().any(|call| code.contains(call)) && !explained {
                report("a barrier wants a comment that says who wrote and who reads next");
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

#[test]
fn files_fit_one_sitting() {
    const LIMITS: [(&str, usize); 5] =
        [("kernels", 300), ("src", 500), ("cli/src", 500), ("simt", 500), ("candle", 500)];
    let mut long = Vec::new();
    for (folder, limit) in LIMITS {
        for file in files(folder) {
            let Ok(source) = fs::read_to_string(&file) else { continue };
            let lines = source.lines().count();
            if lines > limit && !file.to_string_lossy().contains("target") {
                long.push(format!("{}: {lines} lines, at most {limit}", file.display()));
            }
        }
    }
    let reference = read("src/engine/reference.rs").lines().count();
    assert!(reference <= 250, "the oracle has {reference} lines; it must stay obviously right");
    assert!(long.is_empty(), "{long:#?}");
}

#[test]
fn the_rust_version_is_one_all_dependencies_accept() {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let version = Command::new("rustc").arg("-vV").output().expect("rustc runs");
    let version = String::from_utf8_lossy(&version.stdout).into_owned();
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).expect("rustc tells its host");
    // What was built for this host is on disk; other platforms' packages may not be.
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--locked", "--offline", "--filter-platform", host])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("cargo prints JSON");
    let version = |text: &str| -> Vec<u32> { text.split('.').filter_map(|part| part.parse().ok()).collect() };
    let ours = version(env!("CARGO_PKG_RUST_VERSION"));
    let packages = metadata["packages"].as_array().expect("a list of packages");
    assert!(packages.len() > 10);
    for package in packages {
        if let Some(theirs) = package["rust_version"].as_str() {
            let (name, minimum) = (&package["name"], version(theirs));
            assert!(minimum <= [ours.clone(), vec![0]].concat(), "{name} needs Rust {theirs}");
        }
    }
}
