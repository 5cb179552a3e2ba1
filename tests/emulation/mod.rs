//! Which kernels the emulator runs, in which form.

use fused_attention::emulated::{Rung, Settings};
use fused_attention::{Direction, Engine, INSTANCES, Instance};
#[cfg(feature = "cuda")]
use fused_attention::{Form, Target, cuda};
use std::io::Write;

/// Each kernel that a plan may start with alone, as its source has it and as nvcc does.
pub fn kernels(direction: Direction) -> Vec<Settings> {
    let leads = |row: &&Instance| row.runs_on(Engine::Emulated) && row.direction == direction && row.leads;
    let mut leading: Vec<&Instance> = INSTANCES.iter().filter(leads).collect();
    leading.dedup_by_key(|row| row.kernel);
    let of =
        |rung: Rung| leading.iter().filter(move |row| rungs(row).contains(&rung)).map(move |row| settings(row, rung));
    of(Rung::Source).chain(of(Rung::Ptx)).collect()
}

/// The row's kernel alone, on the GPU that it is for.
pub fn settings(row: &Instance, rung: Rung) -> Settings {
    let compute_capability = row.device.as_ref().map_or((8, 0), |code| code.compute_capability);
    Settings { compute_capability, kernel: Some(row.kernel.to_string()), rung, ..Settings::default() }
}

/// The forms of a row that this build has.
pub fn rungs(row: &Instance) -> &'static [Rung] {
    #[cfg(feature = "cuda")]
    if let (Some(toolkit), Some(code)) = (cuda::toolkit(), &row.device) {
        let has_ptx = |target: &Target| (code.specific || target.form == Form::Ptx) && code.compiles_for(target);
        if toolkit.targets.iter().any(has_ptx) {
            return &[Rung::Source, Rung::Ptx];
        }
    }
    assert!(
        std::env::var_os("FUSED_ATTENTION_REQUIRE_KERNELS").is_none_or(|value| value == "0"),
        "no PTX of {} in this build",
        row.symbol()
    );
    // Not eprintln: the test harness would swallow it.
    let _ = writeln!(
        std::io::stderr(),
        "LEFT OUT: {} as nvcc's PTX: this build has none; run scripts/get-nvcc",
        row.symbol()
    );
    &[Rung::Source]
}

/// For messages.
pub fn name(settings: &Settings) -> String {
    format!("{} {:?}", settings.kernel.as_deref().unwrap_or_default(), settings.rung)
}
