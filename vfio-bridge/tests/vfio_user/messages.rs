//! Our server, message by message.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use vfio_bridge::{Function, IrqKind, RegionKind};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use vmm_sys_util::tempfile::TempFile;
use vtd::Iova;

use super::misbehaving::{ERROR, REPLY, message, next, words};
use super::rig::{Asked, PATIENT, Rig, Serving, event, serving};

pub fn client() -> (UnixStream, Serving) {
    let (mut client, serving) = serving();
    client.write_all(&message(0, 1, 0, 0, b"\0\0\x01\0{}\0")).unwrap();
    next(&mut client).unwrap();
    (client, serving)
}

/// Sends a command with files; the flags of the answer and its errno.
fn ask(client: &mut UnixStream, command: u16, payload: &[u8], fds: &[RawFd]) -> (u32, u32) {
    let bytes = message(9, command, 0, 0, payload);
    if fds.is_empty() {
        client.write_all(&bytes).unwrap();
    } else {
        assert_eq!(client.send_with_fds(&[&bytes[..]], fds).unwrap(), bytes.len());
    }
    let mut header = [0; 16];
    client.read_exact(&mut header).unwrap();
    let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
    let mut rest = vec![0; word(4) as usize - 16];
    client.read_exact(&mut rest).unwrap();
    (word(8), word(12))
}

/// Sends a command; the payload of the answer, or its errno.
pub fn ask_for(client: &mut UnixStream, command: u16, payload: &[u8]) -> Result<Vec<u8>, u32> {
    client.write_all(&message(9, command, 0, 0, payload)).unwrap();
    let mut header = [0; 16];
    client.read_exact(&mut header).unwrap();
    let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
    let mut rest = vec![0; word(4) as usize - 16];
    client.read_exact(&mut rest).unwrap();
    if word(8) & ERROR == 0 { Ok(rest) } else { Err(word(12)) }
}

fn map(flags: u32, offset: u64, address: u64, size: u64) -> Vec<u8> {
    [words(&[32, flags]), [offset, address, size].iter().flat_map(|n| n.to_ne_bytes()).collect()].concat()
}

fn memory() -> File {
    let mut file = TempFile::new().unwrap().into_file();
    file.write_all(&[7; 0x4000]).unwrap();
    file
}

#[test]
fn a_map_that_makes_no_sense_is_refused() {
    let (mut client, serving) = client();
    let file = memory();
    const EINVAL: (u32, u32) = (REPLY | ERROR, 22);
    for (payload, files) in [
        // No permission, an offset beyond the end of numbers, no size, two files.
        (map(0, 0, 0, 0x1000), 1),
        (map(3, u64::MAX - 0xfff, 0, 0x1001), 1),
        (map(3, 0, 0, 0), 1),
        (map(3, 0, 0, 0x1000), 2),
    ] {
        assert_eq!(ask(&mut client, 2, &payload, &vec![file.as_raw_fd(); files]), EINVAL);
    }
    assert_eq!(ask(&mut client, 2, &map(1, 0x1000, 0x5000, 0x1000), &[file.as_raw_fd()]), (REPLY, 0));
    // Over what is there, from before it and from inside it: EEXIST.
    for (address, size) in [(0x5000, 0x1000), (0x4000, 0x2000), (0x5800, 0x1000), (0x4000, 0x1001)] {
        assert_eq!(ask(&mut client, 2, &map(1, 0, address, size), &[]), (REPLY | ERROR, 17), "{address:#x}");
    }
    // What is mapped read-only cannot be written, and what has no file cannot be reached.
    let mut data = [0; 8];
    serving.memory.read(Iova(0x5ff8), &mut data).unwrap();
    assert_eq!(data, [7; 8]);
    assert!(serving.memory.write(Iova(0x5000), &data).is_err());
    assert_eq!(ask(&mut client, 2, &map(3, 0, 0x6000, 0x1000), &[]), (REPLY, 0));
    assert!(serving.memory.read(Iova(0x6000), &mut data).is_err());
    assert!(serving.memory.read(Iova(0x5ffc), &mut data).is_err());
}

#[test]
fn a_command_that_wants_no_reply_is_carried_out_and_gets_none() {
    const NO_REPLY: u32 = 1 << 4;
    let (mut client, serving) = client();
    let write = [&4u64.to_ne_bytes()[..], &words(&[7, 2]), &[6, 0]].concat();
    client.write_all(&message(1, 10, NO_REPLY, 0, &write)).unwrap();
    // One that fails has none either.
    client.write_all(&message(2, 99, NO_REPLY, 0, &[])).unwrap();
    // Nor has a reply that nobody waits for, which is not carried out.
    client.write_all(&message(3, 13, REPLY, 0, &[])).unwrap();
    client.write_all(&message(4, 13, 0, 0, &[])).unwrap();
    assert_eq!(next(&mut client).unwrap(), (4, 13, vec![]));
    assert_eq!(serving.device.take(), [Asked::Write(RegionKind::Config, 4, vec![6, 0]), Asked::Reset]);
}

#[test]
fn f5_eventfds_are_one_for_each_vector_or_none() {
    const EVENTS: u32 = 0x24;
    const DISABLE: u32 = 0x21;
    let (mut client, serving) = client();
    let event = event();
    let mut set = |flags, index, start, count, fds: usize| {
        ask(&mut client, 8, &words(&[20, flags, index, start, count]), &vec![event.as_raw_fd(); fds])
    };
    assert_eq!(set(EVENTS, 2, 38, 2, 2), (REPLY, 0));
    assert_eq!(set(EVENTS, 2, 0, 3, 0), (REPLY, 0));
    assert_eq!(set(DISABLE, 2, 0, 0, 0), (REPLY, 0));
    let expected = [
        Asked::Irqs(IrqKind::Msix, 38, vec![true; 2]),
        Asked::Irqs(IrqKind::Msix, 0, vec![false; 3]),
        Asked::Disable(IrqKind::Msix),
    ];
    assert_eq!(serving.device.take(), expected);
    // Files that are no others' business are closed when a program is started.
    for trigger in serving.device.triggers.lock().unwrap().iter().flatten() {
        // SAFETY: the call takes two numbers.
        assert_eq!(unsafe { libc::fcntl(trigger.as_raw_fd(), libc::F_GETFD) } & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
    }
    // Too few files, too many, a vector too many, a trigger without an eventfd, and an unmask of what masks nothing.
    for (flags, index, start, count, fds, errno) in [
        (EVENTS, 2, 0, 3, 2, 22),
        (EVENTS, 2, 0, 1, 2, 22),
        (EVENTS, 2, 39, 2, 2, 22),
        (EVENTS, 1, 0, 1, 1, 22),
        (DISABLE, 2, 0, 1, 0, 95),
        (0x11, 2, 0, 1, 0, 95),
        (0x11, 0, 0, 0, 0, 95),
    ] {
        assert_eq!(set(flags, index, start, count, fds), (REPLY | ERROR, errno), "{flags:#x} of {index}");
    }
    assert_eq!(serving.device.take(), []);
}

#[test]
fn a_function_says_what_it_has_and_that_it_can_be_reset() {
    let (mut client, _serving) = client();
    let mut get = |command, payload: &[u8]| {
        client.write_all(&message(1, command, 0, 0, payload)).unwrap();
        next(&mut client).unwrap().2
    };
    assert_eq!(get(4, &[]), words(&[16, 3, 9, 5]));
    let region = |index, flags, size: u64| {
        [words(&[32, flags, index, 0]), size.to_ne_bytes().to_vec(), 0u64.to_ne_bytes().to_vec()].concat()
    };
    let mut ask = |index| get(5, &words(&[32, 0, index, 0, 0, 0, 0, 0]));
    assert_eq!(ask(2), region(2, 3, 4 << 20));
    assert_eq!(ask(0), region(0, 0, 0));
    assert_eq!(ask(8), region(8, 0, 0), "VGA");
    assert_eq!(get(7, &words(&[16, 0, 2, 0])), words(&[16, 9, 2, 40]));
}

#[test]
fn errors_of_a_process_are_told_as_what_they_are() {
    let write = |stream: UnixStream, deadline| {
        let rig = Rig::connect(stream, deadline).unwrap();
        rig.function.write(RegionKind::Bar(0), 0, &[1]).unwrap_err().raw_os_error()
    };
    let refusing = |errno| {
        super::misbehaving::server(move |id, command, _| {
            (command == 10).then(|| message(id, 10, REPLY | ERROR, errno, &[]))
        })
    };
    assert_eq!(write(refusing(13), PATIENT), Some(libc::EACCES));
    assert_eq!(write(refusing(0), PATIENT), Some(libc::EIO), "it does not say");
    let silent = super::misbehaving::server(|_, command, _| (command == 10).then(Vec::new));
    assert_eq!(write(silent, std::time::Duration::from_millis(300)), Some(libc::ETIMEDOUT));
}

#[test]
fn a_message_is_four_aligned_bytes_anywhere_in_the_interrupt_window() {
    let (stream, serving) = serving();
    let rig = Rig::connect(stream, PATIENT).unwrap();
    let data = 0x4041u32.to_le_bytes();
    for address in [0xfee0_0000, 0xfeef_fffc] {
        serving.memory.write(Iova(address), &data).unwrap();
    }
    for address in [0xfedf_fffc, 0xfef0_0000, 0xfee0_0002] {
        assert!(serving.memory.write(Iova(address), &data).is_err(), "{address:#x}");
    }
    assert!(serving.memory.write(Iova(0xfee0_0000), &[0; 2]).is_err());
    assert_eq!(*rig.heard.messages.lock().unwrap(), [(0xfee0_0000, 0x4041), (0xfeef_fffc, 0x4041)]);
}
