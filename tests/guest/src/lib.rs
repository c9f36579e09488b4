//! What the guest programs share: the kernel's VFIO type1 interface, the edu function, and memory that a device writes.
//!
//! The programs run inside a guest, or in the nested bench's host to show the reference behaviour. They speak to the
//! kernel that they run on, never to Causeway: what they see is what any driver in that kernel would see.

pub mod affinity;
pub mod edu;
pub mod kernel_log;
pub mod memory;
pub mod vfio;
