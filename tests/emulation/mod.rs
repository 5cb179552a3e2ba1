//! Which kernels the emulator runs, in which form.

use fused_attention::emulated::{Rung, Settings};
use fused_attention::{Direction, Engine, INSTANCES, Instance};
#[cfg(feature = "cuda")]
use fused_attention::{Form, cuda};
use std::io::Write;

/// Each kernel that a plan may start with alone, as its source has it and as nvcc does.
pub fn kernels(direction: Direction) -> Vec<Settings> {
    let leads = |row: &&Instance| row.runs_on(Engine::Emulated) && row.direction == direction && row.leads;
    let mut leading: Vec<(&str, (u32, u32))> = INSTANCES.iter().filter(leads).filter_map(kernel).collect();
    leading.dedup();
    let of = |rung| {
        leading.iter().map(move |&(name, compute_capability)| {
            let kernel = Some(name.to_string());
            Settings { compute_capability, kernel, rung, ..Settings::default() }
        })
    };
    of(Rung::Source).chain(rungs().contains(&Rung::Ptx).then(|| of(Rung::Ptx)).into_iter().flatten()).collect()
}

/// Name, and the GPU that it needs.
fn kernel(row: &'static Instance) -> Option<(&'static str, (u32, u32))> {
    row.device.as_ref().map(|code| (row.kernel, code.compute_capability))
}

/// The forms of the kernels that this build has.
pub fn rungs() -> &'static [Rung] {
    #[cfg(feature = "cuda")]
    if cuda::toolkit().is_some_and(|toolkit| toolkit.targets.iter().any(|target| target.form == Form::Ptx)) {
        return &[Rung::Source, Rung::Ptx];
    }
    assert!(
        std::env::var_os("FUSED_ATTENTION_REQUIRE_KERNELS").is_none_or(|value| value == "0"),
        "no PTX in this build"
    );
    // Not eprintln: the test harness would swallow it.
    let _ = writeln!(std::io::stderr(), "LEFT OUT: kernels as nvcc's PTX: this build has none; run scripts/get-nvcc");
    &[Rung::Source]
}

/// For messages.
pub fn name(settings: &Settings) -> String {
    format!("{} {:?}", settings.kernel.as_deref().unwrap_or_default(), settings.rung)
}
