//! The suite of guest-side test images, by `causeway test`, on this machine's own KVM: once with an edu inside the
//! virtual machine, once with one that another process emulates, behind the bridge; and what concerns DMA once more
//! with such a process that is given no file of the guest's memory.

use crate::cache::progress;
use crate::crate_tests::{cargo, outputs, verdicts};
use crate::report::{Outcome, Reporter};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where the device of the tests is: a part of their names, and the options of `causeway test`.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place {
    name: &'static str,
    options: &'static [&'static str],
    /// Without `--long` only tests whose names begin with one of these; with none, all.
    short: &'static [&'static str],
}

const PLACES: [Place; 3] = [
    Place { name: "emulated", options: &["--device", "edu"], short: &[] },
    Place { name: "vfio_user", options: &[], short: &[] },
    // Translation, faults and resets; the rest of the suite is about the unit, whatever the device is.
    Place {
        name: "confined",
        options: &["--confine"],
        short: &["a1_", "a8_", "a11_", "b1_", "b8_", "b9_", "b14_", "rule1_"],
    },
];

impl Place {
    fn takes(&self, test: &str, long: bool) -> bool {
        long || self.short.is_empty() || self.short.iter().any(|start| test.starts_with(start))
    }
}

/// The program and the tests that are wanted, each in its place.
#[derive(Default)]
pub struct Suite {
    causeway: PathBuf,
    tests: Vec<(Place, String)>,
}

impl Suite {
    /// Without the tests whose full name is not `wanted`.
    pub fn only(mut self, wanted: impl Fn(&str) -> bool) -> Self {
        self.tests.retain(|(place, test)| wanted(&full_name(*place, test)));
        self
    }

    pub fn full_names(&self) -> impl Iterator<Item = String> {
        self.tests.iter().map(|(place, test)| full_name(*place, test))
    }
}

fn full_name(place: Place, test: &str) -> String {
    format!("images::{}::{test}", place.name)
}

/// What is built for the images.
pub struct Built {
    pub causeway: PathBuf,
    /// The suite that is in it, as a file of its own.
    pub suite: PathBuf,
}

/// Builds the program, with its suite.
pub fn program() -> Result<Built> {
    progress("building the test images");
    let result = cargo()
        .args(["build", "--package", "vmm", "--bin", "causeway", "--quiet", "--message-format=json-render-diagnostics"])
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo build")?;
    ensure!(result.status.success(), "causeway does not build");
    let text = String::from_utf8_lossy(&result.stdout);
    let messages: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let causeway = messages.iter().filter_map(|message| message["executable"].as_str().map(PathBuf::from)).next_back();
    let mut folders = messages.iter().filter_map(|message| Some(Path::new(message["out_dir"].as_str()?).join("suite")));
    Ok(Built {
        causeway: causeway.context("cargo names no program")?,
        suite: folders.rfind(|file| file.is_file()).context("cargo names no folder with the suite")?,
    })
}

/// Builds the program, with its suite, and asks it for the list. `long`: also what takes longer than it is worth each
/// time.
pub fn build(long: bool) -> Result<Suite> {
    let causeway = program()?.causeway;
    let list = Command::new(&causeway).args(["test", "--list"]).stdin(Stdio::null()).output()?;
    ensure!(list.status.success(), "the suite does not list its tests");
    let list = String::from_utf8_lossy(&list.stdout);
    let all = PLACES.iter().flat_map(|place| list.lines().map(|test| (*place, test.to_owned())));
    let tests = all.filter(|(place, test)| place.takes(test, long)).collect();
    Ok(Suite { causeway, tests })
}

/// Runs the suite and reports each test.
pub fn run(suite: &Suite, reporter: &Reporter) -> Result<()> {
    if suite.tests.is_empty() {
        return Ok(());
    }
    if std::fs::OpenOptions::new().read(true).write(true).open(Path::new("/dev/kvm")).is_err() {
        for test in suite.full_names() {
            reporter.add(&test, Outcome::Skipped("this machine has no /dev/kvm".to_owned()), None);
        }
        return Ok(());
    }
    for place in PLACES {
        let tests = suite.tests.iter().filter(|(other, _)| *other == place).map(|(_, test)| test.as_str());
        run_in(place, &suite.causeway, &tests.collect::<Vec<_>>(), reporter)?;
    }
    Ok(())
}

fn run_in(place: Place, causeway: &Path, tests: &[&str], reporter: &Reporter) -> Result<()> {
    if tests.is_empty() {
        return Ok(());
    }
    progress(format_args!("{} test images, {}", tests.len(), place.name));
    let filter = format!("^({})$", tests.join("|"));
    let mut command = Command::new(causeway);
    // In the development profile 300,000 mappings take their time, one by one, in another process.
    command.args(["test", "--timeout", "120", "--filter", &filter]).args(place.options);
    let result = command.stdin(Stdio::null()).output()?;
    let text = String::from_utf8_lossy(&result.stdout).into_owned();
    let (verdicts, outputs) = (verdicts(&text), outputs(&text));
    for test in tests {
        let outcome = match verdicts.get(test).copied() {
            Some(verdict) if verdict.starts_with("ok") => Outcome::Passed,
            Some(verdict) if verdict.starts_with("skipped") => {
                Outcome::Failed(format!("{verdict}: this machine has all that the suite needs"))
            }
            Some(verdict) => {
                let log = outputs.get(*test).map_or("", String::as_str);
                Outcome::Failed(format!("{verdict}\n{log}"))
            }
            None => {
                let errors = String::from_utf8_lossy(&result.stderr);
                Outcome::Failed(format!("no result; the runner ended with {}\n{errors}", result.status))
            }
        };
        reporter.add(&full_name(place, test), outcome, None);
    }
    Ok(())
}
