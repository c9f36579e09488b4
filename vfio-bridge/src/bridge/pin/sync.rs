//! What pinning stands on: locks, waiting, a thread. The models (`tests/models`) compile the same code over loom's.

use std::io;
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// When a wait ends at the latest.
#[derive(Clone, Copy)]
pub(crate) struct Deadline(Instant);

impl Deadline {
    pub(crate) fn after(time: Duration) -> Self {
        Self(Instant::now() + time)
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Waits for a change.
pub(crate) fn wait<'a, T>(changed: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    changed.wait(guard).unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Waits for a change; `None` when it is too late.
pub(crate) fn wait_until<'a, T>(
    changed: &Condvar,
    guard: MutexGuard<'a, T>,
    Deadline(deadline): Deadline,
) -> Option<MutexGuard<'a, T>> {
    let left = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
    Some(changed.wait_timeout(guard, left).unwrap_or_else(std::sync::PoisonError::into_inner).0)
}

/// Starts a thread that nobody waits for.
pub(crate) fn start(name: String, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name(name).spawn(run).map(drop)
}

/// While it lives, this thread is told in debug builds if it calls what waits for a unit's queue lock.
pub(crate) fn inside() -> vtd::InsideNotification {
    vtd::InsideNotification::enter()
}
