//! Writes and reads registers of a PCI function without rest, a thread for each, while another thread disables and
//! enables the function's memory, resets it, and takes it out of its slot: what is written while memory is disabled, or
//! nobody is in the slot, must not be there afterwards, what is read then is all ones, and what is written while it is
//! enabled is there.
//!
//! ```text
//!  enabled   each thread reads back what it wrote
//!  changing  threads write and read on; that may arrive or not
//!  disabled  reads are all ones; nothing of what is written is ever seen
//! ```
//!
//! A function in a slot is reached by its address: the kernel takes what it maps of a function from its users before
//! the function goes, and then nobody would access what is not there. It goes by turns as the guest turns its power
//! off, and as who looks after the machine takes it away, who is asked by a line `bar-hammer: N remove` or
//! `bar-hammer: N add`.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;

/// Hammers registers of a function while its memory comes and goes.
#[derive(Parser)]
struct Arguments {
    /// The function, as DDDD:BB:DD.F. It has no driver.
    bdf: String,
    /// A 32-bit register of BAR 0 that holds what is written to its bits 31:12, hexadecimal.
    #[arg(long = "register", required = true, value_parser = hexadecimal)]
    registers: Vec<u32>,
    /// For so long at least.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Memory is disabled so often at least, however long that takes.
    #[arg(long, default_value_t = 10)]
    times: u64,
    /// Every so many times that memory was disabled the function is reset as well; 0: never.
    #[arg(long, default_value_t = 0)]
    reset_every: u64,
    /// The slot that the function is in, by its name in /sys/bus/pci/slots.
    #[arg(long)]
    slot: Option<String>,
    /// Every so many times that memory was disabled the function is taken out of its slot as well, and comes again; 0:
    /// never.
    #[arg(long, default_value_t = 0, requires = "slot")]
    unplug_every: u64,
}

fn hexadecimal(text: &str) -> Result<u32, std::num::ParseIntError> {
    u32::from_str_radix(text.trim_start_matches("0x"), 16)
}

/// Bits of a register that hold what is written.
const HELD: u32 = 0xffff_f000;
/// Where the phase in which a value was written is in it; a number is above it.
const PHASE_SHIFT: u32 = 12;
const NUMBER_SHIFT: u32 = 14;

const CHANGING: u32 = 0;
const ENABLED: u32 = 1;
const DISABLED: u32 = 2;
/// No thread is inside a phase.
const NOWHERE: u32 = 3;

/// A register, mapped.
struct Register {
    at: NonNull<u32>,
    /// The phase that its thread relies on while it accesses the register.
    inside: AtomicU32,
    enabled: AtomicU64,
    changing: AtomicU64,
    disabled: AtomicU64,
}

// SAFETY: the mapping stays for the life of the process; accesses of it are volatile.
unsafe impl Sync for Register {}

impl Register {
    fn read(&self) -> u32 {
        // SAFETY: `at` is aligned, and inside a mapping that stays.
        unsafe { self.at.read_volatile() }
    }
    fn write(&self, value: u32) {
        // SAFETY: as in `read`; what the register holds is of no consequence, as said on the command line.
        unsafe { self.at.write_volatile(value) }
    }
}

struct Shared {
    phase: AtomicU32,
    ends: AtomicBool,
    failed: Mutex<Option<String>>,
}

impl Shared {
    fn fail(&self, what: String) {
        self.failed.lock().unwrap().get_or_insert(what);
        self.ends.store(true, Ordering::SeqCst);
    }
}

fn is_of(value: u32, phase: u32) -> bool {
    value != u32::MAX && value >> PHASE_SHIFT & 3 == phase
}

fn hammer(register: &Register, shared: &Shared) {
    let mut number = 0u32;
    while !shared.ends.load(Ordering::SeqCst) {
        let phase = shared.phase.load(Ordering::SeqCst);
        if phase != CHANGING {
            register.inside.store(phase, Ordering::SeqCst);
            if shared.phase.load(Ordering::SeqCst) != phase {
                register.inside.store(NOWHERE, Ordering::SeqCst);
                continue;
            }
        }
        number = number.wrapping_add(1);
        let value = number << NUMBER_SHIFT | phase << PHASE_SHIFT;
        register.write(value);
        let read = register.read();
        let (right, counter) = match phase {
            ENABLED => (read & HELD == value, &register.enabled),
            DISABLED => (read == u32::MAX, &register.disabled),
            _ => (!is_of(read, DISABLED), &register.changing),
        };
        register.inside.store(NOWHERE, Ordering::SeqCst);
        counter.fetch_add(1, Ordering::Relaxed);
        if !right {
            shared.fail(format!("in phase {phase} {value:#010x} was written and {read:#010x} read"));
        }
    }
}

struct Function {
    path: PathBuf,
    config: File,
}

/// How long the guest's kernel and the machine may take for a slot.
const PATIENCE: Duration = Duration::from_secs(120);

fn until(what: &str, holds: impl Fn() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !holds()? {
        ensure!(start.elapsed() < PATIENCE, "{what}: not within {} s", PATIENCE.as_secs());
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// A slot with hot-plug.
struct Slot {
    power: PathBuf,
}

impl Slot {
    fn new(name: &str) -> Self {
        Self { power: Path::new("/sys/bus/pci/slots").join(name).join("power") }
    }

    fn has_power(&self) -> Result<bool> {
        let text = fs::read_to_string(&self.power).with_context(|| self.power.display().to_string())?;
        Ok(text.trim() == "1")
    }

    fn set_power(&self, on: bool) -> Result<()> {
        fs::write(&self.power, u8::from(on).to_string()).context("switching the slot's power")
    }
}

impl Function {
    /// Enables it.
    fn open(bdf: &str) -> Result<Self> {
        let path = PathBuf::from("/sys/bus/pci/devices").join(bdf);
        fs::write(path.join("enable"), "1").with_context(|| format!("no PCI function {bdf}"))?;
        let config = OpenOptions::new().read(true).write(true).open(path.join("config"))?;
        Ok(Self { path, config })
    }

    /// First address and length of BAR 0.
    fn bar(&self) -> Result<(u64, u64)> {
        let text = fs::read_to_string(self.path.join("resource"))?;
        let mut numbers = text.split_whitespace().map(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16));
        let (first, last) = (numbers.next().context("no BAR 0")??, numbers.next().context("no BAR 0")??);
        ensure!(first != 0 && last > first, "BAR 0 has no address");
        Ok((first, last - first + 1))
    }

    fn memory(&self, enabled: bool) -> Result<()> {
        let mut command = [0; 2];
        self.config.read_exact_at(&mut command, 4)?;
        command[0] = command[0] & !2 | u8::from(enabled) << 1;
        self.config.write_all_at(&command, 4).context("writing the command register")
    }

    fn reset(&self) -> Result<()> {
        fs::write(self.path.join("reset"), "1").context("resetting the function")
    }
}

/// From now on it is `phase`. Nobody relies on another one any more.
fn enter(phase: u32, shared: &Shared, registers: &[Register]) {
    shared.phase.store(phase, Ordering::SeqCst);
    let elsewhere = |register: &Register| ![phase, NOWHERE].contains(&register.inside.load(Ordering::SeqCst));
    while registers.iter().any(elsewhere) {
        thread::yield_now();
    }
}

/// Until each thread was in `phase` some more times.
fn let_them(phase: u32, shared: &Shared, registers: &[Register]) {
    let count = |register: &Register| match phase {
        ENABLED => register.enabled.load(Ordering::Relaxed),
        _ => register.disabled.load(Ordering::Relaxed),
    };
    let before: Vec<u64> = registers.iter().map(count).collect();
    let waits = |(register, before): (&Register, &u64)| count(register) < before + 3;
    while registers.iter().zip(&before).any(waits) && !shared.ends.load(Ordering::SeqCst) {
        thread::yield_now();
    }
}

/// How often each was done.
#[derive(Default)]
struct Done {
    toggles: u64,
    resets: u64,
    unplugs: u64,
}

/// Takes the function out of its slot, while threads go on, and has it come again. It is there when this returns, with
/// its memory enabled, and it is [`CHANGING`].
fn unplug(function: Function, slot: &Slot, number: u64, shared: &Shared, registers: &[Register]) -> Result<Function> {
    let (path, bar) = (function.path.clone(), function.bar()?);
    drop(function);
    let by_guest = number % 2 == 1;
    if by_guest {
        slot.set_power(false)?;
    } else {
        println!("bar-hammer: {number} remove");
    }
    // The kernel takes the power when it has forgotten the function.
    until("the function goes", || Ok(!path.exists() && !slot.has_power()?))?;
    enter(DISABLED, shared, registers);
    let_them(DISABLED, shared, registers);
    enter(CHANGING, shared, registers);
    if by_guest {
        slot.set_power(true)?;
    } else {
        println!("bar-hammer: {number} add");
    }
    until("the function comes", || Ok(path.join("resource0").exists()))?;
    let bdf = path.file_name().and_then(|name| name.to_str()).context("a name")?;
    let function = Function::open(bdf)?;
    ensure!(function.bar()? == bar, "the function came to another address: {:x?} after {bar:x?}", function.bar()?);
    Ok(function)
}

fn toggle(mut function: Function, arguments: &Arguments, shared: &Shared, registers: &[Register]) -> Result<Done> {
    let ends = Instant::now() + Duration::from_secs(arguments.seconds);
    let slot = arguments.slot.as_deref().map(Slot::new);
    let Done { mut toggles, mut resets, mut unplugs } = Done::default();
    while (Instant::now() < ends || toggles < arguments.times) && !shared.ends.load(Ordering::SeqCst) {
        let_them(ENABLED, shared, registers);
        enter(CHANGING, shared, registers);
        function.memory(false)?;
        enter(DISABLED, shared, registers);
        let_them(DISABLED, shared, registers);
        enter(CHANGING, shared, registers);
        toggles += 1;
        function.memory(true)?;
        if arguments.reset_every != 0 && toggles % arguments.reset_every == 0 {
            function.reset()?;
            resets += 1;
            function.memory(true)?;
        }
        if let Some(slot) = &slot
            && arguments.unplug_every != 0
            && toggles % arguments.unplug_every == 0
        {
            unplugs += 1;
            function = unplug(function, slot, unplugs, shared, registers)?;
        }
        for register in registers {
            let read = register.read();
            if read == u32::MAX || is_of(read, DISABLED) {
                bail!("with memory enabled again a register has {read:#010x}");
            }
        }
        enter(ENABLED, shared, registers);
    }
    Ok(Done { toggles, resets, unplugs })
}

/// Maps `len` bytes of a file.
fn map(path: &Path, offset: u64, len: u64) -> Result<NonNull<u32>> {
    // Of /dev/mem, not by the processor's cache.
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_SYNC);
    let file = options.open(path).with_context(|| path.display().to_string())?;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            offset as libc::off_t,
        )
    };
    ensure!(at != libc::MAP_FAILED, "mapping {}: {}", path.display(), std::io::Error::last_os_error());
    NonNull::new(at.cast()).context("a mapping at 0")
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let function = Function::open(&arguments.bdf)?;
    let (first, len) = function.bar()?;
    let at = match arguments.slot {
        Some(_) => map(Path::new("/dev/mem"), first, len)?,
        None => map(&function.path.join("resource0"), 0, len)?,
    };
    let mut registers = Vec::new();
    for offset in &arguments.registers {
        ensure!(offset % 4 == 0 && u64::from(*offset) + 4 <= len, "{offset:#x} is no register of BAR 0");
        // SAFETY: it is inside the mapping, as was just checked.
        let at = unsafe { at.byte_add(*offset as usize) };
        let (inside, count) = (AtomicU32::new(NOWHERE), AtomicU64::default);
        registers.push(Register { at, inside, enabled: count(), changing: count(), disabled: count() });
    }
    let shared = Shared { phase: AtomicU32::new(ENABLED), ends: AtomicBool::new(false), failed: Mutex::new(None) };
    let Done { toggles, resets, unplugs } = thread::scope(|scope| {
        for register in &registers {
            scope.spawn(|| hammer(register, &shared));
        }
        let result = toggle(function, &arguments, &shared, &registers);
        shared.ends.store(true, Ordering::SeqCst);
        result
    })?;
    if let Some(failed) = shared.failed.lock().unwrap().take() {
        bail!(failed);
    }
    let sum = |count: fn(&Register) -> &AtomicU64| -> u64 {
        registers.iter().map(|register| count(register).load(Ordering::Relaxed)).sum()
    };
    println!(
        "bar-hammer: disabled {toggles} times, reset {resets} times, unplugged {unplugs} times; accesses while enabled {}, \
         disabled {}, in between {}",
        sum(|register| &register.enabled),
        sum(|register| &register.disabled),
        sum(|register| &register.changing)
    );
    Ok(())
}
