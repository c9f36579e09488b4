//! The seam between the unit and whatever makes its translations real: map operations, and the listener that the unit
//! notifies. `vfio-bridge` implements [`SpaceListener`]; nothing here knows about it.

use crate::ids::{Gpa, Iova, Requester, Stream};
use crate::range::{GpaRange, IovaRange};
use crate::space::{Perm, SpaceKey};

/// A run of IOVAs that leads to a run of guest-physical addresses. `len` is in bytes, a multiple of 4096, not 0, and
/// `iova + len - 1` does not overflow.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Mapping {
    /// First IOVA.
    pub iova: Iova,
    /// Guest-physical address that the first IOVA leads to.
    pub gpa: Gpa,
    /// Length in bytes.
    pub len: u64,
    /// What the device may do.
    pub perm: Perm,
}

impl Mapping {
    /// The last IOVA, inclusive.
    pub const fn last(&self) -> Iova {
        Iova(self.iova.0 + (self.len - 1))
    }

    /// Its IOVAs.
    pub const fn range(&self) -> IovaRange {
        IovaRange::new(self.iova.0, self.last().0)
    }

    /// The part of it that leads into `targets`, both of whole pages; `None` for none.
    pub fn leading_into(&self, targets: GpaRange) -> Option<Self> {
        let (first, last) = (self.gpa.0, self.gpa.0 + (self.len - 1));
        let (from, to) = (first.max(targets.first), last.min(targets.last));
        let part = || Self { iova: Iova(self.iova.0 + (from - first)), gpa: Gpa(from), len: to - from + 1, ..*self };
        (from <= to).then(part)
    }
}

/// One change of a space.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MapOp {
    /// Nothing in the range is reachable any more. It may be larger than what is mapped (up to the whole of 2^64) and
    /// never cuts a mapping that stays, except as behaviour B-8 allows.
    Unmap(IovaRange),
    /// A new mapping; nothing was mapped in its range.
    Map(Mapping),
}

/// What became of a batch of operations.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Applied {
    /// The maps that did not become real, in the order of the batch. The shadow forgets them, so that they are tried
    /// again. A mapping of the batch may be refused in part: then each lost piece is a refusal of its own. Remainders
    /// that were lost while an extent was cut (B-8) are refusals too. An unmap cannot fail outwards.
    pub refused: Vec<Refusal>,
}

/// A mapping, or a piece of one, that the host refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// The IOVAs that are not mapped.
    pub range: IovaRange,
    /// Why.
    pub cause: RefusalCause,
    /// One of those in the space for which it was refused (the one the guest's fault record names).
    pub stream: Stream,
}

/// Why a host refused a mapping.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum RefusalCause {
    /// The host's limit of mappings (`ENOSPC`; type1's `dma_entry_limit`).
    Limit,
    /// The limit of locked memory (`ENOMEM`; RLIMIT_MEMLOCK).
    Memlock,
    /// Outside the IOVA ranges of the host (`EINVAL`).
    Range,
    /// The guest-physical address leads to nothing that can be mapped. Tried again when that changed
    /// ([`Unit::memory_changed`](crate::Unit::memory_changed)).
    Target,
    /// Anything else.
    Other,
}

impl RefusalCause {
    /// Whether the same mapping may be taken later, when others are gone.
    pub const fn may_pass(self) -> bool {
        matches!(self, Self::Limit | Self::Memlock | Self::Other)
    }
}

/// Why an endpoint could not be attached to a space. Unless the variant says otherwise, the endpoint is blocked:
/// nothing is reachable.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AttachRefused {
    /// The requester was never registered with the listener.
    #[error("{0} is not a device that the bridge knows")]
    UnknownRequester(Requester),
    /// The host refused some of the mappings of the space; the rest are in place. The shadow of a paged space forgets
    /// what was refused, as with [`Applied::refused`]: nobody else was in the space. (With others there it is
    /// [`Self::Shared`].)
    #[error("{} mappings of the space were refused by the host", .0.len())]
    Partial(Vec<Refusal>),
    /// Others have the paged space with all of its mappings, and the host refused some of them to this endpoint, so it
    /// cannot be there. What was refused first is named; it is worth another try when there is room again, or memory
    /// where its leaves lead.
    #[error("others are in the space, and {} of its mappings were refused by the host", .0.len())]
    Shared(Vec<Refusal>),
    /// The host could not switch the device.
    #[error("the host could not attach {requester}: {reason}")]
    Host {
        /// The requester.
        requester: Requester,
        /// What the host said.
        reason: String,
    },
}

/// Hears what changes in the spaces of a unit.
///
/// The unit calls it in order, never twice at once. When a call returns, what was unmapped can no longer be reached by
/// any device.
///
/// The queue lock of the unit is held meanwhile (rule 11), in the thread whose register write or call it was. So from
/// inside, as from inside a [`RemapListener`](crate::RemapListener) or an [`MsiSink`](crate::MsiSink), of all methods
/// of [`Unit`](crate::Unit) only these may be called, which do not take that lock: `config`, `stats`, `walk`, `remap`,
/// `deliver`, `record_remap_fault`, `set_remap_listener`, and except by a `RemapListener` `read`. Nor is an
/// [`Endpoint`](crate::Endpoint) to be dropped. What takes the lock would wait for ever; debug builds panic instead.
pub trait SpaceListener: Send + Sync {
    /// `stream` moves from whatever it was attached to, to `space`. `live` yields what is mapped in a paged space,
    /// in ascending order, with the boundaries that it was mapped with (B-5, B-7); it is empty for
    /// [`SpaceKey::Identity`] (the listener knows guest RAM itself) and [`SpaceKey::Blocked`]. A mapping that the
    /// device has before and after is not touched.
    fn attach(
        &self,
        stream: Stream,
        space: &SpaceKey,
        live: &mut dyn Iterator<Item = Mapping>,
    ) -> Result<(), AttachRefused>;

    /// `stream` is no longer behind the unit; nothing of it stays mapped.
    fn detach(&self, stream: Stream);

    /// The mappings of `space` change. Unmaps come before maps.
    fn apply(&self, space: &SpaceKey, ops: &[MapOp]) -> Applied;
}
