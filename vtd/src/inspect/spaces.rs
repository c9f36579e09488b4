//! What functions were granted, as the unit has it: in one moment between two drains, and no more of it than is asked
//! for.

use vm_memory::GuestMemoryBackend;

use crate::ids::Requester;
use crate::listener::Mapping;
use crate::range::IovaRange;
use crate::space::{PagedSpace, SpaceKey};
use crate::unit::Unit;

/// How large a space is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SpaceSize {
    /// Which space.
    pub key: PagedSpace,
    /// The functions that are in it.
    pub members: Vec<Requester>,
    /// Mappings that the listener was told of; `None`: nothing, because a bound was exhausted.
    pub mappings: Option<usize>,
}

impl<M: GuestMemoryBackend + Clone + Send + Sync> Unit<M> {
    /// The spaces that have members. Waits for a drain.
    pub fn space_sizes(&self) -> Vec<SpaceSize> {
        let spaces = self.spaces();
        let size = |(key, members, mappings): (PagedSpace, &std::collections::BTreeSet<Requester>, Option<usize>)| {
            SpaceSize { key, members: members.iter().copied().collect(), mappings }
        };
        spaces.sizes().map(size).collect()
    }

    /// Calls `look` with what `requester` is attached to, and with what it was granted there from `range`, ascending;
    /// nothing unless it is a paged space. Waits for a drain; the lock order is that of [`Unit::audit`]. `None`: no
    /// such function is assigned.
    pub fn granted<T>(
        &self,
        requester: Requester,
        range: IovaRange,
        look: impl FnOnce(&SpaceKey, &mut dyn Iterator<Item = Mapping>) -> T,
    ) -> Option<T> {
        let spaces = self.spaces();
        let attached = spaces.attached_to(requester)?;
        let part = match attached {
            SpaceKey::Paged(space) => spaces.open_shadow(space, range),
            SpaceKey::Identity | SpaceKey::Blocked => None,
        };
        Some(look(&attached, &mut part.into_iter().flatten()))
    }
}
