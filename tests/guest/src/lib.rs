//! What the guest programs share: the kernel's VFIO with type1 and with iommufd, the edu function, counters of its
//! perf, memory that a device writes, and (in the nested bench's host) what the kernel's IOMMU driver holds for
//! Causeway.
//!
//! The programs run inside a guest, or in the nested bench's host to show the reference behaviour. They speak to the
//! kernel that they run on, never to Causeway: what they see is what any driver in that kernel would see. Only
//! `host_trace` reads what Causeway wrote.

pub mod affinity;
pub mod edu;
pub mod first_stage;
pub mod host_trace;
pub mod iommufd;
pub mod kernel_log;
pub mod kernel_tables;
pub mod memory;
pub mod perf;
pub mod random;
pub mod vfio;
