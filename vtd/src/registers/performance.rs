//! The counters of performance monitoring: what their registers read, what a write of them and an enhanced command
//! change, and what becomes of what is counted. Chapter 10, and sections 11.4.13 and 11.4.14.

use serde::{Deserialize, Serialize};

use super::event::EventRegisters;
use super::{Command, HIGH, LOW, Outcome, Registers, Write, event_write};
use crate::ids::{DomainId, Pasid, SourceId};
use crate::msi::Msi;
use crate::spec::performance::{
    COUNTER_BITS, COUNTERS, Capability, Configuration, EVENT_GROUPS, EnhancedCommand, EnhancedResponse, Event, FILTERS,
    Filter, FilterRegister, StatusCode, command, offset, pasid_mode,
};

/// The bits that a counter has.
pub(super) const VALUE: u64 = (1 << COUNTER_BITS) - 1;
/// What can be written of the configuration of a counter that is not enabled.
pub(super) const CONFIGURATION: u64 = Configuration::new()
    .with_interrupt_on_overflow(true)
    .with_freeze_on_overflow(true)
    .with_group(0xf)
    .with_events(0xfff_ffff)
    .into_bits();
/// A bit for each counter.
const ALL_COUNTERS: u8 = ((1u16 << COUNTERS) - 1) as u8;
/// CMD of ECMD_REG, at which a command begins.
const ECMD_COMMAND: u64 = 0xff;

/// A counter of performance monitoring.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counter {
    /// PERFCNTRCFG.
    pub configuration: Configuration,
    /// The filters, in the order of their registers.
    pub filters: [FilterRegister; FILTERS],
    /// PERFCNTR.
    pub value: u64,
}

/// The registers of performance monitoring and of the enhanced commands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PerformanceState {
    /// The counters.
    pub counters: [Counter; COUNTERS],
    /// PERFFRZSTS, a bit for each counter.
    pub frozen: u8,
    /// PERFOVFSTS, a bit for each counter.
    pub overflowed: u8,
    /// PERFINTRSTS.
    pub interrupt_status: u32,
    /// PERFINTRCTL, PERFINTRDATA, PERFINTRADDR, PERFINTRUADDR.
    pub event: EventRegisters,
    /// Bits 63:32 of ECMD as last written: the upper part of an operand, which comes before the command.
    pub operand: u32,
    /// ECRSP.
    pub response: EnhancedResponse,
}

/// How often each event happened, by the order of [`Event::ALL`], and to whose requests.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Occurred {
    pub(crate) times: [u32; Event::ALL.len()],
    /// Who made them, if it has an id of its own.
    pub(crate) source: Option<SourceId>,
    /// The PASID that they carried.
    pub(crate) pasid: Option<Pasid>,
    /// The domain of what was cached for them.
    pub(crate) domain: Option<DomainId>,
}

impl PerformanceState {
    /// The 8 bytes at `at`, a multiple of 8.
    pub(super) fn read(&self, at: u64) -> u64 {
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        match at {
            offset::PERFCAP => Capability::OFFERED.into_bits(),
            offset::PERFCFGOFF => pair(offset::PERFCNTRCFG as u32, offset::PERFFRZSTS as u32),
            offset::PERFOVFOFF => pair(offset::PERFOVFSTS as u32, offset::PERFCNTR as u32),
            0x320 => pair(0, self.interrupt_status),
            offset::PERFINTRCTL => pair(self.event.control.into_bits(), self.event.data),
            offset::PERFINTRADDR => pair(self.event.address, self.event.upper_address),
            offset::PERFEVNTCAP.. if at < offset::PERFEVNTCAP + 8 * EVENT_GROUPS as u64 => {
                Event::of_group(((at - offset::PERFEVNTCAP) / 8) as u8).into()
            }
            // ECMD and ECEO are write-only.
            offset::ECRSP => self.response.into_bits(),
            offset::ECCAP_3 => command::OFFERED,
            offset::PERFFRZSTS => self.frozen.into(),
            offset::PERFOVFSTS => self.overflowed.into(),
            offset::PERFCNTRCFG..offset::PERFFRZSTS => {
                let (index, register) = place(at, offset::PERFCNTRCFG, offset::CONFIGURATION_STRIDE);
                let counter = &self.counters[index];
                match register {
                    0 => counter.configuration.into_bits(),
                    _ => {
                        let filter = |number: usize| counter.filters.get(number).map_or(0, |filter| filter.into_bits());
                        let first = filters_at(register);
                        first.map_or(0, |first| pair(filter(first), filter(first + 1)))
                    }
                }
            }
            offset::PERFCNTR..offset::END => match place(at, offset::PERFCNTR, offset::COUNTER_STRIDE) {
                (index, 0) => self.counters[index].value,
                _ => 0,
            },
            _ => 0,
        }
    }

    /// Writes a part of the 8 bytes at `at`.
    pub(super) fn write(&mut self, at: u64, write: Write) -> Outcome {
        let (touches_low, touches_high) = (write.mask & LOW != 0, write.mask & HIGH != 0);
        match at {
            0x320 if touches_high => {
                self.interrupt_status &= !((write.value >> 32) as u32 & 1);
                if self.interrupt_status == 0 {
                    self.event.withdraw();
                }
            }
            offset::PERFINTRCTL | offset::PERFINTRADDR => {
                return event_write(&mut self.event, at - offset::PERFINTRCTL, write.value, write.mask);
            }
            offset::ECMD => {
                if touches_high {
                    self.operand = (write.value >> 32) as u32;
                }
                if write.mask & ECMD_COMMAND != 0 {
                    let given = u64::from(self.operand) << 32 | write.value & LOW;
                    let command = Command::Enhanced(EnhancedCommand::from_bits(given));
                    return Outcome { command: Some(command), message: None };
                }
            }
            offset::PERFOVFSTS if touches_low => self.overflowed &= !(write.value as u8),
            offset::PERFCNTRCFG..offset::PERFFRZSTS => {
                let (index, register) = place(at, offset::PERFCNTRCFG, offset::CONFIGURATION_STRIDE);
                self.counters[index].configure(register, write);
            }
            offset::PERFCNTR..offset::END => {
                let (index, register) = place(at, offset::PERFCNTR, offset::COUNTER_STRIDE);
                if register == 0 {
                    write.merge(&mut self.counters[index].value, VALUE);
                }
            }
            _ => {}
        }
        Outcome::default()
    }

    /// Does a command. Section 11.4.14.
    fn command(&mut self, given: EnhancedCommand) {
        // All of an operand counts: a number beyond the counters is none, however large it is.
        let index = usize::try_from(given.operand()).ok().filter(|index| *index < COUNTERS);
        let status = match (given.command(), index) {
            (command::ENABLE, Some(index)) if self.counters[index].can_be_enabled() => {
                self.counters[index].enable(true);
                StatusCode::Success
            }
            (command::DISABLE, Some(index)) => {
                self.counters[index].enable(false);
                self.frozen &= !(1 << index);
                StatusCode::Success
            }
            (command::ENABLE | command::DISABLE, _) => StatusCode::Counter,
            (command::RESET_CONFIGURATION, _) => {
                for counter in &mut self.counters {
                    *counter = Counter { value: counter.value, ..Counter::default() };
                }
                (self.frozen, self.overflowed) = (0, 0);
                StatusCode::Success
            }
            (command::RESET_VALUES, _) => {
                self.counters.iter_mut().for_each(|counter| counter.value = 0);
                StatusCode::Success
            }
            (command::FREEZE, _) => {
                self.frozen = ALL_COUNTERS;
                StatusCode::Success
            }
            (command::UNFREEZE, _) => {
                self.frozen = 0;
                StatusCode::Success
            }
            _ => StatusCode::Undefined,
        };
        self.response = EnhancedResponse::new().with_status(status as u8);
    }

    fn is_frozen(&self, index: usize) -> bool {
        self.frozen >> index & 1 != 0
    }

    /// Whether any counter counts now.
    pub(super) fn counts(&self) -> bool {
        (0..COUNTERS).any(|index| self.counters[index].configuration.enabled() && !self.is_frozen(index))
    }

    /// Takes in what happened: all of it, before anything is frozen by an overflow. The message of the event is given
    /// back. Section 10.3.1.
    fn count(&mut self, occurred: &Occurred) -> Option<Msi> {
        let (frozen, mut freezes, mut message) = (self.frozen, false, None);
        for (index, counter) in self.counters.iter_mut().enumerate() {
            let configuration = counter.configuration;
            if !configuration.enabled() || frozen >> index & 1 != 0 {
                continue;
            }
            let sum = counter.value + counter.selected(occurred);
            counter.value = sum & VALUE;
            if sum <= VALUE {
                continue;
            }
            self.overflowed |= 1 << index;
            freezes |= configuration.freeze_on_overflow();
            if configuration.interrupt_on_overflow() {
                self.interrupt_status |= 1;
                message = self.event.raise().or(message);
            }
        }
        if freezes {
            self.frozen = ALL_COUNTERS;
        }
        message
    }
}

/// Which of the registers that are `stride` bytes apart from `first` on `at` is in, and where in it.
fn place(at: u64, first: u64, stride: u64) -> (usize, u64) {
    (((at - first) / stride) as usize, (at - first) % stride)
}

/// The number of the first of the two filters that are at `register` of a counter's configuration.
fn filters_at(register: u64) -> Option<usize> {
    let first = register.checked_sub(offset::FILTER)? / 4;
    usize::try_from(first).ok().filter(|first| *first < FILTERS)
}

impl Counter {
    /// Writes a part of the 8 bytes at `register` of its configuration. While it is enabled, that has no effect.
    fn configure(&mut self, register: u64, write: Write) {
        if self.configuration.enabled() {
            return;
        }
        if register == 0 {
            write.merge(&mut self.configuration, CONFIGURATION);
            return;
        }
        let Some(first) = filters_at(register) else { return };
        for (half, number) in [first, first + 1].into_iter().enumerate() {
            let (value, mask) = ((write.value >> (32 * half)) as u32, (write.mask >> (32 * half)) as u32);
            if let (Some(register), Some(filter)) = (self.filters.get_mut(number), Filter::ALL.get(number)) {
                let changed = mask & filter.writable();
                *register = FilterRegister::from_bits(register.into_bits() & !changed | value & changed);
            }
        }
    }

    fn enable(&mut self, enabled: bool) {
        self.configuration = self.configuration.with_enabled(enabled);
    }

    fn filter(&self, filter: Filter) -> Option<u32> {
        let register = self.filters[filter as usize];
        register.enabled().then_some(register.value())
    }

    /// The events that it is to count.
    fn events(&self) -> impl Iterator<Item = (usize, Event)> + use<> {
        let (group, events) = (self.configuration.group(), self.configuration.events());
        let selected = move |(_, event): &(usize, Event)| {
            let (of_group, bit) = event.place();
            of_group == group && events & bit != 0
        };
        Event::ALL.into_iter().enumerate().filter(selected)
    }

    /// The checks of section 10.5. Every group and event that there is can be counted by every counter, and so can
    /// its overflow be an event, and freeze them.
    pub(super) fn can_be_enabled(&self) -> bool {
        let (group, events) = (self.configuration.group(), self.configuration.events());
        let filters = Filter::ALL.into_iter().filter(|filter| self.filter(*filter).is_some());
        let filters = filters.fold(0, |filters, filter| filters | filter.bit());
        let offered = events != 0 && events & !Event::of_group(group) == 0;
        let filtered =
            filters == 0 || events.is_power_of_two() && self.events().all(|(_, event)| filters & !event.filters() == 0);
        let pasid = self.filter(Filter::Pasid).is_none_or(|value| value >> 20 <= pasid_mode::NONE);
        offered && filtered && pasid
    }

    /// How often something happened that it counts.
    fn selected(&self, occurred: &Occurred) -> u64 {
        let happened = self.events().filter(|(_, event)| self.passes(*event, occurred));
        happened.map(|(index, _)| u64::from(occurred.times[index])).sum()
    }

    /// Whether all of its filters let `event` pass. Section 10.4.
    fn passes(&self, event: Event, Occurred { source, pasid, domain, .. }: &Occurred) -> bool {
        let lets_pass = |filter: Filter, value: u32| match filter {
            Filter::Requester => source.is_some_and(|id| u32::from(id.0) == value),
            Filter::Domain => domain.is_some_and(|domain| u32::from(domain.0) == value),
            Filter::Pasid => match value >> 20 {
                pasid_mode::THIS => pasid.is_some_and(|pasid| pasid.0 == value & Pasid::MAX.0),
                pasid_mode::ANY => pasid.is_some(),
                _ => pasid.is_none(),
            },
            // All requests are untranslated ones.
            Filter::AddressType => value & 1 != 0,
            Filter::PageTableLevel => value & event.level() != 0,
        };
        Filter::ALL.into_iter().all(|filter| self.filter(filter).is_none_or(|value| lets_pass(filter, value)))
    }
}

impl Registers {
    /// Does an enhanced command, and says whether any counter counts now.
    pub(crate) fn enhanced_command(&mut self, given: EnhancedCommand) -> bool {
        self.state.performance.as_mut().is_some_and(|performance| {
            performance.command(given);
            performance.counts()
        })
    }

    /// Whether any counter counts now.
    pub(crate) fn counts(&self) -> bool {
        self.state.performance.is_some_and(|performance| performance.counts())
    }

    /// Takes in what happened. The message of an overflow is given back.
    pub(crate) fn count(&mut self, occurred: &Occurred) -> Option<Msi> {
        self.state.performance.as_mut()?.count(occurred)
    }
}
