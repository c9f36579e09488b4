//! A page that a guest reads in place of the registers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use vtd::spec::registers::offset;
use vtd::{Iova, REGISTER_WINDOW, RegisterPage, UnitConfig, UnitId};

use crate::rig::{NVME, QUEUE, Rig, requester, wait_interrupt};

const NOWHERE: [u64; 0] = [];

struct Page(Vec<AtomicU64>);

impl Page {
    fn of(rig: &Rig) -> Arc<Self> {
        let page = Arc::new(Self((0..REGISTER_WINDOW / 8).map(|_| AtomicU64::new(0)).collect()));
        rig.unit.show_registers(page.clone());
        page
    }

    fn load(&self, at: u64) -> u64 {
        self.0[(at / 8) as usize].load(Ordering::Relaxed)
    }

    /// Where it has something else than the registers.
    fn differs(&self, rig: &Rig) -> Vec<u64> {
        (0..REGISTER_WINDOW).step_by(8).filter(|at| self.load(*at) != rig.read64(*at)).collect()
    }
}

impl RegisterPage for Page {
    fn store(&self, offset: u64, value: u64) {
        self.0[(offset / 8) as usize].store(value, Ordering::Relaxed);
    }
}

#[test]
fn a5_a_page_has_what_the_registers_read() {
    let mut rig = Rig::new();
    rig.write64(offset::RTADDR, 0x5000);
    let page = Page::of(&rig);
    assert_eq!((page.load(offset::RTADDR), page.differs(&rig)), (0x5000, vec![]));
    rig.enable_queue();
    rig.enable_translation();
    assert_eq!(page.load(offset::IQA), QUEUE);
    // A fault has its record and its condition there.
    rig.unit.endpoint(NVME).read(Iova(0x7000), &mut [0]).unwrap_err();
    assert_eq!((page.load(offset::FRCD), page.load(0x30) >> 32 & 2), (0x7000, 2));
    // So have the queue's head and its completion.
    assert!(rig.submit(&[wait_interrupt()]));
    assert_eq!((page.load(offset::IQH), page.load(0x98) >> 32), (32, 1));
    assert_eq!(page.differs(&rig), NOWHERE);
    let saved = rig.unit.save();
    rig.unit.reset();
    assert_eq!((page.load(offset::RTADDR), page.differs(&rig)), (0, vec![]));
    rig.unit.restore(saved).unwrap();
    assert_ne!(page.load(offset::RTADDR), 0);
    assert_eq!(page.differs(&rig), NOWHERE);
}

#[test]
fn a5_only_what_changes_is_put_into_the_page() {
    struct Counted(AtomicU64);
    impl RegisterPage for Counted {
        fn store(&self, _: u64, _: u64) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
    let (rig, page) = (Rig::new(), Arc::new(Counted(AtomicU64::new(0))));
    rig.unit.show_registers(page.clone());
    let stores = |act: &dyn Fn()| {
        let before = page.0.load(Ordering::Relaxed);
        act();
        page.0.load(Ordering::Relaxed) - before
    };
    assert_eq!(stores(&|| rig.write64(offset::RTADDR, 0x5000)), 1);
    assert_eq!(stores(&|| rig.write64(offset::RTADDR, 0x5000)), 0);
    assert_eq!(stores(&|| _ = rig.read64(offset::RTADDR)), 0);
}

#[test]
fn a5_what_a_status_speaks_of_is_in_the_page_before_it() {
    #[derive(Default)]
    struct Order(std::sync::Mutex<Vec<u64>>);
    impl RegisterPage for Order {
        fn store(&self, offset: u64, _: u64) {
            self.0.lock().unwrap().push(offset);
        }
    }
    let (mut rig, order) = (Rig::translating(), Arc::new(Order::default()));
    rig.unit.show_registers(order.clone());
    let stored = || std::mem::take(&mut *order.0.lock().unwrap());
    stored();
    rig.unit.endpoint(NVME).read(Iova(0x7000), &mut [0]).unwrap_err();
    let record = [offset::FRCD, offset::FRCD + 8];
    let stores = stored();
    let at = |place: u64| stores.iter().position(|at| *at == place).unwrap();
    assert!(at(record[0]) < at(record[1]) && at(record[1]) < at(0x30), "{stores:x?}");
    // A descriptor of no kind.
    rig.push(&[(0xff, 0)]);
    rig.ring();
    let stores = stored();
    let at = |place: u64| stores.iter().position(|at| *at == place).unwrap();
    assert!(at(offset::IQERCD) < at(0x30), "{stores:x?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever the guest and its functions do, the page has what the registers read.
    #[test]
    fn a5_a_page_is_right_after_each_step(
        (remapping, counting) in any::<(bool, bool)>(),
        steps in proptest::collection::vec((prop_oneof![4 => 0..0x100u64, 1 => 0x300..0x450u64], any::<u64>(), 0..8u8), 1..40),
    ) {
        let config = UnitConfig {
            interrupt_remapping: remapping,
            extended_interrupt_mode: remapping,
            performance_counters: counting,
            ..UnitConfig::new(UnitId(0), 48)
        };
        let mut rig = Rig::with(config);
        let page = Page::of(&rig);
        for (at, value, what) in steps {
            match what {
                0..=2 => rig.write64(at & !7, value),
                3..=5 => rig.write32(at & !3, value as u32),
                6 => _ = rig.unit.endpoint(requester(0, at as u8 % 32, 0)).read(Iova(value), &mut [0]),
                _ if value % 8 == 0 => rig.unit.reset(),
                _ if value % 8 == 1 => rig.enable_queue(),
                _ if value % 8 == 2 => rig.enable_translation(),
                _ => rig.write64(offset::FRCD + 16 * (value % 8) + 8, value | 1 << 63),
            }
            prop_assert_eq!(page.differs(&rig), NOWHERE);
        }
    }
}
