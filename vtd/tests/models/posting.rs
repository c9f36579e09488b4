//! interrupts that are posted into one descriptor at the same time, and who takes them out.

use std::sync::Arc;

use loom::sync::atomic::{AtomicU64, Ordering, fence};
use loom::thread;
use vtd::spec::irte::PostedControl;

use crate::model;
use crate::posted::{DescriptorWords, post};

/// The words of which the model makes use; the others are 0.
struct Descriptor {
    requests: AtomicU64,
    control: AtomicU64,
}

impl Descriptor {
    fn new(control: PostedControl) -> Arc<Self> {
        Arc::new(Self { requests: AtomicU64::new(0), control: AtomicU64::new(control.into_bits()) })
    }

    fn word(&self, index: usize) -> Option<&AtomicU64> {
        match index {
            0 => Some(&self.requests),
            4 => Some(&self.control),
            _ => None,
        }
    }

    /// Posts in a thread of its own, which says whether a notification was owed.
    fn post(self: &Arc<Self>, vector: u8) -> thread::JoinHandle<bool> {
        let words = self.clone();
        thread::spawn(move || post(&*words, vector, false, true).unwrap().is_some())
    }

    /// Clears bits of the control word, by one locked instruction of a processor: the word before.
    fn clear(&self, bits: PostedControl) -> PostedControl {
        let before = self.control.fetch_and(!bits.into_bits(), Ordering::SeqCst);
        fence(Ordering::SeqCst);
        PostedControl::from_bits(before)
    }
}

impl DescriptorWords for Descriptor {
    fn get(&self, index: usize) -> Option<u64> {
        Some(self.word(index).map_or(0, |word| word.load(Ordering::Relaxed)))
    }
    fn set_bits(&self, index: usize, bits: u64) -> Option<()> {
        self.word(index)?.fetch_or(bits, Ordering::AcqRel);
        Some(())
    }
    fn exchange(&self, index: usize, old: u64, new: u64) -> Option<bool> {
        let exchange = |word: &AtomicU64| word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        self.word(index).map(exchange)
    }
}

#[test]
fn a17_two_interrupts_and_who_takes_them_out_lose_none() {
    model(3, || {
        let descriptor = Descriptor::new(PostedControl::new());
        let posters = [descriptor.post(1), descriptor.post(2)];
        let found = descriptor.clear(PostedControl::new().with_outstanding(true)).outstanding();
        let taken = descriptor.requests.swap(0, Ordering::SeqCst);
        let notified = posters.map(|poster| usize::from(poster.join().unwrap())).into_iter().sum::<usize>();
        let left = descriptor.requests.load(Ordering::Relaxed);
        let control = PostedControl::from_bits(descriptor.control.load(Ordering::Relaxed));
        assert_eq!(taken | left, 0b110, "an interrupt is lost");
        assert!(left == 0 || control.outstanding(), "nobody comes for what is left");
        // Each time that ON was set is one notification, and nobody is notified of anything else.
        assert_eq!(notified, usize::from(found) + usize::from(control.outstanding()));
    });
}

#[test]
fn a17_what_is_posted_while_suppression_ends_is_seen() {
    model(3, || {
        let descriptor = Descriptor::new(PostedControl::new().with_suppressed(true));
        let poster = descriptor.post(1);
        // As KVM does when it lets a virtual processor run: SN is cleared, then PIR looked at.
        descriptor.clear(PostedControl::new().with_suppressed(true));
        let seen = descriptor.requests.load(Ordering::Relaxed) != 0;
        let notified = poster.join().unwrap();
        let control = PostedControl::from_bits(descriptor.control.load(Ordering::Relaxed));
        assert!(seen || notified, "neither seen nor notified of");
        assert_eq!(notified, control.outstanding());
    });
}
