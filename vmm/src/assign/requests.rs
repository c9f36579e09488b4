//! What functions of other processes ask for by message.

use std::sync::Arc;

use devices::host::Interrupts;
use vfio_bridge::Requests;
use vtd::{Access, Endpoint, Iova, Msi};

use crate::kvm::irq::KvmInterrupts;
use crate::kvm::memory::Ram;

/// What a function of another process asks for and was not given is its unit's to judge, as every function's.
pub struct UserRequests {
    /// The way that its requests would take.
    pub endpoint: Endpoint<Ram>,
    /// Where its messages go.
    pub interrupts: Arc<KvmInterrupts>,
}

impl Requests for UserRequests {
    fn blocked(&self, iova: Iova, write: bool) {
        let access = if write { Access::Write } else { Access::Read };
        // The unit records the fault. Where it finds none, the guest mapped it a moment ago, or the bridge could not
        // map it.
        if self.endpoint.enter().translate(iova, access).is_ok() {
            log::debug!("{}: {iova} is not mapped for the device yet", self.endpoint.requester());
        }
    }

    fn message(&self, address: u64, data: u32) {
        self.interrupts.signal(self.endpoint.requester(), Msi { address, data });
    }
}
