//! What a hostile guest cannot do (rule 1, rule 5), and what the host refuses (B-11).

use std::time::Duration;

use vtd::spec::registers::offset;
use vtd::spec::second_stage::SecondStageEntry;
use vtd::{Bounds, Iova, Perm, SpaceKey, UnitConfig, UnitId};

use crate::rig::{
    Event, MEMORY, NIC, NVME, Rig, context_device, context_domain, context_global, iotlb_domain, iotlb_global,
    iotlb_pages, map, mapping, requester, unmap, wait_status,
};

fn bounded(bounds: Bounds) -> (Rig, u64) {
    let mut rig = Rig::with(UnitConfig { bounds, ..UnitConfig::new(UnitId(0), 57) });
    rig.enable_queue();
    rig.enable_translation();
    let root = rig.table();
    rig.set_paged(NVME, root, 48, 1);
    rig.unit.add_requester(NVME).unwrap();
    rig.listener.take_events();
    (rig, root)
}

#[test]
fn rule1_whatever_is_wrong_takes_mappings_away() {
    type Break = fn(&mut Rig, u64);
    let broken: [(&str, Break); 9] = [
        ("root entry not present", |rig, _| rig.store(rig.root_table, 0)),
        ("root entry reserved", |rig, _| rig.store(rig.root_table + 8, 1)),
        ("context table outside memory", |rig, _| rig.store(rig.root_table, MEMORY | 1)),
        ("context entry not present", |rig, _| rig.clear_context(NVME)),
        ("context entry reserved", |rig, _| {
            let entry = rig.context_address(NVME);
            rig.store(entry + 8, rig.load(entry + 8) | 1 << 40);
        }),
        ("page table root outside memory", |rig, _| {
            rig.set_paged(NVME, MEMORY, 48, 1);
        }),
        ("table entry reserved", |rig, root| rig.store(root, rig.load(root) | 1 << 62)),
        ("table outside memory", |rig, root| rig.store(root, MEMORY | 3)),
        ("leaf reserved", |rig, root| {
            let entry = rig.entry_address(root, 48, 0x4000, 1);
            rig.store(entry, rig.load(entry) | 1 << 11);
        }),
    ];
    for (name, breaks) in broken {
        let (mut rig, root) = bounded(Bounds::default());
        rig.pages(root, 0x4000, 0x8000, 1);
        assert!(rig.submit(&[iotlb_global()]));
        assert_eq!(rig.listener.reach(NVME).len(), 1);
        breaks(&mut rig, root);
        assert!(rig.submit(&[context_global(), iotlb_global()]));
        assert_eq!(rig.listener.reach(NVME), [], "{name}");
        assert_ne!(rig.listener.attached(NVME), Some(SpaceKey::Identity), "{name}");
    }
}

#[test]
fn rule5_tables_that_point_at_themselves_block_the_space() {
    let (mut rig, root) = bounded(Bounds { table_entries: 1 << 20, ..Bounds::default() });
    rig.pages(root, 0x4000, 0x8000, 1);
    assert!(rig.submit(&[iotlb_domain(1)]));
    rig.listener.take_ops();
    let itself = SecondStageEntry::new().with_read(true).with_write(true).with_page(root >> 12);
    (1..512).for_each(|index| rig.store(root + index * 8, itself.into_bits()));
    assert!(rig.submit(&[iotlb_domain(1)]));
    assert_eq!(rig.listener.take_ops(), [unmap(0, u64::MAX)]);
    assert_eq!(rig.unit.stats().bounds_exhausted, 1);
    assert!(rig.unit.spaces_snapshot()[0].blocked);
    // A page-selective invalidation does not open it again; one of everything does.
    (1..512).for_each(|index| rig.store(root + index * 8, 0));
    assert!(rig.submit(&[iotlb_pages(1, 0x4000, 0)]));
    assert_eq!(rig.listener.take_ops(), []);
    assert!(rig.submit(&[iotlb_domain(1)]));
    assert_eq!(rig.listener.take_ops(), [map(0x4000, 0x8000, 0x1000)]);
    rig.pages(root, 0x6000, 0x8000, 1);
    assert!(rig.submit(&[iotlb_pages(1, 0x6000, 0)]));
    assert_eq!(rig.listener.take_ops(), [map(0x6000, 0x8000, 0x1000)]);
}

#[test]
fn rule5_many_overlapping_ranges_share_one_budget() {
    let (mut rig, root) = bounded(Bounds { table_entries: 4096, ..Bounds::default() });
    rig.pages(root, 0x20_0000, 0x80_0000, 512);
    let ranges: Vec<_> = (0..100).map(|page| iotlb_pages(1, 0x20_0000 + (page << 12), 9)).collect();
    assert!(rig.submit(&ranges), "the same range a hundred times is one range");
    assert_eq!(rig.unit.stats().bounds_exhausted, 0);
    let walked = rig.unit.stats().leaves_walked;
    let ranges: Vec<_> = (9..19).map(|mask| iotlb_pages(1, 0x20_0000, mask)).collect();
    assert!(rig.submit(&ranges), "ten ranges with the same table in them are more than the budget");
    assert_eq!((rig.listener.reach(NVME).len(), rig.unit.stats().bounds_exhausted), (1, 0));
    // The last look is at everything.
    let walked = rig.unit.stats().leaves_walked - walked;
    assert!(walked <= 4096 + 512, "{walked} leaves walked");
}

#[test]
fn rule5_a_range_that_is_more_than_the_budget_blocks_the_space_without_another_look() {
    let (mut rig, root) = bounded(Bounds { table_entries: 2048, ..Bounds::default() });
    (0..4).for_each(|table| rig.pages(root, table * 0x20_0000, 0x80_0000, 512));
    assert!(rig.submit(&[iotlb_pages(1, 0, 18)]));
    assert_eq!((rig.listener.reach(NVME), rig.unit.stats().bounds_exhausted), (vec![], 1));
    // Two of the tables; a look at everything would begin with another one.
    assert_eq!(rig.unit.stats().leaves_walked, 1024);
}

#[test]
fn rule5_a_full_queue_of_ranges_in_one_batch_is_served_with_one_look_at_everything() {
    let (mut rig, root) = bounded(Bounds { table_entries: 1 << 14, ..Bounds::default() });
    (0..8).for_each(|table| rig.pages(root, table * 0x20_0000, 0x80_0000, 8));
    // 8 MiB to 1 GiB around the same tables, in two forms each: more than the budget without a wait between them.
    let ranges: Vec<_> = (11..19).flat_map(|mask| [iotlb_pages(1, 0, mask), iotlb_pages(1, 0x80_0000, mask)]).collect();
    assert!(rig.submit(&ranges));
    assert_eq!((rig.listener.reach(NVME).len(), rig.unit.stats().bounds_exhausted), (8, 0));
    // What the look at everything found is followed as before.
    rig.clear(root, 0x20_0000, 8);
    assert!(rig.submit(&[iotlb_pages(1, 0x20_0000, 3)]));
    assert_eq!(rig.listener.reach(NVME).len(), 7);
}

#[test]
fn rule5_too_many_extents_block_the_space() {
    let (mut rig, root) = bounded(Bounds { shadow_entries: 100, ..Bounds::default() });
    // Every second page, so that nothing merges.
    (0..100).for_each(|page| rig.pages(root, page * 0x2000, 0x80_0000, 1));
    assert!(rig.submit(&[iotlb_domain(1)]));
    assert_eq!(rig.listener.reach(NVME).len(), 100);
    rig.pages(root, 0x100_0000, 0x80_0000, 1);
    assert!(rig.submit(&[iotlb_pages(1, 0x100_0000, 0)]));
    assert_eq!(rig.listener.reach(NVME), []);
    assert!(rig.unit.spaces_snapshot()[0].blocked);
    // A device that joins a blocked space can reach nothing, either.
    rig.set_paged(NIC, root, 48, 1);
    rig.unit.add_requester(NIC).unwrap();
    assert_eq!(rig.listener.reach(NIC), []);
    rig.clear(root, 0x100_0000, 1);
    assert!(rig.submit(&[iotlb_domain(1)]));
    assert_eq!((rig.listener.reach(NVME).len(), rig.listener.reach(NIC).len()), (100, 100));
}

#[test]
fn rule5_a_batch_that_replaces_all_that_a_space_may_hold_is_served() {
    let (mut rig, root) = bounded(Bounds { shadow_entries: 100, ..Bounds::default() });
    (0..100).for_each(|page| rig.pages(root, 0x100_0000 + page * 0x2000, 0x80_0000, 1));
    assert!(rig.submit(&[iotlb_domain(1)]));
    // What comes stands before what goes, in the order of addresses.
    (0..100).for_each(|page| {
        rig.clear(root, 0x100_0000 + page * 0x2000, 1);
        rig.pages(root, page * 0x2000, 0x80_0000, 1);
    });
    assert!(rig.submit(&[iotlb_pages(1, 0x100_0000, 8), iotlb_pages(1, 0, 8)]));
    assert_eq!((rig.listener.reach(NVME).len(), rig.unit.stats().bounds_exhausted), (100, 0));
}

#[test]
fn rule5_a_batch_that_is_far_beyond_the_bound_ends_early() {
    let (mut rig, root) = bounded(Bounds { shadow_entries: 100, ..Bounds::default() });
    (0..1000).for_each(|page| rig.pages(root, page * 0x2000, 0x80_0000, 1));
    let ranges: Vec<_> = (0..15).map(|range| iotlb_pages(1, range << 19, 7)).collect();
    assert!(rig.submit(&ranges));
    assert_eq!((rig.listener.reach(NVME), rig.unit.stats().bounds_exhausted), (vec![], 1));
    let walked = rig.unit.stats().leaves_walked;
    assert!((200..=320).contains(&walked), "{walked} leaves walked");
}

#[test]
fn rule5_too_many_spaces_block_the_device() {
    let (mut rig, root) = bounded(Bounds { spaces: 1, ..Bounds::default() });
    rig.set_paged(NIC, root, 48, 2);
    rig.unit.add_requester(NIC).unwrap();
    assert_eq!(rig.listener.attached(NIC), Some(SpaceKey::Blocked));
    // The first device leaves its space: there is room.
    rig.clear_context(NVME);
    assert!(rig.submit(&[context_global()]));
    assert!(rig.submit(&[context_global()]));
    assert!(matches!(rig.listener.attached(NIC), Some(SpaceKey::Paged(_))));
}

#[test]
fn rule5_a_space_that_is_about_to_be_left_does_not_count() {
    let (mut rig, root) = bounded(Bounds { spaces: 1, ..Bounds::default() });
    // The only one there may be is left for another one.
    let other = rig.set_paged(NVME, root, 48, 2);
    assert!(rig.submit(&[context_device(1, NVME.sid, 0)]));
    assert_eq!(rig.unit.attachments(), [(NVME, other)]);
    rig.set_paged(NIC, root, 48, 2);
    rig.unit.add_requester(NIC).unwrap();
    // Both leave it in one batch; and each does what it can when the other one stays.
    let third = rig.set_paged(NVME, root, 48, 3);
    rig.set_paged(NIC, root, 48, 3);
    assert!(rig.submit(&[context_device(2, NVME.sid, 0), context_device(2, NIC.sid, 0)]));
    assert_eq!(rig.unit.attachments(), [(NVME, third), (NIC, third)]);
    assert_eq!(rig.unit.stats().bounds_exhausted, 0);
    rig.set_paged(NVME, root, 48, 4);
    assert!(rig.submit(&[context_device(3, NVME.sid, 0)]));
    assert_eq!(rig.unit.attachments(), [(NVME, SpaceKey::Blocked), (NIC, third)]);
    // By their ids, too.
    let tables = [rig.table(), rig.table()];
    let (from, to) = ([requester(4, 0, 0), requester(4, 1, 0)], [requester(5, 0, 0).sid, requester(5, 1, 0).sid]);
    let spaces = from.map(|function| rig.set_paged(function, tables[0], 48, 7));
    let _ = to.map(|sid| rig.set_paged(vtd::Requester { segment: 0, sid }, tables[1], 48, 8));
    rig.unit.remove_requester(NVME);
    rig.unit.remove_requester(NIC);
    from.iter().for_each(|function| rig.unit.add_requester(*function).unwrap());
    assert_eq!(rig.unit.attachments(), [(from[0], spaces[0]), (from[1], spaces[1])]);
    rig.unit.renumber(&[(from[0], Some(to[0])), (from[1], Some(to[1]))]);
    assert!(rig.unit.attachments().iter().all(|(_, key)| matches!(key, SpaceKey::Paged(space) if space.domain.0 == 8)));
}

#[test]
fn b11_a_refused_map_loses_itself_and_is_told_once() {
    let (mut rig, root) = bounded(Bounds::default());
    rig.pages(root, 0x4000, 0x8000, 1);
    rig.pages(root, 0x6000, 0x8000, 1);
    rig.listener.0.lock().unwrap().refuse.insert(0x4000);
    assert!(rig.submit(&[iotlb_domain(1)]));
    assert_eq!(rig.listener.reach(NVME), [mapping(0x6000, 0x8000, 0x1000, Perm::ReadWrite)]);
    assert_eq!(rig.fault_records(), [(0, NVME.sid, 7, 0x4000, true)]);
    rig.write32(offset::FRCD + 12, 1 << 31);
    // It is tried again at the next invalidation, and no second record is made.
    rig.listener.take_ops();
    assert!(rig.submit(&[iotlb_pages(1, 0x4000, 2)]));
    assert_eq!(rig.listener.take_ops(), [map(0x4000, 0x8000, 0x1000)]);
    assert_eq!((rig.fault_records(), rig.unit.stats().maps_refused), (vec![], 2));
    rig.listener.0.lock().unwrap().refuse.clear();
    assert!(rig.submit(&[iotlb_pages(1, 0x4000, 2)]));
    assert_eq!(rig.listener.reach(NVME).len(), 2);
    assert!(rig.submit(&[iotlb_pages(1, 0x4000, 2)]));
    assert_eq!(rig.unit.stats().map_ops, 4);
}

#[test]
fn b11_each_cause_and_each_function_that_comes_has_a_record_of_its_own() {
    let (mut rig, root) = bounded(Bounds::default());
    rig.listener.0.lock().unwrap().refuse.extend([0x4000, 1 << 32]);
    rig.pages(root, 0x4000, 0x8000, 1);
    assert!(rig.submit(&[iotlb_domain(1)]));
    let read = |rig: &Rig| {
        let found = rig.fault_records();
        found.iter().for_each(|record| rig.write32(offset::FRCD + 16 * record.0 as u64 + 12, 1 << 31));
        found.into_iter().map(|record| record.3).collect::<Vec<_>>()
    };
    assert_eq!(read(&rig), [0x4000]);
    rig.pages(root, 1 << 32, 0x8000, 1);
    assert!(rig.submit(&[iotlb_domain(1)]));
    assert_eq!(read(&rig), [1 << 32], "another cause");
    assert!(rig.submit(&[iotlb_domain(1)]));
    assert!(read(&rig).is_empty());
    rig.unit.remove_requester(NVME);
    rig.unit.add_requester(NVME).unwrap();
    assert_eq!(read(&rig), [0x4000], "it is told again");
}

#[test]
fn b11_a_function_that_waits_for_room_is_tried_ever_more_rarely_unless_the_guest_names_it() {
    let (mut rig, root) = bounded(Bounds::default());
    rig.unit.add_requester(NIC).unwrap();
    rig.listener.0.lock().unwrap().crowded.insert(NIC);
    let space = rig.set_paged(NIC, root, 48, 1);
    let tries = |rig: &Rig| {
        let events = rig.listener.take_events();
        events.into_iter().filter(|event| matches!(event, Event::Attach(NIC, SpaceKey::Paged(_), _))).count()
    };
    assert!(rig.submit(&[context_device(0, NIC.sid, 0)]));
    assert_eq!((tries(&rig), rig.fault_records().len()), (1, 1));
    // Pages that come make no room, pages that go do.
    rig.pages(root, 0x4000, 0x8000, 1);
    assert!(rig.submit(&[iotlb_pages(1, 0x4000, 0)]));
    assert_eq!(tries(&rig), 0);
    rig.clear(root, 0x4000, 1);
    assert!(rig.submit(&[iotlb_pages(1, 0x4000, 0)]));
    assert_eq!(tries(&rig), 1);
    for _ in 0..7 {
        assert!(rig.submit(&[context_global(), iotlb_global()]));
    }
    assert_eq!(tries(&rig), 2, "at the third and the seventh occasion");
    assert!(rig.submit(&[context_device(0, NIC.sid, 0)]));
    assert_eq!((tries(&rig), rig.fault_records().len()), (1, 1));
    assert_eq!(rig.unit.attachments()[1], (NIC, SpaceKey::Blocked));
    // Once a drain, whatever stands before it there.
    for others in
        [vec![context_global()], vec![context_global(), wait_status(1)], vec![context_domain(0), iotlb_global()]]
    {
        let named = [&others[..], &[context_device(0, NIC.sid, 0); 3]].concat();
        assert!(rig.submit(&named));
        assert_eq!(tries(&rig), 1, "{others:?}");
    }
    rig.listener.0.lock().unwrap().crowded.clear();
    assert!(rig.submit(&[context_device(0, NIC.sid, 0)]));
    assert_eq!(rig.unit.attachments()[1], (NIC, space));
}

#[test]
fn b11_a_function_that_waits_for_room_is_tried_when_everything_changes_or_another_one_goes() {
    let (mut rig, root) = bounded(Bounds::default());
    rig.unit.add_requester(NIC).unwrap();
    rig.listener.0.lock().unwrap().crowded.insert(NIC);
    rig.set_paged(NIC, root, 48, 1);
    let tries = |rig: &Rig| {
        let events = rig.listener.take_events();
        events.into_iter().filter(|event| matches!(event, Event::Attach(NIC, SpaceKey::Paged(_), _))).count()
    };
    assert!(rig.submit(&[context_device(0, NIC.sid, 0)]));
    for _ in 0..3 {
        assert!(rig.submit(&[iotlb_global()]));
    }
    assert_eq!(tries(&rig), 3, "named, and at the first and the third occasion");
    // It would sit out some more.
    rig.set_root();
    assert_eq!(tries(&rig), 1, "everything changed");
    let other = requester(6, 0, 0);
    rig.set_paged(other, root, 48, 9);
    rig.unit.add_requester(other).unwrap();
    for _ in 0..16 {
        assert!(rig.submit(&[iotlb_global()]));
    }
    assert!(rig.submit(&[iotlb_pages(1, 0x4000, 0)]));
    let before = tries(&rig);
    assert!(before > 0);
    // Until another function is gone, which makes room.
    let mut occasions = 0;
    while tries(&rig) == 0 {
        rig.unit.add_requester(other).unwrap();
        rig.unit.remove_requester(other);
        assert!(rig.submit(&[iotlb_pages(1, 0x4000, 0)]));
        occasions += 1;
        assert!(occasions < 64, "its turn comes");
    }
}

#[test]
fn b11_refusals_are_told_again_after_a_reset() {
    let (mut rig, root) = bounded(Bounds::default());
    rig.pages(root, 0x4000, 0x8000, 1);
    rig.listener.0.lock().unwrap().refuse.insert(0x4000);
    assert!(rig.submit(&[iotlb_domain(1)]));
    assert_eq!(rig.fault_records().len(), 1);
    rig.unit.reset();
    assert_eq!(rig.fault_records(), []);
    rig.enable_queue();
    rig.enable_translation();
    assert_eq!(rig.fault_records(), [(0, NVME.sid, 7, 0x4000, true)]);
}

#[test]
fn b11_a_space_that_is_refused_in_part_at_attach_has_the_rest() {
    let (mut rig, root) = bounded(Bounds::default());
    rig.pages(root, 0x4000, 0x8000, 1);
    rig.pages(root, 0x6000, 0x8000, 1);
    rig.set_paged(NVME, root, 48, 5);
    rig.listener.0.lock().unwrap().refuse.insert(0x6000);
    assert!(rig.submit(&[context_global()]));
    assert_eq!(rig.listener.reach(NVME), [mapping(0x4000, 0x8000, 0x1000, Perm::ReadWrite)]);
    assert_eq!(rig.fault_records(), [(0, NVME.sid, 7, 0x6000, true)]);
    rig.listener.0.lock().unwrap().refuse.clear();
    assert!(rig.submit(&[iotlb_domain(5)]));
    assert_eq!(rig.listener.reach(NVME).len(), 2);
}

#[test]
fn an_attach_that_the_host_refuses_blocks_the_device_and_is_tried_again() {
    let (mut rig, root) = bounded(Bounds::default());
    let space = rig.set_paged(NVME, root, 48, 6);
    rig.listener.0.lock().unwrap().unattachable.insert(NVME);
    assert!(rig.submit(&[context_global()]));
    assert_eq!(rig.unit.attachments(), [(NVME, SpaceKey::Blocked)]);
    assert!(rig.unit.spaces_snapshot().is_empty());
    assert_eq!(rig.fault_records().len(), 1);
    rig.listener.0.lock().unwrap().unattachable.clear();
    assert!(rig.submit(&[context_global()]));
    assert_eq!(rig.unit.attachments(), [(NVME, space)]);
    // A function that cannot be attached when it is added is not behind the unit.
    rig.listener.0.lock().unwrap().unattachable.insert(NIC);
    rig.set_pass_through(NIC, 1);
    assert!(rig.unit.add_requester(NIC).is_err());
    assert_eq!(rig.unit.attachments().len(), 1);
}

#[test]
fn one_domain_id_with_two_roots_is_two_spaces_and_one_invalidation_reaches_both() {
    let (mut rig, root) = bounded(Bounds::default());
    let other = rig.table();
    let second = rig.set_paged(NIC, other, 39, 1);
    rig.unit.add_requester(NIC).unwrap();
    assert_eq!(rig.unit.spaces_snapshot().len(), 2);
    rig.pages(root, 0x4000, 0x8000, 1);
    rig.leaf(other, 39, 0x4000, 0x9000, Some(Perm::Write), 1);
    rig.listener.take_events();
    assert!(rig.submit(&[iotlb_pages(1, 0x4000, 0)]));
    assert_eq!(rig.listener.reach(NVME), [mapping(0x4000, 0x8000, 0x1000, Perm::ReadWrite)]);
    assert_eq!(rig.listener.reach(NIC), [mapping(0x4000, 0x9000, 0x1000, Perm::Write)]);
    // The last member leaves: the space is forgotten, and nothing is told of it any more.
    rig.unit.remove_requester(NIC);
    assert_eq!(rig.unit.spaces_snapshot().len(), 1);
    rig.listener.take_events();
    rig.leaf(other, 39, 0x5000, 0x9000, Some(Perm::Write), 1);
    assert!(rig.submit(&[iotlb_global()]));
    assert_eq!(rig.listener.take_events(), []);
    assert_ne!(Some(second), rig.listener.attached(NVME));
}

#[test]
fn two_devices_of_a_domain_are_one_space_and_one_batch() {
    let (mut rig, root) = bounded(Bounds::default());
    let space = rig.set_paged(NIC, root, 48, 1);
    rig.unit.add_requester(NIC).unwrap();
    rig.pages(root, 0x4000, 0x8000, 1);
    rig.listener.take_events();
    assert!(rig.submit(&[iotlb_pages(1, 0x4000, 0)]));
    assert_eq!(rig.listener.take_events(), [Event::Apply(space, vec![map(0x4000, 0x8000, 0x1000)])]);
    rig.unit.remove_requester(NVME);
    assert_eq!(rig.listener.reach(NIC).len(), 1);
    assert_eq!(rig.listener.attached(NVME), None);
}

#[test]
fn a_space_without_members_is_never_told_of() {
    let (mut rig, root) = bounded(Bounds::default());
    rig.unit.remove_requester(NVME);
    rig.listener.take_events();
    rig.pages(root, 0x4000, 0x8000, 4);
    assert!(rig.submit(&[context_global(), iotlb_global(), iotlb_pages(1, 0x4000, 3)]));
    assert_eq!(rig.listener.take_events(), []);
    // A function that the tables do not name is blocked from the start.
    let nobody = requester(9, 9, 1);
    rig.unit.add_requester(nobody).unwrap();
    assert_eq!(rig.listener.attached(nobody), Some(SpaceKey::Blocked));
}

#[test]
fn a_guest_that_changes_its_mind_within_one_drain_ends_with_what_the_tables_say() {
    // Overlapping ranges in one batch: what the first maps, the second must be able to take back. A table that is
    // edited by another processor meanwhile looks like this; here the first range reaches further than it says (B-1).
    let (mut rig, root) = bounded(Bounds::default());
    rig.leaf(root, 48, 0x20_0000, 0x100_0000, Some(Perm::ReadWrite), 2);
    assert!(rig.submit(&[iotlb_pages(1, 0x20_0000, 0), iotlb_pages(1, 0x20_5000, 0), iotlb_pages(1, 0x20_0000, 9)]));
    assert_eq!(rig.listener.take_ops(), [map(0x20_0000, 0x100_0000, 0x20_0000)]);
    let walked = rig.unit.spaces_snapshot()[0].extents.clone();
    assert_eq!(walked, [mapping(0x20_0000, 0x100_0000, 0x20_0000, Perm::ReadWrite)]);
    assert_eq!(rig.unit.walk(&rig.unit.spaces_snapshot()[0].key), Some(walked));
    assert_eq!(
        rig.unit.endpoint(NVME).enter().translate(Iova(0x20_0000), vtd::Access::Read).map(|gpa| gpa.0),
        Ok(0x100_0000)
    );
}

#[test]
fn rule5_a_full_queue_of_global_invalidations_is_one_walk_and_is_served() {
    const PAGES: u64 = 4096;
    for descriptor in [iotlb_global(), iotlb_domain(1), context_global(), context_domain(1)] {
        let (mut rig, root) = bounded(Bounds::default());
        (0..PAGES).for_each(|page| rig.pages(root, page * 0x2000, 0x80_0000, 1));
        let time = rig.full_queue(&[descriptor]);
        assert_eq!(rig.listener.reach(NVME).len() as u64, PAGES);
        assert_eq!((rig.unit.stats().map_ops, rig.unit.stats().bounds_exhausted), (PAGES, 0));
        assert_eq!(rig.unit.stats().leaves_walked, PAGES, "{descriptor:x?}: walked once, not once a wait");
        assert!(time < Duration::from_secs(20), "{time:?}");
        // What the guest changes afterwards takes effect at its next invalidation.
        rig.clear(root, 0, 1);
        assert_eq!(rig.listener.reach(NVME).len() as u64, PAGES);
        rig.full_queue(&[iotlb_global()]);
        assert_eq!(rig.listener.reach(NVME).len() as u64, PAGES - 1);
    }
}

#[test]
fn rule5_a_full_queue_over_tables_that_point_at_themselves_ends_after_one_budget() {
    let (mut rig, root) = bounded(Bounds { table_entries: 1 << 20, ..Bounds::default() });
    rig.pages(root, 0x4000, 0x8000, 1);
    assert!(rig.submit(&[iotlb_domain(1)]));
    let itself = SecondStageEntry::new().with_read(true).with_write(true).with_page(root >> 12);
    (0..512).for_each(|index| rig.store(root + index * 8, itself.into_bits()));
    let time = rig.full_queue(&[iotlb_global(), context_global(), iotlb_domain(1), iotlb_pages(1, 0, 18)]);
    assert_eq!(rig.listener.reach(NVME), []);
    assert_eq!(rig.unit.stats().bounds_exhausted, 1, "blocked once, and looked at again in the next drain only");
    assert!(time < Duration::from_secs(20), "{time:?}");
}

#[test]
fn rule5_a_full_queue_of_large_ranges_is_served_with_one_look_at_everything() {
    // 16,384 ranges of 1 GiB with 512 tables each: ten thousand times the budget, and still legal.
    let (mut rig, root) = bounded(Bounds { table_entries: 1 << 14, ..Bounds::default() });
    for table in 0..8 {
        rig.pages(root, table * 0x20_0000, 0x80_0000, 8);
    }
    let time = rig.full_queue(&[iotlb_pages(1, 0, 18)]);
    assert_eq!((rig.listener.reach(NVME).len(), rig.unit.stats().bounds_exhausted), (8, 0));
    assert!(rig.unit.stats().leaves_walked < 1000, "{} leaves walked", rig.unit.stats().leaves_walked);
    assert!(time < Duration::from_secs(20), "{time:?}");
}
