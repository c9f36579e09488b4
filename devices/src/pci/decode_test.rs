use std::fs::File;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;
use vtd::{Requester, SourceId};

use super::decode::{BarTarget, Bells, Decoder};
use crate::host::{Doorbells, HostWindow, MemorySlots};
use crate::testing::{FakeDoorbells, FakeSlots};
use crate::{Bus, BusDevice};

struct Answer(u8);
impl BusDevice for Answer {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(self.0);
    }
    fn write(&self, _: u64, _: &[u8]) {}
}

/// A target that answers with `answer`, with a window of two pages in its third and fourth one.
fn target(answer: u8, slots: &Arc<FakeSlots>) -> BarTarget {
    let fd = Arc::new(File::open("/dev/null").unwrap().into());
    let window = HostWindow { fd, offset: 0x7000, len: 0x2000, writable: true, dma_buf: None };
    let slots: Arc<dyn MemorySlots> = slots.clone();
    let device = Arc::new(Answer(answer));
    BarTarget { device, windows: Arc::new([(0x2000, window)]), slots: Some(slots), bells: None }
}

const A: Requester = Requester { segment: 0, sid: SourceId::new(0, 1, 0) };
const B: Requester = Requester { segment: 0, sid: SourceId::new(0, 2, 0) };
/// As the first, in another segment.
const OTHER_A: Requester = Requester { segment: 1, ..A };

fn decoder() -> (Decoder, Arc<Bus>, Arc<FakeSlots>) {
    let (bus, slots) = (Arc::new(Bus::default()), Arc::new(FakeSlots::default()));
    (Decoder::new(bus.clone()), bus, slots)
}

fn who(bus: &Bus, address: u64) -> u8 {
    let mut data = [0];
    bus.read(address, &mut data);
    data[0]
}

#[test]
fn f3_a_bar_and_its_windows_come_and_go_together() {
    let (decoder, bus, slots) = decoder();
    let one = target(1, &slots);
    assert!(decoder.set(A, 0, Some((0x10_0000, 0x10_ffff)), &one));
    assert_eq!((who(&bus, 0x10_ffff), slots.mapped()), (1, vec![(0x10_2000, 0x7000, 0x2000)]));
    // Told again what is so, it stays as it is: its windows are not taken from a guest that uses them.
    *slots.on_unmap.lock().unwrap() = Some(Box::new(|| panic!("a window was taken away")));
    assert!(decoder.set(A, 0, Some((0x10_0000, 0x10_ffff)), &one));
    *slots.on_unmap.lock().unwrap() = None;
    assert!(decoder.set(A, 0, Some((0x20_0000, 0x20_ffff)), &one));
    assert_eq!((who(&bus, 0x10_0000), who(&bus, 0x20_0000)), (0xff, 1));
    assert_eq!(slots.mapped(), [(0x20_2000, 0x7000, 0x2000)]);
    assert!(decoder.set(A, 0, None, &one));
    assert_eq!((who(&bus, 0x20_0000), slots.mapped()), (0xff, vec![]));
}

#[test]
fn f6_a_bar_that_waits_takes_nothing_from_the_one_that_is_there() {
    let (decoder, bus, slots) = decoder();
    let (one, two) = (target(1, &slots), target(2, &slots));
    let at = 0x10_0000;
    assert!(decoder.set(B, 0, Some((at, at + 0xfff)), &two));
    assert!(!decoder.set(A, 0, Some((at, at + 0xfff)), &one), "the range is taken");
    assert!(!decoder.set(A, 0, Some((at, at + 0xfff)), &one), "and still is");
    // One that moves over itself keeps its place, whoever else waits for it.
    assert!(decoder.set(B, 0, Some((at, at + 0x1fff)), &two));
    assert_eq!((who(&bus, at), slots.mapped().len()), (2, 1));
    // Who gives up waiting leaves the other one alone.
    assert!(decoder.set(A, 0, None, &one));
    assert_eq!(who(&bus, at), 2);
    assert!(!decoder.set(A, 0, Some((at + 0x1000, at + 0x1fff)), &one));
    assert!(decoder.set(B, 0, Some((at + 0x8000, at + 0x8fff)), &two));
    assert_eq!((who(&bus, at + 0x1000), who(&bus, at), who(&bus, at + 0x8000)), (1, 0xff, 2));
    assert!(decoder.set(A, 0, Some((at + 0x1000, at + 0x1fff)), &one), "it has its place now");
}

#[test]
fn f6_a_bar_that_lies_half_in_what_a_bridge_forwards_is_not_there() {
    let (decoder, bus, slots) = decoder();
    let one = target(1, &slots);
    decoder.forward(A, &[(0x10_0000, 0x1f_ffff)]);
    for first in [0xf_f000, 0x1f_f000] {
        assert!(!decoder.set(A, 0, Some((first, first + 0x1fff)), &one));
        assert_eq!((who(&bus, first), who(&bus, first + 0x1000), slots.mapped()), (0xff, 0xff, vec![]));
    }
    assert!(decoder.set(A, 0, Some((0x1f_c000, 0x1f_ffff)), &one));
    assert_eq!((who(&bus, 0x1f_c000), slots.mapped().len()), (1, 1));
}

#[test]
fn f6_bells_hang_where_the_bar_is_and_for_as_long() {
    let ((decoder, bus, _), hung) = (decoder(), Arc::new(FakeDoorbells::default()));
    let event = Arc::new(EventFd::new(0).unwrap());
    let bells = |offsets: &[u64]| Bells { by: hung.clone(), event: event.clone(), offsets: offsets.into() };
    let target = |answer: u8, offsets: &[u64]| BarTarget {
        bells: Some(bells(offsets)),
        ..BarTarget::of_device(Arc::new(Answer(answer)))
    };
    let (one, two) = (target(1, &[0x3000, 0x3004]), target(2, &[0x3000]));
    decoder.set(A, 0, Some((0x10_0000, 0x10_7fff)), &one);
    assert_eq!(hung.hung(), [0x10_3000, 0x10_3004]);
    decoder.set(A, 0, Some((0x20_0000, 0x20_7fff)), &one);
    assert_eq!(hung.hung(), [0x20_3000, 0x20_3004]);
    // One that waits for its place has none, and none of the other's.
    decoder.set(B, 0, Some((0x20_0000, 0x20_7fff)), &two);
    assert_eq!((hung.hung(), who(&bus, 0x20_0000)), (vec![0x20_3000, 0x20_3004], 1));
    decoder.set(A, 0, None, &one);
    assert_eq!((hung.hung(), who(&bus, 0x20_0000)), (vec![0x20_3000], 2));
    // What is taken already stays a write, and is not taken down with the rest.
    hung.hang(0x30_3000, &event).unwrap();
    decoder.set(B, 0, Some((0x30_0000, 0x30_7fff)), &two);
    assert_eq!(hung.hung(), [0x30_3000]);
    decoder.set(B, 0, None, &two);
    assert_eq!(hung.hung(), [0x30_3000]);
}

#[test]
fn a13_functions_of_one_id_in_two_segments_have_bars_of_their_own() {
    let (decoder, bus, slots) = decoder();
    let (one, other) = (target(1, &slots), target(2, &slots));
    assert!(decoder.set(A, 0, Some((0x10_0000, 0x10_ffff)), &one));
    assert!(decoder.set(OTHER_A, 0, Some((0x20_0000, 0x20_ffff)), &other));
    assert_eq!((who(&bus, 0x10_0000), who(&bus, 0x20_0000)), (1, 2));
    assert_eq!(decoder.find(0x20_0008, 8).map(|(of, at, _)| (of, at)), Some((OTHER_A, 8)));
    // The bridge above the one says nothing of the other.
    decoder.forward(OTHER_A, &[]);
    assert_eq!((who(&bus, 0x10_0000), who(&bus, 0x20_0000)), (1, 0xff));
    assert!(decoder.set(A, 0, Some((0x30_0000, 0x30_ffff)), &one));
    assert!(decoder.set(A, 0, Some((0x10_0000, 0x10_ffff)), &one));
    decoder.forward(OTHER_A, &[(0, u64::MAX)]);
    // Both want one address: who waits has it when the other leaves.
    assert!(!decoder.set(OTHER_A, 0, Some((0x10_0000, 0x10_ffff)), &other));
    assert!(decoder.set(A, 0, None, &one));
    assert_eq!(who(&bus, 0x10_0000), 2);
}
