//! B-1 and B-14 while a device does DMA without a pause: the second processor drives it, the first one
//! changes what it reaches.
//!
//! What must not be reached any more is *sealed*: filled with a pattern as soon as the unit says that the change is
//! done. A transfer that still reaches it then, begun before or after, breaks the seal.

use images::edu::Edu;
use images::memory::{PAGE, load, page, pages, store};
use images::smp::{Other, beside};
use images::tables::{LARGE, READ_WRITE, span};
use images::vtd::{Fault, IOTLB_GLOBAL, TRANSLATION, context_device, iotlb_domain, iotlb_pages};
use images::world::{IOVA, UNTOUCHED, WRITE_DENIED, WRITTEN};
use images::x86::Stopwatch;
use images::{World, check, check_eq};

images::tests!(
    a6_page_moves_under_dma => "--cpus 2",
    a6_page_is_unmapped_under_dma => "--cpus 2",
    a1_device_moves_between_domains_under_dma => "--cpus 2",
    a11_translation_goes_off_and_on_under_dma => "--cpus 2",
    a11_other_tables_take_effect_under_dma => "--cpus 2",
    b1_superpage_and_table_replace_each_other_under_dma => "--cpus 2 --device edu",
    b14_table_changes_its_shape_under_dma => "--cpus 2",
);

const AREA: u64 = 0x2_0000_0000;
/// Fault reason: the context entry is not present.
const NO_CONTEXT: u8 = 2;

/// The device of `World`, for the second processor.
pub fn driver() -> Edu {
    Edu::all().next().unwrap_or_else(|| panic!("there is no edu"))
}

/// Says whether a test goes on: until the second processor has ended so many rounds; but not for longer than two
/// seconds, because QEMU's device takes a tenth of a second for each transfer.
pub fn rounds(count: u64, second: &Other) -> impl FnMut() -> bool {
    let time = Stopwatch::start();
    // The stopwatch goes on from 0 at its end.
    let mut late = false;
    move || {
        late |= time.ms() > 2000;
        second.rounds() < 10 || (second.rounds() < count && !late)
    }
}

/// Fills a page that nothing is to write to from now on.
pub fn seal(page: u64) {
    for at in (page..page + PAGE).step_by(8) {
        store(at, UNTOUCHED ^ at);
    }
}

/// Nothing wrote to it.
pub fn is_sealed(page: u64) -> bool {
    (page..page + PAGE).step_by(8).all(|at| load(at) == UNTOUCHED ^ at)
}

#[track_caller]
fn check_sealed(page: u64) {
    check!(is_sealed(page), "the device wrote to a page that it must not reach any more");
}

/// The device, begun before or not, reaches the first page and not the second.
#[track_caller]
fn only_reaches(second: &Other, new: u64, old: u64) {
    seal(new);
    second.wait_for_rounds(1);
    check!(!is_sealed(new), "the device does not reach the page that is mapped");
    check_sealed(old);
}

/// Takes the faults that are there, each of which must be a write to [`IOVA`] blocked for `reason`. How many there
/// were.
fn faults(world: &World, reason: u8) -> usize {
    let expected = Fault { source: world.edu.sid, reason, info: IOVA, read: false };
    let mut count = 0;
    while let Some(fault) = world.unit.take_fault() {
        check_eq!(fault, expected, "the fault");
        count += 1;
    }
    count
}

/// What is done without a pause: the whole buffer goes to [`IOVA`].
fn writes(edu: &Edu) -> impl FnMut() + Send {
    move || edu.dma_write(IOVA, PAGE)
}

fn a6_page_moves_under_dma() {
    let (mut world, domain) = World::with_domain();
    let (edu, places) = (driver(), [page(), page()]);
    domain.map(IOVA, places[0], READ_WRITE);
    world.unit.invalidate(&[iotlb_pages(domain.id, IOVA, 0)]);
    beside(writes(&edu), |second| {
        let mut go_on = rounds(500, second);
        let mut change = 0;
        while go_on() {
            change += 1;
            let (old, new) = (places[(change + 1) % 2], places[change % 2]);
            domain.map(IOVA, new, READ_WRITE);
            world.unit.invalidate(&[iotlb_pages(domain.id, IOVA, 0)]);
            seal(old);
            if change % 4 == 0 {
                only_reaches(second, new, old);
            }
            check_sealed(old);
        }
    });
    world.no_fault();
}

fn a6_page_is_unmapped_under_dma() {
    let (mut world, domain) = World::with_domain();
    let (edu, page) = (driver(), page());
    beside(writes(&edu), |second| {
        let mut go_on = rounds(500, second);
        while go_on() {
            domain.map(IOVA, page, READ_WRITE);
            world.unit.invalidate(&[iotlb_pages(domain.id, IOVA, 0)]);
            // Those that began before it was mapped may have been blocked.
            second.wait_for_rounds(0);
            faults(&world, WRITE_DENIED);
            seal(page);
            second.wait_for_rounds(1);
            check!(!is_sealed(page), "the device does not reach the page that is mapped");
            world.no_fault();

            domain.clear(IOVA, 1);
            world.unit.invalidate(&[iotlb_pages(domain.id, IOVA, 0)]);
            seal(page);
            second.wait_for_rounds(1);
            check!(faults(&world, WRITE_DENIED) > 0 || !world.edu.recorded, "no fault was recorded");
            check_sealed(page);
        }
    });
}

fn a1_device_moves_between_domains_under_dma() {
    let (mut world, one) = World::with_domain();
    let two = world.domain(2, one.levels);
    let (edu, sid, places) = (driver(), world.edu.sid, [page(), page()]);
    let domains = [one, two];
    for (domain, place) in domains.iter().zip(places) {
        domain.map(IOVA, place, READ_WRITE);
    }
    world.unit.invalidate(&[IOTLB_GLOBAL]);
    beside(writes(&edu), |second| {
        let mut go_on = rounds(500, second);
        let mut change = 0;
        while go_on() {
            change += 1;
            let (from, to) = (domains[(change + 1) % 2], domains[change % 2]);
            let (old, new) = (places[(change + 1) % 2], places[change % 2]);
            // As Linux does it: out of the one, then into the other.
            world.set_context(sid, 0, 0);
            world.unit.invalidate(&[context_device(from.id, sid), iotlb_domain(from.id)]);
            places.iter().for_each(|page| seal(*page));
            second.wait_for_rounds(1);
            check!(faults(&world, NO_CONTEXT) > 0 || !world.edu.recorded, "no fault was recorded");
            places.iter().for_each(|page| check_sealed(*page));

            world.set_context(sid, to.root | 1, u64::from(to.levels - 2) | u64::from(to.id) << 8);
            world.unit.invalidate(&[context_device(0, sid), iotlb_domain(to.id)]);
            second.wait_for_rounds(0);
            faults(&world, NO_CONTEXT);
            only_reaches(second, new, old);
            world.no_fault();
        }
    });
}

fn a11_translation_goes_off_and_on_under_dma() {
    let (mut world, domain) = World::with_domain();
    // The address of the one leads to the other while translation is on.
    let (edu, identical, mapped) = (driver(), page(), page());
    domain.map(identical, mapped, READ_WRITE);
    world.unit.invalidate(&[iotlb_domain(domain.id)]);
    beside(
        || edu.dma_write(identical, PAGE),
        |second| {
            let mut go_on = rounds(500, second);
            let mut change = 0;
            while go_on() {
                change += 1;
                for (on, old, new) in [(false, mapped, identical), (true, identical, mapped)] {
                    world.unit.command(TRANSLATION, on);
                    seal(old);
                    if change % 2 == 0 {
                        only_reaches(second, new, old);
                    }
                    check_sealed(old);
                }
            }
        },
    );
    world.no_fault();
}

fn a11_other_tables_take_effect_under_dma() {
    let (mut world, one) = World::with_domain();
    let two = world.domain(2, one.levels);
    let (edu, places) = (driver(), [page(), page()]);
    one.map(IOVA, places[0], READ_WRITE);
    two.map(IOVA, places[1], READ_WRITE);
    world.unit.invalidate(&[iotlb_domain(one.id)]);
    let (root, contexts) = (page(), page());
    store(root, contexts | 1);
    let at = contexts + 16 * u64::from(world.edu.sid.0 & 0xff);
    store(at + 8, u64::from(two.levels - 2) | u64::from(two.id) << 8);
    store(at, two.root | 1);
    let roots = [world.root, root];
    beside(writes(&edu), |second| {
        let mut go_on = rounds(500, second);
        let mut change = 0;
        while go_on() {
            change += 1;
            let (old, new) = (places[(change + 1) % 2], places[change % 2]);
            world.unit.set_root(roots[change % 2]);
            world.unit.invalidate_all();
            seal(old);
            if change % 2 == 0 {
                only_reaches(second, new, old);
            }
            check_sealed(old);
        }
    });
    world.no_fault();
}

/// A device that carries numbers from one page to another, each of which must arrive.
struct Carrier {
    edu: Edu,
    /// IOVA and memory.
    from: (u64, u64),
    to: (u64, u64),
    number: u64,
}

impl Carrier {
    fn carry(&mut self) {
        self.number += 1;
        store(self.from.1, WRITTEN ^ self.number);
        self.edu.dma_read(self.from.0, 8);
        self.edu.dma_write(self.to.0, 8);
        check_eq!(load(self.to.1), WRITTEN ^ self.number, "what the device carried");
    }
}

/// A table of 4 KiB leaves for 2 MiB of memory, without those that are not `wanted`.
fn leaves(memory: u64, wanted: impl Fn(u64) -> bool) -> u64 {
    let table = page();
    for index in (0..512).filter(|index| wanted(*index)) {
        store(table + 8 * index, (memory + index * PAGE) | READ_WRITE);
    }
    table | READ_WRITE
}

fn carrier(memory: u64) -> Carrier {
    let at = |offset| (AREA + offset, memory + offset);
    Carrier { edu: driver(), from: at(0x3000), to: at(0x1f_f000), number: 0 }
}

fn b14_table_changes_its_shape_under_dma() {
    let (mut world, domain) = World::with_domain();
    let memory = pages(512, span(2));
    let (entry, beneath) = (domain.entry(AREA, 2), page());
    let shapes = [leaves(memory, |_| true), memory | LARGE | READ_WRITE];
    store(entry, shapes[0]);
    world.unit.invalidate(&[iotlb_pages(domain.id, AREA, 9)]);
    let mut carrier = carrier(memory);
    beside(
        || carrier.carry(),
        |second| {
            let mut go_on = rounds(500, second);
            let mut change = 0;
            while go_on() {
                change += 1;
                store(entry, shapes[change % 2]);
                // Another page, beside it.
                match change % 4 {
                    0 => domain.map(AREA - PAGE, beneath, READ_WRITE),
                    2 => domain.clear(AREA - PAGE, 1),
                    _ => {}
                }
                let invalidation = [
                    iotlb_pages(domain.id, AREA, 9),
                    iotlb_domain(domain.id),
                    iotlb_pages(domain.id, AREA, 10),
                    IOTLB_GLOBAL,
                ][change / 2 % 4];
                world.unit.invalidate(&[iotlb_pages(domain.id, AREA - PAGE, 0), invalidation]);
            }
        },
    );
    world.no_fault();
}

fn b1_superpage_and_table_replace_each_other_under_dma() {
    let (mut world, domain) = World::with_domain();
    let memory = pages(512, span(2));
    let other = Edu::all().nth(1).unwrap_or_else(|| panic!("there is no second edu"));
    domain.map(other.scratch, other.scratch, READ_WRITE);
    world.attach(other.sid, &domain);
    let entry = domain.entry(AREA, 2);
    let (whole, holes) = (memory | LARGE | READ_WRITE, leaves(memory, |index| !(100..400).contains(&index)));
    // The first table cuts what was mapped as a whole, and what stays of it is away for a moment where the host cannot
    // cut (B-8). From then on each part is a mapping of its own.
    for shape in [whole, holes, whole] {
        store(entry, shape);
        world.unit.invalidate(&[iotlb_pages(domain.id, AREA, 9)]);
    }
    let mut carrier = carrier(memory);
    beside(
        || carrier.carry(),
        |second| {
            let mut go_on = rounds(500, second);
            let mut change = 0;
            while go_on() {
                change += 1;
                // The second device, driven from here, looks at what comes and goes between the pages that stay.
                let (iova, gpa) = (AREA + 100 * PAGE + change % 300 * PAGE, memory + 100 * PAGE + change % 300 * PAGE);
                other.fill(WRITTEN ^ change);
                for (shape, mapped) in [(holes, false), (whole, true)] {
                    store(entry, shape);
                    world.unit.invalidate(&[iotlb_pages(domain.id, AREA, 9)]);
                    store(gpa, UNTOUCHED);
                    other.dma_write(iova, 8);
                    let fault = world.unit.take_fault().map(|fault| (fault.source, fault.reason, fault.info));
                    let expected = (!mapped && other.recorded).then_some((other.sid, WRITE_DENIED, iova));
                    check_eq!(fault, expected, "the fault");
                    let expected = if mapped { WRITTEN ^ change } else { UNTOUCHED };
                    check_eq!(load(gpa), expected, "a page that comes and goes");
                }
            }
        },
    );
    world.no_fault();
}
