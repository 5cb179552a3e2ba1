//! The rows as a bar chart in SVG, with its own background so that it reads on any page.

use super::gpu::Cache;
use super::measure::Row;
use super::table::{significant, time};
use std::fmt::Write;

const WIDTH: f64 = 960.0;
const MARGIN: f64 = 24.0;
/// Where bars start: case names end left of it.
const LEFT: f64 = 236.0;
/// Where the axis ends: values and times stand right of the bars.
const RIGHT: f64 = 800.0;
const TOP: f64 = 92.0;
const ROW: f64 = 24.0;
const BAR: f64 = 15.0;
/// Room for a suite's name above its rows.
const GROUP: f64 = 34.0;
const BOTTOM: f64 = 56.0;

const BACKGROUND: &str = "#ffffff";
const BORDER: &str = "#d0d7de";
const GRID: &str = "#e6e9ed";
const INK: &str = "#1f2328";
const FAINT: &str = "#59636e";
/// By direction; told apart by lightness too.
const BARS: [(&str, &str); 3] = [("forward", "#2563a8"), ("backward", "#d9822b"), ("training step", "#5b2a86")];

/// Draws TFLOP/s per case, grouped by suite.
pub(super) fn svg(title: &str, rows: &[Row]) -> String {
    let groups = rows.iter().enumerate().filter(|&(i, row)| i == 0 || rows[i - 1].case.suite != row.case.suite).count();
    let bottom = TOP + groups as f64 * GROUP + rows.len() as f64 * ROW;
    let height = bottom + BOTTOM;
    let fastest = rows.iter().filter_map(Row::tflops).fold(0.0, f64::max);
    let (step, steps) = axis(fastest);
    let x = |tflops: f64| LEFT + (RIGHT - LEFT) * tflops / (step * steps as f64);

    let mut svg = Svg::new(height);
    svg.text(MARGIN, 40.0, "start", 20, INK, &format!("font-weight=\"600\">{}", escape(title)));
    let dtype = rows.first().map_or("", |row| row.dtype.name());
    let subtitle =
        format!("TFLOP/s by case, {dtype}; more is better. Right of each bar: its value and the median time.");
    svg.text(MARGIN, 62.0, "start", 13, FAINT, &format!(">{subtitle}"));
    legend(&mut svg, rows);

    for tick in 0..=steps {
        let value = step * tick as f64;
        let at = x(value);
        let ink = if tick == 0 { FAINT } else { GRID };
        svg.line(&format!(
            "<line x1=\"{at:.1}\" y1=\"{TOP:.1}\" x2=\"{at:.1}\" y2=\"{:.1}\" stroke=\"{ink}\"/>",
            bottom + 6.0
        ));
        svg.text(at, bottom + 22.0, "middle", 12, FAINT, &format!(">{}", label(value, step)));
    }
    svg.text((LEFT + RIGHT) / 2.0, bottom + 42.0, "middle", 12, FAINT, ">TFLOP/s");

    let mut y = TOP;
    for (i, row) in rows.iter().enumerate() {
        if i == 0 || rows[i - 1].case.suite != row.case.suite {
            y += GROUP;
            let suite = escape(row.case.suite);
            svg.text(MARGIN, y - 8.0, "start", 13, INK, &format!("font-weight=\"600\">{suite}"));
        }
        bar(&mut svg, row, y, x(row.tflops().unwrap_or(0.0)));
        y += ROW;
    }
    svg.end()
}

fn bar(svg: &mut Svg, row: &Row, y: f64, end: f64) {
    let middle = y + ROW / 2.0 + 4.0;
    let cache = if row.cache == Some(Cache::Warm) { ", warm" } else { "" };
    svg.text(LEFT - 10.0, middle, "end", 13, INK, &format!(">{}{cache}", escape(&row.case.name)));
    let (Some(tflops), Some(median_us)) = (row.tflops(), row.median_us()) else {
        svg.text(LEFT + 8.0, middle, "start", 12, FAINT, &format!(">{}", row.kernel()));
        return;
    };
    let ink = BARS.iter().find(|(direction, _)| *direction == row.case.pass.name()).map_or(FAINT, |(_, ink)| ink);
    svg.line(&format!(
        "<rect x=\"{LEFT:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{BAR}\" rx=\"2\" fill=\"{ink}\"/>",
        y + (ROW - BAR) / 2.0,
        (end - LEFT).max(1.0)
    ));
    let value = format!("fill=\"{INK}\">{}</tspan>", significant(tflops));
    // A rim in the colour of the page, so that a grid line does not cross a number.
    let rim = format!("paint-order=\"stroke\" stroke=\"{BACKGROUND}\" stroke-width=\"4\"");
    let text = format!("{rim}><tspan {value}<tspan dx=\"8\">{}</tspan>", time(median_us));
    svg.text(end.max(LEFT + 1.0) + 8.0, middle, "start", 12, FAINT, &text);
}

/// Says which colour is which, where there are several.
fn legend(svg: &mut Svg, rows: &[Row]) {
    let mut drawn = BARS.to_vec();
    drawn.retain(|(direction, _)| rows.iter().any(|row| row.case.pass.name() == *direction));
    if drawn.len() < 2 {
        return;
    }
    for (i, (direction, ink)) in drawn.iter().enumerate() {
        let at = WIDTH - MARGIN - 300.0 + 100.0 * i as f64;
        svg.line(&format!("<rect x=\"{at:.1}\" y=\"29\" width=\"12\" height=\"12\" rx=\"2\" fill=\"{ink}\"/>"));
        svg.text(at + 18.0, 40.0, "start", 13, INK, &format!(">{direction}"));
    }
}

/// A step of 1, 2 or 5 times a power of ten, and how many of them, at most six, pass the value.
fn axis(fastest: f64) -> (f64, u32) {
    let fastest = if fastest.is_finite() && fastest > 0.0 { fastest } else { 1.0 };
    let power = 10f64.powf((fastest / 6.0).log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|digit| digit * power).into_iter().find(|step| step * 6.0 >= fastest);
    let step = step.unwrap_or(10.0 * power);
    (step, (fastest / step).ceil() as u32)
}

/// A tick with as many decimals as its step has.
fn label(value: f64, step: f64) -> String {
    let decimals = (-step.log10().floor()).max(0.0) as usize;
    format!("{value:.decimals$}")
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A document that grows line by line. A String takes every write.
struct Svg(String);

impl Svg {
    fn new(height: f64) -> Svg {
        let mut svg = Svg(String::new());
        svg.line(&format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
             viewBox=\"0 0 {WIDTH} {height}\" font-family=\"system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, \
             sans-serif\">"
        ));
        svg.line(&format!(
            "<rect x=\"0.5\" y=\"0.5\" width=\"{}\" height=\"{}\" rx=\"8\" fill=\"{BACKGROUND}\" stroke=\"{BORDER}\"/>",
            WIDTH - 1.0,
            height - 1.0
        ));
        svg
    }

    fn line(&mut self, line: &str) {
        self.0 += line;
        self.0.push('\n');
    }

    /// `rest` is further attributes, the closing angle and the content.
    fn text(&mut self, x: f64, y: f64, anchor: &str, size: u32, ink: &str, rest: &str) {
        let _ = writeln!(
            self.0,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" font-size=\"{size}\" fill=\"{ink}\" {rest}</text>"
        );
    }

    fn end(mut self) -> String {
        self.line("</svg>");
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::measure::{Measured, Trouble};
    use crate::bench::suites::{CASES, Case};
    use fused_attention::{DType, Engine};
    use std::time::Duration;

    /// A row per case, as fast as a GPU might be; one of them refused.
    fn rows() -> Vec<Row> {
        let row = |(i, case): (usize, &'static Case)| Row {
            case,
            engine: Engine::Cuda,
            dtype: DType::F16,
            cache: Some(if i % 2 == 0 { Cache::Cold } else { Cache::Warm }),
            result: match i {
                0 => Err(Trouble::Refused("no kernel".to_string())),
                _ => Ok(Measured { kernel: "forward".to_string(), median: Duration::from_micros(3 + i as u64) }),
            },
        };
        CASES.iter().enumerate().map(row).collect()
    }

    #[test]
    fn every_case_is_drawn_and_both_directions_explained() {
        let chart = svg("a < b & \"c\"", &rows());
        assert!(chart.contains("a &lt; b &amp; &quot;c&quot;"));
        for case in CASES.iter() {
            assert!(chart.contains(&escape(&case.name)), "{}", case.name);
        }
        assert!(chart.contains(">refused<") && chart.contains(", warm<"));
        for (direction, ink) in BARS {
            assert!(chart.contains(&format!(">{direction}<")) && chart.contains(ink));
        }
    }

    #[test]
    fn the_axis_passes_every_value() {
        for value in [0.0, f64::NAN, 1e-9, 0.0035, 0.6, 5.999, 6.0, 6.001, 592.0, 989.0, 1e5] {
            let (step, steps) = axis(value);
            assert!(step > 0.0 && (1..=6).contains(&steps), "{value}: {steps} of {step}");
            assert!(value.is_nan() || step * f64::from(steps) >= value, "{value}: {steps} of {step}");
        }
    }
}
