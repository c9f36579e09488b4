//! What performance monitoring counts of emulated DMA. Chapter 10.
//!
//! Counting costs a hit nothing while it is off: while it is on, no look-up of a page finds anything
//! ([`Iotlb::set_counting`](super::iotlb::Iotlb::set_counting)), so each request comes to a walk, and the walk looks
//! into the cache again and counts. What happens to a request is noted in the endpoint, and the counters take it in
//! when the request is done; where several threads use one endpoint, one may take in what another noted.

use vm_memory::GuestMemoryBackend;

use super::due::Due;
use super::endpoint::{DmaError, Endpoint, PAGE, Wanted};
use super::iotlb::Sampled;
use super::walk::NO_DIRECTORY;
use crate::ids::{Gpa, Iova};
use crate::registers::performance::Occurred;
use crate::spec::performance::Event;
use crate::tables::context::Resolved;
use crate::tables::second_stage::DIRECTORY_SPAN;

impl<M: GuestMemoryBackend + Clone + Send + Sync> Endpoint<M> {
    /// Notes `event`, if what began with `sampled` is counted.
    #[inline]
    pub(super) fn note(&self, sampled: Sampled, event: Event) {
        if sampled.counting() {
            self.noted.add(event);
        }
    }

    /// Notes a look-up, which was a hit.
    #[inline]
    pub(super) fn note_hit(&self, sampled: Sampled, look_up: Event, hit: Event) {
        self.note(sampled, look_up);
        self.note(sampled, hit);
    }

    /// Notes that a directory was looked for in vain, of the stage that requests are first translated by.
    #[inline]
    pub(super) fn note_no_directory(&self, sampled: Sampled, resolved: &Resolved) {
        if sampled.counting() {
            match resolved {
                Resolved::Off | Resolved::PassThrough { .. } => {}
                Resolved::Paged { .. } => self.noted.add(Event::SecondLookup),
                Resolved::First { .. } | Resolved::Nested { .. } => self.noted.add(Event::FirstLookup),
            }
        }
    }

    /// Notes a look-up of the context entry, with which that of the PASID table is cached in scalable mode.
    #[inline]
    pub(super) fn note_context(&self, sampled: Sampled, is_cached: bool) {
        if sampled.counting() {
            let scalable = self.unit.core.translation.load().is_scalable();
            let events = [
                (Event::ContextLookup, true),
                (Event::ContextHit, is_cached),
                (Event::PasidLookup, scalable),
                (Event::PasidHit, scalable && is_cached),
            ];
            events.into_iter().filter(|(_, happened)| *happened).for_each(|(event, _)| self.noted.add(event));
        }
    }

    /// A request while counters count.
    #[cold]
    pub(super) fn walk_counting(
        &self,
        sampled: Sampled,
        iova: Iova,
        wanted: Wanted,
        due: &Due,
    ) -> Result<Gpa, DmaError> {
        let context = self.iotlb.context(sampled);
        let domain = context.and_then(|words| Resolved::unpack(words, &self.unit.core.config).domain());
        self.noted.add(Event::Request);
        self.noted.add(Event::IotlbLookup);
        let cached = self.iotlb.page_counting(sampled, iova.0 / PAGE).filter(|page| page.permits(wanted.bits()));
        let result = match cached {
            Some(page) => {
                self.noted.add(Event::IotlbHit);
                Ok(page.target())
            }
            None => {
                // Where anything is cached, a walk from the root comes after what was looked up for another one.
                let directory = self.iotlb.directory(sampled, iova.0 / DIRECTORY_SPAN);
                let again = context.is_some() || directory.is_some();
                let from_root = if again { sampled.not_counting() } else { sampled };
                let cached = self.miss_by(sampled, directory.unwrap_or(NO_DIRECTORY), iova, wanted);
                cached.map_or_else(|| self.walk_tables(from_root, iova, wanted), Ok)
            }
        };
        let source = self.unit.core.sources.load().of(self.requester).own();
        let occurred = Occurred { times: self.noted.take(), source, pasid: self.pasid, domain };
        due.of_counters(self.unit.core.registers().count(&occurred));
        result
    }
}
