//! Machines of this host's KVM that run an image, with an edu in a process of its own behind the bridge: what is traced
//! and looked at here comes from a real run.

use crate::children::{end_with_this_process, inherit};
use anyhow::{Context, Result, ensure};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// What ends well by `isa-debug-exit` has this code.
const PASSED: i32 = 1;

/// A machine, and the process with its edu.
pub struct Running {
    /// The machine is the last one.
    processes: Vec<Child>,
}

/// Why this host runs no machines, if it does not.
pub fn unable() -> Option<&'static str> {
    let kvm = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    kvm.is_err().then_some("this machine has no /dev/kvm")
}

/// The page of the trace in a file, beside it.
pub fn report(causeway: &Path, trace: &Path) -> Result<PathBuf> {
    let page = trace.with_extension("html");
    let result = Command::new(causeway).arg("report").arg(trace).arg("-o").arg(&page).output()?;
    ensure!(result.status.success(), "causeway report: {}", String::from_utf8_lossy(&result.stderr));
    Ok(page)
}

impl Running {
    /// Starts `image`, with words for its command line and options for `causeway run`; what all say goes to `log`.
    pub fn start(causeway: &Path, image: &Path, words: &str, options: &[&str], log: &Path) -> Result<Self> {
        let (client, server) = UnixStream::pair()?;
        let log = std::fs::File::create(log).with_context(|| log.display().to_string())?;
        let begin = |command: &mut Command, end: &UnixStream| -> Result<Child> {
            command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log.try_clone()?);
            inherit(command, end.as_fd());
            end_with_this_process(command, libc::SIGKILL);
            command.spawn().context("cannot run causeway")
        };
        let mut edu = Command::new(causeway);
        edu.args(["device", "edu", "--fd", &server.as_raw_fd().to_string()]);
        let mut machine = Command::new(causeway);
        machine.args(["run", "--memory", "64M", "--timeout", "120", "--device"]);
        machine.arg(format!("vfio-user,fd={},addr=01.0", client.as_raw_fd())).arg("--image").arg(image);
        machine.arg("--cmdline").arg(format!("{words} assigned=01.0")).args(options);
        let mut running = Self { processes: vec![begin(&mut edu, &server)?] };
        running.processes.push(begin(&mut machine, &client)?);
        Ok(running)
    }

    /// Waits for the end, which must be a good one.
    pub fn finish(mut self) -> Result<()> {
        let status = self.processes.last_mut().context("no machine was started")?.wait()?;
        ensure!(status.code() == Some(PASSED), "the machine ended with {status}");
        Ok(())
    }

    /// Ends the machine, by its control socket, and waits until all that it writes is written.
    pub fn quit(mut self, causeway: &Path, socket: &str) -> Result<()> {
        let asked = Command::new(causeway).args(["ctl", socket, "quit"]).stdin(Stdio::null()).output()?;
        ensure!(asked.status.success(), "ctl quit: {}", String::from_utf8_lossy(&asked.stderr));
        let status = self.processes.last_mut().context("no machine was started")?.wait()?;
        ensure!(status.success(), "the machine ended with {status}");
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for process in self.processes.iter_mut().rev() {
            // It fails for one that has ended.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}
