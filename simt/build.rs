//! Builds the emulator, and with the feature `self-test` the kernels that its own tests run.

use std::path::Path;

#[path = "build_support.rs"]
mod build_support;

const EMULATOR: &[&str] = &[
    "async_proxy",
    "banks",
    "c_abi",
    "clocks",
    "constants",
    "fiber",
    "global_shadow",
    "hooks",
    "launch",
    "mbarrier",
    "memory",
    "primitives_async",
    "primitives_matrix",
    "primitives_scalar",
    "primitives_sync",
    "race",
    "registers",
    "scheduler",
    "sites",
    "tensor_map",
    "tma",
    "wgmma",
];

const SELF_TEST: &[&str] = &["matmul", "protocol", "memory", "primitives", "hopper", "hopper_matmul"];

fn main() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));

    // Before the emulator in link order: it is what they need.
    if std::env::var_os("CARGO_FEATURE_SELF_TEST").is_some() {
        let kernels = build_support::Kernels::new(here, "simt_test_kernels").include(here.join("tests/kernels"));
        SELF_TEST
            .iter()
            .fold(kernels, |kernels, name| kernels.file(here.join(format!("tests/kernels/{name}.cpp"))))
            .compile();
    }

    let mut emulator = cc::Build::new();
    emulator.cpp(true).std("c++17").opt_level(3).debug(true).flag("-Wall").flag("-Wextra").flag("-fno-rtti");
    emulator.flag("-ffp-contract=off");
    for name in EMULATOR {
        emulator.file(here.join(format!("emulator/{name}.cpp")));
    }
    emulator.compile("simt_emulator");
    for path in ["build.rs", "build_support.rs", "emulator", "../kernels/ptx"] {
        println!("cargo::rerun-if-changed={}", here.join(path).display());
    }
    // DEP_SIMT_EMULATOR_INCLUDE in the build scripts of dependents.
    println!("cargo::metadata=include={}", here.join("include").display());
}
