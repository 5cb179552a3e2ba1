//! Finds the CUDA compiler, so that the crate can tell at run time whether it was there, and, with the feature `emulated`,
//! compiles the kernels for the emulator: one translation unit per row of device code in the table of instances.

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
    #[cfg(feature = "emulated")]
    emulated::compile();
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

/// The table and the parameter block, as the crate itself has them.
#[cfg(feature = "emulated")]
#[path = "src/plan/instances.rs"]
#[expect(dead_code, reason = "the build needs the rows of device code and their sources only")]
mod instances;
#[cfg(feature = "emulated")]
#[path = "src/plan/params.rs"]
mod params;
#[cfg(feature = "emulated")]
#[path = "simt/build_support.rs"]
mod simt_build;
#[cfg(feature = "emulated")]
#[expect(dead_code, reason = "the table needs the words only")]
#[path = "src/problem"]
mod problem {
    mod dtype;
    pub use dtype::{DType, Direction};
}

#[cfg(feature = "emulated")]
mod emulated {
    use super::{instances::INSTANCES, params, simt_build::Kernels};
    use std::fmt::Write;
    use std::path::Path;
    use std::{env, fs};

    /// Compiles every row and writes the function that finds an entry point by the row's symbol.
    pub fn compile() {
        let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
        let folder = Path::new(&out).join("emulated");
        fs::create_dir_all(&folder).expect("OUT_DIR can be written");
        write(&folder.join("params_layout.h"), &params::assertions());

        let mut kernels = Kernels::new("simt", "fused_attention_emulated").include("kernels").include(&folder);
        let (mut declarations, mut arms) = (String::new(), String::new());
        for row in INSTANCES {
            let Some(source) = row.translation_unit() else { continue };
            let symbol = row.symbol();
            let entry = format!(
                "{source}#include \"simt/entry.hpp\"\n\
                 extern \"C\" void emulated_{symbol}(const void* params) {{ simt::entry<{symbol}>(params); }}\n"
            );
            let file = folder.join(format!("{symbol}.cpp"));
            write(&file, &entry);
            kernels = kernels.file(&file);
            let _ = writeln!(declarations, "    fn emulated_{symbol}(params: *const c_void);");
            let _ = writeln!(
                arms,
                "        // SAFETY: exported by simt::entry for a kernel that takes a ForwardParams; only run with checks.\n        \
                 \"{symbol}\" => Some(unsafe {{ Kernel::new(emulated_{symbol}) }}),"
            );
        }
        kernels.compile();
        let source = format!(
            "unsafe extern \"C\" {{\n{declarations}}}\n\n\
             pub(super) fn kernel(symbol: &str) -> Option<Kernel<ForwardParams>> {{\n    \
             match symbol {{\n{arms}        _ => None,\n    }}\n}}\n"
        );
        write(&Path::new(&out).join("emulated_kernels.rs"), &source);
    }

    /// Leaves a file alone that already says this, so that nothing is compiled anew for it.
    fn write(path: &Path, text: &str) {
        if fs::read_to_string(path).is_ok_and(|old| old == text) {
            return;
        }
        fs::write(path, text).expect("OUT_DIR can be written");
    }
}
