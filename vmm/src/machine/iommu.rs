//! Looks at the IOMMU of a running machine: the guest's tables, and what was granted beside what the host holds. Each
//! call gives one page, which is bounded, so that no guest and no client can hold the machine up.

use vtd::inspect::{PageBounds, Position};
use vtd::{IovaRange, Requester, SourceId, Unit};

use super::units::Units;
use super::{Machine, units};
use crate::config::shown;
use crate::kvm::memory::Ram;
use crate::view::Hex;
use crate::view::mappings::{self, Item};
use crate::view::tables;

/// Items of a page of mappings, and mappings that are looked at of each side for it: more than one function may add.
const MOST_ITEMS: usize = 512;

/// What has no unit has none of this.
const NO_UNIT: &str = "this machine has no unit: it was started with --iommu none";

impl Machine {
    /// A page of the guest's tables, of the unit that has all functions that no other one names; of `device` alone, by
    /// its id or its address in the guest, those of its unit. The machine runs on.
    pub fn iommu_tables(&self, device: Option<&str>, position: Option<&str>) -> Result<tables::Page, String> {
        let units = self.units.as_ref().ok_or(NO_UNIT)?;
        let from = begin(position)?;
        let only = device.map(|device| self.source_of(device, units)).transpose()?;
        let (unit, only) = match only {
            Some(only) => (only.unit, Some(only.source)),
            None => (&**units.rest(), None),
        };
        let segment = unit.config().segment;
        // Behind a bridge functions have one entry together.
        let id_of = |source: SourceId| {
            let its = self.placed.iter().filter(|placed| placed.requester.segment == segment);
            let its = its.filter(|placed| unit.source_id(placed.requester) == Some(source));
            let ids: Vec<&str> = its.map(|placed| placed.id.as_str()).collect();
            (!ids.is_empty()).then(|| ids.join(","))
        };
        let mut page = tables::Page::new(&unit.tables_page(only, from, PageBounds::default()), segment, &id_of);
        page.head.unit = (units.all().count() > 1).then(|| units::name(unit));
        Ok(page)
    }

    /// A page of what assigned functions were granted and what the host holds for them; of `device` alone, by its id or
    /// its address in the guest. Only the queue of the unit is held up.
    pub fn iommu_mappings(&self, device: Option<&str>, position: Option<&str>) -> Result<mappings::Page, String> {
        let units = self.units.as_ref().ok_or(NO_UNIT)?;
        let (first, mut from) = begin_in(position)?;
        let mut at = first;
        let only = device.map(|device| self.source_of(device, units)).transpose()?;
        let _unchanged = self.peers.hold();
        let mut page = mappings::Page::default();
        let mut attached: Vec<_> = units.all().flat_map(|unit| unit.attachments()).collect();
        attached.sort_unstable_by_key(|(requester, _)| *requester);
        let source_of = |name: Requester| units.of(name).and_then(|unit| unit.source_id(name));
        let is_wanted = |name: Requester| {
            let of = |only: &Source<'_>| only.segment == name.segment && source_of(name) == Some(only.source);
            only.as_ref().is_none_or(of)
        };
        attached.retain(|(name, _)| is_wanted(*name));
        if let (Some(device), true) = (device, attached.is_empty()) {
            return Err(format!("nothing is mapped for {device} in the host: it is not assigned, or emulated here"));
        }
        for (requester, _) in attached {
            let (this, reached) = ((requester.segment, requester.sid.0), (at, from.source));
            if this < reached {
                continue;
            }
            if this > reached {
                (at, from) = (requester.segment, Position { source: requester.sid.0, ..Position::default() });
            }
            if page.items.len() >= MOST_ITEMS {
                page.next = Some(in_segment(at, from));
                break;
            }
            let offset = from.offset.unwrap_or(0);
            let Some(unit) = units.of(requester) else { continue };
            let found = unit.granted(requester, IovaRange::new(offset, u64::MAX), |space, granted| {
                let found = self.bridge.mappings(requester, space, granted, offset, MOST_ITEMS)?;
                Some((space.to_string(), found))
            });
            let Some(Some((space, found))) = found else { continue };
            if from.offset.is_none() {
                let refused = found.refused.iter().take(MOST_ITEMS);
                page.items.push(Item::Function(mappings::Function {
                    id: self.id_of(requester),
                    addr: source_of(requester)
                        .map_or_else(|| "none".to_owned(), |sid| shown(Requester { sid, ..requester })),
                    space,
                    backend: self.bridge.backend(requester).unwrap_or("nobody").to_owned(),
                    refused: refused.map(|range| (Hex(range.first), Hex(range.last))).collect(),
                }));
            }
            page.items.extend(found.differences.into_iter().map(Item::Difference));
            page.items.extend(found.pieces.iter().map(|piece| Item::Range(piece.into())));
            if let Some(next) = found.next {
                page.next = Some(in_segment(at, Position { offset: Some(next), ..from }));
                break;
            }
        }
        Ok(page)
    }

    /// The id of a device of the command line.
    pub(super) fn id_of(&self, requester: Requester) -> Option<String> {
        self.placed.iter().find(|placed| placed.requester == requester).map(|placed| placed.id.clone())
    }

    /// The source id of the device with this id, or this one: `05.0`, `00:05.0` or `0000:00:05.0`; and its unit.
    fn source_of<'a>(&self, device: &str, units: &'a Units) -> Result<Source<'a>, String> {
        let of = |name: Requester, source| {
            let unit = units.of(name)?;
            Some(Source { unit, segment: name.segment, source })
        };
        if let Some(placed) = self.placed.iter().find(|placed| placed.id == device) {
            let source = units.of(placed.requester).and_then(|unit| unit.source_id(placed.requester));
            let found = source.and_then(|source| of(placed.requester, source));
            return found.ok_or_else(|| format!("{device} has no source id: the guest gave its bus no number"));
        }
        let found = address(device).and_then(|name| of(name, name.sid));
        found.ok_or_else(|| format!("there is no device {device}: `devices` has ids and addresses"))
    }
}

/// A source id of a segment, and the unit that requests with it are for.
struct Source<'a> {
    unit: &'a Unit<Ram>,
    segment: u16,
    source: SourceId,
}

/// Where a page of all segments begins: a segment other than the first is in front of the position.
fn begin_in(position: Option<&str>) -> Result<(u16, Position), String> {
    let Some((segment, rest)) = position.and_then(|text| text.split_once('/')) else {
        return Ok((0, begin(position)?));
    };
    Ok((segment.parse().map_err(|e| format!("{segment}: {e}"))?, begin(Some(rest))?))
}

/// The other way round.
fn in_segment(segment: u16, position: Position) -> String {
    if segment == 0 { position.to_string() } else { format!("{segment}/{position}") }
}

/// The position of a page; at the beginning where none is given.
fn begin(position: Option<&str>) -> Result<Position, String> {
    position.map_or(Ok(Position::default()), |text| text.parse().map_err(|e| format!("{text}: {e}")))
}

/// An address in the guest, in segment 0 where it names none.
fn address(text: &str) -> Option<Requester> {
    let number = |digits: &str, most: u8| {
        let plain = !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        u8::from_str_radix(digits, 16).ok().filter(|number| plain && *number <= most)
    };
    let (segment, text) = match text.split_once(':') {
        Some((segment, rest)) if segment.len() == 4 && rest.contains(':') => (segment, rest),
        _ => ("0000", text),
    };
    let [high, low] = [segment.get(..2)?, segment.get(2..)?].map(|digits| number(digits, u8::MAX));
    let segment = u16::from_be_bytes([high?, low?]);
    let (bus, slot) = text.split_once(':').unwrap_or(("0", text));
    let (device, function) = slot.split_once('.')?;
    let sid = SourceId::new(number(bus, u8::MAX)?, number(device, 31)?, number(function, 7)?);
    Some(Requester { segment, sid })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_a_function_is_named_by_its_address_in_every_usual_form() {
        for text in ["05.1", "00:05.1", "0000:00:05.1", "0:5.1"] {
            assert_eq!(address(text).unwrap().to_string(), "0000:00:05.1", "{text}");
        }
        let other = address("0001:00:05.1").unwrap();
        assert_eq!((other.segment, other.sid), (1, SourceId::new(0, 5, 1)));
        assert_eq!(address("ff:1f.7").unwrap().sid, SourceId::new(0xff, 0x1f, 7));
        for text in [
            "",
            "5",
            "05.8",
            "20.0",
            "100:05.0",
            "001:00:05.0",
            "00é:00:05.0",
            "+0:05.0",
            "00:05.0.0",
            "vfio0",
            ":05.0",
        ] {
            assert_eq!(address(text), None, "{text}");
        }
    }
}
