//! The crates' criterion benchmarks: their medians and, where valgrind is installed, how many instructions an operation
//! takes. Times differ with the machine and what else it does; instructions hardly do.

use crate::cache::{Cache, progress, target};
use crate::cases::in_ci;
use crate::crate_tests::cargo;
use crate::report::{Outcome, Reporter};
use crate::unpacked::{installed, tree};
use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Instant, SystemTime};

/// What is counted of an operation takes about so long without being counted, which makes it some fifty times slower.
const COUNTED_NS: f64 = 10e6;
/// What is counted for its limit alone takes about so many instructions.
const COUNTED_FOR_A_LIMIT: u64 = 20_000_000;
/// Fewer would be lost beside what precedes them, and more take too long.
const ITERATIONS: std::ops::RangeInclusive<u64> = 16..=40_000;
/// The same for a limit, of an operation that takes millions.
const FEWEST_FOR_A_LIMIT: u64 = 2;
/// The check of `cargo xtask test` that no operation takes more than it may.
pub const CHECK: &str = "check::instructions";

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
    if let Some(valgrind) = Valgrind::installed() {
        progress("counting instructions");
        for program in &programs {
            count(&valgrind, program, &mut found)?;
        }
    } else {
        progress("instructions are not counted: there is no valgrind (apt-get install valgrind)");
    }
    Ok(found)
}

/// The limits of a package: `benches/limits.toml`, an operation's name and the most instructions that it may take.
#[derive(Debug)]
pub struct Limits {
    folder: PathBuf,
    of: BTreeMap<String, u64>,
}

/// What counts instructions.
pub struct Valgrind {
    program: PathBuf,
    /// Where its tools are, of one that is not installed.
    tools: Option<PathBuf>,
}

impl Valgrind {
    fn installed() -> Option<Self> {
        installed(&["valgrind"], "--version").map(|program| Self { program, tools: None })
    }

    /// This machine's, the cache's, or else the archive's.
    ///
    /// # Errors
    /// There is none, and none comes from the archive.
    pub fn find(cache: impl FnOnce() -> Result<Cache>) -> Result<Self> {
        match Self::installed() {
            Some(valgrind) => Ok(valgrind),
            None => Self::unpacked(&tree(&cache()?, "valgrind", &["libc6-dbg"])?),
        }
    }

    /// That of a tree. The program is named differently where a script stands before it, which looks for it in `/usr`.
    fn unpacked(tree: &Path) -> Result<Self> {
        let programs = ["usr/bin/valgrind.bin", "usr/bin/valgrind"].map(|name| tree.join(name));
        let program = programs.into_iter().find(|file| file.is_file());
        let tools = tree.join("usr/libexec/valgrind");
        ensure!(tools.is_dir(), "valgrind's package has no {}", tools.display());
        Ok(Self { program: program.context("valgrind's package has no program")?, tools: Some(tools) })
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.envs(self.tools.as_ref().map(|tools| ("VALGRIND_LIB", OsString::from(tools))));
        command
    }
}

/// Tells as a check of the whole tree whether an operation takes more instructions than it may.
pub fn check(cache: impl FnOnce() -> Result<Cache>, reporter: &Reporter) {
    let start = Instant::now();
    let outcome = match Valgrind::find(cache) {
        Err(error) if !in_ci() => Outcome::Skipped(format!("there is no valgrind: {error:#}").replace('\n', " ")),
        Err(error) => Outcome::Failed(format!("{error:#}")),
        Ok(valgrind) => match check_limits(&valgrind, &|_| true) {
            Ok(complaints) if complaints.is_empty() => Outcome::Passed,
            Ok(complaints) => Outcome::Failed(complaints.join("\n")),
            Err(error) => Outcome::Failed(format!("{error:#}")),
        },
    };
    reporter.add(CHECK, outcome, Some(start.elapsed()));
}

/// Counts the instructions of the operations that have a limit, and times nothing. Each that takes more than it may is
/// named, and each that is none.
pub fn check_limits(valgrind: &Valgrind, wants: &dyn Fn(&str) -> bool) -> Result<Vec<String>> {
    let result = cargo().args(["metadata", "--no-deps", "--format-version", "1"]).output()?;
    let metadata: Value = serde_json::from_slice(&result.stdout).context("cannot run cargo metadata")?;
    let mut complaints = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or_default();
        let manifest = Path::new(package["manifest_path"].as_str().unwrap_or_default());
        let Some(limits) = wants(name).then(|| limits(manifest)).transpose()?.flatten() else { continue };
        let mut counted = BTreeMap::new();
        for bench in package["targets"].as_array().into_iter().flatten().filter(|t| t["kind"][0] == "bench") {
            let program = program(name, bench["name"].as_str().unwrap_or_default())?;
            let names = operations(&program)?;
            for (operation, limit) in limits.of.iter().filter(|(operation, _)| names.contains(operation)) {
                let iterations = (COUNTED_FOR_A_LIMIT / limit.max(&1)).clamp(FEWEST_FOR_A_LIMIT, *ITERATIONS.end());
                counted.insert(operation.clone(), instructions_each(valgrind, &program, operation, iterations)?);
            }
        }
        complaints.extend(beyond(&limits, &counted));
    }
    Ok(complaints)
}

fn limits(manifest: &Path) -> Result<Option<Limits>> {
    let file = manifest.with_file_name("benches").join("limits.toml");
    if !file.is_file() {
        return Ok(None);
    }
    let of = toml::from_str(&std::fs::read_to_string(&file)?).with_context(|| file.display().to_string())?;
    Ok(Some(Limits { folder: file, of }))
}

/// What is wrong with what was counted.
fn beyond(limits: &Limits, counted: &BTreeMap<String, f64>) -> Vec<String> {
    let complaint = |(operation, limit): (&String, &u64)| match counted.get(operation) {
        None => Some(format!("{operation} has a limit and is no benchmark ({})", limits.folder.display())),
        Some(count) => {
            progress(format_args!("{operation}: {count:.0} instructions of at most {limit}"));
            (*count > *limit as f64).then(|| format!("{operation} takes {count:.0} instructions: at most {limit}"))
        }
    };
    limits.of.iter().filter_map(complaint).collect()
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
fn count(valgrind: &Valgrind, program: &Path, benches: &mut [Criterion]) -> Result<()> {
    let names = operations(program)?;
    for bench in benches.iter_mut().filter(|bench| names.contains(&bench.name)) {
        bench.instructions = Some(instructions_each(valgrind, program, &bench.name, iterations(bench.median_ns))?);
    }
    Ok(())
}

/// What a benchmark says that it can count.
fn operations(program: &Path) -> Result<Vec<String>> {
    let result = Command::new(program).arg("count").stdin(Stdio::null()).output()?;
    Ok(String::from_utf8_lossy(&result.stdout).lines().map(str::to_owned).collect())
}

fn instructions_each(valgrind: &Valgrind, program: &Path, name: &str, iterations: u64) -> Result<f64> {
    let (once, twice) =
        (instructions(valgrind, program, name, iterations)?, instructions(valgrind, program, name, iterations * 2)?);
    Ok(twice.saturating_sub(once) as f64 / iterations as f64)
}

fn iterations(median_ns: f64) -> u64 {
    ((COUNTED_NS / median_ns.max(0.1)) as u64).clamp(*ITERATIONS.start(), *ITERATIONS.end())
}

fn instructions(valgrind: &Valgrind, program: &Path, name: &str, iterations: u64) -> Result<u64> {
    let result = valgrind
        .command()
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
    fn more_instructions_than_a_limit_are_a_complaint_and_so_is_a_limit_of_nothing() {
        let of = BTreeMap::from([("a/b".to_owned(), 65), ("c".to_owned(), 7), ("gone".to_owned(), 1)]);
        let limits = Limits { folder: PathBuf::from("benches/limits.toml"), of };
        let counted = |a: f64| BTreeMap::from([("a/b".to_owned(), a), ("c".to_owned(), 7.0)]);
        let gone = "gone has a limit and is no benchmark (benches/limits.toml)";
        assert_eq!(beyond(&limits, &counted(65.0)), [gone]);
        assert_eq!(beyond(&limits, &counted(65.6)), ["a/b takes 66 instructions: at most 65", gone]);
    }

    #[test]
    fn an_unpacked_valgrind_is_told_where_its_tools_are() {
        let tree = std::env::temp_dir().join(format!("causeway-valgrind-{}", std::process::id()));
        std::fs::create_dir_all(tree.join("usr/libexec/valgrind")).unwrap();
        std::fs::create_dir_all(tree.join("usr/bin")).unwrap();
        let without = Valgrind::unpacked(&tree).map(|_| ());
        std::fs::write(tree.join("usr/bin/valgrind"), "").unwrap();
        let plain = Valgrind::unpacked(&tree).unwrap();
        std::fs::write(tree.join("usr/bin/valgrind.bin"), "").unwrap();
        let wrapped = Valgrind::unpacked(&tree).unwrap();
        std::fs::remove_dir_all(&tree).unwrap();
        assert!(without.is_err());
        assert!(plain.program.ends_with("valgrind") && wrapped.program.ends_with("valgrind.bin"));
        let command = wrapped.command();
        let told: Vec<_> = command.get_envs().collect();
        assert_eq!(told, [("VALGRIND_LIB".as_ref(), Some(tree.join("usr/libexec/valgrind").as_os_str()))]);
        assert!(Valgrind::unpacked(&tree).is_err());
    }

    #[test]
    fn the_limits_of_the_tree_are_numbers() {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../vtd/Cargo.toml");
        let limits = limits(&manifest).unwrap().unwrap();
        assert!(limits.of.contains_key("translate/hit"), "{limits:?}");
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
