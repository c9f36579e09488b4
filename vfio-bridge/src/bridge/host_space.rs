//! One space of the host: the ledger of what it holds, and the host operations that change it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{error, trace, warn};
use vtd::{IovaRange, Mapping, RefusalCause};

use crate::bridge::dirty::{Found, Tracking};
use crate::bridge::guest_map::{GuestMap, MemKind, PAGE_SIZE};
use crate::bridge::ledger::{Extent, Ledger, Run, Switch, last_of};
use crate::bridge::limits::{Limits, without_interrupt_window};
use crate::host::dirty::DirtyKnowledge;
use crate::host::{HostIommu, HostSpaceId, Map, MapRefused};
use crate::stats::{Counters, cause_index};

/// A range that is not mapped although it was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Lost {
    pub range: IovaRange,
    pub cause: RefusalCause,
}

/// In the middle of a switch: who needs the host's room, and what found none so far.
#[derive(Default)]
struct Room {
    /// Unmaps that are still to come.
    unmaps: usize,
    /// A map found none since the last unmap. Who comes later does not overtake it: else the small would be there in
    /// the end and the large not.
    full: bool,
    /// Remainders that are not mapped yet. Each has an entry kept for it: what is in both spaces is not lost to what is
    /// new.
    remainders: u64,
    /// Remainders that wait for the last unmap.
    waiting_remainders: Vec<Extent>,
    /// New mappings that do.
    waiting: Vec<Extent>,
}

/// A host space with its ledger.
pub(crate) struct HostSpace {
    id: HostSpaceId,
    host: Arc<dyn HostIommu>,
    /// Whose it is, for messages.
    owner: String,
    limits: Limits,
    /// Bits of an address of the guest's space that it holds: nothing beyond is ever mapped.
    width: u8,
    ledger: Ledger,
    counters: Arc<Counters>,
    /// What the counters have of it: extents and bytes.
    counted: (u64, u64),
    /// Causes that were logged.
    warned: [bool; 5],
    /// Why it is no longer trusted to hold what the ledger says: an unmap was refused.
    broken: Option<String>,
    /// What is written by it is tracked.
    tracking: Option<Tracking>,
}

impl HostSpace {
    /// An empty one. What is done in it is counted by `counters`.
    pub fn new(id: HostSpaceId, host: Arc<dyn HostIommu>, owner: String, counters: Arc<Counters>) -> Self {
        let limits = host.limits(id);
        let (ledger, warned) = (Ledger::default(), [false; 5]);
        Self {
            id,
            host,
            owner,
            limits,
            width: 64,
            ledger,
            counters,
            counted: (0, 0),
            warned,
            broken: None,
            tracking: None,
        }
    }

    pub fn id(&self) -> HostSpaceId {
        self.id
    }

    /// It is to hold a space of the guest whose addresses have `width` bits.
    pub fn set_width(&mut self, width: u8) {
        self.width = width;
    }

    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Why the functions in it are, or must be, stopped.
    pub fn broken(&self) -> Option<&str> {
        self.broken.as_deref()
    }

    /// The host could not do what `why` says: who is in it must be stopped.
    pub fn break_for(&mut self, why: String) {
        if self.broken.is_none() {
            error!("{}: {why}", self.owner);
            self.broken = Some(why);
        }
    }

    /// The host gave it up, with all that it held.
    pub fn gone(&mut self) {
        self.tracking = None;
        self.ledger = Ledger::default();
        self.count_held();
    }

    /// Whether the host tracks what is written, and if so whether unmaps are to close their window (E-3).
    pub fn track(&mut self, close: Option<bool>) {
        match (close, &mut self.tracking) {
            (Some(close), Some(tracking)) => {
                tracking.set_close(&*self.host, self.id, close, &self.ledger, &self.owner);
            }
            (Some(close), None) => {
                let tracking = Tracking::start(&*self.host, self.id, close, &self.ledger, &self.owner);
                self.tracking = Some(tracking);
            }
            (None, Some(_)) => {
                self.tracking = None;
                self.host.dirty_stop(self.id);
            }
            (None, None) => {}
        }
    }

    /// How it is known what is written, if it is tracked.
    pub fn dirty_knowledge(&self) -> Option<DirtyKnowledge> {
        self.tracking.as_ref().map(Tracking::knowledge)
    }

    /// What was written since the last time, if it is tracked.
    pub fn read_dirty(&mut self) -> Option<Found> {
        let broken = self.broken.is_some();
        self.tracking.as_mut().map(|tracking| tracking.read(&*self.host, self.id, &self.ledger, broken))
    }

    fn count_held(&mut self) {
        let held = (self.ledger.len() as u64, self.ledger.bytes());
        self.counters.held(std::mem::replace(&mut self.counted, held), held);
    }

    /// What `mapping` is for this host: the extents that can be mapped, in ascending order. What cannot goes to `lost`;
    /// the interrupt window is left out without a word, since no request is ever translated there.
    pub fn resolve(&mut self, guest: &GuestMap, mapping: &Mapping, lost: &mut Vec<Lost>) -> Vec<Extent> {
        let Mapping { iova, gpa, len, perm } = *mapping;
        let whole = [iova.0, gpa.0, len].iter().all(|n| n.is_multiple_of(PAGE_SIZE));
        let Some(last) = len.checked_sub(1).and_then(|n| iova.0.checked_add(n)).filter(|_| whole) else {
            self.refuse(IovaRange { first: iova.0, last: iova.0 }, RefusalCause::Other, lost);
            return Vec::new();
        };
        if gpa.0.checked_add(len - 1).is_none() {
            self.refuse(IovaRange { first: iova.0, last }, RefusalCause::Target, lost);
            return Vec::new();
        }
        let mut extents = Vec::with_capacity(1);
        for (range, mappable) in self.limits.cut(iova.0, last) {
            for range in without_interrupt_window(range) {
                // A mapping that ends at 2^64 cannot be unmapped on older kernels (`UnmapRange::Span`). One that
                // reaches over the end of its space would not go with all of it (`Ledger::clip`).
                if !mappable || range.last == u64::MAX || range.last > last_of(self.width) {
                    self.refuse(range, RefusalCause::Range, lost);
                    continue;
                }
                for piece in guest.pieces(gpa.0 + (range.first - iova.0), range.last - range.first + 1) {
                    let first = iova.0 + (piece.gpa - gpa.0);
                    let range = IovaRange { first, last: first + (piece.len - 1) };
                    match guest.host_mem(piece.gpa, piece.len).filter(|_| piece.present) {
                        Some(mem) => {
                            let hva = mem.hva();
                            extents.push(Extent { first, last: range.last, gpa: piece.gpa, hva, perm });
                        }
                        None => self.refuse(range, RefusalCause::Target, lost),
                    }
                }
            }
        }
        extents
    }

    /// Makes `extents` real, where they are not yet. Ranges in `except` (ascending, disjoint) are left out.
    pub fn map(&mut self, guest: &GuestMap, extents: &[Extent], except: &[IovaRange], lost: &mut Vec<Lost>) {
        let mut batch: Vec<Extent> = Vec::with_capacity(extents.len());
        for extent in extents {
            // What is missing is told by the ledger, which does not know of the batch yet.
            if batch.last().is_some_and(|last| extent.first <= last.last) {
                self.map_batch(guest, &batch, lost);
                batch.clear();
            }
            // Not from the start each time: a guest can make both as long as its shadow.
            let from = except.partition_point(|range| range.last < extent.first);
            for wish in extent.range().without(except[from..].iter().copied()) {
                // What is there and leads elsewhere is a broken promise of the caller, and is refused.
                let plan = self.ledger.missing(&extent.part(wish.first, wish.last));
                for range in plan.conflicts {
                    self.refuse(range, RefusalCause::Other, lost);
                }
                batch.extend(plan.maps);
            }
        }
        self.map_batch(guest, &batch, lost);
    }

    /// Maps all of `batch`, which overlaps nothing.
    fn map_batch(&mut self, guest: &GuestMap, batch: &[Extent], lost: &mut Vec<Lost>) {
        let mut maps = Vec::with_capacity(batch.len());
        let mut extents = Vec::with_capacity(batch.len());
        for extent in batch {
            match guest.host_mem(extent.gpa, extent.size()) {
                Some(mem) => {
                    maps.push(Map { iova: extent.first, mem, perm: extent.perm });
                    extents.push(extent);
                }
                None => self.refuse(extent.range(), RefusalCause::Target, lost),
            }
        }
        let host = Arc::clone(&self.host);
        let mut start = Instant::now();
        let mut done = extents.into_iter().zip(&maps);
        host.map_all(self.id, &maps, &mut |result| {
            let Some((extent, map)) = done.next() else { return };
            let result = result.map_err(|refused| of_target(refused, map.mem.kind()));
            let end = Instant::now();
            let mapped = self.mapped(extent, end - std::mem::replace(&mut start, end), result);
            if let Err(cause) = mapped {
                self.refuse(extent.range(), cause, lost);
            }
        });
    }

    /// Takes away everything in `ranges` (ascending, disjoint) that there is in its space.
    pub fn unmap(&mut self, guest: &GuestMap, ranges: &[IovaRange], lost: &mut Vec<Lost>) {
        let ranges: Vec<IovaRange> = ranges.iter().filter_map(|range| self.ledger.clip(*range, self.width)).collect();
        let runs = self.ledger.plan_unmap(&ranges, self.limits.unmap_all);
        self.unmap_runs(guest, &runs, lost);
    }

    /// Makes it hold exactly `target` (ascending, disjoint). With `whole` it ends at the first map that is
    /// refused.
    ///
    /// A device may be at work meanwhile, and hardware would serve each of its requests by the old or by the new
    /// translation. So what is new where nothing was comes first, and what is replaced is away for as long as its own
    /// run takes. In between it holds some of both, never anything else; the guest is told that it is done
    /// when there is only the new.
    pub fn switch(&mut self, guest: &GuestMap, target: &[Extent], whole: bool, lost: &mut Vec<Lost>) {
        let Switch { maps, runs } = self.ledger.plan_switch(target, self.limits.entries, self.limits.unmap_all);
        let remainders = runs.iter().map(|run| run.remainders.len() as u64).sum();
        let mut room = Room { unmaps: runs.len(), remainders, ..Room::default() };
        for extent in &maps {
            if whole && !lost.is_empty() {
                return;
            }
            self.map_new(guest, extent, &mut room, lost);
        }
        for run in &runs {
            let start = Instant::now();
            room.unmaps -= 1;
            // Once an unmap was refused nothing is mapped any more: its functions are stopped. What else must go still
            // goes.
            if !self.unmap_run(run) || self.broken.is_some() {
                continue;
            }
            room.full = false;
            for extent in &run.remainders {
                self.map_remainder(guest, extent, &mut room, lost);
            }
            if run.cuts > 0 {
                self.counters.split(run.cuts, start.elapsed());
            }
            for extent in &run.maps {
                if whole && !lost.is_empty() {
                    return;
                }
                self.map_new(guest, extent, &mut room, lost);
            }
        }
        if self.broken.is_some() {
            return;
        }
        for extent in room.waiting_remainders.iter().chain(&room.waiting) {
            if whole && !lost.is_empty() {
                return;
            }
            self.map_one(guest, extent, lost);
        }
    }

    /// Maps what stays of an extent that was cut. It waits if the host has no room and unmaps are still to come.
    fn map_remainder(&mut self, guest: &GuestMap, extent: &Extent, room: &mut Room, lost: &mut Vec<Lost>) {
        match self.try_map(guest, extent) {
            Err(cause) if room.unmaps > 0 && cause.may_pass() => {
                room.waiting_remainders.push(*extent);
                return;
            }
            Err(cause) => self.refuse(extent.range(), cause, lost),
            Ok(()) => {}
        }
        room.remainders -= 1;
    }

    /// Maps what only the new space has. It waits if the host has no room and unmaps are still to come, or no more
    /// entries than the remainders need.
    fn map_new(&mut self, guest: &GuestMap, extent: &Extent, room: &mut Room, lost: &mut Vec<Lost>) {
        let may_wait = room.unmaps > 0 || room.remainders > 0;
        if may_wait && (room.full || self.ledger.len() as u64 + room.remainders >= self.limits.entries) {
            room.waiting.push(*extent);
            return;
        }
        match self.try_map(guest, extent) {
            Err(cause) if room.unmaps > 0 && cause.may_pass() => {
                room.full = true;
                room.waiting.push(*extent);
            }
            Err(cause) => self.refuse(extent.range(), cause, lost),
            Ok(()) => {}
        }
    }

    fn unmap_runs(&mut self, guest: &GuestMap, runs: &[Run], lost: &mut Vec<Lost>) {
        for run in runs {
            let start = Instant::now();
            if !self.unmap_run(run) {
                continue;
            }
            for extent in &run.remainders {
                self.map_one(guest, extent, lost);
            }
            if run.cuts > 0 {
                self.counters.split(run.cuts, start.elapsed());
            }
        }
    }

    /// One host unmap. On failure the ledger keeps the extents: what the kernel did is not known (design rule 4).
    fn unmap_run(&mut self, run: &Run) -> bool {
        let expected: u64 = run.extents.iter().map(Extent::size).sum();
        let result = match &mut self.tracking {
            Some(tracking) => tracking.unmap(&*self.host, self.id, run, &self.counters),
            None => self.counters.time_unmap(expected, || self.host.unmap(self.id, run.range)),
        };
        trace!(target: "vfio_bridge::host", "{}: unmap {:x?}: {result:?}", self.owner, run.range);
        let why = match result {
            Ok(bytes) if bytes == expected => {
                self.ledger.remove(&run.extents);
                self.count_held();
                return true;
            }
            Ok(bytes) => format!("the host unmapped {bytes:#x} bytes of {expected:#x} in {:x?}", run.range),
            Err(e) => format!("the host refused to unmap {:x?}: {e}", run.range),
        };
        self.counters.unmap_refused();
        self.break_for(why);
        false
    }

    fn map_one(&mut self, guest: &GuestMap, extent: &Extent, lost: &mut Vec<Lost>) {
        if let Err(cause) = self.try_map(guest, extent) {
            self.refuse(extent.range(), cause, lost);
        }
    }

    /// One host map. A refusal is not counted yet, the operation is.
    fn try_map(&mut self, guest: &GuestMap, extent: &Extent) -> Result<(), RefusalCause> {
        let mem = guest.host_mem(extent.gpa, extent.size());
        // What stays of an extent that was cut may be memory that is not there any more.
        let mem = mem.filter(|mem| mem.hva() == extent.hva).ok_or(RefusalCause::Target)?;
        let start = Instant::now();
        let result = self.host.map(self.id, extent.first, mem, extent.perm);
        let result = result.map_err(|refused| of_target(refused, mem.kind()));
        self.mapped(extent, start.elapsed(), result)
    }

    /// Books the result of one host map.
    fn mapped(&mut self, extent: &Extent, time: Duration, result: Result<(), MapRefused>) -> Result<(), RefusalCause> {
        let range = extent.range();
        trace!(target: "vfio_bridge::host", "{}: map {range} to {:#x} {:?}: {result:?}", self.owner, extent.gpa, extent.perm);
        match result {
            Ok(()) => {
                self.counters.host_map(time, Some(extent.size()));
                self.ledger.insert(*extent);
                self.count_held();
                Ok(())
            }
            Err(refused) => {
                self.counters.host_map(time, None);
                Err(refused.cause)
            }
        }
    }

    /// Counts a refusal and says it once a cause.
    fn refuse(&mut self, range: IovaRange, cause: RefusalCause, lost: &mut Vec<Lost>) {
        self.counters.refused(cause);
        lost.push(Lost { range, cause });
        let warned = &mut self.warned[cause_index(cause)];
        if std::mem::replace(warned, true) {
            return;
        }
        let (owner, held, remedy) = (&self.owner, self.ledger.len(), self.host.remedy(self.id, cause));
        match cause {
            RefusalCause::Limit => warn!(
                "{owner}: {held} mappings are held, and the host takes no more: the device cannot reach {range}. {remedy}"
            ),
            RefusalCause::Memlock => warn!(
                "{owner}: the host lets this process lock no more memory: the device cannot reach {range}. {remedy}"
            ),
            RefusalCause::Range => warn!(
                "{owner}: the host cannot map {range}, which is outside its IOVA ranges: the device cannot reach it. {remedy}"
            ),
            RefusalCause::Target => warn!(
                "{owner}: {range} leads to guest-physical addresses that are neither RAM nor in a BAR that the host \
                 can map: the device cannot reach it"
            ),
            RefusalCause::Other => {
                warn!("{owner}: the host refused to map {range}: the device cannot reach it. {remedy}");
            }
        }
    }
}

/// Why `refused`, of memory of `kind`: where the host's room, and the range, were fit for RAM, what it does not take is
/// the BAR (B-10). Hosts say that in several ways.
fn of_target(refused: MapRefused, kind: MemKind) -> MapRefused {
    let cause = match (kind, refused.cause) {
        (MemKind::Bar, RefusalCause::Range | RefusalCause::Other) => RefusalCause::Target,
        (_, cause) => cause,
    };
    MapRefused { cause, ..refused }
}
