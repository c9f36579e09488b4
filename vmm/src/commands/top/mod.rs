//! `causeway ctl PATH top`: a live screen of a machine, or one picture of it as text.
//!
//! The terminal is put back on every way out: a key, a signal, a machine that goes away, a panic. A signal that stops
//! this program for a while puts it back, too. No request is waited for while keys and signals come: a machine that is
//! busy with something else is said to be, and can be left.

mod picture;
mod sample;
mod screen;

use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::commands::client::Client;
use crate::control_protocol::{MOST_UNREAD, Reply, Request, Verb, line};
use crate::messages::tell;
use crate::signals::{Signal, Signals};
use picture::{Picture, text};
use sample::{Sample, rate};
use screen::Screen;

/// Between two pictures.
const PERIOD: Duration = Duration::from_secs(1);
/// Between the two moments of the only picture.
const ONCE: Duration = Duration::from_millis(500);
/// After this, a machine that does not reply is said to be busy.
const BUSY: Duration = Duration::from_secs(3);
/// How long a change of the terminal's size may go unseen.
const LOOK: Duration = Duration::from_millis(250);
/// Columns of the picture that is text.
const COLUMNS: u16 = 132;
/// Rates that are kept.
const HISTORY: usize = 512;

/// How it ended.
pub enum Ended {
    /// As was wanted.
    Left,
    /// The machine refuses it.
    Refused(String),
    /// By this signal.
    Signal(i32),
}

/// Shows the machine, until it is left; with `once`, or where there is no terminal, once.
pub fn run(socket: &Path, once: bool) -> io::Result<Ended> {
    if once || !has_terminal() {
        return print(socket);
    }
    // Before a thread exists and before the terminal is changed.
    let signals = Signals::block()?;
    let stream = UnixStream::connect(socket)?;
    stream.set_nonblocking(true)?;
    let screen = Screen::enter()?;
    let mut live = Live {
        machine: socket.display().to_string(),
        stream,
        unread: Vec::new(),
        asked: None,
        next: Instant::now(),
        samples: Vec::new(),
        history: Vec::new(),
        screen,
    };
    live.run(&signals)
}

/// Whether there is a terminal, and this job has it: one in the background would take it from the shell.
fn has_terminal() -> bool {
    // SAFETY: these calls take a number at most, and give one.
    let in_front = unsafe { libc::tcgetpgrp(libc::STDIN_FILENO) == libc::getpgrp() };
    in_front && io::stdout().is_terminal() && io::stdin().is_terminal()
}

/// One picture, as text.
fn print(socket: &Path) -> io::Result<Ended> {
    let mut client = Client::connect(socket)?;
    let mut samples = Vec::new();
    for pause in [Duration::ZERO, ONCE] {
        std::thread::sleep(pause);
        match client.ask(&Verb::Top.into())? {
            Reply::Ok(object) => samples.push(serde_json::from_str::<Sample>(object.get())?),
            Reply::Error(why) => return Ok(Ended::Refused(why)),
        }
    }
    let (before, now) = (&samples[0], &samples[1]);
    let operations = [rate(before.operations(), now.operations(), now.wall_ms.saturating_sub(before.wall_ms))];
    let machine = socket.display().to_string();
    let picture = Picture { machine: &machine, now, before: Some(before), history: &operations, note: "" };
    tell(format_args!("{}", text(&picture, COLUMNS).trim_end()));
    Ok(Ended::Left)
}

struct Live {
    machine: String,
    stream: UnixStream,
    /// Of a reply.
    unread: Vec<u8>,
    /// Since when a reply is due.
    asked: Option<Instant>,
    /// When the next request is.
    next: Instant,
    /// The last two.
    samples: Vec<Sample>,
    history: Vec<u64>,
    screen: Screen,
}

/// Which of `files` have something within `timeout`.
fn wait(files: [RawFd; 3], timeout: Duration) -> io::Result<[bool; 3]> {
    let mut polls = files.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    // SAFETY: the call is told of these structures and how many they are.
    let ready = unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, timeout.as_millis() as i32) };
    if ready < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
        return Err(io::Error::last_os_error());
    }
    Ok(polls.map(|poll| poll.revents != 0))
}

impl Live {
    fn run(&mut self, signals: &Signals) -> io::Result<Ended> {
        loop {
            if self.asked.is_none() && self.next <= Instant::now() {
                self.stream.write_all(&line(&Request::from(Verb::Top)))?;
                (self.asked, self.next) = (Some(Instant::now()), Instant::now() + PERIOD);
            }
            let [key, signal, reply] =
                wait([libc::STDIN_FILENO, signals.files()[0], self.stream.as_raw_fd()], self.idle())?;
            if signal {
                match signals.next() {
                    Some(Signal::End(signal)) => return Ok(Ended::Signal(signal)),
                    Some(Signal::Suspend) => self.screen.suspend()?,
                    Some(Signal::Continue | Signal::Report) | None => {}
                }
            }
            if key && left()? {
                return Ok(Ended::Left);
            }
            if reply && let Some(why) = self.read()? {
                return Ok(Ended::Refused(why));
            }
            self.draw()?;
        }
    }

    /// How long there is nothing to do, unless something comes.
    fn idle(&self) -> Duration {
        match self.asked {
            Some(_) => LOOK,
            None => LOOK.min(self.next.saturating_duration_since(Instant::now())),
        }
    }

    /// Takes what came; why the machine refuses, if it does. An error means that it is gone.
    fn read(&mut self) -> io::Result<Option<String>> {
        let mut part = [0; 1 << 16];
        match self.stream.read(&mut part) {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the machine is gone")),
            Ok(count) => self.unread.extend_from_slice(&part[..count]),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => return Ok(None),
            Err(e) => return Err(e),
        }
        let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') else {
            if self.unread.len() > MOST_UNREAD {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "what listens there speaks something else"));
            }
            return Ok(None);
        };
        let reply: Reply = serde_json::from_slice(&self.unread[..end])?;
        self.unread.drain(..=end);
        self.asked = None;
        match reply {
            Reply::Error(why) => return Ok(Some(why)),
            Reply::Ok(object) => self.samples.push(serde_json::from_str(object.get())?),
        }
        if let [.., before, now] = &self.samples[..] {
            let ms = now.wall_ms.saturating_sub(before.wall_ms);
            self.history.push(rate(before.operations(), now.operations(), ms));
        }
        self.samples.drain(..self.samples.len().saturating_sub(2));
        self.history.drain(..self.history.len().saturating_sub(HISTORY));
        Ok(None)
    }

    fn draw(&mut self) -> io::Result<()> {
        let Self { machine, samples, history, screen, asked, .. } = self;
        let busy = asked.is_some_and(|asked| asked.elapsed() > BUSY);
        let note = if busy { "the machine is busy and does not reply" } else { "" };
        let empty = Sample::default();
        let (before, now) = match &samples[..] {
            [.., before, now] => (Some(before), now),
            [now] => (None, now),
            [] => (None, &empty),
        };
        screen.draw(&Picture { machine, now, before, history, note })
    }
}

/// Whether a key that leaves was pressed: q, Ctrl-C, Ctrl-D, or the end of the keys.
fn left() -> io::Result<bool> {
    let mut keys = [0; 256];
    match io::stdin().lock().read(&mut keys) {
        Ok(count) => Ok(count == 0 || keys[..count].iter().any(|key| matches!(key, b'q' | b'Q' | 3 | 4))),
        Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(false),
        // The terminal is gone, or somebody else's now.
        Err(e) if e.raw_os_error() == Some(libc::EIO) => Ok(true),
        Err(e) => Err(e),
    }
}
