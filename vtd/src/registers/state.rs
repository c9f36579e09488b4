//! Everything of a unit that a guest can change, in one serialisable struct (rule 9). What is derived from guest memory
//! (spaces, shadows, cached translations) is not here: it is built again from the tables.

use serde::{Deserialize, Serialize};

use crate::config::FAULT_RECORDS;
use crate::spec::registers::EventControl;

/// A fault recording register: its two halves.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct FaultRecord {
    /// Bits 63:0: the faulting page, or the index of the interrupt in bits 63:48.
    pub low: u64,
    /// Bits 127:64.
    pub high: u64,
}

/// An event with its message: fault event or invalidation completion event.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct EventRegisters {
    /// Control: IM and IP.
    pub control: u32,
    /// Data.
    pub data: u32,
    /// Address.
    pub address: u32,
    /// Upper address.
    pub upper_address: u32,
}

impl Default for EventRegisters {
    fn default() -> Self {
        Self { control: EventControl::new().with_masked(true).into_bits(), data: 0, address: 0, upper_address: 0 }
    }
}

/// The state of a unit.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct State {
    /// GSTS.
    pub global_status: u32,
    /// RTADDR as last written.
    pub root_table_address: u64,
    /// RTADDR as it was when SRTP was last given: what is in use.
    pub root_table_in_use: u64,
    /// IRTA as last written.
    pub interrupt_table_address: u64,
    /// IRTA as it was when SIRTP was last given: what is in use.
    pub interrupt_table_in_use: u64,
    /// CCMD.
    pub context_command: u64,
    /// PFO, IQE, ICE, ITE and FRI of FSTS; PPF follows from the records.
    pub fault_status: u32,
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
    pub queue_address: u64,
    /// IQA as it was when the queue was enabled: what is in use.
    pub queue_in_use: u64,
    /// ICS.
    pub completion_status: u32,
    /// IECTL, IEDATA, IEADDR, IEUADDR.
    pub completion_event: EventRegisters,
    /// IQERCD.
    pub queue_error_record: u64,
    /// IVA.
    pub invalidate_address: u64,
    /// IOTLB.
    pub iotlb_invalidate: u64,
}

impl State {
    /// Back to what it is at power-on.
    pub fn reset(&mut self) {
        // Destructured, so that a field that is added later cannot be forgotten here.
        let Self {
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
        } = self;
        *global_status = 0;
        *root_table_address = 0;
        *root_table_in_use = 0;
        *interrupt_table_address = 0;
        *interrupt_table_in_use = 0;
        *context_command = 0;
        *fault_status = 0;
        *fault_event = EventRegisters::default();
        *fault_records = Default::default();
        *next_fault_record = 0;
        *queue_head = 0;
        *queue_tail = 0;
        *queue_address = 0;
        *queue_in_use = 0;
        *completion_status = 0;
        *completion_event = EventRegisters::default();
        *queue_error_record = 0;
        *invalidate_address = 0;
        *iotlb_invalidate = 0;
    }
}
