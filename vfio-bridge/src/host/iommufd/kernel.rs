//! What the backend asks of the kernel: of an iommufd, and of the functions that are bound to it. Tests have another
//! one, without a kernel.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use iommufd_ioctls::IommuFd;
use vfio_ioctls::{VfioDevice, VfioError, VfioIommufd};
use vtd::{IovaRange, Pasid, Perm};

use super::sys::{self, DeviceInfo, Hwpt, Ioas, Place, With};
use crate::bridge::guest_map::HostMem;
use crate::host::{HostDevice, HostStream, UnmapRange};

/// A kernel with an iommufd. Its devices have the numbers that it gave them.
pub trait Kernel: Send + Sync {
    /// A new, empty IOAS.
    fn alloc_ioas(&self) -> io::Result<Ioas>;

    /// A page table for `device`, which has all that `ioas` has now and follows it from then on.
    fn alloc_hwpt(&self, device: HostDevice, ioas: Ioas, with: With) -> io::Result<Hwpt>;

    /// An IOAS, or a page table, goes. Nothing may use it any more.
    fn destroy(&self, id: u32) -> io::Result<()>;

    /// `at` leads to `mem`, by its address in this process. With a page table the memory is pinned and charged to its
    /// user; without one that waits until there is one.
    fn map(&self, at: Place, mem: &HostMem<'_>, perm: Perm) -> io::Result<()>;

    /// The same by the file of `mem`, if it has one and the kernel can. Charged as [`Kernel::map`].
    fn map_file(&self, at: Place, mem: &HostMem<'_>, perm: Perm) -> io::Result<()>;

    /// `at` leads to `mem`, a part of a BAR, by the dma-buf of that (Linux 6.19). Nothing is pinned or charged. When
    /// the function's memory is disabled the kernel takes the translation away, and does not bring it back.
    fn map_dma_buf(&self, at: Place, mem: &HostMem<'_>, perm: Perm) -> io::Result<()>;

    /// `len` bytes at `to` lead to where those at `from` do. Memory that is pinned there is not pinned again.
    fn copy(&self, to: Place, from: Place, len: u64, perm: Perm) -> io::Result<()>;

    /// What is mapped in `range` goes, in whole mappings. Returns how many bytes that were. `ENOENT` means that there
    /// was nothing, or that a mapping would have to be cut, and then others may have gone: it is an error as any other.
    fn unmap(&self, ioas: Ioas, range: UnmapRange) -> io::Result<u64>;

    /// `hwpt`, which has dirty bits, keeps them, all clean; or no more.
    fn track_dirty(&self, hwpt: Hwpt, on: bool) -> io::Result<()>;

    /// Sets a bit of `words` for each page of 4 KiB of `range` that `hwpt` has dirty, and makes it clean unless it is
    /// to `keep` them. Nothing is said of what is behind the first hole, nor of a page table that is not tracked, and
    /// no error either.
    fn dirty_bitmap(&self, hwpt: Hwpt, range: IovaRange, words: &mut [u64], keep: bool) -> io::Result<()>;

    /// Where mappings may be in `ioas`: the intersection of what the devices that are attached to it allow. And what
    /// every IOVA is a multiple of.
    fn iova_ranges(&self, ioas: Ioas) -> io::Result<(Vec<IovaRange>, u64)>;

    /// What is known of `device`.
    fn device_info(&self, device: HostDevice) -> DeviceInfo;

    /// The requests of `stream` reach what `to` has, and nothing else from now on, in one step. Its device's group is
    /// switched with it.
    fn attach(&self, stream: HostStream, to: Hwpt) -> io::Result<()>;

    /// The requests of `stream` reach nothing. No error where they did not.
    fn detach(&self, stream: HostStream) -> io::Result<()>;
}

/// The kernel of this host.
pub struct Host {
    // It keeps the IOAS of RAM and the KVM-VFIO device, too.
    pub(super) vfio: Arc<VfioIommufd>,
    devices: RwLock<BTreeMap<HostDevice, Arc<dyn BoundDevice>>>,
}

/// A device that is bound to the iommufd, as it is attached to page tables. A HWPT is named by the number that the
/// kernel gave it.
pub trait BoundDevice: Send + Sync {
    /// The requests with `pasid`, or those without one, reach what `hwpt` has, and nothing else from now on, in one
    /// step. Its group, if the kernel has others in it, is switched with it.
    ///
    /// # Errors
    /// They reach what they did.
    fn attach(&self, pasid: Option<Pasid>, hwpt: u32) -> io::Result<()>;

    /// They reach nothing. No error where they did not.
    ///
    /// # Errors
    /// Nothing may be concluded about what they reach.
    fn detach(&self, pasid: Option<Pasid>) -> io::Result<()>;
}

/// VFIO's device file of a function.
pub struct Cdev(pub Arc<VfioDevice>);

impl BoundDevice for Cdev {
    fn attach(&self, pasid: Option<Pasid>, hwpt: u32) -> io::Result<()> {
        match pasid {
            None => self.0.attach_hwpt(hwpt),
            Some(Pasid(pasid)) => self.0.attach_iommufd_pt_pasid(hwpt, pasid),
        }
        .map_err(vfio_error)
    }

    fn detach(&self, pasid: Option<Pasid>) -> io::Result<()> {
        match pasid {
            None => self.0.detach_hwpt(),
            Some(Pasid(pasid)) => self.0.detach_iommufd_pt_pasid(pasid),
        }
        .map_err(vfio_error)
    }
}

impl Host {
    pub(super) fn new(vfio: VfioIommufd) -> Self {
        Self { vfio: Arc::new(vfio), devices: RwLock::default() }
    }

    /// `device` is bound to the iommufd, which knows it by this number.
    pub(super) fn bound(&self, number: HostDevice, device: Box<dyn BoundDevice>) {
        self.devices.write().unwrap_or_else(PoisonError::into_inner).insert(number, device.into());
    }

    /// It is not used any more: its file is not kept here.
    pub(super) fn forget(&self, number: HostDevice) {
        self.devices.write().unwrap_or_else(PoisonError::into_inner).remove(&number);
    }

    fn fd(&self) -> &IommuFd {
        self.vfio.iommufd()
    }

    fn device(&self, number: HostDevice) -> io::Result<Arc<dyn BoundDevice>> {
        let devices = self.devices.read().unwrap_or_else(PoisonError::into_inner);
        devices.get(&number).cloned().ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))
    }
}

/// The errno of a call of vfio-ioctls on a device of an iommufd.
fn vfio_error(error: VfioError) -> io::Error {
    match error {
        VfioError::VfioDeviceAttachIommufdPt(e)
        | VfioError::VfioDeviceDetachIommufdPt(e)
        | VfioError::VfioDeviceBindIommufd(e) => io::Error::from_raw_os_error(e.errno()),
        other => io::Error::other(other),
    }
}

impl Kernel for Host {
    fn alloc_ioas(&self) -> io::Result<Ioas> {
        sys::alloc_ioas(self.fd())
    }

    fn alloc_hwpt(&self, device: HostDevice, ioas: Ioas, with: With) -> io::Result<Hwpt> {
        sys::alloc_hwpt(self.fd(), device.0, ioas, with)
    }

    fn destroy(&self, id: u32) -> io::Result<()> {
        sys::destroy(self.fd(), id)
    }

    fn map(&self, at: Place, mem: &HostMem<'_>, perm: Perm) -> io::Result<()> {
        // SAFETY: `mem` is the guest's alone, without Rust references into it: that is the promise of whoever made the
        // `GuestMap` that it is from. The kernel pins its pages, so they outlive their mapping here.
        unsafe { sys::map(self.fd(), at, mem.hva(), mem.size(), perm) }
    }

    fn map_file(&self, at: Place, mem: &HostMem<'_>, perm: Perm) -> io::Result<()> {
        let (file, offset) = mem.backing().ok_or(io::ErrorKind::Unsupported)?;
        // SAFETY: as in `map`.
        unsafe { sys::map_file(self.fd(), at, file, offset, mem.size(), perm) }
    }

    fn map_dma_buf(&self, at: Place, mem: &HostMem<'_>, perm: Perm) -> io::Result<()> {
        let (file, offset) = mem.dma_buf().ok_or(io::ErrorKind::Unsupported)?;
        // SAFETY: as in `map`, but that there are no pages: the kernel has a mapping end with what it leads to.
        unsafe { sys::map_file(self.fd(), at, file, offset, mem.size(), perm) }
    }

    fn copy(&self, to: Place, from: Place, len: u64, perm: Perm) -> io::Result<()> {
        sys::copy(self.fd(), to, from, len, perm)
    }

    fn unmap(&self, ioas: Ioas, range: UnmapRange) -> io::Result<u64> {
        sys::unmap(self.fd(), ioas, range)
    }

    fn track_dirty(&self, hwpt: Hwpt, on: bool) -> io::Result<()> {
        sys::track_dirty(self.fd(), hwpt, on)
    }

    fn dirty_bitmap(&self, hwpt: Hwpt, range: IovaRange, words: &mut [u64], keep: bool) -> io::Result<()> {
        sys::dirty_bitmap(self.fd(), hwpt, range, words, keep)
    }

    fn iova_ranges(&self, ioas: Ioas) -> io::Result<(Vec<IovaRange>, u64)> {
        sys::iova_ranges(self.fd(), ioas)
    }

    fn device_info(&self, device: HostDevice) -> DeviceInfo {
        sys::device_info(self.fd(), device.0)
    }

    fn attach(&self, stream: HostStream, to: Hwpt) -> io::Result<()> {
        self.device(stream.device)?.attach(stream.pasid, to.0)
    }

    fn detach(&self, stream: HostStream) -> io::Result<()> {
        self.device(stream.device)?.detach(stream.pasid)
    }
}
