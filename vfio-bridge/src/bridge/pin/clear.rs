//! The order in which an unmap and the clients of what is unmapped meet (D-3).

use super::book::{Going, Pins};
use super::sync::{Mutex, MutexGuard, lock};

/// What has a book of pins, behind one lock with what they are pinned in.
pub(crate) trait HasPins {
    fn pins(&mut self) -> &mut Pins;
}

/// What is `going` is about to go from `state`, which `mutex` guards: nothing of it is pinned when this returns, and
/// nothing can be until the lock is given back. If somebody had something pinned there, the lock was given back
/// meanwhile: what the caller knew of the state has to be looked up afresh. Also says who had to be cut off, and why.
pub(crate) fn clear<'a, S: HasPins>(
    mutex: &'a Mutex<S>,
    mut state: MutexGuard<'a, S>,
    going: Going<'_>,
) -> (MutexGuard<'a, S>, Vec<String>) {
    let Some(mut window) = state.pins().begin(going) else { return (state, Vec::new()) };
    drop(state);
    window.wait();
    let mut state = lock(mutex);
    let cut_off = state.pins().end(going, window);
    (state, cut_off)
}
