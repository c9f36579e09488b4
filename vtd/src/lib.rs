//! An emulated Intel VT-d remapping unit: pure logic over guest memory.
//!
//! A [`Unit`] is the register file, the invalidation queue and the walks of the guest's tables. Two kinds of devices
//! stand behind it:
//!
//! - **assigned functions** ([`Unit::add_requester`]): the unit keeps a *shadow* of each space that a function is
//!   attached to, compares it with the guest's tables at each invalidation, and tells a [`SpaceListener`] what changed;
//! - **emulated devices** ([`Unit::endpoint`]): their accesses go through a [`DmaSession`], which walks the tables
//!   itself.
//!
//! ```text
//!  vCPU --MMIO--> unit --> queue --> spaces --> shadow: diff --> SpaceListener (the bridge to the host IOMMU)
//!                   |                   ^
//!                   v                   | walk, tables
//!               registers          guest memory <-- walk -- endpoint <-- emulated device
//! ```
//!
//! Messages of both kinds go through [`Unit::remap`] or [`Unit::deliver`]: interrupt remapping (a [`RemapListener`]
//! hears when routes are to be made again).
//!
//! Legacy mode is offered, and scalable mode where [`UnitConfig`] asks for it.
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate self as vtd;

mod ats;
pub mod audit;
pub mod config;
mod core;
mod dma;
mod faults;
pub mod ids;
pub mod inspect;
pub mod listener;
mod memory;
pub mod msi;
mod queue;
mod queue_lock;
mod range;
mod registers;
#[cfg(test)]
#[path = "../tests/unit/rig.rs"]
mod rig;
mod scope;
mod shadow;
mod source_ids;
pub mod space;
pub mod spec;
mod stats;
mod sync;
mod tables;
mod tail_bells;
mod tails;
mod unit;

pub use ats::{AtsFunction, Completion, PageResponse, ResponseCode, TlbScope};
pub use audit::{Audit, Difference};
pub use config::{Bounds, ConfigError, REGISTER_WINDOW, Stages, UnitConfig};
pub use dma::{DirtyLog, DirtySlice, DmaError, DmaSession, Endpoint, NoTranslation, PageRequest, PageRequested};
pub use faults::{Access, Fault, RequestType};
pub use ids::{DomainId, Gpa, Iova, Pasid, Requester, SourceId, Stream, UnitId};
pub use listener::{Applied, AttachRefused, MapOp, Mapping, Refusal, RefusalCause, SpaceListener};
pub use msi::{Msi, MsiSink};
pub use queue_lock::InsideNotification;
pub use range::{GpaRange, IovaRange};
pub use registers::event::EventRegisters;
pub use registers::page::RegisterPage;
pub use registers::performance::{Counter, PerformanceState};
pub use registers::restore::RestoreError;
pub use registers::saved_space::{ExtentState, SpaceState};
pub use registers::state::{FaultRecord, PageRequestRegisters, State, StateVersion};
pub use shadow::SpaceView;
pub use space::{PagedSpace, Perm, SpaceKey, Tables};
pub use stats::{DescriptorStats, UnitStats};
pub use tables::interrupt::{
    EntriesChanged, Posting, RemapError, RemapFault, RemapListener, Remapped, interrupt_index,
};
pub use tail_bells::{QueueShape, TailBells};
pub use unit::Unit;
