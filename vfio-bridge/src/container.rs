//! One container of the host: the ledger of what it holds, and the host operations that change it.

use std::sync::Arc;
use std::time::Instant;

use log::{error, trace, warn};
use vtd::{Mapping, RefusalCause};

use crate::guest_map::GuestMap;
use crate::host::{ContainerId, GroupId, HostIommu, PAGE_SIZE};
use crate::ledger::{Extent, Ledger, Run, Switch, subtract};
use crate::limits::{IovaRange, Limits, without_interrupt_window};
use crate::stats::{Counters, cause_index};

/// A range that is not mapped although it was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Lost {
    pub range: IovaRange,
    pub cause: RefusalCause,
}

/// The container that a group is in.
pub(crate) struct Container {
    id: ContainerId,
    group: GroupId,
    host: Arc<dyn HostIommu>,
    limits: Limits,
    ledger: Ledger,
    counters: Arc<Counters>,
    /// Causes that were logged.
    warned: [bool; 5],
    /// Why the container is no longer trusted to hold what the ledger says: an unmap was refused.
    broken: Option<String>,
}

impl Container {
    pub fn new(id: ContainerId, group: GroupId, host: Arc<dyn HostIommu>) -> Self {
        let limits = host.limits(id);
        Self {
            id,
            group,
            host,
            limits,
            ledger: Ledger::default(),
            counters: Arc::default(),
            warned: [false; 5],
            broken: None,
        }
    }

    pub fn id(&self) -> ContainerId {
        self.id
    }

    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Why the functions of this container are, or must be, stopped.
    pub fn broken(&self) -> Option<&str> {
        self.broken.as_deref()
    }

    /// What `mapping` is for this host: the extents that can be mapped, in ascending order. What cannot goes to `lost`; the
    /// interrupt window is left out without a word, since no request is ever translated there.
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
                // A mapping that ends at 2^64 cannot be unmapped on older kernels (`UnmapRange::Span`).
                if !mappable || range.last == u64::MAX {
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
        for extent in extents {
            // Not from the start each time: a guest can make both as long as its shadow.
            let from = except.partition_point(|range| range.last < extent.first);
            for wish in subtract(extent.first, extent.last, except[from..].iter().copied()) {
                self.map_missing(guest, &extent.part(wish.first, wish.last), lost);
            }
        }
    }

    /// Maps what is not there yet of `extent`. What is there and leads elsewhere is a broken promise of the caller, and is refused.
    fn map_missing(&mut self, guest: &GuestMap, extent: &Extent, lost: &mut Vec<Lost>) {
        let plan = self.ledger.missing(extent);
        for range in plan.conflicts {
            self.refuse(range, RefusalCause::Other, lost);
        }
        for part in plan.maps {
            self.map_one(guest, &part, lost);
        }
    }

    /// Takes away everything in `ranges` (ascending, disjoint).
    pub fn unmap(&mut self, guest: &GuestMap, ranges: &[IovaRange], lost: &mut Vec<Lost>) {
        let runs = self.ledger.plan_unmap(ranges, self.limits.unmap_all);
        self.unmap_runs(guest, &runs, lost);
    }

    /// Makes the container hold exactly `target` (ascending, disjoint). With `whole` it ends at the first map that is refused.
    pub fn switch(&mut self, guest: &GuestMap, target: &[Extent], whole: bool, lost: &mut Vec<Lost>) {
        let Switch { unmaps, maps } = self.ledger.plan_switch(target, self.limits.unmap_all);
        self.unmap_runs(guest, &unmaps, lost);
        if self.broken.is_some() {
            return;
        }
        for extent in &maps {
            if whole && !lost.is_empty() {
                return;
            }
            self.map_one(guest, extent, lost);
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
        let start = Instant::now();
        let result = self.host.unmap(self.id, run.range);
        let time = start.elapsed();
        trace!("group {}: unmap {:x?}: {result:?}", self.group, run.range);
        let why = match result {
            Ok(bytes) if bytes == expected => {
                self.counters.host_unmap(time, Some(bytes));
                self.ledger.remove(&run.extents);
                self.counters.live(self.ledger.len() as u64, self.ledger.bytes());
                return true;
            }
            Ok(bytes) => format!("the host unmapped {bytes:#x} bytes of {expected:#x} in {:x?}", run.range),
            Err(e) => format!("the host refused to unmap {:x?}: {e}", run.range),
        };
        self.counters.host_unmap(time, None);
        self.counters.unmap_refused();
        if self.broken.is_none() {
            error!("group {}: {why}", self.group);
            self.broken = Some(why);
        }
        false
    }

    fn map_one(&mut self, guest: &GuestMap, extent: &Extent, lost: &mut Vec<Lost>) {
        let range = IovaRange { first: extent.first, last: extent.last };
        let Some(mem) = guest.host_mem(extent.gpa, extent.size()) else {
            self.refuse(range, RefusalCause::Target, lost);
            return;
        };
        let start = Instant::now();
        let result = self.host.map(self.id, extent.first, mem, extent.perm);
        let time = start.elapsed();
        trace!("group {}: map {range} to {:#x} {:?}: {result:?}", self.group, extent.gpa, extent.perm);
        match result {
            Ok(()) => {
                self.counters.host_map(time, Some(extent.size()));
                self.ledger.insert(*extent);
                self.counters.live(self.ledger.len() as u64, self.ledger.bytes());
            }
            Err(refused) => {
                self.counters.host_map(time, None);
                self.refuse(range, refused.cause, lost);
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
        let group = self.group;
        let held = self.ledger.len();
        match cause {
            RefusalCause::Limit => warn!(
                "group {group}: the host holds {held} mappings and takes no more: the device cannot reach {range}. Raise the \
                 limit with `modprobe -r vfio_iommu_type1; modprobe vfio_iommu_type1 dma_entry_limit=N`, or let the guest \
                 use larger pages"
            ),
            RefusalCause::Memlock => warn!(
                "group {group}: the host lets this process lock no more memory: the device cannot reach {range}. Raise the \
                 limit with `ulimit -l`, or give the program CAP_IPC_LOCK"
            ),
            RefusalCause::Range => warn!(
                "group {group}: the host cannot map {range}, which is outside its IOVA ranges: the device cannot reach it. \
                 See /sys/kernel/iommu_groups/{group}/reserved_regions; a smaller aw-bits may keep the guest out of it"
            ),
            RefusalCause::Target => warn!(
                "group {group}: the guest maps {range} to a guest-physical address that is not RAM: the device cannot reach it"
            ),
            RefusalCause::Other => warn!(
                "group {group}: the host refused to map {range}: the device cannot reach it. See the host's kernel log"
            ),
        }
    }
}
