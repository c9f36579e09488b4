//! Tracing (B-16): a line for each notification of a unit and for each host operation.
//!
//! A [`TracedListener`] stands between a unit and the bridge, a [`TracedHost`] between the bridge and the host. Whoever
//! does not trace does not put them there, so tracing that is off costs nothing. `docs/tracing.md` has the line format.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, BufWriter, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vtd::{
    Applied, AttachRefused, IovaRange, MapOp, Mapping, Pasid, Perm, Refusal, RefusalCause, Requester, SpaceKey,
    SpaceListener, Stream,
};

use crate::bridge::guest_map::{GuestMap, HostMem};
use crate::bridge::ledger::{Extent, Ledger};
use crate::bridge::limits::Limits;
use crate::host::dirty::{DirtyBitmap, DirtySupport};
use crate::host::{GroupId, HostIommu, HostSpaceId, HostStream, Map, MapRefused, Placement, UnmapRange};

/// Where the lines go, through a buffer.
pub struct Trace {
    start: Instant,
    out: Mutex<BufWriter<Box<dyn Write + Send>>>,
    failed: AtomicBool,
    /// The groups that have a space of the host for life.
    owners: Mutex<BTreeMap<HostSpaceId, GroupId>>,
}

/// Above every group: the numbers of spaces that no group has for life.
const FIRST_OF_SHARED_SPACES: u32 = 1 << 30;

impl Trace {
    /// A trace into `out`; times count from now.
    pub fn new(out: Box<dyn Write + Send>) -> Arc<Self> {
        Arc::new(Self {
            start: Instant::now(),
            out: Mutex::new(BufWriter::with_capacity(1 << 16, out)),
            failed: AtomicBool::new(false),
            owners: Mutex::default(),
        })
    }

    /// The `container` of the lines: the number of the group that has the space for life; or else one of the space's
    /// own, and `host attach` says which groups are in it.
    fn container(&self, space: HostSpaceId) -> u32 {
        let owners = self.owners.lock().unwrap_or_else(PoisonError::into_inner);
        owners.get(&space).map_or(FIRST_OF_SHARED_SPACES | space.0, |group| group.0)
    }

    fn out(&self) -> MutexGuard<'_, BufWriter<Box<dyn Write + Send>>> {
        self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a line: the time, and `what`.
    fn line(&self, what: fmt::Arguments<'_>) {
        let mut out = self.out();
        // Under the lock, so that times ascend.
        let time = self.start.elapsed();
        let written = writeln!(out, "{}.{:09} {what}", time.as_secs(), time.subsec_nanos());
        drop(out);
        self.check(written);
    }

    /// Says where the guest's memory is in this process: what `gpa` of the other lines means to the host.
    pub fn memory(&self, guest: &GuestMap) {
        for region in guest.regions() {
            let (first, last) = (region.gpa(), region.gpa() + (region.size() - 1));
            let hva = guest.host_mem(first, region.size()).map_or(0, |mem| mem.hva());
            self.line(format_args!("host memory gpa={first:#x}-{last:#x} hva={hva:#x}"));
        }
    }

    /// A part of a BAR of `of`, `len` bytes, comes to `gpa`.
    pub fn bar_came(&self, gpa: u64, len: u64, hva: u64, of: Requester) {
        let last = gpa + (len - 1);
        self.line(format_args!("host memory gpa={gpa:#x}-{last:#x} hva={hva:#x} bar={of}"));
    }

    /// The part of a BAR at `gpa` went: nothing in the host leads there any more.
    pub fn bar_went(&self, gpa: u64, len: u64) {
        let last = gpa + (len - 1);
        self.line(format_args!("host gone gpa={gpa:#x}-{last:#x}"));
    }

    /// What the ledger of `space` holds.
    pub(crate) fn ledger(&self, space: HostSpaceId, ledger: &Ledger) {
        let container = self.container(space);
        let (extents, bytes) = (ledger.len(), ledger.bytes());
        self.line(format_args!("host ledger container={container} extents={extents} bytes={bytes:#x}"));
        for Extent { first, last, gpa, hva, perm } in ledger.extents() {
            self.line(format_args!(
                "host extent container={container} iova={first:#x}-{last:#x} gpa={gpa:#x} hva={hva:#x} perm={perm}"
            ));
        }
    }

    /// Brings the buffered lines out. An error is logged once.
    pub fn flush(&self) {
        let flushed = self.out().flush();
        self.check(flushed);
    }

    fn check(&self, result: io::Result<()>) {
        if let Err(e) = result
            && !self.failed.swap(true, Ordering::Relaxed)
        {
            log::error!("the trace is not complete: {e}");
        }
    }
}

/// `ok`, or an errno's or a cause's text with no blank in it.
struct Word<T>(T);

impl<T: fmt::Display> fmt::Display for Word<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.to_string().replace(char::is_whitespace, "_"))
    }
}

/// `device=0000:00:05.0`, and the PASID if there is one.
struct Device(Stream);

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Stream { requester, pasid } = self.0;
        write!(f, "device={requester}")?;
        pasid.map_or(Ok(()), |Pasid(pasid)| write!(f, " pasid={pasid:#x}"))
    }
}

/// `part=3 pasid=0x5`: the number that the host has for the device.
struct Part(HostStream);

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "part={}", self.0.device.0)?;
        self.0.pasid.map_or(Ok(()), |Pasid(pasid)| write!(f, " pasid={pasid:#x}"))
    }
}

fn cause(cause: RefusalCause) -> &'static str {
    match cause {
        RefusalCause::Limit => "limit",
        RefusalCause::Memlock => "memlock",
        RefusalCause::Range => "range",
        RefusalCause::Target => "target",
        RefusalCause::Other => "other",
    }
}

/// A listener whose notifications are traced.
pub struct TracedListener {
    inner: Arc<dyn SpaceListener>,
    trace: Arc<Trace>,
}

impl TracedListener {
    /// Traces what `inner` is told.
    pub fn new(inner: Arc<dyn SpaceListener>, trace: Arc<Trace>) -> Self {
        Self { inner, trace }
    }

    fn refused(&self, space: &SpaceKey, refused: &[Refusal]) {
        for Refusal { range, cause: why, stream } in refused {
            let (device, why) = (Device(*stream), cause(*why));
            self.trace.line(format_args!("notify refused space={space} {device} iova={range} cause={why}"));
        }
    }

    fn map(&self, op: &str, space: &SpaceKey, mapping: &Mapping) {
        let (range, Mapping { gpa, perm, .. }) = (mapping.range(), mapping);
        self.trace.line(format_args!("notify {op} space={space} iova={range} gpa={gpa} perm={perm}"));
    }
}

impl SpaceListener for TracedListener {
    fn attach(
        &self,
        stream: Stream,
        space: &SpaceKey,
        live: &mut dyn Iterator<Item = Mapping>,
    ) -> Result<(), AttachRefused> {
        let device = Device(stream);
        self.trace.line(format_args!("notify attach {device} space={space}"));
        let mut live = live.inspect(|mapping| self.map("replay", space, mapping));
        let result = self.inner.attach(stream, space, &mut live);
        match &result {
            Ok(()) => self.trace.line(format_args!("notify attached {device} space={space} result=ok")),
            Err(refused) => {
                let word = Word(refused);
                self.trace.line(format_args!("notify attached {device} space={space} result={word}"));
                if let AttachRefused::Partial(pieces) | AttachRefused::Shared(pieces) = refused {
                    self.refused(space, pieces);
                }
            }
        }
        result
    }

    fn detach(&self, stream: Stream) {
        self.trace.line(format_args!("notify detach {}", Device(stream)));
        self.inner.detach(stream);
    }

    fn apply(&self, space: &SpaceKey, ops: &[MapOp]) -> Applied {
        for op in ops {
            match op {
                MapOp::Unmap(range) => self.trace.line(format_args!("notify unmap space={space} iova={range}")),
                MapOp::Map(mapping) => self.map("map", space, mapping),
            }
        }
        let applied = self.inner.apply(space, ops);
        self.refused(space, &applied.refused);
        let (ops, refused) = (ops.len(), applied.refused.len());
        self.trace.line(format_args!("notify applied space={space} ops={ops} refused={refused}"));
        applied
    }
}

/// A host whose operations are traced.
pub struct TracedHost {
    inner: Arc<dyn HostIommu>,
    trace: Arc<Trace>,
}

impl TracedHost {
    /// Traces what `inner` is asked for.
    pub fn new(inner: Arc<dyn HostIommu>, trace: Arc<Trace>) -> Self {
        Self { inner, trace }
    }

    fn moved(&self, what: &str, ask: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let start = Instant::now();
        let result = ask();
        let ns = start.elapsed().as_nanos();
        let said: &dyn fmt::Display = match &result {
            Ok(()) => &"ok",
            Err(e) => &Word(e),
        };
        self.trace.line(format_args!("host {what} ns={ns} result={said}"));
        result
    }

    fn mapped(&self, space: HostSpaceId, map: &Map<'_>, time: Duration, result: &Result<(), MapRefused>) {
        let Map { iova, mem, perm } = map;
        let (last, gpa, container, ns) =
            (iova + (mem.size() - 1), mem.gpa(), self.trace.container(space), time.as_nanos());
        let said: &dyn fmt::Display = match result {
            Ok(()) => &"ok",
            Err(refused) => &Word(&refused.source),
        };
        self.trace.line(format_args!(
            "host map container={container} iova={iova:#x}-{last:#x} gpa={gpa:#x} perm={perm} ns={ns} result={said}"
        ));
    }

    fn unmapped(&self, space: HostSpaceId, range: IovaRange, time: Duration, result: &io::Result<u64>) {
        let (IovaRange { first, last }, container, ns) = (range, self.trace.container(space), time.as_nanos());
        let (said, bytes): (&dyn fmt::Display, u64) = match result {
            Ok(bytes) => (&"ok", *bytes),
            Err(e) => (&Word(e), 0),
        };
        self.trace.line(format_args!(
            "host unmap container={container} iova={first:#x}-{last:#x} bytes={bytes:#x} ns={ns} result={said}"
        ));
    }
}

impl HostIommu for TracedHost {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn placement(&self, group: GroupId) -> Option<Placement> {
        let placement = self.inner.placement(group);
        if let Some(Placement::PerGroup(space)) = placement {
            self.trace.owners.lock().unwrap_or_else(PoisonError::into_inner).insert(space, group);
        }
        placement
    }

    fn limits(&self, space: HostSpaceId) -> Limits {
        self.inner.limits(space)
    }

    fn create(&self) -> io::Result<HostSpaceId> {
        let start = Instant::now();
        let created = self.inner.create();
        let ns = start.elapsed().as_nanos();
        let (container, said): (u32, &dyn fmt::Display) = match &created {
            Ok(space) => (self.trace.container(*space), &"ok"),
            Err(e) => (0, &Word(e)),
        };
        self.trace.line(format_args!("host create container={container} ns={ns} result={said}"));
        created
    }

    fn destroy(&self, space: HostSpaceId) {
        let start = Instant::now();
        self.inner.destroy(space);
        let ns = start.elapsed().as_nanos();
        self.trace.line(format_args!("host destroy container={} ns={ns} result=ok", self.trace.container(space)));
    }

    fn attach(&self, group: GroupId, space: HostSpaceId) -> io::Result<()> {
        let what = format!("attach container={} group={group}", self.trace.container(space));
        self.moved(&what, || self.inner.attach(group, space))
    }

    fn detach(&self, group: GroupId) -> io::Result<()> {
        self.moved(&format!("detach group={group}"), || self.inner.detach(group))
    }

    fn attach_part(&self, stream: HostStream, space: HostSpaceId) -> io::Result<()> {
        let what = format!("attach container={} {}", self.trace.container(space), Part(stream));
        self.moved(&what, || self.inner.attach_part(stream, space))
    }

    fn detach_part(&self, stream: HostStream) -> io::Result<()> {
        self.moved(&format!("detach {}", Part(stream)), || self.inner.detach_part(stream))
    }

    fn remedy(&self, space: HostSpaceId, cause: RefusalCause) -> String {
        self.inner.remedy(space, cause)
    }

    fn map(&self, space: HostSpaceId, iova: u64, mem: HostMem<'_>, perm: Perm) -> Result<(), MapRefused> {
        let start = Instant::now();
        let result = self.inner.map(space, iova, mem, perm);
        self.mapped(space, &Map { iova, mem, perm }, start.elapsed(), &result);
        result
    }

    fn map_all(&self, space: HostSpaceId, maps: &[Map<'_>], done: &mut dyn FnMut(Result<(), MapRefused>)) {
        let mut start = Instant::now();
        let mut asked = maps.iter();
        self.inner.map_all(space, maps, &mut |result| {
            let end = Instant::now();
            if let Some(map) = asked.next() {
                self.mapped(space, map, end - std::mem::replace(&mut start, end), &result);
            }
            done(result);
        });
    }

    fn unmap(&self, space: HostSpaceId, range: UnmapRange) -> io::Result<u64> {
        let start = Instant::now();
        let result = self.inner.unmap(space, range);
        let (first, last) = match range {
            UnmapRange::Span { first, last } => (first, last),
            UnmapRange::All => (0, u64::MAX),
        };
        self.unmapped(space, IovaRange { first, last }, start.elapsed(), &result);
        result
    }

    fn dirty_start(&self, space: HostSpaceId) -> io::Result<DirtySupport> {
        let start = Instant::now();
        let result = self.inner.dirty_start(space);
        let (container, ns) = (self.trace.container(space), start.elapsed().as_nanos());
        let said: &dyn fmt::Display = match &result {
            Ok(support) => &support.knowledge.name(),
            Err(e) => &Word(e),
        };
        self.trace.line(format_args!("host dirty-start container={container} ns={ns} result={said}"));
        result
    }

    fn dirty_stop(&self, space: HostSpaceId) {
        self.inner.dirty_stop(space);
        self.trace.line(format_args!("host dirty-stop container={} result=ok", self.trace.container(space)));
    }

    fn dirty_close(&self, space: HostSpaceId, mapped: &mut dyn Iterator<Item = (IovaRange, Perm)>) -> io::Result<()> {
        let start = Instant::now();
        let result = self.inner.dirty_close(space, mapped);
        let (container, ns) = (self.trace.container(space), start.elapsed().as_nanos());
        let said: &dyn fmt::Display = match &result {
            Ok(()) => &"ok",
            Err(e) => &Word(e),
        };
        self.trace.line(format_args!("host dirty-close container={container} ns={ns} result={said}"));
        result
    }

    fn dirty_read(&self, space: HostSpaceId, bitmap: &mut DirtyBitmap) -> io::Result<()> {
        let start = Instant::now();
        let result = self.inner.dirty_read(space, bitmap);
        let (container, ns) = (self.trace.container(space), start.elapsed().as_nanos());
        let said: &dyn fmt::Display = match &result {
            Ok(()) => &"ok",
            Err(e) => &Word(e),
        };
        let (IovaRange { first, last }, pages) = (bitmap.range(), bitmap.pages());
        self.trace.line(format_args!(
            "host dirty-read container={container} iova={first:#x}-{last:#x} pages={pages} ns={ns} result={said}"
        ));
        result
    }

    fn unmap_dirty(&self, space: HostSpaceId, bitmap: &mut DirtyBitmap, close: bool) -> io::Result<u64> {
        let start = Instant::now();
        let result = self.inner.unmap_dirty(space, bitmap, close);
        self.unmapped(space, bitmap.range(), start.elapsed(), &result);
        result
    }
}
