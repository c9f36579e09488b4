//! fault records, overflow, collapse, silence, and the fault event. All of them are of a device whose faults the
//! unit records; an assigned one that is blocked beside it leaves no trace in it.

use images::edu::Edu;
use images::memory::{load, page, store};
use images::vtd::offset::*;
use images::vtd::{OVERFLOW, PENDING, TRANSLATION};
use images::world::{IOVA, READ_DENIED, UNTOUCHED, WRITE_DENIED, WRITTEN};
use images::x86::{enable_interrupts, interrupts, pause, wait_for};
use images::{World, check, check_eq};

images::tests!(
    a8_record_names_device_page_and_kind,
    a8_faults_of_one_device_collapse,
    a8_records_are_used_in_turn,
    a8_devices_have_records_of_their_own => "--device edu",
    a8_overflow_is_told_and_ends => "--device edu --device edu --device edu --device edu --device edu --device edu --device edu \
                                     --device edu",
    a8_fault_processing_disable_silences,
    a8_fault_event_interrupts,
    a8_fault_event_is_held_back_by_its_mask,
    a8_fault_event_is_withdrawn_when_the_fault_is_served,
    a8_one_event_until_all_is_served => "--device edu",
);

const VECTOR: u8 = 0x71;

fn a8_record_names_device_page_and_kind() {
    let (world, _) = World::recorded_with_domain();
    world.edu.fill(WRITTEN);
    world.edu.dma_write(IOVA + 0x123 * 8, 8);
    check_eq!(world.unit.read32(FSTS), PENDING, "FSTS");
    let fault = world.unit.fault_at(0).unwrap_or_else(|| panic!("there is no record"));
    check_eq!((fault.source, fault.reason, fault.read), (world.edu.sid, WRITE_DENIED, false), "the record");
    check_eq!(fault.info, IOVA, "the page");
    world.unit.clear_fault(0);
    check_eq!(world.unit.read32(FSTS) & PENDING, 0, "FSTS");
    world.edu.dma_read(IOVA + 0x5000, 8);
    world.fault(READ_DENIED, IOVA + 0x5000, true);
}

fn a8_faults_of_one_device_collapse() {
    let (world, _) = World::recorded_with_domain();
    world.edu.fill(WRITTEN);
    for index in 0..20 {
        world.edu.dma_write(IOVA + index * 4096, 8);
    }
    // The first one, and nothing else.
    world.fault(WRITE_DENIED, IOVA, false);
    check_eq!(world.unit.read32(FSTS), 0, "FSTS");
    world.edu.dma_write(IOVA + 0x7000, 8);
    world.fault(WRITE_DENIED, IOVA + 0x7000, false);
}

fn a8_records_are_used_in_turn() {
    let (world, _) = World::recorded_with_domain();
    world.edu.fill(WRITTEN);
    let count = world.unit.fault_records();
    for index in 0..2 * count + 1 {
        world.edu.dma_write(IOVA + index * 4096, 8);
        check_eq!(u64::from(world.unit.read32(FSTS) >> 8 & 0xff), index % count, "FRI");
        world.fault(WRITE_DENIED, IOVA + index * 4096, false);
    }
}

/// All devices, none of them in a domain, their buffers filled; translation is on.
fn blocked_devices() -> (World, impl Iterator<Item = Edu>) {
    let world = World::recorded();
    Edu::all().for_each(|edu| edu.fill(WRITTEN));
    world.unit.command(TRANSLATION, true);
    (world, Edu::all())
}

fn a8_devices_have_records_of_their_own() {
    let (world, edus) = blocked_devices();
    let mut records = 0;
    for edu in edus {
        edu.dma_write(IOVA, 8);
        let source = world.unit.fault_at(records).map(|fault| fault.source);
        check_eq!(source, edu.recorded.then_some(edu.sid), "the source of a record");
        records += u64::from(edu.recorded);
    }
    check!(records >= 2, "there are not two devices with records");
    take_faults(&world, records);
}

/// Takes the faults of so many devices, and there are no more.
fn take_faults(world: &World, count: u64) {
    for _ in 0..count {
        check!(world.unit.take_fault().is_some(), "a fault is lost");
    }
    world.no_fault();
}

fn a8_overflow_is_told_and_ends() {
    let (world, edus) = blocked_devices();
    let count = world.unit.fault_records();
    let mut devices = 0;
    for edu in edus {
        check_eq!(world.unit.read32(FSTS) & OVERFLOW, 0, "PFO before the records are full");
        edu.dma_write(IOVA, 8);
        devices += u64::from(edu.recorded);
    }
    check!(devices > count, "{devices} devices cannot fill {count} records");
    check_eq!(world.unit.read32(FSTS) & (OVERFLOW | PENDING), OVERFLOW | PENDING, "FSTS");
    for index in 0..count {
        check!(world.unit.fault_at(index).is_some(), "record {index} is empty");
        world.unit.clear_fault(index);
    }
    // Nothing is recorded until the overflow is served.
    world.edu.dma_write(IOVA, 8);
    check_eq!(world.unit.read32(FSTS) & (OVERFLOW | PENDING), OVERFLOW, "FSTS");
    world.unit.write32(FSTS, OVERFLOW);
    check_eq!(world.unit.read32(FSTS) & OVERFLOW, 0, "FSTS");
    world.edu.dma_write(IOVA, 8);
    world.fault(2, IOVA, false);
}

fn a8_fault_processing_disable_silences() {
    let (mut world, domain) = World::recorded_with_domain();
    let page = page();
    world.edu.fill(WRITTEN);
    let high = u64::from(domain.levels - 2) | 1 << 8;
    world.set_context(world.edu.sid, domain.root | 3, high);
    world.refresh(world.edu.sid, 1);
    store(page, UNTOUCHED);
    world.edu.dma_write(IOVA, 8);
    world.no_fault();
    check_eq!(load(page), UNTOUCHED, "memory");
    // Not present, FPD set.
    world.set_context(world.edu.sid, 2, 0);
    world.refresh(world.edu.sid, 1);
    world.edu.dma_write(IOVA, 8);
    world.no_fault();
    // What is found before a context entry is not silenced.
    store(world.root, load(world.root) & !1);
    world.unit.invalidate_all();
    world.edu.dma_write(IOVA, 8);
    world.fault(1, IOVA, false);
}

fn event(world: &World) {
    let id = enable_interrupts();
    world.unit.write32(FEDATA, VECTOR.into());
    world.unit.write32(FEADDR, 0xfee0_0000 | u32::from(id) << 12);
}

fn a8_fault_event_interrupts() {
    let (world, _) = World::recorded_with_domain();
    event(&world);
    world.unit.write32(FECTL, 0);
    world.edu.fill(WRITTEN);
    for round in 1..=3 {
        world.edu.dma_write(IOVA, 8);
        wait_for("the fault event", || interrupts(VECTOR) == round);
        world.fault(WRITE_DENIED, IOVA, false);
    }
}

fn a8_fault_event_is_held_back_by_its_mask() {
    let (world, _) = World::recorded_with_domain();
    event(&world);
    world.edu.fill(WRITTEN);
    world.edu.dma_write(IOVA, 8);
    check_eq!(world.unit.read32(FECTL), 3 << 30, "FECTL: masked and pending");
    pause(2);
    check_eq!(interrupts(VECTOR), 0, "events under the mask");
    world.unit.write32(FECTL, 0);
    wait_for("the fault event", || interrupts(VECTOR) == 1);
    check_eq!(world.unit.read32(FECTL), 0, "FECTL");
    world.fault(WRITE_DENIED, IOVA, false);
}

fn a8_fault_event_is_withdrawn_when_the_fault_is_served() {
    let (world, _) = World::recorded_with_domain();
    event(&world);
    world.edu.fill(WRITTEN);
    world.edu.dma_write(IOVA, 8);
    check_eq!(world.unit.read32(FECTL) >> 30 & 1, 1, "IP");
    world.fault(WRITE_DENIED, IOVA, false);
    check_eq!(world.unit.read32(FECTL) >> 30 & 1, 0, "IP");
    world.unit.write32(FECTL, 0);
    pause(2);
    check_eq!(interrupts(VECTOR), 0, "events of a fault that was served");
}

fn a8_one_event_until_all_is_served() {
    let (world, edus) = blocked_devices();
    event(&world);
    world.unit.write32(FECTL, 0);
    let mut records = 0;
    for edu in edus {
        edu.dma_write(IOVA, 8);
        records += u64::from(edu.recorded);
    }
    wait_for("the fault event", || interrupts(VECTOR) == 1);
    pause(2);
    check_eq!(interrupts(VECTOR), 1, "events");
    take_faults(&world, records);
    world.edu.dma_write(IOVA, 8);
    wait_for("the next fault event", || interrupts(VECTOR) == 2);
}
