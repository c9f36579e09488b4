//! PCI: configuration space, the root of the hierarchy, and how BARs reach the MMIO bus.

pub mod bridge;
pub mod config;
pub mod decode;
#[cfg(test)]
mod decode_test;
pub mod express;
pub mod host_bridge;
pub mod pcie_pci_bridge;
pub mod root;
pub mod root_port;
#[cfg(test)]
mod root_port_test;

use crate::saved::Saves;

pub use bridge::{Bridge, Path};
pub use config::{BarKind, ConfigSpace, Identity};
pub use decode::{BarTarget, Bells, Decoder};
pub use host_bridge::HostBridge;
pub use pcie_pci_bridge::{PciePciBridge, PciePciBridgeWiring};
pub use root::{ConfigPorts, Ecam, PciRoot, SlotError, gsi_of};
pub use root_port::{Occupied, RootPort, RootPortWiring, SlotState};

/// One function, as software sees it through configuration space. Called from any vCPU thread.
pub trait PciFunction: Send + Sync {
    /// Reads `data.len()` bytes (1, 2 or 4) at `offset`; `offset + data.len()` is at most 4096. Every byte is written.
    fn config_read(&self, offset: u16, data: &mut [u8]);
    /// Writes `data` (1, 2 or 4 bytes) at `offset`; `offset + data.len()` is at most 4096.
    fn config_write(&self, offset: u16, data: &[u8]);
    /// This gets through the bridges above it from now on. Where no requests get upwards ([`Path::masters`]), the
    /// function does none once this returns, whatever its own Bus Master says. Called before the function is reached
    /// for the first time, and with the registers of the bridge held: it waits for none of them. What a bridge forwards
    /// downwards needs nothing here: the decoder has it.
    fn path_changed(&self, _path: &Path) {}
    /// The function as a bridge, if it is one.
    fn as_bridge(&self) -> Option<&dyn Bridge> {
        None
    }
    /// No BAR decoded, no bus mastering, no interrupt from now on: what must hold of every function before the first is
    /// reset, for the reset of one can be that of its whole bus (F-4). Only for functions of the host.
    fn quiesce(&self) {}
    /// Back to the state after power-on: no BAR decoded, no bus mastering, no interrupt. The machine calls it when the
    /// guest resets, after [`PciFunction::quiesce`] of all functions and before the remapping unit is reset (rule 12).
    fn reset(&self);
    /// Its state, if it can be saved and put back.
    fn saves(&self) -> Option<&dyn Saves> {
        None
    }
}
