//! An emulated Intel VT-d remapping unit: pure logic over guest memory.
//!
//! A [`Unit`] is the register file, the invalidation queue and the walks of the guest's tables. Two kinds of devices
//! stand behind it:
//!
//! - **assigned functions** ([`Unit::add_requester`]): the unit keeps a *shadow* of each space that a function is
//!   attached to, compares it with the guest's tables at each invalidation, and tells a [`SpaceListener`] what changed;
//! - **emulated devices** ([`Unit::endpoint`]): their accesses go through a [`DmaSession`], which walks the tables itself.
//!
//! ```text
//!  vCPU --MMIO--> unit --> queue --> spaces --> shadow: diff --> SpaceListener (the bridge to the host IOMMU)
//!                   |                   ^
//!                   v                   | walk, tables
//!               registers          guest memory <-- walk -- endpoint <-- emulated device
//! ```
//!
//! Messages of both kinds go through [`Unit::remap`] or [`Unit::deliver`]: interrupt remapping (a [`RemapListener`] hears
//! when routes are to be made again).
//!
//! Legacy mode is offered.
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate self as vtd;

pub mod audit;
pub mod config;
mod endpoint;
mod extents;
mod fault;
pub mod ids;
mod iotlb;
#[cfg(test)]
mod iotlb_test;
mod memory;
mod queue;
mod registers;
mod remap;
mod resync;
#[cfg(test)]
#[path = "../tests/unit/rig.rs"]
mod rig;
mod shadow;
pub mod space;
mod spaces;
pub mod spec;
mod state;
mod stats;
mod sync;
mod tables;
mod unit;
mod waiting;
mod walk;

pub use audit::{Audit, Difference};
pub use config::{Bounds, ConfigError, REGISTER_WINDOW, UnitConfig};
pub use endpoint::{DmaError, DmaSession, Endpoint};
pub use fault::{Access, Fault};
pub use ids::{DomainId, Gpa, Iova, Pasid, Requester, SourceId, UnitId};
pub use remap::{EntriesChanged, RemapError, RemapFault, RemapListener, interrupt_index};
pub use space::{
    Applied, AttachRefused, MapOp, Mapping, Msi, MsiSink, PagedSpace, Perm, Refusal, RefusalCause, SpaceKey,
    SpaceListener, Stage,
};
pub use spaces::SpaceView;
pub use state::{EventRegisters, FaultRecord, State};
pub use stats::{DescriptorStats, UnitStats};
pub use unit::Unit;
