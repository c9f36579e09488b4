//! QEMU's edu function (1234:11e8), which is also what Causeway's own emulated edu looks like.
//!
//! Its DMA engine copies between memory and an internal buffer. QEMU's starts 100 ms after the doorbell, and corrupts
//! its own heap when told an address or a length outside the buffer, so [`Edu::start`] refuses those.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use crate::vfio::Device;

/// Vendor id of the function.
pub const VENDOR: u16 = 0x1234;
/// Device id of the function.
pub const DEVICE: u16 = 0x11e8;
/// Size of the internal buffer, the most that one DMA moves.
pub const BUFFER_SIZE: usize = 0x1000;

/// Device address of the internal buffer.
const BUFFER: u64 = 0x4_0000;

const IDENTIFICATION: usize = 0x00;
const LIVENESS: usize = 0x04;
const INTERRUPT_STATUS: usize = 0x24;
const INTERRUPT_RAISE: usize = 0x60;
const INTERRUPT_ACKNOWLEDGE: usize = 0x64;
const DMA_SOURCE: usize = 0x80;
const DMA_DESTINATION: usize = 0x88;
const DMA_COUNT: usize = 0x90;
const DMA_COMMAND: usize = 0x98;
/// Causeway's own: by which PASID transfers go.
const DMA_PASID: usize = 0xa0;

const PASID_VALID: u32 = 1 << 31;
const DMA_RUN: u64 = 1;
const DMA_TO_MEMORY: u64 = 2;
const DMA_INTERRUPT: u64 = 4;
/// Interrupt status of an interrupt that is raised by register.
const RAISED: u32 = 1;
/// Interrupt status that the end of a DMA sets.
const DMA_INTERRUPT_STATUS: u32 = 0x100;

const DMA_DEADLINE: Duration = Duration::from_secs(20);
const INTERRUPT_DEADLINE: Duration = Duration::from_secs(10);

/// Which way a DMA goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The device reads memory at the IOVA into its buffer.
    FromMemory,
    /// The device writes its buffer to memory at the IOVA.
    ToMemory,
}

/// The function, through VFIO.
pub struct Edu {
    device: Device,
}

impl Edu {
    /// Takes the function after a check that it is an edu and alive.
    ///
    /// # Errors
    /// If identification or liveness register answer anything else.
    pub fn new(device: Device) -> Result<Self> {
        let id = device.read32(IDENTIFICATION);
        ensure!(id & 0xff == 0xed, "identification register reads {id:#x}");
        device.write32(LIVENESS, 0x1234_5678);
        let alive = device.read32(LIVENESS);
        ensure!(alive == !0x1234_5678, "liveness register reads {alive:#x}");
        Ok(Self { device })
    }

    /// Writes source, destination and length of a DMA of `len` bytes, without starting it.
    ///
    /// # Panics
    /// If `len` does not fit the internal buffer.
    pub fn program(&self, direction: Direction, iova: u64, len: usize) {
        assert!(len <= BUFFER_SIZE, "{len} bytes do not fit edu's buffer");
        let (source, destination) = match direction {
            Direction::FromMemory => (iova, BUFFER),
            Direction::ToMemory => (BUFFER, iova),
        };
        self.device.write64(DMA_SOURCE, source);
        self.device.write64(DMA_DESTINATION, destination);
        self.device.write64(DMA_COUNT, len as u64);
    }

    /// Rings the doorbell for what [`Self::program`] wrote.
    pub fn start(&self, direction: Direction) {
        self.device.write64(DMA_COMMAND, DMA_RUN | if direction == Direction::ToMemory { DMA_TO_MEMORY } else { 0 });
    }

    /// By which PASID transfers go from now on: a register that only Causeway's own edu with `pasid=on` has.
    ///
    /// # Errors
    /// If the register does not take it.
    pub fn set_pasid(&self, pasid: Option<u32>) -> Result<()> {
        let value = pasid.map_or(0, |pasid| pasid | PASID_VALID);
        self.device.write32(DMA_PASID, value);
        let has = self.device.read32(DMA_PASID);
        ensure!(has == value, "the register of the PASID reads {has:#x} instead of {value:#x}");
        Ok(())
    }

    /// Whether a DMA is pending or running.
    pub fn busy(&self) -> bool {
        self.device.read64(DMA_COMMAND) & DMA_RUN != 0
    }

    /// Waits for the end of the DMA.
    ///
    /// # Errors
    /// After 20 s.
    pub fn wait(&self) -> Result<()> {
        let start = Instant::now();
        while self.busy() {
            ensure!(start.elapsed() < DMA_DEADLINE, "edu's DMA has not ended after {DMA_DEADLINE:?}");
            sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// One whole DMA of `len` bytes. The device does not say whether its accesses were let through.
    ///
    /// # Errors
    /// If it does not end in time.
    pub fn dma(&self, direction: Direction, iova: u64, len: usize) -> Result<()> {
        self.program(direction, iova, len);
        self.start(direction);
        self.wait()
    }

    /// Has MSI signal an eventfd: one interrupt raised by register, one by the end of a DMA from the mapped page
    /// `iova`.
    ///
    /// # Errors
    /// If an interrupt does not arrive, or its status is not the one raised.
    pub fn check_msi(&self, iova: u64) -> Result<()> {
        let eventfd = self.enable_msi()?;
        self.interrupt(&eventfd)?;
        println!("msi: interrupt with status {RAISED:#x} arrived");
        self.program(Direction::FromMemory, iova, BUFFER_SIZE);
        self.device.write64(DMA_COMMAND, DMA_RUN | DMA_INTERRUPT);
        self.expect_interrupt(&eventfd, DMA_INTERRUPT_STATUS)?;
        println!("msi: interrupt with status {DMA_INTERRUPT_STATUS:#x} arrived");
        self.wait()
    }

    /// Has MSI signal the eventfd that it returns.
    ///
    /// # Errors
    /// As [`Device::enable_msi`].
    pub fn enable_msi(&self) -> Result<OwnedFd> {
        // SAFETY: takes no memory; the descriptor is checked and given to its owner below.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        ensure!(fd >= 0, "eventfd: {}", io::Error::last_os_error());
        // SAFETY: the kernel has just given us this descriptor and nobody else knows it.
        let eventfd = unsafe { OwnedFd::from_raw_fd(fd) };
        self.device.enable_msi(&eventfd)?;
        Ok(eventfd)
    }

    /// Raises one interrupt, which must arrive at `eventfd` once, and acknowledges it.
    ///
    /// # Errors
    /// If it does not arrive in time, or not once.
    pub fn interrupt(&self, eventfd: &OwnedFd) -> Result<()> {
        self.device.write32(INTERRUPT_RAISE, RAISED);
        self.expect_interrupt(eventfd, RAISED)
    }

    /// Raises one interrupt and acknowledges it; how many arrived at `eventfd` since the last one was counted, at least
    /// this one.
    ///
    /// # Errors
    /// If it does not arrive in time.
    pub fn count_interrupt(&self, eventfd: &OwnedFd) -> Result<u64> {
        let before = read_count(eventfd);
        self.device.write32(INTERRUPT_RAISE, RAISED);
        Ok(before + self.wait_for_interrupt(eventfd, RAISED)?)
    }

    /// One interrupt must arrive at `eventfd`; the device's interrupt status must be `expected` and is acknowledged.
    ///
    /// # Errors
    /// If it does not arrive in time, or not once.
    pub fn expect_interrupt(&self, eventfd: &OwnedFd, expected: u32) -> Result<()> {
        let count = self.wait_for_interrupt(eventfd, expected)?;
        ensure!(count == 1, "the eventfd counted {count} interrupts instead of 1");
        Ok(())
    }

    fn wait_for_interrupt(&self, eventfd: &OwnedFd, expected: u32) -> Result<u64> {
        let mut poll = libc::pollfd { fd: eventfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd, as the count says.
        let ready = unsafe { libc::poll(&raw mut poll, 1, INTERRUPT_DEADLINE.as_millis() as i32) };
        if ready != 1 {
            bail!("no MSI within {INTERRUPT_DEADLINE:?}, interrupt status {:#x}", self.device.read32(INTERRUPT_STATUS));
        }
        let count = read_count(eventfd);
        let status = self.device.read32(INTERRUPT_STATUS);
        self.device.write32(INTERRUPT_ACKNOWLEDGE, status);
        ensure!(status == expected, "interrupt status {status:#x} instead of {expected:#x}");
        Ok(count)
    }
}

/// What an eventfd has counted since it was read last.
fn read_count(eventfd: &OwnedFd) -> u64 {
    let mut count = 0u64;
    // SAFETY: an eventfd gives exactly the eight bytes of its counter, or an error if that is 0.
    let read = unsafe { libc::read(eventfd.as_raw_fd(), (&raw mut count).cast(), size_of::<u64>()) };
    if read == size_of::<u64>() as isize { count } else { 0 }
}
