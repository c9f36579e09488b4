//! The other end: serves a function that this process emulates to a client, ours or any other.
//!
//! The function's DMA goes by the file that the client sent with each mapping, for as long as the mapping is there.
//! What is not mapped it asks the client for by message, over the second socket, if the client wants one: so a client
//! with a remapping unit hears of DMA that is blocked, and of messages written into the interrupt window.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use log::{debug, warn};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_IRQ_INFO_AUTOMASKED, VFIO_IRQ_INFO_EVENTFD,
    VFIO_IRQ_INFO_MASKABLE, VFIO_IRQ_INFO_NORESIZE, VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER,
    VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE, VFIO_PCI_NUM_REGIONS,
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
};
use vtd::{Iova, Perm};
use zerocopy::IntoBytes;

use super::granted::{Grant, Granted, Missing};
use super::logging;
use super::migration::{Migration, ServedState};
use super::socket::{MAX_DATA, MAX_FDS, Message, receive, reply_to, send};
use super::wire::{
    Capabilities, DMA_MAP_READ, DMA_MAP_WRITE, DMA_UNMAP_ALL, DeviceInfo, DmaAccess, DmaMap, DmaUnmap, FLAG_ERROR,
    FLAG_NO_REPLY, Header, IrqInfo, IrqSet, MAX_DMA_MAPS, RegionAccess, RegionInfo, TwinSocket, VERSION, Version,
    command, parse_version, version_payload,
};
use crate::bridge::guest_map::PAGE_SIZE;
use crate::function::{IrqKind, RegionKind};

/// A function that this process emulates. Called from the thread that serves it.
pub trait Served {
    /// Bytes of `region`; 0: there is none.
    fn region_size(&self, region: RegionKind) -> u64;
    /// Vectors of `kind`.
    fn irq_count(&self, kind: IrqKind) -> u32;
    /// Reads; the range lies inside the region.
    fn read(&self, region: RegionKind, offset: u64, data: &mut [u8]);
    /// Writes; the range lies inside the region.
    fn write(&self, region: RegionKind, offset: u64, data: &[u8]);
    /// Vectors from `start` on, which exist, signal these eventfds from now on, `None`: nobody.
    fn set_irqs(&self, kind: IrqKind, start: u32, triggers: Vec<Option<File>>);
    /// Disables `kind`.
    fn disable_irqs(&self, kind: IrqKind);
    /// The legacy line is not raised until it is unmasked.
    fn mask_intx(&self);
    /// The legacy line may be raised again.
    fn unmask_intx(&self);
    /// Back to the state after power-on. When it returns, no DMA of before is under way.
    fn reset(&self);
    /// Its state, if that can be given to another process.
    fn state(&self) -> Option<&dyn ServedState> {
        None
    }
}

/// Why a client is served no longer.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket.
    #[error("the connection to the client failed: {0}")]
    Io(#[from] io::Error),
    /// The client did not begin with a version, or with one that is not spoken here.
    #[error("the client does not speak this version of vfio-user")]
    Version,
}

/// The DMA was not carried out, or not in full.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the client does not let the device reach {0}")]
pub struct DmaRefused(pub Iova);

/// The memory that a client lets a function reach.
#[derive(Default)]
pub struct ClientMemory {
    granted: Granted,
    /// Files that came, by device and inode: a client sends the same one with each of its mappings.
    files: Mutex<BTreeMap<(u64, u64), Weak<File>>>,
    /// For requests; one is under way at a time.
    twin: Mutex<Option<Twin>>,
}

/// The second socket.
struct Twin {
    stream: UnixStream,
    /// Bytes of data that the client takes with one message.
    transfer: u64,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ClientMemory {
    /// Reads all of `data` at `iova`.
    ///
    /// # Errors
    /// The first byte that is not to be had; what came before it was read.
    pub fn read(&self, iova: Iova, data: &mut [u8]) -> Result<(), DmaRefused> {
        let mut done = 0;
        while let Err(Missing(more)) = self.granted.read(iova.0.wrapping_add(done as u64), &mut data[done..]) {
            done += more;
            let (at, len) = self.in_message(iova, done, data.len())?;
            let reply = self.ask(command::DMA_READ, at, len, &[]).ok_or(DmaRefused(Iova(at)))?;
            let (_, found) = reply.parse::<DmaAccess>().map_err(|_| DmaRefused(Iova(at)))?;
            data[done..done + len].copy_from_slice(found.get(..len).ok_or(DmaRefused(Iova(at)))?);
            done += len;
        }
        Ok(())
    }

    /// Writes all of `data` at `iova`.
    ///
    /// # Errors
    /// The first byte that is not to be had; what came before it was written.
    pub fn write(&self, iova: Iova, data: &[u8]) -> Result<(), DmaRefused> {
        let mut done = 0;
        while let Err(Missing(more)) = self.granted.write(iova.0.wrapping_add(done as u64), &data[done..]) {
            done += more;
            let (at, len) = self.in_message(iova, done, data.len())?;
            self.ask(command::DMA_WRITE, at, len, &data[done..done + len]).ok_or(DmaRefused(Iova(at)))?;
            done += len;
        }
        Ok(())
    }

    /// What is asked for in one message from `done` bytes behind `iova` on: its address and length. It ends at the end
    /// of a page, and is no longer than what the client takes.
    fn in_message(&self, iova: Iova, done: usize, len: usize) -> Result<(u64, usize), DmaRefused> {
        let at = iova.0.checked_add(done as u64).ok_or(DmaRefused(iova))?;
        let transfer = locked(&self.twin).as_ref().map_or(PAGE_SIZE, |twin| twin.transfer.max(1));
        Ok((at, (len - done).min((PAGE_SIZE - at % PAGE_SIZE).min(transfer) as usize)))
    }

    /// Asks the client to do it.
    fn ask(&self, command: u16, address: u64, len: usize, data: &[u8]) -> Option<Message> {
        let twin = locked(&self.twin);
        let stream = &twin.as_ref()?.stream;
        let access = DmaAccess { address, count: len as u64 };
        let header = Header { command, ..Header::default() };
        send(stream, header, &[access.as_bytes(), data], &[]).ok()?;
        receive(stream).ok().flatten().filter(|reply| reply.header.flags & FLAG_ERROR == 0)
    }

    /// Grants what `message` names, if no more than `most` mappings are there then.
    fn map(&self, message: &mut Message, most: u64) -> Result<(), i32> {
        let (map, _) = message.parse::<DmaMap>().map_err(|_| libc::EINVAL)?;
        let perm = match (map.flags & DMA_MAP_READ != 0, map.flags & DMA_MAP_WRITE != 0) {
            (true, true) => Perm::ReadWrite,
            (true, false) => Perm::Read,
            (false, true) => Perm::Write,
            (false, false) => return Err(libc::EINVAL),
        };
        let last = map.size.checked_sub(1).and_then(|n| map.address.checked_add(n)).filter(|last| *last != u64::MAX);
        let last = last.filter(|_| map.offset.checked_add(map.size).is_some()).ok_or(libc::EINVAL)?;
        if message.fds.len() > 1 {
            return Err(libc::EINVAL);
        }
        if self.granted.len() >= most {
            return Err(libc::ENOSPC);
        }
        let file = message.fds.pop().map(|fd| self.file(fd)).transpose().map_err(|_| libc::EINVAL)?;
        let added = self.granted.insert(map.address, Grant { last, perm, file, offset: map.offset });
        if added { Ok(()) } else { Err(libc::EEXIST) }
    }

    fn file(&self, fd: OwnedFd) -> io::Result<Arc<File>> {
        let file = File::from(fd);
        let metadata = file.metadata()?;
        let mut files = locked(&self.files);
        let slot = files.entry((metadata.dev(), metadata.ino())).or_default();
        if let Some(known) = slot.upgrade() {
            return Ok(known);
        }
        let file = Arc::new(file);
        *slot = Arc::downgrade(&file);
        files.retain(|_, file| file.strong_count() > 0);
        Ok(file)
    }

    /// Takes back whole mappings, as VFIO does: the range may have holes, and nothing at all. The reply says how many
    /// bytes were mapped there.
    fn unmap(&self, message: &Message) -> Result<Vec<u8>, i32> {
        let (unmap, _) = message.parse::<DmaUnmap>().map_err(|_| libc::EINVAL)?;
        let last = match (unmap.flags, unmap.address, unmap.size) {
            (0, first, size) => size.checked_sub(1).and_then(|n| first.checked_add(n)),
            (DMA_UNMAP_ALL, 0, 0) => Some(u64::MAX),
            // Whoever wants to know what was written is not told that nothing was.
            _ => None,
        };
        let gone = self.granted.remove(unmap.address, last.ok_or(libc::EINVAL)?).ok_or(libc::EINVAL)?;
        let size = gone.iter().map(|mapping| mapping.end - mapping.start).sum();
        Ok(DmaUnmap { size, ..unmap }.as_bytes().to_vec())
    }

    /// The client is gone.
    fn clear(&self) {
        self.granted.clear();
        locked(&self.files).clear();
        *locked(&self.twin) = None;
    }
}

/// Serves `function` to the client at the other end of `stream`, until it closes the connection. `memory` is what the
/// function's DMA goes by; afterwards it is empty, and the function signals nobody. One that the client stopped is
/// reset then.
pub fn serve(stream: &UnixStream, function: &dyn Served, memory: &ClientMemory) -> Result<(), ServeError> {
    let mut session = Session { stream, function, memory, mappings: 0, migration: Migration::default() };
    let result = session.run();
    memory.clear();
    IrqKind::ALL.into_iter().for_each(|kind| function.disable_irqs(kind));
    if session.migration.is_stopped() {
        // Else it would begin what the client did not want.
        function.reset();
        session.migration.was_reset(function.state());
    }
    result
}

struct Session<'a> {
    stream: &'a UnixStream,
    function: &'a dyn Served,
    memory: &'a ClientMemory,
    /// How many mappings the client may make.
    mappings: u64,
    migration: Migration,
}

impl Session<'_> {
    fn run(&mut self) -> Result<(), ServeError> {
        let Some(first) = receive(self.stream)? else { return Ok(()) };
        self.agree(&first)?;
        while let Some(mut message) = receive(self.stream)? {
            let header = message.header;
            if header.flags & 0xf != 0 {
                debug!("a reply that nobody waits for");
                continue;
            }
            let result = self.carry_out(&mut message);
            if header.flags & FLAG_NO_REPLY != 0 {
                if let Err(errno) = result {
                    warn!("command {} failed: {}", header.command, io::Error::from_raw_os_error(errno));
                }
                continue;
            }
            match result {
                Ok(payload) => send(self.stream, reply_to(&header, None), &[&payload], &[])?,
                Err(errno) => send(self.stream, reply_to(&header, Some(errno)), &[], &[])?,
            }
        }
        Ok(())
    }

    /// Answers what the client proposes: the smaller minor version of both, and what this side can as far as the client
    /// can it too.
    fn agree(&mut self, first: &Message) -> Result<(), ServeError> {
        let proposed = (first.header.command == command::VERSION).then(|| parse_version(&first.payload)).flatten();
        let Some((version, wanted)) = proposed.filter(|(version, _)| version.major == VERSION.major) else {
            send(self.stream, reply_to(&first.header, Some(libc::EINVAL)), &[], &[])?;
            return Err(ServeError::Version);
        };
        let mut capabilities = Capabilities {
            max_msg_fds: MAX_FDS as u32,
            max_data_xfer_size: MAX_DATA as u64,
            max_dma_maps: wanted.max_dma_maps.min(MAX_DMA_MAPS),
            ..Capabilities::default()
        };
        self.mappings = capabilities.max_dma_maps;
        let version = Version { minor: version.minor.min(VERSION.minor), ..VERSION };
        let mut theirs = None;
        if wanted.twin_socket.is_some_and(|twin| twin.supported) {
            let (ours, other) = UnixStream::pair()?;
            *locked(&self.memory.twin) = Some(Twin { stream: ours, transfer: wanted.max_data_xfer_size });
            capabilities.twin_socket = Some(TwinSocket { supported: true, fd_index: Some(0) });
            theirs = Some(other);
        }
        let fds: Vec<_> = theirs.iter().map(AsRawFd::as_raw_fd).collect();
        send(self.stream, reply_to(&first.header, None), &[&version_payload(version, &capabilities)], &fds)?;
        Ok(())
    }

    /// The payload of the reply, or an errno.
    fn carry_out(&mut self, message: &mut Message) -> Result<Vec<u8>, i32> {
        let short = |_| libc::EINVAL;
        match message.header.command {
            command::DMA_MAP => self.memory.map(message, self.mappings).map(|()| Vec::new()),
            command::DMA_UNMAP => self.memory.unmap(message),
            command::DEVICE_GET_INFO => {
                let info = DeviceInfo {
                    argsz: size_of::<DeviceInfo>() as u32,
                    flags: VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET,
                    num_regions: VFIO_PCI_NUM_REGIONS,
                    num_irqs: IrqKind::ALL.len() as u32,
                };
                Ok(info.as_bytes().to_vec())
            }
            command::DEVICE_GET_REGION_INFO => {
                let (ask, _) = message.parse::<RegionInfo>().map_err(short)?;
                if ask.index >= VFIO_PCI_NUM_REGIONS {
                    return Err(libc::EINVAL);
                }
                let size = RegionKind::of_index(ask.index).map_or(0, |region| self.function.region_size(region));
                let flags = if size > 0 { VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE } else { 0 };
                let argsz = size_of::<RegionInfo>() as u32;
                let info = RegionInfo { argsz, flags, index: ask.index, cap_offset: 0, size, offset: 0 };
                Ok(info.as_bytes().to_vec())
            }
            command::DEVICE_GET_IRQ_INFO => {
                let (ask, _) = message.parse::<IrqInfo>().map_err(short)?;
                let kind = IrqKind::of_index(ask.index).ok_or(libc::EINVAL)?;
                let flags = VFIO_IRQ_INFO_EVENTFD
                    | match kind {
                        IrqKind::Intx => VFIO_IRQ_INFO_MASKABLE | VFIO_IRQ_INFO_AUTOMASKED,
                        _ => VFIO_IRQ_INFO_NORESIZE,
                    };
                let count = self.function.irq_count(kind);
                if count == 0 && kind == IrqKind::Error {
                    // As the kernel's VFIO does it for functions that report no errors: QEMU's client warns of one with
                    // none.
                    return Err(libc::EINVAL);
                }
                let info = IrqInfo { argsz: size_of::<IrqInfo>() as u32, flags, index: ask.index, count };
                Ok(info.as_bytes().to_vec())
            }
            command::DEVICE_SET_IRQS => self.set_irqs(message).map(|()| Vec::new()),
            command::REGION_READ => {
                let (access, _) = message.parse::<RegionAccess>().map_err(short)?;
                let region = self.inside(&access)?;
                let mut reply = access.as_bytes().to_vec();
                let at = reply.len();
                reply.resize(at + access.count as usize, 0);
                self.function.read(region, access.offset, &mut reply[at..]);
                Ok(reply)
            }
            command::REGION_WRITE => {
                let (access, data) = message.parse::<RegionAccess>().map_err(short)?;
                let region = self.inside(&access)?;
                let data = Some(data).filter(|data| data.len() == access.count as usize).ok_or(libc::EINVAL)?;
                self.function.write(region, access.offset, data);
                Ok(access.as_bytes().to_vec())
            }
            command::DEVICE_FEATURE if Migration::serves(message) => {
                self.migration.feature(self.function.state(), message)
            }
            command::MIG_DATA_READ => self.migration.read(message),
            command::MIG_DATA_WRITE => self.migration.write(message),
            command::DEVICE_FEATURE => logging::serve(&self.memory.granted, message),
            command::DEVICE_RESET => {
                self.function.reset();
                self.migration.was_reset(self.function.state());
                Ok(Vec::new())
            }
            _ => Err(libc::ENOTSUP),
        }
    }

    fn inside(&self, access: &RegionAccess) -> Result<RegionKind, i32> {
        let region = RegionKind::of_index(access.region).ok_or(libc::EINVAL)?;
        let end = access.offset.checked_add(access.count.into());
        let fits = end.is_some_and(|end| end <= self.function.region_size(region)) && access.count as usize <= MAX_DATA;
        if fits { Ok(region) } else { Err(libc::EINVAL) }
    }

    fn set_irqs(&self, message: &mut Message) -> Result<(), i32> {
        let (set, _) = message.parse::<IrqSet>().map_err(|_| libc::EINVAL)?;
        let kind = IrqKind::of_index(set.index).ok_or(libc::EINVAL)?;
        let end = set.start.checked_add(set.count).filter(|end| *end <= self.function.irq_count(kind));
        end.ok_or(libc::EINVAL)?;
        const TRIGGER: u32 = VFIO_IRQ_SET_ACTION_TRIGGER;
        const DISABLE: u32 = VFIO_IRQ_SET_DATA_NONE | TRIGGER;
        const EVENTS: u32 = VFIO_IRQ_SET_DATA_EVENTFD | TRIGGER;
        const MASK: u32 = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_MASK;
        const UNMASK: u32 = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_UNMASK;
        match set.flags {
            DISABLE if set.count == 0 => self.function.disable_irqs(kind),
            EVENTS if message.fds.is_empty() => {
                self.function.set_irqs(kind, set.start, (0..set.count).map(|_| None).collect());
            }
            EVENTS if message.fds.len() == set.count as usize => {
                let triggers = message.fds.drain(..).map(|fd| Some(File::from(fd))).collect();
                self.function.set_irqs(kind, set.start, triggers);
            }
            MASK if kind == IrqKind::Intx && set.count == 1 => self.function.mask_intx(),
            UNMASK if kind == IrqKind::Intx && set.count == 1 => self.function.unmask_intx(),
            EVENTS => return Err(libc::EINVAL),
            _ => return Err(libc::ENOTSUP),
        }
        Ok(())
    }
}
