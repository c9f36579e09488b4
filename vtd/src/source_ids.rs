//! Which source id the requests of a function carry, beside the name that it was added with.

use std::collections::BTreeMap;

use crate::ids::{Requester, SourceId};

/// What the requests of a function carry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Source {
    /// An id of its own, or of the bridge that makes its requests.
    Own(SourceId),
    /// An id that another function has as well.
    Shared(SourceId),
    /// None.
    None,
}

impl Source {
    /// The id, if it is the function's own.
    pub(crate) fn own(self) -> Option<SourceId> {
        match self {
            Self::Own(id) => Some(id),
            Self::Shared(_) | Self::None => None,
        }
    }

    /// The id, whosever it is.
    pub(crate) fn id(self) -> Option<SourceId> {
        match self {
            Self::Own(id) | Self::Shared(id) => Some(id),
            Self::None => None,
        }
    }

    /// `name` with the id that a fault record shows.
    pub(crate) fn seen(self, name: Requester) -> Requester {
        Requester { sid: self.id().unwrap_or(name.sid), ..name }
    }
}

/// The functions whose requests do not carry the id of their name, or not alone. Empty in a machine whose buses stay as
/// they were.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(crate) struct Sources(pub(crate) BTreeMap<Requester, Source>);

impl Sources {
    pub(crate) fn of(&self, name: Requester) -> Source {
        self.0.get(&name).copied().unwrap_or(Source::Own(name.sid))
    }
}
