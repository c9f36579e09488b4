//! Device models: PCI core, IOAPIC, serial, edu and the assigned vfio-pci function.
#![forbid(unsafe_code)]

pub mod ats;
pub mod bus;
#[cfg(test)]
mod bus_test;
pub mod debug_exit;
pub mod dma;
pub mod edu;
pub mod fw_cfg;
pub mod host;
pub mod ioapic;
pub mod legacy;
pub mod page_requests;
pub mod pc_testdev;
pub mod pci;
pub mod pic;
pub mod pinblk;
pub mod pit;
pub mod pm;
pub mod rtc;
pub mod saved;
#[cfg(test)]
mod saved_test;
pub mod serial;
mod sync;
#[cfg(test)]
mod testing;
pub mod timers;
mod told;
pub mod vfio_pci;
pub mod virtio;

pub use bus::{Bus, BusDevice};
pub use told::Told;
