//! What an audit says.

use std::fmt;

use super::compare::{Piece, Target};
use crate::ids::Requester;
use crate::listener::Mapping;
use crate::space::{PagedSpace, SpaceKey};

/// Differences that are listed; the rest is counted.
const LISTED: usize = 64;

/// Two books that do not say the same.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Difference {
    /// About where IOVAs of a space lead. The guest's tables are the left side of the piece, the shadow its right.
    Shadow(PagedSpace, Piece),
    /// About what a function is attached to.
    Attachment {
        /// The function.
        requester: Requester,
        /// What the guest's tables say.
        tables: SpaceKey,
        /// What it is attached to.
        attached: SpaceKey,
    },
    /// About what a function reaches in the host. What it was granted is the left side of the piece, what the host was
    /// handed its right.
    Host(Requester, Piece),
    /// Anything else, in words.
    Other(String),
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let says = |target: &Option<Target>| match target {
            Some(Target { gpa, perm }) => format!("{gpa} {perm}"),
            None => "nothing".to_owned(),
        };
        match self {
            Self::Shadow(space, Piece { range, left, right }) => {
                write!(f, "{space}: {range}: the guest's tables say {}, the shadow says {}", says(left), says(right))
            }
            Self::Attachment { requester, tables, attached } => {
                write!(f, "{requester}: the guest's tables say {tables}, it is attached to {attached}")
            }
            Self::Host(requester, Piece { range, left, right }) => {
                write!(f, "{requester}: {range}: granted is {}, the host holds {}", says(left), says(right))
            }
            Self::Other(text) => f.write_str(text),
        }
    }
}

/// What an audit found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Audit {
    /// Comparisons made: runs of IOVAs, and attachments.
    pub checked: u64,
    /// What the guest's tables say and no completed invalidation has covered yet: runs of IOVAs, and attachments.
    pub pending: u64,
    /// What differs: the first of them.
    pub differences: Vec<Difference>,
    /// Differences that are not listed.
    pub more: u64,
}

impl Audit {
    /// Adds a difference.
    pub fn differ(&mut self, difference: Difference) {
        if self.differences.len() < LISTED {
            self.differences.push(difference);
        } else {
            self.more += 1;
        }
    }

    /// Number of differences.
    pub fn differing(&self) -> u64 {
        self.differences.len() as u64 + self.more
    }
}

/// Compares one function's book of the host with what the function was granted: the space that it is attached to, and
/// what is mapped there, ascending; empty unless the space is a paged one.
pub type AuditHost<'a> = dyn FnMut(Requester, &SpaceKey, &mut dyn Iterator<Item = Mapping>, &mut Audit) + 'a;
