//! What `causeway ctl` shows of a running machine's IOMMU: the forms on the wire, which are JSON, and their text.

pub mod mappings;
pub mod tables;

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number that is written as text, `0x1000`: not every reader of JSON takes all 64 bits of a number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Hex(pub u64);

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let number = text.strip_prefix("0x").and_then(|digits| u64::from_str_radix(digits, 16).ok());
        number.map(Self).ok_or_else(|| serde::de::Error::custom("a number such as 0x1000 is missing"))
    }
}

/// `ADDR ID`, or the address alone of what has no id.
fn named(addr: &str, id: Option<&str>) -> String {
    id.map_or_else(|| addr.to_owned(), |id| format!("{addr} {id}"))
}
