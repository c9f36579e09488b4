//! the invalidation queue itself: order, wrap, sizes, errors and their reasons, waits.

use images::memory::{load, page, store};
use images::vtd::offset::*;
use images::vtd::{
    CONTEXT_GLOBAL, Descriptor, ENTRIES_GLOBAL, IOTLB_GLOBAL, PENDING, QUEUE, QUEUE_ERROR, Unit, context_domain,
    entries, iotlb_pages, wait_status,
};
use images::x86::{enable_interrupts, interrupts, pause, read, wait_for};
use images::{check, check_eq};

images::tests!(
    a6_wait_writes_its_status,
    a6_wait_interrupts_once_until_it_is_acknowledged,
    a6_wait_interrupt_is_held_back_by_its_mask,
    a6_waits_are_done_in_order,
    a6_queue_wraps,
    a6_largest_queue,
    a6_head_follows_the_tail,
    a6_queue_that_is_off_does_nothing,
    a6_every_descriptor_is_taken,
    a6_unknown_type_stops_the_queue,
    a6_reserved_bits_stop_the_queue,
    a6_address_mask_beyond_mamv_stops_the_queue,
    a6_reserved_granularity_stops_the_queue,
    a6_tail_beyond_the_queue_stops_it,
    a6_queue_outside_memory_stops,
    a6_what_came_before_an_error_is_done,
    a6_queue_goes_on_when_the_error_is_cleared,
    a6_queue_error_raises_the_fault_event,
);

const VECTOR: u8 = 0x61;

fn unit() -> Unit {
    let mut unit = Unit::new();
    unit.start_queue(0);
    unit
}

/// The queue stopped at the descriptor with this index, for this reason (IQEI of IQERCD).
fn stopped(unit: &Unit, index: u64, reason: u64) {
    wait_for("a queue error", || unit.read32(FSTS) & QUEUE_ERROR != 0);
    check_eq!(unit.read64(IQH) / 16, index, "the head");
    check_eq!(unit.read64(IQERCD) & 0xf, reason, "IQEI");
}

fn a6_wait_writes_its_status() {
    let mut unit = unit();
    let status = page();
    store(status, u64::MAX);
    unit.queue(&[wait_status(status + 4, 0x1234_5678)]);
    unit.ring();
    wait_for("the status", || read::<u32>(status + 4) == 0x1234_5678);
    check_eq!(read::<u32>(status), u32::MAX, "the four bytes beside the status");
}

/// A wait that interrupts.
const WAIT_INTERRUPT: Descriptor = [5 | 1 << 4, 0];

fn event(unit: &Unit) {
    let id = enable_interrupts();
    unit.write32(IEDATA, VECTOR.into());
    unit.write32(IEADDR, 0xfee0_0000 | u32::from(id) << 12);
}

fn a6_wait_interrupts_once_until_it_is_acknowledged() {
    let mut unit = unit();
    event(&unit);
    unit.write32(IECTL, 0);
    unit.invalidate(&[WAIT_INTERRUPT]);
    wait_for("the completion event", || interrupts(VECTOR) == 1);
    check_eq!(unit.read32(ICS), 1, "ICS");
    unit.invalidate(&[WAIT_INTERRUPT]);
    pause(2);
    check_eq!(interrupts(VECTOR), 1, "events before the acknowledgement");
    unit.write32(ICS, 1);
    check_eq!(unit.read32(ICS), 0, "ICS");
    unit.invalidate(&[WAIT_INTERRUPT]);
    wait_for("the next completion event", || interrupts(VECTOR) == 2);
}

fn a6_wait_interrupt_is_held_back_by_its_mask() {
    let mut unit = unit();
    event(&unit);
    unit.invalidate(&[WAIT_INTERRUPT]);
    check_eq!(unit.read32(IECTL), 3 << 30, "IECTL: masked and pending");
    pause(2);
    check_eq!(interrupts(VECTOR), 0, "events under the mask");
    unit.write32(IECTL, 0);
    wait_for("the event", || interrupts(VECTOR) == 1);
    check_eq!(unit.read32(IECTL), 0, "IECTL");
}

fn a6_waits_are_done_in_order() {
    let mut unit = unit();
    let status = page();
    for value in 1..=50 {
        unit.queue(&[IOTLB_GLOBAL, wait_status(status, value)]);
    }
    unit.ring();
    wait_for("the last status", || load(status) == 50);
    wait_for("the head", || unit.read64(IQH) == unit.read64(IQT));
}

fn a6_queue_wraps() {
    let mut unit = unit();
    for round in 0..100 {
        unit.invalidate(&[IOTLB_GLOBAL; 10]);
        check_eq!(unit.read64(IQH) / 16, (round + 1) * 11 % 256, "the head");
    }
}

fn a6_largest_queue() {
    let mut unit = Unit::new();
    unit.start_queue(7);
    for _ in 0..3 {
        unit.invalidate(&[IOTLB_GLOBAL; 15_000]);
    }
    check_eq!(unit.read64(IQH) / 16, 3 * 15_001 % 32_768, "the head");
}

fn a6_head_follows_the_tail() {
    let mut unit = unit();
    check_eq!((unit.read64(IQH), unit.read64(IQT)), (0, 0), "head and tail");
    unit.invalidate(&[IOTLB_GLOBAL]);
    wait_for("the head", || (unit.read64(IQH), unit.read64(IQT)) == (32, 32));
}

fn a6_queue_that_is_off_does_nothing() {
    let mut unit = unit();
    let status = page();
    unit.command(QUEUE, false);
    unit.write64(IQT, 0);
    unit.queue(&[wait_status(status, 1)]);
    unit.write64(IQT, 16);
    pause(2);
    check_eq!(load(status), 0, "a status of a queue that is off");
}

fn a6_every_descriptor_is_taken() {
    let mut unit = unit();
    let (device, mask) = ([1 | 3 << 4 | 0xff << 32 | 3 << 48, 0], unit.capability(48, 6) as u8);
    let all =
        [CONTEXT_GLOBAL, context_domain(7), device, IOTLB_GLOBAL, iotlb_pages(7, 0x1000, 0), iotlb_pages(7, 0, mask)];
    unit.invalidate(&all);
    if unit.extended(3, 1) == 1 {
        unit.invalidate(&[ENTRIES_GLOBAL, entries(3, 0), entries(0, unit.extended(20, 4) as u8)]);
    }
    check_eq!(unit.read32(FSTS), 0, "FSTS");
}

/// `descriptor` is the second of three: the first is done, and it stops the queue for `reason`.
fn stops(descriptor: Descriptor, reason: u64) {
    let mut unit = unit();
    let status = page();
    unit.queue(&[wait_status(status, 1), descriptor, wait_status(status, 2)]);
    unit.ring();
    stopped(&unit, 1, reason);
    pause(1);
    check_eq!(load(status), 1, "the status");
}

/// For several: the queue is started anew after each.
fn each_stops(descriptors: &[Descriptor], reason: u64) {
    let mut unit = unit();
    for descriptor in descriptors {
        let index = unit.tail();
        unit.queue(&[*descriptor]);
        unit.ring();
        stopped(&unit, index, reason);
        // Behind it, and on.
        unit.command(QUEUE, false);
        unit.write32(FSTS, QUEUE_ERROR);
        unit.start_queue(0);
        unit.invalidate(&[IOTLB_GLOBAL]);
        check_eq!(unit.read32(FSTS), 0, "FSTS");
    }
}

fn a6_unknown_type_stops_the_queue() {
    each_stops(&[[0, 0], [0xf, 0], [2 | 1 << 9, 0], [0xa, 0]], 3);
}

fn a6_reserved_bits_stop_the_queue() {
    each_stops(
        &[
            [CONTEXT_GLOBAL[0] | 1 << 6, 0],
            [CONTEXT_GLOBAL[0] | 1 << 63, 0],
            [CONTEXT_GLOBAL[0], 1],
            [IOTLB_GLOBAL[0] | 1 << 12, 0],
            [IOTLB_GLOBAL[0] | 1 << 32, 0],
            [IOTLB_GLOBAL[0], 1 << 7],
            [5 | 1 << 5 | 1 << 20, 0x1000],
            [5 | 1 << 5, 0x1001],
        ],
        4,
    );
}

fn a6_address_mask_beyond_mamv_stops_the_queue() {
    let mask = Unit::new().capability(48, 6) as u8;
    check!(mask < 63, "MAMV is {mask}");
    stops(iotlb_pages(1, 0, mask + 1), 4);
}

fn a6_reserved_granularity_stops_the_queue() {
    each_stops(&[[1, 0], [2, 0]], 4);
}

fn a6_tail_beyond_the_queue_stops_it() {
    let unit = unit();
    unit.write64(IQT, 256 * 16);
    stopped(&unit, 0, 1);
    unit.write64(IQT, 0x7_fff0);
    unit.write32(FSTS, QUEUE_ERROR);
    stopped(&unit, 0, 1);
}

fn a6_queue_outside_memory_stops() {
    let unit = Unit::new();
    unit.write64(IQA, 0x8_0000_0000);
    unit.command(QUEUE, true);
    unit.write64(IQT, 16);
    stopped(&unit, 0, 2);
}

fn a6_what_came_before_an_error_is_done() {
    stops([0xf, 0], 3);
}

fn a6_queue_goes_on_when_the_error_is_cleared() {
    let mut unit = unit();
    let (queue, status) = (unit.read64(IQA) & !0xfff, page());
    unit.queue(&[[0xf, 0], wait_status(status, 1)]);
    unit.ring();
    stopped(&unit, 0, 3);
    // More of them changes nothing while the error stands.
    unit.queue(&[wait_status(status, 2)]);
    unit.ring();
    pause(1);
    check_eq!(load(status), 0, "the status");
    store(queue, IOTLB_GLOBAL[0]);
    unit.write32(FSTS, QUEUE_ERROR);
    wait_for("the rest of the queue", || load(status) == 2);
    check_eq!(unit.read32(FSTS), 0, "FSTS");
}

fn a6_queue_error_raises_the_fault_event() {
    let mut unit = unit();
    let id = enable_interrupts();
    unit.write32(FEDATA, VECTOR.into());
    unit.write32(FEADDR, 0xfee0_0000 | u32::from(id) << 12);
    unit.write32(FECTL, 0);
    unit.queue(&[[0xf, 0]]);
    unit.ring();
    wait_for("the fault event", || interrupts(VECTOR) == 1);
    check_eq!(unit.read32(FSTS) & (QUEUE_ERROR | PENDING), QUEUE_ERROR, "FSTS");
    check!(unit.fault_at(0).is_none(), "a queue error has a fault record");
}
