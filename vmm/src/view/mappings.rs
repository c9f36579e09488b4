//! `iommu mappings`: what each function was granted, beside what the host holds for it.

use std::fmt;

use serde::{Deserialize, Serialize};
use vtd::audit;

use super::{Hex, named};

/// A page of it.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Default, Debug)]
pub struct Page {
    /// By function and IOVA.
    pub items: Vec<Item>,
    /// Where the next page begins.
    pub next: Option<String>,
}

/// Something that is there.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
#[serde(rename_all = "kebab-case")]
pub enum Item {
    /// An assigned function. What follows is its.
    Function(Function),
    /// A run of IOVAs.
    Range(Range),
    /// What differs otherwise, in words.
    Difference(String),
}

/// An assigned function.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Function {
    /// The id of the device.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub id: Option<String>,
    /// Address in the guest.
    pub addr: String,
    /// The space that it is attached to: identity, blocked, or the name of a paged one.
    pub space: String,
    /// Who holds its mappings: type1, iommufd, vfio-user or software.
    pub backend: String,
    /// What the host refused of identity: first and last IOVA. It is tried again, and no difference.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub refused: Vec<(Hex, Hex)>,
}

/// Where a run of IOVAs leads.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Target {
    /// Guest-physical address that the first leads to.
    pub gpa: Hex,
    /// r, w or rw.
    pub perm: String,
}

/// A run of IOVAs.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Range {
    /// First IOVA.
    pub first: Hex,
    /// Last IOVA.
    pub last: Hex,
    /// What the guest's tables grant, as the unit has it.
    pub granted: Option<Target>,
    /// What the host was handed.
    pub held: Option<Target>,
    /// The two are not the same.
    pub differs: bool,
}

impl From<&audit::Piece> for Range {
    fn from(piece: &audit::Piece) -> Self {
        let target = |target: Option<audit::Target>| {
            target.map(|target| Target { gpa: Hex(target.gpa.0), perm: target.perm.to_string() })
        };
        Self {
            first: Hex(piece.range.first),
            last: Hex(piece.range.last),
            granted: target(piece.left),
            held: target(piece.right),
            differs: !piece.agrees(),
        }
    }
}

impl Range {
    /// Makes `next` part of it, when it goes on where this ends: a run that a page ended in is one.
    pub fn join(&mut self, next: &Self) -> bool {
        let len = next.first.0.wrapping_sub(self.first.0);
        let goes_on = |from: &Option<Target>, to: &Option<Target>| match (from, to) {
            (Some(from), Some(to)) => from.gpa.0.checked_add(len) == Some(to.gpa.0) && from.perm == to.perm,
            (None, None) => true,
            _ => false,
        };
        let joins = self.last.0.checked_add(1) == Some(next.first.0)
            && goes_on(&self.granted, &next.granted)
            && goes_on(&self.held, &next.held);
        if joins {
            self.last = next.last;
        }
        joins
    }
}

impl fmt::Display for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { id, addr, space, backend, refused } = self;
        write!(f, "{}: {space}, held by {backend}", named(addr, id.as_deref()))?;
        for (first, last) in refused {
            write!(f, "\n    {first}-{last}: refused by the host, and tried again")?;
        }
        Ok(())
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { first, last, granted, held, differs } = self;
        let says = |target: &Option<Target>| match target {
            Some(Target { gpa, perm }) => format!("{gpa} {perm}"),
            None => "nothing".to_owned(),
        };
        let range = format!("{first}-{last}");
        match differs {
            false => write!(f, "    {range:<35} {}", says(granted)),
            true => write!(f, "  ! {range:<35} granted is {}, the host holds {}", says(granted), says(held)),
        }
    }
}
