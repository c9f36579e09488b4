//! One test in a virtual machine: a process of its own, so that whatever happens in it stays there.

use std::fs::File;
use std::io::{self, PipeWriter, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use super::devices::{Devices, Placed};
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

/// Runs `test` with `devices`. Gives back how it ended and what it printed, at most the last 64 KiB.
pub fn run(image: &ImageFile, test: &Test, devices: &Devices, limit: Duration) -> io::Result<(Ended, String)> {
    let (output, input) = io::pipe()?;
    let (told, tell) = mpsc::channel();
    let reader = std::thread::spawn(move || {
        let log = read_tail(output);
        // Nobody listens only when this was too late.
        let _ = told.send(());
        log
    });
    let started = start(image, test, devices, limit, input);
    let ended = started.and_then(|mut processes| {
        let stuck = tell.recv_timeout(limit + GRACE).is_err();
        if stuck {
            processes.end();
        }
        processes.machine.wait().map(|status| if stuck { Ended::Stuck } else { status.into() })
    });
    let log = reader.join().unwrap_or_default();
    Ok((ended?, log))
}

/// The virtual machine, and those that emulate devices for it.
struct Processes {
    machine: Child,
    devices: Vec<Child>,
}

impl Processes {
    /// Ends all.
    fn end(&mut self) {
        for process in self.devices.iter_mut().chain([&mut self.machine]) {
            // It fails for one that ended by itself.
            let _ = process.kill();
        }
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        self.end();
        for process in &mut self.devices {
            let _ = process.wait();
        }
    }
}

/// This program again, with nothing to read and its output to `out`. It is killed when the thread that starts it ends,
/// and gets `sockets` under the numbers that they have here.
fn ourselves(out: &PipeWriter, sockets: &[&UnixStream]) -> io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out.try_clone()?);
    let descriptors: Vec<i32> = sockets.iter().map(|socket| socket.as_raw_fd()).collect();
    // SAFETY: prctl and fcntl are system calls that touch no memory; nothing else runs between fork and exec.
    unsafe {
        command.pre_exec(move || {
            // The thread that waits for the machine is the one that starts it.
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            for fd in &descriptors {
                if libc::fcntl(*fd, libc::F_SETFD, 0) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    Ok(command)
}

fn start(image: &ImageFile, test: &Test, devices: &Devices, limit: Duration, out: PipeWriter) -> io::Result<Processes> {
    let Placed { mut options, processes, words } = devices.of(test);
    let mut sockets = Vec::new();
    let mut started = Vec::new();
    for index in processes {
        let (ours, theirs) = UnixStream::pair()?;
        let mut command = ourselves(&out, &[&theirs])?;
        command.args(["device", "edu", "--fd"]).arg(theirs.as_raw_fd().to_string());
        // Its client's death is all that it would say.
        command.env("RUST_LOG", "error");
        started.push(command.spawn()?);
        options[index] = devices.of_process(&options[index], ours.as_raw_fd());
        sockets.push(ours);
    }
    let mut command = ourselves(&out, &sockets.iter().collect::<Vec<_>>())?;
    command.args(["run", "--timeout"]).arg(limit.as_secs_f64().to_string());
    if !test.options.iter().any(|option| option == "--memory") {
        command.args(["--memory", "64M"]);
    }
    if !test.reboots {
        command.arg("--no-reboot");
    }
    command.arg("--image").arg(image.path()).arg("--cmdline").arg(format!("test={}{words}", test.name));
    command.args(&test.options);
    options.iter().for_each(|device| {
        command.arg("--device").arg(device);
    });
    let machine = command.spawn()?;
    Ok(Processes { machine, devices: started })
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
