//! Several `--iommu vtd`: which functions each unit has (A-13).

use crate::boot::layout;
use crate::commands::options::BadOption;
use crate::config::{
    DeviceKind, DeviceOption, FurtherUnit, IommuOption, Place, RootSlot, UnitPart, VtdOption, segments, slot_of_port,
};

fn bad<T>(message: impl Into<String>) -> Result<T, BadOption> {
    Err(BadOption::new(message))
}

/// What a unit can name.
pub struct Named<'a> {
    /// The devices.
    pub devices: &'a [DeviceOption],
    /// Their ids.
    pub names: &'a [String],
    /// Where they are.
    pub places: &'a [Place],
    /// How many root ports there are.
    pub root_ports: u8,
}

/// What the units have in common, and those but the one that has all others of segment 0, in the order of the command
/// line. Every function is in a segment that has a unit for it.
pub fn units(options: &[IommuOption], named: &Named<'_>) -> Result<(IommuOption, Vec<FurtherUnit>), BadOption> {
    let mut units: Vec<&VtdOption> = Vec::with_capacity(options.len());
    for option in options {
        match option {
            IommuOption::Vtd(unit) => units.push(unit),
            IommuOption::None if options.len() == 1 => return Ok((IommuOption::None, Vec::new())),
            IommuOption::None => return bad("--iommu none is there alone, or not at all"),
        }
    }
    let there = segments(named.places);
    if let Some(unit) = units.iter().find(|unit| !there.contains(&unit.segment)) {
        let segment = unit.segment;
        return bad(format!("segment={segment}: no device is there; one with addr={segment:04x}:00:01.0 would be"));
    }
    let is_rest = |unit: &&&VtdOption, segment: u16| unit.devices.is_empty() && unit.segment == segment;
    for segment in there.into_iter().filter(|segment| *segment != 0) {
        match units.iter().filter(|unit| is_rest(unit, segment)).count() {
            1 => {}
            0 => return bad(named.without_unit(segment)),
            _ => {
                return bad(format!(
                    "just one --iommu vtd,segment={segment} has no devices=: it has every function of the segment that no \
                     other names"
                ));
            }
        }
    }
    let (rest, further): (Vec<&VtdOption>, Vec<&VtdOption>) = units.into_iter().partition(|unit| is_rest(&unit, 0));
    let [rest] = rest[..] else {
        return bad("just one --iommu vtd has no devices=: it has every function that no other names, and the IOAPIC");
    };
    if further.len() >= layout::MAX_UNITS {
        return bad(format!("there are at most {} units", layout::MAX_UNITS));
    }
    let mut taken = Vec::new();
    let mut of_units = Vec::with_capacity(further.len());
    for unit in further {
        // Of some capabilities Linux uses what all units have, of others what the first has.
        if (VtdOption { devices: Vec::new(), segment: 0, ..unit.clone() }) != *rest {
            return bad(
                "every --iommu vtd has the same keys but for devices= and segment=: guests expect units that offer the same",
            );
        }
        let mut parts = Vec::with_capacity(unit.devices.len());
        for device in &unit.devices {
            let part = named.part(device, unit.segment)?;
            if taken.contains(&part) {
                return bad(format!("devices={device} is named twice"));
            }
            taken.push(part);
            parts.push(part);
        }
        of_units.push(FurtherUnit { segment: unit.segment, parts });
    }
    Ok((IommuOption::Vtd(rest.clone()), of_units))
}

impl Named<'_> {
    /// Why there is no machine whose functions of this segment have no unit.
    fn without_unit(&self, segment: u16) -> String {
        let is_there = |place: &Place| matches!(place, Place::Root(at) if at.segment == segment);
        let name = self.places.iter().position(is_there).map_or("a device", |index| &self.names[index]);
        format!(
            "{name} is in segment {segment}, which has no unit for it: add --iommu vtd,segment={segment}, without devices="
        )
    }

    /// The function or bridge of this segment with this id or at this slot, or the root port of this name. A device's
    /// id goes before a port's name.
    fn part(&self, text: &str, segment: u16) -> Result<UnitPart, BadOption> {
        let at = |place: &Place| match place {
            Place::Root(at) => at.in_full() == text || at.segment == segment && at.slot.to_string() == text,
            _ => false,
        };
        let index = self.names.iter().position(|name| name == text).or_else(|| self.places.iter().position(at));
        let part = index.map_or_else(|| self.port(text), |index| self.part_at(text, index))?;
        match part.segment() {
            its if its == segment => Ok(part),
            its => bad(format!("devices={text}: it is in segment {its}, and this unit in segment {segment}")),
        }
    }

    fn part_at(&self, text: &str, index: usize) -> Result<UnitPart, BadOption> {
        match self.places[index] {
            Place::Root(RootSlot { slot, .. }) if self.devices[index].kind == DeviceKind::PciBridge => {
                Ok(UnitPart::Bridge { bridge: index, slot })
            }
            Place::Root(at) => Ok(UnitPart::Function(at)),
            Place::Port(port) => bad(format!("devices={text}: it is behind root port {port}: write port{port}")),
            Place::Bridge { bridge, .. } => match self.places[bridge] {
                Place::Port(port) => bad(format!("devices={text}: it is behind root port {port}: write port{port}")),
                _ => bad(format!("devices={text}: it is behind a bridge: write {}", self.names[bridge])),
            },
        }
    }

    fn port(&self, text: &str) -> Result<UnitPart, BadOption> {
        let named = |port: &u8| format!("port{port}") == text || slot_of_port(*port).to_string() == text;
        match (1..=self.root_ports).find(named) {
            Some(port) => Ok(UnitPart::Port(port)),
            None => bad(format!(
                "devices={text}: there is no such device on bus 0, by its id or by its slot, and no such root port"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{RootSlot, Slot};

    fn parsed(texts: &[&str]) -> Vec<IommuOption> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn of(texts: &[&str]) -> Result<(IommuOption, Vec<FurtherUnit>), String> {
        of_machine(texts, &[])
    }

    /// Of a machine with further edus.
    fn of_machine(texts: &[&str], more: &[RootSlot]) -> Result<(IommuOption, Vec<FurtherUnit>), String> {
        let slot = |device| Place::Root(RootSlot::first(Slot { device, function: 0 }));
        let names = ["edu0", "nvme", "edu1", "behind", "br", "below", "br1", "deep"].map(str::to_owned);
        let names: Vec<String> = names.into_iter().chain(more.iter().map(|at| format!("edu-{}", at.segment))).collect();
        let behind = |bridge| Place::Bridge { bridge, slot: Slot { device: 1, function: 0 } };
        let places = [slot(1), slot(2), slot(3), Place::Port(1), slot(8), behind(4), Place::Port(2), behind(6)];
        let kinds = ["edu", "edu", "edu", "edu", "pcie-pci-bridge", "edu", "pcie-pci-bridge", "edu"];
        let places: Vec<Place> = places.into_iter().chain(more.iter().map(|at| Place::Root(*at))).collect();
        let kinds = kinds.into_iter().chain(more.iter().map(|_| "edu"));
        let devices: Vec<DeviceOption> = kinds.map(|kind| kind.parse().unwrap()).collect();
        let named = Named { devices: &devices, names: &names, places: &places, root_ports: 2 };
        units(&parsed(texts), &named).map_err(|e| e.to_string())
    }

    #[test]
    fn a13_each_unit_has_the_functions_that_are_named_by_id_or_slot() {
        let slot = |device| Slot { device, function: 0 };
        let function = |device: &u8| UnitPart::Function(RootSlot::first(slot(*device)));
        let slots = |devices: &[u8]| FurtherUnit { segment: 0, parts: devices.iter().map(function).collect() };
        let plain = IommuOption::Vtd(VtdOption::default());
        assert_eq!(of(&["vtd"]), Ok((plain.clone(), vec![])));
        assert_eq!(of(&["none"]), Ok((IommuOption::None, vec![])));
        let texts = ["vtd,devices=nvme+0000:00:01.0", "vtd", "vtd,devices=edu1"];
        assert_eq!(of(&texts), Ok((plain, vec![slots(&[2, 1]), slots(&[3])])));
        let (common, _) = of(&["vtd,aw-bits=39", "vtd,devices=nvme,aw-bits=39"]).unwrap();
        assert_eq!(common, IommuOption::Vtd(VtdOption { aw_bits: Some(39), ..VtdOption::default() }));
    }

    #[test]
    fn a13_a_unit_has_bridges_and_root_ports_with_all_that_is_behind_them() {
        let bridge = UnitPart::Bridge { bridge: 4, slot: Slot { device: 8, function: 0 } };
        let (one, two) = (UnitPart::Port(1), UnitPart::Port(2));
        let parts =
            |texts: &[&str]| of(texts).map(|(_, units)| units.into_iter().map(|it| it.parts).collect::<Vec<_>>());
        assert_eq!(
            parts(&["vtd", "vtd,devices=br+port2", "vtd,devices=port1"]),
            Ok(vec![vec![bridge, two], vec![one]])
        );
        // By their slots.
        assert_eq!(parts(&["vtd", "vtd,devices=08.0+10.0+11.0"]), Ok(vec![vec![bridge, one, two]]));
    }

    #[test]
    fn a13_each_segment_with_functions_has_a_unit_for_them() {
        let at = |segment, device| RootSlot { segment, slot: Slot { device, function: 0 } };
        let machine = [at(1, 1), at(5, 2)];
        let of = |texts: &[&str]| of_machine(texts, &machine).map(|(_, units)| units);
        let rest = |segment| FurtherUnit { segment, parts: vec![] };
        assert_eq!(of(&["none"]), Ok(vec![]));
        let texts = ["vtd,segment=5", "vtd", "vtd,segment=1"];
        assert_eq!(of(&texts), Ok(vec![rest(5), rest(1)]));
        let named = |segment, device| FurtherUnit { segment, parts: vec![UnitPart::Function(at(segment, device))] };
        for name in ["01.0", "edu-1", "0001:00:01.0"] {
            let unit = format!("vtd,segment=1,devices={name}");
            let texts = [&texts[..], &[&unit]].concat();
            assert_eq!(of(&texts), Ok(vec![rest(5), rest(1), named(1, 1)]), "{name}");
        }
        for (more, why) in [
            (&["vtd"][..], "edu-1 is in segment 1, which has no unit for it: add --iommu vtd,segment=1"),
            (&["vtd", "vtd,segment=1"], "edu-5 is in segment 5"),
            // One that names its function leaves out what else may come.
            (&["vtd", "vtd,segment=1", "vtd,segment=5,devices=02.0"], "edu-5 is in segment 5"),
            (&["vtd,segment=1", "vtd,segment=5"], "just one --iommu vtd has no"),
            (&["vtd", "vtd,segment=1", "vtd,segment=1", "vtd,segment=5"], "just one --iommu vtd,segment=1"),
            (&["vtd", "vtd,segment=1", "vtd,segment=5", "vtd,segment=2"], "segment=2: no device is there"),
            (&["vtd", "vtd,segment=1,aw-bits=39", "vtd,segment=5"], "the same keys"),
            (
                &["vtd", "vtd,segment=1", "vtd,segment=5", "vtd,devices=edu-1"],
                "in segment 1, and this unit in segment 0",
            ),
            (
                &["vtd", "vtd,segment=1", "vtd,segment=5", "vtd,segment=1,devices=nvme"],
                "in segment 0, and this unit in",
            ),
            (
                &["vtd", "vtd,segment=1", "vtd,segment=5", "vtd,segment=5,devices=port1"],
                "in segment 0, and this unit in",
            ),
            (&["vtd", "vtd,segment=1", "vtd,segment=5", "vtd,segment=1,devices=02.0"], "no such device"),
            (&["vtd", "vtd,segment=1", "vtd,segment=5", "vtd,segment=1,devices=0000:00:01.0"], "in segment 0, and"),
        ] {
            let error = of(more).unwrap_err();
            assert!(error.contains(why), "{more:?}: {error}");
        }
    }

    #[test]
    fn a13_what_no_machine_can_have_is_refused_with_the_reason() {
        let many: Vec<String> = (0..9).map(|n| format!("vtd,devices={n}")).chain(["vtd".to_owned()]).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        for (texts, part) in [
            (&["vtd", "none"][..], "alone"),
            (&["vtd", "vtd"], "just one"),
            (&["vtd,devices=nvme"], "just one"),
            (&["vtd", "vtd,devices=nvme,aw-bits=39"], "the same keys"),
            (&["vtd", "vtd,devices=nvme+02.0"], "named twice"),
            (&["vtd", "vtd,devices=nvme", "vtd,devices=nvme"], "named twice"),
            (&["vtd", "vtd,devices=behind"], "root port 1: write port1"),
            (&["vtd", "vtd,devices=below"], "behind a bridge: write br"),
            (&["vtd", "vtd,devices=br1"], "root port 2: write port2"),
            (&["vtd", "vtd,devices=deep"], "root port 2: write port2"),
            (&["vtd", "vtd,devices=port3"], "no such root port"),
            (&["vtd", "vtd,devices=port1+10.0"], "named twice"),
            (&["vtd", "vtd,devices=port1", "vtd,devices=port1"], "named twice"),
            (&["vtd", "vtd,devices=other"], "no such device"),
            (&["vtd", "vtd,devices=04.0"], "no such device"),
            (&many, "at most 8 units"),
        ] {
            let error = of(texts).unwrap_err();
            assert!(error.contains(part), "{texts:?}: {error}");
        }
    }
}
