//! The kernel's iommufd and the VFIO character device of a function: address spaces, page tables that track what is
//! written, page tables of the user's own over those, and page tables of one PASID.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use iommufd_bindings::iommufd::*;
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DEVICE_ATTACH_PASID, VFIO_TYPE, vfio_device_attach_iommufd_pt, vfio_device_bind_iommufd,
};

use crate::memory::{DmaMemory, PAGE};
use crate::vfio::{Access, Device, ioctl};

const fn number(command: u32) -> libc::c_ulong {
    ((IOMMUFD_TYPE as u32) << 8 | command) as libc::c_ulong
}

const BIND_IOMMUFD: libc::c_ulong = ((VFIO_TYPE as u32) << 8 | (VFIO_BASE + 18)) as libc::c_ulong;
const ATTACH_IOMMUFD_PT: libc::c_ulong = ((VFIO_TYPE as u32) << 8 | (VFIO_BASE + 19)) as libc::c_ulong;

/// Address width of the user's own first-stage tables: 4 levels.
const FIRST_STAGE_WIDTH: u32 = 48;

/// How long a page fault is waited for.
const FAULT_DEADLINE: Duration = Duration::from_secs(20);

/// An address space: memory by IOVA.
#[derive(Clone, Copy, Debug)]
pub struct Ioas(u32);

/// A page table that functions are attached to.
#[derive(Clone, Copy, Debug)]
pub struct Hwpt(u32);

/// What a page table of the kernel is made for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Purpose {
    /// What is written through it can be tracked.
    pub dirty_tracking: bool,
    /// Tables of the user's own lie over it.
    pub parent: bool,
    /// PASIDs of the function are attached, to this one or to others (Linux 6.15).
    pub pasids: bool,
}

/// An open iommufd.
pub struct Iommufd(File);

impl Iommufd {
    /// Opens the kernel's.
    ///
    /// # Errors
    /// If the kernel has none.
    pub fn open() -> Result<Self> {
        Ok(Self(OpenOptions::new().read(true).write(true).open("/dev/iommu").context("opening /dev/iommu")?))
    }

    fn call<T>(&self, command: u32, argument: &mut T) -> io::Result<()> {
        ioctl(self.0.as_raw_fd(), number(command), argument).map(drop)
    }

    /// A new, empty address space.
    ///
    /// # Errors
    /// The kernel's.
    pub fn alloc_ioas(&self) -> io::Result<Ioas> {
        let mut alloc = iommu_ioas_alloc { size: size_of::<iommu_ioas_alloc>() as u32, flags: 0, out_ioas_id: 0 };
        self.call(IOMMUFD_CMD_IOAS_ALLOC, &mut alloc)?;
        Ok(Ioas(alloc.out_ioas_id))
    }

    /// Maps `len` bytes of `memory` from `offset` at `iova`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn map(
        &self,
        ioas: Ioas,
        iova: u64,
        memory: &DmaMemory,
        offset: usize,
        len: usize,
        access: Access,
    ) -> io::Result<()> {
        assert!(offset.checked_add(len).is_some_and(|end| end <= memory.len()));
        let write = if access == Access::ReadWrite { iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE } else { 0 };
        let mut map = iommu_ioas_map {
            size: size_of::<iommu_ioas_map>() as u32,
            flags: iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA
                | iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE
                | write,
            ioas_id: ioas.0,
            __reserved: 0,
            user_va: memory.address(offset),
            length: len as u64,
            iova,
        };
        self.call(IOMMUFD_CMD_IOAS_MAP, &mut map)
    }

    /// Unmaps what was mapped at `iova`, `len` bytes.
    ///
    /// # Errors
    /// The kernel's: `ENOENT` if nothing is there.
    pub fn unmap(&self, ioas: Ioas, iova: u64, len: usize) -> io::Result<()> {
        let size = size_of::<iommu_ioas_unmap>() as u32;
        let mut unmap = iommu_ioas_unmap { size, ioas_id: ioas.0, iova, length: len as u64 };
        self.call(IOMMUFD_CMD_IOAS_UNMAP, &mut unmap)
    }

    fn alloc(&self, mut alloc: iommu_hwpt_alloc) -> io::Result<Hwpt> {
        self.call(IOMMUFD_CMD_HWPT_ALLOC, &mut alloc)?;
        Ok(Hwpt(alloc.out_hwpt_id))
    }

    /// A page table of the kernel, filled from `ioas`, that `function` can be attached to.
    ///
    /// # Errors
    /// `EOPNOTSUPP` if the unit above the function does not offer what it is for.
    pub fn alloc_hwpt(&self, function: &Function, ioas: Ioas, purpose: Purpose) -> io::Result<Hwpt> {
        let flag = |is: bool, flag: u32| if is { flag } else { 0 };
        self.alloc(iommu_hwpt_alloc {
            size: size_of::<iommu_hwpt_alloc>() as u32,
            flags: flag(purpose.dirty_tracking, iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_DIRTY_TRACKING)
                | flag(purpose.parent, iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_NEST_PARENT)
                | flag(purpose.pasids, iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_PASID),
            dev_id: function.id,
            pt_id: ioas.0,
            ..Default::default()
        })
    }

    /// A first-stage table of the user's own, of 4 levels from `root` on, an address of the address space behind
    /// `parent`. Its page faults go to `faults`, if there is one. `pasids` as in [`Purpose`].
    ///
    /// # Errors
    /// `EOPNOTSUPP` if the unit does not nest, or cannot send page faults.
    pub fn alloc_nested(
        &self,
        function: &Function,
        parent: Hwpt,
        root: u64,
        faults: Option<&FaultQueue>,
        pasids: bool,
    ) -> io::Result<Hwpt> {
        let first = iommu_hwpt_vtd_s1 { flags: 0, pgtbl_addr: root, addr_width: FIRST_STAGE_WIDTH, __reserved: 0 };
        let valid = if faults.is_some() { iommufd_hwpt_alloc_flags_IOMMU_HWPT_FAULT_ID_VALID } else { 0 };
        let pasid = if pasids { iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_PASID } else { 0 };
        self.alloc(iommu_hwpt_alloc {
            size: size_of::<iommu_hwpt_alloc>() as u32,
            flags: valid | pasid,
            dev_id: function.id,
            pt_id: parent.0,
            data_type: iommu_hwpt_data_type_IOMMU_HWPT_DATA_VTD_S1,
            data_len: size_of::<iommu_hwpt_vtd_s1>() as u32,
            data_uptr: std::ptr::from_ref(&first) as u64,
            fault_id: faults.map_or(0, |faults| faults.id),
            ..Default::default()
        })
    }

    /// What the unit has cached of `pages` pages from `iova` on, by a table of the user's own, goes.
    ///
    /// # Errors
    /// The kernel's.
    pub fn invalidate(&self, table: Hwpt, iova: u64, pages: u64) -> io::Result<()> {
        let mut entry = iommu_hwpt_vtd_s1_invalidate { addr: iova, npages: pages, flags: 0, __reserved: 0 };
        let mut invalidate = iommu_hwpt_invalidate {
            size: size_of::<iommu_hwpt_invalidate>() as u32,
            hwpt_id: table.0,
            data_uptr: std::ptr::from_mut(&mut entry) as u64,
            data_type: iommu_hwpt_invalidate_data_type_IOMMU_HWPT_INVALIDATE_DATA_VTD_S1,
            entry_len: size_of::<iommu_hwpt_vtd_s1_invalidate>() as u32,
            entry_num: 1,
            __reserved: 0,
        };
        self.call(IOMMUFD_CMD_HWPT_INVALIDATE, &mut invalidate)
    }

    /// From now on what is written through `table` is tracked, or no longer.
    ///
    /// # Errors
    /// The kernel's.
    pub fn track_dirty(&self, table: Hwpt, on: bool) -> io::Result<()> {
        let enable = iommufd_hwpt_set_dirty_tracking_flags_IOMMU_HWPT_DIRTY_TRACKING_ENABLE;
        let mut set = iommu_hwpt_set_dirty_tracking {
            size: size_of::<iommu_hwpt_set_dirty_tracking>() as u32,
            flags: if on { enable } else { 0 },
            hwpt_id: table.0,
            __reserved: 0,
        };
        self.call(IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING, &mut set)
    }

    /// Which of `pages` pages from `iova` on were written since the last call, which this one makes clean unless
    /// `keep`. By their numbers from `iova`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn dirty_pages(&self, table: Hwpt, iova: u64, pages: usize, keep: bool) -> io::Result<Vec<usize>> {
        let no_clear = iommufd_hwpt_get_dirty_bitmap_flags_IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR;
        let mut bitmap = vec![0u64; pages.div_ceil(64)];
        let mut get = iommu_hwpt_get_dirty_bitmap {
            size: size_of::<iommu_hwpt_get_dirty_bitmap>() as u32,
            hwpt_id: table.0,
            flags: if keep { no_clear } else { 0 },
            __reserved: 0,
            iova,
            length: (pages * PAGE) as u64,
            page_size: PAGE as u64,
            data: bitmap.as_mut_ptr() as u64,
        };
        self.call(IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP, &mut get)?;
        Ok((0..pages).filter(|page| bitmap[page / 64] >> (page % 64) & 1 != 0).collect())
    }

    /// A queue of page faults.
    ///
    /// # Errors
    /// The kernel's.
    pub fn alloc_fault_queue(&self) -> io::Result<FaultQueue> {
        let mut alloc = iommu_fault_alloc { size: size_of::<iommu_fault_alloc>() as u32, ..Default::default() };
        self.call(IOMMUFD_CMD_FAULT_QUEUE_ALLOC, &mut alloc)?;
        // SAFETY: the kernel has just given us this descriptor and nobody else knows it.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(alloc.out_fault_fd as i32) });
        Ok(FaultQueue { id: alloc.out_fault_id, file })
    }

    /// Binds a function, which vfio-pci has, to this iommufd; it reaches nothing yet.
    ///
    /// # Errors
    /// If it has no character device, or another user.
    pub fn bind(&self, bdf: &str) -> Result<Function> {
        let folder = Path::new("/sys/bus/pci/devices").join(bdf).join("vfio-dev");
        let name = fs::read_dir(&folder)
            .with_context(|| format!("{bdf} has no character device of VFIO"))?
            .next()
            .with_context(|| format!("{} is empty", folder.display()))??
            .file_name();
        let path = Path::new("/dev/vfio/devices").join(name);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .with_context(|| format!("opening {}", path.display()))?;
        let mut bind = vfio_device_bind_iommufd {
            argsz: size_of::<vfio_device_bind_iommufd>() as u32,
            iommufd: self.0.as_raw_fd(),
            ..Default::default()
        };
        ioctl(file.as_raw_fd(), BIND_IOMMUFD, &mut bind).context("VFIO_DEVICE_BIND_IOMMUFD")?;
        Ok(Function { file, id: bind.out_devid })
    }
}

/// A function that is bound to an iommufd.
pub struct Function {
    file: File,
    id: u32,
}

impl Function {
    fn attach_with(&self, table: Hwpt, flags: u32, pasid: u32) -> io::Result<()> {
        let argsz = size_of::<vfio_device_attach_iommufd_pt>() as u32;
        let mut attach = vfio_device_attach_iommufd_pt { argsz, flags, pt_id: table.0, pasid };
        ioctl(self.file.as_raw_fd(), ATTACH_IOMMUFD_PT, &mut attach).map(drop)
    }

    /// Its requests without a PASID go through `table` from now on.
    ///
    /// # Errors
    /// The kernel's.
    pub fn attach(&self, table: Hwpt) -> io::Result<()> {
        self.attach_with(table, 0, 0)
    }

    /// Its requests with `pasid` go through `table` from now on (Linux 6.15).
    ///
    /// # Errors
    /// The kernel's.
    pub fn attach_pasid(&self, pasid: u32, table: Hwpt) -> io::Result<()> {
        self.attach_with(table, VFIO_DEVICE_ATTACH_PASID, pasid)
    }

    /// Its registers.
    ///
    /// # Errors
    /// If its configuration space cannot be written, or BAR 0 cannot be mapped.
    pub fn device(&self) -> Result<Device> {
        Device::of(self.file.try_clone()?)
    }
}

/// Page faults of functions: the kernel gives them to the user, who answers.
pub struct FaultQueue {
    id: u32,
    file: File,
}

impl FaultQueue {
    /// The next fault; waits for it.
    ///
    /// # Errors
    /// The kernel's, what comes is not one, or nothing comes in time.
    pub fn next(&self) -> Result<iommu_hwpt_pgfault> {
        // Reading does not wait.
        let mut poll = libc::pollfd { fd: self.file.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd, as the count says.
        let ready = unsafe { libc::poll(&raw mut poll, 1, FAULT_DEADLINE.as_millis() as i32) };
        ensure!(ready == 1, "no page fault within {FAULT_DEADLINE:?}");
        let mut bytes = [0; size_of::<iommu_hwpt_pgfault>()];
        (&self.file).read_exact(&mut bytes).context("reading a page fault")?;
        let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let fault = iommu_hwpt_pgfault {
            flags: word(0),
            dev_id: word(4),
            pasid: word(8),
            grpid: word(12),
            perm: word(16),
            __reserved: word(20),
            addr: u64::from(word(24)) | u64::from(word(28)) << 32,
            length: word(32),
            cookie: word(36),
        };
        ensure!(fault.__reserved == 0, "not a page fault: {bytes:?}");
        Ok(fault)
    }

    /// Answers a fault: the page is there now, or it will not be.
    ///
    /// # Errors
    /// The kernel's.
    pub fn answer(&self, fault: &iommu_hwpt_pgfault, there: bool) -> Result<()> {
        let code = if there {
            iommufd_page_response_code_IOMMUFD_PAGE_RESP_SUCCESS
        } else {
            iommufd_page_response_code_IOMMUFD_PAGE_RESP_INVALID
        };
        let bytes = [fault.cookie.to_ne_bytes(), code.to_ne_bytes()].concat();
        (&self.file).write_all(&bytes).context("answering a page fault")
    }
}
