//! A guest that does anything at all, as a script of bytes: it stores in its memory, writes and reads registers of
//! any size at any offset, gives descriptors, and has devices make requests, with PASIDs or not, for translations, for
//! pages and for interrupts, while functions come, go and change their ids. Whatever the bytes are, after each step
//!
//! - nothing panicked, and no more of the guest's memory was looked at than the bounds allow;
//! - spaces and extents are within their bounds, and the listener was told, in order, exactly what the shadows say;
//! - an audit finds no difference;
//! - what is saved can be restored into a fresh unit, which is then saved as the same.
//!
//! Used by the tests beside it and by the fuzz target of `fuzz/`.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vtd::inspect::{PageBounds, Position};
use vtd::spec::registers::offset;
use vtd::{
    Access, AtsFunction, Bounds, Completion, Endpoint, Gpa, GpaRange, Iova, IovaRange, Mapping, Msi, MsiSink,
    PageRequest, PageResponse, Pasid, Remapped, Requester, SourceId, SpaceKey, Stages, State, Stream, TlbScope, Unit,
    UnitConfig, UnitId,
};

// The path is said since the fuzz targets have this file by another one.
#[path = "spoilt.rs"]
mod spoilt;
#[path = "told.rs"]
mod told;

use told::Listener;

/// Guest memory, from address 0.
const MEMORY: u64 = 64 * PAGE;
const PAGE: u64 = 4096;

// Pages with tables that are right to begin with. All others are data.
const ROOT: u64 = 0;
/// Of legacy mode, and of functions 0 to 127 in scalable mode.
const CONTEXT: u64 = PAGE;
const UPPER_CONTEXT: u64 = 2 * PAGE;
const DIRECTORY: u64 = 3 * PAGE;
const PASIDS: u64 = 4 * PAGE;
/// Levels 5 to 1 of the second stage.
const SECOND: u64 = 5 * PAGE;
/// The same of the first stage.
const FIRST: u64 = 10 * PAGE;
const INTERRUPTS: u64 = 15 * PAGE;
const QUEUE: u64 = 16 * PAGE;
const PAGE_REQUESTS: u64 = 17 * PAGE;
const STATUS: u64 = 18 * PAGE;
/// The pages that a script stores in.
const STORED: u64 = 20;

const BOUNDS: Bounds = Bounds { shadow_entries: 64, spaces: 3, table_entries: 1 << 11 };
/// Look-ups of guest memory in one step: a queue of all memory is 16,384 descriptors of a few words, and each space may
/// be compared in parts and then whole, with the entries beside a range.
const LOOK_UPS: u64 = 1 << 19;

/// Registers that a script writes most.
const REGISTERS: [u64; 24] = [
    offset::GCMD,
    offset::RTADDR,
    offset::CCMD,
    offset::FSTS,
    offset::FECTL,
    offset::FEDATA,
    offset::FEADDR,
    offset::IQH,
    offset::IQT,
    offset::IQA,
    0x9c,
    offset::IECTL,
    offset::IRTA,
    offset::PQH,
    offset::PQT,
    offset::PQA,
    0xdc,
    offset::PECTL,
    offset::IVA,
    offset::IOTLB,
    offset::FRCD,
    offset::FRCD + 8,
    0x400,
    0x420,
];

/// Guest memory that counts how often an address is looked up.
#[derive(Clone)]
struct Memory {
    inner: GuestMemoryMmap<()>,
    looked: Arc<AtomicU64>,
}

impl GuestMemoryBackend for Memory {
    type R = <GuestMemoryMmap<()> as GuestMemoryBackend>::R;

    fn find_region(&self, addr: GuestAddress) -> Option<&Self::R> {
        self.looked.fetch_add(1, Ordering::Relaxed);
        self.inner.find_region(addr)
    }

    fn iter(&self) -> impl Iterator<Item = &Self::R> {
        self.inner.iter()
    }
}

/// A script. Behind its end there are zeros.
struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    fn below(&mut self, end: u64) -> u64 {
        u64::from(self.byte()) % end
    }

    fn word(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// A value: nothing, anything, a page with some low bits, a bit of `old` that is another, or what few bits say.
    fn value(&mut self, old: u64) -> u64 {
        match self.byte() % 6 {
            0 => 0,
            1 => self.word(),
            2 => (self.below(STORED + 2) * PAGE) | self.below(16),
            3 => old ^ 1 << self.below(64),
            4 => u64::from(self.byte()) << self.below(57),
            _ => self.below(64) << 21 | 0x80 | self.below(4),
        }
    }

    fn iova(&mut self) -> u64 {
        match self.byte() % 4 {
            0 => self.word(),
            1 => 0xfee0_0000 + (self.below(4) << 2),
            2 => self.below(4) << self.below(57),
            _ => self.below(64) * 0x800,
        }
    }
}

struct Silent;

impl MsiSink for Silent {
    fn signal(&self, _: Msi) {}
}

/// A device-TLB, which answers or does not.
struct Tlb(bool);

impl AtsFunction for Tlb {
    fn invalidate(&self, _: TlbScope, _: IovaRange) -> Completion {
        if self.0 { Completion::Sent } else { Completion::Never }
    }
    fn respond(&self, _: PageResponse) {}
}

fn answer(unit: &Unit<Memory>, tlbs: &[Arc<Tlb>; 2]) {
    for (number, tlb) in (2..).zip(tlbs) {
        let tlb: Weak<Tlb> = Arc::downgrade(tlb);
        unit.set_ats_function(function(number), tlb);
    }
}

fn function(number: u64) -> Requester {
    Requester { segment: 0, sid: SourceId::new(0, 1 + number as u8 % 4, 0) }
}

/// What the first bytes of a script make of the unit.
fn config(script: &mut Script<'_>) -> UnitConfig {
    let (stages, bits) = (script.byte(), script.byte());
    let scalable = [None, Some(Stages::Second), Some(Stages::First), Some(Stages::Both)][usize::from(stages % 4)];
    let is_scalable = scalable.is_some();
    let second = matches!(scalable, Some(Stages::Second | Stages::Both));
    let wanted = |bit: u8| bits >> bit & 1 == 0;
    UnitConfig {
        caching_mode: wanted(0),
        pass_through: wanted(1),
        interrupt_remapping: wanted(2),
        extended_interrupt_mode: wanted(2),
        posted_interrupts: wanted(2),
        scalable,
        nested: scalable == Some(Stages::Both),
        second_stage_dirty: second && wanted(3),
        pasid_bits: if is_scalable { 20 } else { 0 },
        device_tlb: wanted(4),
        page_requests: is_scalable && wanted(4),
        performance_counters: wanted(5),
        bounds: BOUNDS,
        ..UnitConfig::new(UnitId(0), [39, 48, 57][usize::from(stages / 4 % 3)])
    }
}

/// What makes requests: functions without a PASID and with one.
fn endpoints(unit: &Arc<Unit<Memory>>) -> Vec<Endpoint<Memory>> {
    let streams = [(2, None), (2, Some(1)), (3, None), (3, Some(2)), (0, None)];
    let endpoint =
        |(of, pasid): (u64, Option<u32>)| unit.endpoint_of(Stream { requester: function(of), pasid: pasid.map(Pasid) });
    streams.map(endpoint).into_iter().collect()
}

struct World {
    memory: Memory,
    config: UnitConfig,
    listener: Arc<Listener>,
    unit: Arc<Unit<Memory>>,
    endpoints: Vec<Endpoint<Memory>>,
    tlbs: [Arc<Tlb>; 2],
    /// Who was given another id, or the id of another.
    ids: BTreeMap<Requester, Option<SourceId>>,
    tail: u64,
    wide: bool,
}

/// What came of a script.
#[derive(Default, Debug)]
pub struct Outcome {
    /// The most look-ups of guest memory in one step.
    pub look_ups: u64,
    /// The most extents of one space.
    pub extents: usize,
    /// Requests that were led somewhere.
    pub led: u64,
    /// Faults that were recorded or would have been.
    pub faults: u64,
    /// States that were restored.
    pub restored: u64,
}

impl World {
    fn new(script: &mut Script<'_>) -> Self {
        let config = config(script);
        let inner = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
        let memory = Memory { inner, looked: Arc::default() };
        let listener = Arc::new(Listener::default());
        let unit = Unit::new(config, memory.clone(), listener.clone(), Arc::new(Silent)).unwrap();
        let endpoints = endpoints(&unit);
        let tlbs = [Arc::new(Tlb(true)), Arc::new(Tlb(false))];
        answer(&unit, &tlbs);
        unit.add_requester(function(0)).unwrap();
        let ids = BTreeMap::new();
        let mut world = Self { memory, config, listener, unit, endpoints, tlbs, ids, tail: 0, wide: false };
        if script.byte().is_multiple_of(2) {
            world.furnish(script);
        }
        world
    }

    fn store(&self, at: u64, value: u64) {
        // Where a script has no memory, nothing is stored.
        let _ = self.memory.inner.write_obj(value, GuestAddress(at));
    }

    fn load(&self, at: u64) -> u64 {
        self.memory.inner.read_obj(GuestAddress(at)).unwrap_or(0)
    }

    fn write(&self, at: u64, value: u64, len: usize) {
        self.unit.write(at, &value.to_le_bytes()[..len]);
    }

    /// Tables in which everything is right, in a mode of the unit, and everything on.
    fn furnish(&mut self, script: &mut Script<'_>) {
        let levels = u64::from((self.config.aw_bits - 12) / 9);
        let (is_scalable, kinds) = (self.config.scalable.is_some() && !script.byte().is_multiple_of(4), script.byte());
        for (stage, flags) in [(SECOND, 3), (FIRST, 7)] {
            (0..4).for_each(|level| self.store(stage + level * PAGE, (stage + (level + 1) * PAGE) | flags));
            self.store(stage + 3 * PAGE + 8, 0x80 | flags);
            (0..16).for_each(|page| self.store(stage + 4 * PAGE + page * 8, ((48 + page) * PAGE) | flags));
        }
        let root = |stage: u64, levels: u64| stage + (5 - levels) * PAGE;
        self.store(ROOT, CONTEXT | 1);
        if is_scalable {
            self.store(ROOT + 8, UPPER_CONTEXT | 1);
            self.store(DIRECTORY, PASIDS | 1);
            for number in 0..4 {
                let entry = CONTEXT + u64::from(function(number).sid.devfn()) * 32;
                self.store(entry, DIRECTORY | 1 | 7 << 9 | 1 << 3 | u64::from(self.config.device_tlb) << 2);
                let kind = u64::from(kinds >> (2 * number) & 3) + 1;
                let first_levels = if self.config.aw_bits == 57 { 5 } else { 4 };
                let pasid = PASIDS + number * 64;
                self.store(pasid, root(SECOND, levels) | (levels - 2) << 2 | kind << 6 | 1);
                self.store(pasid + 8, number / 2 + 1);
                self.store(pasid + 16, root(FIRST, first_levels) | (first_levels - 4) << 2);
                self.store(entry + 8, number);
            }
        } else {
            for number in 0..4 {
                let entry = CONTEXT + u64::from(function(number).sid.devfn()) * 16;
                let kind = u64::from(kinds >> (2 * number) & 3) % 3;
                self.store(entry, root(SECOND, levels) | kind << 2 | 1);
                self.store(entry + 8, (levels - 2) | (number / 2 + 1) << 8);
            }
        }
        for index in 0..8 {
            self.store(INTERRUPTS + index * 16, 1 | (0x30 + index) << 16);
        }
        self.wide = is_scalable;
        self.tail = 0;
        self.write(offset::IQA, QUEUE | u64::from(self.wide) << 11, 8);
        self.write(offset::RTADDR, ROOT | u64::from(is_scalable) << 10, 8);
        self.write(offset::IRTA, INTERRUPTS | 7, 8);
        self.write(offset::PQA, PAGE_REQUESTS, 8);
        let queue = 1 << 26;
        for command in [queue, queue | 1 << 30, queue | 1 << 24, queue | 1 << 25, queue | 1 << 25 | 1 << 31] {
            self.write(offset::GCMD, command, 4);
        }
    }

    fn push(&mut self, low: u64, high: u64) {
        let size = if self.wide { 32 } else { 16 };
        let at = QUEUE + self.tail * size;
        self.store(at, low);
        self.store(at + 8, high);
        self.tail = (self.tail + 1) % (PAGE / size);
    }

    fn descriptors(&mut self, script: &mut Script<'_>) {
        for _ in 0..=script.below(3) {
            let (kind, more) = (script.below(10), script.byte());
            let (granularity, domain) = (u64::from(more & 3), u64::from(more >> 2 & 3));
            let common = kind & 7 | (kind >> 3) << 9 | granularity << 4 | domain << 16;
            let (low, high) = match more >> 4 {
                // A function, or a PASID, where the kind has one.
                0..8 => (common | u64::from(function(domain).sid.0) << 32, script.iova() & !0xfff | script.below(4)),
                8..12 => (common | script.below(4) << 32, script.iova()),
                12..14 => (common, 0),
                _ => (script.word() & !0xe0f | common, script.word()),
            };
            self.push(low, high);
        }
        if script.byte().is_multiple_of(2) {
            self.push(5 | 1 << 5 | 7 << 32, STATUS);
        }
        self.write(offset::IQT, self.tail * if self.wide { 32 } else { 16 }, 8);
    }

    fn request(&mut self, script: &mut Script<'_>, outcome: &mut Outcome) {
        let endpoint = &self.endpoints[script.below(self.endpoints.len() as u64) as usize];
        let (what, iova) = (script.byte(), Iova(script.iova()));
        let mut data = [0; 24];
        let len = 1 + script.below(24) as usize;
        let led = match what % 8 {
            0 | 1 => endpoint.read(iova, &mut data[..len]).is_ok(),
            2 | 3 => endpoint.write(iova, &data[..len]).is_ok(),
            4 => endpoint.enter().translate(iova, Access::Write).is_ok(),
            5 => endpoint.enter().request_translation(iova, what & 8 != 0).is_ok(),
            6 => endpoint.enter().write_translated(Gpa(iova.0), &data[..len]).is_ok(),
            _ => {
                let (group, read, write) = (script.byte().into(), what & 8 != 0, what & 16 != 0);
                let request = PageRequest { iova, read, write, last: what & 32 != 0, group };
                endpoint.request_page(request);
                false
            }
        };
        outcome.led += u64::from(led);
        outcome.faults += u64::from(!led);
    }

    fn interrupt(&self, script: &mut Script<'_>) {
        let (from, what) = (function(script.below(4)), script.byte());
        let address = match what % 3 {
            0 => 0xfee0_0010 | script.below(16) << 5 | script.below(2) << 3,
            1 => 0xfee0_0000 | script.word() & 0xf_ffff,
            _ => script.word(),
        };
        let msi = Msi { address, data: script.byte().into() };
        match self.unit.remap(from, msi) {
            // By the entry as it was looked up, whatever it is by now.
            Ok(Remapped::Posted(posting)) if what & 0x40 != 0 => drop(self.unit.post(&posting)),
            _ if what & 0x80 != 0 => drop(self.unit.deliver(from, msi)),
            _ => {}
        }
    }

    fn functions(&mut self, script: &mut Script<'_>) {
        let name = function(script.below(4));
        match script.byte() % 5 {
            0 => drop(self.unit.add_requester(name)),
            1 => self.unit.remove_requester(name),
            2 => self.renumber(name, None),
            _ => self.renumber(name, Some(function(script.below(4)).sid)),
        }
    }

    fn renumber(&mut self, name: Requester, id: Option<SourceId>) {
        self.ids.insert(name, id);
        self.unit.renumber(&[(name, id)]);
    }

    fn looks(&self, script: &mut Script<'_>) {
        let (what, first) = (script.byte() % 4, script.iova() & !0xfff);
        let last = first | 0xfff | ((PAGE << script.below(12)) - 1);
        match what {
            0 => self.unit.memory_changed(GpaRange::new(first, last)),
            1 => self.unit.look_at(function(script.below(4)), &[IovaRange::new(first, last)]),
            2 => {
                let bounds = PageBounds { items: 8, entries: 64 };
                drop(self.unit.tables_page(None, Position::default(), bounds));
            }
            _ => {}
        }
    }

    /// A unit at power-on, with the same functions.
    fn fresh(&self) -> (Arc<Unit<Memory>>, Arc<Listener>) {
        let listener = Arc::new(Listener::default());
        let unit = Unit::new(self.config, self.memory.clone(), listener.clone(), Arc::new(Silent)).unwrap();
        for (requester, _) in self.unit.attachments() {
            unit.add_requester(requester).unwrap();
        }
        self.ids.iter().for_each(|(name, id)| unit.renumber(&[(*name, *id)]));
        (unit, listener)
    }

    /// A fresh unit that is given what this one saved is as this one.
    fn restore(&self) {
        let saved = self.unit.save();
        let text = serde_json::to_string(&saved).unwrap();
        let (unit, listener) = self.fresh();
        unit.restore(serde_json::from_str(&text).unwrap()).unwrap();
        let restored = State { spaces: Vec::new(), ..unit.save() };
        assert_eq!(restored, State { spaces: Vec::new(), ..saved });
        check(&unit, &listener);
    }

    fn step(&mut self, script: &mut Script<'_>, outcome: &mut Outcome) {
        match script.byte() % 16 {
            0..3 => {
                let wide = script.byte();
                let at =
                    script.below(STORED) * PAGE + if wide < 192 { script.below(16) } else { script.below(255) * 2 } * 8;
                let value = script.value(self.load(at));
                self.store(at, value);
            }
            3 | 4 => {
                let (what, len) = (script.byte(), [4, 8, 4, 8, 1, 2, 3, 7][script.below(8) as usize]);
                let at =
                    if what < 192 { REGISTERS[usize::from(what) % REGISTERS.len()] } else { script.word() & 0x3fff };
                let mut old = [0; 8];
                self.unit.read(at, &mut old);
                self.write(at, script.value(u64::from_le_bytes(old)), len);
            }
            5 => {
                let mut on = [0; 4];
                self.unit.read(offset::GSTS, &mut on);
                let bit = [31, 30, 26, 25, 24, 23][script.below(6) as usize];
                self.write(offset::GCMD, u64::from(u32::from_le_bytes(on) & !(0x41 << 24) ^ 1 << bit), 4);
            }
            6..9 => self.descriptors(script),
            9 => {
                let mut data = [0; 16];
                let len = script.below(17) as usize;
                self.unit.read(script.iova(), &mut data[..len]);
            }
            10..12 => self.request(script, outcome),
            12 => self.interrupt(script),
            13 => self.functions(script),
            14 => self.looks(script),
            _ => match script.byte() % 8 {
                0 => self.unit.reset(),
                1 => self.furnish(script),
                2 => self.write(offset::FSTS, 0x7f, 4),
                3 => {
                    // As a driver that gives the queue up and begins again.
                    (self.tail, self.wide) = (0, self.load(0).is_multiple_of(2) && self.config.scalable.is_some());
                    self.write(offset::GCMD, 0, 4);
                    self.write(offset::IQA, QUEUE | u64::from(self.wide) << 11, 8);
                    self.write(offset::IQT, 0, 8);
                    self.write(offset::GCMD, 1 << 26, 4);
                }
                _ => {
                    self.restore();
                    outcome.restored += 1;
                }
            },
        }
    }
}

/// What holds after each step.
fn check(unit: &Unit<Memory>, listener: &Listener) -> usize {
    let views = unit.spaces_snapshot();
    assert!(views.len() <= BOUNDS.spaces, "{} spaces", views.len());
    let mut most = 0;
    {
        let told = listener.0.lock().unwrap();
        let attached: BTreeMap<Requester, SpaceKey> = unit.attachments().into_iter().collect();
        assert_eq!(attached, told.attached);
        for view in &views {
            most = most.max(view.extents.len());
            assert!(view.extents.len() <= BOUNDS.shadow_entries && (!view.blocked || view.extents.is_empty()));
            let told = told.spaces.get(&SpaceKey::Paged(view.key)).into_iter().flat_map(BTreeMap::values);
            assert!(joined(told.copied()) == joined(view.extents.iter().copied()), "the shadow is what was told");
        }
    }
    let audit = unit.audit(&mut |_, _, _, _| {});
    assert_eq!(audit.differences, []);
    most
}

fn joined(mappings: impl Iterator<Item = Mapping>) -> Vec<Mapping> {
    let mut all: Vec<Mapping> = Vec::new();
    for next in mappings {
        match all.last_mut() {
            Some(m) if m.last().0 + 1 == next.iova.0 && m.gpa.0 + m.len == next.gpa.0 && m.perm == next.perm => {
                m.len += next.len;
            }
            _ => all.push(next),
        }
    }
    all
}

impl World {
    /// A step, and what holds after it.
    fn checked_step(&mut self, script: &mut Script<'_>, outcome: &mut Outcome) {
        self.memory.looked.store(0, Ordering::Relaxed);
        self.step(script, outcome);
        let look_ups = self.memory.looked.load(Ordering::Relaxed);
        assert!(look_ups <= LOOK_UPS, "{look_ups} look-ups in one step");
        outcome.look_ups = outcome.look_ups.max(look_ups);
        outcome.extents = outcome.extents.max(check(&self.unit, &self.listener));
    }
}

/// Runs a script to its end.
pub fn run(bytes: &[u8]) -> Outcome {
    let mut script = Script(bytes);
    let mut outcome = Outcome::default();
    let mut world = World::new(&mut script);
    while !script.0.is_empty() {
        world.checked_step(&mut script, &mut outcome);
    }
    world.restore();
    outcome
}

/// A few steps, then a fresh unit is given what was saved, spoilt as the script says. It refuses that and is as it was,
/// or it has taken it, and all holds for the rest of the script that holds of any unit.
pub fn run_state(bytes: &[u8]) -> Outcome {
    let mut script = Script(bytes);
    let mut outcome = Outcome::default();
    let mut world = World::new(&mut script);
    for _ in 0..script.below(6) {
        world.checked_step(&mut script, &mut outcome);
    }
    let text = spoilt::spoilt(&world.unit.save(), &mut script);
    let (unit, listener) = world.fresh();
    let before = unit.save();
    match serde_json::from_str::<State>(&text).map(|state| unit.restore(state)) {
        Ok(Ok(())) => outcome.restored += 1,
        Ok(Err(_)) | Err(_) => assert_eq!(unit.save(), before, "what is refused changes nothing"),
    }
    check(&unit, &listener);
    answer(&unit, &world.tlbs);
    world.endpoints = endpoints(&unit);
    (world.unit, world.listener) = (unit, listener);
    while !script.0.is_empty() {
        world.checked_step(&mut script, &mut outcome);
    }
    world.restore();
    outcome
}
