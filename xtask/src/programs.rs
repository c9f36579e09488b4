//! The programs that L1 and its guests run, built as static executables: neither has this machine's libraries.

use crate::cache::{progress, target};
use crate::crate_tests::cargo;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A program and its name in `/causeway/bin`.
#[derive(Debug, Clone)]
pub struct Program {
    pub name: String,
    pub file: PathBuf,
}

/// `causeway` (or the one given instead of building it) and every program of `guest-programs`.
pub fn build(causeway: Option<&Path>) -> Result<Vec<Program>> {
    let mut programs = Vec::new();
    match causeway {
        Some(file) => {
            ensure!(file.is_file(), "{} is not a file", file.display());
            programs.push(Program { name: "causeway".to_owned(), file: file.to_owned() });
        }
        None => programs.push(build_one("vmm", "causeway")?),
    }
    for name in binaries("guest-programs")? {
        programs.push(build_one("guest-programs", &name)?);
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

/// A target folder of its own: the flag is this build's only, and must not make others build again.
fn build_one(package: &str, name: &str) -> Result<Program> {
    let folder = target().join("static");
    progress(format_args!("building {name}"));
    let result = cargo()
        .args(["rustc", "--quiet", "--release", "--package", package, "--bin", name, "--target-dir"])
        .arg(&folder)
        .args(["--", "-Ctarget-feature=+crt-static"])
        .output()
        .context("cannot run cargo")?;
    ensure!(result.status.success(), "cannot build {name}:\n{}", String::from_utf8_lossy(&result.stderr));
    Ok(Program { name: name.to_owned(), file: folder.join("release").join(name) })
}
