//! Random tables of scalable mode: what an emulated function is told, and what an assigned one reaches, is what a
//! second implementation of section 3.4.3 finds, with the same reason. That one is plain: one address, one bit after
//! the other.

use proptest::prelude::*;
use vtd::{Access, DmaError, Iova, SpaceKey};

use crate::pasid_tables::{config, pass_through, second_stage};
use crate::rig::{MEMORY, NVME, Rig};

/// Addresses that are asked for: in both leaf sizes, beside them, and at every bound.
const IOVAS: [u64; 8] = [0x5000, 0x6fff, 0x20_0000, 0x3f_ffff, 0x4000_0000, 1 << 39, 1 << 48, u64::MAX - 0xfff];

/// Where a flipped bit is.
#[derive(Clone, Copy, Debug)]
enum Place {
    Root,
    Context(u64),
    Directory,
    Entry(u64),
    /// An entry of the second stage for one of the addresses, by level.
    Paging(usize, u8),
}

fn place() -> impl Strategy<Value = Place> {
    prop_oneof![
        1 => Just(Place::Root),
        2 => (0..4u64).prop_map(Place::Context),
        1 => Just(Place::Directory),
        4 => (0..8u64).prop_map(Place::Entry),
        8 => (0..5usize, 1..4u8).prop_map(|(iova, level)| Place::Paging(iova, level)),
    ]
}

/// A word of memory, where there is some.
fn word(rig: &Rig, at: u64) -> Option<u64> {
    (at < MEMORY).then(|| rig.load(at))
}

const fn bits(word: u64, low: u32, high: u32) -> u64 {
    (word >> low) & (u64::MAX >> (63 - (high - low)))
}

/// What the tables say about a request without PASID of `NVME`: where it leads, or why not. The host has 48 address
/// bits.
fn expected(rig: &Rig, iova: u64, write: bool) -> Result<u64, u8> {
    let sid = u64::from(NVME.sid.0);
    let root = word(rig, rig.root_table + (sid >> 8) * 16 + bits(sid, 7, 7) * 8).ok_or(0x38u8)?;
    if root & 1 == 0 {
        return Err(0x39);
    }
    if bits(root, 1, 11) != 0 || bits(root, 48, 63) != 0 {
        return Err(0x3a);
    }
    let context = (root & !0xfff) + (sid & 0x7f) * 32;
    let context: Option<Vec<u64>> = (0..4).map(|index| word(rig, context + index * 8)).collect();
    let context = context.ok_or(0x40u8)?;
    let silent = |fpd: bool, reason: u8| if fpd { 0xff } else { reason };
    let fpd = context[0] & 2 != 0;
    if context[0] & 1 == 0 {
        return Err(silent(fpd, 0x41));
    }
    let reserved = [bits(context[0], 2, 8), bits(context[0], 48, 63), bits(context[1], 20, 63), context[2], context[3]];
    if reserved.iter().any(|field| *field != 0) {
        return Err(silent(fpd, 0x42));
    }
    let pasid = bits(context[1], 0, 19);
    if pasid >= 64 << (bits(context[0], 9, 11) + 7) {
        return Err(silent(fpd, 0x43));
    }
    let directory = word(rig, (context[0] & !0xfff) + pasid / 64 * 8).ok_or(0x50u8)?;
    let fpd = fpd || directory & 2 != 0;
    if directory & 1 == 0 {
        return Err(silent(fpd, 0x51));
    }
    if bits(directory, 2, 11) != 0 || bits(directory, 48, 63) != 0 {
        return Err(silent(fpd, 0x52));
    }
    let entry = (directory & !0xfff) + pasid % 64 * 64;
    let entry: Option<Vec<u64>> = (0..8).map(|index| word(rig, entry + index * 8)).collect();
    let entry = entry.ok_or(0x58u8)?;
    let fpd = fpd || entry[0] & 2 != 0;
    let fail = |reason: u8| Err(silent(fpd, reason));
    if entry[0] & 1 == 0 {
        return fail(0x59);
    }
    let mut reserved = vec![bits(entry[0], 5, 5), bits(entry[0], 9, 11), bits(entry[0], 48, 63)];
    reserved.extend([bits(entry[1], 16, 22), bits(entry[1], 24, 63), entry[2] & !(3 << 5)]);
    reserved.extend(&entry[3..]);
    if reserved.iter().any(|field| *field != 0) {
        return fail(0x5a);
    }
    let levels = match (bits(entry[0], 6, 8), bits(entry[0], 2, 4)) {
        (4, _) if iova >> 48 != 0 => return fail(0x83),
        (4, _) => return Ok(iova),
        (2, width @ (1 | 2)) => width + 2,
        _ => return fail(0x5b),
    };
    if iova >> (12 + 9 * levels) != 0 {
        return fail(0x84);
    }
    let (mut table, mut permitted) = (entry[0] & !0xfff, 3);
    for level in (1..=levels).rev() {
        let span = 1u64 << (12 + 9 * (level - 1));
        let Some(entry) = word(rig, table + iova / span % 512 * 8) else {
            return fail(if level == levels { 0x7b } else { 0x78 });
        };
        if entry & 3 == 0 {
            return fail(0x79);
        }
        let leaf = level == 1 || entry & 0x80 != 0;
        let address = bits(entry, 12, 51) << 12;
        let misplaced = leaf && (level > 3 || !address.is_multiple_of(span));
        if bits(entry, 48, 51) != 0 || entry & (1 << 11 | 1 << 62) != 0 || misplaced {
            return fail(0x7a);
        }
        permitted &= entry & 3;
        table = address;
        if leaf {
            let gpa = address + iova % span;
            return match (permitted, write) {
                (0, _) => fail(0x79),
                (1, true) => fail(0x85),
                (2, false) => fail(0x86),
                _ if bits(gpa, 20, 63) == 0xfee => fail(0x87),
                _ => Ok(gpa),
            };
        }
    }
    unreachable!("level 1 has leaves only")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn a3_random_tables_of_scalable_mode_are_understood(
        passes_through in proptest::bool::weighted(0.1),
        is_wide in any::<bool>(),
        pasid in prop_oneof![Just(0u32), 0..0x2000u32],
        targets in proptest::collection::vec((0..4usize, 1..4u64), 4),
        flips in proptest::collection::vec((place(), 0..64u32), 0..4),
    ) {
        let mut rig = Rig::scalable(config(48));
        let root = rig.table();
        let width = if is_wide { 48 } else { 39 };
        let entry = if passes_through { pass_through(9) } else { second_stage(root, width, 9) };
        rig.set_entry(NVME, pasid, entry);
        let context = rig.scalable_context_address(NVME);
        rig.store(context + 8, pasid.into());
        for (index, (target, permitted)) in targets.iter().enumerate() {
            let level = [1, 1, 2, 2][index];
            let at = rig.entry_address(root, width, IOVAS[index], level);
            let to = [0x80_0000, 0xfee0_0000, 0x4000_0000, 0][*target];
            rig.store(at, to | permitted | u64::from(level == 2) << 7);
        }
        for (place, bit) in flips {
            let at = match place {
                Place::Root => rig.root_half_address(NVME),
                Place::Context(index) => rig.scalable_context_address(NVME) + index * 8,
                Place::Directory => (rig.load(context) & !0xfff) + u64::from(pasid / 64) * 8,
                Place::Entry(index) => {
                    let table = rig.load((rig.load(context) & 0xffff_f000) % MEMORY + u64::from(pasid / 64) * 8);
                    (table & 0xffff_f000) % MEMORY + u64::from(pasid % 64) * 64 + index * 8
                }
                // Below a leaf there is no entry.
                Place::Paging(iova, level) if iova >= 2 && level == 1 => continue,
                Place::Paging(iova, level) => match rig.try_entry_address(root, width, IOVAS[iova], level) {
                    Some(at) => at,
                    None => continue,
                },
            };
            if at < MEMORY {
                rig.store(at, rig.load(at) ^ 1 << bit);
            }
        }
        rig.set_root();
        rig.unit.add_requester(NVME).unwrap();
        let attached = rig.listener.attached(NVME);
        let reach = rig.listener.reach(NVME);
        let endpoint = rig.unit.endpoint(NVME);
        for iova in IOVAS {
            let mut reachable = None;
            for write in [false, true] {
                let access = if write { Access::Write } else { Access::Read };
                let expected = expected(&rig, iova, write);
                let translated = endpoint.enter().translate(Iova(iova), access);
                let translated = translated.map(|gpa| gpa.0).map_err(|error| match error {
                    DmaError::Fault(fault) if fault.silenced => 0xff,
                    DmaError::Fault(fault) => fault.reason.code(),
                    other => panic!("{other}"),
                });
                prop_assert_eq!(translated, expected, "{:#x}, write {}", iova, write);
                reachable = reachable.or(expected.ok());
            }
            let held = reach.iter().find(|m| m.range().contains(iova)).map(|m| m.gpa.0 + (iova - m.iova.0));
            match attached {
                Some(SpaceKey::Identity) => prop_assert!(iova >> 48 != 0 || reachable == Some(iova)),
                Some(SpaceKey::Paged(_)) => prop_assert_eq!(held, reachable, "{:#x}", iova),
                _ => prop_assert_eq!(reachable, None),
            }
        }
    }
}
