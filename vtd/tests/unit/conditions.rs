//! Fault conditions, event messages and what is restored: register by register.

use std::sync::{Arc, Mutex, OnceLock, Weak};

use vtd::spec::fault::{FaultReason, FaultRecordHigh, InterruptFaultReason};
use vtd::spec::invalidation::QueueError;
use vtd::spec::registers::{
    ContextCommand, EventControl, FaultStatus, Global, InterruptTableAddress, InvalidateAddress, IotlbInvalidate,
    PageRequestAddress, PageRequestStatus, QueueAddress, QueueErrorRecord, RootTableAddress, offset,
};
use vtd::{
    Access, DmaError, EventRegisters, FaultRecord, Gpa, Iova, Msi, MsiSink, PageRequestRegisters, Perm, Stages, State,
    StateVersion, Unit, UnitConfig, UnitId,
};

use crate::rig::{
    Listener, MEMORY, Memory, NVME, QUEUE, Rig, STATUS, context_device, iotlb_global, iotlb_pages, map, requester,
    wait_interrupt, wait_status,
};

fn status(rig: &Rig) -> FaultStatus {
    FaultStatus::from_bits(rig.read32(offset::FSTS))
}

/// A request of a function that the tables do not name, so that it is a fault.
fn fault(rig: &Rig, device: u8) {
    let endpoint = rig.unit.endpoint(requester(0, device, 0));
    assert!(endpoint.enter().translate(Iova(0x1000), Access::Read).is_err());
}

fn served(rig: &Rig, record: u64) {
    rig.write32(offset::FRCD + 16 * record + 12, 1 << 31);
}

fn is_pending(rig: &Rig) -> bool {
    EventControl::from_bits(rig.read32(offset::FECTL)).pending()
}

#[test]
fn a8_fri_names_the_first_record_until_all_are_served() {
    let rig = Rig::translating();
    (4..7).for_each(|device| fault(&rig, device));
    assert_eq!((rig.fault_records().len(), status(&rig).record()), (3, 0));
    (0..3).for_each(|record| served(&rig, record));
    (4..6).for_each(|device| fault(&rig, device));
    assert_eq!(status(&rig).record(), 3);
}

#[test]
fn a8_records_are_used_in_turn_and_one_that_is_full_is_an_overflow_even_if_others_are_not() {
    let rig = Rig::translating();
    (4..12).for_each(|device| fault(&rig, device));
    (0..8).filter(|record| *record != 1).for_each(|record| served(&rig, record));
    fault(&rig, 12);
    assert_eq!(rig.fault_records().iter().map(|record| record.0).collect::<Vec<_>>(), [0, 1]);
    fault(&rig, 13);
    assert_eq!((rig.fault_records().len(), status(&rig).overflow(), status(&rig).pending()), (2, true, true));
    assert_eq!(rig.unit.stats().faults_dropped, 1);
}

#[test]
fn a8_each_record_is_served_by_its_own_bit_alone() {
    let rig = Rig::translating();
    (4..7).for_each(|device| fault(&rig, device));
    // Neither the other half, nor the other bits.
    rig.write32(offset::FRCD + 16 + 8, u32::MAX);
    rig.write32(offset::FRCD + 16 + 12, !(1 << 31));
    rig.write64(offset::FRCD + 16, u64::MAX);
    assert_eq!(rig.fault_records().len(), 3);
    rig.write64(offset::FRCD + 16 + 8, 1 << 63);
    assert_eq!(rig.fault_records().iter().map(|record| record.0).collect::<Vec<_>>(), [0, 2]);
}

#[test]
fn a8_a_read_of_nothing_is_recorded_as_a_read() {
    let (rig, _) = Rig::with_nvme();
    let endpoint = rig.unit.endpoint(NVME);
    assert!(endpoint.enter().translate(Iova(0x1000), Access::ZeroLengthRead).is_err());
    assert_eq!(rig.fault_records(), [(0, NVME.sid, 6, 0x1000, true)]);
}

#[test]
fn a8_fpd_silences_what_is_found_at_the_context_entry_or_behind_it() {
    for reason in FaultReason::ALL {
        let legacy = matches!(reason.code(), 0x1 | 0x8 | 0x9 | 0xa);
        let unqualified = legacy || matches!(reason.code(), 0x30..=0x33 | 0x38..=0x3a | 0x40 | 0x50 | 0x58);
        assert_eq!(reason.qualified(), !unqualified, "{reason:?}");
    }
    for reason in InterruptFaultReason::ALL {
        assert_eq!(reason.qualified(), matches!(reason.code(), 0x22 | 0x24 | 0x26..=0x28), "{reason:?}");
    }
}

#[test]
fn a8_a_write_of_fsts_clears_what_it_names_and_nothing_else() {
    // PFO, IQE, ICE and ITE.
    const BITS: [u32; 4] = [1 << 0, 1 << 4, 1 << 5, 1 << 6];
    let all = BITS.iter().sum::<u32>();
    for (index, bit) in BITS.into_iter().enumerate() {
        let rig = Rig::new();
        let pending = EventControl::new().with_masked(true).with_pending(true);
        let event = EventRegisters { control: pending, ..EventRegisters::default() };
        let fault_status = FaultStatus::from_bits(all | 5 << 8);
        let state = State { fault_status, fault_event: event, ..State::default() };
        rig.unit.restore(state.clone()).unwrap();
        assert_eq!(rig.read32(offset::FSTS), all | 5 << 8);
        // What is read-only is not cleared, and reserved bits are nothing.
        rig.write32(offset::FSTS, !all);
        assert_eq!(rig.read32(offset::FSTS), all | 5 << 8);
        if index % 2 == 0 {
            rig.write32(offset::FSTS, bit)
        } else {
            rig.write64(0x30, u64::from(bit) << 32)
        };
        assert_eq!(rig.read32(offset::FSTS), all & !bit | 5 << 8, "{bit:#x}");
        // Any of the others alone is a condition of the event; without one it is withdrawn.
        for other in BITS.into_iter().filter(|other| *other != bit) {
            rig.unit.restore(state.clone()).unwrap();
            rig.write32(offset::FSTS, all & !other);
            assert!(is_pending(&rig), "{other:#x} is there");
            rig.write32(offset::FSTS, other);
            assert!(!is_pending(&rig));
        }
    }
}

#[test]
fn a8_a_masked_event_stays_while_a_queue_error_or_an_overflow_does() {
    let (mut rig, _) = Rig::with_nvme();
    rig.write32(offset::FEADDR, 0xfee0_0000);
    rig.push(&[(0, 0)]);
    rig.ring();
    fault(&rig, 4);
    served(&rig, 0);
    assert!(is_pending(&rig), "IQE is there");
    rig.write32(offset::FECTL, 1 << 31);
    assert!(is_pending(&rig), "a mask that is set again");
    rig.write32(offset::FECTL, 0);
    assert_eq!(rig.messages.take().len(), 1);
    assert!(!is_pending(&rig));

    let rig = Rig::translating();
    (4..13).for_each(|device| fault(&rig, device));
    (0..8).for_each(|record| served(&rig, record));
    assert!(is_pending(&rig) && status(&rig).overflow());
    rig.write32(offset::FSTS, 1);
    assert!(!is_pending(&rig));
}

#[test]
fn a8_a_second_condition_of_any_kind_raises_no_second_event() {
    let (mut rig, _) = Rig::with_nvme();
    rig.write32(offset::FEADDR, 0xfee0_0000);
    rig.write32(offset::FECTL, 0);
    fault(&rig, 4);
    assert_eq!(rig.messages.take().len(), 1);
    rig.push(&[(0, 0)]);
    rig.ring();
    assert_eq!((rig.messages.take(), status(&rig).queue_error()), (vec![], true));
    served(&rig, 0);
    fault(&rig, 5);
    assert_eq!(rig.messages.take(), [], "IQE is there still");
}

#[test]
fn a5_event_registers_are_written_in_pairs_too() {
    for (control, address) in [(offset::FECTL, offset::FEADDR), (offset::IECTL, offset::IEADDR)] {
        let rig = Rig::new();
        rig.write64(control, 0x1234_8765 << 32 | 1 << 31);
        assert_eq!((rig.read32(control), rig.read32(control + 4)), (1 << 31, 0x8765));
        rig.write32(control, 0);
        assert_eq!((rig.read32(control), rig.read32(control + 4)), (0, 0x8765), "the data stays");
        rig.write32(control + 4, 0x11);
        assert_eq!((rig.read32(control), rig.read32(control + 4)), (0, 0x11), "the control stays");
        rig.write64(address, 0x12_0000_3007);
        assert_eq!(rig.read64(address), 0x12_0000_3004);
        rig.write32(address, 0xfee0_0000);
        assert_eq!(rig.read64(address), 0x12_fee0_0000);
        rig.write32(address + 4, 0);
        assert_eq!(rig.read64(address), 0xfee0_0000);
    }
}

#[test]
fn a5_a_completion_is_acknowledged_by_its_bit_alone() {
    let mut rig = Rig::new();
    rig.enable_queue();
    rig.push(&[wait_interrupt()]);
    rig.ring();
    for value in [0, !1] {
        rig.write32(offset::ICS, value);
        assert_eq!(rig.read32(offset::ICS), 1);
    }
    rig.write64(offset::ICS - 4, u64::from(u32::MAX));
    assert_eq!(rig.read32(offset::ICS), 1, "the other half");
    assert!(EventControl::from_bits(rig.read32(offset::IECTL)).pending());
    rig.write64(offset::ICS - 4, 1 << 32);
    assert_eq!((rig.read32(offset::ICS), rig.read32(offset::IECTL)), (0, 1 << 31));
}

#[test]
fn a7_commands_begin_with_their_upper_half_and_show_what_was_asked() {
    let rig = Rig::new();
    let context = ContextCommand::new().with_domain(!0).with_source(!0).with_function_mask(3).with_granularity(3);
    let iotlb = IotlbInvalidate::new().with_domain(!0).with_granularity(3).with_drain_reads(true);
    let iotlb = iotlb.with_drain_writes(true).into_bits();
    for (at, writable) in [(offset::CCMD, context.into_bits()), (offset::IOTLB, iotlb)] {
        rig.write64(at, !(1 << 63));
        assert_eq!(rig.read64(at), writable, "{at:#x}");
        rig.write64(at, 0);
        assert_eq!(rig.read64(at), 0);
    }
    assert_eq!(rig.unit.stats().register_invalidations, 0);
    // A command that was saved before it was carried out: the lower half does not start it.
    let state = State {
        context_command: ContextCommand::new().with_granularity(1).with_invalidate(true),
        iotlb_invalidate: IotlbInvalidate::new().with_granularity(1).with_invalidate(true),
        ..State::default()
    };
    rig.unit.restore(state).unwrap();
    rig.write32(offset::CCMD, 0);
    rig.write32(offset::IOTLB, 0);
    assert_eq!(rig.unit.stats().register_invalidations, 0);
    rig.write32(
        offset::IOTLB + 4,
        (IotlbInvalidate::new().with_granularity(1).with_invalidate(true).into_bits() >> 32) as u32,
    );
    assert_eq!(rig.unit.stats().register_invalidations, 1);
    assert_eq!(IotlbInvalidate::from_bits(rig.read64(offset::IOTLB)).actual(), 1);
}

/// Reads the head whenever an interrupt comes.
#[derive(Default)]
struct HeadAt {
    unit: OnceLock<Weak<Unit<Memory>>>,
    heads: Mutex<Vec<(Msi, u64, u64)>>,
}

impl MsiSink for HeadAt {
    fn signal(&self, msi: Msi) {
        let Some(unit) = self.unit.get().and_then(Weak::upgrade) else { return };
        let read = |at: u64| {
            let mut data = [0; 8];
            unit.read(at, &mut data);
            u64::from_le_bytes(data)
        };
        self.heads.lock().unwrap().push((msi, read(offset::IQH), read(offset::ICS - 4) >> 32));
    }
}

#[test]
fn a6_the_head_is_past_a_wait_when_the_wait_is_complete() {
    let mut rig = Rig::new();
    let sink = Arc::new(HeadAt::default());
    let config = UnitConfig::new(UnitId(0), 48);
    rig.unit = Unit::new(config, rig.memory.clone(), Arc::new(Listener::default()), sink.clone()).unwrap();
    sink.unit.set(Arc::downgrade(&rig.unit)).unwrap();
    rig.enable_queue();
    rig.write32(offset::IEADDR, 0xfee0_0000);
    rig.write32(offset::IECTL, 0);
    rig.push(&[wait_status(1), wait_interrupt(), wait_status(2), iotlb_global()]);
    rig.ring();
    assert_eq!(*sink.heads.lock().unwrap(), [(Msi { address: 0xfee0_0000, data: 0 }, 0x20, 1)]);
    assert_eq!((rig.read64(offset::IQH), rig.load(STATUS) as u32), (0x40, 2));
}

#[test]
fn a6_a_wait_does_what_it_is_asked_and_nothing_else() {
    let mut rig = Rig::new();
    rig.enable_queue();
    // An interrupt without a status: nothing is written, also not at address 0.
    [0, STATUS].iter().for_each(|at| rig.store(*at, 7));
    rig.push(&[wait_interrupt()]);
    rig.ring();
    assert_eq!((rig.load(0), rig.load(STATUS), rig.read32(offset::ICS)), (7, 7, 1));
    rig.write32(offset::ICS, 1);
    // A status without an interrupt.
    rig.push(&[wait_status(9)]);
    rig.ring();
    assert_eq!((rig.load(STATUS), rig.read32(offset::ICS)), (9, 0));
    // Both.
    rig.push(&[(wait_status(10).0 | wait_interrupt().0, wait_status(10).1)]);
    rig.ring();
    assert_eq!((rig.load(STATUS), rig.read32(offset::ICS)), (10, 1));
}

#[test]
fn a6_the_queue_that_was_enabled_is_the_one_in_use() {
    let mut rig = Rig::new();
    rig.enable_queue();
    rig.write64(offset::IQA, MEMORY - 0x1000);
    rig.push(&[wait_status(3)]);
    rig.ring();
    assert_eq!((rig.load(STATUS), rig.read64(offset::IQH)), (3, 0x10));
    assert_eq!(rig.read64(offset::IQA), MEMORY - 0x1000);
    // A command that leaves the queue on does not start it again.
    rig.command(|on| on.with_translation(false));
    assert_eq!((rig.read64(offset::IQH), status(&rig).queue_error()), (0x10, false));
}

#[test]
fn a6_the_largest_mask_reaches_its_last_page() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x7fff_f000, 0x80_0000, 1);
    rig.pages(root, 0x8000_0000, 0x80_0000, 1);
    assert!(rig.submit(&[iotlb_pages(1, 0x4000_0000, 18)]));
    assert_eq!(rig.listener.take_ops(), [map(0x7fff_f000, 0x80_0000, 0x1000)]);
}

#[test]
fn a14_descriptors_that_were_not_processed_are_when_a_unit_is_restored() {
    let mut rig = Rig::new();
    rig.push(&[iotlb_global(), wait_status(4)]);
    let queue = QueueAddress::from_bits(QUEUE);
    let state = State {
        global_status: Global::new().with_queued_invalidation(true),
        queue_address: queue,
        queue_in_use: queue,
        queue_tail: 0x20,
        ..State::default()
    };
    rig.unit.restore(state.clone()).unwrap();
    assert_eq!((rig.read64(offset::IQH), rig.load(STATUS)), (0x20, 4));
    assert_eq!(rig.unit.stats().descriptors.iotlb, 1);

    // A tail beyond the queue is one that a guest can write: the queue stops.
    rig.store(STATUS, 0);
    rig.unit.restore(State { queue_tail: 256 * 16, ..state }).unwrap();
    let record = QueueErrorRecord::from_bits(rig.read64(offset::IQERCD));
    assert_eq!((status(&rig).queue_error(), record.queue_error()), (true, QueueError::InvalidTail as u8));
    assert_eq!(rig.load(STATUS), 0);
}

#[test]
fn a11_reset_leaves_nothing_of_any_register() {
    let control = EventControl::new().with_pending(true);
    let event = EventRegisters { control, data: 0x41, address: 0xfee0_0000, upper_address: 0x100 };
    let scalable = Some(Stages::Second);
    let config = UnitConfig { interrupt_remapping: true, ..UnitConfig::new(UnitId(0), 48) };
    let rig = Rig::with(UnitConfig { scalable, device_tlb: true, page_requests: true, ..config });
    let record = FaultRecord { low: 0x1000, high: FaultRecordHigh::new().with_fault(true) };
    let state = State {
        version: StateVersion::CURRENT,
        global_status: Global::new().with_queued_invalidation(true),
        root_table_address: RootTableAddress::from_bits(0x1000),
        root_table_in_use: RootTableAddress::from_bits(0x2000),
        interrupt_table_address: InterruptTableAddress::from_bits(0x3000),
        interrupt_table_in_use: InterruptTableAddress::from_bits(0x4000),
        context_command: ContextCommand::new().with_domain(3),
        fault_status: FaultStatus::from_bits(0x11),
        fault_event: event,
        fault_records: [record; vtd::config::FAULT_RECORDS],
        next_fault_record: 3,
        queue_head: 0x10,
        queue_tail: 0x10,
        queue_address: QueueAddress::from_bits(0x5000),
        queue_in_use: QueueAddress::from_bits(0x6000),
        completion_status: 1,
        completion_event: event,
        queue_error_record: QueueErrorRecord::from_bits(2),
        invalidate_address: InvalidateAddress::from_bits(0x7000),
        iotlb_invalidate: IotlbInvalidate::new().with_domain(5),
        page_requests: PageRequestRegisters {
            head: 0x20,
            tail: 0x40,
            address: PageRequestAddress::from_bits(0x8000),
            status: PageRequestStatus::new().with_overflow(true),
            event,
        },
        performance: None,
        spaces: Vec::new(),
    };
    rig.unit.restore(state.clone()).unwrap();
    assert_eq!(rig.unit.save(), state);
    rig.unit.reset();
    assert_eq!(rig.unit.save(), State::default());
    assert_eq!(rig.unit.save(), Rig::new().unit.save());
    // Both events come up masked.
    assert_eq!((rig.read32(offset::FECTL), rig.read32(offset::IECTL)), (1 << 31, 1 << 31));
}

#[test]
fn a1_pass_through_ends_at_the_width_of_the_host() {
    let (mut rig, _) = Rig::with_nvme();
    rig.set_pass_through(NVME, 4);
    let endpoint = rig.unit.endpoint(NVME);
    let translate = |iova: u64| endpoint.enter().translate(Iova(iova), Access::Read);
    assert_eq!(translate((1 << 48) - 1), Ok(Gpa((1 << 48) - 1)));
    let error = translate(1 << 48).unwrap_err();
    assert!(matches!(error, DmaError::Fault(fault) if fault.reason == FaultReason::AddressBeyondWidth), "{error:?}");
}

#[test]
fn everything_that_happens_is_counted_once() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x4000, 0x8000, 2);
    rig.pages(root, 0x7000, 0x8000, 1);
    let before = rig.unit.stats();
    assert!(rig.submit(&[iotlb_pages(1, 0x4000, 2), context_device(1, NVME.sid, 0)]));
    let stats = rig.unit.stats();
    let descriptors = stats.descriptors;
    assert_eq!((descriptors.context_cache, descriptors.iotlb, descriptors.wait, descriptors.device_tlb), (1, 1, 1, 0));
    assert_eq!((stats.map_ops - before.map_ops, stats.unmap_ops - before.unmap_ops), (2, 0));
    assert_eq!(stats.leaves_walked - before.leaves_walked, 3);
    rig.clear(root, 0x4000, 2);
    rig.leaf(root, 48, 0x7000, 0x8000, Some(Perm::Read), 1);
    assert!(rig.submit(&[iotlb_pages(1, 0x4000, 2)]));
    let after = rig.unit.stats();
    assert_eq!((after.map_ops - stats.map_ops, after.unmap_ops - stats.unmap_ops), (1, 1));
    assert_eq!((after.faults.len(), after.queue_errors, after.maps_refused, after.bounds_exhausted), (0, 0, 0, 0));
    rig.push(&[(0, 0)]);
    rig.ring();
    assert_eq!(rig.unit.stats().queue_errors, 1);
}

#[test]
fn a_walk_for_an_audit_ends_at_the_bounds() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x4000, 0x8000, 2);
    assert!(rig.submit(&[iotlb_global()]));
    let key = rig.unit.spaces_snapshot()[0].key;
    assert_eq!(rig.unit.walk(&key).map(|runs| runs.len()), Some(1));
    let mut config = *rig.unit.config();
    config.bounds.table_entries = 1024;
    let unit = Unit::new(config, rig.memory.clone(), rig.listener.clone(), rig.messages.clone()).unwrap();
    assert_eq!(unit.walk(&key), None);
}
