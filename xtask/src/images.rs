//! The suite of guest-side test images, by `causeway test`, on this machine's own KVM.

use crate::cache::progress;
use crate::crate_tests::{cargo, outputs, verdicts};
use crate::report::{Outcome, Reporter};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The program and the tests that are wanted.
#[derive(Default)]
pub struct Suite {
    causeway: PathBuf,
    tests: Vec<String>,
}

impl Suite {
    /// Without the tests whose full name is not `wanted`.
    pub fn only(mut self, wanted: impl Fn(&str) -> bool) -> Self {
        self.tests.retain(|test| wanted(&full_name(test)));
        self
    }

    pub fn full_names(&self) -> impl Iterator<Item = String> {
        self.tests.iter().map(|test| full_name(test))
    }
}

fn full_name(test: &str) -> String {
    format!("images::{test}")
}

/// Builds the program, with its suite, and asks it for the list.
pub fn build() -> Result<Suite> {
    progress("building the test images");
    let result = cargo()
        .args(["build", "--package", "vmm", "--bin", "causeway", "--quiet", "--message-format=json-render-diagnostics"])
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo build")?;
    ensure!(result.status.success(), "causeway does not build");
    let text = String::from_utf8_lossy(&result.stdout);
    let messages = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let causeway = messages
        .filter_map(|message| message["executable"].as_str().map(PathBuf::from))
        .next_back()
        .context("cargo names no program")?;
    let list = Command::new(&causeway).args(["test", "--list"]).stdin(Stdio::null()).output()?;
    ensure!(list.status.success(), "the suite does not list its tests");
    let tests = String::from_utf8_lossy(&list.stdout).lines().map(str::to_owned).collect();
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
    progress(format_args!("{} test images", suite.tests.len()));
    let filter = format!("^({})$", suite.tests.join("|"));
    let result = Command::new(&suite.causeway).args(["test", "--filter", &filter]).stdin(Stdio::null()).output()?;
    let text = String::from_utf8_lossy(&result.stdout).into_owned();
    let (verdicts, outputs) = (verdicts(&text), outputs(&text));
    for test in &suite.tests {
        let outcome = match verdicts.get(test.as_str()).copied() {
            Some(verdict) if verdict.starts_with("ok") => Outcome::Passed,
            Some(verdict) if verdict.starts_with("skipped") => {
                Outcome::Failed(format!("{verdict}: this machine has all that the suite needs"))
            }
            Some(verdict) => {
                let log = outputs.get(test.as_str()).map_or("", String::as_str);
                Outcome::Failed(format!("{verdict}\n{log}"))
            }
            None => {
                let errors = String::from_utf8_lossy(&result.stderr);
                Outcome::Failed(format!("no result; the runner ended with {}\n{errors}", result.status))
            }
        };
        reporter.add(&full_name(test), outcome, None);
    }
    Ok(())
}
