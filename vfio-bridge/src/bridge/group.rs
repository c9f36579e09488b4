//! A host IOMMU group is a set of devices: all of them are in one space (C-1 to C-3).

use std::collections::BTreeMap;

use vtd::{Requester, SpaceKey};

/// The functions of one host group that this virtual machine has, and the space that each of them wants.
#[derive(Clone, Debug, Default)]
pub struct Group {
    /// `None`: not behind a unit any more, so it has no say.
    wants: BTreeMap<Requester, Option<SpaceKey>>,
}

impl Group {
    /// Adds a member, which wants nothing to be reachable until it is attached.
    pub fn add(&mut self, requester: Requester) {
        self.wants.insert(requester, Some(SpaceKey::Blocked));
    }

    /// Takes a member away.
    pub fn remove(&mut self, requester: Requester) {
        self.wants.remove(&requester);
    }

    /// The members, in ascending order.
    pub fn members(&self) -> impl Iterator<Item = Requester> {
        self.wants.keys().copied()
    }

    /// `requester` wants `space` from now on; `None` when it has no say any more.
    pub fn set(&mut self, requester: Requester, space: Option<SpaceKey>) {
        self.wants.insert(requester, space);
    }

    /// What `requester` wants.
    pub fn wanted(&self, requester: Requester) -> Option<SpaceKey> {
        self.wants.get(&requester).copied().flatten()
    }

    /// The space that all members with a say want. Guests switch one device at a time, so disagreement is normal, and
    /// passes: until then the group is blocked.
    pub fn agreed(&self) -> SpaceKey {
        let mut wishes = self.wants.values().flatten();
        match wishes.next() {
            Some(first) if wishes.all(|other| other == first) => *first,
            _ => SpaceKey::Blocked,
        }
    }
}
