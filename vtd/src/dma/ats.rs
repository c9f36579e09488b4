//! What a function with a device-TLB asks of the unit: translations, and accesses to what these lead to. Chapter
//! 4.
//!
//! A translation request reads the tables: nothing that was cached for other requests is used, and nothing of it is
//! cached here. So the implicit invalidation of a page request (section 6.5.3.1) has nothing to do.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::endpoint::{DmaError, Endpoint, PAGE};
use super::session::DmaSession;
use crate::core::Core;
use crate::faults::{Access, Fault, RequestType};
use crate::ids::{Gpa, Iova, Requester};
use crate::range::IovaRange;
use crate::source_ids::Source;
use crate::spec::INTERRUPT_WINDOW;
use crate::spec::ats::{TranslationData, sized_page};
use crate::spec::fault::FaultReason;
use crate::tables::blocked::Blocked;
use crate::tables::context::{Attached, Resolved, Unresolved};
use crate::tables::first_stage::{FirstDirectory, FirstLeaf, Nothing};
use crate::tables::flags::Request;
use crate::tables::nested::Second;
use crate::tables::resolve::resolve;
use crate::tables::second_stage::{DIRECTORY_SPAN, Directory, Reached, SecondStage};

/// Why a translation request has no translation for an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoTranslation {
    /// Unsupported Request: the guest does not let the function have any.
    #[error("the function may not ask for translations")]
    Unsupported,
    /// Completer Abort: the tables are not as they have to be.
    #[error("the tables cannot be used")]
    Aborted,
}

/// What a reason means for a translation request. Section 7.1.3, table of fault conditions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Answer {
    /// An error, and the fault is recorded.
    Error(NoTranslation),
    /// A translation that permits nothing, so that the function may ask for the page. The fault is recorded only where
    /// the function cannot help it.
    Nothing { recorded: bool },
}

fn answer_to(reason: FaultReason) -> Answer {
    use FaultReason as R;
    match reason {
        R::RootNotPresent
        | R::ContextNotPresent
        | R::RequestTypeBlocked
        | R::PasidInLegacyMode
        | R::PageRequestInLegacyMode
        | R::AbortMode
        | R::ScalableRootNotPresent
        | R::ScalableContextNotPresent
        | R::DeviceTlbNotEnabled
        | R::PasidNotEnabled
        | R::PageRequestNotEnabled
        | R::PasidBeyondDirectory
        | R::PasidIsRidPasid
        | R::PasidBeyondSize => Answer::Error(NoTranslation::Unsupported),
        R::AddressBeyondWidth
        | R::WriteNotPermitted
        | R::ReadNotPermitted
        | R::PasidDirectoryNotPresent
        | R::PasidEntryNotPresent
        | R::FirstStageAccess
        | R::FirstStageNotPresent
        | R::FirstStageReserved
        | R::FirstStageRootAccess
        | R::FirstStageBeyondWidth
        | R::FirstStageRootRead
        | R::FirstStageTableRead
        | R::FirstStageTableWrite
        | R::FirstStageFlagsNotSnooped
        | R::SecondStageNotPermitted
        | R::NotCanonical
        | R::SupervisorPage
        | R::BeyondHostWidth
        | R::BeyondSecondStageWidth
        | R::ScalableWriteNotPermitted
        | R::ScalableReadNotPermitted => Answer::Nothing { recorded: false },
        R::FirstStageFlagsNotSet => Answer::Nothing { recorded: true },
        R::ContextInvalid
        | R::PagingTableAccess
        | R::RootTableAccess
        | R::ContextTableAccess
        | R::RootReserved
        | R::ContextReserved
        | R::PagingReserved
        | R::OutputInInterruptRange
        | R::TableModeInvalid
        | R::ScalableRootAccess
        | R::ScalableRootReserved
        | R::ScalableContextAccess
        | R::ScalableContextReserved
        | R::ScalableContextInvalid
        | R::PasidDirectoryAccess
        | R::PasidDirectoryReserved
        | R::PasidEntryAccess
        | R::PasidEntryReserved
        | R::PasidEntryInvalid
        | R::SecondStageAccess
        | R::SecondStageReserved
        | R::SecondStageRootAccess
        | R::SecondStageFlagsNotSnooped
        | R::SecondStageFlagsNotSet
        | R::ScalableOutputInInterruptRange => Answer::Error(NoTranslation::Aborted),
    }
}

/// What the tables say about a page, with what both stages permit.
struct Leaf {
    page: Gpa,
    read: bool,
    write: bool,
    /// Of a leaf of 2 MiB at least.
    large: bool,
}

/// What the tables say about a requester, and what a fault of it says.
pub(super) struct Asked {
    pub(super) resolved: Resolved,
    pub(super) scalable: bool,
    source: Source,
}

impl Asked {
    /// The requester of this name, with the id of its requests.
    pub(super) fn seen(&self, name: Requester) -> Requester {
        self.source.seen(name)
    }
}

impl<M: GuestMemoryBackend + Clone + Send + Sync> Endpoint<M> {
    fn fault(&self, source: Source, of: (RequestType, Iova, Access), reason: FaultReason, disabled: bool) -> Fault {
        let (request, iova, access) = of;
        let pasid = self.pasid.filter(|_| request != RequestType::Translated);
        let (requester, silenced) = (source.seen(self.requester), disabled && reason.qualified());
        Fault { requester, pasid, iova, access, request, reason, silenced }
    }

    /// What the tables say about such a request; `None` where the unit takes none: without translation, or from a
    /// function without a source id.
    pub(super) fn ask(&self, of: (RequestType, Iova, Access)) -> Option<Result<Asked, Fault>> {
        let core = &self.unit.core;
        let source = core.sources.load().of(self.requester);
        let translation = **core.translation.load();
        if !core.config.device_tlb || !translation.enabled {
            return None;
        }
        // Translated requests never carry a PASID (EPTR is not offered).
        let pasid = self.pasid.filter(|_| of.0 != RequestType::Translated);
        let attached = match source {
            Source::Own(id) => resolve(&core.memory, &core.config, translation, id, pasid, of.0),
            // Of two entries, neither is said to be for it.
            Source::Shared(_) => Err(FaultReason::ContextInvalid.into()),
            Source::None => return None,
        };
        let asked = |Attached { resolved, .. }| Asked { resolved, scalable: translation.is_scalable(), source };
        let fault =
            |Unresolved { reason, fault_processing_disable }| self.fault(source, of, reason, fault_processing_disable);
        Some(attached.map(asked).map_err(fault))
    }

    /// The fault of a request that was looked up.
    pub(super) fn fault_of(&self, asked: &Asked, of: (RequestType, Iova, Access), blocked: Blocked) -> Fault {
        let disabled = asked.resolved.fault_processing_disable();
        self.fault(asked.source, of, blocked.reason(of.2, asked.scalable), disabled)
    }

    /// The leaf for `iova`. With `no_write`, nothing becomes dirty.
    fn leaf(&self, resolved: Resolved, iova: Iova, no_write: bool) -> Result<Leaf, Blocked> {
        let Core { memory, config, .. } = &self.unit.core;
        let wants = |writes: bool| match writes {
            // Whatever is permitted is told; what may be written becomes dirty, whether or not it may be read.
            true => Request { access: Access::ZeroLengthRead, writes },
            false => Request { access: Access::Read, writes },
        };
        let of_second = |Reached { page, read, write, dirty }: Reached, large: bool| Leaf {
            page,
            read,
            write: write && dirty && !no_write,
            large,
        };
        match resolved {
            Resolved::Off | Resolved::PassThrough { .. } if iova.0 >> config.host_address_width != 0 => {
                Err(Blocked::BeyondHostWidth)
            }
            Resolved::Off | Resolved::PassThrough { .. } => {
                Ok(Leaf { page: Gpa(iova.0 & !(PAGE - 1)), read: true, write: !no_write, large: true })
            }
            Resolved::Paged { space, flags, .. } => {
                let tables = SecondStage::of(&space, flags);
                let directory = Directory::find(memory, config, tables, iova, wants(!no_write))?;
                Ok(of_second(directory.reach(memory, config, iova, wants(!no_write))?, directory.large()))
            }
            Resolved::First { tables, .. } => {
                let directory = FirstDirectory::find(memory, config, tables, &Nothing, iova, !no_write)?;
                let FirstLeaf { page, may_write, dirty } = directory.leaf(memory, config, &Nothing, iova, !no_write)?;
                Ok(Leaf { page, read: true, write: may_write && dirty && !no_write, large: directory.large() })
            }
            Resolved::Nested { tables, second, .. } => {
                let reach = |address: Gpa, request: Request| {
                    let address = Iova(address.0);
                    Directory::find(memory, config, second, address, request)?.reach(memory, config, address, request)
                };
                let beneath = Second { tables: second, reach };
                let directory = FirstDirectory::find(memory, config, tables, &beneath, iova, !no_write)?;
                let leaf = directory.leaf(memory, config, &beneath, iova, !no_write)?;
                if leaf.page.0 >> second.width != 0 {
                    return Err(Blocked::FirstStageBeyondWidth);
                }
                let writes = !no_write && leaf.may_write && leaf.dirty;
                let found = of_second((beneath.reach)(leaf.page, wants(writes))?, false);
                Ok(Leaf { write: found.write && writes, ..found })
            }
        }
    }

    /// The translation for `iova`; a fault where there is none.
    fn translation(&self, asked: &Asked, iova: Iova, no_write: bool) -> Result<TranslationData, Blocked> {
        let without_pasid = self.pasid.is_none();
        if without_pasid && INTERRUPT_WINDOW.contains(iova.0) {
            // What goes there is an interrupt, and not to be translated. Section 7.1.3, special conditions.
            return Ok(TranslationData::new().with_write(!no_write).with_untranslated_only(!no_write));
        }
        let Leaf { page, read, write, large } = self.leaf(asked.resolved, iova, no_write)?;
        if !read && !write {
            return Ok(TranslationData::new());
        }
        let is_pass_through = matches!(asked.resolved, Resolved::PassThrough { .. });
        if INTERRUPT_WINDOW.contains(page.0) && !is_pass_through {
            return Err(Blocked::OutputInInterruptRange);
        }
        let touches = |address: u64| INTERRUPT_WINDOW.intersection(around(address)).is_some();
        let large = large && !touches(page.0) && !(without_pasid && touches(iova.0));
        let order = DIRECTORY_SPAN.trailing_zeros() - PAGE.trailing_zeros();
        let named = if large { sized_page(page.0, order) } else { page.0 >> 12 };
        Ok(TranslationData::new().with_read(read).with_write(write).with_large(large).with_page(named))
    }
}

/// The 2 MiB around an address.
fn around(address: u64) -> IovaRange {
    let first = address & !(DIRECTORY_SPAN - 1);
    IovaRange::new(first, first + (DIRECTORY_SPAN - 1))
}

impl<M: GuestMemoryBackend + Clone + Send + Sync> DmaSession<'_, M> {
    /// A translation request: what the function's device-TLB may cache for the page of `iova`, or for a naturally
    /// aligned range around it. One translation is given, whatever length is asked for (section 4.2.3.2). `no_write`
    /// (NW) asks for no permission to write.
    ///
    /// What it permits lasts until the function's [`AtsFunction::invalidate`](crate::AtsFunction::invalidate) is
    /// called: one that was asked for before that is not to be cached after it.
    ///
    /// # Errors
    /// There is no translation at all; a fault has been recorded, unless translation is off. Where one could be, but
    /// the tables permit nothing, that is no error.
    pub fn request_translation(&self, iova: Iova, no_write: bool) -> Result<TranslationData, NoTranslation> {
        let endpoint = self.endpoint();
        let of = (RequestType::Translation, iova, Access::Read);
        let asked = endpoint.ask(of).ok_or(NoTranslation::Unsupported)?;
        let found = asked.and_then(|asked| {
            let found = endpoint.translation(&asked, iova, no_write);
            found.map_err(|blocked| endpoint.fault_of(&asked, of, blocked))
        });
        found.or_else(|fault| match answer_to(fault.reason) {
            Answer::Error(error) => {
                self.record(&fault);
                Err(error)
            }
            Answer::Nothing { recorded } => {
                if recorded {
                    self.record(&fault);
                }
                Ok(TranslationData::new())
            }
        })
    }

    /// Reads `data.len()` bytes at `at`, an address from a device-TLB.
    ///
    /// # Errors
    /// The guest does not let the function use any; a fault has been recorded, unless translation is off.
    pub fn read_translated(&self, at: Gpa, data: &mut [u8]) -> Result<(), DmaError> {
        let memory = &self.endpoint().unit.core.memory;
        let len = data.len();
        self.translated(at, len, Access::Read, || memory.read_slice(data, GuestAddress(at.0)))
    }

    /// Writes `data` at `at`, an address from a device-TLB.
    ///
    /// # Errors
    /// See [`Self::read_translated`].
    pub fn write_translated(&self, at: Gpa, data: &[u8]) -> Result<(), DmaError> {
        let memory = &self.endpoint().unit.core.memory;
        self.translated(at, data.len(), Access::Write, || memory.write_slice(data, GuestAddress(at.0)))
    }

    /// A translated request: does `transfer`, if it may. Section 4.2.5.
    fn translated(
        &self,
        at: Gpa,
        len: usize,
        access: Access,
        transfer: impl FnOnce() -> Result<(), GuestMemoryError>,
    ) -> Result<(), DmaError> {
        let endpoint = self.endpoint();
        let iova = Iova(at.0);
        let no_memory = DmaError::NoMemory { iova, gpa: at };
        let last = at.0.checked_add(len.saturating_sub(1) as u64).ok_or(no_memory)?;
        let of = (RequestType::Translated, iova, access);
        let asked = endpoint.ask(of).ok_or(DmaError::Unsupported(at))?;
        let checked = asked.and_then(|asked| {
            let blocked = if INTERRUPT_WINDOW.intersection(IovaRange::new(at.0, last)).is_some() {
                Blocked::OutputInInterruptRange
            } else if last >> endpoint.unit.core.config.host_address_width != 0 {
                Blocked::BeyondHostWidth
            } else {
                return Ok(());
            };
            Err(endpoint.fault_of(&asked, of, blocked))
        });
        if let Err(fault) = checked {
            self.record(&fault);
            return Err(fault.into());
        }
        transfer().map_err(|_| no_memory)
    }
}
