//! BARs of assigned functions as targets of other devices' DMA (B-10): the guest-physical map of the bridge follows
//! what is mapped into the guest, and the unit looks at the leaves that lead there (B-15).
//!
//! Called while a function's configuration and the decoder are held, from a vCPU's configuration write or a reset;
//! waits for the unit's queue (rule 11: before a drain come configuration, decoder, this map; nothing that a drain
//! calls takes one of these).

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use vfio_bridge::{Bridge, GuestMap, Region, Trace};
use vtd::GpaRange;

use super::units::Units;
use crate::kvm::slots::{BarWindow, Peers};

/// The guest-physical map, with the BARs that are mapped now.
pub struct PeerMemory {
    bridge: Arc<Bridge>,
    units: Option<Arc<Units>>,
    trace: Option<Arc<Trace>>,
    /// Held from the change of the map until nothing is left of what it was: who compares books waits for it.
    map: Mutex<GuestMap>,
}

impl PeerMemory {
    /// Of RAM, which is all that `bridge` has.
    pub(super) fn new(
        ram: GuestMap,
        bridge: Arc<Bridge>,
        units: Option<Arc<Units>>,
        trace: Option<Arc<Trace>>,
    ) -> Self {
        Self { bridge, units, trace, map: Mutex::new(ram) }
    }

    /// Until what this gives is dropped, nothing comes or goes.
    pub fn hold(&self) -> MutexGuard<'_, GuestMap> {
        self.map.lock().unwrap()
    }

    /// From now on it is `new`, which differs in `len` bytes at `gpa`.
    fn replace(&self, map: &mut GuestMap, new: GuestMap, gpa: u64, len: u64) {
        *map = new;
        // Functions in the identity space first, of which the unit knows nothing.
        self.bridge.replace_guest_map(map.clone());
        let range = GpaRange::new(gpa, gpa + (len - 1));
        self.units.iter().flat_map(|units| units.all()).for_each(|unit| unit.memory_changed(range));
    }
}

impl Peers for PeerMemory {
    fn come(&self, window: &BarWindow) -> io::Result<()> {
        let BarWindow { of, gpa, len, .. } = *window;
        let (hva, owner) = window.host_memory();
        // SAFETY: that is what `host_memory` says of it; the region keeps `owner`.
        let region = unsafe { Region::bar(gpa, len, hva, of, owner) }.map_err(io::Error::other)?;
        let region = region.with_dma_buf(window.dma_buf.clone());
        let mut map = self.hold();
        let new = map.with(region).map_err(io::Error::other)?;
        if let Some(trace) = &self.trace {
            trace.bar_came(gpa, len, hva, of);
        }
        self.replace(&mut map, new, gpa, len);
        Ok(())
    }

    fn go(&self, gpa: u64, len: u64) {
        let mut map = self.hold();
        let new = map.without_bar(gpa);
        self.replace(&mut map, new, gpa, len);
        if let Some(trace) = &self.trace {
            trace.bar_went(gpa, len);
        }
    }
}

#[cfg(test)]
#[path = "peers_test.rs"]
mod peers_test;
