//! Nested translation: a first stage whose addresses, of its tables and of its pages, are those of a second stage, for
//! requests of emulated functions. Section 3.8.

use super::blocked::Blocked;
use super::first_stage::{Beneath, FirstLeaf, Table};
use super::flags::{Flags, Request};
use super::second_stage::{Reached, SecondStage, Translated};
use crate::faults::Access;
use crate::ids::Gpa;
use crate::space::Perm;

/// A second stage beneath a first one.
pub(crate) struct Second<F> {
    pub(crate) tables: SecondStage,
    /// Walks it.
    pub(crate) reach: F,
}

impl<F: Fn(Gpa, Request) -> Result<Reached, Blocked>> Beneath for Second<F> {
    const SECOND: bool = true;

    fn table(&self, address: Gpa) -> Result<Table, Blocked> {
        if self.is_beyond(address) {
            return Err(Blocked::FirstStageBeyondWidth);
        }
        // With flags of the second stage, to read a table of the first needs the permission to write, too; the page
        // that it is in counts as written.
        let flagged = self.tables.flags != Flags::Ignored;
        let access = if flagged { Access::Write } else { Access::Read };
        let Reached { page, read, write, .. } = (self.reach)(address, Request { access, writes: flagged })?;
        match (read, write) {
            (false, false) => Err(Blocked::NothingPermitted),
            (false, true) => Err(Blocked::FirstStageTableRead),
            (true, false) if flagged => Err(Blocked::FirstStageTableWrite),
            (true, writable) => Ok(Table { at: page, writable }),
        }
    }

    fn is_beyond(&self, address: Gpa) -> bool {
        address.0 >> self.tables.width != 0
    }
}

impl<F: Fn(Gpa, Request) -> Result<Reached, Blocked>> Second<F> {
    /// Where a page of the first stage is, for this request. What both stages permit is permitted.
    pub(crate) fn translate(&self, leaf: FirstLeaf, request: Request) -> Result<Translated, Blocked> {
        if request.writes && !leaf.may_write {
            return Err(Blocked::WriteNotPermitted);
        }
        if self.is_beyond(leaf.page) {
            return Err(Blocked::FirstStageBeyondWidth);
        }
        let Translated { page, perm } = (self.reach)(leaf.page, request)?.translated(request.access)?;
        let writable = perm.writable() && leaf.may_write && leaf.dirty;
        let perm = Perm::from_bits(perm.readable(), writable).ok_or(Blocked::ReadNotPermitted)?;
        Ok(Translated { page, perm })
    }
}
