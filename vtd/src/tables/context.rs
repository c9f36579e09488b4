//! From a requester to what it is attached to: root table and context tables of legacy mode. Sections 3.4.2
//! and 3.4.3.

use vm_memory::GuestMemoryBackend;

use super::first_stage::FirstStage;
use super::flags::Flags;
use super::second_stage::SecondStage;
use crate::config::UnitConfig;
use crate::faults::RequestType;
use crate::ids::{DomainId, Gpa, Pasid, SourceId};
use crate::memory::read_pair;
use crate::space::{PagedSpace, Tables};
use crate::spec::fault::FaultReason;
use crate::spec::registers::{RootTableAddress, table_mode};
use crate::spec::root_context::{ContextEntryHigh, ContextEntryLow, RootEntryLow, TranslationType};

/// What the guest has the unit do: the part of its state that every translation begins with.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Translation {
    /// TES.
    pub(crate) enabled: bool,
    /// The root table in use.
    pub(crate) root: RootTableAddress,
}

impl Translation {
    /// TTM says scalable mode; only a unit that offers it takes any notice.
    pub(crate) fn is_scalable(self) -> bool {
        self.root.mode() == table_mode::SCALABLE
    }
}

/// What the tables say about a requester.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Resolved {
    /// Translation is off.
    Off,
    /// Pass-through.
    PassThrough { domain: DomainId, fault_processing_disable: bool },
    /// A page table.
    Paged { space: PagedSpace, flags: Flags, fault_processing_disable: bool },
    /// A page table of the first stage.
    First { tables: FirstStage, domain: DomainId, fault_processing_disable: bool },
    /// One whose addresses are those of a second stage.
    Nested { tables: FirstStage, second: SecondStage, domain: DomainId, fault_processing_disable: bool },
}

impl Resolved {
    /// The domain that tags what is cached of it; none without translation.
    pub(crate) fn domain(&self) -> Option<DomainId> {
        match self {
            Self::Off => None,
            Self::PassThrough { domain, .. } | Self::First { domain, .. } | Self::Nested { domain, .. } => {
                Some(*domain)
            }
            Self::Paged { space, .. } => Some(space.domain),
        }
    }

    /// FPD of the entries that led to it.
    pub(crate) fn fault_processing_disable(&self) -> bool {
        match self {
            Self::Off => false,
            Self::PassThrough { fault_processing_disable, .. }
            | Self::Paged { fault_processing_disable, .. }
            | Self::First { fault_processing_disable, .. }
            | Self::Nested { fault_processing_disable, .. } => *fault_processing_disable,
        }
    }
}

/// What requests are attached to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Attached {
    pub(crate) resolved: Resolved,
    /// The PASID that they are translated with, theirs or RID_PASID; none without scalable mode.
    pub(crate) pasid: Option<Pasid>,
}

impl From<Resolved> for Attached {
    fn from(resolved: Resolved) -> Self {
        Self { resolved, pasid: None }
    }
}

/// Why the tables say nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Unresolved {
    pub(crate) reason: FaultReason,
    pub(crate) fault_processing_disable: bool,
}

impl From<FaultReason> for Unresolved {
    fn from(reason: FaultReason) -> Self {
        Self { reason, fault_processing_disable: false }
    }
}

/// Bits of a table address beyond the host address width.
pub(super) const fn beyond_width(config: &UnitConfig, address: u64) -> bool {
    address >> config.host_address_width != 0
}

/// Looks up in the tables of legacy mode what `source` is attached to. Every error means that nothing is reachable
/// (rule 1).
pub(super) fn resolve<M: GuestMemoryBackend>(
    memory: &M,
    config: &UnitConfig,
    root_table: u64,
    source: SourceId,
    request: RequestType,
) -> Result<Resolved, Unresolved> {
    if beyond_width(config, root_table) {
        return Err(FaultReason::RootTableAccess.into());
    }
    let (low, high) =
        read_pair(memory, Gpa(root_table + u64::from(source.bus()) * 16)).ok_or(FaultReason::RootTableAccess)?;
    let root = RootEntryLow::from_bits(low);
    if !root.present() {
        return Err(FaultReason::RootNotPresent.into());
    }
    let context_table = root.context_table() << 12;
    if root.reserved() != 0 || high != 0 || beyond_width(config, context_table) {
        return Err(FaultReason::RootReserved.into());
    }

    let (low, high) = read_pair(memory, Gpa(context_table + u64::from(source.devfn()) * 16))
        .ok_or(FaultReason::ContextTableAccess)?;
    let (low, high) = (ContextEntryLow::from_bits(low), ContextEntryHigh::from_bits(high));
    let fault_processing_disable = low.fault_processing_disable();
    let unresolved = |reason| Unresolved { reason, fault_processing_disable };
    if !low.present() {
        return Err(unresolved(FaultReason::ContextNotPresent));
    }
    let kind = TranslationType::from_bits(low.translation_type());
    let root = low.second_stage() << 12;
    // The pointer of a pass-through entry is ignored, whatever it holds.
    let pointer_used = kind != Some(TranslationType::PassThrough);
    if low.reserved() != 0 || high.reserved_low() || high.reserved() != 0 || pointer_used && beyond_width(config, root)
    {
        return Err(unresolved(FaultReason::ContextReserved));
    }
    let width = supported_width(config, high.address_width()).ok_or(unresolved(FaultReason::ContextInvalid))?;
    let domain = DomainId(high.domain());
    let of_device_tlb = request != RequestType::Untranslated;
    match kind {
        Some(TranslationType::PassThrough) if config.pass_through && of_device_tlb => {
            Err(unresolved(FaultReason::RequestTypeBlocked))
        }
        Some(TranslationType::Untranslated) if of_device_tlb => Err(unresolved(FaultReason::RequestTypeBlocked)),
        Some(TranslationType::PassThrough) if config.pass_through => {
            Ok(Resolved::PassThrough { domain, fault_processing_disable })
        }
        Some(kind)
            if kind == TranslationType::Untranslated || kind == TranslationType::DeviceTlb && config.device_tlb =>
        {
            let space = PagedSpace { unit: config.id, tables: Tables::Second { root: Gpa(root), width }, domain };
            Ok(Resolved::Paged { space, flags: Flags::Ignored, fault_processing_disable })
        }
        // One that is not offered; 11 is reserved.
        Some(_) | None => Err(unresolved(FaultReason::ContextInvalid)),
    }
}

/// The width that AW names, when SAGAW has it.
pub(super) fn supported_width(config: &UnitConfig, address_width: u8) -> Option<u8> {
    let offered = config.capability().adjusted_widths() >> address_width & 1 != 0;
    offered.then_some(30 + 9 * address_width)
}
