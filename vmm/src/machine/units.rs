//! The remapping units of a machine: each function is behind one of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use vtd::{Audit, Msi, Posting, RemapError, RemapFault, Remapped, Requester, SourceId, Unit};

use crate::acpi::dmar::{Scope, UnitDescription};
use crate::boot::layout;
use crate::config::Slot;
use crate::kvm::irq::Remapper;
use crate::kvm::memory::Ram;

/// The units.
pub(super) struct Units {
    /// The one that has every function that no other names, and the IOAPIC.
    rest: Arc<Unit<Ram>>,
    /// The others.
    further: Vec<Arc<Unit<Ram>>>,
    /// Which of those a function of bus 0 is behind.
    of: BTreeMap<SourceId, usize>,
}

/// The source id of a function of bus 0.
fn source(slot: Slot) -> SourceId {
    SourceId::new(0, slot.device, slot.function)
}

impl Units {
    /// `further` are those besides `rest`, each with its functions.
    pub fn new(rest: Arc<Unit<Ram>>, further: Vec<(Arc<Unit<Ram>>, &[Slot])>) -> Self {
        let slots = further.iter().enumerate();
        let of = slots.flat_map(|(index, (_, slots))| slots.iter().map(move |slot| (source(*slot), index))).collect();
        Self { rest, further: further.into_iter().map(|(unit, _)| unit).collect(), of }
    }

    /// The one that a function is behind. What is below root ports is named by requesters of no bus 0.
    pub fn of(&self, name: Requester) -> &Arc<Unit<Ram>> {
        self.of.get(&name.sid).map_or(&self.rest, |index| &self.further[*index])
    }

    /// The one that has every function that no other names.
    pub fn rest(&self) -> &Arc<Unit<Ram>> {
        &self.rest
    }

    /// All of them, by their numbers.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Unit<Ram>>> {
        [&self.rest].into_iter().chain(&self.further)
    }

    /// What the guest is told of them.
    pub fn describe(&self) -> Vec<UnitDescription> {
        let describe = |(index, unit): (usize, &Arc<Unit<Ram>>)| {
            let endpoint = |id: &SourceId| Scope::Endpoint((id.bus(), id.device(), id.function()));
            let scopes = match index.checked_sub(1) {
                None => vec![Scope::IoApic { id: layout::IOAPIC_ID, source: layout::IOAPIC_SOURCE }],
                Some(further) => {
                    let functions = self.of.iter().filter(|(_, unit)| **unit == further);
                    functions.map(|(id, _)| endpoint(id)).collect()
                }
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

    const SLOTS: [Slot; 3] = [slot(1), slot(2), slot(3)];

    /// A unit for the first slot, another for the next two, and the one for all others.
    fn units() -> Units {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let unit = |id| {
            let config = UnitConfig { performance_counters: true, ..UnitConfig::new(UnitId(id), 48) };
            Unit::new(config, memory.clone(), Arc::new(Nobody), Arc::new(Nobody)).unwrap()
        };
        Units::new(unit(0), vec![(unit(1), &SLOTS[..1]), (unit(2), &SLOTS[1..])])
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
        assert_eq!(units.all().map(|unit| name(unit)).collect::<Vec<_>>(), ["vtd0", "vtd1", "vtd2"]);

        let table =
            dmar::table(&Remapping { width: 46, interrupts: true, device_tlbs: false, units: units.describe() });
        let endpoint = |device: u8| [1, 8, 0, 0, 0, 0, device, device];
        let unit = |scopes: &[[u8; 8]], include_all: u8, base: u64| {
            let scopes: Vec<u8> = scopes.concat();
            let mut unit = vec![0, 0, 16 + scopes.len() as u8, 0, include_all, 2, 0, 0];
            unit.extend(base.to_le_bytes());
            unit.extend(scopes);
            unit
        };
        let expected = [
            unit(&[endpoint(1)], 0, 0xfed9_4000),
            unit(&[endpoint(2), endpoint(3)], 0, 0xfed9_8000),
            unit(&[[3, 8, 0, 0, 0, 0, 0x1f, 7]], 1, 0xfed9_0000),
        ];
        assert_eq!(table[48..], expected.concat());
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
