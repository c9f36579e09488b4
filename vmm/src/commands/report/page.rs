//! The page: HTML with its pictures in it. No script and nothing from elsewhere; what the trace says is escaped.

use std::fmt::{self, Write};

use super::grid::{COLUMNS, Grid};
use super::summary::{Event, Span, Summary};

/// What a reader's browser may do with the page, in case something was forgotten: show it.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'";
const STYLE: &str = "
:root{color-scheme:light dark;
--ink:#1c1c1c;--paper:#fff;--faint:#d8d8d8;--map:#2f74c0;--unmap:#e08a1e;--bad:#c62828}
@media(prefers-color-scheme:dark){:root{
--ink:#e4e4e4;--paper:#161616;--faint:#3a3a3a;--map:#6aa9ee;--unmap:#f0a94a;--bad:#ff6b6b}}
body{font:14px/1.45 system-ui,sans-serif;color:var(--ink);background:var(--paper);
margin:2em auto;max-width:70em;padding:0 1em}
table{border-collapse:collapse;margin:.5em 0 1.5em}
th,td{padding:.2em .8em;text-align:right;border-bottom:1px solid var(--faint);overflow-wrap:anywhere}
th:first-child,td:first-child{text-align:left}
svg{width:100%;height:auto}rect{shape-rendering:crispEdges}svg text{fill:var(--ink);font-size:11px}
.map{fill:var(--map)}.unmap{fill:var(--unmap)}.bad{fill:var(--bad)}.axis{stroke:var(--faint)}.note{opacity:.75}
";

/// Text that is no markup, whatever it is.
pub struct Text<'a>(pub &'a str);

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|letter| match letter {
            '&' => f.write_str("&amp;"),
            '<' => f.write_str("&lt;"),
            '>' => f.write_str("&gt;"),
            '"' => f.write_str("&quot;"),
            '\'' => f.write_str("&#39;"),
            // Nor does it change the direction of what stands beside it.
            letter if letter.is_control() || ('\u{202a}'..='\u{202e}').contains(&letter) => f.write_char('\u{fffd}'),
            letter => f.write_char(letter),
        })
    }
}

fn seconds(ns: u64) -> String {
    format!("{}.{:03}", ns / 1_000_000_000, ns / 1_000_000 % 1000)
}

fn microseconds(ns: u64) -> String {
    format!("{}.{}", ns / 1000, ns / 100 % 10)
}

/// A table; cells are text.
fn table(out: &mut String, heading: &[&str], rows: &[Vec<String>]) -> fmt::Result {
    out.push_str("<table><tr>");
    heading.iter().try_for_each(|cell| write!(out, "<th>{}</th>", Text(cell)))?;
    out.push_str("</tr>\n");
    for row in rows {
        out.push_str("<tr>");
        row.iter().try_for_each(|cell| write!(out, "<td>{}</td>", Text(cell)))?;
        out.push_str("</tr>\n");
    }
    out.push_str("</table>\n");
    Ok(())
}

/// Operations a second: bars of maps and unmaps, and below them what was refused and what was cut.
fn operations(out: &mut String, summary: &Summary) -> fmt::Result {
    let (width, height) = (960.0, 160.0);
    let most = summary.spans.iter().map(|span| span.maps + span.unmaps).max().unwrap_or(0).max(1);
    let count = summary.spans.len().max(1);
    let bar = width / count as f64;
    let a_second = |count: u64| u128::from(count) * 1_000_000_000 / u128::from(summary.span.max(1));
    writeln!(out, "<svg viewBox=\"0 0 1000 210\" role=\"img\" aria-label=\"host operations a second\">")?;
    writeln!(out, "<text x=\"0\" y=\"12\">{} a second</text>", a_second(most))?;
    writeln!(out, "<line class=\"axis\" x1=\"0\" y1=\"{0}\" x2=\"{width}\" y2=\"{0}\"/>", height + 20.0)?;
    for (at, Span { maps, unmaps, refused, remainders }) in summary.spans.iter().enumerate() {
        let x = at as f64 * bar;
        let high = |count: u64| count as f64 / most as f64 * height;
        let (maps_high, unmaps_high) = (high(*maps), high(*unmaps));
        let mut part = |class: &str, y: f64, high: f64, what: &str, count: u64| {
            if count == 0 {
                return Ok(());
            }
            let time = seconds(summary.span.saturating_mul(at as u64));
            writeln!(
                out,
                "<rect class=\"{class}\" x=\"{x:.2}\" y=\"{y:.2}\" width=\"{bar:.2}\" height=\"{high:.2}\">\
                 <title>{time} s: {count} {what}</title></rect>"
            )
        };
        part("map", height + 20.0 - maps_high, maps_high, "maps", *maps)?;
        part("unmap", height + 20.0 - maps_high - unmaps_high, unmaps_high, "unmaps", *unmaps)?;
        part("bad", height + 24.0, 6.0, "refused", *refused)?;
        part("unmap", height + 32.0, 4.0, "maps of what was left of a mapping that was cut", *remainders)?;
    }
    let end = seconds(summary.span.saturating_mul(count as u64));
    writeln!(
        out,
        "<text x=\"0\" y=\"208\">0 s</text><text x=\"{width}\" y=\"208\" text-anchor=\"end\">{end} s</text>"
    )?;
    out.push_str("</svg>\n");
    Ok(())
}

/// What a container held, over time.
fn addresses(out: &mut String, grid: &Grid, end: u64) -> fmt::Result {
    let (cell_width, cell_high, left) = (5.0, 4.0, 190.0);
    let gap = 14.0;
    let high = grid.cells.len() as f64 * cell_high + grid.bands.len() as f64 * gap + 20.0;
    writeln!(out, "<svg viewBox=\"0 0 1000 {high}\" role=\"img\" aria-label=\"mapped addresses over time\">")?;
    for (number, band) in grid.bands.iter().enumerate() {
        // The lowest band is at the bottom, as addresses grow upwards.
        let top = |row: usize| {
            let below = row as f64 * cell_high + number as f64 * gap;
            high - 20.0 - below - cell_high
        };
        let (first, last) = (band.row, band.row + band.rows - 1);
        writeln!(
            out,
            "<text x=\"0\" y=\"{:.1}\">{:#x}</text>\
             <line class=\"axis\" x1=\"{left}\" y1=\"{2:.1}\" x2=\"990\" y2=\"{2:.1}\"/>",
            top(first) + cell_high,
            band.range.first,
            top(first) + cell_high,
        )?;
        if band.rows > 4 {
            writeln!(out, "<text x=\"0\" y=\"{:.1}\">{:#x}</text>", top(last) + 8.0, band.range.last)?;
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
                        left + at as f64 * cell_width,
                        top(row),
                        run as f64 * cell_width,
                    )?;
                }
                at += run;
            }
        }
    }
    let (y, right) = (high - 4.0, left + COLUMNS as f64 * cell_width);
    writeln!(
        out,
        "<text x=\"{left}\" y=\"{y:.1}\">0 s</text>\
         <text x=\"{right}\" y=\"{y:.1}\" text-anchor=\"end\">{} s</text></svg>",
        seconds(end)
    )
}

fn events(out: &mut String, heading: &[&str], events: &[Event], with_time: bool) -> fmt::Result {
    let row = |event: &Event| {
        let mut row = vec![event.text.clone(), seconds(event.time)];
        row.extend(with_time.then(|| microseconds(event.ns)));
        row
    };
    table(out, heading, &events.iter().map(row).collect::<Vec<_>>())
}

/// The page about the trace that is called `name`, with pictures of these containers.
pub fn page(name: &str, summary: &Summary, grids: &[(String, Grid)]) -> Result<String, fmt::Error> {
    let mut out = String::new();
    let name = Text(name);
    writeln!(
        out,
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{POLICY}\">\
         <title>causeway report: {name}</title><style>{STYLE}</style></head><body>\n<h1>{name}</h1>"
    )?;
    let of_all = |count: fn(&super::summary::Container) -> u64| {
        summary.containers.0.values().map(count).fold(0, u64::saturating_add)
    };
    let totals = [
        ("seconds", seconds(summary.end)),
        ("host maps", of_all(|of| of.maps).to_string()),
        ("host unmaps", of_all(|of| of.unmaps).to_string()),
        ("refused by the host", of_all(|of| of.failed).to_string()),
        ("mappings that did not become real", summary.refused.to_string()),
        ("maps of what was left of a mapping that was cut", of_all(|of| of.remainders).to_string()),
        ("batches of notifications", summary.batches.to_string()),
        ("lines", summary.lines.to_string()),
        ("lines that are not of a trace", summary.others.to_string()),
    ];
    let totals: Vec<Vec<String>> = totals.into_iter().map(|(what, count)| vec![what.to_owned(), count]).collect();
    table(&mut out, &["the whole", ""], &totals)?;

    out.push_str(
        "<h2>Host operations a second</h2>\n<p class=\"note\">Blue: maps. Orange: unmaps. Below, red: what did not \
                  become real; orange: maps of what was left of a mapping that was cut.</p>\n",
    );
    operations(&mut out, summary)?;

    out.push_str("<h2>Mapped addresses over time</h2>\n");
    for (container, grid) in grids {
        writeln!(out, "<h3>Container {}</h3>", Text(container))?;
        if grid.lost > 0 {
            writeln!(out, "<p class=\"note\">{} mappings are not in the picture: too many at a time.</p>", grid.lost)?;
        }
        addresses(&mut out, grid, summary.end)?;
    }
    if grids.len() < summary.containers.0.len() {
        let more = summary.containers.0.len() - grids.len();
        writeln!(out, "<p class=\"note\">{more} more are in the table alone.</p>")?;
    }

    out.push_str("<h2>Functions</h2>\n");
    let functions = summary.functions.0.iter().map(|(name, of)| {
        let causes: Vec<String> = of.refused.iter().map(|(cause, count)| format!("{cause} {count}")).collect();
        vec![name.clone(), of.attaches.to_string(), of.failed.to_string(), of.space.clone(), causes.join(", ")]
    });
    let heading = ["function", "attached", "in vain", "last space", "refused"];
    table(&mut out, &heading, &functions.collect::<Vec<_>>())?;

    out.push_str("<h2>Spaces of the guest</h2>\n");
    let spaces = summary.spaces.0.iter().map(|(name, of)| {
        let counts = [of.maps, of.unmaps, of.replays, of.refused];
        [name.clone()].into_iter().chain(counts.iter().map(u64::to_string)).collect()
    });
    table(&mut out, &["space", "maps", "unmaps", "replayed", "refused"], &spaces.collect::<Vec<_>>())?;

    out.push_str("<h2>Containers</h2>\n");
    let containers = summary.containers.0.iter().map(|(name, of)| {
        let counts = [of.maps, of.unmaps, of.failed, of.remainders, of.mapped, of.unmapped, of.ns / 1000];
        [name.clone()].into_iter().chain(counts.iter().map(u64::to_string)).collect()
    });
    let heading =
        ["container", "maps", "unmaps", "refused", "remainders", "bytes mapped", "bytes unmapped", "host time, us"];
    table(&mut out, &heading, &containers.collect::<Vec<_>>())?;

    writeln!(
        out,
        "<h2>What did not become real</h2>\n<p class=\"note\">The first {} of {}. Each function has a fault \
                   record for each cause; faults of accesses are not in a trace.</p>",
        summary.refusals.len(),
        summary.refused
    )?;
    events(&mut out, &["what", "second"], &summary.refusals, false)?;
    out.push_str("<h2>The slowest host operations</h2>\n");
    events(&mut out, &["what", "second", "us"], &summary.slowest, true)?;
    out.push_str("</body></html>\n");
    Ok(out)
}
