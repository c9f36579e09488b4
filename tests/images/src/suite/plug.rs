//! F-3: a card goes from its slot and comes again while another processor accesses it without a pause.

use core::sync::atomic::{AtomicU32, Ordering};

use images::pci::{BAR0, MASTER, MEMORY, SourceId};
use images::smp::{Other, beside};
use images::x86::{read, wait_for, write};
use images::{check, check_eq, harness, println};

use super::concurrent::rounds;

images::tests!(
    f3_card_goes_and_comes_under_accesses => "--cpus 2 --root-ports 1 --device edu,port=1",
);

/// Identification of the device, at offset 0 of its BAR, and a register that is read inverted.
const IDENTIFICATION: u32 = 0x0100_00ed;
const LIVENESS: u64 = 4;
/// PCI Express capability of the port: slot control, with slot status above it.
const EXPRESS: u8 = 0x10;
const SLOT_CONTROL: u16 = 0x18;
const POWER_OFF: u32 = 1 << 10;
/// Slot status: the attention button was pressed, a card came or went; a card is there.
const BUTTON: u32 = 1 << 16;
const PRESENCE: u32 = 1 << 19;
const PRESENT: u32 = 1 << 22;

/// The card is reached, is not, or neither for certain: what the second processor relies on, and what it marks as its
/// value is written then.
const CHANGING: u32 = 0;
const REACHED: u32 = 1;
const GONE: u32 = 2;
static PHASE: AtomicU32 = AtomicU32::new(CHANGING);

/// A root port with an edu in its slot.
struct Slot {
    port: SourceId,
    control: u16,
    card: SourceId,
    bar: u32,
}

impl Slot {
    fn first() -> Self {
        let port = SourceId::root_ports().next().unwrap_or_else(|| harness::skipped("there is no root port"));
        let express = port.capability(EXPRESS).unwrap_or_else(|| panic!("the port has no Express capability"));
        let card = SourceId(u16::from(port.buses().0) << 8);
        let slot = Self { port, control: express + SLOT_CONTROL, card, bar: card.read(BAR0) & !0xf };
        check!(slot.bar != 0, "firmware left no address in BAR 0");
        slot.configure();
        check_eq!(read::<u32>(slot.bar.into()), IDENTIFICATION, "the card");
        slot
    }

    fn events(&self) -> u32 {
        self.port.read(self.control) & (BUTTON | PRESENCE)
    }

    fn has_card(&self) -> bool {
        self.port.read(self.control) & PRESENT != 0
    }

    /// Switches the slot's power, and forgets the events in `clear`.
    fn power(&self, on: bool, clear: u32) {
        let control = self.port.read(self.control) & 0xffff & !POWER_OFF;
        self.port.write(self.control, clear | control | if on { 0 } else { POWER_OFF });
    }

    /// After a reset: the address, and memory.
    fn configure(&self) {
        self.card.write(BAR0, self.bar);
        self.card.command(MEMORY | MASTER, 0);
    }

    /// What the second processor wrote last; 0 where nobody answers.
    fn content(&self) -> u32 {
        !read::<u32>(u64::from(self.bar) + LIVENESS)
    }

    /// The second processor relies on it that nobody is reached, for a while.
    fn is_gone(&self, second: &Other) {
        PHASE.store(GONE, Ordering::SeqCst);
        second.wait_for_rounds(1);
        PHASE.store(CHANGING, Ordering::SeqCst);
        second.wait_for_rounds(1);
    }

    /// Whatever was written while nobody was there was heard by nobody.
    fn is_back(&self) -> u32 {
        let found = self.content();
        check!(found & 3 != GONE, "{found:#x} was written while nobody could hear it");
        found
    }

    /// Does what the slot's events ask for: a card that is asked for is let go of, and one that comes is used.
    fn attend(&self, second: &Other) -> bool {
        let events = self.events();
        if events == 0 {
            return false;
        }
        self.power(false, 0);
        self.is_gone(second);
        if events & PRESENCE == 0 {
            wait_for("the card is taken", || self.events() & PRESENCE != 0);
        }
        wait_for("a card comes", || self.has_card());
        self.is_gone(second);
        self.power(true, BUTTON | PRESENCE);
        self.configure();
        self.is_back();
        true
    }
}

/// The second processor writes and reads a register without a pause. Memory goes off and on, the bus is reset, and the
/// slot loses its power and has it again: while nobody is reached it reads ones, and what it wrote is never there;
/// otherwise what it wrote is there.
///
/// With `outside=1` on the command line this goes on for ever, and who looks after the machine takes the card, also by
/// surprise, and puts another one there.
fn f3_card_goes_and_comes_under_accesses() {
    let slot = Slot::first();
    let from_outside = harness::number("outside=").is_some();
    let register = u64::from(slot.bar) + LIVENESS;
    let mut number = 0u32;
    let accesses = move || {
        let phase = PHASE.load(Ordering::SeqCst);
        number = number.wrapping_add(1);
        let value = number << 2 | phase;
        write::<u32>(register, value);
        let found = !read::<u32>(register);
        let right = match phase {
            REACHED => found == value || (found == 0 && from_outside),
            GONE => found == 0,
            _ => found & 3 != GONE,
        };
        check!(right, "in phase {phase} {value:#x} was written, and {found:#x} is there");
    };
    beside(accesses, |second| {
        let mut go_on = rounds(2000, second);
        let (mut change, mut cards) = (0u32, 0u32);
        while from_outside || go_on() {
            PHASE.store(REACHED, Ordering::SeqCst);
            second.wait_for_rounds(1);
            PHASE.store(CHANGING, Ordering::SeqCst);
            second.wait_for_rounds(1);
            match change % 3 {
                0 => slot.card.command(0, MEMORY),
                1 => slot.port.hold_in_reset(true),
                _ => slot.power(false, 0),
            }
            slot.is_gone(second);
            match change % 3 {
                0 => {}
                1 => slot.port.hold_in_reset(false),
                _ => slot.power(true, 0),
            }
            let bar = slot.card.read(BAR0);
            let is_reset = bar & !0xf == 0 || (from_outside && bar == u32::MAX);
            check!(change % 3 == 0 || is_reset, "BAR 0 is {bar:#x} behind a bus that was reset or without power");
            slot.configure();
            let found = slot.is_back();
            check!(found != 0 || from_outside, "the card does not answer");
            change += 1;
            if from_outside && slot.attend(second) {
                cards += 1;
                println!("card {cards} after {change} changes");
            }
        }
        check!(change >= 3, "there was no time for each of the changes");
    });
}
