//! The crates' criterion benchmarks: their medians and, where valgrind is installed, how many instructions an operation
//! takes. Times differ with the machine and what else it does; instructions hardly do.

use crate::cache::{progress, target};
use crate::crate_tests::cargo;
use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

/// What is counted of an operation takes about so long without being counted, which makes it some fifty times slower.
const COUNTED_NS: f64 = 10e6;
/// Fewer would be lost beside what precedes them, and more take too long.
const ITERATIONS: std::ops::RangeInclusive<u64> = 16..=40_000;

#[derive(Debug, Serialize)]
pub struct Criterion {
    pub name: String,
    pub median_ns: f64,
    /// Of one operation, as valgrind counts them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instructions: Option<f64>,
}

/// Runs the benchmarks of the crates, those with a name that is wanted.
pub fn run(wants: &dyn Fn(&str) -> bool) -> Result<Vec<Criterion>> {
    let result = cargo()
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .output()
        .context("cannot run cargo metadata")?;
    let metadata: Value = serde_json::from_slice(&result.stdout)?;
    let started = SystemTime::now();
    let mut programs = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or_default();
        for bench in package["targets"].as_array().into_iter().flatten().filter(|t| t["kind"][0] == "bench") {
            let bench = bench["name"].as_str().unwrap_or_default();
            if wants(&format!("{name}::{bench}")) {
                progress(format_args!("{name}::{bench}"));
                let status = cargo().args(["bench", "--quiet", "--package", name, "--bench", bench]).status()?;
                ensure!(status.success(), "the benchmark {name}::{bench} failed");
                programs.push(program(name, bench)?);
            }
        }
    }
    let mut found = Vec::new();
    if programs.is_empty() {
        return Ok(found);
    }
    estimates(&target().join("criterion"), started, &mut found)?;
    found.sort_by(|a, b| a.name.cmp(&b.name));
    if Command::new("valgrind").arg("--version").output().is_ok_and(|result| result.status.success()) {
        progress("counting instructions");
        for program in &programs {
            count(program, &mut found)?;
        }
    } else {
        progress("instructions are not counted: there is no valgrind (apt-get install valgrind)");
    }
    Ok(found)
}

/// The executable of a benchmark, which is built.
fn program(package: &str, bench: &str) -> Result<PathBuf> {
    let build = ["bench", "--quiet", "--no-run", "--message-format=json-render-diagnostics"];
    let result = cargo().args(build).args(["--package", package, "--bench", bench]).output()?;
    executable(&result.stdout).with_context(|| format!("cargo has no executable of {package}::{bench}"))
}

fn executable(messages: &[u8]) -> Option<PathBuf> {
    String::from_utf8_lossy(messages)
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
}

/// criterion leaves `NAME/new/estimates.json` and `NAME/new/benchmark.json`.
fn estimates(folder: &Path, newer_than: SystemTime, found: &mut Vec<Criterion>) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let file = path.join("estimates.json");
        if path.ends_with("new") && file.is_file() {
            if std::fs::metadata(&file)?.modified()? >= newer_than {
                let json = |file: &Path| -> Result<Value> { Ok(serde_json::from_slice(&std::fs::read(file)?)?) };
                let median_ns =
                    json(&file)?["median"]["point_estimate"].as_f64().context("an estimate without a median")?;
                let name = json(&path.join("benchmark.json"))?["full_id"].as_str().unwrap_or_default().to_owned();
                found.push(Criterion { name, median_ns, instructions: None });
            }
        } else if path.is_dir() {
            estimates(&path, newer_than, found)?;
        }
    }
    Ok(())
}

/// Counts what this program says it can count (`PROGRAM count` names it): an operation's instructions are the
/// difference of two runs, one with twice as many, since each makes its tables first.
fn count(program: &Path, benches: &mut [Criterion]) -> Result<()> {
    let result = Command::new(program).arg("count").stdin(Stdio::null()).output()?;
    let names = String::from_utf8_lossy(&result.stdout).into_owned();
    for bench in benches.iter_mut().filter(|bench| names.lines().any(|name| name == bench.name)) {
        let iterations = iterations(bench.median_ns);
        let (once, twice) =
            (instructions(program, &bench.name, iterations)?, instructions(program, &bench.name, iterations * 2)?);
        bench.instructions = Some(twice.saturating_sub(once) as f64 / iterations as f64);
    }
    Ok(())
}

fn iterations(median_ns: f64) -> u64 {
    ((COUNTED_NS / median_ns.max(0.1)) as u64).clamp(*ITERATIONS.start(), *ITERATIONS.end())
}

fn instructions(program: &Path, name: &str, iterations: u64) -> Result<u64> {
    let result = Command::new("valgrind")
        .args(["--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"])
        .arg(program)
        .args(["count", name, &iterations.to_string()])
        .stdin(Stdio::null())
        .output()?;
    let text = String::from_utf8_lossy(&result.stderr);
    ensure!(result.status.success(), "counting the instructions of {name}: {}", text.trim());
    counted(&text).with_context(|| format!("valgrind did not say how many instructions {name} took: {}", text.trim()))
}

/// From the line `==PID== I refs: 1,234`.
fn counted(text: &str) -> Option<u64> {
    let number = text.lines().find_map(|line| line.split_once("refs:"))?.1;
    number.trim().replace(',', "").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_read_as_valgrind_prints_them() {
        let text = "==7== Cachegrind, a high-precision tracing profiler\n==7== \n==7== I refs:        51,234,567\n";
        assert_eq!(counted(text), Some(51_234_567));
        assert_eq!(counted("==7== I   refs:      12\n"), Some(12));
        assert_eq!(counted("==7== Command: walk count a 5\n"), None);
    }

    #[test]
    fn quick_operations_are_counted_more_often() {
        assert_eq!(iterations(4.4), 40_000);
        assert_eq!(iterations(1000.0), 10_000);
        assert_eq!(iterations(5e9), 16);
        assert_eq!(iterations(0.0), 40_000);
    }

    #[test]
    fn the_executable_is_the_message_that_has_one() {
        let text = b"{\"reason\":\"compiler-artifact\",\"executable\":null}\nnoise\n{\"executable\":\"/t/walk-1\"}\n{\"reason\":\"build-finished\"}\n";
        assert_eq!(executable(text), Some(PathBuf::from("/t/walk-1")));
        assert_eq!(executable(b"{\"reason\":\"build-finished\"}\n"), None);
    }
}
