//! The page request queue: which request gets an entry, and when the page request event is raised. Sections
//! 7.4.1 and 7.5.

use super::Registers;
use crate::msi::Msi;
use crate::spec::page_requests::PAGE_REQUEST_SIZE;
use crate::spec::registers::PageRequestStatus;

/// What becomes of a page request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Queued {
    /// It is in the queue.
    Yes,
    /// It was discarded: the queue is full, or was and the guest did not say yet that it knows.
    Overflow,
}

impl Registers {
    /// Has `write` write a descriptor at its address, and says which message to send. What cannot be written is as if
    /// there was no room.
    pub(crate) fn queue_page_request(&mut self, write: impl FnOnce(u64) -> bool) -> (Queued, Option<Msi>) {
        let state = &mut self.state.page_requests;
        if state.status.overflow() {
            return (Queued::Overflow, None);
        }
        let before = state.status;
        let size = 4096u64 << state.address.size();
        // The guest writes both offsets, and may write what is beyond the queue.
        let (head, tail) = (state.head % size, state.tail % size);
        let next = (tail + PAGE_REQUEST_SIZE) % size;
        let address = (state.address.page() << 12).checked_add(tail);
        let queued = if next != head && address.is_some_and(write) {
            state.tail = next;
            state.status = before.with_pending(true);
            Queued::Yes
        } else {
            state.status = before.with_overflow(true);
            Queued::Overflow
        };
        // One condition that the guest has not served covers the next ones.
        let is_first = before == PageRequestStatus::new();
        (queued, is_first.then(|| state.event.raise()).flatten())
    }

    /// PRS is write-1-to-clear.
    pub(super) fn write_page_request_status(&mut self, written: PageRequestStatus) {
        let state = &mut self.state.page_requests;
        let status = state.status;
        state.status = PageRequestStatus::new()
            .with_pending(status.pending() && !written.pending())
            .with_overflow(status.overflow() && !written.overflow());
        if state.status == PageRequestStatus::new() {
            state.event.withdraw();
        }
    }
}
