//! A guest in scalable mode: its tables, its descriptors, and a first stage. Sections 3.4.3, 3.6, 6.5.2 and 9.4 to 9.7
//! of the VT-d specification.

use crate::edu::Edu;
use crate::memory::{load, page, store};
use crate::pci::SourceId;
use crate::tables::Domain;
use crate::vtd::{CONTEXT_GLOBAL, Descriptor, IOTLB_GLOBAL, TRANSLATION, Unit};
use crate::world::{UNTOUCHED, WRITTEN};
use crate::{check, check_eq, harness};

/// Entry of a first stage: P.
pub const PRESENT: u64 = 1 << 0;
/// Entry of a first stage: R/W.
pub const WRITABLE: u64 = 1 << 1;
/// Entry of a first stage: U/S.
pub const USER: u64 = 1 << 2;
/// Entry of a first stage: A.
pub const ACCESSED: u64 = 1 << 5;
/// Entry of a first stage: D.
pub const DIRTY: u64 = 1 << 6;
/// Entry of a first stage: what most have.
pub const USABLE: u64 = PRESENT | WRITABLE | USER;
/// Entry of a second stage: A.
pub const SECOND_ACCESSED: u64 = 1 << 8;
/// Entry of a second stage: D.
pub const SECOND_DIRTY: u64 = 1 << 9;

/// Context entry: PASIDE.
pub const PASID_ENABLE: u64 = 1 << 3;
/// Context entry: DTE.
pub const DEVICE_TLB_ENABLE: u64 = 1 << 2;
/// Context entry: PRE.
pub const PAGE_REQUEST_ENABLE: u64 = 1 << 4;
/// Entry of a PASID table: SSADE.
pub const SECOND_FLAGS: u64 = 1 << 9;

/// PASID-cache invalidation, global. Section 6.5.2.2.
pub const PASID_CACHE_GLOBAL: Descriptor = [7 | 3 << 4, 0];
/// PASID-cache invalidation of a PASID of a domain.
pub const fn pasid_cache(domain: u16, pasid: u32) -> Descriptor {
    [7 | 1 << 4 | (domain as u64) << 16 | (pasid as u64) << 32, 0]
}
/// PASID-based IOTLB invalidation of a PASID of a domain. Section 6.5.2.4.
pub const fn pasid_iotlb(domain: u16, pasid: u32) -> Descriptor {
    [6 | 2 << 4 | (domain as u64) << 16 | (pasid as u64) << 32, 0]
}
/// The same of `2^mask` pages.
pub const fn pasid_pages(domain: u16, pasid: u32, iova: u64, mask: u8) -> Descriptor {
    [6 | 3 << 4 | (domain as u64) << 16 | (pasid as u64) << 32, iova | mask as u64]
}

/// Device-TLB invalidation of a page, of requests without PASID. Section 6.5.2.5.
pub const fn device_tlb(source: SourceId, iova: u64) -> Descriptor {
    [3 | (source.0 as u64) << 32, iova]
}
/// The same of everything.
pub const fn device_tlb_all(source: SourceId) -> Descriptor {
    [3 | (source.0 as u64) << 32, (u64::MAX >> 1) & !0xfff | 1]
}
/// Device-TLB invalidation of a page of a PASID. Section 6.5.2.6.
pub const fn pasid_device_tlb(source: SourceId, pasid: u32, iova: u64) -> Descriptor {
    [8 | (source.0 as u64) << 16 | (pasid as u64) << 32, iova]
}
/// Answer to a group of page requests. Section 7.6.1.
pub const fn page_response(source: SourceId, pasid: Option<u32>, group: u16, code: u8) -> Descriptor {
    let (present, pasid) = match pasid {
        Some(pasid) => (1, pasid),
        None => (0, 0),
    };
    [9 | present << 4 | (code as u64) << 12 | (source.0 as u64) << 16 | (pasid as u64) << 32, (group as u64) << 3]
}

/// The first edu with a device-TLB, which is on; without one the test is skipped.
pub fn a_device_with_ats() -> Edu {
    let edu = Edu::all().find(Edu::enable_ats);
    edu.unwrap_or_else(|| harness::skipped("there is no edu with a device-TLB"))
}

/// An entry of a PASID table: its first three words. Section 9.6. Walks snoop.
pub type Entry = [u64; 3];

/// For the second stage of a domain.
pub fn second_stage(domain: &Domain) -> Entry {
    [1 | u64::from(domain.levels - 2) << 2 | 2 << 6 | domain.root, u64::from(domain.id) | 1 << 23, 0]
}

/// For a first stage of four levels.
pub fn first_stage(first: &FirstStage, domain: u16) -> Entry {
    [1 | 2 << 2 | 1 << 6, u64::from(domain) | 1 << 23, first.root]
}

/// For a first stage whose addresses are those of the second stage of a domain.
pub fn nested(first: &FirstStage, domain: &Domain) -> Entry {
    let [low, middle, _] = second_stage(domain);
    [low | 1 << 6, middle, first.root + first.up]
}

/// For pass-through.
pub fn pass_through(domain: u16) -> Entry {
    [1 | 2 << 2 | 4 << 6, u64::from(domain) | 1 << 23, 0]
}

/// A first-stage table of four levels.
pub struct FirstStage {
    /// Where its root is in memory.
    pub root: u64,
    /// So much higher than memory are its addresses.
    pub up: u64,
}

impl FirstStage {
    /// An empty one. `up` is 0 unless there is a second stage, which leads from there to memory.
    pub fn new(up: u64) -> Self {
        Self { root: page(), up }
    }

    /// Where the entry of `level` for `iova` is. Tables above it are made if they are missing.
    pub fn entry(&self, iova: u64, level: u8) -> u64 {
        let mut table = self.root;
        for above in (level + 1..=4).rev() {
            let at = table + 8 * (iova >> (12 + 9 * (above - 1)) & 511);
            if load(at) & PRESENT == 0 {
                store(at, (page() + self.up) | USABLE);
            }
            table = (load(at) & 0x000f_ffff_ffff_f000) - self.up;
        }
        table + 8 * (iova >> (12 + 9 * (level - 1)) & 511)
    }

    /// Writes a leaf of 4 KiB that leads to `gpa` in memory. The caller invalidates. Where the leaf is.
    pub fn map(&self, iova: u64, gpa: u64, bits: u64) -> u64 {
        let at = self.entry(iova, 1);
        store(at, (gpa + self.up) | bits);
        at
    }
}

/// A unit in scalable mode, a device, and their tables.
pub struct ScalableWorld {
    /// The unit.
    pub unit: Unit,
    /// The device.
    pub edu: Edu,
    /// The root table.
    pub root: u64,
    contexts: [u64; 2],
}

impl ScalableWorld {
    /// Every context entry is empty; translation is on. With the device that all tests have.
    pub fn new() -> Self {
        Self::of(Edu::first())
    }

    /// The same with a device that has PASIDs, and has them enabled.
    pub fn with_pasids() -> Self {
        let edu = Edu::all().find(Edu::enable_pasids);
        Self::of(edu.unwrap_or_else(|| harness::skipped("there is no edu with PASIDs")))
    }

    /// The same with a device that has a device-TLB, which its context entry lets it have.
    pub fn with_ats() -> Self {
        let mut world = Self::of(a_device_with_ats());
        let context = world.context(world.edu.sid);
        world.entry(0);
        store(context, load(context) | DEVICE_TLB_ENABLE);
        world.forget();
        world
    }

    /// The same with a device that may ask for pages, too, and has PASIDs if the unit has some.
    pub fn with_page_requests() -> Self {
        let mut world = Self::with_ats();
        if !world.edu.enable_page_requests() {
            harness::skipped("the edu has no page requests");
        }
        world.edu.enable_pasids();
        let context = world.context(world.edu.sid);
        store(context, load(context) | PAGE_REQUEST_ENABLE);
        world.forget();
        world
    }

    fn of(edu: Edu) -> Self {
        let mut unit = Unit::new();
        if unit.extended(43, 1) == 0 {
            harness::skipped("the unit does not offer scalable mode");
        }
        let (root, contexts) = (page(), [page(), page()]);
        store(root, contexts[0] | 1);
        store(root + 8, contexts[1] | 1);
        unit.start_wide_queue();
        unit.set_root(root | 1 << 10);
        unit.command(TRANSLATION, true);
        let mut world = Self { unit, edu, root, contexts };
        world.forget();
        world
    }

    /// Every cached thing is invalidated.
    pub fn forget(&mut self) {
        self.unit.invalidate(&[CONTEXT_GLOBAL, PASID_CACHE_GLOBAL, IOTLB_GLOBAL]);
    }

    /// Where the context entry of a function of bus 0 is.
    pub fn context(&self, source: SourceId) -> u64 {
        self.contexts[usize::from(source.0 >> 7 & 1)] + 32 * u64::from(source.0 & 0x7f)
    }

    /// Where the entry of the PASID directory is for a PASID of 13 bits at most. The context entry is made if it is
    /// empty, with PASIDs if the unit has them.
    pub fn directory(&self, pasid: u32) -> u64 {
        let context = self.context(self.edu.sid);
        if load(context) & 1 == 0 {
            let pasids = if self.unit.extended(40, 1) == 1 { PASID_ENABLE } else { 0 };
            store(context, page() | pasids | 1);
        }
        (load(context) & !0xfff) + 8 * u64::from(pasid >> 6)
    }

    /// Where the entry of the PASID table is. The one of the directory is made if it is empty.
    pub fn entry(&self, pasid: u32) -> u64 {
        let directory = self.directory(pasid);
        if load(directory) & 1 == 0 {
            store(directory, page() | 1);
        }
        (load(directory) & !0xfff) + 64 * u64::from(pasid & 0x3f)
    }

    /// Writes an entry of the PASID table, and invalidates everything.
    pub fn set(&mut self, pasid: u32, [low, middle, upper]: Entry) {
        let at = self.entry(pasid);
        store(at, 0);
        store(at + 16, upper);
        store(at + 8, middle);
        store(at, low);
        self.forget();
    }

    /// The test fails if there is a fault.
    pub fn no_fault(&self) {
        if let Some(fault) = self.unit.take_fault() {
            panic!("a fault that nothing called for: {fault:x?}");
        }
    }

    /// The device writes at `iova`, and that reaches `gpa`; `scratch` is where it reaches its scratch page.
    pub fn writes_reach(&self, iova: u64, gpa: u64) {
        store(gpa, UNTOUCHED);
        self.edu.dma_write(iova, 8);
        self.no_fault();
        check!(load(gpa) != UNTOUCHED, "the device did not reach {gpa:#x}");
    }

    /// The device reads `from` and writes what it read to `to`: `to_gpa` gets what is in `from_gpa`.
    pub fn carries(&self, (from, from_gpa): (u64, u64), (to, to_gpa): (u64, u64)) {
        let value = WRITTEN ^ from ^ from_gpa;
        store(from_gpa, value);
        store(to_gpa, UNTOUCHED);
        self.edu.dma_read(from, 8);
        self.edu.dma_write(to, 8);
        self.no_fault();
        check_eq!(load(to_gpa), value, "what the device carried");
    }

    /// The device's access to the eight bytes at `iova` is blocked for `reason`.
    pub fn blocked(&self, iova: u64, read: bool, reason: u8) {
        match read {
            true => self.edu.dma_read(iova, 8),
            false => self.edu.dma_write(iova, 8),
        }
        match self.unit.take_fault() {
            Some(fault) => {
                check_eq!(fault.reason, reason, "the reason");
                check!(fault.source == self.edu.sid && fault.read == read, "the fault is {fault:x?}");
                check_eq!(fault.info, iova & !0xfff, "the address of the fault");
            }
            None => panic!("there is no fault; its reason should be {reason:#x}"),
        }
        self.no_fault();
    }
}

impl Default for ScalableWorld {
    fn default() -> Self {
        Self::new()
    }
}
