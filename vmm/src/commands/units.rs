//! Several `--iommu vtd`: which functions each unit has (A-13).

use crate::boot::layout;
use crate::commands::options::BadOption;
use crate::config::{DeviceKind, DeviceOption, IommuOption, Place, UnitPart, VtdOption, slot_of_port};

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

/// What the units have in common, and of each but the one that has all others what it names, in the order of the
/// command line.
pub fn units(options: &[IommuOption], named: &Named<'_>) -> Result<(IommuOption, Vec<Vec<UnitPart>>), BadOption> {
    let mut units: Vec<&VtdOption> = Vec::with_capacity(options.len());
    for option in options {
        match option {
            IommuOption::Vtd(unit) => units.push(unit),
            IommuOption::None if options.len() == 1 => return Ok((IommuOption::None, Vec::new())),
            IommuOption::None => return bad("--iommu none is there alone, or not at all"),
        }
    }
    let (rest, further): (Vec<&VtdOption>, Vec<&VtdOption>) =
        units.into_iter().partition(|unit| unit.devices.is_empty());
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
        if (VtdOption { devices: Vec::new(), ..unit.clone() }) != *rest {
            return bad(
                "every --iommu vtd has the same keys but for devices=: guests expect units that offer the same",
            );
        }
        let mut parts = Vec::with_capacity(unit.devices.len());
        for device in &unit.devices {
            let part = named.part(device)?;
            if taken.contains(&part) {
                return bad(format!("devices={device} is named twice"));
            }
            taken.push(part);
            parts.push(part);
        }
        of_units.push(parts);
    }
    Ok((IommuOption::Vtd(rest.clone()), of_units))
}

impl Named<'_> {
    /// The function or bridge with this id or at this slot, or the root port of this name. A device's id goes before a
    /// port's name.
    fn part(&self, text: &str) -> Result<UnitPart, BadOption> {
        let at = |place: &Place| matches!(place, Place::Root(slot) if slot.to_string() == text);
        let index = self.names.iter().position(|name| name == text).or_else(|| self.places.iter().position(at));
        let Some(index) = index else { return self.port(text) };
        match self.places[index] {
            Place::Root(slot) if self.devices[index].kind == DeviceKind::PciBridge => {
                Ok(UnitPart::Bridge { bridge: index, slot })
            }
            Place::Root(slot) => Ok(UnitPart::Function(slot)),
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
    use crate::config::Slot;

    fn parsed(texts: &[&str]) -> Vec<IommuOption> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn of(texts: &[&str]) -> Result<(IommuOption, Vec<Vec<UnitPart>>), String> {
        let slot = |device| Place::Root(Slot { device, function: 0 });
        let names = ["edu0", "nvme", "edu1", "behind", "br", "below", "br1", "deep"].map(str::to_owned);
        let behind = |bridge| Place::Bridge { bridge, slot: Slot { device: 1, function: 0 } };
        let places = [slot(1), slot(2), slot(3), Place::Port(1), slot(8), behind(4), Place::Port(2), behind(6)];
        let kinds = ["edu", "edu", "edu", "edu", "pcie-pci-bridge", "edu", "pcie-pci-bridge", "edu"];
        let devices = kinds.map(|kind| kind.parse().unwrap());
        let named = Named { devices: &devices, names: &names, places: &places, root_ports: 2 };
        units(&parsed(texts), &named).map_err(|e| e.to_string())
    }

    #[test]
    fn a13_each_unit_has_the_functions_that_are_named_by_id_or_slot() {
        let slot = |device| Slot { device, function: 0 };
        let slots = |devices: &[u8]| devices.iter().map(|device| UnitPart::Function(slot(*device))).collect();
        let plain = IommuOption::Vtd(VtdOption::default());
        assert_eq!(of(&["vtd"]), Ok((plain.clone(), vec![])));
        assert_eq!(of(&["none"]), Ok((IommuOption::None, vec![])));
        let texts = ["vtd,devices=nvme+01.0", "vtd", "vtd,devices=edu1"];
        assert_eq!(of(&texts), Ok((plain, vec![slots(&[2, 1]), slots(&[3])])));
        let (common, _) = of(&["vtd,aw-bits=39", "vtd,devices=nvme,aw-bits=39"]).unwrap();
        assert_eq!(common, IommuOption::Vtd(VtdOption { aw_bits: Some(39), ..VtdOption::default() }));
    }

    #[test]
    fn a13_a_unit_has_bridges_and_root_ports_with_all_that_is_behind_them() {
        let bridge = UnitPart::Bridge { bridge: 4, slot: Slot { device: 8, function: 0 } };
        let (one, two) = (UnitPart::Port(1), UnitPart::Port(2));
        let parts = |texts: &[&str]| of(texts).map(|(_, parts)| parts);
        assert_eq!(
            parts(&["vtd", "vtd,devices=br+port2", "vtd,devices=port1"]),
            Ok(vec![vec![bridge, two], vec![one]])
        );
        // By their slots.
        assert_eq!(parts(&["vtd", "vtd,devices=08.0+10.0+11.0"]), Ok(vec![vec![bridge, one, two]]));
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
