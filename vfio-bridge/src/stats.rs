//! Counters of what the bridge did to the host, as the statistics file shows them.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use serde::Serialize;
use vtd::RefusalCause;

/// Maps that did not become real, by cause.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct RefusedMaps {
    /// The host's limit of mappings.
    pub limit: u64,
    /// The limit of locked memory.
    pub memlock: u64,
    /// Outside the host's IOVA ranges.
    pub range: u64,
    /// The guest-physical address leads to nothing that can be mapped.
    pub target: u64,
    /// Anything else.
    pub other: u64,
}

/// Whole-run counts of one device. Devices of one host group share a container and so show the same counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct DeviceStats {
    /// Host map operations (`VFIO_IOMMU_MAP_DMA`) issued, refused ones included.
    pub host_maps: u64,
    /// Host unmap operations (`VFIO_IOMMU_UNMAP_DMA`) issued, refused ones included.
    pub host_unmaps: u64,
    /// Bytes mapped over the whole run.
    pub mapped_bytes_total: u64,
    /// Bytes unmapped over the whole run.
    pub unmapped_bytes_total: u64,
    /// Mappings that the host holds now.
    pub live_extents: u64,
    /// Bytes that the host holds now.
    pub live_bytes: u64,
    /// The most mappings that the host held at once.
    pub peak_extents: u64,
    /// Maps that did not become real.
    pub refused_maps: RefusedMaps,
    /// Time spent in host operations, in nanoseconds.
    pub host_time_ns: u64,
    /// Host mappings that were cut while a part of them stayed granted (B-8). Also those that were cut for a move into
    /// a space of others which was refused afterwards: the part was away for as long.
    pub splits: u64,
    /// Time that parts which stayed granted were not mapped, in nanoseconds.
    pub splits_open_ns: u64,
    /// Unmaps that the host refused (B-11).
    pub unmaps_refused: u64,
    /// 1 when the function was stopped because the host refused an unmap.
    pub quarantined: u64,
}

/// The counters behind [`DeviceStats`]. Readers never wait for a host operation.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    host_maps: AtomicU64,
    host_unmaps: AtomicU64,
    mapped_bytes: AtomicU64,
    unmapped_bytes: AtomicU64,
    live_extents: AtomicU64,
    live_bytes: AtomicU64,
    peak_extents: AtomicU64,
    refused: [AtomicU64; 5],
    host_time_ns: AtomicU64,
    splits: AtomicU64,
    splits_open_ns: AtomicU64,
    unmaps_refused: AtomicU64,
    quarantined: AtomicU64,
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// The place of `cause` in an array with one element a cause.
pub(crate) fn cause_index(cause: RefusalCause) -> usize {
    match cause {
        RefusalCause::Limit => 0,
        RefusalCause::Memlock => 1,
        RefusalCause::Range => 2,
        RefusalCause::Target => 3,
        RefusalCause::Other => 4,
    }
}

impl Counters {
    pub fn host_map(&self, time: Duration, mapped: Option<u64>) {
        self.host_maps.fetch_add(1, Relaxed);
        self.host_time_ns.fetch_add(nanos(time), Relaxed);
        self.mapped_bytes.fetch_add(mapped.unwrap_or(0), Relaxed);
    }
    pub fn host_unmap(&self, time: Duration, unmapped: Option<u64>) {
        self.host_unmaps.fetch_add(1, Relaxed);
        self.host_time_ns.fetch_add(nanos(time), Relaxed);
        self.unmapped_bytes.fetch_add(unmapped.unwrap_or(0), Relaxed);
    }
    /// Has the host unmap, and counts that; its bytes only if they are `expected`.
    pub fn time_unmap(&self, expected: u64, unmap: impl FnOnce() -> io::Result<u64>) -> io::Result<u64> {
        let start = Instant::now();
        let result = unmap();
        let whole = result.as_ref().ok().copied().filter(|bytes| *bytes == expected);
        self.host_unmap(start.elapsed(), whole);
        result
    }
    /// A host space that held `before` (extents, bytes) holds `now`.
    pub fn held(&self, before: (u64, u64), now: (u64, u64)) {
        // Wrapping, as the counters are.
        let (extents, bytes) = (now.0.wrapping_sub(before.0), now.1.wrapping_sub(before.1));
        let extents = self.live_extents.fetch_add(extents, Relaxed).wrapping_add(extents);
        self.live_bytes.fetch_add(bytes, Relaxed);
        self.peak_extents.fetch_max(extents, Relaxed);
    }
    pub fn refused(&self, cause: RefusalCause) {
        self.refused[cause_index(cause)].fetch_add(1, Relaxed);
    }
    pub fn split(&self, extents: u64, open: Duration) {
        self.splits.fetch_add(extents, Relaxed);
        self.splits_open_ns.fetch_add(nanos(open), Relaxed);
    }
    pub fn unmap_refused(&self) {
        self.unmaps_refused.fetch_add(1, Relaxed);
        self.quarantined.store(1, Relaxed);
    }

    pub fn snapshot(&self) -> DeviceStats {
        let get = |n: &AtomicU64| n.load(Relaxed);
        let [limit, memlock, range, target, other] = &self.refused;
        DeviceStats {
            host_maps: get(&self.host_maps),
            host_unmaps: get(&self.host_unmaps),
            mapped_bytes_total: get(&self.mapped_bytes),
            unmapped_bytes_total: get(&self.unmapped_bytes),
            live_extents: get(&self.live_extents),
            live_bytes: get(&self.live_bytes),
            peak_extents: get(&self.peak_extents),
            refused_maps: RefusedMaps {
                limit: get(limit),
                memlock: get(memlock),
                range: get(range),
                target: get(target),
                other: get(other),
            },
            host_time_ns: get(&self.host_time_ns),
            splits: get(&self.splits),
            splits_open_ns: get(&self.splits_open_ns),
            unmaps_refused: get(&self.unmaps_refused),
            quarantined: get(&self.quarantined),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_counter_is_shown_under_its_name() {
        let counters = Counters::default();
        let ns = Duration::from_nanos;
        counters.host_map(ns(1), Some(100));
        counters.host_map(ns(2), None);
        counters.host_map(ns(4), Some(20));
        counters.host_unmap(ns(8), Some(7));
        counters.host_unmap(ns(16), None);
        counters.held((0, 0), (7, 70));
        counters.held((0, 0), (2, 20));
        counters.held((7, 70), (2, 20));
        let causes = [
            RefusalCause::Limit,
            RefusalCause::Memlock,
            RefusalCause::Range,
            RefusalCause::Target,
            RefusalCause::Other,
        ];
        for (times, cause) in (1..).zip(causes) {
            (0..times).for_each(|_| counters.refused(cause));
        }
        counters.split(3, ns(32));
        counters.split(1, ns(64));
        (0..2).for_each(|_| counters.unmap_refused());
        let expected = serde_json::json!({
            "host_maps": 3, "host_unmaps": 2, "mapped_bytes_total": 120, "unmapped_bytes_total": 7, "live_extents": 4,
            "live_bytes": 40, "peak_extents": 9,
            "refused_maps": {"limit": 1, "memlock": 2, "range": 3, "target": 4, "other": 5},
            "host_time_ns": 31, "splits": 4, "splits_open_ns": 96, "unmaps_refused": 2, "quarantined": 1,
        });
        assert_eq!(serde_json::to_value(counters.snapshot()).expect("numbers"), expected);
    }
}
