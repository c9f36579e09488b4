//! What the lock-free parts of the crate stand on: atomics, fences, waiting, and the sizes of their tables. The models
//! (`tests/models`) compile the same parts over loom's atomics, with tables so small that every order can be tried.

use std::cell::Cell;
use std::sync::atomic::compiler_fence;
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};

/// Sets of cached pages, of two pages each.
pub(crate) const PAGE_SETS: usize = 1024;
/// Sets of cached directories, of two each; a directory leads to 2 MiB.
pub(crate) const DIRECTORY_SETS: usize = 256;
/// Sessions of one endpoint that can be open at a time.
pub(crate) const SESSIONS: usize = 16;

/// A full fence right behind an atomic read-modify-write of this thread. On x86-64 that instruction is one already, so
/// only the compiler is held back.
#[inline]
pub(crate) fn fence_after_update() {
    if cfg!(target_arch = "x86_64") { compiler_fence(Ordering::SeqCst) } else { fence(Ordering::SeqCst) }
}

/// Waits a little, the `attempt`th time in a row. Whoever is waited for may have lost its processor, so it is given
/// this one.
pub(crate) fn relax(attempt: u32) {
    if attempt < 128 { std::hint::spin_loop() } else { std::thread::yield_now() }
}

/// A number of this thread, other than those of the threads that began just before it.
#[inline]
pub(crate) fn thread_number() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static NUMBER: Cell<Option<usize>> = const { Cell::new(None) };
    }
    NUMBER.with(|number| {
        number.get().unwrap_or_else(|| {
            let new = NEXT.fetch_add(1, Ordering::Relaxed);
            number.set(Some(new));
            new
        })
    })
}
