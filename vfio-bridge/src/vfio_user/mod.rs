//! vfio-user: functions that another process emulates, over a Unix socket (the protocol's specification, version 0.9.2
//! and later, is `docs/interop/vfio-user.rst` of QEMU's source).
//!
//! ```text
//!   VfioPci ──► UserFunction ─┐                        ┌─ server: any process, or `serve` of this crate
//!                             ├─► Connection ══socket══┤
//!   Bridge ───► VfioUser ─────┘    ▲  DMA by message   └─ memory: what was mapped, by the file of guest RAM
//!   unit ◄──── Requests ◄──────────┘
//! ```
//!
//! There is no host IOMMU below: the process is given the file behind guest memory and the ranges that it may use, and
//! is trusted not to look further. Where it asks by message instead, [`VfioUser`] holds it to what is mapped, as an
//! IOMMU would, and what is blocked is told to the unit ([`crate::Requests`]), which records the fault.
//!
//! A *confined* process ([`UserOptions::confined`]) is given no file: each access is a message, and what is not granted
//! at that moment is blocked. What it does not let go of is revoked all the same.
//!
//! # Deadline
//! Each call has one ([`CALL_DEADLINE`]). A process that does not answer is cut off: its connection is closed, and its
//! function reads as all ones. If it was asked to let go of memory and it still runs, the memory is not revoked, and
//! the unmap fails: the bridge then stops the machine before the guest is told that the unmap is done (D-3). A process
//! that ended, that closed its end, or that is confined, holds nothing any more.
//!
//! # Locks
//! What is mapped (`Granted`) is never locked while a message is under way, so a request of the device is answered also
//! while it is asked to unmap. Nothing else is shared.

mod connection;
mod function;
mod granted;
mod host;
mod logging;
mod messages;
mod migration;
mod server;
mod socket;
mod wire;

pub use connection::{CALL_DEADLINE, CallError, ConnectError};
pub use function::UserFunction;
pub use host::{UserEndpoint, UserOptions, VfioUser};
pub use migration::{MOST_STATE, ServedState};
pub use server::{ClientMemory, DmaRefused, ServeError, Served, serve};
