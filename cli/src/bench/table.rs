//! The rows as a table for the terminal.

use super::gpu::Cache;
use super::measure::Row;

const HEAD: [&str; 13] =
    ["suite", "case", "kernel", "dtype", "cache", "b", "h", "sq", "skv", "d", "median", "TFLOP/s", "GB/s"];
/// Columns of words; the others are numbers and end at their right edge.
const WORDS: usize = 5;
/// What stands where a row has nothing.
const NOTHING: &str = "–";

pub(super) fn aligned(rows: &[Row]) -> String {
    let mut lines = vec![HEAD.map(String::from).to_vec()];
    for row in rows {
        let case = row.case;
        let skv: Vec<String> = case.keys().iter().map(usize::to_string).collect();
        let number = |value: Option<f64>, text: fn(f64) -> String| value.map_or(NOTHING.to_string(), text);
        lines.push(vec![
            case.suite.to_string(),
            case.name.clone(),
            row.kernel().to_string(),
            row.dtype.name().to_string(),
            row.cache.map_or(NOTHING, Cache::name).to_string(),
            case.batch.to_string(),
            case.heads.to_string(),
            case.seq_q.to_string(),
            skv.join("+"),
            case.head_dim.to_string(),
            number(row.median_us(), time),
            number(row.tflops(), significant),
            number(row.gbytes_per_s(), significant),
        ]);
    }
    let columns = lines[0].len();
    let widths: Vec<usize> =
        (0..columns).map(|c| lines.iter().map(|line| line[c].chars().count()).max().unwrap_or(0)).collect();
    let mut text = String::new();
    for line in lines {
        let cells = line.iter().zip(&widths).enumerate();
        let cells = cells.map(|(c, (cell, &w))| if c < WORDS { format!("{cell:w$}") } else { format!("{cell:>w$}") });
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

/// A time in the unit that fits.
pub(super) fn time(us: f64) -> String {
    match us {
        _ if us < 1e3 => format!("{} us", significant(us)),
        _ if us < 1e6 => format!("{} ms", significant(us / 1e3)),
        _ => format!("{} s", significant(us / 1e6)),
    }
}

/// Three digits, or all before the point.
pub(super) fn significant(value: f64) -> String {
    const MOST_DECIMALS: f64 = 6.0;
    let decimals = (2.0 - value.log10().floor()).clamp(0.0, MOST_DECIMALS) as usize;
    format!("{value:.decimals$}")
}
