//! What is cached of walks, as words.

use bitfield_struct::bitfield;
use vm_memory::GuestMemoryBackend;

use super::context::Resolved;
use super::first_stage::{FirstDirectory, FirstStage};
use super::flags::Flags;
use super::second_stage::{Directory, Reserved, SecondStage};
use crate::config::UnitConfig;
use crate::ids::{DomainId, Gpa, Iova};
use crate::memory::Words;
use crate::space::{PagedSpace, Perm, Tables};
use crate::spec::INTERRUPT_WINDOW;
use crate::spec::second_stage::{PAGE_SIZE, SecondStageEntry, TABLE_ENTRIES};

/// What the entries above level 1 lead to, of either stage.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum CachedDirectory {
    Second(Directory),
    First(FirstDirectory),
}

#[bitfield(u64)]
struct Packed {
    /// Of a second stage: every entry permits to read. Of a first one: the table of level 1 may be written.
    read: bool,
    /// Every entry permits to write.
    write: bool,
    /// Of a first stage.
    first: bool,
    large: bool,
    dirty: bool,
    #[bits(2)]
    flags: u8,
    nested: bool,
    #[bits(4)]
    __: u8,
    #[bits(40)]
    page: u64,
    #[bits(12)]
    __: u16,
}

impl CachedDirectory {
    /// As one word.
    pub(crate) fn pack(self) -> u64 {
        let packed = Packed::new();
        match self {
            Self::Second(Directory { base, large, read, write, dirty, flags }) => packed
                .with_read(read)
                .with_write(write)
                .with_large(large)
                .with_dirty(dirty)
                .with_flags(flags.into_bits())
                .with_page(base.0 >> 12),
            Self::First(FirstDirectory { base, large, may_write, dirty, table_writable, nested, flags }) => packed
                .with_first(true)
                .with_nested(nested)
                .with_read(table_writable)
                .with_write(may_write)
                .with_large(large)
                .with_dirty(dirty)
                .with_flags(flags.into_bits())
                .with_page(base.0 >> 12),
        }
        .into_bits()
    }

    /// What was packed.
    #[inline]
    pub(crate) fn unpack(word: u64) -> Self {
        let packed = Packed::from_bits(word);
        let (base, large, dirty) = (Gpa(packed.page() << 12), packed.large(), packed.dirty());
        let flags = Flags::from_bits(packed.flags());
        if packed.first() {
            let (may_write, table_writable, nested) = (packed.write(), packed.read(), packed.nested());
            Self::First(FirstDirectory { base, large, may_write, dirty, table_writable, nested, flags })
        } else {
            Self::Second(Directory { base, large, read: packed.read(), write: packed.write(), dirty, flags })
        }
    }
}

/// A directory as most of them are: of a second stage without flags, and a table of level 1. What is read from it needs
/// no more than a few instructions, since permissions are the same bits here, in an entry and in what is cached.
#[derive(Clone, Copy)]
pub(crate) struct PlainDirectory(Packed);

impl PlainDirectory {
    /// What was packed, if it is one.
    #[inline(always)]
    pub(crate) fn unpack(word: u64) -> Option<Self> {
        let packed = Packed::from_bits(word);
        // Nobody asks what is dirty there, so it is; where no directory is, there is nothing at all.
        let of_second = packed.dirty() && !packed.first();
        let plain = of_second && !packed.large() && packed.flags() == Flags::Ignored.into_bits();
        plain.then_some(Self(packed))
    }

    /// As it was packed.
    pub(crate) fn into_word(self) -> u64 {
        self.0.into_bits()
    }

    /// Goes on to the page of `iova`: where that is, and the bits of its [`Perm`], which may be none. `None` where
    /// [`Directory::translate`] has more to say.
    #[inline(always)]
    pub(crate) fn translate<M: GuestMemoryBackend>(
        self,
        memory: &M,
        reserved: Reserved,
        iova: Iova,
    ) -> Option<(Gpa, u64)> {
        let at = (self.0.page() << 12) + (iova.0 / PAGE_SIZE % TABLE_ENTRIES) * 8;
        let word = Words::near(memory, Gpa(at), 1)?.get(0)?;
        let page = reserved.leaf(SecondStageEntry::from_bits(word))?;
        (!INTERRUPT_WINDOW.contains(page.0)).then_some((page, word & self.0.into_bits() & Perm::ReadWrite as u64))
    }
}

/// What the first word of a context says.
mod kind {
    pub(super) const PASS_THROUGH: u8 = 1;
    pub(super) const SECOND: u8 = 2;
    pub(super) const FIRST: u8 = 3;
    pub(super) const NESTED: u8 = 4;
}

/// The first word of a context: what it is, and its first stage.
#[bitfield(u64)]
struct PackedContext {
    domain: u16,
    /// See [`kind`]; 0 without translation.
    #[bits(3)]
    kind: u8,
    #[bits(3)]
    levels: u8,
    #[bits(2)]
    flags: u8,
    #[bits(40)]
    root_page: u64,
}

/// The second word: the second stage.
#[bitfield(u64)]
struct PackedSecond {
    #[bits(6)]
    width: u8,
    #[bits(2)]
    flags: u8,
    #[bits(40)]
    root_page: u64,
    __: u16,
}

impl PackedSecond {
    #[inline(always)]
    fn unpack(self) -> SecondStage {
        let flags = Flags::from_bits(self.flags());
        SecondStage { root: Gpa(self.root_page() << 12), width: self.width(), flags }
    }
}

impl Resolved {
    /// The second of two stages, if there are two.
    #[inline(always)]
    pub(crate) fn unpack_second([first, second]: [u64; 2]) -> Option<SecondStage> {
        let nested = PackedContext::from_bits(first).kind() == kind::NESTED;
        nested.then(|| PackedSecond::from_bits(second).unpack())
    }

    /// As two words, to be cached. Fault Processing Disable is left out: a fault is told by the tables, not by a cache.
    pub(crate) fn pack(&self) -> [u64; 2] {
        let packed = PackedContext::new();
        let with_first = |packed: PackedContext, tables: FirstStage| {
            packed.with_levels(tables.levels).with_flags(tables.flags.into_bits()).with_root_page(tables.root.0 >> 12)
        };
        let second_word = |SecondStage { root, width, flags }: SecondStage| {
            let packed = PackedSecond::new().with_width(width).with_flags(flags.into_bits());
            packed.with_root_page(root.0 >> 12).into_bits()
        };
        let (first, second) = match self {
            Self::Off => (packed, 0),
            Self::PassThrough { domain, .. } => (packed.with_kind(kind::PASS_THROUGH).with_domain(domain.0), 0),
            Self::Paged { space, flags, .. } => {
                let packed = packed.with_kind(kind::SECOND).with_domain(space.domain.0);
                (packed, second_word(SecondStage::of(space, *flags)))
            }
            Self::First { tables, domain, .. } => {
                (with_first(packed.with_kind(kind::FIRST).with_domain(domain.0), *tables), 0)
            }
            Self::Nested { tables, second, domain, .. } => {
                let packed = packed.with_kind(kind::NESTED).with_domain(domain.0);
                (with_first(packed, *tables), second_word(*second))
            }
        };
        [first.into_bits(), second]
    }

    /// What was packed, of the unit with this `config`.
    pub(crate) fn unpack([first, second]: [u64; 2], config: &UnitConfig) -> Self {
        let (packed, second) = (PackedContext::from_bits(first), PackedSecond::from_bits(second));
        let (domain, fault_processing_disable) = (DomainId(packed.domain()), false);
        let root = Gpa(packed.root_page() << 12);
        let tables = FirstStage { root, levels: packed.levels(), flags: Flags::from_bits(packed.flags()) };
        let SecondStage { root, width, flags } = second.unpack();
        match packed.kind() {
            kind::PASS_THROUGH => Self::PassThrough { domain, fault_processing_disable },
            kind::SECOND => {
                let space = PagedSpace { unit: config.id, tables: Tables::Second { root, width }, domain };
                Self::Paged { space, flags, fault_processing_disable }
            }
            kind::FIRST => Self::First { tables, domain, fault_processing_disable },
            kind::NESTED => {
                let second = second.unpack();
                Self::Nested { tables, second, domain, fault_processing_disable }
            }
            _ => Self::Off,
        }
    }
}
