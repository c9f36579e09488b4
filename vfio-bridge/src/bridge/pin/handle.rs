//! What a software device is given to pin pages with.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use arc_swap::ArcSwap;
use vtd::{Perm, Requester};

use super::book::{ClientId, MAX_PAGES, PinError};
use super::client::{Client, PinLimits, PinStats, UnmapNotifier};
use crate::bridge::guest_map::{GuestMap, MemKind, PAGE_SIZE};
use crate::bridge::placement::{Held, HeldState};
use crate::bridge::{Bridge, lock};

/// Why a client could not be registered.
#[derive(Debug, thiserror::Error)]
pub enum RegisterClientError {
    /// The device is not behind the bridge.
    #[error("{0} is not a device that the bridge knows")]
    Unknown(Requester),
    /// The device is no software: a host knows what it reaches, and nothing can be pinned for it.
    #[error("{0} is not a device of this process: it cannot pin")]
    NotSoftware(Requester),
    /// The deadline is out of bounds.
    #[error("a deadline of {0:?} is refused: it is more than 0, and at most {max:?}", max = PinLimits::MAX_DEADLINE)]
    Deadline(Duration),
    /// There is no thread to be had.
    #[error("the thread on which {0} would hear of unmaps could not be started: {1}")]
    Thread(Requester, io::Error),
}

/// A pinned page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PinnedPage {
    /// Its IOVA.
    pub iova: u64,
    /// Where it is in this process: 4096 bytes, the guest's, which writes to them at any time.
    pub hva: u64,
}

/// Pinned pages, in the order in which they were asked for.
#[derive(Clone)]
pub struct Pinned {
    /// The pages.
    pub pages: Vec<PinnedPage>,
    /// Keeps the memory.
    memory: Arc<GuestMap>,
}

impl std::fmt::Debug for Pinned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(&self.pages).finish()
    }
}

impl Pinned {
    /// What keeps the memory behind the pages in this process: I/O that is in flight holds it.
    pub fn memory(&self) -> &Arc<GuestMap> {
        &self.memory
    }
}

/// A client: pins pages of the space that its device is in. There is none without an [`UnmapNotifier`] (D-4).
///
/// Dropping it releases its pins: all of its I/O has to be over by then.
pub struct PinClient {
    held: Arc<Held>,
    guest: Arc<ArcSwap<GuestMap>>,
    client: Arc<Client>,
    id: ClientId,
}

impl Drop for PinClient {
    fn drop(&mut self) {
        self.held.lock().pins.remove(self.id);
        self.client.close();
    }
}

impl PinClient {
    /// Pins the pages at these IOVAs, at most 512, for an access of this kind, and says where they are: all of them, or
    /// none. A page that is pinned already is counted, and has to be unpinned as often (D-1).
    ///
    /// Whoever pins may read and write there, as far as `access` says, until it unpins. It waits for no host call and
    /// no other client.
    pub fn pin(&self, pages: &[u64], access: Perm) -> Result<Pinned, PinError> {
        let pinned = self.try_pin(pages, access);
        if pinned.is_err() {
            self.client.counters.refused.fetch_add(1, Relaxed);
        }
        pinned
    }

    fn try_pin(&self, pages: &[u64], access: Perm) -> Result<Pinned, PinError> {
        if pages.len() > MAX_PAGES {
            return Err(PinError::TooMany(pages.len()));
        }
        let memory = self.guest.load_full();
        let mut state = self.held.lock();
        let HeldState { space, pins, .. } = &mut *state;
        if space.broken().is_some() {
            return Err(PinError::CutOff);
        }
        let mut found = Vec::with_capacity(pages.len());
        for &iova in pages {
            if !iova.is_multiple_of(PAGE_SIZE) {
                return Err(PinError::Unaligned(iova));
            }
            let extent = space.ledger().overlapping(iova, iova).next().ok_or(PinError::NotMapped(iova))?;
            if access.readable() && !extent.perm.readable() || access.writable() && !extent.perm.writable() {
                return Err(PinError::Denied(iova));
            }
            let page = extent.part(iova, iova + (PAGE_SIZE - 1));
            // The memory that is kept has to be the one that the ledger has.
            let mem = memory.host_mem(page.gpa, PAGE_SIZE);
            let ram = mem.is_some_and(|mem| mem.kind() == MemKind::Ram && mem.hva() == page.hva);
            if !ram {
                return Err(PinError::NotRam(iova));
            }
            found.push((iova, page.hva));
        }
        pins.pin(self.id, &found)?;
        drop(state);
        Ok(Pinned { pages: found.into_iter().map(|(iova, hva)| PinnedPage { iova, hva }).collect(), memory })
    }

    /// Unpins these pages, each once for each time that it stands there: all of them, or none. When a page was unpinned
    /// as often as it was pinned, no I/O of the client may reach it (D-2).
    pub fn unpin(&self, pages: &[u64]) -> Result<(), PinError> {
        self.held.lock().pins.unpin(self.id, pages)
    }

    /// What it did so far.
    pub fn stats(&self) -> PinStats {
        self.client.counters.snapshot()
    }
}

impl Bridge {
    /// A client for `requester`, which was registered with a group of [`Software`](crate::Software). One device may
    /// have several.
    pub fn register_client(
        &self,
        requester: Requester,
        notifier: Arc<dyn UnmapNotifier>,
        limits: PinLimits,
    ) -> Result<PinClient, RegisterClientError> {
        if limits.deadline.is_zero() || limits.deadline > PinLimits::MAX_DEADLINE {
            return Err(RegisterClientError::Deadline(limits.deadline));
        }
        let held = self.software_space_of(requester)?;
        let client = Client::start(requester, notifier, limits);
        let client = client.map_err(|e| RegisterClientError::Thread(requester, e))?;
        let id = held.lock().pins.add(Arc::clone(&client));
        Ok(PinClient { held, guest: Arc::clone(&self.guest), client, id })
    }

    /// How often each page of the space of `requester`'s group is pinned, in ascending order of IOVAs; empty for one
    /// that is no software.
    pub fn pinned(&self, requester: Requester) -> Vec<(u64, u32)> {
        self.software_space_of(requester).map_or_else(|_| Vec::new(), |held| held.lock().pins.pages().collect())
    }

    fn software_space_of(&self, requester: Requester) -> Result<Arc<Held>, RegisterClientError> {
        let placed = self.group_of(requester).ok_or(RegisterClientError::Unknown(requester))?;
        let held = lock(&placed).software_space().cloned();
        held.ok_or(RegisterClientError::NotSoftware(requester))
    }
}
