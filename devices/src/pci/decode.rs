//! Which BAR is on a bus where, with its windows in the guest's memory: a BAR has both, or neither.
//!
//! A guest may give two BARs one address, for a moment or for good. The first keeps it; the second waits, and is put
//! there as soon as its range is free. A BAR behind a bridge waits, too, until the bridge forwards its range.

use std::collections::BTreeMap;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;
use vtd::Requester;

use crate::host::{Doorbells, HostWindow, MemorySlots, SlotId};
use crate::sync::{Mutex, RwLock};
use crate::{Bus, BusDevice};

/// What answers for a BAR.
#[derive(Clone)]
pub struct BarTarget {
    /// To accesses that are not mapped.
    pub device: Arc<dyn BusDevice>,
    /// What is mapped into the guest while the BAR is on the bus: offset in the BAR, and part of a file.
    pub windows: Arc<[(u64, HostWindow)]>,
    /// Puts them there; without it there are none.
    pub slots: Option<Arc<dyn MemorySlots>>,
    /// Where a write only says that there is something to do.
    pub bells: Option<Bells>,
}

/// Places in a BAR where every write is the same: they signal an eventfd while the BAR is on the bus.
#[derive(Clone)]
pub struct Bells {
    /// Who hangs them.
    pub by: Arc<dyn Doorbells>,
    /// What they signal.
    pub event: Arc<EventFd>,
    /// Offsets in the BAR.
    pub offsets: Arc<[u64]>,
}

impl BarTarget {
    /// Only a device.
    pub fn of_device(device: Arc<dyn BusDevice>) -> Self {
        Self { device, windows: Arc::new([]), slots: None, bells: None }
    }
}

/// Puts BARs on a bus, that of MMIO or that of ports, and takes them off.
pub struct Decoder {
    bus: Arc<Bus>,
    // Held while windows are mapped and unmapped, which calls nothing that comes back here.
    claims: Mutex<Claims>,
    placed: RwLock<Placed>,
}

#[derive(Default)]
struct Claims {
    by_bar: BTreeMap<(Requester, u8), Claim>,
    /// Of functions behind bridges: what is forwarded to them, first and last addresses.
    forwarded: BTreeMap<Requester, Vec<(u64, u64)>>,
}

impl Claims {
    /// Whether accesses of all of the range get to `of`.
    fn reach(&self, of: Requester, first: u64, last: u64) -> bool {
        let Some(forwarded) = self.forwarded.get(&of) else { return true };
        forwarded.iter().any(|(from, to)| *from <= first && last <= *to)
    }

    /// Puts what waits where it can be.
    fn place_all(&mut self, decoder: &Decoder) {
        let waiting: Vec<_> = self.by_bar.iter().filter(|(_, claim)| !claim.placed).map(|(key, _)| *key).collect();
        waiting.into_iter().for_each(|key| self.place(decoder, key));
    }

    fn place(&mut self, decoder: &Decoder, key: (Requester, u8)) {
        let reached = self.by_bar.get(&key).is_some_and(|claim| self.reach(key.0, claim.first, claim.last));
        if let Some(claim) = self.by_bar.get_mut(&key).filter(|_| reached) {
            claim.place(decoder, key);
        }
    }
}

/// BARs that are on the bus: first address -> last address, function, what answers.
type Placed = BTreeMap<u64, (u64, Requester, Arc<dyn BusDevice>)>;

struct Claim {
    first: u64,
    last: u64,
    target: BarTarget,
    placed: bool,
    mapped: Vec<SlotId>,
    /// Where bells hang.
    hung: Vec<u64>,
}

impl Decoder {
    /// A decoder for `bus`.
    pub fn new(bus: Arc<Bus>) -> Self {
        Self { bus, claims: Mutex::default(), placed: RwLock::default() }
    }

    /// What answers for `len` bytes at `address`, if all of them are in one BAR that is on the bus: its function, the
    /// offset in the BAR, and the device. Waits for no change that is under way.
    pub fn find(&self, address: u64, len: usize) -> Option<(Requester, u64, Arc<dyn BusDevice>)> {
        let placed = self.placed.read().unwrap();
        let (first, (last, of, device)) = placed.range(..=address).next_back()?;
        let end = address.checked_add((len as u64).checked_sub(1)?)?;
        (end <= *last).then(|| (*of, address - first, device.clone()))
    }

    /// From now on BAR `bar` of `of` is decoded at `range` (first and last address), or nowhere. `true` when it is
    /// where it should be; `false` when something else has the range: then nothing answers for it until that goes away.
    ///
    /// Its windows leave the guest before it leaves the bus, and come after it (F-3).
    pub fn set(&self, of: Requester, bar: u8, range: Option<(u64, u64)>, target: &BarTarget) -> bool {
        let claims = &mut *self.claims.lock().unwrap();
        let key = (of, bar);
        if let Some(old) = claims.by_bar.get_mut(&key) {
            if range == Some((old.first, old.last)) {
                return old.placed;
            }
            old.withdraw(self);
            claims.by_bar.remove(&key);
        }
        if let Some((first, last)) = range {
            let claim = Claim { first, last, target: target.clone(), placed: false, mapped: vec![], hung: vec![] };
            claims.by_bar.insert(key, claim);
        }
        // The one that asks comes first: it may take what it only waits for because it moved over itself.
        claims.place(self, key);
        claims.place_all(self);
        let placed = claims.by_bar.get(&key).is_none_or(|claim| claim.placed);
        if !placed {
            log::debug!(
                "BAR {bar} of {of} has an address that is taken or not forwarded: nothing answers there for it"
            );
        }
        placed
    }

    /// `of` is behind a bridge, which forwards accesses of these ranges (first and last addresses) to it and no
    /// others: of its BARs those are on the bus that lie in one of them.
    pub fn forward(&self, of: Requester, ranges: &[(u64, u64)]) {
        let claims = &mut *self.claims.lock().unwrap();
        claims.forwarded.insert(of, ranges.to_vec());
        let keys: Vec<_> = claims.by_bar.range((of, 0)..=(of, u8::MAX)).map(|(key, _)| *key).collect();
        for key in keys {
            let stays = claims.by_bar.get(&key).is_some_and(|claim| claims.reach(of, claim.first, claim.last));
            if let Some(claim) = claims.by_bar.get_mut(&key).filter(|_| !stays) {
                claim.withdraw(self);
            }
        }
        claims.place_all(self);
    }
}

impl Claim {
    fn place(&mut self, decoder: &Decoder, (of, bar): (Requester, u8)) {
        // Where something else answers, mapping over it would hide that.
        let device = &self.target.device;
        self.placed = decoder.bus.insert(self.first, self.last, device.clone()).is_ok();
        if !self.placed {
            return;
        }
        decoder.placed.write().unwrap().insert(self.first, (self.last, of, device.clone()));
        if let Some(bells) = &self.target.bells {
            for at in bells.offsets.iter().map(|offset| self.first + offset) {
                match bells.by.hang(at, &bells.event) {
                    Ok(()) => self.hung.push(at),
                    Err(e) => log::debug!("a write at {at:#x}, of BAR {bar} of {of}, stays an exit: {e}"),
                }
            }
        }
        let Some(slots) = &self.target.slots else { return };
        for (offset, window) in &*self.target.windows {
            match slots.map(self.first + offset, window) {
                Ok(slot) => self.mapped.push(slot),
                Err(e) => log::debug!("a window of BAR {bar} of {of} stays trapped: {e}"),
            }
        }
    }

    fn withdraw(&mut self, decoder: &Decoder) {
        for slot in self.mapped.drain(..) {
            if let Some(slots) = &self.target.slots {
                slots.unmap(slot);
            }
        }
        for at in self.hung.drain(..) {
            if let Some(bells) = &self.target.bells {
                bells.by.take_down(at, &bells.event);
            }
        }
        if std::mem::take(&mut self.placed) {
            decoder.placed.write().unwrap().remove(&self.first);
            decoder.bus.remove(self.first);
        }
    }
}
