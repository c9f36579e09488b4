use super::*;
use crate::acpi::dmar::{Scope, UnitDescription};
use crate::boot::layout::Window;
use crate::config::MAX_SEGMENTS;
use std::collections::BTreeMap;

fn u32_at(table: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(table[offset..offset + 4].try_into().unwrap())
}

fn u64_at(table: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(table[offset..offset + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn unit() -> UnitDescription {
    UnitDescription {
        segment: 0,
        base: layout::VTD_UNIT,
        window: 0x1000,
        include_all: true,
        scopes: vec![Scope::IoApic { id: layout::IOAPIC_ID, source: layout::IOAPIC_SOURCE }],
    }
}

/// The windows of a machine with one segment.
fn windows(high: Option<Window>) -> [BarWindows; 1] {
    [BarWindows { segment: 0, low: layout::pci32_window(0, 0), high }]
}

/// Finds the tables as a guest does: from the RSDP, by the XSDT.
fn find(description: &Description<'_>) -> BTreeMap<String, Vec<u8>> {
    let placed: BTreeMap<u64, Vec<u8>> = tables(description).into_iter().collect();
    let rsdp = &placed[&layout::ACPI_TABLES];
    assert_eq!((&rsdp[..8], sum(&rsdp[..20]), sum(rsdp)), (&b"RSD PTR "[..], 0, 0));
    let xsdt = &placed[&u64_at(rsdp, 24)];
    let mut found = BTreeMap::new();
    for at in xsdt[36..].chunks(8).map(|entry| u64_at(entry, 0)) {
        let table = &placed[&at];
        found.insert(String::from_utf8(table[..4].to_vec()).unwrap(), table.clone());
    }
    let fadt = &found["FACP"];
    let (facs, dsdt) = (u32_at(fadt, 36), u32_at(fadt, 40));
    assert_eq!(u64_at(fadt, 140), u64::from(dsdt));
    assert_eq!(facs % 64, 0);
    assert_eq!(&placed[&u64::from(facs)][..4], b"FACS");
    found.insert("DSDT".into(), placed[&u64::from(dsdt)].clone());
    found.insert("XSDT".into(), xsdt.clone());
    found
}

#[test]
fn every_table_is_found_and_its_length_and_checksum_are_right() {
    let remapping =
        Remapping { width: 48, interrupts: true, device_tlbs: false, integrated_tlbs: vec![], units: vec![unit()] };
    let pci64 = layout::pci64_window(layout::high_end(512 << 20), 40, &[]);
    let tables = find(&Description {
        cpus: 4,
        windows: &windows(pci64),
        root_ports: 0,
        last_bus: 0,
        remapping: Some(&remapping),
    });
    assert_eq!(tables.keys().collect::<Vec<_>>(), ["APIC", "DMAR", "DSDT", "FACP", "MCFG", "XSDT"]);
    for (name, table) in &tables {
        assert_eq!(&table[..4], name.as_bytes());
        assert_eq!(u32_at(table, 4) as usize, table.len(), "{name}");
        assert_eq!(sum(table), 0, "{name}");
    }
    assert!(
        !find(&Description { cpus: 4, windows: &windows(pci64), root_ports: 0, last_bus: 0, remapping: None })
            .contains_key("DMAR")
    );
}

#[test]
fn tables_do_not_overlap_and_fit_for_the_largest_machine() {
    let mut placed = tables(&Description {
        cpus: 254,
        windows: &windows(layout::pci64_window(layout::high_end(1 << 40), 46, &[])),
        root_ports: 0,
        last_bus: 0,
        remapping: None,
    });
    placed.sort();
    assert!(placed.windows(2).all(|pair| pair[0].0 + pair[0].1.len() as u64 <= pair[1].0));
    let (at, table) = placed.last().unwrap();
    assert!(at + table.len() as u64 <= layout::ACPI_LAST);
}

#[test]
fn the_madt_names_each_cpu_the_ioapic_and_a_level_triggered_sci() {
    let tables = find(&Description { cpus: 3, windows: &windows(None), root_ports: 0, last_bus: 0, remapping: None });
    let madt = &tables["APIC"];
    assert_eq!(u32_at(madt, 40), 1, "a pair of 8259A is there");
    let mut rest = &madt[44..];
    let mut entries = Vec::new();
    while !rest.is_empty() {
        let (entry, after) = rest.split_at(rest[1].into());
        entries.push(entry.to_vec());
        rest = after;
    }
    for id in 0..3u8 {
        assert_eq!(entries[usize::from(id)], [0, 8, id, id, 1, 0, 0, 0]);
    }
    assert_eq!((entries[3][0], u32_at(&entries[3], 4), u32_at(&entries[3], 8)), (1, 0xfec0_0000, 0));
    assert_eq!(entries[4], [2, 10, 0, 0, 2, 0, 0, 0, 0, 0], "the timer's interrupt 0 is at pin 2");
    assert_eq!(entries[5], [2, 10, 0, 9, 9, 0, 0, 0, 0xd, 0]);
}

#[test]
fn the_fadt_says_that_there_is_a_clock_with_a_century() {
    let tables = find(&Description { cpus: 1, windows: &windows(None), root_ports: 0, last_bus: 0, remapping: None });
    let fadt = &tables["FACP"];
    assert_eq!((fadt[108], fadt[109] & 1 << 5), (0x32, 0));
}

#[test]
fn the_fadt_says_that_power_button_and_alarm_are_fixed_hardware_and_that_there_is_no_sleep_button() {
    let tables = find(&Description { cpus: 1, windows: &windows(None), root_ports: 0, last_bus: 0, remapping: None });
    let flags = u32_at(&tables["FACP"], 112);
    assert_eq!((flags >> 4 & 1, flags >> 5 & 1, flags >> 6 & 1), (0, 1, 0));
    // A device of the namespace would be a second one.
    assert!(!tables["DSDT"].windows(4).any(|id| id == [0x41, 0xd0, 0x0c, 0x0c]), "PNP0C0C");
}

#[test]
fn the_dsdt_has_both_windows_and_an_interrupt_for_every_pin() {
    let pci64 = layout::pci64_window(layout::high_end(512 << 20), 40, &[128 << 30]).unwrap();
    assert_eq!(pci64, Window { first: 128 << 30, last: (256 << 30) - 1 });
    let tables =
        find(&Description { cpus: 1, windows: &windows(Some(pci64)), root_ports: 0, last_bus: 0, remapping: None });
    let dsdt = &tables["DSDT"];
    let has = |part: &[u8]| dsdt.windows(part.len()).any(|window| window == part);
    let ends = [(pci64.first).to_le_bytes(), (pci64.last).to_le_bytes()].concat();
    assert!(has(&ends));
    let ends = [(layout::PCI32_FIRST as u32).to_le_bytes(), (layout::PCI32_LAST as u32).to_le_bytes()].concat();
    assert!(has(&ends));
    assert!(has(b"_S5_") && has(b"_PRT") && has(b"COM1") && has(b"RTC0"));
    for device in 0..32u32 {
        assert!(has(&(device << 16 | 0xffff).to_le_bytes()));
    }
}

#[test]
fn f6_with_root_ports_there_is_a_bus_for_each_and_native_hot_plug_is_granted() {
    let without = find(&Description { cpus: 1, windows: &windows(None), root_ports: 0, last_bus: 0, remapping: None });
    let with = find(&Description { cpus: 1, windows: &windows(None), root_ports: 3, last_bus: 3, remapping: None });
    let has = |dsdt: &[u8], part: &[u8]| dsdt.windows(part.len()).any(|window| window == part);
    assert_eq!(with["MCFG"][52..56], [0, 0, 0, 3], "segment, first bus, last bus");
    // Bus numbers: granularity, first, last, translation, length.
    assert!(has(&with["DSDT"], &[0x88, 13, 0, 2, 0x0c, 0, 0, 0, 0, 0, 3, 0, 0, 0, 4, 0]));
    // ECAM is reserved: writable, from 0xe0000000 on, 4 MiB.
    assert!(has(&with["DSDT"], &[0x86, 9, 0, 1, 0, 0, 0, 0xe0, 0, 0, 0x40, 0]));
    assert!(!has(&without["DSDT"], b"_OSC"));
    // A method of four arguments, serialized; then what is kept of the controls (And, 0x11 as a byte: hot-plug and the
    // PCI Express capability).
    assert!(has(&with["DSDT"], b"_OSC\x0c"));
    assert!(has(&with["DSDT"], b"\x7bCDW3\x0a\x11\x60"));
    let uuid = [0x5b, 0x4d, 0xdb, 0x33, 0xf7, 0x1f, 0x1c, 0x40, 0x96, 0x57, 0x74, 0x41, 0xc0, 0x3d, 0xd7, 0x66];
    assert!(has(&with["DSDT"], &uuid));
}

#[test]
fn the_mcfg_and_the_root_bridge_name_bus_0_alone() {
    let tables = find(&Description { cpus: 1, windows: &windows(None), root_ports: 0, last_bus: 0, remapping: None });
    let mcfg = &tables["MCFG"];
    assert_eq!((mcfg.len(), u64_at(mcfg, 44)), (60, 0xe000_0000));
    assert_eq!(mcfg[52..56], [0, 0, 0, 0], "segment, first bus, last bus");
    // Bus numbers (type 2), produced, both ends fixed; granularity, first, last, translation, length.
    let buses = [0x88, 13, 0, 2, 0x0c, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    assert!(tables["DSDT"].windows(buses.len()).any(|window| window == buses));
}

#[test]
fn a13_each_segment_has_its_ecam_in_the_mcfg_and_a_root_bridge() {
    let high = Window { first: 64 << 30, last: (128 << 30) - 1 };
    let of = |segment, high| BarWindows { segment, low: layout::pci32_window(segment, 3), high };
    let windows = [of(0, None), of(3, Some(high))];
    let tables = find(&Description { cpus: 1, windows: &windows, root_ports: 2, last_bus: 2, remapping: None });
    let mcfg = &tables["MCFG"];
    assert_eq!((mcfg.len(), u64_at(mcfg, 44), u64_at(mcfg, 60)), (76, 0xe000_0000, 0xf200_0000));
    assert_eq!((&mcfg[52..56], &mcfg[68..72]), (&[0, 0, 0, 2][..], &[3, 0, 0, 0][..]), "segment, first bus, last bus");
    let dsdt = &tables["DSDT"];
    let places = |part: &[u8]| {
        let found = dsdt.windows(part.len()).enumerate().filter(|(_, window)| *window == part);
        found.map(|(at, _)| at).collect::<Vec<_>>()
    };
    let [first, other, rest] = [b"PCI0", b"PCI3", b"RSVD"].map(|name| places(name)[0]);
    assert!(first < other && other < rest);
    let has = |from: usize, to: usize, part: &[u8]| dsdt[from..to].windows(part.len()).any(|window| window == part);
    // _SEG and _UID are 3, _BBN is 0; _CBA is where MCFG says.
    assert!(has(other, rest, b"\x08_SEG\x0a\x03") && has(other, rest, b"\x08_UID\x0a\x03"));
    assert!(has(other, rest, b"\x08_BBN\x00") && has(other, rest, b"\x08_CBA\x0c\x00\x00\x00\xf2"));
    assert!(has(other, rest, b"_PRT") && has(first, other, b"_OSC") && !has(other, rest, b"_OSC"));
    // Its windows, and none of the first one's; no ports.
    let ends = |window: Window| [(window.first as u32).to_le_bytes(), (window.last as u32).to_le_bytes()].concat();
    assert!(has(other, rest, &ends(windows[1].low)) && !has(other, rest, &ends(windows[0].low)));
    assert!(has(first, other, &ends(windows[0].low)) && has(first, other, &[0x47, 1, 0xf8, 0x0c]));
    let high = [high.first.to_le_bytes(), high.last.to_le_bytes()].concat();
    assert!(has(other, rest, &high) && !has(first, other, &high));
    assert!(!has(other, rest, &[0x47, 1, 0xf8, 0x0c]) && !has(other, rest, &[0x88, 13, 0, 1]));
    // Its configuration space is reserved, of one bus.
    assert!(has(rest, dsdt.len(), &[0x86, 9, 0, 1, 0, 0, 0, 0xf2, 0, 0, 0x10, 0]));
}

#[test]
fn a13_tables_of_all_segments_have_room() {
    let segments: Vec<BarWindows> = (0..MAX_SEGMENTS)
        .map(|segment| BarWindows { segment, low: layout::pci32_window(segment, MAX_SEGMENTS - 1), high: None })
        .collect();
    let description = Description { cpus: 254, windows: &segments, root_ports: 15, last_bus: 30, remapping: None };
    let (at, table) = tables(&description).into_iter().max().unwrap();
    assert!(at + table.len() as u64 <= layout::ACPI_LAST - 0x1000);
}
