//! Our own messages: to stderr or a file, and never in the way of the machine.

use std::fmt::Arguments;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::output::{Output, OutputWriter};
use crate::signals::Signals;

/// How long the last messages may take to be read.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Where messages go.
pub struct Messages {
    stderr: Output,
    /// The file of `--log` where it is one that may block.
    file: Option<Output>,
}

/// Whether writing to `file` blocks nobody for long, so that what is written is there at once, whatever happens next.
fn is_regular(file: BorrowedFd<'_>) -> bool {
    file.try_clone_to_owned().and_then(|file| File::from(file).metadata()).is_ok_and(|file| file.is_file())
}

impl Messages {
    /// Starts the log of `causeway run`, in `file` or on stderr; `verbose` is 0 to 3. An error is a file that cannot be
    /// opened, or a thread that cannot be made.
    pub fn start(file: Option<&Path>, verbose: u8) -> anyhow::Result<Self> {
        let stderr = Output::start("messages", io::stderr().as_fd())?;
        let (target, output): (Box<dyn Write + Send>, _) = match file {
            None if is_regular(io::stderr().as_fd()) => (Box::new(io::stderr()), None),
            None => (Box::new(stderr.writer()), None),
            Some(path) => {
                let file = OpenOptions::new()
                    .create(true)
                    .append(true)
                    .open(path)
                    .map_err(|e| anyhow::anyhow!("the log file {} cannot be opened: {e}", path.display()))?;
                if is_regular(file.as_fd()) {
                    (Box::new(file), None)
                } else {
                    let output = Output::start("log", file.as_fd())?;
                    (Box::new(output.writer()), Some(output))
                }
            }
        };
        logger(file.is_some(), verbose, target).try_init()?;
        Ok(Self { stderr, file: output })
    }

    /// Text for the user's terminal, also where messages go to a file.
    pub fn terminal(&self) -> OutputWriter {
        self.stderr.writer()
    }

    /// Gives the last messages the time to be read, within bounds.
    pub fn finish(&self, signals: &Signals) {
        for output in self.file.iter().chain([&self.stderr]) {
            // It ends us anyway.
            let _ = output.finish(LAST_WORDS, signals);
        }
    }
}

fn logger(is_file: bool, verbose: u8, target: Box<dyn Write + Send>) -> env_logger::Builder {
    let level = match verbose {
        0 => log::LevelFilter::Info,
        1 => log::LevelFilter::Debug,
        _ => log::LevelFilter::Trace,
    };
    let mut builder = env_logger::Builder::new();
    builder.filter_level(level);
    if verbose == 0 {
        // It warns of interrupt kinds that a device simply does not have; what fails, we say ourselves.
        builder.filter_module("vfio_ioctls", log::LevelFilter::Error);
        // It complains of each ring that a guest breaks; that its device needs a reset, we say once.
        builder.filter_module("virtio_queue", log::LevelFilter::Off);
    }
    if let Ok(filters) = std::env::var("RUST_LOG") {
        builder.parse_filters(&filters);
    }
    let start = Instant::now();
    let timed = is_file || verbose > 0;
    builder.format(move |out, record| {
        let level = record.level().as_str().to_ascii_lowercase();
        let message = record.args().to_string();
        let remedy = remedy(&message);
        match timed {
            true => writeln!(out, "causeway [{:.6}] {level}: {message}{remedy}", start.elapsed().as_secs_f64()),
            false => writeln!(out, "causeway: {level}: {message}{remedy}"),
        }
    });
    builder.target(env_logger::Target::Pipe(target));
    builder
}

/// What the user can do about an error of the system that can come from anywhere, by its number in the message.
fn remedy(message: &str) -> &'static str {
    match message {
        // Where more is known, it is said already.
        _ if message.contains("ulimit -n") => "",
        _ if message.contains("(os error 24)") => {
            "; raise the limit on open files: ulimit -n, or LimitNOFILE= of a service"
        }
        _ if message.contains("(os error 23)") => "; the host has no more open files: sysctl fs.file-max",
        _ => "",
    }
}

/// Prints a line to stderr where there is no log. Nobody is told when that fails.
pub fn say(message: Arguments<'_>) {
    let message = message.to_string();
    let _ = writeln!(io::stderr(), "{message}{}", remedy(&message));
}

/// Prints a line to stdout. A reader that is gone is no error of ours.
pub fn tell(message: Arguments<'_>) {
    let _ = writeln!(io::stdout(), "{message}");
}
