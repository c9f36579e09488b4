//! Random table edits, invalidations and switches: wherever an invalidation has completed, the listener was told
//! exactly what a fresh walk of the tables finds. The walk here is its own: one address at a time, from the
//! specification.

use proptest::prelude::*;
use vtd::spec::second_stage::{SecondStageEntry, entry_span};
use vtd::{Access, Endpoint, Gpa, Iova, Mapping, Perm, SpaceKey};

use crate::rig::{
    Memory, NIC, NVME, Rig, context_device, context_global, iotlb_domain, iotlb_global, iotlb_pages, joined,
};

/// The part of the address space that is edited: four 2 MiB spans, two of them around the interrupt range's start.
const SPANS: [u64; 4] = [0x20_0000, 0x40_0000, 0xfec0_0000, 0xfee0_0000];
/// Pages of each span that are edited one by one.
const PAGES: u64 = 12;

#[derive(Clone, Debug)]
enum Step {
    /// `count` pages from `page` of a span: to a target, or away.
    Pages {
        span: usize,
        page: u64,
        count: u64,
        target: Option<(u64, Perm)>,
    },
    /// The whole span: a 2 MiB leaf, or nothing.
    Large {
        span: usize,
        target: Option<(u64, Perm)>,
    },
    /// A 2 MiB leaf becomes 512 equal pages.
    Split {
        span: usize,
    },
    /// A reserved bit in a leaf.
    Corrupt {
        span: usize,
        page: u64,
    },
    /// An invalidation of `2^mask` pages.
    InvalidatePages {
        span: usize,
        page: u64,
        mask: u8,
    },
    InvalidateDomain,
    InvalidateEverything,
    /// The second device moves: to the same table, to none, to pass-through.
    Move(u8),
    /// Several invalidations in one drain follow.
    Hold(bool),
    SetRoot,
}

fn perm() -> impl Strategy<Value = Perm> {
    prop_oneof![4 => Just(Perm::ReadWrite), 1 => Just(Perm::Read), 1 => Just(Perm::Write)]
}

fn step() -> impl Strategy<Value = Step> {
    let span = 0..SPANS.len();
    // Few targets, so that contiguous and equal ones are common.
    let target = || proptest::option::weighted(0.7, ((0u64..3).prop_map(|n| 0x1000_0000 + (n << 21)), perm()));
    prop_oneof![
        6 => (span.clone(), 0..PAGES, 1..6u64, target())
            .prop_map(|(span, page, count, target)| Step::Pages { span, page, count, target }),
        2 => (span.clone(), target()).prop_map(|(span, target)| Step::Large { span, target }),
        1 => span.clone().prop_map(|span| Step::Split { span }),
        1 => (span.clone(), 0..PAGES).prop_map(|(span, page)| Step::Corrupt { span, page }),
        6 => (span, 0..PAGES, 0..10u8).prop_map(|(span, page, mask)| Step::InvalidatePages { span, page, mask }),
        1 => Just(Step::InvalidateDomain),
        1 => Just(Step::InvalidateEverything),
        1 => (0..3u8).prop_map(Step::Move),
        2 => any::<bool>().prop_map(Step::Hold),
        1 => Just(Step::SetRoot),
    ]
}

/// Where a page leads, from the tables alone.
fn look_up(rig: &Rig, root: u64, iova: u64) -> Option<(u64, Perm)> {
    if (0xfee0_0000..0xfef0_0000).contains(&iova) {
        return None;
    }
    let (mut table, mut read, mut write) = (root, true, true);
    for level in (1..=4u8).rev() {
        let entry = SecondStageEntry::from_bits(rig.load(table + iova / entry_span(level) % 512 * 8));
        (read, write) = (read && entry.read(), write && entry.write());
        let perm = Perm::from_bits(read, write)?;
        if entry.snoop() {
            return None;
        }
        let address = entry.page() << 12;
        if level == 1 || entry.page_size() {
            return Some((address + iova % entry_span(level), perm));
        }
        table = address;
    }
    None
}

/// Everything that the tables say about the edited spans, page by page.
fn fresh(rig: &Rig, root: u64) -> Vec<Mapping> {
    let pages = SPANS.iter().flat_map(|span| (0..512).map(move |page| span + (page << 12)));
    let found = pages.filter_map(|iova| {
        look_up(rig, root, iova).map(|(gpa, perm)| Mapping { iova: Iova(iova), gpa: Gpa(gpa), len: 4096, perm })
    });
    joined(found)
}

struct World {
    rig: Rig,
    root: u64,
    /// Invalidations that the queue holds, but was not told of.
    held: Vec<(u64, u64)>,
    hold: bool,
    /// Edited and not invalidated since, by page number.
    stale: std::collections::BTreeSet<u64>,
    /// Emulated functions: one with `NVME`'s id, and one with `NIC`'s, which moves.
    endpoints: [Endpoint<Memory>; 2],
    nic: Place,
}

/// Where the tables say that `NIC` is.
#[derive(Clone, Copy)]
enum Place {
    Paged,
    Nowhere,
    PassThrough,
}

impl World {
    fn new() -> Self {
        let (mut rig, root) = Rig::with_nvme();
        rig.set_paged(NIC, root, 48, 1);
        rig.unit.add_requester(NIC).unwrap();
        let endpoints = [NVME, NIC].map(|requester| rig.unit.endpoint(requester));
        Self { rig, root, held: Vec::new(), hold: false, stale: Default::default(), endpoints, nic: Place::Paged }
    }

    fn touched(&mut self, first: u64, pages: u64) {
        self.stale.extend((0..pages).map(|page| (first >> 12) + page));
    }

    /// An edit of part of a span that is a 2 MiB leaf makes it a table first.
    fn make_table(&mut self, span: u64) {
        let entry = self.rig.entry_address(self.root, 48, span, 2);
        let old = SecondStageEntry::from_bits(self.rig.load(entry));
        if !old.page_size() {
            return;
        }
        let perm = Perm::from_bits(old.read(), old.write());
        self.rig.store(entry, 0);
        for page in 0..512 {
            let gpa = (old.page() << 12) + (page << 12);
            self.rig.leaf(self.root, 48, span + (page << 12), gpa, perm, 1);
        }
    }

    fn invalidate(&mut self, descriptor: (u64, u64), reaches: impl Fn(u64) -> bool) {
        self.held.push(descriptor);
        self.stale.retain(|page| !reaches(*page));
        if !self.hold {
            self.flush();
        }
    }

    fn flush(&mut self) {
        let held = std::mem::take(&mut self.held);
        for some in held.chunks(100) {
            assert!(self.rig.submit(some));
        }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Pages { span, page, count, target } => {
                let span = SPANS[span];
                self.make_table(span);
                for page in page..(page + count).min(512) {
                    let iova = span + (page << 12);
                    let (gpa, perm) = target.map_or((0, None), |(gpa, perm)| (gpa + (page << 12), Some(perm)));
                    self.rig.leaf(self.root, 48, iova, gpa, perm, 1);
                    self.touched(iova, 1);
                }
            }
            Step::Large { span, target } => {
                let (gpa, perm) = target.map_or((0, None), |(gpa, perm)| (gpa, Some(perm)));
                self.rig.leaf(self.root, 48, SPANS[span], gpa, perm, 2);
                if perm.is_none() {
                    let entry = self.rig.entry_address(self.root, 48, SPANS[span], 2);
                    self.rig.store(entry, 0);
                }
                self.touched(SPANS[span], 512);
            }
            // Nothing is touched: the translations are the same.
            Step::Split { span } => self.make_table(SPANS[span]),
            Step::Corrupt { span, page } => {
                self.make_table(SPANS[span]);
                let iova = SPANS[span] + (page << 12);
                let entry = self.rig.entry_address(self.root, 48, iova, 1);
                self.rig.store(entry, self.rig.load(entry) | 1 << 11);
                self.touched(iova, 1);
            }
            Step::InvalidatePages { span, page, mask } => {
                let first = ((SPANS[span] >> 12) + page) & !((1 << mask) - 1);
                let descriptor = iotlb_pages(1, first << 12, mask);
                self.invalidate(descriptor, |page| (first..first + (1 << mask)).contains(&page));
            }
            Step::InvalidateDomain => self.invalidate(iotlb_domain(1), |_| true),
            Step::InvalidateEverything => self.invalidate(iotlb_global(), |_| true),
            Step::Move(to) => {
                self.nic = [Place::Paged, Place::Nowhere, Place::PassThrough][usize::from(to)];
                match self.nic {
                    Place::Paged => drop(self.rig.set_paged(NIC, self.root, 48, 1)),
                    Place::Nowhere => self.rig.clear_context(NIC),
                    Place::PassThrough => self.rig.set_pass_through(NIC, 2),
                }
                self.invalidate(context_device(0, NIC.sid, 0), |_| false);
            }
            Step::Hold(hold) => {
                self.hold = hold;
                if !hold {
                    self.flush();
                }
            }
            Step::SetRoot => {
                self.flush();
                self.rig.set_root();
                self.stale.clear();
            }
        }
    }

    /// Wherever nothing is stale, what was told is what the tables say.
    fn check(&self) {
        if !self.held.is_empty() {
            return;
        }
        let told = self.rig.listener.reach(NVME);
        let fresh = fresh(&self.rig, self.root);
        let at = |mappings: &[Mapping], page: u64| {
            let iova = page << 12;
            let found = mappings.iter().find(|m| m.iova.0 <= iova && iova <= m.last().0);
            found.map(|m| (m.gpa.0 + (iova - m.iova.0), m.perm))
        };
        let pages = SPANS.iter().flat_map(|span| (span >> 12)..(span >> 12) + 512);
        for page in pages.filter(|page| !self.stale.contains(page)) {
            assert_eq!(at(&told, page), at(&fresh, page), "page {page:#x}");
        }
        if self.stale.is_empty() {
            assert_eq!(told, fresh);
        }
        self.check_endpoints();
        let views = self.rig.unit.spaces_snapshot();
        assert_eq!(joined(views[0].extents.iter().copied()), told, "the shadow is what was told");
        let nic = self.rig.listener.attached(NIC);
        if matches!(nic, Some(SpaceKey::Paged(_))) {
            assert_eq!(self.rig.listener.reach(NIC), told);
        }
    }
}

impl World {
    /// Emulated functions are led where the tables say, page by page, whatever of them is cached.
    fn check_endpoints(&self) {
        let numbers = || (0..PAGES + 6).chain([100, 510, 511]);
        let pages = SPANS.iter().flat_map(|span| numbers().map(move |number| span + (number << 12)));
        for iova in pages.filter(|iova| !self.stale.contains(&(iova >> 12))) {
            let paged = look_up(&self.rig, self.root, iova);
            let moved = match self.nic {
                Place::Paged => paged,
                Place::PassThrough if !(0xfee0_0000..0xfef0_0000).contains(&iova) => Some((iova, Perm::ReadWrite)),
                Place::Nowhere | Place::PassThrough => None,
            };
            for (endpoint, expected) in self.endpoints.iter().zip([paged, moved]) {
                let session = endpoint.enter();
                for access in [Access::Read, Access::Write] {
                    let permitted =
                        |perm: Perm| if access == Access::Write { perm.writable() } else { perm.readable() };
                    let expected = expected.filter(|(_, perm)| permitted(*perm)).map(|(gpa, _)| Gpa(gpa + 8));
                    let found = session.translate(Iova(iova + 8), access).ok();
                    assert_eq!(found, expected, "{} at {iova:#x}, {access:?}", endpoint.requester());
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn b2_what_is_told_is_what_a_fresh_walk_finds(steps in proptest::collection::vec(step(), 1..60)) {
        let mut world = World::new();
        for step in &steps {
            world.step(step);
            // An edit alone tells nobody anything.
            if !matches!(step, Step::Pages { .. } | Step::Large { .. } | Step::Split { .. } | Step::Corrupt { .. }) {
                world.check();
            }
        }
        world.hold = false;
        world.flush();
        assert!(world.rig.submit(&[context_global(), iotlb_global()]));
        world.stale.clear();
        world.check();
    }

    /// Descriptors and registers of any content: no panic, no loop without end, and the head never passes the tail's
    /// queue.
    #[test]
    fn rule5_any_descriptors_and_registers_are_survived(
        descriptors in proptest::collection::vec((any::<u64>(), any::<u64>(), 0..6u64), 1..40),
        writes in proptest::collection::vec((0..0x2c0u64, any::<u64>(), any::<bool>()), 0..40),
    ) {
        let (mut rig, root) = Rig::with_nvme();
        rig.pages(root, 0x20_0000, 0x80_0000, 8);
        for (low, high, kind) in descriptors {
            // Mostly of a known type, or nothing behind the type would be reached.
            rig.push(&[(low & !0xe0f | kind, high)]);
            rig.ring();
            rig.write32(vtd::spec::registers::offset::FSTS, 0x7f);
        }
        for (at, value, wide) in writes {
            if wide { rig.write64(at & !7, value) } else { rig.write32(at & !3, value as u32) }
        }
        rig.unit.reset();
        prop_assert_eq!(rig.listener.attached(NVME), Some(SpaceKey::Identity));
    }
}
