//! The guest-physical map changes below tables that stay as they are: BARs that come, go and move (B-15).

use std::collections::BTreeMap;

use proptest::prelude::*;
use vtd::{Access, Bounds, GpaRange, Iova, IovaRange, MapOp, Mapping, Perm, SpaceKey, UnitConfig, UnitId};

use crate::rig::{Event, NIC, NVME, Rig, context_device, iotlb_domain, iotlb_pages, map, mapping, unmap};

/// A BAR of 2 MiB, beyond all memory, and another place for it.
const BAR: GpaRange = GpaRange::new(0x1_0000_0000, 0x1_001f_ffff);
const ELSEWHERE: GpaRange = GpaRange::new(0x1_8000_0000, 0x1_801f_ffff);

/// A function in domain 1, and the root of its table. No BAR is there.
fn without_bars() -> (Rig, u64) {
    let (rig, root) = Rig::with_nvme();
    rig.listener.0.lock().unwrap().absent = vec![BAR, ELSEWHERE];
    (rig, root)
}

fn set_absent(rig: &Rig, absent: &[GpaRange]) {
    rig.listener.0.lock().unwrap().absent = absent.to_vec();
}

#[test]
fn b15_a_bar_goes_away_and_comes_back() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x4000, 0x8000, 2);
    rig.pages(root, 0x6000, BAR.first + 0x3000, 2);
    rig.pages(root, 0x9000, BAR.last - 0xfff, 1);
    rig.pages(root, 0xa000, BAR.last + 1, 1);
    assert!(rig.submit(&[iotlb_domain(1)]));
    let before = rig.listener.reach(NVME);
    assert_eq!(before.len(), 3, "the page in the BAR and the one behind it are one run");
    rig.listener.take_events();

    set_absent(&rig, &[BAR]);
    rig.unit.memory_changed(BAR);
    let offered = [map(0x6000, BAR.first + 0x3000, 0x2000), map(0x9000, BAR.last - 0xfff, 0x1000)];
    // In one batch. Nothing is between the two, so they are one unmap; what leads right behind the BAR stays.
    let batch = [&[unmap(0x6000, 0x9fff)][..], &offered].concat();
    assert_eq!(rig.listener.take_ops(), batch);
    let rest =
        [mapping(0x4000, 0x8000, 0x2000, Perm::ReadWrite), mapping(0xa000, BAR.last + 1, 0x1000, Perm::ReadWrite)];
    assert_eq!(rig.listener.reach(NVME), rest);
    assert_eq!(rig.unit.stats().maps_refused, 2);
    // It went already, and is refused again.
    rig.unit.memory_changed(BAR);
    assert_eq!(rig.listener.take_ops(), offered);

    set_absent(&rig, &[]);
    rig.unit.memory_changed(BAR);
    assert_eq!(rig.listener.take_ops(), offered);
    assert_eq!(rig.listener.reach(NVME), before);
    // What is behind it may be another BAR: all of it goes, although the tables say the same.
    rig.unit.memory_changed(BAR);
    assert_eq!(rig.listener.take_ops(), batch);
    assert_eq!(rig.listener.reach(NVME), before);
}

#[test]
fn b15_a_bar_moves_between_leaves_that_wait_for_it() {
    let (mut rig, root) = without_bars();
    set_absent(&rig, &[ELSEWHERE]);
    rig.pages(root, 0x4000, BAR.first, 1);
    rig.pages(root, 0x5000, ELSEWHERE.first, 1);
    assert!(rig.submit(&[iotlb_pages(1, 0x4000, 1)]));
    let at = |iova, gpa| vec![mapping(iova, gpa, 0x1000, Perm::ReadWrite)];
    assert_eq!(rig.listener.reach(NVME), at(0x4000, BAR.first));
    set_absent(&rig, &[BAR]);
    rig.unit.memory_changed(BAR);
    assert_eq!(rig.listener.reach(NVME), []);
    rig.unit.memory_changed(ELSEWHERE);
    assert_eq!(rig.listener.reach(NVME), at(0x5000, ELSEWHERE.first));
}

#[test]
fn b15_of_a_leaf_that_is_partly_in_the_range_that_part_goes_and_comes() {
    let (mut rig, root) = Rig::with_nvme();
    rig.leaf(root, 48, 0x20_0000, BAR.first, Some(Perm::Read), 2);
    assert!(rig.submit(&[iotlb_pages(1, 0x20_0000, 9)]));
    rig.listener.take_events();
    // Not of whole pages: less than one is not mapped.
    let inside = GpaRange::new(BAR.first + 0x4010, BAR.first + 0x5fff);
    set_absent(&rig, &[GpaRange::new(BAR.first + 0x4000, BAR.first + 0x5fff)]);
    rig.unit.memory_changed(inside);
    let part = MapOp::Map(mapping(0x20_4000, BAR.first + 0x4000, 0x2000, Perm::Read));
    assert_eq!(rig.listener.take_ops(), [unmap(0x20_4000, 0x20_5fff), part]);
    let sides = [
        mapping(0x20_0000, BAR.first, 0x4000, Perm::Read),
        mapping(0x20_6000, BAR.first + 0x6000, 0x1f_a000, Perm::Read),
    ];
    assert_eq!(rig.listener.reach(NVME), sides);
    set_absent(&rig, &[]);
    rig.unit.memory_changed(GpaRange::new(BAR.first + 0x4000, BAR.first + 0x5001));
    assert_eq!(rig.listener.take_ops(), [part]);
    assert_eq!(rig.listener.reach(NVME), [mapping(0x20_0000, BAR.first, 0x20_0000, Perm::Read)]);
}

#[test]
fn b15_no_part_in_the_interrupt_window_comes() {
    let (mut rig, root) = without_bars();
    rig.leaf(root, 48, 0xfee0_0000, BAR.first, Some(Perm::ReadWrite), 2);
    rig.leaf(root, 48, 0x20_0000, 0xfee0_0000, Some(Perm::ReadWrite), 2);
    assert!(rig.submit(&[iotlb_domain(1)]));
    rig.listener.take_events();
    set_absent(&rig, &[]);
    rig.unit.memory_changed(BAR);
    assert_eq!(rig.listener.take_ops(), [map(0xfef0_0000, BAR.first + 0x10_0000, 0x10_0000)]);
    rig.unit.memory_changed(GpaRange::new(0xfee0_0000, 0xfeff_ffff));
    assert_eq!(rig.listener.take_ops(), [unmap(0x30_0000, 0x3f_ffff), map(0x30_0000, 0xfef0_0000, 0x10_0000)]);
}

#[test]
fn rule3_what_leads_elsewhere_is_not_touched_whatever_the_tables_say_now() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x4000, 0x8000, 4);
    rig.pages(root, 0x8000, BAR.first, 3);
    assert!(rig.submit(&[iotlb_domain(1)]));
    rig.listener.take_events();
    // Gone, led elsewhere, led into the range, and new; nothing of it is invalidated.
    rig.clear(root, 0x4000, 1);
    rig.pages(root, 0x5000, 0x2_0000, 1);
    rig.pages(root, 0x6000, BAR.first + 0x1_0000, 1);
    rig.pages(root, 0xb000, 0x3_0000, 1);
    // Of those into the range: one goes, and one leads elsewhere. A new one comes early.
    rig.clear(root, 0x8000, 1);
    rig.pages(root, 0x9000, 0x4_0000, 1);
    rig.pages(root, 0xc000, BAR.first + 0x2_0000, 1);
    rig.unit.memory_changed(BAR);
    let comes = [map(0xa000, BAR.first + 0x2000, 0x1000), map(0xc000, BAR.first + 0x2_0000, 0x1000)];
    assert_eq!(rig.listener.take_ops(), [&[unmap(0x8000, 0xafff)][..], &comes].concat());
    // Every invalidation still does what it says.
    assert!(rig.submit(&[iotlb_domain(1)]));
    let view = rig.unit.spaces_snapshot().remove(0);
    assert_eq!(rig.unit.walk(&view.key), Some(rig.listener.reach(NVME)));
}

#[test]
fn b15_each_space_has_one_batch_and_only_paged_ones() {
    let (mut rig, root) = Rig::with_nvme();
    let other = rig.table();
    let third = requester_in_identity(&mut rig);
    let spaces = [rig.set_paged(NVME, root, 48, 1), rig.set_paged(NIC, other, 39, 2)];
    rig.unit.add_requester(NIC).unwrap();
    let endpoint = rig.unit.endpoint(NIC);
    rig.pages(root, 0x4000, BAR.first, 1);
    rig.leaf(other, 39, 0x7000, BAR.first + 0x1000, Some(Perm::Write), 1);
    assert!(rig.submit(&[iotlb_domain(1), iotlb_domain(2)]));
    let cached = endpoint.enter().translate(Iova(0x7000), Access::Write);
    rig.listener.take_events();
    rig.unit.memory_changed(BAR);
    let write_only = MapOp::Map(mapping(0x7000, BAR.first + 0x1000, 0x1000, Perm::Write));
    let batches = [
        Event::Apply(spaces[0], vec![unmap(0x4000, 0x4fff), map(0x4000, BAR.first, 0x1000)]),
        Event::Apply(spaces[1], vec![unmap(0x7000, 0x7fff), write_only]),
    ];
    assert_eq!(rig.listener.take_events(), batches);
    assert_eq!(rig.listener.attached(third), Some(SpaceKey::Identity));
    // An emulated device is led where it was: its accesses look the address up in guest memory.
    assert_eq!(endpoint.enter().translate(Iova(0x7000), Access::Write), cached);
    rig.unit.memory_changed(ELSEWHERE);
    assert_eq!(rig.listener.take_events(), []);
}

fn requester_in_identity(rig: &mut Rig) -> vtd::Requester {
    let requester = crate::rig::requester(2, 0, 0);
    rig.set_pass_through(requester, 7);
    rig.unit.add_requester(requester).unwrap();
    requester
}

#[test]
fn rule5_a_walk_or_a_shadow_beyond_its_bound_blocks_the_space() {
    // Pages that wait for memory: more of them than there may be extents.
    let bounds = Bounds { shadow_entries: 4, ..Bounds::default() };
    let mut rig = Rig::with(UnitConfig { bounds, ..UnitConfig::new(UnitId(0), 48) });
    rig.enable_queue();
    rig.enable_translation();
    let root = rig.table();
    rig.set_paged(NVME, root, 48, 1);
    rig.unit.add_requester(NVME).unwrap();
    rig.pages(root, 0x4000, 0x8000, 1);
    set_absent(&rig, &[BAR]);
    (0..3).for_each(|page| rig.pages(root, 0x1_0000 + page * 0x2000, BAR.first, 1));
    assert!(rig.submit(&[iotlb_domain(1)]));
    set_absent(&rig, &[]);
    rig.unit.memory_changed(BAR);
    assert_eq!((rig.listener.reach(NVME).len(), rig.unit.stats().bounds_exhausted), (4, 0));
    // What stays counts, too.
    (0..4).for_each(|page| rig.pages(root, 0x1_0000 + page * 0x2000, BAR.first, 1));
    rig.listener.take_events();
    rig.unit.memory_changed(BAR);
    assert_eq!(rig.listener.take_ops(), [unmap(0, u64::MAX)]);
    assert_eq!((rig.listener.reach(NVME), rig.unit.stats().bounds_exhausted), (vec![], 1));
    // It stays blocked, and nothing is added to it.
    rig.unit.memory_changed(BAR);
    assert_eq!(rig.listener.take_ops(), []);
    rig.clear(root, 0x1_0000, 1);
    assert!(rig.submit(&[iotlb_domain(1)]));
    assert_eq!(rig.listener.reach(NVME).len(), 4);
    // Tables that point at themselves.
    let bounds = Bounds { table_entries: 1 << 14, ..Bounds::default() };
    let mut rig = Rig::with(UnitConfig { bounds, ..UnitConfig::new(UnitId(0), 48) });
    rig.enable_queue();
    rig.enable_translation();
    let root = rig.table();
    rig.set_paged(NVME, root, 48, 1);
    rig.pages(root, 0x4000, 0x8000, 1);
    rig.pages(root, 0x9000, BAR.first, 1);
    rig.unit.add_requester(NVME).unwrap();
    assert_eq!(rig.listener.reach(NVME).len(), 2);
    (1..512).for_each(|index| rig.store(root + index * 8, root | 3));
    rig.unit.memory_changed(ELSEWHERE);
    assert_eq!(rig.listener.reach(NVME).len(), 2, "nothing leads there, so nobody looks");
    rig.unit.memory_changed(BAR);
    assert_eq!((rig.listener.reach(NVME), rig.unit.stats().bounds_exhausted), (vec![], 1));
}

#[test]
fn b15_a_change_where_no_leaf_leads_costs_no_walk() {
    let (mut rig, root) = without_bars();
    rig.pages(root, 0x4000, 0x8000, 4);
    rig.pages(root, 0x9000, ELSEWHERE.first, 1);
    assert!(rig.submit(&[iotlb_domain(1)]));
    rig.listener.take_events();
    let walked = |rig: &Rig| rig.unit.stats().leaves_walked;
    let before = walked(&rig);
    rig.unit.memory_changed(BAR);
    assert_eq!((walked(&rig), rig.listener.take_ops()), (before, vec![]));
    // Where one was refused, it is looked for each time.
    for _ in 0..3 {
        let before = walked(&rig);
        rig.unit.memory_changed(GpaRange::new(ELSEWHERE.first, ELSEWHERE.first + 0xfff));
        assert_eq!(rig.listener.take_ops(), [map(0x9000, ELSEWHERE.first, 0x1000)]);
        assert!(walked(&rig) > before);
    }
    set_absent(&rig, &[]);
    rig.unit.memory_changed(ELSEWHERE);
    assert_eq!(rig.listener.take_ops(), [map(0x9000, ELSEWHERE.first, 0x1000)]);
    // Once the guest took it away it is forgotten with the next look at everything.
    set_absent(&rig, &[ELSEWHERE]);
    rig.unit.memory_changed(ELSEWHERE);
    rig.clear(root, 0x9000, 1);
    assert!(rig.submit(&[iotlb_domain(1)]));
    let before = walked(&rig);
    rig.unit.memory_changed(ELSEWHERE);
    assert_eq!(walked(&rig), before);
}

#[test]
fn b15_a_function_that_waits_for_memory_joins_when_it_comes_and_when_its_leaves_go() {
    for comes in [true, false] {
        let (mut rig, root) = Rig::with_nvme();
        rig.pages(root, 0x4000, BAR.first, 1);
        rig.pages(root, 0x9000, 0x8000, 1);
        assert!(rig.submit(&[iotlb_domain(1)]));
        // The map is changed already, and the unit does not know it yet.
        set_absent(&rig, &[BAR]);
        let space = rig.set_paged(NIC, root, 48, 1);
        rig.clear_context(NIC);
        rig.unit.add_requester(NIC).unwrap();
        rig.set_paged(NIC, root, 48, 1);
        assert!(rig.submit(&[context_device(0, NIC.sid, 0)]));
        assert_eq!(rig.listener.attached(NIC), Some(SpaceKey::Blocked));
        rig.listener.take_events();
        // Room does not help.
        assert!(rig.submit(&[iotlb_domain(9)]));
        assert_eq!(rig.listener.take_events(), []);
        if comes {
            set_absent(&rig, &[]);
        }
        rig.unit.memory_changed(if comes { ELSEWHERE } else { BAR });
        assert_eq!(rig.listener.attached(NIC), Some(space));
        assert_eq!(rig.listener.reach(NIC), rig.listener.reach(NVME));
        assert_eq!(rig.listener.reach(NIC).len(), if comes { 2 } else { 1 });
    }
}

/// Pieces of guest-physical space that are there or not, of 4 pages each; the last two are two BARs far away.
const PIECES: [u64; 4] = [0x80_0000, 0x80_4000, BAR.first, ELSEWHERE.first];
const PIECE: u64 = 0x4000;
/// IOVAs that are edited.
const FIRST: u64 = 0x20_0000;
const PAGES: u64 = 24;

#[derive(Clone, Debug)]
enum Step {
    /// `count` pages from `page` on lead to a page of a piece and on from there, or to nothing.
    Pages {
        page: u64,
        count: u64,
        target: Option<(usize, u64, Perm)>,
    },
    /// The 2 MiB behind the edited pages: a leaf that begins at a BAR, or nothing.
    Large(Option<usize>),
    Invalidate {
        page: u64,
        mask: u8,
    },
    InvalidateDomain,
    /// A piece comes, goes, or is exchanged for another one, from one page of it to another.
    Memory {
        piece: usize,
        pages: (u64, u64),
        present: bool,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let perm = prop_oneof![3 => Just(Perm::ReadWrite), 1 => Just(Perm::Read)];
    let target = proptest::option::weighted(0.8, (0..PIECES.len(), 0..4u64, perm));
    let pages = (0..4u64, 0..4u64).prop_map(|(a, b)| (a.min(b), a.max(b)));
    prop_oneof![
        5 => (0..PAGES, 1..7u64, target).prop_map(|(page, count, target)| Step::Pages { page, count, target }),
        1 => proptest::option::of(2..4usize).prop_map(Step::Large),
        3 => (0..PAGES, 0..5u8).prop_map(|(page, mask)| Step::Invalidate { page, mask }),
        1 => Just(Step::InvalidateDomain),
        5 => (0..PIECES.len(), pages, any::<bool>())
            .prop_map(|(piece, pages, present)| Step::Memory { piece, pages, present }),
    ]
}

/// A guest and a host of which the pages are counted.
struct World {
    rig: Rig,
    root: u64,
    /// Guest-physical pages that are away.
    absent: std::collections::BTreeSet<u64>,
    /// Which memory is behind a guest-physical page: another one each time that it comes.
    memory: BTreeMap<u64, u32>,
    /// What the host has: by page of IOVAs, where it leads, and to which memory.
    host: BTreeMap<u64, (u64, Perm, u32)>,
    /// Pages of IOVAs that the guest wrote and did not invalidate yet.
    written: std::collections::BTreeSet<u64>,
}

impl World {
    fn new() -> Self {
        let (rig, root) = Rig::with_nvme();
        Self {
            rig,
            root,
            absent: Default::default(),
            memory: BTreeMap::new(),
            host: BTreeMap::new(),
            written: Default::default(),
        }
    }

    fn behind(&self, gpa: u64) -> u32 {
        self.memory.get(&(gpa >> 12)).copied().unwrap_or(0)
    }

    /// Takes in what the listener was told. With `only`: nothing else is touched.
    fn hear(&mut self, only: Option<GpaRange>) {
        let inside = |gpa: u64| only.is_none_or(|range| range.first <= gpa && gpa <= range.last);
        for op in self.rig.listener.take_ops() {
            match op {
                MapOp::Unmap(IovaRange { first, last }) => {
                    let hit: Vec<u64> = self.host.range(first >> 12..=last >> 12).map(|(page, _)| *page).collect();
                    for page in hit {
                        let (gpa, ..) = self.host.remove(&page).unwrap();
                        assert!(inside(gpa), "{page:#x}, which leads to {gpa:#x}, is unmapped");
                    }
                }
                MapOp::Map(m) => {
                    for offset in (0..m.len).step_by(0x1000) {
                        let (iova, gpa) = (m.iova.0 + offset, m.gpa.0 + offset);
                        assert!(inside(gpa), "{iova:#x} to {gpa:#x} is mapped");
                        if !self.absent.contains(&(gpa >> 12)) {
                            let old = self.host.insert(iova >> 12, (gpa, m.perm, self.behind(gpa)));
                            assert_eq!(old, None, "{iova:#x} was mapped");
                        }
                    }
                }
            }
        }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Pages { page, count, target } => {
                for index in 0..count.min(PAGES - page) {
                    self.written.insert((FIRST >> 12) + page + index);
                    let to = target.map(|(piece, first, perm)| (PIECES[piece] + (first + index) * 0x1000, perm));
                    let (gpa, perm) = to.map_or((0, None), |(gpa, perm)| (gpa, Some(perm)));
                    self.rig.leaf(self.root, 48, FIRST + (page + index) * 0x1000, gpa, perm, 1);
                }
            }
            Step::Large(piece) => {
                let (gpa, perm) = piece.map_or((0, None), |piece| (PIECES[piece], Some(Perm::ReadWrite)));
                let entry = self.rig.entry_address(self.root, 48, FIRST + 0x20_0000, 2);
                self.rig.store(entry, 0);
                self.written.extend((0..512).map(|page| ((FIRST + 0x20_0000) >> 12) + page));
                if perm.is_some() {
                    self.rig.leaf(self.root, 48, FIRST + 0x20_0000, gpa, perm, 2);
                }
            }
            Step::Invalidate { page, mask } => {
                assert!(self.rig.submit(&[iotlb_pages(1, FIRST + page * 0x1000, mask)]));
                let first = ((FIRST >> 12) + page) >> mask << mask;
                self.written.retain(|page| !(first..first + (1 << mask)).contains(page));
                self.hear(None);
            }
            Step::InvalidateDomain => {
                assert!(self.rig.submit(&[iotlb_domain(1)]));
                self.written.clear();
                self.hear(None);
                self.check_all();
            }
            Step::Memory { piece, pages: (from, to), present } => {
                let range = GpaRange::new(PIECES[piece] + from * 0x1000, PIECES[piece] + to * 0x1000 + 0xfff);
                for page in range.first >> 12..=range.last >> 12 {
                    if present {
                        self.absent.remove(&page)
                    } else {
                        self.absent.insert(page)
                    };
                    *self.memory.entry(page).or_default() += 1;
                }
                let absent: Vec<GpaRange> =
                    self.absent.iter().map(|page| GpaRange::new(page << 12, (page << 12) + 0xfff)).collect();
                set_absent(&self.rig, &absent);
                self.rig.unit.memory_changed(range);
                self.hear(Some(range));
                self.check_range(range);
            }
        }
        let told: Vec<Mapping> = self.rig.unit.spaces_snapshot()[0].extents.clone();
        let pages = told.iter().flat_map(|m| (0..m.len).step_by(0x1000).map(|at| (m.iova.0 + at, m.gpa.0 + at)));
        let host = self.host.iter().map(|(page, (gpa, ..))| (page << 12, *gpa));
        assert!(pages.eq(host), "the shadow is what the host has");
        for (page, (gpa, _, memory)) in &self.host {
            assert_eq!(*memory, self.behind(*gpa), "{page:#x} reaches what was at {gpa:#x} before");
        }
    }

    /// Where the tables lead by pages, as far as there is memory.
    fn fresh(&self) -> BTreeMap<u64, (u64, Perm, u32)> {
        let view = self.rig.unit.spaces_snapshot().remove(0);
        let walked = self.rig.unit.walk(&view.key).unwrap();
        let pages = walked
            .iter()
            .flat_map(|m| (0..m.len).step_by(0x1000).map(move |at| ((m.iova.0 + at) >> 12, (m.gpa.0 + at, m.perm))));
        let present = pages.filter(|(_, (gpa, _))| !self.absent.contains(&(gpa >> 12)));
        present.map(|(page, (gpa, perm))| (page, (gpa, perm, self.behind(gpa)))).collect()
    }

    fn check_all(&self) {
        assert_eq!(self.host, self.fresh());
    }

    /// Of what the tables lead into `range`, all is there that was invalidated, but where something else was not; and
    /// nothing more.
    fn check_range(&self, range: GpaRange) {
        let inside = |gpa: u64| range.first <= gpa && gpa <= range.last;
        let fresh = self.fresh();
        for (page, there) in fresh.iter().filter(|(_, (gpa, ..))| inside(*gpa)) {
            let has = self.host.get(page);
            let early = has.is_none() && self.written.contains(page);
            let other = has.is_some_and(|(gpa, ..)| !inside(*gpa));
            assert!(has == Some(there) || early || other, "{page:#x}: {has:x?} {there:x?}");
        }
        for (page, there) in self.host.iter().filter(|(_, (gpa, ..))| inside(*gpa)) {
            assert_eq!(fresh.get(page), Some(there), "{page:#x}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn b15_the_host_has_what_the_tables_say_as_far_as_there_is_memory(
        steps in proptest::collection::vec(step(), 1..60),
    ) {
        let mut world = World::new();
        steps.iter().for_each(|step| world.step(step));
        world.step(&Step::InvalidateDomain);
        for piece in 0..PIECES.len() {
            world.step(&Step::Memory { piece, pages: (0, PIECE / 0x1000 - 1), present: piece % 2 == 0 });
            world.check_all();
        }
    }
}
