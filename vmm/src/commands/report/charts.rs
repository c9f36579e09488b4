//! The pictures of the page: SVG, with one axis of time for all, so that what is above each other is at the same time.

use std::fmt::{self, Write};

use super::grid::{COLUMNS, Grid};
use super::summary::{Span, Summary};
use super::text::{Text, moment, seconds};

/// The whole picture and where its data begins and ends, in units of the picture.
const WIDTH: f64 = 1000.0;
const LEFT: f64 = 170.0;
const RIGHT: f64 = 985.0;
/// Of the bars.
const HIGH: f64 = 160.0;
const TOP: f64 = 14.0;
/// Times that are named below a picture.
const TICKS: u64 = 5;

/// The lines and names of the axis of time, in a picture whose data ends at `bottom`.
fn times(out: &mut String, end: u64, top: f64, bottom: f64) -> fmt::Result {
    for tick in 0..=TICKS {
        let x = LEFT + (RIGHT - LEFT) * tick as f64 / TICKS as f64;
        let time = u128::from(end) * u128::from(tick) / u128::from(TICKS);
        let anchor = if tick == TICKS { "end" } else { "middle" };
        writeln!(
            out,
            "<line class=\"axis\" x1=\"{x:.1}\" y1=\"{top:.1}\" x2=\"{x:.1}\" y2=\"{bottom:.1}\"/>\
             <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{}</text>",
            bottom + 14.0,
            moment(time as u64, end),
        )?;
    }
    Ok(())
}

/// A name at the left.
fn label(out: &mut String, y: f64, text: &str) -> fmt::Result {
    writeln!(out, "<text x=\"{}\" y=\"{y:.1}\" text-anchor=\"end\">{}</text>", LEFT - 8.0, Text(text))
}

/// Operations a second: bars of maps and unmaps, and below them what was refused and what was cut.
pub fn operations(out: &mut String, summary: &Summary) -> fmt::Result {
    let most = summary.spans.iter().map(|span| span.maps + span.unmaps).max().unwrap_or(0).max(1);
    let end = summary.end.max(1);
    // The last span may reach beyond the end of the trace.
    let place = |at: usize| {
        let time = (summary.span as f64 * at as f64).min(end as f64);
        LEFT + (RIGHT - LEFT) * time / end as f64
    };
    let a_second = |count: u64| u128::from(count) * 1_000_000_000 / u128::from(summary.span.max(1));
    let (zero, refused, remainders) = (TOP + HIGH, TOP + HIGH + 6.0, TOP + HIGH + 22.0);
    let bottom = remainders + 12.0;
    writeln!(
        out,
        "<svg viewBox=\"0 0 {WIDTH} {:.0}\" role=\"img\" aria-label=\"host operations a second\">",
        bottom + 22.0
    )?;
    times(out, end, TOP, bottom)?;
    for (y, count) in [(TOP, a_second(most)), (TOP + HIGH / 2.0, a_second(most) / 2), (zero, 0)] {
        writeln!(out, "<line class=\"axis\" x1=\"{LEFT}\" y1=\"{y}\" x2=\"{RIGHT}\" y2=\"{y}\"/>")?;
        label(out, y + 4.0, &format!("{count}/s"))?;
    }
    label(out, refused + 11.0, "refused")?;
    label(out, remainders + 11.0, "remainders")?;
    for (at, Span { maps, unmaps, refused: lost, remainders: cut }) in summary.spans.iter().enumerate() {
        let (x, width) = (place(at), (place(at + 1) - place(at)).max(0.8));
        let high = |count: u64| count as f64 / most as f64 * HIGH;
        let mut part = |class: &str, y: f64, high: f64, what: &str, count: u64| {
            if count == 0 {
                return Ok(());
            }
            let time = seconds(summary.span.saturating_mul(at as u64));
            writeln!(
                out,
                "<rect class=\"{class}\" x=\"{x:.2}\" y=\"{y:.2}\" width=\"{width:.2}\" height=\"{high:.2}\">\
                 <title>{time} s: {count} {what}</title></rect>"
            )
        };
        part("map", zero - high(*maps), high(*maps), "maps", *maps)?;
        part("unmap", zero - high(*maps + *unmaps), high(*unmaps), "unmaps", *unmaps)?;
        part("bad", refused, 12.0, "refused", *lost)?;
        part("cut", remainders, 12.0, "remainders", *cut)?;
    }
    out.push_str("</svg>\n");
    Ok(())
}

/// What a container held, over time.
pub fn addresses(out: &mut String, grid: &Grid, end: u64) -> fmt::Result {
    let (cell_width, cell_high, gap) = ((RIGHT - LEFT) / COLUMNS as f64, 4.0, 16.0);
    let bottom = grid.cells.len() as f64 * cell_high + grid.bands.len() as f64 * gap;
    writeln!(
        out,
        "<svg viewBox=\"0 0 {WIDTH} {:.0}\" role=\"img\" aria-label=\"mapped addresses over time\">",
        bottom + 22.0
    )?;
    times(out, end, gap, bottom)?;
    for (number, band) in grid.bands.iter().enumerate() {
        // The lowest band is at the bottom, as addresses grow upwards.
        let top = |row: usize| bottom - row as f64 * cell_high - number as f64 * gap - cell_high;
        let (first, last) = (band.row, band.row + band.rows - 1);
        label(out, top(first) + cell_high, &format!("{:#x}", band.range.first))?;
        if band.rows > 4 {
            label(out, top(last) + 8.0, &format!("{:#x}", band.range.last))?;
        }
        for row in first..=last {
            let cells = &grid.cells[row];
            let mut at = 0;
            while at < COLUMNS {
                let run = cells[at..].iter().take_while(|cell| **cell == cells[at]).count();
                if cells[at] {
                    writeln!(
                        out,
                        "<rect class=\"map\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{cell_high}\"/>",
                        LEFT + at as f64 * cell_width,
                        top(row),
                        run as f64 * cell_width,
                    )?;
                }
                at += run;
            }
            // On top of it, to be pointed at.
            let range = band.addresses(row - first);
            writeln!(
                out,
                "<rect class=\"row\" x=\"{LEFT}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{cell_high}\">\
                 <title>{:#x}-{:#x}</title></rect>",
                top(row),
                RIGHT - LEFT,
                range.first,
                range.last,
            )?;
        }
    }
    out.push_str("</svg>\n");
    Ok(())
}
