//! Compiles the kernels of the table of instances: for GPUs, where there is a CUDA compiler (build/images.rs), and, with
//! the feature `emulated`, for the emulator (build/emulated.rs).

use std::path::Path;
use std::{env, fs};

#[cfg(feature = "emulated")]
#[path = "build/emulated.rs"]
mod emulated;
#[cfg(feature = "cuda")]
#[path = "build/images.rs"]
mod images;
#[cfg(feature = "cuda")]
#[path = "build/nvcc.rs"]
mod nvcc;
#[cfg(feature = "emulated")]
#[path = "simt/build_support.rs"]
mod simt_build;
#[cfg(any(feature = "cuda", feature = "emulated"))]
#[path = "build/translation_unit.rs"]
mod translation_unit;

/// The table and the parameter block, as the crate itself has them.
#[allow(dead_code, reason = "the build needs the rows of device code and their sources only")]
#[path = "src/plan/instances.rs"]
mod instances;
#[path = "src/plan/params.rs"]
mod params;
#[path = "src/plan/sm80.rs"]
mod sm80;
#[path = "src/plan/sm90.rs"]
mod sm90;
#[allow(dead_code, reason = "the table needs the words only")]
#[path = "src/problem"]
mod problem {
    mod dtype;
    pub use dtype::{DType, Direction};
}
#[cfg(feature = "cuda")]
#[allow(dead_code, reason = "which target loads is asked at run time")]
#[path = "src/plan/target.rs"]
mod target;

fn main() {
    for path in ["build.rs", "build", "kernels", "src/plan", "src/problem/dtype.rs"] {
        println!("cargo::rerun-if-changed={path}");
    }
    let out = env::var_os("OUT_DIR").expect("cargo sets OUT_DIR");
    let out = Path::new(&out);
    write(&out.join("params_layout.h"), &params::assertions());
    #[cfg(feature = "cuda")]
    {
        let workspace = env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
        if let Err(failure) = images::build(Path::new(&workspace), out) {
            eprintln!("{failure}");
            std::process::exit(1);
        }
    }
    #[cfg(feature = "emulated")]
    emulated::build(out);
}

/// Leaves a file alone that already says this, so that nothing is compiled anew for it.
fn write(path: &Path, text: &str) {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return;
    }
    fs::write(path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}
