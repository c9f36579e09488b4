//! The register file: what each (offset, size) reads and what a write of it changes. No register read has an
//! effect.
//!
//! A read gives the bytes that are there, whatever its size and place, as from a page that [shows](page) them. Writes
//! are of 4 bytes at a multiple of 4 and of 8 bytes at a multiple of 8; any other is dropped. An 8-byte access to a
//! 64-bit register is one access; a write to a pair of 32-bit registers is two, the lower one first (Xen writes FEADDR
//! and FEUADDR so).

pub(crate) mod event;
pub(crate) mod page;
pub(crate) mod page_requests;
pub(crate) mod performance;
pub(crate) mod record;
pub(crate) mod restore;
pub(crate) mod saved_space;
pub(crate) mod state;
mod writable;

use event::EventRegisters;
use state::State;

use crate::config::{FAULT_RECORDS, UnitConfig};
use crate::msi::Msi;
use crate::spec::fault::FaultRecordHigh;
use crate::spec::performance::{self as counters, EnhancedCommand};
use crate::spec::registers::{EventControl, FaultStatus, Global, PageRequestStatus, offset};

/// The registers of a unit.
pub(crate) struct Registers {
    pub(crate) state: State,
    config: UnitConfig,
    shown: Option<page::Shown>,
}

/// What a register write asks the unit to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Command {
    /// GCMD was written with this value.
    Global(Global),
    /// ICC was set in CCMD.
    Context,
    /// IVT was set in IOTLB.
    Iotlb,
    /// The tail was moved, or a queue error was cleared: there may be descriptors to process.
    Drain,
    /// ECMD was written.
    Enhanced(EnhancedCommand),
}

/// What follows from one write.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) command: Option<Command>,
    pub(crate) message: Option<Msi>,
}

const LOW: u64 = 0xffff_ffff;
const HIGH: u64 = LOW << 32;
const FRCD_END: u64 = offset::FRCD + 16 * FAULT_RECORDS as u64;

impl Registers {
    pub(crate) fn new(config: UnitConfig) -> Self {
        Self { state: State::of(&config), config, shown: None }
    }

    /// Takes a state that a unit of this configuration can be in. What was saved where counters were not offered has
    /// them as they are at power-on.
    pub(crate) fn put(&mut self, state: State) {
        let performance = state.performance.or(State::of(&self.config).performance);
        self.state = State { performance, ..state };
    }

    /// Whether a write of `len` bytes at `at` may give a [`Command`], whatever the registers hold.
    pub(crate) fn commands(at: u64, len: usize) -> bool {
        let end = at.saturating_add(len as u64);
        let hits = |register: u64, size: u64| at < register + size && register < end;
        let of_remapping = hits(offset::GCMD, 4) || hits(offset::CCMD, 8) || hits(offset::IQT, 8);
        of_remapping || hits(offset::IOTLB, 8) || hits(counters::offset::ECMD, 8)
    }

    /// Whether a write of `len` bytes of `value` at `at` lets a queue go on that had stopped: of FSTS only one that
    /// clears IQE or ITE gives a [`Command`], so that a fault handler has no other lock to wait for.
    pub(crate) fn resumes(&self, at: u64, len: usize, value: u64) -> bool {
        let fault_status = match (at, len) {
            (offset::FSTS, 4) => value as u32,
            (0x30, 8) => (value >> 32) as u32,
            _ => 0,
        };
        let (written, now) = (FaultStatus::from_bits(fault_status), self.fault_status());
        written.queue_error() && now.queue_error() || written.timeout_error() && now.timeout_error()
    }

    /// An error stops the invalidation queue. Section 6.5.2.11.
    pub(crate) fn queue_is_stopped(&self) -> bool {
        let status = self.state.fault_status;
        status.queue_error() || status.timeout_error()
    }

    /// The bytes at `at`, little endian: as many as there are in 8, and none beyond the last address.
    pub(crate) fn read(&self, at: u64, data: &mut [u8]) {
        let (first, skipped) = (at & !7, (at & 7) as usize);
        let quad = |at: Option<u64>| at.map_or(0, |at| self.read_quad(at)).to_le_bytes();
        let (low, high) = (quad(Some(first)), quad(first.checked_add(8)));
        let bytes = low.into_iter().chain(high).skip(skipped).take(8).chain(std::iter::repeat(0));
        for (byte, value) in data.iter_mut().zip(bytes) {
            *byte = value;
        }
    }

    /// The 8 bytes at `at`, a multiple of 8.
    fn read_quad(&self, at: u64) -> u64 {
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        let state = &self.state;
        match at {
            offset::VER => pair(self.config.version(), 0),
            offset::CAP => self.config.capability().into_bits(),
            offset::ECAP => self.config.extended_capability().into_bits(),
            offset::GCMD => pair(0, state.global_status.into_bits()),
            offset::RTADDR => state.root_table_address.into_bits(),
            offset::CCMD => state.context_command.into_bits(),
            0x30 => pair(0, self.fault_status().into_bits()),
            offset::FECTL => pair(state.fault_event.control.into_bits(), state.fault_event.data),
            offset::FEADDR => pair(state.fault_event.address, state.fault_event.upper_address),
            offset::IQH => state.queue_head,
            offset::IQT => state.queue_tail,
            offset::IQA => state.queue_address.into_bits(),
            0x98 => pair(0, state.completion_status),
            offset::IECTL => pair(state.completion_event.control.into_bits(), state.completion_event.data),
            offset::IEADDR => pair(state.completion_event.address, state.completion_event.upper_address),
            offset::IQERCD => state.queue_error_record.into_bits(),
            offset::PQH => state.page_requests.head,
            offset::PQT => state.page_requests.tail,
            offset::PQA => state.page_requests.address.into_bits(),
            0xd8 => pair(0, state.page_requests.status.into_bits()),
            offset::PECTL..=offset::PEUADDR if !self.config.page_requests => 0,
            offset::PECTL => pair(state.page_requests.event.control.into_bits(), state.page_requests.event.data),
            offset::PEADDR => pair(state.page_requests.event.address, state.page_requests.event.upper_address),
            // IVA is write-only.
            offset::IRTA => state.interrupt_table_address.into_bits(),
            offset::IOTLB => state.iotlb_invalidate.into_bits(),
            offset::FRCD..FRCD_END => {
                let record = &state.fault_records[((at - offset::FRCD) / 16) as usize];
                if at & 8 == 0 { record.low } else { record.high.into_bits() }
            }
            _ => state.performance.as_ref().map_or(0, |performance| performance.read(at)),
        }
    }

    /// Writes `len` bytes of `value` at `at`.
    pub(crate) fn write(&mut self, at: u64, len: usize, value: u64) -> Outcome {
        match len {
            4 if at.is_multiple_of(4) => {
                let shift = 8 * (at & 4);
                self.write_quad(at & !7, (value & LOW) << shift, LOW << shift)
            }
            8 if at.is_multiple_of(8) => match at {
                offset::GCMD
                | 0x30
                | offset::FECTL
                | offset::FEADDR
                | 0x98
                | offset::IECTL
                | offset::IEADDR
                | 0xd8
                | offset::PECTL
                | offset::PEADDR => {
                    let low = self.write_quad(at, value, LOW);
                    let high = self.write_quad(at, value, HIGH);
                    Outcome { command: low.command.or(high.command), message: low.message.or(high.message) }
                }
                _ => self.write_quad(at, value, u64::MAX),
            },
            _ => Outcome::default(),
        }
    }

    /// Writes those bits of the 8 bytes at `at` (a multiple of 8) that `mask` has.
    fn write_quad(&mut self, at: u64, value: u64, mask: u64) -> Outcome {
        let state = &mut self.state;
        let write = Write { value, mask };
        let high_word = (value >> 32) as u32;
        let touches_low = mask & LOW != 0;
        let touches_high = mask & HIGH != 0;
        let command = |command: Command| Outcome { command: Some(command), message: None };
        match at {
            offset::GCMD if touches_low => return command(Command::Global(Global::from_bits(value as u32))),
            offset::RTADDR => write.merge(&mut state.root_table_address, writable::ROOT_TABLE_ADDRESS),
            offset::CCMD => {
                write.merge(&mut state.context_command, writable::CONTEXT_COMMAND);
                if touches_high && state.context_command.invalidate() {
                    return command(Command::Context);
                }
            }
            0x30 if touches_high => return self.write_fault_status(FaultStatus::from_bits(high_word)),
            offset::FECTL | offset::FEADDR => {
                return event_write(&mut state.fault_event, at - offset::FECTL, value, mask);
            }
            offset::IQT => {
                write.merge(&mut state.queue_tail, writable::QUEUE_TAIL);
                if touches_low {
                    return command(Command::Drain);
                }
            }
            offset::IQA => write.merge(&mut state.queue_address, writable::queue_address(&self.config)),
            0x98 if touches_high => {
                state.completion_status &= !(high_word & 1);
                if state.completion_status & 1 == 0 {
                    state.completion_event.withdraw();
                }
            }
            offset::IECTL | offset::IEADDR => {
                return event_write(&mut state.completion_event, at - offset::IECTL, value, mask);
            }
            offset::IRTA => {
                write.merge(&mut state.interrupt_table_address, writable::interrupt_table_address(&self.config));
            }
            offset::PQH..=offset::PEUADDR if !self.config.page_requests => {}
            offset::PQH => write.merge(&mut state.page_requests.head, writable::PAGE_QUEUE_OFFSET),
            offset::PQT => write.merge(&mut state.page_requests.tail, writable::PAGE_QUEUE_OFFSET),
            offset::PQA => {
                write.merge(&mut state.page_requests.address, writable::queue_pages(&self.config));
            }
            0xd8 if touches_high => self.write_page_request_status(PageRequestStatus::from_bits(high_word)),
            offset::PECTL | offset::PEADDR => {
                return event_write(&mut state.page_requests.event, at - offset::PECTL, value, mask);
            }
            offset::IVA => write.merge(&mut state.invalidate_address, writable::INVALIDATE_ADDRESS),
            offset::IOTLB => {
                write.merge(&mut state.iotlb_invalidate, writable::IOTLB_INVALIDATE);
                if touches_high && state.iotlb_invalidate.invalidate() {
                    return command(Command::Iotlb);
                }
            }
            offset::FRCD..FRCD_END if at & 8 != 0 => {
                let high = &mut state.fault_records[((at - offset::FRCD) / 16) as usize].high;
                let served = FaultRecordHigh::from_bits(value & mask).fault();
                *high = high.with_fault(high.fault() && !served);
                self.fault_conditions_cleared();
            }
            _ => return state.performance.as_mut().map_or_else(Outcome::default, |it| it.write(at, write)),
        }
        Outcome::default()
    }

    /// FSTS is write-1-to-clear. Clearing IQE, and ITE, lets the queue go on.
    fn write_fault_status(&mut self, written: FaultStatus) -> Outcome {
        let was_stopped = self.queue_is_stopped();
        self.set_fault_status(|status| {
            status
                .with_overflow(status.overflow() && !written.overflow())
                .with_queue_error(status.queue_error() && !written.queue_error())
                .with_completion_error(status.completion_error() && !written.completion_error())
                .with_timeout_error(status.timeout_error() && !written.timeout_error())
        });
        self.fault_conditions_cleared();
        let resumed = was_stopped && !self.queue_is_stopped();
        Outcome { command: resumed.then_some(Command::Drain), message: None }
    }

    /// Raises the invalidation completion event (section 11.4.8.5); a completion that is not yet acknowledged covers
    /// the next ones.
    pub(crate) fn raise_completion(&mut self) -> Option<Msi> {
        if self.state.completion_status & 1 != 0 {
            return None;
        }
        self.state.completion_status |= 1;
        self.state.completion_event.raise()
    }
}

/// A write of those bits of 8 bytes that `mask` has.
#[derive(Clone, Copy)]
struct Write {
    value: u64,
    mask: u64,
}

impl Write {
    /// Takes in what it writes of a register with these `writable` bits.
    fn merge<R: Copy + From<u64> + Into<u64>>(self, register: &mut R, writable: u64) {
        let changed = self.mask & writable;
        *register = R::from((*register).into() & !changed | self.value & changed);
    }
}

/// A write to the four registers of an event, `at` bytes from its control register: 0 or 8.
fn event_write(event: &mut EventRegisters, at: u64, value: u64, mask: u64) -> Outcome {
    let (low, high) = (value as u32, (value >> 32) as u32);
    let mut message = None;
    if mask & LOW != 0 {
        if at == 0 {
            message = event.set_mask(EventControl::from_bits(low).masked());
        } else {
            event.address = low & writable::EVENT_ADDRESS;
        }
    }
    if mask & HIGH != 0 {
        if at == 0 {
            event.data = high & writable::EVENT_DATA;
        } else {
            event.upper_address = high;
        }
    }
    Outcome { command: None, message }
}
