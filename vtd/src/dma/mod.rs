//! The way of an emulated device to guest memory (rule 6).

mod ats;
mod counting;
mod dirty;
mod due;
mod endpoint;
pub(crate) mod iotlb;
#[cfg(test)]
mod iotlb_test;
mod noted;
mod page_request;
mod session;
mod walk;

pub use ats::NoTranslation;
pub use dirty::{DirtyLog, DirtySlice};
pub use endpoint::{DmaError, Endpoint};
pub use page_request::{PageRequest, PageRequested};
pub use session::DmaSession;
