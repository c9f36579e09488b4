//! Walks for the requests of an endpoint: what they find is cached.

use vm_memory::GuestMemoryBackend;

use super::due::Due;
use super::endpoint::{DmaError, Endpoint, PAGE, Wanted};
use super::iotlb::{CachedPage, Sampled};
use crate::core::Core;
use crate::faults::{Access, Fault, RequestType};
use crate::ids::{Gpa, Iova};
use crate::source_ids::Source;
use crate::space::Perm;
use crate::spec::INTERRUPT_WINDOW;
use crate::spec::fault::FaultReason;
use crate::spec::performance::Event;
use crate::tables::blocked::Blocked;
use crate::tables::cached::{CachedDirectory, PlainDirectory};
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

/// The number of the directory of an address of the second of two stages.
const fn second_of_two(address: Gpa) -> u64 {
    (address.0 / DIRECTORY_SPAN) ^ SECOND_OF_TWO
}

/// No directory is cached. No directory is this word: those of stages without flags are dirty.
pub(super) const NO_DIRECTORY: u64 = 0;

impl<M: GuestMemoryBackend + Clone + Send + Sync> Endpoint<M> {
    /// The page of `iova` where it is not cached, but what leads to it is. Nearly every miss goes this way, so it is as
    /// short as can be: what is rare is left to [`walk`](Self::walk), which is told by `None`.
    #[inline(never)]
    pub(super) fn miss(&self, iova: Iova, wanted: Wanted) -> Option<Gpa> {
        if INTERRUPT_WINDOW.contains(iova.0) {
            return None;
        }
        let sampled = self.iotlb.sample_not_counting()?;
        let directory = self.iotlb.directory(sampled, iova.0 / DIRECTORY_SPAN).unwrap_or(NO_DIRECTORY);
        match PlainDirectory::unpack(directory) {
            Some(plain) => self.miss_plain(sampled, plain, iova, wanted),
            None => self.miss_first(sampled, directory, iova, wanted),
        }
    }

    /// The slow way to where `iova` leads. The cache's epoch is sampled before the first table read.
    #[cold]
    pub(super) fn walk(&self, iova: Iova, wanted: Wanted, due: &Due) -> Result<Gpa, DmaError> {
        // Requests without PASID to this range are interrupts, also with translation off, when a PASID is ignored.
        // Section 3.15.
        if INTERRUPT_WINDOW.contains(iova.0) && (self.pasid.is_none() || !self.unit.core.translation.load().enabled) {
            return Err(DmaError::InterruptRange(iova));
        }
        let sampled = self.iotlb.sample();
        let page = if sampled.counting() {
            self.walk_counting(sampled, iova, wanted, due)
        } else {
            self.walk_tables(sampled, iova, wanted)
        };
        page.map(|page| Gpa(page.0 + iova.0 % PAGE))
    }

    /// The same from a plain directory.
    #[inline(never)]
    fn miss_plain(&self, sampled: Sampled, plain: PlainDirectory, iova: Iova, wanted: Wanted) -> Option<Gpa> {
        let found = plain.translate(&self.unit.core.memory, self.reserved, iova);
        match found.and_then(|(page, bits)| CachedPage::from_bits(page, bits)) {
            Some(page) if page.permits(wanted.bits()) => self.keep_page(sampled, iova, page),
            _ => self.miss_by(sampled, plain.into_word(), iova, wanted),
        }
    }

    /// Caches what a walk found for `iova`, and says where that is.
    #[inline(always)]
    fn keep_page(&self, sampled: Sampled, iova: Iova, page: CachedPage) -> Option<Gpa> {
        self.iotlb.insert_page(sampled, iova.0 / PAGE, page);
        Some(page.target())
    }

    /// The same as [`miss`](Self::miss) where `directory` is that of a first stage, there is no other one, and no
    /// flag is to be set.
    #[inline(never)]
    fn miss_first(&self, sampled: Sampled, directory: u64, iova: Iova, wanted: Wanted) -> Option<Gpa> {
        let Core { memory, config, .. } = &self.unit.core;
        match CachedDirectory::unpack(directory) {
            CachedDirectory::First(first) if first.nested() => self.miss_nested(sampled, directory, iova, wanted),
            CachedDirectory::First(first) => {
                let leaf = first.leaf_as_it_is(memory, config, &Nothing, iova, wanted.writes());
                let found = leaf.and_then(|leaf| leaf.translated(wanted.writes()).ok());
                match found.map(|Translated { page, perm }| CachedPage::new(page, perm)) {
                    Some(page) if page.permits(wanted.bits()) => self.keep_page(sampled, iova, page),
                    _ => self.miss_by(sampled, directory, iova, wanted),
                }
            }
            CachedDirectory::Second(_) => self.miss_by(sampled, directory, iova, wanted),
        }
    }

    /// The same where there is a second stage, whose directory is cached, too.
    #[inline(never)]
    fn miss_nested(&self, sampled: Sampled, directory: u64, iova: Iova, wanted: Wanted) -> Option<Gpa> {
        match self.leaf_of_nested(sampled, directory, iova, wanted) {
            Some(page) if page.permits(wanted.bits()) => self.keep_page(sampled, iova, page),
            _ => self.miss_by(sampled, directory, iova, wanted),
        }
    }

    #[inline(always)]
    fn leaf_of_nested(&self, sampled: Sampled, directory: u64, iova: Iova, wanted: Wanted) -> Option<CachedPage> {
        let Core { memory, config, .. } = &self.unit.core;
        let CachedDirectory::First(first) = CachedDirectory::unpack(directory) else { return None };
        let beneath = self.second_of_two(sampled, Resolved::unpack_second(self.iotlb.context(sampled)?)?);
        let leaf = first.leaf_as_it_is(memory, config, &beneath, iova, wanted.writes())?;
        let second = self.iotlb.directory(sampled, second_of_two(leaf.page))?;
        let (page, bits) = PlainDirectory::unpack(second)?.translate(memory, self.reserved, Iova(leaf.page.0))?;
        let of_first = if leaf.may_write && leaf.dirty { Perm::ReadWrite } else { Perm::Read };
        CachedPage::from_bits(page, bits & of_first as u64)
    }

    /// The same from any `directory`, or without one, whether requests are counted or not. `None` where what is cached
    /// is not enough, and where the access is not permitted: what is told about that is as the tables are now.
    #[cold]
    #[inline(never)]
    pub(super) fn miss_by(&self, sampled: Sampled, directory: u64, iova: Iova, wanted: Wanted) -> Option<Gpa> {
        let Core { memory, config, .. } = &self.unit.core;
        let request = wanted.request();
        let found = match CachedDirectory::unpack(directory) {
            _ if directory == NO_DIRECTORY => self.walk_from(sampled, self.cached_context(sampled)?, iova, request),
            CachedDirectory::Second(directory) => {
                self.note_hit(sampled, Event::SecondLookup, Event::SecondHit);
                directory.translate(memory, config, iova, request)
            }
            CachedDirectory::First(directory) => {
                self.note_hit(sampled, Event::FirstLookup, Event::FirstHit);
                if directory.nested() {
                    self.leaf_of_cached(sampled, directory, iova, request)
                } else {
                    directory.translate(memory, config, iova, request.writes)
                }
            }
        };
        let Translated { page, perm } = found.ok()?;
        let page = CachedPage::new(page, perm);
        if !page.permits(wanted.bits()) {
            return None;
        }
        self.keep_page(sampled, iova, page)
    }

    /// What is cached of the context entry.
    #[inline]
    fn cached_context(&self, sampled: Sampled) -> Option<Resolved> {
        let cached = self.iotlb.context(sampled);
        self.note_context(sampled, cached.is_some());
        Some(Resolved::unpack(cached?, &self.unit.core.config))
    }

    /// Goes on from a directory of the first of two stages that is cached.
    #[inline(always)]
    fn leaf_of_cached(
        &self,
        sampled: Sampled,
        directory: FirstDirectory,
        iova: Iova,
        request: Request,
    ) -> Result<Translated, Blocked> {
        match self.cached_context(sampled) {
            Some(Resolved::Nested { second, .. }) => self.leaf_of_two(sampled, directory, second, iova, request),
            _ => Err(Blocked::NothingPermitted),
        }
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
            fault(wanted.first(), reason, fault_processing_disable)
        })?;
        let Attached { resolved, pasid } = attached;
        self.iotlb.note_owner(resolved.domain(), pasid);
        self.iotlb.insert_context(sampled, resolved.pack());
        let disabled = resolved.fault_processing_disable();
        let blocked =
            |access, blocked: Blocked| fault(access, blocked.reason(access, translation.is_scalable()), disabled);
        let found = self.walk_from(sampled, resolved, iova, wanted.request());
        let found = found.map_err(|why| blocked(wanted.first(), why))?;
        wanted.permitted(found.perm).map_err(|(access, why)| blocked(access, why))?;
        self.iotlb.insert_page(sampled, iova.0 / PAGE, CachedPage::new(found.page, found.perm));
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
            let (number, iova) = (second_of_two(address), Iova(address.0));
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
