//! The register file and the command state machine.

use vtd::spec::registers::{ContextCommand, EventControl, InvalidateAddress, IotlbInvalidate, offset};
use vtd::{Msi, SpaceKey, UnitConfig, UnitId};

use crate::rig::{Event, MEMORY, NIC, NVME, QUEUE, Rig, map, wait_interrupt, wait_status};

#[test]
fn a5_every_offset_and_size_is_defined() {
    let rig = Rig::new();
    let mut bytes = vec![0; vtd::REGISTER_WINDOW as usize + 32];
    for at in (0..vtd::REGISTER_WINDOW as usize).step_by(8) {
        rig.unit.read(at as u64, &mut bytes[at..at + 8]);
    }
    for at in 0..vtd::REGISTER_WINDOW + 16 {
        for size in 0..=16usize {
            let mut data = vec![0xaa; size];
            rig.unit.read(at, &mut data);
            let (there, beyond) = data.split_at(size.min(8));
            assert_eq!(there, &bytes[at as usize..at as usize + there.len()], "a read of {size} at {at:#x}");
            assert!(beyond.iter().all(|byte| *byte == 0), "a read of {size} at {at:#x}");
            if !(matches!(size, 4 | 8) && at.is_multiple_of(size as u64)) {
                rig.unit.write(at, &vec![0xff; size]);
            }
        }
    }
    let mut data = [0xaa; 8];
    rig.unit.read(u64::MAX - 3, &mut data);
    assert_eq!(data, [0; 8]);
    // The undefined writes changed nothing.
    assert_eq!(rig.unit.save(), Rig::new().unit.save());
    assert_eq!(rig.read64(offset::RTADDR), 0);
}

#[test]
fn a5_any_write_to_any_place_is_survived() {
    let rig = Rig::new();
    for value in [u64::MAX, 0, 0x5555_5555_5555_5555, 0xc000_0000_c000_0000] {
        for at in (0..vtd::REGISTER_WINDOW).step_by(4) {
            rig.write32(at, value as u32);
            rig.write64(at & !7, value);
        }
    }
    assert_eq!(rig.read32(offset::VER), 0x10);
    assert_eq!(rig.read64(offset::CAP), rig.unit.config().capability().into_bits());
    assert_eq!(rig.read64(offset::ECAP), rig.unit.config().extended_capability().into_bits());
}

#[test]
fn a5_masks() {
    // Offset, size, what can be written, what reads back at first.
    let cases = [
        (offset::VER, 4, 0, 0x10),
        (offset::GCMD, 4, 0, 0),
        (offset::RTADDR, 8, !0x3ff, 0),
        (offset::FECTL, 4, 0x8000_0000, 0x8000_0000),
        (offset::FEDATA, 4, 0xffff, 0),
        (offset::FEADDR, 4, 0xffff_fffc, 0),
        (offset::FEUADDR, 4, 0xffff_ffff, 0),
        (offset::IQH, 8, 0, 0),
        (offset::IQT, 8, 0x7_fff0, 0),
        (offset::IQA, 8, !0xff8 & ((1 << 48) - 1), 0),
        (offset::IECTL, 4, 0x8000_0000, 0x8000_0000),
        (offset::IEDATA, 4, 0xffff, 0),
        (offset::IEADDR, 4, 0xffff_fffc, 0),
        (offset::IEUADDR, 4, 0xffff_ffff, 0),
        (offset::IQERCD, 8, 0, 0),
        (offset::IRTA, 8, 0, 0),
        (offset::IVA, 8, 0, 0),
        (0x58, 8, 0, 0),
        (0x64, 4, 0, 0),
    ];
    for (at, size, writable, initial) in cases {
        let rig = Rig::new();
        let read = || if size == 8 { rig.read64(at) } else { u64::from(rig.read32(at)) };
        let write = |value: u64| if size == 8 { rig.write64(at, value) } else { rig.write32(at, value as u32) };
        assert_eq!(read(), initial, "{at:#x} at first");
        // Bits that start a command or clear themselves have their own tests.
        write(u64::MAX);
        assert_eq!(read(), writable | initial & !writable, "{at:#x} with ones");
        write(0);
        assert_eq!(read(), initial & !writable, "{at:#x} with zeros");
    }
}

#[test]
fn a5_halves_of_a_64_bit_register_are_written_apart() {
    let rig = Rig::new();
    rig.write32(offset::RTADDR + 4, 0x12);
    rig.write32(offset::RTADDR, 0x3456_7000);
    assert_eq!(rig.read64(offset::RTADDR), 0x12_3456_7000);
    assert_eq!(rig.read32(offset::RTADDR + 4), 0x12);
}

#[test]
fn a5_xen_writes_both_halves_of_the_event_address_at_once() {
    let rig = Rig::new();
    rig.write64(offset::FEADDR, 0x1_fee0_1004);
    assert_eq!((rig.read32(offset::FEADDR), rig.read32(offset::FEUADDR)), (0xfee0_1004, 1));
}

#[test]
fn a5_the_root_table_address_reads_back_its_mode() {
    let rig = Rig::new();
    rig.write64(offset::RTADDR, 0x7400);
    assert_eq!(rig.read64(offset::RTADDR), 0x7400);
}

#[test]
fn a5_windows_enables_the_queue_with_a_tail_that_is_not_0() {
    let mut rig = Rig::new();
    rig.push(&[wait_status(5)]);
    rig.write64(offset::IQA, QUEUE);
    rig.write64(offset::IQT, 16);
    assert_eq!(rig.load(crate::rig::STATUS) as u32, 0);
    rig.command(|on| on.with_queued_invalidation(true));
    assert!(rig.status().queued_invalidation());
    assert_eq!(rig.load(crate::rig::STATUS) as u32, 5);
    assert_eq!(rig.read64(offset::IQH), 16);
    rig.command(|on| on.with_queued_invalidation(false));
    assert_eq!(rig.read64(offset::IQH), 0);
}

#[test]
fn a5_the_queue_can_be_enabled_with_address_0() {
    let rig = Rig::new();
    rig.command(|on| on.with_queued_invalidation(true));
    assert!(rig.status().queued_invalidation());
}

#[test]
fn a5_several_commands_in_one_write() {
    let mut rig = Rig::new();
    let root = rig.table();
    rig.pages(root, 0x4000, 0x8000, 1);
    let space = rig.set_paged(NVME, root, 48, 3);
    rig.unit.add_requester(NVME).unwrap();
    rig.write64(offset::RTADDR, rig.root_table);
    rig.write64(offset::IQA, QUEUE);
    rig.command(|on| on.with_root_table_pointer(true).with_translation(true).with_queued_invalidation(true));
    let status = rig.status();
    assert!(status.root_table_pointer() && status.translation() && status.queued_invalidation());
    assert_eq!(rig.listener.attached(NVME), Some(space));
}

#[test]
fn a5_commands_that_are_not_offered_change_nothing() {
    let rig = Rig::new();
    rig.command(|on| {
        on.with_interrupt_remapping(true)
            .with_interrupt_table_pointer(true)
            .with_compatibility_format(true)
            .with_advanced_fault_log(true)
            .with_fault_log_pointer(true)
            .with_write_buffer_flush(true)
    });
    assert_eq!(rig.status().into_bits(), 0);
}

#[test]
fn a6_a_completion_event_follows_its_mask() {
    let mut rig = Rig::new();
    rig.enable_queue();
    rig.write32(offset::IEDATA, 0x41);
    rig.write64(offset::IEADDR, 0x200_fee0_0000);
    let message = Msi { address: 0x200_fee0_0000, data: 0x41 };
    rig.push(&[wait_interrupt()]);
    rig.ring();
    assert_eq!(rig.messages.take(), []);
    assert!(EventControl::from_bits(rig.read32(offset::IECTL)).pending());
    assert_eq!(rig.read32(offset::ICS), 1);
    rig.write32(offset::IECTL, 0);
    assert_eq!(rig.messages.take(), [message]);
    assert_eq!(rig.read32(offset::IECTL), 0);
    // Until IWC is cleared, the next completions are covered by it.
    rig.push(&[wait_interrupt()]);
    rig.ring();
    assert_eq!(rig.messages.take(), []);
    rig.write32(offset::ICS, 1);
    assert_eq!(rig.read32(offset::ICS), 0);
    rig.push(&[wait_interrupt()]);
    rig.ring();
    assert_eq!(rig.messages.take(), [message]);
}

/// The addresses of messages that are no interrupts; the last two are beyond memory.
const NO_INTERRUPTS: [u64; 5] = [0x1000, 0, MEMORY - 4, 0xfed0_0000, 0x1_fee0_0000];

#[test]
fn a6_a_completion_event_outside_the_interrupt_range_is_a_write_to_memory() {
    for address in NO_INTERRUPTS {
        let mut rig = Rig::new();
        rig.enable_queue();
        let around = address & !7;
        if around < MEMORY {
            rig.store(around, 0x5555_5555_5555_5555);
        }
        rig.write32(offset::IEDATA, 0x41);
        rig.write64(offset::IEADDR, address);
        rig.write32(offset::IECTL, 0);
        rig.push(&[wait_interrupt()]);
        rig.ring();
        assert_eq!((rig.messages.take(), rig.read32(offset::ICS)), (vec![], 1), "{address:#x}");
        if around < MEMORY {
            let shift = 8 * (address - around);
            assert_eq!(rig.load(around), (0x5555_5555_5555_5555 & !(0xffff_ffff << shift)) | 0x41 << shift);
        }
    }
}

#[test]
fn a8_a_fault_event_outside_the_interrupt_range_is_a_write_to_memory() {
    for address in NO_INTERRUPTS {
        let (mut rig, _) = Rig::with_nvme();
        rig.write32(offset::FEDATA, 0x41);
        rig.write32(offset::FEADDR, address as u32);
        rig.write32(offset::FEUADDR, (address >> 32) as u32);
        rig.push(&[(0, 0)]);
        rig.ring();
        // Held back by the mask, and sent by the write that unmasks it.
        rig.write32(offset::FECTL, 0);
        assert_eq!(rig.messages.take(), []);
        if address < MEMORY {
            assert_eq!(rig.load(address & !7) >> (8 * (address & 7)) & 0xffff_ffff, 0x41, "{address:#x}");
        }
    }
}

#[test]
fn a6_a_completion_event_anywhere_in_the_interrupt_range_is_an_interrupt() {
    for address in [0xfee0_0000, 0xfeef_fffc, 0x100_fee0_1008, 0xffff_ff00_feef_f00c] {
        let mut rig = Rig::new();
        rig.enable_queue();
        rig.write64(offset::IEADDR, address);
        rig.write32(offset::IECTL, 0);
        rig.push(&[wait_interrupt()]);
        rig.ring();
        assert_eq!(rig.messages.take(), [Msi { address, data: 0 }]);
    }
}

#[test]
fn a6_a_completion_that_was_acknowledged_under_the_mask_sends_no_message() {
    let mut rig = Rig::new();
    rig.enable_queue();
    rig.push(&[wait_interrupt()]);
    rig.ring();
    rig.write32(offset::ICS, 1);
    rig.write32(offset::IECTL, 0);
    assert_eq!(rig.messages.take(), []);
}

fn context_command(rig: &Rig, granularity: u8, domain: u16) -> ContextCommand {
    let command = ContextCommand::new().with_granularity(granularity).with_domain(domain).with_source(NVME.sid.0);
    rig.write64(offset::CCMD, command.with_invalidate(true).into_bits());
    ContextCommand::from_bits(rig.read64(offset::CCMD))
}

fn iotlb_command(rig: &Rig, granularity: u8, domain: u16) -> IotlbInvalidate {
    let command = IotlbInvalidate::new().with_granularity(granularity).with_domain(domain).with_invalidate(true);
    rig.write64(offset::IOTLB, command.into_bits());
    IotlbInvalidate::from_bits(rig.read64(offset::IOTLB))
}

#[test]
fn a7_register_invalidations_do_what_descriptors_do() {
    let mut rig = Rig::new();
    rig.enable_translation();
    rig.unit.add_requester(NVME).unwrap();
    let root = rig.table();
    for (granularity, domain) in [(1, 0), (2, 0), (3, 0)] {
        rig.clear_context(NVME);
        context_command(&rig, 1, 0);
        assert_eq!(rig.listener.attached(NVME), Some(SpaceKey::Blocked));
        let space = rig.set_paged(NVME, root, 48, 9);
        let done = context_command(&rig, granularity, domain);
        assert_eq!((done.invalidate(), done.actual()), (false, granularity));
        assert_eq!(rig.listener.attached(NVME), Some(space));
    }
    rig.listener.take_events();
    for (granularity, domain, page) in [(1, 0, 1u64), (2, 9, 2), (3, 9, 3)] {
        rig.pages(root, page << 12, 0x80_0000, 1);
        rig.write64(offset::IVA, InvalidateAddress::new().with_page(page).into_bits());
        let done = iotlb_command(&rig, granularity, domain);
        assert_eq!((done.invalidate(), done.actual()), (false, granularity));
        assert_eq!(rig.listener.take_ops(), [map(page << 12, 0x80_0000, 0x1000)]);
    }
    assert_eq!(rig.unit.stats().register_invalidations, 9);
}

#[test]
fn a7_register_invalidations_are_refused_while_the_queue_is_on() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x1000, 0x80_0000, 1);
    let done = iotlb_command(&rig, 1, 0);
    assert_eq!((done.invalidate(), done.actual()), (false, 0));
    rig.clear_context(NVME);
    let done = context_command(&rig, 1, 0);
    assert_eq!((done.invalidate(), done.actual()), (false, 0));
    assert_eq!(rig.listener.take_events(), []);
    assert_eq!(rig.unit.stats().register_invalidations, 0);
}

#[test]
fn a7_reserved_granularity_and_a_mask_beyond_mamv_are_refused() {
    let rig = Rig::new();
    assert_eq!(context_command(&rig, 0, 0).actual(), 0);
    assert_eq!(iotlb_command(&rig, 0, 0).actual(), 0);
    rig.write64(offset::IVA, InvalidateAddress::new().with_address_mask(19).into_bits());
    assert_eq!(iotlb_command(&rig, 3, 0).actual(), 0);
    assert_eq!(rig.unit.stats().register_invalidations, 0);
}

#[test]
fn a7_a_command_needs_its_upper_half() {
    let rig = Rig::new();
    rig.write32(offset::CCMD, 0xffff_ffff);
    assert_eq!(rig.unit.stats().register_invalidations, 0);
    rig.write32(offset::CCMD + 4, 0xa000_0000);
    assert_eq!(rig.unit.stats().register_invalidations, 1);
}

#[test]
fn a11_spaces_follow_translation_on_and_off() {
    let mut rig = Rig::new();
    rig.unit.add_requester(NVME).unwrap();
    rig.unit.add_requester(NIC).unwrap();
    let root = rig.table();
    rig.pages(root, 0x4000, 0x8000, 1);
    let space = rig.set_paged(NVME, root, 48, 3);
    rig.set_pass_through(NIC, 4);
    assert_eq!(rig.listener.attached(NVME), Some(SpaceKey::Identity));
    rig.listener.take_events();
    rig.enable_translation();
    // Pass-through stays where it is: it is not touched.
    let live = vec![crate::rig::mapping(0x4000, 0x8000, 0x1000, vtd::Perm::ReadWrite)];
    assert_eq!(rig.listener.take_events(), [Event::Attach(NVME, space, live)]);
    rig.command(|on| on.with_translation(false));
    assert_eq!(rig.listener.take_events(), [Event::Attach(NVME, SpaceKey::Identity, vec![])]);
    assert!(rig.unit.spaces_snapshot().is_empty());
}

#[test]
fn a11_translation_that_comes_on_again_finds_the_tables_as_they_are_then() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x4000, 0x8000, 2);
    assert!(rig.submit(&[crate::rig::iotlb_domain(1)]));
    let space = rig.listener.attached(NVME).unwrap();
    rig.command(|on| on.with_translation(false));
    assert_eq!(rig.listener.attached(NVME), Some(SpaceKey::Identity));
    assert!(rig.unit.spaces_snapshot().is_empty());
    // Nothing is invalidated: a driver need not while translation is off.
    rig.clear(root, 0x5000, 1);
    rig.pages(root, 0x9000, 0xa000, 1);
    rig.listener.take_events();
    rig.enable_translation();
    let live = [(0x4000, 0x8000), (0x9000, 0xa000)]
        .map(|(iova, gpa)| crate::rig::mapping(iova, gpa, 0x1000, vtd::Perm::ReadWrite))
        .to_vec();
    assert_eq!(rig.listener.take_events(), [Event::Attach(NVME, space, live)]);
}

#[test]
fn a11_another_root_table_under_translation_changes_no_mapping_if_the_tables_are_equal() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x4000, 0x8000, 3);
    assert!(rig.submit(&[crate::rig::iotlb_domain(1)]));
    rig.listener.take_events();
    // kdump: the new kernel copies the root and context tables, and gives the copy while translation is on.
    let (old, copy) = (rig.root_table, rig.table());
    for at in (0..4096).step_by(8) {
        rig.store(copy + at, rig.load(old + at));
    }
    rig.root_table = copy;
    rig.set_root();
    assert_eq!(rig.listener.take_events(), []);
    // And with a page less, just that page goes.
    rig.clear(root, 0x5000, 1);
    rig.set_root();
    assert_eq!(rig.listener.take_ops(), [crate::rig::unmap(0x5000, 0x5fff)]);
}

#[test]
fn a11_a_written_root_table_address_is_not_in_use_before_it_is_set() {
    let (rig, _) = Rig::with_nvme();
    let before = rig.listener.attached(NVME);
    rig.write64(offset::RTADDR, 0x700_0000);
    assert!(rig.unit.read_attached(NVME) == before);
    rig.command(|on| on.with_root_table_pointer(true));
    assert_eq!(rig.listener.attached(NVME), Some(SpaceKey::Blocked));
}

trait ReadAttached {
    fn read_attached(&self, requester: vtd::Requester) -> Option<SpaceKey>;
}

impl ReadAttached for vtd::Unit<crate::rig::Memory> {
    fn read_attached(&self, requester: vtd::Requester) -> Option<SpaceKey> {
        self.attachments().into_iter().find(|(each, _)| *each == requester).map(|(_, key)| key)
    }
}

#[test]
fn a11_reset_returns_everything_to_power_on() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x4000, 0x8000, 3);
    assert!(rig.submit(&[crate::rig::iotlb_domain(1)]));
    rig.write32(offset::FEDATA, 0x77);
    rig.write32(offset::FECTL, 0);
    rig.unit.reset();
    assert_eq!(rig.unit.save(), Rig::new().unit.save());
    assert_eq!(rig.listener.attached(NVME), Some(SpaceKey::Identity));
    assert!(rig.unit.spaces_snapshot().is_empty());
}

#[test]
fn a14_a_restored_unit_attaches_to_the_guests_tables() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x4000, 0x8000, 3);
    let saved = rig.unit.save();
    let other = Rig::with(UnitConfig::new(UnitId(0), 48));
    let mut copy = vec![0; 0x40_0000];
    vm_memory::Bytes::read_slice(&rig.memory, &mut copy, vm_memory::GuestAddress(0)).unwrap();
    vm_memory::Bytes::write_slice(&other.memory, &copy, vm_memory::GuestAddress(0)).unwrap();
    other.unit.add_requester(NVME).unwrap();
    other.unit.restore(saved.clone()).unwrap();
    // Here its pages are not told yet.
    assert_eq!(vtd::State { spaces: vec![], ..other.unit.save() }, saved);
    assert_eq!(other.listener.attached(NVME), rig.listener.attached(NVME));
    assert_eq!(other.listener.reach(NVME), [crate::rig::mapping(0x4000, 0x8000, 0x3000, vtd::Perm::ReadWrite)]);
}

#[test]
fn a6_a_queue_error_that_is_cleared_by_a_write_of_eight_bytes_lets_the_queue_go_on() {
    let (mut rig, _) = Rig::with_nvme();
    rig.push(&[(0xf, 0), wait_status(7)]);
    rig.ring();
    let stopped = rig.read64(offset::IQH);
    let good = wait_status(6);
    rig.store(QUEUE + stopped, good.0);
    rig.store(QUEUE + stopped + 8, good.1);
    // The lower half of the pair is reserved: no bit of it clears anything.
    rig.write64(0x30, 0x10);
    assert_eq!(rig.read64(offset::IQH), stopped);
    rig.write64(0x30, 0x10 << 32);
    assert_eq!(rig.load(crate::rig::STATUS) as u32, 7);
    assert_eq!(rig.read64(offset::IQH), rig.read64(offset::IQT));
}

#[test]
fn a5_an_access_of_eight_bytes_that_is_not_aligned_serves_no_record() {
    let (rig, _) = Rig::with_nvme();
    let endpoint = rig.unit.endpoint(NVME);
    endpoint.read(vtd::Iova(0x5000), &mut [0]).unwrap_err();
    let records = rig.fault_records();
    assert_eq!(records.len(), 1);
    for at in (offset::FRCD + 4..offset::FRCD + 16).step_by(4) {
        if !at.is_multiple_of(8) {
            rig.write64(at, u64::MAX);
        }
    }
    assert_eq!(rig.fault_records(), records);
    // The lower half of a record, and its source and reason, cannot be written.
    rig.write64(offset::FRCD, u64::MAX);
    rig.write64(offset::FRCD + 8, u64::MAX >> 1);
    assert_eq!(rig.fault_records(), records);
    rig.write64(offset::FRCD + 8, 1 << 63);
    assert_eq!(rig.fault_records(), []);
}
