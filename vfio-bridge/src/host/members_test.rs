use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use vtd::Pasid;

use super::*;

/// Device 9 is the parent of 1 and 2, which it keeps apart; 8 that of 3 and 4, which it does not. 5 is itself.
#[derive(Default)]
struct Host {
    at: RefCell<BTreeMap<HostStream, HostSpaceId>>,
    calls: Cell<u32>,
    /// The calls that fail.
    fails: Vec<u32>,
}

impl Host {
    fn call(&self) -> io::Result<()> {
        self.calls.set(self.calls.get() + 1);
        if self.fails.contains(&self.calls.get()) { Err(io::Error::from_raw_os_error(libc::EINVAL)) } else { Ok(()) }
    }
}

fn stream(device: u32, pasid: Option<u32>) -> HostStream {
    HostStream { device: HostDevice(device), pasid: pasid.map(Pasid) }
}

impl Devices for Host {
    fn seen(&self, device: HostDevice) -> HostStream {
        match device.0 {
            part @ (1 | 2) => stream(9, Some(part)),
            3 | 4 => stream(8, None),
            other => stream(other, None),
        }
    }
    fn attach(&self, stream: HostStream, space: HostSpaceId) -> io::Result<()> {
        self.call()?;
        self.at.borrow_mut().insert(stream, space);
        Ok(())
    }
    fn detach(&self, stream: HostStream) -> io::Result<()> {
        self.call()?;
        self.at.borrow_mut().remove(&stream);
        Ok(())
    }
}

const GROUP: [HostDevice; 5] = [HostDevice(1), HostDevice(2), HostDevice(3), HostDevice(4), HostDevice(5)];
const OLD: HostSpaceId = HostSpaceId(1);
const NEW: HostSpaceId = HostSpaceId(2);

/// All that the IOMMU sees of the group, in `space`.
fn all_in(space: HostSpaceId) -> BTreeMap<HostStream, HostSpaceId> {
    [stream(9, Some(1)), stream(9, Some(2)), stream(8, None), stream(5, None)].map(|of| (of, space)).into()
}

#[test]
fn c1_each_member_is_attached_by_what_the_iommu_sees_of_it() {
    let host = Host::default();
    attach(&host, &GROUP, None, NEW).expect("attached");
    assert_eq!(*host.at.borrow(), all_in(NEW));
    assert_eq!(host.calls.get(), 4, "3 and 4 are one to the IOMMU");
    detach(&host, &GROUP).expect("detached");
    assert!(host.at.borrow().is_empty());
    assert!(attach(&host, &[], None, NEW).is_err(), "nobody would be attached");
}

#[test]
fn c2_half_an_attach_is_undone() {
    for from in [None, Some(OLD)] {
        for fails in 1..=4 {
            let host = Host { fails: vec![fails], ..Host::default() };
            let before = from.map(all_in).unwrap_or_default();
            host.at.replace(before.clone());
            assert!(attach(&host, &GROUP, from, NEW).is_err());
            assert_eq!(*host.at.borrow(), before, "{from:?}: call {fails} failed");
            assert_eq!(host.calls.get(), 2 * fails - 1);
        }
    }
    // What cannot be brought back does not keep the others from it.
    let host = Host { fails: vec![4, 5], ..Host::default() };
    host.at.replace(all_in(OLD));
    assert!(attach(&host, &GROUP, Some(OLD), NEW).is_err());
    assert_eq!(host.at.borrow().values().filter(|space| **space == NEW).count(), 1);
}

#[test]
fn c2_a_member_that_cannot_be_detached_does_not_keep_the_others() {
    for fails in 1..=4 {
        let host = Host { fails: vec![fails], ..Host::default() };
        host.at.replace(all_in(OLD));
        assert!(detach(&host, &GROUP).is_err());
        assert_eq!((host.at.borrow().len(), host.calls.get()), (1, 4));
    }
}
