//! What a unit is built from, and the capabilities that follow from it.

use crate::ids::{SourceId, UnitId};
use crate::spec::performance;
use crate::spec::registers::{Capability, ExtendedCapability, offset};
use crate::spec::second_stage::levels;

/// Size of the register window in bytes, without performance counters: see [`UnitConfig::register_window`].
pub const REGISTER_WINDOW: u64 = 4096;
/// Number of fault recording registers.
pub const FAULT_RECORDS: usize = 8;
/// Largest address mask of a page-selective invalidation: 2^18 pages, 1 GiB.
pub const MAX_ADDRESS_MASK: u8 = 18;

/// MHMV: largest mask of an index-selective invalidation of the interrupt entry cache: 2^15 entries.
pub const MAX_HANDLE_MASK: u8 = 15;

/// What a guest can make the unit keep or do, at most.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bounds {
    /// Extents in the shadow of one space.
    pub shadow_entries: usize,
    /// Spaces that have members.
    pub spaces: usize,
    /// Table entries visited by one walk of one range (tables that point at themselves have no end).
    pub table_entries: u64,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { shadow_entries: 1 << 20, spaces: 1 << 12, table_entries: 1 << 26 }
    }
}

/// The stages of translation that scalable mode offers.
///
/// The first stage is for emulated functions. An assigned one that the guest's tables put into it is blocked: in
/// Caching Mode, too, a guest need not say when it adds a first-stage mapping (section 6.1), so there would be no
/// moment to give it to the host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stages {
    /// The second only.
    Second,
    /// The first only.
    First,
    /// Either, one at a time.
    Both,
}

/// The description of a unit, fixed when the machine starts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UnitConfig {
    /// Which unit it is.
    pub id: UnitId,
    /// PCI segment of its requesters.
    pub segment: u16,
    /// Offer DMA remapping. A unit that does not only remaps interrupts, and says so by no address width (SAGAW is 0):
    /// its functions reach memory untranslated, whatever the guest does, so none is to be assigned.
    pub dma_translation: bool,
    /// Widest guest address (IOVA) in bits: 39, 48 or 57.
    pub aw_bits: u8,
    /// Width of a guest-physical address in bits, 32 to 52; address bits above it are reserved in every structure.
    pub host_address_width: u8,
    /// Caching Mode: the guest invalidates what it adds, too. Needed as soon as a function is assigned.
    pub caching_mode: bool,
    /// Offer the pass-through translation type.
    pub pass_through: bool,
    /// Offer interrupt remapping.
    pub interrupt_remapping: bool,
    /// Offer destinations of 32 bits (x2APIC) in interrupt remapping.
    pub extended_interrupt_mode: bool,
    /// Offer posted interrupts, in interrupt remapping: entries that record an interrupt in a descriptor in memory.
    pub posted_interrupts: bool,
    /// Offer scalable mode with these stages and pass-through, and abort-DMA mode; `None`: legacy mode only.
    pub scalable: Option<Stages>,
    /// Offer nested translation, a first stage over a second one. Like the first stage alone it is for emulated
    /// functions.
    pub nested: bool,
    /// Offer accessed and dirty flags of the second stage, in scalable mode. They are set for emulated functions; an
    /// assigned one whose entry asks for them is blocked, since its host would not set any.
    pub second_stage_dirty: bool,
    /// Bits of a PASID in requests that carry one, 1 to 20; 0: there are no such requests. They are of scalable mode,
    /// and of emulated functions: of an assigned one, only the requests without PASID are attached to anything.
    pub pasid_bits: u8,
    /// Offer device-TLBs (ATS). They are of emulated functions: the ATS capability of an assigned one is not the
    /// guest's, since what its device-TLB held would be addresses of the host.
    pub device_tlb: bool,
    /// Offer page requests (PRI), of emulated functions with a device-TLB, in scalable mode.
    pub page_requests: bool,
    /// Offer performance monitoring, of the requests of emulated functions, with the enhanced commands that it needs.
    pub performance_counters: bool,
    /// Interrupts of this source (an IOAPIC) pass whatever source their entry asks for: some guests give the pins of an
    /// IOAPIC entries with the id of the device that is wired to them.
    pub unchecked_source: Option<SourceId>,
    /// Bounds against a hostile guest.
    pub bounds: Bounds,
}

/// Why a configuration cannot be built.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not a width that a second-stage table can have.
    #[error("a guest address width of {0} bits does not exist: 39, 48 and 57 do")]
    AddressWidth(u8),
    /// Outside 32 to 52 bits.
    #[error("a host address width of {0} bits is outside 32 to 52")]
    HostAddressWidth(u8),
    /// Extended interrupt mode is a mode of interrupt remapping.
    #[error("extended interrupt mode needs interrupt remapping")]
    ExtendedModeAlone,
    /// Posted interrupts are entries of the interrupt remapping table.
    #[error("posted interrupts need interrupt remapping")]
    PostedAlone,
    /// More bits than a PASID has.
    #[error("a PASID of {0} bits does not exist: it has 20 at most")]
    PasidBits(u8),
    /// PASIDs are of scalable mode.
    #[error("requests with a PASID need scalable mode")]
    PasidsAlone,
    /// There are no two stages to nest.
    #[error("nested translation needs both stages of scalable mode")]
    NestedAlone,
    /// There are flags in scalable mode only.
    #[error("accessed and dirty flags of the second stage need scalable mode with a second stage")]
    FlagsAlone,
    /// A page request says what a device-TLB missed, and is of scalable mode.
    #[error("page requests need device-TLBs and scalable mode")]
    PageRequestsAlone,
    /// A unit that remaps neither.
    #[error("a unit without DMA remapping has to remap interrupts")]
    RemapsNothing,
    /// Scalable mode, device-TLBs and performance counters are of DMA.
    #[error("a unit without DMA remapping has neither scalable mode nor device-TLBs nor performance counters")]
    InterruptsOnly,
    /// A bound of 0 would block everything.
    #[error("the bound on {0} is 0, which would block every space")]
    ZeroBound(&'static str),
}

impl UnitConfig {
    /// Caching Mode and pass-through on, no interrupt remapping, legacy mode only, segment 0, 48 bits of guest-physical
    /// address, default bounds.
    pub fn new(id: UnitId, aw_bits: u8) -> Self {
        Self {
            id,
            segment: 0,
            dma_translation: true,
            aw_bits,
            host_address_width: 48,
            caching_mode: true,
            pass_through: true,
            interrupt_remapping: false,
            extended_interrupt_mode: false,
            posted_interrupts: false,
            scalable: None,
            nested: false,
            second_stage_dirty: false,
            pasid_bits: 0,
            device_tlb: false,
            page_requests: false,
            performance_counters: false,
            unchecked_source: None,
            bounds: Bounds::default(),
        }
    }

    /// Whether a unit can be built from it.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !matches!(self.aw_bits, 39 | 48 | 57) {
            return Err(ConfigError::AddressWidth(self.aw_bits));
        }
        if !(32..=52).contains(&self.host_address_width) {
            return Err(ConfigError::HostAddressWidth(self.host_address_width));
        }
        if self.extended_interrupt_mode && !self.interrupt_remapping {
            return Err(ConfigError::ExtendedModeAlone);
        }
        if self.posted_interrupts && !self.interrupt_remapping {
            return Err(ConfigError::PostedAlone);
        }
        if !self.dma_translation && !self.interrupt_remapping {
            return Err(ConfigError::RemapsNothing);
        }
        if !self.dma_translation && (self.scalable.is_some() || self.device_tlb || self.performance_counters) {
            return Err(ConfigError::InterruptsOnly);
        }
        if self.pasid_bits > 20 {
            return Err(ConfigError::PasidBits(self.pasid_bits));
        }
        if self.pasid_bits != 0 && self.scalable.is_none() {
            return Err(ConfigError::PasidsAlone);
        }
        if self.nested && self.scalable != Some(Stages::Both) {
            return Err(ConfigError::NestedAlone);
        }
        if self.second_stage_dirty && !self.second_stage() {
            return Err(ConfigError::FlagsAlone);
        }
        if self.page_requests && !(self.device_tlb && self.scalable.is_some()) {
            return Err(ConfigError::PageRequestsAlone);
        }
        let bounds = [
            (self.bounds.shadow_entries as u64, "shadow entries"),
            (self.bounds.spaces as u64, "spaces"),
            (self.bounds.table_entries, "table entries"),
        ];
        bounds.iter().find(|(value, _)| *value == 0).map_or(Ok(()), |(_, name)| Err(ConfigError::ZeroBound(name)))
    }

    /// Whether scalable mode has the second stage.
    pub const fn second_stage(&self) -> bool {
        matches!(self.scalable, Some(Stages::Second | Stages::Both))
    }

    /// Whether scalable mode has the first stage.
    pub const fn first_stage(&self) -> bool {
        matches!(self.scalable, Some(Stages::First | Stages::Both))
    }

    /// Levels that a first-stage table can have at most: 5 in a unit of 57 bits, else 4; 0 without a first stage.
    pub const fn first_stage_levels(&self) -> u8 {
        match (self.first_stage(), self.aw_bits) {
            (false, _) => 0,
            (true, 57) => 5,
            (true, _) => 4,
        }
    }

    /// Size of the register window in bytes, a power of two: a page, or four with performance counters.
    pub const fn register_window(&self) -> u64 {
        if self.performance_counters { performance::offset::END.next_power_of_two() } else { REGISTER_WINDOW }
    }

    /// Version register: 1.0. Section 11.4.1.
    pub const fn version(&self) -> u32 {
        0x10
    }

    /// Capability register.
    pub const fn capability(&self) -> Capability {
        // SAGAW bit 1 is 3 levels: the widest width of the unit and every narrower one. A driver that finds none leaves
        // DMA remapping alone and remaps interrupts, as Linux does.
        let adjusted_widths = if self.dma_translation { (1u8 << (levels(self.aw_bits) - 1)) - 2 } else { 0 };
        Capability::new()
            .with_number_of_domains(6)
            .with_caching_mode(self.caching_mode)
            .with_adjusted_widths(adjusted_widths)
            .with_max_guest_width(self.aw_bits - 1)
            .with_zero_length_read(true)
            .with_fault_record_offset((offset::FRCD / 16) as u16)
            .with_large_pages(if self.dma_translation { 0b11 } else { 0 })
            .with_page_selective(true)
            .with_fault_records(FAULT_RECORDS as u8 - 1)
            .with_max_address_mask(MAX_ADDRESS_MASK)
            .with_drain_writes(true)
            .with_drain_reads(true)
            .with_first_stage_1g(self.first_stage())
            .with_posted_interrupts(self.posted_interrupts)
            .with_first_stage_5_levels(self.first_stage_levels() == 5)
            .with_enhanced_commands(self.performance_counters)
            .with_enhanced_srtp(true)
            .with_enhanced_sirtp(self.interrupt_remapping)
    }

    /// Extended capability register.
    pub const fn extended_capability(&self) -> ExtendedCapability {
        ExtendedCapability::new()
            .with_coherent(true)
            .with_queued_invalidation(true)
            .with_device_tlb(self.device_tlb)
            .with_no_write_flag(self.device_tlb)
            .with_page_requests(self.page_requests)
            .with_page_request_drain(self.page_requests)
            .with_pass_through(self.pass_through && self.dma_translation)
            .with_interrupt_remapping(self.interrupt_remapping)
            .with_extended_interrupt_mode(self.extended_interrupt_mode)
            .with_max_handle_mask(if self.interrupt_remapping { MAX_HANDLE_MASK } else { 0 })
            .with_iotlb_offset((offset::IVA / 16) as u16)
            .with_scalable_mode(self.scalable.is_some())
            .with_pasid(self.pasid_bits != 0)
            .with_pasid_size(self.pasid_bits.saturating_sub(1))
            .with_nested(self.nested)
            .with_second_stage(self.second_stage())
            .with_second_stage_dirty(self.second_stage_dirty)
            .with_first_stage(self.first_stage())
            .with_scalable_coherent(self.scalable.is_some())
            .with_rid_pasid(self.scalable.is_some())
            .with_performance_monitoring(self.performance_counters)
            .with_abort_mode(self.scalable.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a4_widths_follow_the_configuration() {
        for (aw, sagaw) in [(39, 0b0010), (48, 0b0110), (57, 0b1110)] {
            let capability = UnitConfig::new(UnitId(0), aw).capability();
            assert_eq!((capability.adjusted_widths(), capability.max_guest_width()), (sagaw, aw - 1));
        }
    }

    #[test]
    fn a4_capabilities_are_what_linux_reads() {
        let capability = UnitConfig::new(UnitId(0), 48).capability().into_bits();
        assert_eq!(capability & 7, 6);
        assert_eq!(capability >> 7 & 1, 1, "CM");
        assert_eq!(capability >> 34 & 0xf, 3, "SLLPS");
        assert_eq!((capability >> 24 & 0x3ff) * 16, 0x220, "FRO");
        assert_eq!(capability >> 39 & 1, 1, "PSI");
        assert_eq!(capability >> 40 & 0xff, 7, "NFR");
        assert_eq!(capability >> 48 & 0x3f, 18, "MAMV");
        assert_eq!(capability >> 54 & 3, 3, "DWD, DRD");
        assert_eq!(capability >> 63, 1, "ESRTPS");
        let mut config = UnitConfig::new(UnitId(0), 48);
        let extended = config.extended_capability().into_bits();
        assert_eq!(extended & 0xff, 0b0100_0011, "C, QI, PT; no IR, no SC, no DT");
        assert_eq!(extended >> 8 & 0x3ff, 0xf, "IRO");
        config.pass_through = false;
        config.caching_mode = false;
        assert!(!config.extended_capability().pass_through());
        assert!(!config.capability().caching_mode());
    }

    #[test]
    fn a4_interrupt_remapping_is_offered_when_asked_for() {
        let mut config = UnitConfig::new(UnitId(0), 48);
        assert!(!config.capability().enhanced_sirtp() && config.extended_capability().max_handle_mask() == 0);
        config.interrupt_remapping = true;
        let extended = config.extended_capability().into_bits();
        assert_eq!((extended >> 3 & 1, extended >> 4 & 1, extended >> 20 & 0xf), (1, 0, 15), "IR, EIM, MHMV");
        let capability = config.capability().into_bits();
        assert_eq!((capability >> 62 & 1, capability >> 59 & 1), (1, 0), "ESIRTPS, PI");
        config.extended_interrupt_mode = true;
        assert_eq!(config.extended_capability().into_bits() >> 4 & 1, 1, "EIM");
        assert_eq!(config.validate(), Ok(()));
        config.interrupt_remapping = false;
        assert_eq!(config.validate(), Err(ConfigError::ExtendedModeAlone));
    }

    #[test]
    fn a17_posted_interrupts_are_offered_when_asked_for_and_with_interrupt_remapping_only() {
        let mut config = UnitConfig { interrupt_remapping: true, ..UnitConfig::new(UnitId(0), 48) };
        let before = config.capability().into_bits();
        config.posted_interrupts = true;
        assert_eq!(config.capability().into_bits() ^ before, 1 << 59, "PI");
        assert_eq!(config.validate(), Ok(()));
        config.interrupt_remapping = false;
        assert_eq!(config.validate(), Err(ConfigError::PostedAlone));
    }

    #[test]
    fn a4_a_unit_that_remaps_interrupts_only_has_no_width() {
        let interrupts = UnitConfig { interrupt_remapping: true, ..UnitConfig::new(UnitId(0), 48) };
        let config = UnitConfig { dma_translation: false, ..interrupts };
        assert_eq!(config.validate(), Ok(()));
        let (all, capability) = (interrupts.capability(), config.capability());
        assert_eq!((capability.adjusted_widths(), capability.large_pages()), (0, 0));
        assert_eq!(
            capability.with_adjusted_widths(all.adjusted_widths()).with_large_pages(3),
            all,
            "all else is the same"
        );
        assert!(!config.extended_capability().pass_through());
        assert_eq!(config.extended_capability().with_pass_through(true), interrupts.extended_capability());
        let nothing = UnitConfig { interrupt_remapping: false, ..config };
        assert_eq!(nothing.validate(), Err(ConfigError::RemapsNothing));
        for more in [
            UnitConfig { scalable: Some(Stages::Second), ..config },
            UnitConfig { device_tlb: true, ..config },
            UnitConfig { performance_counters: true, ..config },
        ] {
            assert_eq!(more.validate(), Err(ConfigError::InterruptsOnly));
        }
    }

    #[test]
    fn a4_impossible_configurations_are_refused() {
        assert_eq!(UnitConfig::new(UnitId(0), 40).validate(), Err(ConfigError::AddressWidth(40)));
        let mut config = UnitConfig::new(UnitId(0), 57);
        assert_eq!(config.validate(), Ok(()));
        config.host_address_width = 53;
        assert_eq!(config.validate(), Err(ConfigError::HostAddressWidth(53)));
        config.host_address_width = 31;
        assert_eq!(config.validate(), Err(ConfigError::HostAddressWidth(31)));
        for width in [32, 39, 52] {
            config.host_address_width = width;
            assert_eq!(config.validate(), Ok(()));
        }
        let bounds = config.bounds;
        config.bounds.table_entries = 0;
        assert_eq!(config.validate(), Err(ConfigError::ZeroBound("table entries")));
        config.bounds = Bounds { shadow_entries: 0, ..bounds };
        assert_eq!(config.validate(), Err(ConfigError::ZeroBound("shadow entries")));
        config.bounds = Bounds { spaces: 0, ..bounds };
        assert_eq!(config.validate(), Err(ConfigError::ZeroBound("spaces")));
    }
}
