//! From IOMMU notifications to what the host IOMMU holds.
//!
//! [`Bridge`] implements [`vtd::SpaceListener`]. Per space of the host it keeps a [`ledger`], which records exactly
//! what the kernel was handed, and issues the fewest host operations that make a change true. Backends implement
//! [`HostIommu`]: [`Type1`] and [`Iommufd`] are the kernel's, [`vfio_user`] are functions that other processes emulate,
//! [`model`] is an in-memory host for tests. A [`Function`] is what is assigned.

mod bridge;
mod function;
mod host;
mod stats;
mod trace;
pub mod vfio_user;

pub use bridge::dirty::{DirtyPages, DirtyRace};
pub use bridge::dirty_reads::{DirtyError, DirtyRead};
pub use bridge::group::Group;
pub use bridge::guest_map::{Backing, GuestMap, GuestMapError, HostMem, MemKind, PAGE_SIZE, Piece, Region};
pub use bridge::ledger;
pub use bridge::limits::{Limits, Memlock};
pub use bridge::mappings::Mappings;
pub use bridge::pin::book::PinError;
pub use bridge::pin::client::{Notice, PinLimits, PinStats, UnmapNotifier};
pub use bridge::pin::handle::{PinClient, Pinned, PinnedPage, RegisterClientError};
pub use bridge::{Bridge, Quarantine, RegisterError};
pub use function::check::{Bdf, BdfError, CheckedFunction, HostPaths, OpenError, check_memlock};
pub use function::reset::{NoBusReset, ResetScope, ResetWay};
pub use function::vfio::HostFunction;
pub use function::{DmaMessages, Function, IrqKind, Migrates, RegionInfo, RegionKind, Requests};
pub use host::dirty::{DirtyBitmap, DirtyKnowledge, DirtySupport, UnmapWindow};
pub use host::iommufd::{BoundDevice, Iommufd};
pub use host::software::Software;
pub use host::type1::Type1;
pub use host::{GroupId, HostDevice, HostIommu, HostSpaceId, HostStream, Map, MapRefused, Placement, UnmapRange};
pub use host::{faulty, model};
pub use stats::{DeviceStats, RefusedMaps};
pub use trace::{Trace, TracedHost, TracedListener};
pub use vfio_ioctls::VfioDeviceFd;
