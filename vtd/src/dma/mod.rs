//! The way of an emulated device to guest memory (rule 6).

mod counting;
mod dirty;
mod due;
mod endpoint;
pub(crate) mod iotlb;
#[cfg(test)]
mod iotlb_test;
mod noted;
mod session;
mod walk;

pub use dirty::{DirtyLog, DirtySlice};
pub use endpoint::{DmaError, Endpoint};
pub use session::DmaSession;
