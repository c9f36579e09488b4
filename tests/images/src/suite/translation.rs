//! tables, widths, leaves, permissions, and what domain a device is in.

use images::edu::Edu;
use images::memory::{load, page, pages, store};
use images::tables::{Domain, READ, READ_WRITE, WRITE, span};
use images::vtd::{IOTLB_GLOBAL, TRANSLATION, iotlb_domain, iotlb_pages};
use images::world::{IOVA, UNTOUCHED, WRITE_DENIED, WRITTEN};
use images::{World, check, check_eq};

images::tests!(
    a1_translation_off_is_identity,
    a1_page_is_translated_for_reads_and_writes,
    a1_three_levels,
    a1_four_levels,
    a1_five_levels => "--iommu vtd,aw-bits=57",
    a1_2m_leaf,
    a1_1g_leaf,
    a1_read_only_page,
    a1_write_only_page,
    a1_permissions_of_directories_count_too,
    a1_pass_through_reaches_all_of_memory,
    a1_transfer_across_a_page_edge_follows_both_pages,
    a1_transfer_into_a_hole_is_blocked_there,
    a1_device_moves_between_domains,
    a1_two_devices_share_a_domain => "--device edu",
    a1_two_devices_have_domains_of_their_own => "--device edu",
    a1_one_domain_id_with_two_roots => "--device edu",
    a11_translation_goes_off_and_on,
    a11_copied_tables_change_nothing,
    a11_other_tables_take_effect,
    a12_interrupt_window_is_never_translated,
);

fn a1_translation_off_is_identity() {
    let world = World::new();
    let page = page();
    world.reaches(page, page);
}

fn a1_page_is_translated_for_reads_and_writes() {
    let (mut world, domain) = World::with_domain();
    let page = page();
    world.not_mapped(IOVA, page);
    domain.map(IOVA, page, READ_WRITE);
    world.unit.invalidate(&[iotlb_pages(domain.id, IOVA, 0)]);
    world.reaches(IOVA, page);
    world.reaches(IOVA + 0xff8, page + 0xff8);
}

fn first_and_last_page_of_a_width(levels: u8) {
    let (mut world, domain) = World::with_levels(levels);
    let (first, last) = (page(), page());
    let top = span(levels) * 512 - 4096;
    // Page 0 and the last one, and one that differs from the first in the highest index only.
    domain.map(0, first, READ_WRITE);
    domain.map(top, last, READ_WRITE);
    world.unit.invalidate(&[IOTLB_GLOBAL]);
    world.reaches(0, first);
    world.reaches(top, last);
    world.not_mapped(span(levels), first);
}

fn a1_three_levels() {
    first_and_last_page_of_a_width(3);
}

fn a1_four_levels() {
    first_and_last_page_of_a_width(4);
}

fn a1_five_levels() {
    first_and_last_page_of_a_width(5);
}

fn a1_2m_leaf() {
    let (mut world, domain) = World::with_domain();
    let memory = pages(512, span(2));
    domain.map_at(span(3), memory, 2, READ_WRITE);
    world.unit.invalidate(&[iotlb_pages(domain.id, span(3), 9)]);
    for offset in [0, 0x5000, span(2) - 8] {
        world.reaches(span(3) + offset, memory + offset);
    }
    world.not_mapped(span(3) + span(2), memory);
}

fn a1_1g_leaf() {
    let (mut world, domain) = World::with_domain();
    let page = page();
    domain.map_at(span(3) * 5, 0, 3, READ_WRITE);
    world.unit.invalidate(&[iotlb_domain(domain.id)]);
    // An assigned device's host maps what there is of it, which is told once: this guest has 64 MiB.
    check_eq!(world.refused(), world.edu.assigned.then_some(span(3) * 5 + (64 << 20)), "what the host did not map");
    world.reaches(span(3) * 5 + page, page);
    world.not_mapped(span(3) * 6 + page, page);
}

fn a1_read_only_page() {
    let (mut world, domain) = World::with_domain();
    let page = page();
    domain.map(IOVA, page, READ);
    world.unit.invalidate(&[iotlb_pages(domain.id, IOVA, 0)]);
    world.reads_reach(IOVA, page);
    world.write_blocked(IOVA, page, WRITE_DENIED);
    world.reads_reach(IOVA, page);
}

fn a1_write_only_page() {
    let (mut world, domain) = World::with_domain();
    let page = page();
    domain.map(IOVA, page, WRITE);
    world.unit.invalidate(&[iotlb_pages(domain.id, IOVA, 0)]);
    world.writes_reach(IOVA, page);
    world.read_of_write_only_blocked(IOVA, page);
    world.writes_reach(IOVA, page);
}

fn a1_permissions_of_directories_count_too() {
    let (mut world, domain) = World::with_domain();
    let page = page();
    domain.map(IOVA, page, READ_WRITE);
    let directory = domain.entry(IOVA, 2);
    let table = load(directory) & !0xfff;
    for (permissions, readable, writable) in [(READ, true, false), (WRITE, false, true), (READ_WRITE, true, true)] {
        store(directory, table | permissions);
        world.unit.invalidate(&[iotlb_domain(domain.id)]);
        match readable {
            true => world.reads_reach(IOVA, page),
            false => world.read_of_write_only_blocked(IOVA, page),
        }
        match writable {
            true => world.writes_reach(IOVA, page),
            false => {
                world.edu.fill(WRITTEN);
                world.write_blocked(IOVA, page, WRITE_DENIED);
            }
        }
    }
    // Read above and write below leave nothing.
    store(directory, table | READ);
    domain.map(IOVA, page, WRITE);
    world.unit.invalidate(&[iotlb_domain(domain.id)]);
    world.not_mapped(IOVA, page);
}

fn a1_pass_through_reaches_all_of_memory() {
    let (mut world, domain) = World::with_domain();
    let (page, context) = (page(), world.context(world.edu.sid));
    world.edu.fill(WRITTEN);
    world.write_blocked(page, page, WRITE_DENIED);
    let aw = u64::from(domain.levels - 2);
    // The pointer of a pass-through entry is ignored, even one that no memory can have.
    world.set_context(world.edu.sid, 0x000f_ffff_ffff_f000 | 2 << 2 | 1, aw | 9 << 8);
    world.refresh(world.edu.sid, 1);
    check!(load(context) & 1 == 1, "the context entry is not there");
    world.reaches(page, page);
}

fn a1_transfer_across_a_page_edge_follows_both_pages() {
    let (mut world, domain) = World::with_domain();
    // Not neighbours, and in the other order.
    let (second, _, first) = (page(), page(), page());
    domain.map(IOVA, first, READ_WRITE);
    domain.map(IOVA + 0x1000, second, READ_WRITE);
    world.unit.invalidate(&[iotlb_pages(domain.id, IOVA, 0), iotlb_pages(domain.id, IOVA + 0x1000, 0)]);
    store(first + 0xff8, 11);
    store(second, 22);
    world.edu.dma_read(IOVA + 0xff8, 16);
    world.edu.dma_write(world.edu.scratch + 0x100, 16);
    world.no_fault();
    check_eq!((load(world.edu.scratch + 0x100), load(world.edu.scratch + 0x108)), (11, 22), "what was read");
    world.edu.dma_read(world.edu.scratch + 0x108, 8);
    store(second, 0);
    world.edu.dma_write(IOVA + 0xffc, 8);
    world.no_fault();
    check_eq!((load(first + 0xff8) as u32, load(first + 0xff8) >> 32), (11, 22), "the end of the first page");
    check_eq!(load(second), 0, "the beginning of the second page");
}

fn a1_transfer_into_a_hole_is_blocked_there() {
    let (mut world, domain) = World::with_domain();
    let (mapped, beside) = (page(), page());
    domain.map(IOVA, mapped, READ_WRITE);
    world.unit.invalidate(&[iotlb_pages(domain.id, IOVA, 0)]);
    store(beside, UNTOUCHED);
    world.edu.dma_write(IOVA + 0xff8, 16);
    world.fault(WRITE_DENIED, IOVA + 0x1000, false);
    check_eq!(load(beside), UNTOUCHED, "the page behind the mapped one");
}

fn a1_device_moves_between_domains() {
    let (mut world, one) = World::with_domain();
    let two = world.domain(2, one.levels);
    let (first, second) = (page(), page());
    one.map(IOVA, first, READ_WRITE);
    two.map(IOVA, second, READ_WRITE);
    world.unit.invalidate(&[iotlb_domain(1), iotlb_domain(2)]);
    for _ in 0..2 {
        world.reaches(IOVA, first);
        world.attach(world.edu.sid, &two);
        world.reaches(IOVA, second);
        check!(load(first) != load(second), "both domains lead to one page");
        world.attach(world.edu.sid, &one);
    }
    world.reaches(IOVA, first);
}

/// Another device whose faults the guest hears of.
fn other_edu(world: &World) -> Edu {
    let here =
        |edu: &Edu| edu.sid == world.edu.sid || world.beside.as_ref().is_some_and(|beside| edu.sid == beside.sid);
    Edu::all().find(|edu| edu.recorded && !here(edu)).unwrap_or_else(|| panic!("there is no second edu"))
}

/// The second device writes at `iova`, and that reaches `gpa`.
fn other_writes(other: &Edu, iova: u64, gpa: u64) {
    store(gpa, UNTOUCHED);
    other.fill(WRITTEN + 1);
    other.dma_write(iova, 8);
    check_eq!(load(gpa), WRITTEN + 1, "what the second device wrote");
}

fn a1_two_devices_share_a_domain() {
    let (mut world, domain) = World::with_domain();
    let (other, page) = (other_edu(&world), page());
    domain.map(other.scratch, other.scratch, READ_WRITE);
    domain.map(IOVA, page, READ_WRITE);
    world.attach(other.sid, &domain);
    world.reaches(IOVA, page);
    other_writes(&other, IOVA, page);
    domain.clear(IOVA, 1);
    world.unit.invalidate(&[iotlb_pages(domain.id, IOVA, 0)]);
    world.not_mapped(IOVA, page);
    other.fill(WRITTEN);
    store(page, UNTOUCHED);
    other.dma_write(IOVA, 8);
    check_eq!(
        world.unit.take_fault().map(|fault| (fault.source, fault.reason)),
        Some((other.sid, WRITE_DENIED)),
        "fault"
    );
    check_eq!(load(page), UNTOUCHED, "what the second device must not reach");
}

fn a1_two_devices_have_domains_of_their_own() {
    let (mut world, one) = World::with_domain();
    let other = other_edu(&world);
    let two = Domain::new(2, one.levels);
    two.map(other.scratch, other.scratch, READ_WRITE);
    let (first, second) = (page(), page());
    one.map(IOVA, first, READ_WRITE);
    two.map(IOVA, second, READ_WRITE);
    world.attach(other.sid, &two);
    world.unit.invalidate(&[iotlb_domain(1)]);
    world.reaches(IOVA, first);
    other_writes(&other, IOVA, second);
    check!(load(first) != WRITTEN + 1, "the second device reached the first one's page");
    world.no_fault();
}

fn a1_one_domain_id_with_two_roots() {
    let (mut world, one) = World::with_domain();
    let other = other_edu(&world);
    let two = Domain::new(one.id, one.levels);
    two.map(other.scratch, other.scratch, READ_WRITE);
    let (first, second) = (page(), page());
    one.map(IOVA, first, READ_WRITE);
    two.map(IOVA, second, READ_WRITE);
    world.attach(other.sid, &two);
    world.reaches(IOVA, first);
    other_writes(&other, IOVA, second);
    world.reaches(IOVA, first);
    two.clear(IOVA, 1);
    world.unit.invalidate(&[iotlb_pages(one.id, IOVA, 0)]);
    world.reaches(IOVA, first);
}

fn a11_translation_goes_off_and_on() {
    let (mut world, domain) = World::with_domain();
    let (mapped, page) = (page(), page());
    domain.map(IOVA, mapped, READ_WRITE);
    world.unit.invalidate(&[iotlb_pages(domain.id, IOVA, 0)]);
    for _ in 0..2 {
        world.reaches(IOVA, mapped);
        world.not_mapped(page, page);
        world.unit.command(TRANSLATION, false);
        world.reaches(page, page);
        world.unit.command(TRANSLATION, true);
    }
    world.reaches(IOVA, mapped);
}

/// A root table and a context table with the entries of `world`.
fn copy_tables(world: &World) -> (u64, u64) {
    let (root, contexts) = (page(), page());
    store(root, contexts | 1);
    for at in (0..4096).step_by(8) {
        store(contexts + at, load(world.contexts + at));
    }
    (root, contexts)
}

fn a11_copied_tables_change_nothing() {
    let (mut world, domain) = World::with_domain();
    let page = page();
    domain.map(IOVA, page, READ_WRITE);
    world.unit.invalidate(&[iotlb_domain(domain.id)]);
    world.reaches(IOVA, page);
    let (root, _) = copy_tables(&world);
    world.unit.set_root(root);
    world.reaches(IOVA, page);
    world.unit.invalidate_all();
    world.reaches(IOVA, page);
}

fn a11_other_tables_take_effect() {
    let (mut world, one) = World::with_domain();
    let two = world.domain(2, one.levels);
    let (first, second) = (page(), page());
    one.map(IOVA, first, READ_WRITE);
    two.map(IOVA, second, READ_WRITE);
    world.unit.invalidate(&[iotlb_domain(1)]);
    world.reaches(IOVA, first);
    let (root, contexts) = copy_tables(&world);
    let at = contexts + 16 * u64::from(world.edu.sid.0 & 0xff);
    store(at, two.root | 1);
    store(at + 8, u64::from(two.levels - 2) | 2 << 8);
    // The pointer alone changes nothing until it is set.
    world.unit.write64(images::vtd::offset::RTADDR, root);
    world.unit.invalidate_all();
    world.reaches(IOVA, first);
    world.unit.set_root(root);
    world.unit.invalidate_all();
    world.reaches(IOVA, second);
    check!(load(first) != load(second), "both tables lead to one page");
}

fn a12_interrupt_window_is_never_translated() {
    let (mut world, domain) = World::with_domain();
    let (window, memory) = (0xfee0_0000, pages(512, span(2)));
    domain.map_at(window, memory, 2, READ_WRITE);
    world.unit.invalidate(&[iotlb_domain(domain.id)]);
    world.edu.fill(WRITTEN);
    store(memory + 0x8000, UNTOUCHED);
    world.edu.dma_write(window + 0x8000, 8);
    check_eq!(load(memory + 0x8000), UNTOUCHED, "the page that the table names for the interrupt window");
}
