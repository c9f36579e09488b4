//! Accessed and dirty flags, which walks for requests of emulated functions set. Sections 3.6.2 and 3.7.2.

use crate::faults::Access;

/// Times that an entry is read again because a processor changed it while a flag was to be set.
pub(super) const ATTEMPTS: usize = 64;

/// What walks do about the accessed and dirty flags of a stage.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Flags {
    /// These bits are none: SSADE is clear.
    Ignored,
    /// They set them.
    Set,
    /// They do not snoop (PWSNP is clear), so they cannot set any.
    NotSnooped,
}

impl Flags {
    pub(super) const fn into_bits(self) -> u8 {
        match self {
            Self::Ignored => 0,
            Self::Set => 1,
            Self::NotSnooped => 2,
        }
    }

    pub(super) const fn from_bits(bits: u8) -> Self {
        match bits {
            0 => Self::Ignored,
            1 => Self::Set,
            _ => Self::NotSnooped,
        }
    }
}

/// What a walk is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Request {
    /// What has to be permitted.
    pub(crate) access: Access,
    /// Writes are wanted, instead or too.
    pub(crate) writes: bool,
}

impl Request {
    /// Whether a page of the second stage with this permission is dirty from now on. Where nothing but writing is
    /// permitted there is no permission without a dirty flag, for a read of no bytes either.
    pub(super) fn dirties(self, read: bool, write: bool) -> bool {
        let wants = match self.access {
            Access::Read => self.writes && read,
            Access::Write => true,
            Access::ZeroLengthRead => self.writes || !read,
        };
        write && wants
    }
}
