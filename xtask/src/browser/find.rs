//! Where the browser comes from.

use super::Browser;
use crate::cache::Cache;
use crate::unpacked::{installed, libraries, tree};
use anyhow::{Result, ensure};

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

/// A browser: this machine's, the cache's, or else the archive's.
///
/// # Errors
/// There is none, and none comes from the archive.
pub fn find(cache: &Cache) -> Result<Browser> {
    let folder = super::folder(cache)?;
    if let Some(program) = installed(&PROGRAMS, "--version") {
        return Ok(Browser { program, environment: Vec::new(), folder });
    }
    let tree = tree(cache, PACKAGE, &BARE)?;
    let program = tree.join("usr/lib/chromium").join(PACKAGE);
    ensure!(program.is_file(), "the package {PACKAGE} has no {}", program.display());
    let fonts = tree.join("fonts.conf");
    let config = format!(
        "<?xml version=\"1.0\"?>\n<!DOCTYPE fontconfig SYSTEM \"fonts.dtd\">\n<fontconfig>\n\
         <dir>{0}/usr/share/fonts</dir>\n<cachedir>{0}/fonts.cache</cachedir>\n</fontconfig>\n",
        tree.display()
    );
    std::fs::write(&fonts, config)?;
    let environment = vec![("LD_LIBRARY_PATH", libraries(&tree)), ("FONTCONFIG_FILE", fonts.display().to_string())];
    Ok(Browser { program, environment, folder })
}
