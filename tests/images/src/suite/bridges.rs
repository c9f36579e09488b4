//! C-5, A-16 and F-6: functions behind root ports and behind a PCIe-to-PCI bridge, whose ids are what the guest makes
//! of the buses.

use images::edu::Edu;
use images::memory::{load, page, store};
use images::pci::{MASTER, SourceId};
use images::tables::{Domain, READ_WRITE};
use images::vtd::{TRANSLATION, iotlb_pages};
use images::world::{IOVA, UNTOUCHED, WRITTEN};
use images::{World, check, check_eq, harness};

images::tests!(
    c5_functions_behind_a_bridge_share_its_context_entry
        => "--device pcie-pci-bridge,id=br,addr=08.0 --device edu,bus=br --device edu,bus=br",
    c5_bridge_behind_a_root_port
        => "--root-ports 1 --device pcie-pci-bridge,id=br,port=1 --device edu,bus=br",
    a16_buses_are_renumbered_under_dma
        => "--root-ports 1 --device edu,port=1 --device pcie-pci-bridge,id=br,addr=08.0 --device edu,bus=br",
    f6_bus_master_of_a_bridge_is_that_of_all_below
        => "--root-ports 1 --device edu,port=1 --device pcie-pci-bridge,id=br,addr=08.0 --device edu,bus=br",
    f4_reset_of_a_bus_is_one_of_its_functions
        => "--root-ports 1 --device edu,port=1 --device pcie-pci-bridge,id=br,addr=08.0 --device edu,bus=br",
);

/// Vendor and device.
const EDU: u32 = 0x11e8_1234;

fn bridge_on(bus: u8) -> SourceId {
    let found = SourceId::bridges(bus).next();
    found.unwrap_or_else(|| harness::skipped("there is no PCIe-to-PCI bridge"))
}

fn port() -> SourceId {
    SourceId::root_ports().next().unwrap_or_else(|| harness::skipped("there is no root port"))
}

fn edu_below(bridge: SourceId) -> Edu {
    Edu::on_bus(bridge.buses().0).next().unwrap_or_else(|| panic!("there is no edu behind the bridge"))
}

/// The source id of device 0 on the bus below.
fn alias(bridge: SourceId) -> SourceId {
    SourceId(u16::from(bridge.buses().0) << 8)
}

/// A unit whose root table leads to a context table for each of some buses.
struct Buses {
    world: World,
    contexts: [(u8, u64); 6],
}

impl Buses {
    fn new() -> Self {
        let world = World::recorded();
        let contexts = [1, 2, 3, 4, 5, 6].map(|bus| (bus, page()));
        for (bus, table) in contexts {
            store(world.root + 16 * u64::from(bus), table | 1);
        }
        Self { world, contexts }
    }

    /// Puts a source id into a domain.
    fn attach(&mut self, source: SourceId, domain: &Domain) {
        let bus = (source.0 >> 8) as u8;
        let table = self.contexts.iter().find(|(of, _)| *of == bus).map(|(_, table)| *table);
        let at = table.unwrap_or_else(|| panic!("bus {bus} has no table")) + 16 * u64::from(source.0 & 0xff);
        store(at, 0);
        store(at + 8, u64::from(domain.levels - 2) | u64::from(domain.id) << 8);
        store(at, domain.root | 1);
        self.world.unit.invalidate_all();
    }

    /// A domain in which [`IOVA`] leads to a page of its own, and the scratch pages of these to themselves.
    fn domain(&self, id: u16, edus: &[&Edu]) -> (Domain, u64) {
        let (domain, target) = (Domain::new(id, self.world.levels()), page());
        domain.map(IOVA, target, READ_WRITE);
        edus.iter().for_each(|edu| domain.map(edu.scratch, edu.scratch, READ_WRITE));
        (domain, target)
    }
}

/// What `edu` writes at [`IOVA`] is at `target`, and `others` stay as they are.
fn reaches(edu: &Edu, target: u64, others: &[u64]) {
    for at in others.iter().chain([&target]) {
        store(*at, UNTOUCHED);
    }
    edu.fill(WRITTEN);
    edu.dma_write(IOVA, 8);
    check_eq!(load(target), WRITTEN, "what the device wrote");
    others.iter().for_each(|at| check_eq!(load(*at), UNTOUCHED, "memory that is another id's"));
}

fn c5_functions_behind_a_bridge_share_its_context_entry() {
    let bridge = bridge_on(0);
    let mut buses = Buses::new();
    let mut edus = Edu::on_bus(bridge.buses().0);
    let (first, second) = (edus.next(), edus.next());
    let (Some(first), Some(second)) = (first, second) else { panic!("there are not two edus behind the bridge") };
    check!(first.sid != second.sid && first.sid != alias(bridge), "they have addresses of their own");
    let (shared, common) = buses.domain(1, &[&first, &second]);
    let (wrong, stray) = buses.domain(2, &[&first, &second]);
    buses.attach(alias(bridge), &shared);
    // What an entry of a function's own address says is for nobody.
    buses.attach(first.sid, &wrong);
    buses.attach(second.sid, &wrong);
    buses.world.unit.command(TRANSLATION, true);
    reaches(&first, common, &[stray]);
    reaches(&second, common, &[stray]);
    buses.world.no_fault();
    // An unmap is one of both, and what is blocked then is recorded by the bridge's id.
    shared.clear(IOVA, 1);
    buses.world.unit.invalidate(&[iotlb_pages(shared.id, IOVA, 0)]);
    for edu in [&first, &second] {
        store(common, UNTOUCHED);
        edu.dma_write(IOVA, 8);
        check_eq!(load(common), UNTOUCHED, "memory that was unmapped");
        let fault = buses.world.unit.take_fault().unwrap_or_else(|| panic!("there is no fault"));
        check_eq!((fault.source, fault.info), (alias(bridge), IOVA), "whose fault it is, and where");
    }
}

fn c5_bridge_behind_a_root_port() {
    let port = port();
    let bridge = bridge_on(port.buses().0);
    check!(port.buses().1 == bridge.buses().0, "the port leads to the bus below the bridge");
    let edu = edu_below(bridge);
    let mut buses = Buses::new();
    let (domain, target) = buses.domain(1, &[&edu]);
    let (wrong, stray) = buses.domain(2, &[&edu]);
    buses.attach(alias(bridge), &domain);
    buses.attach(alias(port), &wrong);
    buses.world.unit.command(TRANSLATION, true);
    reaches(&edu, target, &[stray]);
    // Without a number that leads through the port nothing is reached, and there is no id to record.
    let (below, last) = port.buses();
    port.set_buses(below, below);
    check_eq!(edu.sid.read(0), u32::MAX, "what is not found any more");
    store(target, UNTOUCHED);
    edu.dma_write(IOVA, 8);
    check_eq!(load(target), UNTOUCHED, "memory that a function without an id reaches");
    port.set_buses(below, last);
    reaches(&edu, target, &[stray]);
    buses.world.no_fault();
}

fn a16_buses_are_renumbered_under_dma() {
    let mut buses = Buses::new();
    for (bridge, id) in [(port(), 1), (bridge_on(0), 3)] {
        let edu = edu_below(bridge);
        let (old, new) = (alias(bridge), SourceId(0x0500));
        let (of_old, at_old) = buses.domain(id, &[&edu]);
        let (of_new, at_new) = buses.domain(id + 1, &[&edu]);
        buses.attach(old, &of_old);
        buses.attach(new, &of_new);
        buses.world.unit.command(TRANSLATION, true);
        reaches(&edu, at_old, &[at_new]);
        let (here, there) = (bridge.buses().0, 5);
        for round in 0..20 {
            let to_new = round % 2 == 0;
            let (number, now, before) = if to_new { (there, at_new, at_old) } else { (here, at_old, at_new) };
            store(now, UNTOUCHED);
            edu.fill(WRITTEN + round);
            edu.begin_write(IOVA, 4096);
            bridge.set_buses(number, number);
            // Nothing with the old id comes after the write.
            store(before, UNTOUCHED);
            edu.finish();
            check_eq!(load(before), UNTOUCHED, "memory of the old id after the change");
            let moved = SourceId(u16::from(number) << 8 | edu.sid.0 & 0xff);
            check_eq!(moved.read(0), EDU, "who is found at the new id");
            // What an assigned function asks for while it moves may be blocked.
            while buses.world.unit.take_fault().is_some() {}
            reaches(&edu, now, &[before]);
            buses.world.no_fault();
        }
        bridge.set_buses(here, here);
        buses.world.unit.command(TRANSLATION, false);
    }
}

fn f6_bus_master_of_a_bridge_is_that_of_all_below() {
    let mut buses = Buses::new();
    for (bridge, id) in [(port(), 1), (bridge_on(0), 2)] {
        let edu = edu_below(bridge);
        let (domain, target) = buses.domain(id, &[&edu]);
        buses.attach(alias(bridge), &domain);
        buses.world.unit.command(TRANSLATION, true);
        reaches(&edu, target, &[]);
        bridge.command(0, MASTER);
        store(target, UNTOUCHED);
        edu.dma_write(IOVA, 8);
        edu.dma_write(IOVA + 0x10_0000, 8);
        check_eq!(load(target), UNTOUCHED, "memory behind a bridge that forwards no requests");
        // The unit has not heard of them.
        buses.world.no_fault();
        check!(edu.command() & MASTER != 0, "the function's own bit is as it was");
        bridge.command(MASTER, 0);
        reaches(&edu, target, &[]);
        buses.world.no_fault();
        buses.world.unit.command(TRANSLATION, false);
    }
}

fn f4_reset_of_a_bus_is_one_of_its_functions() {
    for bridge in [port(), bridge_on(0)] {
        let edu = edu_below(bridge);
        check!(edu.command() & MASTER != 0, "it was enabled");
        bridge.hold_in_reset(true);
        check_eq!(edu.sid.read(0), u32::MAX, "a function that is held in reset");
        bridge.hold_in_reset(false);
        check_eq!(edu.command() & 7, 0, "the command register after a reset");
    }
}
