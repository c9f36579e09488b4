//! What a trace says of refusals, and that what it stands before is not changed by it (B-16).

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use vfio_bridge::model::{Kernel, Model};
use vfio_bridge::{GroupId, HostIommu, HostSpaceId, Map, Placement, Trace, TracedHost, TracedListener, UnmapRange};
use vtd::{
    Applied, AttachRefused, IovaRange, MapOp, Mapping, Pasid, Perm, Refusal, RefusalCause, SpaceKey, SpaceListener,
    Stream,
};

use crate::world::*;

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

fn trace() -> (Arc<Trace>, Text) {
    let text = Text::default();
    (Trace::new(Box::new(text.clone())), text)
}

/// The lines without their times.
fn lines(trace: &Trace, text: &Text) -> Vec<String> {
    trace.flush();
    let text = String::from_utf8(std::mem::take(&mut *text.0.lock().expect("whole"))).expect("text");
    text.lines().map(|line| line.split_once(' ').expect("a time").1.to_owned()).collect()
}

const CAUSES: [RefusalCause; 5] =
    [RefusalCause::Limit, RefusalCause::Memlock, RefusalCause::Range, RefusalCause::Target, RefusalCause::Other];

/// A listener that refuses everything, for each cause.
struct Refusing;

fn refusals() -> Vec<Refusal> {
    let refusal = |cause| Refusal { range: IovaRange::new(0, 0xfff), cause, stream: requester(1).into() };
    CAUSES.map(refusal).to_vec()
}

impl SpaceListener for Refusing {
    fn attach(
        &self,
        stream: Stream,
        _: &SpaceKey,
        live: &mut dyn Iterator<Item = Mapping>,
    ) -> Result<(), AttachRefused> {
        let pieces = refusals()[..live.count()].to_vec();
        Err(if stream.pasid.is_some() { AttachRefused::Shared(pieces) } else { AttachRefused::Partial(pieces) })
    }
    fn detach(&self, _: Stream) {}
    fn apply(&self, _: &SpaceKey, _: &[MapOp]) -> Applied {
        Applied { refused: refusals() }
    }
}

#[test]
fn b16_each_refusal_is_a_line_with_its_cause() {
    let (trace, text) = trace();
    let listener = TracedListener::new(Arc::new(Refusing), trace.clone());
    let space = SpaceKey::Identity;
    assert_eq!(listener.apply(&space, &[]).refused, refusals());
    let refused = |cause| format!("notify refused space=identity device=0000:00:01.0 iova=0x0-0xfff cause={cause}");
    let mut expected: Vec<String> = ["limit", "memlock", "range", "target", "other"].map(refused).to_vec();
    expected.push("notify applied space=identity ops=0 refused=5".to_owned());
    assert_eq!(lines(&trace, &text), expected);

    // Those of an attach, too: in part, and of a group that may not join.
    for pasid in [None, Some(Pasid(1))] {
        let mut live = [mapping(0, 0, KIB4), mapping(MIB2, 0, KIB4)].into_iter();
        let result = listener.attach(Stream { pasid, ..requester(1).into() }, &space, &mut live);
        assert!(matches!(result, Err(AttachRefused::Partial(_) | AttachRefused::Shared(_))));
        let lines = lines(&trace, &text);
        assert_eq!(lines.len(), 6, "{lines:?}");
        let suffix = if pasid.is_some() { " pasid=0x1" } else { "" };
        let expected_start = format!("notify attached device=0000:00:01.0{suffix} space=identity result=");
        assert!(lines[3].starts_with(&expected_start), "{lines:?}");
        assert_eq!(lines[4..], expected[..2]);
    }
}

#[test]
fn b16_a_traced_host_is_the_host() {
    let (trace, text) = trace();
    let model = Model::new(Kernel { entries: 3, ..Kernel::new(39) }, &[GroupId(7)]);
    let host = TracedHost::new(model.clone(), trace.clone());
    let space = HostSpaceId(1);
    assert_eq!(
        (host.name(), host.placement(GroupId(7)), host.placement(GroupId(8))),
        ("model", Some(Placement::PerGroup(space)), None)
    );
    assert_eq!(host.limits(space), model.limits(space));
    let ram = Ram { low: MIB2, high: MIB2 }.map();
    let mem = ram.host_mem(KIB4, KIB4).expect("RAM");
    host.map(space, 0, mem, Perm::Write).expect("mapped");
    let maps = [0, MIB2].map(|iova| Map { iova, mem, perm: Perm::Read });
    let mut told = Vec::new();
    host.map_all(space, &maps, &mut |result| told.push(result.is_ok()));
    assert_eq!(told, [false, true], "the first overlaps");
    assert_eq!(model.contents(GroupId(7)).len(), 2);
    assert_eq!(host.unmap(space, UnmapRange::Span { first: 0, last: KIB4 - 1 }).expect("unmapped"), KIB4);
    assert!(host.unmap(space, UnmapRange::Span { first: 0, last: KIB4 }).is_err());
    let lines = lines(&trace, &text);
    let starts = [
        "host map container=7 iova=0x0-0xfff gpa=0x1000 perm=w ns=",
        "host map container=7 iova=0x0-0xfff gpa=0x1000 perm=r ns=",
        "host map container=7 iova=0x200000-0x200fff gpa=0x1000 perm=r ns=",
        "host unmap container=7 iova=0x0-0xfff bytes=0x1000 ns=",
        "host unmap container=7 iova=0x0-0x1000 bytes=0x0 ns=",
    ];
    let ends = [
        "result=ok",
        "result=File_exists_(os_error_17)",
        "result=ok",
        "result=ok",
        "result=Invalid_argument_(os_error_22)",
    ];
    assert_eq!(lines.len(), starts.len());
    for ((line, start), end) in lines.iter().zip(starts).zip(ends) {
        assert!(line.starts_with(start) && line.ends_with(end), "{line}");
    }
}

#[test]
fn b16_who_is_attached_to_what_is_a_line_where_groups_move() {
    let (trace, text) = trace();
    let model = Model::per_space(Kernel::new(39), &[GroupId(7)]);
    let host = TracedHost::new(model.clone(), trace.clone());
    assert_eq!(host.placement(GroupId(7)), Some(Placement::PerSpace));
    let space = host.create().expect("made");
    host.attach(GroupId(7), space).expect("attached");
    assert!(host.attach(GroupId(8), space).is_err(), "nobody has that group");
    host.detach(GroupId(7)).expect("detached");
    host.destroy(space);
    let container = (1 << 30) + space.0;
    let expected = [
        format!("host create container={container} ns= result=ok"),
        format!("host attach container={container} group=7 ns= result=ok"),
        format!("host attach container={container} group=8 ns= result=No_such_device_(os_error_19)"),
        "host detach group=7 ns= result=ok".to_owned(),
        format!("host destroy container={container} ns= result=ok"),
    ];
    let without_time = |line: String| {
        let (before, after) = line.split_once("ns=").expect("a time");
        format!("{before}ns= {}", after.split_once(' ').expect("a result").1)
    };
    assert_eq!(lines(&trace, &text).into_iter().map(without_time).collect::<Vec<_>>(), expected);
}
