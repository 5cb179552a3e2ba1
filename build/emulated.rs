//! The kernels' source for the emulator: one translation unit per row of device code.

use super::{instances::INSTANCES, simt_build::Kernels, write};
use std::fmt::Write;
use std::fs;
use std::path::Path;

/// Compiles every row and writes the function that finds an entry point by the row's symbol.
pub fn build(out: &Path) {
    let folder = out.join("emulated");
    fs::create_dir_all(&folder).expect("OUT_DIR can be written");

    let mut kernels = Kernels::new("simt", "fused_attention_emulated").include("kernels").include(out);
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
    write(&out.join("emulated_kernels.rs"), &source);
}
