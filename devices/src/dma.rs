//! Where an emulated function's DMA goes: through its endpoint of the remapping unit, or straight to memory where there
//! is no unit. What the unit leads into a BAR of another function goes to that (B-10).

use std::ops::Range;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vtd::{DmaError, Endpoint, Gpa, Iova};

use crate::BusDevice;
use crate::pci::Decoder;

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

/// Memory, and the BARs of other functions, behind a remapping unit.
///
/// A BAR is reached as a processor reaches it that traps: one of the host's function through its gate (F-2). That is
/// after the session of the translation, which must span no such access; so it may come after an invalidation that
/// waited for the session, as a posted write on a bus may. A function never reaches itself: it may be in the middle of
/// what began this access.
pub struct BehindUnit<M: GuestMemoryBackend + Clone + Send + Sync> {
    /// The way to memory.
    pub endpoint: Endpoint<M>,
    /// Knows the BARs.
    pub decoder: Arc<Decoder>,
}

/// An access to a device at an offset, of this part of the data.
type ToRegisters<'a> = dyn FnMut(&dyn BusDevice, u64, Range<usize>) + 'a;

/// Lengths of the aligned pieces of 8, 4, 2 or 1 bytes that `len` bytes at `address` are.
fn pieces(address: u64, len: usize) -> impl Iterator<Item = Range<usize>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let from = at;
        let fits = |n: &usize| *n <= len - from && (address + from as u64).is_multiple_of(*n as u64);
        at += [8, 4, 2, 1].into_iter().find(fits)?;
        Some(from..at)
    })
}

impl<M: GuestMemoryBackend + Clone + Send + Sync> BehindUnit<M> {
    /// Does `access` for the rest of `len` bytes, from the first that did not reach memory. `to_memory` is for what
    /// lies behind a BAR.
    fn go_on(
        &self,
        iova: Iova,
        len: usize,
        mut error: DmaError,
        access: &mut ToRegisters<'_>,
        to_memory: &mut dyn FnMut(Iova, Range<usize>) -> Result<(), DmaError>,
    ) -> Result<(), DmaFailed> {
        loop {
            let own = self.endpoint.requester();
            let failed = |error: DmaError| {
                log::debug!("{own}: {error}");
                DmaFailed
            };
            let DmaError::NoMemory { iova: at, gpa: Gpa(gpa) } = error else { return Err(failed(error)) };
            let done = at.0.checked_sub(iova.0).map_or(len, |done| done as usize);
            // To the end of the page: what follows leads elsewhere.
            let part = len.checked_sub(done).ok_or(DmaFailed)?.min((0x1000 - (at.0 & 0xfff)) as usize);
            for piece in pieces(gpa, part) {
                let (address, piece) = (gpa + piece.start as u64, done + piece.start..done + piece.end);
                let found = self.decoder.find(address, piece.len()).filter(|(sid, ..)| *sid != own.sid);
                let (_, offset, device) = found.ok_or_else(|| failed(error))?;
                access(&*device, offset, piece);
            }
            let done = done + part;
            if part == 0 || done == len {
                return if part == 0 { Err(failed(error)) } else { Ok(()) };
            }
            let Some(next) = iova.0.checked_add(done as u64) else { return Err(DmaFailed) };
            match to_memory(Iova(next), done..len) {
                Ok(()) => return Ok(()),
                Err(next) => error = next,
            }
        }
    }
}

impl<M: GuestMemoryBackend + Clone + Send + Sync> DmaTarget for BehindUnit<M> {
    fn read(&self, iova: Iova, data: &mut [u8]) -> Result<(), DmaFailed> {
        let Err(error) = self.endpoint.read(iova, data) else { return Ok(()) };
        let len = data.len();
        let data = std::cell::RefCell::new(data);
        self.go_on(
            iova,
            len,
            error,
            &mut |device, offset, piece| device.read(offset, &mut data.borrow_mut()[piece]),
            &mut |iova, rest| self.endpoint.read(iova, &mut data.borrow_mut()[rest]),
        )
    }

    fn write(&self, iova: Iova, data: &[u8]) -> Result<(), DmaFailed> {
        let Err(error) = self.endpoint.write(iova, data) else { return Ok(()) };
        self.go_on(
            iova,
            data.len(),
            error,
            &mut |device, offset, piece| device.write(offset, &data[piece]),
            &mut |iova, rest| self.endpoint.write(iova, &data[rest]),
        )
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
