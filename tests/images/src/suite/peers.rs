//! B-10 and B-15: a device's DMA and the registers of another device.

use images::edu::Edu;
use images::pci::{self, BAR0, MEMORY, SourceId};
use images::tables::READ_WRITE;
use images::vtd::iotlb_pages;
use images::world::IOVA;
use images::x86::{read, write};
use images::{World, check, check_eq};

images::tests!(b10_bar_of_another_function => "--device edu");

/// The register of an edu that reads as the inverse of what was written.
const LIVENESS: u64 = 0x04;
/// The register of an NVMe controller that says where its admin submission queue is: what was written stays there.
const ADMIN_QUEUE: u64 = 0x28;

/// With an edu and an NVMe of the host, both assigned, the edu reaches the NVMe's registers. Otherwise the target is a
/// second edu, emulated or in a process of its own: these have no memory that could be mapped, so only an emulated edu
/// reaches them.
fn b10_bar_of_another_function() {
    let host_has_edu = !Edu::first().recorded;
    match pci::find(0, 0x1b36, 0x0010).next().filter(|_| host_has_edu) {
        Some(nvme) => registers_are_reached_while_they_are_there(nvme),
        None => registers_without_memory_are_reached_by_emulated_dma(),
    }
}

/// Where a 64-bit BAR is.
fn bar(function: SourceId) -> u64 {
    u64::from(function.read(BAR0) & !0xf) | u64::from(function.read(BAR0 + 4)) << 32
}

fn registers_are_reached_while_they_are_there(nvme: SourceId) {
    let mut world = World::new();
    nvme.command(MEMORY, 0);
    let home = bar(nvme);
    let register = |at: u64| read::<u64>(at + ADMIN_QUEUE);
    let reaches = |world: &World, iova: u64, at: u64, value: u64| {
        world.edu.fill(value);
        world.edu.dma_write(iova + ADMIN_QUEUE, 8);
        check_eq!(register(at), value, "what the edu wrote into the NVMe's register");
        world.edu.fill(0);
        world.edu.dma_read(iova + ADMIN_QUEUE, 8);
        check_eq!(world.edu.content(), value, "what the edu read from the NVMe's register");
    };
    // Before there is translation.
    reaches(&world, home, home, 0x11_1000);

    let levels = world.levels();
    let domain = world.domain(1, levels);
    domain.map(IOVA, home, READ_WRITE);
    world.attach(world.edu.sid, &domain);
    world.unit.command(images::vtd::TRANSLATION, true);
    check!(world.refused().is_none(), "the host maps no BAR for another device");
    reaches(&world, IOVA, home, 0x22_2000);

    // It goes while a transfer is under way, which arrives before that or never; and none arrives afterwards.
    for round in 0..3 {
        let before = register(home);
        world.edu.fill(0x33_3000);
        world.edu.begin_write(IOVA + ADMIN_QUEUE, 8);
        nvme.command(0, MEMORY);
        world.edu.finish();
        // The guest is told once that a page of its table leads to nothing.
        check_eq!(world.refused(), (round == 0).then_some(IOVA), "the page without a target");
        world.edu.fill(0xbad_b000);
        world.edu.dma_write(IOVA + ADMIN_QUEUE, 8);
        nvme.command(MEMORY, 0);
        let now = register(home);
        check!(now == before || now == 0x33_3000, "a register that nothing could reach is {now:#x}");
    }
    reaches(&world, IOVA, home, 0x44_4000);

    // It moves: who led there leads to nothing, and who led to nothing leads there.
    let away = home + (64 << 20);
    domain.map(IOVA + 0x1000, away, READ_WRITE);
    world.unit.invalidate(&[iotlb_pages(domain.id, IOVA + 0x1000, 0)]);
    world.no_fault();
    nvme.write(BAR0, away as u32);
    check_eq!(bar(nvme), away, "where the NVMe is now");
    reaches(&world, IOVA + 0x1000, away, 0x55_5000);
    world.edu.fill(0x66_6000);
    world.edu.dma_write(IOVA + ADMIN_QUEUE, 8);
    check_eq!(register(away), 0x55_5000, "a register that moved away");
    nvme.write(BAR0, home as u32);
    reaches(&world, IOVA, home, 0x77_7000);
    world.no_fault();
    write(home + ADMIN_QUEUE, 0u64);
}

fn registers_without_memory_are_reached_by_emulated_dma() {
    let (mut world, domain) = World::with_domain();
    let other = |edu: &Edu| edu.sid != world.edu.sid && world.beside.as_ref().is_none_or(|it| it.sid != edu.sid);
    let target = Edu::all().find(other);
    let target = target.unwrap_or_else(|| panic!("there is no other edu"));
    target.write(LIVENESS, 0x1234_5678);
    domain.map(IOVA, u64::from(target.sid.read(BAR0) & !0xf), READ_WRITE);
    world.unit.invalidate(&[iotlb_pages(domain.id, IOVA, 0)]);
    check_eq!(world.refused(), world.edu.assigned.then_some(IOVA), "what the host did not map");
    world.edu.fill(0x8765_4321);
    world.edu.dma_write(IOVA + LIVENESS, 4);
    let written = if world.edu.assigned { 0x1234_5678 } else { 0x8765_4321 };
    check_eq!(target.read(LIVENESS), !written, "a register without memory");
    // Not any more while its memory is disabled.
    target.sid.command(0, MEMORY);
    world.edu.fill(0);
    world.edu.dma_write(IOVA + LIVENESS, 4);
    target.sid.command(MEMORY, 0);
    check_eq!(target.read(LIVENESS), !written, "a register that was not there");
    // All else goes on.
    let page = images::memory::page();
    domain.map(IOVA + 0x1000, page, READ_WRITE);
    world.unit.invalidate(&[iotlb_pages(domain.id, IOVA + 0x1000, 0)]);
    world.reaches(IOVA + 0x1000, page);
}
