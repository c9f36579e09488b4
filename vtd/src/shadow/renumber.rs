//! Source ids that change. The requests of a function behind a bridge carry the bridge's secondary bus number,
//! which the guest may write at any time; so what the unit knows a function by and what its requests carry are two
//! things.
//!
//! A function keeps the **name** that it was given to the unit with. Tables are looked up, faults recorded, and
//! interrupts checked with its **source id**. While two functions have the same id, as they may between two writes of a
//! guest that renumbers its buses, nobody can tell their requests apart: with translation on, neither reaches anything.
//! So does one that has no id.
//!
//! A conventional function has no id at all: the bridge that takes its requests to PCI Express makes them in its own
//! name (PCI Express to PCI bridge specification 1.0, section 2.3). Functions that have such an **alias** in common
//! have one id together, and their requests are no strangers to each other: the alias is who must not share its id.
//!
//! Order of a change, so that nothing of the old id is left when it returns:
//!
//! 1. the new ids are in force: a walk that begins now uses them, and a walk that began before is not cached (its epoch
//!    is over, 2.);
//! 2. cached translations are emptied, and open sessions waited for;
//! 3. assigned functions are looked up again and moved by the usual diff;
//! 4. the routes of interrupts are made again.

use std::collections::{BTreeMap, BTreeSet};

use vm_memory::GuestMemoryBackend;

use super::Spaces;
use super::members::{Member, resolve_requester};
use crate::core::Core;
use crate::ids::{Requester, SourceId};
use crate::scope::Scope;
use crate::source_ids::{Source, Sources};
use crate::tables::interrupt::EntriesChanged;

impl Spaces {
    /// The functions of these names have these ids now, or none. All of them at once.
    pub(crate) fn renumber<M: GuestMemoryBackend>(
        &mut self,
        core: &Core<M>,
        changes: &[(Requester, Option<SourceId>)],
    ) {
        for (name, id) in changes {
            if *id == Some(name.sid) {
                self.ids.remove(name);
            } else {
                self.ids.insert(*name, *id);
            }
        }
        self.sources_changed(core);
    }

    /// The requests of `name` carry whatever id those of `alias` do.
    pub(crate) fn set_alias<M: GuestMemoryBackend>(&mut self, core: &Core<M>, name: Requester, alias: Requester) {
        self.aliases.insert(name, alias);
        self.sources_changed(core);
    }

    /// A function of this name is gone. What it is an alias of stays.
    pub(super) fn forget_id(&mut self, name: Requester) {
        self.aliases.remove(&name);
        if !self.aliases.values().any(|alias| *alias == name) {
            self.ids.remove(&name);
        }
    }

    /// Who there is, or which ids they have, changed: whoever is concerned is looked up again.
    pub(crate) fn sources_changed<M: GuestMemoryBackend>(&mut self, core: &Core<M>) {
        let before = core.sources.load_full();
        let sources = self.sources();
        if sources == *before {
            return;
        }
        let names = before.0.keys().chain(sources.0.keys());
        let changed: BTreeSet<Requester> =
            names.filter(|name| before.of(**name) != sources.of(**name)).copied().collect();
        core.sources.store(sources.into());
        for (name, iotlb) in &self.endpoints {
            if changed.contains(name) {
                iotlb.invalidate(Scope::Everything);
                iotlb.wait_for_sessions();
            }
        }
        if !self.draining {
            self.round += 1;
        }
        let mut moves = BTreeMap::new();
        for name in changed {
            let Some(member) = self.members.get_mut(&name) else { continue };
            let (key, domain, pasid) = resolve_requester(core, name);
            *member =
                Member { domain, pasid, source: core.sources.load().of(name).id(), resolved_in: self.round, ..*member };
            if member.attached != key {
                moves.insert(name, key);
            }
        }
        self.move_members(core, moves);
        core.entries_changed(EntriesChanged::All);
    }

    /// Who has which id, from `ids` and from who there is.
    fn sources(&self) -> Sources {
        if self.ids.is_empty() && self.aliases.is_empty() {
            return Sources::default();
        }
        let there = self.members.keys().chain(self.endpoints.iter().map(|(name, _)| name));
        let there = there.chain(self.ids.keys()).chain(self.aliases.keys());
        let there: BTreeSet<Requester> = there.copied().collect();
        let alias_of = |name: &Requester| self.aliases.get(name).copied().unwrap_or(*name);
        let id_of = |name: &Requester| {
            let alias = alias_of(name);
            self.ids.get(&alias).copied().unwrap_or(Some(alias.sid))
        };
        let mut having: BTreeMap<(u16, SourceId), BTreeSet<Requester>> = BTreeMap::new();
        for name in &there {
            if let Some(id) = id_of(name) {
                having.entry((name.segment, id)).or_default().insert(alias_of(name));
            }
        }
        let source = |name: &Requester| match id_of(name) {
            None => Source::None,
            Some(id) if having.get(&(name.segment, id)).is_some_and(|having| having.len() > 1) => Source::Shared(id),
            Some(id) => Source::Own(id),
        };
        let differ = there.iter().map(|name| (*name, source(name)));
        Sources(differ.filter(|(name, source)| *source != Source::Own(name.sid)).collect())
    }
}
