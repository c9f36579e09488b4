//! What the listener is told: the shadow, its diff, and its batches (B-1, B-2, B-5, B-6, B-7, B-14, A-10).

use vtd::{MapOp, Perm, SpaceKey};

use crate::rig::{
    Event, MEMORY, NIC, NVME, Rig, context_device, context_domain, context_global, iotlb_domain, iotlb_global,
    iotlb_pages, joined, map, mapping, unmap,
};

const RW: Option<Perm> = Some(Perm::ReadWrite);

#[test]
fn a10_pages_made_present_are_mapped_at_their_invalidation() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x10_0000, 0x80_0000, 32);
    assert_eq!(rig.listener.take_ops(), []);
    assert!(rig.submit(&[iotlb_pages(1, 0x10_0000, 5)]));
    assert_eq!(rig.listener.take_ops(), [map(0x10_0000, 0x80_0000, 32 * 4096)]);
    rig.clear(root, 0x10_0000, 32);
    assert!(rig.submit(&[iotlb_pages(1, 0x10_0000, 5)]));
    assert_eq!(rig.listener.take_ops(), [unmap(0x10_0000, 0x11_ffff)]);
    assert_eq!(rig.listener.reach(NVME), []);
}

#[test]
fn a10_a_context_entry_made_present_takes_effect_at_its_invalidation_with_domain_0() {
    let mut rig = Rig::translating();
    rig.unit.add_requester(NVME).unwrap();
    assert_eq!(rig.listener.attached(NVME), Some(SpaceKey::Blocked));
    let root = rig.table();
    rig.pages(root, 0x5000, 0x9000, 1);
    let space = rig.set_paged(NVME, root, 48, 7);
    rig.listener.take_events();
    assert!(rig.submit(&[context_device(0, NVME.sid, 0), iotlb_domain(7)]));
    let live = vec![mapping(0x5000, 0x9000, 0x1000, Perm::ReadWrite)];
    assert_eq!(rig.listener.take_events(), [Event::Attach(NVME, space, live)]);
}

#[test]
fn a1_permissions_are_anded_downwards_and_write_only_stays_apart() {
    for upper in 1..4u64 {
        let (mut rig, root) = Rig::with_nvme();
        let perms = [Perm::Read, Perm::Write, Perm::ReadWrite];
        for (page, perm) in (0x20_0000u64..).step_by(4096).zip(perms) {
            rig.leaf(root, 48, page, page, Some(perm), 1);
        }
        let directory = rig.entry_address(root, 48, 0x20_0000, 2);
        rig.store(directory, rig.load(directory) & !3 | upper);
        assert!(rig.submit(&[iotlb_pages(1, 0x20_0000, 2)]));
        let both = |perm: Perm| Perm::from_bits(perm.readable() && upper & 1 != 0, perm.writable() && upper & 2 != 0);
        let expected = (0x20_0000u64..).step_by(4096).zip(perms);
        let expected = expected.filter_map(|(page, perm)| both(perm).map(|perm| mapping(page, page, 4096, perm)));
        assert_eq!(rig.listener.reach(NVME), joined(expected));
    }
}

#[test]
fn b1_a_cleared_directory_entry_unmaps_all_that_it_covered() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x20_0000, 0x80_0000, 512);
    rig.pages(root, 0x40_0000, 0xa0_0000, 1);
    assert!(rig.submit(&[iotlb_domain(1)]));
    rig.listener.take_ops();
    rig.leaf(root, 48, 0x20_0000, 0, None, 2);
    assert!(rig.submit(&[iotlb_pages(1, 0x20_5000, 0)]));
    assert_eq!(rig.listener.take_ops(), [unmap(0x20_0000, 0x3f_ffff)]);
    assert_eq!(rig.listener.reach(NVME), [mapping(0x40_0000, 0xa0_0000, 0x1000, Perm::ReadWrite)]);
}

#[test]
fn b1_a_superpage_that_replaced_a_table_maps_all_that_it_covers() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x20_0000, 0x80_0000, 4);
    assert!(rig.submit(&[iotlb_domain(1)]));
    rig.listener.take_ops();
    rig.leaf(root, 48, 0x20_0000, 0x80_0000, RW, 2);
    assert!(rig.submit(&[iotlb_pages(1, 0x20_0000, 0)]));
    assert_eq!(rig.listener.take_ops(), [map(0x20_4000, 0x80_4000, 0x1f_c000)]);
}

#[test]
fn b1_a_directory_entry_that_went_wrong_unmaps_all_that_it_covered() {
    type Break = fn(u64) -> u64;
    let broken: [(&str, Break); 3] = [
        ("a table outside memory", |_| MEMORY | 3),
        ("a reserved bit", |entry| entry | 1 << 62),
        ("no permission", |entry| entry & !3),
    ];
    for (name, breaks) in broken {
        let (mut rig, root) = Rig::with_nvme();
        rig.pages(root, 0x20_0000, 0x80_0000, 3);
        rig.pages(root, 0x3f_f000, 0x80_0000, 1);
        rig.pages(root, 0x40_0000, 0x80_0000, 1);
        assert!(rig.submit(&[iotlb_domain(1)]));
        let entry = rig.entry_address(root, 48, 0x20_0000, 2);
        rig.store(entry, breaks(rig.load(entry)));
        // One page of it is named.
        assert!(rig.submit(&[iotlb_pages(1, 0x30_0000, 0)]));
        assert_eq!(rig.listener.reach(NVME), [mapping(0x40_0000, 0x80_0000, 0x1000, Perm::ReadWrite)], "{name}");
    }
}

#[test]
fn b7_unmaps_of_neighbours_in_one_batch_are_one_operation() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x4000, 0x80_0000, 3);
    for page in [0x4000, 0x5000, 0x6000] {
        assert!(rig.submit(&[iotlb_pages(1, page, 0)]));
    }
    rig.listener.take_ops();
    rig.clear(root, 0x4000, 3);
    assert!(rig.submit(&[iotlb_pages(1, 0x6000, 0), iotlb_pages(1, 0x4000, 0), iotlb_pages(1, 0x5000, 0)]));
    assert_eq!(rig.listener.take_ops(), [unmap(0x4000, 0x6fff)]);
}

#[test]
fn b2_nothing_that_stayed_the_same_is_touched() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x20_0000, 0x80_0000, 16);
    assert!(rig.submit(&[iotlb_pages(1, 0x20_0000, 4)]));
    rig.listener.take_ops();
    let invalidations =
        [iotlb_domain(1), iotlb_global(), context_global(), context_domain(1), iotlb_pages(1, 0x20_0000, 9)];
    for invalidation in invalidations {
        assert!(rig.submit(&[invalidation]));
        assert_eq!(rig.listener.take_events(), []);
    }
    rig.pages(root, 0x20_4000, 0x90_0000, 1);
    assert!(rig.submit(&[iotlb_domain(1)]));
    assert_eq!(rig.listener.take_ops(), [unmap(0x20_4000, 0x20_4fff), map(0x20_4000, 0x90_0000, 0x1000)]);
}

#[test]
fn b5_a_device_that_joins_gets_all_live_mappings() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x20_0000, 0x80_0000, 2);
    assert!(rig.submit(&[iotlb_pages(1, 0x20_0000, 1)]));
    let space = rig.set_paged(NIC, root, 48, 1);
    rig.listener.take_events();
    rig.unit.add_requester(NIC).unwrap();
    let live = vec![mapping(0x20_0000, 0x80_0000, 0x2000, Perm::ReadWrite)];
    assert_eq!(rig.listener.take_events(), [Event::Attach(NIC, space, live)]);
}

#[test]
fn b6_a_leaf_over_the_interrupt_range_maps_both_sides_right() {
    let (mut rig, root) = Rig::with_nvme();
    rig.leaf(root, 48, 0xc000_0000, 0x1_c000_0000, RW, 3);
    assert!(rig.submit(&[iotlb_pages(1, 0xc000_0000, 18)]));
    let expected = [map(0xc000_0000, 0x1_c000_0000, 0x3ee0_0000), map(0xfef0_0000, 0x1_fef0_0000, 0x0110_0000)];
    assert_eq!(rig.listener.take_ops(), expected);
}

#[test]
fn a12_the_interrupt_range_is_never_an_output() {
    let (mut rig, root) = Rig::with_nvme();
    rig.leaf(root, 48, 0x1_0000_0000, 0xfee0_0000, RW, 2);
    rig.leaf(root, 48, 0x1_0020_0000, 0xfee0_0000, RW, 1);
    assert!(rig.submit(&[iotlb_domain(1)]));
    assert_eq!(rig.listener.take_ops(), [map(0x1_0010_0000, 0xfef0_0000, 0x10_0000)]);
}

#[test]
fn b7_leaves_of_different_invalidations_are_not_merged() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x10_0000, 0x80_0000, 8);
    assert!(rig.submit(&[iotlb_pages(1, 0x10_0000, 2), iotlb_pages(1, 0x10_4000, 2)]));
    assert_eq!(rig.listener.take_ops(), [map(0x10_0000, 0x80_0000, 0x4000), map(0x10_4000, 0x80_4000, 0x4000)]);
    rig.clear(root, 0x10_0000, 8);
    assert!(rig.submit(&[iotlb_pages(1, 0x10_0000, 2), iotlb_pages(1, 0x10_4000, 2)]));
    assert_eq!(rig.listener.take_ops(), [unmap(0x10_0000, 0x10_7fff)]);
}

#[test]
fn b7_leaves_with_a_gap_between_them_are_not_merged() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x10_0000, 0x80_0000, 1);
    rig.pages(root, 0x10_2000, 0x80_1000, 1);
    assert!(rig.submit(&[iotlb_pages(1, 0x10_0000, 2)]));
    assert_eq!(rig.listener.take_ops(), [map(0x10_0000, 0x80_0000, 0x1000), map(0x10_2000, 0x80_1000, 0x1000)]);
}

#[test]
fn b7_a_whole_resync_merges_within_2_mib_only() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x1f_e000, 0x80_0000, 4);
    rig.leaf(root, 48, 0x40_0000, 0x100_0000, RW, 2);
    rig.leaf(root, 48, 0x60_0000, 0x120_0000, RW, 2);
    assert!(rig.submit(&[iotlb_domain(1)]));
    let expected = [
        map(0x1f_e000, 0x80_0000, 0x2000),
        map(0x20_0000, 0x80_2000, 0x2000),
        map(0x40_0000, 0x100_0000, 0x20_0000),
        map(0x60_0000, 0x120_0000, 0x20_0000),
    ];
    assert_eq!(rig.listener.take_ops(), expected);
}

#[test]
fn b8_a_page_taken_out_of_a_2m_extent_is_unmapped_exactly() {
    let (mut rig, root) = Rig::with_nvme();
    rig.leaf(root, 48, 0x20_0000, 0x100_0000, RW, 2);
    assert!(rig.submit(&[iotlb_domain(1)]));
    rig.leaf(root, 48, 0x20_0000, 0, None, 2);
    rig.pages(root, 0x20_0000, 0x100_0000, 512);
    rig.clear(root, 0x20_7000, 1);
    rig.listener.take_ops();
    assert!(rig.submit(&[iotlb_pages(1, 0x20_7000, 0)]));
    assert_eq!(rig.listener.take_ops(), [unmap(0x20_7000, 0x20_7fff)]);
    let reach = [
        mapping(0x20_0000, 0x100_0000, 0x7000, Perm::ReadWrite),
        mapping(0x20_8000, 0x100_8000, 0x1f_8000, Perm::ReadWrite),
    ];
    assert_eq!(rig.listener.reach(NVME), reach);
}

#[test]
fn b8_an_extent_that_a_rounded_range_cuts_goes_whole_if_nothing_of_it_is_live() {
    // As Linux's vfio takes 3 + 13 huge pages away: both are cleared, then each is invalidated, rounded up to a power
    // of two.
    let (mut rig, root) = Rig::with_nvme();
    for pages in [
        [(0x4000_0000, 0x600_0000, 3), (0x4000_3000, 0x680_0000, 13)],
        [(0x4000_0000, 0x600_0000, 13), (0x4000_d000, 0x680_0000, 3)],
    ] {
        let ranges = [iotlb_pages(1, 0x4000_0000, 2), iotlb_pages(1, 0x4000_0000, 4)];
        let (ranges, whole) = if pages[0].2 == 3 {
            (ranges, ranges[1])
        } else {
            ([iotlb_pages(1, 0x4000_c000, 2), ranges[1]], ranges[1])
        };
        for (iova, gpa, count) in pages {
            rig.pages(root, iova, gpa, count);
            assert!(rig.submit(&[whole]));
        }
        rig.listener.take_ops();
        rig.clear(root, 0x4000_0000, 16);
        // What is not at an edge of the range, or beyond an extent, stays until it is invalidated.
        rig.pages(root, 0x5000_0000, 0x90_0000, 1);
        assert!(rig.submit(&[ranges[0]]));
        assert_eq!(rig.listener.take_ops(), [unmap(0x4000_0000, 0x4000_ffff)]);
        assert!(rig.submit(&[ranges[1]]));
        assert_eq!((rig.listener.take_ops(), rig.listener.reach(NVME)), (vec![], vec![]));
    }
}

#[test]
fn b8_what_is_live_beside_a_range_is_not_looked_at_any_further() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x4000_0000, 0x600_0000, 16);
    assert!(rig.submit(&[iotlb_pages(1, 0x4000_0000, 4)]));
    rig.listener.take_ops();
    // Not invalidated, and beyond a live page.
    rig.clear(root, 0x4000_8000, 1);
    rig.clear(root, 0x4000_0000, 2);
    let walked = rig.unit.stats().leaves_walked;
    assert!(rig.submit(&[iotlb_pages(1, 0x4000_0000, 1)]));
    assert_eq!(rig.listener.take_ops(), [unmap(0x4000_0000, 0x4000_1fff)]);
    assert_eq!(rig.unit.stats().leaves_walked - walked, 1, "the page beside it");
    // On the other side, too.
    rig.clear(root, 0x4000_f000, 1);
    let walked = rig.unit.stats().leaves_walked;
    assert!(rig.submit(&[iotlb_pages(1, 0x4000_f000, 0)]));
    assert_eq!(rig.listener.take_ops(), [unmap(0x4000_f000, 0x4000_ffff)]);
    assert_eq!(rig.unit.stats().leaves_walked - walked, 1, "the page before it");
    // Gone beside it, and live further on: exactly what is gone goes.
    rig.clear(root, 0x4000_2000, 2);
    assert!(rig.submit(&[iotlb_pages(1, 0x4000_2000, 0)]));
    assert_eq!(rig.listener.take_ops(), [unmap(0x4000_2000, 0x4000_3fff), unmap(0x4000_8000, 0x4000_8fff)]);
    let live = [(0x4000_4000, 0x600_4000, 0x4000), (0x4000_9000, 0x600_9000, 0x6000)];
    assert_eq!(rig.listener.reach(NVME), live.map(|(iova, gpa, len)| mapping(iova, gpa, len, Perm::ReadWrite)));
    // What leads elsewhere by now is live, too: it waits for its own invalidation.
    rig.clear(root, 0x4000_9000, 1);
    rig.pages(root, 0x4000_a000, 0x700_0000, 5);
    assert!(rig.submit(&[iotlb_pages(1, 0x4000_9000, 0)]));
    assert_eq!(rig.listener.take_ops(), [unmap(0x4000_9000, 0x4000_9fff)]);
}

#[test]
fn b14_a_superpage_replaced_by_equal_pages_is_no_operation() {
    let (mut rig, root) = Rig::with_nvme();
    rig.leaf(root, 48, 0x20_0000, 0x100_0000, RW, 2);
    assert!(rig.submit(&[iotlb_domain(1)]));
    rig.listener.take_ops();
    rig.leaf(root, 48, 0x20_0000, 0, None, 2);
    rig.pages(root, 0x20_0000, 0x100_0000, 512);
    for invalidation in [iotlb_pages(1, 0x20_0000, 9), iotlb_domain(1)] {
        assert!(rig.submit(&[invalidation]));
        assert_eq!(rig.listener.take_ops(), []);
    }
    rig.leaf(root, 48, 0x20_0000, 0x100_0000, RW, 2);
    assert!(rig.submit(&[iotlb_domain(1)]));
    assert_eq!(rig.listener.take_ops(), []);
}

#[test]
fn b3_a_space_with_nothing_left_is_unmapped_whole() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x20_0000, 0x80_0000, 1);
    rig.leaf(root, 48, 0xffff_c000_0000, 0x80_0000, RW, 1);
    assert!(rig.submit(&[iotlb_domain(1)]));
    assert_eq!(rig.listener.take_ops().iter().filter(|op| matches!(op, MapOp::Map(_))).count(), 2);
    rig.store(root, 0);
    rig.store(root + 511 * 8, 0);
    assert!(rig.submit(&[iotlb_domain(1)]));
    assert_eq!(rig.listener.take_ops(), [unmap(0, u64::MAX)]);
}
