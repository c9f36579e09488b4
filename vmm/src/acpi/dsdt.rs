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

use crate::acpi::{Description, OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::boot::layout::{self, BarWindows, Window};

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

/// The root bridge of the segment with these windows.
fn root_bridge(sink: &mut dyn AmlSink, description: &Description<'_>, windows: &BarWindows) {
    let BarWindows { segment, low: Window { first, last }, high } = *windows;
    let is_first = segment == 0;
    let memory = AddressSpaceCacheable::NotCacheable;
    let buses = AddressSpace::new_bus_number(0u16, description.last_bus_of(segment).into());
    let config_ports = IO::new(0xcf8, 0xcf8, 1, 8);
    let low_ports = AddressSpace::new_io(0u16, 0xcf7, None);
    let high_ports = AddressSpace::new_io(0xd00u16, 0xffff, None);
    let window32 = AddressSpace::new_memory(memory, true, first as u32, last as u32, None);
    let window64 = high.map(|window| AddressSpace::new_memory(memory, true, window.first, window.last, None));
    let mut resources: Vec<&dyn Aml> = vec![&buses];
    // There is one space of ports, which is segment 0's; so is the way to configuration space by them.
    if is_first {
        resources.extend([&config_ports as &dyn Aml, &low_ports, &high_ports]);
    }
    resources.push(&window32);
    if let Some(window) = &window64 {
        resources.push(window);
    }
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0A08"));
    let cid = Name::new("_CID".into(), &EISAName::new("PNP0A03"));
    let numbers = [("_UID", segment), ("_SEG", segment), ("_BBN", 0)];
    let numbers = numbers.map(|(name, number)| Name::new(name.into(), &number));
    let ecam = Name::new("_CBA".into(), &(layout::ecam_of(segment) as u32));
    let current = Name::new("_CRS".into(), &ResourceTemplate::new(resources));
    let routing = Name::new("_PRT".into(), &interrupt_routing());
    let mut children: Vec<&dyn Aml> = vec![&hid, &cid];
    children.extend(numbers.iter().map(|number| number as &dyn Aml));
    children.extend([&current as &dyn Aml, &routing]);
    // MCFG says it of all of them; for others than the first here, too, as of a bridge that a guest can find later.
    if !is_first {
        children.push(&ecam);
    }
    // Where there is nothing to be plugged a guest is asked for nothing. Root ports are in segment 0.
    if is_first && description.root_ports > 0 {
        children.push(&OperatingSystemCapabilities);
    }
    Device::new(format!("PCI{segment}").as_str().into(), children).to_aml_bytes(sink);
}

fn reserved(sink: &mut dyn AmlSink, description: &Description<'_>) {
    let power = IO::new(layout::PM_BLOCK, layout::PM_BLOCK, 1, PmBlock::LEN as u8);
    let ecam = description.windows.iter().map(|BarWindows { segment, .. }| {
        let size = layout::ecam_size(description.last_bus_of(*segment));
        Memory32Fixed::new(true, layout::ecam_of(*segment) as u32, size as u32)
    });
    let ecam: Vec<Memory32Fixed> = ecam.collect();
    let units = Memory32Fixed::new(
        true,
        layout::VTD_UNIT as u32,
        (layout::unit_base(layout::MAX_UNITS) - layout::VTD_UNIT) as u32,
    );
    let mut resources: Vec<&dyn Aml> = vec![&power];
    resources.extend(ecam.iter().map(|ecam| ecam as &dyn Aml));
    resources.push(&units);
    Device::new(
        "RSVD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
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
pub fn table(description: &Description<'_>) -> Vec<u8> {
    let mut system_bus = Vec::new();
    description.windows.iter().for_each(|windows| root_bridge(&mut system_bus, description, windows));
    reserved(&mut system_bus, description);
    serial(&mut system_bus);
    clock(&mut system_bus);
    let mut body = Scope::raw("_SB_".into(), system_bus);
    let sleep_type = PmBlock::SLP_TYP_S5;
    Name::new("_S5_".into(), &Package::new(vec![&sleep_type, &ZERO, &ZERO, &ZERO])).to_aml_bytes(&mut body);

    let mut sdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    sdt.append_slice(&body);
    sdt.as_slice().to_vec()
}
