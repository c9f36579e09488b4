//! Cached translations of one endpoint, for emulated DMA (rule 6): a direct-mapped table of pages that is read without a
//! lock, and the record of the DMA sessions in flight.
//!
//! **A hit** loads the generation and one slot; a slot is a sequence lock over three words, so a reader never waits.
//!
//! **A miss** samples `epoch` and the generation before the first table read, walks the guest's tables with no lock,
//! and stores the result only if, with the slot held, `epoch` is still the same.
//!
//! **An invalidation** first advances `epoch`: from then on no walk that began earlier is stored. Then it takes the
//! generation forward (everything is stale at once), or, for a few pages, empties just their slots. A store that
//! passed its check before `epoch` moved holds its slot until it is done, so the emptying waits for it and finds it.
//! Last, it waits for each session that is open: the access of a session may still use what was just invalidated.
//!
//! A session is a slot in `sessions`: odd while it is open. The waiter notes the odd ones and waits until each of them
//! has changed, so sessions that begin later cannot hold it up. Both sides have a full fence between their store and
//! their loads: either the session sees the invalidation, or the invalidation sees the session.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};

use crate::ids::{DomainId, Gpa};
use crate::space::Perm;
use crate::walk::Translated;

const SLOTS: usize = 1024;
const SESSIONS: usize = 16;
/// Up to this many pages an invalidation empties slots; beyond it takes the generation forward.
const MAX_PAGES_BY_SLOT: u64 = 64;

// `domain` is a domain id, or one of these.
const NO_DOMAIN: u32 = u32::MAX;
const MANY_DOMAINS: u32 = u32::MAX - 1;

/// Which cached translations an invalidation reaches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Scope {
    /// All.
    Everything,
    /// Those of one domain.
    Domain(DomainId),
    /// Those of one domain in a range of addresses, inclusive.
    Pages(DomainId, u64, u64),
}

#[derive(Default)]
struct Slot {
    /// Odd while it is written.
    sequence: AtomicU32,
    /// Page number of the IOVA.
    page: AtomicU64,
    /// Page of the GPA, permission in bits 1:0.
    target: AtomicU64,
    /// The slot is empty unless this is the current generation.
    generation: AtomicU64,
}

/// When a walk began; what it finds may be stored only if no invalidation came since.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sampled {
    epoch: u64,
    generation: u64,
}

/// The cached translations and the sessions of one endpoint.
pub(crate) struct Iotlb {
    slots: Box<[Slot]>,
    /// From 1: a slot that was never written is of no generation.
    generation: AtomicU64,
    epoch: AtomicU64,
    /// The domain that everything cached belongs to.
    domain: AtomicU32,
    /// A page of a large leaf is cached: an invalidation of any part of the leaf must find it.
    large: AtomicBool,
    sessions: [AtomicU64; SESSIONS],
}

impl Default for Iotlb {
    fn default() -> Self {
        Self {
            slots: (0..SLOTS).map(|_| Slot::default()).collect(),
            generation: AtomicU64::new(1),
            epoch: AtomicU64::new(0),
            domain: AtomicU32::new(NO_DOMAIN),
            large: AtomicBool::new(false),
            sessions: Default::default(),
        }
    }
}

/// An open session: which of the sessions, and its number.
#[derive(Debug)]
pub(crate) struct SessionToken {
    index: usize,
    number: u64,
}

impl Iotlb {
    fn slot(&self, page: u64) -> &Slot {
        &self.slots[page as usize % SLOTS]
    }

    /// The cached translation of a page. Takes no lock.
    pub(crate) fn get(&self, page: u64) -> Option<(Gpa, Perm)> {
        let generation = self.generation.load(Ordering::Acquire);
        let slot = self.slot(page);
        let before = slot.sequence.load(Ordering::Acquire);
        let found = (slot.page.load(Ordering::Relaxed), slot.generation.load(Ordering::Relaxed));
        let target = slot.target.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let consistent = before & 1 == 0 && slot.sequence.load(Ordering::Relaxed) == before;
        if !consistent || found != (page, generation) {
            return None;
        }
        let perm = Perm::from_bits(target & 1 != 0, target & 2 != 0)?;
        Some((Gpa(target & !0xfff), perm))
    }

    /// To be called before the first table read of a walk.
    pub(crate) fn sample(&self) -> Sampled {
        let epoch = self.epoch.load(Ordering::SeqCst);
        Sampled { epoch, generation: self.generation.load(Ordering::SeqCst) }
    }

    /// Stores what a walk found, unless an invalidation came since `sampled`, or the slot is busy. `domain` is `None` for
    /// requests that are not translated.
    pub(crate) fn insert(&self, sampled: Sampled, domain: Option<DomainId>, page: u64, found: Translated) {
        let slot = self.slot(page);
        let sequence = slot.sequence.load(Ordering::Relaxed);
        let held = sequence & 1 == 0
            && slot
                .sequence
                .compare_exchange(sequence, sequence.wrapping_add(1), Ordering::SeqCst, Ordering::Relaxed)
                .is_ok();
        if !held {
            return;
        }
        // No store below is seen before the odd sequence is.
        fence(Ordering::Release);
        self.note_domain(domain);
        if found.large {
            self.large.store(true, Ordering::SeqCst);
        }
        if self.epoch.load(Ordering::SeqCst) == sampled.epoch {
            let perm = u64::from(found.perm.readable()) | u64::from(found.perm.writable()) << 1;
            slot.page.store(page, Ordering::Relaxed);
            slot.target.store(found.page.0 & !0xfff | perm, Ordering::Relaxed);
            slot.generation.store(sampled.generation, Ordering::Relaxed);
        }
        slot.sequence.store(sequence.wrapping_add(2), Ordering::Release);
    }

    fn note_domain(&self, domain: Option<DomainId>) {
        // What is not translated is told from every domain id: an invalidation of a domain does not reach it.
        let domain = domain.map_or(1 << 16, |domain| u32::from(domain.0));
        let noted = self.domain.compare_exchange(NO_DOMAIN, domain, Ordering::SeqCst, Ordering::SeqCst);
        if noted.is_err_and(|other| other != domain) {
            self.domain.store(MANY_DOMAINS, Ordering::SeqCst);
        }
    }

    /// Makes stale what `scope` reaches, of walks that end later, too. Does not wait for sessions.
    pub(crate) fn invalidate(&self, scope: Scope) {
        self.epoch.fetch_add(1, Ordering::SeqCst);
        let cached = self.domain.load(Ordering::SeqCst);
        let reaches = |domain: DomainId| cached == MANY_DOMAINS || cached == u32::from(domain.0);
        match scope {
            Scope::Everything => self.forget(),
            Scope::Domain(domain) if reaches(domain) => self.forget(),
            Scope::Pages(domain, first, last) if reaches(domain) => {
                let (first, last) = (first >> 12, last >> 12);
                if last - first >= MAX_PAGES_BY_SLOT || self.large.load(Ordering::SeqCst) {
                    self.forget();
                } else {
                    (first..=last).for_each(|page| self.empty(page));
                }
            }
            Scope::Domain(_) | Scope::Pages(..) => {}
        }
    }

    fn forget(&self) {
        // In this order: what is noted after the generation moved belongs to the new one.
        self.domain.store(NO_DOMAIN, Ordering::SeqCst);
        self.large.store(false, Ordering::SeqCst);
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    fn empty(&self, page: u64) {
        let slot = self.slot(page);
        loop {
            let sequence = slot.sequence.load(Ordering::Relaxed);
            let next = sequence.wrapping_add(1);
            if sequence & 1 == 0
                && slot.sequence.compare_exchange(sequence, next, Ordering::SeqCst, Ordering::Relaxed).is_ok()
            {
                fence(Ordering::Release);
                if slot.page.load(Ordering::Relaxed) == page {
                    slot.generation.store(0, Ordering::Relaxed);
                }
                slot.sequence.store(next.wrapping_add(1), Ordering::Release);
                return;
            }
            std::hint::spin_loop();
        }
    }

    /// Opens a session. Takes no lock; waits only while sixteen sessions of this endpoint are open.
    pub(crate) fn open_session(&self) -> SessionToken {
        loop {
            for (index, session) in self.sessions.iter().enumerate() {
                let number = session.load(Ordering::Relaxed);
                if number & 1 == 0
                    && session.compare_exchange(number, number + 1, Ordering::SeqCst, Ordering::Relaxed).is_ok()
                {
                    fence(Ordering::SeqCst);
                    return SessionToken { index, number: number + 1 };
                }
            }
            std::thread::yield_now();
        }
    }

    /// Closes a session.
    pub(crate) fn close_session(&self, token: &SessionToken) {
        self.sessions[token.index].store(token.number + 1, Ordering::Release);
    }

    /// Waits for every session that is open now.
    pub(crate) fn wait_for_sessions(&self) {
        fence(Ordering::SeqCst);
        for session in &self.sessions {
            let number = session.load(Ordering::Acquire);
            let mut spins = 0u32;
            while number & 1 != 0 && session.load(Ordering::Acquire) == number {
                spins += 1;
                if spins < 128 { std::hint::spin_loop() } else { std::thread::yield_now() }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FOUND: Translated = Translated { page: Gpa(0x9000), perm: Perm::ReadWrite, large: false };
    const DOMAIN: DomainId = DomainId(1);

    #[test]
    fn rule6_a_walk_that_began_before_an_invalidation_is_never_cached() {
        // Also when the invalidation had nothing of its domain to empty: the walk may be about to find just that.
        for scope in [Scope::Everything, Scope::Domain(DOMAIN), Scope::Pages(DOMAIN, 0x5000, 0x5fff)] {
            let iotlb = Iotlb::default();
            let sampled = iotlb.sample();
            iotlb.invalidate(scope);
            iotlb.insert(sampled, Some(DOMAIN), 5, FOUND);
            assert_eq!(iotlb.get(5), None, "{scope:?}");
            iotlb.insert(iotlb.sample(), Some(DOMAIN), 5, FOUND);
            assert_eq!(iotlb.get(5), Some((Gpa(0x9000), Perm::ReadWrite)));
        }
    }

    #[test]
    fn rule6_an_invalidation_of_a_few_pages_empties_just_their_slots() {
        let iotlb = Iotlb::default();
        // The third has the same slot as the first.
        for page in [5, 6, 5 + SLOTS as u64] {
            iotlb.insert(iotlb.sample(), Some(DOMAIN), page, FOUND);
        }
        assert_eq!((iotlb.get(5), iotlb.get(5 + SLOTS as u64)), (None, Some((Gpa(0x9000), Perm::ReadWrite))));
        iotlb.invalidate(Scope::Pages(DOMAIN, 0x5000, 0x5fff));
        assert!(iotlb.get(5 + SLOTS as u64).is_some(), "another page in that slot");
        iotlb.invalidate(Scope::Pages(DOMAIN, 0x6000, 0x6fff));
        assert_eq!(iotlb.get(6), None);
        iotlb.invalidate(Scope::Pages(DOMAIN, 0x100_0000, 0x1ff_ffff));
        assert!(iotlb.get(5 + SLOTS as u64).is_none(), "many pages take the generation forward");
    }

    #[test]
    fn rule6_translations_of_several_domains_are_reached_by_each() {
        let iotlb = Iotlb::default();
        iotlb.insert(iotlb.sample(), Some(DOMAIN), 5, FOUND);
        iotlb.insert(iotlb.sample(), Some(DomainId(2)), 6, FOUND);
        iotlb.invalidate(Scope::Domain(DOMAIN));
        assert_eq!(iotlb.get(5), None);
        iotlb.insert(iotlb.sample(), None, 7, FOUND);
        iotlb.invalidate(Scope::Domain(DomainId(0)));
        assert!(iotlb.get(7).is_some(), "what is not translated belongs to no domain");
        iotlb.invalidate(Scope::Everything);
        assert_eq!(iotlb.get(7), None);
    }
}
