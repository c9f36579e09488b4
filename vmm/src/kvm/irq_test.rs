use super::*;

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

use allocation_counter::measure;
use vtd::RemapFault;
use vtd::spec::fault::InterruptFaultReason;

use crate::kvm::vm;

#[path = "irq_posted_test.rs"]
mod posted;

/// What a function sends, in the remappable format: entry 3.
const SENT: Msi = Msi { address: 0xfee0_0070, data: 0 };
/// Entry 4.
const OTHER: Msi = Msi { address: 0xfee0_0090, data: 0 };
/// What an entry makes of it: processor 0x101, by all 32 bits of the destination.
const REMAPPED: Msi = Msi { address: 0x100_fee0_1000, data: 0x41 };
const MOVED: Msi = Msi { address: 0xfee0_2000, data: 0x42 };

fn requester() -> Requester {
    Requester { segment: 0, sid: SourceId::new(0, 5, 0) }
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Call {
    Routes(BTreeMap<u32, (u64, u32)>),
    Connect(u32),
    Disconnect(u32),
    Send(Msi),
}

/// KVM that remembers what it was asked, and delivers what the eventfd of a connected vector counted already.
#[derive(Default)]
struct FakeKvm {
    calls: Mutex<Vec<Call>>,
    refuses_routes: AtomicBool,
    refuses_eventfds: AtomicBool,
    refuses_messages: AtomicBool,
}

impl FakeKvm {
    fn take(&self) -> Vec<Call> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }
    fn note(&self, call: Call, refused: &AtomicBool) -> io::Result<()> {
        if refused.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        self.calls.lock().unwrap().push(call);
        Ok(())
    }
}

impl Kvm for FakeKvm {
    fn set_routes(&self, entries: &[kvm_irq_routing_entry]) -> io::Result<()> {
        let route = |entry: &kvm_irq_routing_entry| {
            assert_eq!(entry.type_, KVM_IRQ_ROUTING_MSI);
            // SAFETY: the entry's type says that this is the member in use.
            let msi = unsafe { entry.u.msi };
            (entry.gsi, (u64::from(msi.address_hi) << 32 | u64::from(msi.address_lo), msi.data))
        };
        self.note(Call::Routes(entries.iter().map(route).collect()), &self.refuses_routes)
    }
    fn connect(&self, _: &EventFd, gsi: u32) -> io::Result<()> {
        self.note(Call::Connect(gsi), &self.refuses_eventfds)
    }
    fn disconnect(&self, _: &EventFd, gsi: u32) -> io::Result<()> {
        self.note(Call::Disconnect(gsi), &AtomicBool::default())
    }
    fn send(&self, msi: Msi) -> io::Result<()> {
        self.note(Call::Send(msi), &self.refuses_messages)
    }
}

/// A unit whose entries are a map; what is not there faults. What is posted and urgent is notified of with
/// [`posted::NOTICE`].
#[derive(Default)]
struct FakeUnit {
    entries: Mutex<BTreeMap<u32, Remapped>>,
    faults: Mutex<Vec<(Requester, Msi)>>,
    posts: Mutex<Vec<(Requester, Posting)>>,
}

impl FakeUnit {
    fn set(&self, sent: Msi, remapped: Option<Msi>) {
        self.set_entry(sent, remapped.map(Remapped::Message));
    }
    fn set_entry(&self, sent: Msi, entry: Option<Remapped>) {
        let index = vtd::interrupt_index(sent).unwrap();
        let mut entries = self.entries.lock().unwrap();
        match entry {
            Some(entry) => entries.insert(index, entry),
            None => entries.remove(&index),
        };
    }
    fn faults(&self) -> Vec<(Requester, Msi)> {
        std::mem::take(&mut self.faults.lock().unwrap())
    }
}

impl Remapper for FakeUnit {
    fn remap(&self, requester: Requester, msi: Msi) -> Result<Remapped, RemapError> {
        let index = vtd::interrupt_index(msi).ok_or(RemapError::NotAnInterrupt(msi.address))?;
        self.entries.lock().unwrap().get(&index).copied().ok_or_else(|| {
            let reason = InterruptFaultReason::EntryNotPresent;
            RemapError::Fault(RemapFault { requester, index: index as u16, reason, silenced: false })
        })
    }
    fn deliver(&self, requester: Requester, msi: Msi) -> Result<Option<Msi>, RemapError> {
        match self.remap(requester, msi).inspect_err(|_| self.faults.lock().unwrap().push((requester, msi)))? {
            Remapped::Message(msi) => Ok(Some(msi)),
            Remapped::Posted(posting) => Ok(self.post(requester, &posting)?),
        }
    }
    fn post(&self, requester: Requester, posting: &Posting) -> Result<Option<Msi>, RemapFault> {
        self.posts.lock().unwrap().push((requester, *posting));
        Ok(posting.urgent.then_some(posted::NOTICE))
    }
}

struct Bench {
    kvm: Arc<FakeKvm>,
    unit: Arc<FakeUnit>,
    interrupts: Arc<KvmInterrupts>,
}

fn bench() -> Bench {
    let (kvm, unit) = (Arc::<FakeKvm>::default(), Arc::<FakeUnit>::default());
    let interrupts = KvmInterrupts::over(kvm.clone()).unwrap();
    let remapper: Weak<dyn Remapper> = Arc::<FakeUnit>::downgrade(&unit);
    interrupts.remap_by(remapper);
    Bench { kvm, unit, interrupts }
}

fn routes<const N: usize>(routes: [(u32, Msi); N]) -> Call {
    Call::Routes(routes.into_iter().map(|(gsi, msi)| (gsi, (msi.address, msi.data))).collect())
}

impl Bench {
    fn invalidate(&self, first: u16, count: u32) {
        self.interrupts.entries_changed(EntriesChanged::Range { first, count });
    }
}

#[test]
fn gsis_begin_above_the_pins_and_are_taken_back() {
    let Bench { interrupts, .. } = bench();
    let gsis = |interrupts: &KvmInterrupts| interrupts.table().vectors.keys().copied().collect::<Vec<_>>();
    let (a, b) = (interrupts.route(requester()).unwrap(), interrupts.route(requester()).unwrap());
    assert_eq!(gsis(&interrupts), [24, 25]);
    drop(a);
    let c = interrupts.route(requester()).unwrap();
    assert_eq!(gsis(&interrupts), [24, 25]);
    drop((b, c));
    assert!(gsis(&interrupts).is_empty());
}

#[test]
fn f5_a_function_takes_no_more_than_its_share_and_gives_it_back() {
    let Bench { interrupts, .. } = bench();
    let other = Requester { segment: 0, sid: SourceId::new(0, 6, 0) };
    interrupts.share_out([(requester(), 2), (other, 1)]);
    let mut mine = vec![interrupts.route(requester()).unwrap(), interrupts.route(requester()).unwrap()];
    let refused = |requester| interrupts.route(requester).err().unwrap().to_string();
    assert!(refused(requester()).contains("its share of 2") && refused(requester()).contains("fewer queues"));
    let other_one = interrupts.route(other).unwrap();
    assert!(refused(other).contains("its share of 1"));
    mine.pop();
    mine.push(interrupts.route(requester()).unwrap());
    refused(requester());
    assert_eq!(other_one.number(), 26);
}

#[test]
fn f5_kvms_routes_come_to_an_end_and_are_used_again() {
    let Bench { interrupts, .. } = bench();
    // Handed out without an eventfd each: this process cannot have so many.
    let mut table = interrupts.table();
    let trigger = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    for _ in 0..MAX_VECTORS {
        let gsi = table.take_gsi(requester()).unwrap();
        let vector = Vector { requester: requester(), trigger: trigger.clone(), sends: None, path: Path::Masked };
        assert!(table.vectors.insert(gsi, vector).is_none(), "{gsi} was in use");
    }
    assert_eq!((table.vectors.first_key_value().unwrap().0, table.vectors.last_key_value().unwrap().0), (&24, &4095));
    assert!(table.take_gsi(requester()).unwrap_err().to_string().contains("no interrupt route left"));
    table.give_gsi_back(1000);
    table.give_gsi_back(1000);
    assert_eq!(table.take_gsi(requester()).unwrap(), 1000);
    assert_eq!(table.taken[&requester()], MAX_VECTORS);
}

#[test]
fn f5_what_is_unmasked_at_once_is_one_change_of_the_routes() {
    let Bench { kvm, unit, interrupts } = &bench();
    unit.set(SENT, Some(REMAPPED));
    unit.set(OTHER, Some(MOVED));
    let vectors: Vec<_> = (0..4).map(|_| interrupts.route(requester()).unwrap()).collect();
    let sends = [Some(SENT), None, Some(OTHER), Some(SENT)];
    let changes: Vec<_> = vectors.iter().cloned().zip(sends).collect();
    interrupts.set_routes(&changes);
    let connected = [24, 26, 27].map(Call::Connect);
    let all = routes([(24, REMAPPED), (26, MOVED), (27, REMAPPED)]);
    assert_eq!(kvm.take(), [vec![all], connected.to_vec()].concat());
    let masked: Vec<_> = vectors.iter().cloned().map(|vector| (vector, None)).collect();
    interrupts.set_routes(&masked);
    assert_eq!(kvm.take(), [24, 26, 27].map(Call::Disconnect));
    interrupts.set_routes(&changes);
    assert_eq!(kvm.take(), connected, "the routes are there still");
}

#[test]
fn a9_a_vector_is_routed_as_its_entry_says_and_rerouted_at_the_invalidation() {
    let bench = bench();
    let Bench { kvm, unit, interrupts } = &bench;
    unit.set(SENT, Some(REMAPPED));
    let route = interrupts.route(requester()).unwrap();
    interrupts.set_routes(&[(route.clone(), Some(SENT))]);
    assert_eq!(kvm.take(), [routes([(24, REMAPPED)]), Call::Connect(24)]);

    unit.set(SENT, Some(MOVED));
    bench.invalidate(4, 100);
    assert_eq!(kvm.take(), [], "another entry");
    bench.invalidate(3, 1);
    assert_eq!(kvm.take(), [routes([(24, MOVED)])], "the eventfd stays with KVM");
    interrupts.entries_changed(EntriesChanged::All);
    assert_eq!(kvm.take(), [], "nothing changed");

    interrupts.set_routes(&[(route.clone(), None)]);
    unit.set(SENT, Some(REMAPPED));
    bench.invalidate(3, 1);
    assert_eq!(kvm.take(), [Call::Disconnect(24)], "a masked vector is not looked up");
    interrupts.set_routes(&[(route.clone(), Some(SENT))]);
    assert_eq!(kvm.take(), [routes([(24, REMAPPED)]), Call::Connect(24)]);
    drop(route);
    assert_eq!(kvm.take(), [Call::Disconnect(24)], "nobody signals by the route, so KVM may keep it for now");
    interrupts.set_pin(1, Some((SENT, false)));
    assert_eq!(kvm.take(), [routes([(1, REMAPPED)])]);
    assert_eq!(unit.faults(), []);
}

#[test]
fn a9_all_that_an_invalidation_touches_is_one_change_of_the_routes() {
    let bench = bench();
    let Bench { kvm, unit, interrupts } = &bench;
    unit.set(SENT, Some(REMAPPED));
    unit.set(OTHER, Some(REMAPPED));
    let vectors: Vec<_> = (0..3).map(|_| interrupts.route(requester()).unwrap()).collect();
    for (vector, sends) in vectors.iter().zip([SENT, OTHER, SENT]) {
        interrupts.set_routes(&[(vector.clone(), Some(sends))]);
    }
    interrupts.set_pin(7, Some((OTHER, false)));
    kvm.take();
    unit.set(SENT, Some(MOVED));
    unit.set(OTHER, None);
    interrupts.entries_changed(EntriesChanged::All);
    // What is blocked leaves KVM before the guest is told, and the pin has no route while its entry faults.
    assert_eq!(kvm.take(), [Call::Disconnect(25), routes([(24, MOVED), (25, REMAPPED), (26, MOVED)])]);
    unit.set(OTHER, Some(MOVED));
    bench.invalidate(4, 1);
    assert_eq!(
        kvm.take(),
        [routes([(7, MOVED), (24, MOVED), (25, MOVED), (26, MOVED)]), Call::Connect(25)],
        "the route first, then the eventfd"
    );
}

#[test]
fn a9_a_blocked_vector_faults_when_it_fires_and_not_before() {
    let bench = bench();
    let Bench { kvm, unit, interrupts } = &bench;
    let route = interrupts.route(requester()).unwrap();
    interrupts.set_routes(&[(route.clone(), Some(SENT))]);
    bench.invalidate(0, 65536);
    interrupts.serve_blocked();
    assert_eq!((kvm.take(), unit.faults()), (vec![], vec![]));
    assert!(!route.take_pending(), "it is not masked");

    for _ in 0..2 {
        route.trigger().write(1).unwrap();
        interrupts.serve_blocked();
        interrupts.serve_blocked();
        assert_eq!(unit.faults(), [(requester(), SENT)], "once each");
    }
    // The entry became valid, and the guest has not said so: the unit is asked when it fires.
    unit.set(SENT, Some(REMAPPED));
    route.trigger().write(1).unwrap();
    interrupts.serve_blocked();
    assert_eq!(kvm.take(), [Call::Send(REMAPPED)]);
    bench.invalidate(3, 1);
    assert_eq!(kvm.take(), [routes([(24, REMAPPED)]), Call::Connect(24)]);
    interrupts.serve_blocked();
    assert_eq!((kvm.take(), unit.faults()), (vec![], vec![]));
}

#[test]
fn a9_a_signal_that_kvm_delivered_at_the_handover_is_no_fault_later() {
    let bench = bench();
    let Bench { kvm, unit, interrupts } = &bench;
    unit.set(SENT, Some(REMAPPED));
    let route = interrupts.route(requester()).unwrap();
    // Between the last look at what is pending and the handover: KVM delivers it, and leaves it counted.
    route.trigger().write(1).unwrap();
    interrupts.set_routes(&[(route.clone(), Some(SENT))]);
    unit.set(SENT, None);
    bench.invalidate(3, 1);
    interrupts.serve_blocked();
    assert_eq!(unit.faults(), []);
    assert_eq!(kvm.take(), [routes([(24, REMAPPED)]), Call::Connect(24), Call::Disconnect(24)]);
    interrupts.set_routes(&[(route.clone(), None)]);
    assert!(!route.take_pending());
}

#[test]
fn a_masked_vector_counts_signals() {
    let bench = bench();
    let Bench { kvm, unit, interrupts } = &bench;
    let route = interrupts.route(requester()).unwrap();
    route.trigger().write(1).unwrap();
    assert!(route.take_pending());
    assert!(!route.take_pending());
    // Blocked, then masked: the event loop leaves it alone.
    interrupts.set_routes(&[(route.clone(), Some(SENT))]);
    interrupts.set_routes(&[(route.clone(), None)]);
    route.trigger().write(1).unwrap();
    interrupts.serve_blocked();
    assert!(route.take_pending());
    assert_eq!((kvm.take(), unit.faults()), (vec![], vec![]));
}

#[test]
fn where_kvm_refuses_interrupts_are_served_by_the_event_loop() {
    for (refuses_routes, calls) in [(true, 0), (false, 1)] {
        let bench = bench();
        let Bench { kvm, unit, interrupts } = &bench;
        unit.set(SENT, Some(REMAPPED));
        let refused = if refuses_routes { &kvm.refuses_routes } else { &kvm.refuses_eventfds };
        refused.store(true, Ordering::SeqCst);
        let route = interrupts.route(requester()).unwrap();
        interrupts.set_routes(&[(route.clone(), Some(SENT))]);
        assert_eq!(kvm.take().len(), calls);
        route.trigger().write(1).unwrap();
        interrupts.serve_blocked();
        assert_eq!(kvm.take(), [Call::Send(REMAPPED)]);
        refused.store(false, Ordering::SeqCst);
        bench.invalidate(3, 1);
        assert_eq!(kvm.take().last(), Some(&Call::Connect(24)), "the next change tries again");
        assert_eq!(interrupts.table().routes[&24], REMAPPED);
    }
}

#[test]
fn routes_that_cannot_be_replaced_deliver_nothing_to_the_old_target() {
    let bench = bench();
    let Bench { kvm, unit, interrupts } = &bench;
    unit.set(SENT, Some(REMAPPED));
    let route = interrupts.route(requester()).unwrap();
    interrupts.set_routes(&[(route.clone(), Some(SENT))]);
    kvm.take();
    kvm.refuses_routes.store(true, Ordering::SeqCst);
    unit.set(SENT, Some(MOVED));
    bench.invalidate(3, 1);
    assert_eq!(kvm.take(), [Call::Disconnect(24)]);
    route.trigger().write(1).unwrap();
    interrupts.serve_blocked();
    assert_eq!(kvm.take(), [Call::Send(MOVED)]);
}

#[test]
fn single_messages_are_remapped_and_the_units_own_are_not() {
    let Bench { kvm, unit, interrupts } = &bench();
    Interrupts::signal(&**interrupts, requester(), SENT);
    assert_eq!((kvm.take(), unit.faults()), (vec![], vec![(requester(), SENT)]));
    unit.set(SENT, Some(REMAPPED));
    Interrupts::signal(&**interrupts, requester(), SENT);
    MsiSink::signal(&**interrupts, SENT);
    assert_eq!(kvm.take(), [Call::Send(REMAPPED), Call::Send(SENT)]);
}

#[test]
fn without_a_unit_messages_go_as_they_are_if_they_are_messages() {
    let kvm = Arc::<FakeKvm>::default();
    let interrupts = KvmInterrupts::over(kvm.clone()).unwrap();
    for (address, sent) in [(0xfee0_1000, 1), (0xfeef_fffc, 1), (0xfedf_fffc, 0), (0xfef0_0000, 0), (0x1_fee0_1000, 0)]
    {
        Interrupts::signal(&*interrupts, requester(), Msi { address, data: 0x41 });
        assert_eq!(kvm.take().len(), sent, "{address:#x}");
    }
}

#[test]
fn nothing_is_delivered_once_the_unit_is_gone() {
    let Bench { kvm, unit, interrupts } = bench();
    unit.set(SENT, Some(REMAPPED));
    drop(unit);
    Interrupts::signal(&*interrupts, requester(), SENT);
    let route = interrupts.route(requester()).unwrap();
    interrupts.set_routes(&[(route.clone(), Some(SENT))]);
    assert_eq!(kvm.take(), []);
}

#[test]
fn f5_a_pin_has_a_route_with_the_trigger_mode_that_the_processors_see() {
    let kvm = Arc::<FakeKvm>::default();
    let interrupts = KvmInterrupts::over(kvm.clone()).unwrap();
    let msi = Msi { address: 0xfee0_1000, data: 0x41 };
    interrupts.set_pin(9, Some((msi, true)));
    interrupts.set_pin(9, None);
    interrupts.set_pin(200, Some((msi, false)));
    assert_eq!(kvm.take(), [routes([(9, Msi { data: 0x41 | DATA_LEVEL, ..msi })])]);

    // Linux leaves the entry edge-triggered: the end of the interrupt comes by the EOI register then, and not from KVM.
    let Bench { kvm, unit, interrupts } = bench();
    unit.set(SENT, Some(REMAPPED));
    interrupts.set_pin(9, Some((SENT, true)));
    assert_eq!(kvm.take(), [routes([(9, REMAPPED)])]);
    assert_eq!(unit.faults(), []);
}

#[test]
fn kvm_takes_what_it_is_given() {
    let Ok(kvm) = vm::open() else {
        eprintln!("no /dev/kvm: nothing to check");
        return;
    };
    let interrupts = KvmInterrupts::new(vm::create(&kvm).unwrap()).unwrap();
    let unit = Arc::<FakeUnit>::default();
    unit.set(SENT, Some(REMAPPED));
    let remapper: Weak<dyn Remapper> = Arc::<FakeUnit>::downgrade(&unit);
    interrupts.remap_by(remapper);
    let route = interrupts.route(requester()).unwrap();
    let path = || interrupts.table().vectors[&24].path;
    route.trigger().write(1).unwrap();
    interrupts.set_routes(&[(route.clone(), Some(SENT))]);
    assert_eq!((path(), interrupts.table().stale), (Path::Kvm, false));
    unit.set(SENT, Some(MOVED));
    interrupts.entries_changed(EntriesChanged::All);
    assert_eq!((path(), interrupts.table().stale), (Path::Kvm, false));
    unit.set(SENT, None);
    interrupts.entries_changed(EntriesChanged::All);
    assert_eq!(path(), Path::Served);
    interrupts.serve_blocked();
    assert_eq!(unit.faults(), []);
    route.trigger().write(1).unwrap();
    interrupts.serve_blocked();
    assert_eq!(unit.faults(), [(requester(), SENT)]);
    interrupts.set_routes(&[(route.clone(), None)]);
    route.trigger().write(1).unwrap();
    assert!(route.take_pending());
}

thread_local! {
    static LINES: Cell<u64> = const { Cell::new(0) };
}

/// Counts the lines of each thread, at the levels that are on without asking for more.
struct Count;

impl log::Log for Count {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Info
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            LINES.set(LINES.get() + 1);
        }
    }

    fn flush(&self) {}
}

#[test]
fn rule5_what_kvm_refuses_again_and_again_is_said_once_and_leaves_no_memory() {
    const ROUNDS: u64 = 1000;
    let Bench { kvm, unit, interrupts } = &bench();
    assert!(log::set_logger(&Count).is_ok(), "nobody else counts in this program's tests");
    log::set_max_level(log::LevelFilter::Trace);
    let route = interrupts.route(requester()).unwrap();
    let round = |number: u64| {
        let refuses = |of: u64| number % 4 == of;
        kvm.refuses_routes.store(refuses(1), Ordering::SeqCst);
        kvm.refuses_eventfds.store(refuses(2), Ordering::SeqCst);
        kvm.refuses_messages.store(refuses(3), Ordering::SeqCst);
        // Another target each time, now and then none; masked and unmasked; and more vectors that come and go.
        unit.set(SENT, (!number.is_multiple_of(7)).then_some(Msi { data: number as u32, ..REMAPPED }));
        interrupts.set_routes(&[(route.clone(), Some(SENT))]);
        interrupts.entries_changed(EntriesChanged::All);
        interrupts.set_pin((number % 24) as u8, Some((SENT, number.is_multiple_of(2))));
        route.trigger().write(1).unwrap();
        interrupts.serve_blocked();
        Interrupts::signal(&**interrupts, requester(), SENT);
        let other = interrupts.route(requester()).unwrap();
        interrupts.set_routes(&[(other.clone(), Some(OTHER))]);
        drop(other);
        interrupts.set_routes(&[(route.clone(), (!number.is_multiple_of(5)).then_some(SENT))]);
        kvm.take();
        unit.faults();
    };
    (0..ROUNDS).for_each(round);
    let second = measure(|| (ROUNDS..2 * ROUNDS).for_each(round));
    assert_eq!(LINES.get(), 3, "routes, eventfds and messages once each");
    assert!(second.bytes_current < ROUNDS as i64, "{second:?}");
    assert!(second.bytes_max < 1 << 16, "{second:?}");
}
