//! A-9 and F-5: interrupts without remapping, and those of lines.

use images::edu::Edu;
use images::memory::{page, store};
use images::pci::SourceId;
use images::vtd::offset::IRTA;
use images::vtd::{ENTRIES_GLOBAL, INTERRUPT_POINTER, INTERRUPT_REMAPPING, Unit};
use images::x86::{enable_interrupts, interrupts, pause, read, wait_for, write};
use images::{check_eq, harness};

images::tests!(
    f5_message_arrives,
    f5_message_needs_bus_master,
    f5_line_interrupts_through_the_ioapic,
    a9_line_is_remapped,
    a9_line_with_the_source_of_its_device_is_blocked,
    a9_line_with_the_source_of_its_device_is_an_option => "--iommu vtd,ioapic-check=off",
    a9_line_in_compatibility_format_is_blocked,
);

const VECTOR: u8 = 0x91;
const IOAPIC: u64 = 0xfec0_0000;
/// The IOAPIC's source id in the DMAR table of this machine.
const IOAPIC_SOURCE: u64 = 0x1f << 3 | 7;

fn edu() -> Edu {
    Edu::all().next().unwrap_or_else(|| panic!("there is no edu"))
}

fn f5_message_arrives() {
    let (edu, id) = (edu(), enable_interrupts());
    edu.set_message(0xfee0_0000 | u64::from(id) << 12, VECTOR.into());
    for round in 1..=20 {
        edu.interrupt();
        wait_for("an interrupt", || interrupts(VECTOR) == round);
    }
}

fn f5_message_needs_bus_master() {
    let (edu, id) = (edu(), enable_interrupts());
    edu.set_message(0xfee0_0000 | u64::from(id) << 12, VECTOR.into());
    edu.sid.command(0, images::pci::MASTER);
    edu.interrupt();
    pause(2);
    check_eq!(interrupts(VECTOR), 0, "interrupts without Bus Master");
    edu.sid.command(images::pci::MASTER, 0);
    edu.interrupt();
    wait_for("an interrupt", || interrupts(VECTOR) == 1);
}

/// Programs pin `pin` of the IOAPIC.
fn route(pin: u8, low: u32, high: u32) {
    for (register, value) in [(0x11 + 2 * pin, high), (0x10 + 2 * pin, low)] {
        write::<u32>(IOAPIC, register.into());
        write::<u32>(IOAPIC + 0x10, value);
    }
}

/// The pin of a function, as firmware left it in the interrupt line register.
fn pin(function: SourceId) -> u8 {
    let pin = function.read(0x3c) as u8;
    if pin >= 24 {
        harness::skipped("firmware left no IOAPIC pin in the interrupt line register");
    }
    pin
}

fn f5_line_interrupts_through_the_ioapic() {
    let (edu, id) = (edu(), enable_interrupts());
    route(pin(edu.sid), VECTOR.into(), u32::from(id) << 24);
    for round in 1..=5 {
        edu.interrupt();
        wait_for("an interrupt", || interrupts(VECTOR) == round);
    }
    // Masked.
    route(pin(edu.sid), u32::from(VECTOR) | 1 << 16, u32::from(id) << 24);
    edu.interrupt();
    pause(2);
    check_eq!(interrupts(VECTOR), 5, "interrupts of a masked pin");
}

fn remapping(unit: &mut Unit) -> u64 {
    if unit.extended(3, 1) == 0 {
        harness::skipped("the unit does not offer interrupt remapping");
    }
    let table = page();
    unit.start_queue(0);
    unit.write64(IRTA, table | 7);
    unit.command(INTERRUPT_POINTER, true);
    unit.command(INTERRUPT_REMAPPING, true);
    unit.invalidate(&[ENTRIES_GLOBAL]);
    table
}

fn a9_line_is_remapped() {
    let (edu, id, mut unit) = (edu(), enable_interrupts(), Unit::new());
    let table = remapping(&mut unit);
    // Only the IOAPIC may use the entry.
    store(table + 16 * 6 + 8, 1 << 18 | IOAPIC_SOURCE);
    store(table + 16 * 6, 1 | u64::from(VECTOR) << 16 | u64::from(id) << 40);
    unit.invalidate(&[ENTRIES_GLOBAL]);
    // Index 6 in bits 63:49, the format bit 48.
    route(pin(edu.sid), VECTOR.into(), 6 << 17 | 1 << 16);
    for round in 1..=5 {
        edu.interrupt();
        wait_for("an interrupt", || interrupts(VECTOR) == round);
    }
    check_eq!(unit.take_fault(), None, "a fault");
}

/// Routes the device's line to an entry that is for the device itself, as some guests do it, and interrupts.
fn line_as_its_device(unit: &mut Unit) {
    let (edu, id) = (edu(), enable_interrupts());
    let table = remapping(unit);
    store(table + 8, 1 << 18 | u64::from(edu.sid.0));
    store(table, 1 | u64::from(VECTOR) << 16 | u64::from(id) << 40);
    unit.invalidate(&[ENTRIES_GLOBAL]);
    route(pin(edu.sid), VECTOR.into(), 1 << 16);
    edu.interrupt();
}

fn a9_line_with_the_source_of_its_device_is_blocked() {
    let mut unit = Unit::new();
    line_as_its_device(&mut unit);
    let mut fault = None;
    wait_for("the fault of an interrupt", || {
        fault = unit.take_fault();
        fault.is_some()
    });
    check_eq!(fault.map(|fault| (u64::from(fault.source.0), fault.reason)), Some((IOAPIC_SOURCE, 0x26)), "the fault");
    check_eq!(interrupts(VECTOR), 0, "interrupts");
}

fn a9_line_with_the_source_of_its_device_is_an_option() {
    let mut unit = Unit::new();
    line_as_its_device(&mut unit);
    wait_for("an interrupt", || interrupts(VECTOR) == 1);
    check_eq!(unit.take_fault(), None, "a fault");
}

fn a9_line_in_compatibility_format_is_blocked() {
    let (edu, id, mut unit) = (edu(), enable_interrupts(), Unit::new());
    remapping(&mut unit);
    route(pin(edu.sid), VECTOR.into(), u32::from(id) << 24);
    edu.interrupt();
    let mut fault = None;
    wait_for("the fault of an interrupt", || {
        fault = unit.take_fault();
        fault.is_some()
    });
    let seen = fault.map(|fault| (u64::from(fault.source.0), fault.reason));
    check_eq!(seen, Some((IOAPIC_SOURCE, 0x25)), "the fault");
    check_eq!(interrupts(VECTOR), 0, "interrupts");
    // Its value is read back, as it is in the table of the IOAPIC.
    check_eq!(read::<u32>(IOAPIC + 0x10), u32::from(VECTOR), "the redirection entry");
}
