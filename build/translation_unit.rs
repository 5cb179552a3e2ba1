//! The source of a row of device code: one entry point, and the table's numbers asserted against the kernel's.

use super::instances::Instance;
use super::problem::DType;
use std::fmt::Write;

/// Nothing for a row of the host's.
pub fn translation_unit(row: &Instance) -> Option<String> {
    let device = row.device.as_ref()?;
    let entry = &device.entry;
    let element = if matches!(row.dtypes[0], DType::F16) { "HalfElement" } else { "Bfloat16Element" };
    let mut unit = format!("#include \"{}.cuh\"\n#include \"params_layout.h\"\n", row.kernel);
    let mut equal = Vec::new();
    if let Some(rows) = entry.rows {
        let more = entry.warpgroups.map_or(String::new(), |[consumers, stages]| format!(", {consumers}, {stages}"));
        let _ = writeln!(unit, "using Config = {}<{element}, {}, {rows}{more}>;", entry.config, row.max_head_dim);
        equal.push(("BLOCK_Q".to_string(), row.block_q as u32));
        equal.push(("BLOCK_KV".to_string(), row.block_kv as u32));
    } else {
        let _ = writeln!(unit, "using Config = {}<{element}>;", entry.config);
    }
    equal.push(("THREADS".to_string(), device.threads));
    for (branches, key_tiles, gradient_tiles) in [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 1, 1), (2, 50, 0)] {
        let bytes = device.shared_bytes_for(branches, key_tiles, gradient_tiles);
        equal.push((format!("shared_bytes({branches}, {key_tiles}, {gradient_tiles})"), bytes));
    }
    for (constant, value) in equal {
        let _ = writeln!(unit, "static_assert(Config::{constant} == {value}, \"src/plan/sm80.rs, sm90.rs\");");
    }
    let (symbol, threads, blocks) = (row.symbol(), device.threads, device.resident_blocks);
    let (params, function) = (entry.params, entry.function);
    let _ = write!(
        unit,
        "extern \"C\" __global__ void __launch_bounds__({threads}, {blocks}) {symbol}(const __grid_constant__ {params} p) {{\n  \
         {function}<Config>(p);\n\
         }}\n"
    );
    Some(unit)
}
