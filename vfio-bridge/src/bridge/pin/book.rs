//! Which pages of a host space are pinned, and by whom.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use vtd::{IovaRange, Requester};

use super::client::{Client, Notice, Ticket};
use super::sync::Deadline;

/// How often one client can pin one page (D-1). A client that comes near it forgets to unpin.
pub(crate) const MAX_COUNT: u32 = 4095;
/// Pages of one call (D-1), as many as Linux takes (`VFIO_PIN_PAGES_MAX_ENTRIES`).
pub(crate) const MAX_PAGES: usize = 512;
const PAGE_SIZE: u64 = 4096;

/// Why pages could not be pinned or unpinned. Nothing of the call was done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PinError {
    /// More pages than one call can have.
    #[error("{0} pages are more than the {MAX_PAGES} of one call")]
    TooMany(usize),
    /// No address of a page.
    #[error("{0:#x} is not the address of a page")]
    Unaligned(u64),
    /// The page has no translation.
    #[error("{0:#x} is not mapped")]
    NotMapped(u64),
    /// The page's translation does not allow this access.
    #[error("the mapping of {0:#x} does not allow the access")]
    Denied(u64),
    /// The page leads to something other than RAM.
    #[error("{0:#x} does not lead to RAM")]
    NotRam(u64),
    /// The page's translation is just going away (D-3).
    #[error("the mapping of {0:#x} is going away")]
    GoingAway(u64),
    /// The client would have more pages pinned than it may (D-5).
    #[error("the client may pin {0} pages at a time")]
    Limit(u64),
    /// The client has pinned this page too often.
    #[error("{0:#x} is pinned {MAX_COUNT} times")]
    TooOften(u64),
    /// The client has not pinned this page (so often).
    #[error("{0:#x} is not pinned")]
    NotPinned(u64),
    /// The client's device was detached, cut off or stopped.
    #[error("the device can pin nothing any more")]
    CutOff,
}

/// A client, in the book that it is in.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct ClientId(u64);

struct Entry {
    client: Arc<Client>,
    /// Pages that it has pinned (D-5).
    pages: u64,
    cut_off: bool,
}

struct Page {
    hva: u64,
    /// How often, by client. Not empty, none is 0.
    counts: BTreeMap<ClientId, u32>,
}

/// What goes away.
#[derive(Clone, Copy)]
pub(crate) enum Going<'a> {
    /// The translations in these ranges: ascending, disjoint.
    Ranges(&'a [IovaRange]),
    /// A device, which may have been one of several.
    Device(Requester),
}

/// Clients are being told that something goes away, and pins there are refused.
pub(crate) struct Window {
    id: u64,
    told: Vec<(ClientId, Arc<Client>, Ticket)>,
    late: BTreeSet<ClientId>,
}

impl Window {
    /// Waits until all have answered, or their time is over. No lock of the bridge may be held.
    pub fn wait(&mut self) {
        let deadlines: Vec<_> =
            self.told.iter().map(|(_, client, _)| Deadline::after(client.limits.deadline)).collect();
        for ((id, client, ticket), deadline) in self.told.iter().zip(deadlines) {
            if !client.wait(ticket, deadline) {
                self.late.insert(*id);
            }
        }
    }
}

/// The pinned pages of a host space, with who pins there.
#[derive(Default)]
pub(crate) struct Pins {
    /// By IOVA.
    pages: BTreeMap<u64, Page>,
    clients: BTreeMap<ClientId, Entry>,
    /// Where pins are refused, by window.
    closed: BTreeMap<u64, Vec<IovaRange>>,
    /// Devices that are behind no unit any more.
    absent: BTreeSet<Requester>,
    next: u64,
}

impl Pins {
    /// Whether nothing is pinned.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// How often each page is pinned, all clients together.
    pub fn pages(&self) -> impl Iterator<Item = (u64, u32)> {
        self.pages.iter().map(|(iova, page)| (*iova, page.counts.values().sum()))
    }

    pub fn add(&mut self, client: Arc<Client>) -> ClientId {
        let id = ClientId(self.number());
        self.clients.insert(id, Entry { client, pages: 0, cut_off: false });
        id
    }

    /// A client leaves, and with it exactly its own pins (D-4).
    pub fn remove(&mut self, id: ClientId) {
        let its: Vec<u64> = self.pinned_by(id).collect();
        its.into_iter().for_each(|iova| self.drop_all(id, iova));
        self.clients.remove(&id);
    }

    /// `device` is behind a unit, or not any more.
    pub fn set_present(&mut self, device: Requester, present: bool) {
        if present {
            self.absent.remove(&device);
        } else {
            self.absent.insert(device);
        }
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn pinned_by(&self, id: ClientId) -> impl Iterator<Item = u64> {
        let its = self.pages.iter().filter(move |(_, page)| page.counts.contains_key(&id));
        its.map(|(iova, _)| *iova)
    }

    /// Pins pages by IOVA, with where each leads: all of them, or none.
    pub fn pin(&mut self, id: ClientId, pages: &[(u64, u64)]) -> Result<(), PinError> {
        let entry = self.clients.get(&id).filter(|entry| !entry.cut_off).ok_or(PinError::CutOff)?;
        if self.absent.contains(&entry.client.requester) {
            return Err(PinError::CutOff);
        }
        let wanted = multiplicities(pages.iter().map(|(iova, _)| *iova));
        let mut new = 0;
        for (iova, times) in &wanted {
            if self.closed.values().flatten().any(|range| range.contains(*iova)) {
                return Err(PinError::GoingAway(*iova));
            }
            let count = self.count(id, *iova);
            if count.checked_add(*times).is_none_or(|count| count > MAX_COUNT) {
                return Err(PinError::TooOften(*iova));
            }
            new += u64::from(count == 0);
        }
        let limit = entry.client.limits.pages;
        if entry.pages.checked_add(new).is_none_or(|pages| pages > limit) {
            return Err(PinError::Limit(limit));
        }
        for (iova, hva) in pages {
            let page = self.pages.entry(*iova).or_insert_with(|| Page { hva: *hva, counts: BTreeMap::new() });
            // A page whose translation changed is not pinned any more.
            debug_assert_eq!(page.hva, *hva);
            *page.counts.entry(id).or_default() += 1;
        }
        if let Some(entry) = self.clients.get_mut(&id) {
            entry.pages += new;
            entry.client.counters.pinned_pages.fetch_add(new, Relaxed);
            entry.client.counters.pins.fetch_add(pages.len() as u64, Relaxed);
        }
        Ok(())
    }

    fn count(&self, id: ClientId, iova: u64) -> u32 {
        self.pages.get(&iova).and_then(|page| page.counts.get(&id)).copied().unwrap_or(0)
    }

    /// Unpins pages by IOVA, each as often as it stands there: all of them, or none (D-2).
    pub fn unpin(&mut self, id: ClientId, pages: &[u64]) -> Result<(), PinError> {
        let wanted = multiplicities(pages.iter().copied());
        if let Some((iova, _)) = wanted.iter().find(|(iova, times)| self.count(id, **iova) < **times) {
            return Err(PinError::NotPinned(*iova));
        }
        for (iova, times) in wanted {
            if self.count(id, iova) == times {
                self.drop_all(id, iova);
            } else if let Some(count) = self.pages.get_mut(&iova).and_then(|page| page.counts.get_mut(&id)) {
                *count -= times;
            }
        }
        Ok(())
    }

    /// A client has a page no longer, however often it had pinned it.
    fn drop_all(&mut self, id: ClientId, iova: u64) {
        let Some(page) = self.pages.get_mut(&iova) else { return };
        if page.counts.remove(&id).is_some()
            && let Some(entry) = self.clients.get_mut(&id)
        {
            entry.pages -= 1;
            entry.client.counters.pinned_pages.fetch_sub(1, Relaxed);
        }
        if page.counts.is_empty() {
            self.pages.remove(&iova);
        }
    }

    /// What is pinned of what goes away, by client.
    fn pinned_in(&self, going: Going<'_>) -> BTreeMap<ClientId, Vec<IovaRange>> {
        let mut found: BTreeMap<ClientId, Vec<IovaRange>> = BTreeMap::new();
        let range = |iova: u64| IovaRange::new(iova, iova + (PAGE_SIZE - 1));
        match going {
            Going::Ranges(ranges) => {
                for going in ranges {
                    // A range may begin within a page.
                    let from = going.first & !(PAGE_SIZE - 1);
                    for (iova, page) in self.pages.range(from..=going.last) {
                        page.counts.keys().for_each(|id| found.entry(*id).or_default().push(range(*iova)));
                    }
                }
            }
            Going::Device(device) => {
                let its = self.clients.iter().filter(|(_, entry)| entry.client.requester == device);
                for (id, _) in its {
                    let pages: Vec<_> = self.pinned_by(*id).map(range).collect();
                    if !pages.is_empty() {
                        found.insert(*id, pages);
                    }
                }
            }
        }
        found
    }

    /// Something goes away: tells the clients that have pins there, and only those, and refuses pins there from now on
    /// (D-3). `None`: nobody has.
    pub fn begin(&mut self, going: Going<'_>) -> Option<Window> {
        if self.pages.is_empty() {
            return None;
        }
        let pinned = self.pinned_in(going);
        if pinned.is_empty() {
            return None;
        }
        let id = self.number();
        if let Going::Ranges(ranges) = going {
            self.closed.insert(id, ranges.to_vec());
        }
        let mut told = Vec::with_capacity(pinned.len());
        for (client, ranges) in pinned {
            if let Some(Entry { client: its, cut_off: false, .. }) = self.clients.get(&client) {
                let ticket = its.post(Notice::Unmap { ranges: IovaRange::union_of(ranges).into() });
                told.push((client, Arc::clone(its), ticket));
            }
        }
        Some(Window { id, told, late: BTreeSet::new() })
    }

    /// All that were told have answered, or their time is over. What is still pinned is revoked, and whoever had it is
    /// cut off, with all of its pins: the bridge cannot know whether I/O is in flight there. Says for whom that was,
    /// and why. The translations must be gone before anybody can pin again.
    pub fn end(&mut self, going: Going<'_>, window: Window) -> Vec<String> {
        self.closed.remove(&window.id);
        let left = self.pinned_in(going);
        let guilty: BTreeSet<ClientId> = left.keys().copied().chain(window.late.iter().copied()).collect();
        let mut said = Vec::with_capacity(guilty.len());
        for id in guilty {
            let ranges = IovaRange::union_of(left.get(&id).cloned().unwrap_or_default());
            let pages: u64 = ranges.iter().map(|range| (range.last - range.first + 1) / PAGE_SIZE).sum();
            let its: Vec<u64> = self.pinned_by(id).collect();
            its.into_iter().for_each(|iova| self.drop_all(id, iova));
            let Some(entry) = self.clients.get_mut(&id) else { continue };
            entry.client.counters.left_pinned.fetch_add(pages, Relaxed);
            if std::mem::replace(&mut entry.cut_off, true) {
                continue;
            }
            let who = entry.client.requester;
            said.push(if window.late.contains(&id) {
                format!("{who} did not answer in {:?} that pinned pages are unmapped", entry.client.limits.deadline)
            } else {
                let first = ranges.first().map_or(0, |range| range.first);
                format!("{who} answered that it let go, and still has {pages} pages pinned, from {first:#x} on")
            });
        }
        said
    }
}

/// Each address once, with how often it was there.
fn multiplicities(addresses: impl Iterator<Item = u64>) -> BTreeMap<u64, u32> {
    let mut found = BTreeMap::new();
    addresses.for_each(|address| *found.entry(address).or_default() += 1);
    found
}
