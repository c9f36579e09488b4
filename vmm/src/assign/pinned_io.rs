//! I/O of the host's kernel into and out of guest memory that is pinned meanwhile (D): for devices that have a few such
//! calls under way at a time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use devices::virtio::ring::Part;
use vfio_bridge::{
    Bridge, Notice, PinClient, PinError, PinLimits, Pinned, PinnedPage, RegisterClientError, Requests, UnmapNotifier,
};
use vtd::{Iova, IovaRange, Perm, Requester};

const PAGE_SIZE: u64 = 4096;
/// Pages that one call can have pinned.
pub const PAGES: u64 = 512;

/// What was asked for is not all granted by the guest's tables, or not any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("guest memory could not be pinned")]
pub struct NotPinned;

/// What is, or is about to be, pinned.
#[derive(Default)]
struct Flights {
    in_flight: Mutex<Vec<Flight>>,
    changed: Condvar,
    next: AtomicU64,
}

/// That of one call.
struct Flight {
    name: u64,
    ranges: Vec<IovaRange>,
}

impl Flights {
    fn lock(&self) -> MutexGuard<'_, Vec<Flight>> {
        self.in_flight.lock().unwrap()
    }

    /// A call to these pages begins. Its name.
    fn begin(&self, ranges: Vec<IovaRange>) -> u64 {
        let name = self.next.fetch_add(1, Ordering::Relaxed);
        self.lock().push(Flight { name, ranges });
        name
    }

    /// It is over, and has nothing pinned.
    fn land(&self, name: u64) {
        self.lock().retain(|flight| flight.name != name);
        self.changed.notify_all();
    }
}

/// The guest unmaps: waits until the calls in flight there are over and their pages are unpinned. None can be pinned
/// there again, so this ends.
impl UnmapNotifier for Flights {
    fn notify(&self, notice: &Notice) {
        // There is nothing to do for a notice that is not known.
        if let Notice::Unmap { ranges } = notice {
            let touched = |in_flight: &mut Vec<Flight>| {
                let hit = |page: &IovaRange| ranges.iter().any(|range| range.intersection(*page).is_some());
                in_flight.iter().flat_map(|flight| &flight.ranges).any(hit)
            };
            drop(self.changed.wait_while(self.lock(), touched).unwrap());
        }
    }
}

/// Has the bridge told what the guest's tables say now of these pages.
pub type Look = Box<dyn Fn(&[IovaRange]) + Send + Sync>;

/// The way of one device.
pub struct PinnedIo {
    flights: Arc<Flights>,
    client: Arc<PinClient>,
    /// Before pages are pinned, where a guest does not say what it maps.
    look: Option<Look>,
    /// Who is told what could not be pinned.
    requests: Box<dyn Requests>,
}

impl PinnedIo {
    /// For the device at `requester`, which was registered as software and has at most `calls` calls under way.
    pub fn new(
        bridge: &Bridge,
        requester: Requester,
        calls: u64,
        look: Option<Look>,
        requests: Box<dyn Requests>,
    ) -> Result<Self, RegisterClientError> {
        let limits = PinLimits { pages: PAGES * calls, ..PinLimits::default() };
        let flights = Arc::new(Flights::default());
        let client = Arc::new(bridge.register_client(requester, flights.clone(), limits)?);
        Ok(Self { flights, client, look, requests })
    }

    /// Who pins, for statistics.
    pub fn client(&self) -> &Arc<PinClient> {
        &self.client
    }

    /// Calls `io` with the memory of `parts`, which is pinned for `access` until it returns: at most [`PAGES`] pages,
    /// counted for each part.
    /// Where parts follow each other in memory, they are one.
    ///
    /// # Errors
    /// A page could not be pinned: `io` was not called. What the guest's tables do not grant is a fault record.
    pub fn with<R>(
        &self,
        parts: &[Part],
        access: Perm,
        io: impl FnOnce(&mut [libc::iovec]) -> R,
    ) -> Result<R, NotPinned> {
        let whole = parts.iter().filter(|part| part.len > 0).map(|part| {
            let last = part.iova.checked_add(u64::from(part.len) - 1).ok_or(NotPinned)?;
            Ok(IovaRange::new(part.iova / PAGE_SIZE * PAGE_SIZE, last | (PAGE_SIZE - 1)))
        });
        let ranges = whole.collect::<Result<Vec<IovaRange>, NotPinned>>()?;
        let count = ranges.iter().map(|range| (range.last - range.first) / PAGE_SIZE + 1).sum::<u64>();
        if count > PAGES {
            return Err(NotPinned);
        }
        let pages: Vec<u64> =
            ranges.iter().flat_map(|range| (range.first..=range.last).step_by(PAGE_SIZE as usize)).collect();
        // This call is not in flight yet: what the bridge is told to take away waits for others at most, which end.
        if let Some(look) = &self.look {
            look(&ranges);
        }
        let (name, pinned) = match self.pin(ranges, &pages, access) {
            Ok(pinned) => pinned,
            Err(e) => {
                log::debug!("guest memory could not be pinned: {e}");
                if let PinError::NotMapped(page) | PinError::Denied(page) | PinError::GoingAway(page) = e {
                    self.requests.blocked(Iova(page), access.writable());
                }
                return Err(NotPinned);
            }
        };
        let done = io(&mut in_memory(parts, &pinned));
        if let Err(e) = self.client.unpin(&pages) {
            // The bridge revoked them because this took too long.
            log::error!("guest memory was not pinned any more when the I/O there ended: {e}");
        }
        self.flights.land(name);
        Ok(done)
    }

    /// Pins `pages`, which are those of `ranges`, in flight under this name from now on if that succeeds.
    fn pin(&self, ranges: Vec<IovaRange>, pages: &[u64], access: Perm) -> Result<(u64, Pinned), PinError> {
        // Before they are pinned: a notice that comes in between waits for it.
        let name = self.flights.begin(ranges);
        match self.client.pin(pages, access) {
            Ok(pinned) => Ok((name, pinned)),
            Err(e) => {
                self.flights.land(name);
                Err(e)
            }
        }
    }
}

/// Where `parts` are in this process; `pinned` has their pages, in their order.
fn in_memory(parts: &[Part], pinned: &Pinned) -> Vec<libc::iovec> {
    let mut found: Vec<libc::iovec> = Vec::with_capacity(pinned.pages.len());
    let mut pages = pinned.pages.iter();
    for part in parts {
        let (mut at, mut left) = (part.iova, u64::from(part.len));
        while left > 0 {
            let Some(PinnedPage { hva, .. }) = pages.next() else { return found };
            let offset = at % PAGE_SIZE;
            let len = left.min(PAGE_SIZE - offset);
            let address = hva + offset;
            match found.last_mut() {
                Some(last) if last.iov_base as u64 + last.iov_len as u64 == address => last.iov_len += len as usize,
                _ => found.push(libc::iovec { iov_base: address as *mut libc::c_void, iov_len: len as usize }),
            }
            at += len;
            left -= len;
        }
    }
    found
}

/// What of `parts` is behind the first `bytes` bytes.
pub fn advance(mut parts: &mut [libc::iovec], mut bytes: usize) -> &mut [libc::iovec] {
    while let Some(first) = parts.first() {
        if bytes < first.iov_len {
            break;
        }
        bytes -= first.iov_len;
        parts = &mut parts[1..];
    }
    if let Some(first) = parts.first_mut() {
        first.iov_base = first.iov_base.wrapping_byte_add(bytes);
        first.iov_len -= bytes;
    }
    parts
}

#[cfg(test)]
#[path = "pinned_io_test.rs"]
mod pinned_io_test;
