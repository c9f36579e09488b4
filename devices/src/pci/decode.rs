//! Which BAR is on a bus where, with its windows in the guest's memory: a BAR has both, or neither.
//!
//! A guest may give two BARs one address, for a moment or for good. The first keeps it; the second waits, and is put
//! there as soon as its range is free.

use std::collections::BTreeMap;
use std::sync::Arc;

use vtd::SourceId;

use crate::host::{HostWindow, MemorySlots, SlotId};
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
}

impl BarTarget {
    /// Only a device.
    pub fn of_device(device: Arc<dyn BusDevice>) -> Self {
        Self { device, windows: Arc::new([]), slots: None }
    }
}

/// Puts BARs on a bus, that of MMIO or that of ports, and takes them off.
pub struct Decoder {
    bus: Arc<Bus>,
    // Held while windows are mapped and unmapped, which calls nothing that comes back here.
    claims: Mutex<BTreeMap<(SourceId, u8), Claim>>,
    placed: RwLock<Placed>,
}

/// BARs that are on the bus: first address -> last address, function, what answers.
type Placed = BTreeMap<u64, (u64, SourceId, Arc<dyn BusDevice>)>;

struct Claim {
    first: u64,
    last: u64,
    target: BarTarget,
    placed: bool,
    mapped: Vec<SlotId>,
}

impl Decoder {
    /// A decoder for `bus`.
    pub fn new(bus: Arc<Bus>) -> Self {
        Self { bus, claims: Mutex::default(), placed: RwLock::default() }
    }

    /// What answers for `len` bytes at `address`, if all of them are in one BAR that is on the bus: its function, the
    /// offset in the BAR, and the device. Waits for no change that is under way.
    pub fn find(&self, address: u64, len: usize) -> Option<(SourceId, u64, Arc<dyn BusDevice>)> {
        let placed = self.placed.read().unwrap();
        let (first, (last, sid, device)) = placed.range(..=address).next_back()?;
        let end = address.checked_add((len as u64).checked_sub(1)?)?;
        (end <= *last).then(|| (*sid, address - first, device.clone()))
    }

    /// From now on BAR `bar` of `sid` is decoded at `range` (first and last address), or nowhere. `true` when it is
    /// where it should be; `false` when something else has the range: then nothing answers for it until that goes away.
    ///
    /// Its windows leave the guest before it leaves the bus, and come after it (F-3).
    pub fn set(&self, sid: SourceId, bar: u8, range: Option<(u64, u64)>, target: &BarTarget) -> bool {
        let mut claims = self.claims.lock().unwrap();
        let key = (sid, bar);
        if let Some(old) = claims.get_mut(&key) {
            if range == Some((old.first, old.last)) {
                return old.placed;
            }
            old.withdraw(self);
            claims.remove(&key);
        }
        if let Some((first, last)) = range {
            claims.insert(key, Claim { first, last, target: target.clone(), placed: false, mapped: Vec::new() });
        }
        // The one that asks comes first: it may take what it only waits for because it moved over itself.
        if let Some(claim) = claims.get_mut(&key) {
            claim.place(self, key);
        }
        for (key, claim) in claims.iter_mut().filter(|(_, claim)| !claim.placed) {
            claim.place(self, *key);
        }
        let placed = claims.get(&key).is_none_or(|claim| claim.placed);
        if !placed {
            log::debug!("BAR {bar} of {sid} has an address that is taken: nothing answers there for it");
        }
        placed
    }
}

impl Claim {
    fn place(&mut self, decoder: &Decoder, (sid, bar): (SourceId, u8)) {
        // Where something else answers, mapping over it would hide that.
        let device = &self.target.device;
        self.placed = decoder.bus.insert(self.first, self.last, device.clone()).is_ok();
        if self.placed {
            decoder.placed.write().unwrap().insert(self.first, (self.last, sid, device.clone()));
        }
        let Some(slots) = self.target.slots.as_ref().filter(|_| self.placed) else { return };
        for (offset, window) in &*self.target.windows {
            match slots.map(self.first + offset, window) {
                Ok(slot) => self.mapped.push(slot),
                Err(e) => log::debug!("a window of BAR {bar} of {sid} stays trapped: {e}"),
            }
        }
    }

    fn withdraw(&mut self, decoder: &Decoder) {
        for slot in self.mapped.drain(..) {
            if let Some(slots) = &self.target.slots {
                slots.unmap(slot);
            }
        }
        if std::mem::take(&mut self.placed) {
            decoder.placed.write().unwrap().remove(&self.first);
            decoder.bus.remove(self.first);
        }
    }
}
