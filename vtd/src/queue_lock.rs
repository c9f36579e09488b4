//! The queue lock of a unit (rule 11). Whoever is called with it held, a listener or a sink, cannot call what waits for
//! it: nobody else will give it back. A guest that gives one command after the other keeps nobody away for longer than
//! about a millisecond: whoever waits, another processor, an audit, a device that is plugged, is handed the lock then.
//! Debug builds know which thread has it, and panic instead of waiting for ever; release builds do not look.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use parking_lot::{Mutex, MutexGuard};

/// While it lives, this thread works for another one that has the queue lock of some unit, and waits for it: a listener
/// that asks others before it returns. Debug builds panic when this thread calls what waits for a queue lock, as they
/// do in the listener's own.
#[derive(Debug)]
pub struct InsideNotification(PhantomData<*const ()>);

impl InsideNotification {
    /// From now on.
    pub fn enter() -> Self {
        #[cfg(debug_assertions)]
        holder::INSIDE.with(|inside| inside.set(inside.get() + 1));
        Self(PhantomData)
    }
}

impl Drop for InsideNotification {
    fn drop(&mut self) {
        #[cfg(debug_assertions)]
        holder::INSIDE.with(|inside| inside.set(inside.get() - 1));
    }
}

/// What stands behind the queue lock.
#[derive(Default)]
pub(crate) struct QueueLock<T> {
    inner: Mutex<T>,
    #[cfg(debug_assertions)]
    holder: holder::Holder,
}

/// The queue lock is held.
pub(crate) struct QueueGuard<'a, T> {
    inner: MutexGuard<'a, T>,
    #[cfg(debug_assertions)]
    holder: &'a holder::Holder,
}

impl<T> QueueLock<T> {
    /// Waits for the lock.
    #[cfg_attr(debug_assertions, track_caller)]
    pub(crate) fn lock(&self) -> QueueGuard<'_, T> {
        self.assert_not_inside();
        let inner = self.inner.lock();
        #[cfg(debug_assertions)]
        self.holder.set();
        QueueGuard {
            inner,
            #[cfg(debug_assertions)]
            holder: &self.holder,
        }
    }

    /// Panics in debug builds if this thread has the lock.
    #[cfg_attr(debug_assertions, track_caller)]
    pub(crate) fn assert_not_inside(&self) {
        #[cfg(debug_assertions)]
        assert!(
            !self.holder.is_this_thread() && holder::INSIDE.with(std::cell::Cell::get) == 0,
            "a listener or a sink called what waits for the queue lock, which the unit has while it calls them: see \
             SpaceListener for what may be called from inside"
        );
    }
}

impl<T> Deref for QueueGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T> DerefMut for QueueGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

#[cfg(debug_assertions)]
impl<T> Drop for QueueGuard<'_, T> {
    fn drop(&mut self) {
        // The lock itself is given back after this.
        self.holder.clear();
    }
}

#[cfg(debug_assertions)]
mod holder {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use crate::sync::thread_number;

    thread_local! {
        /// How many [`super::InsideNotification`]s this thread has.
        pub(super) static INSIDE: std::cell::Cell<u32> = const { std::cell::Cell::new(0) };
    }

    /// 0, or the number of the thread that has the lock and 1. A thread finds its own number only where it wrote it.
    #[derive(Default)]
    pub(super) struct Holder(AtomicUsize);

    impl Holder {
        pub(super) fn set(&self) {
            self.0.store(thread_number() + 1, Ordering::Relaxed);
        }
        pub(super) fn clear(&self) {
            self.0.store(0, Ordering::Relaxed);
        }
        pub(super) fn is_this_thread(&self) -> bool {
            self.0.load(Ordering::Relaxed) == thread_number() + 1
        }
    }
}
