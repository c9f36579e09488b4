//! The invalidation queue.

use vtd::SpaceKey;
use vtd::spec::invalidation::{IotlbLow, QueueError, WaitLow, kind};
use vtd::spec::registers::{FaultStatus, QueueAddress, QueueErrorRecord, offset};

use crate::rig::{
    NIC, QUEUE, Rig, STATUS, context_device, context_domain, context_global, iotlb_domain, iotlb_global, iotlb_pages,
    map, requester, wait_interrupt, wait_status,
};

fn queue_error(rig: &Rig) -> Option<u8> {
    FaultStatus::from_bits(rig.read32(offset::FSTS))
        .queue_error()
        .then(|| QueueErrorRecord::from_bits(rig.read64(offset::IQERCD)).queue_error())
}

#[test]
fn a6_each_iotlb_invalidation_acts_at_its_granularity() {
    let (mut rig, root) = Rig::with_nvme();
    let other = rig.table();
    rig.set_paged(NIC, other, 48, 2);
    rig.unit.add_requester(NIC).unwrap();
    let mut page = 0x10_0000;
    let mut check = |rig: &mut Rig, invalidation, expected: [bool; 3]| {
        // One page inside the range in domain 1, one outside of it, one in domain 2.
        page += 0x10_0000;
        rig.pages(root, page, 0x80_0000, 1);
        rig.pages(root, page + 0x8_0000, 0x90_0000, 1);
        rig.pages(other, page, 0xa0_0000, 1);
        rig.listener.take_ops();
        assert!(rig.submit(&[invalidation]));
        let ops = rig.listener.take_ops();
        let maps = [map(page, 0x80_0000, 4096), map(page + 0x8_0000, 0x90_0000, 4096), map(page, 0xa0_0000, 4096)];
        assert_eq!(maps.map(|op| ops.contains(&op)), expected, "{invalidation:x?}");
        assert!(rig.submit(&[iotlb_global()]));
    };
    check(&mut rig, iotlb_global(), [true, true, true]);
    check(&mut rig, iotlb_domain(1), [true, true, false]);
    check(&mut rig, iotlb_domain(2), [false, false, true]);
    check(&mut rig, iotlb_domain(3), [false, false, false]);
    check(&mut rig, iotlb_pages(1, 0x50_0000 + 0x10_0000, 4), [true, false, false]);
    check(&mut rig, iotlb_pages(2, 0x70_0000, 0), [false, false, true]);
    check(&mut rig, iotlb_pages(1, 0x80_0000, 8), [true, true, false]);
}

#[test]
fn a6_an_address_that_is_not_aligned_to_its_mask_is_rounded_down() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x10_0000, 0x80_0000, 4);
    assert!(rig.submit(&[iotlb_pages(1, 0x10_3000, 2)]));
    assert_eq!(rig.listener.take_ops(), [map(0x10_0000, 0x80_0000, 0x4000)]);
}

#[test]
fn a6_each_context_invalidation_acts_at_its_granularity() {
    let functions: Vec<_> = (0..8).map(|function| requester(2, 4, function)).collect();
    let cases: [((u64, u64), &[u8]); 7] = [
        (context_global(), &[0, 1, 2, 3, 4, 5, 6, 7]),
        (context_device(0, functions[5].sid, 0), &[5]),
        (context_device(0, functions[5].sid, 1), &[1, 5]),
        (context_device(0, functions[5].sid, 2), &[1, 3, 5, 7]),
        (context_device(0, functions[5].sid, 3), &[0, 1, 2, 3, 4, 5, 6, 7]),
        (context_domain(3), &[3]),
        (context_domain(0), &[]),
    ];
    for (invalidation, reached) in cases {
        let mut rig = Rig::translating();
        let root = rig.table();
        for (number, function) in functions.iter().enumerate() {
            rig.set_paged(*function, root, 48, number as u16 + if number == 0 { 100 } else { 0 });
            rig.unit.add_requester(*function).unwrap();
        }
        for function in &functions {
            rig.clear_context(*function);
        }
        assert!(rig.submit(&[invalidation]));
        let blocked = |number: &u8| rig.listener.attached(functions[usize::from(*number)]) == Some(SpaceKey::Blocked);
        let blocked: Vec<u8> = (0..8).filter(blocked).collect();
        assert_eq!(blocked, reached, "{invalidation:x?}");
    }
}

#[test]
fn a6_a_wait_comes_after_the_effect_of_what_is_before_it() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x1000, 0x80_0000, 2);
    rig.push(&[iotlb_pages(1, 0x1000, 0), wait_status(1), iotlb_pages(1, 0x2000, 0)]);
    rig.ring();
    // Two batches: a wait ends the first.
    let events = rig.listener.take_events();
    assert_eq!(events.len(), 2);
    assert_eq!(rig.load(STATUS) as u32, 1);
    assert_eq!(rig.read64(offset::IQH), 0x30);
}

#[test]
fn a6_a_full_queue_is_served() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x1000, 0x80_0000, 1);
    rig.push(&vec![iotlb_pages(1, 0x1000, 0); 254]);
    rig.push(&[wait_status(9)]);
    rig.ring();
    assert_eq!(rig.load(STATUS) as u32, 9);
    assert_eq!(rig.listener.take_ops(), [map(0x1000, 0x80_0000, 0x1000)]);
    // And around its end.
    assert!(rig.submit(&[iotlb_global(), iotlb_global(), iotlb_global()]));
    assert_eq!(rig.read64(offset::IQH), 0x30);
    assert_eq!(rig.unit.stats().descriptors.iotlb, 257);
}

#[test]
fn a6_a_tail_beyond_the_queue_stops_it() {
    let (mut rig, _) = Rig::with_nvme();
    rig.push(&[wait_status(3)]);
    rig.write64(offset::IQT, 256 * 16);
    assert_eq!(queue_error(&rig), Some(QueueError::InvalidTail as u8));
    assert_eq!((rig.read64(offset::IQH), rig.load(STATUS)), (0, 0));
    rig.write64(offset::IQT, 16);
    assert_eq!(rig.load(STATUS), 0, "stopped until IQE is cleared");
    rig.write32(offset::FSTS, FaultStatus::new().with_queue_error(true).into_bits());
    assert_eq!(queue_error(&rig), None);
    assert_eq!(rig.load(STATUS) as u32, 3);
}

#[test]
fn a6_larger_queues_have_larger_tails() {
    let mut rig = Rig::new();
    rig.write64(offset::IQA, QueueAddress::from_bits(QUEUE).with_size(1).into_bits());
    rig.command(|on| on.with_queued_invalidation(true));
    rig.push(&[wait_status(3)]);
    // 300 descriptors that are no descriptors after it.
    rig.write64(offset::IQT, 300 * 16);
    assert_eq!(rig.load(STATUS) as u32, 3);
    assert_eq!(queue_error(&rig), Some(QueueError::InvalidType as u8));
    assert_eq!(rig.read64(offset::IQH), 16);
}

#[test]
fn a6_bad_descriptors_stop_the_queue_with_their_reason() {
    let wait = WaitLow::new().with_kind(kind::WAIT).into_bits();
    let iotlb = IotlbLow::new().with_kind(kind::IOTLB).into_bits();
    let cases = [
        ((0, 0), QueueError::InvalidType),
        ((kind::DEVICE_TLB.into(), 0), QueueError::InvalidType),
        ((kind::INTERRUPT_ENTRY.into(), 0), QueueError::InvalidType),
        ((6, 0), QueueError::InvalidType),
        ((u64::from(kind::WAIT) | 1 << 9, 0), QueueError::InvalidType),
        ((wait | 1 << 7, 0), QueueError::Reserved),
        ((wait | 1 << 31, 0), QueueError::Reserved),
        ((wait, 1), QueueError::Reserved),
        ((iotlb, 0), QueueError::Reserved),
        ((iotlb_global().0 | 1 << 8, 0), QueueError::Reserved),
        ((iotlb_global().0 | 1 << 32, 0), QueueError::Reserved),
        ((iotlb_pages(1, 0, 0).0, 1 << 7), QueueError::Reserved),
        (iotlb_pages(1, 0, 19), QueueError::Reserved),
        ((context_global().0 | 1 << 6, 0), QueueError::Reserved),
        ((context_global().0 | 1 << 50, 0), QueueError::Reserved),
        ((context_global().0, 1), QueueError::Reserved),
        ((kind::CONTEXT_CACHE.into(), 0), QueueError::Reserved),
    ];
    for (bad, reason) in cases {
        let (mut rig, root) = Rig::with_nvme();
        rig.pages(root, 0x1000, 0x80_0000, 1);
        rig.push(&[iotlb_pages(1, 0x1000, 0), bad, wait_status(1)]);
        rig.ring();
        assert_eq!(queue_error(&rig), Some(reason as u8), "{bad:x?}");
        assert_eq!(rig.read64(offset::IQH), 0x10, "the head is at the bad one");
        assert_eq!(rig.load(STATUS), 0);
        assert_eq!(rig.listener.take_ops().len(), 1, "what came before it took effect");
        assert_eq!(rig.unit.stats().queue_errors, 1);
        // Linux replaces the bad descriptor with a wait, and clears IQE.
        let replacement = wait_status(7);
        rig.store(QUEUE + 0x10, replacement.0);
        rig.store(QUEUE + 0x18, replacement.1);
        rig.write32(offset::FSTS, FaultStatus::new().with_queue_error(true).into_bits());
        assert_eq!((queue_error(&rig), rig.load(STATUS) as u32), (None, 1));
    }
}

#[test]
fn a6_a_queue_outside_memory_is_a_fetch_error() {
    let rig = Rig::new();
    rig.write64(offset::IQA, !0xfff);
    rig.command(|on| on.with_queued_invalidation(true));
    rig.write64(offset::IQT, 0x10);
    assert_eq!(queue_error(&rig), Some(QueueError::Fetch as u8));
}

#[test]
fn a6_wide_descriptors_do_not_go_with_legacy_mode() {
    let rig = Rig::new();
    rig.write64(offset::IQA, QueueAddress::from_bits(QUEUE).with_wide(true).into_bits());
    rig.command(|on| on.with_queued_invalidation(true));
    rig.write64(offset::IQT, 0x20);
    // DW is reserved without scalable mode and does not stick, so 0x20 is the tail of 128-bit descriptors.
    assert_eq!(queue_error(&rig), Some(QueueError::InvalidType as u8));
    assert!(!QueueAddress::from_bits(rig.read64(offset::IQA)).wide());
}

#[test]
fn a6_a_wait_status_outside_memory_is_dropped() {
    let mut rig = Rig::new();
    rig.enable_queue();
    rig.push(&[(wait_status(1).0, 0xfee0_0000), (wait_status(1).0, !3), wait_interrupt()]);
    rig.ring();
    assert_eq!((queue_error(&rig), rig.read64(offset::IQH)), (None, 0x30));
    assert_eq!(rig.unit.stats().descriptors.wait, 3);
}

#[test]
fn a6_a_queue_error_raises_the_fault_event() {
    let (mut rig, _) = Rig::with_nvme();
    rig.write32(offset::FEDATA, 0x22);
    rig.write32(offset::FEADDR, 0xfee0_0000);
    rig.write32(offset::FECTL, 0);
    rig.push(&[(0, 0)]);
    rig.ring();
    assert_eq!(rig.messages.take().len(), 1);
    assert!(FaultStatus::from_bits(rig.read32(offset::FSTS)).queue_error());
}
