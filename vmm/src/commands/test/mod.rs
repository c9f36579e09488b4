//! `causeway test`: runs the tests of an image, each in a fresh virtual machine of its own process.
//!
//! An image lists its tests in the section `.tests` of its ELF file: a line for each, its name, `reboots` if it resets
//! its machine, and then options of `causeway run`. The name goes to the image as `test=NAME`, and the value that it
//! writes to isa-debug-exit is the verdict: 0 passed, 1 failed, 2 skipped.

mod devices;
mod junit;
mod list;
mod machine;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use regex::Regex;

use crate::commands::options;
use crate::config::DeviceOption;
use crate::exit::{CRASHED, ERROR, REFUSED, USAGE};
use crate::kvm::vm;
use crate::messages::{say, tell};
use devices::Devices;
use list::Test;

/// `causeway test`.
#[derive(Args, Debug)]
#[command(after_help = "\
Exit codes: 0 all passed; 2 usage; 4 cannot run here; 6 an error of the runner; 8 a test failed.")]
pub struct TestArgs {
    /// An image (see docs/writing-images.md); without it the built-in suite
    image: Option<PathBuf>,
    /// Only tests whose name this expression matches
    #[arg(long, value_name = "RE")]
    filter: Option<Regex>,
    /// Print the names and run nothing
    #[arg(long)]
    list: bool,
    /// With --list: an array of objects, with the behaviour that a test checks and what that rests on, such as a
    /// section of the specification
    #[arg(long, requires = "list")]
    json: bool,
    /// The device that the tests drive: `edu` emulates it inside the virtual machine, `vfio,host=BDF` is one of the
    /// host, beside which there is an emulated one for what the guest hears of. Without it each edu is emulated by a
    /// process of its own, behind the bridge
    #[arg(long = "device", value_name = "KIND[,KEY=VALUE]...")]
    devices: Vec<String>,
    /// The processes that emulate an edu are given no file of the guest's memory: `confine=on` of `vfio-user`
    #[arg(long, conflicts_with = "devices")]
    confine: bool,
    /// Write the results as JUnit XML
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Virtual machines at a time; as many as there are processors
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    jobs: Option<u16>,
    /// Time limit of each test
    #[arg(long, value_name = "SECONDS", default_value = "20", value_parser = options::seconds)]
    timeout: Duration,
}

/// The built-in suite: `tests/images`, compiled by the build script.
static SUITE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/suite"));

/// How a test ended.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Verdict {
    Passed,
    /// Why.
    Failed(String),
    /// Why.
    Skipped(String),
}

/// What is told about a test.
struct Outcome {
    test: Test,
    verdict: Verdict,
    time: Duration,
    log: String,
}

/// Does what the command line says. Gives back the exit code.
pub fn run(args: &TestArgs) -> ExitCode {
    match Runner::new(args).and_then(|runner| runner.run()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(CRASHED),
        Err(Stopped { code, message }) => {
            say(format_args!("causeway: {message}"));
            ExitCode::from(code)
        }
    }
}

/// Why nothing was run, or not all.
struct Stopped {
    code: u8,
    message: String,
}

fn stopped<E: std::fmt::Display>(code: u8) -> impl Fn(E) -> Stopped {
    move |e| Stopped { code, message: e.to_string() }
}

struct Runner<'a> {
    args: &'a TestArgs,
    tests: Vec<Test>,
    image: machine::ImageFile,
    devices: Devices,
}

impl<'a> Runner<'a> {
    fn new(args: &'a TestArgs) -> Result<Self, Stopped> {
        let mut options: Vec<DeviceOption> = Vec::new();
        for device in &args.devices {
            options.push(device.parse().map_err(|e| stopped(USAGE)(format!("--device {device}: {e}")))?);
        }
        options::name_devices(&options).map_err(stopped(USAGE))?;
        let devices = Devices::new(args.devices.iter().cloned().zip(options).collect(), args.confine);
        let (image, tests) = match &args.image {
            None => (machine::ImageFile::of(SUITE).map_err(stopped(ERROR))?, list::of(SUITE, "suite")),
            Some(path) => {
                let unreadable = |e| format!("the image {} cannot be read: {e}", path.display());
                let content = fs::read(path).map_err(unreadable).map_err(stopped(REFUSED))?;
                let name = path.file_stem().unwrap_or_default().to_string_lossy();
                (machine::ImageFile::Path(path.clone()), list::of(&content, &name))
            }
        };
        let tests = tests.map_err(stopped(REFUSED))?;
        let wanted = |test: &Test| args.filter.as_ref().is_none_or(|filter| filter.is_match(&test.name));
        let tests: Vec<Test> = tests.into_iter().filter(wanted).collect();
        if tests.is_empty() {
            return Err(Stopped { code: USAGE, message: "no test has a name like that; --list shows them".to_owned() });
        }
        Ok(Self { args, tests, image, devices })
    }

    /// Whether all passed.
    fn run(self) -> Result<bool, Stopped> {
        if self.args.json {
            let tests: Vec<_> = self.tests.iter().map(Test::as_json).collect();
            tell(format_args!("{:#}", serde_json::Value::from(tests)));
            return Ok(true);
        }
        if self.args.list {
            self.tests.iter().for_each(|test| tell(format_args!("{}", test.name)));
            return Ok(true);
        }
        vm::open().map_err(vm::remedy).map_err(|e| {
            let nested =
                "the nested bench has a KVM of its own: cargo xtask nested --script FILE, with `causeway test` in it";
            Stopped { code: REFUSED, message: format!("{e}; {nested}") }
        })?;
        let outcomes = self.all();
        for outcome in outcomes.iter().filter(|outcome| matches!(outcome.verdict, Verdict::Failed(_))) {
            tell(format_args!("\n---- {} stdout ----\n{}", outcome.test.name, outcome.log.trim_end()));
        }
        tell(format_args!("\n{}", table(&outcomes).trim_end()));
        if let Some(file) = &self.args.junit {
            junit::write(file, &outcomes)
                .map_err(|e| format!("the results cannot be written to {}: {e}", file.display()))
                .map_err(stopped(ERROR))?;
        }
        Ok(!outcomes.iter().any(|outcome| matches!(outcome.verdict, Verdict::Failed(_))))
    }

    /// How many virtual machines run at a time: one where they would share a function of the host.
    fn jobs(&self) -> usize {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        if self.devices.are_shared() { 1 } else { self.args.jobs.map_or(processors, usize::from) }
    }

    fn all(&self) -> Vec<Outcome> {
        let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            for _ in 0..self.jobs().min(self.tests.len()) {
                scope.spawn(|| {
                    while let Some(test) = self.tests.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let outcome = self.one(test);
                        progress(&outcome);
                        done.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(outcome);
                    }
                });
            }
        });
        let mut outcomes = done.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
        outcomes.sort_by(|a, b| a.test.name.cmp(&b.test.name));
        outcomes
    }

    fn one(&self, test: &Test) -> Outcome {
        let start = Instant::now();
        let (verdict, log) = match machine::run(&self.image, test, &self.devices, self.args.timeout) {
            Ok((machine::Ended::Code(4), log)) if self.devices.are_shared() => (refused(test, &log), log),
            Ok((ended, log)) => (verdict(ended, &log), log),
            Err(e) => (Verdict::Failed(format!("the virtual machine could not be started: {e}")), String::new()),
        };
        Outcome { test: test.clone(), verdict, time: start.elapsed(), log }
    }
}

/// The start of a machine with an assigned device was refused: a test that asks for a unit which the host cannot
/// follow, or for more memory than it can lock, is skipped.
fn refused(test: &Test, log: &str) -> Verdict {
    let why = log.lines().rev().find_map(|line| line.strip_prefix("causeway: error: "));
    match why {
        Some(why) if test.options.iter().any(|option| matches!(option.as_str(), "--iommu" | "--memory")) => {
            Verdict::Skipped(why.to_owned())
        }
        _ => Verdict::Failed("the start was refused".to_owned()),
    }
}

/// What the exit code of `causeway run` says of a test.
fn verdict(ended: machine::Ended, log: &str) -> Verdict {
    let line = |prefix: &str| log.lines().rev().find_map(|line| line.strip_prefix(prefix)).unwrap_or("no reason given");
    match ended {
        machine::Ended::Code(1) => Verdict::Passed,
        machine::Ended::Code(3) => Verdict::Failed(line("FAILED: ").to_owned()),
        machine::Ended::Code(5) => Verdict::Skipped(line("skipped: ").to_owned()),
        machine::Ended::Code(0) => Verdict::Failed("it powered off without a verdict".to_owned()),
        machine::Ended::Code(4) => Verdict::Failed("the start was refused".to_owned()),
        machine::Ended::Code(6) => Verdict::Failed("the virtual machine ended with an error".to_owned()),
        machine::Ended::Code(7) => Verdict::Failed("the image does not know this test".to_owned()),
        machine::Ended::Code(8) => Verdict::Failed("it crashed (triple fault or reset)".to_owned()),
        machine::Ended::Code(10) => Verdict::Failed("it hung: the time limit was reached".to_owned()),
        machine::Ended::Code(code) => Verdict::Failed(format!("it ended with code {code}")),
        machine::Ended::Signal(signal) => Verdict::Failed(format!("the virtual machine died by signal {signal}")),
        machine::Ended::Stuck => Verdict::Failed("the virtual machine did not stop and was killed".to_owned()),
    }
}

fn progress(outcome: &Outcome) {
    let verdict = match &outcome.verdict {
        Verdict::Passed => "ok".to_owned(),
        Verdict::Failed(why) => format!("FAILED: {why}"),
        Verdict::Skipped(why) => format!("skipped: {why}"),
    };
    tell(format_args!("test {} ... {verdict} ({:.2} s)", outcome.test.name, outcome.time.as_secs_f64()));
}

/// A line for each behaviour, by the part of the names before the first `_`, and the total.
fn table(outcomes: &[Outcome]) -> String {
    let mut groups: Vec<(&str, [usize; 3])> = Vec::new();
    let mut total = [0; 3];
    for outcome in outcomes {
        let group = outcome.test.name.split('_').next().unwrap_or_default();
        let index = match outcome.verdict {
            Verdict::Passed => 0,
            Verdict::Failed(_) => 1,
            Verdict::Skipped(_) => 2,
        };
        if groups.last().is_none_or(|(last, _)| *last != group) {
            groups.push((group, [0; 3]));
        }
        if let Some((_, counts)) = groups.last_mut() {
            counts[index] += 1;
        }
        total[index] += 1;
    }
    let mut text = format!("{:<12} {:>7} {:>7} {:>8}\n", "behaviour", "passed", "failed", "skipped");
    for (group, [passed, failed, skipped]) in groups {
        text.push_str(&format!("{group:<12} {passed:>7} {failed:>7} {skipped:>8}\n"));
    }
    let [passed, failed, skipped] = total;
    text.push_str(&format!("{passed} passed, {failed} failed, {skipped} skipped\n"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(name: &str, verdict: Verdict) -> Outcome {
        let test = Test::named(name);
        Outcome { test, verdict, time: Duration::ZERO, log: String::new() }
    }

    #[test]
    fn the_table_counts_by_behaviour() {
        let outcomes = [
            outcome("a1_x", Verdict::Passed),
            outcome("a1_y", Verdict::Failed(String::new())),
            outcome("b2_x", Verdict::Skipped(String::new())),
        ];
        let text = table(&outcomes);
        let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[1], ["a1", "1", "1", "0"]);
        assert_eq!(rows[2], ["b2", "0", "0", "1"]);
        assert_eq!(text.lines().last(), Some("1 passed, 1 failed, 1 skipped"));
    }

    #[test]
    fn verdicts_follow_the_exit_code_and_quote_the_image() {
        let log = "test x\nFAILED: it leaked\n  at y\n";
        assert_eq!(verdict(machine::Ended::Code(1), log), Verdict::Passed);
        assert_eq!(verdict(machine::Ended::Code(3), log), Verdict::Failed("it leaked".to_owned()));
        assert_eq!(verdict(machine::Ended::Code(5), "skipped: old\n"), Verdict::Skipped("old".to_owned()));
        for ended in [0, 2, 4, 6, 7, 8, 9, 10, 255].map(machine::Ended::Code) {
            assert!(matches!(verdict(ended, log), Verdict::Failed(_)));
        }
        assert!(matches!(verdict(machine::Ended::Signal(9), log), Verdict::Failed(_)));
        assert!(matches!(verdict(machine::Ended::Stuck, log), Verdict::Failed(_)));
    }

    #[test]
    fn a_unit_that_the_host_cannot_follow_is_a_reason_to_skip() {
        let test = |options: &[&str]| Test {
            options: options.iter().map(|option| option.to_string()).collect(),
            ..Test::named("x")
        };
        let log = "causeway: info: x\ncauseway: error: the host maps 48 bits\n";
        assert_eq!(
            refused(&test(&["--iommu", "vtd,aw-bits=57"]), log),
            Verdict::Skipped("the host maps 48 bits".to_owned())
        );
        for options in [&[][..], &["--device", "edu"]] {
            assert!(matches!(refused(&test(options), log), Verdict::Failed(_)));
        }
        assert!(matches!(refused(&test(&["--iommu", "vtd,aw-bits=57"]), ""), Verdict::Failed(_)));
    }

    #[test]
    fn the_built_in_suite_has_tests_and_every_name_is_there_once() {
        let tests = list::of(SUITE, "suite").unwrap_or_else(|e| panic!("{e}"));
        let mut names: Vec<&str> = tests.iter().map(|test| test.name.as_str()).collect();
        assert!(names.len() > 1);
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
        for test in tests {
            let rule = test.behaviour().is_none_or(|behaviour| behaviour.starts_with("rule "));
            assert_eq!(test.rests_on.is_none(), rule, "{}: what it rests on", test.name);
        }
    }
}
