//! Pages, as a real browser shows them: without a screen, and each time as one that was never used before.
//!
//! The browser is one of this machine's, or else comes from the machine's archive into the bench's cache, as QEMU does
//! ([`crate::apt`]): nothing is installed.

mod find;
mod pixels;

use crate::cache::Cache;
use crate::children::end_with_this_process;
use anyhow::{Context, Result, ensure};
use regex::Regex;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

pub use find::find;
pub use pixels::Pixels;

/// What no page here takes nearly as long as.
const LONG: Duration = Duration::from_secs(120);
const ALWAYS: [&str; 10] = [
    "--headless",
    // It runs as root, too, and shows nothing but what was made here.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--dump-dom",
];

/// A browser of the Chromium family.
pub struct Browser {
    program: PathBuf,
    /// Of its process.
    environment: Vec<(&'static str, String)>,
    /// Where its profiles come and go.
    folder: PathBuf,
}

/// How a page is to be shown.
#[derive(Debug, Clone, Copy)]
pub struct View {
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// Whether the reader prefers light on dark.
    pub dark: bool,
}

/// What was seen of a page.
pub struct Seen {
    /// The elements as the browser has them once the page is whole, as HTML.
    pub dom: String,
    /// The upper part of it, as large as the view.
    pub picture: PathBuf,
    /// What the browser said in the console: errors of scripts, and what the page's policy blocked.
    pub console: Vec<String>,
    /// The addresses that were asked of the network; what is on the disk does not count.
    pub requests: Vec<String>,
}

impl Browser {
    /// Opens the file `page` and leaves the picture in `picture`.
    ///
    /// # Errors
    /// The browser does not run, or does not end by itself.
    pub fn look(&self, page: &Path, view: View, picture: &Path) -> Result<Seen> {
        let profile = self.folder.join("profile");
        let _ = fs::remove_dir_all(&profile);
        fs::create_dir_all(&profile)?;
        let page = page.canonicalize().with_context(|| format!("{} is not there", page.display()))?;
        let (log, said, dom) = (profile.join("net.json"), profile.join("said"), profile.join("dom"));
        let mut command = Command::new(&self.program);
        command.args(ALWAYS).envs(self.environment.iter().cloned()).env("LC_ALL", "C.UTF-8").env("HOME", &profile);
        command.arg(format!("--user-data-dir={}", profile.display()));
        command.arg(format!("--window-size={},{}", view.width, view.height));
        command.arg(format!("--blink-settings=preferredColorScheme={}", u8::from(!view.dark)));
        command.arg(format!("--log-net-log={}", log.display())).arg(format!("--screenshot={}", picture.display()));
        command.arg(format!("file://{}", page.display()));
        command.stdin(Stdio::null()).stdout(File::create(&dom)?).stderr(File::create(&said)?);
        end_with_this_process(&mut command, libc::SIGKILL);
        let child = command.spawn().with_context(|| format!("cannot run {}", self.program.display()))?;
        let status = wait(child)?;
        let said = text(&said)?;
        ensure!(status.success() && picture.is_file(), "the browser ended with {status}:\n{said}");
        let seen = Seen {
            dom: text(&dom)?,
            picture: picture.to_owned(),
            console: console(&said),
            requests: requests(&text(&log)?)?,
        };
        fs::remove_dir_all(&profile)?;
        Ok(seen)
    }
}

fn text(file: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    File::open(file).and_then(|mut file| file.read_to_end(&mut bytes)).with_context(|| file.display().to_string())?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Until it has ended, or [`LONG`] is over.
fn wait(mut child: Child) -> Result<ExitStatus> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if start.elapsed() > LONG {
            child.kill()?;
            child.wait()?;
            anyhow::bail!("the browser did not end within {} s", LONG.as_secs());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The lines of the console: `[...:INFO:CONSOLE:1] "text", source: ...`.
fn console(said: &str) -> Vec<String> {
    said.lines().filter_map(|line| line.split_once(":CONSOLE")).map(|(_, text)| text.to_owned()).collect()
}

/// The addresses in a log of the network.
fn requests(log: &str) -> Result<Vec<String>> {
    // It is a JSON document whose end is missing where the browser was in a hurry.
    let address = Regex::new(r#""url":"([^"]*)""#)?;
    ensure!(log.contains("\"constants\""), "the browser wrote no log of the network");
    let mut found: Vec<String> = address.captures_iter(log).map(|found| found[1].to_owned()).collect();
    found.sort();
    found.dedup();
    Ok(found)
}

/// A folder in the cache for what is made of pages.
pub fn folder(cache: &Cache) -> Result<PathBuf> {
    let folder = cache.path("run/browser");
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_browser_says_is_read() {
        let said =
            "[1/2:ERROR:dbus/bus.cc:405] Failed\n[1/2:INFO:CONSOLE:1] \"Uncaught Error: boo\", source: file:///c (1)\n";
        assert_eq!(console(said), [":1] \"Uncaught Error: boo\", source: file:///c (1)"]);
        let log = "{\"constants\": {}, \"events\":[{\"params\":{\"url\":\"http://b.invalid/\"}},\n\
                   {\"params\":{\"url\":\"http://a.invalid/\"}},{\"params\":{\"url\":\"http://b.invalid/\"}}";
        assert_eq!(requests(log).unwrap(), ["http://a.invalid/", "http://b.invalid/"]);
        assert!(requests("").is_err());
    }
}
