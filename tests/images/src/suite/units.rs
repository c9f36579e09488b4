//! two units, each with functions of its own, of one segment or each of another; and one that only remaps
//! interrupts.

use images::acpi;
use images::edu::Edu;
use images::memory::{load, page, pages, store};
use images::pci::SourceId;
use images::tables::{Domain, READ_WRITE};
use images::vtd::offset::{GCMD, GSTS, IRTA, RTADDR};
use images::vtd::{
    ENTRIES_GLOBAL, Fault, INTERRUPT_POINTER, INTERRUPT_REMAPPING, ROOT_POINTER, TRANSLATION, Unit, iotlb_domain,
    iotlb_pages,
};
use images::world::{IOVA, UNTOUCHED, WRITE_DENIED, WRITTEN};
use images::x86::{enable_interrupts, interrupts, wait_for};
use images::{World, check, check_eq, harness};

images::tests!(
    a13_each_unit_translates_for_its_own_functions => "--iommu vtd --iommu vtd,devices=02.0 --device edu",
    a13_faults_are_recorded_by_the_unit_of_the_function => "--iommu vtd --iommu vtd,devices=02.0 --device edu",
    a13_invalidations_reach_one_unit => "--iommu vtd --iommu vtd,devices=02.0 --device edu",
    a13_interrupts_are_remapped_by_the_unit_of_the_function => "--iommu vtd --iommu vtd,devices=02.0 --device edu",
    a13_what_is_behind_a_root_port_is_behind_its_unit
        => "--root-ports 1 --iommu vtd --iommu vtd,devices=port1 --device edu,port=1",
    a13_a_unit_may_remap_interrupts_only => "--iommu vtd,dma-translation=off",
    a13_each_segment_has_its_functions_and_a_unit_that_translates_for_them
        => "--iommu vtd --iommu vtd,segment=1 --device edu,addr=01.0 --device edu,addr=0001:00:01.0",
    a13_interrupts_are_remapped_by_the_unit_of_the_segment
        => "--iommu vtd --iommu vtd,segment=1 --device edu,addr=01.0 --device edu,addr=0001:00:01.0",
    a13_invalidations_of_one_segment_leave_the_other_alone
        => "--iommu vtd --iommu vtd,segment=1 --device edu,addr=01.0 --device edu,addr=0001:00:01.0",
    a13_units_offer_the_same => "--iommu vtd,perf=on,aw-bits=39 --iommu vtd,perf=on,aw-bits=39,devices=02.0 --device edu",
);

const VECTOR: u8 = 0x95;
/// The same domain in both units, which have nothing to do with each other.
const DOMAIN: u16 = 1;

fn edu(device: u16) -> Edu {
    let edu = Edu::all().find(|edu| edu.sid == SourceId(device << 3));
    edu.unwrap_or_else(|| panic!("there is no edu at {device:02x}.0"))
}

/// The device of each of the two units.
fn worlds() -> [World; 2] {
    let of = |number: u64, edu: Edu| {
        if !edu.recorded {
            harness::skipped("the host of a function hears of its faults");
        }
        World::behind(Unit::number(number), edu, None)
    };
    [of(0, edu(1)), of(1, edu(2))]
}

/// Functions of one address in two segments, each behind the unit of its segment.
fn segments() -> [World; 2] {
    let sid = edu(1).sid;
    let ecam = acpi::ecam(1).unwrap_or_else(|| panic!("the MCFG table has no segment 1"));
    let there = Edu::in_segment(ecam, sid).unwrap_or_else(|| panic!("there is no edu in segment 1"));
    check!(Edu::in_segment(ecam, SourceId(sid.0 + 8)).is_none(), "a function of segment 0 is in segment 1, too");
    let worlds = [edu(1), there].into_iter().enumerate().map(|(segment, edu)| {
        if !edu.recorded {
            harness::skipped("the host of a function hears of its faults");
        }
        let unit = Unit::number(segment as u64);
        check_eq!(acpi::segment_of_unit(unit.base()), Some(segment as u16), "the segment of the unit");
        World::behind(unit, edu, None)
    });
    let mut worlds = worlds;
    [(); 2].map(|()| worlds.next().unwrap_or_else(|| panic!("a segment is missing")))
}

fn a13_each_segment_has_its_functions_and_a_unit_that_translates_for_them() {
    let memory = pages(2, 4096);
    let mut worlds = segments();
    for (number, world) in worlds.iter_mut().enumerate() {
        // The same domain, function and address, in each.
        let domain = world.domain(DOMAIN, world.levels());
        domain.map(IOVA, memory + 4096 * number as u64, READ_WRITE);
        world.attach(world.edu.sid, &domain);
        world.unit.command(TRANSLATION, true);
    }
    let [one, other] = worlds;
    one.reaches(IOVA, memory);
    other.reaches(IOVA, memory + 4096);
    let nowhere = IOVA + 0x1000;
    for (world, beside) in [(&one, &other), (&other, &one)] {
        world.edu.dma_write(nowhere, 8);
        beside.no_fault();
        let expected = Fault { source: world.edu.sid, reason: WRITE_DENIED, info: nowhere, read: false };
        check!(world.unit.take_fault() == Some(expected), "the fault is not in the record of the segment's unit");
        world.no_fault();
    }
    one.unit.command(TRANSLATION, false);
    one.reaches(memory, memory);
    other.write_blocked(memory, memory, WRITE_DENIED);
}

fn a13_interrupts_are_remapped_by_the_unit_of_the_segment() {
    let [one, other] = segments();
    let (id, tables) = (enable_interrupts(), [page(), page()]);
    // The same entry of each, for the same source.
    for (number, world) in [&one, &other].into_iter().enumerate() {
        let vector = u64::from(VECTOR) + number as u64;
        store(tables[number] + 8, 1 << 18 | u64::from(world.edu.sid.0));
        store(tables[number], u64::from(id) << 40 | vector << 16 | 1);
        world.unit.write64(IRTA, tables[number]);
        world.unit.command(INTERRUPT_POINTER, true);
        world.unit.command(INTERRUPT_REMAPPING, true);
        world.edu.set_message(0xfee0_0000 | 1 << 4 | 1 << 3, 0);
    }
    other.edu.interrupt();
    wait_for("the interrupt of segment 1", || interrupts(VECTOR + 1) == 1);
    one.edu.interrupt();
    wait_for("the interrupt of segment 0", || interrupts(VECTOR) == 1);
    // One segment's entry is gone; the other's stays.
    store(tables[1], 0);
    let (mut one, mut other) = (one, other);
    one.unit.invalidate(&[ENTRIES_GLOBAL]);
    other.unit.invalidate(&[ENTRIES_GLOBAL]);
    other.edu.interrupt();
    wait_for("the fault of segment 1", || other.unit.fault_at(0).is_some());
    let fault = other.unit.take_fault().map(|fault| (fault.source, fault.reason));
    check!(fault == Some((other.edu.sid, 0x22)), "the fault is {fault:x?}");
    one.no_fault();
    one.edu.interrupt();
    wait_for("the next interrupt of segment 0", || interrupts(VECTOR) == 2);
    check_eq!(interrupts(VECTOR + 1), 1, "interrupts of segment 1");
}

/// `IOVA` of each, in a domain of one number, leads to the page of its number, which its function has reached.
fn reaching(worlds: &mut [World; 2], memory: u64) -> [Domain; 2] {
    let domains = worlds.each_ref().map(|world| world.domain(DOMAIN, world.levels()));
    for (number, world) in worlds.iter_mut().enumerate() {
        domains[number].map(IOVA, memory + 4096 * number as u64, READ_WRITE);
        world.attach(world.edu.sid, &domains[number]);
        world.unit.command(TRANSLATION, true);
        world.reaches(IOVA, memory + 4096 * number as u64);
    }
    domains
}

fn a13_invalidations_of_one_segment_leave_the_other_alone() {
    let memory = pages(2, 4096);
    let mut worlds = segments();
    let domains = reaching(&mut worlds, memory);
    let [mut one, mut other] = worlds;
    domains.iter().for_each(|domain| domain.clear(IOVA, 1));
    one.unit.invalidate(&[iotlb_domain(DOMAIN)]);
    one.not_mapped(IOVA, memory);
    // What segment 1 has cached of the same domain is as it was.
    other.reaches(IOVA, memory + 4096);
    other.unit.invalidate(&[iotlb_domain(DOMAIN)]);
    other.not_mapped(IOVA, memory + 4096);
}

/// The same, with translation on: `IOVA` of each leads to the page of its number.
fn translating(memory: u64) -> [World; 2] {
    let mut worlds = worlds();
    let other = [worlds[1].edu.sid, worlds[0].edu.sid];
    for (number, world) in worlds.iter_mut().enumerate() {
        let domain = world.domain(DOMAIN, world.levels());
        domain.map(IOVA, memory + 4096 * number as u64, READ_WRITE);
        world.attach(world.edu.sid, &domain);
        // Its tables say the same of the function of the other unit, which means nothing.
        world.attach(other[number], &domain);
        world.unit.command(TRANSLATION, true);
    }
    worlds
}

fn a13_each_unit_translates_for_its_own_functions() {
    let memory = pages(2, 4096);
    let [one, other] = translating(memory);
    one.reaches(IOVA, memory);
    other.reaches(IOVA, memory + 4096);
    one.reaches(IOVA, memory);
    // One is off: its function reaches memory, and the other's does not.
    one.unit.command(TRANSLATION, false);
    one.reaches(memory, memory);
    other.write_blocked(memory, memory, WRITE_DENIED);
}

fn a13_faults_are_recorded_by_the_unit_of_the_function() {
    let [one, other] = translating(pages(2, 4096));
    let nowhere = IOVA + 0x1000;
    for (world, beside) in [(&one, &other), (&other, &one)] {
        world.edu.dma_write(nowhere, 8);
        beside.no_fault();
        let expected = Fault { source: world.edu.sid, reason: WRITE_DENIED, info: nowhere, read: false };
        check!(world.unit.take_fault() == Some(expected), "the fault is not in the record of its unit");
        world.no_fault();
    }
}

fn a13_invalidations_reach_one_unit() {
    let memory = pages(2, 4096);
    let mut worlds = worlds();
    let domains = reaching(&mut worlds, memory);
    let [mut one, mut other] = worlds;
    domains.iter().for_each(|domain| domain.clear(IOVA, 1));
    other.unit.invalidate(&[iotlb_pages(DOMAIN, IOVA, 0)]);
    other.not_mapped(IOVA, memory + 4096);
    // What the first one has cached, or its bridge mapped, is as it was until it is told.
    one.reaches(IOVA, memory);
    one.unit.invalidate(&[iotlb_domain(DOMAIN)]);
    one.not_mapped(IOVA, memory);
}

fn a13_interrupts_are_remapped_by_the_unit_of_the_function() {
    let [one, other] = worlds();
    let (id, table) = (enable_interrupts(), page());
    let entry = |at: u64, vector: u8| {
        store(at + 8, 0);
        store(at, u64::from(id) << 40 | u64::from(vector) << 16 | 1);
    };
    // Of the first unit an entry, of the other none that is present.
    entry(table, VECTOR);
    for (world, table) in [(&one, table), (&other, page())] {
        world.unit.write64(IRTA, table);
        world.unit.command(INTERRUPT_POINTER, true);
        world.unit.command(INTERRUPT_REMAPPING, true);
        world.edu.set_message(0xfee0_0000 | 1 << 4 | 1 << 3, 0);
    }
    one.edu.interrupt();
    wait_for("the interrupt of the first unit's function", || interrupts(VECTOR) == 1);
    other.edu.interrupt();
    other.edu.settle();
    wait_for("the fault of the other one's", || other.unit.fault_at(0).is_some());
    check_eq!(interrupts(VECTOR), 1, "interrupts");
    let fault = other.unit.take_fault().map(|fault| (fault.source, fault.reason));
    check!(fault == Some((other.edu.sid, 0x22)), "the fault is {fault:x?}");
    one.no_fault();
}

fn a13_what_is_behind_a_root_port_is_behind_its_unit() {
    let port = SourceId::root_ports().next().unwrap_or_else(|| harness::skipped("there is no root port"));
    let bus = port.buses().0;
    let below = Edu::on_bus(bus).next().unwrap_or_else(|| panic!("there is no edu behind the port"));
    if !below.recorded {
        harness::skipped("the host of a function hears of its faults");
    }
    let (mut beside, mut world) = (World::recorded(), World::behind(Unit::number(1), below, None));
    let (memory, ids) = (pages(2, 4096), [beside.edu.sid, world.edu.sid]);
    for (number, world) in [&mut beside, &mut world].into_iter().enumerate() {
        // Both buses of each have the same context table.
        store(world.root + 16 * u64::from(bus), world.contexts | 1);
        let domain = world.domain(DOMAIN, world.levels());
        domain.map(IOVA, memory + 4096 * number as u64, READ_WRITE);
        // Each says the same of the other's function, which means nothing.
        ids.iter().for_each(|id| world.attach(*id, &domain));
        world.unit.command(TRANSLATION, true);
    }
    beside.reaches(IOVA, memory);
    world.reaches(IOVA, memory + 4096);
    let nowhere = IOVA + 0x1000;
    world.edu.dma_write(nowhere, 8);
    beside.no_fault();
    let expected = Fault { source: world.edu.sid, reason: WRITE_DENIED, info: nowhere, read: false };
    check!(world.unit.take_fault() == Some(expected), "the fault is not in the record of the port's unit");
    // When the guest numbers the bus anew, it is the port's unit that hears of it.
    port.set_buses(bus + 1, bus + 1);
    store(world.root + 16 * u64::from(bus + 1), world.contexts | 1);
    world.unit.invalidate_all();
    world.reaches(IOVA, memory + 4096);
    world.edu.dma_write(nowhere, 8);
    let fault = world.unit.take_fault().map(|fault| (fault.source, fault.info));
    let moved = SourceId(u16::from(bus + 1) << 8);
    check!(fault == Some((moved, nowhere)), "the fault is {fault:x?}");
}

fn a13_a_unit_may_remap_interrupts_only() {
    let (mut unit, edu, id, memory) = (Unit::new(), Edu::first(), enable_interrupts(), page());
    check_eq!((unit.capability(8, 5), unit.extended(3, 1)), (0, 1), "SAGAW and IR");
    // Of a root table whose entries are empty nothing is reached, if it is one.
    unit.write64(RTADDR, page());
    unit.write32(GCMD, ROOT_POINTER);
    unit.write32(GCMD, TRANSLATION);
    check_eq!(unit.read32(GSTS) & TRANSLATION, 0, "GSTS.TES");
    store(memory, UNTOUCHED);
    edu.fill(WRITTEN);
    edu.dma_write(memory, 8);
    check_eq!(load(memory), WRITTEN, "what the device wrote, untranslated");
    let table = page();
    store(table + 8, 1 << 18 | u64::from(edu.sid.0));
    store(table, u64::from(id) << 40 | u64::from(VECTOR) << 16 | 1);
    unit.start_queue(0);
    unit.write64(IRTA, table);
    unit.command(INTERRUPT_POINTER, true);
    unit.command(INTERRUPT_REMAPPING, true);
    unit.invalidate(&[ENTRIES_GLOBAL]);
    edu.set_message(0xfee0_0000 | 1 << 4 | 1 << 3, 0);
    edu.interrupt();
    wait_for("the remapped interrupt", || interrupts(VECTOR) == 1);
    store(table, 0);
    unit.invalidate(&[ENTRIES_GLOBAL]);
    edu.interrupt();
    wait_for("the fault of one that is blocked", || unit.fault_at(0).is_some());
    let fault = unit.take_fault().map(|fault| (fault.source, fault.reason));
    check!(fault == Some((edu.sid, 0x22)), "the fault is {fault:x?}");
    check_eq!(interrupts(VECTOR), 1, "interrupts");
}

fn a13_units_offer_the_same() {
    let [one, other] = [0, 1].map(Unit::number);
    check_eq!(
        (one.capability(0, 63), one.extended(0, 63)),
        (other.capability(0, 63), other.extended(0, 63)),
        "CAP, ECAP"
    );
    check_eq!((one.capability(16, 6), one.extended(51, 1)), (38, 1), "MGAW and PMS");
}
