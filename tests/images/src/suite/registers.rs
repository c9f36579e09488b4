//! what the unit says of itself, and its register file.

use images::memory::{load, page, store};
use images::tables::READ_WRITE;
use images::vtd::offset::*;
use images::vtd::{INTERRUPT_REMAPPING, QUEUE, ROOT_POINTER, TRANSLATION, Unit, wait_status};
use images::world::{IOVA, WRITTEN};
use images::x86::{read, wait_for};
use images::{World, check, check_eq};

images::tests!(
    a4_capabilities_agree_with_each_other,
    a4_39_bits => "--iommu vtd,aw-bits=39",
    a4_48_bits => "--iommu vtd,aw-bits=48",
    a4_57_bits => "--iommu vtd,aw-bits=57",
    a4_caching_mode_is_an_option => "--iommu vtd,caching-mode=off",
    a4_pass_through_is_an_option => "--iommu vtd,pt=off",
    a4_interrupt_remapping_is_an_option => "--iommu vtd,intremap=off",
    a5_events_come_up_masked,
    a5_nothing_runs_at_power_on,
    a5_capabilities_and_status_cannot_be_written,
    a5_registers_have_halves,
    a5_root_address_reads_back,
    a5_event_addresses_take_64_bits_at_once,
    a5_several_commands_in_one_write,
    a5_queue_starts_behind_a_tail_that_is_set,
    a5_queue_at_address_0,
);

fn a4_capabilities_agree_with_each_other() {
    let unit = Unit::new();
    check_eq!(unit.read32(VER), 0x10, "VER");
    let (sagaw, mgaw) = (unit.capability(8, 5), unit.capability(16, 6) + 1);
    check_eq!(sagaw & !0b1110, 0, "SAGAW bits that no width has");
    check_eq!(30 + 9 * u64::from(sagaw.ilog2()), mgaw, "the widest width of SAGAW");
    check_eq!(unit.capability(7, 1), 1, "CM");
    let records = unit.capability(24, 10) * 16;
    check!(
        records >= 0xc0 && records + 16 * unit.fault_records() <= 4096,
        "the fault records lie outside of the window"
    );
    check!(unit.capability(34, 4) == 0b11, "no leaves of 2 MiB and 1 GiB");
    check_eq!((unit.capability(39, 1), unit.capability(54, 2)), (1, 3), "PSI, DWD and DRD");
    check_eq!((unit.extended(0, 2), unit.extended(3, 2), unit.extended(6, 1)), (3, 3, 1), "C and QI, IR and EIM, PT");
}

fn width(bits: u64) {
    let unit = Unit::new();
    check_eq!(unit.capability(16, 6) + 1, bits, "MGAW");
    check_eq!(unit.capability(8, 5), (2 << ((bits - 30) / 9)) - 2, "SAGAW");
}

fn a4_39_bits() {
    width(39);
}

fn a4_48_bits() {
    width(48);
}

fn a4_57_bits() {
    width(57);
}

fn a4_caching_mode_is_an_option() {
    check_eq!(Unit::new().capability(7, 1), 0, "CM");
    // Then what was not present takes effect without an invalidation: nobody may cache it.
    let (world, domain) = World::with_domain();
    let page = page();
    world.not_mapped(IOVA, page);
    domain.map(IOVA, page, READ_WRITE);
    world.reaches(IOVA, page);
}

fn a4_pass_through_is_an_option() {
    let mut world = World::new();
    check_eq!(world.unit.extended(6, 1), 0, "PT");
    world.edu.fill(WRITTEN);
    let page = page();
    world.set_context(world.edu.sid, 2 << 2 | 1, u64::from(world.levels() - 2) | 1 << 8);
    world.unit.command(TRANSLATION, true);
    world.unit.invalidate_all();
    world.write_blocked(page, page, 3);
}

fn a4_interrupt_remapping_is_an_option() {
    let unit = Unit::new();
    check_eq!(unit.extended(3, 2), 0, "IR and EIM");
    unit.write32(GCMD, INTERRUPT_REMAPPING);
    check_eq!(unit.read32(GSTS) & INTERRUPT_REMAPPING, 0, "IRES");
}

fn a5_events_come_up_masked() {
    let unit = Unit::new();
    check_eq!((unit.read32(FECTL), unit.read32(IECTL)), (1 << 31, 1 << 31), "FECTL and IECTL");
}

fn a5_nothing_runs_at_power_on() {
    let unit = Unit::new();
    for (what, value) in [GSTS, FSTS, ICS].map(|offset| (offset, unit.read32(offset))) {
        check!(value == 0, "register {what:#x} is {value:#x}");
    }
    for (what, value) in [RTADDR, IQH, IQT, IQA, IRTA, IQERCD].map(|offset| (offset, unit.read64(offset))) {
        check!(value == 0, "register {what:#x} is {value:#x}");
    }
}

fn a5_capabilities_and_status_cannot_be_written() {
    let unit = Unit::new();
    let before = [CAP, ECAP, IQH].map(|offset| unit.read64(offset));
    for offset in [CAP, ECAP, IQH] {
        unit.write64(offset, !unit.read64(offset));
    }
    unit.write32(VER, u32::MAX);
    unit.write32(GSTS, u32::MAX);
    check_eq!([CAP, ECAP, IQH].map(|offset| unit.read64(offset)), before, "read-only registers");
    check_eq!((unit.read32(VER), unit.read32(GSTS)), (0x10, 0), "VER and GSTS");
}

fn a5_registers_have_halves() {
    let unit = Unit::new();
    for offset in [CAP, ECAP] {
        let halves = u64::from(unit.read32(offset)) | u64::from(unit.read32(offset + 4)) << 32;
        check_eq!(halves, unit.read64(offset), "the halves of a register");
    }
    unit.write32(RTADDR, 0x1234_5000);
    unit.write32(RTADDR + 4, 0x7);
    check_eq!(unit.read64(RTADDR), 0x7_1234_5000, "RTADDR");
}

fn a5_root_address_reads_back() {
    let unit = Unit::new();
    unit.write64(RTADDR, 0x1234_5000 | 3 << 10);
    check_eq!(unit.read64(RTADDR), 0x1234_5000 | 3 << 10, "RTADDR with its mode bits");
}

fn a5_event_addresses_take_64_bits_at_once() {
    let unit = Unit::new();
    for (address, upper) in [(FEADDR, FEUADDR), (IEADDR, IEUADDR)] {
        unit.write64(address, 0x1_fee0_1008);
        check_eq!((unit.read32(address), unit.read32(upper)), (0xfee0_1008, 1), "the address of an event");
    }
}

fn a5_several_commands_in_one_write() {
    let mut world = World::new();
    let domain = world.domain(1, world.levels());
    let page = page();
    domain.map(IOVA, page, READ_WRITE);
    world.unit.command(QUEUE, false);
    world.set_context(world.edu.sid, domain.root | 1, u64::from(domain.levels - 2) | 1 << 8);
    world.unit.write32(GCMD, QUEUE | ROOT_POINTER | TRANSLATION);
    let all = QUEUE | ROOT_POINTER | TRANSLATION;
    wait_for("three commands", || world.unit.read32(GSTS) & all == all);
    world.unit.set_tail(world.unit.read64(IQT) / 16);
    world.unit.invalidate_all();
    world.reaches(IOVA, page);
}

fn a5_queue_starts_behind_a_tail_that_is_set() {
    let (unit, queue, status) = (Unit::new(), page(), page());
    let [low, high] = wait_status(status, 7);
    store(queue, low);
    store(queue + 8, high);
    // As Windows does it: the tail first.
    unit.write64(IQA, queue);
    unit.write64(IQT, 16);
    unit.command(QUEUE, true);
    wait_for("the descriptor before the tail", || read::<u32>(status) == 7 && unit.read64(IQH) == 16);
}

fn a5_queue_at_address_0() {
    let (unit, status) = (Unit::new(), page());
    let [low, high] = wait_status(status, 9);
    unit.write64(IQA, 0);
    unit.write64(IQT, 0);
    unit.command(QUEUE, true);
    store_low(0, low);
    store_low(8, high);
    unit.write64(IQT, 16);
    wait_for("a descriptor at address 0", || load(status) == 9);
}

/// At address 0 a pointer is null, which compiled code may not follow.
fn store_low(at: u64, value: u64) {
    // SAFETY: the first page is memory that nobody uses after start-up.
    unsafe { core::arch::asm!("mov [{}], {}", in(reg) at, in(reg) value, options(nostack, preserves_flags)) }
}
