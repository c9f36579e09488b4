//! Ports, memory-mapped registers, time, and interrupts.

use core::arch::asm;

/// Writes a byte to a port.
pub fn outb(port: u16, value: u8) {
    // SAFETY: an image owns its machine; no port writes to its memory by itself.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) }
}

/// Reads a byte from a port.
pub fn inb(port: u16) -> u8 {
    let value: u8;
    // SAFETY: as in `outb`.
    unsafe { asm!("in al, dx", out("al") value, in("dx") port, options(nomem, nostack, preserves_flags)) }
    value
}

/// Writes four bytes to a port.
pub fn outl(port: u16, value: u32) {
    // SAFETY: as in `outb`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags)) }
}

/// Writes bytes to one port, one after the other.
pub fn outsb(port: u16, bytes: &[u8]) {
    // SAFETY: the bytes are only read; else as in `outb`.
    unsafe {
        asm!("rep outsb", in("dx") port, inout("rsi") bytes.as_ptr() => _, inout("rcx") bytes.len() => _,
            options(readonly, nostack, preserves_flags))
    }
}

/// Reads four bytes from a port.
pub fn inl(port: u16) -> u32 {
    let value: u32;
    // SAFETY: as in `outb`.
    unsafe { asm!("in eax, dx", out("eax") value, in("dx") port, options(nomem, nostack, preserves_flags)) }
    value
}

/// Reads memory or a register at a physical address, which must lie in the first 4 GiB and have the alignment of `T`.
pub fn read<T: Copy>(address: u64) -> T {
    // SAFETY: the first 4 GiB are mapped one to one, and an access to what is not there has no effect.
    unsafe { (address as *const T).read_volatile() }
}

/// Writes memory or a register at a physical address, as [`read`].
pub fn write<T: Copy>(address: u64, value: T) {
    // SAFETY: as in `read`; tests write to registers and to pages of [`crate::memory`], which no reference points into.
    unsafe { (address as *mut T).write_volatile(value) }
}

/// The ACPI timer, 24 bits at 3.579545 MHz.
const TIMER: u16 = 0x608;
const TICKS_PER_MS: u32 = 3579;

/// Time that has passed since it was made. It wraps after 4.6 seconds.
pub struct Stopwatch(u32);

impl Stopwatch {
    /// From now on.
    pub fn start() -> Self {
        Self(inl(TIMER))
    }

    /// Milliseconds.
    pub fn ms(&self) -> u32 {
        (inl(TIMER).wrapping_sub(self.0) & 0xff_ffff) / TICKS_PER_MS
    }
}

/// Seconds that something may take: a busy machine lets an emulator, another process or another processor wait, while
/// this processor's time goes on.
const PATIENCE: u32 = 15;

/// Waits until `done`; the test fails after fifteen seconds.
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let (mut last, mut left) = (inl(TIMER), PATIENCE * 1000 * TICKS_PER_MS);
    while !done() {
        let now = inl(TIMER);
        let passed = now.wrapping_sub(last) & 0xff_ffff;
        if passed > left {
            // Once more: this processor may not have run meanwhile.
            if done() {
                return;
            }
            panic!("{PATIENCE} seconds passed, and not yet: {what}");
        }
        (last, left) = (now, left - passed);
        core::hint::spin_loop();
    }
}

/// Lets `ms` milliseconds (at most 4000) pass: for what must not happen.
pub fn pause(ms: u32) {
    let time = Stopwatch::start();
    while time.ms() < ms {
        core::hint::spin_loop();
    }
}

unsafe extern "C" {
    static IRQ_COUNT: [core::sync::atomic::AtomicU64; 256];
    static IRQ_REGISTER: core::sync::atomic::AtomicU64;
}

/// The vector of non-maskable interrupts, for [`interrupts`].
pub const NMI: u8 = 2;

/// Sends a non-maskable interrupt to the processor with that id, by this one's local APIC.
pub fn send_nmi(id: u8) {
    write::<u32>(LOCAL_APIC + 0x310, u32::from(id) << 24);
    write::<u32>(LOCAL_APIC + 0x300, 0x4400);
}

/// How often interrupt `vector` (32 to 255, or [`NMI`]) arrived, at any processor.
pub fn interrupts(vector: u8) -> u64 {
    // SAFETY: start-up's assembly defines it, with this size; interrupts change it atomically.
    unsafe { IRQ_COUNT[usize::from(vector)].load(core::sync::atomic::Ordering::Acquire) }
}

/// From now on every interrupt's handler writes ones to the four bytes at `register`, before it tells the end of the
/// interrupt. It must be a register that is the processor's to write: a KVM that emulates ring 0 in software was seen
/// to lose such a write of a handler where it is an exit.
pub fn write_at_interrupts(register: u64) {
    // SAFETY: start-up's assembly defines it, with this size, and only reads it.
    unsafe { IRQ_REGISTER.store(register, core::sync::atomic::Ordering::Release) }
}

/// The local APIC of the processor that looks there.
pub(crate) const LOCAL_APIC: u64 = 0xfee0_0000;

/// Turns this processor's local APIC on, so that interrupts arrive. Gives its id.
pub fn enable_interrupts() -> u8 {
    write::<u32>(LOCAL_APIC + 0xf0, 0x1ff);
    (read::<u32>(LOCAL_APIC + 0x20) >> 24) as u8
}
