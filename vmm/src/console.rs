//! stdin to the guest's serial port, with Ctrl-A as the key that is for us.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use devices::serial::SerialPort;
use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::control::{Control, Stop};

const CTRL_A: u8 = 1;
const HELP: &str = "\r\nCtrl-A x  quits\r\nCtrl-A h  shows this\r\nCtrl-A Ctrl-A  sends Ctrl-A to the guest\r\n";

/// What a key after Ctrl-A means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Command {
    Quit,
    Help,
}

/// Takes the keys that are for us out of what was typed.
#[derive(Default)]
struct Escape {
    armed: bool,
}

impl Escape {
    fn filter(&mut self, typed: &[u8], to_guest: &mut VecDeque<u8>) -> Vec<Command> {
        let mut commands = Vec::new();
        for byte in typed {
            match (std::mem::take(&mut self.armed), byte) {
                (false, &CTRL_A) => self.armed = true,
                (true, b'x' | b'X') => commands.push(Command::Quit),
                (true, b'h' | b'H' | b'?') => commands.push(Command::Help),
                (true, &CTRL_A) | (false, _) => to_guest.push_back(*byte),
                (true, _) => to_guest.extend([CTRL_A, *byte]),
            }
        }
        commands
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Input {
    /// In the event loop.
    Watched,
    /// Out of it, until the guest takes what it has.
    Full,
    /// A file: always ready, and not for epoll. Read whenever the guest takes something.
    Unpollable,
    /// At its end.
    Closed,
}

/// stdin as an event source. A guest that reads nothing stops us reading, so nothing is lost and nothing grows.
pub struct Console {
    fd: RawFd,
    serial: Arc<SerialPort>,
    drained: EventFd,
    control: Arc<Control>,
    /// `Some` when stdin is a terminal in raw mode.
    escape: Option<Escape>,
    pending: VecDeque<u8>,
    input: Input,
}

impl Console {
    /// `drained` is the serial port's signal that the guest took its input.
    pub fn new(serial: Arc<SerialPort>, drained: EventFd, control: Arc<Control>, terminal: bool) -> Self {
        Self {
            fd: libc::STDIN_FILENO,
            serial,
            drained,
            control,
            escape: terminal.then(Escape::default),
            pending: VecDeque::new(),
            input: Input::Closed,
        }
    }

    /// Hands over what the guest takes; whether all is gone.
    fn feed(&mut self) -> bool {
        while !self.pending.is_empty() {
            let accepted = self.serial.enqueue(self.pending.make_contiguous());
            if accepted == 0 {
                return false;
            }
            self.pending.drain(..accepted);
        }
        true
    }

    /// Reads once; whether there may be more.
    fn read(&mut self) -> bool {
        let mut typed = [0u8; 64];
        // SAFETY: the buffer is ours and as long as we say.
        let got = unsafe { libc::read(self.fd, typed.as_mut_ptr().cast(), typed.len()) };
        let Some(typed) = usize::try_from(got).ok().filter(|got| *got > 0).map(|got| &typed[..got]) else {
            let again = got < 0 && matches!(errno(), libc::EAGAIN | libc::EINTR);
            return again;
        };
        match &mut self.escape {
            None => self.pending.extend(typed),
            Some(escape) => {
                for command in escape.filter(typed, &mut self.pending) {
                    match command {
                        Command::Quit => self.control.request(Stop::Quit),
                        Command::Help => eprint!("{HELP}"),
                    }
                }
            }
        }
        true
    }

    fn stdin_ready(&mut self, ops: &mut EventOps<'_>) {
        let more = self.read();
        if !more || !self.feed() {
            let _ = ops.remove(Events::new_raw(self.fd, EventSet::IN));
            self.input = if more { Input::Full } else { Input::Closed };
        }
    }

    fn guest_took(&mut self, ops: &mut EventOps<'_>) {
        let _ = self.drained.read();
        if !self.feed() {
            return;
        }
        match self.input {
            Input::Full => self.watch(ops),
            Input::Unpollable => {
                while self.input == Input::Unpollable && self.feed() {
                    if !self.read() {
                        self.input = Input::Closed;
                    }
                }
            }
            Input::Watched | Input::Closed => {}
        }
    }

    fn watch(&mut self, ops: &mut EventOps<'_>) {
        self.input = match ops.add(Events::new_raw(self.fd, EventSet::IN)) {
            Ok(()) => Input::Watched,
            Err(event_manager::Error::Epoll(e)) if e.errno() == libc::EPERM => Input::Unpollable,
            Err(e) => {
                log::warn!("stdin cannot be watched, the guest gets no input: {e}");
                Input::Closed
            }
        };
    }
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

impl MutEventSubscriber for Console {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(e) = ops.add(Events::new(&self.drained, EventSet::IN)) {
            log::warn!("the serial port's input cannot be watched: {e}");
        }
        self.watch(ops);
        if self.input == Input::Unpollable {
            self.guest_took(ops);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if events.fd() == self.drained.as_raw_fd() {
            self.guest_took(ops);
        } else {
            self.stdin_ready(ops);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_is_ours_and_twice_the_guests() {
        let mut escape = Escape::default();
        let mut guest = VecDeque::new();
        assert_eq!(escape.filter(b"ab\x01", &mut guest), []);
        assert_eq!(escape.filter(b"hc", &mut guest), [Command::Help]);
        assert_eq!(escape.filter(b"\x01\x01\x01q\x01x", &mut guest), [Command::Quit]);
        assert_eq!(guest, b"abc\x01\x01q");
    }
}
