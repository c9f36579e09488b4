//! D-1 to D-5: a device whose reads are in flight in the host's kernel while the guest takes their memory away.

use images::harness;
use images::memory::{PAGE, load, page, pages, store};
use images::pinblk::PinBlk;
use images::tables::{Domain, LARGE, READ, READ_WRITE, span};
use images::vtd::{Fault, TRANSLATION, context_device, iotlb_domain, iotlb_pages};
use images::world::{UNTOUCHED, WRITE_DENIED};
use images::x86::{outb, pause, wait_for};
use images::{World, check, check_eq};

use super::concurrent::{is_sealed, seal};

images::tests!(
    d1_reads_arrive_in_pages_that_are_pinned_meanwhile => "--device pinblk",
    d1_what_is_not_granted_for_writing_ends_a_read_with_a_fault => "--device pinblk",
    d3_nothing_arrives_after_an_unmap_under_a_read => "--device pinblk",
    d3_nothing_arrives_after_the_device_moved_under_a_read => "--device pinblk",
    d3_an_unmap_beside_a_read_does_not_end_it => "--device pinblk",
    rule12_nothing_arrives_after_a_reset_under_a_read => "reboots --device pinblk",
);

/// Aligned to 1 GiB.
const AREA: u64 = 0x2_0000_0000;
const GIB: u64 = 1 << 30;
/// Fault reason: the context entry is not present.
const NO_CONTEXT: u8 = 2;

fn start() -> (World, Domain, PinBlk) {
    let (mut world, domain) = World::recorded_with_domain();
    let device = PinBlk::first();
    world.attach(device.sid, &domain);
    (world, domain, device)
}

/// 1 GiB of IOVAs, all of which lead to the same 2 MiB.
fn a_gibibyte(domain: &Domain) -> u64 {
    let memory = pages(512, span(2));
    leads_to(domain, memory);
    memory
}

fn leads_to(domain: &Domain, memory: u64) {
    let table = domain.entry(AREA, 2);
    for index in 0..512 {
        store(table + 8 * index, memory | LARGE | READ_WRITE);
    }
}

fn seal_all(memory: u64) {
    (memory..memory + span(2)).step_by(PAGE as usize).for_each(seal);
}

fn check_all_sealed(memory: u64) {
    let touched = (memory..memory + span(2)).step_by(PAGE as usize).find(|page| !is_sealed(*page));
    if let Some(page) = touched {
        panic!("bytes arrived at {page:#x} after the unmap was done");
    }
}

/// Takes the faults that are there, all of them writes of the device that were blocked for `reason`. How many.
fn faults(world: &World, device: &PinBlk, reason: u8) -> u64 {
    let mut count = 0;
    while let Some(fault) = world.unit.take_fault() {
        let Fault { source, reason: found, info, read } = fault;
        check!(
            (source, found, read) == (device.sid, reason, false) && (AREA..AREA + GIB).contains(&info),
            "the fault is {fault:x?}"
        );
        count += 1;
    }
    count
}

fn d1_reads_arrive_in_pages_that_are_pinned_meanwhile() {
    let (mut world, domain, device) = start();
    // Backwards, so that no two neighbours are neighbours.
    let memory = pages(300, PAGE);
    let at = |index: u64| memory + (299 - index) * PAGE;
    (0..300).for_each(|index| domain.map(AREA + index * PAGE, at(index), READ_WRITE));
    world.unit.invalidate(&[iotlb_domain(domain.id)]);
    device.start(AREA, 5 * PAGE, 300 * PAGE);
    check!(device.arrives(), "the read failed");
    for index in 0..300 {
        for word in (0..PAGE).step_by(8) {
            check_eq!(load(at(index) + word), PinBlk::content((5 + index) * PAGE + word), "a word of the file");
        }
    }
    check_eq!(device.arrived(), 300 * PAGE, "bytes that arrived");
    check_eq!(device.pinned(), 0, "pages that are pinned afterwards");
    world.no_fault();
}

fn d1_what_is_not_granted_for_writing_ends_a_read_with_a_fault() {
    let (mut world, domain, device) = start();
    let (granted, read_only) = (page(), page());
    domain.map(AREA, granted, READ_WRITE);
    domain.map(AREA + PAGE, read_only, READ);
    world.unit.invalidate(&[iotlb_domain(domain.id)]);
    for last in [AREA + PAGE, AREA + 2 * PAGE] {
        store(read_only, UNTOUCHED);
        device.start(last, 0, PAGE);
        check!(!device.arrives(), "a read arrived where nothing may be written");
        check_eq!((load(read_only), faults(&world, &device, WRITE_DENIED)), (UNTOUCHED, 1), "the page, and the faults");
    }
    device.start(AREA, 0, PAGE);
    check!(device.arrives(), "the read failed");
    world.no_fault();
}

/// Rounds of a test in which a read of 1 GiB is under way: `rounds=N` on the command line, else few.
fn rounds() -> u64 {
    harness::number("rounds=").unwrap_or(12)
}

/// Waits until a read is under way, and a little more in each round than in the one before.
fn under_way(device: &PinBlk, round: u64) {
    let enough = 1 + (round % 16) * (3 << 20);
    wait_for("the first bytes of a read", || device.arrived() >= enough || !device.is_busy());
    check!(device.is_busy(), "a read of 1 GiB is over already: {:#x} bytes arrived", device.arrived());
}

/// What the guest took away is its own: nothing is pinned, nothing arrives, and the read is over.
fn is_the_guests(device: &PinBlk, memory: u64) {
    check_eq!(device.pinned(), 0, "pages that are pinned after the unmap");
    seal_all(memory);
    check!(!device.arrives(), "a read of 1 GiB arrived in full although its memory was taken away");
    check!(device.arrived() < GIB, "it had arrived already");
    check_all_sealed(memory);
}

fn d3_nothing_arrives_after_an_unmap_under_a_read() {
    let (mut world, domain, device) = start();
    let memory = a_gibibyte(&domain);
    let directory = domain.entry(AREA, 3);
    let table = load(directory);
    for round in 0..rounds() {
        store(directory, table);
        world.unit.invalidate(&[iotlb_domain(domain.id)]);
        device.start(AREA, 0, GIB);
        under_way(&device, round);
        store(directory, 0);
        world.unit.invalidate(&[iotlb_domain(domain.id)]);
        is_the_guests(&device, memory);
        check!(faults(&world, &device, WRITE_DENIED) > 0, "no fault was recorded");
    }
}

fn d3_nothing_arrives_after_the_device_moved_under_a_read() {
    let (mut world, domain, device) = start();
    let memory = a_gibibyte(&domain);
    let empty = world.domain(2, domain.levels);
    for round in 0..rounds() / 2 {
        world.attach(device.sid, &domain);
        device.start(AREA, 0, GIB);
        under_way(&device, round);
        let reason = match round % 3 {
            0 => {
                world.attach(device.sid, &empty);
                // It was without an entry for a moment.
                WRITE_DENIED
            }
            1 => {
                world.set_context(device.sid, 0, 0);
                world.unit.invalidate(&[context_device(domain.id, device.sid), iotlb_domain(domain.id)]);
                NO_CONTEXT
            }
            _ => {
                // What is there at these addresses is no RAM.
                world.unit.command(TRANSLATION, false);
                is_the_guests(&device, memory);
                world.unit.command(TRANSLATION, true);
                continue;
            }
        };
        is_the_guests(&device, memory);
        let mut recorded = 0;
        while let Some(fault) = world.unit.take_fault() {
            check!(
                fault.source == device.sid && [reason, NO_CONTEXT].contains(&fault.reason),
                "the fault is {fault:x?}"
            );
            recorded += 1;
        }
        check!(recorded > 0, "no fault was recorded");
    }
}

fn d3_an_unmap_beside_a_read_does_not_end_it() {
    let (mut world, domain, device) = start();
    let (memory, beside) = (a_gibibyte(&domain), page());
    world.unit.invalidate(&[iotlb_domain(domain.id)]);
    device.start(AREA, 0, GIB);
    let mut changes = 0;
    while device.is_busy() {
        domain.map(AREA - PAGE, beside, READ_WRITE);
        world.unit.invalidate(&[iotlb_pages(domain.id, AREA - PAGE, 0)]);
        domain.clear(AREA - PAGE, 1);
        world.unit.invalidate(&[iotlb_pages(domain.id, AREA - PAGE, 0)]);
        changes += 1;
    }
    check!(device.arrives() && changes > 0, "the read failed after {changes} changes");
    check_eq!((device.arrived(), device.pinned()), (GIB, 0), "what arrived, and what is pinned");
    // Whichever of the file's parts came last.
    check_eq!(load(memory + 8) % span(2), PinBlk::content(8) % span(2), "a word of the file");
    world.no_fault();
}

/// The image is loaded anew, and what is behind the memory that it gives out stays.
fn rule12_nothing_arrives_after_a_reset_under_a_read() {
    const MEMORY: u64 = 60 << 20;
    const KEPT: u64 = MEMORY + span(2);
    const MARK: u64 = 0x6b65_7074_2061_6c69;
    if load(KEPT) != MARK {
        let (mut world, domain, device) = start();
        leads_to(&domain, MEMORY);
        world.unit.invalidate(&[iotlb_domain(domain.id)]);
        device.start(AREA, 0, GIB);
        under_way(&device, 1);
        store(KEPT, MARK);
        outb(0xcf9, 6);
        wait_for("the reset", || false);
    }
    check!(load(MEMORY) != 0, "nothing had arrived before the reset");
    seal_all(MEMORY);
    let device = PinBlk::first();
    check_eq!((device.is_busy(), device.pinned()), (false, 0), "what the device does");
    pause(50);
    check_all_sealed(MEMORY);
}
