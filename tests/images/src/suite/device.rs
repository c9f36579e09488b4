//! F-1, F-2, F-3 and F-6: BARs and Memory Enable, Bus Master, and configuration space.

use core::sync::atomic::{AtomicU32, Ordering};

use images::memory::{load, page, store};
use images::pci::{BAR0, MASTER, MEMORY, SourceId};
use images::smp::beside;
use images::world::{UNTOUCHED, WRITTEN};
use images::x86::{read, write};
use images::{World, check, check_eq};

use super::concurrent::rounds;

images::tests!(
    f1_bar_answers_only_while_memory_is_enabled,
    f1_bar_moves,
    f2_disabled_memory_reads_ones_and_drops_writes,
    f3_memory_goes_off_and_on_under_accesses => "--cpus 2",
    f6_bus_master_off_stops_dma,
    f6_bar_size_is_told,
    f6_ecam_and_ports_agree => "--device edu",
    f6_nothing_is_where_no_function_is,
);

/// Identification of the device, at offset 0 of its BAR.
const IDENTIFICATION: u32 = 0x0100_00ed;
const LIVENESS: u64 = 4;

fn bar(sid: SourceId) -> u64 {
    u64::from(sid.read(BAR0) & !0xf)
}

fn f1_bar_answers_only_while_memory_is_enabled() {
    let world = World::new();
    for _ in 0..5 {
        check_eq!(world.edu.read(0), IDENTIFICATION, "the device");
        world.edu.sid.command(0, MEMORY);
        check_eq!(world.edu.read(0), u32::MAX, "a BAR without Memory Enable");
        world.edu.sid.command(MEMORY, 0);
    }
}

fn f1_bar_moves() {
    let world = World::new();
    let (sid, old) = (world.edu.sid, bar(world.edu.sid));
    let new = 0xd000_0000;
    sid.write(BAR0, new as u32);
    check_eq!(read::<u32>(new), IDENTIFICATION, "the device in its new place");
    check_eq!(read::<u32>(old), u32::MAX, "its old place");
    sid.write(BAR0, old as u32);
    check_eq!((read::<u32>(old), read::<u32>(new)), (IDENTIFICATION, u32::MAX), "both places");
}

fn f2_disabled_memory_reads_ones_and_drops_writes() {
    let world = World::new();
    let address = bar(world.edu.sid) + LIVENESS;
    write::<u32>(address, 5);
    check_eq!(read::<u32>(address), !5, "the liveness register");
    world.edu.sid.command(0, MEMORY);
    write::<u32>(address, 9);
    check_eq!(read::<u32>(address), u32::MAX, "a BAR without Memory Enable");
    world.edu.sid.command(MEMORY, 0);
    check_eq!(read::<u32>(address), !5, "the liveness register after a write that nobody heard");
}

/// Memory is enabled, disabled, or neither for certain: what the second processor relies on, and what it marks as its
/// value is written then.
const CHANGING: u32 = 0;
const ENABLED: u32 = 1;
const DISABLED: u32 = 2;

/// The second processor writes and reads a register without a pause. While memory is disabled it reads ones, and what
/// it wrote is never there; while it is enabled, what it wrote is there.
fn f3_memory_goes_off_and_on_under_accesses() {
    static PHASE: AtomicU32 = AtomicU32::new(CHANGING);
    let world = World::new();
    let (sid, register) = (world.edu.sid, bar(world.edu.sid) + LIVENESS);
    // Reads as the inverse of what was written.
    let content = move || !read::<u32>(register);
    let mut number = 0u32;
    let accesses = move || {
        let phase = PHASE.load(Ordering::SeqCst);
        number = number.wrapping_add(1);
        let value = number << 2 | phase;
        write::<u32>(register, value);
        let found = content();
        let right = match phase {
            ENABLED => found == value,
            DISABLED => found == !u32::MAX,
            _ => found & 3 != DISABLED,
        };
        check!(right, "{value:#x} was written, and {found:#x} is there");
    };
    beside(accesses, |second| {
        let mut go_on = rounds(2000, second);
        while go_on() {
            PHASE.store(ENABLED, Ordering::SeqCst);
            second.wait_for_rounds(1);
            PHASE.store(CHANGING, Ordering::SeqCst);
            second.wait_for_rounds(1);
            sid.command(0, MEMORY);
            PHASE.store(DISABLED, Ordering::SeqCst);
            second.wait_for_rounds(1);
            PHASE.store(CHANGING, Ordering::SeqCst);
            second.wait_for_rounds(1);
            sid.command(MEMORY, 0);
            let found = content();
            check!(found != !u32::MAX && found & 3 != DISABLED, "{found:#x} was written while memory was disabled");
        }
    });
}

fn f6_bus_master_off_stops_dma() {
    let world = World::new();
    let page = page();
    store(page, UNTOUCHED);
    world.edu.fill(WRITTEN);
    world.edu.sid.command(0, MASTER);
    check_eq!(world.edu.command() & MASTER, 0, "Bus Master");
    world.edu.dma_write(page, 8);
    check_eq!(load(page), UNTOUCHED, "memory");
    world.edu.sid.command(MASTER, 0);
    world.reaches(page, page);
}

fn f6_bar_size_is_told() {
    let sid = World::new().edu.sid;
    let address = sid.read(BAR0);
    check!(address & !0xf != 0, "firmware left no address in BAR 0");
    sid.command(0, MEMORY);
    sid.write(BAR0, u32::MAX);
    check_eq!(sid.read(BAR0), 0xfff0_0000, "the mask of BAR 0: 1 MiB");
    sid.write(BAR0, address);
    sid.command(MEMORY, 0);
    check_eq!(read::<u32>(u64::from(address)), IDENTIFICATION, "the device");
}

fn f6_ecam_and_ports_agree() {
    for slot in 0..32u64 {
        let sid = SourceId((slot << 3) as u16);
        for offset in [0, 4, 8, 0x10, 0x2c, 0x3c] {
            let address = 0xe000_0000 | slot << 15 | u64::from(offset);
            check_eq!(read::<u32>(address), sid.read(offset), "a register of configuration space");
        }
    }
}

fn f6_nothing_is_where_no_function_is() {
    let absent = SourceId(0x1e << 3);
    check_eq!(absent.read(0), u32::MAX, "vendor and device");
    absent.write(0x10, 0);
    check_eq!(read::<u32>(0xe000_0000 | 200 << 20), u32::MAX, "where configuration space of another bus would be");
}
