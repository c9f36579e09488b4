//! Which BAR is on the MMIO bus where, with its windows in the guest's memory: a BAR has both, or neither.
//!
//! A guest may give two BARs one address, for a moment or for good. The first keeps it; the second waits, and is put
//! there as soon as its range is free.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, RwLock};

use vtd::SourceId;

use crate::host::{HostWindow, MemorySlots, SlotId};
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

/// Puts BARs on the MMIO bus and takes them off.
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

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::testing::FakeSlots;

    struct Answer(u8);
    impl BusDevice for Answer {
        fn read(&self, _: u64, data: &mut [u8]) {
            data.fill(self.0);
        }
        fn write(&self, _: u64, _: &[u8]) {}
    }

    /// A target that answers with `answer`, with a window of two pages in its third and fourth one.
    fn target(answer: u8, slots: &Arc<FakeSlots>) -> BarTarget {
        let fd = Arc::new(File::open("/dev/null").unwrap().into());
        let window = HostWindow { fd, offset: 0x7000, len: 0x2000, writable: true, dma_buf: None };
        let slots: Arc<dyn MemorySlots> = slots.clone();
        let device = Arc::new(Answer(answer));
        BarTarget { device, windows: Arc::new([(0x2000, window)]), slots: Some(slots) }
    }

    const A: SourceId = SourceId::new(0, 1, 0);
    const B: SourceId = SourceId::new(0, 2, 0);

    fn decoder() -> (Decoder, Arc<Bus>, Arc<FakeSlots>) {
        let (bus, slots) = (Arc::new(Bus::default()), Arc::new(FakeSlots::default()));
        (Decoder::new(bus.clone()), bus, slots)
    }

    fn who(bus: &Bus, address: u64) -> u8 {
        let mut data = [0];
        bus.read(address, &mut data);
        data[0]
    }

    #[test]
    fn f3_a_bar_and_its_windows_come_and_go_together() {
        let (decoder, bus, slots) = decoder();
        let one = target(1, &slots);
        assert!(decoder.set(A, 0, Some((0x10_0000, 0x10_ffff)), &one));
        assert_eq!((who(&bus, 0x10_ffff), slots.mapped()), (1, vec![(0x10_2000, 0x7000, 0x2000)]));
        // Told again what is so, it stays as it is: its windows are not taken from a guest that uses them.
        *slots.on_unmap.lock().unwrap() = Some(Box::new(|| panic!("a window was taken away")));
        assert!(decoder.set(A, 0, Some((0x10_0000, 0x10_ffff)), &one));
        *slots.on_unmap.lock().unwrap() = None;
        assert!(decoder.set(A, 0, Some((0x20_0000, 0x20_ffff)), &one));
        assert_eq!((who(&bus, 0x10_0000), who(&bus, 0x20_0000)), (0xff, 1));
        assert_eq!(slots.mapped(), [(0x20_2000, 0x7000, 0x2000)]);
        assert!(decoder.set(A, 0, None, &one));
        assert_eq!((who(&bus, 0x20_0000), slots.mapped()), (0xff, vec![]));
    }

    #[test]
    fn f6_a_bar_that_waits_takes_nothing_from_the_one_that_is_there() {
        let (decoder, bus, slots) = decoder();
        let (one, two) = (target(1, &slots), target(2, &slots));
        let at = 0x10_0000;
        assert!(decoder.set(B, 0, Some((at, at + 0xfff)), &two));
        assert!(!decoder.set(A, 0, Some((at, at + 0xfff)), &one), "the range is taken");
        assert!(!decoder.set(A, 0, Some((at, at + 0xfff)), &one), "and still is");
        // One that moves over itself keeps its place, whoever else waits for it.
        assert!(decoder.set(B, 0, Some((at, at + 0x1fff)), &two));
        assert_eq!((who(&bus, at), slots.mapped().len()), (2, 1));
        // Who gives up waiting leaves the other one alone.
        assert!(decoder.set(A, 0, None, &one));
        assert_eq!(who(&bus, at), 2);
        assert!(!decoder.set(A, 0, Some((at + 0x1000, at + 0x1fff)), &one));
        assert!(decoder.set(B, 0, Some((at + 0x8000, at + 0x8fff)), &two));
        assert_eq!((who(&bus, at + 0x1000), who(&bus, at), who(&bus, at + 0x8000)), (1, 0xff, 2));
        assert!(decoder.set(A, 0, Some((at + 0x1000, at + 0x1fff)), &one), "it has its place now");
    }
}
