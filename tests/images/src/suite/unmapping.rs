//! B-1 to B-14: large changes of a table: directories, superpages, everything at once, and very many pages.

use images::memory::{load, page, pages, store};
use images::tables::{LARGE, READ_WRITE, span};
use images::vtd::{iotlb_domain, iotlb_pages};
use images::world::{UNTOUCHED, WRITE_DENIED, WRITTEN};
use images::{World, check, check_eq};

images::tests!(
    b1_directory_entry_cleared_under_512_pages,
    b1_superpage_replaces_a_table,
    b3_whole_space_unmap_39_bits,
    b3_whole_space_unmap_48_bits,
    b3_whole_space_unmap_57_bits => "--iommu vtd,aw-bits=57",
    b6_leaf_over_the_interrupt_window_maps_both_sides,
    b7_300000_contiguous_pages,
    b7_300000_scattered_pages,
    b8_page_unmapped_inside_a_superpage,
    b8_page_unmapped_among_neighbours,
    b9_read_only_page_becomes_writable_and_back,
    b14_superpage_is_split_and_merged_under_dma,
);

const AREA: u64 = 0x2_0000_0000;

fn a_table_of_512_pages() -> (World, images::tables::Domain, u64) {
    let (mut world, domain) = World::with_domain();
    let memory = pages(512, span(2));
    for page in 0..512 {
        domain.map(AREA + page * 4096, memory + page * 4096, READ_WRITE);
    }
    world.unit.invalidate(&[iotlb_pages(domain.id, AREA, 9)]);
    (world, domain, memory)
}

fn b1_directory_entry_cleared_under_512_pages() {
    let (mut world, domain, memory) = a_table_of_512_pages();
    for page in [0, 1, 255, 511] {
        world.reaches(AREA + page * 4096, memory + page * 4096);
    }
    domain.clear(AREA, 2);
    world.unit.invalidate(&[iotlb_pages(domain.id, AREA, 9)]);
    for page in [0, 1, 100, 255, 511] {
        world.not_mapped(AREA + page * 4096, memory + page * 4096);
    }
}

fn b1_superpage_replaces_a_table() {
    let (mut world, domain, memory) = a_table_of_512_pages();
    world.reaches(AREA + 0x3000, memory + 0x3000);
    let other = pages(512, span(2));
    domain.map_at(AREA, other, 2, READ_WRITE);
    world.unit.invalidate(&[iotlb_pages(domain.id, AREA, 9)]);
    for page in [0, 3, 511] {
        world.reaches(AREA + page * 4096, other + page * 4096);
    }
    store(memory, 1);
}

fn whole_space(levels: u8) {
    let (mut world, domain) = World::with_levels(levels);
    let page = page();
    let top = span(levels) * 512 - 4096;
    let places = [0, span(2), span(levels) + 0x5000, top];
    places.iter().for_each(|iova| domain.map(*iova, page, READ_WRITE));
    world.unit.invalidate(&[iotlb_domain(domain.id)]);
    places.iter().for_each(|iova| world.reaches(*iova, page));
    world.edu.fill(WRITTEN);
    for index in 0..512 {
        store(domain.root + 8 * index, 0);
    }
    world.unit.invalidate(&[iotlb_domain(domain.id)]);
    places.iter().for_each(|iova| world.write_blocked(*iova, page, WRITE_DENIED));
}

fn b3_whole_space_unmap_39_bits() {
    whole_space(3);
}

fn b3_whole_space_unmap_48_bits() {
    whole_space(4);
}

fn b3_whole_space_unmap_57_bits() {
    whole_space(5);
}

fn b6_leaf_over_the_interrupt_window_maps_both_sides() {
    let (mut world, domain) = World::with_domain();
    let memory = pages(512, span(2));
    // The window is 0xfee00000 to 0xfeefffff: the lower half of this leaf.
    domain.map_at(0xfee0_0000, memory, 2, READ_WRITE);
    domain.map_at(0xfec0_0000, memory, 2, READ_WRITE);
    world.unit.invalidate(&[iotlb_domain(domain.id)]);
    for offset in [0x10_0000, 0x10_1000, 0x1f_f000] {
        world.reaches(0xfee0_0000 + offset, memory + offset);
    }
    world.reaches(0xfedf_f000, memory + 0x1f_f000);
}

const MANY: u64 = 300_000;

/// 512 leaves, the pages of which `memory` names, under as many directory entries as `MANY` pages need. What an
/// assigned device reaches of them is what its host maps; `fits`: it can map all.
fn many(fits: bool, memory: impl Fn(u64) -> u64) {
    let (mut world, domain) = World::with_domain();
    let table = page();
    for index in 0..512 {
        store(table + 8 * index, memory(index) | READ_WRITE);
    }
    let directories = MANY.div_ceil(512);
    for directory in 0..directories {
        store(domain.entry(AREA + directory * span(2), 2), table | READ_WRITE);
    }
    world.unit.invalidate(&[iotlb_domain(domain.id)]);
    // One record tells of the first page that was refused, whose neighbours are refused too.
    let reached = world.refused().map_or(MANY, |iova| (iova - AREA) / 4096);
    check!(reached == MANY || !fits && reached > 512, "only {reached} of {MANY} pages are mapped");
    for sample in [0, 1, 511, 512, 65_536, MANY / 2, reached - 1, reached, MANY - 1] {
        let (iova, gpa) = (AREA + sample * 4096, memory(sample % 512));
        match sample < reached {
            true => world.reaches(iova, gpa),
            false if sample < MANY => not_in_the_host(&world, iova, gpa),
            false => {}
        }
    }
    for directory in 0..directories {
        domain.clear(AREA + directory * span(2), 2);
    }
    world.unit.invalidate(&[iotlb_domain(domain.id)]);
    world.edu.fill(WRITTEN);
    for sample in [0, 1, 511, 512, 65_536, MANY / 2, reached - 1, MANY - 1] {
        world.write_blocked(AREA + sample * 4096, memory(sample % 512), WRITE_DENIED);
    }
    // There is room again, for those at the end too.
    for directory in directories - 2..directories {
        store(domain.entry(AREA + directory * span(2), 2), table | READ_WRITE);
    }
    world.unit.invalidate(&[iotlb_domain(domain.id)]);
    world.reaches(AREA + (MANY - 1) * 4096, memory((MANY - 1) % 512));
}

/// What the guest's table grants and the host did not map: an assigned device does not reach it, and its host hears of
/// that.
fn not_in_the_host(world: &World, iova: u64, gpa: u64) {
    world.edu.fill(WRITTEN);
    store(gpa, UNTOUCHED);
    world.edu.dma_write(iova, 8);
    world.no_fault();
    check_eq!(load(gpa), UNTOUCHED, "a page that the host did not map");
}

fn b7_300000_contiguous_pages() {
    let memory = pages(512, span(2));
    many(true, |index| memory + index * 4096);
}

fn b7_300000_scattered_pages() {
    let memory = pages(16, 4096);
    many(false, |index| memory + index * 7 % 16 * 4096);
}

fn b8_page_unmapped_inside_a_superpage() {
    let (mut world, domain) = World::with_domain();
    let (memory, table) = (pages(512, span(2)), page());
    domain.map_at(AREA, memory, 2, READ_WRITE);
    world.unit.invalidate(&[iotlb_pages(domain.id, AREA, 9)]);
    world.reaches(AREA + 0x64_000, memory + 0x64_000);
    for index in (0..512).filter(|index| *index != 100) {
        store(table + 8 * index, (memory + index * 4096) | READ_WRITE);
    }
    store(domain.entry(AREA, 2), table | READ_WRITE);
    world.unit.invalidate(&[iotlb_pages(domain.id, AREA, 9)]);
    world.not_mapped(AREA + 100 * 4096, memory + 100 * 4096);
    for index in [0, 99, 101, 511] {
        world.reaches(AREA + index * 4096, memory + index * 4096);
    }
}

fn b8_page_unmapped_among_neighbours() {
    let (mut world, domain, memory) = a_table_of_512_pages();
    for index in 99..=101 {
        world.reaches(AREA + index * 4096, memory + index * 4096);
    }
    domain.clear(AREA + 100 * 4096, 1);
    world.unit.invalidate(&[iotlb_pages(domain.id, AREA + 100 * 4096, 0)]);
    world.reaches(AREA + 99 * 4096, memory + 99 * 4096);
    world.not_mapped(AREA + 100 * 4096, memory + 100 * 4096);
    world.reaches(AREA + 101 * 4096, memory + 101 * 4096);
}

fn b9_read_only_page_becomes_writable_and_back() {
    let (mut world, domain) = World::with_domain();
    let page = page();
    for _ in 0..2 {
        domain.map(AREA, page, images::tables::READ);
        world.unit.invalidate(&[iotlb_pages(domain.id, AREA, 0)]);
        world.reads_reach(AREA, page);
        world.write_blocked(AREA, page, WRITE_DENIED);
        domain.map(AREA, page, READ_WRITE);
        world.unit.invalidate(&[iotlb_pages(domain.id, AREA, 0)]);
        world.reaches(AREA, page);
    }
}

fn b14_superpage_is_split_and_merged_under_dma() {
    let (mut world, domain) = World::with_domain();
    let (memory, table) = (pages(512, span(2)), page());
    for index in 0..512 {
        store(table + 8 * index, (memory + index * 4096) | READ_WRITE);
    }
    domain.map_at(AREA, memory, 2, READ_WRITE);
    world.unit.invalidate(&[iotlb_pages(domain.id, AREA, 9)]);
    for round in 0..4 {
        let entry = if round % 2 == 0 { table | READ_WRITE } else { memory | LARGE | READ_WRITE };
        store(domain.entry(AREA, 2), entry);
        // Both translate alike, so a transfer between the change and its invalidation is as good as any.
        world.reaches(AREA + round * 0x5000, memory + round * 0x5000);
        world.unit.invalidate(&[iotlb_pages(domain.id, AREA, 9)]);
        world.reaches(AREA + 0x1f_f000 - round * 0x3000, memory + 0x1f_f000 - round * 0x3000);
    }
}
