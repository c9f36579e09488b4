//! The names of things that cross a wall: requesters, domains, addresses.
//!
//! Each is a type of its own, so that two integers are never confused.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A PCI source id: bus in bits 15:8, device in 7:3, function in 2:0 (VT-d specification, section 3.4.1).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SourceId(pub u16);

impl SourceId {
    /// The source id of bus `bus`, device `device` (0 to 31), function `function` (0 to 7).
    pub const fn new(bus: u8, device: u8, function: u8) -> Self {
        Self((bus as u16) << 8 | ((device & 0x1f) as u16) << 3 | (function & 7) as u16)
    }
    /// Bus number.
    pub const fn bus(self) -> u8 {
        (self.0 >> 8) as u8
    }
    /// Device and function: the index into a context table.
    pub const fn devfn(self) -> u8 {
        self.0 as u8
    }
    /// Device number, 0 to 31.
    pub const fn device(self) -> u8 {
        self.devfn() >> 3
    }
    /// Function number, 0 to 7.
    pub const fn function(self) -> u8 {
        self.devfn() & 7
    }
}

impl fmt::Display for SourceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.bus(), self.device(), self.function())
    }
}

impl fmt::Debug for SourceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Who makes a DMA request, as the unit sees it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Requester {
    /// PCI segment.
    pub segment: u16,
    /// Source id within the segment.
    pub sid: SourceId,
}

impl fmt::Display for Requester {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{}", self.segment, self.sid)
    }
}

/// Domain id of a context or PASID entry (VT-d specification, section 9.3).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct DomainId(pub u16);

/// Process address space id, 20 bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Pasid(pub u32);

impl Pasid {
    /// The largest one there can be.
    pub const MAX: Self = Self(0xf_ffff);
}

/// What is attached to a space: the requests of a function that carry one PASID, or those that carry none.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Stream {
    /// Who makes the requests.
    pub requester: Requester,
    /// The PASID that they carry, `None`: requests without PASID.
    pub pasid: Option<Pasid>,
}

/// Requests without PASID.
impl From<Requester> for Stream {
    fn from(requester: Requester) -> Self {
        Self { requester, pasid: None }
    }
}

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pasid {
            None => self.requester.fmt(f),
            Some(Pasid(pasid)) => write!(f, "{} with PASID {pasid:#x}", self.requester),
        }
    }
}

/// Which unit of the machine, counted from 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct UnitId(pub u16);

/// An address as a device issues it, before translation.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Iova(pub u64);

/// A guest-physical address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Gpa(pub u64);

macro_rules! hex {
    ($($t:ident),*) => {$(
        impl fmt::Debug for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
        impl fmt::Display for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    )*};
}
hex!(Iova, Gpa);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_ids_are_laid_out_as_in_a_request() {
        let id = SourceId::new(0x12, 0x1f, 5);
        assert_eq!((id.0, id.bus(), id.devfn(), id.device(), id.function()), (0x12fd, 0x12, 0xfd, 0x1f, 5));
        assert_eq!(SourceId::new(1, 0x3f, 0xf), SourceId::new(1, 0x1f, 7), "what is beyond a field is dropped");
        assert_eq!(Requester { segment: 3, sid: id }.to_string(), "0003:12:1f.5");
        assert_eq!(format!("{:?} {}", Iova(0x1000), Gpa(0x2000)), "0x1000 0x2000");
    }
}
