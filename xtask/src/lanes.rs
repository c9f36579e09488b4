//! Runs the nested cases in several L1s at a time. A lane is a thread that boots one L1 after the other; each L1 is
//! given its cases one by one, over a port of its own, and tells between marks how they ended.

use crate::ahead::OwnKernels;
use crate::cache::Cache;
use crate::cases::{self, Case};
use crate::l1::Host;
use crate::l1::Images;
use crate::nested::{self, End, Job, Kernel, Limit, Machine};
use crate::own_kernel;
use crate::pool::Pool;
use crate::programs::Program;
use crate::report::{Outcome, Reporter};
use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;
use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What an L1 has, beyond a case's limit, to end that case and to ask for the next one.
const OVERTIME: Duration = Duration::from_secs(60);
const DRIVER: &str = include_str!("../../resources/l1/run-cases");
/// A case's status that means: this machine cannot run it.
const SKIPPED: i32 = 77;
/// What an L1 may take of this machine: its memory, QEMU's translated code, and what QEMU needs besides.
const KIB_OF_AN_L1: u64 = 6 << 20;

/// What all L1s of a run have in common.
pub struct Bench<'a> {
    pub cache: &'a Cache,
    /// Of each host that a case needs.
    pub images: &'a BTreeMap<Host, &'a Images>,
    pub programs: &'a [Program],
    pub files: &'a [(String, PathBuf)],
    pub reporter: &'a Reporter,
}

impl Bench<'_> {
    fn images(&self, host: Host) -> Result<&Images> {
        self.images.get(&host).copied().with_context(|| format!("the {host:?} host was not made ready"))
    }
}

/// How many L1s this machine runs side by side: each has one processor, and memory of its own.
pub fn default_lanes() -> usize {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let available = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        text.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.split_whitespace().next()?.parse::<u64>().ok())
    });
    let fit = available.map_or(1, |kib| usize::try_from(kib / KIB_OF_AN_L1).unwrap_or(usize::MAX));
    processors.min(fit).max(1)
}

/// Runs the cases in at most so many L1s at a time, those that need an own kernel when it is there, and tells the
/// reporter how each ended.
pub fn run(bench: &Bench, cases: Vec<Case>, own_kernels: OwnKernels, lanes: usize) {
    let (mut cases, mut others): (Vec<Case>, Vec<Case>) =
        cases.into_iter().partition(|case| case.machine.kernel == Kernel::Own);
    for (host, images) in bench.images {
        let its = others.extract_if(.., |case| case.machine.host == *host).collect();
        cases.extend(able(&cases::kernel_config(images), its, bench.reporter));
    }
    let pool = Arc::new(Pool::new(cases));
    let booted = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..lanes {
            scope.spawn(|| lane(bench, &pool, &booted));
        }
        for (host, made) in own_kernels {
            own_kernel_is_made(bench, &pool, host, made);
        }
        for host in [Host::Default, Host::New] {
            own_kernel_is_made(bench, &pool, host, Err(anyhow!("it was not made")));
        }
    });
}

fn lane(bench: &Bench, pool: &Arc<Pool>, booted: &AtomicUsize) {
    while let Some(machine) = pool.next_l1() {
        let number = booted.fetch_add(1, Ordering::Relaxed) + 1;
        if let Err(error) = l1(bench, pool, &machine, number) {
            bench.reporter.add("nested::bench", Outcome::Failed(format!("{error:#}")), None);
            let without = Outcome::Failed("there is no L1 for it: see nested::bench".to_owned());
            add_all(&pool.give_up(&machine), &without, bench.reporter);
        }
        pool.ended(&machine);
    }
}

/// The cases that wait for this host's own kernel can be run, or cannot.
fn own_kernel_is_made(bench: &Bench, pool: &Pool, host: Host, made: Result<bool>) {
    let own = bench.images.get(&host).and_then(|images| images.own.get());
    pool.own_kernel_is_made(host, |cases| {
        let outcome = match (&made, own) {
            (Ok(_), Some(own)) => return able(&own.config, cases, bench.reporter),
            (Ok(_), None) => Outcome::Skipped(format!("`{}` was not run", own_kernel::command_for(host))),
            (Err(error), _) => Outcome::Failed(format!("the own kernel: {error:#}")),
        };
        add_all(&cases, &outcome, bench.reporter);
        Vec::new()
    });
}

fn add_all(cases: &[Case], outcome: &Outcome, reporter: &Reporter) {
    cases.iter().for_each(|case| reporter.add(&case.full_name(), outcome.clone(), None));
}

/// The cases that a kernel with this configuration can run; the others are skipped.
fn able(config: &Path, cases: Vec<Case>, reporter: &Reporter) -> Vec<Case> {
    let options = cases::kernel_options(config);
    let (able, unable): (Vec<Case>, Vec<Case>) =
        cases.into_iter().partition(|case| case.needs.iter().all(|need| options.contains_key(need)));
    for case in unable {
        let missing: Vec<&str> =
            case.needs.iter().map(String::as_str).filter(|need| !options.contains_key(*need)).collect();
        let reason = format!("the bench's kernel lacks {}", missing.join(" "));
        reporter.add(&case.full_name(), Outcome::Skipped(reason), None);
    }
    able
}

/// One L1, from its boot until there is no case left for it, or one took it down: then the others get another L1.
///
/// # Errors
/// It did not come up, or does not take cases.
fn l1(bench: &Bench, pool: &Arc<Pool>, machine: &Machine, number: usize) -> Result<()> {
    let topology = machine.topology.to_possible_value().map_or(String::new(), |value| value.get_name().to_owned());
    let token = format!("@@{}@@", random()?);
    let script = DRIVER.replacen("#!/bin/sh\n", &format!("#!/bin/sh\nMARK='{token}'\n"), 1);
    let (to_l1, input) = UnixStream::pair().context("cannot make a pair of sockets")?;
    let progress = Arc::new(Mutex::new(Progress::default()));
    let sink = Sink {
        token,
        line: Vec::new(),
        to_l1,
        pool: Arc::clone(pool),
        machine: machine.clone(),
        progress: Arc::clone(&progress),
        reporter: bench.reporter.clone(),
    };
    let hangs = |scale: u32| progress.lock().map_or(true, |mut progress| progress.hangs(scale));
    let job = Job {
        machine,
        name: &format!("cases-{number:02}-{topology}"),
        script: script.as_bytes(),
        files: bench.files,
        programs: bench.programs,
        out: None,
        limit: Limit::When(&hangs),
        interactive: false,
        input: Some(input.as_fd()),
    };
    let report = nested::run(bench.cache, bench.images(machine.host)?, &job, Box::new(sink));
    let mut progress = progress.lock().map_err(|_| anyhow::anyhow!("the output's reader failed"))?;
    // A case that was begun is done with, whatever became of L1.
    if let Some(running) = progress.running.take() {
        let (reason, console) = match &report {
            Ok(report) => (how_it_ended(report), nested::console_end(&report.console)),
            Err(error) => (format!("the bench failed while it ran: {error:#}"), String::new()),
        };
        let output = running.output;
        let text = format!("{output}\n{reason}\n{console}{}", stale_breakpoint(&format!("{output}{console}")));
        bench.reporter.add(&running.case.full_name(), Outcome::Failed(text), None);
        return Ok(());
    }
    let report = report?;
    if progress.done == 0 && !progress.told_the_end {
        bail!("an L1 did not come up: {:?}\n{}", report.end, nested::console_end(&report.console));
    }
    Ok(())
}

/// Why a case has no result.
fn how_it_ended(report: &nested::Report) -> String {
    let slow = report.boot.is_some_and(nested::too_slow);
    match &report.end {
        End::TimeLimit if slow => "bench too slow".to_owned(),
        End::TimeLimit => format!("L1 hung while it ran; its processor:\n{}", report.processor.trim_end()),
        End::Exit(status) => format!("L1's driver ended ({status}) while it ran"),
        End::Broken(reason) => format!("L1 ended while it ran: {reason}"),
    }
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
    running: Option<Running>,
    /// How many cases have their result.
    done: usize,
    /// It asked for a case when there was none.
    told_the_end: bool,
}

struct Running {
    case: Case,
    output: String,
}

impl Progress {
    /// Whether what is running is far beyond its limit; the first time to be asked when L1 is up.
    fn hangs(&mut self, scale: u32) -> bool {
        let limit = Duration::from_secs(self.running.as_ref().map_or(0, |running| running.case.limit));
        self.since.get_or_insert_with(Instant::now).elapsed() > limit * scale + OVERTIME
    }
}

/// Reads the driver's output line by line, and hands out cases.
struct Sink {
    token: String,
    line: Vec<u8>,
    to_l1: UnixStream,
    pool: Arc<Pool>,
    machine: Machine,
    progress: Arc<Mutex<Progress>>,
    reporter: Reporter,
}

impl Sink {
    fn take(&mut self, line: &str) {
        let Ok(mut progress) = self.progress.lock() else { return };
        let marked = line.strip_prefix(&self.token).map(|rest| rest.split_whitespace().collect::<Vec<_>>());
        match marked.as_deref() {
            Some(["next"]) => {
                progress.since = Some(Instant::now());
                let next = self.pool.take(&self.machine);
                let answer = next.as_ref().map_or("\n".to_owned(), |case| format!("{} {}\n", case.name, case.limit));
                progress.told_the_end = next.is_none();
                progress.running = next.map(|case| Running { case, output: String::new() });
                // An L1 that is gone is told of by its end.
                let _ = self.to_l1.write_all(answer.as_bytes());
            }
            Some(["end", status, seconds]) => {
                progress.since = Some(Instant::now());
                let Some(Running { case, output }) = progress.running.take() else { return };
                let outcome = match status.parse::<i32>() {
                    Ok(0) => Outcome::Passed,
                    Ok(SKIPPED) if !cases::in_ci() => {
                        Outcome::Skipped(output.lines().last().unwrap_or("no reason given").to_owned())
                    }
                    _ => Outcome::Failed(format!("{output}status {status}\n{}", stale_breakpoint(&output))),
                };
                let time = seconds.parse().ok().filter(|s| *s >= 0.0).map(Duration::from_secs_f64);
                self.reporter.add(&case.full_name(), outcome, time);
                progress.done += 1;
            }
            _ => {
                if let Some(running) = &mut progress.running {
                    running.output.push_str(line);
                    running.output.push('\n');
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn sink(cases: &[&str]) -> (Sink, UnixStream) {
        let cases: Vec<Case> = cases.iter().map(|name| Case::parse(name, "").unwrap()).collect();
        let machine = Case::parse("m", "").unwrap().machine;
        let (to_l1, input) = UnixStream::pair().unwrap();
        let sink = Sink {
            token: "@@t@@".to_owned(),
            line: Vec::new(),
            to_l1,
            pool: Arc::new(Pool::new(cases)),
            machine,
            progress: Arc::default(),
            reporter: Reporter::new(false),
        };
        (sink, input)
    }

    #[test]
    fn a_breakpoint_that_is_not_there_is_explained() {
        assert!(stale_breakpoint("[  144.300710] Oops: int3: 0000 [#1] PREEMPT SMP NOPTI").contains("nested-bench.md"));
        assert_eq!(stale_breakpoint("[  1.0] Oops: 0002 [#1] SMP"), "");
    }

    #[test]
    fn cases_are_handed_out_one_by_one_and_a_cut_one_stays_open() {
        let (mut sink, mut input) = sink(&["a", "b", "c", "d"]);
        let text = "noise\n@@t@@ next\nsome output\n@@t@@ end 0 1.5\n@@t@@ next\nwhy\n@@t@@ end 3 0.1\n\
                    @@t@@ next\nwhole\nhalf";
        sink.write_all(text.as_bytes()).unwrap();
        let progress = sink.progress.lock().unwrap();
        let running = progress.running.as_ref().unwrap();
        assert_eq!((progress.done, running.case.name.as_str(), running.output.as_str()), (2, "c", "whole\n"));
        assert_eq!(sink.reporter.counts(), (1, 1, 0));
        // The fourth is another L1's.
        assert_eq!(sink.pool.take(&sink.machine).unwrap().name, "d");
        sink.to_l1.shutdown(std::net::Shutdown::Write).unwrap();
        let mut told = String::new();
        input.read_to_string(&mut told).unwrap();
        assert_eq!(told, "a 240\nb 240\nc 240\n");
    }

    #[test]
    fn an_empty_line_says_that_there_are_no_more_cases() {
        let (mut sink, mut input) = sink(&[]);
        sink.write_all(b"@@t@@ next\n").unwrap();
        let mut told = [0; 2];
        assert_eq!(input.read(&mut told).unwrap(), 1);
        assert_eq!(told[0], b'\n');
        let progress = sink.progress.lock().unwrap();
        assert!(progress.told_the_end && progress.running.is_none());
    }

    #[test]
    fn marks_that_answer_no_question_give_no_result() {
        let (mut sink, _input) = sink(&["a"]);
        sink.write_all(b"@@t@@ end 0 1.5\n@@x@@ next\n").unwrap();
        assert_eq!(sink.reporter.counts(), (0, 0, 0));
        assert!(sink.progress.lock().unwrap().running.is_none());
    }

    #[test]
    fn what_a_kernel_lacks_is_skipped_by_name() {
        let config = std::env::temp_dir().join(format!("xtask-config-{}", std::process::id()));
        std::fs::write(&config, "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=m\n").unwrap();
        let cases = ["# needs: CONFIG_A CONFIG_C\n", "# needs: CONFIG_A CONFIG_B\n"]
            .map(|head| Case::parse("x", head).unwrap());
        let reporter = Reporter::new(false);
        assert_eq!(able(&config, cases.to_vec(), &reporter).len(), 1);
        assert_eq!(reporter.counts(), (0, 0, 1));
        std::fs::remove_file(config).unwrap();
    }

    #[test]
    fn an_l1_hangs_when_its_case_is_far_beyond_its_limit() {
        let mut progress = Progress::default();
        assert!(!progress.hangs(1));
        let ago = |seconds| Instant::now().checked_sub(Duration::from_secs(seconds));
        progress.since = ago(61);
        assert!(progress.hangs(1));
        progress.running = Some(Running { case: Case::parse("a", "# limit: 100\n").unwrap(), output: String::new() });
        progress.since = ago(161);
        assert!(progress.hangs(1));
        assert!(!progress.hangs(2));
    }
}
