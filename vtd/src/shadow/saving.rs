//! What is saved of spaces, and how a restored unit has their boundaries again.

use std::collections::BTreeMap;

use vm_memory::GuestMemoryBackend;

use super::Spaces;
use crate::core::Core;
use crate::listener::Mapping;
use crate::registers::saved_space::{SAVED_EXTENTS, SpaceState};
use crate::space::PagedSpace;

impl Spaces {
    /// What the listener was told of each space that is not blocked, as far as it is saved.
    pub(crate) fn saved(&self) -> Vec<SpaceState> {
        let mut room = SAVED_EXTENTS;
        let mut saved = Vec::new();
        for (space, extents) in self.open_shadows() {
            let state = SpaceState::of(space, extents, room);
            room -= state.extents.len();
            if !state.extents.is_empty() {
                saved.push(state);
            }
        }
        saved
    }

    /// [`Self::refresh`], where a space that gets its first member leads where its tables say, with the boundaries that
    /// were `told` of it (ascending and disjoint) wherever that is the same.
    pub(crate) fn refresh_as_told<M: GuestMemoryBackend>(
        &mut self,
        core: &Core<M>,
        told: BTreeMap<PagedSpace, Vec<Mapping>>,
    ) {
        self.told = told;
        self.refresh(core);
        self.told.clear();
    }
}
