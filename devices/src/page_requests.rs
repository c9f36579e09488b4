//! Page requests (PRI) of an emulated function that has one outstanding at a time: it asks, and waits until it
//! is answered, or until what it does is given up.

use std::sync::{Condvar, Mutex, MutexGuard};

use vtd::{PageResponse, Pasid, ResponseCode};

/// What a function that asked waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Waiting {
    /// For an answer to this.
    For { pasid: Option<Pasid>, group: u16 },
    /// It was answered.
    Answered(ResponseCode),
}

#[derive(Default)]
struct Inner {
    waiting: Option<Waiting>,
    group: u16,
    unexpected: bool,
    /// How often it was given up.
    given_up: u64,
}

/// What a task of the function may ask for pages with, until that is given up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MayAsk(u64);

/// The page requests of a function. The lock is held for a look, and waits for nobody: answers come with the queue lock
/// of the unit held.
#[derive(Default)]
pub struct PageRequests {
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl PageRequests {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// For a task that begins.
    pub fn may_ask(&self) -> MayAsk {
        MayAsk(self.lock().given_up)
    }

    /// The index of a group for a new request of this PASID, whose answer is expected from now on; `None` if all was
    /// given up since the task began.
    pub fn begin(&self, may: MayAsk, pasid: Option<Pasid>) -> Option<u16> {
        let mut inner = self.lock();
        if inner.given_up != may.0 {
            return None;
        }
        let group = inner.group;
        inner.group = (group + 1) % 512;
        inner.waiting = Some(Waiting::For { pasid, group });
        Some(group)
    }

    /// Waits for the answer to what was begun; `None` if it was given up.
    pub fn wait(&self) -> Option<ResponseCode> {
        let waits = |inner: &mut Inner| matches!(inner.waiting, Some(Waiting::For { .. }));
        let mut inner = self.changed.wait_while(self.lock(), waits).unwrap_or_else(|poisoned| poisoned.into_inner());
        match inner.waiting.take() {
            Some(Waiting::Answered(code)) => Some(code),
            _ => None,
        }
    }

    /// The request that was begun will get no answer, or has one already.
    pub fn end(&self) {
        self.lock().waiting = None;
    }

    /// Nothing is waited for any more, and no task that has begun asks for anything; an answer that comes later is
    /// unexpected.
    pub fn give_up(&self) {
        let mut inner = self.lock();
        inner.waiting = None;
        inner.given_up += 1;
        drop(inner);
        self.changed.notify_all();
    }

    /// Whether an answer came that nothing waited for, since the last call.
    pub fn take_unexpected(&self) -> bool {
        std::mem::take(&mut self.lock().unexpected)
    }

    /// An answer comes.
    pub fn respond(&self, PageResponse { pasid, group, code }: PageResponse) {
        let mut inner = self.lock();
        if inner.waiting == Some(Waiting::For { pasid, group }) {
            inner.waiting = Some(Waiting::Answered(code));
            self.changed.notify_all();
        } else {
            inner.unexpected = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a12_an_answer_is_for_the_request_that_waits_for_it() {
        let requests = PageRequests::default();
        let code = ResponseCode::Success;
        let may = requests.may_ask();
        let group = requests.begin(may, Some(Pasid(7))).unwrap();
        for (pasid, group) in [(None, group), (Some(Pasid(8)), group), (Some(Pasid(7)), group + 1)] {
            requests.respond(PageResponse { pasid, group, code });
            assert!(requests.take_unexpected());
        }
        requests.respond(PageResponse { pasid: Some(Pasid(7)), group, code });
        requests.respond(PageResponse { pasid: Some(Pasid(7)), group, code });
        assert_eq!((requests.wait(), requests.take_unexpected()), (Some(code), true));
        let next = requests.begin(may, None).unwrap();
        assert_eq!(next, group + 1);
        std::thread::scope(|threads| {
            let waits = threads.spawn(|| requests.wait());
            requests.give_up();
            assert_eq!(waits.join().unwrap(), None);
        });
        requests.respond(PageResponse { pasid: None, group: next, code });
        assert!(requests.take_unexpected());
        assert_eq!(requests.begin(may, None), None, "a task of before");
        let may = requests.may_ask();
        let last = (0..512).filter_map(|_| requests.begin(may, None)).max();
        assert_eq!(last, Some(511));
    }
}
