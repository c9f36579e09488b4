use std::os::fd::OwnedFd;

use vtd::SourceId;

use super::*;
use crate::kvm::vm;

const OF: Requester = Requester { segment: 0, sid: SourceId::new(0, 5, 0) };

/// Writes down what it is told, and refuses what begins at `taken`.
#[derive(Default)]
struct Told {
    log: Arc<Mutex<Vec<String>>>,
    taken: Option<u64>,
}

impl Peers for Told {
    fn come(&self, window: &BarWindow) -> io::Result<()> {
        let BarWindow { of, gpa, len, .. } = window;
        self.log.lock().unwrap().push(format!("{of} comes {gpa:#x} {len:#x}"));
        let (hva, kept) = window.host_memory();
        assert!(hva != 0 && hva.is_multiple_of(4096) && Arc::strong_count(&kept) >= 2);
        if self.taken == Some(*gpa) { Err(io::ErrorKind::AlreadyExists.into()) } else { Ok(()) }
    }
    fn go(&self, gpa: u64, len: u64) {
        self.log.lock().unwrap().push(format!("goes {gpa:#x} {len:#x}"));
    }
}

fn file() -> Arc<OwnedFd> {
    let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
    file.set_len(0x3000).unwrap();
    Arc::new(file.into())
}

fn window(fd: &Arc<OwnedFd>, writable: bool) -> HostWindow {
    HostWindow { fd: fd.clone(), offset: 0x1000, len: 0x2000, writable, dma_buf: None }
}

/// Slots whose KVM writes down what it is asked, and refuses what begins at `full`.
fn slots(peers: Told, full: Option<u64>) -> (FunctionSlots, Arc<Mutex<Vec<String>>>) {
    let log = peers.log.clone();
    let kvm = log.clone();
    let set = move |region: kvm_userspace_memory_region| {
        let (gpa, len) = (region.guest_phys_addr, region.memory_size);
        kvm.lock().unwrap().push(format!("slot {} {gpa:#x} {len:#x}", region.slot));
        if full == Some(gpa) && len != 0 { Err(io::ErrorKind::AlreadyExists.into()) } else { Ok(()) }
    };
    let slots = Arc::new(KvmSlots::with(Box::new(set), 3, Arc::new(peers)));
    (FunctionSlots { slots, of: OF }, log)
}

#[test]
fn f3_a_window_leaves_the_guest_then_devices_and_comes_in_reverse() {
    let (slots, log) = slots(Told::default(), None);
    let fd = file();
    let id = slots.map(0xc000_0000, &window(&fd, true)).unwrap();
    let taken = || std::mem::take(&mut *log.lock().unwrap());
    assert_eq!(taken(), ["0000:00:05.0 comes 0xc0000000 0x2000", "slot 3 0xc0000000 0x2000"]);
    slots.unmap(id);
    assert_eq!(taken(), ["slot 3 0xc0000000 0x0", "goes 0xc0000000 0x2000"]);
    slots.unmap(id);
    assert!(taken().is_empty());
}

#[test]
fn b10_what_the_guest_or_the_map_does_not_take_no_device_keeps() {
    let fd = file();
    let (over, log) = slots(Told { taken: Some(0x1000), ..Told::default() }, Some(0x8000));
    assert!(over.map(0x1000, &window(&fd, true)).is_err());
    assert_eq!(std::mem::take(&mut *log.lock().unwrap()), ["0000:00:05.0 comes 0x1000 0x2000"], "it is nobody's");
    assert!(over.map(0x8000, &window(&fd, true)).is_err());
    let said = std::mem::take(&mut *log.lock().unwrap());
    assert_eq!(said, ["0000:00:05.0 comes 0x8000 0x2000", "slot 3 0x8000 0x2000", "goes 0x8000 0x2000"]);
    // The slot is still to be had.
    assert_eq!(over.map(0x10_0000, &window(&fd, true)).unwrap(), SlotId(3));
}

#[test]
fn a_slot_can_be_used_again_at_once_when_its_window_left() {
    let Ok(kvm) = vm::open() else {
        eprintln!("no /dev/kvm: nothing to check");
        return;
    };
    let slots = Arc::new(KvmSlots::new(vm::create(&kvm).unwrap(), 3, Arc::new(Told::default())));
    let slots = FunctionSlots { slots, of: OF };
    let fd = file();
    let first = slots.map(0xc000_0000, &window(&fd, true)).unwrap();
    // The kernel refuses overlapping slots, so this proves that the first is there, and then that it is gone.
    assert!(slots.map(0xc000_1000, &window(&fd, true)).is_err());
    slots.unmap(first);
    slots.unmap(first);
    let again = slots.map(0xc000_1000, &window(&fd, false)).unwrap();
    assert_eq!((first, again), (SlotId(3), SlotId(3)));
    assert_eq!(slots.map(0xd000_0000, &window(&fd, true)).unwrap(), SlotId(4));
}
