//! A program at a real terminal, tmux, and what it shows there as a page: a browser makes a picture of that.

use crate::cache::Cache;
use crate::unpacked::{installed, libraries, tree};
use anyhow::{Context, Result, ensure};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

/// The sixteen colours of a terminal, as they are on a dark ground.
const COLOURS: [&str; 16] = [
    "#1c1c1c", "#ff6b6b", "#7ec87e", "#f0c674", "#6aa9ee", "#c39bf0", "#6fd0d0", "#d8d8d8", "#808080", "#ff8f8f",
    "#a3e0a3", "#ffdf9e", "#93c4ff", "#dcc0ff", "#9be8e8", "#ffffff",
];

/// The program that is a terminal.
#[derive(Clone)]
pub struct Tmux {
    program: PathBuf,
    libraries: Option<String>,
}

/// A terminal in which a program runs.
pub struct Terminal {
    tmux: Tmux,
    /// The server's socket is in it: its path must not be long.
    folder: PathBuf,
}

impl Tmux {
    /// This machine's, the cache's, or else the archive's.
    ///
    /// # Errors
    /// There is none, and none comes from the archive.
    pub fn find(cache: &Cache) -> Result<Self> {
        if let Some(program) = installed(&["tmux"], "-V") {
            return Ok(Self { program, libraries: None });
        }
        let tree = tree(cache, "tmux", &[])?;
        Ok(Self { program: tree.join("usr/bin/tmux"), libraries: Some(libraries(&tree)) })
    }
}

impl Terminal {
    /// Starts `command` in a terminal of this size.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(tmux: &Tmux, columns: u32, rows: u32, command: &[&str]) -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("causeway-terminal-{}", std::process::id()));
        std::fs::create_dir(&folder).with_context(|| folder.display().to_string())?;
        let terminal = Self { tmux: tmux.clone(), folder };
        let size = [columns, rows].map(|count| count.to_string());
        let session = ["new-session", "-d", "-x", &size[0], "-y", &size[1], "--"];
        let started = terminal.tmux(&[&session, command].concat())?;
        ensure!(started.status.success(), "tmux: {}", String::from_utf8_lossy(&started.stderr));
        Ok(terminal)
    }

    fn tmux(&self, arguments: &[&str]) -> Result<Output> {
        let Tmux { program, libraries } = &self.tmux;
        let mut command = Command::new(program);
        // Neither its user's settings nor a tmux in which this runs.
        command.args(["-u", "-f", "/dev/null", "-S"]).arg(self.folder.join("tmux")).args(arguments);
        command.env_remove("TMUX").env("LC_ALL", "C.UTF-8").stdin(Stdio::null());
        command.envs(libraries.as_ref().map(|libraries| ("LD_LIBRARY_PATH", libraries)));
        command.output().with_context(|| format!("cannot run {}", program.display()))
    }

    /// What it shows, with its colours as escape sequences.
    pub fn shown(&self) -> Result<String> {
        let captured = self.tmux(&["capture-pane", "-e", "-p"])?;
        ensure!(captured.status.success(), "tmux: {}", String::from_utf8_lossy(&captured.stderr));
        Ok(String::from_utf8_lossy(&captured.stdout).into_owned())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It fails where the program has ended, and the server with it.
        let _ = self.tmux(&["kill-server"]);
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// How letters look: what escape sequences changed.
#[derive(Default, Clone, PartialEq, Eq, Debug)]
struct Style {
    bold: bool,
    dim: bool,
    /// Of [`COLOURS`].
    ink: Option<usize>,
}

impl Style {
    /// Follows the numbers of a sequence that ends in `m`.
    fn change(&mut self, numbers: &str) {
        let mut numbers = numbers.split(';').map(|number| number.parse::<usize>().unwrap_or(0));
        while let Some(number) = numbers.next() {
            match number {
                0 => *self = Self::default(),
                1 => self.bold = true,
                2 => self.dim = true,
                22 => (self.bold, self.dim) = (false, false),
                30..=37 => self.ink = Some(number - 30),
                90..=97 => self.ink = Some(number - 90 + 8),
                38 if numbers.next() == Some(5) => self.ink = numbers.next().filter(|colour| *colour < 16),
                39 => self.ink = None,
                _ => {}
            }
        }
    }

    fn css(&self) -> String {
        let ink = self.ink.map_or(String::new(), |colour| format!("color:{};", COLOURS[colour]));
        let (bold, dim) = (if self.bold { "font-weight:bold;" } else { "" }, if self.dim { "opacity:.6;" } else { "" });
        format!("{ink}{bold}{dim}")
    }
}

/// A page with the text that a terminal shows.
pub fn page(shown: &str) -> Result<String> {
    let mut out = "<!DOCTYPE html><meta charset=\"utf-8\"><style>body{margin:0;background:#1c1c1c;color:#d8d8d8}\
                   pre{margin:10px 12px;font:13px/15px 'DejaVu Sans Mono',monospace}</style><pre>"
        .to_owned();
    let mut style = Style::default();
    for line in shown.trim_end().lines() {
        for (number, part) in line.split("\x1b[").enumerate() {
            let text = match part.split_once('m').filter(|_| number > 0) {
                Some((numbers, text)) => {
                    style.change(numbers);
                    text
                }
                None => part,
            };
            let text = text.replace('&', "&amp;").replace('<', "&lt;");
            if !text.is_empty() {
                write!(out, "<span style=\"{}\">{text}</span>", style.css())?;
            }
        }
        out.push('\n');
    }
    out.push_str("</pre>\n");
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_of_a_terminal_are_those_of_the_page() {
        let text = "\x1b[1ma<b\x1b[0m\x1b[39m\x1b[49m c\n\x1b[38;5;1;1md\x1b[22me\x1b[91mf\x1b[39mg\x1b[2mh  \n\n";
        let page = page(text).unwrap();
        let inside = page.split_once("<pre>").unwrap().1;
        let span = |style: &str, text: &str| format!("<span style=\"{style}\">{text}</span>");
        let wanted = [
            span("font-weight:bold;", "a&lt;b") + &span("", " c") + "\n",
            span("color:#ff6b6b;font-weight:bold;", "d") + &span("color:#ff6b6b;", "e"),
            span("color:#ff8f8f;", "f") + &span("", "g") + &span("opacity:.6;", "h") + "\n</pre>\n",
        ];
        assert_eq!(inside, wanted.concat());
    }
}
