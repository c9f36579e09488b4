//! Which BAR is on the MMIO bus where.
//!
//! A guest may give two BARs one address, for a moment or for good. The first keeps it; the second waits, and comes onto the
//! bus as soon as its range is free.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use vtd::SourceId;

use crate::{Bus, BusDevice};

/// Puts BARs on the MMIO bus and takes them off.
pub struct Decoder {
    bus: Arc<Bus>,
    claims: Mutex<BTreeMap<(SourceId, u8), Claim>>,
}

struct Claim {
    first: u64,
    last: u64,
    device: Arc<dyn BusDevice>,
    placed: bool,
}

impl Decoder {
    /// A decoder for `bus`.
    pub fn new(bus: Arc<Bus>) -> Self {
        Self { bus, claims: Mutex::default() }
    }

    /// From now on BAR `bar` of `sid` is decoded at `range` (first and last address), or nowhere. `true` when it is where it
    /// should be; `false` when something else has the range: then nothing answers for it until that goes away.
    pub fn set(&self, sid: SourceId, bar: u8, range: Option<(u64, u64)>, device: &Arc<dyn BusDevice>) -> bool {
        let mut claims = self.claims.lock().unwrap();
        let key = (sid, bar);
        if let Some(old) = claims.get(&key) {
            if range == Some((old.first, old.last)) {
                return old.placed;
            }
            if old.placed {
                self.bus.remove(old.first);
            }
            claims.remove(&key);
        }
        if let Some((first, last)) = range {
            claims.insert(key, Claim { first, last, device: device.clone(), placed: false });
        }
        // The one that asks comes first: it may take what it only waits for because it moved over itself.
        if let Some(claim) = claims.get_mut(&key) {
            claim.place(&self.bus);
        }
        for claim in claims.values_mut().filter(|claim| !claim.placed) {
            claim.place(&self.bus);
        }
        let placed = claims.get(&key).is_none_or(|claim| claim.placed);
        if !placed {
            log::debug!("BAR {bar} of {sid} has an address that is taken: nothing answers there for it");
        }
        placed
    }
}

impl Claim {
    fn place(&mut self, bus: &Bus) {
        self.placed = bus.insert(self.first, self.last, self.device.clone()).is_ok();
    }
}
