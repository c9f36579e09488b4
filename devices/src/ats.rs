//! What an emulated function with ATS has: a device-TLB, which caches translations as a function of hardware does, and
//! page requests.
//!
//! A translation is looked up and used inside one session of the function's endpoint, and is kept only if no
//! invalidation came since it was asked for. So when the unit has told of an invalidation and waited for the sessions
//! that were open, nothing of what was invalidated is used any more. The lock is held for a look at the entries, and
//! waits for nobody: the unit calls with its queue lock held.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};

use vtd::spec::ats::TranslationData;
use vtd::{AtsFunction, Completion, Gpa, Iova, IovaRange, PageRequest, PageRequested, PageResponse, Pasid, TlbScope};

use crate::page_requests::PageRequests;

/// Translations that are kept at most; a new one takes the place of the oldest.
pub const ENTRIES: usize = 32;

/// Why an access by way of a device-TLB did not happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AtsFailed {
    /// The guest's tables permit no such access, which a page request may change.
    #[error("there is no translation that permits the access")]
    Missing,
    /// There is nothing to be done about it.
    #[error("the access was not carried out")]
    Failed,
}

/// What a function with a device-TLB reads and writes by DMA.
pub trait AtsTarget: Send + Sync {
    /// Reads `data.len()` bytes at `iova`, all in one page of 4 KiB.
    ///
    /// # Errors
    /// Nothing, or not all, was read.
    fn read_by(&self, tlb: &DeviceTlb, iova: Iova, data: &mut [u8]) -> Result<(), AtsFailed>;
    /// Writes `data` at `iova`, all in one page of 4 KiB.
    ///
    /// # Errors
    /// Nothing, or not all, was written.
    fn write_by(&self, tlb: &DeviceTlb, iova: Iova, data: &[u8]) -> Result<(), AtsFailed>;
    /// Asks the guest for a page. The answer may come before this returns.
    fn request_page(&self, request: PageRequest) -> PageRequested;
}

/// The ATS of a function, as the unit tells it.
#[derive(Default)]
pub struct Ats {
    /// What it has cached.
    pub tlb: DeviceTlb,
    /// What it asked the guest for.
    pub requests: PageRequests,
}

impl AtsFunction for Ats {
    fn invalidate(&self, of: TlbScope, range: IovaRange) -> Completion {
        self.tlb.invalidate(of, range)
    }

    fn respond(&self, response: PageResponse) {
        self.requests.respond(response);
    }
}

/// What one translation request of a function was answered with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Entry {
    pasid: Option<Pasid>,
    /// The addresses that are translated, and where the first of them leads.
    range: IovaRange,
    first: Gpa,
    read: bool,
    write: bool,
}

#[derive(Default)]
struct Tlb {
    entries: VecDeque<Entry>,
    /// Advanced by each invalidation: what was asked for before it is not kept.
    epoch: u64,
    silent: bool,
}

/// The device-TLB of a function, of all of its PASIDs.
#[derive(Default)]
pub struct DeviceTlb(Mutex<Tlb>);

/// When a translation was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AskedAt(u64);

impl DeviceTlb {
    fn lock(&self) -> MutexGuard<'_, Tlb> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Where `iova` leads, if an entry permits the access.
    pub fn look_up(&self, pasid: Option<Pasid>, iova: Iova, write: bool) -> Option<Gpa> {
        let tlb = self.lock();
        let permits = |entry: &&Entry| if write { entry.write } else { entry.read };
        let reaches = |entry: &&Entry| entry.pasid == pasid && entry.range.contains(iova.0);
        let found = tlb.entries.iter().filter(reaches).find(permits)?;
        Some(Gpa(found.first.0 + (iova.0 - found.range.first)))
    }

    /// To be called before a translation is asked for.
    pub fn ask(&self) -> AskedAt {
        AskedAt(self.lock().epoch)
    }

    /// Keeps what the request for `iova` was answered with, unless an invalidation came since; it may be used in the
    /// session that it was asked for in, all the same.
    pub fn keep(&self, asked: AskedAt, pasid: Option<Pasid>, iova: Iova, found: TranslationData) {
        let mut tlb = self.lock();
        if tlb.epoch != asked.0 {
            return;
        }
        let target = found.target();
        let (size_less_one, first) = (target.last - target.first, Gpa(target.first));
        let from = iova.0 & !size_less_one;
        let range = IovaRange::new(from, from + size_less_one);
        tlb.entries.retain(|entry| entry.pasid != pasid || entry.range.intersection(range).is_none());
        if tlb.entries.len() == ENTRIES {
            tlb.entries.pop_front();
        }
        tlb.entries.push_back(Entry { pasid, range, first, read: found.read(), write: found.write() });
    }

    /// Forgets everything: the function's ATS was turned off, or it was reset.
    pub fn clear(&self) {
        let mut tlb = self.lock();
        tlb.epoch += 1;
        tlb.entries.clear();
    }

    /// Invalidations are neither acted on nor answered, or are again: what a broken function does, for tests of guests.
    pub fn set_silent(&self, silent: bool) {
        self.lock().silent = silent;
    }

    /// How many translations it has.
    pub fn len(&self) -> usize {
        self.lock().entries.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl DeviceTlb {
    /// Forgets what it has cached of `range`, of requests that are under way, too.
    pub fn invalidate(&self, of: TlbScope, range: IovaRange) -> Completion {
        let mut tlb = self.lock();
        if tlb.silent {
            return Completion::Never;
        }
        tlb.epoch += 1;
        let named = |pasid: Option<Pasid>| match of {
            TlbScope::WithoutPasid => pasid.is_none(),
            TlbScope::Pasid(named) => pasid == Some(named),
            TlbScope::EveryPasid => pasid.is_some(),
        };
        tlb.entries.retain(|entry| !named(entry.pasid) || entry.range.intersection(range).is_none());
        Completion::Sent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(page: u64, large: bool) -> TranslationData {
        let page = if large { vtd::spec::ats::sized_page(page << 12, 9) } else { page };
        TranslationData::new().with_read(true).with_write(true).with_large(large).with_page(page)
    }

    #[test]
    fn a12_a_translation_is_kept_until_its_invalidation_and_no_longer() {
        let tlb = DeviceTlb::default();
        let (one, two) = (Some(Pasid(1)), Some(Pasid(2)));
        let all = || [None, one, two].map(|pasid| tlb.look_up(pasid, Iova(0x1010), true).is_some());
        for (of, first, last, left) in [
            (TlbScope::WithoutPasid, 0x1000, 0x1fff, [false, true, true]),
            (TlbScope::Pasid(Pasid(1)), 0, u64::MAX, [true, false, true]),
            (TlbScope::EveryPasid, 0x1fff, 0x2fff, [true, false, false]),
            (TlbScope::EveryPasid, 0x2000, 0x2fff, [true, true, true]),
            (TlbScope::WithoutPasid, 0, 0xfff, [true, true, true]),
        ] {
            tlb.clear();
            [None, one, two].into_iter().for_each(|pasid| tlb.keep(tlb.ask(), pasid, Iova(0x1234), data(0x80, false)));
            assert_eq!((all(), tlb.invalidate(of, IovaRange::new(first, last))), ([true; 3], Completion::Sent));
            assert_eq!(all(), left, "{of:?} {first:#x}");
        }
        tlb.set_silent(true);
        assert_eq!(tlb.invalidate(TlbScope::EveryPasid, IovaRange::ALL), Completion::Never);
        assert_eq!(all(), [true; 3]);
    }

    #[test]
    fn a12_what_was_asked_for_before_an_invalidation_is_not_kept_after_it() {
        let tlb = DeviceTlb::default();
        let asked = tlb.ask();
        tlb.invalidate(TlbScope::WithoutPasid, IovaRange::new(0x9000, 0x9fff));
        tlb.keep(asked, None, Iova(0x1000), data(0x80, false));
        assert!(tlb.is_empty());
        let asked = tlb.ask();
        tlb.clear();
        tlb.keep(asked, None, Iova(0x1000), data(0x80, false));
        assert!(tlb.is_empty());
    }

    #[test]
    fn a12_entries_have_their_size_and_permissions_and_are_bounded() {
        let tlb = DeviceTlb::default();
        tlb.keep(tlb.ask(), None, Iova(0x23_4567), data(0x40_0000 >> 12, true));
        assert_eq!(tlb.look_up(None, Iova(0x3f_ffff), false), Some(Gpa(0x5f_ffff)));
        assert_eq!(tlb.look_up(None, Iova(0x40_0000), false), None);
        // A newer one of a part takes the place of all of it.
        tlb.keep(tlb.ask(), None, Iova(0x20_0000), data(0x99, false).with_write(false));
        assert_eq!(tlb.look_up(None, Iova(0x20_0004), false), Some(Gpa(0x9_9004)));
        assert_eq!((tlb.look_up(None, Iova(0x20_0004), true), tlb.look_up(None, Iova(0x3f_ffff), false)), (None, None));
        for page in 0..100 {
            tlb.keep(tlb.ask(), None, Iova(page << 12), data(page, false));
        }
        assert_eq!((tlb.len(), tlb.look_up(None, Iova(0), false)), (ENTRIES, None));
        assert!(tlb.look_up(None, Iova(99 << 12), false).is_some());
    }
}
