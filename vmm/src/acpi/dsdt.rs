//! The DSDT: the PCI root bridge with its windows and interrupt routing, what is reserved, the serial port, and \_S5.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal, IO, If, Interrupt,
    Local, Memory32Fixed, Method, Name, NotEqual, ONE, Or, Package, PackageBuilder, Path, ResourceTemplate, Return,
    Scope, Store, Uuid, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};
use devices::pci::gsi_of;
use devices::pm::PmBlock;
use devices::rtc::Rtc;
use devices::serial::SerialPort;

use crate::acpi::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::boot::layout::{self, Window};

/// The interrupt of every pin of every device of bus 0.
fn interrupt_routing() -> PackageBuilder {
    let mut table = PackageBuilder::new();
    for device in 0..32u8 {
        for pin in 0..4u8 {
            let address = u32::from(device) << 16 | 0xffff;
            let gsi = gsi_of(device, pin + 1);
            table.add_element(&Package::new(vec![&address, &pin, &ZERO, &gsi]));
        }
    }
    table
}

/// What `_OSC` gives to the guest (PCI Firmware specification 3.3, section 4.5.1): native hot-plug, and the PCI Express
/// capability, without which there is none. The ports have no AER, and nothing sends power-management events.
const GRANTED: u32 = 1 << 0 | 1 << 4;

/// `_OSC` of the root bridge.
struct OperatingSystemCapabilities;

impl Aml for OperatingSystemCapabilities {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let (status, controls) = (Path::new("CDW1"), Path::new("CDW3"));
        let uuid = Uuid::new("33DB4D5B-1FF7-401C-9657-7441C03DD766");
        // Another revision, less granted than was asked for, another kind of bridge.
        let (revision, masked, unknown) = (0x08u8, 0x10u8, 0x04u8);
        let status_field = CreateDWordField::new(&status, &Arg(3), &0u8);
        let control_field = CreateDWordField::new(&controls, &Arg(3), &8u8);
        let granted = And::new(&Local(0), &controls, &GRANTED);
        let set_revision = Or::new(&status, &status, &revision);
        let other_revision = NotEqual::new(&Arg(1), &ONE);
        let if_revision = If::new(&other_revision, vec![&set_revision]);
        let set_masked = Or::new(&status, &status, &masked);
        let less = NotEqual::new(&Local(0), &controls);
        let if_less = If::new(&less, vec![&set_masked]);
        let answer = Store::new(&controls, &Local(0));
        let known = Equal::new(&Arg(0), &uuid);
        let if_known = If::new(&known, vec![&control_field, &granted, &if_revision, &if_less, &answer]);
        let set_unknown = Or::new(&status, &status, &unknown);
        let otherwise = Else::new(vec![&set_unknown]);
        let give = Return::new(&Arg(3));
        Method::new("_OSC".into(), 4, true, vec![&status_field, &if_known, &otherwise, &give]).to_aml_bytes(sink);
    }
}

fn root_bridge(sink: &mut dyn AmlSink, pci64: Option<Window>, hot_plug: bool, last_bus: u8) {
    let memory = AddressSpaceCacheable::NotCacheable;
    let buses = AddressSpace::new_bus_number(0u16, last_bus.into());
    let config_ports = IO::new(0xcf8, 0xcf8, 1, 8);
    let low_ports = AddressSpace::new_io(0u16, 0xcf7, None);
    let high_ports = AddressSpace::new_io(0xd00u16, 0xffff, None);
    let window32 = AddressSpace::new_memory(memory, true, layout::PCI32_FIRST as u32, layout::PCI32_LAST as u32, None);
    let window64 = pci64.map(|window| AddressSpace::new_memory(memory, true, window.first, window.last, None));
    let mut resources: Vec<&dyn Aml> = vec![&buses, &config_ports, &low_ports, &high_ports, &window32];
    if let Some(window) = &window64 {
        resources.push(window);
    }
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0A08"));
    let cid = Name::new("_CID".into(), &EISAName::new("PNP0A03"));
    let numbers = ["_UID", "_SEG", "_BBN"].map(|name| Name::new(name.into(), &ZERO));
    let current = Name::new("_CRS".into(), &ResourceTemplate::new(resources));
    let routing = Name::new("_PRT".into(), &interrupt_routing());
    let mut children: Vec<&dyn Aml> = vec![&hid, &cid];
    children.extend(numbers.iter().map(|number| number as &dyn Aml));
    children.extend([&current as &dyn Aml, &routing]);
    // Where there is nothing to be plugged a guest is asked for nothing.
    if hot_plug {
        children.push(&OperatingSystemCapabilities);
    }
    Device::new("PCI0".into(), children).to_aml_bytes(sink);
}

fn reserved(sink: &mut dyn AmlSink, last_bus: u8) {
    let power = IO::new(layout::PM_BLOCK, layout::PM_BLOCK, 1, PmBlock::LEN as u8);
    let ecam = Memory32Fixed::new(true, layout::ECAM as u32, layout::ecam_size(last_bus) as u32);
    let units = Memory32Fixed::new(
        true,
        layout::VTD_UNIT as u32,
        (layout::unit_base(layout::MAX_UNITS) - layout::VTD_UNIT) as u32,
    );
    Device::new(
        "RSVD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&power, &ecam, &units])),
        ],
    )
    .to_aml_bytes(sink);
}

fn serial(sink: &mut dyn AmlSink) {
    let ports = IO::new(SerialPort::FIRST as u16, SerialPort::FIRST as u16, 1, 8);
    let interrupt = Interrupt::new(true, true, false, false, SerialPort::GSI.into());
    Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &interrupt])),
        ],
    )
    .to_aml_bytes(sink);
}

fn clock(sink: &mut dyn AmlSink) {
    let ports = IO::new(Rtc::FIRST as u16, Rtc::FIRST as u16, 1, 2);
    let interrupt = Interrupt::new(true, true, false, false, Rtc::GSI.into());
    Device::new(
        "RTC0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &interrupt])),
        ],
    )
    .to_aml_bytes(sink);
}

/// The whole table.
pub fn table(pci64: Option<Window>, hot_plug: bool, last_bus: u8) -> Vec<u8> {
    let mut system_bus = Vec::new();
    root_bridge(&mut system_bus, pci64, hot_plug, last_bus);
    reserved(&mut system_bus, last_bus);
    serial(&mut system_bus);
    clock(&mut system_bus);
    let mut body = Scope::raw("_SB_".into(), system_bus);
    let sleep_type = PmBlock::SLP_TYP_S5;
    Name::new("_S5_".into(), &Package::new(vec![&sleep_type, &ZERO, &ZERO, &ZERO])).to_aml_bytes(&mut body);

    let mut sdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    sdt.append_slice(&body);
    sdt.as_slice().to_vec()
}
