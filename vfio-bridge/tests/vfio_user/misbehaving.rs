//! Processes that do not do as they should: each call ends, and nothing is said to be revoked that is not.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vfio_bridge::vfio_user::{ConnectError, UserEndpoint, UserOptions, VfioUser};
use vfio_bridge::{Bridge, Function, HostIommu, Quarantine, RegionKind, ResetScope, UnmapRange};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use vmm_sys_util::tempdir::TempDir;
use vmm_sys_util::tempfile::TempFile;
use vtd::{Iova, Perm, RefusalCause, Requester, SourceId, SpaceKey, SpaceListener};

use super::rig::{Memory, PATIENT, Rig, serving};

pub const REPLY: u32 = 1;
pub const ERROR: u32 = 1 << 5;

/// A message, byte by byte: id, command, size, flags, error, payload.
pub fn message(id: u16, command: u16, flags: u32, error: u32, payload: &[u8]) -> Vec<u8> {
    let size = 16 + payload.len() as u32;
    [
        &id.to_ne_bytes()[..],
        &command.to_ne_bytes(),
        &size.to_ne_bytes(),
        &flags.to_ne_bytes(),
        &error.to_ne_bytes(),
        payload,
    ]
    .concat()
}

/// Reads a message: id, command, payload. `None` when the client is gone.
pub fn next(stream: &mut UnixStream) -> Option<(u16, u16, Vec<u8>)> {
    let mut header = [0; 16];
    stream.read_exact(&mut header).ok()?;
    let half = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
    let size = u32::from_ne_bytes(header[4..8].try_into().unwrap());
    let mut payload = vec![0; size as usize - 16];
    stream.read_exact(&mut payload).ok()?;
    Some((half(0), half(2), payload))
}

pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// What an orderly server answers to `command`: one region of each kind with 4 KiB, and no interrupts.
pub fn orderly(command: u16, payload: &[u8]) -> Vec<u8> {
    match command {
        1 => [&[0, 0, 1, 0][..], b"{\"capabilities\":{\"max_dma_maps\":3}}\0"].concat(),
        4 => words(&[16, 3, 9, 0]),
        5 => [words(&[32, 3]), payload[8..12].to_vec(), words(&[0, 4096, 0, 0, 0])].concat(),
        3 => payload.to_vec(),
        _ => Vec::new(),
    }
}

/// A server that is orderly but for what `strange` does instead: bytes to send, or `None` to be orderly.
pub fn server(strange: impl Fn(u16, u16, &[u8]) -> Option<Vec<u8>> + Send + 'static) -> UnixStream {
    let (client, mut server) = UnixStream::pair().unwrap();
    std::thread::spawn(move || {
        while let Some((id, command, payload)) = next(&mut server) {
            let bytes = strange(id, command, &payload)
                .unwrap_or_else(|| message(id, command, REPLY, 0, &orderly(command, &payload)));
            if server.write_all(&bytes).is_err() {
                return;
            }
        }
    });
    client
}

pub const SHORT: Duration = Duration::from_millis(300);

/// Calls have [`SHORT`].
fn soon() -> UserOptions {
    UserOptions { deadline: SHORT, ..UserOptions::default() }
}

#[test]
fn d3_who_does_not_answer_an_unmap_is_cut_off_and_the_unmap_has_failed() {
    let stream = server(|_, command, _| (command == 3).then(Vec::new));
    let rig = Rig::connect(stream, SHORT).unwrap();
    rig.map(0x1000, 0, 0x1000, Perm::ReadWrite).unwrap();
    let start = Instant::now();
    // The process is this one, so it is not gone: its memory is not revoked.
    assert!(rig.unmap(0x1000, 0x1fff).is_err());
    assert!(start.elapsed() >= SHORT);
    // Nothing else waits.
    let mut data = [0; 4];
    rig.function.read(RegionKind::Bar(0), 0, &mut data);
    assert_eq!(data, [0xff; 4]);
    assert!(rig.function.write(RegionKind::Bar(0), 0, &data).is_err());
    assert_eq!(rig.map(0x1000, 0, 0x1000, Perm::Read).unwrap_err().cause, RefusalCause::Other);
}

/// Whoever is asked to stop functions, and cannot.
#[derive(Default)]
struct Stubborn {
    functions: Mutex<Vec<Requester>>,
    machine: AtomicBool,
}

impl Quarantine for Stubborn {
    fn quarantine(&self, functions: &[Requester], _: &str) -> Result<(), String> {
        self.functions.lock().unwrap().extend(functions);
        Err("its process does not answer".to_owned())
    }
    fn stop_machine(&self, _: &[Requester], _: &str) {
        self.machine.store(true, Ordering::Relaxed);
    }
}

#[test]
fn d3_the_machine_is_stopped_before_the_guest_is_told_of_an_unmap_that_was_not_answered() {
    let stream = server(|_, command, _| (command == 3).then(Vec::new));
    let memory = Memory::new();
    let host = Arc::new(VfioUser::default());
    let function = host.open_with(UserEndpoint::Connected(stream.into()), "test", soon()).unwrap();
    let stubborn = Arc::new(Stubborn::default());
    let bridge = Bridge::new(vec![host], memory.map.clone(), stubborn.clone());
    let requester = Requester { segment: 0, sid: SourceId::new(0, 1, 0) };
    bridge.register(requester, function.group()).unwrap();
    bridge.attach(requester.into(), &SpaceKey::Identity, &mut std::iter::empty()).unwrap();
    assert!(!stubborn.machine.load(Ordering::Relaxed));
    assert!(bridge.attach(requester.into(), &SpaceKey::Blocked, &mut std::iter::empty()).is_err());
    assert_eq!(*stubborn.functions.lock().unwrap(), [requester]);
    assert!(stubborn.machine.load(Ordering::Relaxed));
}

#[test]
fn d3_who_is_cut_off_reaches_nothing_by_message_either() {
    let (stream, serving) = serving();
    let rig = Rig::connect(stream, SHORT).unwrap();
    rig.map(0x1000, 0, 0x1000, Perm::ReadWrite).unwrap();
    let message = || serving.memory.write(Iova(0xfee0_0000), &[1, 2, 3, 4]);
    message().unwrap();
    *serving.device.slowness.lock().unwrap() = 3 * SHORT;
    let mut data = [0; 4];
    rig.function.read(RegionKind::Config, 0, &mut data);
    assert_eq!(data, [0xff; 4]);
    assert!(message().is_err());
    assert_eq!(rig.heard.messages.lock().unwrap().len(), 1);
    // Its thread ends when it finds out; then it has forgotten what it was given.
    let _ = serving.thread.join().unwrap();
    assert!(serving.memory.read(Iova(0x1000), &mut data).is_err());
}

#[test]
fn d3_an_unmap_that_is_refused_has_failed() {
    let stream = server(|id, command, _| (command == 3).then(|| message(id, 3, REPLY | ERROR, 22, &[])));
    let rig = Rig::connect(stream, PATIENT).unwrap();
    rig.map(0x1000, 0, 0x1000, Perm::ReadWrite).unwrap();
    assert!(rig.unmap(0x1000, 0x1fff).is_err());
    // It still answers, so its function can be stopped.
    rig.function.write(RegionKind::Config, 4, &[0, 0]).unwrap();
}

#[test]
fn whoever_closes_its_end_holds_nothing_any_more() {
    let (stream, serving) = serving();
    let shutdown = stream.try_clone().unwrap();
    let rig = Rig::connect(stream, PATIENT).unwrap();
    rig.map(0x1000, 0, 0x1000, Perm::ReadWrite).unwrap();
    rig.map(0x3000, 0, 0x1000, Perm::ReadWrite).unwrap();
    // As if the process had ended: the server's side is shut, too.
    shutdown.shutdown(std::net::Shutdown::Both).unwrap();
    let _ = serving.thread.join().unwrap();
    assert_eq!(rig.host_unmap_all(), 0x2000);
    assert!(rig.map(0x1000, 0, 0x1000, Perm::ReadWrite).is_err());
    assert!(rig.function.reset(ResetScope::Function).is_err());
}

impl Rig {
    fn host_unmap_all(&self) -> u64 {
        self.host.unmap(self.space(), UnmapRange::All).unwrap()
    }
}

#[test]
fn a_full_process_is_a_limit() {
    let stream = server(|_, _, _| None);
    let rig = Rig::connect(stream, PATIENT).unwrap();
    for page in 0..3 {
        rig.map(page * 0x1000, 0, 0x1000, Perm::Read).unwrap();
    }
    assert_eq!(rig.map(0x9000, 0, 0x1000, Perm::Read).unwrap_err().cause, RefusalCause::Limit);
    rig.unmap(0, 0xfff).unwrap();
    rig.map(0x9000, 0, 0x1000, Perm::Read).unwrap();

    // It says so: its table is full, or it has as many mappings of its own as it may have, which is what ends
    // libvfio-user.
    for errno in [28, 12] {
        let stream = server(move |id, command, _| (command == 2).then(|| message(id, 2, REPLY | ERROR, errno, &[])));
        let rig = Rig::connect(stream, PATIENT).unwrap();
        assert_eq!(rig.map(0, 0, 0x1000, Perm::Read).unwrap_err().cause, RefusalCause::Limit, "errno {errno}");
        // It is not in the book: asked by message, the device does not get it either.
        assert_eq!(rig.host_unmap_all(), 0);
    }
}

/// A server whose region 2 (of 16 MiB) lists every other page as mappable: more than a client asks for at first. It
/// says so, and gives the list when all of it is asked for, or as much of it as `given`, or (0) none.
fn server_with_long_list(pages: u32, given: u32) -> UnixStream {
    let (client, mut server) = UnixStream::pair().unwrap();
    std::thread::spawn(move || {
        let file = TempFile::new().unwrap().into_file();
        while let Some((id, command, payload)) = next(&mut server) {
            if command != 5 || payload[8] != 2 {
                server.write_all(&message(id, command, REPLY, 0, &orderly(command, &payload))).unwrap();
                continue;
            }
            let (size, needed) = (16u64 << 20, 48 + 16 * pages);
            let asked = u32::from_ne_bytes(payload[..4].try_into().unwrap());
            let list = [
                words(&[1 | 1 << 16, 0, pages, 0]),
                (0..pages.into()).flat_map(|i| [i * 0x2000, 0x1000]).flat_map(u64::to_ne_bytes).collect(),
            ];
            let len = if asked < needed { 0 } else { given.min(needed) as usize };
            let (flags, at) = if len == 0 { (7, 0) } else { (15, 32) };
            let info = [words(&[needed, flags, 2, at]), size.to_ne_bytes().to_vec(), vec![0; 8]].concat();
            let answer = [&info, &list.concat()[..len.saturating_sub(info.len())]].concat();
            server.send_with_fd(&message(id, command, REPLY, 0, &answer)[..], file.as_raw_fd()).unwrap();
        }
    });
    client
}

#[test]
fn a_list_of_mappable_areas_that_is_longer_than_asked_for_is_asked_for_again() {
    let rig = Rig::connect(server_with_long_list(1000, u32::MAX), PATIENT).unwrap();
    let mappable = rig.function.region(RegionKind::Bar(2)).mappable;
    assert_eq!(mappable, (0..1000).map(|i| (i * 0x2000, 0x1000)).collect::<Vec<_>>());
    // Otherwise nothing is mappable: what the list leaves out is no memory.
    for given in [0, 32, 40, 48, 1000] {
        let rig = Rig::connect(server_with_long_list(1000, given), PATIENT).unwrap();
        assert_eq!(rig.function.region(RegionKind::Bar(2)).mappable, [], "{given} bytes");
    }
}

/// A server whose regions have 4 MiB, these flags, and these capabilities behind the structure; with a file or without.
fn server_of_regions(flags: u32, capabilities: Vec<u8>, file: bool) -> UnixStream {
    let (client, mut server) = UnixStream::pair().unwrap();
    std::thread::spawn(move || {
        let region = TempFile::new().unwrap().into_file();
        while let Some((id, command, payload)) = next(&mut server) {
            let head = [words(&[32 + capabilities.len() as u32, flags]), payload.get(8..12).unwrap_or(&[]).to_vec()];
            let info = [&head.concat()[..], &words(&[32, 4 << 20, 0, 0x3000, 0]), &capabilities].concat();
            let answer = if command == 5 { info } else { orderly(command, &payload) };
            let bytes = message(id, command, REPLY, 0, &answer);
            if command == 5 && file {
                server.send_with_fd(&bytes[..], region.as_raw_fd()).unwrap();
            } else {
                server.write_all(&bytes).unwrap();
            }
        }
    });
    client
}

/// What region 2 of such a server is: readable, writable, what is mappable, whether it has a file.
fn region_of(flags: u32, capabilities: &[u32], file: bool) -> (bool, bool, Vec<(u64, u64)>, bool) {
    let rig = Rig::connect(server_of_regions(flags, words(capabilities), file), PATIENT).unwrap();
    let (info, file) = (rig.function.region(RegionKind::Bar(2)), rig.function.file(RegionKind::Bar(2)));
    assert_eq!((info.size, info.file_offset), (4 << 20, 0x3000));
    (info.readable, info.writable, info.mappable, file.is_some())
}

#[test]
fn f1_a_region_is_mappable_with_a_file_that_it_is_mapped_from() {
    const READ: u32 = 1;
    const WRITE: u32 = 2;
    const MAP: u32 = 4;
    let whole = vec![(0, 4 << 20)];
    assert_eq!(region_of(READ | WRITE | MAP, &[], true), (true, true, whole.clone(), true));
    assert_eq!(region_of(READ | WRITE | MAP, &[], false), (true, true, vec![], false));
    assert_eq!(region_of(READ, &[], true), (true, false, vec![], true));
    assert_eq!(region_of(WRITE | MAP, &[], true), (false, true, whole, true));
}

#[test]
fn f1_the_capability_that_lists_areas_is_found_behind_others_and_a_loop_ends() {
    const FLAGS: u32 = 1 | 2 | 4 | 8;
    // Capabilities { id: u16, version: u16, next: u32 }: another one, then the list.
    let other = |next| [7 | 1 << 16, next];
    let list = [1 | 1 << 16, 0, 1, 0, 0x1000, 0, 0x2000, 0];
    let found = region_of(FLAGS, &[&other(40)[..], &list].concat(), true);
    assert_eq!(found.2, [(0x1000, 0x2000)]);
    // Without a list all of it is mappable.
    assert_eq!(region_of(FLAGS, &other(0), true).2, [(0, 4 << 20)]);
    for looping in [vec![other(32)], vec![other(40), other(32)], vec![other(40), other(40)]] {
        assert_eq!(region_of(FLAGS, &looping.concat(), true).2, [(0, 4 << 20)], "{looping:?}");
    }
}

#[test]
fn who_does_not_take_a_connection_is_not_waited_for() {
    let place = TempDir::new().unwrap();
    let path = place.as_path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    // As libvfio-user listens: who is served leaves room for one who waits.
    // SAFETY: the call takes two numbers.
    assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
    let host = VfioUser::default();
    let connect = || host.open_with(UserEndpoint::Path(path.clone()), "test", soon()).err().unwrap();
    let timed_out = |error| matches!(error, ConnectError::Io(e) if e.kind() == std::io::ErrorKind::TimedOut);
    assert!(timed_out(connect()));
    // Its place stays taken although nobody is there any more.
    let start = Instant::now();
    assert!(timed_out(connect()));
    assert!(start.elapsed() >= SHORT);
    drop(listener);
    assert!(matches!(connect(), ConnectError::Io(e) if e.kind() == std::io::ErrorKind::ConnectionRefused));
    let nowhere = UserEndpoint::Path("x".repeat(200).into());
    assert!(matches!(host.open(nowhere, "test").err().unwrap(), ConnectError::Io(_)));
}

#[test]
fn answers_that_make_no_sense_are_errors() {
    for (bad, len) in [(9, 0), (9, 12), (9, 17)] {
        let stream = server(move |id, command, _| (command == bad).then(|| message(id, bad, REPLY, 0, &vec![1; len])));
        let rig = Rig::connect(stream, PATIENT).unwrap();
        let mut data = [0; 4];
        rig.function.read(RegionKind::Bar(1), 0, &mut data);
        assert_eq!(data, [0xff; 4], "an answer with {len} bytes");
    }
    // Impossible sizes end the connection; what follows would be taken for something else.
    for size in [0u32, 15, 1 << 30, u32::MAX] {
        let stream = server(move |id, command, _| {
            let mut bytes = message(id, command, REPLY, 0, &[]);
            bytes[4..8].copy_from_slice(&size.to_ne_bytes());
            (command == 9).then_some(bytes)
        });
        let rig = Rig::connect(stream, PATIENT).unwrap();
        let mut data = [0; 4];
        rig.function.read(RegionKind::Bar(1), 0, &mut data);
        assert_eq!(data, [0xff; 4]);
        assert!(rig.function.write(RegionKind::Bar(1), 0, &data).is_err());
    }
    // Answers to what nobody asked are passed over.
    let stream = server(|id, command, _| {
        let noise = message(id.wrapping_add(77), 9, REPLY, 0, &[1; 20]);
        (command == 10).then(|| [noise.clone(), message(id, 10, REPLY, 0, &[0; 16]), noise].concat())
    });
    let rig = Rig::connect(stream, PATIENT).unwrap();
    (0..3).for_each(|_| rig.function.write(RegionKind::Bar(1), 0, &[1]).unwrap());
}

#[test]
fn requests_of_a_hostile_process_are_bounded_and_answered() {
    // A request of 2^40 bytes, one of data that is not there, one that is no request: each before an answer.
    let requests = [
        message(1, 11, 0, 0, &[0u64.to_ne_bytes(), (1u64 << 40).to_ne_bytes()].concat()),
        message(2, 12, 0, 0, &[0u64.to_ne_bytes(), 64u64.to_ne_bytes()].concat()),
        message(3, 11, 0, 0, &[1, 2, 3]),
        message(4, 99, 0, 0, &[0; 16]),
        message(5, 11, 0, 0, &[0x1000u64.to_ne_bytes(), 8u64.to_ne_bytes()].concat()),
    ]
    .concat();
    let (client, mut server) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let mut replies = Vec::new();
        loop {
            let Some((id, command, payload)) = next(&mut server) else { return replies };
            if command >= 11 && command != 13 {
                replies.push((id, payload));
                if replies.len() == 5 {
                    return replies;
                }
                continue;
            }
            if command == 10 {
                server.write_all(&requests).unwrap();
            }
            server.write_all(&message(id, command, REPLY, 0, &orderly(command, &payload))).unwrap();
        }
    });
    let rig = Rig::connect(client, PATIENT).unwrap();
    rig.map(0x1000, 0, 0x1000, Perm::Read).unwrap();
    rig.memory.put(0, 0x1122);
    rig.function.write(RegionKind::Bar(0), 0, &[0]).unwrap();
    // The replies come from another thread than the answers to calls: the server ends when it has all.
    let replies = thread.join().unwrap();
    assert_eq!(replies.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    assert!(replies[..4].iter().all(|(_, payload)| payload.is_empty()));
    assert_eq!(replies[4].1[16..], 0x1122u64.to_ne_bytes());
}

#[test]
fn a_start_with_something_else_at_the_socket_is_refused() {
    let error = |bytes: Vec<u8>| {
        let stream = server(move |_, _, _| Some(bytes.clone()));
        Rig::connect(stream, SHORT).err().unwrap()
    };
    assert!(matches!(error(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()), ConnectError::Io(_)));
    assert!(matches!(error(message(0, 1, REPLY | ERROR, 22, &[])), ConnectError::Protocol(_)));
    assert!(matches!(error(message(0, 1, REPLY, 0, &[1, 0, 0, 0])), ConnectError::Version { major: 1 }));
    assert!(matches!(error(message(0, 1, REPLY, 0, b"\0\0\x01\0{not json}\0")), ConnectError::Protocol(_)));
    let twin = b"\0\0\x01\0{\"capabilities\":{\"twin_socket\":{\"supported\":true,\"fd_index\":0}}}\0";
    assert!(matches!(error(message(0, 1, REPLY, 0, twin)), ConnectError::Protocol(_)));
    let pages = b"\0\0\x01\0{\"capabilities\":{\"pgsizes\":2097152}}\0";
    assert!(matches!(error(message(0, 1, REPLY, 0, pages)), ConnectError::Protocol(_)));
    // Nobody answers.
    assert!(matches!(error(Vec::new()), ConnectError::Io(_)));
}

#[test]
fn a_server_survives_a_hostile_client() {
    let (mut client, serving) = serving();
    client.write_all(&message(0, 1, 0, 0, b"\0\0\x01\0{}\0")).unwrap();
    next(&mut client).unwrap();
    // Each is answered with an error: short, outside, unknown, without its data, beyond the end of addresses.
    let access = |offset: u64, region: u32, count: u32| [&offset.to_ne_bytes()[..], &words(&[region, count])].concat();
    let map = |address: u64, size: u64| {
        [words(&[32, 3]), [0, address, size].iter().flat_map(|n| n.to_ne_bytes()).collect()].concat()
    };
    let bad = [
        (9, access(255, 7, 2)),
        (9, access(u64::MAX, 7, 1)),
        (9, access(0, 2, 2 << 20)),
        (9, access(0, 77, 1)),
        (10, access(0, 7, 4)),
        (2, map(0x1000, 0)),
        (2, map(u64::MAX - 0xfff, 0x1000)),
        (2, map(u64::MAX - 0xfff, 0x2000)),
        (3, [words(&[24, 0]), vec![0; 16]].concat()),
        (5, words(&[32, 0, 9, 0, 0, 0, 0, 0])),
        (7, words(&[16, 0, 5, 0])),
        (8, words(&[20, 0x24, 2, 39, 2])),
        (8, words(&[20, 0x24, 2, u32::MAX, 2])),
        (8, words(&[20, 0x3f, 2, 0, 1])),
        (6, vec![0; 16]),
        (77, vec![]),
        (4, vec![]),
    ];
    for (command, payload) in bad {
        client.write_all(&message(9, command, 0, 0, &payload)).unwrap();
        let mut header = [0; 16];
        client.read_exact(&mut header).unwrap();
        let flags = u32::from_ne_bytes(header[8..12].try_into().unwrap());
        let size = u32::from_ne_bytes(header[4..8].try_into().unwrap());
        if command == 4 {
            // It needs nothing of its payload.
            assert_eq!(flags, REPLY);
            let mut rest = vec![0; size as usize - 16];
            client.read_exact(&mut rest).unwrap();
            continue;
        }
        assert_eq!((flags, size), (REPLY | ERROR, 16), "command {command}");
    }
    // An impossible size ends it.
    client.write_all(&[0, 0, 9, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    assert!(serving.thread.join().unwrap().is_err());
}
