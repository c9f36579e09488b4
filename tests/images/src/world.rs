//! What most tests begin with: a unit with its queue and a root table, a device, and a domain that the device is in.
//!
//! Where the device is a function of the host, the host hears of the faults of its DMA. Then there are two: the
//! assigned one, of which is checked what it reaches and what not, and beside it an emulated one in the same domains,
//! which is blocked where the assigned one is, and has the fault record.

use crate::edu::Edu;
use crate::memory::{load, page, store};
use crate::pci::SourceId;
use crate::tables::{Domain, READ_WRITE};
use crate::vtd::{Fault, TRANSLATION, Unit, context_device, iotlb_domain};
use crate::{check, check_eq, harness};

/// An IOVA that nothing else uses.
pub const IOVA: u64 = 0x1_4020_3000;
/// What memory holds that a device must not change.
pub const UNTOUCHED: u64 = 0x1111_2222_3333_4444;
/// What a device writes.
pub const WRITTEN: u64 = 0xd0d1_d2d3_d4d5_d6d7;

/// A unit, a device, and their tables.
pub struct World {
    /// The unit.
    pub unit: Unit,
    /// The device that the test is about.
    pub edu: Edu,
    /// An emulated one, if that is a function of the host: its context entry follows that one's
    /// ([`World::set_context`]).
    pub beside: Option<Edu>,
    /// The root table.
    pub root: u64,
    /// The context table of bus 0.
    pub contexts: u64,
}

impl World {
    /// The queue runs and the root table is set; every context entry is empty; translation is off.
    pub fn new() -> Self {
        let edu = Edu::first();
        let beside = (!edu.recorded).then(Edu::recorded);
        Self::of(edu, beside)
    }

    /// The same for a test of what the unit records or sends of its own: with a device whose faults it hears of, even
    /// where there is an assigned one.
    pub fn recorded() -> Self {
        Self::of(Edu::recorded(), None)
    }

    /// The same with this device.
    pub fn with_device(edu: Edu) -> Self {
        Self::of(edu, None)
    }

    fn of(edu: Edu, beside: Option<Edu>) -> Self {
        Self::behind(Unit::new(), edu, beside)
    }

    /// The same for a device behind this unit. What it does wrong has to be recorded there, or by the one beside it.
    pub fn behind(mut unit: Unit, edu: Edu, beside: Option<Edu>) -> Self {
        let (root, contexts) = (page(), page());
        store(root, contexts | 1);
        unit.start_queue(0);
        unit.set_root(root);
        unit.invalidate_all();
        Self { unit, edu, beside, root, contexts }
    }

    /// With the device in a domain of the unit's narrowest table, and translation on. The domain maps the device's
    /// scratch page.
    pub fn with_domain() -> (Self, Domain) {
        Self::new().and_widest_domain()
    }

    /// As [`World::with_domain`], for [`World::recorded`].
    pub fn recorded_with_domain() -> (Self, Domain) {
        Self::recorded().and_widest_domain()
    }

    /// As [`World::with_domain`], with a table of `levels`; the test is skipped when the unit has none of these.
    pub fn with_levels(levels: u8) -> (Self, Domain) {
        let world = Self::new();
        if world.unit.capability(8, 5) >> (levels - 2) & 1 == 0 {
            harness::skipped("the unit does not offer this number of levels");
        }
        world.and_domain(levels)
    }

    fn and_widest_domain(self) -> (Self, Domain) {
        let levels = self.levels();
        self.and_domain(levels)
    }

    fn and_domain(mut self, levels: u8) -> (Self, Domain) {
        let domain = self.domain(1, levels);
        self.attach(self.edu.sid, &domain);
        self.unit.command(TRANSLATION, true);
        (self, domain)
    }

    /// The most levels that the unit offers, up to 4.
    pub fn levels(&self) -> u8 {
        let offered = self.unit.capability(8, 5);
        if offered >> 2 & 1 == 1 { 4 } else { 3 }
    }

    /// A domain that maps the device's scratch page.
    pub fn domain(&self, id: u16, levels: u8) -> Domain {
        let domain = Domain::new(id, levels);
        for edu in [&self.edu].into_iter().chain(&self.beside) {
            domain.map(edu.scratch, edu.scratch, READ_WRITE);
        }
        domain
    }

    /// Where the context entry of a function of bus 0 is.
    pub fn context(&self, source: SourceId) -> u64 {
        self.contexts + 16 * u64::from(source.0 & 0xff)
    }

    /// `source`, and the device beside it, if it is the one that the test is about.
    fn followed(&self, source: SourceId) -> impl Iterator<Item = SourceId> + use<> {
        let beside = self.beside.as_ref().filter(|_| source == self.edu.sid).map(|beside| beside.sid);
        [source].into_iter().chain(beside)
    }

    /// Writes a context entry. The caller invalidates.
    pub fn set_context(&self, source: SourceId, low: u64, high: u64) {
        for source in self.followed(source) {
            let at = self.context(source);
            // Not present while it is half written.
            store(at, 0);
            store(at + 8, high);
            store(at, low);
        }
    }

    /// Puts a function into a domain, and invalidates what there was.
    pub fn attach(&mut self, source: SourceId, domain: &Domain) {
        let high = u64::from(domain.levels - 2) | u64::from(domain.id) << 8;
        let old = (load(self.context(source) + 8) >> 8) as u16;
        self.set_context(source, domain.root | 1, high);
        self.refresh(source, old);
        self.refresh(source, domain.id);
    }

    /// Invalidates a function's context entry, of this domain and of none, and the domain's translations.
    pub fn refresh(&mut self, source: SourceId, id: u16) {
        for source in self.followed(source) {
            self.unit.invalidate(&[context_device(0, source), context_device(id, source), iotlb_domain(id)]);
        }
    }

    /// The test fails if there is a fault.
    pub fn no_fault(&self) {
        if let Some(fault) = self.unit.take_fault() {
            panic!("a fault that nothing called for: {fault:x?}");
        }
    }

    /// The test fails unless there is just this fault of the device, which accessed the eight bytes at `iova`; it is
    /// taken. There must be none of a function of the host: then the device beside it does the same, and the fault is
    /// that one's.
    pub fn fault(&self, reason: u8, iova: u64, read: bool) {
        let mut source = self.edu.sid;
        if let Some(beside) = &self.beside {
            self.no_fault();
            match read {
                true => beside.dma_read(iova, 8),
                false => beside.dma_write(iova, 8),
            }
            source = beside.sid;
        }
        let expected = Fault { source, reason, info: iova & !0xfff, read };
        match self.unit.take_fault() {
            Some(fault) => check!(fault == expected, "the fault is {fault:x?}, not {expected:x?}"),
            None => panic!("there is no fault; it should be {expected:x?}"),
        }
        self.no_fault();
    }

    /// The first IOVA that an assigned device cannot reach although its table grants it, since its host did not map it:
    /// one record tells of it, however many pages they are, and is taken. `None` where there is no such record.
    pub fn refused(&self) -> Option<u64> {
        let fault = self.unit.take_fault()?;
        let expected = Fault { source: self.edu.sid, reason: TABLE_UNUSABLE, info: fault.info, read: true };
        check!(self.edu.assigned && fault == expected, "the fault is {fault:x?}, not that of a refused mapping");
        self.no_fault();
        Some(fault.info)
    }

    /// The device writes at `iova`, and that reaches `gpa`.
    pub fn writes_reach(&self, iova: u64, gpa: u64) {
        store(gpa, UNTOUCHED);
        self.edu.fill(WRITTEN ^ iova);
        self.edu.dma_write(iova, 8);
        self.no_fault();
        check_eq!(load(gpa), WRITTEN ^ iova, "what the device wrote");
    }

    /// The device reads at `iova`, and gets what is at `gpa`.
    pub fn reads_reach(&self, iova: u64, gpa: u64) {
        store(gpa, WRITTEN ^ iova ^ gpa);
        self.edu.fill(UNTOUCHED);
        self.edu.dma_read(iova, 8);
        self.no_fault();
        check_eq!(self.edu.content(), WRITTEN ^ iova ^ gpa, "what the device read");
        self.no_fault();
    }

    /// Reads and writes at `iova` reach `gpa`.
    pub fn reaches(&self, iova: u64, gpa: u64) {
        self.writes_reach(iova, gpa);
        self.reads_reach(iova, gpa);
    }

    /// A write at `iova` is blocked for `reason`, and `gpa`, which it could have reached, stays as it was.
    pub fn write_blocked(&self, iova: u64, gpa: u64, reason: u8) {
        store(gpa, UNTOUCHED);
        self.edu.dma_write(iova, 8);
        self.fault(reason, iova, false);
        check_eq!(load(gpa), UNTOUCHED, "memory that the device must not reach");
    }

    /// A read at `iova` is blocked for `reason`, and the device does not get what `gpa` has. Needs the scratch page.
    pub fn read_blocked(&self, iova: u64, gpa: u64, reason: u8) {
        store(gpa, WRITTEN);
        self.edu.fill(UNTOUCHED);
        self.no_fault();
        self.edu.dma_read(iova, 8);
        self.fault(reason, iova, true);
        check!(self.edu.content() != WRITTEN, "the device read what it must not see");
        self.no_fault();
    }

    /// As [`World::read_blocked`], for a page that may be written. Linux up to 6.12 lets a function of the host read
    /// such a page: then only the device beside it is looked at.
    pub fn read_of_write_only_blocked(&self, iova: u64, gpa: u64) {
        match self.edu.recorded {
            false => self.fault(READ_DENIED, iova, true),
            true => self.read_blocked(iova, gpa, READ_DENIED),
        }
    }

    /// Neither reads nor writes at `iova` reach `gpa`: no permission.
    pub fn not_mapped(&self, iova: u64, gpa: u64) {
        self.edu.fill(WRITTEN);
        self.write_blocked(iova, gpa, WRITE_DENIED);
        self.read_blocked(iova, gpa, READ_DENIED);
    }
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

/// Fault reason: a paging table could not be used; also for what the host did not map.
pub const TABLE_UNUSABLE: u8 = 7;
/// Fault reason: no write permission.
pub const WRITE_DENIED: u8 = 5;
/// Fault reason: no read permission.
pub const READ_DENIED: u8 = 6;
