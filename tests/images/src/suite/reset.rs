//! a reset of the machine. What a test must remember lies in memory that neither the image nor firmware touches:
//! the image itself is loaded anew.

use images::memory::{PAGE, load, page, store};
use images::pci::{self, BAR0, COMMAND, MASTER};
use images::smp::beside;
use images::tables::{Domain, READ_WRITE};
use images::vtd::offset::{
    CCMD, FEADDR, FECTL, FEDATA, FSTS, GSTS, ICS, IEADDR, IECTL, IEDATA, IQA, IQH, IQT, IRTA, RTADDR,
};
use images::vtd::{PENDING, QUEUE_ERROR, TRANSLATION, Unit, iotlb_domain};
use images::world::{IOVA, WRITTEN};
use images::x86::{enable_interrupts, interrupts, outb, pause, read, wait_for, write};
use images::{World, check, check_eq, harness};

use super::concurrent::{driver, is_sealed, seal};
use super::interrupts::{IOAPIC, route};
use super::remapping::{Remapped, VECTOR};

images::tests!(
    a11_reset_leaves_the_unit_as_power_on_does => "reboots",
    a11_reset_under_dma_leaves_the_device_quiet => "reboots --cpus 2",
    a11_reset_is_of_every_unit => "reboots --iommu vtd,perf=on --iommu vtd,perf=on,devices=02.0 --device edu",
);

/// Behind what [`page`] gives out.
const KEPT: u64 = 60 << 20;
/// Says that [`KEPT`] is ours.
const MARK: u64 = 0x6b65_7074_2061_6c69;
/// Where power-on state is kept: of the unit's registers, of configuration space, of the device's registers, of what
/// else is read.
const REGISTERS: u64 = KEPT + PAGE;
const CONFIGURATION: u64 = KEPT + 2 * PAGE;
const DEVICE: u64 = KEPT + 3 * PAGE;
const ELSEWHERE: u64 = KEPT + 4 * PAGE;
/// Memory under DMA.
const MAPPED: u64 = KEPT + 5 * PAGE;
/// Another page, whose address leads to [`MAPPED`] while translation is on.
const ALIAS: u64 = KEPT + 6 * PAGE;
/// How far the second processor came.
const COUNT: u64 = KEPT + 8;

/// How often the machine was reset.
fn resets() -> u64 {
    match load(KEPT) ^ MARK {
        resets @ 0..=9 => resets,
        _ => {
            store(KEPT, MARK);
            0
        }
    }
}

fn reset() -> ! {
    let resets = resets();
    store(KEPT, MARK ^ (resets + 1));
    // The reset register, which ACPI names, and the keyboard controller.
    if resets.is_multiple_of(2) {
        outb(0xcf9, 6)
    } else {
        outb(0x64, 0xfe)
    }
    wait_for("the reset", || false);
    unreachable!()
}

fn a11_reset_is_of_every_unit() {
    let [one, other] = [0, 1].map(Unit::number);
    for unit in [&one, &other] {
        // The configuration of the first performance counter, where the unit says that it is.
        let counter = u64::from(unit.read32(0x310));
        check_eq!((unit.read32(GSTS), unit.read64(RTADDR), unit.read64(counter)), (0, 0, 0), "what it has at first");
        unit.set_root(page());
        unit.command(TRANSLATION, true);
        unit.write64(counter, 2 << 32);
        check!(unit.read64(RTADDR) != 0 && unit.read64(counter) == 2 << 32, "it does not hold what was written");
    }
    if resets() < 2 {
        reset();
    }
}

/// Keeps the `words` of four bytes that `now` gives when the machine is new, and compares them after each reset.
#[track_caller]
fn as_after_power_on(what: &str, kept: u64, words: u64, new: bool, now: impl Fn(u64) -> u32) {
    for offset in (0..4 * words).step_by(4) {
        let value = now(offset);
        if new {
            write(kept + offset, value);
        }
        let expected = read::<u32>(kept + offset);
        check!(value == expected, "{what} {offset:#x} is {value:#x} after the reset, and {expected:#x} after power-on");
    }
}

fn a11_reset_leaves_the_unit_as_power_on_does() {
    let resets = resets();
    let unit = Unit::new();
    as_after_power_on("the unit's register", REGISTERS, 1024, resets == 0, |offset| unit.read32(offset));
    as_after_power_on("the IOAPIC's register (times 4)", ELSEWHERE, 0x40, resets == 0, |offset| {
        write::<u32>(IOAPIC, offset as u32 / 4);
        read(IOAPIC + 0x10)
    });

    // Neither DMA nor interrupts are remapped.
    let (edu, id, page) = (driver(), enable_interrupts(), page());
    store(edu.scratch, WRITTEN ^ resets);
    edu.dma_read(edu.scratch, 8);
    edu.dma_write(page, 8);
    check_eq!(load(page), WRITTEN ^ resets, "what the device wrote without translation");
    edu.set_message(0xfee0_0000 | u64::from(id) << 12, VECTOR.into());
    edu.interrupt();
    wait_for("an interrupt that is not remapped", || interrupts(VECTOR) == 1);

    let mut remapped = Remapped::new();
    remapped.set(3, remapped.entry(VECTOR), 0);
    remapped.use_entry(3);
    remapped.arrives(VECTOR);
    let domain = translation_on(&mut remapped.world);
    domain.map(IOVA, page, READ_WRITE);
    remapped.world.unit.invalidate(&[iotlb_domain(domain.id)]);
    remapped.world.reaches(IOVA, page);
    remapped.world.not_mapped(page, page);
    if resets < 2 {
        leave_traces(&mut remapped.world);
        reset();
    }
}

fn translation_on(world: &mut World) -> Domain {
    let domain = world.domain(1, world.levels());
    world.attach(world.edu.sid, &domain);
    world.unit.command(TRANSLATION, true);
    domain
}

/// Leaves few registers as they were at power-on: with a fault, an error and events pending.
fn leave_traces(world: &mut World) {
    let unit = &mut world.unit;
    for (control, data, address) in [(FECTL, FEDATA, FEADDR), (IECTL, IEDATA, IEADDR)] {
        unit.write32(data, VECTOR.into());
        unit.write32(address, 0xfee0_0000);
        unit.write32(control, 0);
    }
    route(20, VECTOR.into(), 0);
    unit.write64(CCMD, 0x1234_5678);
    world.beside.as_ref().unwrap_or(&world.edu).dma_write(IOVA + PAGE, 8);
    // A wait that interrupts, then an unknown descriptor.
    unit.queue(&[[5 | 1 << 4, 0], [0xf, 0]]);
    unit.ring();
    wait_for("the queue's error", || unit.read32(FSTS) & QUEUE_ERROR != 0);
    check!(unit.read32(FSTS) & PENDING != 0, "no fault is pending");
    for register in [GSTS, FEDATA, FEADDR, ICS, IEDATA, IEADDR] {
        check!(unit.read32(register) != 0, "register {register:#x} is 0 before the reset");
    }
    for register in [RTADDR, CCMD, IQH, IQT, IQA, IRTA] {
        check!(unit.read64(register) != 0, "register {register:#x} is 0 before the reset");
    }
    check_eq!((unit.read32(FECTL) >> 31, unit.read32(IECTL) >> 31), (0, 0), "the masks before the reset");
}

/// Registers of the device.
const LIVENESS: u64 = 0x04;
const STATUS: u64 = 0x20;
const INTERRUPT_AFTER_FACTORIAL: u32 = 0x80;

/// So often; the last time is none in which the second processor counts for ever.
const RESETS: u64 = 6;

/// Where no BAR is at power-on.
const OTHER_PLACE: u64 = 0xd000_0000;

fn a11_reset_under_dma_leaves_the_device_quiet() {
    let resets = resets();
    seal(MAPPED);
    let sid = pci::find(0, 0x1234, 0x11e8).next().unwrap_or_else(|| panic!("there is no edu"));
    let configuration = |offset| sid.read(offset as u16);
    as_after_power_on("configuration space at", CONFIGURATION, 64, resets == 0, configuration);
    check_eq!(sid.read(COMMAND) & MASTER, 0, "Bus Master");
    let bar = u64::from(sid.read(BAR0) & !0xf);
    // On a bus that nothing resets, a function of the host keeps its registers.
    if !harness::is_unrecorded(sid) {
        as_after_power_on("the device's register", DEVICE, 0xa0 / 4, resets == 0, |offset| read(bar + offset));
    }
    as_after_power_on("where the BAR was,", ELSEWHERE, 4, resets == 0, |offset| read(OTHER_PLACE + offset));
    enable_interrupts();
    let count = load(COUNT);
    pause(10);
    check!(resets == 0 || is_sealed(ALIAS), "the device reached an untranslated address");
    check!(is_sealed(MAPPED), "the device wrote to memory after the reset");
    check_eq!((load(COUNT), interrupts(VECTOR)), (count, 0), "rounds of the second processor and interrupts");

    sid.write(BAR0, OTHER_PLACE as u32);
    let mut remapped = Remapped::new();
    remapped.set(3, remapped.entry(VECTOR), 0);
    remapped.use_entry(3);
    remapped.arrives(VECTOR);
    let domain = translation_on(&mut remapped.world);
    domain.map(ALIAS, MAPPED, READ_WRITE);
    remapped.world.unit.invalidate(&[iotlb_domain(domain.id)]);
    let edu = driver();
    edu.write(LIVENESS, 1);
    edu.write(STATUS, INTERRUPT_AFTER_FACTORIAL);
    seal(ALIAS);
    let count_up = || store(COUNT, load(COUNT) + 1);
    beside(
        || {
            edu.dma_write(ALIAS, PAGE);
            edu.interrupt();
            count_up();
            // Every third time it does not do anything else any more.
            if resets % 3 == 1 {
                loop {
                    count_up();
                }
            }
        },
        |second| {
            wait_for("the second processor", || load(COUNT) > count + 3);
            check!(!is_sealed(MAPPED), "the device does not reach the page that is mapped");
            check!(is_sealed(ALIAS), "the page of that address was reached");
            if resets < RESETS {
                // A round has just ended: not always at the same place of the next one.
                for _ in 0..4 * resets {
                    sid.read(0);
                }
                reset();
            }
            second.wait_for_rounds(1);
        },
    );
    remapped.world.no_fault();
}
