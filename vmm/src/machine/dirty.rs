//! Which guest memory devices wrote (E-1): what the bridge knows of assigned functions, and the log of RAM, which has
//! what this process wrote for emulated devices and as the remapping unit. What vCPUs write is KVM's log, and not here.

use serde::Serialize;
use vfio_bridge::{DirtyKnowledge, DirtyPages, DirtyRace, PAGE_SIZE};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vtd::Requester;

use super::Machine;

/// Ranges in one reply: it stays far below what a client may leave unread.
const MOST_RANGES: usize = 4096;

/// What is tracked.
#[derive(Default)]
pub struct Dirty {
    /// The last read, for whoever asks for the rest of it: a bit a page of RAM.
    last: Read,
    /// Something is tracked.
    on: bool,
}

impl Dirty {
    /// Whether something is tracked.
    pub fn is_on(&self) -> bool {
        self.on
    }
}

#[derive(Clone, Default)]
struct Read {
    pages: DirtyPages,
    devices: Vec<Known>,
}

/// How it is known what a device writes.
#[derive(Serialize, Clone, PartialEq, Eq, Debug)]
pub struct Known {
    /// Its id.
    pub id: String,
    /// exact, whole-mappings or cannot-tell.
    pub known: &'static str,
}

/// What is tracked from now on.
#[derive(Serialize, PartialEq, Eq, Debug)]
pub struct Started {
    /// The devices whose writes are.
    pub devices: Vec<Known>,
}

/// What was written.
#[derive(Serialize, PartialEq, Eq, Debug)]
pub struct Pages {
    /// How many pages, in all.
    pub pages: u64,
    /// Bytes of each.
    pub page_size: u64,
    /// Guest-physical address and length in bytes, ascending.
    pub ranges: Vec<(u64, u64)>,
    /// Where the rest begins, if there is one.
    pub next: Option<u64>,
    /// How it is known.
    pub devices: Vec<Known>,
}

impl Machine {
    /// Tracks what `device` writes, or all devices do.
    pub fn start_dirty(&mut self, device: Option<&str>, race: DirtyRace) -> Result<Started, String> {
        let of = device.map(|id| self.assigned_as(id)).transpose()?;
        let known = self.bridge.dirty_start(of, race).map_err(|e| e.to_string())?;
        self.dirty.on = true;
        if device.is_none() {
            self.ram.iter().for_each(|region| region.bitmap().log().start());
        }
        Ok(Started { devices: self.known(&known, device) })
    }

    /// What `device` wrote since the last read, or all that are tracked did; with `from`, the rest of the last read.
    pub fn read_dirty(&mut self, device: Option<&str>, from: Option<u64>) -> Result<Pages, String> {
        if from.is_none() {
            let of = device.map(|id| self.assigned_as(id)).transpose()?;
            let read = self.bridge.dirty_read(of).map_err(|e| format!("{e} (`dirty start`)"))?;
            let mut pages = read.pages;
            if device.is_none() {
                self.take_own(&mut pages);
            }
            self.dirty.last = Read { pages, devices: self.known(&read.known, device) };
        }
        let (Read { pages, devices }, from) = (&self.dirty.last, from.unwrap_or(0));
        let ranges = pages.ranges_from(PAGE_SIZE, from, MOST_RANGES);
        let next = ranges.last().and_then(|range| range.last.checked_add(1));
        let next = next.filter(|next| !pages.ranges_from(PAGE_SIZE, *next, 1).is_empty());
        let ranges = ranges.iter().map(|range| (range.first, range.last - range.first + 1)).collect();
        Ok(Pages { pages: pages.count(), page_size: PAGE_SIZE, ranges, next, devices: devices.clone() })
    }

    /// What devices and this process wrote since the last time, while all are tracked.
    pub(super) fn written_by_devices(&self) -> Result<DirtyPages, String> {
        let mut pages = self.bridge.dirty_read(None).map_err(|e| e.to_string())?.pages;
        self.take_own(&mut pages);
        Ok(pages)
    }

    /// Tracks nothing more of `device`, or of all.
    pub fn stop_dirty(&mut self, device: Option<&str>) -> Result<(), String> {
        let of = device.map(|id| self.assigned_as(id)).transpose()?;
        if device.is_none() {
            self.ram.iter().for_each(|region| region.bitmap().log().stop());
        }
        self.dirty = Dirty::default();
        self.bridge.dirty_stop(of).map_err(|e| e.to_string())
    }

    /// What this process wrote.
    fn take_own(&self, pages: &mut DirtyPages) {
        for region in self.ram.iter() {
            let bitmap = region.bitmap();
            for (at, word) in (0u64..).zip(bitmap.log().take()) {
                for bit in (0..64).filter(|bit| word & (1 << bit) != 0) {
                    pages.mark(region.start_addr().raw_value() + (at * 64 + bit) * PAGE_SIZE, PAGE_SIZE);
                }
            }
        }
    }

    /// The requester of an assigned function.
    fn assigned_as(&self, id: &str) -> Result<Requester, String> {
        let placed = self.placed.iter().find(|placed| placed.id == id);
        let placed = placed.ok_or_else(|| format!("there is no device {id}: `devices` has their ids"))?;
        match self.bridge.backend(placed.requester) {
            Some(_) => Ok(placed.requester),
            None => {
                Err(format!("{id} is emulated, and what it writes is told with what all write: ask without a device"))
            }
        }
    }

    /// By id. With all of them, what this process writes is known, too.
    fn known(&self, known: &[(Requester, DirtyKnowledge)], device: Option<&str>) -> Vec<Known> {
        let of = |requester| known.iter().find(|(of, _)| *of == requester).map(|(_, known)| known.name());
        let emulated = |requester| {
            let exact = device.is_none() && self.bridge.backend(requester).is_none();
            exact.then_some(DirtyKnowledge::Exact.name())
        };
        let devices = self.placed.iter().filter_map(|placed| {
            let known = of(placed.requester).or_else(|| emulated(placed.requester))?;
            Some(Known { id: placed.id.clone(), known })
        });
        devices.collect()
    }
}
