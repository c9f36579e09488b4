//! Tables of scalable mode with everything that can be wrong in them, and how it is told. Tests have the
//! condition codes of section 7.1.3.

use vtd::spec::pasid::EntryLow;
use vtd::{Access, DmaError, Iova, Perm, SpaceKey, UnitConfig};

use crate::pasid_tables::{Entry, config, pass_through, second_stage};
use crate::rig::{MEMORY, NVME, Rig, iotlb_global};

/// The page that requests go to.
const IOVA: u64 = 0x5000;
const GPA: u64 = 0x90_0000;

/// A unit of 48 bits in scalable mode whose NVME reaches `GPA` at `IOVA`, assigned and emulated; and the root of its
/// 39-bit table.
struct World {
    rig: Rig,
    root: u64,
}

impl World {
    fn new() -> Self {
        Self::with(config(48))
    }

    fn with(config: UnitConfig) -> Self {
        let mut rig = Rig::scalable(config);
        let root = rig.table();
        rig.leaf(root, 39, IOVA, GPA, Some(Perm::ReadWrite), 1);
        rig.set_entry(NVME, 0, second_stage(root, 39, 1));
        rig.unit.add_requester(NVME).unwrap();
        Self { rig, root }
    }

    /// The reason of a request, as the fault record has it; 0 for none. An assigned function reaches nothing there,
    /// either.
    fn reason_of(&self, iova: u64, access: Access) -> u8 {
        // SRTP invalidates everything.
        self.rig.set_root();
        let endpoint = self.rig.unit.endpoint(NVME);
        let translated = endpoint.enter().translate(Iova(iova), access);
        let reached = match self.rig.listener.attached(NVME) {
            Some(SpaceKey::Identity) => true,
            Some(SpaceKey::Paged(_)) => {
                let holds = |m: &vtd::Mapping| m.range().contains(iova);
                self.rig.listener.reach(NVME).iter().any(holds)
            }
            _ => false,
        };
        let records = self.rig.fault_records();
        records.iter().for_each(|record| {
            self.rig.write32(vtd::spec::registers::offset::FRCD + 16 * record.0 as u64 + 12, 1 << 31);
        });
        match translated {
            Ok(_) => {
                assert!(reached && records.is_empty(), "{records:x?}");
                0
            }
            Err(DmaError::Fault(fault)) => {
                let permitted_otherwise = matches!(fault.reason.code(), 0x83 | 0x85 | 0x86);
                assert!(!reached || permitted_otherwise, "{fault}");
                let is_read = access != Access::Write;
                let recorded: Vec<_> =
                    records.into_iter().map(|(_, sid, reason, at, read)| (sid, reason, at, read)).collect();
                let record = (NVME.sid, fault.reason.code(), iova & !0xfff, is_read);
                assert_eq!(recorded, if fault.silenced { vec![] } else { vec![record] });
                if fault.silenced { 0xff } else { fault.reason.code() }
            }
            Err(other) => panic!("{other}"),
        }
    }

    fn reason(&self) -> u8 {
        self.reason_of(IOVA, Access::Read)
    }

    /// The reason with the word at `at` changed.
    fn reason_with(&self, at: u64, word: u64) -> u8 {
        let before = self.rig.load(at);
        self.rig.store(at, word);
        let reason = self.reason();
        self.rig.store(at, before);
        reason
    }

    /// The reason with one bit of the word at `at` changed.
    fn reason_with_bit(&self, at: u64, bit: u32) -> u8 {
        self.reason_with(at, self.rig.load(at) ^ 1 << bit)
    }

    /// The reason with another entry in the PASID table.
    fn reason_with_entry(&mut self, entry: Entry) -> u8 {
        self.rig.set_entry(NVME, 0, entry);
        self.reason()
    }
}

#[test]
fn a3_the_tables_of_the_tests_are_good() {
    let mut world = World::new();
    assert_eq!((world.reason(), world.reason_of(IOVA, Access::Write)), (0, 0));
    assert_eq!(world.reason_with_entry(pass_through(1)), 0);
}

#[test]
fn a3_rta1_a_table_mode_that_is_reserved() {
    let mut world = World::new();
    world.rig.table_mode = 2;
    assert_eq!(world.reason(), 0x30);
}

#[test]
fn a3_rta4_abort_mode() {
    let mut world = World::new();
    world.rig.table_mode = 3;
    assert_eq!(world.reason(), 0x33);
}

#[test]
fn a3_srt1_a_root_table_that_cannot_be_read() {
    let mut world = World::new();
    for bad in [MEMORY, 1 << 48, !0xfff] {
        world.rig.root_table = bad;
        assert_eq!(world.reason(), 0x38, "{bad:#x}");
    }
}

#[test]
fn a3_srt2_a_half_of_the_root_entry_that_is_not_present() {
    let world = World::new();
    let half = world.rig.root_half_address(NVME);
    assert_eq!(world.reason_with(half, 0xffe), 0x39, "nothing is checked before P");
    assert_eq!(world.reason_with(half + 8, !0), 0, "the other half is of other devices");
}

#[test]
fn a3_srt3_reserved_bits_of_the_root_entry() {
    let world = World::new();
    let half = world.rig.root_half_address(NVME);
    for bit in (1..12).chain(48..64) {
        assert_eq!(world.reason_with_bit(half, bit), 0x3a, "bit {bit}");
    }
}

#[test]
fn a3_sct1_a_context_table_that_cannot_be_read() {
    let world = World::new();
    assert_eq!(world.reason_with(world.rig.root_half_address(NVME), MEMORY | 1), 0x40);
}

#[test]
fn a3_sct2_a_context_entry_that_is_not_present() {
    let mut world = World::new();
    let context = world.rig.scalable_context_address(NVME);
    assert_eq!(world.reason_with(context, 0xffc), 0x41);
    assert_eq!(world.reason_with(context, 0x2), 0xff, "FPD is honoured without P");
}

#[test]
fn a3_sct3_reserved_bits_of_the_context_entry() {
    let mut world = World::new();
    let context = world.rig.scalable_context_address(NVME);
    // DTE, PASIDE, PRE, HPTE, EPTR, and what is beyond the host address width.
    for bit in (2..9).chain(48..64) {
        assert_eq!(world.reason_with_bit(context, bit), 0x42, "bit {bit}");
    }
    for bit in 20..64 {
        assert_eq!(world.reason_with_bit(context + 8, bit), 0x42, "bit {}", bit + 64);
    }
    for bit in 0..64 {
        assert_eq!(world.reason_with_bit(context + 16, bit), 0x42, "bit {}", bit + 128);
        assert_eq!(world.reason_with_bit(context + 24, bit), 0x42, "bit {}", bit + 192);
    }
    assert_eq!(world.reason_with(context, world.rig.load(context) | 0x6), 0xff, "silenced by FPD");
}

#[test]
fn a3_sct4_a_rid_pasid_beyond_the_directory() {
    let mut world = World::new();
    let context = world.rig.scalable_context_address(NVME);
    for size in 0..8u64 {
        let low = world.rig.load(context) & !(7 << 9) | size << 9;
        world.rig.store(context, low);
        let beyond = 1 << (size + 13);
        if beyond <= 0xf_ffff {
            assert_eq!(world.reason_with(context + 8, beyond), 0x43);
        }
        let last = world.reason_with(context + 8, (beyond - 1).min(0xf_ffff));
        assert_ne!(last, 0x43, "the last PASID of 2^{} entries", size + 7);
    }
}

#[test]
fn a3_spd1_a_directory_that_cannot_be_read() {
    let mut world = World::new();
    let context = world.rig.scalable_context_address(NVME);
    assert_eq!(world.reason_with(context, MEMORY | 1), 0x50);
    assert_eq!(world.reason_with(context, MEMORY | 3), 0x50, "FPD does not silence it");
}

#[test]
fn a3_spd2_an_entry_of_the_directory_that_is_not_present() {
    let mut world = World::new();
    let directory = world.rig.directory_address(NVME, 0);
    assert_eq!(world.reason_with(directory, 0xffc), 0x51);
    assert_eq!(world.reason_with(directory, 0x2), 0xff);
}

#[test]
fn a3_spd3_reserved_bits_of_the_directory() {
    let mut world = World::new();
    let directory = world.rig.directory_address(NVME, 0);
    for bit in (2..12).chain(48..64) {
        assert_eq!(world.reason_with_bit(directory, bit), 0x52, "bit {bit}");
    }
}

#[test]
fn a3_spt1_a_pasid_table_that_cannot_be_read() {
    let mut world = World::new();
    let directory = world.rig.directory_address(NVME, 0);
    assert_eq!(world.reason_with(directory, MEMORY | 1), 0x58);
}

#[test]
fn a3_spt2_an_entry_of_the_pasid_table_that_is_not_present() {
    let mut world = World::new();
    let at = world.rig.entry_of_pasid(NVME, 0);
    assert_eq!(world.reason_with(at, !3), 0x59);
    assert_eq!(world.reason_with(at, !1), 0xff);
}

#[test]
fn a3_spt3_reserved_bits_of_the_pasid_table() {
    let mut world = World::new();
    let at = world.rig.entry_of_pasid(NVME, 0);
    for bit in [5, 9, 10, 11].into_iter().chain(48..64) {
        assert_eq!(world.reason_with_bit(at, bit), 0x5a, "bit {bit}");
    }
    for bit in (16..23).chain(24..64) {
        assert_eq!(world.reason_with_bit(at + 8, bit), 0x5a, "bit {}", bit + 64);
    }
    for bit in 0..64 {
        let ignored = matches!(bit, 5 | 6);
        assert_eq!(world.reason_with_bit(at + 16, bit), if ignored { 0 } else { 0x5a }, "bit {}", bit + 128);
        for word in 3..8u64 {
            assert_eq!(world.reason_with_bit(at + word * 8, bit), 0x5a, "bit {}", u64::from(bit) + word * 64);
        }
    }
    assert_eq!(world.reason_with_bit(at + 8, 23), 0, "PWSNP");
    assert_eq!(world.reason_with(at, world.rig.load(at) | 0x22), 0xff, "FPD");
}

#[test]
fn a3_spt4_an_entry_with_a_type_or_a_width_that_is_not_offered() {
    let mut world = World::new();
    let at = world.rig.entry_of_pasid(NVME, 0);
    let low = EntryLow::from_bits(world.rig.load(at));
    for kind in [0, 1, 3, 5, 6, 7] {
        assert_eq!(world.reason_with(at, low.with_translation_type(kind).into_bits()), 0x5b, "type {kind}");
    }
    for width in [0, 3, 4, 5, 6, 7] {
        assert_eq!(world.reason_with(at, low.with_address_width(width).into_bits()), 0x5b, "width {width}");
        let through = low.with_translation_type(4).with_address_width(width).into_bits();
        assert_eq!(world.reason_with(at, through), 0, "no width is asked for");
    }
    let mut without = World::with(UnitConfig { pass_through: false, ..config(48) });
    assert_eq!(without.reason_with_entry(pass_through(1)), 0x5b);
}

#[test]
fn a3_sss1_a_table_that_cannot_be_read() {
    let mut world = World::new();
    for level in [2, 3] {
        let entry = world.rig.entry_address(world.root, 39, IOVA, level);
        assert_eq!(world.reason_with(entry, MEMORY | 3), 0x78, "of level {}", level - 1);
    }
}

#[test]
fn a3_sss2_entries_that_permit_nothing() {
    let mut world = World::new();
    for level in [1, 2, 3] {
        let entry = world.rig.entry_address(world.root, 39, IOVA, level);
        assert_eq!(world.reason_with(entry, world.rig.load(entry) & !3), 0x79, "level {level}");
    }
    let leaf = world.rig.entry_address(world.root, 39, IOVA, 1);
    world.rig.store(leaf, GPA | 1);
    let directory = world.rig.entry_address(world.root, 39, IOVA, 2);
    assert_eq!(world.reason_with(directory, world.rig.load(directory) & !1), 0x79, "nor do both together");
}

#[test]
fn a3_sss3_reserved_bits_of_a_second_stage_entry() {
    let mut world = World::new();
    for level in [1, 2, 3] {
        let entry = world.rig.entry_address(world.root, 39, IOVA, level);
        for bit in (48..52).chain([11, 62]) {
            assert_eq!(world.reason_with_bit(entry, bit), 0x7a, "level {level}, bit {bit}");
        }
    }
    let directory = world.rig.entry_address(world.root, 39, IOVA, 2);
    assert_eq!(world.reason_with(directory, (GPA + 0x1000) | 0x83), 0x7a, "a large leaf that is not aligned");
}

#[test]
fn a3_sss4_a_topmost_table_that_cannot_be_read() {
    let mut world = World::new();
    assert_eq!(world.reason_with_entry(second_stage(MEMORY, 39, 1)), 0x7b);
}

#[test]
fn a3_sgn4_an_address_beyond_the_host_address_width() {
    let mut world = World::with(UnitConfig { host_address_width: 40, ..config(48) });
    world.rig.set_entry(NVME, 0, pass_through(1));
    assert_eq!(world.reason_of((1 << 40) - 0x1000, Access::Read), 0);
    assert_eq!(world.reason_of(1 << 40, Access::Read), 0x83);
}

#[test]
fn a3_sgn5_an_address_beyond_the_width_of_the_entry() {
    let world = World::new();
    assert_eq!(world.reason_of((1 << 39) - 1, Access::Read), 0x79);
    assert_eq!(world.reason_of(1 << 39, Access::Read), 0x84);
    assert_eq!(world.reason_of(u64::MAX, Access::Write), 0x84);
}

#[test]
fn a3_sgn6_and_sgn7_a_permission_that_is_missing() {
    let mut world = World::new();
    let leaf = world.rig.entry_address(world.root, 39, IOVA, 1);
    world.rig.store(leaf, GPA | 1);
    assert_eq!((world.reason_of(IOVA, Access::Read), world.reason_of(IOVA, Access::Write)), (0, 0x85));
    world.rig.store(leaf, GPA | 2);
    assert_eq!((world.reason_of(IOVA, Access::Read), world.reason_of(IOVA, Access::Write)), (0x86, 0));
    assert_eq!(world.reason_of(IOVA, Access::ZeroLengthRead), 0, "ZLR");
}

#[test]
fn a3_sgn8_a_translation_into_the_interrupt_range() {
    let mut world = World::new();
    let leaf = world.rig.entry_address(world.root, 39, IOVA, 1);
    for page in [0xfee0_0000, 0xfeef_f000] {
        assert_eq!(world.reason_with(leaf, page | 3), 0x87);
    }
    assert_eq!(world.reason_with(leaf, 0xfedf_f003), 0);
    assert!(world.rig.submit(&[iotlb_global()]));
}
