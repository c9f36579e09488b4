//! Where an emulated function's DMA goes: through its endpoint of the remapping unit, or straight to memory where there
//! is no unit.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vtd::{Endpoint, Iova};

/// The access did not happen, or not in full. Where a unit blocked it, the guest has a fault record.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the DMA access was not carried out")]
pub struct DmaFailed;

/// What an emulated function reads and writes by DMA.
pub trait DmaTarget: Send + Sync {
    /// Reads `data.len()` bytes at `iova`.
    fn read(&self, iova: Iova, data: &mut [u8]) -> Result<(), DmaFailed>;
    /// Writes `data` at `iova`.
    fn write(&self, iova: Iova, data: &[u8]) -> Result<(), DmaFailed>;
}

impl<M: GuestMemoryBackend + Clone + Send + Sync> DmaTarget for Endpoint<M> {
    fn read(&self, iova: Iova, data: &mut [u8]) -> Result<(), DmaFailed> {
        self.read(iova, data).map_err(|e| {
            log::debug!("{}: {e}", self.requester());
            DmaFailed
        })
    }
    fn write(&self, iova: Iova, data: &[u8]) -> Result<(), DmaFailed> {
        self.write(iova, data).map_err(|e| {
            log::debug!("{}: {e}", self.requester());
            DmaFailed
        })
    }
}

/// Guest memory without a remapping unit in front of it (`--iommu none`): an IOVA is a guest-physical address.
pub struct DirectMemory<M>(pub M);

impl<M: GuestMemoryBackend + Send + Sync> DmaTarget for DirectMemory<M> {
    fn read(&self, iova: Iova, data: &mut [u8]) -> Result<(), DmaFailed> {
        self.0.read_slice(data, GuestAddress(iova.0)).map_err(|_| DmaFailed)
    }
    fn write(&self, iova: Iova, data: &[u8]) -> Result<(), DmaFailed> {
        self.0.write_slice(data, GuestAddress(iova.0)).map_err(|_| DmaFailed)
    }
}

#[cfg(test)]
#[path = "dma_test.rs"]
mod dma_test;
