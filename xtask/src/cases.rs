//! The nested cases: shell scripts in `tests/nested`, each with its needs in the comment at its head.
//!
//! `# topology: bridge`, `# append: more of L1's kernel command line`, `# cpu: MODEL`, `# kernel: own`, `# limit: SECONDS`,
//! `# needs: CONFIG_NAME` and `# long` stand on lines of their own. Files that end in `lib.sh` are what the cases share.

use crate::cache::{Cache, workspace};
use crate::l1::Images;
use crate::nested::{self, DEFAULT_CPU, End, Files, Job, Kernel, Limit, Machine, Topology};
use crate::programs::Program;
use crate::report::{Outcome, Reporter};
use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const DEFAULT_LIMIT: u64 = 240;
/// What an L1 has, beyond a case's limit, to end that case and to begin the next one.
const OVERTIME: Duration = Duration::from_secs(60);
const DRIVER: &str = include_str!("../../resources/l1/run-cases");
/// A case's status that means: this machine cannot run it.
const SKIPPED: i32 = 77;

#[derive(Debug, Clone)]
pub struct Case {
    pub name: String,
    pub machine: Machine,
    pub limit: u64,
    pub long: bool,
    pub needs: Vec<String>,
}

impl Case {
    fn parse(name: &str, text: &str) -> Result<Self> {
        let machine = Machine {
            topology: Topology::Flat,
            append: String::new(),
            cpu: DEFAULT_CPU.to_owned(),
            kernel: Kernel::Distribution,
        };
        let mut case = Self { name: name.to_owned(), machine, limit: DEFAULT_LIMIT, long: false, needs: Vec::new() };
        for line in text.lines().map_while(|line| line.strip_prefix('#')) {
            let Some((key, value)) = line.trim().split_once(':').map(|(key, value)| (key, value.trim())) else {
                case.long |= line.trim() == "long";
                continue;
            };
            match key {
                "topology" => {
                    case.machine.topology =
                        Topology::from_str(value, false).map_err(|_| anyhow::anyhow!("{name}: no topology {value}"))?;
                }
                "append" => case.machine.append = value.to_owned(),
                "cpu" => case.machine.cpu = value.to_owned(),
                "kernel" if value == "own" => case.machine.kernel = Kernel::Own,
                "kernel" => bail!("{name}: no kernel {value}"),
                "limit" => case.limit = value.parse().with_context(|| format!("{name}: limit {value}"))?,
                "needs" => case.needs.extend(value.split_whitespace().map(str::to_owned)),
                // A sentence with a colon.
                _ => {}
            }
        }
        Ok(case)
    }

    pub fn full_name(&self) -> String {
        format!("nested::{}", self.name)
    }
}

fn folder() -> PathBuf {
    workspace().join("tests/nested")
}

/// All files of the folder, for L1, and the cases among them.
pub fn load() -> Result<(Files, Vec<Case>)> {
    let (mut files, mut cases) = (Files::new(), Vec::new());
    let entries = std::fs::read_dir(folder()).with_context(|| format!("cannot list {}", folder().display()))?;
    for entry in entries {
        let path = entry?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()).map(str::to_owned) else { continue };
        if !path.is_file() {
            continue;
        }
        files.push((format!("causeway/files/{name}"), path.clone()));
        if let Some(stem) = name.strip_suffix(".sh").filter(|_| !name.ends_with("lib.sh")) {
            let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            cases.push(Case::parse(stem, &text)?);
        }
    }
    files.sort();
    cases.sort_by(|a, b| a.name.cmp(&b.name));
    Ok((files, cases))
}

/// Runs the cases, as many as can share an L1 in one, and tells the reporter how each ended.
pub fn run(
    cache: &Cache,
    images: &Images,
    programs: &[Program],
    files: &[(String, PathBuf)],
    cases: &[Case],
    reporter: &Reporter,
) -> Result<()> {
    let mut groups: BTreeMap<Machine, Vec<Case>> = BTreeMap::new();
    for case in cases {
        groups.entry(case.machine.clone()).or_default().push(case.clone());
    }
    for (machine, mut pending) in groups {
        while !pending.is_empty() {
            let done = run_together(cache, images, programs, files, &machine, &pending, reporter)?;
            pending.retain(|case| !done.contains(&case.name));
        }
    }
    Ok(())
}

/// One L1; gives the names that are done with. Not all of them, if a case took L1 down: the others get another L1.
fn run_together(
    cache: &Cache,
    images: &Images,
    programs: &[Program],
    files: &[(String, PathBuf)],
    machine: &Machine,
    cases: &[Case],
    reporter: &Reporter,
) -> Result<Vec<String>> {
    let token = format!("@@{}@@", random()?);
    let list: String = cases.iter().map(|case| format!("{} {}\n", case.name, case.limit)).collect();
    let list_file = cache.path("cases");
    std::fs::write(&list_file, list)?;
    let mut files = files.to_vec();
    files.push(("causeway/cases".to_owned(), list_file));
    let script = DRIVER.replacen("#!/bin/sh\n", &format!("#!/bin/sh\nMARK='{token}'\n"), 1);
    let progress = Arc::new(Mutex::new(Progress::default()));
    let sink = Sink { token, line: Vec::new(), progress: Arc::clone(&progress), reporter: reporter.clone() };
    let limits: HashMap<&str, u64> = cases.iter().map(|case| (case.name.as_str(), case.limit)).collect();
    let hangs = |scale: u32| {
        let Ok(mut progress) = progress.lock() else { return true };
        let limit = progress.current.as_ref().and_then(|(name, _)| limits.get(name.as_str())).copied();
        let since = *progress.since.get_or_insert_with(Instant::now);
        since.elapsed() > Duration::from_secs(limit.unwrap_or_default()) * scale + OVERTIME
    };
    let log =
        format!("cases-{}", machine.topology.to_possible_value().map_or(String::new(), |v| v.get_name().to_owned()));
    let job = Job {
        machine,
        name: &log,
        script: script.as_bytes(),
        files: &files,
        programs,
        out: None,
        limit: Limit::When(&hangs),
        interactive: false,
    };
    let report = nested::run(cache, images, &job, Box::new(sink))?;
    let mut progress = progress.lock().map_err(|_| anyhow::anyhow!("the output's reader failed"))?;
    let slow = report.boot.is_some_and(nested::too_slow);
    if let Some((name, output)) = progress.current.take() {
        let reason = match &report.end {
            End::TimeLimit if slow => "bench too slow".to_owned(),
            End::TimeLimit => format!("L1 hung while it ran; its processor:\n{}", report.processor.trim_end()),
            End::Exit(status) => format!("L1's driver ended ({status}) while it ran"),
            End::Broken(reason) => format!("L1 ended while it ran: {reason}"),
        };
        let console = nested::console_end(&report.console);
        let text = format!("{output}\n{reason}\n{console}{}", stale_breakpoint(&format!("{output}{console}")));
        reporter.add(&format!("nested::{name}"), Outcome::Failed(text), None);
        progress.done.push(name);
    }
    if progress.done.is_empty() {
        nested::show_console(&report.console);
        bail!("the nested bench did not come up: {:?}", report.end);
    }
    Ok(std::mem::take(&mut progress.done))
}

/// What to know of a kernel that died of a breakpoint which is not there: a fault of the processors that QEMU emulates.
fn stale_breakpoint(output: &str) -> &'static str {
    if output.contains("Oops: int3") {
        "A kernel met a breakpoint that it had already taken away: QEMU's emulated processors, not the case. \
         See \"Why L1 has one processor\" in docs/nested-bench.md.\n"
    } else {
        ""
    }
}

/// Not to be guessed by what a case prints; not a secret.
fn random() -> Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/uuid").context("cannot read a random id")?.trim().to_owned())
}

#[derive(Default)]
struct Progress {
    /// The last mark, or when L1 was up.
    since: Option<Instant>,
    current: Option<(String, String)>,
    done: Vec<String>,
}

/// Reads the driver's output line by line.
struct Sink {
    token: String,
    line: Vec<u8>,
    progress: Arc<Mutex<Progress>>,
    reporter: Reporter,
}

impl Sink {
    fn take(&mut self, line: &str) {
        let Ok(mut progress) = self.progress.lock() else { return };
        let marked = line.strip_prefix(&self.token).map(|rest| rest.split_whitespace().collect::<Vec<_>>());
        match marked.as_deref() {
            Some(["begin", name]) => {
                progress.since = Some(Instant::now());
                progress.current = Some(((*name).to_owned(), String::new()));
            }
            Some(["end", name, status, seconds]) => {
                progress.since = Some(Instant::now());
                let output = progress.current.take().map(|(_, output)| output).unwrap_or_default();
                let outcome = match status.parse::<i32>() {
                    Ok(0) => Outcome::Passed,
                    Ok(SKIPPED) if !in_ci() => {
                        Outcome::Skipped(output.lines().last().unwrap_or("no reason given").to_owned())
                    }
                    _ => Outcome::Failed(format!("{output}status {status}\n{}", stale_breakpoint(&output))),
                };
                let time = seconds.parse().ok().filter(|s| *s >= 0.0).map(Duration::from_secs_f64);
                self.reporter.add(&format!("nested::{name}"), outcome, time);
                progress.done.push((*name).to_owned());
            }
            _ => {
                if let Some((_, output)) = &mut progress.current {
                    output.push_str(line);
                    output.push('\n');
                }
            }
        }
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        for byte in bytes {
            if *byte == b'\n' {
                let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).trim_end_matches('\r').to_owned();
                self.take(&line);
            } else {
                self.line.push(*byte);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Where only what is missing for a reason known beforehand may be skipped.
pub fn in_ci() -> bool {
    std::env::var_os("CI").is_some_and(|value| value == "true")
}

/// The configuration of the distribution's kernel.
pub fn kernel_config(images: &Images) -> PathBuf {
    let name =
        images.kernel.file_name().map(|name| name.to_string_lossy().replace("vmlinuz", "config")).unwrap_or_default();
    images.kernel.with_file_name(name)
}

/// The options that a kernel was built with, for `needs`.
pub fn kernel_options(config: &Path) -> HashMap<String, String> {
    let text = std::fs::read_to_string(config).unwrap_or_default();
    text.lines()
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_says_what_it_needs_in_its_first_comment_only() {
        let text = "# What it shows: a sentence.\n# topology: bridge\n# append: a=1 b=2\n# limit: 30\n# needs: CONFIG_A CONFIG_B\n# long\n\
                    exit 0\n# topology: slot\n";
        let case = Case::parse("x", text).unwrap();
        assert_eq!(case.machine.topology, Topology::Bridge);
        assert_eq!(case.machine.append, "a=1 b=2");
        assert_eq!((case.limit, case.long), (30, true));
        assert_eq!(case.needs, ["CONFIG_A", "CONFIG_B"]);
        assert!(Case::parse("x", "# topology: ring\n").is_err());
        assert_eq!(case.machine.kernel, Kernel::Distribution);
        assert_eq!(Case::parse("x", "# kernel: own\n").unwrap().machine.kernel, Kernel::Own);
        assert!(Case::parse("x", "# kernel: old\n").is_err());
    }

    #[test]
    fn a_breakpoint_that_is_not_there_is_explained() {
        assert!(stale_breakpoint("[  144.300710] Oops: int3: 0000 [#1] PREEMPT SMP NOPTI").contains("nested-bench.md"));
        assert_eq!(stale_breakpoint("[  1.0] Oops: 0002 [#1] SMP"), "");
    }

    #[test]
    fn results_are_read_between_marks_and_a_cut_case_stays_open() {
        let progress = Arc::new(Mutex::new(Progress::default()));
        let reporter = Reporter::new(false);
        let mut sink = Sink {
            token: "@@t@@".to_owned(),
            line: Vec::new(),
            progress: Arc::clone(&progress),
            reporter: reporter.clone(),
        };
        let text = "noise\n@@t@@ begin a\nsome output\n@@t@@ end a 0 1.5\n@@t@@ begin b\nwhy\n@@t@@ end b 3 0.1\n\
                    @@t@@ begin d\nhalf";
        sink.write_all(text.as_bytes()).unwrap();
        let progress = progress.lock().unwrap();
        assert_eq!(progress.done, ["a", "b"]);
        assert_eq!(progress.current.as_ref().unwrap().0, "d");
        assert_eq!(reporter.counts(), (1, 1, 0));
    }
}
