//! Processes that are given no file of guest memory: each access is a message, and what is granted at that moment is
//! all that is carried out.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use vfio_bridge::vfio_user::DmaRefused;
use vfio_bridge::{DmaMessages, Function, HostIommu, RegionKind, UnmapRange};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use vtd::{Iova, Perm};

use super::misbehaving::{ERROR, REPLY, SHORT, message, next, orderly};
use super::rig::{HIGH, PATIENT, Rig, serving};

const EFAULT: u32 = 14;
const EINVAL: u32 = 22;
/// The longest data of a message.
const MAX: usize = 1 << 20;

fn access(address: u64, count: u64, data: &[u8]) -> Vec<u8> {
    [&address.to_ne_bytes()[..], &count.to_ne_bytes(), data].concat()
}

/// A server whose requests a test chooses. It answers the client in a thread, and passes on what answers its requests:
/// id, flags, errno, data.
struct Asking {
    stream: UnixStream,
    answers: std::sync::mpsc::Receiver<(u16, u32, u32, Vec<u8>)>,
    /// DMA_MAP messages that came with files.
    files: Arc<Mutex<usize>>,
    thread: JoinHandle<()>,
}

fn asking(strange: impl Fn(u16, u16) -> Option<Vec<u8>> + Send + 'static) -> (UnixStream, Asking) {
    let (client, stream) = UnixStream::pair().unwrap();
    let (tell, answers) = std::sync::mpsc::channel();
    let files = Arc::new(Mutex::new(0));
    let thread = {
        let (mut stream, files) = (stream.try_clone().unwrap(), files.clone());
        std::thread::spawn(move || {
            loop {
                let mut header = [0; 16];
                let Ok((got, file)) = stream.recv_with_fd(&mut header) else { return };
                *files.lock().unwrap() += usize::from(file.is_some());
                if got == 0 || stream.read_exact(&mut header[got..]).is_err() {
                    return;
                }
                let half = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
                let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
                let mut payload = vec![0; word(4) as usize - 16];
                stream.read_exact(&mut payload).unwrap();
                let (id, command) = (half(0), half(2));
                if word(8) & 0xf == REPLY {
                    let _ = tell.send((id, word(8), word(12), payload.split_off(payload.len().min(16))));
                    continue;
                }
                let bytes =
                    strange(id, command).unwrap_or_else(|| message(id, command, REPLY, 0, &orderly(command, &payload)));
                if stream.write_all(&bytes).is_err() {
                    return;
                }
            }
        })
    };
    (client, Asking { stream, answers, files, thread })
}

impl Asking {
    fn send(&mut self, id: u16, command: u16, payload: &[u8]) {
        self.stream.write_all(&message(id, command, 0, 0, payload)).unwrap();
    }

    /// The errno of the answer, 0 if there is none, and its data.
    fn ask(&mut self, command: u16, address: u64, count: u64, data: &[u8]) -> (u32, Vec<u8>) {
        self.send(7, command, &access(address, count, data));
        let (id, flags, errno, data) = self.answers.recv_timeout(PATIENT).unwrap();
        assert_eq!((id, flags & ERROR != 0), (7, errno != 0));
        (errno, data)
    }

    fn read(&mut self, address: u64, count: u64) -> (u32, Vec<u8>) {
        self.ask(11, address, count, &[])
    }

    fn write(&mut self, address: u64, data: &[u8]) -> u32 {
        self.ask(12, address, data.len() as u64, data).0
    }
}

#[test]
fn a_confined_process_is_given_no_file_and_reaches_what_is_mapped_by_message() {
    let (stream, mut server) = asking(|_, _| None);
    let rig = Rig::confined(stream, PATIENT);
    assert!(rig.function.is_confined());
    rig.map(0x1000, HIGH + 0x3000, 0x2000, Perm::ReadWrite).unwrap();
    rig.map(0x3000, 0x1000, 0x1000, Perm::Read).unwrap();
    rig.map(0x9000, 0x2000, 0x1000, Perm::Write).unwrap();
    assert_eq!(*server.files.lock().unwrap(), 0);
    rig.memory.put(HIGH + 0x4ff8, 5);
    rig.memory.put(0x1000, 6);
    // Over the edge of two mappings, which are far apart in memory.
    let both = [5u64.to_ne_bytes(), 6u64.to_ne_bytes()].concat();
    assert_eq!(server.read(0x2ff8, 16), (0, both));
    assert_eq!(server.write(0x1008, &[7; 8]), 0);
    assert_eq!(rig.memory.get(HIGH + 0x3008), 0x0707_0707_0707_0707);

    // Permissions, holes, the end of addresses, and across an edge: the fault is at the first byte that is not granted.
    assert_eq!(server.write(0x3000, &[1; 8]), EFAULT);
    assert_eq!(rig.memory.get(0x1000), 6);
    assert_eq!(server.read(0x9000, 8), (EFAULT, vec![]));
    assert_eq!(server.read(0x5000, 8), (EFAULT, vec![]));
    assert_eq!(server.write(0x2ff8, &[9; 16]), EFAULT);
    assert_eq!(server.read(u64::MAX - 3, 8), (EFAULT, vec![]));
    let blocked = [(0x3000, true), (0x9000, false), (0x5000, false), (0x3000, true), (u64::MAX - 3, false)];
    assert_eq!(*rig.heard.blocked.lock().unwrap(), blocked);
    // What is longer than a message, or not there: the whole of it is refused, and is no fault.
    rig.map(0x100_0000, 0, 0x8_0000, Perm::ReadWrite).unwrap_err();
    rig.unmap(0x3000, 0x3fff).unwrap();
    rig.map(0x100_0000, 0, 0x8_0000, Perm::ReadWrite).unwrap();
    assert_eq!(server.read(0x100_0000, MAX as u64 + 1), (EINVAL, vec![]));
    assert_eq!(server.read(0x100_0000, u64::MAX), (EINVAL, vec![]));
    assert_eq!(server.ask(12, 0x100_0000, 64, &[1; 63]), (EINVAL, vec![]));
    assert_eq!(server.ask(12, 0x100_0000, 64, &[1; 65]), (EINVAL, vec![]));
    server.send(7, 11, &[0; 15]);
    assert_eq!(server.answers.recv_timeout(PATIENT).unwrap().2, EINVAL);
    assert_eq!(rig.memory.get(0), 0);
    assert_eq!(rig.heard.blocked.lock().unwrap().len(), blocked.len());
    let counted = DmaMessages { reads: 1, writes: 1, bytes: 24, blocked: 5, refused: 5 };
    assert_eq!(rig.function.dma_messages(), Some(counted));
    drop(rig);
    server.thread.join().unwrap();
}

#[test]
fn d3_what_was_unmapped_is_revoked_whatever_a_confined_process_does() {
    // It refuses; it does not answer and is cut off.
    for silent in [false, true] {
        let strange = move |id, command| {
            (command == 3).then(|| if silent { Vec::new() } else { message(id, 3, REPLY | ERROR, 22, &[]) })
        };
        let (stream, mut server) = asking(strange);
        let rig = Rig::confined(stream, if silent { SHORT } else { PATIENT });
        rig.map(0x1000, 0, 0x1000, Perm::ReadWrite).unwrap();
        rig.map(0x3000, 0x1000, 0x1000, Perm::ReadWrite).unwrap();
        let start = Instant::now();
        // The process runs on, and with its files the unmap would have failed.
        assert_eq!(rig.unmap(0x1000, 0x1fff).unwrap(), 0x1000);
        if silent {
            assert!(start.elapsed() >= SHORT);
            assert!(rig.function.write(RegionKind::Bar(0), 0, &[0]).is_err());
            assert!(server.answers.recv_timeout(PATIENT).is_err(), "it is cut off");
        } else {
            assert_eq!(server.write(0x1000, &[1; 8]), EFAULT);
            assert_eq!(server.write(0x3000, &[1; 8]), 0);
        }
        assert_eq!(rig.memory.get(0), 0);
        assert_eq!(rig.host.unmap(rig.space(), UnmapRange::All).unwrap(), 0x1000);
    }
}

#[test]
fn d3_requests_are_served_while_a_call_waits_and_none_after_the_unmap() {
    // It asks before it answers an unmap, and waits for what it asked for: who served one thing at a time would wait
    // for ever.
    let gate = Arc::new(Barrier::new(2));
    let strange = {
        let gate = gate.clone();
        move |_, command: u16| {
            if command == 3 || command == 10 {
                gate.wait();
                gate.wait();
            }
            None
        }
    };
    let (stream, server) = asking(strange);
    let rig = Rig::confined(stream, PATIENT);
    rig.map(0x1000, 0, 0x1000, Perm::ReadWrite).unwrap();
    rig.map(0x3000, 0x1000, 0x1000, Perm::ReadWrite).unwrap();
    std::thread::scope(|scope| {
        let mut asked = server.stream.try_clone().unwrap();
        let mut write = move |address: u64| {
            let bytes = message(1, 12, 0, 0, &access(address, 8, &[address as u8 >> 4 | 1; 8]));
            asked.write_all(&bytes).unwrap();
        };
        scope.spawn(|| rig.unmap(0x1000, 0x1fff).unwrap());
        gate.wait();
        // The unmap is under way, and it is not granted any more: revoked first, asked for then.
        write(0x1000);
        write(0x3000);
        gate.wait();
    });
    let answer = || server.answers.recv_timeout(PATIENT).unwrap().2;
    assert_eq!([answer(), answer()], [EFAULT, 0]);
    assert_eq!((rig.memory.get(0), rig.memory.get(0x1000) != 0), (0, true));
}

#[test]
fn a_confined_process_that_floods_is_bounded_and_cut_off() {
    // Requests and no look at the answers, by the one socket: the socket fills, and nothing else does.
    let (client, mut server) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let mut sent = 0u64;
        while let Some((id, command, payload)) = next(&mut server) {
            server.write_all(&message(id, command, REPLY, 0, &orderly(command, &payload))).unwrap();
            if command == 10 {
                let request = message(1, 11, 0, 0, &access(0x1000, 0x1000, &[]));
                while server.write_all(&request).is_ok() {
                    sent += 1;
                }
                return sent;
            }
        }
        0
    });
    let rig = Rig::confined(client, SHORT);
    rig.map(0x1000, 0, 0x1000, Perm::ReadWrite).unwrap();
    rig.function.write(RegionKind::Bar(0), 0, &[0]).unwrap();
    let sent = thread.join().unwrap();
    assert!(sent > 64, "{sent} requests were taken before it was cut off");
    // Each call from now on ends at once.
    let start = Instant::now();
    assert!(rig.function.write(RegionKind::Bar(0), 0, &[0]).is_err());
    assert!(start.elapsed() < PATIENT / 2);
    assert_eq!(rig.unmap(0x1000, 0x1fff).unwrap(), 0x1000);
}

#[test]
fn ourserver_works_without_files() {
    let (stream, serving) = serving();
    let rig = Rig::confined(stream, PATIENT);
    rig.map(0x10_0000, HIGH + 0x3000, 0x4000, Perm::ReadWrite).unwrap();
    rig.map(0x20_0000, 0x1000, 0x1000, Perm::Read).unwrap();
    // More than a page, from the middle of one.
    let data: Vec<u8> = (0..0x2345u32).map(|n| n as u8 ^ 0x5a).collect();
    serving.memory.write(Iova(0x10_0123), &data).unwrap();
    let mut back = vec![0; data.len()];
    serving.memory.read(Iova(0x10_0123), &mut back).unwrap();
    assert_eq!(back, data);
    let mut first = [0; 8];
    serving.memory.read(Iova(0x10_0123), &mut first).unwrap();
    assert_eq!(first, data[..8]);
    let messages = rig.function.dma_messages().unwrap();
    assert_eq!(messages.bytes, 2 * 0x2345 + 8);
    assert_eq!(serving.memory.write(Iova(0x20_0000), &[1; 4]), Err(DmaRefused(Iova(0x20_0000))));
    assert_eq!(serving.memory.read(Iova(0x20_0ffc), &mut first), Err(DmaRefused(Iova(0x20_1000))));
    assert_eq!(*rig.heard.blocked.lock().unwrap(), [(0x20_0000, true), (0x20_1000, false)]);
    serving.memory.write(Iova(0xfee0_0004), &0x4041u32.to_le_bytes()).unwrap();
    assert_eq!(*rig.heard.messages.lock().unwrap(), [(0xfee0_0004, 0x4041)]);
    rig.unmap(0x10_0000, 0x10_3fff).unwrap();
    assert!(serving.memory.read(Iova(0x10_0123), &mut first).is_err());
}

#[test]
fn d3_a_confined_process_writes_nothing_after_an_unmap() {
    let (stream, serving) = serving();
    let rig = Rig::confined(stream, PATIENT);
    let stop = Arc::new(AtomicBool::new(false));
    let writer = {
        let (memory, stop) = (serving.memory.clone(), stop.clone());
        std::thread::spawn(move || {
            let mut written = 0u64;
            while !stop.load(Ordering::Relaxed) {
                written += u64::from(memory.write(Iova(0x8000), &[0xaa; 64]).is_ok());
            }
            written
        })
    };
    for round in 0..200 {
        rig.map(0x8000, 0x2000, 0x1000, Perm::ReadWrite).unwrap();
        while round < 20 && rig.memory.get(0x2008) != 0xaaaa_aaaa_aaaa_aaaa {
            std::thread::yield_now();
        }
        rig.unmap(0x8000, 0x8fff).unwrap();
        rig.memory.put(0x2000, round);
        rig.memory.put(0x2008, round);
        std::thread::yield_now();
        assert_eq!((rig.memory.get(0x2000), rig.memory.get(0x2008)), (round, round), "written after the unmap");
    }
    stop.store(true, Ordering::Relaxed);
    assert!(writer.join().unwrap() >= 20);
}

#[test]
fn a_process_with_files_is_not_confined() {
    let (stream, server) = asking(|_, _| None);
    let rig = Rig::connect(stream, PATIENT).unwrap();
    rig.map(0x1000, 0, 0x1000, Perm::ReadWrite).unwrap();
    assert!(!rig.function.is_confined());
    assert_eq!(*server.files.lock().unwrap(), 1);
}
