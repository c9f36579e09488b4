//! From IOMMU notifications to what the host IOMMU holds.
//!
//! [`Bridge`] implements [`vtd::SpaceListener`]. Per container of the host it keeps a [`ledger`], which records exactly
//! what the kernel was handed, and issues the fewest host operations that make a change true. Backends implement
//! [`HostIommu`]: [`Type1`] is the kernel's VFIO, [`vfio_user`] are functions that other processes emulate, [`model`]
//! is an in-memory host for tests.

mod bridge;
mod container;
mod function;
mod group;
mod guest_map;
mod host;
pub mod ledger;
mod limits;
pub mod model;
mod open;
mod reset;
mod stats;
mod trace;
mod type1;
pub mod vfio_user;

pub use bridge::{Bridge, Quarantine, RegisterError};
pub use function::{HostFunction, IrqKind, RegionInfo, RegionKind};
pub use group::Group;
pub use guest_map::{Backing, GuestMap, GuestMapError, HostMem, MemKind, PAGE_SIZE, Piece, Region};
pub use host::{ContainerId, GroupId, HostIommu, Hosts, Map, MapRefused, UnmapRange};
pub use limits::{INTERRUPT_WINDOW, IovaRange, Limits, Memlock};
pub use open::{Bdf, BdfError, CheckedFunction, HostPaths, OpenError, check_memlock};
pub use reset::{NoBusReset, ResetScope, ResetWay};
pub use stats::{DeviceStats, RefusedMaps};
pub use trace::{Trace, TracedHost, TracedListener};
pub use type1::Type1;
pub use vfio_ioctls::VfioDeviceFd;
