//! The kernels' source for the emulator: one translation unit per row of device code.

use super::translation_unit::translation_unit;
use super::{instances::INSTANCES, params, simt_build::Kernels, write};
use std::fmt::Write;
use std::path::Path;
use std::{env, fs};

/// Compiles every row and writes the function that finds an entry point by the row's symbol.
pub fn build(out: &Path) {
    let folder = out.join("emulated");
    fs::create_dir_all(&folder).expect("OUT_DIR can be written");

    const LIBRARY: &str = "fused_attention_emulated";
    let mut kernels = Kernels::new("simt", LIBRARY).include("kernels").include(out);
    let (mut declarations, mut arms, mut registry) = (String::new(), String::new(), Vec::new());
    for row in INSTANCES {
        let (Some(source), Some(device)) = (translation_unit(row), &row.device) else { continue };
        let symbol = row.symbol();
        let entry = format!(
            "{source}#include \"simt/entry.hpp\"\n\
             extern \"C\" void emulated_{symbol}(const void* params) {{ simt::entry<{symbol}>(params); }}\n"
        );
        let file = folder.join(format!("{symbol}.cpp"));
        write(&file, &entry);
        kernels = kernels.file(&file);
        let params = device.entry.params;
        let (_, bytes) = params::SIZES.iter().find(|(name, _)| *name == params).expect("a block of params.rs");
        registry.push((symbol.clone(), format!("emulated_{symbol}"), *bytes));
        let _ = writeln!(declarations, "    fn emulated_{symbol}(params: *const c_void);");
        let _ = writeln!(
            arms,
            "        // SAFETY: exported by simt::entry for a kernel that takes a {params}; only run with checks.\n        \
             \"{symbol}\" => Some(AnyKernel::{params}(unsafe {{ Kernel::new(emulated_{symbol}) }})),"
        );
    }
    kernels.compile();
    let driver = out.join("stand_in_driver");
    if cfg!(target_os = "linux") {
        let archives = env::var_os("DEP_SIMT_EMULATOR_ARCHIVES").expect("simt's build script tells its folder");
        Kernels::driver(LIBRARY, Path::new("simt"), Path::new(&archives), &registry, &driver);
    }
    println!("cargo::rustc-env=FUSED_ATTENTION_STAND_IN_DRIVER={}", driver.display());
    let source = format!(
        "unsafe extern \"C\" {{\n{declarations}}}\n\n\
         pub(super) fn kernel(symbol: &str) -> Option<AnyKernel> {{\n    \
         match symbol {{\n{arms}        _ => None,\n    }}\n}}\n"
    );
    write(&out.join("emulated_kernels.rs"), &source);
}
