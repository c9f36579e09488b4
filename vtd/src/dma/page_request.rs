//! Page requests of a function with a device-TLB. Section 7.4.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::endpoint::Endpoint;
use crate::ats::ResponseCode;
use crate::faults::{Access, RequestType};
use crate::ids::Iova;
use crate::registers::page_requests::Queued;
use crate::spec::page_requests::{PAGE_REQUEST, PageRequestHigh, PageRequestLow};

/// A page that a function asks the guest for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageRequest {
    /// An address in it.
    pub iova: Iova,
    /// It is to be read.
    pub read: bool,
    /// It is to be written.
    pub write: bool,
    /// Index of the group that the request belongs to, 0 to 511.
    pub group: u16,
    /// It is the last of its group: the guest answers it.
    pub last: bool,
}

/// What became of a page request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PageRequested {
    /// The guest finds it in its queue. If it is the last of its group, the answer comes by
    /// [`AtsFunction::respond`](crate::AtsFunction::respond), maybe before this is returned.
    Queued,
    /// The unit itself answers: with success where the queue overflowed, so that the function asks anew.
    Answered(ResponseCode),
    /// It is gone, and is not answered: it was not the last of its group.
    Dropped,
}

impl<M: GuestMemoryBackend + Clone + Send + Sync> Endpoint<M> {
    /// Asks the guest for a page. Where the tables do not let the function ask, a fault is recorded, and the answer is
    /// an invalid request.
    ///
    /// Not to be called inside a [`DmaSession`](crate::DmaSession): the message that tells the guest may be a system
    /// call.
    pub fn request_page(&self, request: PageRequest) -> PageRequested {
        let PageRequest { iova, read, write, group, last } = request;
        let answer = |code: ResponseCode| if last { PageRequested::Answered(code) } else { PageRequested::Dropped };
        let core = &self.unit.core;
        let asked = core.config.page_requests.then(|| self.ask((RequestType::Page, iova, Access::Read))).flatten();
        let asked = match asked {
            Some(Ok(asked)) => asked,
            Some(Err(fault)) => {
                let message = core.record(&fault);
                core.signal(message);
                return answer(ResponseCode::InvalidRequest);
            }
            None => return answer(ResponseCode::InvalidRequest),
        };
        let low = PageRequestLow::new()
            .with_kind(PAGE_REQUEST)
            .with_source(asked.seen(self.requester).sid.0)
            .with_pasid_present(self.pasid.is_some())
            .with_pasid(self.pasid.map_or(0, |pasid| pasid.0));
        let high = PageRequestHigh::new()
            .with_read(read)
            .with_write(write)
            .with_last(last)
            .with_group(group & 0x1ff)
            .with_page(iova.0 >> 12);
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&low.into_bits().to_le_bytes());
        bytes[8..16].copy_from_slice(&high.into_bits().to_le_bytes());
        // With the registers locked: the tail moves when the descriptor is there, and no other one comes between.
        let (queued, message) =
            core.registers().queue_page_request(|at| core.memory.write_slice(&bytes, GuestAddress(at)).is_ok());
        core.signal(message);
        match queued {
            Queued::Yes => PageRequested::Queued,
            Queued::Overflow => answer(ResponseCode::Success),
        }
    }
}
