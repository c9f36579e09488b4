//! A guest in scalable mode: its tables and its descriptors.

use vtd::spec::invalidation::{IotlbHigh, PasidLow, kind, pasid_cache, pasid_iotlb};
use vtd::spec::pasid::{ContextHigh, ContextLow, DirectoryEntry, EntryLow, EntryMiddle, EntryUpper, RootHalf};
use vtd::{DomainId, Gpa, PagedSpace, Requester, SpaceKey, Stages, Tables, UnitConfig, UnitId};

use crate::rig::{NVME, Rig};

/// An entry of a PASID table.
pub type Entry = [u64; 8];

/// A unit that offers scalable mode.
pub fn config(aw_bits: u8) -> UnitConfig {
    UnitConfig { scalable: Some(Stages::Second), ..UnitConfig::new(UnitId(0), aw_bits) }
}

/// A present entry for the second stage of `width` bits at `root`. As Linux does, it has walks snoop.
pub fn second_stage(root: u64, width: u8, domain: u16) -> Entry {
    let low = EntryLow::new().with_present(true).with_translation_type(2).with_address_width((width - 30) / 9);
    [low.with_second_stage(root >> 12).into_bits(), middle(domain), 0, 0, 0, 0, 0, 0]
}

/// A present entry for the first stage of 4 or 5 levels at `root`.
pub fn first_stage(root: u64, levels: u8, domain: u16) -> Entry {
    // AW as Linux writes it.
    let low = EntryLow::new().with_present(true).with_translation_type(1).with_address_width(2);
    let upper = EntryUpper::new().with_paging_mode(levels - 4).with_first_stage(root >> 12);
    [low.into_bits(), middle(domain), upper.into_bits(), 0, 0, 0, 0, 0]
}

/// A present entry for the first stage of 4 levels at `first`, whose addresses are those of a second stage.
pub fn nested(first: u64, second: u64, width: u8, domain: u16) -> Entry {
    let low = EntryLow::new().with_present(true).with_translation_type(3).with_address_width((width - 30) / 9);
    let upper = EntryUpper::new().with_first_stage(first >> 12);
    [low.with_second_stage(second >> 12).into_bits(), middle(domain), upper.into_bits(), 0, 0, 0, 0, 0]
}

/// The entry with SSADE set.
pub fn with_flags(mut entry: Entry) -> Entry {
    entry[0] = EntryLow::from_bits(entry[0]).with_second_stage_dirty(true).into_bits();
    entry
}

/// A present entry for pass-through.
pub fn pass_through(domain: u16) -> Entry {
    let low = EntryLow::new().with_present(true).with_translation_type(4).with_address_width(2);
    [low.into_bits(), middle(domain), 0, 0, 0, 0, 0, 0]
}

fn middle(domain: u16) -> u64 {
    EntryMiddle::new().with_domain(domain).with_walk_snoop(true).into_bits()
}

/// The space that [`second_stage`] describes.
pub fn space(root: u64, width: u8, domain: u16) -> SpaceKey {
    let tables = Tables::Second { root: Gpa(root), width };
    SpaceKey::Paged(PagedSpace { unit: UnitId(0), tables, domain: DomainId(domain) })
}

impl Rig {
    /// A unit in scalable mode, with the queue and translation on.
    pub fn scalable(config: UnitConfig) -> Self {
        let mut rig = Self::with(config);
        (rig.table_mode, rig.wide) = (1, true);
        rig.enable_queue();
        rig.enable_translation();
        rig
    }

    /// The same, with `NVME` assigned and in domain 1; and the root of its 48-bit table.
    pub fn scalable_with_nvme() -> (Self, u64) {
        let mut rig = Self::scalable(config(48));
        let root = rig.table();
        rig.set_entry(NVME, 0, second_stage(root, 48, 1));
        rig.unit.add_requester(NVME).unwrap();
        rig.listener.take_events();
        (rig, root)
    }

    /// Where the half of the root entry is that leads to a requester's context table.
    pub fn root_half_address(&self, requester: Requester) -> u64 {
        self.root_table + u64::from(requester.sid.bus()) * 16 + u64::from(requester.sid.devfn() >> 7) * 8
    }

    /// Where the context entry of a requester is; its table is made when there is none.
    pub fn scalable_context_address(&mut self, requester: Requester) -> u64 {
        let half = self.root_half_address(requester);
        let mut entry = RootHalf::from_bits(self.load(half));
        if !entry.present() {
            entry = RootHalf::new().with_present(true).with_context_table(self.table() >> 12);
            self.store(half, entry.into_bits());
        }
        (entry.context_table() << 12) + u64::from(requester.sid.devfn() & 0x7f) * 32
    }

    /// Writes the first half of a requester's context entry.
    pub fn set_scalable_context(&mut self, requester: Requester, low: ContextLow, high: ContextHigh) {
        let entry = self.scalable_context_address(requester);
        self.store(entry + 8, high.into_bits());
        self.store(entry, low.into_bits());
    }

    /// Where the entry of a PASID directory is; the context entry is made when it is not present, with a directory of
    /// 2^13 PASIDs.
    pub fn directory_address(&mut self, requester: Requester, pasid: u32) -> u64 {
        let context = self.scalable_context_address(requester);
        let mut low = ContextLow::from_bits(self.load(context));
        if !low.present() {
            low = ContextLow::new().with_present(true).with_directory(self.table() >> 12);
            self.set_scalable_context(requester, low, ContextHigh::new());
        }
        (low.directory() << 12) + u64::from(pasid >> 6) * 8
    }

    /// Where the entry of a PASID table is; what is above it is made when it is not present.
    pub fn entry_of_pasid(&mut self, requester: Requester, pasid: u32) -> u64 {
        let directory = self.directory_address(requester, pasid);
        let mut entry = DirectoryEntry::from_bits(self.load(directory));
        if !entry.present() {
            entry = DirectoryEntry::new().with_present(true).with_table(self.table() >> 12);
            self.store(directory, entry.into_bits());
        }
        (entry.table() << 12) + u64::from(pasid & 0x3f) * 64
    }

    /// Writes an entry of the PASID table, the lowest word last.
    pub fn set_entry(&mut self, requester: Requester, pasid: u32, entry: Entry) {
        let at = self.entry_of_pasid(requester, pasid);
        for (index, word) in entry.into_iter().enumerate().rev() {
            self.store(at + index as u64 * 8, word);
        }
    }
}

/// A PASID-cache invalidation of a PASID of a domain.
pub fn pasid_cache_of(domain: u16, pasid: u32) -> (u64, u64) {
    (low(kind::PASID_CACHE, pasid_cache::PASID).with_domain(domain).with_pasid(pasid).into_bits(), 0)
}

/// A PASID-cache invalidation of a domain.
pub fn pasid_cache_domain(domain: u16) -> (u64, u64) {
    (low(kind::PASID_CACHE, pasid_cache::DOMAIN).with_domain(domain).into_bits(), 0)
}

/// A PASID-cache invalidation of everything.
pub fn pasid_cache_global() -> (u64, u64) {
    (low(kind::PASID_CACHE, pasid_cache::GLOBAL).into_bits(), 0)
}

/// A PASID-based IOTLB invalidation of a PASID of a domain.
pub fn pasid_iotlb_of(domain: u16, pasid: u32) -> (u64, u64) {
    (low(kind::PASID_IOTLB, pasid_iotlb::PASID).with_domain(domain).with_pasid(pasid).into_bits(), 0)
}

/// The same of `2^mask` pages at `iova`.
pub fn pasid_iotlb_pages(domain: u16, pasid: u32, iova: u64, mask: u8) -> (u64, u64) {
    let low = low(kind::PASID_IOTLB, pasid_iotlb::PAGES).with_domain(domain).with_pasid(pasid);
    (low.into_bits(), IotlbHigh::new().with_page(iova >> 12).with_address_mask(mask).into_bits())
}

fn low(kind: u8, granularity: u8) -> PasidLow {
    PasidLow::new().with_kind(kind).with_granularity(granularity)
}
