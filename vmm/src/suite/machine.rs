//! One test in a virtual machine: a process of its own, so that whatever happens in it stays there.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use super::list::Test;

/// What is kept of a test's output.
const LOG_MAX: usize = 64 << 10;
/// How much longer than its time limit a machine may take to start and to stop.
const GRACE: Duration = Duration::from_secs(30);

/// The image as a file.
pub enum ImageFile {
    /// The user's.
    Path(PathBuf),
    /// In memory.
    Memory(File),
}

impl ImageFile {
    /// A file in memory with this content.
    pub fn of(content: &[u8]) -> io::Result<Self> {
        // SAFETY: the name is a C string literal. Not closed on exec: the machines open it by its number.
        let fd = unsafe { libc::memfd_create(c"causeway-suite".as_ptr(), 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: memfd_create returned this descriptor just now, nobody else has it.
        let mut file = unsafe { File::from_raw_fd(fd) };
        file.write_all(content)?;
        Ok(Self::Memory(file))
    }

    fn path(&self) -> PathBuf {
        match self {
            Self::Path(path) => path.clone(),
            Self::Memory(file) => format!("/proc/self/fd/{}", file.as_raw_fd()).into(),
        }
    }
}

/// How the process ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ended {
    /// With this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// Not by itself.
    Stuck,
}

impl From<ExitStatus> for Ended {
    fn from(status: ExitStatus) -> Self {
        status.code().map(Self::Code).unwrap_or(Self::Signal(status.signal().unwrap_or(0)))
    }
}

/// Runs `test`. Gives back how it ended and what it printed, at most the last 64 KiB.
pub fn run(image: &ImageFile, test: &Test, devices: &[String], limit: Duration) -> io::Result<(Ended, String)> {
    let (output, input) = io::pipe()?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["run", "--memory", "64M", "--no-reboot", "--timeout"]).arg(limit.as_secs_f64().to_string());
    // What such a device does wrong, the host's IOMMU hears of.
    let faults = if devices.iter().any(|device| device.starts_with("vfio,")) { " faults=host" } else { "" };
    command.arg("--image").arg(image.path()).arg("--cmdline").arg(format!("test={}{faults}", test.name));
    devices.iter().for_each(|device| {
        command.arg("--device").arg(device);
    });
    command.args(&test.options).stdin(Stdio::null()).stdout(input.try_clone()?).stderr(input);
    // SAFETY: prctl is a system call and touches no memory; nothing else runs between fork and exec.
    unsafe {
        command.pre_exec(|| {
            // The thread that waits for the machine is the one that starts it.
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    let mut child = command.spawn()?;
    // Our ends of the pipe: else its end would never come.
    drop(command);
    let (told, tell) = mpsc::channel();
    let reader = std::thread::spawn(move || {
        let log = read_tail(output);
        // Nobody listens only when this was too late.
        let _ = told.send(());
        log
    });
    let stuck = tell.recv_timeout(limit + GRACE).is_err();
    if stuck {
        child.kill()?;
    }
    let status = child.wait()?;
    let log = reader.join().unwrap_or_default();
    Ok((if stuck { Ended::Stuck } else { status.into() }, log))
}

fn read_tail(mut output: impl Read) -> String {
    let mut log = Vec::new();
    let mut part = [0; 4096];
    while let Ok(len @ 1..) = output.read(&mut part) {
        log.extend_from_slice(&part[..len]);
        if log.len() > 2 * LOG_MAX {
            log.drain(..log.len() - LOG_MAX);
        }
    }
    String::from_utf8_lossy(&log).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_is_bounded_and_keeps_its_end() {
        let text = "x".repeat(1 << 20) + "end";
        let log = read_tail(text.as_bytes());
        assert!(log.len() <= 2 * LOG_MAX + 4096 && log.ends_with("end"));
    }
}
