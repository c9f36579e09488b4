//! A function of the host, or of another process: what there is of it, and how it is opened, used and reset.

pub(crate) mod check;
pub(crate) mod reset;
pub(crate) mod vfio;

use vfio_bindings::bindings::vfio::{
    VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_INTX_IRQ_INDEX,
    VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX, VFIO_PCI_ROM_REGION_INDEX,
};

use crate::bridge::guest_map::PAGE_SIZE;

/// A region of the function.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RegionKind {
    /// Base address register 0 to 5.
    Bar(u8),
    /// The expansion ROM.
    Rom,
    /// Configuration space.
    Config,
}

impl RegionKind {
    /// The region with VFIO's index `index`, if it is one of these.
    pub(crate) fn of_index(index: u32) -> Option<Self> {
        let bars = (0..6).map(Self::Bar);
        bars.chain([Self::Rom, Self::Config]).find(|region| region.index() == index)
    }

    pub(crate) fn index(self) -> u32 {
        match self {
            Self::Bar(n) => VFIO_PCI_BAR0_REGION_INDEX + u32::from(n.min(5)),
            Self::Rom => VFIO_PCI_ROM_REGION_INDEX,
            Self::Config => VFIO_PCI_CONFIG_REGION_INDEX,
        }
    }
}

/// What VFIO says about a region.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RegionInfo {
    /// Length in bytes; 0 when the function has no such region.
    pub size: u64,
    /// Where it starts in the device file.
    pub file_offset: u64,
    /// Whether it can be read.
    pub readable: bool,
    /// Whether it can be written.
    pub writable: bool,
    /// The parts that can be mapped: offset in the region and length, whole pages, ascending. MSI-X tables are left
    /// out by hosts that do not let them be mapped.
    pub mappable: Vec<(u64, u64)>,
}

/// A kind of interrupt of the function.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum IrqKind {
    /// The legacy line.
    Intx,
    /// MSI.
    Msi,
    /// MSI-X.
    Msix,
    /// The device reported an uncorrectable error.
    Error,
    /// The host wants the device back.
    Request,
}

impl IrqKind {
    /// All, in the order of their indices in VFIO.
    pub(crate) const ALL: [Self; 5] = [Self::Intx, Self::Msi, Self::Msix, Self::Error, Self::Request];

    /// The kind with VFIO's index `index`.
    pub(crate) fn of_index(index: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.index() == index)
    }

    pub(crate) fn index(self) -> u32 {
        match self {
            Self::Intx => VFIO_PCI_INTX_IRQ_INDEX,
            Self::Msi => VFIO_PCI_MSI_IRQ_INDEX,
            Self::Msix => VFIO_PCI_MSIX_IRQ_INDEX,
            Self::Error => VFIO_PCI_ERR_IRQ_INDEX,
            Self::Request => VFIO_PCI_REQ_IRQ_INDEX,
        }
    }
}

/// Of the areas that a region of `size` bytes offers for mapping, those that can be: whole pages inside it. In
/// ascending order.
pub(crate) fn mappable_pages(size: u64, areas: impl IntoIterator<Item = (u64, u64)>) -> Vec<(u64, u64)> {
    let whole = |(offset, len): &(u64, u64)| *len > 0 && (offset | len).is_multiple_of(PAGE_SIZE);
    let inside = |(offset, len): &(u64, u64)| offset.checked_add(*len).is_some_and(|end| end <= size);
    let mut pages: Vec<(u64, u64)> = areas.into_iter().filter(|area| whole(area) && inside(area)).collect();
    pages.sort_unstable();
    pages
}
