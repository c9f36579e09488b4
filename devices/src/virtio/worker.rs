//! The thread of a device (H-3), and how it is told to work and to stop.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vtd::Requester;

use super::ring::{Broken, Positions, Ring};
use super::vectors::{Cause, Vectors};
use super::{Device, Dma, Work};
use crate::saved::{Unfit, fits, hex};
use crate::told::Told;

/// Bytes that a device has besides its rings, at most.
const MOST_MORE: usize = 1 << 16;
/// How long what a device does in the host's kernel may take to end when the driver or a reset stops it.
pub const DEADLINE: Duration = Duration::from_secs(10);
/// How long a device that is stopped for good is waited for.
const LAST_WAIT: Duration = Duration::from_secs(1);

/// Interrupt status: a queue.
const ISR_QUEUE: u8 = 1;
/// Interrupt status: the configuration.
const ISR_CONFIG: u8 = 2;

/// What function and worker share. The worker holds its lock for moments only: not while it works.
pub struct Link {
    requester: Requester,
    /// The interrupts of the device.
    pub vectors: Vectors,
    state: Mutex<State>,
    changed: Condvar,
    /// The worker is to come to an end with what it does.
    stop: AtomicBool,
    /// Status bits that the device sets.
    status: AtomicU8,
    isr: AtomicU8,
    wake: Arc<EventFd>,
    told: Told,
}

#[derive(Default)]
struct State {
    /// None while the driver is not ready, and while the worker has them.
    rings: Vec<Option<Ring>>,
    /// Features of a driver that became ready, which the device has not heard yet.
    fresh: Option<u64>,
    /// It was reset, which the device has not heard yet.
    forgotten: bool,
    /// The driver is ready, and its rings are in order.
    started: bool,
    /// The function may do DMA.
    master: bool,
    /// The worker has the rings.
    busy: bool,
    /// It is to rest, and begins nothing.
    held: bool,
    /// It rests: what the device has besides its rings. None where the rings are broken.
    rested: Option<Vec<u8>>,
    /// What a device that was put back has besides its rings, until it has heard of it.
    more: Option<Vec<u8>>,
    /// Nothing is begun any more.
    ended: bool,
    /// The thread ends.
    closed: bool,
    /// It has ended, and the device is gone.
    gone: bool,
}

impl Link {
    /// For the function at `requester`.
    pub fn new(requester: Requester, vectors: Vectors) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            requester,
            vectors,
            state: Mutex::default(),
            changed: Condvar::new(),
            stop: AtomicBool::new(true),
            status: AtomicU8::new(0),
            isr: AtomicU8::new(0),
            wake: Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?),
            told: Told::default(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// There may be something to do.
    pub fn kick(&self) {
        // A counter that is full wakes as well.
        let _ = self.wake.write(1);
    }

    /// What [`Self::kick`] signals.
    pub fn wake(&self) -> &Arc<EventFd> {
        &self.wake
    }

    /// Status bits that the device has set.
    pub fn status(&self) -> u8 {
        self.status.load(Ordering::Acquire)
    }

    /// The interrupt status, which reading clears.
    pub fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    /// The driver is ready. The worker is not at anything: the device was reset before.
    pub fn start(&self, rings: Result<Vec<Option<Ring>>, Broken>, features: u64) {
        let mut state = self.lock();
        match rings {
            Ok(rings) => {
                (state.rings, state.fresh, state.started) = (rings, Some(features), true);
                self.go_on(&state);
            }
            Err(why) => {
                drop(state);
                self.needs_reset(why);
            }
        }
    }

    fn go_on(&self, state: &State) {
        if state.may_work() {
            self.stop.store(false, Ordering::Release);
            self.kick();
        }
    }

    /// Whether the function may do DMA; when it may not, it does none once this returns. `false`: that was not in time.
    #[must_use]
    pub fn set_master(&self, master: bool) -> bool {
        let mut state = self.lock();
        if std::mem::replace(&mut state.master, master) == master {
            return true;
        }
        if master {
            self.go_on(&state);
            return true;
        }
        self.wait(state, DEADLINE).is_some()
    }

    /// Whether the worker is to come to an end with what it does.
    #[cfg(test)]
    pub fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// The device is reset: when this returns it has no rings and does nothing. `false`: that was not in time.
    #[must_use]
    pub fn reset(&self) -> bool {
        let Some(mut state) = self.wait(self.lock(), DEADLINE) else { return false };
        (state.rings, state.fresh, state.started, state.forgotten) = (Vec::new(), None, false, true);
        state.more = None;
        self.kick();
        self.status.store(0, Ordering::Release);
        self.isr.store(0, Ordering::Release);
        true
    }

    /// Nothing is begun any more. `false`: what is under way does not end.
    #[must_use]
    pub fn end_for_good(&self) -> bool {
        let mut state = self.lock();
        state.ended = true;
        self.wait(state, LAST_WAIT).is_some()
    }

    /// Makes the worker put down what it has. `None`: it did not in time, and never begins anything again.
    fn wait<'a>(&self, state: MutexGuard<'a, State>, limit: Duration) -> Option<MutexGuard<'a, State>> {
        self.stop.store(true, Ordering::Release);
        // What did not end when it was ended for good has stopped the machine.
        let limit = if state.ended { limit.min(LAST_WAIT) } else { limit };
        let (mut state, waited) = self.changed.wait_timeout_while(state, limit, |state| state.busy).unwrap();
        if waited.timed_out() {
            state.ended = true;
            return None;
        }
        Some(state)
    }

    /// Makes the device rest until [`Link::go_on_again`]. `false`: what is under way does not end in time.
    #[must_use]
    pub fn hold(&self) -> bool {
        let mut state = self.lock();
        state.held = true;
        self.stop.store(true, Ordering::Release);
        self.kick();
        let moving = |state: &mut State| state.busy || state.must_rest();
        !self.changed.wait_timeout_while(state, DEADLINE, moving).unwrap().1.timed_out()
    }

    /// It may go on.
    pub fn go_on_again(&self) {
        let mut state = self.lock();
        (state.held, state.rested) = (false, None);
        self.go_on(&state);
    }

    /// What is saved of a device that rests.
    pub fn save(&self) -> Saved {
        let state = self.lock();
        let positions = |ring: &Option<Ring>| ring.as_ref().map(Ring::positions);
        Saved {
            running: state.started,
            rings: state.rings.iter().map(positions).collect(),
            status: self.status(),
            isr: self.isr.load(Ordering::Acquire),
            // What the device was put back with, and has not heard of, is still so.
            more: state.more.clone().or_else(|| state.rested.clone()).unwrap_or_default(),
        }
    }

    /// Puts it back into a device that rests: its rings, with the features of its driver, or none.
    pub fn restore(&self, saved: Saved, rings: Vec<Option<Ring>>, features: u64, master: bool) {
        let Saved { running, rings: _, status, isr, more } = saved;
        let mut state = self.lock();
        (state.rings, state.started, state.master, state.forgotten) = (rings, running, master, !running);
        (state.fresh, state.more) = if running { (Some(features), Some(more)) } else { (None, None) };
        self.status.store(status, Ordering::Release);
        self.isr.store(isr, Ordering::Release);
    }

    /// The thread ends, and with it the device: when this returns its file, its pins and its place in the unit are free
    /// for another one. Not where something is under way that does not end, or that ends late.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        self.stop.store(true, Ordering::Release);
        self.kick();
        if !state.ended {
            drop(self.changed.wait_timeout_while(state, LAST_WAIT, |state| !state.gone).unwrap());
        }
    }

    /// The device's DEVICE_NEEDS_RESET (section 2.1.2).
    fn needs_reset(&self, why: Broken) {
        let requester = self.requester;
        self.told.once(|| {
            log::warn!("the virtio device {requester} needs a reset: {why}; further times are not logged");
        });
        self.status.fetch_or(VIRTIO_CONFIG_S_NEEDS_RESET as u8, Ordering::AcqRel);
        self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
        self.vectors.raise(Cause::Config);
    }

    fn used(&self, queue: usize) {
        self.isr.fetch_or(ISR_QUEUE, Ordering::AcqRel);
        self.vectors.raise(Cause::Queue(queue));
    }
}

/// What is saved of a device besides its registers.
#[derive(Serialize, Deserialize, Debug)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    /// The driver is ready, and the rings are in order.
    pub running: bool,
    /// How far each queue is that the driver uses.
    pub rings: Vec<Option<Positions>>,
    status: u8,
    isr: u8,
    #[serde(with = "hex")]
    more: Vec<u8>,
}

impl Saved {
    /// Whether a device can be in it.
    pub fn check(&self) -> Result<(), Unfit> {
        fits("status", u32::from(self.status) & !VIRTIO_CONFIG_S_NEEDS_RESET == 0)?;
        fits("interrupt status", self.isr & !(ISR_QUEUE | ISR_CONFIG) == 0)?;
        fits("input", self.more.len() <= MOST_MORE)
    }
}

impl State {
    fn may_work(&self) -> bool {
        self.started && self.master && !self.ended && !self.closed && !self.held
    }

    /// Whether the device is to rest now.
    fn must_rest(&self) -> bool {
        self.held && self.rested.is_none() && !self.closed
    }
}

/// Says that the thread has ended, however it did.
struct Gone(Arc<Link>);

impl Drop for Gone {
    fn drop(&mut self) {
        // A lock that a panic of this thread has poisoned says nothing new.
        if let Ok(mut state) = self.0.state.lock() {
            state.gone = true;
        }
        self.0.changed.notify_all();
    }
}

/// Starts the thread of `device`. Nobody waits long for its end: I/O that never ends must not keep the process.
pub fn spawn<D: Dma>(link: Arc<Link>, dma: D, device: impl Device<D>, name: &str) -> io::Result<()> {
    let events = Epoll::new()?;
    events.ctl(ControlOperation::Add, link.wake.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))?;
    if let Some(input) = device.input() {
        let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
        events.ctl(ControlOperation::Add, input, EpollEvent::new(edges, 1))?;
    }
    let thread = std::thread::Builder::new().name(name.to_owned());
    thread.spawn(move || {
        let gone = Gone(link);
        // Dropped before `gone` is.
        let (dma, mut device) = (dma, device);
        while gone.0.turn(&events, &dma, &mut device) {}
    })?;
    Ok(())
}

impl Link {
    /// Waits for something to do, and does it. `false`: the thread ends.
    fn turn<D: Dma>(&self, events: &Epoll, dma: &D, device: &mut impl Device<D>) -> bool {
        match events.wait(-1, &mut [EpollEvent::default(); 2]) {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return true,
            Err(e) => {
                log::error!("the virtio device {} stops: its events cannot be waited for: {e}", self.requester);
                return false;
            }
        }
        // Before the rings are looked at: a kick that comes later wakes again.
        let _ = self.wake.read();
        let mut state = self.lock();
        if state.closed {
            return false;
        }
        let (forgotten, works) = (std::mem::take(&mut state.forgotten), state.may_work());
        // One that has not begun has nothing to put back.
        let rests = state.must_rest();
        let puts_back = rests && state.started && state.fresh.is_none();
        let mut rings = if works || puts_back { std::mem::take(&mut state.rings) } else { Vec::new() };
        let fresh = if works { state.fresh.take() } else { None };
        let more = if works { state.more.take() } else { None };
        state.busy = works || rests;
        drop(state);
        if forgotten {
            device.reset();
        }
        if !works && !rests {
            return true;
        }
        match (fresh, more) {
            (Some(features), Some(more)) => device.restored(features, &more),
            (Some(features), None) => device.start(features),
            (None, _) => {}
        }
        let notify = |queue: usize| self.used(queue);
        let mut work = Work { dma, rings: &mut rings, stop: &self.stop, notify: &notify, events, wake: &self.wake };
        let done = match (works, puts_back) {
            (true, _) => device.work(&mut work).map(|()| None),
            (false, true) => device.rest(&mut work).map(Some),
            (false, false) => Ok(Some(Vec::new())),
        };
        let broken = done.as_ref().err().copied();
        if broken.is_some() {
            device.reset();
        }
        let mut state = self.lock();
        if works || puts_back {
            state.rings = rings;
        }
        state.busy = false;
        if rests {
            state.rested = Some(done.ok().flatten().unwrap_or_default());
        }
        state.started &= broken.is_none();
        // Still under the lock: a reset that comes now takes it back.
        if let Some(why) = broken {
            self.needs_reset(why);
        }
        if state.must_rest() || state.closed {
            // A device that waited may have taken the kick for that.
            self.kick();
        }
        self.changed.notify_all();
        true
    }
}
