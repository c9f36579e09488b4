//! The DMAR table (A-13; VT-d specification, chapter 8), from the same description that the units are built from.

use std::collections::BTreeSet;

use acpi_tables::sdt::Sdt;

use crate::acpi::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};

/// A bus, device and function.
pub type SourcePath = (u8, u8, u8);

/// A device of a unit's scope (section 8.3.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// A PCI endpoint.
    Endpoint(SourcePath),
    /// A PCI-to-PCI bridge, with all that is below it.
    Bridge(SourcePath),
    /// The IOAPIC with this id, which makes requests by this name.
    IoApic {
        /// Its APIC id in the MADT.
        id: u8,
        /// Its source id.
        source: SourcePath,
    },
}

impl Scope {
    fn append_to(self, out: &mut Vec<u8>) {
        let (kind, id, (bus, device, function)) = match self {
            Self::Endpoint(path) => (1, 0, path),
            Self::Bridge(path) => (2, 0, path),
            Self::IoApic { id, source } => (3, id, source),
        };
        // Type, length, two reserved bytes, enumeration id, start bus, then the path.
        out.extend_from_slice(&[kind, 8, 0, 0, id, bus, device, function]);
    }
}

/// A remapping unit (section 8.3).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnitDescription {
    /// PCI segment.
    pub segment: u16,
    /// Guest-physical address of its registers.
    pub base: u64,
    /// Their size in bytes: a power of two, of at least a page.
    pub window: u64,
    /// Whether it has every function of the segment that no other unit names.
    pub include_all: bool,
    /// The devices that it names.
    pub scopes: Vec<Scope>,
}

/// The remapping units of a machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Remapping {
    /// The widest guest address of the units, in bits.
    pub width: u8,
    /// Whether they remap interrupts.
    pub interrupts: bool,
    /// Whether functions behind root ports may have device-TLBs; those beside them may wherever a unit has some.
    pub device_tlbs: bool,
    /// The functions of a bus 0, integrated endpoints, that have a device-TLB, with their segments. Where units have
    /// some.
    pub integrated_tlbs: Vec<(u16, SourcePath)>,
    /// The units.
    pub units: Vec<UnitDescription>,
}

/// Interrupt remapping is supported. X2APIC_OPT_OUT (bit 1) stays clear: it would make Linux leave it off.
const INTR_REMAP: u8 = 1;
const DRHD: u16 = 0;
const INCLUDE_PCI_ALL: u8 = 1;
/// Section 8.5.
const ATSR: u16 = 2;
const ALL_PORTS: u8 = 1;
/// Section 8.8. Its flag ATC_REQUIRED stays clear: the device-TLBs are for speed, and nothing fails without them.
const SATC: u16 = 5;
/// Header of the table: the ACPI header, width, flags, ten reserved bytes.
const HEADER: u32 = 48;

/// The table for these units. A unit that includes all functions comes last, as the specification demands.
pub fn table(remapping: &Remapping) -> Vec<u8> {
    let mut sdt = Sdt::new(*b"DMAR", HEADER, 1, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    sdt.write_u8(36, remapping.width - 1);
    sdt.write_u8(37, if remapping.interrupts { INTR_REMAP } else { 0 });
    let mut sorted: Vec<&UnitDescription> = remapping.units.iter().collect();
    sorted.sort_by_key(|unit| (unit.segment, unit.include_all));
    for unit in sorted {
        let mut scopes = Vec::new();
        unit.scopes.iter().for_each(|scope| scope.append_to(&mut scopes));
        let mut drhd = Vec::new();
        drhd.extend_from_slice(&DRHD.to_le_bytes());
        drhd.extend_from_slice(&(16 + scopes.len() as u16).to_le_bytes());
        drhd.push(if unit.include_all { INCLUDE_PCI_ALL } else { 0 });
        drhd.push((unit.window / 4096).ilog2() as u8); // register size: 2^N pages
        drhd.extend_from_slice(&unit.segment.to_le_bytes());
        drhd.extend_from_slice(&unit.base.to_le_bytes());
        drhd.extend_from_slice(&scopes);
        sdt.append_slice(&drhd);
    }
    if remapping.device_tlbs {
        let segments: BTreeSet<u16> = remapping.units.iter().map(|unit| unit.segment).collect();
        for segment in segments {
            let mut atsr = Vec::new();
            atsr.extend_from_slice(&ATSR.to_le_bytes());
            atsr.extend_from_slice(&8_u16.to_le_bytes());
            atsr.extend_from_slice(&[ALL_PORTS, 0]);
            atsr.extend_from_slice(&segment.to_le_bytes());
            sdt.append_slice(&atsr);
        }
    }
    let with_tlbs: BTreeSet<u16> = remapping.integrated_tlbs.iter().map(|(segment, _)| *segment).collect();
    for segment in with_tlbs {
        let mut scopes = Vec::new();
        let of_segment = remapping.integrated_tlbs.iter().filter(|(its, _)| *its == segment);
        of_segment.for_each(|(_, path)| Scope::Endpoint(*path).append_to(&mut scopes));
        let mut satc = Vec::new();
        satc.extend_from_slice(&SATC.to_le_bytes());
        satc.extend_from_slice(&(8 + scopes.len() as u16).to_le_bytes());
        // No flags, a reserved byte.
        satc.extend_from_slice(&[0; 2]);
        satc.extend_from_slice(&segment.to_le_bytes());
        satc.extend_from_slice(&scopes);
        sdt.append_slice(&satc);
    }
    sdt.as_slice().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a13_each_segment_has_units_atsr_and_satc_of_its_own() {
        let unit = |segment, base, include_all, scopes: &[Scope]| UnitDescription {
            segment,
            base,
            window: 0x1000,
            include_all,
            scopes: scopes.to_vec(),
        };
        let units = vec![
            unit(0, 0xfed9_0000, true, &[]),
            unit(1, 0xfed9_4000, true, &[]),
            unit(1, 0xfed9_8000, false, &[Scope::Endpoint((0, 2, 0))]),
        ];
        let integrated_tlbs = vec![(1, (0, 2, 0)), (0, (0, 2, 0)), (1, (0, 3, 0))];
        let table = table(&Remapping { width: 48, interrupts: true, device_tlbs: true, integrated_tlbs, units });
        let endpoint = |device: u8| [1, 8, 0, 0, 0, 0, device, 0];
        let drhd = |segment: u8, base: u64, all: u8, scopes: &[u8]| {
            let head = [0, 0, 16 + scopes.len() as u8, 0, all, 0, segment, 0];
            [&head[..], &base.to_le_bytes(), scopes].concat()
        };
        let satc =
            |segment: u8, scopes: &[u8]| [&[5, 0, 8 + scopes.len() as u8, 0, 0, 0, segment, 0][..], scopes].concat();
        let expected = [
            drhd(0, 0xfed9_0000, 1, &[]),
            drhd(1, 0xfed9_8000, 0, &endpoint(2)),
            drhd(1, 0xfed9_4000, 1, &[]),
            vec![2, 0, 8, 0, 1, 0, 0, 0],
            vec![2, 0, 8, 0, 1, 0, 1, 0],
            satc(0, &endpoint(2)),
            satc(1, &[endpoint(2), endpoint(3)].concat()),
        ];
        assert_eq!(table[48..], expected.concat());
    }

    #[test]
    fn a13_the_table_says_what_the_description_says_with_the_catch_all_unit_last() {
        let units = vec![
            UnitDescription {
                segment: 0,
                base: 0xfed9_0000,
                window: 0x4000,
                include_all: true,
                scopes: vec![Scope::IoApic { id: 0, source: (0, 0x1f, 7) }],
            },
            UnitDescription {
                segment: 0,
                base: 0xfed9_4000,
                window: 0x1000,
                include_all: false,
                scopes: vec![Scope::Endpoint((0, 5, 0)), Scope::Bridge((0, 6, 1))],
            },
        ];
        let remapping =
            Remapping { width: 48, interrupts: false, device_tlbs: false, integrated_tlbs: Vec::new(), units };
        let with_interrupts = table(&Remapping { interrupts: true, ..remapping.clone() });
        assert_eq!((with_interrupts[36], with_interrupts[37]), (47, INTR_REMAP));
        let with_tlbs = table(&Remapping { device_tlbs: true, ..remapping.clone() });
        let integrated = Remapping { integrated_tlbs: vec![(0, (0, 1, 0)), (0, (0, 2, 3))], ..remapping.clone() };
        let with_integrated = table(&Remapping { device_tlbs: true, ..integrated });
        let table = table(&remapping);
        // One structure for all ports of the segment, behind the units; then one of the functions beside them.
        assert_eq!(with_tlbs[48..], [&table[48..], &[2, 0, 8, 0, 1, 0, 0, 0]].concat());
        let satc = [5, 0, 24, 0, 0, 0, 0, 0, 1, 8, 0, 0, 0, 0, 1, 0, 1, 8, 0, 0, 0, 0, 2, 3];
        assert_eq!(with_integrated[48..], [&with_tlbs[48..], &satc].concat());
        assert_eq!(with_tlbs.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        assert_eq!(table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        assert_eq!(&table[..4], b"DMAR");
        assert_eq!(u32::from_le_bytes(table[4..8].try_into().unwrap()) as usize, table.len());
        assert_eq!((table[36], table[37]), (47, 0));

        let explicit = &table[48..80];
        assert_eq!(&explicit[..8], [0, 0, 32, 0, 0, 0, 0, 0]);
        assert_eq!(u64::from_le_bytes(explicit[8..16].try_into().unwrap()), 0xfed9_4000);
        assert_eq!(&explicit[16..24], [1, 8, 0, 0, 0, 0, 5, 0]);
        assert_eq!(&explicit[24..32], [2, 8, 0, 0, 0, 0, 6, 1]);
        let all = &table[80..];
        assert_eq!((all[2], all[4]), (24, INCLUDE_PCI_ALL));
        assert_eq!((explicit[5], all[5]), (0, 2), "one page, and four");
        assert_eq!(&all[16..], [3, 8, 0, 0, 0, 0, 0x1f, 7]);
    }
}
