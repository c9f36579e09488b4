//! The crates' own tests: built by cargo, listed and run by their own executables, so that each has its line.

use crate::cache::{progress, workspace};
use crate::report::{Outcome, Reporter};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::collections::HashMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// One test executable and the tests in it that are wanted.
pub struct Executable {
    /// The crate's name, and for an integration test its file's.
    pub prefix: String,
    pub file: PathBuf,
    /// The crate's folder, where its tests run.
    pub folder: PathBuf,
    pub tests: Vec<String>,
}

impl Executable {
    pub fn full_name(&self, test: &str) -> String {
        format!("{}::{test}", self.prefix)
    }
}

pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace()).stdin(Stdio::null());
    command
}

/// Builds all tests and asks each executable for its list.
pub fn build() -> Result<Vec<Executable>> {
    progress("building the crates' tests");
    let result = cargo()
        .args(["test", "--workspace", "--no-run", "--quiet", "--message-format=json-render-diagnostics"])
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo test")?;
    ensure!(result.status.success(), "the tests do not build");
    let mut executables = executables(&result.stdout)?;
    for executable in &mut executables {
        let mut list = Command::new(&executable.file);
        let list = list.args(["--list", "--format", "terse"]).stdin(Stdio::null()).output()?;
        ensure!(list.status.success(), "{} does not list its tests", executable.file.display());
        executable.tests = String::from_utf8_lossy(&list.stdout)
            .lines()
            .filter_map(|line| line.strip_suffix(": test"))
            .map(str::to_owned)
            .collect();
    }
    Ok(executables)
}

/// The test executables that cargo's messages name, by name, without their lists of tests.
pub fn executables(messages: &[u8]) -> Result<Vec<Executable>> {
    let mut executables = Vec::new();
    for line in String::from_utf8_lossy(messages).lines() {
        let Ok(message) = serde_json::from_str::<Value>(line) else { continue };
        let (Some(file), true) = (message["executable"].as_str(), message["profile"]["test"] == true) else { continue };
        let manifest = PathBuf::from(message["manifest_path"].as_str().context("an artefact has no manifest")?);
        let folder = manifest.parent().context("a manifest has no folder")?.to_owned();
        let target = message["target"]["name"].as_str().unwrap_or_default().replace('-', "_");
        let package = package_name(&message);
        let prefix = if target == package { package } else { format!("{package}::{target}") };
        executables.push(Executable { prefix, file: file.into(), folder, tests: Vec::new() });
    }
    executables.sort_by(|a, b| a.prefix.cmp(&b.prefix));
    Ok(executables)
}

/// `path+file:///folder/name#0.1.0` or `path+file:///folder#name@0.1.0`.
fn package_name(message: &Value) -> String {
    let id = message["package_id"].as_str().unwrap_or_default();
    let (path, rest) = id.split_once('#').unwrap_or((id, ""));
    let name = rest.split_once('@').map_or_else(|| path.rsplit('/').next().unwrap_or_default(), |(name, _)| name);
    name.replace('-', "_")
}

/// Runs the executable's tests and reports each.
pub fn run(executable: &Executable, long: bool, reporter: &Reporter) -> Result<()> {
    if executable.tests.is_empty() {
        return Ok(());
    }
    let mut command = Command::new(&executable.file);
    command.arg("--exact").args(&executable.tests).current_dir(&executable.folder).stdin(Stdio::null());
    command.env("CARGO_MANIFEST_DIR", &executable.folder);
    if long {
        command.env("CAUSEWAY_LONG", "1");
    }
    let result = command.output().with_context(|| format!("cannot run {}", executable.file.display()))?;
    let text = String::from_utf8_lossy(&result.stdout).into_owned();
    let (verdicts, outputs) = (verdicts(&text), outputs(&text));
    for test in &executable.tests {
        let output = || outputs.get(test.as_str()).cloned().unwrap_or_default();
        let outcome = match verdicts.get(test.as_str()).copied() {
            Some("ok") => Outcome::Passed,
            // Nothing of this workspace's is ever ignored.
            Some(verdict) if verdict.starts_with("ignored") => {
                Outcome::Failed("ignored, which no test here may be".to_owned())
            }
            Some(_) => Outcome::Failed(output()),
            None => Outcome::Failed(format!(
                "no result; its executable ended with {}\n{}",
                result.status,
                String::from_utf8_lossy(&result.stderr)
            )),
        };
        reporter.add(&executable.full_name(test), outcome, None);
    }
    Ok(())
}

/// The verdicts of the lines `test NAME ... VERDICT`.
pub fn verdicts(text: &str) -> HashMap<&str, &str> {
    let lines = text.lines().filter_map(|line| line.strip_prefix("test ")?.split_once(" ... "));
    // `name - should panic ... ok`
    lines.map(|(name, verdict)| (name.split(" - ").next().unwrap_or(name), verdict.trim())).collect()
}

/// What failing tests printed, from the sections `---- NAME stdout ----`.
pub fn outputs(text: &str) -> HashMap<&str, String> {
    let mut sections: HashMap<&str, String> = HashMap::new();
    let mut current = None;
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----")) {
            current = Some(name);
        } else if line == "failures:" || line.starts_with("test result:") {
            current = None;
        } else if let Some(name) = current {
            let section = sections.entry(name).or_default();
            section.push_str(line);
            section.push('\n');
        }
    }
    sections
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\nrunning 3 tests\ntest a::good ... ok\ntest b - should panic ... ok\ntest c::bad ... FAILED\n\nfailures:\n\n\
                        ---- c::bad stdout ----\nthread panicked\nleft: 1\n\n\nfailures:\n    c::bad\n\ntest result: FAILED. 2 passed\n";

    #[test]
    fn verdicts_and_the_output_of_failures_are_read() {
        let found = verdicts(TEXT);
        assert_eq!((found["a::good"], found["b"], found["c::bad"]), ("ok", "ok", "FAILED"));
        assert_eq!(outputs(TEXT)["c::bad"].trim(), "thread panicked\nleft: 1");
        assert!(!found.contains_key("result: FAILED. 2 passed"));
    }

    #[test]
    fn a_package_is_named_in_either_form_of_its_id() {
        let name = |id: &str| package_name(&serde_json::json!({ "package_id": id }));
        assert_eq!(name("path+file:///w/vfio-bridge#0.1.0"), "vfio_bridge");
        assert_eq!(name("path+file:///w/tests/guest#guest-programs@0.1.0"), "guest_programs");
    }
}
