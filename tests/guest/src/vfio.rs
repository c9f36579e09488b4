//! The kernel's VFIO interface with the type1 IOMMU: a container, a group, a PCI function.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::ptr::NonNull;

use anyhow::{Context, Result, bail, ensure};
use vfio_bindings::bindings::vfio::*;

use crate::memory::DmaMemory;

const fn ioctl_number(number: u32) -> libc::c_ulong {
    ((VFIO_TYPE as u32) << 8 | (VFIO_BASE + number)) as libc::c_ulong
}

const SET_IOMMU: libc::c_ulong = ioctl_number(2);
const GROUP_GET_STATUS: libc::c_ulong = ioctl_number(3);
const GROUP_SET_CONTAINER: libc::c_ulong = ioctl_number(4);
const GROUP_GET_DEVICE_FD: libc::c_ulong = ioctl_number(6);
const DEVICE_GET_REGION_INFO: libc::c_ulong = ioctl_number(8);
const DEVICE_SET_IRQS: libc::c_ulong = ioctl_number(10);
const IOMMU_MAP_DMA: libc::c_ulong = ioctl_number(13);
const IOMMU_UNMAP_DMA: libc::c_ulong = ioctl_number(14);

/// An ioctl whose argument the kernel only reads or fills in place.
pub(crate) fn ioctl<T>(fd: RawFd, request: libc::c_ulong, argument: &mut T) -> io::Result<RawFd> {
    // SAFETY: every caller in this crate passes the structure that `request` is defined with, with its own size in it
    // where it has one, so the kernel reads and writes inside `argument` only, and through addresses of memory that
    // the caller holds.
    let result = unsafe { libc::ioctl(fd, request, std::ptr::from_mut(argument)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

const PCI_DEVICES: &str = "/sys/bus/pci/devices";

/// The first PCI function with this vendor and device id, as DDDD:BB:DD.F.
///
/// # Errors
/// If there is none.
pub fn find_function(vendor: u16, device: u16) -> Result<String> {
    let id = |path: &Path, name: &str| fs::read_to_string(path.join(name)).unwrap_or_default().trim().to_owned();
    let mut functions: Vec<_> = fs::read_dir(PCI_DEVICES)?.collect::<io::Result<_>>()?;
    functions.sort_by_key(fs::DirEntry::file_name);
    functions
        .iter()
        .find(|f| {
            id(&f.path(), "vendor") == format!("{vendor:#06x}") && id(&f.path(), "device") == format!("{device:#06x}")
        })
        .map(|f| f.file_name().to_string_lossy().into_owned())
        .with_context(|| format!("no PCI function {vendor:04x}:{device:04x}"))
}

/// Gives the function to vfio-pci, whatever driver has it. A function that vfio-pci has already is left alone.
///
/// # Errors
/// If the kernel has no vfio-pci, or it does not take the function (no IOMMU group).
pub fn bind(bdf: &str) -> Result<()> {
    let function = Path::new(PCI_DEVICES).join(bdf);
    let driver = || fs::read_link(function.join("driver")).ok().and_then(|l| Some(l.file_name()?.to_owned()));
    if driver().is_some_and(|d| d == "vfio-pci") {
        return Ok(());
    }
    fs::write(function.join("driver_override"), "vfio-pci").with_context(|| format!("no PCI function {bdf}"))?;
    if driver().is_some() {
        fs::write(function.join("driver/unbind"), bdf).with_context(|| format!("unbinding {bdf}"))?;
    }
    fs::write("/sys/bus/pci/drivers_probe", bdf).with_context(|| format!("probing {bdf}"))?;
    ensure!(driver().is_some_and(|d| d == "vfio-pci"), "vfio-pci did not take {bdf}: is it loaded, is an IOMMU on?");
    Ok(())
}

/// The message of a function's first MSI vector, as its capability has it: address and data.
///
/// # Errors
/// If it has no MSI capability.
pub fn msi_message(bdf: &str) -> Result<(u64, u32)> {
    const CAPABILITIES: usize = 0x34;
    const MSI: u8 = 5;
    const WIDE: u8 = 1 << 7;
    let file = Path::new("/sys/bus/pci/devices").join(bdf).join("config");
    let config = fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
    let bytes = |at: usize, len: usize| config.get(at..at + len).context("the configuration space is too short");
    let mut at = usize::from(bytes(CAPABILITIES, 1)?[0]);
    // A chain has no more capabilities than fit.
    for _ in 0..64 {
        let header = bytes(at, 4)?;
        if at != 0 && header[0] == MSI {
            let wide = header[2] & WIDE != 0;
            let word = |at: usize| Ok::<u32, anyhow::Error>(u32::from_le_bytes(bytes(at, 4)?.try_into()?));
            let high = if wide { word(at + 8)? } else { 0 };
            let data = bytes(at + if wide { 12 } else { 8 }, 2)?;
            let address = u64::from(high) << 32 | u64::from(word(at + 4)?);
            return Ok((address, u16::from_le_bytes(data.try_into()?).into()));
        }
        at = header[1].into();
    }
    bail!("{bdf} has no MSI capability")
}

/// What the device may do with a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The device reads and writes.
    ReadWrite,
    /// The device reads; its writes fault.
    ReadOnly,
}

/// A container with the type1v2 IOMMU and one group in it.
pub struct Container {
    file: File,
    group: File,
}

impl Container {
    /// Opens the group of `bdf` and puts it into a container of its own.
    ///
    /// # Errors
    /// If the function has no group, the group is not viable, or the kernel refuses type1 (`EPERM`: interrupt remapping
    /// is off and `vfio_iommu_type1.allow_unsafe_interrupts` is not set).
    pub fn open(bdf: &str) -> Result<Self> {
        let link = fs::read_link(Path::new(PCI_DEVICES).join(bdf).join("iommu_group"))
            .with_context(|| format!("{bdf} has no IOMMU group"))?;
        let number = link.file_name().context("an empty group link")?.to_string_lossy().into_owned();
        let open = |path: String| {
            OpenOptions::new().read(true).write(true).open(&path).with_context(|| format!("opening {path}"))
        };
        let file = open("/dev/vfio/vfio".to_owned())?;
        let group = open(format!("/dev/vfio/{number}"))?;
        let mut status = vfio_group_status { argsz: size_of::<vfio_group_status>() as u32, flags: 0 };
        ioctl(group.as_raw_fd(), GROUP_GET_STATUS, &mut status).context("VFIO_GROUP_GET_STATUS")?;
        ensure!(status.flags & VFIO_GROUP_FLAGS_VIABLE != 0, "group {number} is not viable");
        ioctl(group.as_raw_fd(), GROUP_SET_CONTAINER, &mut file.as_raw_fd()).context("VFIO_GROUP_SET_CONTAINER")?;
        // SAFETY: VFIO_SET_IOMMU takes the IOMMU type by value and no memory.
        if unsafe { libc::ioctl(file.as_raw_fd(), SET_IOMMU, VFIO_TYPE1v2_IOMMU as libc::c_ulong) } < 0 {
            return Err(io::Error::last_os_error()).context("VFIO_SET_IOMMU type1v2");
        }
        Ok(Self { file, group })
    }

    /// Maps `size` bytes of `memory` from `offset` at `iova`.
    ///
    /// # Errors
    /// The kernel's: `EEXIST` for an overlap, `EINVAL` outside the IOVA ranges, `ENOMEM` at the memlock limit.
    pub fn map(&self, iova: u64, memory: &DmaMemory, offset: usize, size: usize, access: Access) -> io::Result<()> {
        assert!(offset.checked_add(size).is_some_and(|end| end <= memory.len()));
        let write = if access == Access::ReadWrite { VFIO_DMA_MAP_FLAG_WRITE } else { 0 };
        let mut map = vfio_iommu_type1_dma_map {
            argsz: size_of::<vfio_iommu_type1_dma_map>() as u32,
            flags: VFIO_DMA_MAP_FLAG_READ | write,
            vaddr: memory.address(offset),
            iova,
            size: size as u64,
        };
        ioctl(self.file.as_raw_fd(), IOMMU_MAP_DMA, &mut map).map(drop)
    }

    /// Unmaps whatever lies in `size` bytes from `iova`, and gives back how many bytes that was.
    ///
    /// # Errors
    /// The kernel's: `EINVAL` if the range bisects a mapping.
    pub fn unmap(&self, iova: u64, size: u64) -> io::Result<u64> {
        let mut unmap = vfio_iommu_type1_dma_unmap {
            argsz: size_of::<vfio_iommu_type1_dma_unmap>() as u32,
            flags: 0,
            iova,
            size,
            data: Default::default(),
        };
        ioctl(self.file.as_raw_fd(), IOMMU_UNMAP_DMA, &mut unmap)?;
        Ok(unmap.size)
    }

    /// Opens the function itself, with Memory Enable and Bus Master on and BAR 0 mapped.
    ///
    /// # Errors
    /// If another process has it, or BAR 0 cannot be mapped.
    pub fn device(&self, bdf: &str) -> Result<Device> {
        let name = std::ffi::CString::new(bdf)?;
        // SAFETY: VFIO_GROUP_GET_DEVICE_FD reads a NUL-terminated name.
        let fd = unsafe { libc::ioctl(self.group.as_raw_fd(), GROUP_GET_DEVICE_FD, name.as_ptr()) };
        if fd < 0 {
            return Err(io::Error::last_os_error()).with_context(|| format!("VFIO_GROUP_GET_DEVICE_FD {bdf}"));
        }
        // SAFETY: the kernel has just given us this descriptor and nobody else knows it.
        Device::of(File::from(unsafe { OwnedFd::from_raw_fd(fd) })).with_context(|| format!("taking {bdf}"))
    }
}

fn region(device: &File, index: u32) -> Result<vfio_region_info> {
    let argsz = size_of::<vfio_region_info>() as u32;
    let mut info = vfio_region_info { argsz, flags: 0, index, cap_offset: 0, size: 0, offset: 0 };
    ioctl(device.as_raw_fd(), DEVICE_GET_REGION_INFO, &mut info).context("VFIO_DEVICE_GET_REGION_INFO")?;
    ensure!(info.size != 0, "region {index} is empty");
    Ok(info)
}

/// A PCI function with its BAR 0 mapped.
pub struct Device {
    file: File,
    registers: NonNull<u8>,
    size: usize,
}

impl Device {
    /// The function that `file` is, with Memory Enable and Bus Master on and BAR 0 mapped.
    ///
    /// # Errors
    /// If its configuration space cannot be written, or BAR 0 cannot be mapped.
    pub(crate) fn of(file: File) -> Result<Self> {
        const COMMAND: u64 = 4;
        const MEMORY_ENABLE_AND_BUS_MASTER: u16 = 6;
        let config = region(&file, VFIO_PCI_CONFIG_REGION_INDEX)?.offset;
        let mut command = [0; 2];
        file.read_exact_at(&mut command, config + COMMAND).context("reading the command register")?;
        let command = u16::from_le_bytes(command) | MEMORY_ENABLE_AND_BUS_MASTER;
        file.write_all_at(&command.to_le_bytes(), config + COMMAND).context("writing the command register")?;

        let bar = region(&file, VFIO_PCI_BAR0_REGION_INDEX)?;
        let size = usize::try_from(bar.size)?;
        let offset = libc::off_t::try_from(bar.offset)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of this process.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), size, protection, libc::MAP_SHARED, file.as_raw_fd(), offset) };
        ensure!(start != libc::MAP_FAILED, "mapping BAR 0: {}", io::Error::last_os_error());
        let registers = NonNull::new(start.cast()).context("BAR 0 mapped at address 0")?;
        Ok(Self { file, registers, size })
    }

    fn register<T>(&self, offset: usize) -> *mut T {
        assert!(offset.is_multiple_of(size_of::<T>()) && offset + size_of::<T>() <= self.size);
        // SAFETY: inside the mapping, as asserted.
        unsafe { self.registers.as_ptr().add(offset).cast() }
    }

    /// Reads a 32-bit register of BAR 0.
    pub fn read32(&self, offset: usize) -> u32 {
        // SAFETY: `register` checks range and alignment; the BAR stays mapped as long as `self`.
        unsafe { self.register::<u32>(offset).read_volatile() }
    }

    /// Writes a 32-bit register of BAR 0.
    pub fn write32(&self, offset: usize, value: u32) {
        // SAFETY: `register` checks range and alignment; the BAR stays mapped as long as `self`.
        unsafe { self.register::<u32>(offset).write_volatile(value) }
    }

    /// Reads a 64-bit register of BAR 0 in one access.
    pub fn read64(&self, offset: usize) -> u64 {
        // SAFETY: `register` checks range and alignment; the BAR stays mapped as long as `self`.
        unsafe { self.register::<u64>(offset).read_volatile() }
    }

    /// Writes a 64-bit register of BAR 0 in one access.
    pub fn write64(&self, offset: usize, value: u64) {
        // SAFETY: `register` checks range and alignment; the BAR stays mapped as long as `self`.
        unsafe { self.register::<u64>(offset).write_volatile(value) }
    }

    /// Has the first MSI vector signal `eventfd`.
    ///
    /// # Errors
    /// If the function has no MSI, or the kernel cannot allocate a vector.
    pub fn enable_msi(&self, eventfd: &OwnedFd) -> Result<()> {
        #[repr(C)]
        struct WithEventfd {
            set: vfio_irq_set,
            eventfd: RawFd,
        }
        let mut irqs = WithEventfd {
            set: vfio_irq_set {
                argsz: size_of::<WithEventfd>() as u32,
                flags: VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER,
                index: VFIO_PCI_MSI_IRQ_INDEX,
                start: 0,
                count: 1,
                data: Default::default(),
            },
            eventfd: eventfd.as_raw_fd(),
        };
        ioctl(self.file.as_raw_fd(), DEVICE_SET_IRQS, &mut irqs).map(drop).context("VFIO_DEVICE_SET_IRQS for MSI")
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone and nothing refers to it any more.
        unsafe { libc::munmap(self.registers.as_ptr().cast(), self.size) };
    }
}
