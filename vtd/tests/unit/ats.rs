//! Functions with a device-TLB: translation requests, translated requests, invalidations.

use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vtd::spec::ats::TranslationData;
use vtd::spec::fault::FaultRecordHigh;
use vtd::spec::invalidation::{DeviceTlbHigh, DeviceTlbLow, PasidDeviceTlbHigh, PasidDeviceTlbLow, QueueError, kind};
use vtd::spec::pasid::{ContextHigh, ContextLow};
use vtd::spec::registers::{FaultStatus, QueueErrorRecord, offset};
use vtd::spec::root_context::{ContextEntryHigh, ContextEntryLow};
use vtd::{
    AtsFunction, Completion, ConfigError, DmaError, Endpoint, Gpa, Iova, IovaRange, NoTranslation, PageResponse, Pasid,
    Perm, Requester, SourceId, Stages, Stream, TlbScope, UnitConfig, UnitId,
};

use crate::pasid_tables::{config, first_stage, nested, pass_through, second_stage, with_flags};
use crate::rig::{Memory, NIC, NVME, QUEUE, Rig, STATUS, iotlb_global, requester, wait_status};

/// What a function was told, and whether it answers.
#[derive(Default)]
struct Function {
    told: Mutex<Vec<(TlbScope, IovaRange)>>,
    silent: Mutex<bool>,
}

impl AtsFunction for Function {
    fn invalidate(&self, of: TlbScope, range: IovaRange) -> Completion {
        self.told.lock().unwrap().push((of, range));
        if *self.silent.lock().unwrap() { Completion::Never } else { Completion::Sent }
    }

    fn respond(&self, _: PageResponse) {}
}

impl Function {
    fn of(rig: &Rig, requester: Requester) -> Arc<Self> {
        let function = Arc::new(Self::default());
        let weak = Arc::downgrade(&function);
        rig.unit.set_ats_function(requester, weak);
        function
    }

    fn take(&self) -> Vec<(TlbScope, IovaRange)> {
        std::mem::take(&mut self.told.lock().unwrap())
    }
}

fn legacy() -> UnitConfig {
    UnitConfig { device_tlb: true, ..UnitConfig::new(UnitId(0), 48) }
}

fn scalable() -> UnitConfig {
    let second_stage_dirty = true;
    UnitConfig {
        device_tlb: true,
        pasid_bits: 13,
        scalable: Some(Stages::Both),
        nested: true,
        second_stage_dirty,
        ..config(48)
    }
}

/// A unit in legacy mode, with NVME in domain 1 and allowed a device-TLB; and the root of its table.
fn legacy_rig() -> (Rig, u64) {
    let mut rig = Rig::with(legacy());
    rig.enable_queue();
    rig.enable_translation();
    let root = rig.table();
    set_legacy(&mut rig, root, 1);
    (rig, root)
}

fn set_legacy(rig: &mut Rig, root: u64, translation_type: u8) {
    let low = ContextEntryLow::new().with_present(true).with_second_stage(root >> 12);
    let high = ContextEntryHigh::new().with_address_width(2).with_domain(1);
    rig.set_context(NVME, low.with_translation_type(translation_type), high);
}

/// A unit in scalable mode with PASIDs; NVME may have a device-TLB.
fn scalable_rig(config: UnitConfig) -> Rig {
    let mut rig = Rig::scalable(config);
    let context = rig.directory_address(NVME, 0) & !0xfff;
    let low = ContextLow::new().with_present(true).with_pasid(true).with_device_tlb(true);
    rig.set_scalable_context(NVME, low.with_directory(context >> 12), ContextHigh::new());
    rig
}

fn endpoint(rig: &Rig, pasid: u32) -> Endpoint<Memory> {
    rig.unit.endpoint_of(Stream { requester: NVME, pasid: Some(Pasid(pasid)) })
}

fn ask(endpoint: &Endpoint<Memory>, iova: u64) -> Result<TranslationData, NoTranslation> {
    endpoint.enter().request_translation(Iova(iova), false)
}

fn leads_to(page: u64, read: bool, write: bool) -> Result<TranslationData, NoTranslation> {
    Ok(TranslationData::new().with_page(page >> 12).with_read(read).with_write(write))
}

const NOTHING: Result<TranslationData, NoTranslation> = Ok(TranslationData::new());

/// The reason and AT of the only fault, which is taken.
fn take_fault(rig: &Rig) -> Option<(u8, u8)> {
    let at = |index: usize| offset::FRCD + 16 * index as u64;
    let found: Vec<usize> = rig.fault_records().into_iter().map(|(index, ..)| index).collect();
    assert!(found.len() <= 1);
    let index = *found.first()?;
    let high = FaultRecordHigh::from_bits(rig.read64(at(index) + 8));
    rig.write32(at(index) + 12, 1 << 31);
    Some((high.reason(), high.address_type()))
}

fn device_tlb(source: SourceId, iova: u64, large: bool) -> (u64, u64) {
    let low = DeviceTlbLow::new().with_kind(kind::DEVICE_TLB).with_source(source.0).with_max_pending(31);
    (low.into_bits(), DeviceTlbHigh::new().with_page(iova >> 12).with_large(large).into_bits())
}

fn pasid_device_tlb(source: SourceId, pasid: u32, iova: u64, large: bool, global: bool) -> (u64, u64) {
    let low = PasidDeviceTlbLow::new().with_kind(kind::PASID_DEVICE_TLB).with_source(source.0).with_pasid(pasid);
    let high = PasidDeviceTlbHigh::new().with_page(iova >> 12).with_large(large).with_global(global);
    (low.with_max_pending(31).into_bits(), high.into_bits())
}

#[test]
fn a4_device_tlbs_are_offered_when_asked_for() {
    let bits = |config: UnitConfig| config.extended_capability().into_bits();
    let (off, on) = (bits(UnitConfig { device_tlb: false, ..legacy() }), bits(legacy()));
    assert_eq!((off & (1 << 2 | 1 << 33), on ^ off), (0, 1 << 2 | 1 << 33), "DT and NWFS");
    let both = UnitConfig { page_requests: true, ..scalable() };
    assert_eq!((both.validate(), bits(both) ^ bits(scalable())), (Ok(()), 1 << 29 | 1 << 42), "PRS and PDS");
    for alone in [UnitConfig { page_requests: true, ..legacy() }, UnitConfig { device_tlb: false, ..both }] {
        assert_eq!(alone.validate(), Err(ConfigError::PageRequestsAlone));
    }
}

#[test]
fn a12_a_translation_request_is_answered_as_the_tables_are() {
    let (mut rig, root) = legacy_rig();
    rig.leaf(root, 48, 0x1000, 0x80_0000, Some(Perm::ReadWrite), 1);
    rig.leaf(root, 48, 0x2000, 0x80_1000, Some(Perm::Read), 1);
    rig.leaf(root, 48, 0x3000, 0x80_2000, Some(Perm::Write), 1);
    rig.leaf(root, 48, 0x20_0000, 0x40_0000, Some(Perm::ReadWrite), 2);
    rig.leaf(root, 48, 0x6000, 0xfee0_0000, Some(Perm::ReadWrite), 1);
    let nvme = rig.unit.endpoint(NVME);
    assert_eq!(ask(&nvme, 0x1234), leads_to(0x80_0000, true, true));
    assert_eq!(ask(&nvme, 0x2000), leads_to(0x80_1000, true, false));
    assert_eq!(ask(&nvme, 0x3000), leads_to(0x80_2000, false, true));
    let read_only = |iova: u64| nvme.enter().request_translation(Iova(iova), true);
    assert_eq!((read_only(0x1000), read_only(0x3000)), (leads_to(0x80_0000, true, false), NOTHING), "NW");
    let large = ask(&nvme, 0x2a_5000).unwrap();
    assert!(large.large() && large.read() && large.write());
    assert_eq!(large.target(), IovaRange::new(0x40_0000, 0x5f_ffff));
    for (iova, expected) in [(0x4000, NOTHING), (1 << 48, NOTHING), (u64::MAX, NOTHING)] {
        assert_eq!(ask(&nvme, iova), expected, "{iova:#x}");
    }
    assert_eq!(take_fault(&rig), None, "none of these is a fault");
    // No cache is in between.
    rig.leaf(root, 48, 0x1000, 0x90_0000, Some(Perm::ReadWrite), 1);
    assert_eq!(ask(&nvme, 0x1000), leads_to(0x90_0000, true, true));
    assert_eq!((ask(&nvme, 0x6000), take_fault(&rig)), (Err(NoTranslation::Aborted), Some((0xe, 1))));
}

#[test]
fn a12_the_interrupt_range_is_only_for_untranslated_requests() {
    let (mut rig, root) = legacy_rig();
    rig.leaf(root, 48, 0xfee0_0000, 0x40_0000, Some(Perm::ReadWrite), 2);
    let nvme = rig.unit.endpoint(NVME);
    let untranslated = TranslationData::new().with_write(true).with_untranslated_only(true);
    for iova in [0xfee0_0000, 0xfeef_ffff] {
        assert_eq!(ask(&nvme, iova), Ok(untranslated));
        assert_eq!(nvme.enter().request_translation(Iova(iova), true), NOTHING);
    }
    // What is beside it in a large leaf has a translation of its own.
    assert_eq!(ask(&nvme, 0xfef0_0000), leads_to(0x50_0000, true, true));
    let mut rig = scalable_rig(scalable());
    let root = rig.table();
    rig.leaf(root, 48, 0xfee0_0000, 0x40_0000, Some(Perm::ReadWrite), 2);
    // A leaf that leads beside the window, and into it.
    rig.leaf(root, 48, 0x20_0000, 0xfee0_0000, Some(Perm::ReadWrite), 2);
    rig.set_entry(NVME, 7, second_stage(root, 48, 2));
    let seven = endpoint(&rig, 7);
    assert_eq!(ask(&seven, 0xfee0_0000).unwrap().target(), IovaRange::new(0x40_0000, 0x5f_ffff), "with a PASID");
    assert_eq!(ask(&seven, 0x30_0000), leads_to(0xfef0_0000, true, true));
    assert_eq!((ask(&seven, 0x20_0000), take_fault(&rig)), (Err(NoTranslation::Aborted), Some((0x87, 1))));
}

#[test]
fn a12_only_a_function_that_may_have_a_device_tlb_uses_one() {
    let (mut rig, root) = legacy_rig();
    rig.pages(root, 0x1000, 0x80_0000, 1);
    let nvme = rig.unit.endpoint(NVME);
    let write = || nvme.enter().write_translated(Gpa(0x90_0000), &[7; 8]);
    assert_eq!((write(), rig.load(0x90_0000)), (Ok(()), 0x0707_0707_0707_0707));
    for translation_type in [0, 2] {
        set_legacy(&mut rig, root, translation_type);
        rig.store(0x90_0000, 0);
        assert_eq!((ask(&nvme, 0x1000), take_fault(&rig)), (Err(NoTranslation::Unsupported), Some((0xd, 1))));
        assert!(matches!(write(), Err(DmaError::Fault(fault)) if fault.reason.code() == 0xd && fault.pasid.is_none()));
        assert_eq!((take_fault(&rig), rig.load(0x90_0000)), (Some((0xd, 2)), 0));
    }
    set_legacy(&mut rig, root, 3);
    assert_eq!((ask(&nvme, 0x1000), take_fault(&rig)), (Err(NoTranslation::Aborted), Some((3, 1))));
    rig.command(|on| on.with_translation(false));
    assert_eq!(
        (ask(&nvme, 0x1000), write()),
        (Err(NoTranslation::Unsupported), Err(DmaError::Unsupported(Gpa(0x90_0000))))
    );
    assert_eq!(take_fault(&rig), None, "without translation there is no fault");

    let mut rig = scalable_rig(scalable());
    rig.set_entry(NVME, 0, pass_through(1));
    rig.set_entry(NVME, 7, pass_through(1));
    let (nvme, seven) = (rig.unit.endpoint(NVME), endpoint(&rig, 7));
    let read = |endpoint: &Endpoint<Memory>| endpoint.enter().read_translated(Gpa(0x90_0000), &mut [0; 8]);
    assert_eq!((read(&nvme), read(&seven)), (Ok(()), Ok(())));
    assert_eq!(ask(&seven, 0x1234).unwrap().target(), IovaRange::new(0, 0x1f_ffff));
    let context = rig.scalable_context_address(NVME);
    rig.store(context, rig.load(context) & !4);
    for endpoint in [&nvme, &seven] {
        assert_eq!((ask(endpoint, 0x1000), take_fault(&rig)), (Err(NoTranslation::Unsupported), Some((0x44, 1))));
        assert!(matches!(read(endpoint), Err(DmaError::Fault(_))));
        assert_eq!(take_fault(&rig), Some((0x44, 2)));
    }
    // A unit without device-TLBs answers nothing, and DTE is reserved there.
    let rig = scalable_rig(UnitConfig { device_tlb: false, ..scalable() });
    assert_eq!(ask(&rig.unit.endpoint(NVME), 0x1000), Err(NoTranslation::Unsupported));
    assert!(matches!(read(&rig.unit.endpoint(NVME)), Err(DmaError::Unsupported(_))));
    assert!(rig.unit.endpoint(NVME).read(Iova(0x1000), &mut [0; 8]).is_err());
    assert_eq!(take_fault(&rig), Some((0x42, 0)));
}

#[test]
fn a12_translated_requests_stay_out_of_the_interrupt_range_and_inside_the_width() {
    let (rig, _) = legacy_rig();
    let nvme = rig.unit.endpoint(NVME);
    let reason = |at: u64| match nvme.enter().write_translated(Gpa(at), &[0; 8]) {
        Err(DmaError::Fault(fault)) => fault.reason.code(),
        other => panic!("{other:?}"),
    };
    for (at, code) in [(0xfee0_0000, 0xe), (0xfeef_fff8, 0xe), (0xfedf_fffc, 0xe), (1 << 48, 4), (u64::MAX - 7, 4)] {
        assert_eq!((reason(at), take_fault(&rig)), (code, Some((code, 2))), "{at:#x}");
    }
    assert!(matches!(nvme.enter().write_translated(Gpa(u64::MAX), &[0; 8]), Err(DmaError::NoMemory { .. })));
    assert!(matches!(nvme.enter().write_translated(Gpa(0xfef0_0000), &[0; 8]), Err(DmaError::NoMemory { .. })));
    let mut rig = scalable_rig(scalable());
    rig.set_entry(NVME, 0, pass_through(1));
    let nvme = rig.unit.endpoint(NVME);
    for (at, code) in [(0xfee0_0000, 0x87), (1 << 48, 0x83)] {
        assert!(nvme.enter().read_translated(Gpa(at), &mut [0; 8]).is_err());
        assert_eq!(take_fault(&rig), Some((code, 2)), "{at:#x}");
    }
}

#[test]
fn a12_a_translation_request_marks_what_it_permits_to_write() {
    let mut rig = scalable_rig(scalable());
    let (second, first) = (rig.table(), rig.table());
    rig.pages(second, 0x1000, 0x80_0000, 1);
    let leaf = rig.entry_address(second, 48, 0x1000, 1);
    rig.set_entry(NVME, 7, with_flags(second_stage(second, 48, 2)));
    let seven = endpoint(&rig, 7);
    assert_eq!(seven.enter().request_translation(Iova(0x1000), true), leads_to(0x80_0000, true, false));
    assert_eq!(rig.load(leaf) >> 8 & 3, 1, "accessed, not dirty");
    assert_eq!((ask(&seven, 0x1000), rig.load(leaf) >> 8 & 3), (leads_to(0x80_0000, true, true), 3));

    let mut table = first;
    for _ in 0..3 {
        let next = rig.table();
        rig.store(table, next | 7);
        table = next;
    }
    rig.store(table + 8, 0x80_0000 | 7);
    rig.store(table + 16, 0x80_1000 | 5);
    rig.set_entry(NVME, 8, first_stage(first, 4, 3));
    let eight = endpoint(&rig, 8);
    assert_eq!(eight.enter().request_translation(Iova(0x1000), true), leads_to(0x80_0000, true, false));
    assert_eq!(rig.load(table + 8) >> 5 & 3, 1);
    assert_eq!((ask(&eight, 0x1000), rig.load(table + 8) >> 5 & 3), (leads_to(0x80_0000, true, true), 3));
    assert_eq!((ask(&eight, 0x2000), ask(&eight, 0x3000)), (leads_to(0x80_1000, true, false), NOTHING));
    assert_eq!(ask(&eight, 1 << 47), NOTHING, "not canonical");

    // All of memory, one to one, beneath the same first stage; one of its pages is not to be written.
    let beneath = rig.table();
    (0..16).for_each(|n| rig.leaf(beneath, 48, n << 21, n << 21, Some(Perm::ReadWrite), 2));
    rig.set_entry(NVME, 9, nested(first, beneath, 48, 4));
    let nine = endpoint(&rig, 9);
    assert_eq!(
        (ask(&nine, 0x1000), ask(&nine, 0x2000)),
        (leads_to(0x80_0000, true, true), leads_to(0x80_1000, true, false))
    );
    rig.leaf(beneath, 48, 4 << 21, 4 << 21, Some(Perm::Read), 2);
    assert_eq!(ask(&nine, 0x1000), leads_to(0x80_0000, true, false));
    assert_eq!(take_fault(&rig), None);
}

#[test]
fn a12_what_the_tables_lack_is_no_fault_and_what_is_wrong_in_them_is_one() {
    let mut rig = scalable_rig(scalable());
    let second = rig.table();
    rig.pages(second, 0x1000, 0x80_0000, 1);
    let seven = endpoint(&rig, 7);
    rig.set_entry(NVME, 0, pass_through(1));
    assert_eq!(ask(&seven, 0x1000), NOTHING, "no entry of this PASID");
    rig.set_entry(NVME, 7, second_stage(second, 48, 2));
    let (directory, entry) = (rig.directory_address(NVME, 7), rig.entry_of_pasid(NVME, 7));
    let (was, leaf) = (rig.load(directory), rig.entry_address(second, 48, 0x1000, 1));
    rig.store(directory, 0);
    assert_eq!((ask(&seven, 0x1000), take_fault(&rig)), (NOTHING, None));
    let aborted = |rig: &Rig, code: u8| {
        assert_eq!((ask(&seven, 0x1000), take_fault(rig)), (Err(NoTranslation::Aborted), Some((code, 1))));
    };
    rig.store(directory, was | 1 << 2);
    aborted(&rig, 0x52);
    rig.store(directory, was);
    let low = rig.load(entry);
    rig.store(entry, low | 1 << 5);
    aborted(&rig, 0x5a);
    rig.store(entry, low & !(7 << 6));
    aborted(&rig, 0x5b);
    rig.store(entry, low);
    let page = rig.load(leaf);
    rig.store(leaf, page | 1 << 11);
    aborted(&rig, 0x7a);
    // TM is a hint where there are device-TLBs.
    rig.store(leaf, page | 1 << 62);
    assert_eq!(ask(&seven, 0x1000), leads_to(0x80_0000, true, true));
    assert_eq!(
        (ask(&endpoint(&rig, 0x2000), 0x1000), take_fault(&rig)),
        (Err(NoTranslation::Unsupported), Some((0x89, 1)))
    );
    assert_eq!((ask(&endpoint(&rig, 0), 0x1000), take_fault(&rig)), (Err(NoTranslation::Unsupported), Some((0x48, 1))));
    let other = rig.unit.endpoint(NIC);
    assert_eq!((ask(&other, 0x1000), take_fault(&rig)), (Err(NoTranslation::Unsupported), Some((0x39, 1))));
    // FPD silences such a fault as any.
    let context = rig.scalable_context_address(NVME);
    rig.store(context, (rig.load(context) | 2) & !4);
    assert_eq!((ask(&seven, 0x1000), take_fault(&rig)), (Err(NoTranslation::Unsupported), None));
}

#[test]
fn a6_invalidations_go_to_the_function_with_their_range() {
    let mut rig = scalable_rig(scalable());
    let function = Function::of(&rig, NVME);
    let sid = NVME.sid;
    let range = IovaRange::new;
    for (descriptor, told) in [
        (device_tlb(sid, 0x1234_5000, false), (TlbScope::WithoutPasid, range(0x1234_5000, 0x1234_5fff))),
        (device_tlb(sid, 0x1234_5000, true), (TlbScope::WithoutPasid, range(0x1234_4000, 0x1234_7fff))),
        (device_tlb(sid, u64::MAX >> 1, true), (TlbScope::WithoutPasid, IovaRange::ALL)),
        (pasid_device_tlb(sid, 7, 0x1000, false, false), (TlbScope::Pasid(Pasid(7)), range(0x1000, 0x1fff))),
        (pasid_device_tlb(sid, 7, 0x4000, true, false), (TlbScope::Pasid(Pasid(7)), range(0x4000, 0x5fff))),
        (pasid_device_tlb(sid, 0, 0x1000, false, true), (TlbScope::EveryPasid, range(0x1000, 0x1fff))),
    ] {
        assert!(rig.submit(&[descriptor]));
        assert_eq!(function.take(), [told], "{descriptor:x?}");
    }
    assert_eq!(rig.unit.stats().descriptors.device_tlb, 6);
}

#[test]
fn a6_bad_device_tlb_descriptors_stop_the_queue_with_their_reason() {
    let reserved = |low: u64, high: u64, base: (u64, u64)| ((base.0 | low, base.1 | high), QueueError::Reserved);
    let (plain, of_pasid) = (device_tlb(NVME.sid, 0, false), pasid_device_tlb(NVME.sid, 7, 0, false, false));
    let mut cases = Vec::new();
    cases.extend((4..9).chain(12..16).chain(21..32).chain(48..64).map(|bit| reserved(1 << bit, 0, plain)));
    cases.extend((1..12).map(|bit| reserved(0, 1 << bit, plain)));
    cases.extend((12..16).chain(52..64).map(|bit| reserved(1 << bit, 0, of_pasid)));
    cases.extend((1..11).map(|bit| reserved(0, 1 << bit, of_pasid)));
    for (bad, reason) in cases {
        let mut rig = scalable_rig(scalable());
        let function = Function::of(&rig, NVME);
        assert!(!rig.submit(&[bad]));
        let record = QueueErrorRecord::from_bits(rig.read64(offset::IQERCD));
        assert_eq!((record.queue_error(), function.take()), (reason as u8, vec![]), "{bad:x?}");
    }
    // A response goes with page requests, a PASID with scalable mode, and all of them with their capability.
    let without = UnitConfig { device_tlb: false, ..scalable() };
    let response = (u64::from(kind::PAGE_RESPONSE), 0);
    for (mut rig, bad) in [
        (scalable_rig(scalable()), response),
        (scalable_rig(without), plain),
        (scalable_rig(without), of_pasid),
        (legacy_rig().0, of_pasid),
    ] {
        assert!(!rig.submit(&[bad]));
        let record = QueueErrorRecord::from_bits(rig.read64(offset::IQERCD));
        assert_eq!(record.queue_error(), QueueError::InvalidType as u8, "{bad:x?}");
    }
}

#[test]
fn a6_a_function_that_does_not_answer_stops_the_queue() {
    let (mut rig, _) = legacy_rig();
    let (function, other) = (Function::of(&rig, NVME), Function::of(&rig, NIC));
    *function.silent.lock().unwrap() = true;
    rig.write32(offset::FEDATA, 0x22);
    rig.write32(offset::FEADDR, 0xfee0_0000);
    rig.write32(offset::FECTL, 0);
    rig.store(STATUS, 0);
    // What comes before the wait is executed; the wait and all behind it is not.
    let global = device_tlb(NVME.sid, u64::MAX >> 1, true);
    rig.push(&[iotlb_global(), global, device_tlb(NIC.sid, 0, false), wait_status(1), device_tlb(NIC.sid, 0, false)]);
    rig.push(&[wait_status(2)]);
    rig.ring();
    assert_eq!((function.take().len(), other.take().len(), rig.load(STATUS)), (1, 1, 0));
    let status = FaultStatus::from_bits(rig.read32(offset::FSTS));
    assert!(status.timeout_error() && !status.queue_error());
    assert_eq!(QueueErrorRecord::from_bits(rig.read64(offset::IQERCD)).timeout_source(), NVME.sid.0);
    assert_eq!((rig.read64(offset::IQH), rig.messages.take().len()), (0x40, 1), "the head is behind the wait");
    rig.ring();
    assert_eq!((rig.load(STATUS), other.take().len()), (0, 0), "the tail moves nothing");
    let saved = rig.unit.save();
    rig.unit.restore(saved).unwrap();
    rig.write32(offset::FSTS, FaultStatus::new().with_queue_error(true).into_bits());
    assert_eq!(rig.load(STATUS), 0, "IQE is not what stopped it");
    rig.write32(offset::FSTS, FaultStatus::new().with_timeout_error(true).into_bits());
    assert_eq!((rig.load(STATUS), other.take().len()), (2, 1), "the aborted wait is not done later");
    // So does one that is not there any more, or never was.
    *function.silent.lock().unwrap() = false;
    assert!(rig.submit(&[global]));
    drop(function);
    for source in [NVME.sid, requester(9, 9, 1).sid] {
        assert!(!rig.submit(&[device_tlb(source, 0, false)]));
        assert_eq!(QueueErrorRecord::from_bits(rig.read64(offset::IQERCD)).timeout_source(), source.0);
        rig.write64(0x30, u64::from(FaultStatus::new().with_timeout_error(true).into_bits()) << 32);
    }
    assert!(rig.submit(&[iotlb_global()]));
}

#[test]
fn a6_a_bad_descriptor_and_a_time_out_are_both_told() {
    let (mut rig, _) = legacy_rig();
    let function = Function::of(&rig, NVME);
    *function.silent.lock().unwrap() = true;
    assert!(!rig.submit(&[device_tlb(NVME.sid, 0, false), (0, 0)]));
    let record = QueueErrorRecord::from_bits(rig.read64(offset::IQERCD));
    assert_eq!((record.queue_error(), record.timeout_source()), (3, NVME.sid.0));
    rig.write32(offset::FSTS, FaultStatus::new().with_timeout_error(true).into_bits());
    assert_eq!(rig.load(STATUS), 0, "IQE is still there");
    rig.store(QUEUE + 16, iotlb_global().0);
    rig.write32(offset::FSTS, FaultStatus::new().with_queue_error(true).into_bits());
    assert_eq!(rig.load(STATUS), 1);
}

#[test]
fn a12_an_invalidation_waits_for_what_is_under_way() {
    let (mut rig, root) = legacy_rig();
    rig.pages(root, 0x1000, 0x80_0000, 1);
    let _function = Function::of(&rig, NVME);
    let nvme = rig.unit.endpoint(NVME);
    let session = nvme.enter();
    let found = session.request_translation(Iova(0x1000), false).unwrap();
    std::thread::scope(|threads| {
        let rig = &mut rig;
        let submitted = threads.spawn(move || rig.submit(&[device_tlb(NVME.sid, 0x1000, false)]));
        // As long as the session is open the wait cannot be complete, however long that is.
        for _ in 0..64 {
            std::thread::yield_now();
            assert!(!submitted.is_finished());
        }
        session.write_translated(Gpa(found.page() << 12), &[1; 8]).unwrap();
        drop(session);
        assert!(submitted.join().unwrap());
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// A translation request permits what accesses of the same endpoint are then let do, page by page.
    #[test]
    fn a12_translation_requests_and_accesses_agree(
        leaves in prop::collection::vec((0u64..8, 0u64..16, 0u8..4), 1..12),
        of_scalable in any::<bool>(),
    ) {
        let (mut rig, root) = legacy_rig();
        if of_scalable {
            rig = scalable_rig(scalable());
            let table = rig.table();
            rig.set_entry(NVME, 0, second_stage(table, 48, 1));
            set(&mut rig, table, &leaves);
        } else {
            set(&mut rig, root, &leaves);
        }
        let nvme = rig.unit.endpoint(NVME);
        for page in 0..8 {
            let iova = Iova(page << 12);
            let session = nvme.enter();
            let found = session.request_translation(iova, false).unwrap();
            let reads = session.translate(iova, vtd::Access::Read).ok();
            let writes = session.translate(iova, vtd::Access::Write).ok();
            prop_assert_eq!((found.read(), found.write()), (reads.is_some(), writes.is_some()));
            if let Some(gpa) = reads.or(writes) {
                prop_assert_eq!(found.page() << 12, gpa.0);
            }
        }
    }
}

fn set(rig: &mut Rig, root: u64, leaves: &[(u64, u64, u8)]) {
    for (page, to, perm) in leaves {
        rig.leaf(root, 48, page << 12, 0x100_0000 + (to << 12), Perm::from_bits(perm & 1 != 0, perm & 2 != 0), 1);
    }
}
