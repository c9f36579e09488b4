//! Scalable mode with the second stage and pass-through, as a listener and an emulated function see it (A-2, A-6,
//!

use vtd::spec::registers::{FaultStatus, offset};
use vtd::{Access, Gpa, Iova, RestoreError, SpaceKey, State};

use crate::pasid_tables::{
    config, pasid_cache_domain, pasid_cache_global, pasid_cache_of, pasid_iotlb_of, pasid_iotlb_pages, pass_through,
    second_stage, space,
};
use crate::rig::{
    NIC, NVME, QUEUE, Rig, context_device, context_domain, context_global, iotlb_domain, iotlb_global, iotlb_pages,
    map, requester, unmap, wait_status,
};

/// IQEI, if the queue has stopped.
fn queue_error(rig: &Rig) -> Option<u64> {
    let stopped = FaultStatus::from_bits(rig.read32(offset::FSTS)).queue_error();
    stopped.then(|| rig.read64(offset::IQERCD))
}

#[test]
fn a4_scalable_mode_is_offered_when_asked_for() {
    let extended = config(48).extended_capability().into_bits();
    let bit = |number: u32| extended >> number & 1;
    assert_eq!([43, 46, 48, 49, 52].map(bit), [1; 5], "SMTS, SSTS, SMPWC, RPS, ADMS");
    // DT, SC, MTS, NEST, PRS, ERS, SRS, NWFS, EAFS, PASID, PDS, SSADS, FSTS, RPRIVS.
    assert_eq!([2, 7, 25, 26, 29, 30, 31, 33, 34, 40, 42, 45, 47, 53].map(bit), [0; 14]);
    let legacy = vtd::UnitConfig { scalable: None, ..config(48) };
    assert_eq!(legacy.extended_capability().into_bits() >> 24, 0);
    assert_eq!(config(48).capability(), legacy.capability());
}

#[test]
fn a2_a_function_is_where_its_pasid_entry_says() {
    let mut rig = Rig::scalable(config(48));
    rig.unit.add_requester(NVME).unwrap();
    assert_eq!(rig.listener.attached(NVME), Some(SpaceKey::Blocked), "no context entry");
    let root = rig.table();
    rig.pages(root, 0x20_0000, 0x80_0000, 4);
    // As Linux does it in Caching Mode: the context entry, then the entry of the PASID table.
    rig.entry_of_pasid(NVME, 0);
    assert!(rig.submit(&[context_device(0, NVME.sid, 0)]) && rig.submit(&[iotlb_domain(0)]));
    assert_eq!(rig.listener.attached(NVME), Some(SpaceKey::Blocked), "no entry in the PASID table");
    rig.set_entry(NVME, 0, second_stage(root, 48, 5));
    assert!(rig.submit(&[pasid_cache_of(5, 0)]) && rig.submit(&[pasid_iotlb_of(5, 0)]));
    assert_eq!(rig.listener.attached(NVME), Some(space(root, 48, 5)));
    assert_eq!(rig.listener.reach(NVME), [crate::rig::mapping(0x20_0000, 0x80_0000, 0x4000, vtd::Perm::ReadWrite)]);
    // To another domain, by way of none.
    let other = rig.table();
    rig.set_entry(NVME, 0, [0; 8]);
    assert!(rig.submit(&[pasid_cache_of(5, 0), iotlb_domain(5)]));
    assert_eq!(rig.listener.attached(NVME), Some(SpaceKey::Blocked));
    rig.set_entry(NVME, 0, second_stage(other, 39, 6));
    assert!(rig.submit(&[pasid_cache_of(6, 0), pasid_iotlb_of(6, 0)]));
    assert_eq!(rig.listener.attached(NVME), Some(space(other, 39, 6)));
    rig.set_entry(NVME, 0, pass_through(1));
    assert!(rig.submit(&[pasid_cache_domain(6)]));
    assert_eq!(rig.listener.attached(NVME), Some(SpaceKey::Identity));
    rig.set_entry(NVME, 0, [0; 8]);
    assert!(rig.submit(&[pasid_cache_global()]));
    assert_eq!(rig.listener.attached(NVME), Some(SpaceKey::Blocked));
}

#[test]
fn a2_mappings_follow_page_selective_invalidations() {
    let (mut rig, root) = Rig::scalable_with_nvme();
    rig.pages(root, 0x20_0000, 0x80_0000, 4);
    assert!(rig.submit(&[iotlb_pages(1, 0x20_0000, 2)]));
    assert_eq!(rig.listener.take_ops(), [map(0x20_0000, 0x80_0000, 0x4000)]);
    rig.clear(root, 0x20_1000, 1);
    assert!(rig.submit(&[iotlb_pages(2, 0x20_0000, 2)]));
    assert_eq!(rig.listener.take_ops(), [], "another domain");
    assert!(rig.submit(&[iotlb_pages(1, 0x20_0000, 2)]));
    assert_eq!(rig.listener.take_ops(), [unmap(0x20_1000, 0x20_1fff)]);
}

#[test]
fn b2_pasid_invalidations_take_nothing_away_that_stayed_the_same() {
    let (mut rig, root) = Rig::scalable_with_nvme();
    let other = rig.table();
    rig.set_entry(NIC, 0, second_stage(other, 48, 2));
    rig.unit.add_requester(NIC).unwrap();
    rig.pages(root, 0x20_0000, 0x80_0000, 512);
    rig.pages(other, 0x20_0000, 0xa0_0000, 512);
    assert!(rig.submit(&[iotlb_global()]));
    rig.listener.take_events();
    let all = [
        pasid_cache_of(1, 0),
        pasid_cache_domain(1),
        pasid_cache_global(),
        pasid_iotlb_of(1, 0),
        pasid_iotlb_pages(1, 0, 0x20_0000, 9),
        pasid_iotlb_pages(1, 0, 0, 63),
        context_device(0, NVME.sid, 0),
        context_domain(77),
        context_global(),
    ];
    for descriptor in all {
        assert!(rig.submit(&[descriptor]));
        assert_eq!(rig.listener.take_events(), [], "{descriptor:x?}");
    }
    // What changed in one page, of what is invalidated, and nothing else.
    for (descriptor, is_reached) in [
        (pasid_cache_of(1, 0), true),
        (pasid_cache_domain(1), true),
        (pasid_cache_domain(2), false),
        (pasid_iotlb_of(2, 0), false),
        (pasid_iotlb_of(1, 0), true),
        (context_domain(77), true),
    ] {
        rig.clear(root, 0x20_3000, 1);
        assert!(rig.submit(&[descriptor]));
        let unmapped = if is_reached { vec![unmap(0x20_3000, 0x20_3fff)] } else { vec![] };
        assert_eq!(rig.listener.take_ops(), unmapped, "{descriptor:x?}");
        rig.pages(root, 0x20_3000, 0x80_3000, 1);
        assert!(rig.submit(&[iotlb_domain(1)]));
        rig.listener.take_events();
    }
}

#[test]
fn a2_both_halves_of_a_root_entry_and_every_pasid_of_a_directory_are_found() {
    let mut rig = Rig::scalable(config(48));
    for (index, device) in [0u8, 15, 16, 31].into_iter().enumerate() {
        let function = requester(3, device, 7);
        let root = rig.table();
        rig.pages(root, 0x1000, 0x80_0000 + index as u64 * 4096, 1);
        // The last PASID of the directory, and one in between.
        let pasid = [0x1fff, 0x41][index % 2];
        rig.set_entry(function, pasid, second_stage(root, 48, 1));
        let context = rig.scalable_context_address(function);
        rig.store(context + 8, pasid.into());
        let endpoint = rig.unit.endpoint(function);
        let gpa = endpoint.enter().translate(Iova(0x1234), Access::Write);
        assert_eq!(gpa, Ok(Gpa(0x80_0234 + index as u64 * 4096)), "{function}");
    }
}

#[test]
fn a2_an_emulated_function_follows_its_pasid_entry() {
    let mut rig = Rig::scalable(config(48));
    let (first, second) = (rig.table(), rig.table());
    rig.pages(first, 0x1000, 0x80_0000, 1);
    rig.pages(second, 0x1000, 0x90_0000, 1);
    let endpoint = rig.unit.endpoint(NVME);
    let read = || endpoint.enter().translate(Iova(0x1000), Access::Read);
    for (entry, domain, leads_to) in [
        (second_stage(first, 48, 1), 1, 0x80_0000),
        (second_stage(second, 48, 2), 1, 0x90_0000),
        (pass_through(3), 2, 0x1000),
        (second_stage(first, 48, 1), 3, 0x80_0000),
    ] {
        rig.set_entry(NVME, 0, entry);
        assert!(rig.submit(&[pasid_cache_of(domain, 0), iotlb_domain(domain)]));
        assert_eq!((read(), read()), (Ok(Gpa(leads_to)), Ok(Gpa(leads_to))), "from the tables, and cached");
    }
    rig.leaf(first, 48, 0x1000, 0xa0_0000, Some(vtd::Perm::Read), 1);
    assert_eq!(read(), Ok(Gpa(0x80_0000)), "not invalidated");
    assert!(rig.submit(&[iotlb_pages(1, 0x1000, 0)]));
    assert_eq!(read(), Ok(Gpa(0xa0_0000)));
}

#[test]
fn a2_abort_mode_blocks_everything() {
    let (mut rig, root) = Rig::scalable_with_nvme();
    rig.pages(root, 0x1000, 0x80_0000, 1);
    assert!(rig.submit(&[iotlb_global()]));
    rig.table_mode = 3;
    rig.set_root();
    assert_eq!(rig.listener.attached(NVME), Some(SpaceKey::Blocked));
    assert!(rig.submit(&[pasid_cache_global(), iotlb_global()]), "the queue goes on");
    rig.table_mode = 1;
    rig.set_root();
    assert_eq!(rig.listener.attached(NVME), Some(space(root, 48, 1)));
    // From one mode to the other, with the same root table.
    rig.table_mode = 0;
    rig.set_root();
    assert_eq!(rig.listener.attached(NVME), Some(SpaceKey::Blocked), "the tables are none of legacy mode");
}

#[test]
fn a6_descriptors_are_as_wide_as_the_queue_says() {
    let (mut rig, _) = Rig::scalable_with_nvme();
    // More than once round.
    for _ in 0..130 {
        assert!(rig.submit(&[iotlb_global()]));
    }
    let stats = rig.unit.stats();
    assert_eq!((stats.descriptors.iotlb, stats.descriptors.wait, stats.queue_errors), (130, 130, 0));
    assert_eq!(rig.read64(offset::IQH), 260 % 128 * 32);
    assert!(rig.submit(&[pasid_cache_of(1, 0), pasid_cache_global(), pasid_iotlb_of(1, 0)]));
    let stats = rig.unit.stats();
    assert_eq!((stats.descriptors.pasid_cache, stats.descriptors.pasid_iotlb), (2, 1));
}

#[test]
fn a6_wide_descriptors_with_something_wrong_stop_the_queue() {
    let stopped = |words: [u64; 4]| {
        let (rig, _) = Rig::scalable_with_nvme();
        words.into_iter().enumerate().for_each(|(index, word)| rig.store(QUEUE + index as u64 * 8, word));
        rig.write64(offset::IQT, 32);
        queue_error(&rig)
    };
    let (cache, iotlb) = (pasid_cache_of(1, 5).0, pasid_iotlb_of(1, 5).0);
    assert_eq!((stopped([cache, 0, 0, 0]), stopped([iotlb, 0, 0, 0])), (None, None));
    for bit in (6..9).chain(12..16).chain(52..64) {
        assert_eq!(stopped([cache | 1 << bit, 0, 0, 0]), Some(4), "bit {bit}");
        assert_eq!(stopped([iotlb | 1 << bit, 0, 0, 0]), Some(4), "bit {bit}");
    }
    for bit in 0..64 {
        assert_eq!(stopped([cache, 1 << bit, 0, 0]), Some(4), "bit {}", bit + 64);
        let reserved = (7..12).contains(&bit).then_some(4);
        assert_eq!(stopped([iotlb, 1 << bit, 0, 0]), reserved, "bit {}", bit + 64);
        for low in [cache, iotlb, iotlb_global().0, context_global().0, wait_status(1).0] {
            assert_eq!(stopped([low, 0, 1 << bit, 0]), Some(4), "bit {}", bit + 128);
            assert_eq!(stopped([low, 0, 0, 1 << bit]), Some(4), "bit {}", bit + 192);
        }
    }
    // Reserved granularities, and types that are not offered.
    assert_eq!(stopped([7 | 2 << 4, 0, 0, 0]), Some(4));
    assert_eq!((stopped([6, 0, 0, 0]), stopped([6 | 1 << 4, 0, 0, 0])), (Some(4), Some(4)));
    for kind in [0, 3, 4, 8, 9, 10, 11, 15] {
        assert_eq!(stopped([kind, 0, 0, 1]), Some(3), "type {kind}");
    }
}

#[test]
fn a6_the_width_goes_with_the_mode() {
    let (mut rig, _) = Rig::scalable_with_nvme();
    rig.write64(offset::IQT, 0x10);
    assert_eq!(queue_error(&rig), Some(6), "a tail inside a descriptor");
    rig.write64(offset::IQT, 0x1000);
    rig.write32(offset::FSTS, 0x7f);
    assert_eq!(queue_error(&rig), Some(1), "a tail beyond the queue");
    // Two descriptors of 128 bits.
    let narrow = |rig: &mut Rig| {
        rig.command(|on| on.with_queued_invalidation(false));
        rig.write32(offset::FSTS, 0x7f);
        rig.wide = false;
        rig.enable_queue();
        rig.submit(&[iotlb_global()])
    };
    assert!(!narrow(&mut rig));
    assert_eq!(queue_error(&rig), Some(5), "128 bits in scalable mode");
    (rig.table_mode, rig.wide) = (0, true);
    rig.set_root();
    assert!(narrow(&mut rig), "in legacy mode either will do");
    rig.command(|on| on.with_queued_invalidation(false));
    rig.wide = true;
    rig.enable_queue();
    assert!(rig.submit(&[iotlb_global(), context_global()]));
    assert!(!rig.submit(&[pasid_cache_global()]));
    assert_eq!(queue_error(&rig), Some(3), "but PASIDs are of scalable mode");
    rig.table_mode = 2;
    rig.set_root();
    rig.write32(offset::FSTS, 0x7f);
    assert_eq!(queue_error(&rig), Some(7), "a reserved mode");
}

#[test]
fn a14_a_unit_in_scalable_mode_is_saved_and_restored() {
    let (mut rig, root) = Rig::scalable_with_nvme();
    rig.pages(root, 0x20_0000, 0x80_0000, 4);
    assert!(rig.submit(&[iotlb_global()]));
    let reach = rig.listener.reach(NVME);
    let saved = rig.unit.save();
    assert_eq!((saved.queue_in_use.wide(), saved.queue_head), (true, 64));
    rig.unit.reset();
    assert_eq!(rig.listener.attached(NVME), Some(SpaceKey::Identity));
    let text = serde_json::to_string(&saved).unwrap();
    rig.unit.restore(serde_json::from_str(&text).unwrap()).unwrap();
    assert_eq!((rig.listener.attached(NVME), rig.listener.reach(NVME)), (Some(space(root, 48, 1)), reach));
    rig.clear(root, 0x20_0000, 1);
    assert!(rig.submit(&[iotlb_pages(1, 0x20_0000, 0)]), "the queue goes on where it was");
    assert_eq!(rig.listener.reach(NVME).len(), 1);
    // A head in the middle of a descriptor, and a queue that only scalable mode has.
    let head = State { queue_head: 0x10, ..saved.clone() };
    assert_eq!(rig.unit.restore(head), Err(RestoreError::QueueHead { head: 0x10, len: 0x1000 }));
    let legacy = Rig::new();
    let wide = RestoreError::Register { register: "IQA", value: saved.queue_address.into_bits() };
    assert_eq!(legacy.unit.restore(saved), Err(wide));
}
