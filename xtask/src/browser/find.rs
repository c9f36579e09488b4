//! Where the browser comes from.

use super::Browser;
use crate::apt::Apt;
use crate::cache::{Cache, progress, recipe};
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Programs of this machine that do, the first one that runs.
const PROGRAMS: [&str; 6] = [
    "chromium-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome-stable",
    "google-chrome",
    "microsoft-edge-stable",
];
const PACKAGE: &str = "chromium-headless-shell";
/// What is wanted without what it depends on: the graphical browser's, with a compiler for graphics processors.
const BARE: [&str; 1] = ["chromium-common"];
/// This machine's own are of the same release, and its loader takes no other C library.
const THIS_MACHINES: [&str; 3] = ["libc6", "libc-bin", "libc6-i386"];
/// What it takes while it is unpacked: the downloads and the tree.
const FREE_BYTES: u64 = 1 << 30;

/// A browser: this machine's, the cache's, or else the archive's.
///
/// # Errors
/// There is none, and none comes from the archive.
pub fn find(cache: &Cache) -> Result<Browser> {
    let folder = super::folder(cache)?;
    if let Some(program) = installed() {
        return Ok(Browser { program, environment: Vec::new(), folder });
    }
    let tree = unpacked(cache)?;
    let program = tree.join("usr/lib/chromium").join(PACKAGE);
    ensure!(program.is_file(), "the package {PACKAGE} has no {}", program.display());
    let fonts = tree.join("fonts.conf");
    let environment = vec![("LD_LIBRARY_PATH", libraries(&tree)), ("FONTCONFIG_FILE", fonts.display().to_string())];
    Ok(Browser { program, environment, folder })
}

fn installed() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let files = PROGRAMS.iter().flat_map(|name| std::env::split_paths(&path).map(move |folder| folder.join(name)));
    files.filter(|file| file.is_file()).find(|file| runs(file))
}

/// A package may be no more than a hint at another one.
fn runs(program: &Path) -> bool {
    let mut command = Command::new(program);
    command.arg("--version").stdin(Stdio::null());
    command.output().is_ok_and(|result| result.status.success())
}

/// Where the libraries of an unpacked tree are.
pub fn libraries(tree: &Path) -> String {
    let folders = ["usr/lib", "lib"].map(|folder| tree.join(folder).join("x86_64-linux-gnu"));
    let own = folders[0].join("pulseaudio");
    folders.iter().chain([&own]).map(|folder| folder.display().to_string()).collect::<Vec<_>>().join(":")
}

/// The tree of the browser's packages.
fn unpacked(cache: &Cache) -> Result<PathBuf> {
    let tree = cache.path("browser");
    let kind = recipe(&["browser 1", include_str!("find.rs"), &crate::apt::release()?]);
    if cache.is_fresh("browser", &kind) {
        return Ok(tree);
    }
    cache.need_free(FREE_BYTES)?;
    cache.forget("browser")?;
    if tree.exists() {
        std::fs::remove_dir_all(&tree)?;
    }
    progress("reading the package lists, for a browser");
    let apt = Apt::open_release(&cache.path("apt-browser"))?;
    let mut pinned = apt.closure_with_bare(PACKAGE, &BARE).context("this release's archive has no such browser")?;
    pinned.retain(|package| !THIS_MACHINES.iter().any(|own| package.starts_with(&format!("{own}="))));
    progress(format_args!("unpacking {} packages of {PACKAGE} (nothing is installed)", pinned.len()));
    apt.unpack(&pinned, &tree)?;
    apt.discard_downloads()?;
    let config = format!(
        "<?xml version=\"1.0\"?>\n<!DOCTYPE fontconfig SYSTEM \"fonts.dtd\">\n<fontconfig>\n\
         <dir>{0}/usr/share/fonts</dir>\n<cachedir>{0}/fonts.cache</cachedir>\n</fontconfig>\n",
        tree.display()
    );
    std::fs::write(tree.join("fonts.conf"), config)?;
    cache.stamp("browser", &kind)?;
    Ok(tree)
}
