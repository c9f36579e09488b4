//! What goes out of this process to whoever may or may not read it: the guest's serial port to stdout, messages to
//! stderr.
//!
//! Whoever writes never waits: bytes go into a bounded buffer, and a thread of its own, which may block for ever, takes
//! them from there. So a pipe that nobody reads and a terminal that is held cost neither a vCPU nor the event loop
//! anything. What does not fit is dropped and counted (G-3).

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::signals::{Signals, Woken};

/// What waits for a reader, at most: bytes.
const CAPACITY: usize = 1 << 20;
/// Bytes written at once: what a pipe takes whole or not at all.
const CHUNK: usize = libc::PIPE_BUF;

/// A file, and the buffer before it.
pub struct Output {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    filled: Condvar,
    /// Signalled when nothing is left to be written, once somebody waits for that.
    emptied: EventFd,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<u8>,
    /// Bytes that the thread has taken and not written yet.
    writing: usize,
    lost: Lost,
    finishing: bool,
}

/// What did not reach its reader.
#[derive(Clone, Default, Debug)]
pub struct Lost {
    /// How much.
    pub bytes: u64,
    /// What the system said; `None`: nobody read in time.
    pub why: Option<Arc<io::Error>>,
}

impl Output {
    /// Starts the thread that writes to `file`, which shares its description with whoever else has it: blocking or not,
    /// it is left as it is.
    pub fn start(name: &str, file: BorrowedFd<'_>) -> io::Result<Self> {
        let file = File::from(file.try_clone_to_owned()?);
        let emptied = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let shared = Arc::new(Shared { state: Mutex::default(), filled: Condvar::new(), emptied });
        let thread = shared.clone();
        std::thread::Builder::new().name(name.to_owned()).spawn(move || thread.write_out(&file))?;
        Ok(Self { shared })
    }

    /// A way into it.
    pub fn writer(&self) -> OutputWriter {
        OutputWriter(self.shared.clone())
    }

    /// Bytes that wait for their reader.
    pub fn waiting(&self) -> usize {
        let state = self.shared.state.lock().unwrap();
        state.waiting.len() + state.writing
    }

    /// Gives what waits `limit` to be read, and ends early when a signal that ends us comes: which.
    pub fn finish(&self, limit: Duration, signals: &Signals) -> Option<libc::c_int> {
        {
            let mut state = self.shared.state.lock().unwrap();
            state.finishing = true;
            // Of an earlier wait.
            let _ = self.shared.emptied.read();
            if state.waiting.is_empty() && state.writing == 0 {
                return None;
            }
        }
        match signals.wait(Some(self.shared.emptied.as_raw_fd()), Some(Instant::now() + limit)) {
            Ok(Woken::Ended(signal)) => Some(signal),
            Ok(Woken::Event | Woken::TimedOut) => None,
            Err(e) => {
                log::debug!("the end of the output could not be waited for: {e}");
                None
            }
        }
    }

    /// What was lost, with what waits still: for the end of the program.
    pub fn lost(&self) -> Lost {
        let state = self.shared.state.lock().unwrap();
        Lost { bytes: state.lost.bytes + (state.waiting.len() + state.writing) as u64, why: state.lost.why.clone() }
    }
}

impl Shared {
    fn push(&self, bytes: &[u8]) {
        let mut state = self.state.lock().unwrap();
        let fits = bytes.len().min(CAPACITY - state.waiting.len());
        state.waiting.extend(&bytes[..fits]);
        state.lost.bytes += (bytes.len() - fits) as u64;
        drop(state);
        self.filled.notify_one();
    }

    fn write_out(&self, file: &File) {
        let mut chunk = Vec::with_capacity(CHUNK);
        loop {
            self.take(&mut chunk);
            let mut rest = &chunk[..];
            while !rest.is_empty() {
                let result = write(file, rest);
                let mut state = self.state.lock().unwrap();
                match result {
                    Ok(written) => {
                        state.writing -= written;
                        rest = &rest[written..];
                    }
                    Err(e) => {
                        state.lost.bytes += rest.len() as u64;
                        state.lost.why = Some(Arc::new(e));
                        state.writing = 0;
                        break;
                    }
                }
            }
        }
    }

    /// Waits for bytes.
    fn take(&self, chunk: &mut Vec<u8>) {
        let state = self.state.lock().unwrap();
        if state.finishing && state.waiting.is_empty() {
            // It is only read by whoever waits, and the counter cannot be full after one of these.
            let _ = self.emptied.write(1);
        }
        let mut state = self.filled.wait_while(state, |state| state.waiting.is_empty()).unwrap();
        let len = state.waiting.len().min(CHUNK);
        chunk.clear();
        chunk.extend(state.waiting.drain(..len));
        state.writing = len;
    }
}

/// Writes once, and waits as long as the file takes nothing, also where it is one that does not block.
fn write(mut file: &File, bytes: &[u8]) -> io::Result<usize> {
    loop {
        match file.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                let mut poll = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
                // SAFETY: `poll` is the one structure that the call is told of. Whatever it says, the write is tried
                // again.
                unsafe { libc::poll(&raw mut poll, 1, -1) };
            }
            result => return result,
        }
    }
}

/// Puts bytes into an [`Output`]. It never waits and never fails.
#[derive(Clone)]
pub struct OutputWriter(Arc<Shared>);

impl Write for OutputWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn g3_what_waits_is_bounded_and_the_first_is_kept() {
        let (mut reader, writer) = io::pipe().unwrap();
        let output = Output::start("test", writer.as_fd()).unwrap();
        // SAFETY: the command has no argument, and the descriptor is open.
        let pipe = unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_GETPIPE_SZ) };
        drop(writer);
        let printed: Vec<u8> = (0..3 * CAPACITY).map(|at| (at / 7) as u8).collect();
        // The thread fills the pipe before anything is lost: else there is room again for what comes behind that.
        let (first, rest) = printed.split_at(usize::try_from(pipe).unwrap() + CHUNK);
        output.writer().write_all(first).unwrap();
        while output.waiting() != CHUNK {
            std::thread::yield_now();
        }
        for part in rest.chunks(1000) {
            output.writer().write_all(part).unwrap();
        }
        assert!(output.waiting() <= CAPACITY + CHUNK);
        let lost = output.shared.state.lock().unwrap().lost.bytes as usize;
        assert!(lost > 0);
        // The thread keeps its end of the pipe, so what is there is read and no end is waited for.
        let mut read = vec![0; printed.len() - lost];
        reader.read_exact(&mut read).unwrap();
        assert!(read == printed[..read.len()]);
    }
}
