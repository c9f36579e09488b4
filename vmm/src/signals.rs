//! Signals from outside. They are blocked in every thread and read from files, so each is heard where it can be served:
//! while the machine is made by a [`Guard`], later by the event loop, and at the end by whoever waits for something.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Signals that end us, after an orderly stop.
const ENDING: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];
/// Signals that stop us for a while, and the one that ends that.
const JOB: [libc::c_int; 2] = [libc::SIGTSTP, libc::SIGCONT];
/// What the kernel sends to a background job that uses its terminal. Blocked, they stop nobody, and a read from the
/// terminal fails instead: the machine goes on, whatever is typed at the shell.
const TERMINAL: [libc::c_int; 2] = [libc::SIGTTIN, libc::SIGTTOU];
/// The signal that asks for a report.
const REPORT: libc::c_int = libc::SIGUSR1;

/// What a signal asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Signal {
    /// An end by this signal.
    End(libc::c_int),
    /// A stop of this process, until it is continued.
    Suspend,
    /// It was continued.
    Continue,
    /// A report.
    Report,
}

impl Signal {
    fn of(number: libc::c_int) -> Self {
        match number {
            REPORT => Self::Report,
            libc::SIGTSTP => Self::Suspend,
            libc::SIGCONT => Self::Continue,
            number => Self::End(number),
        }
    }
}

/// Why a wait is over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Woken {
    /// By a signal that ends us.
    Ended(libc::c_int),
    /// What was waited for is ready.
    Event,
    /// The deadline is over.
    TimedOut,
}

/// Signals as files. They are blocked in every thread that is started after this was made.
pub struct Signals {
    /// Those that are served at any time.
    control: OwnedFd,
    /// Those that wait until the machine runs.
    report: OwnedFd,
}

fn signal_file(numbers: &[libc::c_int]) -> io::Result<OwnedFd> {
    let set = vmm_sys_util::signal::create_sigset(numbers).map_err(io::Error::from)?;
    // SAFETY: the set was initialised just now; -1 asks for a new descriptor.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: signalfd returned this descriptor just now, nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn next_of(file: &OwnedFd) -> Option<libc::c_int> {
    let mut info = std::mem::MaybeUninit::<libc::signalfd_siginfo>::uninit();
    let size = size_of::<libc::signalfd_siginfo>();
    // SAFETY: the buffer is ours and as long as we say.
    let got = unsafe { libc::read(file.as_raw_fd(), info.as_mut_ptr().cast(), size) };
    // SAFETY: the kernel writes whole structures.
    (got == size as isize).then(|| unsafe { info.assume_init() }.ssi_signo as libc::c_int)
}

impl Signals {
    /// Blocks the signals in this thread, and in those it starts.
    pub fn block() -> io::Result<Self> {
        let control: Vec<libc::c_int> = ENDING.into_iter().chain(JOB).collect();
        let all: Vec<libc::c_int> = control.iter().copied().chain(TERMINAL).chain([REPORT]).collect();
        let set = vmm_sys_util::signal::create_sigset(&all).map_err(io::Error::from)?;
        // SAFETY: the set was initialised just now.
        if unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { control: signal_file(&control)?, report: signal_file(&[REPORT])? })
    }

    /// The files, for a loop that calls [`Signals::next`] when one of them is readable.
    pub fn files(&self) -> [RawFd; 2] {
        [self.control.as_raw_fd(), self.report.as_raw_fd()]
    }

    /// The next signal that has come.
    pub fn next(&self) -> Option<Signal> {
        next_of(&self.control).or_else(|| next_of(&self.report)).map(Signal::of)
    }

    /// Waits for a signal that ends us, for `event` to be readable, or for `deadline`, whichever there is first. A
    /// request to stop for a while is served; one for a report waits for the event loop.
    pub fn wait(&self, event: Option<RawFd>, deadline: Option<Instant>) -> io::Result<Woken> {
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            // Rounded up, so that it does not spin through the last millisecond.
            let timeout = left.map_or(-1, |left| left.as_millis().saturating_add(1).min(i32::MAX as u128) as i32);
            // The kernel leaves out a negative descriptor.
            let mut polls = [self.control.as_raw_fd(), event.unwrap_or(-1)].map(|fd| libc::pollfd {
                fd,
                events: libc::POLLIN,
                revents: 0,
            });
            // SAFETY: the call is told of these structures and how many they are.
            let ready = unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, timeout) };
            if ready < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                return Err(io::Error::last_os_error());
            }
            while let Some(signal) = next_of(&self.control) {
                match Signal::of(signal) {
                    Signal::End(signal) => return Ok(Woken::Ended(signal)),
                    Signal::Suspend => crate::terminal::suspend(),
                    Signal::Continue | Signal::Report => {}
                }
            }
            if ready > 0 && polls[1].revents != 0 {
                return Ok(Woken::Event);
            }
            if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                return Ok(Woken::TimedOut);
            }
        }
    }
}

/// While the machine is made, a signal that ends us does so at once, whatever the main thread waits for: the kernel
/// takes away what was made, and no guest has run.
pub struct Guard {
    over: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Guard {
    /// Watches from now on; `last_words` is called before the end.
    pub fn start(
        signals: Arc<Signals>,
        last_words: impl FnOnce(libc::c_int, &Signals) + Send + 'static,
    ) -> io::Result<Self> {
        let over = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let event = over.try_clone()?;
        let thread = std::thread::Builder::new().name("start".to_owned()).spawn(move || {
            match signals.wait(Some(event.as_raw_fd()), None) {
                Ok(Woken::Ended(signal)) => {
                    last_words(signal, &signals);
                    die_by(signal);
                }
                Ok(Woken::Event | Woken::TimedOut) => {}
                Err(e) => log::debug!("signals cannot be waited for: {e}"),
            }
        })?;
        Ok(Self { over, thread: Some(thread) })
    }
}

impl Drop for Guard {
    /// The event loop hears the signals from now on.
    fn drop(&mut self) {
        // The counter is 0.
        let _ = self.over.write(1);
        // The thread says what it has to say, and does not panic.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Ends this process by `signal`, as if it had never been caught.
pub fn die_by(signal: libc::c_int) -> ! {
    // SAFETY: the default action, an unblocked signal and raise are the documented way to die by a signal.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
    let _ = vmm_sys_util::signal::unblock_signal(signal);
    // The default action of every signal in `ENDING` ends the process, so this is not reached.
    std::process::exit(128 + signal)
}
