//! The backend: what is mapped for functions that other processes emulate. Each function is alone in its group and has
//! a space of its own.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use log::debug;
use vtd::{IovaRange, Perm, RefusalCause};
use zerocopy::IntoBytes;

use super::connection::{CALL_DEADLINE, Call, CallError, ConnectError, Connection};
use super::function::UserFunction;
use super::granted::Grant;
use super::logging;
use super::socket::connect;
use super::wire::{DMA_MAP_READ, DMA_MAP_WRITE, DmaMap, DmaUnmap, command};
use crate::bridge::guest_map::{HostMem, MemKind, PAGE_SIZE};
use crate::bridge::limits::Limits;
use crate::host::dirty::{DirtyBitmap, DirtySupport};
use crate::host::{GroupId, HostIommu, HostSpaceId, Map, MapRefused, Placement, UnmapRange};

/// Calls that are under way at a time.
const CALLS_AT_ONCE: usize = 64;

/// Where the server of a function is.
#[derive(Debug)]
pub enum UserEndpoint {
    /// It listens here.
    Path(PathBuf),
    /// It is at the other end of this socket.
    Connected(OwnedFd),
}

/// How a function of another process is opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UserOptions {
    /// Its process is given no file of guest memory. It asks for each of its accesses by message, and is given what is
    /// mapped at that moment.
    pub confined: bool,
    /// How long a call of it may take.
    pub deadline: Duration,
}

impl Default for UserOptions {
    fn default() -> Self {
        Self { confined: false, deadline: CALL_DEADLINE }
    }
}

/// The vfio-user backend.
#[derive(Default)]
pub struct VfioUser {
    /// A connection lives as long as its [`UserFunction`].
    functions: Mutex<BTreeMap<GroupId, (HostSpaceId, Weak<Connection>)>>,
}

impl VfioUser {
    /// Connects to a server. `name` is for messages.
    pub fn open(&self, endpoint: UserEndpoint, name: &str) -> Result<UserFunction, ConnectError> {
        self.open_with(endpoint, name, UserOptions::default())
    }

    /// As [`VfioUser::open`], in another way.
    pub fn open_with(
        &self,
        endpoint: UserEndpoint,
        name: &str,
        options: UserOptions,
    ) -> Result<UserFunction, ConnectError> {
        let UserOptions { confined, deadline } = options;
        let stream = match endpoint {
            UserEndpoint::Path(path) => connect(&path, deadline)?,
            UserEndpoint::Connected(fd) => UnixStream::from(fd),
        };
        let connection = Arc::new(Connection::new(stream, name.to_owned(), deadline, confined)?);
        let mut functions = self.functions();
        // Of those that are gone nobody asks any more.
        functions.retain(|_, (_, connection)| connection.strong_count() > 0);
        let free = |group: &GroupId| !functions.contains_key(group);
        let group = (0..=functions.len() as u32).map(GroupId::of_user_function).find(free);
        let group = group.ok_or(ConnectError::Protocol("there is no group left for it"))?;
        let function = UserFunction::new(connection.clone(), group)?;
        functions.insert(group, (HostSpaceId::next(), Arc::downgrade(&connection)));
        Ok(function)
    }

    fn functions(&self) -> MutexGuard<'_, BTreeMap<GroupId, (HostSpaceId, Weak<Connection>)>> {
        self.functions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connection(&self, space: HostSpaceId) -> io::Result<Arc<Connection>> {
        let functions = self.functions();
        let connection =
            functions.values().find(|(of, _)| *of == space).and_then(|(_, connection)| connection.upgrade());
        connection.ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

/// Asks for a map. The answer is to be taken with [`end_map`].
fn begin_map(connection: &Connection, map: &Map<'_>) -> Result<Call, MapRefused> {
    let refused = |errno: i32| MapRefused::from_errno(errno);
    let Map { iova, mem, perm } = *map;
    // No file of a BAR leaves this process (B-10).
    if mem.kind() == MemKind::Bar {
        return Err(refused(libc::ENOTSUP));
    }
    let granted = connection.granted();
    // The process holds no more than it said, whatever it does with more.
    if granted.len() >= connection.capabilities().max_dma_maps {
        return Err(refused(libc::ENOSPC));
    }
    let (file, offset) = mem.backing().ok_or_else(|| refused(libc::ENOTSUP))?;
    let last = iova.checked_add(mem.size() - 1).ok_or_else(|| refused(libc::EINVAL))?;
    let flags = if perm.readable() { DMA_MAP_READ } else { 0 } | if perm.writable() { DMA_MAP_WRITE } else { 0 };
    let argsz = size_of::<DmaMap>() as u32;
    // Without a file the process has nothing but the range, and an offset means nothing.
    let shown = [file.as_raw_fd()];
    let (shown, at) = if connection.is_confined() { (&[][..], 0) } else { (&shown[..], offset) };
    let message = DmaMap { argsz, flags, offset: at, address: iova, size: mem.size() };
    // First, for the device may use it before the answer is here.
    if !granted.insert(iova, Grant { last, perm, file: Some(file.clone()), offset }) {
        return Err(refused(libc::EEXIST));
    }
    let call = connection.begin(command::DMA_MAP, &[message.as_bytes()], shown);
    call.map_err(|e| not_mapped(connection, map, &e))
}

fn end_map(connection: &Connection, map: &Map<'_>, call: Call) -> Result<(), MapRefused> {
    connection.end(call).map(drop).map_err(|e| not_mapped(connection, map, &e))
}

/// Takes back what was granted, and says why.
fn not_mapped(connection: &Connection, map: &Map<'_>, error: &CallError) -> MapRefused {
    connection.granted().remove(map.iova, map.iova + (map.mem.size() - 1));
    // What a process's errno means is its own affair. A full table is the exception; so are no more mappings of its own
    // (ENOMEM of mmap: Linux lets a process have 65,530, fewer than the protocol promises), which is what ends it in
    // servers on libvfio-user.
    let full = matches!(*error, CallError::Refused(libc::ENOSPC | libc::ENOMEM));
    MapRefused::from_errno(if full { libc::ENOSPC } else { libc::EIO })
}

impl HostIommu for VfioUser {
    fn name(&self) -> &'static str {
        "vfio-user"
    }

    fn placement(&self, group: GroupId) -> Option<Placement> {
        self.functions().get(&group).map(|(space, _)| Placement::PerGroup(*space))
    }

    fn limits(&self, space: HostSpaceId) -> Limits {
        let capabilities = self.connection(space).map(|connection| connection.capabilities().clone());
        let entries = capabilities.as_ref().map_or(0, |capabilities| capabilities.max_dma_maps);
        Limits {
            iova_ranges: vec![IovaRange { first: 0, last: u64::MAX - PAGE_SIZE }],
            page_sizes: capabilities.map_or(PAGE_SIZE, |capabilities| capabilities.pgsizes),
            entries,
            // Nothing is pinned.
            memlock: None,
            unmap_all: true,
        }
    }

    fn map(&self, space: HostSpaceId, iova: u64, mem: HostMem<'_>, perm: Perm) -> Result<(), MapRefused> {
        let mut result = Ok(());
        self.map_all(space, &[Map { iova, mem, perm }], &mut |told| result = told);
        result
    }

    fn map_all(&self, space: HostSpaceId, maps: &[Map<'_>], done: &mut dyn FnMut(Result<(), MapRefused>)) {
        let Ok(connection) = self.connection(space) else {
            return maps.iter().for_each(|_| done(Err(MapRefused::from_errno(libc::ENODEV))));
        };
        for maps in maps.chunks(CALLS_AT_ONCE) {
            let calls: Vec<_> = maps.iter().map(|map| begin_map(&connection, map)).collect();
            for (map, call) in maps.iter().zip(calls) {
                done(call.and_then(|call| end_map(&connection, map, call)));
            }
        }
    }

    /// The protocol wants each mapping named, so this is a message for each, many of them under way at a time.
    fn unmap(&self, space: HostSpaceId, range: UnmapRange) -> io::Result<u64> {
        let connection = self.connection(space)?;
        let (first, last) = match range {
            UnmapRange::Span { first, last } => (first, last),
            UnmapRange::All => (0, u64::MAX),
        };
        let mappings = connection.granted().remove(first, last);
        let mappings = mappings.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let mut failed = None;
        for mappings in mappings.chunks(CALLS_AT_ONCE) {
            let calls: Vec<Result<Call, CallError>> = mappings
                .iter()
                .map(|mapping| {
                    let (argsz, size) = (size_of::<DmaUnmap>() as u32, mapping.end - mapping.start);
                    let unmap = DmaUnmap { argsz, flags: 0, address: mapping.start, size };
                    connection.begin(command::DMA_UNMAP, &[unmap.as_bytes()], &[])
                })
                .collect();
            for call in calls {
                if let Err(e) = call.and_then(|call| connection.end(call)) {
                    failed.get_or_insert(e);
                }
            }
        }
        match failed {
            // Whoever is gone, or never had the memory, holds nothing any more; who is still there was asked and did
            // not let go.
            Some(e) if !connection.is_released() => Err(e.into()),
            failed => {
                if let Some(e) = failed {
                    debug!("{}: {first:#x}-{last:#x} is revoked without its consent: {e}", connection.name());
                }
                Ok(mappings.iter().map(|mapping| mapping.end - mapping.start).sum())
            }
        }
    }

    fn dirty_start(&self, space: HostSpaceId) -> io::Result<DirtySupport> {
        logging::start(&*self.connection(space)?)
    }

    fn dirty_stop(&self, space: HostSpaceId) {
        // Whoever is gone logs nothing.
        if let Err(e) = self.connection(space).and_then(|connection| logging::stop(&connection)) {
            log::debug!("DMA logging could not be stopped: {e}");
        }
    }

    fn dirty_read(&self, space: HostSpaceId, bitmap: &mut DirtyBitmap) -> io::Result<()> {
        let connection = self.connection(space)?;
        let IovaRange { first, last } = bitmap.range();
        logging::report(&connection, &connection.granted().within(first, last), bitmap)
    }

    fn unmap_dirty(&self, space: HostSpaceId, bitmap: &mut DirtyBitmap, _: bool) -> io::Result<u64> {
        let connection = self.connection(space)?;
        let IovaRange { first, last } = bitmap.range();
        let mappings = connection.granted().within(first, last);
        // Before, for servers that forget it then; a report that fails is one of everything.
        let before = logging::report(&connection, &mappings, bitmap);
        let unmapped = self.unmap(space, UnmapRange::Span { first, last })?;
        // By message it writes until then; and ours logs what was under way.
        let after = logging::report(&connection, &mappings, bitmap);
        if before.is_err() || (after.is_err() && connection.is_released()) {
            bitmap.mark(bitmap.range());
        }
        Ok(unmapped)
    }

    fn remedy(&self, _: HostSpaceId, cause: RefusalCause) -> String {
        match cause {
            RefusalCause::Limit => "Let its process take more, or let the guest use larger pages".to_owned(),
            RefusalCause::Other => "See what its process says".to_owned(),
            RefusalCause::Memlock | RefusalCause::Range | RefusalCause::Target => String::new(),
        }
    }
}
