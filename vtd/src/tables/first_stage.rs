//! Walks of first-stage tables, for requests of emulated functions: all of them are user requests. Section 3.6.
//!
//! Nothing of these tables is in a shadow: see [`Stages`](crate::Stages).

use vm_memory::GuestMemoryBackend;

use super::blocked::Blocked;
use super::second_stage::Translated;
use crate::config::UnitConfig;
use crate::ids::{Gpa, Iova};
use crate::memory::Words;
use crate::space::Perm;
use crate::spec::INTERRUPT_WINDOW;
use crate::spec::first_stage::FirstStageEntry;
use crate::spec::second_stage::{PAGE_SIZE, TABLE_ENTRIES, entry_span};

/// Times that an entry is read again because a processor changed it while a flag was to be set.
const ATTEMPTS: usize = 64;

/// The tables of a first stage.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct FirstStage {
    /// Guest-physical address of the root.
    pub(crate) root: Gpa,
    /// 4 or 5.
    pub(crate) levels: u8,
    /// PWSNP: walks snoop. Without, no flag can be set.
    pub(crate) snoops: bool,
}

/// Where `iova` leads. Sets the accessed flag of each entry on the way, and the dirty flag of the leaf if the request
/// writes and may. What is given back permits no write while the leaf is not dirty, so that the write that makes it so
/// comes here.
pub(crate) fn translate<M: GuestMemoryBackend>(
    memory: &M,
    config: &UnitConfig,
    tables: FirstStage,
    iova: Iova,
    writes: bool,
) -> Result<Translated, Blocked> {
    // Bits 63:47, or 63:56, are equal.
    let unused = 64 - (12 + 9 * u32::from(tables.levels));
    if ((iova.0 << unused) as i64 >> unused) as u64 != iova.0 {
        return Err(Blocked::NotCanonical);
    }
    let mut walk = Walk { memory, config, snoops: tables.snoops, writes, may_write: true };
    let mut table = tables.root;
    for level in (1..=tables.levels).rev() {
        let index = iova.0 / entry_span(level) % TABLE_ENTRIES;
        let entry = Gpa(table.0 + index * 8);
        let (step, may_write) = walk.step(entry, level).map_err(|blocked| match blocked {
            Blocked::FirstStageAccess if level == tables.levels => Blocked::FirstStageRootAccess,
            other => other,
        })?;
        walk.may_write = may_write;
        match step {
            Step::Table(next) => table = next,
            Step::Leaf { address, dirty } => {
                let page = Gpa(address.0 + (iova.0 & (entry_span(level) - 1) & !(PAGE_SIZE - 1)));
                if writes && !may_write {
                    return Err(Blocked::WriteNotPermitted);
                }
                if INTERRUPT_WINDOW.contains(page.0) {
                    return Err(Blocked::OutputInInterruptRange);
                }
                let perm = if may_write && dirty { Perm::ReadWrite } else { Perm::Read };
                return Ok(Translated { page, perm });
            }
        }
    }
    // Level 1 has leaves only.
    Err(Blocked::FirstStageReserved)
}

enum Step {
    Table(Gpa),
    Leaf { address: Gpa, dirty: bool },
}

struct Walk<'a, M> {
    memory: &'a M,
    config: &'a UnitConfig,
    snoops: bool,
    writes: bool,
    /// Every entry so far permits it.
    may_write: bool,
}

impl<M: GuestMemoryBackend> Walk<'_, M> {
    /// Uses the entry at `at`: where it leads, and whether writes are still permitted.
    fn step(&self, at: Gpa, level: u8) -> Result<(Step, bool), Blocked> {
        let words = Words::at(self.memory, at, 1).ok_or(Blocked::FirstStageAccess)?;
        // The entry that was checked is the one whose flags are set: another one is looked at anew.
        for _ in 0..ATTEMPTS {
            let word = words.get(0).ok_or(Blocked::FirstStageAccess)?;
            let entry = FirstStageEntry::from_bits(word);
            let is_leaf = self.check(entry, level)?;
            let may_write = self.may_write && entry.write();
            let dirties = is_leaf && self.writes && may_write;
            let used = entry.with_accessed(true).with_dirty(entry.dirty() || dirties);
            if used != entry {
                if !self.snoops {
                    return Err(Blocked::FlagsNotSnooped);
                }
                match words.exchange(0, word, used.into_bits()) {
                    None => return Err(Blocked::FirstStageAccess),
                    Some(false) => continue,
                    Some(true) => {}
                }
            }
            let address = entry.page() << 12;
            let step = if is_leaf {
                // Bit 12 of a large leaf is PAT.
                Step::Leaf { address: Gpa(address & !(entry_span(level) - 1)), dirty: used.dirty() }
            } else {
                Step::Table(Gpa(address))
            };
            return Ok((step, may_write));
        }
        Err(Blocked::FlagsNotSet)
    }

    /// Whether the entry is a leaf.
    fn check(&self, entry: FirstStageEntry, level: u8) -> Result<bool, Blocked> {
        if !entry.present() {
            return Err(Blocked::FirstStageNotPresent);
        }
        let address = entry.page() << 12;
        let large = entry.page_size() && level > 1;
        // Between PAT and the address, in a large leaf.
        let misplaced = large && (level > 3 || address & (entry_span(level) - 1) & !PAGE_SIZE != 0);
        if address >> self.config.host_address_width != 0 || misplaced {
            return Err(Blocked::FirstStageReserved);
        }
        if !entry.user() {
            return Err(Blocked::SupervisorPage);
        }
        Ok(large || level == 1)
    }
}
