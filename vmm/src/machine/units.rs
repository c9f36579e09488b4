//! The remapping units of a machine: each function is behind one of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use vtd::{Audit, Msi, Posting, RemapError, RemapFault, Remapped, Requester, SourceId, Unit};

use crate::acpi::dmar::{Scope, SourcePath, UnitDescription};
use crate::boot::layout;
use crate::config::{BusNumbers, DeviceKind, DeviceOption, Place, UnitPart, slot_of_port};
use crate::kvm::irq::Remapper;
use crate::kvm::memory::Ram;

/// What a unit names: its device of bus 0, and what is behind that.
struct Part {
    source: SourceId,
    scope: Scope,
    /// The numbers of buses in the names of what is behind it.
    below: Vec<u8>,
}

impl Part {
    fn new(part: UnitPart, buses: &BusNumbers, places: &[Place]) -> Self {
        let slot = match part {
            UnitPart::Function(slot) | UnitPart::Bridge { slot, .. } => slot,
            UnitPart::Port(number) => slot_of_port(number),
        };
        let path = (0, slot.device, slot.function);
        let scope = match part {
            UnitPart::Function(_) => Scope::Endpoint(path),
            UnitPart::Bridge { .. } | UnitPart::Port(_) => Scope::Bridge(path),
        };
        let below = match part {
            UnitPart::Function(_) => Vec::new(),
            UnitPart::Bridge { bridge, .. } => buses.bridges.get(&bridge).copied().into_iter().collect(),
            UnitPart::Port(number) => {
                let of_port = usize::from(number).checked_sub(1).and_then(|index| buses.ports.get(index));
                let is_behind = |(index, _): &(&usize, &u8)| places.get(**index) == Some(&Place::Port(number));
                let bridges = buses.bridges.iter().filter(is_behind).map(|(_, bus)| bus);
                of_port.into_iter().chain(bridges).copied().collect()
            }
        };
        Self { source: SourceId::new(0, slot.device, slot.function), scope, below }
    }
}

/// The units.
pub(super) struct Units {
    /// The one that has every function that no other names, and the IOAPIC.
    rest: Arc<Unit<Ram>>,
    /// The others, with what each names, by source id.
    further: Vec<(Arc<Unit<Ram>>, Vec<Scope>)>,
    /// Which of those a device of bus 0 is behind.
    of: BTreeMap<SourceId, usize>,
    /// Which of those it is for what is behind a bridge or a root port, by the bus in its name.
    of_buses: BTreeMap<u8, usize>,
}

impl Units {
    /// `further` are those besides `rest`, each with what it names; `buses` and `places` are the machine's.
    pub fn new(
        rest: Arc<Unit<Ram>>,
        further: Vec<(Arc<Unit<Ram>>, &[UnitPart])>,
        buses: &BusNumbers,
        places: &[Place],
    ) -> Self {
        let mut units = Self { rest, further: Vec::new(), of: BTreeMap::new(), of_buses: BTreeMap::new() };
        for (index, (unit, parts)) in further.into_iter().enumerate() {
            let mut parts: Vec<Part> = parts.iter().map(|part| Part::new(*part, buses, places)).collect();
            parts.sort_by_key(|part| part.source);
            units.of.extend(parts.iter().map(|part| (part.source, index)));
            units.of_buses.extend(parts.iter().flat_map(|part| &part.below).map(|bus| (*bus, index)));
            units.further.push((unit, parts.into_iter().map(|part| part.scope).collect()));
        }
        units
    }

    /// The one that a function is behind.
    pub fn of(&self, name: Requester) -> &Arc<Unit<Ram>> {
        let index = match name.sid.bus() {
            0 => self.of.get(&name.sid),
            bus => self.of_buses.get(&bus),
        };
        index.map_or(&self.rest, |index| &self.further[*index].0)
    }

    /// The one that everything is behind that this bus number is in the name of.
    pub fn of_bus(&self, bus: u8) -> &Arc<Unit<Ram>> {
        self.of(Requester { segment: 0, sid: SourceId::new(bus, 0, 0) })
    }

    /// The one that has every function that no other names.
    pub fn rest(&self) -> &Arc<Unit<Ram>> {
        &self.rest
    }

    /// All of them, by their numbers.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Unit<Ram>>> {
        [&self.rest].into_iter().chain(self.further.iter().map(|(unit, _)| unit))
    }

    /// What the guest is told of them.
    pub fn describe(&self) -> Vec<UnitDescription> {
        let describe = |(index, unit): (usize, &Arc<Unit<Ram>>)| {
            let scopes = match index.checked_sub(1) {
                None => vec![Scope::IoApic { id: layout::IOAPIC_ID, source: layout::IOAPIC_SOURCE }],
                Some(further) => self.further[further].1.clone(),
            };
            let config = unit.config();
            UnitDescription {
                segment: config.segment,
                base: layout::unit_base(index),
                window: config.register_window(),
                include_all: index == 0,
                scopes,
            }
        };
        self.all().enumerate().map(describe).collect()
    }

    /// What an audit of each found, together.
    pub fn audit(&self, mut audit: impl FnMut(&Arc<Unit<Ram>>) -> Audit) -> Audit {
        let mut whole = Audit::default();
        for Audit { checked, pending, differences, more } in self.all().map(&mut audit) {
            whole.checked += checked;
            whole.pending += pending;
            differences.into_iter().for_each(|difference| whole.differ(difference));
            whole.more += more;
        }
        whole
    }
}

/// The functions of bus 0 that have a device-TLB: emulated ones, which are integrated endpoints there.
pub(super) fn integrated_tlbs(devices: &[DeviceOption], places: &[Place]) -> Vec<SourcePath> {
    let of_device = |(device, place): (&DeviceOption, &Place)| match (&device.kind, place) {
        (DeviceKind::Edu { ats: true, .. }, Place::Root(slot)) => Some((0, slot.device, slot.function)),
        _ => None,
    };
    devices.iter().zip(places).filter_map(of_device).collect()
}

/// What statistics, and whoever shows them, call a unit.
pub(super) fn name(unit: &Unit<Ram>) -> String {
    format!("vtd{}", unit.config().id.0)
}

impl Remapper for Units {
    fn remap(&self, requester: Requester, msi: Msi) -> Result<Remapped, RemapError> {
        self.of(requester).remap(requester, msi)
    }
    fn deliver(&self, requester: Requester, msi: Msi) -> Result<Option<Msi>, RemapError> {
        self.of(requester).deliver(requester, msi)
    }
    fn post(&self, requester: Requester, posting: &Posting) -> Result<Option<Msi>, RemapFault> {
        self.of(requester).post(posting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::acpi::dmar::{self, Remapping};
    use crate::config::Slot;
    use vm_memory::{GuestAddress, GuestMemoryMmap};
    use vtd::{
        Applied, AttachRefused, Difference, MapOp, Mapping, MsiSink, SpaceKey, SpaceListener, Stream, UnitConfig,
        UnitId,
    };

    struct Nobody;

    impl SpaceListener for Nobody {
        fn attach(&self, _: Stream, _: &SpaceKey, _: &mut dyn Iterator<Item = Mapping>) -> Result<(), AttachRefused> {
            Ok(())
        }
        fn detach(&self, _: Stream) {}
        fn apply(&self, _: &SpaceKey, _: &[MapOp]) -> Applied {
            Applied::default()
        }
    }

    impl MsiSink for Nobody {
        fn signal(&self, _: Msi) {}
    }

    const fn slot(number: u8) -> Slot {
        Slot { device: number, function: number }
    }

    /// A unit for the first slot, another for the next two and root port 2, and the one for all others. Of the devices
    /// one is a bridge behind that port, and one a bridge of bus 0, which is the first unit's.
    fn units() -> Units {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let unit = |id| {
            let config = UnitConfig { performance_counters: true, ..UnitConfig::new(UnitId(id), 48) };
            Unit::new(config, memory.clone(), Arc::new(Nobody), Arc::new(Nobody)).unwrap()
        };
        let places = [Place::Port(2), Place::Root(slot(4))];
        let devices = ["pcie-pci-bridge", "pcie-pci-bridge"].map(|kind| kind.parse().unwrap());
        let buses = BusNumbers::new(3, &devices, &places);
        let [one, two, three] = [1, 2, 3].map(|number| UnitPart::Function(slot(number)));
        let (first, second) = ([one, UnitPart::Bridge { bridge: 1, slot: slot(4) }], [UnitPart::Port(2), three, two]);
        Units::new(unit(0), vec![(unit(1), &first[..]), (unit(2), &second[..])], &buses, &places)
    }

    #[test]
    fn a13_a_function_is_behind_the_unit_that_names_it_and_the_table_says_so() {
        let units = units();
        let number = |bus, device, function| {
            let name = Requester { segment: 0, sid: SourceId::new(bus, device, function) };
            units.of(name).config().id.0
        };
        assert_eq!([number(0, 1, 1), number(0, 2, 2), number(0, 3, 3)], [1, 2, 2]);
        // Another function of such a slot, one of another bus, and the IOAPIC.
        assert_eq!([number(0, 1, 0), number(1, 1, 1), number(0, 0x1f, 7)], [0, 0, 0]);
        // Names have bus 1 behind the first port, 2 behind the second, 3 behind the bridge there, 4 behind the third
        // port, and 5 behind the bridge of bus 0. Ports and bridges themselves make requests, too: of interrupts.
        assert_eq!([1, 2, 3, 4, 5].map(|bus| number(bus, 0, 0)), [0, 2, 2, 0, 1]);
        assert_eq!([number(0, 0x10, 0), number(0, 0x11, 0), number(0, 4, 4)], [0, 2, 1]);
        assert_eq!(units.of_bus(3).config().id.0, 2);
        assert_eq!(units.all().map(|unit| name(unit)).collect::<Vec<_>>(), ["vtd0", "vtd1", "vtd2"]);

        let table = dmar::table(&Remapping {
            width: 46,
            interrupts: true,
            device_tlbs: false,
            integrated_tlbs: vec![],
            units: units.describe(),
        });
        let endpoint = |device: u8| [1, 8, 0, 0, 0, 0, device, device];
        let bridge = |device: u8, function: u8| [2, 8, 0, 0, 0, 0, device, function];
        let unit = |scopes: &[[u8; 8]], include_all: u8, base: u64| {
            let scopes: Vec<u8> = scopes.concat();
            let mut unit = vec![0, 0, 16 + scopes.len() as u8, 0, include_all, 2, 0, 0];
            unit.extend(base.to_le_bytes());
            unit.extend(scopes);
            unit
        };
        let expected = [
            unit(&[endpoint(1), bridge(4, 4)], 0, 0xfed9_4000),
            unit(&[endpoint(2), endpoint(3), bridge(0x11, 0)], 0, 0xfed9_8000),
            unit(&[[3, 8, 0, 0, 0, 0, 0x1f, 7]], 1, 0xfed9_0000),
        ];
        assert_eq!(table[48..], expected.concat());
    }

    #[test]
    fn a13_device_tlbs_of_bus_0_are_named_and_those_behind_ports_are_of_theirs() {
        let kinds = ["edu,ats=on", "edu", "edu,ats=on", "virtio-rng", "edu,ats=on,pasid=on"];
        let devices = kinds.map(|kind| kind.parse().unwrap());
        let places = [Place::Root(slot(1)), Place::Root(slot(2)), Place::Port(1), Place::Root(slot(3))];
        let places = places.into_iter().chain([Place::Root(slot(4))]).collect::<Vec<_>>();
        assert_eq!(integrated_tlbs(&devices, &places), [(0, 1, 1), (0, 4, 4)]);
    }

    #[test]
    fn a13_an_audit_is_of_all_units() {
        let units = units();
        let whole = units.audit(|unit| Audit {
            checked: 1 << unit.config().id.0,
            pending: 1,
            differences: vec![Difference::Other(name(unit))],
            more: 2,
        });
        let differences = ["vtd0", "vtd1", "vtd2"].map(|name| Difference::Other(name.to_owned())).to_vec();
        assert_eq!(whole, Audit { checked: 7, pending: 3, differences, more: 6 });
    }
}
