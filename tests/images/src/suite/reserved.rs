//! each fault reason of legacy mode, with its record; reserved bits, widths and alignment.

use images::memory::{load, page, pages, store};
use images::tables::{LARGE, READ_WRITE, span};
use images::vtd::{CONTEXT_GLOBAL, IOTLB_GLOBAL, TRANSLATION};
use images::world::{IOVA, READ_DENIED, WRITE_DENIED, WRITTEN};
use images::{World, harness};

images::tests!(
    a3_root_entry_not_present,
    a3_context_entry_not_present,
    a3_context_entry_of_a_reserved_type,
    a3_context_entry_of_the_device_tlb_type,
    a3_context_entry_of_a_width_that_is_not_offered,
    a3_address_beyond_the_width_of_the_entry,
    a3_address_beyond_the_width_of_the_unit => "--iommu vtd,aw-bits=39",
    a3_write_and_read_without_a_mapping,
    a3_paging_table_outside_memory,
    a3_root_table_outside_memory,
    a3_context_table_outside_memory,
    a3_root_entry_reserved_bits,
    a3_context_entry_reserved_bits,
    a3_paging_entry_reserved_bits,
    a3_large_leaf_out_of_alignment,
    a3_large_leaf_at_level_4,
    a3_leads_into_the_interrupt_window,
);

/// No guest of the suite has memory here, and every address width has it.
const NOWHERE: u64 = 0x8_0000_0000;

/// Translation on, with an empty context entry and a filled device.
fn world() -> World {
    let world = World::new();
    world.edu.fill(WRITTEN);
    world.unit.command(TRANSLATION, true);
    world
}

fn refreshed(world: &mut World) {
    world.unit.invalidate(&[CONTEXT_GLOBAL, IOTLB_GLOBAL]);
}

/// Reads and writes are blocked, each for `reason`. The device was filled while translation was off.
fn both_blocked(world: &World, reason: u8) {
    let page = page();
    world.write_blocked(IOVA, page, reason);
    world.edu.dma_read(IOVA, 8);
    world.fault(reason, IOVA, true);
}

fn a3_root_entry_not_present() {
    let mut world = world();
    store(world.root, load(world.root) & !1);
    refreshed(&mut world);
    both_blocked(&world, 1);
}

fn a3_context_entry_not_present() {
    let world = world();
    both_blocked(&world, 2);
}

fn aw(world: &World) -> u64 {
    u64::from(world.levels() - 2)
}

fn a3_context_entry_of_a_reserved_type() {
    let mut world = world();
    world.set_context(world.edu.sid, page() | 3 << 2 | 1, aw(&world) | 1 << 8);
    refreshed(&mut world);
    both_blocked(&world, 3);
}

fn a3_context_entry_of_the_device_tlb_type() {
    let mut world = world();
    if world.unit.extended(2, 1) == 1 {
        harness::skipped("the unit offers device-TLBs");
    }
    world.set_context(world.edu.sid, page() | 1 << 2 | 1, aw(&world) | 1 << 8);
    refreshed(&mut world);
    both_blocked(&world, 3);
}

fn a3_context_entry_of_a_width_that_is_not_offered() {
    let mut world = world();
    let offered = world.unit.capability(8, 5);
    for width in (0..8).filter(|width| *width > 4 || offered >> width & 1 == 0) {
        world.set_context(world.edu.sid, page() | 1, width | 1 << 8);
        refreshed(&mut world);
        both_blocked(&world, 3);
    }
}

fn a3_address_beyond_the_width_of_the_entry() {
    let (mut world, domain) = World::with_levels(3);
    let page = page();
    // What the address would lead to if its upper bits were dropped.
    let inside = 0x20_3000;
    domain.map(inside, page, READ_WRITE);
    refreshed(&mut world);
    world.reaches(inside, page);
    world.edu.fill(WRITTEN);
    for bit in [39, 47, 48, 63] {
        world.write_blocked(inside | 1 << bit, page, 4);
        world.edu.dma_read(inside | 1 << bit, 8);
        world.fault(4, inside | 1 << bit, true);
    }
}

fn a3_address_beyond_the_width_of_the_unit() {
    let (world, _) = World::with_domain();
    let page = page();
    world.edu.fill(WRITTEN);
    world.write_blocked(1 << 39, page, 4);
    world.write_blocked((1 << 39) - 0x1000, page, WRITE_DENIED);
}

fn a3_write_and_read_without_a_mapping() {
    let (world, _) = World::with_domain();
    let page = page();
    world.edu.fill(WRITTEN);
    world.write_blocked(IOVA, page, WRITE_DENIED);
    world.read_blocked(IOVA, page, READ_DENIED);
}

fn a3_paging_table_outside_memory() {
    let (mut world, domain) = World::with_domain();
    let page = page();
    world.edu.fill(WRITTEN);
    for level in 2..=domain.levels {
        store(domain.entry(IOVA, level), NOWHERE | READ_WRITE);
        refreshed(&mut world);
        world.write_blocked(IOVA, page, 7);
        store(domain.entry(IOVA, level), 0);
    }
}

fn a3_root_table_outside_memory() {
    let mut world = world();
    world.unit.set_root(NOWHERE);
    refreshed(&mut world);
    both_blocked(&world, 8);
}

fn a3_context_table_outside_memory() {
    let mut world = world();
    store(world.root, NOWHERE | 1);
    refreshed(&mut world);
    both_blocked(&world, 9);
}

fn a3_root_entry_reserved_bits() {
    let mut world = world();
    let good = load(world.root);
    for (offset, bit) in (1..12).map(|bit| (0, bit)).chain([(8, 0), (8, 12), (8, 63)]) {
        store(world.root, if offset == 0 { good | 1 << bit } else { good });
        store(world.root + 8, if offset == 8 { 1 << bit } else { 0 });
        refreshed(&mut world);
        both_blocked(&world, 0xa);
    }
    store(world.root + 8, 0);
}

fn a3_context_entry_reserved_bits() {
    let (mut world, domain) = World::with_domain();
    let page = page();
    world.edu.fill(WRITTEN);
    let (low, high) = (domain.root | 1, u64::from(domain.levels - 2) | 1 << 8);
    let bits = (4..12).map(|bit| (1 << bit, 0)).chain([7, 24, 40, 63].map(|bit| (0, 1 << bit)));
    for (more_low, more_high) in bits {
        world.set_context(world.edu.sid, low | more_low, high | more_high);
        refreshed(&mut world);
        world.write_blocked(IOVA, page, 0xb);
    }
    // Those between AW and DID are ignored.
    domain.map(IOVA, page, READ_WRITE);
    world.set_context(world.edu.sid, low, high | 0xf << 3);
    refreshed(&mut world);
    world.reaches(IOVA, page);
}

fn a3_paging_entry_reserved_bits() {
    let (mut world, domain) = World::with_domain();
    let page = page();
    domain.map(IOVA, page, READ_WRITE);
    refreshed(&mut world);
    world.reaches(IOVA, page);
    world.edu.fill(WRITTEN);
    // SNP of a leaf (not offered), the highest address bit, TM.
    for (level, bit) in [(1, 11), (1, 51), (1, 62), (2, 11), (2, 51), (3, 62)] {
        let (at, good) = (domain.entry(IOVA, level), load(domain.entry(IOVA, level)));
        store(at, good | 1 << bit);
        refreshed(&mut world);
        world.write_blocked(IOVA, page, 0xc);
        store(at, good);
    }
    // Ignored ones stay ignored.
    let at = domain.entry(IOVA, 1);
    store(at, load(at) | 1 << 10 | 0x3ff << 52 | 1 << 63 | 0x1f << 2);
    refreshed(&mut world);
    world.reaches(IOVA, page);
}

fn a3_large_leaf_out_of_alignment() {
    let (mut world, domain) = World::with_domain();
    let memory = pages(512, span(2));
    world.edu.fill(WRITTEN);
    for (level, offset) in [(2, 0x1000), (2, 0x10_0000), (3, span(2))] {
        domain.map_at(span(3) * 7, memory + offset, level, READ_WRITE);
        refreshed(&mut world);
        world.write_blocked(span(3) * 7, memory + offset, 0xc);
        domain.clear(span(3) * 7, level);
    }
}

fn a3_large_leaf_at_level_4() {
    let (mut world, domain) = World::with_levels(4);
    let page = page();
    world.edu.fill(WRITTEN);
    store(domain.entry(span(4) * 3, 4), READ_WRITE | LARGE);
    refreshed(&mut world);
    world.write_blocked(span(4) * 3 + page, page, 0xc);
}

fn a3_leads_into_the_interrupt_window() {
    let (mut world, domain) = World::with_domain();
    world.edu.fill(WRITTEN);
    for target in [0xfee0_0000, 0xfeef_f000] {
        domain.map(IOVA, target, READ_WRITE);
        refreshed(&mut world);
        world.edu.dma_write(IOVA, 8);
        world.fault(0xe, IOVA, false);
        world.edu.dma_read(IOVA, 8);
        world.fault(0xe, IOVA, true);
    }
}
