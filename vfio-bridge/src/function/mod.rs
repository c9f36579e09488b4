//! A function of the host, or of another process: what there is of it, and how it is opened, used and reset.

pub(crate) mod check;
pub(crate) mod group_files;
pub(crate) mod of_iommufd;
pub(crate) mod reset;
mod sys;
pub(crate) mod vfio;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vfio_bindings::bindings::vfio::{
    VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_INTX_IRQ_INDEX,
    VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX, VFIO_PCI_ROM_REGION_INDEX,
};

use serde::Serialize;
use vmm_sys_util::eventfd::EventFd;
use vtd::Iova;

use self::check::Bdf;
use self::reset::{ResetScope, ResetWay};
use crate::bridge::guest_map::PAGE_SIZE;
use crate::host::{GroupId, HostDevice};

/// An assigned function, open. [`crate::HostFunction`] is one of the host, [`crate::vfio_user::UserFunction`] one that
/// another process emulates.
pub trait Function: Send + Sync {
    /// What messages call it.
    fn name(&self) -> String;
    /// Its group.
    fn group(&self) -> GroupId;
    /// Its address on the host, if it has one.
    fn bdf(&self) -> Option<Bdf> {
        None
    }

    /// Which device of its host it is, if its PASIDs may be attached there (C-4).
    fn device(&self) -> Option<HostDevice> {
        None
    }

    /// What is known of `region`.
    fn region(&self, region: RegionKind) -> RegionInfo;
    /// Reads `data.len()` bytes at `offset` of `region`. What cannot be read is all ones, as on a bus where nobody
    /// answers.
    fn read(&self, region: RegionKind, offset: u64, data: &mut [u8]);
    /// Writes `data` at `offset` of `region`. What cannot be written is dropped; the result says so.
    fn write(&self, region: RegionKind, offset: u64, data: &[u8]) -> io::Result<()>;
    /// The file whose parts become windows into `region`, at [`RegionInfo::file_offset`]; without one nothing of it is
    /// mapped into the guest.
    fn file(&self, region: RegionKind) -> Option<Arc<OwnedFd>>;

    /// A dma-buf of `len` bytes at `offset` of `region`, whole pages in one of [`RegionInfo::mappable`]: by such a file
    /// iommufd maps it for the DMA of others (B-10). While the function's memory is disabled nothing is reached by it.
    /// `None` where the host makes none, or nobody needs it.
    fn dma_buf(&self, _region: RegionKind, _offset: u64, _len: u64) -> Option<Arc<File>> {
        None
    }

    /// How many vectors of `kind` the function has; 0 when it has none or they cannot signal an eventfd.
    fn irq_count(&self, kind: IrqKind) -> u32;
    /// Whether all vectors of `kind` that are ever to be used must be there when it is enabled (F-5). Else each can be
    /// added alone.
    fn irq_noresize(&self, kind: IrqKind) -> bool;
    /// Vectors `start..start + triggers.len()` of `kind` signal these eventfds from now on, `None`: nobody. The first
    /// call enables the kind. After an error none of these vectors signals anybody.
    fn set_irqs(&self, kind: IrqKind, start: u32, triggers: &[Option<&EventFd>]) -> io::Result<()>;
    /// Disables `kind` altogether.
    fn disable_irqs(&self, kind: IrqKind) -> io::Result<()>;
    /// Masks the legacy line, as the host does when it fires. [`io::ErrorKind::Unsupported`] where it is never masked.
    fn mask_intx(&self) -> io::Result<()>;
    /// Unmasks the legacy line, which is masked each time it fires.
    fn unmask_intx(&self) -> io::Result<()>;

    /// How [`Function::reset`] resets the function, if it can.
    fn reset_way(&self) -> ResetWay;
    /// Resets the function, and no other one that is not in `scope`; its configuration space is afterwards what it was
    /// before. [`io::ErrorKind::Unsupported`] where no way is there.
    fn reset(&self, scope: ResetScope) -> io::Result<()>;

    /// Whether another process emulates it. No IOMMU stands before such a process: unless it is confined, it is given
    /// the guest's memory and trusted to use only what is mapped.
    fn is_emulated(&self) -> bool {
        false
    }
    /// From now on `requests` hears of what the function asks for by message and has no mapping for. Only one that is
    /// emulated sends messages.
    fn tell(&self, _requests: Arc<dyn Requests>) {}
    /// Whether its process has no file of the guest's memory, so that each of its accesses is a message.
    fn is_confined(&self) -> bool {
        false
    }
    /// Whether its process is gone, for good.
    fn is_gone(&self) -> bool {
        false
    }
    /// `event` is signalled when its process is gone, now if it is. Only of one that is emulated.
    fn wake_when_gone(&self, _event: EventFd) {}
    /// What it asked for by message; `None` for one that sends none.
    fn dma_messages(&self) -> Option<DmaMessages> {
        None
    }

    /// Its state, if that can be given to another function of its kind. Asks at the first call.
    fn migration(&self) -> Option<&dyn Migrates> {
        None
    }
}

/// A function whose state can be taken out of it, and put into another one.
pub trait Migrates {
    /// Comes to rest. When this returns, no DMA and no interrupt of it is under way, and it begins none until
    /// [`Migrates::go_on`]. Meanwhile it is not told of memory or interrupts.
    ///
    /// # Errors
    /// It cannot, or is gone; it may have stopped all the same. Or what was put into it is no state of it: then it does
    /// nothing until it is reset.
    fn stop(&self) -> io::Result<()>;
    /// Goes on.
    ///
    /// # Errors
    /// It cannot, or is gone.
    fn go_on(&self) -> io::Result<()>;
    /// Its state, while it is stopped: bytes that only such a function understands, at most
    /// [`MOST_STATE`](crate::vfio_user::MOST_STATE).
    ///
    /// # Errors
    /// It has none, too long a one, or is gone.
    fn state(&self) -> io::Result<Vec<u8>>;
    /// Puts a state into it, which begins nothing from now on. It is told of interrupts then, and has taken the state
    /// when [`Migrates::stop`] returns.
    ///
    /// # Errors
    /// It takes none, or not so much, or is gone.
    fn load(&self, state: &[u8]) -> io::Result<()>;
}

/// What the unit hears of a function whose process asks by message. Called from a thread of the connection, without a
/// lock.
pub trait Requests: Send + Sync {
    /// The function asked for `iova`, and has no mapping that allows it: the unit, whose tables say why, records the
    /// fault.
    fn blocked(&self, iova: Iova, write: bool);
    /// The function wrote four aligned bytes into the interrupt window: a message, like any function's.
    fn message(&self, address: u64, data: u32);
}

/// DMA by message of one function, since it was opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct DmaMessages {
    /// Reads that were answered with data.
    pub reads: u64,
    /// Writes that were carried out, messages into the interrupt window among them.
    pub writes: u64,
    /// Bytes of both.
    pub bytes: u64,
    /// Requests for what is not granted, or not in this direction: answered with EFAULT, and told to the unit. What
    /// stands before the first such byte of a write was written.
    pub blocked: u64,
    /// Requests that make no sense: unknown, too short for what they are, longer than a message may be. Answered with
    /// an error.
    pub refused: u64,
}

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

/// What is known of a region.
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
