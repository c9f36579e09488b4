//! What a unit told its listener of its spaces, as it is saved. The tables say where a space leads, and not in
//! which pieces that was told: a restored unit that told it in others would have mappings cut later that never were one
//! (B-7, B-8).

use serde::{Deserialize, Serialize};

use crate::ids::{DomainId, Gpa, Iova};
use crate::listener::Mapping;
use crate::space::{PagedSpace, Perm, Tables};

/// Extents of all spaces together that are saved: more than any host has mappings for. Of what is beyond, the
/// boundaries are those of a look at everything when it is restored.
pub(crate) const SAVED_EXTENTS: usize = 1 << 18;

/// What was told of a space that has members. Nothing of it is believed when it is restored, but where the guest's
/// tables say the same.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpaceState {
    /// The domain id.
    pub domain: DomainId,
    /// Guest-physical address of the root of its second-stage tables.
    pub root: u64,
    /// Guest address width in bits: 39, 48 or 57.
    pub width: u8,
    /// Ascending, and none meets another one.
    pub extents: Vec<ExtentState>,
}

/// A mapping that the listener was told of: its first and its last IOVA, the guest-physical address that the first one
/// leads to, and what a device may do: 1 read, 2 write, 3 both.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ExtentState(pub u64, pub u64, pub u64, pub u8);

impl From<Mapping> for ExtentState {
    fn from(mapping: Mapping) -> Self {
        let permission = u8::from(mapping.perm.readable()) | u8::from(mapping.perm.writable()) << 1;
        Self(mapping.iova.0, mapping.last().0, mapping.gpa.0, permission)
    }
}

impl ExtentState {
    /// The mapping, if it is of whole pages and one that can be.
    fn mapping(self) -> Option<Mapping> {
        let Self(first, last, gpa, permission) = self;
        let perm = Perm::from_bits(permission & 1 != 0, permission & 2 != 0).filter(|_| permission < 4)?;
        let size = last.checked_sub(first)?;
        gpa.checked_add(size)?;
        // All of 2^64 has no length.
        let len = size.checked_add(1)?;
        let pages = [first, gpa, len].iter().all(|value| value.is_multiple_of(4096));
        pages.then_some(Mapping { iova: Iova(first), gpa: Gpa(gpa), len, perm })
    }
}

impl SpaceState {
    /// What was told of `space`: the first `room` of `extents`.
    pub(crate) fn of(space: PagedSpace, extents: impl Iterator<Item = Mapping>, room: usize) -> Self {
        let Tables::Second { root, width } = space.tables;
        let extents = extents.take(room).map(ExtentState::from).collect();
        Self { domain: space.domain, root: root.0, width, extents }
    }

    /// Its tables.
    pub(crate) fn tables(&self) -> Tables {
        Tables::Second { root: Gpa(self.root), width: self.width }
    }

    /// Its mappings.
    ///
    /// # Errors
    /// The first that can be none, or does not come after the one before it.
    pub(crate) fn mappings(&self) -> Result<Vec<Mapping>, ExtentState> {
        let mut before: Option<Iova> = None;
        let mapping = |extent: &ExtentState| {
            let mapping = extent.mapping().filter(|mapping| before.is_none_or(|before| before < mapping.iova));
            before = mapping.map(|mapping| mapping.last());
            mapping.ok_or(*extent)
        };
        self.extents.iter().map(mapping).collect()
    }
}
