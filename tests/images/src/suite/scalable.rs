//! and E-1: scalable mode, with one stage, with two, with flags and with PASIDs.

use images::memory::{load, page, store};
use images::scalable::{
    ACCESSED, DIRTY, FirstStage, PASID_ENABLE, SECOND_ACCESSED, SECOND_DIRTY, SECOND_FLAGS, ScalableWorld, USABLE,
    USER, WRITABLE, first_stage, nested, pasid_cache, pasid_iotlb, pasid_pages, pass_through, second_stage,
};
use images::tables::{Domain, READ, READ_WRITE, WRITE};
use images::vtd::{iotlb_domain, iotlb_pages};
use images::world::IOVA;
use images::{check, check_eq};

images::tests!(
    a2_second_stage_of_a_pasid_table => "--iommu vtd,scalable=on",
    a2_first_stage_says_what_was_used => "--iommu vtd,scalable=on,stage=first",
    a2_nested_translation_leads_through_both_stages => "--iommu vtd,scalable=on,stage=both,nest=on",
    a2_nested_translation_has_flags_in_both_stages => "--iommu vtd,scalable=on,stage=both,nest=on,slads=on",
    a3_nested_translation_has_reasons_of_its_own => "--iommu vtd,scalable=on,stage=both,nest=on",
    a4_nested_translation_is_off_unless_asked_for => "--iommu vtd,scalable=on,stage=both",
    a6_invalidations_of_either_stage_take_effect => "--iommu vtd,scalable=on,stage=both,nest=on",
    e1_second_stage_says_what_was_written => "--iommu vtd,scalable=on,slads=on",
    e1_tracking_goes_on_while_a_device_works => "--iommu vtd,scalable=on,slads=on",
    a2_two_pasids_reach_different_memory => "--iommu vtd,scalable=on,stage=both,pasid-bits=16 --device edu,pasid=on",
    a3_pasids_have_reasons_of_their_own => "--iommu vtd,scalable=on,pasid-bits=16 --device edu,pasid=on",
    a3_pasid_in_legacy_mode_is_blocked => "--iommu vtd,scalable=on,pasid-bits=16 --device edu,pasid=on",
    a8_record_has_the_pasid => "--iommu vtd,scalable=on,pasid-bits=20 --device edu,pasid=on",
    a12_interrupt_range_is_memory_with_a_pasid => "--iommu vtd,scalable=on,pasid-bits=16 --device edu,pasid=on",
);

/// In a second stage, memory is so much higher.
const UP: u64 = 1 << 33;
const OTHER: u64 = IOVA + 0x1000;

fn a2_second_stage_of_a_pasid_table() {
    let mut world = ScalableWorld::new();
    let (domain, from, to) = (Domain::new(5, 4), page(), page());
    domain.map(IOVA, from, READ_WRITE);
    domain.map(OTHER, to, READ_WRITE);
    world.set(0, second_stage(&domain));
    world.carries((IOVA, from), (OTHER, to));
    domain.map(OTHER, from, READ_WRITE);
    world.unit.invalidate(&[iotlb_pages(5, OTHER, 0)]);
    world.writes_reach(OTHER, from);
}

fn a2_first_stage_says_what_was_used() {
    let mut world = ScalableWorld::new();
    let (first, from, to) = (FirstStage::new(0), page(), page());
    let read = first.map(IOVA, from, USABLE);
    let written = first.map(OTHER, to, USABLE);
    world.set(0, first_stage(&first, 5));
    world.carries((IOVA, from), (OTHER, to));
    check_eq!(load(read) & (ACCESSED | DIRTY), ACCESSED, "the flags of what was read");
    check_eq!(load(written) & (ACCESSED | DIRTY), ACCESSED | DIRTY, "the flags of what was written");
}

/// A first stage over a second one, with all of the first stage's tables in the second.
struct TwoStages {
    world: ScalableWorld,
    first: FirstStage,
    second: Domain,
}

impl TwoStages {
    fn new(flags: bool) -> Self {
        let mut world = ScalableWorld::new();
        let (first, second) = (FirstStage::new(UP), Domain::new(5, 4));
        // All of the image's memory, by pages, so that each table has an entry of its own.
        let [low, middle, upper] = nested(&first, &second);
        world.set(0, [if flags { low | SECOND_FLAGS } else { low }, middle, upper]);
        let both = Self { world, first, second };
        both.show(both.first.root);
        both
    }

    /// The second stage leads to this page of memory. Where its entry is.
    fn show(&self, gpa: u64) -> u64 {
        self.second.map((gpa & !0xfff) + UP, gpa & !0xfff, READ_WRITE);
        self.beneath(gpa)
    }

    /// The entry of the second stage for this page.
    fn beneath(&self, gpa: u64) -> u64 {
        self.second.entry((gpa & !0xfff) + UP, 1)
    }

    /// A page of both stages. Where the leaf of the first is.
    fn map(&self, iova: u64, gpa: u64) -> u64 {
        let leaf = self.first.map(iova, gpa, USABLE);
        (1..4).for_each(|level| {
            self.show(self.first.entry(iova, level));
        });
        self.show(gpa);
        leaf
    }
}

fn a2_nested_translation_leads_through_both_stages() {
    let mut both = TwoStages::new(false);
    check_eq!(both.world.unit.extended(26, 1), 1, "NEST");
    let (from, to) = (page(), page());
    let read = both.map(IOVA, from);
    let written = both.map(OTHER, to);
    both.world.forget();
    for _ in 0..2 {
        both.world.carries((IOVA, from), (OTHER, to));
    }
    check_eq!(load(read) & (ACCESSED | DIRTY), ACCESSED, "the flags of what was read");
    check_eq!(load(written) & (ACCESSED | DIRTY), ACCESSED | DIRTY, "the flags of what was written");
    check_eq!(load(both.beneath(to)) & (SECOND_ACCESSED | SECOND_DIRTY), 0, "flags without SSADE");
}

fn a2_nested_translation_has_flags_in_both_stages() {
    let mut both = TwoStages::new(true);
    let (from, to) = (page(), page());
    both.map(IOVA, from);
    let written = both.map(OTHER, to);
    both.world.forget();
    both.world.carries((IOVA, from), (OTHER, to));
    let flags = |at: u64| load(at) & (SECOND_ACCESSED | SECOND_DIRTY);
    check_eq!(flags(both.beneath(from)), SECOND_ACCESSED, "flags of what was read");
    check_eq!(flags(both.beneath(to)), SECOND_ACCESSED | SECOND_DIRTY, "flags of what was written");
    check_eq!(flags(both.beneath(written)), SECOND_ACCESSED | SECOND_DIRTY, "flags of a table of the first stage");
}

fn a3_nested_translation_has_reasons_of_its_own() {
    let mut both = TwoStages::new(false);
    let page = page();
    let leaf = both.map(IOVA, page);
    both.world.forget();
    both.world.writes_reach(IOVA, page);
    let good = load(leaf);
    let mut with = |at: u64, entry: u64, read: bool, reason: u8| {
        let before = load(at);
        store(at, entry);
        both.world.forget();
        both.world.blocked(IOVA, read, reason);
        store(at, before);
        both.world.forget();
        both.world.writes_reach(IOVA, page);
    };
    let second = &both.second;
    let beneath = |gpa: u64| second.entry((gpa & !0xfff) + UP, 1);
    let (root, table) = (beneath(both.first.root), beneath(leaf));
    with(leaf, good & !WRITABLE, false, 0x85);
    with(leaf, good & !USER, true, 0x81);
    with(leaf, 0, true, 0x71);
    with(leaf, good & 0xfff | (UP + (1 << 32)), true, 0x79);
    with(beneath(page), load(beneath(page)) & !WRITE, false, 0x85);
    with(beneath(page), load(beneath(page)) & !READ, true, 0x86);
    with(beneath(page), 0, true, 0x79);
    with(beneath(page), 0xfee0_0000 | READ_WRITE, true, 0x87);
    with(root, load(root) & !READ, true, 0x75);
    with(table, load(table) & !READ, true, 0x76);
    with(table, 0, true, 0x79);
    with(table, load(table) | 1 << 11, true, 0x7a);
    // A flag is to be set in a table that must not be written.
    store(leaf, good & !(ACCESSED | DIRTY));
    with(table, load(table) & !WRITE, true, 0x77);
    // Beyond the width of the second stage, of 39 bits now.
    let narrow = Domain::new(5, 3);
    let [low, middle, upper] = nested(&both.first, &narrow);
    both.world.set(0, [low, middle, 1 << 39]);
    both.world.blocked(IOVA, true, 0x5b);
    narrow.map(both.first.root + UP, both.first.root, READ_WRITE);
    store(both.first.entry(IOVA, 4), 1 << 39 | USABLE);
    both.world.set(0, [low, middle, upper]);
    both.world.blocked(IOVA, true, 0x74);
}

fn a4_nested_translation_is_off_unless_asked_for() {
    let mut both = TwoStages::new(false);
    check_eq!((both.world.unit.extended(26, 1), both.world.unit.extended(45, 1)), (0, 0), "NEST and SSADS");
    both.world.blocked(IOVA, true, 0x5b);
    let [low, middle, upper] = second_stage(&both.second);
    both.world.set(0, [low | SECOND_FLAGS, middle, upper]);
    both.world.blocked(IOVA, true, 0x5a);
}

fn a6_invalidations_of_either_stage_take_effect() {
    let mut both = TwoStages::new(false);
    let (old, new) = (page(), page());
    let leaf = both.map(IOVA, old);
    both.show(new);
    both.world.forget();
    let (to_old, to_new) = (load(leaf) | ACCESSED | DIRTY, (new + UP) | USABLE | ACCESSED | DIRTY);
    for descriptor in [
        pasid_iotlb(5, 0),
        pasid_pages(5, 0, IOVA, 0),
        pasid_cache(5, 0),
        iotlb_domain(5),
        // Of addresses of the second stage: all of both.
        iotlb_pages(5, 0x7000, 0),
    ] {
        store(leaf, to_old);
        both.world.forget();
        both.world.writes_reach(IOVA, old);
        store(leaf, to_new);
        both.world.unit.invalidate(&[descriptor]);
        both.world.writes_reach(IOVA, new);
    }
    store(leaf, to_old);
    let beneath = both.beneath(old);
    for descriptor in [iotlb_pages(5, old + UP, 0), iotlb_domain(5)] {
        store(beneath, old | READ_WRITE);
        both.world.forget();
        both.world.writes_reach(IOVA, old);
        store(beneath, new | READ_WRITE);
        both.world.unit.invalidate(&[descriptor]);
        both.world.writes_reach(IOVA, new);
    }
}

/// A domain with flags that maps two pages; where their leaves are.
fn tracked() -> (ScalableWorld, Domain, [u64; 2], [u64; 2]) {
    let mut world = ScalableWorld::new();
    check_eq!(world.unit.extended(45, 1), 1, "SSADS");
    let (domain, pages) = (Domain::new(5, 4), [page(), page()]);
    domain.map(IOVA, pages[0], READ_WRITE);
    domain.map(OTHER, pages[1], READ_WRITE);
    let [low, middle, upper] = second_stage(&domain);
    world.set(0, [low | SECOND_FLAGS, middle, upper]);
    let leaves = [domain.entry(IOVA, 1), domain.entry(OTHER, 1)];
    (world, domain, pages, leaves)
}

fn e1_second_stage_says_what_was_written() {
    let (mut world, domain, pages, leaves) = tracked();
    let flags = || leaves.map(|leaf| load(leaf) & (SECOND_ACCESSED | SECOND_DIRTY));
    check_eq!(flags(), [0, 0], "before anything");
    world.carries((IOVA, pages[0]), (OTHER, pages[1]));
    check_eq!(flags(), [SECOND_ACCESSED, SECOND_ACCESSED | SECOND_DIRTY], "one was read, one was written");
    for level in 2..=4 {
        let flags = load(domain.entry(IOVA, level)) & (SECOND_ACCESSED | SECOND_DIRTY);
        check_eq!(flags, SECOND_ACCESSED, "the flags of a directory");
    }
    // As a hypervisor does in each round of a migration.
    for _ in 0..3 {
        store(leaves[1], load(leaves[1]) & !SECOND_DIRTY);
        world.unit.invalidate(&[iotlb_pages(5, OTHER, 0)]);
        world.edu.dma_read(OTHER, 8);
        check_eq!(flags()[1], SECOND_ACCESSED, "nothing was written");
        world.writes_reach(OTHER, pages[1]);
        check_eq!(flags()[1], SECOND_ACCESSED | SECOND_DIRTY, "it was written again");
    }
}

fn e1_tracking_goes_on_while_a_device_works() {
    let (mut world, _, pages, leaves) = tracked();
    world.edu.fill(1);
    let _ = world.unit.take_fault();
    for round in 0..50u64 {
        world.edu.begin_write(OTHER, 8);
        store(leaves[1], pages[1] | READ_WRITE);
        world.unit.invalidate(&[iotlb_pages(5, OTHER, 0)]);
        world.edu.finish();
        world.no_fault();
        // Whatever came first: a page that is written from now on gets dirty.
        store(pages[1], !round);
        world.edu.dma_write(OTHER, 8);
        check!(load(leaves[1]) & SECOND_DIRTY != 0, "round {round}: a write was not noted");
    }
}

fn a2_two_pasids_reach_different_memory() {
    let mut world = ScalableWorld::with_pasids();
    check_eq!((world.unit.extended(40, 1), world.unit.extended(35, 5)), (1, 15), "PASID and PSS");
    let (first, second) = (FirstStage::new(0), Domain::new(6, 4));
    let [none, one, other, from] = [page(), page(), page(), page()];
    first.map(IOVA, one, USABLE);
    first.map(OTHER, from, USABLE);
    second.map(IOVA, other, READ_WRITE);
    let plain = Domain::new(4, 4);
    plain.map(IOVA, none, READ_WRITE);
    world.set(0, second_stage(&plain));
    world.set(7, first_stage(&first, 5));
    world.set(0x1fff, second_stage(&second));
    for _ in 0..2 {
        for (pasid, reached) in [(None, none), (Some(7), one), (Some(0x1fff), other), (Some(7), one)] {
            [none, one, other].iter().for_each(|page| store(*page, u64::MAX));
            // By PASID 7 it reads what it writes by the other.
            store(from, 0x1234_5678 + reached);
            world.edu.set_pasid(Some(7));
            world.edu.dma_read(OTHER, 8);
            world.edu.set_pasid(pasid);
            world.edu.dma_write(IOVA, 8);
            world.no_fault();
            for page in [none, one, other] {
                let expected = if page == reached { 0x1234_5678 + reached } else { u64::MAX };
                check_eq!(load(page), expected, "what is in a page of a PASID");
            }
        }
    }
    // Without the enable of its capability the device sends nothing.
    world.edu.set_pasid(Some(7));
    world.edu.disable_pasids();
    store(one, u64::MAX);
    world.edu.dma_write(IOVA, 8);
    world.no_fault();
    check_eq!(load(one), u64::MAX, "what a device without its PASIDs reaches");
}

fn a3_pasids_have_reasons_of_their_own() {
    let mut world = ScalableWorld::with_pasids();
    let (domain, page) = (Domain::new(5, 4), page());
    domain.map(IOVA, page, READ_WRITE);
    world.set(7, second_stage(&domain));
    world.edu.set_pasid(Some(7));
    world.writes_reach(IOVA, page);
    let (context, directory, entry) = (world.context(world.edu.sid), world.directory(7), world.entry(7));
    // No memory, and no address that is too wide.
    let nowhere = 1 << 30;
    for (at, value, reason) in [
        (world.root, load(world.root) & !1, 0x39),
        (world.root, load(world.root) | 2, 0x3a),
        (world.root, nowhere | 1, 0x40),
        (context, load(context) & !1, 0x41),
        (context, load(context) | 1 << 4, 0x42),
        // RID_PASID is beyond the directory; PASIDE is clear; RID_PASID is the PASID of the request.
        (context + 8, 0x2000, 0x43),
        (context, load(context) & !PASID_ENABLE, 0x45),
        (context + 8, 7, 0x48),
        (context, nowhere | PASID_ENABLE | 1, 0x50),
        (directory, 0, 0x51),
        (directory, load(directory) | 4, 0x52),
        (directory, nowhere | 1, 0x58),
        (entry, 0, 0x59),
        (entry, load(entry) | 1 << 5, 0x5a),
        // No translation type that there is, and no width.
        (entry, load(entry) & !(7 << 6) | 5 << 6, 0x5b),
        (entry, load(entry) | 7 << 2, 0x5b),
    ] {
        let before = load(at);
        store(at, value);
        world.forget();
        world.blocked(IOVA, false, reason);
        store(at, before);
        world.forget();
        world.writes_reach(IOVA, page);
    }
    for (pasid, reason) in [(8, 0x59), (0x40, 0x51), (0x2000, 0x46), (0x1_0000, 0x89), (0xf_ffff, 0x89)] {
        world.edu.set_pasid(Some(pasid));
        world.blocked(IOVA, true, reason);
    }
}

fn a3_pasid_in_legacy_mode_is_blocked() {
    let world = ScalableWorld::with_pasids();
    world.unit.set_root(world.root);
    world.edu.set_pasid(Some(7));
    world.blocked(IOVA, true, 0x31);
    // Abort-DMA mode.
    world.unit.set_root(world.root | 3 << 10);
    world.blocked(IOVA, true, 0x33);
}

fn a8_record_has_the_pasid() {
    let mut world = ScalableWorld::with_pasids();
    world.set(0, pass_through(3));
    for pasid in [Some(1), None, Some(0xf_ffff)] {
        world.edu.set_pasid(pasid);
        world.edu.dma_read(1 << 50, 8);
        check_eq!(world.unit.take_pasid(), Some(pasid), "the PASID of the fault");
    }
}

fn a12_interrupt_range_is_memory_with_a_pasid() {
    let mut world = ScalableWorld::with_pasids();
    let (domain, page) = (Domain::new(5, 4), page());
    domain.map(0xfee0_0000, page, READ_WRITE);
    world.set(7, second_stage(&domain));
    world.set(8, pass_through(6));
    world.edu.set_pasid(Some(7));
    world.edu.dma_write(0xfee0_0000, 4);
    world.no_fault();
    world.writes_reach(0xfee0_0000, page);
    world.edu.set_pasid(Some(8));
    world.blocked(0xfee0_0000, false, 0x87);
}
