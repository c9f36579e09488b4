//! interrupt remapping: formats, entries, validation, faults, and what an invalidation moves.

use images::memory::{page, pages, store};
use images::vtd::offset::IRTA;
use images::vtd::{COMPATIBILITY, ENTRIES_GLOBAL, Fault, INTERRUPT_POINTER, INTERRUPT_REMAPPING, entries};
use images::x86::{enable_interrupts, interrupts, wait_for};
use images::{World, check, check_eq, harness};

images::tests!(
    a9_entry_delivers,
    a9_entry_delivers_with_32_bit_destinations,
    a9_compatibility_format_is_blocked,
    a9_compatibility_format_passes_when_it_is_allowed,
    a9_compatibility_format_never_passes_with_32_bit_destinations,
    a9_entry_not_present,
    a9_index_beyond_the_table,
    a9_last_entry_of_each_table_size,
    a9_table_outside_memory,
    a9_entry_reserved_bits,
    a9_posted_entry_is_not_offered,
    a9_request_reserved_bits,
    a9_subhandle_is_added,
    a9_subhandle_does_not_wrap,
    a9_source_is_validated,
    a9_source_is_validated_by_the_bits_that_count,
    a9_source_is_validated_by_bus,
    a9_silenced_entry_blocks_without_a_record,
    a9_entry_invalidation_moves_an_interrupt,
    a9_masked_entry_invalidation_moves_an_interrupt,
    a9_global_entry_invalidation_moves_an_interrupt,
    a9_entry_that_is_cleared_blocks,
    a9_dma_into_the_window_is_remapped_too,
    a9_no_fault_for_an_interrupt_that_does_not_fire,
    a9_new_table_takes_effect,
);

pub(super) const VECTOR: u8 = 0x81;
pub(super) const OTHER: u8 = 0x82;

/// A world with a table of 256 entries, remapping on.
pub(super) struct Remapped {
    pub(super) world: World,
    pub(super) table: u64,
    pub(super) id: u8,
}

/// The address of a request in remappable format.
fn request(handle: u16, subhandle: bool) -> u64 {
    0xfee0_0000 | 1 << 4 | u64::from(subhandle) << 3 | u64::from(handle & 0x7fff) << 5 | u64::from(handle >> 15) << 2
}

impl Remapped {
    pub(super) fn new() -> Self {
        Self::with(7, false)
    }

    /// For messages by DMA. Those of an assigned device are for its host's unit, which knows nothing of this guest's
    /// entries, and whose faults they become.
    fn recorded() -> Self {
        Self::of(World::recorded(), 7, false)
    }

    /// A table of `2 << size` entries, and destinations of 32 bits if `extended`.
    pub(super) fn with(size: u8, extended: bool) -> Self {
        Self::of(World::new(), size, extended)
    }

    fn of(world: World, size: u8, extended: bool) -> Self {
        if world.unit.extended(3, 1) == 0 {
            harness::skipped("the unit does not offer interrupt remapping");
        }
        let id = enable_interrupts();
        let table = pages((32u64 << size).div_ceil(4096), 4096);
        world.unit.write64(IRTA, table | u64::from(extended) << 11 | u64::from(size));
        world.unit.command(INTERRUPT_POINTER, true);
        world.unit.command(INTERRUPT_REMAPPING, true);
        let mut remapped = Self { world, table, id };
        remapped.world.unit.invalidate(&[ENTRIES_GLOBAL]);
        remapped
    }

    pub(super) fn entry(&self, vector: u8) -> u64 {
        1 | u64::from(vector) << 16 | u64::from(self.id) << 40
    }

    /// Writes an entry; the caller invalidates.
    pub(super) fn write(&self, index: u16, low: u64, high: u64) {
        let at = self.table + 16 * u64::from(index);
        store(at, 0);
        store(at + 8, high);
        store(at, low);
    }

    pub(super) fn set(&mut self, index: u16, low: u64, high: u64) {
        self.write(index, low, high);
        self.world.unit.invalidate(&[entries(index, 0)]);
    }

    /// The device's interrupt arrives as `vector`, once.
    pub(super) fn arrives(&self, vector: u8) {
        let before = interrupts(vector);
        self.world.edu.interrupt();
        wait_for("an interrupt", || interrupts(vector) == before + 1);
        self.world.no_fault();
    }

    /// The device's interrupt is blocked, with this reason and index.
    pub(super) fn blocked(&self, reason: u8, index: u16) {
        let before = [VECTOR, OTHER].map(interrupts);
        self.world.edu.interrupt();
        self.fault(reason, index);
        self.world.edu.settle();
        check_eq!([VECTOR, OTHER].map(interrupts), before, "interrupts");
    }

    fn fault(&self, reason: u8, index: u16) {
        let mut found = None;
        wait_for("the fault of an interrupt", || {
            found = self.world.unit.take_fault();
            found.is_some()
        });
        let expected = Fault { source: self.world.edu.sid, reason, info: u64::from(index) << 48, read: false };
        check_eq!(found, Some(expected), "the fault");
        self.world.no_fault();
    }

    /// The device sends messages to entry `handle`.
    pub(super) fn use_entry(&self, handle: u16) {
        self.world.edu.set_message(request(handle, false), 0);
    }
}

fn a9_entry_delivers() {
    let mut remapped = Remapped::new();
    remapped.set(3, remapped.entry(VECTOR), 0);
    remapped.use_entry(3);
    for _ in 0..10 {
        remapped.arrives(VECTOR);
    }
}

fn a9_entry_delivers_with_32_bit_destinations() {
    let mut remapped = Remapped::with(7, true);
    if remapped.world.unit.extended(4, 1) == 0 {
        harness::skipped("the unit does not offer extended interrupt mode");
    }
    remapped.set(3, 1 | u64::from(VECTOR) << 16 | u64::from(remapped.id) << 32, 0);
    remapped.use_entry(3);
    remapped.arrives(VECTOR);
    // Bits that are reserved with destinations of 8 bits name a processor that is not there: nobody gets it, and that
    // is no fault.
    remapped.set(3, 1 | u64::from(VECTOR) << 16 | 0x00ff_0001 << 32, 0);
    remapped.world.edu.interrupt();
    remapped.world.edu.settle();
    remapped.world.no_fault();
    check_eq!(interrupts(VECTOR), 1, "interrupts");
}

fn compatible(remapped: &Remapped) {
    remapped.world.edu.set_message(0xfee0_0000 | u64::from(remapped.id) << 12, VECTOR.into());
}

fn a9_compatibility_format_is_blocked() {
    let remapped = Remapped::new();
    compatible(&remapped);
    remapped.blocked(0x25, 0);
    // Without remapping it passes.
    remapped.world.unit.command(INTERRUPT_REMAPPING, false);
    remapped.arrives(VECTOR);
}

fn a9_compatibility_format_passes_when_it_is_allowed() {
    let remapped = Remapped::new();
    compatible(&remapped);
    remapped.world.unit.command(COMPATIBILITY, true);
    remapped.arrives(VECTOR);
    remapped.world.unit.command(COMPATIBILITY, false);
    remapped.blocked(0x25, 0);
}

fn a9_compatibility_format_never_passes_with_32_bit_destinations() {
    let remapped = Remapped::with(7, true);
    compatible(&remapped);
    remapped.world.unit.command(COMPATIBILITY, true);
    remapped.blocked(0x25, 0);
}

fn a9_entry_not_present() {
    let mut remapped = Remapped::new();
    remapped.use_entry(0x42);
    remapped.blocked(0x22, 0x42);
    remapped.set(0x42, remapped.entry(VECTOR), 0);
    remapped.arrives(VECTOR);
}

fn a9_index_beyond_the_table() {
    let remapped = Remapped::with(0, false);
    for handle in [2, 3, 0x7fff, 0x8000, 0xffff] {
        remapped.use_entry(handle);
        remapped.blocked(0x21, handle);
    }
}

fn a9_last_entry_of_each_table_size() {
    for size in [0, 7, 8, 15] {
        let mut remapped = Remapped::with(size, false);
        let last = ((2u32 << size) - 1) as u16;
        remapped.set(last, remapped.entry(VECTOR), 0);
        remapped.use_entry(last);
        remapped.arrives(VECTOR);
        remapped.world.unit.command(INTERRUPT_REMAPPING, false);
        remapped.world.unit.command(images::vtd::QUEUE, false);
    }
}

fn a9_table_outside_memory() {
    let remapped = Remapped::new();
    remapped.world.unit.write64(IRTA, 0x8_0000_0000 | 7);
    remapped.world.unit.command(INTERRUPT_POINTER, true);
    remapped.use_entry(5);
    remapped.blocked(0x23, 5);
}

fn a9_entry_reserved_bits() {
    let mut remapped = Remapped::new();
    remapped.use_entry(1);
    let good = remapped.entry(VECTOR);
    let low = [12, 13, 14, 24, 31, 32, 39, 48, 63].map(|bit| (good | 1 << bit, 0));
    let high = [20, 32, 63].map(|bit| (good, 1u64 << bit));
    // Delivery modes 3 and 6, and validation type 3, are reserved values.
    let values = [(good | 3 << 5, 0), (good | 6 << 5, 0), (good, 3 << 18)];
    for (low, high) in low.into_iter().chain(high).chain(values) {
        remapped.set(1, low, high);
        remapped.blocked(0x24, 1);
    }
    // Bits 11:8 are for software.
    remapped.set(1, good | 0xf << 8, 0);
    remapped.arrives(VECTOR);
}

fn a9_posted_entry_is_not_offered() {
    let mut remapped = Remapped::new();
    if remapped.world.unit.capability(59, 1) == 1 {
        harness::skipped("the unit offers posted interrupts");
    }
    remapped.use_entry(1);
    remapped.set(1, remapped.entry(VECTOR) | 1 << 15, 0);
    remapped.blocked(0x24, 1);
}

/// The device writes the message `data` to `address` by DMA: then it can have all 32 bits.
fn send(remapped: &Remapped, address: u64, data: u32) {
    remapped.world.edu.fill(data.into());
    remapped.world.edu.dma_write(address, 4);
}

fn a9_request_reserved_bits() {
    let mut remapped = Remapped::recorded();
    remapped.set(4, remapped.entry(VECTOR), 0);
    send(&remapped, request(4, true), 0);
    wait_for("an interrupt", || interrupts(VECTOR) == 1);
    send(&remapped, request(4, true), 1 << 16);
    remapped.fault(0x20, 0);
    check_eq!(interrupts(VECTOR), 1, "interrupts");
    // Without a subhandle the data does not matter.
    send(&remapped, request(4, false), 0xffff_ffff);
    wait_for("an interrupt", || interrupts(VECTOR) == 2);
    remapped.world.no_fault();
}

fn a9_subhandle_is_added() {
    let mut remapped = Remapped::new();
    remapped.set(4, remapped.entry(OTHER), 0);
    remapped.set(9, remapped.entry(VECTOR), 0);
    remapped.world.edu.set_message(request(4, true), 5);
    remapped.arrives(VECTOR);
    // Without the valid bit it counts for nothing.
    remapped.world.edu.set_message(request(4, false), 5);
    remapped.arrives(OTHER);
}

fn a9_subhandle_does_not_wrap() {
    let mut remapped = Remapped::with(15, false);
    remapped.set(1, remapped.entry(VECTOR), 0);
    remapped.world.edu.set_message(request(0xffff, true), 2);
    remapped.blocked(0x21, 0xffff);
}

fn a9_source_is_validated() {
    let mut remapped = Remapped::new();
    let sid = u64::from(remapped.world.edu.sid.0);
    remapped.use_entry(1);
    remapped.set(1, remapped.entry(VECTOR), 1 << 18 | sid);
    remapped.arrives(VECTOR);
    for bit in [0, 3, 8, 15] {
        remapped.set(1, remapped.entry(VECTOR), 1 << 18 | sid ^ 1 << bit);
        remapped.blocked(0x26, 1);
    }
}

fn a9_source_is_validated_by_the_bits_that_count() {
    let mut remapped = Remapped::new();
    let sid = u64::from(remapped.world.edu.sid.0);
    remapped.use_entry(1);
    for (qualifier, ignored) in [(0u64, 0u64), (1, 0b100), (2, 0b110), (3, 0b111)] {
        for difference in 0..8 {
            remapped.set(1, remapped.entry(VECTOR), 1 << 18 | qualifier << 16 | sid ^ difference);
            match difference & !ignored {
                0 => remapped.arrives(VECTOR),
                _ => remapped.blocked(0x26, 1),
            }
        }
    }
}

fn a9_source_is_validated_by_bus() {
    let mut remapped = Remapped::new();
    remapped.use_entry(1);
    // The first bus is in the upper byte: the device is on bus 0.
    for (first, last, allowed) in [(0u64, 0u64, true), (0, 255, true), (1, 255, false), (1, 0, false)] {
        remapped.set(1, remapped.entry(VECTOR), 2 << 18 | first << 8 | last);
        match allowed {
            true => remapped.arrives(VECTOR),
            false => remapped.blocked(0x26, 1),
        }
    }
}

fn a9_silenced_entry_blocks_without_a_record() {
    let mut remapped = Remapped::new();
    remapped.use_entry(1);
    for entry in [2, remapped.entry(VECTOR) | 2 | 1 << 24] {
        remapped.set(1, entry, 0);
        remapped.world.edu.interrupt();
        remapped.world.edu.settle();
        remapped.world.no_fault();
        check_eq!(interrupts(VECTOR), 0, "interrupts");
    }
    // What is found before the entry is not silenced.
    remapped.use_entry(0x100);
    remapped.blocked(0x21, 0x100);
}

fn moved(descriptor: images::vtd::Descriptor) {
    let mut remapped = Remapped::new();
    remapped.set(0x13, remapped.entry(VECTOR), 0);
    remapped.use_entry(0x13);
    remapped.arrives(VECTOR);
    remapped.write(0x13, remapped.entry(OTHER), 0);
    remapped.world.unit.invalidate(&[descriptor]);
    remapped.arrives(OTHER);
    check_eq!(interrupts(VECTOR), 1, "interrupts of the old vector");
}

fn a9_entry_invalidation_moves_an_interrupt() {
    moved(entries(0x13, 0));
}

fn a9_masked_entry_invalidation_moves_an_interrupt() {
    moved(entries(0x10, 3));
}

fn a9_global_entry_invalidation_moves_an_interrupt() {
    moved(ENTRIES_GLOBAL);
}

fn a9_entry_that_is_cleared_blocks() {
    let mut remapped = Remapped::new();
    remapped.set(1, remapped.entry(VECTOR), 0);
    remapped.use_entry(1);
    remapped.arrives(VECTOR);
    remapped.set(1, 0, 0);
    remapped.blocked(0x22, 1);
    remapped.set(1, remapped.entry(OTHER), 0);
    remapped.arrives(OTHER);
}

fn a9_dma_into_the_window_is_remapped_too() {
    let mut remapped = Remapped::recorded();
    remapped.set(1, remapped.entry(VECTOR), 0);
    send(&remapped, 0xfee0_0000 | u64::from(remapped.id) << 12, OTHER.into());
    remapped.fault(0x25, 0);
    check_eq!(interrupts(OTHER), 0, "interrupts that went around the table");
    send(&remapped, request(1, false), 0);
    wait_for("an interrupt", || interrupts(VECTOR) == 1);
}

fn a9_no_fault_for_an_interrupt_that_does_not_fire() {
    let mut remapped = Remapped::new();
    remapped.use_entry(1);
    for low in [0, remapped.entry(VECTOR) | 1 << 24, remapped.entry(VECTOR)] {
        remapped.set(1, low, 0);
        remapped.world.unit.invalidate(&[ENTRIES_GLOBAL]);
        remapped.world.edu.settle();
        remapped.world.no_fault();
    }
    remapped.arrives(VECTOR);
}

fn a9_new_table_takes_effect() {
    let mut remapped = Remapped::new();
    remapped.set(1, remapped.entry(VECTOR), 0);
    remapped.use_entry(1);
    remapped.arrives(VECTOR);
    remapped.table = page();
    remapped.write(1, remapped.entry(OTHER), 0);
    remapped.world.unit.write64(IRTA, remapped.table | 6);
    remapped.arrives(VECTOR);
    remapped.world.unit.command(INTERRUPT_POINTER, true);
    remapped.world.unit.invalidate(&[ENTRIES_GLOBAL]);
    remapped.arrives(OTHER);
    check!(interrupts(VECTOR) == 2, "the old table is still in use");
}
