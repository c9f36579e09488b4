//! A-9 and F-5: interrupts without remapping, and those of lines.

use images::edu::Edu;
use images::memory::{page, store};
use images::pci::SourceId;
use images::vtd::offset::IRTA;
use images::vtd::{ENTRIES_GLOBAL, Fault, INTERRUPT_POINTER, INTERRUPT_REMAPPING, Unit};
use images::x86::{enable_interrupts, interrupts, read, wait_for, write};
use images::{check, check_eq, harness};

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
pub(super) const IOAPIC: u64 = 0xfec0_0000;
/// The IOAPIC's source id in the DMAR table of this machine.
pub(super) const IOAPIC_SOURCE: u64 = 0x1f << 3 | 7;

fn f5_message_arrives() {
    let (edu, id) = (Edu::first(), enable_interrupts());
    edu.set_message(0xfee0_0000 | u64::from(id) << 12, VECTOR.into());
    for round in 1..=20 {
        edu.interrupt();
        wait_for("an interrupt", || interrupts(VECTOR) == round);
    }
}

fn f5_message_needs_bus_master() {
    let (edu, id) = (Edu::first(), enable_interrupts());
    edu.set_message(0xfee0_0000 | u64::from(id) << 12, VECTOR.into());
    edu.sid.command(0, images::pci::MASTER);
    edu.interrupt();
    edu.settle();
    check_eq!(interrupts(VECTOR), 0, "interrupts without Bus Master");
    edu.sid.command(images::pci::MASTER, 0);
    edu.interrupt();
    wait_for("an interrupt", || interrupts(VECTOR) == 1);
}

/// Programs pin `pin` of the IOAPIC.
pub(super) fn route(pin: u8, low: u32, high: u32) {
    for (register, value) in [(0x11 + 2 * pin, high), (0x10 + 2 * pin, low)] {
        write::<u32>(IOAPIC, register.into());
        write::<u32>(IOAPIC + 0x10, value);
    }
}

/// The pin of a function, as firmware left it in the interrupt line register.
pub(super) fn pin(function: SourceId) -> u8 {
    let pin = function.read(0x3c) as u8;
    if pin >= 24 {
        harness::skipped("firmware left no IOAPIC pin in the interrupt line register");
    }
    pin
}

/// Of a redirection entry: masked.
const MASKED: u32 = 1 << 16;

/// How a redirection entry for the device's line is triggered: 1 by its level. So are PCI's lines, and that of an
/// assigned function is masked by its host until the interrupt has its end, which is told only of levels. An emulated
/// one's is as good by its edge: then its handler need not reach the device.
pub(super) fn by_level(edu: &Edu) -> u32 {
    edu.assigned.into()
}

/// The device raises its line five times, and is served each time: it interrupts, and then no more. Gives how often it
/// did.
fn line_interrupts(edu: &Edu) -> u64 {
    // The registers of one that another process emulates are not mapped: a handler does not reach them reliably, and so
    // its level interrupts until the device is acknowledged here.
    let once = !edu.assigned || !edu.recorded;
    if edu.assigned && once {
        edu.acknowledge_in_the_handler();
    }
    let mut before = 0;
    for _ in 0..5 {
        edu.raise();
        wait_for("an interrupt", || interrupts(VECTOR) > before);
        edu.acknowledge();
        edu.settle();
        let now = interrupts(VECTOR);
        check!(now == before + 1 || !once, "{} interrupts of one level", now - before);
        edu.settle();
        check_eq!(interrupts(VECTOR), now, "interrupts of a line that is low");
        before = now;
    }
    before
}

fn f5_line_interrupts_through_the_ioapic() {
    let (edu, id) = (Edu::first(), enable_interrupts());
    let entry = u32::from(VECTOR) | by_level(&edu) << 15;
    route(pin(edu.sid), entry, u32::from(id) << 24);
    let before = line_interrupts(&edu);
    route(pin(edu.sid), entry | MASKED, u32::from(id) << 24);
    edu.raise();
    edu.settle();
    check_eq!(interrupts(VECTOR), before, "interrupts of a masked pin");
    route(pin(edu.sid), entry, u32::from(id) << 24);
    if edu.assigned {
        wait_for("the interrupt of a level that is still there", || interrupts(VECTOR) > before);
    }
    edu.acknowledge();
}

/// Turns remapping on, with a table of 256 entries. Its address.
pub(super) fn remapping(unit: &mut Unit) -> u64 {
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
    let (edu, id, mut unit) = (Edu::first(), enable_interrupts(), Unit::new());
    let table = remapping(&mut unit);
    // Only the IOAPIC may use the entry.
    store(table + 16 * 6 + 8, 1 << 18 | IOAPIC_SOURCE);
    store(table + 16 * 6, 1 | u64::from(by_level(&edu)) << 4 | u64::from(VECTOR) << 16 | u64::from(id) << 40);
    unit.invalidate(&[ENTRIES_GLOBAL]);
    // Index 6 in bits 63:49, the format bit 48.
    route(pin(edu.sid), u32::from(VECTOR) | by_level(&edu) << 15, 6 << 17 | 1 << 16);
    line_interrupts(&edu);
    check_eq!(unit.take_fault(), None, "a fault");
}

/// Routes the device's line to an entry that is for the device itself, as some guests do it, and raises it.
fn line_as_its_device(unit: &mut Unit) -> Edu {
    let (edu, id) = (Edu::first(), enable_interrupts());
    let table = remapping(unit);
    store(table + 8, 1 << 18 | u64::from(edu.sid.0));
    store(table, 1 | u64::from(VECTOR) << 16 | u64::from(id) << 40);
    unit.invalidate(&[ENTRIES_GLOBAL]);
    route(pin(edu.sid), VECTOR.into(), 1 << 16);
    edu.raise();
    edu
}

fn interrupt_fault(unit: &Unit) -> Option<Fault> {
    let mut fault = None;
    wait_for("the fault of an interrupt", || {
        fault = unit.take_fault();
        fault.is_some()
    });
    fault
}

fn a9_line_with_the_source_of_its_device_is_blocked() {
    let mut unit = Unit::new();
    let edu = line_as_its_device(&mut unit);
    let fault = interrupt_fault(&unit);
    edu.acknowledge();
    check_eq!(fault.map(|fault| (u64::from(fault.source.0), fault.reason)), Some((IOAPIC_SOURCE, 0x26)), "the fault");
    check_eq!(interrupts(VECTOR), 0, "interrupts");
}

fn a9_line_with_the_source_of_its_device_is_an_option() {
    let mut unit = Unit::new();
    let edu = line_as_its_device(&mut unit);
    wait_for("an interrupt", || interrupts(VECTOR) == 1);
    edu.acknowledge();
    check_eq!(unit.take_fault(), None, "a fault");
}

fn a9_line_in_compatibility_format_is_blocked() {
    let (edu, id, mut unit) = (Edu::first(), enable_interrupts(), Unit::new());
    remapping(&mut unit);
    route(pin(edu.sid), VECTOR.into(), u32::from(id) << 24);
    edu.raise();
    let fault = interrupt_fault(&unit);
    edu.acknowledge();
    let seen = fault.map(|fault| (u64::from(fault.source.0), fault.reason));
    check_eq!(seen, Some((IOAPIC_SOURCE, 0x25)), "the fault");
    check_eq!(interrupts(VECTOR), 0, "interrupts");
    // Its value is read back, as it is in the table of the IOAPIC.
    check_eq!(read::<u32>(IOAPIC + 0x10), u32::from(VECTOR), "the redirection entry");
}
