//! The programs that L1 and its guests run, built as static executables: neither has this machine's libraries.

use crate::cache::{progress, target};
use crate::crate_tests::cargo;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A program and its name in `/causeway/bin`.
#[derive(Debug, Clone)]
pub struct Program {
    pub name: String,
    pub file: PathBuf,
}

/// How the programs are optimized.
#[derive(Debug, Clone, Copy)]
pub enum Profile {
    /// As users have it, for what is measured.
    Release,
    /// Without optimization across crates, which takes most of the time of a build.
    Programs,
}

/// `causeway` (or the one given instead of building it) and every program of `guest-programs`.
pub fn build(causeway: Option<&Path>, profile: Profile) -> Result<Vec<Program>> {
    let mut programs = Vec::new();
    let mut packages = vec!["guest-programs"];
    if let Some(file) = causeway {
        ensure!(file.is_file(), "{} is not a file", file.display());
        programs.push(Program { name: "causeway".to_owned(), file: file.to_owned() });
    } else {
        packages.push("vmm");
    }
    let folder = build_static(&packages, profile)?;
    for package in packages {
        let built = binaries(package)?.into_iter();
        programs.extend(built.map(|name| Program { file: folder.join(&name), name }));
    }
    Ok(programs)
}

fn binaries(package: &str) -> Result<Vec<String>> {
    let result = cargo()
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .output()
        .context("cannot run cargo metadata")?;
    ensure!(result.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&result.stderr));
    let metadata: Value = serde_json::from_slice(&result.stdout)?;
    let packages = metadata["packages"].as_array().context("cargo metadata has no packages")?;
    let targets = packages.iter().filter(|p| p["name"] == package).filter_map(|p| p["targets"].as_array()).flatten();
    Ok(targets
        .filter(|t| t["kind"].as_array().is_some_and(|kinds| kinds.iter().any(|kind| kind == "bin")))
        .filter_map(|t| t["name"].as_str().map(str::to_owned))
        .collect())
}

/// Builds the programs of these packages; the folder they are in. It is of their own: the flag must not make others
/// build again. With a target named, the flag is not for what runs while they are built, which cannot be static.
fn build_static(packages: &[&str], profile: Profile) -> Result<PathBuf> {
    let profile = match profile {
        Profile::Release => "release",
        Profile::Programs => "programs",
    };
    let (folder, host) = (target().join("static"), host()?);
    let flags = [env::var("RUSTFLAGS").unwrap_or_default(), "-Ctarget-feature=+crt-static".to_owned()].join(" ");
    progress(format_args!("building the static programs of {}", packages.join(" and ")));
    let mut cargo = cargo();
    cargo.env("RUSTFLAGS", flags.trim()).env_remove("CARGO_ENCODED_RUSTFLAGS");
    cargo.args(["build", "--quiet", "--bins", "--profile", profile, "--target", &host, "--target-dir"]).arg(&folder);
    cargo.args(packages.iter().flat_map(|package| ["--package", package]));
    let result = cargo.output().context("cannot run cargo")?;
    ensure!(result.status.success(), "cannot build them:\n{}", String::from_utf8_lossy(&result.stderr));
    Ok(folder.join(host).join(profile))
}

/// The target that the compiler builds for by itself.
pub fn host() -> Result<String> {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let result = Command::new(rustc).arg("-vV").output().context("cannot run rustc")?;
    let text = String::from_utf8(result.stdout).context("rustc -vV")?;
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc does not say what it builds for")?.to_owned())
}
