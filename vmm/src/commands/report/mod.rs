//! `causeway report TRACE -o FILE.html`: one page of a trace, for people.

mod charts;
mod grid;
mod line;
mod page;
mod summary;
mod text;

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use crate::exit::{ERROR, USAGE};
use crate::messages::say;
use grid::Grid;
use line::Line;
use summary::Summary;

/// Containers that have a picture: those with the most operations.
const PICTURES: usize = 4;
/// The longest line that is looked at: bytes. The rest of a longer one is another line, which is none.
const LONGEST_LINE: u64 = 4096;

/// `causeway report`.
#[derive(Args, Debug)]
#[command(after_help = "\
The page has its pictures in it, and needs neither a network nor scripts. Exit codes: 0 it is written; 2 usage, and
files that cannot be read or written; 6 an error while reading.")]
pub struct ReportArgs {
    /// The file of `causeway run --trace FILE`
    #[arg(value_name = "TRACE")]
    trace: PathBuf,
    /// The page
    #[arg(short = 'o', long = "out", value_name = "FILE.html")]
    out: PathBuf,
}

/// Does what the command line says. Gives back the exit code.
pub fn run(args: &ReportArgs) -> ExitCode {
    let ReportArgs { trace, out } = args;
    let mut file = match open(trace) {
        Ok(file) => file,
        Err(e) => {
            say(format_args!("causeway report: {} cannot be read: {e}; it is the file of --trace", trace.display()));
            return ExitCode::from(USAGE);
        }
    };
    let name = trace.file_name().unwrap_or(trace.as_os_str()).to_string_lossy();
    let page = match make(&name, &mut file) {
        Ok(page) => page,
        Err(e) => {
            say(format_args!("causeway report: {}: {e}", trace.display()));
            return ExitCode::from(ERROR);
        }
    };
    match fs::write(out, page) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            say(format_args!("causeway report: {} cannot be written: {e}", out.display()));
            ExitCode::from(USAGE)
        }
    }
}

/// Only a file can be read twice, and has an end.
fn open(path: &Path) -> io::Result<File> {
    let file = File::open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file")),
    }
}

/// The page of `file`, which is called `name`.
fn make(name: &str, file: &mut (impl Read + Seek)) -> io::Result<String> {
    let mut summary = Summary::default();
    each_line(file, |text| summary.add(text))?;
    let mut busiest: Vec<_> = summary.containers.0.iter().filter(|(_, container)| !container.used.is_empty()).collect();
    busiest.sort_by_key(|(_, container)| std::cmp::Reverse(container.maps + container.unmaps));
    let mut grids: Vec<(String, Grid)> = busiest
        .into_iter()
        .take(PICTURES)
        .map(|(name, container)| (name.clone(), Grid::new(&container.used, summary.end)))
        .collect();
    each_line(file, |text| {
        let Some(line) = Line::parse(text).filter(|line| matches!(line.what, ("host", "map" | "unmap"))) else {
            return;
        };
        let name = line.name("container");
        if let Some((_, grid)) = grids.iter_mut().find(|(container, _)| *container == name) {
            grid.add(&line);
        }
    })?;
    grids.iter_mut().for_each(|(_, grid)| grid.finish());
    page::page(name, &summary, &grids).map_err(io::Error::other)
}

/// Calls `each` with every line from the beginning on. What is no text is replaced.
fn each_line(file: &mut (impl Read + Seek), mut each: impl FnMut(&str)) -> io::Result<()> {
    file.rewind()?;
    let mut reader = BufReader::with_capacity(1 << 16, file);
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        each(&String::from_utf8_lossy(&line));
    }
}

#[cfg(test)]
#[path = "report_test.rs"]
mod report_test;
