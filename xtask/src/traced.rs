//! A machine of this host's KVM that runs a test of the suite of images, with an edu in a process of its own behind the
//! bridge: what is traced and looked at here comes from a real run.

use crate::children::{end_with_this_process, inherit};
use crate::images::Built;
use anyhow::{Context, Result, ensure};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
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

impl Running {
    /// Starts `test` of the suite, with these options of `causeway run`; what the machine says goes to `log`.
    pub fn start(built: &Built, test: &str, options: &[&str], log: &Path) -> Result<Self> {
        let (client, server) = UnixStream::pair()?;
        let log = std::fs::File::create(log).with_context(|| log.display().to_string())?;
        let begin = |arguments: &[String], end: &UnixStream| -> Result<Child> {
            let mut command = Command::new(&built.causeway);
            command.args(arguments).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log.try_clone()?);
            inherit(&mut command, end.as_fd());
            end_with_this_process(&mut command, libc::SIGKILL);
            command.spawn().context("cannot run causeway")
        };
        let words = |text: String| -> Vec<String> { text.split(' ').map(str::to_owned).collect() };
        let edu = words(format!("device edu --fd {}", server.as_raw_fd()));
        let mut machine = words(format!(
            "run --memory 64M --timeout 120 --device vfio-user,fd={},addr=01.0 --image {}",
            client.as_raw_fd(),
            built.suite.display()
        ));
        machine.extend(["--cmdline".to_owned(), format!("test={test} assigned=01.0")]);
        machine.extend(options.iter().map(|option| (*option).to_owned()));
        let mut running = Self { processes: vec![begin(&edu, &server)?] };
        running.processes.push(begin(&machine, &client)?);
        Ok(running)
    }

    /// Waits for the end, which must be a good one.
    pub fn finish(mut self) -> Result<()> {
        let status = self.processes.last_mut().context("no machine was started")?.wait()?;
        ensure!(status.code() == Some(PASSED), "the machine ended with {status}");
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
