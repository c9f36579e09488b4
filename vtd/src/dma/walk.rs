//! Walks for the requests of an endpoint: what they find is cached.

use vm_memory::GuestMemoryBackend;

use super::due::Due;
use super::endpoint::{DmaError, Endpoint, PAGE, Wanted};
use super::iotlb::Sampled;
use crate::core::Core;
use crate::faults::{Access, Fault, RequestType};
use crate::ids::{Gpa, Iova};
use crate::source_ids::Source;
use crate::space::Perm;
use crate::spec::INTERRUPT_WINDOW;
use crate::spec::fault::FaultReason;
use crate::spec::performance::Event;
use crate::tables::blocked::Blocked;
use crate::tables::cached::CachedDirectory;
use crate::tables::context::{Attached, Resolved, Unresolved};
use crate::tables::first_stage::{FirstDirectory, FirstStage, Nothing};
use crate::tables::flags::Request;
use crate::tables::nested::Second;
use crate::tables::resolve::resolve;
use crate::tables::second_stage::{DIRECTORY_SPAN, Directory, Reached, SecondStage, Translated};

/// Directories of the second stage of a nested translation are cached beside those of the first: no address has the
/// highest bit in the number of its 2 MiB. The other bit keeps an address and the one that it leads to, which are often
/// alike, out of one set.
const SECOND_OF_TWO: u64 = 1 << 63 | 1 << 7;

impl<M: GuestMemoryBackend + Clone + Send + Sync> Endpoint<M> {
    /// The slow way. The cache's epoch is sampled before the first table read.
    #[inline(never)]
    pub(super) fn walk(&self, iova: Iova, wanted: Wanted, due: &Due) -> Result<Gpa, DmaError> {
        // Requests without PASID to this range are interrupts, also with translation off, when a PASID is ignored.
        // Section 3.15.
        if INTERRUPT_WINDOW.contains(iova.0) && (self.pasid.is_none() || !self.unit.core.translation.load().enabled) {
            return Err(DmaError::InterruptRange(iova));
        }
        let sampled = self.iotlb.sample();
        if sampled.counting() {
            return self.walk_counting(sampled, iova, wanted, due);
        }
        self.walk_cached(sampled, iova, wanted).map_or_else(|| self.walk_tables(sampled, iova, wanted), Ok)
    }

    /// A walk from what is cached of the tables. `None` where that is not enough, and where the access is not
    /// permitted: what is told about that is as the tables are now.
    // There is a second walk, for requests that are counted: it must not keep this one out of line.
    #[inline(always)]
    pub(super) fn walk_cached(&self, sampled: Sampled, iova: Iova, wanted: Wanted) -> Option<Gpa> {
        let Core { memory, config, .. } = &self.unit.core;
        let request = wanted.request();
        let context = || {
            let cached = self.iotlb.context(sampled);
            self.note_context(sampled, cached.is_some());
            Some(Resolved::unpack(cached?, config))
        };
        let found = match self.iotlb.directory(sampled, iova.0 / DIRECTORY_SPAN).map(CachedDirectory::unpack) {
            Some(CachedDirectory::Second(directory)) => {
                self.note_hit(sampled, Event::SecondLookup, Event::SecondHit);
                directory.translate(memory, config, iova, request)
            }
            Some(CachedDirectory::First(directory)) if directory.nested() => {
                self.note_hit(sampled, Event::FirstLookup, Event::FirstHit);
                match context()? {
                    Resolved::Nested { second, .. } => self.leaf_of_two(sampled, directory, second, iova, request),
                    _ => return None,
                }
            }
            Some(CachedDirectory::First(directory)) => {
                self.note_hit(sampled, Event::FirstLookup, Event::FirstHit);
                directory.translate(memory, config, iova, request.writes)
            }
            None => self.walk_from(sampled, context()?, iova, request),
        };
        let found = found.ok().filter(|found| wanted.permitted(found.perm).is_ok())?;
        self.iotlb.insert_page(sampled, iova.0 / PAGE, found.page, found.perm);
        Some(found.page)
    }

    /// A walk from the root table.
    pub(super) fn walk_tables(&self, sampled: Sampled, iova: Iova, wanted: Wanted) -> Result<Gpa, DmaError> {
        let core = &self.unit.core;
        // Sampled before: an id that changes takes the epoch forward.
        let source = core.sources.load().of(self.requester);
        let translation = **core.translation.load();
        let attached = match source {
            Source::Own(id) => {
                resolve(&core.memory, &core.config, translation, id, self.pasid, RequestType::Untranslated)
            }
            Source::Shared(_) | Source::None if !translation.enabled => Ok(Resolved::Off.into()),
            // Of two entries, neither is said to be for it.
            Source::Shared(_) => Err(FaultReason::ContextInvalid.into()),
            Source::None => return Err(DmaError::NoSourceId(iova)),
        };
        let fault = |access: Access, reason: FaultReason, disabled: bool| {
            let silenced = disabled && reason.qualified();
            let (requester, pasid) = (source.seen(self.requester), self.pasid);
            DmaError::Fault(Fault {
                requester,
                pasid,
                iova,
                access,
                request: RequestType::Untranslated,
                reason,
                silenced,
            })
        };
        let attached = attached.map_err(|Unresolved { reason, fault_processing_disable }| {
            fault(wanted.first, reason, fault_processing_disable)
        })?;
        let Attached { resolved, pasid } = attached;
        self.iotlb.note_owner(resolved.domain(), pasid);
        self.iotlb.insert_context(sampled, resolved.pack());
        let disabled = resolved.fault_processing_disable();
        let blocked =
            |access, blocked: Blocked| fault(access, blocked.reason(access, translation.is_scalable()), disabled);
        let found = self.walk_from(sampled, resolved, iova, wanted.request());
        let found = found.map_err(|why| blocked(wanted.first, why))?;
        wanted.permitted(found.perm).map_err(|(access, why)| blocked(access, why))?;
        self.iotlb.insert_page(sampled, iova.0 / PAGE, found.page, found.perm);
        Ok(found.page)
    }

    /// A walk from what the tables say about the requester, whose domain has been noted.
    fn walk_from(
        &self,
        sampled: Sampled,
        resolved: Resolved,
        iova: Iova,
        request: Request,
    ) -> Result<Translated, Blocked> {
        let Core { memory, config, .. } = &self.unit.core;
        let untranslated = Translated { page: Gpa(iova.0 & !(PAGE - 1)), perm: Perm::ReadWrite };
        self.note_no_directory(sampled, &resolved);
        match resolved {
            Resolved::Off => Ok(untranslated),
            // Pass-through is for addresses of the unit's width, too. Section 3.9.
            Resolved::PassThrough { .. } if iova.0 >> config.host_address_width != 0 => Err(Blocked::BeyondHostWidth),
            // Of requests with a PASID.
            Resolved::PassThrough { .. } if INTERRUPT_WINDOW.contains(iova.0) => Err(Blocked::OutputInInterruptRange),
            Resolved::PassThrough { .. } => Ok(untranslated),
            Resolved::Paged { space, flags, .. } => {
                let directory = Directory::find(memory, config, SecondStage::of(&space, flags), iova, request)?;
                self.keep(sampled, iova.0 / DIRECTORY_SPAN, CachedDirectory::Second(directory), directory.large());
                directory.translate(memory, config, iova, request)
            }
            Resolved::First { tables, .. } => {
                let directory = FirstDirectory::find(memory, config, tables, &Nothing, iova, request.writes)?;
                self.keep_first(sampled, iova, directory);
                directory.translate(memory, config, iova, request.writes)
            }
            Resolved::Nested { tables, second, .. } => self.walk_two(sampled, tables, second, iova, request),
        }
    }

    /// A walk of a first stage whose addresses are those of a second one.
    fn walk_two(
        &self,
        sampled: Sampled,
        tables: FirstStage,
        second: SecondStage,
        iova: Iova,
        request: Request,
    ) -> Result<Translated, Blocked> {
        let Core { memory, config, .. } = &self.unit.core;
        let beneath = self.second_of_two(sampled, second);
        let directory = FirstDirectory::find(memory, config, tables, &beneath, iova, request.writes)?;
        self.keep_first(sampled, iova, directory);
        self.leaf_of_two(sampled, directory, second, iova, request)
    }

    /// Goes on from a directory of the first of two stages.
    fn leaf_of_two(
        &self,
        sampled: Sampled,
        directory: FirstDirectory,
        second: SecondStage,
        iova: Iova,
        request: Request,
    ) -> Result<Translated, Blocked> {
        let Core { memory, config, .. } = &self.unit.core;
        let beneath = self.second_of_two(sampled, second);
        let leaf = directory.leaf(memory, config, &beneath, iova, request.writes)?;
        beneath.translate(leaf, request)
    }

    /// The second of two stages, whose directories are cached, too. All of it goes with any invalidation of the domain
    /// but one of a PASID, which is none of the second stage (section 6.5.2.4).
    fn second_of_two(
        &self,
        sampled: Sampled,
        tables: SecondStage,
    ) -> Second<impl Fn(Gpa, Request) -> Result<Reached, Blocked> + '_> {
        let Core { memory, config, .. } = &self.unit.core;
        let reach = move |address: Gpa, request: Request| {
            let (number, iova) = ((address.0 / DIRECTORY_SPAN) ^ SECOND_OF_TWO, Iova(address.0));
            let cached = match self.iotlb.directory(sampled, number).map(CachedDirectory::unpack) {
                Some(CachedDirectory::Second(directory)) if !directory.is_too_clean_for(request) => Some(directory),
                _ => None,
            };
            self.note(sampled, Event::SecondLookup);
            let directory = match cached {
                Some(directory) => {
                    self.note(sampled, Event::SecondHit);
                    directory
                }
                None => {
                    let found = Directory::find(memory, config, tables, iova, request)?;
                    self.iotlb.note_first();
                    self.iotlb.insert_directory(sampled, number, CachedDirectory::Second(found).pack());
                    found
                }
            };
            directory.reach(memory, config, iova, request)
        };
        Second { tables, reach }
    }

    fn keep_first(&self, sampled: Sampled, iova: Iova, directory: FirstDirectory) {
        self.iotlb.note_first();
        self.keep(sampled, iova.0 / DIRECTORY_SPAN, CachedDirectory::First(directory), directory.large());
    }

    /// Caches a directory, whose domain has been noted.
    fn keep(&self, sampled: Sampled, number: u64, directory: CachedDirectory, large: bool) {
        if large {
            self.iotlb.note_large();
        }
        self.iotlb.insert_directory(sampled, number, directory.pack());
    }
}
