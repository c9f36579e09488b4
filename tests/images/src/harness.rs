//! Which test runs, and how it is told: a line on COM1, and a value to isa-debug-exit.

use core::ffi::CStr;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::pci::SourceId;
use crate::println;
use crate::x86::{outl, read};

/// Passed.
const PASSED: u32 = 0;
/// Failed.
const FAILED: u32 = 1;
/// Not possible on this machine.
const SKIPPED: u32 = 2;
/// There is no such test.
const UNKNOWN: u32 = 3;

/// A test. Made by [`crate::tests!`].
pub struct Test {
    /// Its name.
    pub name: &'static str,
    /// Options that `causeway run` needs for it; `reboots` before them if it resets its machine.
    pub options: &'static str,
    /// Returns when it passed, panics when it failed.
    pub run: fn(),
}

/// Names the tests of a module: functions without arguments, each with the options of `causeway run` that it needs
/// besides those of every test, if any. Makes `TESTS`, and puts the names where `causeway test` finds them in the file.
#[macro_export]
macro_rules! tests {
    ($($name:ident $(=> $options:literal)?),* $(,)?) => {
        /// The tests of this module.
        pub static TESTS: &[$crate::harness::Test] = &[
            $($crate::harness::Test { name: stringify!($name), options: concat!("" $(, $options)?), run: $name }),*
        ];
        $crate::listed!(concat!($(stringify!($name), $(" ", $options,)? "\n"),*));
    };
}

/// What behaviours rest on: says so in the file, in lines of an `@`, the behaviour and the rest. A test's behaviour is
/// the one that its name begins with: `A-8` of `a8_x`.
#[macro_export]
macro_rules! rests_on {
    ($($behaviour:literal => $what:literal),* $(,)?) => {
        $crate::listed!(concat!($("@", $behaviour, " ", $what, "\n"),*));
    };
}

/// Puts lines where `causeway test` finds them in the file.
#[macro_export]
#[doc(hidden)]
macro_rules! listed {
    ($text:expr) => {
        const _: () = {
            const TEXT: &[u8] = $text.as_bytes();
            #[used]
            // SAFETY: the linker script collects it with the other lists; nothing else is in that section.
            #[unsafe(link_section = ".tests")]
            static LINES: [u8; TEXT.len()] = {
                let mut bytes = [0; TEXT.len()];
                let mut at = 0;
                while at < TEXT.len() {
                    bytes[at] = TEXT[at];
                    at += 1;
                }
                bytes
            };
        };
    };
}

/// Makes the binary an image that runs the tests of these lists: `test=NAME` on the command line chooses one, `list`
/// prints all.
#[macro_export]
macro_rules! image {
    ($($list:expr),+ $(,)?) => {
        #[unsafe(no_mangle)]
        extern "C" fn rust_main(start_info: u64) -> ! {
            $crate::harness::main(start_info, &[$($list),+])
        }
    };
}

/// Ends the run with `value`.
pub fn exit(value: u32) -> ! {
    outl(0xf4, value);
    loop {
        core::hint::spin_loop();
    }
}

/// Ends the test as skipped: this machine cannot show what it is about.
pub fn skipped(why: &str) -> ! {
    println!("skipped: {why}");
    exit(SKIPPED)
}

pub(crate) fn failed(info: &PanicInfo<'_>) -> ! {
    println!("FAILED: {}", info.message());
    if let Some(place) = info.location() {
        println!("  at {}:{}", place.file(), place.line());
    }
    exit(FAILED)
}

static START_INFO: AtomicU64 = AtomicU64::new(0);

/// Whether the function is assigned: a host or another process lets it reach what the bridge maps (`assigned=DD.F` on
/// the command line, for each).
pub fn is_assigned(function: SourceId) -> bool {
    is_named("assigned=", function)
}

/// Whether the function's host hears of the faults of its DMA, and not this guest (`unrecorded=DD.F` on the command
/// line, for each).
pub fn is_unrecorded(function: SourceId) -> bool {
    is_named("unrecorded=", function)
}

fn is_named(word: &str, function: SourceId) -> bool {
    let parse = |address: &str| {
        let (device, function) = address.split_once('.')?;
        Some(u16::from_str_radix(device, 16).ok()? << 3 | u16::from_str_radix(function, 16).ok()?)
    };
    words().filter_map(|found| found.strip_prefix(word)).any(|address| parse(address) == Some(function.0))
}

/// The number behind `word` on the command line, which ends in `=`.
pub fn number(word: &str) -> Option<u64> {
    words().find_map(|found| found.strip_prefix(word)).and_then(|number| number.parse().ok())
}

/// The memory map that the boot protocol gives: first address, length, kind (1: RAM).
pub fn memory_map() -> impl Iterator<Item = (u64, u64, u32)> {
    let start_info = START_INFO.load(Ordering::Relaxed);
    let (map, entries) =
        if start_info == 0 { (0, 0) } else { (read::<u64>(start_info + 40), read::<u32>(start_info + 48)) };
    (0..u64::from(entries)).map(move |index| map + 24 * index).map(|at| (read(at), read(at + 8), read(at + 16)))
}

fn words() -> impl Iterator<Item = &'static str> {
    command_line().split_ascii_whitespace()
}

fn command_line() -> &'static str {
    let at = match START_INFO.load(Ordering::Relaxed) {
        0 => 0,
        start_info => read::<u64>(start_info + 24),
    };
    if at == 0 {
        return "";
    }
    // SAFETY: the PVH boot protocol says that a text that ends in a zero is there; nothing writes to it.
    let text = unsafe { CStr::from_ptr(at as *const core::ffi::c_char) };
    text.to_str().unwrap_or("")
}

/// See [`crate::image!`].
pub fn main(start_info: u64, lists: &[&[Test]]) -> ! {
    START_INFO.store(start_info, Ordering::Relaxed);
    let tests = || lists.iter().flat_map(|list| list.iter());
    if words().any(|word| word == "list") {
        for test in tests() {
            println!("{} {}", test.name, test.options);
        }
        exit(PASSED);
    }
    let Some(wanted) = words().find_map(|word| word.strip_prefix("test=")) else {
        println!("the command line has neither `test=NAME` nor `list`");
        exit(UNKNOWN);
    };
    match tests().find(|test| test.name == wanted) {
        Some(test) => {
            println!("test {wanted}");
            (test.run)();
            println!("ok");
            exit(PASSED)
        }
        None => {
            println!("there is no test {wanted}");
            exit(UNKNOWN)
        }
    }
}
