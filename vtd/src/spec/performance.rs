//! Performance monitoring, and the enhanced commands that control it. Chapter 10, and sections 11.4.13 and 11.4.14.

use bitfield_struct::bitfield;
use serde::{Deserialize, Serialize};

/// Number of counters.
pub const COUNTERS: usize = 8;
/// Width of a counter in bits.
pub const COUNTER_BITS: u8 = 48;
/// Number of event groups. Linux looks at five, however many there are; nothing of the last one is counted.
pub const EVENT_GROUPS: usize = 5;
/// Number of filters of a counter: see [`Filter`].
pub const FILTERS: usize = 5;

/// Offsets of the registers, in bytes from the base of the unit. Section 11.4, table of registers.
pub mod offset {
    use super::COUNTERS;

    /// Performance monitoring capability, 64 bits.
    pub const PERFCAP: u64 = 0x300;
    /// Configuration offset, which is [`PERFCNTRCFG`].
    pub const PERFCFGOFF: u64 = 0x310;
    /// Freeze offset, which is [`PERFFRZSTS`].
    pub const PERFFRZOFF: u64 = 0x314;
    /// Overflow offset, which is [`PERFOVFSTS`].
    pub const PERFOVFOFF: u64 = 0x318;
    /// Counter offset, which is [`PERFCNTR`].
    pub const PERFCNTROFF: u64 = 0x31c;
    /// Interrupt status.
    pub const PERFINTRSTS: u64 = 0x324;
    /// Interrupt control.
    pub const PERFINTRCTL: u64 = 0x328;
    /// Interrupt data.
    pub const PERFINTRDATA: u64 = 0x32c;
    /// Interrupt address.
    pub const PERFINTRADDR: u64 = 0x330;
    /// Interrupt upper address.
    pub const PERFINTRUADDR: u64 = 0x334;
    /// Event capability of the first group, 64 bits each.
    pub const PERFEVNTCAP: u64 = 0x380;
    /// Enhanced command, 64 bits.
    pub const ECMD: u64 = 0x400;
    /// Extended operand of a command, 64 bits. No command has one.
    pub const ECEO: u64 = 0x408;
    /// Response to a command, 64 bits.
    pub const ECRSP: u64 = 0x410;
    /// Enhanced command capability of commands 192 to 255, 64 bits. Nothing is in those of the others.
    pub const ECCAP_3: u64 = 0x448;

    /// Configuration of the first counter, 64 bits. From here on in places of this unit's own choice: on other pages
    /// than the rest, and each kind aligned as it has to be.
    pub const PERFCNTRCFG: u64 = 0x1000;
    /// Bytes from the configuration of a counter to that of the next.
    pub const CONFIGURATION_STRIDE: u64 = 0x100;
    /// First filter of a counter, 32 bits each, from its configuration on.
    pub const FILTER: u64 = 0x8;
    /// Freeze status, 64 bits.
    pub const PERFFRZSTS: u64 = 0x1800;
    /// Overflow status, 64 bits.
    pub const PERFOVFSTS: u64 = 0x1808;
    /// First counter, 64 bits.
    pub const PERFCNTR: u64 = 0x2000;
    /// Bytes from a counter to the next.
    pub const COUNTER_STRIDE: u64 = 0x400;
    /// Behind the last counter.
    pub const END: u64 = PERFCNTR + COUNTERS as u64 * COUNTER_STRIDE;
}

/// Performance monitoring capability register (64 bits, RO). Section 11.4.13.2.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Capability {
    /// NCNTR: number of counters.
    pub counters: u16,
    /// CW: width of a counter in bits.
    #[bits(7)]
    pub width: u8,
    __: bool,
    /// EGCNT: number of event groups.
    #[bits(5)]
    pub event_groups: u8,
    #[bits(3)]
    __: u8,
    /// RIDFS, DIDFS, PASIDFS, ATFS and PTLFS: which filters there are, by [`Filter`].
    #[bits(5)]
    pub filters: u8,
    #[bits(11)]
    __: u16,
    /// CWE: counters can be written while they are enabled.
    pub writable_while_enabled: bool,
    /// GFS: an overflow can freeze all counters.
    pub freeze_on_overflow: bool,
    /// IOS: an overflow can be an event.
    pub interrupt_on_overflow: bool,
    /// PCCS: counters have capabilities of their own.
    pub per_counter: bool,
    /// CS: counters are `2^(stride + 10)` bytes apart.
    #[bits(3)]
    pub stride: u8,
    #[bits(9)]
    __: u16,
}

impl Capability {
    /// That of every unit with counters.
    pub const OFFERED: Self = Self::new()
        .with_counters(COUNTERS as u16)
        .with_width(COUNTER_BITS)
        .with_event_groups(EVENT_GROUPS as u8)
        .with_filters((1 << FILTERS) - 1)
        .with_writable_while_enabled(true)
        .with_freeze_on_overflow(true)
        .with_interrupt_on_overflow(true)
        .with_stride(offset::COUNTER_STRIDE.ilog2() as u8 - 10);
}

/// Counter configuration register (64 bits). Section 11.4.13.15.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Serialize, Deserialize)]
pub struct Configuration {
    /// EN (RO): the counter is enabled.
    pub enabled: bool,
    /// IO: an overflow is an event.
    pub interrupt_on_overflow: bool,
    /// GFO: an overflow freezes all counters.
    pub freeze_on_overflow: bool,
    #[bits(5)]
    __: u8,
    /// EGI: event group.
    #[bits(4)]
    pub group: u8,
    #[bits(20)]
    __: u32,
    /// ES: events of the group, a bit each.
    #[bits(28)]
    pub events: u32,
    #[bits(4)]
    __: u8,
}

/// What a counter can be confined to. Sections 11.4.13.16 to 11.4.13.20.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Filter {
    /// A source id.
    Requester,
    /// A domain id.
    Domain,
    /// A PASID, any, or none.
    Pasid,
    /// Kinds of requests.
    AddressType,
    /// Levels of entries, or sizes of pages.
    PageTableLevel,
}

impl Filter {
    /// All of them, in the order of their registers.
    pub const ALL: [Self; FILTERS] =
        [Self::Requester, Self::Domain, Self::Pasid, Self::AddressType, Self::PageTableLevel];

    /// The bits of its register that can be written. Of address types there are untranslated requests only.
    pub const fn writable(self) -> u32 {
        let value = match self {
            Self::Requester | Self::Domain => 0xffff,
            Self::Pasid => 0x3f_ffff,
            Self::AddressType => 0b1,
            Self::PageTableLevel => 0b1_1111,
        };
        FilterRegister::new().with_enabled(true).with_value(value).into_bits()
    }

    /// Its bit in sets of filters.
    pub const fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// A filter configuration register (32 bits). Sections 11.4.13.16 to 11.4.13.20.
#[bitfield(u32)]
#[derive(PartialEq, Eq, Serialize, Deserialize)]
pub struct FilterRegister {
    /// RID, DID, PASID with PFM in bits 21:20, AT, or PTL.
    #[bits(31)]
    pub value: u32,
    /// EN.
    pub enabled: bool,
}

/// PFM of a PASID filter. Section 11.4.13.18.
pub mod pasid_mode {
    /// Requests with the PASID of the filter.
    pub const THIS: u32 = 0b00;
    /// Requests with any PASID.
    pub const ANY: u32 = 0b01;
    /// Requests without PASID.
    pub const NONE: u32 = 0b10;
}

/// What is counted. Section 10.7.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// IOMMU_REQUESTS: a page that an emulated function asks for.
    Request,
    /// CTXT_CACHE_LOOKUP.
    ContextLookup,
    /// CTXT_CACHE_HIT.
    ContextHit,
    /// PASID_CACHE_LOOKUP.
    PasidLookup,
    /// PASID_CACHE_HIT.
    PasidHit,
    /// SS_NONLEAF_LOOKUP.
    SecondLookup,
    /// SS_NONLEAF_HIT.
    SecondHit,
    /// FS_NONLEAF_LOOKUP.
    FirstLookup,
    /// FS_NONLEAF_HIT.
    FirstHit,
    /// IOTLB_LOOKUP.
    IotlbLookup,
    /// IOTLB_HIT.
    IotlbHit,
}

impl Event {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Request,
        Self::ContextLookup,
        Self::ContextHit,
        Self::PasidLookup,
        Self::PasidHit,
        Self::SecondLookup,
        Self::SecondHit,
        Self::FirstLookup,
        Self::FirstHit,
        Self::IotlbLookup,
        Self::IotlbHit,
    ];

    /// Its group, and its bit there.
    pub const fn place(self) -> (u8, u32) {
        match self {
            Self::Request => (0, 1 << 1),
            Self::ContextLookup => (2, 1 << 0),
            Self::ContextHit => (2, 1 << 1),
            Self::PasidLookup => (2, 1 << 2),
            Self::PasidHit => (2, 1 << 3),
            Self::SecondLookup => (2, 1 << 4),
            Self::SecondHit => (2, 1 << 5),
            Self::FirstLookup => (2, 1 << 6),
            Self::FirstHit => (2, 1 << 7),
            Self::IotlbLookup => (3, 1 << 0),
            Self::IotlbHit => (3, 1 << 1),
        }
    }

    /// The filters that it can be counted with. The domain is known of what a cache had.
    pub const fn filters(self) -> u8 {
        let always = Filter::Requester.bit() | Filter::Pasid.bit();
        match self {
            Self::Request => always | Filter::AddressType.bit(),
            Self::ContextHit | Self::PasidHit => always | Filter::Domain.bit(),
            Self::SecondHit | Self::FirstHit | Self::IotlbHit => {
                always | Filter::Domain.bit() | Filter::PageTableLevel.bit()
            }
            Self::ContextLookup | Self::PasidLookup | Self::SecondLookup | Self::FirstLookup | Self::IotlbLookup => {
                always
            }
        }
    }

    /// Its bit in the filter of levels: translations are cached by pages of 4 KiB, and of what is above them the
    /// entries that lead to 2 MiB.
    pub const fn level(self) -> u32 {
        match self {
            Self::SecondHit | Self::FirstHit => 0b10,
            _ => 0b1,
        }
    }

    /// ES of the event capability register of `group`. Section 11.4.13.14.
    pub fn of_group(group: u8) -> u32 {
        let of_group = Self::ALL.into_iter().map(Self::place).filter(|(of_event, _)| *of_event == group);
        of_group.fold(0, |events, (_, bit)| events | bit)
    }
}

/// Enhanced command register (64 bits, WO). Section 11.4.14.1.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct EnhancedCommand {
    /// CMD: see [`command`].
    pub command: u8,
    __: u8,
    /// OA.
    #[bits(48)]
    pub operand: u64,
}

/// The enhanced commands. Section 11.4.14.1, table of commands.
pub mod command {
    /// Enable Perfmon Counter.
    pub const ENABLE: u8 = 240;
    /// Disable Perfmon Counter.
    pub const DISABLE: u8 = 241;
    /// Reset All Perfmon Counter Configuration.
    pub const RESET_CONFIGURATION: u8 = 242;
    /// Reset All Perfmon Counter Values.
    pub const RESET_VALUES: u8 = 243;
    /// Freeze All Perfmon Counters.
    pub const FREEZE: u8 = 244;
    /// Unfreeze All Perfmon Counters.
    pub const UNFREEZE: u8 = 245;

    /// ECNTS to UFCNTS of ECCAP_REG_3: all of these.
    pub const OFFERED: u64 = 0x3f << (ENABLE - 192);
}

/// SC of the response to an enhanced command. Section 11.4.14.3.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StatusCode {
    /// It is done.
    Success = 0,
    /// There is no such command.
    Undefined = 1,
    /// The counter cannot be enabled as it is configured, or there is none with this number.
    Counter = 16,
}

/// Enhanced command response register (64 bits, RO). Section 11.4.14.3.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Serialize, Deserialize)]
pub struct EnhancedResponse {
    /// IP: the command is in progress. Each is done when the write that gave it is.
    pub in_progress: bool,
    /// SC: see [`StatusCode`].
    #[bits(7)]
    pub status: u8,
    #[bits(56)]
    __: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a15_the_registers_are_laid_out_as_the_specification_says() {
        assert_eq!(Capability::OFFERED.into_bits(), 8 | 48 << 16 | 5 << 24 | 0x1f << 32 | 0b111 << 48);
        let all =
            Configuration::new().with_enabled(true).with_interrupt_on_overflow(true).with_freeze_on_overflow(true);
        assert_eq!(all.with_group(0xf).with_events(0xfff_ffff).into_bits(), 0x0fff_ffff_0000_0f07);
        assert_eq!(
            Filter::ALL.map(Filter::writable),
            [0x8000_ffff, 0x8000_ffff, 0x803f_ffff, 0x8000_0001, 0x8000_001f]
        );
        assert_eq!([0, 1, 2, 3, 4].map(Event::of_group), [0b10, 0, 0xff, 0b11, 0]);
        assert_eq!(EnhancedCommand::from_bits(0x1234_5678_9abc_00f0).operand(), 0x1234_5678_9abc);
        assert_eq!(command::OFFERED, 0x3f << 48);
        // Aligned as their registers of offsets demand, inside the window, and none over another.
        assert_eq!((offset::PERFCNTRCFG % 0x100, offset::PERFCNTR % offset::COUNTER_STRIDE), (0, 0));
        assert!(offset::PERFCNTRCFG + COUNTERS as u64 * offset::CONFIGURATION_STRIDE <= offset::PERFFRZSTS);
    }
}
