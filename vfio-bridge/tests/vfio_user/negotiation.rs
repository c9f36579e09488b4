//! What both sides agree on at the start, and what clients of VFIO's habits ask of our server, byte by byte: the client
//! of QEMU 11.1, for one.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use vfio_bridge::vfio_user::{ConnectError, DmaRefused};
use vfio_bridge::{Function, HostIommu, IrqKind, RegionKind};
use vtd::{Iova, Perm};

use super::misbehaving::{ERROR, REPLY, message, next, server, words};
use super::rig::{Asked, PATIENT, Rig, Serving, serving};

/// A client that proposed `version` and `json`, and the server's payload.
fn client(version: [u16; 2], json: &str) -> (UnixStream, Serving, Vec<u8>) {
    let (mut client, serving) = serving();
    let version: Vec<u8> = version.iter().flat_map(|number| number.to_ne_bytes()).collect();
    let payload = [&version, json.as_bytes(), b"\0"].concat();
    client.write_all(&message(1, 1, 0, 0, &payload)).unwrap();
    let (_, _, reply) = next(&mut client).expect("a version");
    (client, serving, reply)
}

fn agreed(version: [u16; 2], json: &str) -> ([u16; 2], serde_json::Value) {
    let (_client, _serving, reply) = client(version, json);
    let half = |at: usize| u16::from_ne_bytes([reply[at], reply[at + 1]]);
    let text = reply[4..].strip_suffix(b"\0").expect("a zero byte ends it");
    ([half(0), half(2)], serde_json::from_slice::<serde_json::Value>(text).unwrap()["capabilities"].clone())
}

/// What the client of QEMU 11.1 says.
const QEMU: &str = r#"{"capabilities": {"migration": {"max_bitmap_size": 268435456, "pgsize": 4096}, "max_msg_fds": 8,
    "max_data_xfer_size": 1048576, "pgsizes": 4096, "max_dma_maps": 65535, "write_multiple": true}}"#;

#[test]
fn the_server_answers_with_the_smaller_version_of_both() {
    assert_eq!(agreed([0, 0], QEMU).0, [0, 0]);
    assert_eq!(agreed([0, 1], "{}").0, [0, 1]);
    assert_eq!(agreed([0, 7], "{}").0, [0, 1]);
    // Another major version is another protocol.
    let (mut client, serving) = serving();
    client.write_all(&message(1, 1, 0, 0, b"\x01\0\0\0{}\0")).unwrap();
    let mut header = [0; 16];
    client.read_exact(&mut header).unwrap();
    assert_eq!(header[8..12], (REPLY | ERROR).to_ne_bytes());
    assert!(serving.thread.join().unwrap().is_err());
}

#[test]
fn the_server_promises_no_more_mappings_than_the_client_proposed() {
    let promised = |json| agreed([0, 1], json).1["max_dma_maps"].as_u64();
    assert_eq!(promised(QEMU), Some(65_535));
    // The specification's default, for who says nothing.
    assert_eq!(promised("{}"), Some(65_535));
    assert_eq!(promised(r#"{"capabilities":{"max_dma_maps":12}}"#), Some(12));
    assert_eq!(promised(r#"{"capabilities":{"max_dma_maps":4294967296}}"#), Some(1 << 20));
}

#[test]
fn the_server_offers_what_was_proposed_and_nothing_else() {
    let names = |json| -> Vec<String> { agreed([0, 0], json).1.as_object().unwrap().keys().cloned().collect() };
    assert_eq!(names(QEMU), ["max_data_xfer_size", "max_dma_maps", "max_msg_fds", "pgsizes"]);
    let (_, offered) = agreed([0, 0], QEMU);
    // Each is one that this client takes: 16 files, 1 MiB, pages of 4 KiB.
    let number = |name: &str| offered[name].as_u64().unwrap();
    assert_eq!((number("max_msg_fds"), number("max_data_xfer_size"), number("pgsizes")), (16, 1 << 20, 4096));
    let refused = r#"{"capabilities":{"twin_socket":{"supported":false}}}"#;
    assert!(!names(refused).contains(&"twin_socket".to_owned()));
    let (_, offered) = agreed([0, 1], r#"{"capabilities":{"twin_socket":{"supported":true}}}"#);
    assert_eq!(offered["twin_socket"], serde_json::json!({"supported": true, "fd_index": 0}));
}

#[test]
fn a_client_makes_as_many_mappings_as_were_agreed_on() {
    let (mut client, _serving, _) = client([0, 0], r#"{"capabilities":{"max_dma_maps":2}}"#);
    assert_eq!([0, 1, 2].map(|page| map(&mut client, page * 0x1000, 0x1000)), [0, 0, 28]);
    assert_eq!(unmap(&mut client, 0, 0x1000, 0x1000), Ok(0x1000));
    assert_eq!(map(&mut client, 0x9000, 0x1000), 0);
}

/// Maps without a file; the errno, or 0.
fn map(client: &mut UnixStream, address: u64, size: u64) -> u32 {
    let payload = [words(&[32, 3]), [0, address, size].iter().flat_map(|n| n.to_ne_bytes()).collect()].concat();
    client.write_all(&message(2, 2, 0, 0, &payload)).unwrap();
    answer(client).map_or_else(|errno| errno, |payload| payload.len() as u32)
}

/// Unmaps: the size of the reply, or the errno.
fn unmap(client: &mut UnixStream, flags: u32, address: u64, size: u64) -> Result<u64, u32> {
    let payload = [words(&[24, flags]), [address, size].iter().flat_map(|n| n.to_ne_bytes()).collect()].concat();
    client.write_all(&message(3, 3, 0, 0, &payload)).unwrap();
    answer(client).map(|reply| {
        assert_eq!(reply[..16], payload[..16], "the entry of the request");
        u64::from_ne_bytes(reply[16..].try_into().unwrap())
    })
}

/// The payload of a reply, or its errno.
fn answer(client: &mut UnixStream) -> Result<Vec<u8>, u32> {
    let mut header = [0; 16];
    client.read_exact(&mut header).unwrap();
    let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
    let mut payload = vec![0; word(4) as usize - 16];
    client.read_exact(&mut payload).unwrap();
    assert_eq!(word(8) & 0xf, REPLY);
    if word(8) & ERROR == 0 { Ok(payload) } else { Err(word(12)) }
}

#[test]
fn b3_an_unmap_of_what_holds_nothing_succeeds_with_zero_bytes() {
    let (mut client, _serving, _) = client([0, 0], QEMU);
    assert_eq!(unmap(&mut client, 0, 0, 1 << 31), Ok(0));
    // A whole space in powers of two, as QEMU's unit unmaps it: the first has two mappings and a hole.
    assert_eq!([0x1000, 0x4000].map(|address| map(&mut client, address, 0x1000)), [0, 0]);
    let chunks: Vec<(u64, u64)> = (31..48).map(|bit| (1 << bit, 1 << bit)).collect();
    assert_eq!(unmap(&mut client, 0, 0, 1 << 31), Ok(0x2000));
    assert!(chunks.iter().all(|(address, size)| unmap(&mut client, 0, *address, *size) == Ok(0)));
    // The last one of 2^64 ends at its end.
    assert_eq!(unmap(&mut client, 0, 1 << 63, 1 << 63), Ok(0));
}

#[test]
fn b3_an_unmap_of_everything_is_a_flag_and_no_mapping_is_ever_cut() {
    let (mut client, serving, _) = client([0, 0], QEMU);
    const EVERYTHING: u32 = 2;
    assert_eq!(unmap(&mut client, EVERYTHING, 0, 0), Ok(0));
    assert_eq!([0x1000, 1 << 40].map(|address| map(&mut client, address, 0x2000)), [0, 0]);
    // EINVAL, and nothing is unmapped: half of a mapping, all of it with an address, dirty pages, and no size at all.
    for (flags, address, size) in [
        (0, 0x1000, 0x1000),
        (0, 0x2000, 0x1000),
        (EVERYTHING, 0x1000, 0),
        (EVERYTHING, 0, 0x1000),
        (1, 0x1000, 0x2000),
    ] {
        assert_eq!(unmap(&mut client, flags, address, size), Err(22), "{flags} {address:#x} {size:#x}");
    }
    assert_eq!(unmap(&mut client, 0, 0x1000, 0), Err(22));
    assert_eq!(unmap(&mut client, EVERYTHING, 0, 0), Ok(0x4000));
    drop(client);
    serving.thread.join().unwrap().unwrap();
}

#[test]
fn f5_a_client_masks_the_legacy_line_as_the_interrupts_flags_say() {
    let (mut client, serving, _) = client([0, 0], QEMU);
    let mut set = |words_of: [u32; 5]| {
        client.write_all(&message(4, 8, 0, 0, &words(&words_of))).unwrap();
        answer(&mut client)
    };
    const MASK: u32 = 1 | 1 << 3;
    const UNMASK: u32 = 1 | 1 << 4;
    assert_eq!(set([20, MASK, 0, 0, 1]), Ok(vec![]));
    assert_eq!(set([20, UNMASK, 0, 0, 1]), Ok(vec![]));
    assert_eq!(serving.device.take(), [Asked::Mask, Asked::Unmask]);
    // Only this line, and it is one.
    for words in [[20, MASK, 2, 0, 1], [20, MASK, 0, 0, 0], [20, MASK, 0, 1, 1]] {
        set(words).unwrap_err();
    }
    assert_eq!(serving.device.take(), []);
    // What the kernel says of each kind: the line can be masked and masks itself, the vectors of the others are set all
    // at once. A function that reports no errors has no such kind.
    let mut flags = |index| {
        client.write_all(&message(5, 7, 0, 0, &words(&[16, 0, index, 0]))).unwrap();
        answer(&mut client).map(|info| u32::from_ne_bytes(info[4..8].try_into().unwrap()))
    };
    assert_eq!([0, 1, 2, 3, 4].map(&mut flags), [Ok(0b111), Ok(0b1001), Ok(0b1001), Err(22), Ok(0b1001)]);
}

#[test]
fn requests_by_message_carry_no_more_than_the_client_takes() {
    // A client that takes 24 bytes a message: it answers each request with its address.
    let json = r#"{"capabilities":{"max_data_xfer_size":24,"twin_socket":{"supported":true}}}"#;
    let (client, serving) = serving();
    let mut asked = Vec::new();
    {
        let mut client = client.try_clone().unwrap();
        client.write_all(&message(1, 1, 0, 0, &[b"\0\0\x01\0", json.as_bytes(), b"\0"].concat())).unwrap();
    }
    let mut twin = receive_twin(&client);
    let thread = {
        let memory = serving.memory.clone();
        std::thread::spawn(move || {
            let mut data = [0; 60];
            (memory.read(Iova(0x1ff0), &mut data), data)
        })
    };
    for _ in 0..3 {
        let (id, command, payload) = next(&mut twin).unwrap();
        let [address, count] = [0, 8].map(|at| u64::from_ne_bytes(payload[at..at + 8].try_into().unwrap()));
        asked.push((command, address, count));
        let data = vec![asked.len() as u8; count as usize];
        twin.write_all(&message(id, command, REPLY, 0, &[payload, data].concat())).unwrap();
    }
    let (result, data) = thread.join().unwrap();
    assert_eq!(result, Ok::<(), DmaRefused>(()));
    // The first one ends with its page.
    assert_eq!(asked, [(11, 0x1ff0, 16), (11, 0x2000, 24), (11, 0x2018, 20)]);
    assert_eq!(data, [vec![1; 16], vec![2; 24], vec![3; 20]].concat()[..]);
}

/// The second socket, which comes with the version.
fn receive_twin(client: &UnixStream) -> UnixStream {
    use vmm_sys_util::sock_ctrl_msg::ScmSocket;
    let mut bytes = [0; 4096];
    let (_, file) = client.recv_with_fd(&mut bytes).unwrap();
    UnixStream::from(std::os::fd::OwnedFd::from(file.expect("the second socket")))
}

#[test]
fn our_client_takes_each_version_that_it_proposed_and_no_higher_one() {
    let connect = |minor: u8| {
        let stream = server(move |id, command, _| {
            let version = [&[0, 0, minor, 0][..], b"{}\0"].concat();
            (command == 1).then(|| message(id, 1, REPLY, 0, &version))
        });
        Rig::connect(stream, PATIENT)
    };
    assert!(connect(0).is_ok() && connect(1).is_ok());
    assert!(matches!(connect(2).err().unwrap(), ConnectError::Protocol(_)));
}

#[test]
fn a_kind_of_interrupt_that_the_server_refuses_has_no_vectors() {
    // Five kinds, of which the message-signalled ones are there: two vectors and, which cannot signal an eventfd,
    // three.
    let stream = server(|id, command, payload| match command {
        4 => Some(message(id, 4, REPLY, 0, &words(&[16, 3, 9, 5]))),
        7 if payload[8] == 1 => Some(message(id, 7, REPLY, 0, &words(&[16, 1, 1, 2]))),
        7 if payload[8] == 2 => Some(message(id, 7, REPLY, 0, &words(&[16, 0, 2, 3]))),
        7 => Some(message(id, 7, REPLY | ERROR, 22, &[])),
        _ => None,
    });
    let rig = Rig::connect(stream, PATIENT).unwrap();
    let kinds = [IrqKind::Intx, IrqKind::Msi, IrqKind::Msix, IrqKind::Error, IrqKind::Request];
    assert_eq!(kinds.map(|kind| rig.function.irq_count(kind)), [0, 2, 0, 0, 0]);
}

#[test]
fn our_client_proposes_what_it_can() {
    let (stream, mut server) = UnixStream::pair().unwrap();
    let connecting = std::thread::spawn(move || Rig::connect(stream, PATIENT).map(drop));
    let (_, command, payload) = next(&mut server).unwrap();
    drop(server);
    assert!(connecting.join().unwrap().is_err());
    assert_eq!((command, &payload[..4]), (1, &[0, 0, 1, 0][..]));
    let said: serde_json::Value = serde_json::from_slice(payload[4..].strip_suffix(b"\0").unwrap()).unwrap();
    let expected = serde_json::json!({"max_msg_fds": 16, "max_data_xfer_size": 1 << 20, "max_dma_maps": 1 << 20,
        "pgsizes": 4096, "twin_socket": {"supported": true}});
    assert_eq!(said["capabilities"], expected);
}

#[test]
fn a_server_that_says_nothing_of_itself_is_taken_to_have_the_specifications_defaults() {
    let sizes = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = sizes.clone();
    let stream = server(move |id, command, payload| {
        if command == 10 {
            seen.lock().unwrap().push(payload.len() - 16);
        }
        (command == 1).then(|| message(id, 1, REPLY, 0, &[0, 0, 0, 0]))
    });
    let rig = Rig::connect(stream, PATIENT).unwrap();
    assert_eq!(rig.host.limits(rig.space()).entries, 65_535);
    assert_eq!(rig.host.limits(rig.space()).page_sizes, 4096);
    rig.map(0, 0, 0x1000, Perm::Read).unwrap();
    rig.function.write(RegionKind::Bar(0), 0, &vec![0; (1 << 20) + 1]).unwrap();
    assert_eq!(*sizes.lock().unwrap(), [1 << 20, 1]);
}
