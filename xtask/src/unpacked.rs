//! Programs of this machine's release that are not installed: their packages, unpacked into the bench's cache.

use crate::apt::{self, Apt};
use crate::cache::{Cache, progress, recipe};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// This machine's own are of the same release, and its loader takes no other C library.
const THIS_MACHINES: [&str; 3] = ["libc6", "libc-bin", "libc6-i386"];
/// What it takes meanwhile: the downloads and the tree.
const FREE_BYTES: u64 = 1 << 30;

/// The first of these programs on `PATH` that runs, told `argument`: a package may be no more than a hint at another.
pub fn installed(programs: &[&str], argument: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let files = programs.iter().flat_map(|name| std::env::split_paths(&path).map(move |folder| folder.join(name)));
    let runs = |file: &PathBuf| {
        let mut command = Command::new(file);
        command.arg(argument).stdin(Stdio::null()).output().is_ok_and(|result| result.status.success())
    };
    files.filter(|file| file.is_file()).find(runs)
}

/// The tree of a package and what it depends on; of `bare`, without what only they depend on.
///
/// # Errors
/// There is no apt, or no such package in its archive.
pub fn tree(cache: &Cache, package: &str, bare: &[&str]) -> Result<PathBuf> {
    let tree = cache.path(package);
    let kind = recipe(&[&["unpacked 1", package], bare, &THIS_MACHINES, &[&apt::release()?]].concat());
    if cache.is_fresh(package, &kind) {
        return Ok(tree);
    }
    cache.need_free(FREE_BYTES)?;
    cache.forget(package)?;
    if tree.exists() {
        std::fs::remove_dir_all(&tree)?;
    }
    progress(format_args!("reading the package lists, for {package}"));
    let apt = Apt::open_release(&cache.path("apt-unpacked"))?;
    let pinned = apt.closure_with_bare(package, bare);
    let mut pinned = pinned.with_context(|| format!("this release's archive has no {package}"))?;
    pinned.retain(|pinned| !THIS_MACHINES.iter().any(|own| pinned.starts_with(&format!("{own}="))));
    progress(format_args!("unpacking {} packages of {package} (nothing is installed)", pinned.len()));
    apt.unpack(&pinned, &tree)?;
    apt.discard_downloads()?;
    cache.stamp(package, &kind)?;
    Ok(tree)
}

/// Where the libraries of a tree are, as the loader wants to be told.
pub fn libraries(tree: &Path) -> String {
    let folders = ["usr/lib", "lib"].map(|folder| tree.join(folder).join("x86_64-linux-gnu"));
    let own = folders[0].join("pulseaudio");
    folders.iter().chain([&own]).map(|folder| folder.display().to_string()).collect::<Vec<_>>().join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_on_the_path_is_one_that_runs() {
        assert!(installed(&["no-such-program", "true"], "--version").is_some_and(|file| file.ends_with("true")));
        assert_eq!(installed(&["false"], "x"), None);
        assert_eq!(installed(&["no-such-program"], "x"), None);
    }
}
