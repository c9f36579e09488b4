//! Transfers by way of a device-TLB, page by page, and what is asked of the guest for them.

use vtd::{Iova, PageRequest, PageRequested, Pasid, ResponseCode};

use crate::ats::{Ats, AtsFailed, AtsTarget};
use crate::page_requests::MayAsk;

/// Times that one page is asked for: a guest that says that it is there, and does not let it be, ends the transfer.
const REQUESTS: usize = 8;

/// By which way a transfer goes.
#[derive(Clone, Copy)]
pub(super) struct Way {
    pub(super) pasid: Option<Pasid>,
    /// By the device-TLB.
    pub(super) translated: bool,
    /// What is missing there is asked for.
    pub(super) requests: Option<MayAsk>,
}

/// The bytes of a transfer, and its direction.
pub(super) enum Bytes<'a> {
    /// From memory.
    Read(&'a mut [u8]),
    /// To memory.
    Write(&'a [u8]),
}

/// Why a transfer was not done, or not in full.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Refused {
    /// An access was.
    Access,
    /// The guest said that page requests fail: there are to be no more.
    ResponseFailure,
}

/// Does a transfer by the function's device-TLB.
pub(super) fn transfer_by_tlb(
    target: &dyn AtsTarget,
    ats: &Ats,
    way: Way,
    iova: Iova,
    mut bytes: Bytes<'_>,
) -> Result<(), Refused> {
    let (len, write) = match &bytes {
        Bytes::Read(data) => (data.len(), false),
        Bytes::Write(data) => (data.len(), true),
    };
    let mut done = 0;
    while done < len {
        let at = Iova(iova.0.checked_add(done as u64).ok_or(Refused::Access)?);
        let part = done..len.min(done + (0x1000 - (at.0 & 0xfff) as usize));
        done = part.end;
        let mut access = || match &mut bytes {
            Bytes::Read(data) => target.read_by(&ats.tlb, at, &mut data[part.clone()]),
            Bytes::Write(data) => target.write_by(&ats.tlb, at, &data[part.clone()]),
        };
        let mut requests = 0;
        loop {
            match access() {
                Ok(()) => break,
                Err(AtsFailed::Missing) if requests < REQUESTS => {
                    requests += 1;
                    ask_for(target, ats, way, at, write)?;
                }
                Err(AtsFailed::Missing | AtsFailed::Failed) => return Err(Refused::Access),
            }
        }
    }
    Ok(())
}

/// Asks the guest for a page, and waits for what it says.
fn ask_for(target: &dyn AtsTarget, ats: &Ats, way: Way, iova: Iova, write: bool) -> Result<(), Refused> {
    let group = way.requests.and_then(|may| ats.requests.begin(may, way.pasid)).ok_or(Refused::Access)?;
    let code = match target.request_page(PageRequest { iova, read: !write, write, group, last: true }) {
        PageRequested::Queued => ats.requests.wait(),
        PageRequested::Answered(code) => {
            ats.requests.end();
            Some(code)
        }
        PageRequested::Dropped => {
            ats.requests.end();
            None
        }
    };
    match code {
        Some(ResponseCode::Success) => Ok(()),
        Some(ResponseCode::InvalidRequest) | None => Err(Refused::Access),
        Some(ResponseCode::Failure) => Err(Refused::ResponseFailure),
    }
}

#[cfg(test)]
#[path = "ats_test.rs"]
mod ats_test;
