//! stdin to the guest's serial port or virtio console, with Ctrl-A as the key that is for us.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use devices::serial::SerialPort;
use devices::virtio::console::Input;
use vmm_sys_util::eventfd::EventFd;

use crate::machine::control::{Control, Stop};
use crate::output::OutputWriter;
use crate::terminal::{self, Terminal};

const CTRL_A: u8 = 1;
const HELP: &str = "\r\nCtrl-A x  quits\r\nCtrl-A h  shows this\r\nCtrl-A Ctrl-A  sends Ctrl-A to the guest\r\n";

/// What was typed at a terminal and the guest has not read, at most: bytes. A terminal is always read, else Ctrl-A x
/// would not be seen behind it.
const TYPED_MAX: usize = 1 << 20;
/// How often a terminal that another job has is looked at: nobody says when it becomes ours.
const LOOK: Duration = Duration::from_millis(500);

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

/// Where the guest's input goes: to its virtio console, while that has a driver, else to its serial port.
pub struct GuestInput {
    /// The serial port.
    pub serial: Arc<SerialPort>,
    /// The console, if there is one.
    pub console: Option<Arc<Input>>,
}

impl GuestInput {
    /// How many bytes of `input` it took.
    fn enqueue(&self, input: &[u8]) -> usize {
        let console = self.console.as_ref().and_then(|console| console.enqueue(input));
        console.unwrap_or_else(|| self.serial.enqueue(input))
    }
}

/// stdin for the guest, in a thread of its own: a read may block when somebody else reads the same file.
///
/// From a terminal everything is read at once; what the guest does not take is bounded and then lost. From anything
/// else no more is read than the guest takes, so nothing is lost and nothing grows.
pub struct Console {
    guest: GuestInput,
    drained: EventFd,
    control: Arc<Control>,
    /// For the help.
    screen: OutputWriter,
    escape: Escape,
    pending: VecDeque<u8>,
    closed: bool,
    lost: Arc<AtomicU64>,
}

impl Console {
    /// Takes the terminal if it is ours, and starts the thread, which ends with the process. `drained` is the
    /// signal that the guest took its input. Gives back the count of bytes that were typed and lost.
    pub fn start(
        guest: GuestInput,
        drained: EventFd,
        control: Arc<Control>,
        screen: OutputWriter,
    ) -> io::Result<Arc<AtomicU64>> {
        terminal::take();
        let lost = Arc::new(AtomicU64::new(0));
        let mut console = Self {
            guest,
            drained,
            control,
            screen,
            escape: Escape::default(),
            pending: VecDeque::new(),
            closed: false,
            lost: lost.clone(),
        };
        std::thread::Builder::new().name("console".to_owned()).spawn(move || while console.pump() {})?;
        Ok(lost)
    }

    /// Waits until there is something to do, and does it; whether to go on.
    fn pump(&mut self) -> bool {
        self.feed();
        let terminal = terminal::take();
        let reads = match terminal {
            Terminal::Ours => true,
            // A read would fail, or take what is typed for the job that has the terminal.
            Terminal::Others => false,
            Terminal::None => self.pending.is_empty(),
        };
        let stdin = if reads && !self.closed { libc::STDIN_FILENO } else { -1 };
        // The kernel leaves out a negative descriptor.
        let mut polls =
            [stdin, self.drained.as_raw_fd()].map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
        let timeout = if terminal == Terminal::Others { LOOK.as_millis() as i32 } else { -1 };
        // SAFETY: the call is told of these structures and how many they are.
        let ready = unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, timeout) };
        if ready < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                log::warn!("stdin cannot be watched, the guest gets no input: {error}");
                return false;
            }
            return true;
        }
        if polls[1].revents != 0 {
            let _ = self.drained.read();
        }
        if polls[0].revents != 0 {
            self.closed = !self.read(terminal);
        }
        true
    }

    /// Hands over what the guest takes.
    fn feed(&mut self) {
        while !self.pending.is_empty() {
            let accepted = self.guest.enqueue(self.pending.make_contiguous());
            if accepted == 0 {
                return;
            }
            self.pending.drain(..accepted);
        }
    }

    /// Reads once; whether there may be more.
    fn read(&mut self, from: Terminal) -> bool {
        let mut typed = [0u8; 4096];
        // SAFETY: the buffer is ours and as long as we say.
        let got = unsafe { libc::read(libc::STDIN_FILENO, typed.as_mut_ptr().cast(), typed.len()) };
        let Some(typed) = usize::try_from(got).ok().map(|got| &typed[..got]) else {
            return match io::Error::last_os_error().raw_os_error() {
                Some(libc::EAGAIN | libc::EINTR) => true,
                // Another job got the terminal since we looked.
                Some(libc::EIO) => terminal::take() == Terminal::Others,
                _ => false,
            };
        };
        if from != Terminal::Ours {
            self.pending.extend(typed);
            return !typed.is_empty();
        }
        let commands = self.escape.filter(typed, &mut self.pending);
        // Before the commands: one of them may end the run, which then says how much was lost.
        self.lost.fetch_add(self.pending.len().saturating_sub(TYPED_MAX) as u64, Ordering::Relaxed);
        self.pending.truncate(TYPED_MAX);
        for command in commands {
            match command {
                Command::Quit => self.control.request(Stop::Quit),
                Command::Help => {
                    // It never fails.
                    let _ = self.screen.write_all(HELP.as_bytes());
                }
            }
        }
        !typed.is_empty()
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
