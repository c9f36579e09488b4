//! Pinned pages of software devices (D): whose I/O outlives a session of the unit, since it is in flight in the host's
//! kernel, for one.
//!
//! ```text
//!   device ──► PinClient ──pin, unpin──► Pins, beside the ledger of its host space
//!     ▲                                    │ begin: the window is closed
//!     └────── UnmapNotifier ◄── Client ◄───┘ end: what is left is revoked
//! ```
//!
//! `book` is which page is pinned by whom, `client` a device and the thread on which it hears of unmaps, `clear` the
//! order in which both meet when something is unmapped, and `handle` what a device is given. `docs/bridge.md` has the
//! protocol.

pub(crate) mod book;
pub(crate) mod clear;
pub(crate) mod client;
pub(crate) mod handle;
pub(crate) mod sync;
