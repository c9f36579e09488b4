//! Guest memory in a file, a function that is served from a thread, and what it was asked.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use vfio_bridge::vfio_user::{
    ClientMemory, ConnectError, Served, ServedState, UserEndpoint, UserFunction, UserOptions, VfioUser, serve,
};
use vfio_bridge::{
    Function, GroupId, GuestMap, HostIommu, HostSpaceId, IrqKind, MapRefused, Placement, RegionKind, Requests,
    UnmapRange,
};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::tempfile::TempFile;
use vtd::{Iova, Perm};

/// Bytes of guest memory.
pub const RAM: u64 = 1 << 20;

/// Guest memory in a file: two regions, so that offsets in the file are not addresses.
pub struct Memory {
    pub ram: Arc<GuestMemoryMmap<()>>,
    pub map: GuestMap,
}

pub const HIGH: u64 = 4 << 30;

impl Memory {
    pub fn new() -> Self {
        let file = TempFile::new().unwrap().into_file();
        file.set_len(RAM).unwrap();
        let file = Arc::new(file);
        let half = RAM / 2;
        let range = |gpa, offset| {
            (GuestAddress(gpa), half as usize, Some(FileOffset::from_arc(Arc::<File>::clone(&file), offset)))
        };
        let ram = Arc::new(GuestMemoryMmap::from_ranges_with_files([range(0, 0), range(HIGH, half)]).unwrap());
        let map = GuestMap::of_memory(ram.clone()).unwrap();
        Self { ram, map }
    }

    pub fn put(&self, gpa: u64, value: u64) {
        self.ram.write_obj(value, GuestAddress(gpa)).unwrap();
    }

    pub fn get(&self, gpa: u64) -> u64 {
        self.ram.read_obj(GuestAddress(gpa)).unwrap()
    }
}

/// What a served function was asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Asked {
    Write(RegionKind, u64, Vec<u8>),
    Irqs(IrqKind, u32, Vec<bool>),
    Disable(IrqKind),
    Mask,
    Unmask,
    Reset,
    Stop,
    GoOn,
    Save,
    Load,
}

/// A function whose BAR 2 reads as the offset.
#[derive(Default)]
pub struct Device {
    pub asked: Mutex<Vec<Asked>>,
    pub triggers: Mutex<Vec<Option<File>>>,
    /// How long it takes to read a region.
    pub slowness: Mutex<Duration>,
    /// Its state; `None`: it has none that can be given away. One that begins with 0xbad is none of it.
    pub state: Mutex<Option<Vec<u8>>>,
}

impl Device {
    pub fn take(&self) -> Vec<Asked> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }

    fn note(&self, asked: Asked) {
        self.asked.lock().unwrap().push(asked);
    }
}

impl Served for Device {
    fn region_size(&self, region: RegionKind) -> u64 {
        match region {
            RegionKind::Bar(2) => 4 << 20,
            RegionKind::Config => 256,
            _ => 0,
        }
    }
    fn irq_count(&self, kind: IrqKind) -> u32 {
        match kind {
            IrqKind::Intx => 1,
            IrqKind::Msix => 40,
            _ => 0,
        }
    }
    fn read(&self, _: RegionKind, offset: u64, data: &mut [u8]) {
        std::thread::sleep(*self.slowness.lock().unwrap());
        data.iter_mut().zip(offset..).for_each(|(byte, at)| *byte = at as u8);
    }
    fn write(&self, region: RegionKind, offset: u64, data: &[u8]) {
        self.note(Asked::Write(region, offset, data.to_vec()));
    }
    fn set_irqs(&self, kind: IrqKind, start: u32, triggers: Vec<Option<File>>) {
        self.note(Asked::Irqs(kind, start, triggers.iter().map(Option::is_some).collect()));
        self.triggers.lock().unwrap().extend(triggers);
    }
    fn disable_irqs(&self, kind: IrqKind) {
        self.note(Asked::Disable(kind));
    }
    fn mask_intx(&self) {
        self.note(Asked::Mask);
    }
    fn unmask_intx(&self) {
        self.note(Asked::Unmask);
    }
    fn reset(&self) {
        self.note(Asked::Reset);
    }
    fn state(&self) -> Option<&dyn ServedState> {
        self.state.lock().unwrap().is_some().then_some(self)
    }
}

impl ServedState for Device {
    fn stop(&self) {
        self.note(Asked::Stop);
    }
    fn go_on(&self) {
        self.note(Asked::GoOn);
    }
    fn save(&self) -> Vec<u8> {
        self.note(Asked::Save);
        self.state.lock().unwrap().clone().unwrap()
    }
    fn load(&self, state: &[u8]) -> Result<(), String> {
        self.note(Asked::Load);
        if state.starts_with(&[0xba, 0xd0]) {
            return Err("it begins with 0xbad".to_owned());
        }
        *self.state.lock().unwrap() = Some(state.to_vec());
        Ok(())
    }
}

/// What the unit heard.
#[derive(Default)]
pub struct Heard {
    pub blocked: Mutex<Vec<(u64, bool)>>,
    pub messages: Mutex<Vec<(u64, u32)>>,
}

impl Requests for Heard {
    fn blocked(&self, iova: Iova, write: bool) {
        self.blocked.lock().unwrap().push((iova.0, write));
    }
    fn message(&self, address: u64, data: u32) {
        self.messages.lock().unwrap().push((address, data));
    }
}

/// A client and what it is connected to.
pub struct Rig {
    pub memory: Memory,
    pub function: UserFunction,
    pub host: VfioUser,
    pub heard: Arc<Heard>,
}

/// Long enough for a loaded machine.
pub const PATIENT: Duration = Duration::from_secs(60);

impl Rig {
    pub fn connect(stream: UnixStream, deadline: Duration) -> Result<Self, ConnectError> {
        Self::connect_with(stream, UserOptions { deadline, ..UserOptions::default() })
    }

    /// The process gets no file of the memory.
    pub fn confined(stream: UnixStream, deadline: Duration) -> Self {
        Self::connect_with(stream, UserOptions { deadline, confined: true }).unwrap()
    }

    fn connect_with(stream: UnixStream, options: UserOptions) -> Result<Self, ConnectError> {
        let host = VfioUser::default();
        let endpoint = UserEndpoint::Connected(stream.into());
        let function = host.open_with(endpoint, "test", options)?;
        let heard = Arc::new(Heard::default());
        function.tell(heard.clone());
        Ok(Self { memory: Memory::new(), function, host, heard })
    }

    pub fn space(&self) -> HostSpaceId {
        space_of(&self.host, self.function.group())
    }

    pub fn map(&self, iova: u64, gpa: u64, len: u64, perm: Perm) -> Result<(), MapRefused> {
        let mem = self.memory.map.host_mem(gpa, len).unwrap();
        self.host.map(self.space(), iova, mem, perm)
    }

    pub fn unmap(&self, first: u64, last: u64) -> std::io::Result<u64> {
        self.host.unmap(self.space(), UnmapRange::Span { first, last })
    }
}

/// A function served by this crate, in a thread of its own.
pub struct Serving {
    pub device: Arc<Device>,
    pub memory: Arc<ClientMemory>,
    pub thread: JoinHandle<Result<(), vfio_bridge::vfio_user::ServeError>>,
}

pub fn serving() -> (UnixStream, Serving) {
    let (client, server) = UnixStream::pair().unwrap();
    let (device, memory) = (Arc::new(Device::default()), Arc::new(ClientMemory::default()));
    let thread = {
        let (device, memory) = (device.clone(), memory.clone());
        std::thread::spawn(move || serve(&server, &*device, &memory))
    };
    (client, Serving { device, memory, thread })
}

/// An eventfd as a file, and whether it was signalled since the last time it was asked.
pub fn was_signalled(event: &vmm_sys_util::eventfd::EventFd) -> bool {
    event.read().is_ok()
}

pub fn event() -> vmm_sys_util::eventfd::EventFd {
    vmm_sys_util::eventfd::EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap()
}

/// The space that `group` is in for life.
pub fn space_of(host: &dyn HostIommu, group: GroupId) -> HostSpaceId {
    match host.placement(group) {
        Some(Placement::PerGroup(space)) => space,
        other => panic!("{other:?}"),
    }
}
