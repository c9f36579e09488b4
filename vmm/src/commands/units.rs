//! Several `--iommu vtd`: which functions each unit has.

use crate::boot::layout;
use crate::commands::options::BadOption;
use crate::config::{IommuOption, Place, Slot, VtdOption};

fn bad<T>(message: impl Into<String>) -> Result<T, BadOption> {
    Err(BadOption::new(message))
}

/// What the units have in common, and of each but the one that has all others its functions, in the order of the
/// command line. `names` and `places` are the devices'.
pub fn units(
    options: &[IommuOption],
    names: &[String],
    places: &[Place],
) -> Result<(IommuOption, Vec<Vec<Slot>>), BadOption> {
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
        let mut slots = Vec::with_capacity(unit.devices.len());
        for device in &unit.devices {
            let slot = slot_of(device, names, places)?;
            if taken.contains(&slot) {
                return bad(format!("devices={device} is named twice"));
            }
            taken.push(slot);
            slots.push(slot);
        }
        of_units.push(slots);
    }
    Ok((IommuOption::Vtd(rest.clone()), of_units))
}

/// Where the device with this id, or at this slot, is.
fn slot_of(device: &str, names: &[String], places: &[Place]) -> Result<Slot, BadOption> {
    let named = names.iter().zip(places).find(|(name, _)| *name == device).map(|(_, place)| *place);
    let at = |place: &&Place| matches!(place, Place::Root(slot) if slot.to_string() == device);
    match named.or_else(|| places.iter().find(at).copied()) {
        Some(Place::Root(slot)) => Ok(slot),
        Some(Place::Port(port)) => bad(format!(
            "devices={device}: it is behind root port {port}, and those belong to the unit without devices="
        )),
        Some(Place::Bridge { .. }) => {
            bad(format!("devices={device}: it is behind a bridge, and those belong to the unit without devices="))
        }
        None => bad(format!("devices={device}: there is no such device on bus 0, by its id or by its slot")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(texts: &[&str]) -> Vec<IommuOption> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn of(texts: &[&str]) -> Result<(IommuOption, Vec<Vec<Slot>>), String> {
        let slot = |device| Place::Root(Slot { device, function: 0 });
        let names = ["edu0", "nvme", "edu1", "port"].map(str::to_owned);
        let places = [slot(1), slot(2), slot(3), Place::Port(1)];
        units(&parsed(texts), &names, &places).map_err(|e| e.to_string())
    }

    #[test]
    fn a13_each_unit_has_the_functions_that_are_named_by_id_or_slot() {
        let slots = |devices: &[u8]| devices.iter().map(|device| Slot { device: *device, function: 0 }).collect();
        let plain = IommuOption::Vtd(VtdOption::default());
        assert_eq!(of(&["vtd"]), Ok((plain.clone(), vec![])));
        assert_eq!(of(&["none"]), Ok((IommuOption::None, vec![])));
        let texts = ["vtd,devices=nvme+01.0", "vtd", "vtd,devices=edu1"];
        assert_eq!(of(&texts), Ok((plain, vec![slots(&[2, 1]), slots(&[3])])));
        let (common, _) = of(&["vtd,aw-bits=39", "vtd,devices=nvme,aw-bits=39"]).unwrap();
        assert_eq!(common, IommuOption::Vtd(VtdOption { aw_bits: Some(39), ..VtdOption::default() }));
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
            (&["vtd", "vtd,devices=port"], "root port 1"),
            (&["vtd", "vtd,devices=other"], "no such device"),
            (&["vtd", "vtd,devices=04.0"], "no such device"),
            (&many, "at most 8 units"),
        ] {
            let error = of(texts).unwrap_err();
            assert!(error.contains(part), "{texts:?}: {error}");
        }
    }
}
