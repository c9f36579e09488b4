//! Looks at the IOMMU of a running machine: the guest's tables, and what was granted beside what the host holds. Each
//! call gives one page, which is bounded, so that no guest and no client can hold the machine up.

use vtd::inspect::{PageBounds, Position};
use vtd::{IovaRange, Requester, SourceId, Unit};

use super::units::Units;
use super::{Machine, units};
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
        let unit = only.map_or(&**units.rest(), |(unit, _)| unit);
        let only = only.map(|(_, source)| source);
        // Behind a bridge functions have one entry together.
        let id_of = |source: SourceId| {
            let its = self.placed.iter().filter(|placed| unit.source_id(placed.requester) == Some(source));
            let ids: Vec<&str> = its.map(|placed| placed.id.as_str()).collect();
            (!ids.is_empty()).then(|| ids.join(","))
        };
        let mut page = tables::Page::new(&unit.tables_page(only, from, PageBounds::default()), &id_of);
        page.head.unit = (units.all().count() > 1).then(|| units::name(unit));
        Ok(page)
    }

    /// A page of what assigned functions were granted and what the host holds for them; of `device` alone, by its id or
    /// its address in the guest. Only the queue of the unit is held up.
    pub fn iommu_mappings(&self, device: Option<&str>, position: Option<&str>) -> Result<mappings::Page, String> {
        let units = self.units.as_ref().ok_or(NO_UNIT)?;
        let mut from = begin(position)?;
        let only = device.map(|device| self.source_of(device, units)).transpose()?;
        let _unchanged = self.peers.hold();
        let mut page = mappings::Page::default();
        let mut attached: Vec<_> = units.all().flat_map(|unit| unit.attachments()).collect();
        attached.sort_unstable_by_key(|(requester, _)| *requester);
        let source_of = |name: Requester| units.of(name).source_id(name);
        attached.retain(|(name, _)| only.is_none_or(|(_, only)| source_of(*name) == Some(only)));
        if let (Some(device), true) = (device, attached.is_empty()) {
            return Err(format!("nothing is mapped for {device} in the host: it is not assigned, or emulated here"));
        }
        for (requester, _) in attached {
            if requester.sid.0 < from.source {
                continue;
            }
            if requester.sid.0 > from.source {
                from = Position { source: requester.sid.0, ..Position::default() };
            }
            if page.items.len() >= MOST_ITEMS {
                page.next = Some(from.to_string());
                break;
            }
            let offset = from.offset.unwrap_or(0);
            let found = units.of(requester).granted(requester, IovaRange::new(offset, u64::MAX), |space, granted| {
                let found = self.bridge.mappings(requester, space, granted, offset, MOST_ITEMS)?;
                Some((space.to_string(), found))
            });
            let Some(Some((space, found))) = found else { continue };
            if from.offset.is_none() {
                let refused = found.refused.iter().take(MOST_ITEMS);
                page.items.push(Item::Function(mappings::Function {
                    id: self.id_of(requester),
                    addr: source_of(requester).map_or_else(|| "none".to_owned(), |id| id.to_string()),
                    space,
                    backend: self.bridge.backend(requester).unwrap_or("nobody").to_owned(),
                    refused: refused.map(|range| (Hex(range.first), Hex(range.last))).collect(),
                }));
            }
            page.items.extend(found.differences.into_iter().map(Item::Difference));
            page.items.extend(found.pieces.iter().map(|piece| Item::Range(piece.into())));
            if let Some(next) = found.next {
                page.next = Some(Position { offset: Some(next), ..from }.to_string());
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
    fn source_of<'a>(&self, device: &str, units: &'a Units) -> Result<(&'a Unit<Ram>, SourceId), String> {
        if let Some(placed) = self.placed.iter().find(|placed| placed.id == device) {
            let unit = units.of(placed.requester);
            let source = unit.source_id(placed.requester);
            let source =
                source.ok_or_else(|| format!("{device} has no source id: the guest gave its bus no number"))?;
            return Ok((unit, source));
        }
        let found = address(device).map(|sid| (&**units.of(Requester { segment: 0, sid }), sid));
        found.ok_or_else(|| format!("there is no device {device}: `devices` has ids and addresses"))
    }
}

/// The position of a page; at the beginning where none is given.
fn begin(position: Option<&str>) -> Result<Position, String> {
    position.map_or(Ok(Position::default()), |text| text.parse().map_err(|e| format!("{text}: {e}")))
}

/// An address in the guest. Only segment 0 is there.
fn address(text: &str) -> Option<SourceId> {
    let number = |digits: &str, most: u8| {
        let plain = !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        u8::from_str_radix(digits, 16).ok().filter(|number| plain && *number <= most)
    };
    let text = text.strip_prefix("0000:").unwrap_or(text);
    let (bus, slot) = text.split_once(':').unwrap_or(("0", text));
    let (device, function) = slot.split_once('.')?;
    Some(SourceId::new(number(bus, u8::MAX)?, number(device, 31)?, number(function, 7)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_a_function_is_named_by_its_address_in_every_usual_form() {
        for text in ["05.1", "00:05.1", "0000:00:05.1", "0:5.1"] {
            assert_eq!(address(text), Some(SourceId::new(0, 5, 1)), "{text}");
        }
        assert_eq!(address("ff:1f.7"), Some(SourceId::new(0xff, 0x1f, 7)));
        for text in ["", "5", "05.8", "20.0", "100:05.0", "0001:00:05.0", "+0:05.0", "00:05.0.0", "vfio0", ":05.0"] {
            assert_eq!(address(text), None, "{text}");
        }
    }
}
