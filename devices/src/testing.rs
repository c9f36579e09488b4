//! Fakes of the seams for tests: they record what devices ask for.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vtd::{Msi, Requester};

use crate::host::{
    Doorbells, HostWindow, Interrupts, IoapicRoutes, IrqLine, IrqRoute, MemorySlots, PowerControl, SlotId,
};
use crate::timers::Clock;

/// Records messages; routes deliver when [`FakeInterrupts::pump`] is called, as KVM does by itself.
#[derive(Default)]
pub struct FakeInterrupts {
    sent: Mutex<Vec<(Requester, Msi)>>,
    routes: Mutex<Vec<Weak<FakeRoute>>>,
    /// How often routes were set.
    pub changes: AtomicU32,
    /// So many routes more can be had; any number where nothing is said.
    pub left: Mutex<Option<u32>>,
}

struct FakeRoute {
    requester: Requester,
    number: u32,
    eventfd: EventFd,
    msi: Mutex<Option<Msi>>,
}

impl FakeInterrupts {
    /// What was delivered since the last call.
    pub fn take(&self) -> Vec<Msi> {
        self.pump();
        self.sent.lock().unwrap().drain(..).map(|(_, msi)| msi).collect()
    }
    /// How many routes there are.
    pub fn count(&self) -> usize {
        self.routes().len()
    }
    fn routes(&self) -> Vec<Arc<FakeRoute>> {
        self.routes.lock().unwrap().iter().filter_map(Weak::upgrade).collect()
    }
    /// Delivers what the unmasked routes' eventfds hold.
    fn pump(&self) {
        for route in self.routes() {
            let msi = route.msi.lock().unwrap();
            if let Some(msi) = *msi
                && route.eventfd.read().is_ok()
            {
                self.sent.lock().unwrap().push((route.requester, msi));
            }
        }
    }
}

impl Interrupts for FakeInterrupts {
    fn route(&self, requester: Requester) -> io::Result<Arc<dyn IrqRoute>> {
        if let Some(left) = &mut *self.left.lock().unwrap() {
            *left = left.checked_sub(1).ok_or(io::ErrorKind::QuotaExceeded)?;
        }
        let mut routes = self.routes.lock().unwrap();
        let eventfd = EventFd::new(EFD_NONBLOCK)?;
        let route = Arc::new(FakeRoute { requester, number: routes.len() as u32, eventfd, msi: Mutex::new(None) });
        routes.push(Arc::downgrade(&route));
        Ok(route)
    }
    fn set_routes(&self, changes: &[(Arc<dyn IrqRoute>, Option<Msi>)]) {
        let routes = self.routes.lock().unwrap();
        for (change, msi) in changes {
            let route = routes.iter().filter_map(Weak::upgrade).find(|route| route.number() == change.number());
            *route.expect("a route that is there").msi.lock().unwrap() = *msi;
        }
        self.changes.fetch_add(1, Ordering::SeqCst);
    }
    fn signal(&self, requester: Requester, msi: Msi) {
        self.sent.lock().unwrap().push((requester, msi));
    }
}

impl IrqRoute for FakeRoute {
    fn trigger(&self) -> &EventFd {
        &self.eventfd
    }
    fn number(&self) -> u32 {
        self.number
    }
    fn take_pending(&self) -> bool {
        self.eventfd.read().is_ok()
    }
}

/// Records routes of pins.
#[derive(Default)]
pub struct FakeRoutes(pub Mutex<BTreeMap<u8, Option<(Msi, bool)>>>);

impl IoapicRoutes for FakeRoutes {
    fn set_pin(&self, pin: u8, route: Option<(Msi, bool)>) {
        self.0.lock().unwrap().insert(pin, route);
    }
}

/// A line that remembers its level and how often it rose.
#[derive(Default)]
pub struct FakeLine {
    level: AtomicBool,
    pub rises: Mutex<u32>,
}

impl FakeLine {
    pub fn is_high(&self) -> bool {
        self.level.load(Ordering::SeqCst)
    }
}

impl IrqLine for FakeLine {
    fn set_level(&self, high: bool) {
        if !self.level.swap(high, Ordering::SeqCst) && high {
            *self.rises.lock().unwrap() += 1;
        }
    }
}

/// Remembers what the guest asked for.
#[derive(Default)]
pub struct FakePower {
    pub off: AtomicBool,
    pub reset: AtomicBool,
}

impl PowerControl for FakePower {
    fn power_off(&self) {
        self.off.store(true, Ordering::SeqCst);
    }
    fn reset(&self) {
        self.reset.store(true, Ordering::SeqCst);
    }
}

/// Bells by where they hang. Two at one place are refused.
#[derive(Default)]
pub struct FakeDoorbells(Mutex<BTreeMap<u64, EventFd>>);

impl FakeDoorbells {
    pub fn hung(&self) -> Vec<u64> {
        self.0.lock().unwrap().keys().copied().collect()
    }
    /// The guest writes at `gpa`; `false` where no bell hangs, and the write goes on.
    pub fn ring(&self, gpa: u64) -> bool {
        self.0.lock().unwrap().get(&gpa).map(|bell| bell.write(1).unwrap()).is_some()
    }
}

impl Doorbells for FakeDoorbells {
    fn hang(&self, gpa: u64, event: &EventFd) -> io::Result<()> {
        match self.0.lock().unwrap().entry(gpa) {
            Entry::Occupied(_) => return Err(io::ErrorKind::AlreadyExists.into()),
            Entry::Vacant(place) => place.insert(event.try_clone()?),
        };
        Ok(())
    }
    fn take_down(&self, gpa: u64, _: &EventFd) {
        assert!(self.0.lock().unwrap().remove(&gpa).is_some(), "nothing hangs at {gpa:#x}");
    }
}

/// What is mapped into the guest: guest-physical address, offset into the file, length.
#[derive(Default)]
pub struct FakeSlots {
    /// Called inside each unmap.
    pub on_unmap: Mutex<Option<Box<dyn Fn() + Send>>>,
    state: Mutex<(u32, BTreeMap<SlotId, Mapped>)>,
}

/// Guest-physical address, offset into the file, length.
pub type Mapped = (u64, u64, u64);

impl FakeSlots {
    pub fn mapped(&self) -> Vec<Mapped> {
        let mut all: Vec<_> = self.state.lock().unwrap().1.values().copied().collect();
        all.sort_unstable();
        all
    }
}

impl MemorySlots for FakeSlots {
    fn map(&self, gpa: u64, window: &HostWindow) -> io::Result<SlotId> {
        let mut state = self.state.lock().unwrap();
        let overlaps = |&(first, _, len): &Mapped| gpa < first + len && first < gpa + window.len;
        if state.1.values().any(overlaps) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        state.0 += 1;
        let slot = SlotId(state.0);
        state.1.insert(slot, (gpa, window.offset, window.len));
        Ok(slot)
    }
    fn unmap(&self, slot: SlotId) {
        if let Some(hook) = &*self.on_unmap.lock().unwrap() {
            hook();
        }
        self.state.lock().unwrap().1.remove(&slot).expect("a slot that is mapped");
    }
}

/// A clock that stands until it is set: the time since it was made, and the time of day then.
#[derive(Default)]
pub struct FakeClock(Mutex<(Duration, Duration)>);

impl FakeClock {
    pub fn set(&self, now: Duration) {
        self.0.lock().unwrap().0 = now;
    }
    pub fn set_epoch(&self, wall: Duration) {
        self.0.lock().unwrap().1 = wall;
    }
}

impl Clock for FakeClock {
    fn now(&self) -> Duration {
        self.0.lock().unwrap().0
    }
    fn wall(&self) -> Duration {
        let (now, epoch) = *self.0.lock().unwrap();
        epoch + now
    }
}
