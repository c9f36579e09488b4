//! The audit: at one quiet moment, a fresh walk of the guest's tables is compared with the shadow of each space, and
//! what each function is attached to with what the guest's root and context tables say. The shadows are handed on, so
//! that whoever holds the host's mappings compares his book in the same moment.
//!
//! **Translations are compared, not shapes**: leaves, extents and host mappings may be cut and joined as they like.
//!
//! **Pending or a difference.** A guest edits its tables first and invalidates later, so tables and shadow may disagree
//! at any moment without anybody being wrong. One look cannot tell; two can. What an audit finds to disagree it counts
//! as pending, and remembers: where, what the tables said, what the shadow said. When an invalidation that covers a
//! remembered piece has taken effect (before its wait status is written), the piece is looked at again:
//!
//! ```text
//!              audit: tables and shadow disagree              next audit: still so
//!   (nothing) ────────────────────────────────► remembered          ▲
//!       ▲                                           │ an invalidation │
//!       │   they agree, or one of them changed      ▼  covered it     │
//!       └──────────────────────────────────────── look ──────────► overdue ──► a difference
//!                                                      both as they were
//! ```
//!
//! So a difference is a piece whose entry was there before an invalidation of it began and is there after it completed,
//! and which the shadow missed. (A guest that changes an entry there and back while one drain runs, without an
//! invalidation of its own, breaks the protocol and could make that up.) What the listener refused in that drain is not
//! overdue: it is tried again at the next invalidation, and counted where it was refused. A space that a bound has
//! blocked is not compared with its tables.

pub(crate) mod book;
mod compare;
mod report;

pub use compare::{Piece, Target, compare, disagreements};
pub use report::{Audit, AuditHost, Difference};
