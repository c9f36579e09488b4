use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::rig::{BUFFERS, Driver, SIZE, Way, eventually};
use super::super::ring::Part;
use super::{HEADER, LONGEST, LONGEST_WHOLE, Link, Net, NotGranted, Offloads};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const GUEST_OFFLOADS: u64 = 1 << 1 | 1 << 7 | 1 << 8 | 1 << 9;
const MERGES: u64 = 1 << 15;

/// A link whose other end is the test.
#[derive(Clone)]
struct Wire {
    event: Arc<EventFd>,
    guest: Arc<Mutex<Option<GuestMemoryMmap>>>,
    to_guest: Arc<Mutex<VecDeque<Vec<u8>>>>,
    from_guest: Arc<Mutex<VecDeque<Vec<u8>>>>,
    offloads: Arc<Mutex<Offloads>>,
    refuses: Arc<AtomicBool>,
    /// Bytes that were asked for in the guest, of each packet.
    rooms: Arc<Mutex<Vec<u64>>>,
}

impl Wire {
    fn new() -> Self {
        Self {
            event: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
            guest: Arc::default(),
            to_guest: Arc::default(),
            from_guest: Arc::default(),
            offloads: Arc::default(),
            refuses: Arc::default(),
            rooms: Arc::default(),
        }
    }

    fn driver(&self, without: u64) -> Driver {
        let driver = Driver::ready(Net::new(self.clone(), MAC), without);
        *self.guest.lock().unwrap() = Some(driver.memory.clone());
        driver
    }

    fn send(&self, packet: &[u8]) {
        let mut framed = vec![0; HEADER as usize];
        framed.extend(packet);
        self.to_guest.lock().unwrap().push_back(framed);
        self.event.write(1).unwrap();
    }

    fn sent(&self) -> Vec<u8> {
        eventually("a packet", || self.from_guest.lock().unwrap().pop_front())
    }

    fn granted(&self) -> Result<GuestMemoryMmap, NotGranted> {
        if self.refuses.load(Ordering::SeqCst) {
            Err(NotGranted)
        } else {
            Ok(self.guest.lock().unwrap().clone().unwrap())
        }
    }
}

impl Link for Wire {
    fn file(&self) -> RawFd {
        self.event.as_raw_fd()
    }
    fn has_offloads(&self) -> bool {
        true
    }
    fn set_offloads(&mut self, offloads: Offloads) {
        *self.offloads.lock().unwrap() = offloads;
    }
    fn has_packet(&mut self) -> bool {
        !self.to_guest.lock().unwrap().is_empty()
    }
    fn send(&mut self, packet: &[Part]) -> Result<(), NotGranted> {
        let guest = self.granted()?;
        let mut bytes = Vec::new();
        for part in packet {
            let mut data = vec![0; part.len as usize];
            guest.read_slice(&mut data, GuestAddress(part.iova)).map_err(|_| NotGranted)?;
            bytes.extend(data);
        }
        self.from_guest.lock().unwrap().push_back(bytes);
        Ok(())
    }
    fn receive(&mut self, room: &[Part], spill: &mut [u8]) -> Result<Option<u64>, NotGranted> {
        let guest = self.granted()?;
        self.rooms.lock().unwrap().push(room.iter().map(|part| u64::from(part.len)).sum());
        let Some(packet) = self.to_guest.lock().unwrap().pop_front() else { return Ok(None) };
        let mut rest = &packet[..];
        for part in room {
            let (now, later) = rest.split_at(rest.len().min(part.len as usize));
            guest.write_slice(now, GuestAddress(part.iova)).map_err(|_| NotGranted)?;
            rest = later;
        }
        let (now, rest) = rest.split_at(rest.len().min(spill.len()));
        spill[..now.len()].copy_from_slice(now);
        Ok(Some((packet.len() - rest.len()) as u64))
    }
}

fn packet(len: usize, first: u8) -> Vec<u8> {
    (0..len).map(|at| first.wrapping_add(at as u8)).collect()
}

#[test]
fn h5_packets_go_out_whole_and_in_order() {
    let wire = Wire::new();
    let mut driver = wire.driver(0);
    assert_eq!(driver.read(0x2000, 4) | driver.read(0x2004, 2) << 32, 0x0700_0000_0002);
    for round in 0..20 {
        driver.memory.write_slice(&packet(100, round), GuestAddress(BUFFERS)).unwrap();
        driver.offer(
            1,
            0,
            &[(BUFFERS, 12, Way::ToDevice), (BUFFERS + 12, 1, Way::ToDevice), (BUFFERS + 13, 87, Way::ToDevice)],
        );
        assert_eq!(driver.take(1), (0, 0));
        assert_eq!(wire.sent(), packet(100, round));
    }
}

#[test]
fn h5_what_a_driver_takes_is_what_the_link_gives() {
    let wire = Wire::new();
    let all = Offloads { checksum: true, tcp4: true, tcp6: true, ecn: true };
    let cases = [
        (0, all),
        (GUEST_OFFLOADS, Offloads::default()),
        // Nothing is cut that has no checksum.
        (1 << 1, Offloads::default()),
        (1 << 7, Offloads { tcp4: false, ..all }),
    ];
    for (without, wanted) in cases {
        let mut driver = wire.driver(without);
        driver.offer(1, 0, &[(BUFFERS, 12, Way::ToDevice)]);
        driver.take(1);
        assert_eq!(*wire.offloads.lock().unwrap(), wanted);
    }
}

#[test]
fn h5_a_packet_takes_as_many_buffers_as_it_needs() {
    let wire = Wire::new();
    let mut driver = wire.driver(GUEST_OFFLOADS);
    for buffer in 0..SIZE {
        driver.offer(0, buffer, &[(BUFFERS + 0x1000 * u64::from(buffer), 400, Way::FromDevice)]);
    }
    wire.send(&packet(1000, 3));
    assert_eq!([driver.take(0), driver.take(0), driver.take(0)], [(0, 400), (1, 400), (2, 212)]);
    let got =
        [driver.bytes(BUFFERS, 400), driver.bytes(BUFFERS + 0x1000, 400), driver.bytes(BUFFERS + 0x2000, 212)].concat();
    assert_eq!((got[10], got[11], &got[12..]), (3, 0, &packet(1000, 3)[..]));
    // The next ones take the buffers that are left; for the third there is no room.
    wire.send(&packet(388, 9));
    assert_eq!(driver.take(0), (3, 400));
    assert_eq!(driver.bytes(BUFFERS + 0x3000 + 10, 3), [1, 0, 9]);
    wire.send(&packet(1, 1));
    assert_eq!(driver.take(0), (4, 13));
    wire.send(&packet(1488, 1));
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(
        (driver.try_take(0), wire.to_guest.lock().unwrap().len()),
        (None, 1),
        "what is left might be too little"
    );
    driver.offer(0, 0, &[(BUFFERS, 400, Way::FromDevice)]);
    assert_eq!([0; 4].map(|_| driver.take(0)), [(5, 400), (6, 400), (7, 400), (0, 300)]);
}

#[test]
fn h5_a_ring_that_is_too_small_for_any_packet_has_the_ones_that_fit() {
    let wire = Wire::new();
    let mut driver = wire.driver(0);
    for buffer in 0..SIZE {
        driver.offer(0, buffer, &[(BUFFERS + 0x1000 * u64::from(buffer), 0x1000, Way::FromDevice)]);
    }
    wire.send(&packet(5000, 0));
    assert_eq!([driver.take(0), driver.take(0)], [(0, 4096), (1, 916)]);
}

#[test]
fn h5_only_what_packets_have_is_asked_for_in_the_guest() {
    let wire = Wire::new();
    let mut driver = wire.driver(0);
    let place = |buffer: u16| BUFFERS + 0x1000 * u64::from(buffer);
    let offer = |driver: &mut Driver, buffer| driver.offer(0, buffer, &[(place(buffer), 0x1000, Way::FromDevice)]);
    (0..SIZE).for_each(|buffer| offer(&mut driver, buffer));
    let rooms = || std::mem::take(&mut *wire.rooms.lock().unwrap());
    for round in 0..40 {
        wire.send(&packet(100, round));
        let (buffer, len) = driver.take(0);
        assert_eq!((len, driver.bytes(place(buffer as u16) + HEADER, 100)), (112, packet(100, round)));
        offer(&mut driver, buffer as u16);
    }
    let short = rooms();
    assert_eq!((short[0], short[39]), (LONGEST_WHOLE, 112), "{short:?}");
    // One that is longer comes in whole all the same; the next one has room for it at once.
    for wanted in [112, 9012] {
        wire.send(&packet(9000, 7));
        let used = [driver.take(0), driver.take(0), driver.take(0)];
        assert_eq!(used.map(|(_, len)| len), [4096, 4096, 820]);
        let got: Vec<u8> =
            used.iter().flat_map(|(buffer, len)| driver.bytes(place(*buffer as u16), *len as usize)).collect();
        assert_eq!((got[10], &got[12..]), (3, &packet(9000, 7)[..]));
        used.iter().for_each(|(buffer, _)| offer(&mut driver, *buffer as u16));
        assert_eq!(rooms(), [wanted]);
    }
    // A driver that starts again has the first guess.
    driver.start(0);
    (0..SIZE).for_each(|buffer| offer(&mut driver, buffer));
    wire.send(&packet(1, 1));
    driver.take(0);
    assert_eq!(rooms(), [LONGEST_WHOLE]);
}

#[test]
fn h5_without_merging_each_packet_has_one_buffer() {
    let wire = Wire::new();
    let mut driver = wire.driver(MERGES);
    driver.offer(0, 0, &[(BUFFERS, 12, Way::FromDevice), (BUFFERS + 0x1000, 1000, Way::FromDevice)]);
    driver.offer(0, 4, &[(BUFFERS + 0x2000, 100, Way::FromDevice)]);
    wire.send(&packet(500, 1));
    wire.send(&packet(500, 2));
    assert_eq!([driver.take(0), driver.take(0)], [(0, 512), (4, 100)]);
    assert_eq!((driver.bytes(BUFFERS + 10, 2), driver.bytes(BUFFERS + 0x2000 + 10, 3)), (vec![1, 0], vec![1, 0, 2]));
}

#[test]
fn h2_a_packet_that_none_can_be_needs_a_reset() {
    let wire = Wire::new();
    let mut driver = wire.driver(GUEST_OFFLOADS);
    let sends: [&dyn Fn(&mut Driver); 5] = [
        &|driver| driver.offer(1, 0, &[(BUFFERS, 11, Way::ToDevice)]),
        &|driver| driver.offer(1, 0, &[(BUFFERS, LONGEST as u32 + 1, Way::ToDevice)]),
        &|driver| driver.offer(1, 0, &[(u64::MAX - 100, 1000, Way::ToDevice)]),
        &|driver| {
            (0..SIZE).for_each(|buffer| driver.offer(0, buffer, &[(BUFFERS, 1, Way::FromDevice)]));
            wire.send(&[0; 100]);
        },
        &|driver| {
            driver.offer(0, 0, &[(BUFFERS, 0x1_0000, Way::FromDevice)]);
            wire.refuses.store(true, Ordering::SeqCst);
            wire.send(&[0; 100]);
        },
    ];
    for send in sends {
        send(&mut driver);
        driver.needs_reset();
        wire.refuses.store(false, Ordering::SeqCst);
        wire.to_guest.lock().unwrap().clear();
        driver.start(GUEST_OFFLOADS);
        driver.offer(1, 0, &[(BUFFERS, 12, Way::ToDevice)]);
        assert_eq!(driver.take(1), (0, 0));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(30))]

    /// Whatever sizes buffers and packets have, each packet arrives, in its buffers and in no other memory.
    #[test]
    fn h5_packets_of_all_sizes_come_in_whole_and_in_order(
        sizes in prop::collection::vec(200u32..4000, usize::from(SIZE)),
        packets in prop::collection::vec(1usize..1518, 1..15),
        cut in any::<bool>(),
    ) {
        let wire = Wire::new();
        let mut driver = wire.driver(if cut { GUEST_OFFLOADS } else { 0 });
        let place = |buffer: u32| BUFFERS + 0x2000 * u64::from(buffer);
        for buffer in 0..SIZE {
            driver.offer(0, buffer, &[(place(buffer.into()), sizes[usize::from(buffer)], Way::FromDevice)]);
        }
        for (index, len) in packets.iter().enumerate() {
            wire.send(&packet(*len, index as u8));
            let (mut got, mut buffers, mut count) = (Vec::new(), Vec::new(), 1);
            while buffers.len() < count {
                let (buffer, len) = driver.take(0);
                let bytes = driver.bytes(place(buffer), len as usize);
                if buffers.is_empty() {
                    count = usize::from(bytes[10]);
                }
                got.extend(bytes);
                prop_assert_eq!(driver.bytes(place(buffer) + u64::from(sizes[buffer as usize]), 8), [0; 8]);
                buffers.push(buffer as u16);
            }
            prop_assert_eq!(&got[12..], &packet(*len, index as u8));
            for buffer in buffers {
                driver.offer(0, buffer, &[(place(buffer.into()), sizes[usize::from(buffer)], Way::FromDevice)]);
            }
        }
    }
}
