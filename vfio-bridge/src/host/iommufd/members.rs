//! The functions of one group, which go from page table to page table together. The kernel switches a whole group when
//! one of its functions is given another page table, and asks all the same to be told of each.

use std::io;

use super::sys::Hwpt;

/// One of them.
pub trait Member {
    /// It reaches what `to` has, and nothing else from now on, in one step.
    fn attach(&self, to: Hwpt) -> io::Result<()>;

    /// It reaches nothing.
    fn detach(&self) -> io::Result<()>;
}

/// Why a group was not attached.
#[derive(Debug)]
pub enum Failed {
    /// It is where it was, or reaches nothing.
    Undone(io::Error),
    /// Nothing is known of where it is.
    Astray(String),
}

/// Where a group is: the page table of each of its functions.
#[derive(Debug)]
pub struct Members<M> {
    members: Vec<(M, Option<Hwpt>)>,
}

impl<M> Default for Members<M> {
    fn default() -> Self {
        Self { members: Vec::new() }
    }
}

impl<M: Member> Members<M> {
    /// Each function.
    pub fn iter(&self) -> impl Iterator<Item = &M> {
        self.members.iter().map(|(member, _)| member)
    }

    /// `member`, which is attached to nothing, goes where the others are.
    pub fn add(&mut self, member: M) -> io::Result<()> {
        let at = self.members.first().and_then(|(_, at)| *at);
        if let Some(at) = at {
            member.attach(at)?;
        }
        self.members.push((member, at));
        Ok(())
    }

    /// Attaches all to the page tables that `choose` has for them (which attaches, too, to find out whether one fits).
    /// If one fails, those before it are put back where they were, or all are detached.
    pub fn attach(&mut self, mut choose: impl FnMut(&M) -> io::Result<Hwpt>) -> Result<(), Failed> {
        let before: Vec<Option<Hwpt>> = self.members.iter().map(|(_, at)| *at).collect();
        for i in 0..self.members.len() {
            let (member, at) = &mut self.members[i];
            match choose(member) {
                Ok(hwpt) => *at = Some(hwpt),
                Err(why) => return Err(self.put_back(&before, i, why)),
            }
        }
        Ok(())
    }

    /// The first `switched` were attached, the next could not be.
    fn put_back(&mut self, before: &[Option<Hwpt>], switched: usize, why: io::Error) -> Failed {
        let back = (0..switched).rev().try_for_each(|i| {
            let (member, at) = &mut self.members[i];
            match before[i] {
                Some(hwpt) => member.attach(hwpt)?,
                None => member.detach()?,
            }
            *at = before[i];
            Ok::<(), io::Error>(())
        });
        match back.or_else(|_| self.detach()) {
            Ok(()) => Failed::Undone(why),
            Err(e) => Failed::Astray(format!("attaching it failed ({why}), and so did undoing that ({e})")),
        }
    }

    /// All reach nothing. The first error is returned when each was tried.
    pub fn detach(&mut self) -> io::Result<()> {
        let mut result = Ok(());
        for (member, at) in &mut self.members {
            match member.detach() {
                Ok(()) => *at = None,
                Err(e) => result = result.and(Err(e)),
            }
        }
        result
    }
}

#[cfg(test)]
#[path = "members_test.rs"]
mod members_test;
