//! The audit's comparison of what was granted with the ledger, and the trace (B-16).

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use vfio_bridge::model::{HostOp, Kernel, Model};
use vfio_bridge::{Bridge, GroupId, Trace, TracedHost, TracedListener};
use vtd::{AttachRefused, Audit, Mapping, Perm, SpaceKey, SpaceListener};

use crate::world::{GIB, KIB4, MIB2, Ram, Stopped, World, map, mapping, paged, requester, unmap};

fn audit(world: &World, device: u8, space: &SpaceKey, granted: &[Mapping]) -> Audit {
    let mut audit = Audit::default();
    world.bridge.audit(requester(device), space, &mut granted.iter().copied(), &mut audit);
    audit
}

fn said(audit: &Audit) -> Vec<String> {
    audit.differences.iter().map(ToString::to_string).collect()
}

#[test]
fn the_ledger_agrees_whatever_its_shape() {
    let (world, space) = World::one(Kernel::new(48), 48);
    world.done(&space, &[map(0, 0, KIB4), map(KIB4, KIB4, 3 * KIB4)]);
    // A leaf over the interrupt window: the host holds both sides of it.
    world.done(&space, &[map(0xfec0_0000, MIB2, 2 * MIB2)]);
    let found = audit(&world, 1, &space, &[mapping(0, 0, 4 * KIB4), mapping(0xfec0_0000, MIB2, 2 * MIB2)]);
    assert_eq!(said(&found), [""; 0]);
    assert_eq!((found.checked, found.pending), (4, 0));
}

#[test]
fn an_extent_that_the_ledger_kept_is_a_difference() {
    let (world, space) = World::one(Kernel::new(48), 48);
    world.done(&space, &[map(0, 0, 4 * KIB4)]);
    let found = audit(&world, 1, &space, &[mapping(0, 0, KIB4), mapping(2 * KIB4, 2 * KIB4, 2 * KIB4)]);
    assert_eq!(said(&found), ["0000:00:01.0: 0x1000-0x1fff: granted is nothing, the host holds 0x1000 rw"]);
}

#[test]
fn a_map_that_was_dropped_or_leads_elsewhere_is_a_difference() {
    let (world, space) = World::one(Kernel::new(48), 48);
    world.done(&space, &[map(0, 0, KIB4), map(KIB4, 8 * KIB4, KIB4)]);
    let read_only = Mapping { perm: Perm::Read, ..mapping(0, 0, KIB4) };
    let found = audit(&world, 1, &space, &[read_only, mapping(KIB4, KIB4, KIB4), mapping(MIB2, MIB2, MIB2)]);
    let expected = [
        "0000:00:01.0: 0x0-0xfff: granted is 0x0 r, the host holds 0x0 rw",
        "0000:00:01.0: 0x1000-0x1fff: granted is 0x1000 rw, the host holds 0x8000 rw",
        "0000:00:01.0: 0x200000-0x3fffff: granted is 0x200000 rw, the host holds nothing",
    ];
    assert_eq!(said(&found), expected);
}

#[test]
fn identity_is_all_ram_without_the_interrupt_window() {
    let world = World::new(Kernel::new(48), Ram { low: 4 * GIB - MIB2, high: GIB }, &[(1, 1)]);
    world.attach(1, &SpaceKey::Identity, &[]).expect("attached");
    let found = audit(&world, 1, &SpaceKey::Identity, &[]);
    assert_eq!((said(&found).len(), found.checked), (0, 3));
    assert_eq!(audit(&world, 1, &SpaceKey::Blocked, &[]).differing(), 4, "the attachment, and three ranges of RAM");
}

#[test]
fn what_the_host_refused_of_identity_is_pending_until_it_takes_it() {
    let world = World::new(Kernel::new(48), Ram { low: GIB, high: GIB }, &[(1, 1)]);
    // All of it, as a process that is no more, and the upper half alone.
    for (refused_from, held, pending) in [(0, 0, 2), (4 * GIB, 1, 1)] {
        world.attach(1, &SpaceKey::Blocked, &[]).expect("blocked");
        world
            .model
            .inject(move |_, op| matches!(op, HostOp::Map(held) if held.iova >= refused_from).then_some(libc::EIO));
        assert!(matches!(world.attach(1, &SpaceKey::Identity, &[]), Err(AttachRefused::Partial(_))));
        assert_eq!(world.contents().len(), held);
        assert_eq!(
            audit(&world, 1, &SpaceKey::Identity, &[]),
            Audit { checked: held as u64, pending, ..Audit::default() }
        );
    }
    world.model.stop_injecting();
    world.attach(1, &SpaceKey::Identity, &[]).expect("attached");
    assert_eq!(audit(&world, 1, &SpaceKey::Identity, &[]), Audit { checked: 2, ..Audit::default() });
}

#[test]
fn a_group_whose_members_disagree_holds_nothing() {
    let world = World::new(Kernel::new(48), Ram { low: GIB, high: GIB }, &[(1, 1), (2, 1)]);
    world.attach(1, &SpaceKey::Identity, &[]).expect("attached");
    for (device, space) in [(1, SpaceKey::Identity), (2, SpaceKey::Blocked)] {
        assert_eq!(audit(&world, device, &space, &[]), Audit::default());
    }
    world.attach(2, &SpaceKey::Identity, &[]).expect("attached");
    assert_eq!(audit(&world, 1, &SpaceKey::Identity, &[]), Audit { checked: 2, ..Audit::default() });
}

#[test]
fn a_function_that_was_stopped_is_a_difference() {
    let (world, space) = World::one(Kernel::new(48), 48);
    world.done(&space, &[map(0, 0, KIB4)]);
    world.model.inject(|_, op| matches!(op, HostOp::Unmap(_)).then_some(libc::EIO));
    world.apply(&space, &[unmap(0, KIB4 - 1)]);
    let found = audit(&world, 1, &space, &[]);
    assert_eq!(found.differing(), 1);
    assert!(said(&found)[0].contains("the host may still hold 1 of its mappings"), "{found:?}");
    let unknown = said(&audit(&world, 9, &space, &[]));
    assert_eq!(unknown, ["0000:00:09.0 is not a device that the bridge knows"]);
}

#[derive(Clone, Default)]
struct Text(Arc<Mutex<Vec<u8>>>);

impl Write for Text {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("whole").write(data)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Text {
    /// The lines without what differs from run to run: the time, and how long the host took.
    fn lines(&self) -> Vec<String> {
        let text = String::from_utf8(std::mem::take(&mut *self.0.lock().expect("whole"))).expect("text");
        let fixed = |line: &str| {
            let (time, rest) = line.split_once(' ').expect("a time");
            assert!(time.split_once('.').is_some_and(|(s, n)| s.parse::<u64>().is_ok() && n.len() == 9), "{line}");
            let words = rest.split(' ').filter(|word| !word.starts_with("ns="));
            words.collect::<Vec<_>>().join(" ")
        };
        text.lines().map(fixed).collect()
    }
}

#[test]
fn b16_each_notification_and_host_operation_is_a_line() {
    let text = Text::default();
    let trace = Trace::new(Box::new(text.clone()));
    let model = Model::new(Kernel { entries: 1, ..Kernel::new(48) }, &[GroupId(7)]);
    let host = Arc::new(TracedHost::new(model, trace.clone()));
    let ram = Ram { low: GIB, high: GIB }.map();
    trace.memory(&ram);
    let hva = |gpa| ram.host_mem(gpa, KIB4).expect("RAM").hva();
    let (low, high, second_page) = (hva(0), hva(4 * GIB), hva(KIB4));
    let bridge = Arc::new(Bridge::new(vec![host], ram, Arc::new(Stopped::default())));
    bridge.register(requester(1), GroupId(7)).expect("new");
    let listener = TracedListener::new(bridge.clone(), trace.clone());
    let space = paged(3, 48);

    listener.attach(requester(1).into(), &space, &mut [mapping(0, KIB4, KIB4)].into_iter()).expect("attached");
    let applied = listener.apply(&space, &[map(MIB2, 0, KIB4)]);
    assert_eq!(applied.refused[0].range.first, MIB2);
    bridge.trace_ledgers(&trace);
    listener.apply(&space, &[unmap(0, 0xffff)]);
    listener.detach(requester(1).into());

    assert_eq!(text.lines(), [""; 0], "buffered");
    trace.flush();
    let expected = [
        &format!("host memory gpa=0x0-0x3fffffff hva={low:#x}"),
        &format!("host memory gpa=0x100000000-0x13fffffff hva={high:#x}"),
        "notify attach device=0000:00:01.0 space=unit0/domain3/root0x3000/48bit",
        "notify replay space=unit0/domain3/root0x3000/48bit iova=0x0-0xfff gpa=0x1000 perm=rw",
        "host map container=7 iova=0x0-0xfff gpa=0x1000 perm=rw result=ok",
        "notify attached device=0000:00:01.0 space=unit0/domain3/root0x3000/48bit result=ok",
        "notify map space=unit0/domain3/root0x3000/48bit iova=0x200000-0x200fff gpa=0x0 perm=rw",
        "host map container=7 iova=0x200000-0x200fff gpa=0x0 perm=rw result=No_space_left_on_device_(os_error_28)",
        "notify refused space=unit0/domain3/root0x3000/48bit device=0000:00:01.0 iova=0x200000-0x200fff cause=limit",
        "notify applied space=unit0/domain3/root0x3000/48bit ops=1 refused=1",
        "host ledger container=7 extents=1 bytes=0x1000",
        &format!("host extent container=7 iova=0x0-0xfff gpa=0x1000 hva={second_page:#x} perm=rw"),
        "notify unmap space=unit0/domain3/root0x3000/48bit iova=0x0-0xffff",
        "host unmap container=7 iova=0x0-0xffffffffffffffff bytes=0x1000 result=ok",
        "notify applied space=unit0/domain3/root0x3000/48bit ops=1 refused=0",
        "notify detach device=0000:00:01.0",
    ];
    assert_eq!(text.lines(), expected);
}
