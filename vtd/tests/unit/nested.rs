//! Nested translation: a first stage whose addresses are those of a second stage.

use proptest::prelude::*;
use vtd::{Access, ConfigError, DmaError, Endpoint, Iova, Perm, SpaceKey, Stages, UnitConfig};

use crate::pasid_tables::{
    Entry, config, nested, pasid_cache_of, pasid_iotlb_of, pasid_iotlb_pages, second_stage, with_flags,
};
use crate::rig::{MEMORY, Memory, NVME, Rig, iotlb_domain, iotlb_global, iotlb_pages};
use crate::stray::{others, tables_of};

const P: u64 = 1;
const W: u64 = 1 << 1;
const U: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const SECOND_A: u64 = 1 << 8;
const SECOND_D: u64 = 1 << 9;

/// In the second stage, memory is so much higher.
const UP: u64 = 1 << 32;

pub(crate) fn offered() -> UnitConfig {
    UnitConfig { scalable: Some(Stages::Both), nested: true, second_stage_dirty: true, ..config(48) }
}

/// NVME is emulated and in domain 1, by 4 levels at `first` whose addresses are those of the second stage.
struct World {
    rig: Rig,
    first: u64,
    second: u64,
    endpoint: Endpoint<Memory>,
}

impl World {
    fn new() -> Self {
        Self::with(false)
    }

    /// With flags of the second stage, or without.
    fn with(flags: bool) -> Self {
        Self::of(offered(), flags)
    }

    fn of(config: UnitConfig, flags: bool) -> Self {
        let mut rig = Rig::scalable(config);
        let (first, second) = (rig.table(), rig.table());
        let entry = nested(first + UP, second, 48, 1);
        rig.set_entry(NVME, 0, if flags { with_flags(entry) } else { entry });
        let endpoint = rig.unit.endpoint(NVME);
        let mut world = Self { rig, first, second, endpoint };
        world.show(first);
        world
    }

    /// The second stage has this page of memory.
    fn show(&mut self, gpa: u64) -> u64 {
        self.rig.leaf(self.second, 48, gpa + UP, gpa, Some(Perm::ReadWrite), 1);
        gpa + UP
    }

    /// Where the entry of the first stage of `level` for `iova` is in memory; tables above it are made.
    fn entry(&mut self, iova: u64, level: u8) -> u64 {
        let mut table = self.first;
        for at in (level..=4).rev() {
            let entry = table + (iova >> (12 + 9 * (u32::from(at) - 1)) & 511) * 8;
            if at == level {
                return entry;
            }
            if self.rig.load(entry) & P == 0 {
                let made = self.rig.table();
                let address = self.show(made);
                self.rig.store(entry, address | P | W | U);
            }
            table = (self.rig.load(entry) & 0xf_ffff_ffff_f000) - UP;
        }
        unreachable!()
    }

    fn set(&mut self, iova: u64, level: u8, entry: u64) -> u64 {
        let at = self.entry(iova, level);
        self.rig.store(at, entry);
        at
    }

    /// A page of both stages, which leads to `gpa`.
    fn page(&mut self, iova: u64, gpa: u64) -> u64 {
        let address = self.show(gpa);
        self.set(iova, 1, address | P | W | U)
    }

    /// Where the entry of the second stage is that this page of memory has, shown before.
    fn beneath(&mut self, gpa: u64) -> u64 {
        self.rig.entry_address(self.second, 48, (gpa & !0xfff) + UP, 1)
    }

    fn translate(&self, iova: u64, access: Access) -> Result<u64, u8> {
        self.endpoint.enter().translate(Iova(iova), access).map(|gpa| gpa.0).map_err(|error| match error {
            DmaError::Fault(fault) => fault.reason.code(),
            other => panic!("{other}"),
        })
    }

    fn read(&self, iova: u64) -> Result<u64, u8> {
        self.translate(iova, Access::Read)
    }

    fn write(&self, iova: u64) -> Result<u64, u8> {
        self.translate(iova, Access::Write)
    }

    fn forget(&mut self) {
        assert!(self.rig.submit(&[iotlb_domain(1)]));
    }
}

/// A unit whose NVME, emulated, reaches two pages at `iova` through both stages; and that.
pub(crate) fn two_pages(config: UnitConfig, iova: u64) -> (Rig, Endpoint<Memory>) {
    let mut world = World::of(config, false);
    (0..2).for_each(|page| _ = world.page(iova + page * 4096, 0x80_0000 + page * 4096));
    (world.rig, world.endpoint)
}

#[test]
fn a4_nested_translation_is_offered_when_asked_for() {
    let nest = |config: UnitConfig| config.extended_capability().into_bits() >> 26 & 1;
    assert_eq!((nest(offered()), nest(UnitConfig { nested: false, ..offered() })), (1, 0), "NEST");
    for scalable in [None, Some(Stages::First), Some(Stages::Second)] {
        let config = UnitConfig { scalable, second_stage_dirty: false, ..offered() };
        assert_eq!(config.validate(), Err(ConfigError::NestedAlone));
    }
}

#[test]
fn a2_two_stages_with_leaves_of_each_size() {
    for (first_level, first_size) in [(1u8, 1u64 << 12), (2, 1 << 21), (3, 1 << 30)] {
        for (second_level, second_size) in [(1u8, 1u64 << 12), (2, 1 << 21), (3, 1 << 30)] {
            let mut world = World::new();
            let iova = 7 << 30;
            let ps = if first_level > 1 { PS } else { 0 };
            // The piece that is asked for is the first page of the last leaf of the second stage in it.
            let inside = first_size.max(second_size) - second_size;
            let inside = if first_size >= second_size { inside } else { 0 };
            world.set(iova, first_level, (5 << 30) | P | W | U | ps);
            let at = (5 << 30) + inside;
            world.rig.leaf(world.second, 48, at, 9 << 30, Some(Perm::ReadWrite), second_level);
            for _ in 0..2 {
                let found = (world.read(iova + inside + 0x123), world.write(iova + inside + 0x456));
                assert_eq!(found, (Ok((9 << 30) + 0x123), Ok((9 << 30) + 0x456)), "{first_level} over {second_level}");
            }
        }
    }
}

#[test]
fn a2_flags_of_the_first_stage_are_set_beneath_a_second() {
    let mut world = World::new();
    let leaf = world.page(0x5000, 0x90_0000);
    assert_eq!(world.read(0x5000), Ok(0x90_0000));
    assert_eq!(world.rig.load(leaf) & (A | D), A);
    assert_eq!(world.write(0x5000), Ok(0x90_0000));
    assert_eq!(world.rig.load(leaf) & (A | D), A | D);
    let beneath = world.beneath(0x90_0000);
    assert_eq!(world.rig.load(beneath) & (SECOND_A | SECOND_D), 0, "SSADE is clear");
}

#[test]
fn a2_flags_of_both_stages() {
    let mut world = World::with(true);
    let leaf = world.page(0x5000, 0x90_0000);
    let page = world.beneath(0x90_0000);
    let table = world.beneath(leaf);
    let flags = |world: &World, at: u64| world.rig.load(at) & (SECOND_A | SECOND_D);
    assert_eq!(world.read(0x5000), Ok(0x90_0000));
    assert_eq!(flags(&world, page), SECOND_A);
    assert_eq!(flags(&world, table), SECOND_A | SECOND_D, "its entry got a flag");
    assert_eq!(world.write(0x5000), Ok(0x90_0000));
    assert_eq!(flags(&world, page), SECOND_A | SECOND_D);
    // A flag that is cleared is set again behind an invalidation of the second stage.
    world.rig.store(page, world.rig.load(page) & !SECOND_D);
    assert!(world.rig.submit(&[iotlb_pages(1, 0x90_0000 + UP, 0)]));
    assert_eq!(world.write(0x5000), Ok(0x90_0000));
    assert_eq!(flags(&world, page), SECOND_A | SECOND_D);
}

#[test]
fn a6_invalidations_of_either_stage_reach_both() {
    let mut world = World::new();
    let leaf = world.page(0x5000, 0x90_0000);
    world.page(0x7000, 0x92_0000);
    let other = world.show(0xa0_0000);
    let beneath = world.beneath(0x90_0000);
    let whole = world.rig.load(leaf) | A | D;
    let second = world.rig.load(beneath);
    for (descriptor, reached) in [
        (pasid_iotlb_pages(1, 0, 0x5000, 0), true),
        (pasid_iotlb_pages(1, 0, 0x7000, 0), false),
        (pasid_iotlb_of(1, 0), true),
        (pasid_iotlb_of(1, 1), false),
        (pasid_iotlb_of(2, 0), false),
        (iotlb_domain(1), true),
        (iotlb_domain(2), false),
        (iotlb_pages(1, 0x7000_0000, 0), true),
        (iotlb_global(), true),
        (pasid_cache_of(1, 0), true),
        (pasid_cache_of(1, 1), false),
    ] {
        world.rig.store(leaf, whole);
        world.forget();
        assert_eq!(world.write(0x5000), Ok(0x90_0000));
        world.rig.store(leaf, other | P | W | U | A | D);
        assert!(world.rig.submit(&[descriptor]));
        let leads_to = if reached { 0xa0_0000 } else { 0x90_0000 };
        assert_eq!(world.write(0x5000), Ok(leads_to), "{descriptor:x?}");
    }
    world.rig.store(leaf, whole);
    for (descriptor, reached) in [
        (iotlb_pages(1, 0x90_0000 + UP, 0), true),
        (iotlb_domain(1), true),
        (iotlb_domain(2), false),
        // Table 24: nothing of the second stage, but for what was cached of both.
        (pasid_iotlb_of(1, 1), false),
    ] {
        world.rig.store(beneath, second);
        world.forget();
        assert_eq!(world.write(0x5000), Ok(0x90_0000));
        world.rig.store(beneath, (second & 0xfff) | 0xb0_0000);
        assert!(world.rig.submit(&[descriptor]));
        let leads_to = if reached { 0xb0_0000 } else { 0x90_0000 };
        assert_eq!(world.write(0x5000), Ok(leads_to), "{descriptor:x?}");
    }
}

#[test]
fn a2_an_assigned_function_in_two_stages_is_blocked() {
    let mut world = World::new();
    world.page(0x5000, 0x90_0000);
    world.rig.unit.add_requester(NVME).unwrap();
    assert_eq!(world.rig.listener.attached(NVME), Some(SpaceKey::Blocked));
    assert_eq!(world.read(0x5000), Ok(0x90_0000));
}

#[test]
fn a3_spt4_of_an_entry_for_two_stages() {
    let reason = |config: UnitConfig, entry: Entry| {
        let mut rig = Rig::scalable(config);
        let second = rig.table();
        let mut entry = entry;
        entry[0] |= second;
        rig.set_entry(NVME, 0, entry);
        let found = rig.unit.endpoint(NVME).enter().translate(Iova(0x5000), Access::Read);
        match found {
            Err(DmaError::Fault(fault)) => fault.reason.code(),
            other => panic!("{other:?}"),
        }
    };
    let empty = 0x79;
    assert_eq!(reason(offered(), nested(0x5000, 0, 48, 1)), empty);
    assert_eq!(reason(UnitConfig { nested: false, ..offered() }, nested(0x5000, 0, 48, 1)), 0x5b, "NEST is clear");
    // SPT.4.4: FSPTPTR is beyond the width of AW.
    assert_eq!(reason(offered(), nested(1 << 39, 0, 39, 1)), 0x5b);
    assert_eq!(reason(offered(), nested((1 << 39) - 0x1000, 0, 39, 1)), empty);
    assert_eq!(reason(offered(), nested(0x5000, 0, 57, 1)), 0x5b, "an AW that SAGAW has not");
    let mut five = nested(0x5000, 0, 48, 1);
    five[2] |= 4;
    assert_eq!(reason(offered(), five), 0x5b, "FSPM");
    assert_eq!(reason(offered(), nested(1 << 48, 0, 48, 1)), 0x5a, "beyond the host address width");
    let flags = with_flags(second_stage(0, 48, 1));
    assert_eq!(reason(UnitConfig { second_stage_dirty: false, ..offered() }, flags), 0x5a, "SSADE");
    assert_eq!(reason(offered(), flags), empty);
}

#[test]
fn a3_sfs5_to_sfs8_and_sss_of_first_stage_tables() {
    let mut world = World::new();
    let leaf = world.page(0x5000, 0x90_0000);
    assert_eq!(world.write(0x5000), Ok(0x90_0000));
    for level in 1..=4u8 {
        let at = world.entry(0x5000, level);
        let good = world.rig.load(at);
        world.rig.set_entry(NVME, 0, nested(world.first + UP, world.second, 39, 1));
        world.rig.set_entry(NVME, 0, nested(world.first + UP, world.second, 48, 1));
        let beneath = world.beneath(at);
        let whole = world.rig.load(beneath);
        let mut reason = |entry: u64, wanted: Access| {
            world.rig.store(beneath, entry);
            world.forget();
            let found = world.translate(0x5000, wanted);
            world.rig.store(beneath, whole);
            found.unwrap_err()
        };
        let root = level == 4;
        assert_eq!(reason(whole & !1, Access::Read), if root { 0x75 } else { 0x76 }, "SFS.6, SFS.7: level {level}");
        assert_eq!(reason(0, Access::Read), 0x79, "SSS.2");
        assert_eq!(reason(whole | 1 << 11, Access::Read), 0x7a, "SSS.3");
        assert_eq!(reason(MEMORY | 3, Access::Read), if root { 0x73 } else { 0x70 }, "SFS.4, SFS.1");
        // SFS.8: read-only, and a flag is to be set.
        world.rig.store(at, good & !(A | D));
        world.rig.store(beneath, whole & !2);
        world.forget();
        assert_eq!(world.read(0x5000), Err(0x77), "SFS.8: level {level}");
        world.rig.store(at, good | A);
        world.forget();
        assert_eq!(world.read(0x5000), Ok(0x90_0000), "no flag is to be set");
        world.rig.store(beneath, whole);
        world.rig.store(at, good);
    }
    // D of the leaf.
    world.rig.store(leaf, world.rig.load(leaf) & !D | A);
    let beneath = world.beneath(leaf);
    let whole = world.rig.load(beneath);
    world.rig.store(beneath, whole & !2);
    world.forget();
    assert_eq!((world.read(0x5000), world.write(0x5000)), (Ok(0x90_0000), Err(0x77)));
}

#[test]
fn a3_sfs5_an_address_beyond_the_second_stage() {
    let mut rig = Rig::scalable(offered());
    let (first, second) = (rig.table(), rig.table());
    rig.set_entry(NVME, 0, nested(first, second, 39, 1));
    rig.leaf(second, 39, first, first, Some(Perm::ReadWrite), 1);
    let endpoint = rig.unit.endpoint(NVME);
    let read = |rig: &mut Rig, entry: u64| {
        rig.store(first, entry);
        assert!(rig.submit(&[iotlb_domain(1)]));
        match endpoint.enter().translate(Iova(0x5000), Access::Read) {
            Err(DmaError::Fault(fault)) => fault.reason.code(),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(read(&mut rig, 1 << 39 | P | W | U), 0x74);
    assert_eq!(read(&mut rig, ((1 << 39) - 0x1000) | P | W | U), 0x79);
}

#[test]
fn a3_sgn_of_the_page_of_two_stages() {
    let mut world = World::new();
    let leaf = world.page(0x5000, 0x90_0000);
    let beneath = world.beneath(0x90_0000);
    let (entry, whole) = (world.rig.load(leaf), world.rig.load(beneath));
    let mut both = |first: u64, second: u64| {
        world.rig.store(leaf, first);
        world.rig.store(beneath, second);
        world.forget();
        (world.read(0x5000), world.write(0x5000), world.translate(0x5000, Access::ZeroLengthRead))
    };
    let page = Ok(0x90_0000);
    assert_eq!(both(entry, whole), (page, page, page));
    assert_eq!(both(entry, whole & !2), (page, Err(0x85), page), "SGN.6, by the second stage");
    assert_eq!(both(entry & !W, whole), (page, Err(0x85), page), "SGN.6, by the first");
    assert_eq!(both(entry, whole & !1), (Err(0x86), page, page), "SGN.7");
    assert_eq!(both(entry, 0), (Err(0x79), Err(0x79), Err(0x79)), "SSS.2");
    assert_eq!(both(entry, whole & 0xfff | 0xfee0_0000), (Err(0x87), Err(0x87), Err(0x87)), "SGN.8");
    assert_eq!(both(entry & !U, whole), (Err(0x81), Err(0x81), Err(0x81)), "SGN.2");
}

/// Where the second stage leads, and what it permits: (read, write).
fn second(rig: &Rig, root: u64, address: u64) -> Result<(u64, bool, bool), u8> {
    let (mut table, mut permitted) = (root, 3);
    for level in (0..4u32).rev() {
        let at = table + (address >> (12 + 9 * level) & 511) * 8;
        if at >= MEMORY {
            return Err(if level == 3 { 0x7b } else { 0x78 });
        }
        let (entry, size) = (rig.load(at), 1u64 << (12 + 9 * level));
        if entry & 3 == 0 {
            return Err(0x79);
        }
        let leaf = level == 0 || entry & PS != 0;
        table = entry & 0xf_ffff_ffff_f000;
        if entry >> 48 & 0xf != 0 || entry & (1 << 11 | 1 << 62) != 0 || leaf && (level == 3 || table % size != 0) {
            return Err(0x7a);
        }
        permitted &= entry & 3;
        if leaf {
            return Ok((table + address % size, permitted & 1 != 0, permitted & 2 != 0));
        }
    }
    unreachable!()
}

/// What both stages say, one bit after the other; `flagged`: the second has flags.
fn expected(world: &World, flagged: bool, iova: u64, write: bool) -> Result<u64, u8> {
    let rig = &world.rig;
    let (mut table, mut writable) = (world.first + UP, true);
    for level in (0..4u32).rev() {
        let (at, read, may_set) = second(rig, world.second, table)?;
        match (read, may_set) {
            (false, false) => return Err(0x79),
            (false, true) => return Err(if level == 3 { 0x75 } else { 0x76 }),
            (true, false) if flagged => return Err(0x77),
            _ => {}
        }
        let at = at + (iova >> (12 + 9 * level) & 511) * 8;
        if at >= MEMORY {
            return Err(if level == 3 { 0x73 } else { 0x70 });
        }
        let (entry, size) = (rig.load(at), 1u64 << (12 + 9 * level));
        let leaf = level == 0 || entry & PS != 0;
        if entry & P == 0 {
            return Err(0x71);
        }
        let between = if leaf && level > 0 { entry & (size - 1) & !0x1fff } else { 0 };
        if entry >> 48 & 0xf != 0 || leaf && level == 3 || between != 0 {
            return Err(0x72);
        }
        if entry & U == 0 {
            return Err(0x81);
        }
        writable &= entry & W != 0;
        let dirties = leaf && write && writable && entry & D == 0;
        if (entry & A == 0 || dirties) && !may_set {
            return Err(0x77);
        }
        table = entry & 0xf_ffff_ffff_f000;
        if leaf {
            if write && !writable {
                return Err(0x85);
            }
            let (page, read, may_write) = second(rig, world.second, (table & !(size - 1)) + iova % size)?;
            return match (read, may_write) {
                (false, false) => Err(0x79),
                (false, _) if !write => Err(0x86),
                (_, false) if write => Err(0x85),
                _ if page >> 20 == 0xfee => Err(0x87),
                // Nothing that both stages permit, but to write to what is not dirty.
                _ => Ok(page),
            };
        }
    }
    unreachable!()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    /// Random tables of both stages: where they lead, why they do not, and which flags a request sets.
    #[test]
    fn a3_random_nested_tables_are_understood(
        flagged in any::<bool>(),
        first_flips in proptest::collection::vec((0..4usize, 1..5u8, 0..64u32), 0..3),
        second_flips in proptest::collection::vec((0..9usize, 1..5u8, 0..64u32), 0..4),
        requests in proptest::collection::vec((0..5usize, any::<bool>()), 1..12),
    ) {
        const IOVAS: [u64; 5] = [0x5000, 0x6fff, 0x20_0000, 0x4000_0123, 0x3f_f000];
        let mut world = World::with(flagged);
        world.page(0x5000, 0x90_0000);
        world.page(0x6000, 0x91_0000);
        world.set(0x20_0000, 2, 0x1_0060_0000 | P | W | U | PS);
        world.rig.leaf(world.second, 48, 0x1_00a0_0000, 0x60_0000, Some(Perm::ReadWrite), 2);
        world.set(0x20_0000, 2, 0x1_00a0_0000 | P | W | U | PS);
        world.set(0x4000_0000, 3, 0x4000_0000 | P | W | U | PS);
        world.rig.leaf(world.second, 48, 0x4000_0000, 0x4000_0000, Some(Perm::Read), 3);
        let mut pages = vec![0x90_0000 + UP, 0x91_0000 + UP, 0x1_00a0_0000, 0x4000_0000, world.first + UP];
        pages.extend((1..4).map(|level| (world.entry(0x5000, level) & !0xfff) + UP));
        let (end, mut stages) = (world.rig.table(), tables_of(&world.rig, world.first, |table| table - UP));
        stages.extend(tables_of(&world.rig, world.second, |table| table));
        let before = others(&world.rig, end, &stages);
        for (page, level, bit) in second_flips {
            let address = pages[page % pages.len()];
            // Entries that are there, and no leaf above them.
            let mut at = world.second;
            for above in (level..=4).rev() {
                at += (address >> (12 + 9 * (u32::from(above) - 1)) & 511) * 8;
                if above > level {
                    at = world.rig.load(at % MEMORY) & 0xffff_f000;
                }
            }
            if at < MEMORY {
                world.rig.store(at, world.rig.load(at) ^ 1 << bit);
            }
        }
        for (iova, level, bit) in first_flips {
            let mut at = world.first;
            for above in (level..=4).rev() {
                at += (IOVAS[iova] >> (12 + 9 * (u32::from(above) - 1)) & 511) * 8;
                if above > level {
                    at = (world.rig.load(at % MEMORY) & 0xf_ffff_f000).wrapping_sub(UP) & 0xffff_f000;
                }
            }
            if at < MEMORY {
                world.rig.store(at, world.rig.load(at) ^ 1 << bit);
            }
        }
        for (iova, write) in requests {
            if others(&world.rig, end, &stages) != before {
                break;
            }
            let iova = IOVAS[iova];
            let expected = expected(&world, flagged, iova, write);
            let found = if write { world.write(iova) } else { world.read(iova) };
            prop_assert_eq!(found, expected, "{:#x}, write {}", iova, write);
        }
    }
}
