//! Everything that `causeway ctl PATH top` and `causeway report` show, in some seconds: 10, or `seconds=N` on the
//! command line. An example of a whole image, and what `cargo xtask screenshots` takes its pictures of.
//!
//! Buffers are mapped and unmapped as a driver would, more and fewer of them by turns. Beside them is a superpage, of
//! which one page is away at times; once a page is mapped where there is no memory, and the device reads what is mapped
//! nowhere at times.
#![no_std]
#![no_main]

use images::harness;
use images::memory::{PAGE, pages, store};
use images::tables::{Domain, LARGE, READ_WRITE, span};
use images::vtd::iotlb_pages;
use images::x86::Stopwatch;
use images::{World, check};

images::tests!(tour);
images::image!(TESTS);

/// Where the superpage is.
const TABLE: u64 = 0x2_0000_0000;
/// Below this the buffers are, as Linux places them.
const BUFFERS: u64 = 0x1_0000_0000;
/// The most buffers at a time, and the pages of each.
const MOST: u64 = 96;
const PAGES: u64 = 4;
/// What the device finds nothing at.
const NOWHERE: u64 = 0x3_0000_0000;
/// Beyond all memory.
const NO_MEMORY: u64 = 0x40_0000_0000;
/// The shortest step, in milliseconds.
const STEP: u32 = 10;

/// Grants buffer `index`, or takes it back.
fn buffer(world: &mut World, domain: &Domain, memory: u64, index: u64, present: bool) {
    let iova = BUFFERS - (index + 1) * (PAGES + 4) * PAGE;
    for page in 0..PAGES {
        match present {
            true => domain.map(iova + page * PAGE, memory + (index * PAGES + page) * PAGE, READ_WRITE),
            false => domain.clear(iova + page * PAGE, 1),
        }
    }
    world.unit.invalidate(&[iotlb_pages(domain.id, iova & !(PAGES * PAGE - 1), 2)]);
    if present {
        world.reaches(iova, memory + index * PAGES * PAGE);
    }
}

fn tour() {
    let (mut world, domain) = World::with_domain();
    let (large, table, memory) = (pages(512, span(2)), pages(1, PAGE), pages(MOST * PAGES, PAGE));
    let whole = harness::number("seconds=").unwrap_or(10).max(1) * 1000;
    for page in 0..512 {
        store(table + 8 * page, if page == 200 { 0 } else { (large + page * PAGE) | READ_WRITE });
    }
    domain.map_at(TABLE, large, 2, READ_WRITE);
    world.unit.invalidate(&[iotlb_pages(domain.id, TABLE, 9)]);
    // Milliseconds, buffers that are granted, times that the superpage changed, and steps.
    let (mut elapsed, mut live, mut changes, mut step) = (0, 0, 0, 0);
    while elapsed < whole {
        let time = Stopwatch::start();
        // A wave: up to all of them and down again, four times.
        let phase = elapsed * 8 * MOST / whole % (2 * MOST);
        let wanted = if phase < MOST { phase } else { 2 * MOST - phase };
        while live != wanted {
            let more = live < wanted;
            live -= u64::from(!more);
            buffer(&mut world, &domain, memory, live, more);
            live += u64::from(more);
        }
        // What is in use goes and comes.
        for index in [step % MOST, step * 7 % MOST] {
            if index < live {
                buffer(&mut world, &domain, memory, index, false);
                buffer(&mut world, &domain, memory, index, true);
            }
        }
        if elapsed * 12 / whole >= changes {
            let entry = domain.entry(TABLE, 2);
            changes += 1;
            if changes % 2 == 1 {
                store(entry, table | READ_WRITE);
            } else {
                store(entry, 0);
                world.unit.invalidate(&[iotlb_pages(domain.id, TABLE, 9)]);
                store(entry, large | LARGE | READ_WRITE);
            }
            world.unit.invalidate(&[iotlb_pages(domain.id, TABLE, 9)]);
            world.not_mapped(NOWHERE, large);
            if changes == 2 {
                domain.map(NOWHERE, NO_MEMORY, READ_WRITE);
                world.unit.invalidate(&[iotlb_pages(domain.id, NOWHERE, 0)]);
                check!(world.refused().is_some() == world.edu.assigned, "a page without memory");
                domain.clear(NOWHERE, 1);
                world.unit.invalidate(&[iotlb_pages(domain.id, NOWHERE, 0)]);
            }
        }
        while time.ms() < STEP {
            core::hint::spin_loop();
        }
        elapsed += u64::from(time.ms());
        step += 1;
    }
}
