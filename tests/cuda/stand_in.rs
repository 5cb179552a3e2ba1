//! Tests in a process of their own, whose CUDA driver is the stand-in, and what can be asked of it.

use fused_attention::{Engine, cuda, device, emulated};
use libloading::Library;
use std::collections::BTreeMap;
use std::env;
use std::ffi::{CStr, c_char};
use std::io::Write;
use std::process::Command;

/// Set in the process that runs one test.
const CHILD: &str = "FUSED_ATTENTION_TEST_CHILD";
/// Where the dynamic linker looks first, before the process starts.
const LIBRARY_PATH: &str = "LD_LIBRARY_PATH";

/// Runs a test's body over the stand-in driver, set up by `environment`. `name` is the test's own, with its module.
pub fn over(name: &str, environment: &[(&str, &str)], body: impl FnOnce()) {
    let Some(folder) = emulated::stand_in_driver() else { return left_out(name, "the stand-in driver is for Linux") };
    // This program may have come to another machine, whose own driver would be found instead.
    if !folder.join("libcuda.so.1").is_file() {
        assert!(!kernels_are_required(), "{} has no stand-in driver", folder.display());
        return left_out(name, "the stand-in driver is on the machine that built this");
    }
    if kernels_are_built(name) {
        in_child(name, &folder.display().to_string(), environment, body);
    }
}

/// Orders in which the driver serves streams.
pub const SEEDS: [&str; 6] = ["1", "2", "3", "4", "5", "6"];

/// The same in several orders of the streams, each in a process of its own.
pub fn over_seeds(name: &str, body: impl Fn()) {
    let once = if is_child() { &SEEDS[..1] } else { &SEEDS[..] };
    once.iter().for_each(|seed| over(name, &[("SIMT_DRIVER_SEED", seed)], &body));
}

/// Whether this process runs one test for another process.
pub fn is_child() -> bool {
    env::var_os(CHILD).is_some()
}

/// The same on the real GPU where there is one.
pub fn on_gpu_or_over(name: &str, environment: &[(&str, &str)], body: impl FnOnce()) {
    if !is_child() && device(Engine::Cuda).is_ok() {
        return body();
    }
    over(name, environment, body);
}

/// Runs a test's body where no driver can be found.
pub fn without_driver(name: &str, body: impl FnOnce()) {
    if !is_child() && cuda::driver_version().is_ok() {
        return left_out(name, "this machine has a driver");
    }
    in_child(name, "", &[], body);
}

fn in_child(name: &str, library_path: &str, environment: &[(&str, &str)], body: impl FnOnce()) {
    if env::var(CHILD).is_ok_and(|child| child == name) {
        return body();
    }
    let program = env::current_exe().expect("a program knows its own path");
    let output = Command::new(program)
        .args(["--exact", name, "--nocapture"])
        .env(CHILD, name)
        .env(LIBRARY_PATH, library_path)
        .envs(environment.iter().copied())
        .output()
        .expect("it starts again");
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success(), "{environment:?}: {said}");
    assert!(said.contains("1 passed"), "{name} is no test: {said}");
}

/// Without compiled kernels there is nothing to launch.
pub fn kernels_are_built(name: &str) -> bool {
    let built = cuda::toolkit().is_some();
    assert!(built || !kernels_are_required(), "built without nvcc; run scripts/get-nvcc");
    if !built {
        left_out(name, "the build found no nvcc; run scripts/get-nvcc");
    }
    built
}

fn kernels_are_required() -> bool {
    env::var_os("FUSED_ATTENTION_REQUIRE_KERNELS").is_some_and(|value| value != "0")
}

fn left_out(name: &str, why: &str) {
    // Not eprintln: the test harness would swallow it.
    let _ = writeln!(std::io::stderr(), "LEFT OUT: {name}: {why}");
}

/// The stand-in's own functions.
pub struct Control(Library);

impl Control {
    /// Of the driver that this process has loaded.
    pub fn new() -> Self {
        // SAFETY: the engine loads the same library by the same name.
        Control(unsafe { Library::new("libcuda.so.1") }.expect("the stand-in is on the library path"))
    }

    fn text(&self, name: &str) -> String {
        // SAFETY: of this type in simt/driver/exports.hpp.
        let function = unsafe { self.0.get::<unsafe extern "C" fn() -> *const c_char>(name.as_bytes()) };
        // SAFETY: answers with a C string that lives until the same function is called again, which happens after it is
        // copied here: tests call it from one thread.
        let text = unsafe { CStr::from_ptr(function.expect("this is the stand-in")()) };
        text.to_string_lossy().into_owned()
    }

    /// Calls of the driver since the last time they were forgotten.
    pub fn calls(&self) -> Vec<String> {
        self.text("simt_driver_calls").lines().map(str::to_string).collect()
    }

    pub fn forget_calls(&self) {
        // SAFETY: of this type in simt/driver/exports.hpp.
        unsafe { self.0.get::<unsafe extern "C" fn()>(b"simt_driver_forget_calls").expect("this is the stand-in")() }
    }

    fn fail(&self, what: &str, n: u64, code: u32) {
        // SAFETY: of this type in simt/driver/exports.hpp.
        unsafe { self.0.get::<unsafe extern "C" fn(u64, u32)>(what.as_bytes()).expect("this is the stand-in")(n, code) }
    }

    /// Has the `n`th call from now fail; 0 for none.
    pub fn fail_call(&self, n: u64, code: u32) {
        self.fail("simt_driver_fail_call", n, code);
    }

    /// Has the `n`th kernel to run from now fail.
    pub fn fail_execution(&self, n: u64, code: u32) {
        self.fail("simt_driver_fail_execution", n, code);
    }

    /// Objects that exist, by kind.
    pub fn live(&self) -> BTreeMap<String, u64> {
        let text = self.text("simt_driver_live");
        let pair = |line: &str| line.split_once(' ').map(|(kind, count)| (kind.to_string(), count.parse().unwrap()));
        text.lines().filter_map(pair).collect()
    }

    /// What went wrong in the last kernel that failed.
    pub fn fault(&self) -> String {
        self.text("simt_driver_fault")
    }

    /// Kernels that have run: name, blocks, threads, bytes of shared memory.
    pub fn launches(&self) -> Vec<String> {
        self.text("simt_driver_launches").lines().map(str::to_string).collect()
    }
}
