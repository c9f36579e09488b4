//! posted interrupts: what a message leaves in the descriptor of its entry, and who is notified.

use images::edu::Edu;
use images::memory::{load, page, store};
use images::vtd::{ENTRIES_GLOBAL, Unit, entries};
use images::x86::{enable_interrupts, interrupts, wait_for, write};
use images::{check_eq, harness, println};

use super::interrupts::{IOAPIC, IOAPIC_SOURCE, by_level, pin, remapping, route};
use super::remapping::{OTHER, Remapped, VECTOR};

images::tests!(
    a17_message_is_posted_and_notified_of => "--iommu vtd,posted=on",
    a17_notification_that_is_suppressed => "--iommu vtd,posted=on",
    a17_notification_with_32_bit_destinations => "--iommu vtd,posted=on",
    a17_descriptor_that_is_wrong_is_a_fault => "--iommu vtd,posted=on",
    a17_entry_that_is_wrong_is_a_fault => "--iommu vtd,posted=on",
    a17_invalidation_moves_a_posted_interrupt => "--iommu vtd,posted=on",
    a17_line_is_posted => "--iommu vtd,posted=on",
    a17_posting_goes_on => "--iommu vtd,posted=on",
);

/// The vector of notifications.
const NOTICE: u8 = 0x83;
/// IM of an entry.
const POSTED: u64 = 1 << 15;
/// URG.
const URGENT: u64 = 1 << 14;
/// ON, in the fifth word of a descriptor.
const OUTSTANDING: u64 = 1 << 0;
/// SN.
const SUPPRESSED: u64 = 1 << 1;

/// A posted interrupt descriptor. Section 9.12.
struct Descriptor {
    at: u64,
    /// NV and NDST.
    to: u64,
}

impl Descriptor {
    /// For the processor with this id.
    fn new(id: u8) -> Self {
        Self::of(page() + 64, u64::from(id) << 40)
    }

    /// With these bits 63:32 of the word that has ON.
    fn of(at: u64, destination: u64) -> Self {
        let descriptor = Self { at, to: u64::from(NOTICE) << 16 | destination };
        descriptor.control(0);
        descriptor
    }

    /// Writes the word with ON and SN.
    fn control(&self, bits: u64) {
        store(self.at + 32, self.to | bits);
    }

    /// Both halves of an entry that posts `vector`.
    fn entry(&self, vector: u8) -> (u64, u64) {
        (1 | POSTED | u64::from(vector) << 16 | (self.at & 0xffff_ffc0) << 32, self.at >> 32 << 32)
    }

    /// Whether it has exactly these vectors, and these of ON and SN.
    fn has(&self, vectors: &[u8], bits: u64) -> bool {
        let mut words = [0u64; 8];
        words[4] = self.to | bits;
        vectors.iter().for_each(|vector| words[usize::from(vector / 64)] |= 1 << (vector % 64));
        (0..8).all(|word| load(self.at + 8 * word) == words[word as usize])
    }

    /// Takes out what is there, as who is notified does: ON first.
    fn take(&self) {
        self.control(0);
        (0..4).for_each(|word| store(self.at + 8 * word, 0));
    }
}

/// A world that remaps, with a descriptor that entry 3 posts [`VECTOR`] into and entry 4 [`OTHER`].
fn posting() -> (Remapped, Descriptor) {
    let mut remapped = offered(Remapped::new());
    let descriptor = Descriptor::new(remapped.id);
    for (index, vector) in [(3, VECTOR), (4, OTHER)] {
        let (low, high) = descriptor.entry(vector);
        remapped.set(index, low, high);
    }
    remapped.use_entry(3);
    (remapped, descriptor)
}

fn offered(remapped: Remapped) -> Remapped {
    if remapped.world.unit.capability(59, 1) == 0 {
        harness::skipped("the unit does not offer posted interrupts");
    }
    remapped
}

/// The device interrupts, and these vectors and bits are in the descriptor after that. Nobody gets the vector itself,
/// and there were so many notifications in all.
fn leaves(remapped: &Remapped, descriptor: &Descriptor, vectors: &[u8], bits: u64, notices: u64) {
    remapped.world.edu.interrupt();
    wait_for("the bit of a posted interrupt", || descriptor.has(vectors, bits));
    if interrupts(NOTICE) < notices {
        wait_for("a notification", || interrupts(NOTICE) == notices);
    } else {
        remapped.world.edu.settle();
    }
    let seen = (interrupts(NOTICE), interrupts(VECTOR), interrupts(OTHER));
    check_eq!(seen, (notices, 0, 0), "notifications, and interrupts of the vectors that are posted");
    remapped.world.no_fault();
}

fn a17_message_is_posted_and_notified_of() {
    let (remapped, descriptor) = posting();
    leaves(&remapped, &descriptor, &[VECTOR], OUTSTANDING, 1);
    // While a notification is outstanding there is none.
    remapped.use_entry(4);
    leaves(&remapped, &descriptor, &[VECTOR, OTHER], OUTSTANDING, 1);
    for notices in 2..5 {
        descriptor.take();
        leaves(&remapped, &descriptor, &[OTHER], OUTSTANDING, notices);
    }
}

fn a17_notification_that_is_suppressed() {
    let (mut remapped, descriptor) = posting();
    descriptor.control(SUPPRESSED);
    leaves(&remapped, &descriptor, &[VECTOR], SUPPRESSED, 0);
    let (low, high) = descriptor.entry(OTHER);
    remapped.set(4, low | URGENT, high);
    remapped.use_entry(4);
    leaves(&remapped, &descriptor, &[VECTOR, OTHER], SUPPRESSED | OUTSTANDING, 1);
}

fn a17_notification_with_32_bit_destinations() {
    let mut remapped = offered(Remapped::with(7, true));
    if remapped.world.unit.extended(4, 1) == 0 {
        harness::skipped("the unit does not offer extended interrupt mode");
    }
    let descriptor = Descriptor::of(page(), u64::from(remapped.id) << 32);
    let (low, high) = descriptor.entry(VECTOR);
    remapped.set(3, low, high);
    remapped.use_entry(3);
    leaves(&remapped, &descriptor, &[VECTOR], OUTSTANDING, 1);
    // A processor that is not there is no fault.
    let nobody = Descriptor::of(page(), 0x00ff_0001 << 32);
    let (low, high) = nobody.entry(VECTOR);
    remapped.set(3, low, high);
    leaves(&remapped, &nobody, &[VECTOR], OUTSTANDING, 1);
}

fn a17_descriptor_that_is_wrong_is_a_fault() {
    let (mut remapped, descriptor) = posting();
    // No memory, the interrupt window, the unit's own registers.
    for at in [0x8_0000_0000, 0xfee0_0000, 0xfed9_0000] {
        let (low, high) = Descriptor { at, to: 0 }.entry(VECTOR);
        remapped.set(5, low, high);
        remapped.use_entry(5);
        remapped.blocked(0x27, 5);
    }
    remapped.use_entry(3);
    for bit in [2, 15, 24, 31, 32, 39, 48, 63] {
        descriptor.control(1 << bit);
        remapped.blocked(0x28, 3);
        check_eq!(descriptor.has(&[], 1 << bit), true, "nothing is written");
    }
    descriptor.control(0);
    for word in 5..8 {
        store(descriptor.at + 8 * word, 1 << 40);
        remapped.blocked(0x28, 3);
        check_eq!(load(descriptor.at + 8), 0, "nothing is written");
        store(descriptor.at + 8 * word, 0);
    }
    check_eq!(interrupts(NOTICE), 0, "notifications");
    leaves(&remapped, &descriptor, &[VECTOR], OUTSTANDING, 1);
}

fn a17_entry_that_is_wrong_is_a_fault() {
    let (mut remapped, descriptor) = posting();
    let (good, high) = descriptor.entry(VECTOR);
    let low = [2, 7, 12, 13, 24, 37].map(|bit| (good | 1 << bit, high));
    // Bits 127:116 are above the widest address.
    let upper = [20, 31, 52, 63].map(|bit| (good, high | 1u64 << bit));
    for (low, high) in low.into_iter().chain(upper).chain([(good, high | 3 << 18)]) {
        remapped.set(3, low, high);
        remapped.blocked(0x24, 3);
    }
    let sid = u64::from(remapped.world.edu.sid.0);
    remapped.set(3, good, high | 1 << 18 | sid ^ 1);
    remapped.blocked(0x26, 3);
    check_eq!(descriptor.has(&[], 0), true, "nothing is written");
    // The right source; bits 11:8 are for software.
    remapped.set(3, good | 0xf << 8, high | 1 << 18 | sid);
    leaves(&remapped, &descriptor, &[VECTOR], OUTSTANDING, 1);
}

fn a17_invalidation_moves_a_posted_interrupt() {
    let (mut remapped, descriptor) = posting();
    leaves(&remapped, &descriptor, &[VECTOR], OUTSTANDING, 1);
    let other = Descriptor::new(remapped.id);
    for (descriptor, notices, invalidation) in [(&other, 2, entries(3, 0)), (&descriptor, 3, ENTRIES_GLOBAL)] {
        descriptor.take();
        let (low, high) = descriptor.entry(OTHER);
        remapped.write(3, low, high);
        remapped.world.unit.invalidate(&[invalidation]);
        leaves(&remapped, descriptor, &[OTHER], OUTSTANDING, notices);
    }
    descriptor.take();
    remapped.set(3, remapped.entry(VECTOR), 0);
    remapped.arrives(VECTOR);
    check_eq!((interrupts(NOTICE), descriptor.has(&[], 0)), (3, true), "what is remapped is not posted");
    remapped.set(3, 0, 0);
    remapped.blocked(0x22, 3);
}

fn a17_line_is_posted() {
    let (edu, id, mut unit) = (Edu::first(), enable_interrupts(), Unit::new());
    if unit.capability(59, 1) == 0 {
        harness::skipped("the unit does not offer posted interrupts");
    }
    let table = remapping(&mut unit);
    let descriptor = Descriptor::new(id);
    let (low, high) = descriptor.entry(VECTOR);
    store(table + 16 * 6 + 8, high | 1 << 18 | IOAPIC_SOURCE);
    store(table + 16 * 6, low);
    unit.invalidate(&[ENTRIES_GLOBAL]);
    route(pin(edu.sid), u32::from(VECTOR) | by_level(&edu) << 15, 6 << 17 | 1 << 16);
    for round in 1..=3 {
        edu.raise();
        wait_for("the bit of a posted interrupt", || descriptor.has(&[VECTOR], OUTSTANDING));
        wait_for("a notification", || interrupts(NOTICE) == round);
        edu.acknowledge();
        descriptor.take();
        // To the processor it was an edge: whoever has a level posted tells its end to the IOAPIC. Section 5.2.6.
        write::<u32>(IOAPIC + 0x40, VECTOR.into());
        edu.settle();
        check_eq!(descriptor.has(&[], 0), true, "a line that is low posts nothing");
    }
    check_eq!((interrupts(VECTOR), unit.take_fault()), (0, None), "interrupts of the posted vector, and a fault");
}

/// Interrupts of which none is lost, however often the machine is saved and put back meanwhile.
fn a17_posting_goes_on() {
    let (remapped, descriptor) = posting();
    let rounds = harness::number("rounds=").unwrap_or(20);
    for round in 1..=rounds {
        leaves(&remapped, &descriptor, &[VECTOR], OUTSTANDING, round);
        descriptor.take();
    }
    println!("posted {rounds}");
}
