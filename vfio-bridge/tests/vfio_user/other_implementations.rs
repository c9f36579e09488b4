//! Each end of ours against the other end of the crate `vfio_user`.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};

use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_REGION_INFO_FLAG_READ,
    VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info,
};
use vfio_bridge::vfio_user::{ClientMemory, UserEndpoint, UserOptions, VfioUser, serve};
use vfio_bridge::{Function, HostIommu, IrqKind, RegionKind, ResetScope, ResetWay, UnmapRange};
use vfio_user::{Client, DmaMapFlags, DmaUnmapFlags, IrqInfo, Server, ServerBackend, ServerRegion};
use vmm_sys_util::tempdir::TempDir;
use vtd::{Iova, Perm};

use super::rig::{Asked, Device, HIGH, Memory, event, space_of, was_signalled};

type Maps = Vec<(u64, u64, u64, DmaMapFlags, Option<File>)>;

#[derive(Default)]
struct Backend {
    maps: Arc<Mutex<Maps>>,
    refuse: bool,
}

impl ServerBackend for Backend {
    fn region_read(&mut self, _: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        data.fill(offset as u8);
        Ok(())
    }
    fn region_write(&mut self, _: u32, _: u64, data: &[u8]) -> io::Result<()> {
        if data == [0xee] { Err(io::ErrorKind::InvalidInput.into()) } else { Ok(()) }
    }
    fn dma_map(
        &mut self,
        flags: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> io::Result<()> {
        if self.refuse {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.maps.lock().unwrap().push((address, size, offset, flags, fd));
        Ok(())
    }
    fn dma_unmap(&mut self, _: DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        let mut maps = self.maps.lock().unwrap();
        let before = maps.len();
        maps.retain(|map| (map.0, map.1) != (address, size));
        if maps.len() == before { Err(io::ErrorKind::NotFound.into()) } else { Ok(()) }
    }
    fn reset(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn set_irqs(&mut self, _: u32, _: u32, _: u32, _: u32, fds: Vec<File>) -> io::Result<()> {
        use std::io::Write;
        fds.into_iter().try_for_each(|mut fd| fd.write_all(&1u64.to_ne_bytes()))
    }
}

fn regions() -> Vec<ServerRegion> {
    let region = |index| ServerRegion {
        region_info: vfio_region_info {
            argsz: size_of::<vfio_region_info>() as u32,
            flags: VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE,
            index,
            size: if index == 7 { 256 } else { 0 },
            ..Default::default()
        },
        sparse_areas: Vec::new(),
        mmap_fd: None,
    };
    (0..9).map(region).collect()
}

#[test]
fn our_client_with_its_server() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("socket");
    let irqs = (0..5).map(|index| IrqInfo { index, flags: VFIO_IRQ_INFO_EVENTFD, count: 2 }).collect();
    let server = Server::new(&path, true, irqs, regions()).unwrap();
    let maps: Arc<Mutex<Maps>> = Arc::default();
    let mut backend = Backend { maps: maps.clone(), refuse: false };
    let thread = std::thread::spawn(move || {
        server.run(&mut backend).unwrap();
    });
    let host = VfioUser::default();
    let function = host.open(UserEndpoint::Path(path), "other").unwrap();
    assert_eq!(function.reset_way(), ResetWay::Process);
    assert_eq!((function.region(RegionKind::Config).size, function.region(RegionKind::Bar(0)).size), (256, 0));
    let mut data = [0; 3];
    function.read(RegionKind::Config, 9, &mut data);
    assert_eq!(data, [9; 3]);
    function.write(RegionKind::Config, 4, &[1, 2]).unwrap();
    assert!(function.write(RegionKind::Config, 4, &[0xee]).is_err());
    // It takes one file a message.
    let events = [event(), event()];
    function.set_irqs(IrqKind::Msi, 0, &[Some(&events[0]), Some(&events[1])]).unwrap();
    assert!(was_signalled(&events[0]) && was_signalled(&events[1]));
    function.reset(ResetScope::Function).unwrap();

    let memory = Memory::new();
    let space = space_of(&host, function.group());
    let mem = |gpa| memory.map.host_mem(gpa, 0x1000).unwrap();
    host.map(space, 0x4000, mem(HIGH), Perm::Read).unwrap();
    host.map(space, 0x6000, mem(0x1000), Perm::ReadWrite).unwrap();
    memory.put(HIGH, 0x55);
    {
        let maps = maps.lock().unwrap();
        assert_eq!(
            maps.iter().map(|map| (map.0, map.1, map.3)).collect::<Vec<_>>(),
            [(0x4000, 0x1000, DmaMapFlags::READ), (0x6000, 0x1000, DmaMapFlags::READ_WRITE)]
        );
        let mut data = [0; 8];
        maps[0].4.as_ref().unwrap().read_exact_at(&mut data, maps[0].2).unwrap();
        assert_eq!(u64::from_ne_bytes(data), 0x55);
    }
    assert_eq!(host.unmap(space, UnmapRange::All).unwrap(), 0x2000);
    assert!(maps.lock().unwrap().is_empty());
    // What it does not know, it refuses to unmap; that is told.
    host.map(space, 0x4000, mem(0), Perm::Read).unwrap();
    maps.lock().unwrap().clear();
    assert!(host.unmap(space, UnmapRange::All).is_err());
    drop(function);
    thread.join().unwrap();
}

#[test]
fn its_server_takes_mappings_without_files() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("socket");
    let server = Server::new(&path, false, Vec::new(), regions()).unwrap();
    let maps: Arc<Mutex<Maps>> = Arc::default();
    let mut backend = Backend { maps: maps.clone(), refuse: false };
    let thread = std::thread::spawn(move || {
        server.run(&mut backend).unwrap();
    });
    let host = VfioUser::default();
    let options = UserOptions { confined: true, ..UserOptions::default() };
    let function = host.open_with(UserEndpoint::Path(path), "other", options).unwrap();
    let (space, memory) = (space_of(&host, function.group()), Memory::new());
    host.map(space, 0x4000, memory.map.host_mem(HIGH, 0x1000).unwrap(), Perm::Read).unwrap();
    let (address, size, offset, flags) =
        maps.lock().unwrap().iter().map(|map| (map.0, map.1, map.2, map.3)).next().unwrap();
    assert_eq!((address, size, offset, flags), (0x4000, 0x1000, 0, DmaMapFlags::READ));
    assert!(maps.lock().unwrap()[0].4.is_none());
    assert_eq!(host.unmap(space, UnmapRange::All).unwrap(), 0x1000);
    assert!(maps.lock().unwrap().is_empty());
    drop(function);
    thread.join().unwrap();
}

#[test]
fn its_refusals_reach_us() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("socket");
    let server = Server::new(&path, false, Vec::new(), regions()).unwrap();
    let mut backend = Backend { refuse: true, ..Backend::default() };
    let thread = std::thread::spawn(move || {
        server.run(&mut backend).unwrap();
    });
    let host = VfioUser::default();
    let function = host.open(UserEndpoint::Path(path), "other").unwrap();
    assert_eq!(function.reset(ResetScope::Function).unwrap_err().kind(), io::ErrorKind::Unsupported);
    let memory = Memory::new();
    let space = space_of(&host, function.group());
    host.map(space, 0, memory.map.host_mem(0, 0x1000).unwrap(), Perm::Read).unwrap_err();
    assert_eq!(host.unmap(space, UnmapRange::All).unwrap(), 0);
    drop(function);
    thread.join().unwrap();
}

#[test]
fn its_client_with_our_server() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let (device, memory) = (Arc::new(Device::default()), Arc::new(ClientMemory::default()));
    let thread = {
        let (device, memory) = (device.clone(), memory.clone());
        std::thread::spawn(move || serve(&listener.accept().unwrap().0, &*device, &memory))
    };
    let mut client = Client::new(&path).unwrap();
    assert_eq!(client.region(2).unwrap().size, 4 << 20);
    let mut data = [0; 4];
    client.region_read(2, 0x10, &mut data).unwrap();
    assert_eq!(data, [0x10, 0x11, 0x12, 0x13]);
    client.region_write(7, 4, &[6, 0]).unwrap();
    client.reset().unwrap();
    assert_eq!(device.take(), [Asked::Write(RegionKind::Config, 4, vec![6, 0]), Asked::Reset]);
    assert_eq!(client.get_irq_info(2).unwrap().count, 40);
    let event = event();
    let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    client.set_irqs(2, flags, 3, 1, &[event.as_raw_fd()]).unwrap();
    assert_eq!(device.take(), [Asked::Irqs(IrqKind::Msix, 3, vec![true])]);

    let guest = Memory::new();
    guest.put(0x2000, 0x66);
    let file = guest.map.host_mem(0x2000, 0x1000).unwrap();
    let (file, offset) = file.backing().unwrap();
    client.dma_map(offset, 0x9000, 0x1000, file.as_raw_fd()).unwrap();
    let mut data = [0; 8];
    memory.read(Iova(0x9000), &mut data).unwrap();
    assert_eq!(u64::from_ne_bytes(data), 0x66);
    client.dma_unmap(0x9000, 0x1000).unwrap();
    // It wants no second socket, so it cannot be asked.
    assert!(memory.read(Iova(0x9000), &mut data).is_err());
    client.shutdown().unwrap();
    drop(client);
    thread.join().unwrap().unwrap();
}
