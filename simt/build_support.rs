// Compiles kernels for the emulator. simt's own build.rs uses it, and so does that of any crate with kernels of its
// own:
//
//     #[path = "simt/build_support.rs"]
//     mod simt_build;
//
//     simt_build::Kernels::new("simt", "my_kernels")
//         .include("kernels")
//         .file("kernels/emulated/forward.cpp")
//         .compile();
//
// with `cc` among its build-dependencies and `simt` among its dependencies.

use std::path::{Path, PathBuf};

/// Kernel translation units that become one static library.
pub struct Kernels {
    build: cc::Build,
    library: String,
    watched: Vec<PathBuf>,
}

impl Kernels {
    /// `simt` is the path of the emulator's folder, `library` a name for the archive, unique in the final program.
    pub fn new(simt: impl AsRef<Path>, library: &str) -> Self {
        let mut build = cc::Build::new();
        let simt = simt.as_ref();
        build
            .cpp(true)
            .std("c++17")
            .opt_level(2)
            .debug(true)
            .include(simt.join("include"))
            .include(simt.join("../kernels"));
        // Every load and store becomes a call of a hook. The run-time library of the sanitizer is never linked: the
        // emulator is that library.
        build.flag("-fsanitize=thread");
        if build.get_compiler().is_like_clang() {
            build.flag("-mllvm").flag("-tsan-instrument-func-entry-exit=0");
        } else {
            build.flag("--param").flag("tsan-instrument-func-entry-exit=0");
            // Calls at different lines stay different calls, so that reports name the right one.
            build.flag("-fno-crossjumping").flag("-fno-tree-tail-merge");
        }
        build
            .flag("-fno-optimize-sibling-calls") // a tail call would lose its own line
            .flag("-ffp-contract=off") // one rounding per operation on every host
            .flag("-fno-exceptions")
            .flag("-fno-rtti")
            .flag_if_supported("-ftrivial-auto-var-init=pattern") // uninitialised locals get an absurd value
            .flag("-Wall")
            .flag("-Wextra")
            .flag("-Wno-unknown-pragmas") // #pragma unroll
            .flag_if_supported("-Wno-psabi");
        let watched = vec![simt.join("include"), simt.join("../kernels/ptx")];
        Self { build, library: library.to_owned(), watched }
    }

    /// A folder for `#include`.
    pub fn include(mut self, folder: impl AsRef<Path>) -> Self {
        self.build.include(folder.as_ref());
        self.watched.push(folder.as_ref().to_owned());
        self
    }

    /// A translation unit. It holds kernels and their entry functions and uses nothing of the C++ library beyond
    /// <cstdint> and <cmath>: what it instantiated of the rest would be instrumented, and the linker could pick it for
    /// the emulator too.
    pub fn file(mut self, source: impl AsRef<Path>) -> Self {
        self.build.file(source.as_ref());
        self.watched.push(source.as_ref().to_owned());
        self
    }

    /// `-D name=value`, for one translation unit per instance.
    #[allow(dead_code)] // each build script uses what it needs
    pub fn define(mut self, name: &str, value: &str) -> Self {
        self.build.define(name, value);
        self
    }

    /// Compiles and links the library into the crate being built.
    pub fn compile(self) {
        for path in &self.watched {
            println!("cargo::rerun-if-changed={}", path.display());
        }
        self.build.compile(&self.library);
    }
}
