//! Everything of a unit that a guest can change, in one serialisable struct (rule 9). What is derived from guest memory
//! (spaces, cached translations) is not here: it is built again from the tables. The shadows are, for their boundaries,
//! and not for where they lead.

use serde::{Deserialize, Serialize};

use super::event::EventRegisters;
use super::performance::PerformanceState;
use super::saved_space::SpaceState;
use crate::config::{FAULT_RECORDS, UnitConfig};
use crate::spec::fault::FaultRecordHigh;
use crate::spec::registers::{
    ContextCommand, FaultStatus, Global, InterruptTableAddress, InvalidateAddress, IotlbInvalidate, PageRequestAddress,
    PageRequestStatus, QueueAddress, QueueErrorRecord, RootTableAddress,
};

/// A fault recording register: its two halves.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FaultRecord {
    /// Bits 63:0: the faulting page, or the index of the interrupt in bits 63:48.
    pub low: u64,
    /// Bits 127:64.
    pub high: FaultRecordHigh,
}

/// The registers of the page request queue; those at power-on where page requests are not offered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PageRequestRegisters {
    /// PQH.
    pub head: u64,
    /// PQT.
    pub tail: u64,
    /// PQA.
    pub address: PageRequestAddress,
    /// PRS.
    pub status: PageRequestStatus,
    /// PECTL, PEDATA, PEADDR, PEUADDR.
    pub event: EventRegisters,
}

/// The form in which a [`State`] is serialised: which fields there are, and what they mean.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StateVersion(pub u32);

impl StateVersion {
    /// The form of this library, the only one that it reads.
    pub const CURRENT: Self = Self(2);
}

impl Default for StateVersion {
    fn default() -> Self {
        Self::CURRENT
    }
}

/// The state of a unit, as [`crate::Unit::save`] gives it; the default is that at power-on. Registers are serialised as
/// their bits.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// The form that it was serialised in.
    pub version: StateVersion,
    /// GSTS.
    pub global_status: Global,
    /// RTADDR as last written.
    pub root_table_address: RootTableAddress,
    /// RTADDR as it was when SRTP was last given: what is in use.
    pub root_table_in_use: RootTableAddress,
    /// IRTA as last written.
    pub interrupt_table_address: InterruptTableAddress,
    /// IRTA as it was when SIRTP was last given: what is in use.
    pub interrupt_table_in_use: InterruptTableAddress,
    /// CCMD.
    pub context_command: ContextCommand,
    /// PFO, IQE, ICE, ITE and FRI of FSTS; PPF follows from the records.
    pub fault_status: FaultStatus,
    /// FECTL, FEDATA, FEADDR, FEUADDR.
    pub fault_event: EventRegisters,
    /// FRCD.
    pub fault_records: [FaultRecord; FAULT_RECORDS],
    /// The record that the next fault goes to.
    pub next_fault_record: u8,
    /// IQH.
    pub queue_head: u64,
    /// IQT.
    pub queue_tail: u64,
    /// IQA as last written.
    pub queue_address: QueueAddress,
    /// IQA as it was when the queue was enabled: what is in use.
    pub queue_in_use: QueueAddress,
    /// ICS.
    pub completion_status: u32,
    /// IECTL, IEDATA, IEADDR, IEUADDR.
    pub completion_event: EventRegisters,
    /// IQERCD.
    pub queue_error_record: QueueErrorRecord,
    /// IVA.
    pub invalidate_address: InvalidateAddress,
    /// IOTLB.
    pub iotlb_invalidate: IotlbInvalidate,
    /// PQH, PQT, PQA, PRS and the page request event.
    pub page_requests: PageRequestRegisters,
    /// The registers of performance monitoring, where that is offered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub performance: Option<PerformanceState>,
    /// What the listener was told of the spaces that have members. Empty but in what was saved.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub spaces: Vec<SpaceState>,
}

impl State {
    /// That at power-on of a unit of this configuration.
    pub(crate) fn of(config: &UnitConfig) -> Self {
        Self { performance: config.performance_counters.then(PerformanceState::default), ..Self::default() }
    }

    /// Back to what it is at power-on.
    pub fn reset(&mut self) {
        // Destructured, so that a field that is added later cannot be forgotten here.
        let Self {
            version,
            global_status,
            root_table_address,
            root_table_in_use,
            interrupt_table_address,
            interrupt_table_in_use,
            context_command,
            fault_status,
            fault_event,
            fault_records,
            next_fault_record,
            queue_head,
            queue_tail,
            queue_address,
            queue_in_use,
            completion_status,
            completion_event,
            queue_error_record,
            invalidate_address,
            iotlb_invalidate,
            page_requests,
            performance,
            spaces,
        } = self;
        *version = StateVersion::CURRENT;
        *global_status = Global::new();
        *root_table_address = RootTableAddress::new();
        *root_table_in_use = RootTableAddress::new();
        *interrupt_table_address = InterruptTableAddress::new();
        *interrupt_table_in_use = InterruptTableAddress::new();
        *context_command = ContextCommand::new();
        *fault_status = FaultStatus::new();
        *fault_event = EventRegisters::default();
        *fault_records = Default::default();
        *next_fault_record = 0;
        *queue_head = 0;
        *queue_tail = 0;
        *queue_address = QueueAddress::new();
        *queue_in_use = QueueAddress::new();
        *completion_status = 0;
        *completion_event = EventRegisters::default();
        *queue_error_record = QueueErrorRecord::new();
        *invalidate_address = InvalidateAddress::new();
        *iotlb_invalidate = IotlbInvalidate::new();
        *page_requests = PageRequestRegisters::default();
        *performance = performance.map(|_| PerformanceState::default());
        spaces.clear();
    }
}
