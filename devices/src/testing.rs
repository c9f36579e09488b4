//! Fakes of the seams for tests: they record what devices ask for.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vtd::{Msi, Requester};

use crate::host::{HostWindow, Interrupts, IoapicRoutes, IrqLine, IrqRoute, MemorySlots, PowerControl, SlotId};

/// Records messages; routes deliver when [`FakeInterrupts::pump`] is called, as KVM does by itself.
#[derive(Default)]
pub struct FakeInterrupts {
    sent: Mutex<Vec<(Requester, Msi)>>,
    pub routes: Mutex<Vec<Arc<FakeRoute>>>,
}

pub struct FakeRoute {
    pub requester: Requester,
    eventfd: EventFd,
    msi: Mutex<Option<Msi>>,
}

impl FakeInterrupts {
    /// What was delivered since the last call.
    pub fn take(&self) -> Vec<Msi> {
        self.pump();
        self.sent.lock().unwrap().drain(..).map(|(_, msi)| msi).collect()
    }
    /// Delivers what the unmasked routes' eventfds hold.
    fn pump(&self) {
        for route in self.routes.lock().unwrap().iter() {
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
        let route = Arc::new(FakeRoute { requester, eventfd: EventFd::new(EFD_NONBLOCK)?, msi: Mutex::new(None) });
        self.routes.lock().unwrap().push(route.clone());
        Ok(route)
    }
    fn signal(&self, requester: Requester, msi: Msi) {
        self.sent.lock().unwrap().push((requester, msi));
    }
}

impl IrqRoute for FakeRoute {
    fn trigger(&self) -> &EventFd {
        &self.eventfd
    }
    fn set(&self, msi: Option<Msi>) -> io::Result<()> {
        *self.msi.lock().unwrap() = msi;
        Ok(())
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
