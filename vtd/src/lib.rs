//! An emulated Intel VT-d remapping unit: pure logic over guest memory.
#![forbid(unsafe_code)]

pub mod ids;
pub mod space;

pub use ids::{DomainId, Gpa, Iova, Pasid, Requester, SourceId, UnitId};
pub use space::{
    Applied, AttachRefused, MapOp, Mapping, Msi, MsiSink, PagedSpace, Perm, Refusal, RefusalCause, SpaceKey,
    SpaceListener, Stage,
};
