//! The bells of a unit's tail register: eventfds that KVM signals when the guest writes a tail, without an exit to
//! this process. KVM compares what is written, so each tail has an eventfd of its own, and which one fired says which
//! it was.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vtd::QueueShape;

/// Tails that have a bell, at most: those of the queue that Linux, FreeBSD and Xen make. Each is an open file, and KVM
/// looks through those before the one that is written.
pub const MOST: usize = 256;

/// The bells of one register. They are made once, and hang for as long as the guest's writes are wanted without exits.
pub struct KvmTailBells {
    vm: Arc<VmFd>,
    /// Of the register.
    gpa: u64,
    /// By the tail's place in the queue.
    bells: Vec<EventFd>,
    /// Says of each once that it rang, with its place.
    rang: Epoll,
}

/// Bells that hang: for which queue, and writes of how many bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hanging {
    /// The queue.
    pub queue: QueueShape,
    /// 4 or 8.
    pub width: u8,
}

impl Hanging {
    /// The places of tails, in the order in which KVM looks through them: a guest that waits for each descriptor moves
    /// its tail by two.
    fn places(self) -> Vec<u64> {
        let from = |first: u64| (first..self.queue.descriptors).step_by(2);
        from(0).chain(from(1)).collect()
    }
}

fn error(e: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(e.errno())
}

impl KvmTailBells {
    /// Of the register at `gpa`; none hangs.
    ///
    /// # Errors
    /// There is no room for so many open files.
    pub fn new(vm: Arc<VmFd>, gpa: u64) -> io::Result<Self> {
        let rang = Epoll::new()?;
        let bells = (0..MOST).map(|place| {
            let bell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
            // By edge: what rang is said once, and no bell need be read.
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            rang.ctl(ControlOperation::Add, bell.as_raw_fd(), EpollEvent::new(events, place as u64))?;
            Ok(bell)
        });
        let bells = bells.collect::<io::Result<_>>()?;
        Ok(Self { vm, gpa, bells, rang })
    }

    /// Writes of the tails of this queue ring from now on.
    ///
    /// # Errors
    /// KVM does not take them all. Then none hangs; what rang meanwhile is to be taken.
    pub fn hang(&self, hanging: Hanging) -> io::Result<()> {
        if hanging.queue.descriptors > MOST as u64 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let places = hanging.places();
        for (done, place) in places.iter().enumerate() {
            if let Err(e) = self.each(hanging, *place, true) {
                places[..done].iter().for_each(|place| self.take_one_down(hanging, *place));
                return Err(e);
            }
        }
        Ok(())
    }

    /// The guest's writes are exits again. What rang is to be taken.
    pub fn take_down(&self, hanging: Hanging) {
        // The last first: KVM looks through those before it.
        hanging.places().iter().rev().for_each(|place| self.take_one_down(hanging, *place));
    }

    fn take_one_down(&self, hanging: Hanging, place: u64) {
        if let Err(e) = self.each(hanging, place, false) {
            // It cannot be that nothing hangs there.
            log::error!("the bell of tail {place} at {:#x} stays: {e}", self.gpa);
        }
    }

    fn each(&self, Hanging { queue, width }: Hanging, place: u64, hang: bool) -> io::Result<()> {
        let at = IoEventAddress::Mmio(self.gpa);
        let bell = self.bells.get(place as usize).ok_or(io::ErrorKind::InvalidInput)?;
        let tail = place * queue.descriptor;
        match (width, hang) {
            (4, true) => self.vm.register_ioevent(bell, &at, tail as u32),
            (4, false) => self.vm.unregister_ioevent(bell, &at, tail as u32),
            (_, true) => self.vm.register_ioevent(bell, &at, tail),
            (_, false) => self.vm.unregister_ioevent(bell, &at, tail),
        }
        .map_err(error)
    }

    /// Says which places rang since the last call.
    pub fn take(&self, place: &mut dyn FnMut(u64)) {
        let mut events = [EpollEvent::default(); MOST];
        // A signal does not end a call that does not wait.
        let count = self.rang.wait(0, &mut events).unwrap_or_else(|e| {
            log::error!("the bells of the tail at {:#x} cannot be looked at: {e}", self.gpa);
            0
        });
        events[..count].iter().for_each(|event| place(event.data()));
    }
}

impl AsRawFd for KvmTailBells {
    /// Is readable while something rang that nobody has taken.
    fn as_raw_fd(&self) -> RawFd {
        self.rang.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::vm;

    fn taken(bells: &KvmTailBells) -> Vec<u64> {
        let mut places = Vec::new();
        bells.take(&mut |place| places.push(place));
        places
    }

    #[test]
    fn a6_a_bell_that_rang_twice_is_taken_once_and_rings_again() {
        let Ok(kvm) = vm::open() else {
            eprintln!("no /dev/kvm: nothing to check");
            return;
        };
        let bells = KvmTailBells::new(vm::create(&kvm).unwrap(), 0xfed9_0088).unwrap();
        assert!(taken(&bells).is_empty());
        for place in [7, 2, 7] {
            bells.bells[place].write(1).unwrap();
        }
        let mut once = taken(&bells);
        once.sort_unstable();
        assert_eq!((once, taken(&bells)), (vec![2, 7], vec![]));
        bells.bells[7].write(1).unwrap();
        assert_eq!(taken(&bells), [7]);
    }

    #[test]
    fn a6_bells_hang_for_all_tails_of_a_queue_or_for_none() {
        let Ok(kvm) = vm::open() else {
            eprintln!("no /dev/kvm: nothing to check");
            return;
        };
        let bells = KvmTailBells::new(vm::create(&kvm).unwrap(), 0xfed9_0088).unwrap();
        let queue = QueueShape { descriptors: 256, descriptor: 16 };
        let hanging = Hanging { queue, width: 4 };
        bells.hang(hanging).unwrap();
        // One is in the way of another set, which then leaves nothing behind.
        bells.take_down(hanging);
        bells.each(hanging, 9, true).unwrap();
        assert!(bells.hang(hanging).is_err());
        bells.each(hanging, 9, false).unwrap();
        bells.hang(hanging).unwrap();
        bells.take_down(hanging);
        let larger = QueueShape { descriptors: 512, descriptor: 16 };
        assert!(bells.hang(Hanging { queue: larger, width: 8 }).is_err());
    }
}
