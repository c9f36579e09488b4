//! Messages that a guest can provoke are logged once: a guest that tries again and again fills no log.

use std::sync::atomic::{AtomicBool, Ordering};

/// Whether something has been said.
#[derive(Default)]
pub struct Told(AtomicBool);

impl Told {
    /// Calls `say` the first time.
    pub fn once(&self, say: impl FnOnce()) {
        if !self.0.swap(true, Ordering::Relaxed) {
            say();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_told_is_not_told_again() {
        let (told, mut said) = (Told::default(), 0);
        (0..3).for_each(|_| told.once(|| said += 1));
        assert_eq!(said, 1);
    }
}
