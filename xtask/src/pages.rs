//! The tests that look at `causeway report`'s page in a real browser ([`crate::browser`]): pictures of a real run's
//! trace, and that the page asks for nothing and runs nothing.

use crate::browser::{self, Browser, Pixels, Seen, View};
use crate::cache::{Cache, progress};
use crate::cases::in_ci;
use crate::images::{self, Built};
use crate::report::{Outcome, Reporter};
use crate::screenshots;
use crate::terminal::Tmux;
use crate::traced::{self, Running};
use anyhow::{Context, Result, ensure};
use regex::Regex;
use std::cell::OnceCell;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What each test is given.
struct Rig {
    cache: Cache,
    browser: Browser,
    tmux: Tmux,
    built: Built,
    folder: PathBuf,
    /// Of a run in which pages are mapped and unmapped while the device accesses them.
    trace: String,
    /// Its page, and what was seen of it.
    light: OnceCell<(String, Seen)>,
}

type Test = (&'static str, fn(&Rig) -> Result<()>);

const TESTS: [Test; 5] = [
    ("report_draws_what_the_trace_has", report_draws_what_the_trace_has),
    ("report_has_colours_for_light_and_for_dark", report_has_colours_for_light_and_for_dark),
    ("report_asks_for_nothing_and_runs_nothing", report_asks_for_nothing_and_runs_nothing),
    ("report_of_a_large_trace_is_shown_whole", report_of_a_large_trace_is_shown_whole),
    ("top_is_seen_at_a_real_terminal", top_is_seen_at_a_real_terminal),
];

const LIGHT: View = View { width: 1100, height: 1500, dark: false };
const DARK: View = View { dark: true, ..LIGHT };
/// More than the page of any trace has (docs/tracing.md).
const LARGEST_PAGE: usize = 4 << 20;
/// Operations of the large trace.
const LARGE: u64 = 300_000;

/// What the tests are called in a list of all.
pub fn names() -> impl Iterator<Item = String> {
    TESTS.iter().map(|(name, _)| format!("browser::{name}"))
}

/// Runs those that are wanted, and tells how each ended.
pub fn run(cache: impl FnOnce() -> Result<Cache>, wanted: impl Fn(&str) -> bool, reporter: &Reporter) {
    let tests: Vec<(String, &Test)> = names().zip(&TESTS).filter(|(name, _)| wanted(name)).collect();
    if tests.is_empty() {
        return;
    }
    let start = Instant::now();
    let rig = Rig::new(cache);
    reporter.took("a browser, and a run to look at", start.elapsed());
    for (name, (_, test)) in tests {
        let start = Instant::now();
        let outcome = match &rig {
            Ok(rig) => match test(rig) {
                Ok(()) => Outcome::Passed,
                Err(error) => Outcome::Failed(format!("{error:#}")),
            },
            Err(Without::Reason(reason)) => Outcome::Skipped(reason.replace('\n', " ")),
            Err(Without::Error(error)) => Outcome::Failed(format!("{error:#}")),
        };
        reporter.add(&name, outcome, Some(start.elapsed()));
    }
}

/// Why there is nothing to test with.
enum Without {
    /// This machine has none of it.
    Reason(String),
    Error(anyhow::Error),
}

impl From<anyhow::Error> for Without {
    fn from(error: anyhow::Error) -> Self {
        Self::Error(error)
    }
}

impl Rig {
    fn new(cache: impl FnOnce() -> Result<Cache>) -> Result<Self, Without> {
        if let Some(reason) = traced::unable() {
            return Err(Without::Reason(reason.to_owned()));
        }
        let cache = cache()?;
        let without = |what: &str, error: anyhow::Error| match in_ci() {
            true => Without::Error(error),
            false => Without::Reason(format!("there is no {what}: {error:#}")),
        };
        let browser = browser::find(&cache).map_err(|error| without("browser", error))?;
        let tmux = Tmux::find(&cache).map_err(|error| without("tmux", error))?;
        progress("a run to look at");
        let (built, folder) = (images::program()?, browser::folder(&cache)?);
        let (file, log) = (folder.join("run.trace"), folder.join("run.log"));
        let trace = file.display().to_string();
        let (words, options) = ("test=a6_page_moves_under_dma", ["--cpus", "2", "--trace", &trace]);
        Running::start(&built.causeway, &built.suite, words, &options, &log)
            .and_then(Running::finish)
            .with_context(|| std::fs::read_to_string(&log).unwrap_or_default())?;
        let trace = std::fs::read_to_string(&file).context("the run left no trace")?;
        Ok(Self { cache, browser, tmux, built, folder, trace, light: OnceCell::new() })
    }

    /// The page of a trace, and where it is.
    fn page(&self, name: &str, trace: &str) -> Result<(PathBuf, String)> {
        let file = self.folder.join(format!("{name}.trace"));
        std::fs::write(&file, trace)?;
        let page = traced::report(&self.built.causeway, &file)?;
        let text = std::fs::read_to_string(&page)?;
        Ok((page, text))
    }

    /// The page of the run's trace, and what is seen of it.
    fn light(&self) -> Result<&(String, Seen)> {
        if let Some(seen) = self.light.get() {
            return Ok(seen);
        }
        let (page, text) = self.page("light", &self.trace)?;
        let seen = self.look(&page, LIGHT)?;
        Ok(self.light.get_or_init(|| (text, seen)))
    }

    fn look(&self, page: &Path, view: View) -> Result<Seen> {
        self.browser.look(page, view, &page.with_extension("png"))
    }
}

/// What the marks of one kind stand for in all: the sum of the numbers that their tips have before `what`.
fn marks(dom: &str, what: &str) -> Result<u64> {
    let tip = Regex::new(&format!(r"<title>[0-9.]+ s: ([0-9]+) {what}</title>"))?;
    tip.captures_iter(dom).map(|found| Ok(found[1].parse::<u64>()?)).sum()
}

/// How many lines of the trace are of an operation.
fn lines(trace: &str, operation: &str) -> u64 {
    let of = |line: &&str| line.split_once(' ').is_some_and(|(_, rest)| rest.starts_with(operation));
    trace.lines().filter(of).count() as u64
}

/// A colour of the page: as it is named, for light and for dark.
fn colours(page: &str, name: &str) -> Result<[[u8; 3]; 2]> {
    let hex = Regex::new(&format!("--{name}:#([0-9a-f]+)"))?;
    let found: Vec<String> = hex.captures_iter(page).map(|found| found[1].to_owned()).collect();
    ensure!(found.len() == 2, "the page has {} colours {name}", found.len());
    let parts = |text: &String| -> Result<[u8; 3]> {
        let long = if text.len() == 3 { text.chars().flat_map(|digit| [digit, digit]).collect() } else { text.clone() };
        let number = u32::from_str_radix(&long, 16)?;
        Ok([(number >> 16) as u8, (number >> 8) as u8, number as u8])
    };
    Ok([parts(&found[0])?, parts(&found[1])?])
}

fn report_draws_what_the_trace_has(rig: &Rig) -> Result<()> {
    let (text, seen) = rig.light()?;
    for (operation, what) in [("host map ", "maps"), ("host unmap ", "unmaps"), ("notify refused ", "refused")] {
        let (there, drawn) = (lines(&rig.trace, operation), marks(&seen.dom, what)?);
        ensure!(there == drawn, "the trace has {there} lines of `{operation}`, the pictures have marks for {drawn}");
    }
    ensure!(lines(&rig.trace, "host map ") > 50, "the run did next to nothing");
    let named = format!("<dt>host maps</dt><dd>{}</dd>", lines(&rig.trace, "host map "));
    ensure!(seen.dom.contains(&named), "the page does not say {named}");
    ensure!(seen.dom.matches("<svg").count() == 2, "two pictures were expected");

    let pixels = Pixels::read(&seen.picture)?;
    ensure!((pixels.width, pixels.height) == (LIGHT.width, LIGHT.height), "it is {}x{}", pixels.width, pixels.height);
    // A page without letters has a dozen: theirs have soft edges.
    ensure!(pixels.colours() > 50, "only {} colours: the letters are missing", pixels.colours());
    for (name, least) in [("map", 20_000), ("unmap", 500)] {
        let count = pixels.count(colours(text, name)?[0]);
        ensure!(count >= least, "{count} pixels have the colour of a {name}");
    }
    Ok(())
}

fn report_has_colours_for_light_and_for_dark(rig: &Rig) -> Result<()> {
    let (text, light) = rig.light()?;
    let (page, _) = rig.page("dark", &rig.trace)?;
    let dark = rig.look(&page, DARK)?;
    for (place, (seen, name)) in [(light, "light"), (&dark, "dark")].into_iter().enumerate() {
        let pixels = Pixels::read(&seen.picture)?;
        let paper = colours(text, "paper")?[place];
        ensure!(pixels.commonest() == paper, "{name}: the page is {:?}, not {paper:?}", pixels.commonest());
        let (ink, other) = (colours(text, "ink")?[place], colours(text, "ink")?[1 - place]);
        ensure!(pixels.count(ink) > 100, "{name}: nothing is written in {ink:?}");
        ensure!(pixels.count(other) < pixels.count(ink), "{name}: it is written in {other:?}");
        let map = colours(text, "map")?[place];
        ensure!(pixels.count(map) >= 20_000, "{name}: nothing is drawn in {map:?}");
    }
    Ok(())
}

/// Asks for a picture and runs a script that fails.
const RESTLESS: &str = "<!DOCTYPE html><title>restless</title><script>throw new Error(\"restless\")</script>\
                        <img src=\"http://causeway.invalid/picture.png\">";

fn report_asks_for_nothing_and_runs_nothing(rig: &Rig) -> Result<()> {
    // What would be seen.
    let page = rig.folder.join("restless.html");
    std::fs::write(&page, RESTLESS)?;
    let seen = rig.look(&page, LIGHT)?;
    ensure!(seen.console.iter().any(|line| line.contains("restless")), "an error is not seen: {:?}", seen.console);
    ensure!(seen.requests == ["http://causeway.invalid/picture.png"], "a request is not seen: {:?}", seen.requests);

    // A trace of somebody who would like to have that.
    // Values have no blanks.
    let device = "<script>throw\"restless\"</script>";
    let unit = "<img/src=\"http://causeway.invalid/picture.png\"><style>*{display:none}</style>";
    let evil = rig.trace.replace("unit0", unit).replace("0000:00:01.0", device);
    let (page, _) = rig.page("evil", &evil)?;
    let evil = rig.look(&page, LIGHT)?;
    ensure!(evil.dom.contains("&lt;script&gt;throw\"restless\""), "the names of the trace are not in the page");
    for (name, seen) in [("quiet", &rig.light()?.1), ("evil", &evil)] {
        ensure!(seen.console.is_empty(), "{name}: the browser says {:?}", seen.console);
        ensure!(seen.requests.is_empty(), "{name}: it asks for {:?}", seen.requests);
        for element in ["<script", "<img", "<link", "<iframe"] {
            ensure!(!seen.dom.contains(element), "{name}: the page has a {element}");
        }
        ensure!(seen.dom.matches("<style").count() == 1, "{name}: the page has another style");
    }
    Ok(())
}

fn report_of_a_large_trace_is_shown_whole(rig: &Rig) -> Result<()> {
    let mut trace = String::new();
    for number in 0..LARGE {
        // Six containers, in which pages come and go.
        let (container, first) = (number % 6, (number / 12 % 4000) << 13);
        let (operation, more) = match number / 6 % 2 {
            0 => ("map", "gpa=0x0 perm=rw"),
            _ => ("unmap", "bytes=0x1000"),
        };
        writeln!(
            trace,
            "{}.{:09} host {operation} container={container} iova={first:#x}-{:#x} {more} ns=1000 result=ok",
            number / 10_000,
            number % 10_000 * 100_000,
            first + 0xfff,
        )?;
    }
    let (page, text) = rig.page("large", &trace)?;
    ensure!(text.len() < LARGEST_PAGE, "the page has {} bytes", text.len());
    let seen = rig.look(&page, LIGHT)?;
    ensure!(marks(&seen.dom, "maps")? == LARGE / 2, "marks for {} maps", marks(&seen.dom, "maps")?);
    ensure!(marks(&seen.dom, "unmaps")? == LARGE / 2, "marks for {} unmaps", marks(&seen.dom, "unmaps")?);
    ensure!(seen.dom.trim_end().ends_with("</html>"), "the page is not whole");
    Ok(())
}

/// The pictures of the documents, of a short run.
fn top_is_seen_at_a_real_terminal(rig: &Rig) -> Result<()> {
    let shots = screenshots::take(&rig.cache, (&rig.browser, &rig.tmux), &rig.built.causeway, 20, false)?;
    for part in ["host operations", "vfio-user0", "unit0/domain1/", "virtio-rng0", "write not permitted", "splits"] {
        ensure!(shots.text.contains(part), "{part} is not there:\n{}", shots.text);
    }
    let (top, report) = (Pixels::read(&shots.top)?, Pixels::read(&shots.report)?);
    ensure!(top.commonest() == [0x1c; 3] && top.colours() > 50, "{} colours", top.colours());
    // What is to be noticed is red, and nothing else is.
    let red = top.count([0xff, 0x6b, 0x6b]);
    ensure!((20..4000).contains(&red), "{red} pixels are red");
    ensure!(report.commonest() == [0xff; 3] && report.colours() > 50, "{} colours", report.colours());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_lines_and_colours_are_counted() {
        let dom = "<rect class=\"map\"><title>0.100 s: 5 maps</title></rect><rect><title>1.000 s: 7 maps</title></rect>\
                   <title>1.000 s: 3 unmaps</title><title>0x0-0xfff</title>";
        assert_eq!((marks(dom, "maps").unwrap(), marks(dom, "unmaps").unwrap()), (12, 3));
        let trace = "0.1 host map a=1\n0.2 host unmap a=1\n0.3 notify map a=host map \n0.4 host map b=2\n";
        assert_eq!((lines(trace, "host map "), lines(trace, "host unmap ")), (2, 1));
        let page = ":root{--ink:#0a0b0c;--paper:#fff}@media{--ink:#fefdfc;--paper:#161616}";
        assert_eq!(colours(page, "ink").unwrap(), [[10, 11, 12], [254, 253, 252]]);
        assert_eq!(colours(page, "paper").unwrap(), [[255; 3], [0x16; 3]]);
        assert!(colours(page, "map").is_err());
    }
}
