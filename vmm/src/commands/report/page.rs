//! The page: HTML with its pictures in it. No script and nothing from elsewhere; what the trace says is escaped.

use std::fmt::{self, Write};

use super::charts;
use super::grid::{COLUMNS, Grid};
use super::summary::{Container, Event, Summary};
use super::text::{Text, bytes, duration, kind_of_container, moment, seconds};

/// What a reader's browser may do with the page, in case something was forgotten: show it.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'";
const STYLE: &str = "
:root{color-scheme:light dark;
--ink:#1c1c1c;--paper:#fff;--faint:#d8d8d8;--map:#2f74c0;--unmap:#e08a1e;--bad:#c62828;--cut:#8a4fbf}
@media(prefers-color-scheme:dark){:root{
--ink:#e4e4e4;--paper:#161616;--faint:#3a3a3a;--map:#6aa9ee;--unmap:#f0a94a;--bad:#ff6b6b;--cut:#c39bf0}}
body{font:14px/1.45 system-ui,sans-serif;color:var(--ink);background:var(--paper);
margin:2em auto;max-width:70em;padding:0 1em}
h1{font-size:1.6em;margin-bottom:0;overflow-wrap:anywhere}h2{font-size:1.25em;margin:1.6em 0 .2em}
h3{font-size:1em;margin:1.2em 0 .2em}p{margin:.2em 0 .6em}.note{opacity:.75;max-width:60em}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(13em,1fr));gap:.7em;margin:1.2em 0}
dl div{border:1px solid var(--faint);border-radius:6px;padding:.4em .8em}
dt{opacity:.75;font-size:.9em}dd{margin:0;font-size:1.4em}.alarm dd{color:var(--bad);font-weight:bold}
table{border-collapse:collapse;margin:.5em 0 1.5em}
th,td{padding:.2em .8em;text-align:left;border-bottom:1px solid var(--faint);overflow-wrap:anywhere}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
svg{width:100%;height:auto}rect{shape-rendering:crispEdges}svg text{fill:var(--ink);font-size:11px}
.map{fill:var(--map);background:var(--map)}.unmap{fill:var(--unmap);background:var(--unmap)}
.bad{fill:var(--bad);background:var(--bad)}.cut{fill:var(--cut);background:var(--cut)}
.row{fill:transparent}.row:hover{fill:var(--faint);fill-opacity:.5}.axis{stroke:var(--faint)}
.keys span{margin-right:1.4em;white-space:nowrap}.keys i{display:inline-block;width:.8em;height:.8em;margin-right:.35em}
";

/// A column of a table: its name, and whether it has numbers.
type Column = (&'static str, bool);

const fn text(name: &'static str) -> Column {
    (name, false)
}

const fn number(name: &'static str) -> Column {
    (name, true)
}

/// A table; cells are text. One without rows is a word.
fn table(out: &mut String, columns: &[Column], rows: &[Vec<String>]) -> fmt::Result {
    if rows.is_empty() {
        out.push_str("<p>None.</p>\n");
        return Ok(());
    }
    let class = |is_number: bool| if is_number { " class=\"number\"" } else { "" };
    out.push_str("<table><tr>");
    columns.iter().try_for_each(|(name, number)| write!(out, "<th{}>{}</th>", class(*number), Text(name)))?;
    out.push_str("</tr>\n");
    for row in rows {
        out.push_str("<tr>");
        let cells = columns.iter().zip(row);
        cells
            .into_iter()
            .try_for_each(|((_, number), cell)| write!(out, "<td{}>{}</td>", class(*number), Text(cell)))?;
        out.push_str("</tr>\n");
    }
    out.push_str("</table>\n");
    Ok(())
}

fn events(out: &mut String, columns: &[Column], events: &[Event], with_time: bool) -> fmt::Result {
    let row = |event: &Event| {
        let mut row = vec![event.text.clone(), seconds(event.time)];
        row.extend(with_time.then(|| duration(event.ns)));
        row
    };
    table(out, columns, &events.iter().map(row).collect::<Vec<_>>())
}

/// The numbers at the top.
fn totals(out: &mut String, summary: &Summary) -> fmt::Result {
    let of_all = |count: fn(&Container) -> u64| summary.containers.0.values().map(count).fold(0, u64::saturating_add);
    let failed = of_all(|of| of.failed);
    let totals = [
        ("seconds", seconds(summary.end), false),
        ("host maps", of_all(|of| of.maps).to_string(), false),
        ("host unmaps", of_all(|of| of.unmaps).to_string(), false),
        ("batches of notifications", summary.batches.to_string(), false),
        ("operations that the host refused", failed.to_string(), failed != 0),
        ("mappings that did not become real", summary.refused.to_string(), summary.refused != 0),
        ("remainders of mappings that were cut", of_all(|of| of.remainders).to_string(), false),
        ("lines that are not of a trace", summary.others.to_string(), summary.others != 0),
    ];
    out.push_str("<dl>");
    for (what, count, is_bad) in totals {
        let class = if is_bad { " class=\"alarm\"" } else { "" };
        writeln!(out, "<div{class}><dt>{what}</dt><dd>{count}</dd></div>")?;
    }
    out.push_str("</dl>\n");
    Ok(())
}

fn pictures(out: &mut String, summary: &Summary, grids: &[(String, Grid)]) -> fmt::Result {
    out.push_str(
        "<h2>Host operations a second</h2>\n\
         <p class=\"keys\"><span><i class=\"map\"></i>maps</span><span><i class=\"unmap\"></i>unmaps</span>\
         <span><i class=\"bad\"></i>refused: what the guest asked for and did not get</span>\
         <span><i class=\"cut\"></i>remainders: maps of what was left of a mapping that was cut</span></p>\n",
    );
    charts::operations(out, summary)?;
    writeln!(
        out,
        "<h2>Mapped addresses over time</h2>\n<p class=\"note\">What the devices of a container could reach \
         (blue), as they address it: I/O virtual addresses, growing upwards. Ranges that \
         were never mapped are left out, and a large range is drawn smaller than it is. What was away for less than \
         {} at a time, a column, need not show.</p>",
        duration(summary.end / COLUMNS as u64)
    )?;
    for (container, grid) in grids {
        let kind = kind_of_container(container);
        let colon = if kind.is_empty() { "" } else { ": " };
        writeln!(out, "<h3>Container {}{colon}{kind}</h3>", Text(container))?;
        if grid.lost > 0 {
            writeln!(out, "<p class=\"note\">{} mappings are not in the picture: too many at a time.</p>", grid.lost)?;
        }
        charts::addresses(out, grid, summary.end)?;
    }
    if grids.len() < summary.containers.0.len() {
        let more = summary.containers.0.len() - grids.len();
        writeln!(out, "<p class=\"note\">{more} more are in the table alone.</p>")?;
    }
    Ok(())
}

fn tables(out: &mut String, summary: &Summary) -> fmt::Result {
    out.push_str("<h2>Functions</h2>\n<p class=\"note\">Assigned devices, by their address in the guest.</p>\n");
    let functions = summary.functions.0.iter().map(|(name, of)| {
        let causes: Vec<String> = of.refused.iter().map(|(cause, count)| format!("{cause} {count}")).collect();
        vec![name.clone(), of.attaches.to_string(), of.failed.to_string(), of.space.clone(), causes.join(", ")]
    });
    let columns =
        [text("function"), number("moves to a space"), number("that failed"), text("last space"), text("refused")];
    table(out, &columns, &functions.collect::<Vec<_>>())?;

    out.push_str(
        "<h2>Spaces of the guest</h2>\n<p class=\"note\">The guest's page tables, and what it granted in each and took \
         back. Replayed: granted already when a function came.</p>\n",
    );
    let spaces = summary.spaces.0.iter().map(|(name, of)| {
        let counts = [of.maps, of.unmaps, of.replays, of.refused];
        [name.clone()].into_iter().chain(counts.iter().map(u64::to_string)).collect()
    });
    let columns = [text("space"), number("maps"), number("unmaps"), number("replayed"), number("refused")];
    table(out, &columns, &spaces.collect::<Vec<_>>())?;

    out.push_str(
        "<h2>Containers</h2>\n<p class=\"note\">What the host maps for functions that it cannot tell apart: a group, or \
         a process.</p>\n",
    );
    let containers = summary.containers.0.iter().map(|(name, of)| {
        let counts = [of.maps, of.unmaps, of.failed, of.remainders].map(|count| count.to_string());
        let sizes = [bytes(of.mapped), bytes(of.unmapped), duration(of.ns)];
        [name.clone(), kind_of_container(name).to_owned()].into_iter().chain(counts).chain(sizes).collect()
    });
    let columns = [
        text("container"),
        text("is"),
        number("maps"),
        number("unmaps"),
        number("refused"),
        number("remainders"),
        number("mapped"),
        number("unmapped"),
        number("host time"),
    ];
    table(out, &columns, &containers.collect::<Vec<_>>())?;

    out.push_str("<h2>What did not become real</h2>\n");
    if summary.refused != 0 {
        writeln!(
            out,
            "<p class=\"note\">The first {} of {}. Each function has a fault record for each cause; faults of \
             accesses are not in a trace.</p>",
            summary.refusals.len(),
            summary.refused
        )?;
    }
    events(out, &[text("what"), number("at second")], &summary.refusals, false)?;
    out.push_str("<h2>The slowest host operations</h2>\n");
    events(out, &[text("what"), number("at second"), number("took")], &summary.slowest, true)
}

/// The page about the trace that is called `name`, with pictures of these containers.
pub fn page(name: &str, summary: &Summary, grids: &[(String, Grid)]) -> Result<String, fmt::Error> {
    let mut out = String::new();
    let name = Text(name);
    writeln!(
        out,
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{POLICY}\">\
         <title>causeway report: {name}</title><style>{STYLE}</style></head><body>\n<h1>{name}</h1>\n\
         <p class=\"note\">What a guest asked of its IOMMU in {}, and what the host's did for it: {} lines.</p>",
        moment(summary.end, summary.end),
        summary.lines
    )?;
    totals(&mut out, summary)?;
    pictures(&mut out, summary, grids)?;
    tables(&mut out, summary)?;
    out.push_str("</body></html>\n");
    Ok(out)
}
