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
    "tma_store",
    "wgmma",
];

/// The interpreter of PTX, part of the emulator.
const PTX: &[&str] = &["arithmetic", "interpret", "memory", "parse", "primitives", "primitives_sm90a"];

/// The stand-in for the CUDA driver; linked by whoever has kernels for it.
const DRIVER: &[&str] = &["contexts", "control", "graphs", "images", "launch", "memory", "state", "streams"];

const SELF_TEST: &[&str] = &["matmul", "protocol", "memory", "primitives", "hopper", "hopper_matmul"];

fn main() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = std::env::var("OUT_DIR").expect("cargo sets OUT_DIR");

    // Before the emulator in link order: it is what they need.
    if std::env::var_os("CARGO_FEATURE_SELF_TEST").is_some() {
        let kernels = build_support::Kernels::new(here, "simt_test_kernels").include(here.join("tests/kernels"));
        SELF_TEST
            .iter()
            .fold(kernels, |kernels, name| kernels.file(here.join(format!("tests/kernels/{name}.cpp"))))
            .compile();
    }

    let mut emulator = cc::Build::new();
    emulator.cpp(true).std("c++17").opt_level(3).flag("-Wall").flag("-Wextra").flag("-fno-rtti");
    emulator.flag("-ffp-contract=off");
    build_support::lines_only(&mut emulator);
    for name in EMULATOR {
        emulator.file(here.join(format!("emulator/{name}.cpp")));
    }
    for name in PTX {
        emulator.file(here.join(format!("ptx/{name}.cpp")));
    }
    build_support::compile(&mut emulator, "simt_emulator");
    if cfg!(target_os = "linux") {
        let mut driver = cc::Build::new();
        driver.cpp(true).std("c++17").opt_level(2).flag("-Wall").flag("-Wextra");
        driver.flag("-Wno-missing-field-initializers").include(here.join("include")).cargo_metadata(false);
        build_support::lines_only(&mut driver);
        for name in DRIVER {
            driver.file(here.join(format!("driver/{name}.cpp")));
        }
        build_support::compile(&mut driver, "simt_driver");
        if std::env::var_os("CARGO_FEATURE_SELF_TEST").is_some() {
            // Without a kernel of its own: what the tests give it is PTX.
            let folder = Path::new(&out).join("stand_in_driver");
            build_support::Kernels::driver("simt_test_kernels", here, Path::new(&out), &[], &folder);
            println!("cargo::rustc-env=SIMT_STAND_IN_DRIVER={}", folder.join("libcuda.so.1").display());
        }
    }
    for path in ["build.rs", "build_support.rs", "driver", "emulator", "include", "ptx", "../kernels/ptx"] {
        println!("cargo::rerun-if-changed={}", here.join(path).display());
    }
    // DEP_SIMT_EMULATOR_INCLUDE and _ARCHIVES in the build scripts of dependents.
    println!("cargo::metadata=archives={out}");
    println!("cargo::metadata=include={}", here.join("include").display());
}
