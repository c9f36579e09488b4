//! Rules 1 and 5: a guest that writes garbage everywhere gets no more than it had, and its virtual machine goes on.

use images::memory::{load, page, pages, store};
use images::tables::READ_WRITE;
use images::vtd::offset::*;
use images::vtd::{INTERRUPT_POINTER, INTERRUPT_REMAPPING, QUEUE, ROOT_POINTER, TRANSLATION, Unit};
use images::world::{IOVA, UNTOUCHED};
use images::{World, check, check_eq};

images::tests!(
    rule5_garbage_in_every_register,
    rule5_garbage_in_the_queue,
    rule1_garbage_in_every_table,
    rule1_tables_that_lead_to_themselves,
);

/// A generator of garbage (xorshift), seeded by the test so that a failure comes again.
struct Garbage(u64);

impl Garbage {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn fill(&mut self, at: u64, len: u64) {
        for word in (at..at + len).step_by(8) {
            let value = self.next();
            // Often with the lowest bits of entries that are present.
            store(word, if value >> 60 < 8 { value | 3 } else { value });
        }
    }
}

/// The unit still has its capabilities, and its registers can be read.
fn answers(unit: &Unit) {
    check_eq!(unit.read32(VER), 0x10, "VER");
    check!(unit.read64(CAP) != 0, "CAP");
}

fn rule5_garbage_in_every_register() {
    let (unit, mut garbage) = (Unit::new(), Garbage(0x1234_5678_9abc_def1));
    for _ in 0..2000 {
        let value = garbage.next();
        let offset = value >> 32 & 0x3fc;
        // Registers of which the guest has the right to stop itself: a message is not one for the processor.
        let value = garbage.next() & !0xfee0_0000_fee0_0000;
        match value >> 63 {
            0 => unit.write32(offset, value as u32),
            _ => unit.write64(offset & !7, value),
        }
    }
    answers(&unit);
    // And it can be had back.
    unit.write32(GCMD, 0);
    unit.write32(FSTS, u32::MAX);
    check_eq!(unit.read32(GSTS) & (TRANSLATION | QUEUE | INTERRUPT_REMAPPING), 0, "GSTS");
}

fn rule5_garbage_in_the_queue() {
    let (mut unit, mut garbage) = (Unit::new(), Garbage(77));
    let queue = pages(1, 4096);
    for _ in 0..50 {
        garbage.fill(queue, 4096);
        unit.write64(IQT, 0);
        unit.write64(IQA, queue);
        unit.command(QUEUE, true);
        unit.write64(IQT, garbage.next() & 0xff0);
        unit.command(QUEUE, false);
        unit.write32(FSTS, u32::MAX);
    }
    answers(&unit);
    unit.start_queue(0);
    unit.invalidate(&[images::vtd::IOTLB_GLOBAL]);
}

fn rule1_garbage_in_every_table() {
    let mut world = World::new();
    let (secret, mut garbage) = (page(), Garbage(4711));
    // Garbage addresses are far outside of memory nearly always; the test's page is behind none of them.
    store(secret, UNTOUCHED);
    let tables = pages(64, 4096);
    world.edu.fill(0);
    world.unit.command(TRANSLATION, true);
    for _ in 0..20 {
        garbage.fill(tables, 64 * 4096);
        world.unit.set_root(tables);
        world.unit.write64(IRTA, tables | 0xf);
        world.unit.command(INTERRUPT_POINTER, true);
        world.unit.invalidate_all();
        for _ in 0..5 {
            world.edu.dma_write(garbage.next() >> 20, 8);
            world.unit.take_fault();
        }
    }
    check_eq!(load(secret), UNTOUCHED, "memory that no table names");
    check!(world.unit.read32(GSTS) & ROOT_POINTER != 0, "RTPS");
    answers(&world.unit);
}

fn rule1_tables_that_lead_to_themselves() {
    let (mut world, domain) = World::with_domain();
    world.edu.fill(images::world::WRITTEN);
    // Every entry of the root leads to the root: the last step finds it as a page.
    for index in 0..512 {
        store(domain.root + 8 * index, domain.root | 3);
    }
    world.unit.invalidate_all();
    let before = load(domain.root + 8);
    world.edu.dma_write(IOVA & !0xfff | 8, 8);
    world.no_fault();
    // A request walks four steps. An assigned device would need a mapping for each of 2^36 pages: a bound is exhausted,
    // and its domain is blocked.
    let after = if world.edu.assigned { before } else { images::world::WRITTEN };
    check_eq!(load(domain.root + 8), after, "the root of the table, which is a page of itself");
    (0..512).for_each(|index| store(domain.root + 8 * index, 0));
    let page = page();
    for edu in [&world.edu].into_iter().chain(&world.beside) {
        domain.map(edu.scratch, edu.scratch, READ_WRITE);
    }
    domain.map(IOVA, page, READ_WRITE);
    world.unit.invalidate_all();
    world.reaches(IOVA, page);
    answers(&world.unit);
}
