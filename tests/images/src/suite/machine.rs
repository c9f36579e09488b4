//! The machine around the unit: its memory, its timer and clock, and what a processor sends itself.

use images::harness::memory_map;
use images::x86::{NMI, Stopwatch, enable_interrupts, inb, interrupts, outb, pause, send_nmi, wait_for};
use images::{check, check_eq};

use super::interrupts::route;

images::tests!(
    machine_memory_of_one_gib => "--memory 1G",
    machine_memory_goes_on_above_4_gib => "--memory 5G",
    machine_nmi_to_itself_arrives,
    machine_timer_ticks_at_pin_2,
    machine_timer_fires_once,
    machine_timer_measures_by_its_second_channel,
    machine_clock_interrupts_each_second_at_pin_8,
);

const VECTOR: u8 = 0x92;
const GIB: u64 = 1 << 30;
/// What firmware may keep for itself.
const KEPT: u64 = 2 << 20;

/// The map has that much memory, of which it gives back what lies above 4 GiB.
fn memory_of(size: u64) -> u64 {
    let ram = || memory_map().filter(|(_, _, kind)| *kind == 1);
    let total: u64 = ram().map(|(_, len, _)| len).sum();
    check!(total <= size && total + KEPT >= size, "{total:#x} bytes of memory instead of {size:#x}");
    ram().filter(|(first, _, _)| *first >= 4 * GIB).map(|(_, len, _)| len).sum()
}

fn machine_memory_of_one_gib() {
    check_eq!(memory_of(GIB), 0, "bytes above 4 GiB");
}

fn machine_memory_goes_on_above_4_gib() {
    let above = memory_of(5 * GIB);
    check!((GIB..5 * GIB).contains(&above), "{above:#x} bytes above 4 GiB");
}

fn machine_nmi_to_itself_arrives() {
    let id = enable_interrupts();
    for round in 1..=3 {
        send_nmi(id);
        wait_for("the NMI", || interrupts(NMI) == round);
    }
}

/// Ports of the timer.
const CHANNEL_0: u16 = 0x40;
const CHANNEL_2: u16 = 0x42;
const CONTROL: u16 = 0x43;
const SYSTEM: u16 = 0x61;
/// Ticks of 10 ms.
const TEN_MS: u16 = 11_932;

fn start(control: u8, channel: u16, count: u16) {
    outb(CONTROL, control);
    count.to_le_bytes().iter().for_each(|byte| outb(channel, *byte));
}

/// Waits until it is so; gives how many milliseconds that took.
fn time_until(what: &str, mut done: impl FnMut() -> bool) -> u32 {
    let (mut watch, mut before) = (Stopwatch::start(), 0);
    wait_for(what, || {
        // It wraps after some seconds.
        if watch.ms() >= 1000 {
            before += watch.ms();
            watch = Stopwatch::start();
        }
        done()
    });
    before + watch.ms()
}

fn machine_timer_ticks_at_pin_2() {
    let id = enable_interrupts();
    start(0x34, CHANNEL_0, TEN_MS);
    route(2, VECTOR.into(), u32::from(id) << 24);
    let took = time_until("ten ticks", || interrupts(VECTOR) >= 10);
    // The first may be one that was due when the pin was unmasked.
    check!(took >= 85, "ten ticks of 10 ms came in {took} ms");
}

fn machine_timer_fires_once() {
    let id = enable_interrupts();
    route(2, VECTOR.into(), u32::from(id) << 24);
    for round in 1..=2 {
        start(0x30, CHANNEL_0, TEN_MS);
        let took = time_until("the timer", || interrupts(VECTOR) >= round);
        check!(took >= 9, "10 ms took {took} ms");
        // Longer than the counter takes to wrap.
        pause(80);
        check_eq!(interrupts(VECTOR), round, "interrupts of one count each");
    }
}

fn machine_timer_measures_by_its_second_channel() {
    outb(SYSTEM, 0);
    start(0xb0, CHANNEL_2, 5 * TEN_MS);
    pause(60);
    check_eq!(inb(SYSTEM) & 0x21, 0, "it does not count while its gate is low");
    outb(SYSTEM, 1);
    let took = time_until("the output of channel 2", || inb(SYSTEM) & 0x20 != 0);
    check!(took >= 49, "50 ms took {took} ms");
}

/// A register of the clock.
fn clock(register: u8) -> u8 {
    outb(0x70, register);
    inb(0x71)
}

fn machine_clock_interrupts_each_second_at_pin_8() {
    let id = enable_interrupts();
    // Month, day, hour, minute, second: decimal digits, as far as they go.
    for (register, most) in [(8, 0x12), (7, 0x31), (4, 0x23), (2, 0x59), (0, 0x59)] {
        check!(clock(register) <= most, "register {register} of the clock is {:#x}", clock(register));
    }
    route(8, VECTOR.into(), u32::from(id) << 24);
    clock(0x0c);
    // Register B: an interrupt at each update; 24 hours.
    outb(0x70, 0x0b);
    outb(0x71, 0x12);
    wait_for("the clock", || interrupts(VECTOR) == 1);
    let second = clock(0);
    pause(1500);
    check_eq!(interrupts(VECTOR), 1, "interrupts before register C was read");
    check!(clock(0) != second, "the clock stands still");
    check_eq!(clock(0x0c) & 0x90, 0x90, "register C");
    wait_for("the clock again", || interrupts(VECTOR) == 2);
}
