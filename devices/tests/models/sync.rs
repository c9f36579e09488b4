//! What `src/sync.rs` has, over loom. Each lock that is taken while others are held is noted: no two kinds of locks may
//! ever be taken in both orders, whether or not an execution comes to a stop over it.

use std::any::type_name;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::ops::{Deref, DerefMut};

use loom::thread::{self, ThreadId};

/// A kind of lock is named by what it guards.
type Kind = &'static str;

#[derive(Default)]
struct Order {
    held: BTreeMap<String, Vec<Kind>>,
    /// The second was taken while the first was held.
    seen: BTreeSet<(Kind, Kind)>,
}

thread_local! {
    // Loom's threads are turns of one thread.
    static ORDER: RefCell<Order> = RefCell::default();
}

fn name(thread: ThreadId) -> String {
    format!("{thread:?}")
}

impl Order {
    fn leads(&self, from: Kind, to: Kind) -> bool {
        from == to || self.seen.iter().any(|(first, second)| *first == from && self.leads(second, to))
    }
}

/// Each execution begins without a lock.
pub(crate) fn begin() {
    ORDER.with_borrow_mut(|order| order.held.clear());
}

/// Taking a lock: noted before it is waited for.
fn taking<T>() -> Kind {
    let (kind, thread) = (type_name::<T>(), name(thread::current().id()));
    ORDER.with_borrow_mut(|order| {
        let held = order.held.entry(thread).or_default().clone();
        for first in held {
            assert!(!order.leads(kind, first), "{kind} is taken while {first} is held, and the other way round");
            order.seen.insert((first, kind));
        }
    });
    kind
}

struct Held(Kind);

impl Held {
    fn new(kind: Kind) -> Self {
        let thread = name(thread::current().id());
        ORDER.with_borrow_mut(|order| order.held.entry(thread).or_default().push(kind));
        Self(kind)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // What is dropped with a failed execution is of no interest.
        if std::thread::panicking() {
            return;
        }
        let thread = name(thread::current().id());
        ORDER.with_borrow_mut(|order| {
            let held = order.held.entry(thread).or_default();
            if let Some(at) = held.iter().rposition(|kind| *kind == self.0) {
                held.remove(at);
            }
        });
    }
}

pub(crate) struct Guard<G> {
    // Given back first.
    inner: G,
    _held: Held,
}

impl<G: Deref> Deref for Guard<G> {
    type Target = G::Target;
    fn deref(&self) -> &G::Target {
        &self.inner
    }
}

impl<G: DerefMut> DerefMut for Guard<G> {
    fn deref_mut(&mut self) -> &mut G::Target {
        &mut self.inner
    }
}

type Taken<G> = Result<Guard<G>, Infallible>;

pub(crate) type MutexGuard<'a, T> = Guard<loom::sync::MutexGuard<'a, T>>;
pub(crate) type RwLockReadGuard<'a, T> = Guard<loom::sync::RwLockReadGuard<'a, T>>;

pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(loom::sync::Mutex::new(value))
    }
    pub(crate) fn lock(&self) -> Taken<loom::sync::MutexGuard<'_, T>> {
        let kind = taking::<T>();
        let inner = self.0.lock().unwrap();
        Ok(Guard { inner, _held: Held::new(kind) })
    }
}

impl<T: Default> Default for Mutex<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

pub(crate) struct RwLock<T>(loom::sync::RwLock<T>);

impl<T> RwLock<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(loom::sync::RwLock::new(value))
    }
    pub(crate) fn read(&self) -> Taken<loom::sync::RwLockReadGuard<'_, T>> {
        let kind = taking::<T>();
        let inner = self.0.read().unwrap();
        Ok(Guard { inner, _held: Held::new(kind) })
    }
    pub(crate) fn write(&self) -> Taken<loom::sync::RwLockWriteGuard<'_, T>> {
        let kind = taking::<T>();
        let inner = self.0.write().unwrap();
        Ok(Guard { inner, _held: Held::new(kind) })
    }
}

impl<T: Default> Default for RwLock<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}
