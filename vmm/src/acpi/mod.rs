//! The ACPI tables: RSDP, XSDT, FADT with its FACS, MADT, MCFG, DSDT and, with a unit, DMAR.

pub mod dmar;
mod dsdt;

use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use devices::pci::ConfigPorts;
use devices::pit::Pit;
use devices::pm::PmBlock;
use devices::rtc::Rtc;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::byteorder::{LE, U16, U32};
use zerocopy::{Immutable, IntoBytes};

use crate::boot;
use crate::boot::layout::{self, BarWindows};
use crate::kvm::memory::Ram;
use dmar::Remapping;

/// Who made the tables.
pub const OEM_ID: [u8; 6] = *b"CAUSWY";
/// Which tables they are.
pub const OEM_TABLE_ID: [u8; 8] = *b"CAUSEWAY";
/// Their revision.
pub const OEM_REVISION: u32 = 1;

/// Legacy devices that are not there: VGA (bit 2), ASPM control (bit 4). The 8042 bit (1) is off; the clock's (5) says
/// that it is there.
const BOOT_ARCHITECTURE: u16 = 1 << 2 | 1 << 4;
/// Flags of the MADT, and where they are: there is a pair of 8259A (ACPI 6.5, section 5.2.12). Linux gives ISA
/// interrupts, and the timer's, numbers only where it believes in them.
const PCAT_COMPAT: u8 = 1 << 0;
const MADT_FLAGS: usize = 40;
/// Where each table's checksum is.
const CHECKSUM: usize = 9;

/// What the tables describe.
pub struct Description<'a> {
    /// Virtual CPUs.
    pub cpus: u8,
    /// PCI memory of each segment, the first one first.
    pub windows: &'a [BarWindows],
    /// Root ports, each with a bus of its own: 1 to this many.
    pub root_ports: u8,
    /// The highest bus number that a guest can give in segment 0. The others have bus 0 alone.
    pub last_bus: u8,
    /// The remapping units.
    pub remapping: Option<&'a Remapping>,
}

impl Description<'_> {
    /// The highest bus number that a guest can give in `segment`.
    fn last_bus_of(&self, segment: u16) -> u8 {
        if segment == 0 { self.last_bus } else { 0 }
    }
}

/// An interrupt of the ISA numbering that is not edge-triggered, active-high (ACPI 6.5, section 5.2.12.5).
#[repr(C, packed)]
#[derive(Clone, Copy, IntoBytes, Immutable)]
struct SourceOverride {
    kind: u8,
    length: u8,
    bus: u8,
    source: u8,
    gsi: U32<LE>,
    flags: U16<LE>,
}

impl Aml for SourceOverride {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.as_bytes());
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut out = Vec::new();
    table.to_aml_bytes(&mut out);
    out
}

fn io_port(port: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, port.into())
}

fn fadt(dsdt: u64, facs: u64) -> Vec<u8> {
    let base = layout::PM_BLOCK;
    let port = |offset: u64| base + offset as u16;
    let mut table = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .firmware_ctrl_32(facs as u32)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // No sleep button of the fixed kind; power button and alarm of the clock are of that kind: their flags are off.
        .flag(Flags::SlpButton)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    table.dsdt = (dsdt as u32).into();
    table.x_dsdt = dsdt.into();
    table.sci_int = (layout::SCI_GSI as u16).into();
    table.pm1a_evt_blk = u32::from(port(PmBlock::EVENT)).into();
    table.pm1a_cnt_blk = u32::from(port(PmBlock::CONTROL)).into();
    table.pm_tmr_blk = u32::from(port(PmBlock::TIMER)).into();
    table.gpe0_blk = u32::from(port(PmBlock::GPE0)).into();
    (table.pm1_evt_len, table.pm1_cnt_len, table.pm_tmr_len, table.gpe0_blk_len) = (4, 2, 4, 8);
    table.x_pm1a_evt_blk = io_port(port(PmBlock::EVENT), 32, AccessSize::WordAccess);
    table.x_pm1a_cnt_blk = io_port(port(PmBlock::CONTROL), 16, AccessSize::WordAccess);
    table.x_pm_tmr_blk = io_port(port(PmBlock::TIMER), 32, AccessSize::DwordAccess);
    table.x_gpe0_blk = io_port(port(PmBlock::GPE0), 64, AccessSize::ByteAccess);
    table.reset_reg = io_port(ConfigPorts::RESET_PORT, 8, AccessSize::ByteAccess);
    table.reset_value = ConfigPorts::RESET_VALUE;
    table.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    table.century = Rtc::CENTURY;
    // C2 and C3 are not there.
    (table.p_lvl2_lat, table.p_lvl3_lat) = (0xfff.into(), 0xfff.into());
    bytes(&table.finalize())
}

fn madt(cpus: u8) -> Vec<u8> {
    let address = LocalInterruptController::Address(layout::LOCAL_APIC as u32);
    let mut table = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, address);
    for id in 0..cpus {
        table.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    table.add_structure(IoApic::new(layout::IOAPIC_ID, layout::IOAPIC as u32, 0));
    // The timer's interrupt 0 is where PCs have it; as ISA has it: active high, edge. The SCI: active high, level.
    for (source, gsi, flags) in [(0, Pit::GSI.into(), 0x0), (layout::SCI_GSI as u8, layout::SCI_GSI, 0xd)] {
        table.add_structure(SourceOverride {
            kind: 2,
            length: 10,
            bus: 0,
            source,
            gsi: gsi.into(),
            flags: flags.into(),
        });
    }
    let mut table = bytes(&table);
    table[MADT_FLAGS] |= PCAT_COMPAT;
    table[CHECKSUM] = table[CHECKSUM].wrapping_sub(PCAT_COMPAT);
    table
}

fn mcfg(description: &Description<'_>) -> Vec<u8> {
    let mut table = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for BarWindows { segment, .. } in description.windows {
        table.add_ecam(layout::ecam_of(*segment), *segment, 0, description.last_bus_of(*segment));
    }
    bytes(&table)
}

/// Every table with its guest-physical address, the RSDP first. Addresses are all below 4 GiB.
fn tables(description: &Description<'_>) -> Vec<(u64, Vec<u8>)> {
    let mut next = layout::ACPI_TABLES + Rsdp::len() as u64;
    let mut placed = Vec::new();
    let mut place = |table: Vec<u8>| {
        let at = next.next_multiple_of(64); // what the FACS needs
        next = at + table.len() as u64;
        placed.push((at, table));
        at
    };
    let facs = place(bytes(&FACS::new()));
    let dsdt = place(dsdt::table(description));
    let mut listed = vec![place(fadt(dsdt, facs)), place(madt(description.cpus)), place(mcfg(description))];
    if let Some(remapping) = description.remapping {
        listed.push(place(dmar::table(remapping)));
    }
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    listed.into_iter().for_each(|at| xsdt.add_entry(at));
    let xsdt = place(bytes(&xsdt));
    placed.insert(0, (layout::ACPI_TABLES, bytes(&Rsdp::new(OEM_ID, xsdt))));
    placed
}

/// Writes the tables. Gives back the address of the RSDP.
pub fn write(ram: &Ram, description: &Description<'_>) -> Result<u64, boot::Error> {
    let error = |reason: String| boot::Error::Write { what: "the ACPI tables", reason };
    for (at, table) in tables(description) {
        if at + table.len() as u64 > layout::ACPI_LAST + 1 {
            return Err(error("they are too long".into()));
        }
        ram.write_slice(&table, GuestAddress(at)).map_err(|e| error(e.to_string()))?;
    }
    Ok(layout::ACPI_TABLES)
}

#[cfg(test)]
#[path = "acpi_test.rs"]
mod acpi_test;
