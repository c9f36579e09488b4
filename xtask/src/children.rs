//! Processes that this one starts.

use anyhow::{Result, ensure};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// A run that is killed leaves no QEMU and no compiler behind: they get `signal`.
pub fn end_with_this_process(command: &mut Command, signal: libc::c_int) {
    // SAFETY: prctl is async-signal-safe and PR_SET_PDEATHSIG touches nothing but the calling process.
    unsafe {
        command.pre_exec(move || match libc::prctl(libc::PR_SET_PDEATHSIG, signal) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
}

/// This thread, and what it starts from now on, take what others leave of the processors.
pub fn lower_priority() -> Result<()> {
    const LOWEST: libc::c_int = 19;
    // SAFETY: setpriority takes numbers alone. In Linux 0 is the calling thread.
    let status = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, LOWEST) };
    ensure!(status == 0, "cannot lower a priority: {}", std::io::Error::last_os_error());
    Ok(())
}

/// The command has this one too, under the same number.
pub fn inherit(command: &mut Command, fd: BorrowedFd) {
    let fd = fd.as_raw_fd();
    // SAFETY: fcntl is async-signal-safe; F_SETFD changes one flag of the new process's own table. Whoever
    // starts the command keeps the descriptor open until then.
    unsafe {
        command.pre_exec(move || match libc::fcntl(fd, libc::F_SETFD, 0) {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
}
