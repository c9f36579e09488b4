//! The boot of `nvme_boot` as its guest made it: table entries, descriptors and registers, before a unit, a bridge and
//! a model. At each moment of it (before and after each register write) the unit is saved as text, and restored
//! into another one, over a copy of the guest's memory at other addresses, with a bridge and a host of its own. There
//! everything is as it is here: the registers, which function is in which space, what was granted, what the ledger has
//! and what the host holds, and an audit finds nothing. From every third moment the rest of the boot runs there, too,
//! and all that is the same after each of its steps.

use std::collections::BTreeMap;
use std::sync::Arc;

use vfio_bridge::model::{Kernel, Model};
use vfio_bridge::{Bridge, GroupId, GuestMap};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vtd::spec::registers::offset;
use vtd::{MapOp, Msi, MsiSink, Perm, Requester, SpaceKey, SpaceView, State, Tables, Unit, UnitConfig, UnitId};

use crate::boot::{Boot, Reach, Step, joined};
use crate::nvme_boot::TRACE;
use crate::world::{Stopped, requester};

type Memory = GuestMemoryMmap<()>;

/// Everything that the guest's driver writes is here: its page tables where the trace has their roots, the rest in
/// front of them.
const TABLES: u64 = 0x4b0_0000;
const TABLES_END: u64 = 0x4d0_0000;
const ROOT_TABLE: u64 = TABLES;
const CONTEXT_TABLE: u64 = TABLES + 0x1000;
const QUEUE: u64 = TABLES + 0x2000;
const STATUS: u64 = TABLES + 0x3000;
/// The tables below the roots.
const LOWER_TABLES: u64 = TABLES + 0x1_0000;

/// A write of a register, and what the guest stores in memory before it.
struct Moment {
    stores: Vec<(u64, u64)>,
    offset: u64,
    value: Value,
    /// What a wait descriptor writes at that.
    status: Option<u64>,
}

#[derive(Clone, Copy)]
enum Value {
    Dword(u32),
    Qword(u64),
}

/// The guest's driver: what it has in memory, and what it did.
#[derive(Default)]
struct Driver {
    memory: BTreeMap<u64, u64>,
    stores: Vec<(u64, u64)>,
    moments: Vec<Moment>,
    tables: u64,
    tail: u64,
    status: u64,
}

impl Driver {
    fn store(&mut self, at: u64, value: u64) {
        self.memory.insert(at, value);
        self.stores.push((at, value));
    }

    fn write(&mut self, offset: u64, value: Value) {
        let stores = std::mem::take(&mut self.stores);
        self.moments.push(Moment { stores, offset, value, status: None });
    }

    /// The entry of the last level for `iova`.
    fn leaf(&mut self, root: u64, iova: u64) -> u64 {
        let mut table = root;
        for level in (1..4u32).rev() {
            let entry = table + (iova >> (12 + 9 * level)) % 512 * 8;
            table = match self.memory.get(&entry) {
                Some(word) => word & !0xfff,
                None => {
                    let made = LOWER_TABLES + self.tables * 4096;
                    self.tables += 1;
                    self.store(entry, made | 3);
                    made
                }
            };
        }
        table + (iova >> 12) % 512 * 8
    }

    fn descriptor(&mut self, low: u64, high: u64) {
        self.store(QUEUE + self.tail * 16, low);
        self.store(QUEUE + self.tail * 16 + 8, high);
        self.tail = (self.tail + 1) % 256;
    }

    /// A wait behind what was pushed, and the tail.
    fn submit(&mut self) {
        self.status += 1;
        self.descriptor(5 | 1 << 5 | self.status << 32, STATUS);
        self.write(offset::IQT, Value::Qword(self.tail * 16));
        self.moments.last_mut().expect("just made").status = Some(self.status);
    }

    /// As Linux brings a unit up: the queue, the root table, invalidations of everything, translation.
    fn enable(&mut self, contexts: &[(u8, SpaceKey)]) {
        self.store(ROOT_TABLE, CONTEXT_TABLE | 1);
        for (device, space) in contexts {
            let SpaceKey::Paged(space) = space else { panic!("{space}") };
            let Tables::Second { root, width: 48 } = space.tables else { panic!("{space}") };
            let entry = CONTEXT_TABLE + u64::from(requester(*device).sid.devfn()) * 16;
            self.store(entry + 8, 2 | u64::from(space.domain.0) << 8);
            self.store(entry, root.0 | 1);
        }
        self.write(offset::IQA, Value::Qword(QUEUE));
        self.write(offset::GCMD, Value::Dword(1 << 26));
        self.write(offset::RTADDR, Value::Qword(ROOT_TABLE));
        self.write(offset::GCMD, Value::Dword(1 << 30 | 1 << 26));
        self.descriptor(1 | 1 << 4, 0);
        self.submit();
        self.descriptor(2 | 1 << 4, 0);
        self.submit();
        self.write(offset::GCMD, Value::Dword(1 << 31 | 1 << 26));
    }

    fn apply(&mut self, space: &SpaceKey, ops: &[MapOp]) {
        let SpaceKey::Paged(space) = space else { panic!("{space}") };
        let Tables::Second { root, .. } = space.tables;
        for op in ops {
            let (range, target) = match op {
                MapOp::Unmap(range) => (*range, None),
                MapOp::Map(mapping) => (mapping.range(), Some(mapping)),
            };
            for iova in (range.first..=range.last).step_by(4096) {
                let entry = self.leaf(root.0, iova);
                let value = target.map_or(0, |mapping| {
                    let bits = u64::from(mapping.perm.readable()) | u64::from(mapping.perm.writable()) << 1;
                    (mapping.gpa.0 + (iova - mapping.iova.0)) | bits
                });
                self.store(entry, value);
            }
            // The smallest aligned range of a power of two.
            let mask = 64 - ((range.first ^ range.last) >> 12).leading_zeros();
            let first = range.first & !((4096 << mask) - 1);
            self.descriptor(2 | 3 << 4 | u64::from(space.domain.0) << 16, first | u64::from(mask));
        }
        self.submit();
    }
}

/// What the guest of the trace did, and the functions that it found.
fn moments(boot: &Boot) -> Vec<Moment> {
    let mut driver = Driver::default();
    let mut steps = boot.steps.iter().peekable();
    while let Some(step) = steps.next() {
        match step {
            // All that are told one after the other were moved by one command.
            Step::Attach(device, space) => {
                let mut moved = vec![(*device, *space)];
                while let Some(Step::Attach(device, space)) = steps.peek() {
                    if (*space == SpaceKey::Identity) != (moved[0].1 == SpaceKey::Identity) {
                        break;
                    }
                    moved.push((*device, *space));
                    steps.next();
                }
                match moved[0].1 {
                    SpaceKey::Identity if driver.moments.is_empty() => {}
                    SpaceKey::Identity => driver.write(offset::GCMD, Value::Dword(1 << 26)),
                    _ => driver.enable(&moved),
                }
            }
            Step::Apply(space, ops) => driver.apply(space, ops),
            Step::Detach(_) => panic!("a boot takes no function away"),
        }
    }
    driver.moments
}

struct Silent;

impl MsiSink for Silent {
    fn signal(&self, _: Msi) {}
}

/// What can be seen of a machine, without the addresses of its process.
#[derive(Clone, PartialEq, Debug)]
struct Picture {
    state: State,
    attached: Vec<(Requester, SpaceKey)>,
    /// The spaces with members, and with the boundaries of what was told of them.
    granted: Vec<SpaceView>,
    /// What the host holds for each function, in the pieces that it holds it in.
    held: Vec<Reach>,
}

/// A space, who is in it, and where it leads.
type Granted = (SpaceKey, Vec<Requester>, Reach);

impl Picture {
    /// Where everything leads, in whatever pieces.
    fn without_boundaries(&self) -> (State, Vec<Granted>, Vec<Reach>) {
        let state = State { spaces: Vec::new(), ..self.state.clone() };
        let granted = self.granted.iter().map(|view| {
            let extents = view.extents.iter().map(|m| (m.iova.0, m.last().0, m.gpa.0, m.perm));
            (SpaceKey::Paged(view.key), view.members.clone(), joined(extents))
        });
        (state, granted.collect(), self.held.iter().map(|held| joined(held.iter().copied())).collect())
    }
}

struct Machine {
    memory: Memory,
    unit: Arc<Unit<Memory>>,
    bridge: Arc<Bridge>,
    model: Arc<Model>,
    functions: Vec<u8>,
}

impl Machine {
    fn new(boot: &Boot, per_space: bool) -> Self {
        let memory = Memory::from_ranges(&[(GuestAddress(0), boot.ram.low as usize)]).expect("memory");
        let groups: Vec<GroupId> = boot.functions.iter().map(|device| GroupId((*device).into())).collect();
        let kernel = Kernel::new(48);
        let model = if per_space { Model::per_space(kernel, &groups) } else { Model::new(kernel, &groups) };
        let guest = GuestMap::of_memory(Arc::new(memory.clone())).expect("whole pages");
        let bridge = Arc::new(Bridge::new(vec![model.clone()], guest, Arc::new(Stopped::default())));
        let config = UnitConfig::new(UnitId(0), 48);
        let unit = Unit::new(config, memory.clone(), bridge.clone(), Arc::new(Silent)).expect("a unit");
        for device in &boot.functions {
            bridge.register(requester(*device), GroupId((*device).into())).expect("new");
            unit.add_requester(requester(*device)).expect("attached");
        }
        Self { memory, unit, bridge, model, functions: boot.functions.clone() }
    }

    /// Another one, which has this one's memory and the saved registers of its unit, and nothing else of it.
    fn restored(&self, boot: &Boot, per_space: bool) -> Self {
        let other = Self::new(boot, per_space);
        let mut tables = vec![0; (TABLES_END - TABLES) as usize];
        self.memory.read_slice(&mut tables, GuestAddress(TABLES)).expect("RAM");
        other.memory.write_slice(&tables, GuestAddress(TABLES)).expect("RAM");
        let text = serde_json::to_string(&self.unit.save()).expect("a text");
        other.unit.restore(serde_json::from_str(&text).expect("a state")).expect("restored");
        other
    }

    fn store(&self, moment: &Moment) {
        for (at, value) in &moment.stores {
            assert!((TABLES..TABLES_END).contains(at), "{at:#x}");
            self.memory.write_obj(*value, GuestAddress(*at)).expect("RAM");
        }
    }

    fn write(&self, moment: &Moment) {
        match moment.value {
            Value::Dword(value) => self.unit.write(moment.offset, &value.to_le_bytes()),
            Value::Qword(value) => self.unit.write(moment.offset, &value.to_le_bytes()),
        }
        if let Some(expected) = moment.status {
            let status: u32 = self.memory.read_obj(GuestAddress(STATUS)).expect("RAM");
            assert_eq!(u64::from(status), expected, "the wait is complete");
        }
    }

    fn picture(&self) -> Picture {
        let base = self.memory.get_host_address(GuestAddress(0)).expect("RAM") as u64;
        let held = self.functions.iter().map(|device| {
            let held = self.model.contents(GroupId((*device).into()));
            let ledger = self.bridge.holds(requester(*device));
            assert_eq!(
                ledger.iter().map(|e| (e.first, e.last, e.hva, e.perm)).collect::<Vec<_>>(),
                held.values().map(|h| (h.iova, h.last(), h.hva, h.perm)).collect::<Vec<_>>(),
                "the ledger of {device:#x}"
            );
            held.values().map(|held| (held.iova, held.last(), held.hva - base, held.perm)).collect()
        });
        Picture {
            state: self.unit.save(),
            attached: self.unit.attachments(),
            granted: self.unit.spaces_snapshot(),
            held: held.collect(),
        }
    }

    /// Tables, shadow and ledger agree, and nothing is pending.
    fn audit(&self) {
        let audit = self.unit.audit(&mut |requester, space, granted, audit| {
            self.bridge.audit(requester, space, granted, audit);
        });
        assert_eq!((audit.differences, audit.pending), (vec![], 0));
        assert!(audit.checked > 0);
    }

    fn splits(&self) -> u64 {
        self.functions.iter().map(|device| self.bridge.stats(requester(*device)).expect("registered").splits).sum()
    }
}

/// What the trace says that its functions reach, by each step that it has.
fn reaches_of_the_trace(boot: &Boot) -> Vec<Reach> {
    let mut mapped: BTreeMap<u64, (u64, Perm)> = BTreeMap::new();
    let mut all = Vec::new();
    for step in &boot.steps {
        let Step::Apply(SpaceKey::Paged(space), ops) = step else { continue };
        assert_eq!(space.domain.0, 3, "the NVMe's");
        for op in ops {
            match op {
                MapOp::Unmap(range) => mapped.retain(|iova, _| !range.contains(*iova)),
                MapOp::Map(m) => {
                    let pages = (0..m.len).step_by(4096);
                    mapped.extend(pages.map(|at| (m.iova.0 + at, (m.gpa.0 + at, m.perm))));
                }
            }
        }
        all.push(joined(mapped.iter().map(|(iova, (gpa, perm))| (*iova, iova + 0xfff, *gpa, *perm))));
    }
    all
}

#[test]
fn a14_a_boot_that_is_saved_at_any_moment_goes_on_in_another_machine() {
    let boot = Boot::parse(TRACE);
    let moments = moments(&boot);
    for per_space in [false, true] {
        // The boot, undisturbed.
        let machine = Machine::new(&boot, per_space);
        let undisturbed: Vec<Picture> = moments
            .iter()
            .map(|moment| {
                machine.store(moment);
                machine.write(moment);
                machine.audit();
                machine.picture()
            })
            .collect();
        // It is the one of the trace.
        let mut said: Vec<Reach> = Vec::new();
        let steps = moments.iter().zip(&undisturbed).filter(|(moment, _)| moment.offset == offset::IQT).skip(2);
        said.extend(steps.map(|(_, picture)| joined(picture.held[0].iter().copied())));
        assert_eq!(said, reaches_of_the_trace(&boot));
        assert_eq!(machine.splits(), 0);

        let machine = Machine::new(&boot, per_space);
        for (number, moment) in moments.iter().enumerate() {
            let rest = || moments[number + 1..].iter().zip(&undisturbed[number + 1..]);
            machine.store(moment);
            // What was stored is not invalidated yet: there it takes effect at once, and here with the write, in the
            // pieces that the descriptors say.
            let early = machine.restored(&boot, per_space);
            machine.write(moment);
            early.write(moment);
            let late = machine.restored(&boot, per_space);
            for (other, is_late) in [(&early, false), (&late, true)] {
                let here = || format!("per space: {per_space}, write {number}, restored after it: {is_late}");
                let same = |expected: &Picture| {
                    let picture = other.picture();
                    assert_eq!(picture.without_boundaries(), expected.without_boundaries(), "{}", here());
                    assert!(!is_late || picture == *expected, "{}: {picture:?} and not {expected:?}", here());
                };
                same(&undisturbed[number]);
                other.audit();
                for (moment, expected) in rest().filter(|_| number % 3 == 0) {
                    other.store(moment);
                    other.write(moment);
                    same(expected);
                }
                other.audit();
                // What was told as two mappings is still two: none is cut.
                assert!(!is_late || other.splits() == 0, "{}", here());
            }
            assert_eq!(machine.picture(), undisturbed[number], "to be saved changes nothing");
        }
    }
}
