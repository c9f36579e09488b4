//! Whatever a guest does again and again, it does not fill the log (rule 5).

use std::cell::Cell;

use vtd::spec::second_stage::SecondStageEntry;
use vtd::{Bounds, UnitConfig, UnitId};

use crate::rig::{NIC, NVME, Rig, context_global, iotlb_domain, iotlb_global, iotlb_pages};

thread_local! {
    static LINES: Cell<u64> = const { Cell::new(0) };
}

/// Counts the lines of each thread, at the levels that are on without asking for more.
struct Count;

impl log::Log for Count {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Info
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            LINES.set(LINES.get() + 1);
        }
    }

    fn flush(&self) {}
}

const TIMES: u64 = 2000;

/// How many lines `act` logs when it is done many times.
fn lines(mut act: impl FnMut(u64)) -> u64 {
    // Only the first of the tests that do this succeeds.
    let _ = log::set_logger(&Count);
    log::set_max_level(log::LevelFilter::Trace);
    LINES.set(0);
    (0..TIMES).for_each(&mut act);
    LINES.get()
}

fn rig(bounds: Bounds) -> (Rig, u64) {
    let mut rig = Rig::with(UnitConfig { bounds, ..UnitConfig::new(UnitId(0), 48) });
    rig.enable_queue();
    rig.enable_translation();
    let root = rig.table();
    rig.set_paged(NVME, root, 48, 1);
    rig.unit.add_requester(NVME).unwrap();
    (rig, root)
}

#[test]
fn rule5_exhausted_bounds_are_logged_once() {
    let (mut rig, root) = rig(Bounds { table_entries: 1 << 11, spaces: 1, ..Bounds::default() });
    rig.set_paged(NIC, root, 48, 2);
    let itself = SecondStageEntry::new().with_read(true).with_write(true).with_page(root >> 12);
    let logged = lines(|time| {
        // The space is blocked, and opened again.
        let entry = if time % 2 == 0 { itself } else { SecondStageEntry::new() };
        (0..512).for_each(|index| rig.store(root + index * 8, entry.into_bits()));
        assert!(rig.submit(&[iotlb_global()]));
        // There is no room for a second one.
        let _ = rig.unit.add_requester(NIC);
        rig.unit.remove_requester(NIC);
    });
    assert!(rig.unit.stats().bounds_exhausted > TIMES, "the bounds were not reached");
    assert_eq!(logged, 1);
}

#[test]
fn rule5_refusals_of_the_host_are_logged_once() {
    let (mut rig, root) = rig(Bounds::default());
    rig.pages(root, 0x4000, 0x8000, 1);
    rig.listener.0.lock().unwrap().refuse.insert(0x4000);
    let logged = lines(|time| {
        assert!(rig.submit(&[iotlb_pages(1, 0x4000, 0)]));
        if time % 2 == 0 {
            rig.listener.0.lock().unwrap().unattachable.insert(NVME);
        } else {
            rig.listener.0.lock().unwrap().unattachable.clear();
        }
        rig.set_paged(NVME, root, 48, 2 + (time % 100) as u16);
        assert!(rig.submit(&[context_global(), iotlb_domain(2 + (time % 100) as u16)]));
        rig.listener.take_events();
    });
    assert!(rig.unit.stats().maps_refused > TIMES / 4, "{} maps were refused", rig.unit.stats().maps_refused);
    assert!(logged <= 1, "{logged} lines");
}

#[test]
fn rule5_what_a_guest_gets_wrong_is_not_logged() {
    let (mut rig, _) = rig(Bounds::default());
    let endpoint = rig.unit.endpoint(NIC);
    let logged = lines(|_| {
        // A descriptor of no type, a wait without memory behind it, and DMA that faults.
        rig.push(&[(u64::MAX, u64::MAX)]);
        rig.ring();
        rig.enable_queue();
        rig.write32(vtd::spec::registers::offset::FSTS, u32::MAX);
        let _ = endpoint.enter().translate(vtd::Iova(0x1000), vtd::Access::Write);
    });
    assert_eq!(logged, 0);
    assert!(rig.unit.stats().queue_errors >= TIMES - 1, "{} errors", rig.unit.stats().queue_errors);
}
