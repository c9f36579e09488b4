//! Pages for tables and for data.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::x86::{read, write};

/// Bytes of a page.
pub const PAGE: u64 = 4096;

static NEXT: AtomicU64 = AtomicU64::new(16 << 20);
/// Where the guest's memory ends at the least: `causeway test` gives 64 MiB.
const END: u64 = 60 << 20;

/// `count` fresh pages of zeros, aligned to `align` bytes. They stay until the image ends. Their address.
pub fn pages(count: u64, align: u64) -> u64 {
    let first = NEXT.load(Ordering::Relaxed).next_multiple_of(align);
    let end = first + count * PAGE;
    assert!(end <= END, "the image's memory is used up");
    NEXT.store(end, Ordering::Relaxed);
    for at in (first..end).step_by(8) {
        write(at, 0u64);
    }
    first
}

/// One fresh page of zeros. Its address.
pub fn page() -> u64 {
    pages(1, PAGE)
}

/// The eight bytes at `address`.
pub fn load(address: u64) -> u64 {
    read(address)
}

/// Writes eight bytes at `address`.
pub fn store(address: u64, value: u64) {
    write(address, value);
}
