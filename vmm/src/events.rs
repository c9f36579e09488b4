//! What reaches the main thread from outside: signals, and the end of the time limit.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use devices::vfio_pci::VfioPci;
use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use crate::control::{Control, Stop};
use crate::irq::KvmInterrupts;

/// Signals that end us, after an orderly stop.
const ENDING: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// Signals as a file. They are blocked in every thread that is started after this was made.
pub struct Signals(OwnedFd);

impl Signals {
    /// Blocks the signals in this thread, and in those it starts.
    pub fn block() -> io::Result<Self> {
        let all: Vec<libc::c_int> = ENDING.into_iter().chain([libc::SIGUSR1]).collect();
        let set = vmm_sys_util::signal::create_sigset(&all).map_err(io::Error::from)?;
        // SAFETY: the set was initialised just now.
        if unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: signalfd returned this descriptor just now, nobody else has it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Waits for one that ends us.
    pub fn wait(&self) -> io::Result<libc::c_int> {
        loop {
            let mut poll = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: `poll` is the one structure that the call is told of.
            let ready = unsafe { libc::poll(&raw mut poll, 1, -1) };
            if ready < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                return Err(io::Error::last_os_error());
            }
            if let Some(signal) = self.next().filter(|signal| ENDING.contains(signal)) {
                return Ok(signal);
            }
        }
    }

    fn next(&self) -> Option<libc::c_int> {
        let mut info = std::mem::MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: the buffer is ours and as long as we say.
        let got = unsafe { libc::read(self.0.as_raw_fd(), info.as_mut_ptr().cast(), size) };
        // SAFETY: the kernel writes whole structures.
        (got == size as isize).then(|| unsafe { info.assume_init() }.ssi_signo as libc::c_int)
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

/// Turns signals and the timer into stop requests.
pub struct Outside {
    signals: Signals,
    timer: Option<TimerFd>,
    control: Arc<Control>,
    report: Arc<std::sync::atomic::AtomicBool>,
}

impl Outside {
    /// `report` becomes true when SIGUSR1 comes.
    pub fn new(
        signals: Signals,
        limit: Option<Duration>,
        control: Arc<Control>,
        report: Arc<std::sync::atomic::AtomicBool>,
    ) -> io::Result<Self> {
        let timer = match limit {
            None => None,
            Some(limit) => {
                let mut timer = TimerFd::new().map_err(io::Error::from)?;
                timer.reset(limit, None).map_err(io::Error::from)?;
                Some(timer)
            }
        };
        Ok(Self { signals, timer, control, report })
    }
}

impl MutEventSubscriber for Outside {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let mut fds = vec![self.signals.0.as_raw_fd(), self.control.event().as_raw_fd()];
        fds.extend(self.timer.as_ref().map(AsRawFd::as_raw_fd));
        for fd in fds {
            if let Err(e) = ops.add(Events::new_raw(fd, EventSet::IN)) {
                self.control.request(Stop::Error(format!("the event loop cannot watch what it must: {e}")));
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if events.fd() == self.signals.0.as_raw_fd() {
            while let Some(signal) = self.signals.next() {
                match signal {
                    libc::SIGUSR1 => self.report.store(true, std::sync::atomic::Ordering::Relaxed),
                    signal => self.control.request(Stop::Signal(signal)),
                }
            }
        } else if let Some(timer) = self.timer.as_mut().filter(|timer| timer.as_raw_fd() == events.fd()) {
            let _ = ops.remove(Events::empty_raw(timer.as_raw_fd()));
            self.timer = None;
            self.control.request(Stop::TimeLimit);
        }
        // The control's own event only wakes the loop, whose caller asks the control.
    }
}

/// What an assigned function's host tells us outside of the guest's own accesses.
pub struct FunctionEvents {
    id: String,
    function: Arc<VfioPci>,
    control: Arc<Control>,
}

impl FunctionEvents {
    /// For the function with this id.
    pub fn new(id: String, function: Arc<VfioPci>, control: Arc<Control>) -> Self {
        Self { id, function, control }
    }

    fn is(event: Option<&EventFd>, fd: RawFd) -> bool {
        event.is_some_and(|event| event.as_raw_fd() == fd)
    }
}

impl MutEventSubscriber for FunctionEvents {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let function = &self.function;
        for event in [function.intx_event(), function.error_event(), function.request_event()].into_iter().flatten() {
            if let Err(e) = ops.add(Events::new(event, EventSet::IN)) {
                self.control.request(Stop::Error(format!("the events of {} cannot be watched: {e}", self.id)));
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if Self::is(self.function.intx_event(), events.fd()) {
            return self.function.intx_fired();
        }
        // The others are said once: they end the run.
        let _ = ops.remove(Events::empty_raw(events.fd()));
        let what = if Self::is(self.function.request_event(), events.fd()) {
            "the host wants the device back"
        } else {
            "the device reported an error that it cannot correct"
        };
        self.control.request(Stop::Error(format!("{}: {what}", self.id)));
    }
}

/// Interrupts that the unit blocks: what fires there reaches the unit by way of the event loop.
pub struct BlockedInterrupts {
    interrupts: Arc<KvmInterrupts>,
    control: Arc<Control>,
}

impl BlockedInterrupts {
    /// For all functions of a machine.
    pub fn new(interrupts: Arc<KvmInterrupts>, control: Arc<Control>) -> Self {
        Self { interrupts, control }
    }
}

impl MutEventSubscriber for BlockedInterrupts {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(e) = ops.add(Events::new_raw(self.interrupts.blocked_event(), EventSet::IN)) {
            self.control.request(Stop::Error(format!("blocked interrupts cannot be watched: {e}")));
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        self.interrupts.serve_blocked();
    }
}
