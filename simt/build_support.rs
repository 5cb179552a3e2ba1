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
        build.cpp(true).std("c++17").opt_level(2).include(simt.join("include")).include(simt.join("../kernels"));
        // Every load and store becomes a call of a hook. The run-time library of the sanitizer is never linked: the
        // emulator is that library.
        build.flag("-fsanitize=thread");
        lines_only(&mut build);
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

    /// Links a stand-in for the CUDA driver library that runs these kernels: `folder` gets libcuda.so.1 and libcuda.so.
    ///
    /// `registry` has, of each kernel, its name in the images that the driver will be given, its entry function here, and
    /// the bytes of its parameter block. `simt` is the emulator's folder, `archives` the folder that simt's build script tells: the variable
    /// DEP_SIMT_EMULATOR_ARCHIVES. Call it after [`compile`](Self::compile), whose archive it takes. On Linux only.
    #[allow(dead_code)] // each build script uses what it needs
    pub fn driver(library: &str, simt: &Path, archives: &Path, registry: &[(String, String, usize)], folder: &Path) {
        if is_linted() {
            return;
        }
        let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
        std::fs::create_dir_all(folder).expect("OUT_DIR can be written");
        let (source, exports) = (folder.join("registry.cpp"), folder.join("exports.map"));
        let declarations: String =
            registry.iter().map(|(_, entry, _)| format!("extern \"C\" void {entry}(const void*);\n")).collect();
        let entries: String =
            registry.iter().map(|(name, entry, bytes)| format!("  {{\"{name}\", {entry}, {bytes}}},\n")).collect();
        let table = format!(
            "#include \"simt/registry.hpp\"\n{declarations}\
             extern \"C\" const SimtRegisteredKernel simt_registered_kernels[] = {{\n{entries}  {{nullptr, nullptr, 0}}}};\n"
        );
        std::fs::write(&source, table).expect("OUT_DIR can be written");
        // Nothing else of it may meet the emulator that is linked into the program itself.
        std::fs::write(&exports, "{ global: cu*; simt_driver_*; local: *; };\n").expect("OUT_DIR can be written");
        let linked = folder.join("libcuda.so.1");
        let include = simt.join("include");
        let archive = |folder: &Path, name: &str| folder.join(format!("lib{name}.a"));
        let mut command = cc::Build::new().cpp(true).get_compiler().to_command();
        command.args(["-std=c++17", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-Wl,-Bsymbolic", "-I"]);
        command.arg(include).arg(format!("-Wl,--version-script={}", exports.display())).arg(&source);
        command.arg("-Wl,--whole-archive").arg(archive(archives, "simt_driver")).arg("-Wl,--no-whole-archive");
        command.arg(archive(&out, library)).arg(archive(archives, "simt_emulator"));
        command.args(["-static-libstdc++", "-static-libgcc", "-lpthread", "-o"]).arg(&linked);
        let output = command.output().expect("the C++ compiler runs");
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        let _ = std::fs::remove_file(folder.join("libcuda.so"));
        #[cfg(unix)]
        std::os::unix::fs::symlink("libcuda.so.1", folder.join("libcuda.so")).expect("OUT_DIR takes a link");
    }

    /// Compiles and links the library into the crate being built.
    pub fn compile(mut self) {
        // What the build itself writes is always newer than its start: watched, it would have every build begin again.
        let out = std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR");
        for path in self.watched.iter().filter(|path| !path.starts_with(&out)) {
            println!("cargo::rerun-if-changed={}", path.display());
        }
        compile(&mut self.build, &self.library);
    }
}

/// Whether clippy is all that looks at the crate. It links nothing, so that nothing has to be compiled for it; cargo
/// keeps what it builds for clippy apart, and where it should not, runs the script again because of the variable.
pub fn is_linted() -> bool {
    const WRAPPER: &str = "RUSTC_WORKSPACE_WRAPPER";
    println!("cargo::rerun-if-env-changed={WRAPPER}");
    let wrapper = std::env::var_os(WRAPPER).unwrap_or_default();
    Path::new(&wrapper).file_stem().is_some_and(|program| program == "clippy-driver")
}

/// Lines and what is inlined where: all that a report names, in a quarter of the bytes of full debug information. Not
/// by `debug_str`, whose `-gdwarf-4` GCC takes for a wish for all of it.
pub fn lines_only(build: &mut cc::Build) {
    build.debug(false).force_frame_pointer(true).flag("-g1");
}

/// Compiles a static library, unless for clippy. It is on disk once: programs link it from OUT_DIR, the Rust
/// libraries on the way hold no copy, and its objects go when it is whole.
pub fn compile(build: &mut cc::Build, library: &str) {
    if is_linted() {
        return;
    }
    build.link_lib_modifier("-bundle").compile(library);
    let out = std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR");
    let files = std::fs::read_dir(out).expect("OUT_DIR can be read");
    for file in files.flatten().map(|entry| entry.path()) {
        if file.extension().is_some_and(|ending| ending == "o") {
            let _ = std::fs::remove_file(file);
        }
    }
}
