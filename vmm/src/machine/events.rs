//! What reaches the main thread from outside: the end of the time limit, events of functions, and
//! [signals](crate::signals).

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use devices::vfio_pci::VfioPci;
use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use crate::kvm::irq::KvmInterrupts;
use crate::machine::control::{Control, Stop};
use crate::signals::{Signal, Signals};
use crate::terminal;

/// Turns signals and the timer into stop requests.
pub struct Outside {
    signals: Arc<Signals>,
    timer: Option<TimerFd>,
    control: Arc<Control>,
    report: Arc<std::sync::atomic::AtomicBool>,
}

impl Outside {
    /// `report` becomes true when SIGUSR1 comes.
    pub fn new(
        signals: Arc<Signals>,
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
        let mut fds = self.signals.files().to_vec();
        fds.push(self.control.event().as_raw_fd());
        fds.extend(self.timer.as_ref().map(AsRawFd::as_raw_fd));
        for fd in fds {
            if let Err(e) = ops.add(Events::new_raw(fd, EventSet::IN)) {
                self.control.request(Stop::Error(format!("the event loop cannot watch what it must: {e}")));
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if self.signals.files().contains(&events.fd()) {
            while let Some(signal) = self.signals.next() {
                match signal {
                    Signal::End(signal) => self.control.request(Stop::Signal(signal)),
                    Signal::Suspend => terminal::suspend(),
                    Signal::Continue => terminal::resume(),
                    Signal::Report => self.report.store(true, std::sync::atomic::Ordering::Relaxed),
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

/// A file that only wakes the loop, whose caller looks after it.
pub struct Wake {
    file: RawFd,
    control: Arc<Control>,
}

impl Wake {
    /// `file` is open as long as the loop runs.
    pub fn new(file: RawFd, control: Arc<Control>) -> Self {
        Self { file, control }
    }
}

impl MutEventSubscriber for Wake {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(e) = ops.add(Events::new_raw(self.file, EventSet::IN)) {
            self.control.request(Stop::Error(format!("the control socket cannot be watched: {e}")));
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {}
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
        // It only wakes: `Machine::give_back` reads it.
        if Self::is(self.function.request_event(), events.fd()) {
            return;
        }
        // An error is said once: it ends the run.
        let _ = ops.remove(Events::empty_raw(events.fd()));
        // What it does after that is not to be trusted, until the end of the run, either.
        if let Err(e) = self.function.quarantine() {
            log::error!("{}: it could not be stopped: {e}", self.id);
        }
        let what = "the device reported an error that it cannot correct";
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
