//! Where an emulated function's DMA goes: through its endpoint of the remapping unit, or straight to memory where there
//! is no unit. What the unit leads into a BAR of another function goes to that (B-10).

use std::ops::Range;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vtd::{DmaError, DmaSession, Endpoint, Gpa, Iova, PageRequest, PageRequested};

use crate::BusDevice;
use crate::ats::{AtsFailed, AtsTarget, DeviceTlb};
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
    /// The same for a function with a device-TLB, where there is a unit that may have some.
    fn ats(&self) -> Option<&dyn AtsTarget> {
        None
    }
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
            self.to_registers(gpa, part, &mut |device, offset, piece| {
                access(device, offset, done + piece.start..done + piece.end);
            })
            .map_err(|DmaFailed| failed(error))?;
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

impl<M: GuestMemoryBackend + Clone + Send + Sync> BehindUnit<M> {
    /// Does `access` for each piece of the `len` bytes behind a BAR at `gpa`.
    fn to_registers(&self, gpa: u64, len: usize, access: &mut ToRegisters<'_>) -> Result<(), DmaFailed> {
        let own = self.endpoint.requester();
        for piece in pieces(gpa, len) {
            let found = self.decoder.find(gpa + piece.start as u64, piece.len()).filter(|(of, ..)| *of != own);
            let (_, offset, device) = found.ok_or(DmaFailed)?;
            access(&*device, offset, piece);
        }
        Ok(())
    }

    /// Does `transfer` with where the device-TLB, or else the unit, says that `iova` leads, and `access` for what lies
    /// behind a BAR there.
    fn by_tlb(
        &self,
        tlb: &DeviceTlb,
        (iova, len, write): (Iova, usize, bool),
        transfer: impl FnOnce(&DmaSession<'_, M>, Gpa) -> Result<(), DmaError>,
        access: &mut ToRegisters<'_>,
    ) -> Result<(), AtsFailed> {
        let failed = |error: &dyn std::fmt::Display| {
            log::debug!("{}: {iova}: {error}", self.endpoint.requester());
            AtsFailed::Failed
        };
        let pasid = self.endpoint.pasid();
        // An invalidation waits for the session, so what was looked up inside it may be used inside it.
        let session = self.endpoint.enter();
        let gpa = match tlb.look_up(pasid, iova, write) {
            Some(gpa) => gpa,
            None => {
                let asked = tlb.ask();
                let found = session.request_translation(iova, !write).map_err(|error| failed(&error))?;
                if found.untranslated_only() {
                    return Err(failed(&"it is for untranslated requests"));
                }
                if !(if write { found.write() } else { found.read() }) {
                    return Err(AtsFailed::Missing);
                }
                tlb.keep(asked, pasid, iova, found);
                let target = found.target();
                Gpa(target.first + (iova.0 & (target.last - target.first)))
            }
        };
        let done = transfer(&session, gpa);
        drop(session);
        match done {
            Ok(()) => Ok(()),
            Err(error @ DmaError::NoMemory { .. }) => {
                self.to_registers(gpa.0, len, access).map_err(|DmaFailed| failed(&error))
            }
            Err(error) => Err(failed(&error)),
        }
    }
}

impl<M: GuestMemoryBackend + Clone + Send + Sync> AtsTarget for BehindUnit<M> {
    fn read_by(&self, tlb: &DeviceTlb, iova: Iova, data: &mut [u8]) -> Result<(), AtsFailed> {
        let of = (iova, data.len(), false);
        let data = std::cell::RefCell::new(data);
        self.by_tlb(
            tlb,
            of,
            |session, gpa| session.read_translated(gpa, &mut data.borrow_mut()),
            &mut |device, offset, piece| device.read(offset, &mut data.borrow_mut()[piece]),
        )
    }

    fn write_by(&self, tlb: &DeviceTlb, iova: Iova, data: &[u8]) -> Result<(), AtsFailed> {
        self.by_tlb(
            tlb,
            (iova, data.len(), true),
            |session, gpa| session.write_translated(gpa, data),
            &mut |device, offset, piece| device.write(offset, &data[piece]),
        )
    }

    fn request_page(&self, request: PageRequest) -> PageRequested {
        self.endpoint.request_page(request)
    }
}

impl<M: GuestMemoryBackend + Clone + Send + Sync> DmaTarget for BehindUnit<M> {
    fn ats(&self) -> Option<&dyn AtsTarget> {
        Some(self)
    }

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
