//! From a requester to what it is attached to in scalable mode: root table, context tables, PASID directory and PASID
//! table. Section 3.4.3.
//!
//! Requests without PASID are translated as if they carried the RID_PASID of the context entry.

use vm_memory::GuestMemoryBackend;

use super::context::{Attached, Resolved, Unresolved, beyond_width, supported_width};
use super::first_stage::FirstStage;
use super::flags::Flags;
use super::second_stage::SecondStage;
use crate::config::UnitConfig;
use crate::faults::RequestType;
use crate::ids::{DomainId, Gpa, Pasid, SourceId};
use crate::memory::{Words, read_words};
use crate::space::{PagedSpace, Tables};
use crate::spec::fault::FaultReason;
use crate::spec::pasid::{
    CONTEXT_ENTRY_SIZE, ContextHigh, ContextLow, DirectoryEntry, EntryLow, EntryMiddle, EntryUpper, RootHalf,
    TABLE_BITS, TABLE_ENTRY_WORDS, TranslationType,
};

/// A context entry of a requester.
struct Context {
    low: ContextLow,
    high: ContextHigh,
}

/// Looks `source` up. Every error means that nothing is reachable (rule 1).
pub(super) fn resolve<M: GuestMemoryBackend>(
    memory: &M,
    config: &UnitConfig,
    root_table: Gpa,
    source: SourceId,
    pasid: Option<Pasid>,
    request: RequestType,
) -> Result<Attached, Unresolved> {
    let context = context(memory, config, root_table, source)?;
    let unresolved = |reason| unresolved(reason, context.low.fault_processing_disable());
    let rid_pasid = Pasid(context.high.rid_pasid());
    let (device_tlb, page_requests) = (context.low.device_tlb(), context.low.page_request());
    if rid_pasid.0 > context.low.max_pasid() || page_requests && !device_tlb {
        return Err(unresolved(FaultReason::ScalableContextInvalid));
    }
    match request {
        RequestType::Translation | RequestType::Translated if !device_tlb => {
            return Err(unresolved(FaultReason::DeviceTlbNotEnabled));
        }
        RequestType::Page if !page_requests => return Err(unresolved(FaultReason::PageRequestNotEnabled)),
        _ => {}
    }
    if let Some(pasid) = pasid {
        if pasid.0 >> config.pasid_bits != 0 {
            return Err(unresolved(FaultReason::PasidBeyondSize));
        }
        if !context.low.pasid() {
            return Err(unresolved(FaultReason::PasidNotEnabled));
        }
        if pasid.0 > context.low.max_pasid() {
            return Err(unresolved(FaultReason::PasidBeyondDirectory));
        }
        if pasid == rid_pasid {
            return Err(unresolved(FaultReason::PasidIsRidPasid));
        }
    }
    let pasid = pasid.unwrap_or(rid_pasid);
    Ok(Attached { resolved: entry(memory, config, context.low, pasid)?, pasid: Some(pasid) })
}

const fn unresolved(reason: FaultReason, fault_processing_disable: bool) -> Unresolved {
    Unresolved { reason, fault_processing_disable }
}

/// The present context entry of `source`. Sections 9.2 and 9.4.
fn context<M: GuestMemoryBackend>(
    memory: &M,
    config: &UnitConfig,
    root_table: Gpa,
    source: SourceId,
) -> Result<Context, Unresolved> {
    let (half, index) = (u64::from(source.devfn() >> 7), u64::from(source.devfn() & 0x7f));
    // The other half is of other devices: nothing of it is looked at.
    let root = Gpa(root_table.0 + u64::from(source.bus()) * 16 + half * 8);
    let root = Some(root).filter(|root| !beyond_width(config, root.0));
    let root = root.and_then(|root| Words::at(memory, root, 1)?.get(0)).ok_or(FaultReason::ScalableRootAccess)?;
    let root = RootHalf::from_bits(root);
    if !root.present() {
        return Err(FaultReason::ScalableRootNotPresent.into());
    }
    let table = root.context_table() << 12;
    if root.reserved() != 0 || beyond_width(config, table) {
        return Err(FaultReason::ScalableRootReserved.into());
    }

    let [low, high, rest @ ..] =
        read_words::<_, { CONTEXT_ENTRY_SIZE as usize / 8 }>(memory, Gpa(table + index * CONTEXT_ENTRY_SIZE))
            .ok_or(FaultReason::ScalableContextAccess)?;
    let (low, high) = (ContextLow::from_bits(low), ContextHigh::from_bits(high));
    let disabled = low.fault_processing_disable();
    if !low.present() {
        return Err(unresolved(FaultReason::ScalableContextNotPresent, disabled));
    }
    let reserved = low.device_tlb() && !config.device_tlb || low.page_request() && !config.page_requests;
    let reserved = reserved || low.reserved() != 0;
    let reserved = reserved || low.pasid() && config.pasid_bits == 0;
    let reserved = reserved || high.reserved() != 0 || rest != [0, 0];
    if reserved || beyond_width(config, low.directory() << 12) {
        return Err(unresolved(FaultReason::ScalableContextReserved, disabled));
    }
    Ok(Context { low, high })
}

/// What the PASID table says about `pasid`, which the directory of `context` has an entry for. Sections 9.5 and 9.6.
fn entry<M: GuestMemoryBackend>(
    memory: &M,
    config: &UnitConfig,
    context: ContextLow,
    pasid: Pasid,
) -> Result<Resolved, Unresolved> {
    let disabled = context.fault_processing_disable();
    let directory = Gpa((context.directory() << 12) + u64::from(pasid.0 >> TABLE_BITS) * 8);
    let word = Words::at(memory, directory, 1).and_then(|words| words.get(0));
    let directory = DirectoryEntry::from_bits(word.ok_or(unresolved(FaultReason::PasidDirectoryAccess, disabled))?);
    let disabled = disabled || directory.fault_processing_disable();
    if !directory.present() {
        return Err(unresolved(FaultReason::PasidDirectoryNotPresent, disabled));
    }
    let table = directory.table() << 12;
    if directory.reserved() != 0 || beyond_width(config, table) {
        return Err(unresolved(FaultReason::PasidDirectoryReserved, disabled));
    }

    let index = u64::from(pasid.0) & ((1 << TABLE_BITS) - 1);
    let words = read_words::<_, TABLE_ENTRY_WORDS>(memory, Gpa(table + index * TABLE_ENTRY_WORDS as u64 * 8));
    let [low, middle, upper, rest @ ..] = words.ok_or(unresolved(FaultReason::PasidEntryAccess, disabled))?;
    let (low, middle, upper) = (EntryLow::from_bits(low), EntryMiddle::from_bits(middle), EntryUpper::from_bits(upper));
    let fault_processing_disable = disabled || low.fault_processing_disable();
    let unresolved = |reason| unresolved(reason, fault_processing_disable);
    if !low.present() {
        return Err(unresolved(FaultReason::PasidEntryNotPresent));
    }
    let root = low.second_stage() << 12;
    let first = upper.first_stage() << 12;
    // Memory types are not offered, nor snoop control, nor supervisor requests, nor the extended accessed flag. AW and
    // SSPTPTR are reserved without a second stage, and ignored all the same: Linux writes AW into entries of the first
    // stage, whether or not there is a second.
    let reserved = low.reserved_low() || low.reserved() != 0;
    let reserved = reserved || low.second_stage_dirty() && !config.second_stage_dirty;
    let reserved = reserved || middle.reserved() != 0 || middle.reserved_high() != 0;
    let reserved =
        reserved || upper.reserved() != 0 || upper.reserved_high() != 0 || rest != [0; TABLE_ENTRY_WORDS - 3];
    let of_first_stage = upper.paging_mode() != 0 || upper.write_protect() || first != 0;
    let reserved = reserved || of_first_stage && !config.first_stage();
    if reserved || beyond_width(config, root) || beyond_width(config, first) {
        return Err(unresolved(FaultReason::PasidEntryReserved));
    }
    let domain = DomainId(middle.domain());
    let flags = if middle.walk_snoop() { Flags::Set } else { Flags::NotSnooped };
    let second_flags = if low.second_stage_dirty() { flags } else { Flags::Ignored };
    let first_stage = || {
        let levels = 4 + upper.paging_mode();
        let offered = levels <= config.first_stage_levels();
        offered
            .then_some(FirstStage { root: Gpa(first), levels, flags })
            .ok_or(unresolved(FaultReason::PasidEntryInvalid))
    };
    let width = || supported_width(config, low.address_width()).ok_or(unresolved(FaultReason::PasidEntryInvalid));
    match TranslationType::from_bits(low.translation_type()) {
        Some(TranslationType::PassThrough) if config.pass_through => {
            Ok(Resolved::PassThrough { domain, fault_processing_disable })
        }
        Some(TranslationType::FirstStage) if config.first_stage() => {
            Ok(Resolved::First { tables: first_stage()?, domain, fault_processing_disable })
        }
        Some(TranslationType::SecondStage) if config.second_stage() => {
            let tables = Tables::Second { root: Gpa(root), width: width()? };
            let space = PagedSpace { unit: config.id, tables, domain };
            Ok(Resolved::Paged { space, flags: second_flags, fault_processing_disable })
        }
        Some(TranslationType::Nested) if config.nested => {
            let (tables, width) = (first_stage()?, width()?);
            if first >> width != 0 {
                return Err(unresolved(FaultReason::PasidEntryInvalid));
            }
            let second = SecondStage { root: Gpa(root), width, flags: second_flags };
            Ok(Resolved::Nested { tables, second, domain, fault_processing_disable })
        }
        Some(_) | None => Err(unresolved(FaultReason::PasidEntryInvalid)),
    }
}
