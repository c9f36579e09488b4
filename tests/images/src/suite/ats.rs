//! device-TLBs and page requests, of an edu that has them.

use images::memory::{load, page, store};
use images::scalable::{
    DEVICE_TLB_ENABLE, FirstStage, PAGE_REQUEST_ENABLE, ScalableWorld, USABLE, device_tlb, device_tlb_all, first_stage,
    page_response, pasid_device_tlb, second_stage,
};
use images::tables::{Domain, READ, READ_WRITE};
use images::vtd::offset::{FSTS, IQERCD, PECTL, PQA, PQH, PQT, PRS};
use images::vtd::{IOTLB_GLOBAL, PAGE_OVERFLOW, PAGE_REQUEST, TIME_OUT, iotlb_domain, iotlb_pages, wait_status};
use images::world::{IOVA, UNTOUCHED, WRITTEN};
use images::x86::{pause, wait_for};
use images::{World, check, check_eq};

images::tests!(
    a12_device_tlb_holds_a_translation_until_its_invalidation => "--iommu vtd,scalable=on,ats=on --device edu,ats=on",
    a12_device_tlb_in_legacy_mode => "--iommu vtd,ats=on --device edu,ats=on",
    a12_device_tlb_of_a_pasid => "--iommu vtd,scalable=on,stage=both,pasid-bits=16,ats=on --device edu,pasid=on,ats=on",
    a12_device_tlb_needs_leave_of_the_context_entry => "--iommu vtd,scalable=on,ats=on --device edu,ats=on",
    a12_no_byte_arrives_after_an_invalidation => "--iommu vtd,scalable=on,ats=on --device edu,ats=on",
    a6_invalidation_without_an_answer_times_out => "--iommu vtd,scalable=on,ats=on --device edu,ats=on",
    a12_page_request_is_answered_and_the_data_arrives => "--iommu vtd,scalable=on,stage=both,pasid-bits=16,ats=on,pri=on --device edu,pasid=on,ats=on,pri=on",
    a12_page_request_that_fails_ends_the_transfer => "--iommu vtd,scalable=on,ats=on,pri=on --device edu,ats=on,pri=on",
    a12_page_request_queue_overflows => "--iommu vtd,scalable=on,ats=on,pri=on --device edu,ats=on,pri=on",
    a12_page_request_is_given_up => "--iommu vtd,scalable=on,ats=on,pri=on --device edu,ats=on,pri=on",
);

const OTHER: u64 = IOVA + 0x1000;

/// A world with a device that has a device-TLB, and a domain of it.
fn with_ats() -> (ScalableWorld, Domain) {
    let mut world = ScalableWorld::with_ats();
    check_eq!((world.unit.extended(2, 1), world.unit.extended(33, 1)), (1, 1), "DT and NWFS");
    let domain = Domain::new(5, 4);
    world.set(0, second_stage(&domain));
    (world, domain)
}

/// The device writes at `iova`, and that reaches none of these pages; it says that it failed.
fn reaches_nothing(world: &ScalableWorld, iova: u64, pages: &[u64]) {
    pages.iter().for_each(|page| store(*page, UNTOUCHED));
    world.edu.dma_write(iova, 8);
    check!(world.edu.failed(), "the transfer was not refused");
    pages.iter().for_each(|page| check_eq!(load(*page), UNTOUCHED, "what must not be reached"));
}

fn a12_device_tlb_holds_a_translation_until_its_invalidation() {
    let (mut world, domain) = with_ats();
    let sid = world.edu.sid;
    let [from, old, new] = [page(), page(), page()];
    domain.map(IOVA, from, READ);
    domain.map(OTHER, old, READ_WRITE);
    world.carries((IOVA, from), (OTHER, old));
    check_eq!(world.edu.translations(), 2, "cached translations");
    // The unit's own caches are none of the device's.
    domain.map(OTHER, new, READ_WRITE);
    world.unit.invalidate(&[iotlb_pages(5, OTHER, 0)]);
    world.writes_reach(OTHER, old);
    world.unit.invalidate(&[device_tlb(sid, IOVA)]);
    check_eq!(world.edu.translations(), 1, "those of the other page");
    world.writes_reach(OTHER, old);
    world.unit.invalidate(&[device_tlb(sid, OTHER)]);
    world.writes_reach(OTHER, new);
    domain.clear(OTHER, 1);
    world.unit.invalidate(&[iotlb_domain(5), device_tlb_all(sid)]);
    check_eq!(world.edu.translations(), 0, "cached translations");
    reaches_nothing(&world, OTHER, &[old, new]);
    // A read gives no leave to write.
    world.edu.dma_read(IOVA, 8);
    check!(!world.edu.failed(), "the page may be read");
    reaches_nothing(&world, IOVA, &[from]);
    world.no_fault();
    // What is turned off forgets.
    world.edu.disable_ats();
    check_eq!(world.edu.translations(), 0, "cached translations");
    world.blocked(OTHER, false, 0x79);
}

fn a12_device_tlb_in_legacy_mode() {
    let edu = images::scalable::a_device_with_ats();
    let mut world = World::with_device(edu);
    let (domain, old, new) = (Domain::new(5, 4), page(), page());
    domain.map(IOVA, old, READ_WRITE);
    let entry = world.contexts + 16 * u64::from(world.edu.sid.0 & 0xff);
    store(entry + 8, 2 | 5 << 8);
    store(entry, domain.root | 1 << 2 | 1);
    world.unit.command(images::vtd::TRANSLATION, true);
    world.unit.invalidate_all();
    let reaches = |world: &World, reached: u64| {
        [old, new].iter().for_each(|page| store(*page, UNTOUCHED));
        world.edu.dma_write(IOVA, 8);
        for page in [old, new] {
            check_eq!(load(page) != UNTOUCHED, page == reached, "whether {page:#x} was written");
        }
    };
    reaches(&world, old);
    domain.map(IOVA, new, READ_WRITE);
    world.unit.invalidate(&[IOTLB_GLOBAL]);
    reaches(&world, old);
    world.unit.invalidate(&[device_tlb(world.edu.sid, IOVA)]);
    reaches(&world, new);
    check!(world.unit.take_fault().is_none(), "a fault that nothing called for");
    // Untranslated requests only.
    store(entry, domain.root | 1);
    world.unit.invalidate_all();
    reaches(&world, 0);
    check_eq!(world.unit.take_fault().map(|fault| fault.reason), Some(0xd), "the reason");
}

fn a12_device_tlb_of_a_pasid() {
    let mut world = ScalableWorld::with_ats();
    check!(world.edu.enable_pasids(), "the device has PASIDs");
    let sid = world.edu.sid;
    let (first, second) = (FirstStage::new(0), Domain::new(6, 4));
    let [one, other, new] = [page(), page(), page()];
    let leaf = first.map(IOVA, one, USABLE);
    second.map(IOVA, other, READ_WRITE);
    world.set(0, second_stage(&Domain::new(4, 4)));
    world.set(7, first_stage(&first, 5));
    world.set(8, second_stage(&second));
    for (pasid, reached) in [(7, one), (8, other)] {
        world.edu.set_pasid(Some(pasid));
        world.writes_reach(IOVA, reached);
    }
    check_eq!(world.edu.translations(), 2, "one of each PASID");
    store(leaf, new | USABLE);
    world.unit.invalidate(&[images::scalable::pasid_iotlb(5, 7), device_tlb_all(sid), pasid_device_tlb(sid, 8, IOVA)]);
    check_eq!(world.edu.translations(), 1, "that of PASID 7");
    world.edu.set_pasid(Some(7));
    world.writes_reach(IOVA, one);
    world.unit.invalidate(&[pasid_device_tlb(sid, 7, IOVA)]);
    world.writes_reach(IOVA, new);
}

fn a12_device_tlb_needs_leave_of_the_context_entry() {
    let (mut world, domain) = with_ats();
    let to = page();
    domain.map(IOVA, to, READ_WRITE);
    world.writes_reach(IOVA, to);
    let context = world.context(world.edu.sid);
    let before = load(context);
    store(context, before & !DEVICE_TLB_ENABLE);
    world.forget();
    // What it has cached does not help it.
    let sid = world.edu.sid;
    for cached in [1, 0] {
        check_eq!(world.edu.translations(), cached, "cached translations");
        reaches_nothing(&world, IOVA, &[to]);
        check_eq!(world.unit.take_fault().map(|fault| (fault.source, fault.reason)), Some((sid, 0x44)), "the fault");
        world.unit.invalidate(&[device_tlb_all(sid)]);
    }
    world.edu.disable_ats();
    world.writes_reach(IOVA, to);
    store(context, before);
    world.forget();
    world.edu.enable_ats();
    world.writes_reach(IOVA, to);
    check_eq!(world.edu.translations(), 1, "cached translations");
}

fn a12_no_byte_arrives_after_an_invalidation() {
    let (mut world, domain) = with_ats();
    let to = page();
    let sid = world.edu.sid;
    for round in 0..100 {
        domain.map(IOVA, to, READ_WRITE);
        world.unit.invalidate(&[iotlb_pages(5, IOVA, 0)]);
        world.edu.begin_write(IOVA, 4096);
        domain.clear(IOVA, 1);
        world.unit.invalidate(&[iotlb_pages(5, IOVA, 0), device_tlb(sid, IOVA)]);
        (0..512).for_each(|n| store(to + 8 * n, UNTOUCHED));
        world.edu.finish();
        check!((0..512).all(|n| load(to + 8 * n) == UNTOUCHED), "round {round}: bytes came after the invalidation");
        check_eq!(world.edu.translations(), 0, "cached translations");
    }
    world.no_fault();
}

fn a6_invalidation_without_an_answer_times_out() {
    let (mut world, domain) = with_ats();
    let (to, status) = (page(), page());
    let sid = world.edu.sid;
    domain.map(IOVA, to, READ_WRITE);
    world.writes_reach(IOVA, to);
    world.edu.set_silent(true);
    world.unit.queue(&[iotlb_pages(5, IOVA, 0), device_tlb(sid, IOVA), wait_status(status, 1), wait_status(status, 2)]);
    world.unit.ring();
    wait_for("ITE", || world.unit.read32(FSTS) & TIME_OUT != 0);
    check_eq!((world.unit.read64(IQERCD) >> 32) as u16, sid.0, "ITESID");
    check_eq!(load(status), 0, "the status of the waits");
    world.edu.set_silent(false);
    world.unit.write32(FSTS, TIME_OUT);
    wait_for("the second wait", || load(status) == 2);
    check_eq!(world.unit.read32(FSTS) & TIME_OUT, 0, "ITE");
    // It was not acted upon; now it is.
    world.writes_reach(IOVA, to);
    check_eq!(world.edu.translations(), 1, "cached translations");
    world.unit.invalidate(&[device_tlb(sid, IOVA)]);
    check_eq!(world.edu.translations(), 0, "cached translations");
}

/// A page request as its descriptor has it.
#[derive(PartialEq, Eq, Debug)]
struct Request {
    pasid: Option<u32>,
    iova: u64,
    write: bool,
    group: u16,
}

/// The guest's side of page requests.
struct Pager {
    world: ScalableWorld,
    queue: u64,
}

impl Pager {
    fn new() -> Self {
        let world = ScalableWorld::with_page_requests();
        check_eq!((world.unit.extended(29, 1), world.unit.extended(42, 1)), (1, 1), "PRS and PDS");
        let queue = page();
        world.unit.write64(PQH, 0);
        world.unit.write64(PQT, 0);
        world.unit.write64(PQA, queue);
        world.unit.write32(PECTL, 1 << 31);
        Self { world, queue }
    }

    /// Waits for a request, and takes it.
    fn take(&self) -> Request {
        let unit = &self.world.unit;
        wait_for("a page request", || unit.read64(PQT) != unit.read64(PQH));
        let head = unit.read64(PQH);
        check_eq!(unit.read32(PRS), PAGE_REQUEST, "PRS");
        let [low, high, third, fourth] = [0, 8, 16, 24].map(|at| load(self.queue + head + at));
        check_eq!((low as u8, (low >> 16) as u16, third, fourth), (1, self.world.edu.sid.0, 0, 0), "the descriptor");
        check!(high & 4 != 0 && (high & 1 != 0) != (high & 2 != 0), "LPIG, and a read or a write: {high:#x}");
        unit.write64(PQH, (head + 32) & 0xfff);
        unit.write32(PRS, PAGE_REQUEST);
        Request {
            pasid: (low & 1 << 8 != 0).then_some((low >> 32) as u32 & 0xf_ffff),
            iova: high & !0xfff,
            write: high & 2 != 0,
            group: (high >> 3) as u16 & 0x1ff,
        }
    }

    fn respond(&mut self, request: &Request, code: u8) {
        let response = page_response(self.world.edu.sid, request.pasid, request.group, code);
        self.world.unit.invalidate(&[response]);
    }

    /// Nothing is in the queue, though time passes.
    fn no_request(&self) {
        pause(5);
        check_eq!(self.world.unit.read64(PQT), self.world.unit.read64(PQH), "the tail of the queue");
    }
}

fn a12_page_request_is_answered_and_the_data_arrives() {
    let mut pager = Pager::new();
    let (first, plain) = (FirstStage::new(0), Domain::new(4, 4));
    let [from, to] = [page(), page()];
    pager.world.set(0, second_stage(&plain));
    pager.world.set(7, first_stage(&first, 5));
    for (round, pasid) in [Some(7), None, Some(7)].into_iter().enumerate() {
        let (read, written) = (IOVA + 0x10_0000 * round as u64, OTHER + 0x10_0000 * round as u64);
        let map = |iova: u64, to: u64| match pasid {
            Some(_) => store(first.entry(iova, 1), to | USABLE),
            None => plain.map(iova, to, READ_WRITE),
        };
        pager.world.edu.set_pasid(pasid);
        store(from, WRITTEN + round as u64);
        store(to, UNTOUCHED);
        pager.world.edu.begin_read(read, 8);
        let request = pager.take();
        check_eq!((request.pasid, request.iova, request.write), (pasid, read, false), "what is asked for");
        map(read, from);
        pager.respond(&request, 0);
        pager.world.edu.finish();
        check!(!pager.world.edu.failed(), "the read failed");
        // The last bytes of one page and the first of the next: each is asked for.
        let at = written + 0xffc;
        pager.world.edu.begin_write(at, 8);
        let request = pager.take();
        check_eq!((request.pasid, request.iova, request.write), (pasid, written, true), "what is asked for");
        map(written, to);
        pager.respond(&request, 0);
        let request = pager.take();
        check_eq!((request.pasid, request.iova, request.write), (pasid, written + 0x1000, true), "what is asked for");
        // A guest that did not make it is asked again.
        pager.respond(&request, 0);
        let again = pager.take();
        check!(again.iova == request.iova && again.group != request.group, "{again:?} after {request:?}");
        map(written + 0x1000, to);
        pager.respond(&again, 0);
        pager.world.edu.finish();
        let value = WRITTEN + round as u64;
        check_eq!(
            (load(to + 0xff8) >> 32, load(to) as u32),
            (value & 0xffff_ffff, (value >> 32) as u32),
            "what arrived"
        );
        pager.no_request();
    }
    pager.world.no_fault();
    check_eq!(pager.world.edu.page_request_status() & 3, 0, "RF and UPRGI");
}

fn a12_page_request_that_fails_ends_the_transfer() {
    let mut pager = Pager::new();
    let (domain, to) = (Domain::new(4, 4), page());
    pager.world.set(0, second_stage(&domain));
    for code in [1, 15] {
        pager.world.edu.begin_write(IOVA, 8);
        let request = pager.take();
        pager.respond(&request, code);
        pager.world.edu.finish();
        check!(pager.world.edu.failed(), "the transfer was not refused");
    }
    // After a failure nothing is asked for.
    check_eq!(pager.world.edu.page_request_status() & 3, 1, "RF and UPRGI");
    reaches_nothing(&pager.world, IOVA, &[to]);
    pager.no_request();
    pager.world.edu.clear_page_request_status(1);
    pager.world.edu.begin_write(IOVA, 8);
    let request = pager.take();
    // Answers to what was not asked.
    pager.respond(&Request { group: request.group + 1, ..request }, 0);
    check_eq!(pager.world.edu.page_request_status() & 3, 2, "RF and UPRGI");
    pager.world.edu.clear_page_request_status(2);
    domain.map(IOVA, to, READ_WRITE);
    pager.respond(&request, 0);
    pager.world.edu.finish();
    check!(!pager.world.edu.failed(), "the write failed");
    pager.respond(&request, 0);
    check_eq!(pager.world.edu.page_request_status() & 3, 2, "RF and UPRGI");
    pager.world.no_fault();
    // Without PRE there are none.
    let context = pager.world.context(pager.world.edu.sid);
    store(context, load(context) & !PAGE_REQUEST_ENABLE);
    pager.world.forget();
    reaches_nothing(&pager.world, OTHER, &[to]);
    check_eq!(pager.world.unit.take_fault().map(|fault| fault.reason), Some(0x47), "the reason");
    pager.no_request();
}

fn a12_page_request_queue_overflows() {
    let mut pager = Pager::new();
    let (domain, to) = (Domain::new(4, 4), page());
    pager.world.set(0, second_stage(&domain));
    // All entries but one are in use: there is no room.
    pager.world.unit.write64(PQH, 0x20);
    reaches_nothing(&pager.world, IOVA, &[to]);
    check_eq!((pager.world.unit.read32(PRS), pager.world.unit.read64(PQT)), (PAGE_OVERFLOW, 0), "PRS and PQT");
    // Room is not enough: PRO stands.
    pager.world.unit.write64(PQH, 0);
    reaches_nothing(&pager.world, IOVA, &[to]);
    pager.no_request();
    pager.world.unit.write32(PRS, PAGE_OVERFLOW);
    store(to, UNTOUCHED);
    pager.world.edu.begin_write(IOVA, 8);
    let request = pager.take();
    domain.map(IOVA, to, READ_WRITE);
    pager.respond(&request, 0);
    pager.world.edu.finish();
    check!(load(to) != UNTOUCHED && !pager.world.edu.failed(), "the write did not arrive");
    pager.world.no_fault();
}

fn a12_page_request_is_given_up() {
    let mut pager = Pager::new();
    let (domain, to) = (Domain::new(4, 4), page());
    pager.world.set(0, second_stage(&domain));
    pager.world.edu.begin_write(IOVA, 8);
    let request = pager.take();
    check!(!pager.world.edu.failed(), "it waits");
    pager.world.edu.disable_page_requests();
    pager.world.edu.finish();
    check!(pager.world.edu.failed(), "the transfer was not refused");
    check_eq!(pager.world.edu.page_request_status() >> 8 & 1, 1, "Stopped");
    pager.respond(&request, 0);
    check_eq!(pager.world.edu.page_request_status() & 3, 2, "RF and UPRGI");
    pager.world.edu.clear_page_request_status(2);
    pager.world.edu.enable_page_requests();
    check_eq!(pager.world.edu.page_request_status() & 0x103, 0, "RF, UPRGI and Stopped");
    pager.world.edu.begin_write(IOVA, 8);
    let request = pager.take();
    domain.map(IOVA, to, READ_WRITE);
    pager.respond(&request, 0);
    pager.world.edu.finish();
    check!(!pager.world.edu.failed(), "the write failed");
}
