//! A PCI function that another process emulates: regions, interrupts and reset.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use log::debug;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_SET_ACTION_TRIGGER,
    VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE, VFIO_PCI_NUM_REGIONS,
    VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_FLAG_CAPS, VFIO_REGION_INFO_FLAG_MMAP,
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
};
use vmm_sys_util::eventfd::EventFd;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::connection::{CallError, ConnectError, Connection};
use super::migration::{self, State};
use super::socket::{MAX_DATA, Message};
use super::wire::{self, DeviceInfo, IrqInfo, IrqSet, RegionAccess, command};
use crate::function::reset::{ResetScope, ResetWay};
use crate::function::{DmaMessages, Function, IrqKind, Migrates, RegionInfo, RegionKind, Requests, mappable_pages};
use crate::host::GroupId;

/// Bytes of a region's capabilities that are asked for at first, and what is asked for at most.
const CAPABILITIES: u32 = 4096;
const REGION_INFO_MAX: u32 = MAX_DATA as u32;

/// A function behind a connection, open.
pub struct UserFunction {
    connection: Arc<Connection>,
    group: GroupId,
    regions: Vec<Region>,
    irqs: Vec<IrqInfo>,
    resettable: bool,
    /// Whether its state can be had. Asked when somebody wants to know: there are servers that end at the question.
    migrates: OnceLock<bool>,
}

#[derive(Default)]
struct Region {
    info: RegionInfo,
    file: Option<Arc<OwnedFd>>,
}

impl std::fmt::Debug for UserFunction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UserFunction")
            .field("name", &self.connection.name())
            .field("group", &self.group)
            .finish_non_exhaustive()
    }
}

impl UserFunction {
    /// Asks what the function is.
    pub(super) fn new(connection: Arc<Connection>, group: GroupId) -> Result<Self, ConnectError> {
        let ask = DeviceInfo { argsz: size_of::<DeviceInfo>() as u32, ..DeviceInfo::new_zeroed() };
        let (device, _) = parse::<DeviceInfo>(&connection.call(command::DEVICE_GET_INFO, &[ask.as_bytes()], &[])?)?;
        if device.flags & VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(ConnectError::Protocol("its device is not a PCI function"));
        }
        let regions = (0..VFIO_PCI_NUM_REGIONS.min(device.num_regions)).map(|index| region(&connection, index));
        let regions = regions.collect::<Result<_, _>>()?;
        let irqs = (0..(IrqKind::ALL.len() as u32).min(device.num_irqs)).map(|index| {
            let ask = IrqInfo { argsz: size_of::<IrqInfo>() as u32, index, ..IrqInfo::new_zeroed() };
            match connection.call(command::DEVICE_GET_IRQ_INFO, &[ask.as_bytes()], &[]) {
                Ok(reply) => parse::<IrqInfo>(&reply).map(|(info, _)| info),
                // A kind that the function does not have: servers answer as the kernel's VFIO does.
                Err(CallError::Refused(_)) => Ok(IrqInfo::new_zeroed()),
                Err(e) => Err(e.into()),
            }
        });
        let irqs = irqs.collect::<Result<_, _>>()?;
        let resettable = device.flags & VFIO_DEVICE_FLAGS_RESET != 0;
        Ok(Self { connection, group, regions, irqs, resettable, migrates: OnceLock::new() })
    }

    fn try_read(&self, region: RegionKind, offset: u64, data: &mut [u8]) -> Result<(), CallError> {
        let mut at = offset;
        for part in data.chunks_mut(self.transfer()) {
            let access = RegionAccess { offset: at, region: region.index(), count: part.len() as u32 };
            let reply = self.connection.call(command::REGION_READ, &[access.as_bytes()], &[])?;
            let (_, found) = reply.parse::<RegionAccess>().map_err(|_| CallError::Garbage)?;
            part.copy_from_slice(found.get(..part.len()).ok_or(CallError::Garbage)?);
            at += part.len() as u64;
        }
        Ok(())
    }

    fn transfer(&self) -> usize {
        let theirs = usize::try_from(self.connection.capabilities().max_data_xfer_size).unwrap_or(MAX_DATA);
        theirs.clamp(1, MAX_DATA)
    }

    fn set(&self, kind: IrqKind, flags: u32, start: u32, count: u32, fds: &[i32]) -> io::Result<()> {
        let set = IrqSet { argsz: size_of::<IrqSet>() as u32, flags, index: kind.index(), start, count };
        self.connection.call(command::DEVICE_SET_IRQS, &[set.as_bytes()], fds)?;
        Ok(())
    }
}

impl Function for UserFunction {
    fn name(&self) -> String {
        self.connection.name().to_owned()
    }

    fn group(&self) -> GroupId {
        self.group
    }

    fn region(&self, region: RegionKind) -> RegionInfo {
        self.regions.get(region.index() as usize).map(|region| region.info.clone()).unwrap_or_default()
    }

    fn file(&self, region: RegionKind) -> Option<Arc<OwnedFd>> {
        self.regions.get(region.index() as usize)?.file.clone()
    }

    fn read(&self, region: RegionKind, offset: u64, data: &mut [u8]) {
        if let Err(e) = self.try_read(region, offset, data) {
            debug!("{}: read of {region:?} at {offset:#x} failed: {e}", self.connection.name());
            data.fill(0xff);
        }
    }

    fn write(&self, region: RegionKind, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut at = offset;
        for part in data.chunks(self.transfer()) {
            let access = RegionAccess { offset: at, region: region.index(), count: part.len() as u32 };
            if let Err(e) = self.connection.call(command::REGION_WRITE, &[access.as_bytes(), part], &[]) {
                debug!("{}: write of {region:?} at {at:#x} failed: {e}", self.connection.name());
                return Err(e.into());
            }
            at += part.len() as u64;
        }
        Ok(())
    }

    fn irq_count(&self, kind: IrqKind) -> u32 {
        let info = self.irqs.get(kind.index() as usize);
        info.filter(|irq| irq.flags & VFIO_IRQ_INFO_EVENTFD != 0).map_or(0, |irq| irq.count)
    }

    fn irq_noresize(&self, _: IrqKind) -> bool {
        // A process has no vectors of the host to allocate.
        false
    }

    fn set_irqs(&self, kind: IrqKind, start: u32, triggers: &[Option<&EventFd>]) -> io::Result<()> {
        let most = (self.connection.capabilities().max_msg_fds as usize).max(1);
        let mut start = start;
        // A message carries eventfds for all of its vectors, or takes away those of all.
        for run in triggers.chunk_by(|a, b| a.is_some() == b.is_some()).flat_map(|run| run.chunks(most)) {
            let fds: Vec<_> = run.iter().flatten().map(|event| event.as_raw_fd()).collect();
            let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
            self.set(kind, flags, start, run.len() as u32, &fds)?;
            start += run.len() as u32;
        }
        Ok(())
    }

    fn disable_irqs(&self, kind: IrqKind) -> io::Result<()> {
        self.set(kind, VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER, 0, 0, &[])
    }

    fn mask_intx(&self) -> io::Result<()> {
        // Servers need not do it when it fires, and a write of the command register does not touch it.
        Err(io::ErrorKind::Unsupported.into())
    }

    fn unmask_intx(&self) -> io::Result<()> {
        self.set(IrqKind::Intx, VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_UNMASK, 0, 1, &[])
    }

    fn reset_way(&self) -> ResetWay {
        if self.resettable { ResetWay::Process } else { ResetWay::None(None) }
    }

    fn reset(&self, _: ResetScope) -> io::Result<()> {
        if !self.resettable {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.connection.call(command::DEVICE_RESET, &[], &[])?;
        Ok(())
    }

    fn is_emulated(&self) -> bool {
        true
    }

    fn tell(&self, requests: Arc<dyn Requests>) {
        self.connection.tell(requests);
    }

    fn is_gone(&self) -> bool {
        self.connection.has_ended()
    }
    fn wake_when_gone(&self, event: EventFd) {
        self.connection.wake_at_end(event);
    }
    fn is_confined(&self) -> bool {
        self.connection.is_confined()
    }

    fn dma_messages(&self) -> Option<DmaMessages> {
        Some(self.connection.messages())
    }

    fn migration(&self) -> Option<&dyn Migrates> {
        let offers = *self.migrates.get_or_init(|| migration::is_offered(&self.connection));
        // Who is gone has no state any more.
        (offers && !self.connection.has_ended()).then_some(self)
    }
}

impl Migrates for UserFunction {
    fn stop(&self) -> io::Result<()> {
        migration::go_to(&self.connection, State::Stop)
    }

    fn go_on(&self) -> io::Result<()> {
        migration::go_to(&self.connection, State::Running)
    }

    fn state(&self) -> io::Result<Vec<u8>> {
        migration::read(&self.connection, self.transfer())
    }

    fn load(&self, state: &[u8]) -> io::Result<()> {
        migration::write(&self.connection, self.transfer(), state)
    }
}

fn parse<T: FromBytes>(reply: &Message) -> Result<(T, &[u8]), ConnectError> {
    reply.parse().map_err(|_| ConnectError::Protocol("an answer is too short"))
}

fn region(connection: &Connection, index: u32) -> Result<Region, ConnectError> {
    let ask = |argsz| -> Result<(wire::RegionInfo, Message), ConnectError> {
        let ask = wire::RegionInfo { argsz, index, ..wire::RegionInfo::new_zeroed() };
        let reply = connection.call(command::DEVICE_GET_REGION_INFO, &[ask.as_bytes()], &[])?;
        Ok((parse::<wire::RegionInfo>(&reply)?.0, reply))
    };
    let argsz = size_of::<wire::RegionInfo>() as u32 + CAPABILITIES;
    let (mut info, mut reply) = ask(argsz)?;
    let needs_more = info.argsz > argsz;
    if needs_more && info.argsz <= REGION_INFO_MAX {
        (info, reply) = ask(info.argsz)?;
    }
    let has_capabilities = info.flags & VFIO_REGION_INFO_FLAG_CAPS != 0;
    let mappable = match info.flags & VFIO_REGION_INFO_FLAG_MMAP {
        0 => Vec::new(),
        _ if has_capabilities => {
            // Of a list that cannot be read nothing is mappable: what it leaves out is not memory.
            let areas = sparse_areas(&reply.payload, info.cap_offset);
            areas.map_or_else(Vec::new, |areas| areas.unwrap_or_else(|| vec![(0, info.size)]))
        }
        _ if needs_more => Vec::new(),
        _ => vec![(0, info.size)],
    };
    let file = reply.fds.into_iter().next().map(Arc::new);
    let offered = if file.is_some() { mappable } else { Vec::new() };
    let info = RegionInfo {
        size: info.size,
        file_offset: info.offset,
        readable: info.flags & VFIO_REGION_INFO_FLAG_READ != 0,
        writable: info.flags & VFIO_REGION_INFO_FLAG_WRITE != 0,
        mappable: mappable_pages(info.size, offered),
    };
    Ok(Region { info, file })
}

/// The areas of the capability that lists them; without one `Some(None)`; `None` when the capabilities are not there,
/// or not whole. Offsets count from the start of the structure.
fn sparse_areas(payload: &[u8], first: u32) -> Option<Option<Vec<(u64, u64)>>> {
    let u32_at = |at: usize| Some(u32::from_ne_bytes(payload.get(at..at.checked_add(4)?)?.try_into().ok()?));
    let u64_at = |at: usize| Some(u64::from_ne_bytes(payload.get(at..at.checked_add(8)?)?.try_into().ok()?));
    let mut at = first as usize;
    if at == 0 {
        return None;
    }
    while at != 0 {
        let (kind, next) = (u32_at(at)? & 0xffff, u32_at(at + 4)? as usize);
        if kind == VFIO_REGION_INFO_CAP_SPARSE_MMAP {
            let count = u32_at(at + 8)? as usize;
            let areas = (0..count).map(|i| Some((u64_at(at + 16 + i * 16)?, u64_at(at + 24 + i * 16)?)));
            return areas.collect::<Option<_>>().map(Some);
        }
        // They stand in ascending order; anything else would not end.
        at = if next > at { next } else { 0 };
    }
    Some(None)
}
