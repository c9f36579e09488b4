//! Whether a state that was saved can be one of this unit: what comes from a file is trusted no more than what comes
//! from a guest (A-14, rule 1).

use super::event::EventRegisters;
use super::performance::{self, PerformanceState};
use super::saved_space::{ExtentState, SAVED_EXTENTS, SpaceState};
use super::state::{FaultRecord, PageRequestRegisters, State, StateVersion};
use super::writable;
use crate::config::{FAULT_RECORDS, UnitConfig};
use crate::ids::{DomainId, Pasid};
use crate::listener::Mapping;
use crate::spec::fault::FaultRecordHigh;
use crate::spec::invalidation::Descriptor;
use crate::spec::performance::{EnhancedResponse, Filter};
use crate::spec::registers::{ContextCommand, EventControl, FaultStatus, Global, IotlbInvalidate, QueueErrorRecord};

/// Why a state cannot be restored.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RestoreError {
    /// It was saved in another form.
    #[error("the state has version {}, and this unit reads version {}", .0.0, StateVersion::CURRENT.0)]
    Version(StateVersion),
    /// No unit of this configuration can hold that: reserved bits, bits of what is not offered, or an address beyond
    /// its width.
    #[error("{register} of this unit cannot be {value:#x}")]
    Register {
        /// The register, or the field of [`State`], by its name in the specification.
        register: &'static str,
        /// Its value.
        value: u64,
    },
    /// The head of the queue is where the queue has no descriptor.
    #[error("the head of the invalidation queue is at {head:#x}, and the queue has {len:#x} bytes")]
    QueueHead {
        /// IQH.
        head: u64,
        /// Bytes of the queue; 0 while it is off.
        len: u64,
    },
    /// No listener can have been told that: not whole pages, out of the address space, of no permission, or not behind
    /// the one before.
    #[error("domain {} cannot have a mapping from {first:#x} to {last:#x} there", .domain.0)]
    Extent {
        /// The space's domain id.
        domain: DomainId,
        /// First IOVA.
        first: u64,
        /// Last IOVA.
        last: u64,
    },
    /// More mappings than are ever saved.
    #[error("the state has {extents} mappings, and no more than {SAVED_EXTENTS} are saved")]
    Extents {
        /// How many.
        extents: usize,
    },
}

impl State {
    /// Whether a unit of this configuration can be in it.
    pub(crate) fn check(&self, config: &UnitConfig) -> Result<(), RestoreError> {
        // Destructured, so that a field that is added later is not forgotten here.
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
            ref spaces,
        } = *self;
        if version != StateVersion::CURRENT {
            return Err(RestoreError::Version(version));
        }
        let remapping = config.interrupt_remapping;
        let global = Global::new()
            .with_translation(config.dma_translation)
            .with_root_table_pointer(true)
            .with_queued_invalidation(true)
            .with_interrupt_remapping(remapping)
            .with_interrupt_table_pointer(remapping)
            .with_compatibility_format(remapping);
        // ICE and ITE are of device-TLBs, and defined all the same. PPF follows from the records.
        let faults = FaultStatus::new()
            .with_overflow(true)
            .with_queue_error(true)
            .with_completion_error(true)
            .with_timeout_error(true)
            .with_record(FAULT_RECORDS as u8 - 1);
        let errors = QueueErrorRecord::new()
            .with_queue_error(0xf)
            .with_timeout_source(u16::MAX)
            .with_completion_source(u16::MAX);
        let command = writable::CONTEXT_COMMAND | ContextCommand::new().with_actual(3).into_bits();
        let iotlb = writable::IOTLB_INVALIDATE | IotlbInvalidate::new().with_actual(3).into_bits();
        let (queue, table) = (writable::queue_address(config), writable::interrupt_table_address(config));
        for (register, value, possible) in [
            ("GSTS", global_status.into_bits().into(), global.into_bits().into()),
            ("RTADDR", root_table_address.into_bits(), writable::ROOT_TABLE_ADDRESS),
            ("RTADDR in use", root_table_in_use.into_bits(), writable::ROOT_TABLE_ADDRESS),
            ("IRTA", interrupt_table_address.into_bits(), table),
            ("IRTA in use", interrupt_table_in_use.into_bits(), table),
            ("CCMD", context_command.into_bits(), command),
            ("FSTS", fault_status.into_bits().into(), faults.into_bits().into()),
            ("the next fault record", next_fault_record.into(), FAULT_RECORDS as u64 - 1),
            ("IQT", queue_tail, writable::QUEUE_TAIL),
            ("IQA", queue_address.into_bits(), queue),
            ("IQA in use", queue_in_use.into_bits(), queue),
            ("ICS", completion_status.into(), 1),
            ("IQERCD", queue_error_record.into_bits(), errors.into_bits()),
            ("IVA", invalidate_address.into_bits(), writable::INVALIDATE_ADDRESS),
            ("IOTLB", iotlb_invalidate.into_bits(), iotlb),
        ] {
            check(register, value, possible)?;
        }
        check_event(["FECTL", "FEDATA", "FEADDR"], fault_event)?;
        check_event(["IECTL", "IEDATA", "IEADDR"], completion_event)?;
        check_page_requests(config, page_requests)?;
        fault_records.into_iter().try_for_each(|record| check_record(config, record))?;
        if let Some(performance) = &performance {
            check("PERFCAP", u64::from(!config.performance_counters), 0)?;
            check_performance(performance)?;
        }
        let len = if global_status.queued_invalidation() { 4096 << queue_in_use.size() } else { 0 };
        // The head is 0 while the queue is off.
        if queue_head != 0 && queue_head >= len || !queue_head.is_multiple_of(Descriptor::size(queue_in_use.wide())) {
            return Err(RestoreError::QueueHead { head: queue_head, len });
        }
        let extents = spaces.iter().map(|space| space.extents.len()).sum();
        if extents > SAVED_EXTENTS {
            return Err(RestoreError::Extents { extents });
        }
        Ok(())
    }
}

/// What was told of a space, by the state that was saved.
///
/// # Errors
/// A listener cannot have been told that.
pub(crate) fn told(space: &SpaceState) -> Result<Vec<Mapping>, RestoreError> {
    let error = |extent: ExtentState| RestoreError::Extent { domain: space.domain, first: extent.0, last: extent.1 };
    space.mappings().map_err(error)
}

/// An error if `value` has other bits than `possible`.
fn check(register: &'static str, value: u64, possible: u64) -> Result<(), RestoreError> {
    if value & !possible == 0 { Ok(()) } else { Err(RestoreError::Register { register, value }) }
}

fn check_event([control, data, address]: [&'static str; 3], event: EventRegisters) -> Result<(), RestoreError> {
    // Any upper address is possible.
    let EventRegisters { control: mask_and_pending, data: of_message, address: lower, upper_address: _ } = event;
    let possible = EventControl::new().with_masked(true).with_pending(true).into_bits();
    check(control, mask_and_pending.into_bits().into(), possible.into())?;
    check(data, of_message.into(), writable::EVENT_DATA.into())?;
    check(address, lower.into(), writable::EVENT_ADDRESS.into())
}

fn check_page_requests(config: &UnitConfig, registers: PageRequestRegisters) -> Result<(), RestoreError> {
    let PageRequestRegisters { head, tail, address, status, event } = registers;
    let offered = |bits: u64| if config.page_requests { bits } else { 0 };
    check("PQH", head, offered(writable::PAGE_QUEUE_OFFSET))?;
    check("PQT", tail, offered(writable::PAGE_QUEUE_OFFSET))?;
    check("PQA", address.into_bits(), offered(writable::queue_pages(config)))?;
    check("PRS", status.into_bits().into(), offered(3))?;
    check_event(["PECTL", "PEDATA", "PEADDR"], event)
}

fn check_record(config: &UnitConfig, FaultRecord { low, high }: FaultRecord) -> Result<(), RestoreError> {
    let possible = FaultRecordHigh::new().with_source(u16::MAX).with_reason(u8::MAX).with_type_1(true).with_fault(true);
    // A function may send a PASID to a unit that takes none: then the fault says so.
    let possible = possible.with_pasid_present(true).with_pasid(Pasid::MAX.0);
    let possible = possible.with_address_type(if config.device_tlb { 3 } else { 0 }).with_type_2(config.page_requests);
    check("FRCD", low, !0xfff)?;
    check("FRCD", high.into_bits(), possible.into_bits())
}

fn check_performance(state: &PerformanceState) -> Result<(), RestoreError> {
    // Any part of an operand is possible, and any counter can be frozen, and have overflowed.
    let PerformanceState { counters, frozen: _, overflowed: _, interrupt_status, event, operand: _, response } = *state;
    check("PERFINTRSTS", interrupt_status.into(), 1)?;
    check_event(["PERFINTRCTL", "PERFINTRDATA", "PERFINTRADDR"], event)?;
    check("ECRSP", response.into_bits(), EnhancedResponse::new().with_status(0x7f).into_bits())?;
    for counter in counters {
        let configuration = counter.configuration;
        check("PERFCNTRCFG", configuration.with_enabled(false).into_bits(), performance::CONFIGURATION)?;
        for (filter, register) in Filter::ALL.into_iter().zip(counter.filters) {
            check("a filter of PERFCNTRCFG", register.into_bits().into(), filter.writable().into())?;
        }
        check("PERFCNTR", counter.value, performance::VALUE)?;
        if configuration.enabled() && !counter.can_be_enabled() {
            return Err(RestoreError::Register { register: "PERFCNTRCFG", value: configuration.into_bits() });
        }
    }
    Ok(())
}
