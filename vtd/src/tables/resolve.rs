//! From a requester to what it is attached to, in whichever mode the tables are. Section 3.4.

use vm_memory::GuestMemoryBackend;

use super::context::{self, Attached, Resolved, Translation, Unresolved};
use super::pasid;
use crate::config::UnitConfig;
use crate::faults::RequestType;
use crate::ids::{Gpa, Pasid, SourceId};
use crate::spec::fault::FaultReason;
use crate::spec::registers::table_mode;

/// Looks up what requests of `source` of this kind, with this PASID or without one, are attached to. Every error means
/// that nothing is reachable (rule 1).
pub(crate) fn resolve<M: GuestMemoryBackend>(
    memory: &M,
    config: &UnitConfig,
    translation: Translation,
    source: SourceId,
    pasid: Option<Pasid>,
    request: RequestType,
) -> Result<Attached, Unresolved> {
    // Without translation, a PASID is ignored (section 3.1).
    if !translation.enabled {
        return Ok(Resolved::Off.into());
    }
    let root_table = translation.root.page() << 12;
    match translation.root.mode() {
        table_mode::LEGACY if pasid.is_some() => Err(FaultReason::PasidInLegacyMode.into()),
        table_mode::LEGACY if request == RequestType::Page => Err(FaultReason::PageRequestInLegacyMode.into()),
        table_mode::LEGACY => context::resolve(memory, config, root_table, source, request).map(Attached::from),
        // Where only legacy mode is offered, any other table mode makes the pointer one that cannot be used.
        _ if config.scalable.is_none() => Err(FaultReason::RootTableAccess.into()),
        table_mode::SCALABLE => pasid::resolve(memory, config, Gpa(root_table), source, pasid, request),
        table_mode::ABORT => Err(FaultReason::AbortMode.into()),
        _ => Err(FaultReason::TableModeInvalid.into()),
    }
}
