//! work that goes on, however often its machine is saved and put back meanwhile: what is computed, what the
//! device writes through the unit, where it is blocked, and how often it interrupts is the same.

use images::memory::{load, page, pages, store};
use images::smp::beside;
use images::tables::READ_WRITE;
use images::vtd::iotlb_pages;
use images::world::{IOVA, WRITE_DENIED};
use images::x86::{enable_interrupts, interrupts, wait_for};
use images::{World, check_eq, harness, println};

images::tests!(a14_work_goes_on);

const VECTOR: u8 = 0x93;
/// Pages that the device writes, and as many that a second processor does.
const PAGES: u64 = 64;
/// Rounds where the command line has no `rounds=N`.
const ROUNDS: u64 = 20;

/// The next number of a row (xorshift).
fn next(number: u64) -> u64 {
    let number = number ^ number << 13;
    let number = number ^ number >> 7;
    number ^ number << 17
}

fn a14_work_goes_on() {
    let rounds = harness::number("rounds=").unwrap_or(ROUNDS);
    if harness::number("second=").is_none() {
        return work(rounds);
    }
    // A second processor writes meanwhile, and finds what it wrote.
    let (first, mut written) = (pages(PAGES, 4096), 1);
    let each = move || (0..PAGES).map(move |index| first + index * 4096);
    each().for_each(|page| store(page, written));
    let round = || {
        for page in each() {
            check_eq!(load(page), written, "what the second processor wrote");
            store(page, next(written));
        }
        written = next(written);
    };
    beside(round, |second| {
        work(rounds);
        second.wait_for_rounds(1);
    });
}

fn work(rounds: u64) {
    let (mut world, domain) = World::with_domain();
    // The device writes one after the other, and this processor none: what they hold, the device's log alone knows.
    let (ring, aside) = (pages(PAGES, 4096), page());
    let mut held = [0; PAGES as usize];
    let id = enable_interrupts();
    world.edu.set_message(0xfee0_0000 | u64::from(id) << 12, VECTOR.into());
    let mut number = 0x1234_5678_9abc_def1;
    println!("begins");
    for round in 1..=rounds {
        number = next(number);
        // Another page of the domain each time; that of before is gone.
        let (slot, oldest) = (round % PAGES, (round + 1) % PAGES);
        let memory = ring + slot * 4096;
        let (iova, before) = (IOVA + (round % 512) * 4096, IOVA + ((round - 1) % 512) * 4096);
        domain.clear(before, 1);
        domain.map(iova, memory, READ_WRITE);
        world.unit.invalidate(&[iotlb_pages(domain.id, before, 0), iotlb_pages(domain.id, iova, 0)]);
        world.edu.fill(number);
        world.edu.begin_write_that_interrupts(iova, 8);
        wait_for("an interrupt", || interrupts(VECTOR) >= round);
        world.edu.finish();
        world.edu.acknowledge_transfer();
        check_eq!(load(memory), number, "what the device wrote");
        held[slot as usize] = number;
        check_eq!(load(ring + oldest * 4096), held[oldest as usize], "what the device wrote long before");
        world.no_fault();
        if round % 16 == 0 {
            world.write_blocked(before, aside, WRITE_DENIED);
        }
        check_eq!(interrupts(VECTOR), round, "interrupts");
    }
    println!("{rounds} rounds: {number:016x}");
}
