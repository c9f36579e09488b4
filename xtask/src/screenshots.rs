//! `cargo xtask screenshots`: pictures of the page of `causeway report` and of the screen of `causeway ctl PATH top`,
//! both of one run of the image `tour`.

use crate::browser::{self, Browser, View};
use crate::cache::{Cache, progress, workspace};
use crate::crate_tests::cargo;
use crate::images;
use crate::terminal::{self, Terminal, Tmux};
use crate::traced::{self, Running};
use anyhow::{Context, Result, ensure};
use clap::Args;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// What the documents show is to be small: bytes.
pub const LARGEST: u64 = 150_000;
/// The terminal.
const COLUMNS: u32 = 132;
const ROWS: u32 = 22;
/// What nothing here takes nearly as long as.
const LONG: Duration = Duration::from_secs(90);
/// What the screen is to show: the image asks for something once that it does not get.
const REFUSED: &str = "refused 1  ";

#[derive(Debug, Args)]
pub struct ScreenshotsArgs {
    /// Where report.png and top.png go
    #[arg(long, value_name = "DIR", default_value = "docs/images")]
    out: PathBuf,
    /// How long the run is: what is seen of it in the screen's history
    #[arg(long, value_name = "N", default_value = "40", value_parser = clap::value_parser!(u32).range(20..100))]
    seconds: u32,
}

/// What was made.
pub struct Shots {
    pub report: PathBuf,
    pub top: PathBuf,
    /// The text of the screen.
    pub text: String,
}

pub fn command(args: &ScreenshotsArgs) -> Result<u8> {
    if let Some(reason) = traced::unable() {
        anyhow::bail!("{reason}");
    }
    let cache = Cache::open()?;
    let (browser, tmux) = (browser::find(&cache)?, Tmux::find(&cache)?);
    let causeway = images::program()?.causeway;
    let shots = take(&cache, (&browser, &tmux), &causeway, args.seconds, true)?;
    let out = workspace().join(&args.out);
    std::fs::create_dir_all(&out)?;
    for (shot, name) in [(&shots.report, "report.png"), (&shots.top, "top.png")] {
        let size = shot.metadata()?.len();
        ensure!(size <= LARGEST, "{name} has {size} bytes");
        std::fs::copy(shot, out.join(name))?;
        progress(format_args!("{}: {size} bytes", out.join(name).display()));
    }
    Ok(0)
}

/// The image, built.
fn tour() -> Result<PathBuf> {
    let arguments = ["build", "--quiet", "--release", "--package", "images", "--bin", "tour"];
    let result = cargo().args(arguments).stderr(Stdio::inherit()).output().context("cannot run cargo build")?;
    ensure!(result.status.success(), "the image does not build");
    Ok(crate::cache::target().join("release/tour"))
}

/// Runs the image for so many seconds, or, without `whole`, until there is something to see, and makes both pictures.
pub fn take(
    cache: &Cache,
    (browser, tmux): (&Browser, &Tmux),
    causeway: &Path,
    seconds: u32,
    whole: bool,
) -> Result<Shots> {
    let (image, folder) = (tour()?, browser::folder(cache)?);
    let (trace, log) = (folder.join("guest.trace"), folder.join("guest.log"));
    // The path of a socket must not be long, and is in the picture.
    let sockets = Sockets(std::env::temp_dir().join(format!("causeway-{}", std::process::id())));
    std::fs::create_dir(&sockets.0)?;
    let socket = sockets.0.join("guest.sock").display().to_string();
    let file = trace.display().to_string();
    let more = ["--device", "edu,addr=02.0", "--device", "virtio-rng,addr=03.0"];
    let options = [&["--trace", &file, "--socket", &socket], &more[..]].concat();
    progress(format_args!("a run of {seconds} s"));
    let run = || -> Result<String> {
        let machine = Running::start(causeway, &image, &format!("test=tour seconds={seconds}"), &options, &log)?;
        let long = Duration::from_secs(if whole { u64::from(seconds) * 3 / 4 } else { 0 });
        let text = watch(tmux, causeway, &socket, long)?;
        if whole { machine.finish() } else { machine.quit(causeway, &socket) }?;
        Ok(text)
    };
    let text = run().with_context(|| std::fs::read_to_string(&log).unwrap_or_default())?;
    let page = traced::report(causeway, &trace)?;
    let view = View { width: 1100, height: 1190, dark: false };
    let report = browser.look(&page, view, &folder.join("report.png"))?.picture;
    let screen = folder.join("top.html");
    std::fs::write(&screen, terminal::page(&text)?)?;
    let view = View { width: COLUMNS * 8 + 24, height: ROWS * 15 + 20, dark: true };
    let top = browser.look(&screen, view, &folder.join("top.png"))?.picture;
    Ok(Shots { report, top, text })
}

/// What `top` shows after so long, and once there is what is to be seen.
fn watch(tmux: &Tmux, causeway: &Path, socket: &str, long: Duration) -> Result<String> {
    let start = Instant::now();
    while !Path::new(socket).exists() {
        ensure!(start.elapsed() < LONG, "the machine does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    let command = [&causeway.display().to_string(), "ctl", socket, "top"].map(|word| word.to_owned());
    let words: Vec<&str> = command.iter().map(String::as_str).collect();
    let terminal = Terminal::start(tmux, COLUMNS, ROWS, &words)?;
    let start = Instant::now();
    loop {
        let shown = terminal.shown()?;
        if shown.contains(REFUSED) && start.elapsed() >= long {
            return Ok(shown);
        }
        ensure!(start.elapsed() < LONG, "this is not shown: {REFUSED}\n{shown}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

struct Sockets(PathBuf);

impl Drop for Sockets {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
