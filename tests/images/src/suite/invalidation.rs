//! and B-2: what each invalidation takes away. Where a unit shows the stale entry, that is printed; it
//! need not.

use images::memory::{load, page, pages, store};
use images::tables::{Domain, READ_WRITE, span};
use images::vtd::offset::CCMD;
use images::vtd::{
    CONTEXT_GLOBAL, Descriptor, IOTLB_GLOBAL, QUEUE, context_device, context_domain, iotlb_domain, iotlb_pages,
};
use images::world::{IOVA, UNTOUCHED, WRITTEN};
use images::x86::wait_for;
use images::{World, check, check_eq, println};

images::tests!(
    a6_global_iotlb_invalidation,
    a6_domain_iotlb_invalidation,
    a6_page_iotlb_invalidation,
    a6_page_iotlb_invalidation_with_each_mask,
    a6_page_iotlb_invalidation_takes_all_of_a_large_leaf,
    a6_global_context_invalidation,
    a6_domain_context_invalidation,
    a6_device_context_invalidation,
    a6_device_context_invalidation_with_function_mask,
    a7_iotlb_invalidation_by_register,
    a7_page_invalidation_by_register,
    a7_context_invalidation_by_register,
    a7_registers_are_refused_while_the_queue_is_on,
    a10_context_entry_made_present,
    a10_page_made_present,
    b2_invalidations_without_a_change_keep_everything,
);

/// The device writes at `iova`: which of two pages it reaches. A fault that the stale entry caused is taken.
fn reaches_which(world: &World, iova: u64, pages: [u64; 2]) -> Option<usize> {
    pages.iter().for_each(|page| store(*page, UNTOUCHED));
    world.edu.dma_write(iova, 8);
    world.unit.take_fault();
    pages.iter().position(|page| load(*page) != UNTOUCHED)
}

/// Maps a page, has the device use it, maps another, and says whether the device still reaches the first; then has
/// `invalidate` done: the second is reached.
fn remapped(invalidate: impl FnOnce(&mut World, &Domain)) {
    let (mut world, domain) = World::with_domain();
    let (old, new) = (page(), page());
    domain.map(IOVA, old, READ_WRITE);
    world.unit.invalidate(&[IOTLB_GLOBAL]);
    world.edu.fill(WRITTEN);
    check_eq!(reaches_which(&world, IOVA, [old, new]), Some(0), "the page that is reached");
    domain.map(IOVA, new, READ_WRITE);
    println!("before the invalidation the page is {:?}", reaches_which(&world, IOVA, [old, new]));
    invalidate(&mut world, &domain);
    check_eq!(reaches_which(&world, IOVA, [old, new]), Some(1), "the page that is reached");
    domain.clear(IOVA, 1);
    world.unit.invalidate(&[IOTLB_GLOBAL]);
    check_eq!(reaches_which(&world, IOVA, [old, new]), None, "the page that is reached");
}

fn a6_global_iotlb_invalidation() {
    remapped(|world, _| world.unit.invalidate(&[IOTLB_GLOBAL]));
}

fn a6_domain_iotlb_invalidation() {
    remapped(|world, domain| world.unit.invalidate(&[iotlb_domain(domain.id)]));
}

fn a6_page_iotlb_invalidation() {
    remapped(|world, domain| world.unit.invalidate(&[iotlb_pages(domain.id, IOVA, 0)]));
}

fn a6_page_iotlb_invalidation_with_each_mask() {
    let (mut world, domain) = World::with_domain();
    let (old, new) = (page(), page());
    world.edu.fill(WRITTEN);
    for mask in 0..=world.unit.capability(48, 6) as u8 {
        let size = 4096u64 << mask;
        let base = 0x8_0000_0000;
        // The first and the last page of the range, both cached.
        for (from, to) in [(old, new), (new, old)] {
            for iova in [base, base + size - 4096] {
                domain.map(iova, from, READ_WRITE);
            }
            world.unit.invalidate(&[iotlb_pages(domain.id, base, mask)]);
            for iova in [base, base + size - 4096] {
                check_eq!(reaches_which(&world, iova, [from, to]), Some(0), "the page that is reached");
            }
        }
    }
}

fn a6_page_iotlb_invalidation_takes_all_of_a_large_leaf() {
    let (mut world, domain) = World::with_domain();
    let (base, old, new) = (0x8_0000_0000, pages(512, span(2)), pages(512, span(2)));
    world.edu.fill(WRITTEN);
    for (from, to, invalidated) in [(old, new, 0x5000), (new, old, 0x1f_f000), (old, new, 0)] {
        domain.map_at(base, from, 2, READ_WRITE);
        world.unit.invalidate(&[iotlb_pages(domain.id, base, 9)]);
        for offset in [0, 0x5000, 0x1f_f000] {
            check_eq!(reaches_which(&world, base + offset, [from + offset, to + offset]), Some(0), "the leaf's page");
        }
        domain.map_at(base, to, 2, READ_WRITE);
        // One page of the leaf is named; what is cached of all of it goes.
        world.unit.invalidate(&[iotlb_pages(domain.id, base + invalidated, 0)]);
        for offset in [0, 0x5000, 0x1f_f000] {
            check_eq!(reaches_which(&world, base + offset, [from + offset, to + offset]), Some(1), "the leaf's page");
        }
    }
}

/// Moves the device from one domain to another by its context entry; `invalidate` makes it take effect.
fn moved(invalidate: impl FnOnce(&mut World, Domain)) {
    let (mut world, one) = World::with_domain();
    let two = world.domain(2, one.levels);
    let (old, new) = (page(), page());
    one.map(IOVA, old, READ_WRITE);
    two.map(IOVA, new, READ_WRITE);
    world.unit.invalidate(&[IOTLB_GLOBAL]);
    world.edu.fill(WRITTEN);
    check_eq!(reaches_which(&world, IOVA, [old, new]), Some(0), "the page that is reached");
    world.set_context(world.edu.sid, two.root | 1, u64::from(two.levels - 2) | 2 << 8);
    println!("before the invalidation the page is {:?}", reaches_which(&world, IOVA, [old, new]));
    invalidate(&mut world, one);
    check_eq!(reaches_which(&world, IOVA, [old, new]), Some(1), "the page that is reached");
}

fn a6_global_context_invalidation() {
    moved(|world, _| world.unit.invalidate(&[CONTEXT_GLOBAL, IOTLB_GLOBAL]));
}

fn a6_domain_context_invalidation() {
    moved(|world, old| world.unit.invalidate(&[context_domain(old.id), iotlb_domain(old.id)]));
}

fn a6_device_context_invalidation() {
    moved(|world, old| {
        let sid = world.edu.sid;
        world.unit.invalidate(&[context_device(old.id, sid), iotlb_domain(old.id)]);
    });
}

fn a6_device_context_invalidation_with_function_mask() {
    moved(|world, old| {
        // Another function of the same device, with a mask that ignores the function number.
        let [low, high] = context_device(old.id, images::pci::SourceId(world.edu.sid.0 ^ 5));
        world.unit.invalidate(&[[low | 3 << 48, high], iotlb_domain(old.id)]);
    });
}

/// Where IVA and IOTLB are.
fn iva(world: &World) -> u64 {
    world.unit.extended(8, 10) * 16
}

fn by_register(world: &World, register: u64, command: u64, granularity: u32) {
    world.unit.write64(register, command | 1 << 63);
    wait_for("an invalidation by register", || world.unit.read64(register) >> 63 == 0);
    let done = world.unit.read64(register) >> granularity & 3;
    check!(done != 0, "the invalidation was refused: {:#x}", world.unit.read64(register));
}

fn a7_iotlb_invalidation_by_register() {
    remapped(|world, domain| {
        world.unit.command(QUEUE, false);
        by_register(world, iva(world) + 8, 2 << 60 | u64::from(domain.id) << 32, 57);
        start_again(world);
    });
}

fn a7_page_invalidation_by_register() {
    remapped(|world, domain| {
        world.unit.command(QUEUE, false);
        world.unit.write64(iva(world), IOVA);
        by_register(world, iva(world) + 8, 3 << 60 | u64::from(domain.id) << 32, 57);
        start_again(world);
    });
}

fn a7_context_invalidation_by_register() {
    moved(|world, old| {
        world.unit.command(QUEUE, false);
        by_register(world, CCMD, 3 << 61 | u64::from(world.edu.sid.0) << 16 | u64::from(old.id), 59);
        by_register(world, iva(world) + 8, 1 << 60, 57);
        start_again(world);
    });
}

fn start_again(world: &mut World) {
    world.unit.start_queue(0);
}

fn a7_registers_are_refused_while_the_queue_is_on() {
    let world = World::new();
    for (register, command, granularity) in [(CCMD, 1 << 61, 59), (iva(&world) + 8, 1 << 60, 57)] {
        world.unit.write64(register, command | 1 << 63);
        wait_for("a register that does not stay busy", || world.unit.read64(register) >> 63 == 0);
        check_eq!(world.unit.read64(register) >> granularity & 3, 0, "the granularity that was done");
    }
}

fn a10_context_entry_made_present() {
    let (mut world, domain) = World::with_domain();
    let page = page();
    world.set_context(world.edu.sid, 0, 0);
    world.refresh(world.edu.sid, domain.id);
    world.edu.dma_write(IOVA, 8);
    world.fault(2, IOVA, false);
    domain.map(IOVA, page, READ_WRITE);
    world.set_context(world.edu.sid, domain.root | 1, u64::from(domain.levels - 2) | u64::from(domain.id) << 8);
    // As Linux does it: a not-present entry is cached under domain 0.
    world.unit.invalidate(&[context_device(0, world.edu.sid), iotlb_domain(domain.id)]);
    world.reaches(IOVA, page);
}

fn a10_page_made_present() {
    let (mut world, domain) = World::with_domain();
    let page = page();
    world.not_mapped(IOVA, page);
    for _ in 0..3 {
        domain.map(IOVA, page, READ_WRITE);
        world.unit.invalidate(&[iotlb_pages(domain.id, IOVA, 0)]);
        world.reaches(IOVA, page);
        domain.clear(IOVA, 1);
        world.unit.invalidate(&[iotlb_pages(domain.id, IOVA, 0)]);
        world.not_mapped(IOVA, page);
    }
}

fn b2_invalidations_without_a_change_keep_everything() {
    let (mut world, domain) = World::with_domain();
    let page = page();
    domain.map(IOVA, page, READ_WRITE);
    world.unit.invalidate(&[IOTLB_GLOBAL]);
    let (id, sid) = (domain.id, world.edu.sid);
    for descriptor in
        [CONTEXT_GLOBAL, context_domain(id), context_device(id, sid), IOTLB_GLOBAL, iotlb_domain(id)] as [Descriptor; 5]
    {
        world.unit.invalidate(&[descriptor]);
        world.reaches(IOVA, page);
    }
}
