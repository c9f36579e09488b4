use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::super::rig::{BUFFERS, Driver, MEMORY, Way, eventually};
use super::{Blk, Disk, IoFailed, PIECE, Part, SECTOR};
use crate::pci::PciFunction;

const DISK: usize = 16 * SECTOR as usize;
const HEADER: u64 = 0x7_0000;
const STATUS: u64 = 0x7_1000;

/// A disk in memory, which moves data as the kernel would: by addresses, and not at all where it is not let.
#[derive(Clone)]
struct Memory {
    data: Arc<Mutex<Vec<u8>>>,
    size: u64,
    /// Of the guest, once there is one.
    guest: Arc<Mutex<Option<GuestMemoryMmap>>>,
    read_only: bool,
    /// Calls that are let, before one fails.
    lets: Arc<AtomicU32>,
    flushes: Arc<AtomicU32>,
    calls: Arc<Mutex<Vec<(u64, u64)>>>,
    /// Calls at these offsets wait.
    gate: Arc<(Mutex<Vec<u64>>, Condvar)>,
}

impl Memory {
    fn new(size: usize, read_only: bool) -> Self {
        Self {
            data: Arc::new(Mutex::new((0..size).map(|at| (at % 251) as u8).collect())),
            // The last sector is not whole.
            size: size as u64 + 100,
            guest: Arc::default(),
            read_only,
            lets: Arc::new(AtomicU32::new(u32::MAX)),
            flushes: Arc::default(),
            calls: Arc::default(),
            gate: Arc::default(),
        }
    }

    fn driver(&self) -> Driver {
        let driver = Driver::ready(Blk::new(self.clone()).unwrap(), 0);
        *self.guest.lock().unwrap() = Some(driver.memory.clone());
        driver
    }

    fn shut(&self, offsets: &[u64]) {
        *self.gate.0.lock().unwrap() = offsets.to_vec();
        self.gate.1.notify_all();
    }

    /// Waits until so many calls have begun.
    fn begun(&self, calls: usize) {
        eventually("a call", || (self.calls.lock().unwrap().len() >= calls).then_some(()));
    }

    fn each(
        &self,
        offset: u64,
        parts: &[Part],
        mut one: impl FnMut(&GuestMemoryMmap, &mut [u8], u64),
    ) -> Result<(), IoFailed> {
        self.lets.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |lets| lets.checked_sub(1)).map_err(|_| IoFailed)?;
        self.calls.lock().unwrap().push((offset, super::total(parts)));
        drop(self.gate.1.wait_while(self.gate.0.lock().unwrap(), |shut| shut.contains(&offset)).unwrap());
        let (mut data, guest) = (self.data.lock().unwrap(), self.guest.lock().unwrap());
        let mut at = offset as usize;
        for part in parts {
            one(guest.as_ref().unwrap(), &mut data[at..at + part.len as usize], part.iova);
            at += part.len as usize;
        }
        Ok(())
    }
}

impl Disk for Memory {
    fn size(&self) -> u64 {
        self.size
    }
    fn is_read_only(&self) -> bool {
        self.read_only
    }
    fn serial(&self) -> &str {
        "a-disk-with-a-name-that-is-long"
    }
    fn read(&self, offset: u64, parts: &[Part]) -> Result<(), IoFailed> {
        self.each(offset, parts, |guest, data, iova| guest.write_slice(data, GuestAddress(iova)).unwrap())
    }
    fn write(&self, offset: u64, parts: &[Part]) -> Result<(), IoFailed> {
        self.each(offset, parts, |guest, data, iova| guest.read_slice(data, GuestAddress(iova)).unwrap())
    }
    fn flush(&self) -> Result<(), IoFailed> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        self.each(0, &[], |_, _, _| {})
    }
    fn clear(&self, offset: u64, len: u64, _: bool) -> Result<(), IoFailed> {
        self.each(0, &[], |_, _, _| {})?;
        self.data.lock().unwrap()[offset as usize..][..len as usize].fill(0);
        Ok(())
    }
}

/// Sends a request with `data`; its status, and how many bytes were written.
fn request(driver: &mut Driver, kind: u32, sector: u64, data: &[(u64, u32, Way)]) -> (u8, u32) {
    driver.memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
    driver.memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
    driver.memory.write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
    let mut parts = vec![(HEADER, 16, Way::ToDevice)];
    parts.extend(data);
    parts.push((STATUS, 1, Way::FromDevice));
    driver.offer(0, 0, &parts);
    let (_, written) = driver.take(0);
    (driver.bytes(STATUS, 1)[0], written)
}

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;
const OK: u8 = 0;
const FAILED: u8 = 1;
const UNSUPPORTED: u8 = 2;

#[test]
fn h4_what_is_written_is_read_in_whatever_parts() {
    let disk = Memory::new(DISK, false);
    let mut driver = disk.driver();
    assert_eq!(driver.read(0x2000, 8), 16, "sectors");
    driver.memory.write_slice(&[0xa5; 1024], GuestAddress(BUFFERS)).unwrap();
    let parts = [(BUFFERS, 1, Way::ToDevice), (BUFFERS + 7, 1000, Way::ToDevice), (BUFFERS + 1, 23, Way::ToDevice)];
    assert_eq!(request(&mut driver, OUT, 3, &parts), (OK, 1));
    assert_eq!(disk.data.lock().unwrap()[3 * 512..5 * 512], [0xa5; 1024]);
    let parts = [(BUFFERS + 0x1000, 500, Way::FromDevice), (BUFFERS + 0x2000, 1036, Way::FromDevice)];
    assert_eq!(request(&mut driver, IN, 2, &parts), (OK, 1537));
    let got = [driver.bytes(BUFFERS + 0x1000, 500), driver.bytes(BUFFERS + 0x2000, 1036)].concat();
    assert_eq!(got, disk.data.lock().unwrap()[2 * 512..5 * 512]);
    assert_eq!(request(&mut driver, FLUSH, 0, &[]), (OK, 1));
    assert_eq!(disk.flushes.load(Ordering::SeqCst), 1);
    assert_eq!(request(&mut driver, GET_ID, 0, &[(BUFFERS, 20, Way::FromDevice)]), (OK, 21));
    assert_eq!(driver.bytes(BUFFERS, 20), b"a-disk-with-a-name-t");
    assert_eq!(request(&mut driver, 99, 0, &[]), (UNSUPPORTED, 1));
    // Header and status share parts with the data, or are cut.
    driver.memory.write_slice(&[0; 16], GuestAddress(HEADER)).unwrap();
    driver.offer(0, 0, &[(HEADER, 5, Way::ToDevice), (HEADER + 5, 11, Way::ToDevice), (BUFFERS, 513, Way::FromDevice)]);
    assert_eq!(driver.take(0), (0, 513));
    assert_eq!(driver.bytes(BUFFERS, 513), [&disk.data.lock().unwrap()[..512], &[OK]].concat());
}

#[test]
fn h4_what_the_disk_does_not_have_is_an_error_of_the_request() {
    let disk = Memory::new(DISK, false);
    let mut driver = disk.driver();
    let before = disk.data.lock().unwrap().clone();
    for (kind, way) in [(IN, Way::FromDevice), (OUT, Way::ToDevice)] {
        for (sector, len) in [(16, 512), (15, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 100), (1 << 55, 512)] {
            assert_eq!(request(&mut driver, kind, sector, &[(BUFFERS, len, way)]), (FAILED, 1), "{sector} {len}");
        }
    }
    disk.lets.store(0, Ordering::SeqCst);
    assert_eq!(request(&mut driver, IN, 0, &[(BUFFERS, 512, Way::FromDevice)]), (FAILED, 1));
    assert_eq!(request(&mut driver, OUT, 0, &[(BUFFERS, 512, Way::ToDevice)]), (FAILED, 1));
    assert_eq!(request(&mut driver, FLUSH, 0, &[]), (FAILED, 1));
    disk.lets.store(9, Ordering::SeqCst);
    assert_eq!((request(&mut driver, FLUSH, 0, &[]), driver.status()), ((OK, 1), 0xf), "the device lives");
    assert_eq!(*disk.data.lock().unwrap(), before);
}

#[test]
fn h4_a_disk_that_is_read_only_stays_as_it_is() {
    let disk = Memory::new(DISK, true);
    let mut driver = disk.driver();
    assert_eq!(driver.offered() & (1 << 5 | 1 << 13 | 1 << 14), 1 << 5);
    let before = disk.data.lock().unwrap().clone();
    range(&driver, 0, 1, 0);
    for kind in [OUT, DISCARD, ZEROES] {
        assert_eq!(request(&mut driver, kind, 0, &[(BUFFERS, 16, Way::ToDevice)]), (FAILED, 1));
        assert_eq!(request(&mut driver, kind, 0, &[(BUFFERS, 512, Way::ToDevice)]), (FAILED, 1));
    }
    assert_eq!(*disk.data.lock().unwrap(), before);
}

fn range(driver: &Driver, sector: u64, sectors: u32, flags: u32) {
    driver.memory.write_obj(sector, GuestAddress(BUFFERS)).unwrap();
    driver.memory.write_obj(sectors, GuestAddress(BUFFERS + 8)).unwrap();
    driver.memory.write_obj(flags, GuestAddress(BUFFERS + 12)).unwrap();
}

#[test]
fn h4_ranges_are_cleared_and_no_more() {
    let disk = Memory::new(DISK, false);
    let mut driver = disk.driver();
    let clear = |driver: &mut Driver, kind, sector, sectors, flags| {
        range(driver, sector, sectors, flags);
        request(driver, kind, 0, &[(BUFFERS, 16, Way::ToDevice)]).0
    };
    let mut wanted = disk.data.lock().unwrap().clone();
    assert_eq!(clear(&mut driver, ZEROES, 2, 3, 1), OK);
    assert_eq!(clear(&mut driver, DISCARD, 15, 1, 0), OK);
    wanted[2 * 512..5 * 512].fill(0);
    wanted[15 * 512..].fill(0);
    assert_eq!(clear(&mut driver, ZEROES, 0, 0, 0), OK);
    for (kind, sector, sectors, flags, status) in [
        (ZEROES, 15, 2, 0, FAILED),
        (ZEROES, u64::MAX, 1, 0, FAILED),
        (DISCARD, 0, u32::MAX, 0, FAILED),
        (DISCARD, 0, 1, 1, UNSUPPORTED),
        (ZEROES, 0, 1, 2, UNSUPPORTED),
    ] {
        assert_eq!(clear(&mut driver, kind, sector, sectors, flags), status);
    }
    // Two ranges are more than was offered.
    assert_eq!(request(&mut driver, ZEROES, 0, &[(BUFFERS, 32, Way::ToDevice)]).0, FAILED);
    assert_eq!(*disk.data.lock().unwrap(), wanted);
}

#[test]
fn h2_a_request_without_header_or_status_breaks_its_ring() {
    let disk = Memory::new(DISK, false);
    let mut driver = disk.driver();
    let requests: [&[(u64, u32, Way)]; 4] = [
        &[(HEADER, 16, Way::ToDevice)],
        &[(HEADER, 16, Way::ToDevice), (STATUS, 0, Way::FromDevice)],
        &[(HEADER, 15, Way::ToDevice), (STATUS, 1, Way::FromDevice)],
        &[(STATUS, 1, Way::FromDevice)],
    ];
    for parts in requests {
        driver.offer(0, 0, parts);
        driver.needs_reset();
        driver.start(0);
    }
    assert_eq!(request(&mut driver, FLUSH, 0, &[]), (OK, 1));
}

#[test]
fn h3_a_request_that_is_stopped_in_the_middle_is_begun_again() {
    let disk = Memory::new(4 * PIECE as usize, false);
    let mut driver = disk.driver();
    // Eight parts that are one and the same memory.
    let parts = [(BUFFERS, PIECE as u32 / 2, Way::ToDevice); 6];
    driver.memory.write_slice(&[7; PIECE as usize / 2], GuestAddress(BUFFERS)).unwrap();
    let hold = disk.data.lock().unwrap();
    driver.memory.write_obj(OUT, GuestAddress(HEADER)).unwrap();
    driver.memory.write_obj(0u64, GuestAddress(HEADER + 8)).unwrap();
    let mut all = vec![(HEADER, 16, Way::ToDevice)];
    all.extend(parts);
    all.push((STATUS, 1, Way::FromDevice));
    driver.offer(0, 0, &all);
    disk.begun(1);
    std::thread::scope(|scope| {
        let stopping = scope.spawn(|| driver.function.config_write(4, &[2, 0]));
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!stopping.is_finished());
        drop(hold);
    });
    assert_eq!(driver.try_take(0), None);
    let before = disk.calls.lock().unwrap().len();
    assert!(before < 3, "a stop waits for no more than a piece");
    driver.function.config_write(4, &[6, 0]);
    assert_eq!(driver.take(0), (0, 1));
    let calls = disk.calls.lock().unwrap()[before..].to_vec();
    assert_eq!(calls, [(0, PIECE), (PIECE, PIECE), (2 * PIECE, PIECE)]);
    assert!(disk.data.lock().unwrap()[..3 * PIECE as usize].iter().all(|byte| *byte == 7));
}

/// Offers request `slot`, of one sector, without waiting for it. Its first descriptor is `2 * slot`: its header and
/// data, or data and status, share a part.
fn begin(driver: &mut Driver, slot: u16, kind: u32, sector: u64) {
    let at = BUFFERS + 0x1000 * u64::from(slot);
    driver.memory.write_obj(kind, GuestAddress(at)).unwrap();
    driver.memory.write_obj(sector, GuestAddress(at + 8)).unwrap();
    driver.memory.write_obj(0xffu8, GuestAddress(at + 0x800 + if kind == IN { 512 } else { 0 })).unwrap();
    let (sent, got) = match kind {
        IN => (16, 513),
        OUT => (16 + 512, 1),
        _ => (16, 1),
    };
    driver.offer(0, 2 * slot, &[(at, sent, Way::ToDevice), (at + 0x800, got, Way::FromDevice)]);
}

fn status_of(driver: &Driver, slot: u16, kind: u32) -> u8 {
    driver.bytes(BUFFERS + 0x1000 * u64::from(slot) + 0x800 + if kind == IN { 512 } else { 0 }, 1)[0]
}

#[test]
fn h4_a_request_that_takes_long_keeps_no_other_one() {
    let disk = Memory::new(DISK, false);
    let mut driver = disk.driver();
    disk.shut(&[512, 1024]);
    begin(&mut driver, 0, IN, 1);
    begin(&mut driver, 1, OUT, 2);
    disk.begun(2);
    // Those that come while others are under way, and are kicked for then.
    for (kind, sector) in [(FLUSH, 0), (IN, 3), (OUT, 4), (GET_ID, 0), (IN, 100)] {
        begin(&mut driver, 2, kind, sector);
        assert_eq!(driver.take(0).0, 4, "{kind} {sector}");
        assert_eq!(status_of(&driver, 2, kind), if sector == 100 { FAILED } else { OK });
    }
    assert_eq!((status_of(&driver, 0, IN), status_of(&driver, 1, OUT)), (0xff, 0xff));
    disk.shut(&[512]);
    assert_eq!(driver.take(0), (2, 1));
    disk.shut(&[]);
    assert_eq!(driver.take(0), (0, 513));
    let read = driver.bytes(BUFFERS + 0x800, 513);
    assert_eq!(read, [&disk.data.lock().unwrap()[512..1024], &[OK]].concat());
    assert_eq!(driver.status(), 0xf);
}

/// A disk that keeps both of them until [`waits_for_both`] lets them go.
fn two_reads_under_way() -> (Memory, Driver) {
    let disk = Memory::new(DISK, false);
    let mut driver = disk.driver();
    disk.shut(&[512, 1024]);
    begin(&mut driver, 0, IN, 1);
    begin(&mut driver, 1, IN, 2);
    disk.begun(2);
    (disk, driver)
}

/// `stop` ends when the second of them has ended.
fn waits_for_both(disk: &Memory, name: &str, stop: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let stopping = scope.spawn(stop);
        for left in [&[512][..], &[]] {
            std::thread::sleep(std::time::Duration::from_millis(30));
            assert!(!stopping.is_finished(), "{name}");
            disk.shut(left);
        }
    });
}

#[test]
fn h3_a_stop_waits_for_all_that_is_under_way_and_nothing_else_begins() {
    type Stop = fn(&Driver);
    let stops: [(&str, Stop); 3] = [
        ("a reset by the driver", |driver| driver.write(0x14, 1, 0)),
        ("a reset of the function", |driver| driver.function.reset()),
        ("Bus Master", |driver| driver.function.config_write(4, &[2, 0])),
    ];
    for (name, stop) in stops {
        let (disk, mut driver) = two_reads_under_way();
        waits_for_both(&disk, name, || stop(&driver));
        let (calls, memory) = (disk.calls.lock().unwrap().len(), driver.bytes(0, MEMORY));
        assert_eq!((calls, driver.stopped.load(Ordering::SeqCst)), (2, 0), "{name}");
        // Nothing reaches memory after it.
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(memory == driver.bytes(0, MEMORY), "{name}");
        // And it works again.
        driver.start(0);
        assert_eq!(request(&mut driver, FLUSH, 0, &[]), (OK, 1), "{name}");
    }
}

#[test]
fn h3_a_hold_waits_for_all_that_is_under_way_and_what_is_saved_goes_on_elsewhere() {
    let (disk, mut driver) = two_reads_under_way();
    waits_for_both(&disk, "a hold", || driver.function.saves().unwrap().hold().unwrap());
    // Both are whole, and given back, before anything is saved.
    assert_eq!([0, 1].map(|slot| status_of(&driver, slot, IN)), [OK; 2]);
    // What comes now is not begun here, but where the state goes.
    begin(&mut driver, 2, IN, 3);
    let state = driver.function.saves().unwrap().save();
    let other = Memory::new(DISK, false);
    let mut goes_on = Driver::find(Blk::new(other.clone()).unwrap());
    *other.guest.lock().unwrap() = Some(goes_on.memory.clone());
    goes_on.share(&driver);
    goes_on.function.saves().unwrap().hold().unwrap();
    goes_on.function.saves().unwrap().restore(&state).unwrap();
    goes_on.function.saves().unwrap().go_on();
    let mut heads = [goes_on.take(0), goes_on.take(0), goes_on.take(0)];
    heads.sort_unstable();
    assert_eq!(heads, [(0, 513), (2, 513), (4, 513)]);
    let read = goes_on.bytes(BUFFERS + 0x2800, 513);
    assert_eq!(read, [&other.data.lock().unwrap()[1536..2048], &[OK]].concat());
    let begun = |disk: &Memory| disk.calls.lock().unwrap().iter().map(|(offset, _)| *offset).collect::<Vec<_>>();
    assert_eq!((begun(&other), begun(&disk).len()), (vec![1536], 2));
}

#[test]
fn h3_a_ring_that_breaks_leaves_nothing_under_way() {
    let disk = Memory::new(DISK, false);
    let mut driver = disk.driver();
    disk.shut(&[512]);
    begin(&mut driver, 0, IN, 1);
    disk.begun(1);
    driver.offer(0, 4, &[(HEADER, 15, Way::ToDevice), (STATUS, 1, Way::FromDevice)]);
    std::thread::sleep(std::time::Duration::from_millis(30));
    assert_eq!(driver.status() & 0x40, 0, "it is said when the other one has ended");
    disk.shut(&[]);
    driver.needs_reset();
    assert_eq!(driver.try_take(0), None);
    driver.start(0);
    assert_eq!(request(&mut driver, FLUSH, 0, &[]), (OK, 1));
}

#[derive(Clone, Debug)]
enum Step {
    Read(u64, u32),
    Write(u64, u32, u8),
    Clear(u64, u32),
    Refuse,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let (sector, len) = (0u64..20, prop_oneof![4 => (0u32..6).prop_map(|n| n * 512), 1 => 0u32..3000]);
    let step = prop_oneof![
        (sector.clone(), len.clone()).prop_map(|(sector, len)| Step::Read(sector, len)),
        (sector.clone(), len, any::<u8>()).prop_map(|(sector, len, byte)| Step::Write(sector, len, byte)),
        (sector, 0u32..6).prop_map(|(sector, sectors)| Step::Clear(sector, sectors)),
        Just(Step::Refuse),
    ];
    prop::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(30))]

    #[test]
    fn h4_a_disk_is_as_its_model(steps in steps()) {
        let disk = Memory::new(DISK, false);
        let mut model = disk.data.lock().unwrap().clone();
        let mut driver = disk.driver();
        for step in steps {
            let part = |sector: u64, len: u32| {
                let first = sector as usize * 512;
                (len.is_multiple_of(512) && first + len as usize <= DISK).then_some(first..first + len as usize)
            };
            match step {
                Step::Read(sector, len) => {
                    driver.memory.write_slice(&[0xee; 3000], GuestAddress(BUFFERS)).unwrap();
                    let got = request(&mut driver, IN, sector, &[(BUFFERS, len, Way::FromDevice)]);
                    match part(sector, len) {
                        Some(range) => {
                            prop_assert_eq!(got, (OK, len + 1));
                            prop_assert_eq!(driver.bytes(BUFFERS, len as usize), &model[range]);
                        }
                        None => prop_assert_eq!(got, (FAILED, 1)),
                    }
                }
                Step::Write(sector, len, byte) => {
                    driver.memory.write_slice(&[byte; 3000], GuestAddress(BUFFERS)).unwrap();
                    let got = request(&mut driver, OUT, sector, &[(BUFFERS, len, Way::ToDevice)]);
                    let range = part(sector, len);
                    prop_assert_eq!(got, (if range.is_some() { OK } else { FAILED }, 1));
                    if let Some(range) = range {
                        model[range].fill(byte);
                    }
                }
                Step::Clear(sector, sectors) => {
                    range(&driver, sector, sectors, 0);
                    let (status, _) = request(&mut driver, ZEROES, 0, &[(BUFFERS, 16, Way::ToDevice)]);
                    let range = part(sector, sectors * 512);
                    prop_assert_eq!(status, if range.is_some() { OK } else { FAILED });
                    if let Some(range) = range {
                        model[range].fill(0);
                    }
                }
                Step::Refuse => {
                    disk.lets.store(0, Ordering::SeqCst);
                    let (status, _) = request(&mut driver, OUT, 0, &[(BUFFERS, 512, Way::ToDevice)]);
                    disk.lets.store(u32::MAX, Ordering::SeqCst);
                    prop_assert_eq!(status, FAILED);
                }
            }
            prop_assert_eq!(&*disk.data.lock().unwrap(), &model);
        }
    }

    #[test]
    fn h4_requests_at_a_time_are_as_one_after_the_other(
        rounds in prop::collection::vec(prop::collection::vec((any::<bool>(), 0u64..4, any::<u8>()), 1..=4), 1..20),
    ) {
        let disk = Memory::new(DISK, false);
        let mut model = disk.data.lock().unwrap().clone();
        let mut driver = disk.driver();
        for round in rounds {
            // Each has sectors of its own.
            for (slot, (writes, sector, byte)) in (0u16..).zip(&round) {
                let data = BUFFERS + 0x1000 * u64::from(slot) + if *writes { 16 } else { 0x800 };
                driver.memory.write_slice(&[*byte; 512], GuestAddress(data)).unwrap();
                begin(&mut driver, slot, if *writes { OUT } else { IN }, 4 * u64::from(slot) + sector);
            }
            let mut heads: Vec<u32> = round.iter().map(|_| driver.take(0).0).collect();
            heads.sort_unstable();
            prop_assert_eq!(heads, (0..round.len() as u32).map(|slot| 2 * slot).collect::<Vec<_>>());
            for (slot, (writes, sector, byte)) in (0u16..).zip(&round) {
                let sector = (4 * u64::from(slot) + sector) as usize * 512;
                prop_assert_eq!(status_of(&driver, slot, if *writes { OUT } else { IN }), OK);
                if *writes {
                    model[sector..][..512].fill(*byte);
                } else {
                    let read = driver.bytes(BUFFERS + 0x1000 * u64::from(slot) + 0x800, 512);
                    prop_assert_eq!(&read, &model[sector..][..512]);
                }
            }
            prop_assert_eq!(&*disk.data.lock().unwrap(), &model);
        }
    }
}
