//! An edu with a device-TLB and page requests, over a unit of its own making.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use vtd::spec::ats::TranslationData;
use vtd::{AtsFunction, Completion, Iova, IovaRange, PageRequest, PageRequested, PageResponse, ResponseCode, TlbScope};

use super::super::edu_test::{Bench, SID};
use super::super::{
    ATS_REGISTER, ATS_SILENT, BUFFER, DMA_START, DMA_TO_MEMORY, Features, PASID_REGISTER, TRANSLATIONS_REGISTER,
};
use crate::ats::{Ats, AtsFailed, AtsTarget, DeviceTlb};
use crate::dma::{DmaFailed, DmaTarget};
use crate::pci::config::{COMMAND_MASTER, COMMAND_MEMORY};

const ATS: u16 = 0x100;
const PRI: u16 = 0x110;

/// Memory by pages, of which each may be written or not; and what was asked for.
#[derive(Default)]
struct Pages {
    pages: Mutex<BTreeMap<u64, (Vec<u8>, bool)>>,
    asked: Mutex<Vec<PageRequest>>,
    /// What the unit itself answers.
    answer: Mutex<Option<PageRequested>>,
    untranslated: Mutex<usize>,
}

struct Target(Arc<Pages>);

impl Target {
    fn access(&self, tlb: &DeviceTlb, iova: Iova, write: bool, f: impl FnOnce(&mut [u8])) -> Result<(), AtsFailed> {
        let mut pages = self.0.pages.lock().unwrap();
        let page = iova.0 >> 12;
        let (bytes, writable) = pages.get_mut(&page).ok_or(AtsFailed::Missing)?;
        if write && !*writable {
            return Err(AtsFailed::Missing);
        }
        let found = TranslationData::new().with_page(page).with_read(true).with_write(*writable);
        tlb.keep(tlb.ask(), None, iova, found);
        f(&mut bytes[(iova.0 & 0xfff) as usize..]);
        Ok(())
    }
}

impl AtsTarget for Target {
    fn read_by(&self, tlb: &DeviceTlb, iova: Iova, data: &mut [u8]) -> Result<(), AtsFailed> {
        self.access(tlb, iova, false, |bytes| data.copy_from_slice(&bytes[..data.len()]))
    }
    fn write_by(&self, tlb: &DeviceTlb, iova: Iova, data: &[u8]) -> Result<(), AtsFailed> {
        self.access(tlb, iova, true, |bytes| bytes[..data.len()].copy_from_slice(data))
    }
    fn request_page(&self, request: PageRequest) -> PageRequested {
        self.0.asked.lock().unwrap().push(request);
        self.0.answer.lock().unwrap().unwrap_or(PageRequested::Queued)
    }
}

impl DmaTarget for Target {
    fn read(&self, _: Iova, _: &mut [u8]) -> Result<(), DmaFailed> {
        *self.0.untranslated.lock().unwrap() += 1;
        Ok(())
    }
    fn write(&self, _: Iova, _: &[u8]) -> Result<(), DmaFailed> {
        *self.0.untranslated.lock().unwrap() += 1;
        Ok(())
    }
    fn ats(&self) -> Option<&dyn AtsTarget> {
        Some(self)
    }
}

struct WithAts {
    bench: Bench,
    pages: Arc<Pages>,
    ats: Arc<Ats>,
}

impl WithAts {
    fn new() -> Self {
        let (pages, ats) = (Arc::<Pages>::default(), Arc::<Ats>::default());
        let features = Features { ats: Some(ats.clone()), page_requests: true, ..Features::default() };
        let bench = Bench::with_features(Box::new(Target(pages.clone())), features);
        let new = Self { bench, pages, ats };
        new.set(ATS + 6, 1 << 15);
        new.set(PRI + 12, 1);
        new.set(PRI + 4, 1);
        new
    }
    fn set(&self, offset: u16, value: u16) {
        self.bench.root.config_write(SID, offset, &value.to_le_bytes());
    }
    fn get(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.bench.root.config_read(SID, offset, &mut data);
        u32::from_le_bytes(data)
    }
    fn map(&self, page: u64, writable: bool) {
        self.pages.pages.lock().unwrap().insert(page, (vec![page as u8; 4096], writable));
    }
    /// Begins a write of `len` bytes at `iova`.
    fn begin(&self, iova: u64, len: u64) {
        for (at, value) in [(0x80, BUFFER), (0x88, iova), (0x90, len), (0x98, DMA_START | DMA_TO_MEMORY)] {
            self.bench.write64(at, value);
        }
    }
    fn is_done(&self) -> bool {
        self.bench.read(0x98) & 1 == 0
    }
    fn finish(&self) -> bool {
        while !self.is_done() {
            std::thread::yield_now();
        }
        !self.bench.failed()
    }
    /// Waits for the `count`-th request.
    fn asked(&self, count: usize) -> PageRequest {
        loop {
            if let Some(request) = self.pages.asked.lock().unwrap().get(count - 1) {
                return *request;
            }
            assert!(!self.is_done(), "it ended without request {count}");
            std::thread::yield_now();
        }
    }
    fn respond(&self, request: PageRequest, code: ResponseCode) {
        self.ats.respond(PageResponse { pasid: None, group: request.group, code });
    }
    fn requests(&self) -> usize {
        self.pages.asked.lock().unwrap().len()
    }
}

#[test]
fn f6_edu_has_the_capabilities_that_are_asked_for() {
    let edu = WithAts::new();
    assert_eq!((edu.get(ATS), edu.get(PRI)), (0x1101_000f, 0x0001_0013));
    edu.bench.root.config_write(SID, ATS + 4, &[0xff; 4]);
    assert_eq!(edu.get(ATS + 4), 0x801f_0060, "Enable and STU");
    edu.bench.root.config_write(SID, PRI + 4, &[0xff; 8]);
    // Enable, no Reset; PASID is required in responses; one request outstanding.
    assert_eq!((edu.get(PRI + 4), edu.get(PRI + 8)), (0x8000_0001, 1));
    edu.set(PRI + 4, 0);
    assert_eq!(edu.get(PRI + 4), 0x8100_0000, "Stopped");
    assert_eq!(edu.bench.read(PASID_REGISTER), u32::MAX, "no PASIDs");
    let without = Bench::with_features(Box::new(Target(Arc::default())), Features::default());
    assert_eq!((without.read(ATS_REGISTER), without.read(TRANSLATIONS_REGISTER)), (u32::MAX, u32::MAX));
}

#[test]
fn a12_edu_goes_by_its_device_tlb_while_ats_is_on() {
    let edu = WithAts::new();
    edu.map(1, true);
    edu.map(2, true);
    edu.begin(0x1ffc, 8);
    assert!(edu.finish());
    assert_eq!((edu.bench.read(TRANSLATIONS_REGISTER), *edu.pages.untranslated.lock().unwrap()), (2, 0));
    let all = |edu: &WithAts| edu.ats.invalidate(TlbScope::WithoutPasid, IovaRange::ALL);
    edu.bench.write(ATS_REGISTER, u32::MAX);
    assert_eq!((edu.bench.read(ATS_REGISTER), all(&edu)), (ATS_SILENT, Completion::Never));
    assert_eq!(edu.bench.read(TRANSLATIONS_REGISTER), 2);
    edu.bench.write(ATS_REGISTER, 0);
    assert_eq!((all(&edu), edu.bench.read(TRANSLATIONS_REGISTER)), (Completion::Sent, 0));
    edu.begin(0x1000, 8);
    assert!(edu.finish() && edu.bench.read(TRANSLATIONS_REGISTER) == 1);
    edu.set(ATS + 6, 0);
    assert_eq!(edu.bench.read(TRANSLATIONS_REGISTER), 0, "off, it forgets");
    edu.begin(0x9000, 8);
    assert!(edu.finish() && *edu.pages.untranslated.lock().unwrap() == 1);
    assert_eq!(edu.requests(), 0, "without ATS nothing is asked for");
}

#[test]
fn a12_edu_asks_for_a_page_until_it_is_there() {
    let edu = WithAts::new();
    edu.map(1, false);
    edu.begin(0x1ff0, 0x20);
    let first = edu.asked(1);
    assert_eq!((first.iova, first.write, first.read, first.last), (Iova(0x1ff0), true, false, true));
    edu.map(1, true);
    edu.respond(first, ResponseCode::Success);
    // The second page never comes, whatever the guest says.
    for count in 2..10 {
        let next = edu.asked(count);
        assert_eq!((next.iova, next.group), (Iova(0x2000), first.group + count as u16 - 1));
        edu.respond(next, ResponseCode::Success);
    }
    assert!(!edu.finish());
    assert_eq!(edu.requests(), 9);
    // A unit that answers itself is asked as often.
    *edu.pages.answer.lock().unwrap() = Some(PageRequested::Answered(ResponseCode::Success));
    edu.begin(0x2000, 8);
    assert!(!edu.finish());
    assert_eq!(edu.requests(), 17);
    *edu.pages.answer.lock().unwrap() = Some(PageRequested::Answered(ResponseCode::InvalidRequest));
    edu.begin(0x2000, 8);
    assert!(!edu.finish());
    assert_eq!((edu.requests(), edu.get(PRI + 4) >> 16 & 3), (18, 0));
}

#[test]
fn a12_a_failure_ends_the_requests_of_an_edu() {
    let edu = WithAts::new();
    edu.begin(0x1000, 8);
    edu.respond(edu.asked(1), ResponseCode::Failure);
    assert!(!edu.finish());
    assert_eq!(edu.get(PRI + 4) >> 16 & 3, 1, "RF");
    edu.begin(0x1000, 8);
    assert!(!edu.finish());
    assert_eq!(edu.requests(), 1);
    edu.set(PRI + 6, 1);
    edu.set(PRI + 12, 0);
    edu.begin(0x1000, 8);
    assert!(!edu.finish());
    assert_eq!(edu.requests(), 1, "none may be outstanding");
    edu.set(PRI + 12, 1);
    edu.begin(0x1000, 8);
    let request = edu.asked(2);
    edu.map(1, true);
    edu.respond(request, ResponseCode::Success);
    assert!(edu.finish());
    edu.respond(request, ResponseCode::Success);
    assert_eq!(edu.get(PRI + 4) >> 16 & 3, 2, "UPRGI");
    edu.set(PRI + 6, 2);
    assert_eq!(edu.get(PRI + 4) >> 16 & 3, 0);
}

#[test]
fn a12_a_reset_and_an_unplug_do_not_wait_for_the_guest() {
    let edu = WithAts::new();
    edu.map(5, true);
    edu.begin(0x5000, 8);
    assert!(edu.finish());
    edu.bench.write(ATS_REGISTER, ATS_SILENT);
    edu.begin(0x1000, 8);
    let request = edu.asked(1);
    edu.bench.root.reset();
    edu.set(4, COMMAND_MEMORY | COMMAND_MASTER);
    edu.bench.root.config_write(SID, 0x10, &0xe000_0000_u32.to_le_bytes());
    assert!(edu.is_done() && edu.bench.read(TRANSLATIONS_REGISTER) == 0 && edu.get(ATS + 4) == 0x60);
    assert_eq!(edu.ats.invalidate(TlbScope::EveryPasid, IovaRange::ALL), Completion::Sent, "it answers again");
    edu.respond(request, ResponseCode::Success);
    assert_eq!(edu.get(PRI + 4) >> 16, 0x8102, "stopped, and the answer is unexpected");
    // Clearing Enable gives up what waits, and so does the end of the device.
    edu.set(ATS + 6, 1 << 15);
    edu.set(PRI + 12, 1);
    edu.set(PRI + 4, 1);
    edu.begin(0x1000, 8);
    edu.asked(2);
    edu.set(PRI + 4, 0);
    assert!(!edu.finish());
    edu.set(PRI + 4, 1);
    edu.begin(0x1000, 8);
    edu.asked(3);
    drop(edu);
}
