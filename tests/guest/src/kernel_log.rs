//! Waiting for a line of the running kernel's log.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The kernel's log from the moment of [`KernelLog::from_now`] on.
pub struct KernelLog {
    records: File,
}

impl KernelLog {
    /// Opens the log behind its last record.
    ///
    /// # Errors
    /// Without the right to read /dev/kmsg.
    pub fn from_now() -> Result<Self> {
        let mut records = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg")
            .context("opening /dev/kmsg")?;
        records.seek(SeekFrom::End(0)).context("seeking /dev/kmsg")?;
        Ok(Self { records })
    }

    /// Waits for a record that holds all of `parts` and gives it back.
    ///
    /// # Errors
    /// If `deadline` passes first.
    pub fn wait_for(&mut self, parts: &[&str], deadline: Duration) -> Result<String> {
        let start = Instant::now();
        let mut record = [0; 8192];
        loop {
            match self.records.read(&mut record) {
                Ok(len) => {
                    let line = String::from_utf8_lossy(&record[..len]).trim_end().to_owned();
                    if parts.iter().all(|part| line.contains(part)) {
                        return Ok(line);
                    }
                }
                // A record that was overwritten before it was read: the next read gives the oldest that is left.
                Err(e) if e.raw_os_error() == Some(libc::EPIPE) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    if start.elapsed() > deadline {
                        bail!("no kernel message with {parts:?} within {deadline:?}");
                    }
                    sleep(Duration::from_millis(10));
                }
                Err(e) => return Err(e).context("reading /dev/kmsg"),
            }
        }
    }
}
