//! Functions with a device-TLB (ATS), as the unit sends them messages: invalidations of what they cached, and responses
//! to their page requests. Sections 4.3 and 7.6.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};

use crate::ids::{Pasid, Requester, SourceId};
use crate::range::IovaRange;
use crate::source_ids::Sources;

/// Which of the translations in a device-TLB an invalidation is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TlbScope {
    /// Those of requests without PASID.
    WithoutPasid,
    /// Those of requests with this PASID.
    Pasid(Pasid),
    /// Those of requests with any PASID: Global Invalidate.
    EveryPasid,
}

/// Whether a function answers an invalidation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Completion {
    /// Nothing that was invalidated is in its device-TLB any more, and nothing that it asked for before gets there.
    Sent,
    /// It will not answer: the invalidation times out. Time itself is not modelled; it times out at once.
    Never,
}

/// What a page request, the last of its group, is answered with. Section 7.6.1.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ResponseCode {
    /// 0: all of the group was seen to.
    Success,
    /// 1: a request of the group asks for what there is not.
    InvalidRequest,
    /// 15, and the codes that are not used: nothing is to be asked for any more.
    Failure,
}

impl ResponseCode {
    /// The code of these four bits.
    pub const fn from_bits(bits: u8) -> Self {
        match bits {
            0 => Self::Success,
            1 => Self::InvalidRequest,
            _ => Self::Failure,
        }
    }
}

/// An answer to a group of page requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageResponse {
    /// The PASID of the requests.
    pub pasid: Option<Pasid>,
    /// Index of the group, 0 to 511.
    pub group: u16,
    /// What became of it.
    pub code: ResponseCode,
}

/// A function with a device-TLB.
///
/// It is called with the queue lock of the unit held, by the thread that serves the queue: what a
/// [`SpaceListener`](crate::SpaceListener) may not call, it may not either, nor wait for a thread that may.
pub trait AtsFunction: Send + Sync {
    /// Forgets what it has cached of `range`, of requests for it that are under way, too.
    ///
    /// It need not wait for what it began with such a translation: as long as it looks a translation up and uses it in
    /// one [`DmaSession`](crate::DmaSession) of its endpoints, the unit waits for that.
    fn invalidate(&self, of: TlbScope, range: IovaRange) -> Completion;

    /// An answer to page requests; one that it does not wait for is unexpected.
    fn respond(&self, response: PageResponse);
}

/// The functions with a device-TLB behind a unit.
#[derive(Default)]
pub(crate) struct Functions(Mutex<BTreeMap<Requester, Weak<dyn AtsFunction>>>);

impl Functions {
    pub(crate) fn add(&self, requester: Requester, function: Weak<dyn AtsFunction>) {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).insert(requester, function);
    }

    /// The one that messages for `source` go to, and its name; one that is gone is forgotten.
    pub(crate) fn of(&self, sources: &Sources, source: SourceId) -> Option<(Requester, Arc<dyn AtsFunction>)> {
        let mut functions = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        functions.retain(|_, function| function.strong_count() > 0);
        let found = functions.iter().find(|(name, _)| sources.of(**name).own() == Some(source));
        found.and_then(|(name, function)| Some((*name, function.upgrade()?)))
    }
}
