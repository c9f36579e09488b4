//! Which guest memory devices wrote (E-1 to E-4).
//!
//! ```text
//!   host's bitmap, by IOVA ──ledger──► guest-physical pages of a host space ──► logs of the groups in it ──► read
//!        ▲ at each read, and at each unmap             (at a read, and before a group leaves it)
//! ```
//!
//! A host knows IOVAs, and forgets what was dirty in a mapping when that goes. So an unmap reads it in the same step,
//! and what comes of it is kept by guest-physical address until somebody asks. Nothing is lost where mappings go for
//! other reasons: a switch, a split, a group that leaves, a host space that is given back. A host that cannot tell, or
//! whose call failed, is never taken for one that says "clean": then everything that the device can write is dirty.
//!
//! What vCPUs write is not known here: that is KVM's log. What emulated devices write is in the bitmap of the guest's
//! memory (`vtd`).

mod log;
mod pages;
mod tracking;

pub use self::log::DirtyRace;
pub(crate) use self::log::{All, GroupLog};
pub use self::pages::DirtyPages;
pub(crate) use self::tracking::{Found, Tracking};
