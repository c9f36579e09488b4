//! The remapping units of a machine: each function is behind one of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use devices::BusDevice;
use vtd::{Audit, Msi, Posting, RemapError, RemapFault, Remapped, Requester, SourceId, Unit, UnitConfig, UnitId};

use crate::acpi::dmar::{Scope, SourcePath, UnitDescription};
use crate::boot::layout;
use crate::config::{BusNumbers, DeviceKind, DeviceOption, Place, RootSlot, UnitPart, VtdOption, slot_of_port};
use crate::kvm::irq::{Remapper, ioapic_requester};
use crate::kvm::memory::Ram;

/// The unit's register window on the MMIO bus.
pub(super) struct UnitWindow(pub Arc<Unit<Ram>>);

impl BusDevice for UnitWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read(offset, data);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write(offset, data);
    }
}

/// What unit `index` of `segment` offers; addresses of guests have `width` bits, of memory `physical_bits`.
pub(super) fn config(option: &VtdOption, index: usize, segment: u16, width: u8, physical_bits: u8) -> UnitConfig {
    let mut config = UnitConfig::new(UnitId(index as u16), width);
    config.segment = segment;
    config.host_address_width = physical_bits;
    config.dma_translation = option.dma_translation;
    config.caching_mode = option.caching_mode;
    config.pass_through = option.pass_through;
    config.interrupt_remapping = option.interrupt_remapping;
    config.extended_interrupt_mode = option.extended_interrupt_mode;
    config.posted_interrupts = option.posted_interrupts;
    config.scalable = option.scalable;
    config.nested = option.nested;
    config.second_stage_dirty = option.second_stage_dirty;
    config.pasid_bits = option.pasid_bits;
    config.device_tlb = option.device_tlb;
    config.page_requests = option.page_requests;
    config.performance_counters = option.performance_counters;
    // The IOAPIC is in segment 0: in another one its id would be a function's.
    let is_with_ioapic = ioapic_requester().segment == segment;
    config.unchecked_source = (is_with_ioapic && !option.ioapic_check).then_some(ioapic_requester().sid);
    config
}

/// A unit besides the first one.
pub(super) struct MadeUnit<'a> {
    pub unit: Arc<Unit<Ram>>,
    /// What it names; nothing: it has all of its segment that no other one names.
    pub parts: &'a [UnitPart],
}

/// What a unit names: its device of bus 0, and what is behind that.
struct Part {
    source: Requester,
    scope: Scope,
    /// The numbers of buses in the names of what is behind it.
    below: Vec<u8>,
}

impl Part {
    fn new(part: UnitPart, buses: &BusNumbers, places: &[Place]) -> Self {
        let at = match part {
            UnitPart::Function(at) => at,
            UnitPart::Bridge { slot, .. } => RootSlot::first(slot),
            UnitPart::Port(number) => RootSlot::first(slot_of_port(number)),
        };
        let path = (0, at.slot.device, at.slot.function);
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
        Self { source: at.requester(), scope, below }
    }
}

/// The units.
pub(super) struct Units {
    /// The one that has every function of segment 0 that no other names, and the IOAPIC.
    rest: Arc<Unit<Ram>>,
    /// The others, with what each names, by source id.
    further: Vec<(Arc<Unit<Ram>>, Vec<Scope>)>,
    /// Which of those has every function of a segment after the first that no other names, by segment.
    rests: BTreeMap<u16, usize>,
    /// Which of those a device of a bus 0 is behind.
    of: BTreeMap<Requester, usize>,
    /// Which of those it is for what is behind a bridge or a root port, by segment and the bus in its name.
    of_buses: BTreeMap<(u16, u8), usize>,
}

impl Units {
    /// `further` are those besides `rest`, each with what it names; `buses` and `places` are the machine's.
    pub fn new(rest: Arc<Unit<Ram>>, further: Vec<MadeUnit<'_>>, buses: &BusNumbers, places: &[Place]) -> Self {
        let (rests, of, of_buses) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let mut units = Self { rest, further: Vec::new(), rests, of, of_buses };
        for (index, MadeUnit { unit, parts }) in further.into_iter().enumerate() {
            let mut parts: Vec<Part> = parts.iter().map(|part| Part::new(*part, buses, places)).collect();
            parts.sort_by_key(|part| part.source);
            if parts.is_empty() {
                units.rests.insert(unit.config().segment, index);
            }
            units.of.extend(parts.iter().map(|part| (part.source, index)));
            let below = |part: &Part| part.below.iter().map(|bus| (part.source.segment, *bus)).collect::<Vec<_>>();
            units.of_buses.extend(parts.iter().flat_map(below).map(|bus| (bus, index)));
            units.further.push((unit, parts.into_iter().map(|part| part.scope).collect()));
        }
        units
    }

    /// The one that a function is behind: one of its own segment. None, where its segment has none.
    pub fn of(&self, name: Requester) -> Option<&Arc<Unit<Ram>>> {
        let named = match name.sid.bus() {
            0 => self.of.get(&name),
            bus => self.of_buses.get(&(name.segment, bus)),
        };
        let index = named.or_else(|| self.rests.get(&name.segment));
        let of_first = Some(&self.rest).filter(|_| name.segment == 0);
        index.and_then(|index| self.further.get(*index)).map(|(unit, _)| unit).or(of_first)
    }

    /// The one that everything of segment 0 is behind that this bus number is in the name of.
    pub fn of_bus(&self, bus: u8) -> &Arc<Unit<Ram>> {
        self.of(Requester { segment: 0, sid: SourceId::new(bus, 0, 0) }).unwrap_or(&self.rest)
    }

    /// The one that has every function of segment 0 that no other names.
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
                include_all: index == 0 || self.rests.values().any(|rest| rest + 1 == index),
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

/// The functions of a bus 0 that have a device-TLB, with their segments: emulated ones, which are integrated endpoints
/// there.
pub(super) fn integrated_tlbs(devices: &[DeviceOption], places: &[Place]) -> Vec<(u16, SourcePath)> {
    let of_device = |(device, place): (&DeviceOption, &Place)| match (&device.kind, place) {
        (DeviceKind::Edu { ats: true, .. }, Place::Root(RootSlot { segment, slot })) => {
            Some((*segment, (0, slot.device, slot.function)))
        }
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
        self.of(requester).ok_or(RemapError::NoUnit(requester.segment))?.remap(requester, msi)
    }
    fn deliver(&self, requester: Requester, msi: Msi) -> Result<Option<Msi>, RemapError> {
        self.of(requester).ok_or(RemapError::NoUnit(requester.segment))?.deliver(requester, msi)
    }
    fn post(&self, requester: Requester, posting: &Posting) -> Result<Option<Msi>, RemapFault> {
        self.of(requester).map_or(Ok(None), |unit| unit.post(posting))
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
        let places = [Place::Port(2), Place::Root(RootSlot::first(slot(4)))];
        let devices = ["pcie-pci-bridge", "pcie-pci-bridge"].map(|kind| kind.parse().unwrap());
        let buses = BusNumbers::new(3, &devices, &places);
        let [one, two, three] = [1, 2, 3].map(|number| UnitPart::Function(RootSlot::first(slot(number))));
        let (first, second) = ([one, UnitPart::Bridge { bridge: 1, slot: slot(4) }], [UnitPart::Port(2), three, two]);
        let further = [(1, &first[..]), (2, &second[..])];
        let further = further.map(|(id, parts)| MadeUnit { unit: unit(id), parts });
        Units::new(unit(0), further.into(), &buses, &places)
    }

    #[test]
    fn a13_a_function_is_behind_the_unit_that_names_it_and_the_table_says_so() {
        let units = units();
        let number = |bus, device, function| {
            let name = Requester { segment: 0, sid: SourceId::new(bus, device, function) };
            units.of(name).unwrap().config().id.0
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
    fn a13_a_function_is_behind_a_unit_of_its_segment_or_none() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let unit = |id, segment| {
            let config = config(&VtdOption::default(), id, segment, 48, 48);
            Unit::new(config, memory.clone(), Arc::new(Nobody), Arc::new(Nobody)).unwrap()
        };
        let at = |segment, device| RootSlot { segment, slot: slot(device) };
        let named = [UnitPart::Function(at(1, 2))];
        // Names have bus 2 behind port 2.
        let behind_port = [UnitPart::Port(2)];
        let further = [(1, 1, &named[..]), (2, 4, &[]), (3, 1, &[]), (4, 0, &behind_port)];
        let further = further.map(|(id, segment, parts)| MadeUnit { unit: unit(id, segment), parts });
        let units = Units::new(unit(0, 0), further.into(), &BusNumbers::new(2, &[], &[]), &[]);
        let number = |segment, device| units.of(at(segment, device).requester()).map(|unit| unit.config().id.0);
        // The same id in each segment.
        assert_eq!([0, 1, 4].map(|segment| number(segment, 2)), [Some(0), Some(1), Some(2)]);
        assert_eq!(([0, 1, 4].map(|segment| number(segment, 3))), [Some(0), Some(3), Some(2)]);
        assert_eq!([number(2, 2), number(0xffff, 2)], [None, None]);
        for segment in [0, 1, 4] {
            let of = units.of(Requester { segment, sid: SourceId::new(9, 1, 0) }).unwrap();
            assert_eq!(of.config().segment, segment, "of another bus");
        }
        let of_bus = |segment| units.of(Requester { segment, sid: SourceId::new(2, 0, 0) }).unwrap().config().id.0;
        assert_eq!([0, 1, 4].map(of_bus), [4, 3, 2]);
        // What a function in no unit's segment sends goes nowhere.
        let nobody = at(2, 2).requester();
        let msi = Msi { address: 0xfee0_0000, data: 0x31 };
        assert_eq!(units.deliver(nobody, msi), Err(RemapError::NoUnit(2)));
        assert_eq!(units.remap(nobody, msi), Err(RemapError::NoUnit(2)));
        let described = units.describe();
        let seen: Vec<_> = described.iter().map(|it| (it.segment, it.include_all, it.scopes.len())).collect();
        assert_eq!(seen, [(0, true, 1), (1, false, 1), (4, true, 0), (1, true, 0), (0, false, 1)]);
    }

    #[test]
    fn a13_only_the_unit_of_segment_0_knows_the_ioapic() {
        let unchecked = VtdOption { ioapic_check: false, ..VtdOption::default() };
        let of = |segment| config(&unchecked, 1, segment, 48, 48).unchecked_source;
        assert_eq!((of(0), of(1)), (Some(ioapic_requester().sid), None));
    }

    #[test]
    fn a13_device_tlbs_of_bus_0_are_named_and_those_behind_ports_are_of_theirs() {
        let kinds = ["edu,ats=on", "edu", "edu,ats=on", "virtio-rng", "edu,ats=on,pasid=on"];
        let devices = kinds.map(|kind| kind.parse().unwrap());
        let at = |segment, number| Place::Root(RootSlot { segment, slot: slot(number) });
        let places = [at(0, 1), at(0, 2), Place::Port(1), at(0, 3), at(2, 4)];
        assert_eq!(integrated_tlbs(&devices, &places), [(0, (0, 1, 1)), (2, (0, 4, 4))]);
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
