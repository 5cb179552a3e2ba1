//! The table of processors.

use super::scale::LayerScale;
use super::{AttnProcessors, Entry, Processor};
use candle_core::Tensor;
use std::fmt;

impl fmt::Display for AttnProcessors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = ["layer", "processor", "backend", "adapters", "weights loaded"].map(String::from);
        let rows: Vec<[String; 5]> = std::iter::once(head).chain(self.entries.iter().map(|e| self.row(e))).collect();
        let mut widths = [0; 5];
        for row in &rows {
            widths.iter_mut().zip(row).for_each(|(width, cell)| *width = (*width).max(cell.chars().count()));
        }
        for row in &rows {
            let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
            writeln!(f, "{}", cells.join("  ").trim_end())?;
        }
        let loaded = self.adapters();
        for (name, _) in self.scales.iter().filter(|(name, _)| !loaded.contains(&name.as_str())) {
            writeln!(f, "a scale is set for {name}, which is not loaded")?;
        }
        Ok(())
    }
}

impl AttnProcessors {
    fn row(&self, entry: &Entry) -> [String; 5] {
        let adapters: Vec<String> = entry
            .adapters()
            .map(|name| match self.scale_at(name, entry.cross.unwrap_or_default()) {
                LayerScale::All(scale) => format!("{name} × {scale}"),
                LayerScale::PerImage(scales) => format!("{name} × {scales:?}"),
            })
            .collect();
        [
            entry.layer.name.clone(),
            entry.processor.name(),
            entry.backend.to_string(),
            or_dash(adapters.join(", ")),
            or_dash(weights(&entry.processor)),
        ]
    }
}

fn or_dash(text: String) -> String {
    if text.is_empty() { "–".into() } else { text }
}

/// How many tensors and bytes a processor holds.
fn weights(processor: &Processor) -> String {
    let weights = processor.weights();
    let bytes = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
    let total: usize = weights.iter().map(|(_, tensor)| bytes(tensor)).sum();
    match weights.len() {
        0 => String::new(),
        tensors => format!("{tensors} tensors, {:.1} KiB", total as f64 / 1024.0),
    }
}
