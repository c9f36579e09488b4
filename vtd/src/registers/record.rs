//! Fault recording: which fault gets a register, and when the fault event is raised. Sections 7.2 and 7.3.

use super::Registers;
use super::state::FaultRecord;
use crate::faults::{Access, Fault, RequestType};
use crate::ids::Pasid;
use crate::msi::Msi;
use crate::spec::fault::FaultRecordHigh;
use crate::spec::registers::FaultStatus;
use crate::tables::interrupt::RemapFault;

/// What became of a fault that was to be recorded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Recorded {
    /// It has a record.
    Yes,
    /// The source id has a record that the guest has not read, or all records are full.
    Dropped,
}

impl Registers {
    /// Records `fault`, and says which message to send.
    pub(crate) fn record_fault(&mut self, fault: &Fault) -> (Recorded, Option<Msi>) {
        let is_page_request = fault.request == RequestType::Page;
        let address_type = match fault.request {
            RequestType::Untranslated | RequestType::Page => 0b00,
            RequestType::Translation => 0b01,
            RequestType::Translated => 0b10,
        };
        let high = FaultRecordHigh::new()
            .with_source(fault.requester.sid.0)
            .with_reason(fault.reason.code())
            .with_type_1(fault.access != Access::Write && !is_page_request)
            .with_type_2(is_page_request)
            .with_address_type(address_type)
            .with_pasid_present(fault.pasid.is_some())
            .with_pasid(fault.pasid.map_or(0, |pasid| pasid.0 & Pasid::MAX.0));
        self.record(fault.iova.0 & !0xfff, high)
    }

    /// The same for an interrupt: FI has its index in bits 63:48.
    pub(crate) fn record_remap_fault(&mut self, fault: &RemapFault) -> (Recorded, Option<Msi>) {
        let high = FaultRecordHigh::new().with_source(fault.requester.sid.0).with_reason(fault.reason.code());
        self.record(u64::from(fault.index) << 48, high)
    }

    fn record(&mut self, low: u64, high: FaultRecordHigh) -> (Recorded, Option<Msi>) {
        let before = self.fault_status();
        if before.overflow() {
            return (Recorded::Dropped, None);
        }
        let same_source = |record: &FaultRecord| record.high.fault() && record.high.source() == high.source();
        if self.state.fault_records.iter().any(same_source) {
            // One record a source id until the guest has read it: a device that faults in a loop cannot hide the
            // others.
            return (Recorded::Dropped, None);
        }
        let index = usize::from(self.state.next_fault_record) % self.state.fault_records.len();
        if self.state.fault_records[index].high.fault() {
            self.set_fault_status(|status| status.with_overflow(true));
            return (Recorded::Dropped, self.raise_fault_event(before));
        }
        self.state.fault_records[index] = FaultRecord { low, high: high.with_fault(true) };
        self.state.next_fault_record = ((index + 1) % self.state.fault_records.len()) as u8;
        if !before.pending() {
            self.set_fault_status(|status| status.with_record(index as u8));
        }
        (Recorded::Yes, self.raise_fault_event(before))
    }

    /// FSTS, with PPF as it follows from the records.
    pub(crate) fn fault_status(&self) -> FaultStatus {
        let pending = self.state.fault_records.iter().any(|record| record.high.fault());
        self.state.fault_status.with_pending(pending)
    }

    pub(crate) fn set_fault_status(&mut self, change: impl FnOnce(FaultStatus) -> FaultStatus) {
        self.state.fault_status = change(self.state.fault_status).with_pending(false);
    }

    /// A condition was added to FSTS, which was `before`. The event is raised for the first condition only; the next
    /// one comes when the guest has served them all. Section 7.3.
    pub(crate) fn raise_fault_event(&mut self, before: FaultStatus) -> Option<Msi> {
        if has_condition(before) {
            return None;
        }
        self.state.fault_event.raise()
    }

    /// Conditions were taken out of FSTS: with none left, a message that was held back is no longer due.
    pub(crate) fn fault_conditions_cleared(&mut self) {
        if !has_condition(self.fault_status()) {
            self.state.fault_event.withdraw();
        }
    }
}

const fn has_condition(status: FaultStatus) -> bool {
    status.overflow() || status.pending() || status.queue_error() || status.completion_error() || status.timeout_error()
}
