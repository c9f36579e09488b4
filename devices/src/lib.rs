//! Device models: PCI core, IOAPIC, serial, edu and the assigned vfio-pci function.
#![forbid(unsafe_code)]

pub mod bus;
pub mod host;
pub mod pci;

pub use bus::{Bus, BusDevice};
