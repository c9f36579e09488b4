//! Page requests: their queue, its overflow and its event, and responses.

use std::sync::{Arc, Mutex};

use vtd::spec::fault::FaultRecordHigh;
use vtd::spec::invalidation::{PageResponseHigh, PageResponseLow, QueueError, WaitLow, kind};
use vtd::spec::page_requests::{PageRequestHigh, PageRequestLow};
use vtd::spec::pasid::{ContextHigh, ContextLow};
use vtd::spec::registers::{QueueErrorRecord, offset};
use vtd::{
    AtsFunction, Completion, Endpoint, Iova, IovaRange, PageRequest, PageRequested, PageResponse, Pasid, ResponseCode,
    RestoreError, Stages, Stream, TlbScope, UnitConfig,
};

use crate::pasid_tables::{config, pass_through};
use crate::rig::{Memory, NIC, NVME, Rig, STATUS, wait_status};

const PAGE_QUEUE: u64 = 0x11_0000;
const ENTRIES: u64 = 128;
const PPR: u32 = 1;
const PRO: u32 = 2;

fn offered() -> UnitConfig {
    let scalable = Some(Stages::Both);
    UnitConfig { device_tlb: true, page_requests: true, pasid_bits: 13, scalable, ..config(48) }
}

/// A unit whose context entry of NVME lets it ask for pages, by RID_PASID and by PASID 7, and a queue of 128 entries.
fn rig() -> Rig {
    let mut rig = Rig::scalable(offered());
    rig.set_entry(NVME, 0, pass_through(1));
    rig.set_entry(NVME, 7, pass_through(1));
    let context = rig.scalable_context_address(NVME);
    let low = ContextLow::from_bits(rig.load(context)).with_pasid(true).with_device_tlb(true).with_page_request(true);
    rig.set_scalable_context(NVME, low, ContextHigh::new());
    rig.write64(offset::PQA, PAGE_QUEUE);
    rig.write32(offset::PEDATA, 0x33);
    rig.write32(offset::PEADDR, 0xfee0_1000);
    rig.write32(offset::PECTL, 0);
    rig
}

fn seven(rig: &Rig) -> Endpoint<Memory> {
    rig.unit.endpoint_of(Stream { requester: NVME, pasid: Some(Pasid(7)) })
}

fn request(iova: u64, group: u16, last: bool) -> PageRequest {
    PageRequest { iova: Iova(iova), read: true, write: false, group, last }
}

fn entry(rig: &Rig, index: u64) -> [u64; 4] {
    [0, 8, 16, 24].map(|at| rig.load(PAGE_QUEUE + index * 32 + at))
}

fn messages(rig: &Rig) -> usize {
    rig.messages.take().len()
}

#[test]
fn a12_a_page_request_is_in_the_queue_with_all_that_it_says() {
    let rig = rig();
    rig.store(PAGE_QUEUE + 16, u64::MAX);
    let nvme = rig.unit.endpoint(NVME);
    assert_eq!(seven(&rig).request_page(request(0x1234_5678, 0x155, true)), PageRequested::Queued);
    let low = PageRequestLow::new().with_kind(1).with_source(NVME.sid.0).with_pasid_present(true).with_pasid(7);
    let high = PageRequestHigh::new().with_read(true).with_last(true).with_group(0x155).with_page(0x1_2345);
    assert_eq!(entry(&rig, 0), [low.into_bits(), high.into_bits(), 0, 0]);
    assert_eq!(low.into_bits(), 1 | 1 << 8 | u64::from(NVME.sid.0) << 16 | 7 << 32);
    assert_eq!(high.into_bits(), 1 | 1 << 2 | 0x155 << 3 | 0x1234_5000);
    let write = PageRequest { read: false, write: true, ..request(0x1000, 1, false) };
    assert_eq!(nvme.request_page(write), PageRequested::Queued);
    assert_eq!(entry(&rig, 1)[..2], [1 | u64::from(NVME.sid.0) << 16, 2 | 1 << 3 | 0x1000]);
    assert_eq!((rig.read64(offset::PQH), rig.read64(offset::PQT)), (0, 0x40));
    assert_eq!((rig.read32(offset::PRS), messages(&rig)), (PPR, 1), "one event until PPR is cleared");
    rig.write32(offset::PRS, PPR);
    assert_eq!(nvme.request_page(write), PageRequested::Queued);
    assert_eq!((rig.read32(offset::PRS), messages(&rig)), (PPR, 1));
}

#[test]
fn a12_a_full_queue_overflows_and_the_unit_answers_itself() {
    let rig = rig();
    let nvme = rig.unit.endpoint(NVME);
    // The whole round, from a tail in the middle.
    rig.write64(offset::PQH, 0x800);
    rig.write64(offset::PQT, 0x800);
    for n in 0..ENTRIES - 1 {
        assert_eq!(nvme.request_page(request(n << 12, 1, true)), PageRequested::Queued, "{n}");
    }
    assert_eq!((rig.read64(offset::PQT), messages(&rig)), (0x7e0, 1));
    rig.write32(offset::PRS, PPR);
    let success = PageRequested::Answered(ResponseCode::Success);
    assert_eq!(nvme.request_page(request(0, 1, true)), success);
    assert_eq!((rig.read32(offset::PRS), messages(&rig)), (PRO, 1));
    // Room alone does not help: the guest says that it knows.
    rig.write64(offset::PQH, 0x7e0);
    assert_eq!(nvme.request_page(request(0, 1, false)), PageRequested::Dropped);
    assert_eq!(nvme.request_page(request(0, 1, true)), success);
    assert_eq!((rig.read64(offset::PQT), messages(&rig)), (0x7e0, 0));
    rig.write64(0xd8, u64::from(PRO) << 32);
    assert_eq!(nvme.request_page(request(0x5000, 1, true)), PageRequested::Queued);
    assert_eq!((rig.read32(offset::PRS), rig.read64(offset::PQT), messages(&rig)), (PPR, 0x800, 1));
    assert_eq!(entry(&rig, 0x7e0 / 32)[1] & !0xfff, 0x5000);
    // A queue that is no memory has no room; offsets beyond the queue are those inside it.
    rig.write32(offset::PRS, PPR);
    rig.write64(offset::PQA, 1 << 40);
    assert_eq!((nvme.request_page(request(0, 1, true)), rig.read32(offset::PRS)), (success, PRO));
    rig.write32(offset::PRS, PRO);
    rig.write64(offset::PQA, PAGE_QUEUE);
    rig.write64(offset::PQT, 0x7_f020);
    rig.write64(offset::PQH, 0);
    assert_eq!(nvme.request_page(request(0x6000, 1, true)), PageRequested::Queued);
    assert_eq!((rig.read64(offset::PQT), entry(&rig, 1)[1] & !0xfff), (0x40, 0x6000));
}

#[test]
fn a12_the_event_is_held_back_by_its_mask() {
    let rig = rig();
    let nvme = rig.unit.endpoint(NVME);
    rig.write32(offset::PECTL, 1 << 31);
    nvme.request_page(request(0, 1, true));
    assert_eq!((rig.read32(offset::PECTL), messages(&rig)), (3 << 30, 0));
    rig.write32(offset::PECTL, 0);
    assert_eq!((rig.read32(offset::PECTL), messages(&rig)), (0, 1));
    rig.write32(offset::PRS, PPR);
    rig.write32(offset::PECTL, 1 << 31);
    nvme.request_page(request(0, 1, true));
    rig.write32(offset::PRS, PPR);
    rig.write32(offset::PECTL, 0);
    assert_eq!(messages(&rig), 0, "what was served is not told");
    rig.write64(offset::PEADDR, 0xffff_ffff_fee0_1003);
    assert_eq!(rig.read64(offset::PEADDR), 0xffff_ffff_fee0_1000);
}

#[test]
fn a12_who_may_not_ask_gets_an_invalid_request_and_a_fault() {
    let mut rig = rig();
    let invalid = PageRequested::Answered(ResponseCode::InvalidRequest);
    let refused = |rig: &Rig, endpoint: &Endpoint<Memory>, reason: u8| {
        assert_eq!(endpoint.request_page(request(0x5123, 1, true)), invalid);
        let high = FaultRecordHigh::from_bits(rig.read64(offset::FRCD + 8));
        assert!(high.fault() && high.type_2() && !high.type_1() && high.address_type() == 0, "{high:?}");
        assert_eq!((high.reason(), rig.read64(offset::FRCD)), (reason, 0x5000));
        assert_eq!(endpoint.request_page(request(0x5123, 1, false)), PageRequested::Dropped);
        // Such a record can be restored.
        let saved = rig.unit.save();
        rig.unit.restore(saved).unwrap();
        rig.unit.reset();
        rig.write64(offset::PQA, PAGE_QUEUE);
        rig.enable_translation();
    };
    let context = rig.scalable_context_address(NVME);
    let before = rig.load(context);
    let nvme = rig.unit.endpoint(NVME);
    for (value, reason) in [(before & !(1 << 4), 0x47), (before & !(1 << 2), 0x43), (before & !1, 0x41)] {
        rig.store(context, value);
        refused(&rig, &nvme, reason);
    }
    rig.store(context, before & !(1 << 3));
    refused(&rig, &seven(&rig), 0x45);
    rig.store(context, before);
    rig.set_entry(NVME, 7, [0; 8]);
    refused(&rig, &seven(&rig), 0x59);
    rig.table_mode = 0;
    rig.enable_translation();
    refused(&rig, &nvme, 0x32);
    rig.table_mode = 1;
    rig.enable_translation();
    assert_eq!(nvme.request_page(request(0, 1, true)), PageRequested::Queued);
    rig.command(|on| on.with_translation(false));
    assert_eq!((nvme.request_page(request(0, 1, true)), rig.fault_records()), (invalid, vec![]));
    let without = Rig::scalable(UnitConfig { page_requests: false, ..offered() });
    assert_eq!(without.unit.endpoint(NVME).request_page(request(0, 1, true)), invalid);
}

#[derive(Default)]
struct Function(Mutex<Vec<PageResponse>>);

impl AtsFunction for Function {
    fn invalidate(&self, _: TlbScope, _: IovaRange) -> Completion {
        Completion::Sent
    }
    fn respond(&self, response: PageResponse) {
        self.0.lock().unwrap().push(response);
    }
}

fn response(source: u16, pasid: Option<u32>, group: u16, code: u8) -> (u64, u64) {
    let low = PageResponseLow::new().with_kind(kind::PAGE_RESPONSE).with_source(source).with_code(code);
    let low = low.with_pasid_present(pasid.is_some()).with_pasid(pasid.unwrap_or(0));
    (low.into_bits(), PageResponseHigh::new().with_group(group).with_ignored(7).into_bits())
}

#[test]
fn a6_responses_go_to_the_function_that_they_name() {
    let mut rig = rig();
    let [nvme, nic] = [NVME, NIC].map(|requester| {
        let function = Arc::new(Function::default());
        let weak = Arc::downgrade(&function);
        rig.unit.set_ats_function(requester, weak);
        function
    });
    let codes = [0, 1, 2, 14, 15];
    let descriptors = codes.map(|code| response(NVME.sid.0, Some(7), 0x1ff, code));
    assert!(rig.submit(&descriptors));
    let told: Vec<_> = nvme.0.lock().unwrap().drain(..).collect();
    let expected = [
        ResponseCode::Success,
        ResponseCode::InvalidRequest,
        ResponseCode::Failure,
        ResponseCode::Failure,
        ResponseCode::Failure,
    ];
    assert_eq!(told, expected.map(|code| PageResponse { pasid: Some(Pasid(7)), group: 0x1ff, code }));
    // One to nobody is lost, as on a bus, and one without PASID has none.
    assert!(rig.submit(&[response(0xffff, None, 1, 0), response(NIC.sid.0, None, 2, 0)]));
    let expected = PageResponse { pasid: None, group: 2, code: ResponseCode::Success };
    assert_eq!((nic.0.lock().unwrap().as_slice(), nvme.0.lock().unwrap().len()), (&[expected][..], 0));
    assert_eq!(rig.unit.stats().descriptors.page_response, 7);
}

#[test]
fn a6_bad_responses_stop_the_queue_with_their_reason() {
    let good = response(NVME.sid.0, None, 1, 0);
    let low = (5..9).chain(52..64).map(|bit| (good.0 | 1 << bit, good.1));
    for bad in low.chain((12..64).map(|bit| (good.0, good.1 | 1 << bit))) {
        let mut rig = rig();
        assert!(!rig.submit(&[bad]));
        let record = QueueErrorRecord::from_bits(rig.read64(offset::IQERCD));
        assert_eq!(record.queue_error(), QueueError::Reserved as u8, "{bad:x?}");
    }
}

#[test]
fn a6_a_wait_may_drain_page_requests_where_there_are_some() {
    let (low, high) = wait_status(9);
    let drains = (WaitLow::from_bits(low).with_page_request_drain(true).into_bits(), high);
    for page_requests in [true, false] {
        let mut rig = Rig::scalable(UnitConfig { page_requests, ..offered() });
        rig.store(STATUS, 0);
        rig.push(&[drains]);
        rig.ring();
        assert_eq!(rig.load(STATUS), if page_requests { 9 } else { 0 });
    }
}

#[test]
fn a5_the_registers_of_page_requests_are_there_when_offered() {
    let without = Rig::scalable(UnitConfig { page_requests: false, ..offered() });
    let with = Rig::scalable(offered());
    for at in (0xc0..0xf0).step_by(8) {
        [&without, &with].iter().for_each(|rig| rig.write64(at, u64::MAX));
        assert_eq!(without.read64(at), 0, "{at:#x}");
    }
    assert_eq!([0xc0, 0xc8, 0xd0].map(|at| with.read64(at)), [0x7_ffe0, 0x7_ffe0, 0xffff_ffff_f007]);
    assert_eq!([0xd8, 0xe0, 0xe8].map(|at| with.read64(at)), [0, 0xffff_8000_0000, !3]);
    let saved = with.unit.save();
    assert_eq!(with.unit.restore(saved.clone()), Ok(()));
    assert!(matches!(without.unit.restore(saved.clone()), Err(RestoreError::Register { register: "PQH", .. })));
    for (register, change) in [
        ("PQT", (|state| state.page_requests.tail = 0x10) as fn(&mut vtd::State)),
        ("PQA", |state| state.page_requests.address = 8.into()),
        ("PRS", |state| state.page_requests.status = 4.into()),
        ("PECTL", |state| state.page_requests.event.control = 1.into()),
    ] {
        let mut bad = saved.clone();
        change(&mut bad);
        assert!(
            matches!(with.unit.restore(bad), Err(RestoreError::Register { register: found, .. }) if found == register)
        );
    }
    with.unit.reset();
    assert_eq!((with.read64(0xd0), with.read32(0xe0)), (0, 1 << 31));
}
