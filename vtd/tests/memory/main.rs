//! What a hostile guest does again and again, or as much of as it can, costs the unit a bounded amount of memory (rule
//! 5). Every allocation of the test's thread is counted.

#[path = "../unit/rig.rs"]
mod rig;

use std::cell::RefCell;

use allocation_counter::measure;
use vtd::spec::invalidation::{InterruptEntryLow, kind};
use vtd::spec::registers::offset;
use vtd::spec::second_stage::SecondStageEntry;
use vtd::{Access, Bounds, Iova, Msi, UnitConfig, UnitId};

use rig::{NIC, NVME, QUEUE, Rig, context_domain, context_global, iotlb_domain, iotlb_global, iotlb_pages, requester};

/// Does `round` `rounds` times, and as often again, and nothing may be left of the second half: less than a byte for
/// each round. Returns the most that the second half had on top at any moment, in bytes.
fn flat(rounds: u64, round: impl FnMut(u64)) -> u64 {
    let round = RefCell::new(round);
    (0..rounds).for_each(|number| (round.borrow_mut())(number));
    let second = measure(|| (rounds..2 * rounds).for_each(|number| (round.borrow_mut())(number)));
    assert!(
        second.bytes_current < rounds as i64,
        "{} bytes are left of {rounds} rounds, in {} pieces",
        second.bytes_current,
        second.count_current
    );
    second.bytes_max
}

#[test]
#[should_panic(expected = "bytes are left of 100 rounds")]
fn what_is_kept_is_seen() {
    let mut kept = Vec::new();
    flat(100, |number| kept.push(Box::new(number)));
}

fn assigned(config: UnitConfig) -> (Rig, u64) {
    let mut rig = Rig::with(config);
    rig.enable_queue();
    rig.enable_translation();
    let root = rig.table();
    rig.set_paged(NVME, root, 48, 1);
    rig.unit.add_requester(NVME).unwrap();
    rig.listener.take_events();
    (rig, root)
}

fn bounded(bounds: Bounds) -> (Rig, u64) {
    assigned(UnitConfig { bounds, ..UnitConfig::new(UnitId(0), 48) })
}

/// An entry that leads to `table`: at level 1 a page, above it a table.
fn to(table: u64) -> u64 {
    SecondStageEntry::new().with_read(true).with_write(true).with_page(table >> 12).into_bits()
}

fn fill(rig: &Rig, table: u64, entry: u64) {
    (0..512).for_each(|index| rig.store(table + index * 8, entry));
}

#[test]
fn rule5_memory_is_flat_over_tables_that_point_at_themselves() {
    const EXTENTS: u64 = 1 << 12;
    let bounds = Bounds { table_entries: 1 << 16, shadow_entries: EXTENTS as usize, ..Bounds::default() };
    let (mut rig, root) = bounded(bounds);
    let most = flat(40, |round| {
        fill(&rig, root, if round % 2 == 0 { to(root) } else { 0 });
        assert!(rig.submit(&[iotlb_global()]));
        rig.listener.take_events();
    });
    assert!(rig.unit.stats().bounds_exhausted >= 40, "the bound was not reached");
    assert!(most < EXTENTS * 512, "{most} bytes");
}

#[test]
fn rule5_memory_is_bounded_by_the_extents_of_one_space_whatever_one_drain_asks_for() {
    // Tables that point at themselves, so that each range of 1 GiB has 2^18 leaves; ranges are only looked at together
    // at the end of the drain, and table entries are no bound here.
    const EXTENTS: u64 = 1 << 12;
    let (mut rig, root) = bounded(Bounds { shadow_entries: EXTENTS as usize, ..Bounds::default() });
    let ranges: Vec<_> = (0..200).map(|page| iotlb_pages(1, page << 21, 9)).collect();
    let most = flat(8, |round| {
        let entry = if round % 2 == 0 { to(root) } else { 0 };
        rig.store(root, entry);
        fill(&rig, root, entry);
        assert!(rig.submit(&ranges));
        assert!(rig.submit(&[iotlb_global()]));
        rig.listener.take_events();
    });
    assert!(rig.unit.stats().bounds_exhausted >= 8, "the bound was not reached");
    assert!(most < EXTENTS * 512, "{most} bytes");
}

#[test]
fn rule5_memory_is_flat_over_full_queues() {
    let (mut rig, root) = bounded(Bounds::default());
    rig.pages(root, 0x4000, 0x8000, 16);
    let kinds = [iotlb_global(), context_global(), iotlb_domain(1), context_domain(1), iotlb_pages(1, 0x4000, 4)];
    let most = flat(3, |_| {
        rig.full_queue(&kinds);
        rig.listener.take_events();
    });
    assert!(most < 1 << 20, "{most} bytes");
}

#[test]
fn rule5_memory_is_flat_over_spaces_without_end() {
    let (mut rig, _) = bounded(Bounds { spaces: 2, ..Bounds::default() });
    for function in 0..4 {
        rig.unit.add_requester(requester(2, 0, function)).unwrap();
    }
    let roots: Vec<u64> = (0..8).map(|_| rig.table()).collect();
    // Their context tables are there from now on.
    rig.set_paged(requester(2, 0, 0), roots[0], 48, 1);
    let most = flat(3000, |round| {
        // Each round another domain id for each function: five spaces are wanted, and two may be.
        rig.set_paged(NVME, roots[round as usize % 8], 48, (round * 5) as u16);
        for function in 0..4u64 {
            let domain = (round * 5 + function + 1) as u16;
            rig.set_paged(requester(2, 0, function as u8), roots[(round + function) as usize % 8], 39, domain);
        }
        assert!(rig.submit(&[context_global(), iotlb_global()]));
        assert!(rig.unit.spaces_snapshot().len() <= 2);
        rig.listener.take_events();
    });
    assert!(rig.unit.stats().bounds_exhausted > 3000, "the bound was not reached");
    assert!(most < 1 << 16, "{most} bytes");
}

#[test]
fn rule5_memory_is_flat_over_maps_that_the_host_refuses() {
    let (mut rig, root) = bounded(Bounds::default());
    rig.pages(root, 0, 0, 1);
    // Whatever is mapped at an odd page is refused.
    rig.listener.0.lock().unwrap().refuse.extend((0..512).map(|page| (page * 2 + 1) << 12));
    let most = flat(1000, |round| {
        let page = (round % 512 * 2 + 1) << 12;
        rig.pages(root, page, 0x80_0000, 1);
        assert!(rig.submit(&[iotlb_pages(1, page, 0)]));
        rig.clear(root, page, 1);
        if round % 100 == 0 {
            rig.set_paged(NVME, root, 48, 1 + (round / 100 % 2) as u16);
            assert!(rig.submit(&[context_global()]));
        }
        rig.set_paged(NVME, root, 48, 1);
        assert!(rig.submit(&[context_global(), iotlb_domain(1)]));
        rig.listener.take_events();
    });
    assert!(rig.unit.stats().maps_refused >= 1900, "{} were refused", rig.unit.stats().maps_refused);
    assert!(most < 1 << 17, "{most} bytes");
}

#[test]
fn rule5_memory_is_flat_over_faults_and_broken_descriptors() {
    let (mut rig, root) = bounded(Bounds::default());
    rig.pages(root, 0x4000, 0x8000, 1);
    let endpoint = rig.unit.endpoint(NIC);
    let most = flat(3000, |round| {
        let _ = endpoint.enter().translate(Iova(round << 12), Access::Write);
        rig.push(&[(round | 0xf, round)]);
        rig.ring();
        rig.write32(offset::FSTS, u32::MAX);
        rig.enable_queue();
        rig.messages.take();
    });
    assert!(rig.unit.stats().queue_errors >= 5000, "{} errors", rig.unit.stats().queue_errors);
    assert!(rig.unit.stats().faults_dropped > 1000, "{} faults were dropped", rig.unit.stats().faults_dropped);
    assert!(most < 1 << 16, "{most} bytes");
}

#[test]
fn rule5_memory_is_flat_over_audits_of_tables_that_are_never_invalidated() {
    let (mut rig, root) = bounded(Bounds::default());
    let mut host =
        |_: vtd::Requester, _: &vtd::SpaceKey, _: &mut dyn Iterator<Item = vtd::Mapping>, _: &mut vtd::Audit| {};
    let most = flat(20, |round| {
        // More pieces than are remembered, other ones each round; and a function that is not where its tables say.
        rig.clear(root, 0, 8192);
        (0..4096).for_each(|page| rig.pages(root, (page << 13) | ((round % 2) << 12), 0x80_0000, 1));
        rig.set_paged(NVME, root, 48, (round % 2) as u16 + 2);
        let audit = rig.unit.audit(&mut host);
        assert!(audit.pending > 4000 && audit.differing() == 0, "{audit:?}");
    });
    assert!(most < 4 << 20, "{most} bytes");
}

#[test]
fn rule5_memory_is_flat_over_registers_that_change_without_end() {
    let config = UnitConfig { interrupt_remapping: true, ..UnitConfig::new(UnitId(0), 48) };
    let (mut rig, root) = assigned(config);
    rig.pages(root, 0x4000, 0x8000, 16);
    let all_entries = InterruptEntryLow::new().with_kind(kind::INTERRUPT_ENTRY).into_bits();
    let most = flat(1000, |round| {
        rig.write64(offset::IRTA, ((round % 16) << 12) | (round % 8));
        rig.command(|on| on.with_interrupt_table_pointer(true));
        rig.command(|on| on.with_interrupt_remapping(round % 2 == 0).with_compatibility_format(round % 3 == 0));
        let _ = rig.unit.deliver(NVME, Msi { address: 0xfee0_0010 | ((round % 512) << 5), data: 0 });
        rig.set_root();
        rig.command(|on| on.with_translation(round % 2 == 0));
        rig.push(&[(all_entries, 0)]);
        assert!(rig.submit(&[iotlb_global()]));
        // A queue elsewhere, and no longer than it says.
        rig.command(|on| on.with_queued_invalidation(false));
        rig.write64(offset::IQA, QUEUE | (round % 8));
        rig.enable_queue();
        rig.messages.take();
        rig.listener.take_events();
    });
    assert!(most < 1 << 16, "{most} bytes");
}
