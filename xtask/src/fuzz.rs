//! `cargo xtask fuzz`: the fuzz targets of `fuzz/`, by the stable compiler. libFuzzer is built from its sources by the
//! machine's C++ compiler; what it wants to know of the code under it is asked for by options of code generation.

use crate::cache::{hex, progress, target, workspace};
use crate::crate_tests::cargo;
use crate::programs;
use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Counters of each edge, a table of places, and what comparisons compare; a panic where a number overflows, too.
const FLAGS: [&str; 9] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
    "--cfg",
    "fuzzing",
    "-Cdebug-assertions=on",
];
/// Bytes of the longest script: longer ones are several of these.
const LONGEST: u32 = 1024;

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Target {
    /// A guest that does anything at all
    Unit,
    /// A state to restore that says anything at all
    State,
}

impl Target {
    fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::State => "state",
        }
    }
}

#[derive(Debug, Args)]
pub struct FuzzArgs {
    #[arg(value_enum, default_value = "unit")]
    target: Target,
    /// How long it runs
    #[arg(long, default_value_t = 60, value_name = "N")]
    seconds: u32,
    /// Makes the corpus of the tree anew: the fewest scripts found so far that reach every place which was reached
    #[arg(long)]
    keep: bool,
    /// More memory than so many MiB is a failure
    #[arg(long, default_value_t = 512, value_name = "N")]
    memory: u32,
}

/// # Errors
/// The target cannot be built (there is no C++ compiler), or a corpus cannot be read or written.
pub fn command(args: &FuzzArgs) -> Result<u8> {
    let name = args.target.name();
    let program = build(name)?;
    let work = target().join("fuzz").join("work").join(name);
    let (found, failures, merged) = (work.join("found"), work.join("failures"), work.join("merged"));
    for folder in [&found, &failures] {
        fs::create_dir_all(folder)?;
    }
    let kept = corpus(name);
    if kept.is_file() {
        let scripts = unpack(&fs::read_to_string(&kept)?).with_context(|| kept.display().to_string())?;
        for (number, script) in scripts.iter().enumerate() {
            fs::write(found.join(format!("kept-{number}")), script)?;
        }
    }
    progress(format_args!("fuzzing {name} for {} s", args.seconds));
    let status = Command::new(&program)
        .arg(&found)
        .args([format!("-max_total_time={}", args.seconds), format!("-rss_limit_mb={}", args.memory)])
        .args([format!("-max_len={LONGEST}"), format!("-artifact_prefix={}/", failures.display())])
        .args(["-len_control=0", "-timeout=20", "-print_final_stats=1"])
        .stdin(Stdio::null())
        .status()?;
    if !status.success() {
        println!("{name} failed; the script is in {}", failures.display());
        return Ok(1);
    }
    if args.keep {
        if merged.exists() {
            fs::remove_dir_all(&merged)?;
        }
        fs::create_dir_all(&merged)?;
        let max_len = format!("-max_len={LONGEST}");
        // A place that is reached counts, and not how often: the fewest scripts that reach all places.
        let merge = ["-set_cover_merge=1", "-use_counters=0", &max_len];
        let status = Command::new(&program).args(merge).args([&merged, &found]).status()?;
        ensure!(status.success(), "the corpus could not be merged");
        let scripts: Vec<Vec<u8>> =
            fs::read_dir(&merged)?.map(|entry| Ok(fs::read(entry?.path())?)).collect::<Result<_>>()?;
        fs::write(&kept, pack(scripts))?;
    }
    Ok(0)
}

/// Where the suite finds the scripts of a target, which it runs again.
fn corpus(target: &str) -> PathBuf {
    workspace().join("vtd/tests/hostile/corpus").join(format!("{target}.txt"))
}

/// Builds a target with coverage. The host is named so that what runs while it is built is without.
fn build(name: &str) -> Result<PathBuf> {
    let (folder, host) = (target().join("fuzz"), programs::host()?);
    progress(format_args!("building the fuzz target {name}"));
    let mut cargo = cargo();
    cargo.env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\x1f"));
    cargo.args(["build", "--quiet", "--release", "--bin", name, "--target", &host, "--manifest-path"]);
    cargo.arg(workspace().join("fuzz/Cargo.toml")).arg("--target-dir").arg(&folder);
    ensure!(cargo.status().context("cannot run cargo")?.success(), "cannot build the fuzz target {name}");
    Ok(folder.join(host).join("release").join(name))
}

/// A corpus as text: a script a line, in hexadecimal, the shortest first.
fn pack(mut scripts: Vec<Vec<u8>>) -> String {
    scripts.retain(|script| !script.is_empty());
    scripts.sort_by(|a, b| (a.len(), a).cmp(&(b.len(), b)));
    scripts.iter().fold(String::new(), |mut text, script| {
        let _ = writeln!(text, "{}", hex(script));
        text
    })
}

fn unpack(text: &str) -> Result<Vec<Vec<u8>>> {
    let byte = |pair: &[u8]| Ok(u8::from_str_radix(std::str::from_utf8(pair)?, 16)?);
    text.lines().map(|line| line.as_bytes().chunks(2).map(byte).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_corpus_is_read_as_it_was_written() {
        let scripts = vec![vec![0xab, 0, 1], vec![7], Vec::new()];
        assert_eq!(pack(scripts), "07\nab0001\n");
        assert_eq!(unpack("07\nab0001\n").unwrap(), [vec![7], vec![0xab, 0, 1]]);
        assert!(unpack("0g\n").is_err());
    }

    #[test]
    fn every_target_has_a_program_and_a_corpus() {
        for target in Target::value_variants() {
            let program = workspace().join("fuzz/fuzz_targets").join(format!("{}.rs", target.name()));
            assert!(program.is_file(), "{}", program.display());
            let scripts = unpack(&fs::read_to_string(corpus(target.name())).unwrap()).unwrap();
            assert!(scripts.iter().all(|script| script.len() <= LONGEST as usize));
            assert!(!scripts.is_empty());
        }
    }
}
