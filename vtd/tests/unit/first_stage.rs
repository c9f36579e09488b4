//! The first stage, as an emulated function and an assigned one see it.

use proptest::prelude::*;
use vtd::{Access, DmaError, Endpoint, Iova, Perm, SpaceKey, Stages, UnitConfig};

use crate::pasid_tables::{
    config, first_stage, pasid_cache_of, pasid_iotlb_of, pasid_iotlb_pages, pass_through, second_stage,
};
use crate::rig::{MEMORY, Memory, NVME, Rig, iotlb_domain, iotlb_pages};
use crate::stray::{others, tables_of};

const P: u64 = 1;
const W: u64 = 1 << 1;
const U: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;

/// A unit that offers the first stage, whose NVME is emulated and in domain 1 by `levels` levels at `root`.
struct World {
    rig: Rig,
    root: u64,
    levels: u8,
    endpoint: Endpoint<Memory>,
}

impl World {
    fn new(levels: u8) -> Self {
        let widest = if levels == 5 { 57 } else { 48 };
        Self::with(UnitConfig { scalable: Some(Stages::First), ..config(widest) }, levels)
    }

    fn with(config: UnitConfig, levels: u8) -> Self {
        let mut rig = Rig::scalable(config);
        let root = rig.table();
        rig.set_entry(NVME, 0, first_stage(root, levels, 1));
        let endpoint = rig.unit.endpoint(NVME);
        Self { rig, root, levels, endpoint }
    }

    /// Where the entry of `level` for `iova` is; tables above it are made when there are none.
    fn entry(&mut self, iova: u64, level: u8) -> u64 {
        let mut table = self.root;
        for at in (level..=self.levels).rev() {
            let entry = table + (iova >> (12 + 9 * (u32::from(at) - 1)) & 511) * 8;
            if at == level {
                return entry;
            }
            if self.rig.load(entry) & P == 0 {
                let made = self.rig.table();
                self.rig.store(entry, made | P | W | U);
            }
            table = self.rig.load(entry) & 0xf_ffff_ffff_f000;
        }
        unreachable!()
    }

    fn set(&mut self, iova: u64, level: u8, entry: u64) -> u64 {
        let at = self.entry(iova, level);
        self.rig.store(at, entry);
        at
    }

    fn translate(&self, iova: u64, access: Access) -> Result<u64, u8> {
        self.endpoint.enter().translate(Iova(iova), access).map(|gpa| gpa.0).map_err(|error| match error {
            DmaError::Fault(fault) if fault.silenced => 0xff,
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
        assert!(self.rig.submit(&[pasid_iotlb_of(1, 0)]));
    }
}

#[test]
fn a4_the_first_stage_is_offered_when_asked_for() {
    for (stages, second, first) in [(Stages::Second, 1, 0), (Stages::First, 0, 1), (Stages::Both, 1, 1)] {
        for (width, five) in [(48, 0), (57, 1)] {
            let config = UnitConfig { scalable: Some(stages), ..config(width) };
            let (capability, extended) = (config.capability().into_bits(), config.extended_capability().into_bits());
            assert_eq!((extended >> 46 & 1, extended >> 47 & 1), (second, first), "SSTS, FSTS");
            assert_eq!((capability >> 56 & 1, capability >> 60 & 1), (first, first & five), "FS1GP, FS5LP");
        }
    }
}

#[test]
fn a2_first_stage_tables_of_4_and_5_levels_with_leaves_of_each_size() {
    for levels in [4, 5] {
        let mut world = World::new(levels);
        let upper = u64::MAX << (11 + 9 * levels);
        for half in [0, upper] {
            for (level, size) in [(1, 1u64 << 12), (2, 1 << 21), (3, 1 << 30)] {
                let iova = half + (u64::from(level) << 32);
                let ps = if level > 1 { PS } else { 0 };
                // PAT, which is in another place in a large leaf, and what the processor or software uses.
                let ignored = if level > 1 { 1 << 12 } else { PS };
                world.set(iova, level, 8 << 30 | P | W | U | ps | ignored | 0xfff << 52 | 0xf18);
                for offset in [0x123, size - 1] {
                    assert_eq!(world.read(iova + offset), Ok((8 << 30) + offset), "level {level} of {levels}");
                    assert_eq!(world.write(iova + offset), Ok((8 << 30) + offset));
                }
                assert_eq!(world.read(iova + size), Err(0x71));
            }
        }
    }
}

#[test]
fn a2_flags_say_what_was_used_and_what_was_written() {
    let mut world = World::new(4);
    let leaf = world.set(0x5000, 1, 0x90_0000 | P | W | U);
    let beside = world.set(0x6000, 1, 0x91_0000 | P | W | U);
    let upper = [2, 3, 4].map(|level| world.entry(0x5000, level));
    assert_eq!(world.read(0x5008), Ok(0x90_0008));
    assert_eq!(world.rig.load(leaf) & (A | D), A, "read");
    assert_eq!(world.rig.load(beside) & (A | D), 0);
    upper.iter().for_each(|at| assert_eq!(world.rig.load(*at) & (A | D), A));
    assert_eq!(world.write(0x5010), Ok(0x90_0010), "what is cached was not dirty");
    assert_eq!(world.rig.load(leaf) & (A | D), A | D);
    upper.iter().for_each(|at| assert_eq!(world.rig.load(*at) & (A | D), A, "the dirty flag is of leaves"));
    // As long as it is not invalidated, a flag that is cleared need not be set again; after that it is.
    world.rig.store(leaf, 0x90_0000 | P | W | U);
    world.forget();
    assert_eq!(world.write(0x5000), Ok(0x90_0000));
    assert_eq!(world.rig.load(leaf) & (A | D), A | D);
    // What may not be written does not get dirty.
    world.set(0x7000, 1, 0x92_0000 | P | U);
    assert_eq!((world.write(0x7000), world.read(0x7000), world.write(0x7000)), (Err(0x85), Ok(0x92_0000), Err(0x85)));
    let read_only = world.entry(0x7000, 1);
    assert_eq!(world.rig.load(read_only) & D, 0);
}

#[test]
fn a2_flags_that_are_set_are_in_the_log_of_dirty_memory() {
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
    let mut world = World::new(4);
    let leaf = world.set(0x5000, 1, 0x90_0000 | P | W | U);
    let region = world.rig.memory.iter().next().unwrap();
    let log = region.get_slice(vm_memory::MemoryRegionAddress(0), 1).unwrap().bitmap().log().clone();
    log.start();
    assert_eq!(world.read(0x5000), Ok(0x90_0000));
    let dirty: Vec<u64> = log.take().collect();
    let is_dirty = |page: u64| dirty[page as usize / 64] >> (page % 64) & 1 != 0;
    assert!(is_dirty(leaf >> 12) && !is_dirty(0x90_0000 >> 12));
}

#[test]
fn a2_permissions_of_every_level_count() {
    for level in 1..=4 {
        let mut world = World::new(4);
        world.set(0x5000, 1, 0x90_0000 | P | W | U);
        let at = world.entry(0x5000, level);
        let entry = world.rig.load(at);
        world.rig.store(at, entry & !W);
        assert_eq!((world.read(0x5000), world.write(0x5000)), (Ok(0x90_0000), Err(0x85)), "level {level}");
        world.rig.store(at, entry & !U);
        world.forget();
        assert_eq!((world.read(0x5000), world.write(0x5000)), (Err(0x81), Err(0x81)), "level {level}");
    }
}

#[test]
fn a6_invalidations_reach_the_first_stage() {
    let mut world = World::new(4);
    let leaf = world.set(0x5000, 1, 0x90_0000 | P | W | U | A | D);
    let iova = 0x5000;
    for (descriptor, is_reached) in [
        (pasid_iotlb_pages(1, 0, iova, 0), true),
        (pasid_iotlb_pages(2, 0, iova, 0), false),
        (pasid_iotlb_of(1, 0), true),
        (pasid_iotlb_of(2, 0), false),
        (iotlb_domain(1), true),
        (iotlb_domain(2), false),
        // Addresses of the second stage: everything of the domain.
        (iotlb_pages(1, 0x1000_0000, 0), true),
        (pasid_cache_of(1, 0), true),
    ] {
        world.rig.store(leaf, 0x90_0000 | P | W | U | A | D);
        world.forget();
        assert_eq!(world.read(iova), Ok(0x90_0000));
        world.rig.store(leaf, 0xa0_0000 | P | W | U | A | D);
        assert!(world.rig.submit(&[descriptor]));
        let leads_to = if is_reached { 0xa0_0000 } else { 0x90_0000 };
        assert_eq!(world.read(iova), Ok(leads_to), "{descriptor:x?}");
    }
}

#[test]
fn a2_an_assigned_function_in_the_first_stage_is_blocked() {
    let mut world = World::with(UnitConfig { scalable: Some(Stages::Both), ..config(48) }, 4);
    world.set(0x5000, 1, 0x90_0000 | P | W | U);
    world.rig.unit.add_requester(NVME).unwrap();
    assert_eq!(world.rig.listener.attached(NVME), Some(SpaceKey::Blocked));
    // And comes back from there.
    let second = world.rig.table();
    world.rig.leaf(second, 48, 0x5000, 0x91_0000, Some(Perm::ReadWrite), 1);
    world.rig.set_entry(NVME, 0, second_stage(second, 48, 2));
    assert!(world.rig.submit(&[pasid_cache_of(1, 0), pasid_iotlb_of(1, 0)]));
    assert_eq!(world.rig.listener.reach(NVME).len(), 1);
    assert_eq!(world.read(0x5000), Ok(0x91_0000));
    world.rig.set_entry(NVME, 0, first_stage(world.root, 4, 3));
    assert!(world.rig.submit(&[pasid_cache_of(2, 0), iotlb_domain(2)]));
    assert_eq!(world.rig.listener.attached(NVME), Some(SpaceKey::Blocked));
    assert_eq!(world.read(0x5000), Ok(0x90_0000));
    world.rig.set_entry(NVME, 0, pass_through(4));
    assert!(world.rig.submit(&[pasid_cache_of(3, 0)]));
    assert_eq!(world.rig.listener.attached(NVME), Some(SpaceKey::Identity));
}

#[test]
fn a3_spt3_and_spt4_of_an_entry_of_the_first_stage() {
    let reason = |config: UnitConfig, entry: [u64; 8]| {
        let mut world = World::with(config, 4);
        world.rig.set_entry(NVME, 0, entry);
        world.read(0x5000).unwrap_err()
    };
    let with = |stages| UnitConfig { scalable: Some(stages), ..config(48) };
    let (table, empty) = (0x50_0000, 0x71);
    let first = first_stage(table, 4, 1);
    assert_eq!(reason(with(Stages::First), first), empty);
    assert_eq!(reason(with(Stages::Both), first), empty);
    assert_eq!(reason(with(Stages::Second), first), 0x5a, "FSPTPTR is reserved without a first stage");
    assert_eq!(reason(with(Stages::Second), first_stage(0, 4, 1)), 0x5b);
    assert_eq!(reason(with(Stages::First), second_stage(table, 48, 1)), 0x5b);
    // Five levels, and reserved paging modes.
    assert_eq!(reason(with(Stages::First), first_stage(table, 5, 1)), 0x5b);
    assert_eq!(reason(UnitConfig { scalable: Some(Stages::First), ..config(57) }, first_stage(table, 5, 1)), empty);
    for mode in [2u64, 3] {
        let mut entry = first;
        entry[2] |= mode << 2;
        assert_eq!(reason(UnitConfig { scalable: Some(Stages::First), ..config(57) }, entry), 0x5b);
    }
    for bit in 0..64 {
        let mut entry = first;
        entry[2] ^= 1 << bit;
        // WPE is of supervisor requests, two bits are ignored, and FSPM has a bit for five levels.
        let expected = match bit {
            0 | 1 | 7..12 | 48..64 => 0x5a,
            2 | 3 => 0x5b,
            _ => continue,
        };
        assert_eq!(reason(with(Stages::First), entry), expected, "bit {}", bit + 128);
        entry = first;
        entry[2] |= 0x70;
        assert_eq!(reason(with(Stages::First), entry), empty);
    }
}

#[test]
fn a3_sfs1_to_sfs4_of_first_stage_entries() {
    for levels in [4, 5] {
        let mut world = World::new(levels);
        world.set(0x5000, 1, 0x90_0000 | P | W | U);
        assert_eq!(world.read(0x5000), Ok(0x90_0000));
        for level in 1..=levels {
            let at = world.entry(0x5000, level);
            let good = world.rig.load(at);
            let mut reason = |entry: u64| {
                world.rig.store(at, entry);
                world.forget();
                let reason = world.read(0x5000);
                world.rig.store(at, good);
                reason
            };
            if level > 1 {
                assert_eq!(reason(MEMORY | P | W | U), Err(0x70), "SFS.1: level {}", level - 1);
            }
            assert_eq!(reason(good & !P), Err(0x71), "SFS.2");
            for bit in 48..52 {
                assert_eq!(reason(good | 1 << bit), Err(0x72), "SFS.3: level {level}, bit {bit}");
            }
            if level > 3 {
                assert_eq!(reason(good | PS), Err(0x72), "SFS.3: a leaf of level {level}");
            }
            if level == 2 || level == 3 {
                for bit in 13..12 + 9 * (u32::from(level) - 1) {
                    assert_eq!(reason(P | W | U | PS | 1 << bit), Err(0x72), "SFS.3: level {level}, bit {bit}");
                }
            }
        }
        world.rig.set_entry(NVME, 0, first_stage(MEMORY, levels, 1));
        assert!(world.rig.submit(&[pasid_cache_of(1, 0)]));
        assert_eq!(world.read(0x5000), Err(0x73), "SFS.4");
    }
}

#[test]
fn a3_sfs9_a_flag_that_a_walk_without_snoop_would_have_to_set() {
    let mut world = World::new(4);
    let leaf = world.set(0x5000, 1, 0x90_0000 | P | W | U);
    let entry = world.rig.entry_of_pasid(NVME, 0);
    world.rig.store(entry + 8, world.rig.load(entry + 8) & !(1 << 23));
    assert!(world.rig.submit(&[pasid_cache_of(1, 0)]));
    assert_eq!(world.read(0x5000), Err(0x90));
    for level in 1..=4 {
        let at = world.entry(0x5000, level);
        world.rig.store(at, world.rig.load(at) | A);
    }
    assert_eq!((world.read(0x5000), world.write(0x5000)), (Ok(0x90_0000), Err(0x90)));
    world.rig.store(leaf, world.rig.load(leaf) | D);
    assert_eq!(world.write(0x5000), Ok(0x90_0000));
}

#[test]
fn a3_sgn1_an_address_that_is_not_canonical() {
    for (levels, bits) in [(4, 48), (5, 57)] {
        let world = World::new(levels);
        let half = 1u64 << (bits - 1);
        for canonical in [0, half - 1, !(half - 1), u64::MAX] {
            assert_eq!(world.read(canonical), Err(0x71), "{canonical:#x}");
        }
        for not in [half, 1 << bits, u64::MAX >> 1, !(half - 1) - 1, 1 << 63] {
            assert_eq!(world.read(not), Err(0x80), "{not:#x}");
        }
    }
}

#[test]
fn a3_sgn8_a_first_stage_that_leads_into_the_interrupt_range() {
    let mut world = World::new(4);
    world.set(0x5000, 1, 0xfee0_0000 | P | W | U);
    assert_eq!(world.read(0x5000), Err(0x87));
    world.set(0x4000_0000, 2, 0xfee0_0000 | P | W | U | PS);
    assert_eq!((world.read(0x400f_f000), world.read(0x4010_0000)), (Err(0x87), Ok(0xfef0_0000)));
}

/// What the tables say, one bit after the other.
fn expected(rig: &Rig, root: u64, iova: u64, write: bool) -> Result<u64, u8> {
    if !(iova >> 47 == 0 || iova >> 47 == (1 << 17) - 1) {
        return Err(0x80);
    }
    let (mut table, mut writable) = (root, true);
    for level in (0..4u32).rev() {
        let at = table + (iova >> (12 + 9 * level) & 511) * 8;
        if at >= MEMORY {
            return Err(if level == 3 { 0x73 } else { 0x70 });
        }
        let entry = rig.load(at);
        let size = 1u64 << (12 + 9 * level);
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
        table = entry & 0xf_ffff_ffff_f000;
        if leaf {
            let gpa = (table & !(size - 1)) + iova % size;
            return match gpa >> 20 {
                _ if write && !writable => Err(0x85),
                0xfee => Err(0x87),
                _ => Ok(gpa),
            };
        }
    }
    unreachable!()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// Random tables: where they lead, why they do not, and which flags a request sets, is what the specification says.
    #[test]
    fn a3_random_first_stages_are_understood(
        flips in proptest::collection::vec((0..4usize, 1..5u8, 0..64u32), 0..5),
        requests in proptest::collection::vec((0..6usize, any::<bool>()), 1..12),
    ) {
        const IOVAS: [u64; 6] = [0x5000, 0x6fff, 0x20_0000, 0xffff_8000_4000_0123, 1 << 47, 0x3f_f000];
        let mut world = World::new(4);
        let leaves = [(0x5000, 1, 0x90_0000), (0x6000, 1, 0xfee0_0000), (0x20_0000, 2, 0x60_0000 | PS)];
        for (iova, level, entry) in leaves.into_iter().chain([(IOVAS[3], 3, 0x4000_0000 | PS)]) {
            world.set(iova, level, entry | P | W | U);
        }
        let (end, stages) = (world.rig.table(), tables_of(&world.rig, world.root, |table| table));
        let before = others(&world.rig, end, &stages);
        for (iova, level, bit) in flips {
            // Entries that are there without making any.
            let mut at = world.root;
            for above in (level..=4).rev() {
                at += (IOVAS[iova] >> (12 + 9 * (u32::from(above) - 1)) & 511) * 8;
                if above > level {
                    at = world.rig.load(at % MEMORY) & 0xffff_f000;
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
            let expected = expected(&world.rig, world.root, iova, write);
            let found = if write { world.write(iova) } else { world.read(iova) };
            prop_assert_eq!(found, expected, "{:#x}, write {}", iova, write);
            if found.is_ok() {
                let mut table = world.root;
                for level in (0..4u32).rev() {
                    let entry = world.rig.load(table + (iova >> (12 + 9 * level) & 511) * 8);
                    let leaf = level == 0 || entry & PS != 0;
                    prop_assert!(entry & A != 0 && (!leaf || !write || entry & D != 0), "{:#x}", entry);
                    if leaf {
                        break;
                    }
                    table = entry & 0xf_ffff_ffff_f000;
                }
            }
        }
    }
}
