//! Finds the CUDA compiler, so that the crate can tell at run time whether it was there.

use std::env;
use std::path::PathBuf;

const NVCC: &str = if cfg!(windows) { "nvcc.exe" } else { "nvcc" };

/// Variables that name a toolkit's folder.
const TOOLKIT_VARIABLES: [&str; 3] = ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=NVCC");
    for variable in TOOLKIT_VARIABLES {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    println!("cargo::rustc-check-cfg=cfg(nvcc)");
    if env::var_os("DOCS_RS").is_none() && find_nvcc().is_some() {
        println!("cargo::rustc-cfg=nvcc");
    }
}

/// NVCC, then the toolkit variables, then PATH, then the usual places, then `.cuda/` in the workspace.
fn find_nvcc() -> Option<PathBuf> {
    let named = env::var_os("NVCC").map(PathBuf::from);
    let toolkits = TOOLKIT_VARIABLES.iter().filter_map(env::var_os).map(|home| PathBuf::from(home).join("bin"));
    let path = env::var_os("PATH").map(|path| env::split_paths(&path).collect::<Vec<_>>()).unwrap_or_default();
    let usual = ["/usr/local/cuda/bin", "/opt/cuda/bin"].map(PathBuf::from);
    let workspace = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR")?).join(".cuda").join("bin");
    let folders = toolkits.chain(path).chain(usual).chain([workspace]);
    named.into_iter().chain(folders.map(|folder| folder.join(NVCC))).find(|nvcc| nvcc.is_file())
}
