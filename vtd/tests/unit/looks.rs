//! What a guest adds where it need not say so: without Caching Mode (section 6.1).

use std::collections::BTreeMap;

use proptest::prelude::*;
use vtd::{IovaRange, Perm, SpaceKey, UnitConfig, UnitId};

use crate::rig::{NVME, Rig, iotlb_domain, iotlb_pages, map, mapping, unmap};

const DOMAIN: u16 = 1;

/// A guest that says nothing of what it adds, and the root of the table of the function's domain. The unit found the
/// function's context entry absent when it was last told to look.
fn silent() -> (Rig, u64) {
    let mut rig = Rig::with(UnitConfig { caching_mode: false, ..UnitConfig::new(UnitId(0), 48) });
    rig.enable_queue();
    rig.enable_translation();
    rig.unit.add_requester(NVME).unwrap();
    let root = rig.table();
    (rig, root)
}

fn page(iova: u64) -> IovaRange {
    IovaRange::new(iova, iova + 0xfff)
}

#[test]
fn a10_without_caching_mode_a_look_finds_the_function_and_what_was_added() {
    let (mut rig, root) = silent();
    assert_eq!(rig.listener.attached(NVME), Some(SpaceKey::Blocked));
    rig.unit.look_at(NVME, &[page(0x4000)]);
    assert_eq!(rig.listener.attached(NVME), Some(SpaceKey::Blocked), "the tables say nothing of it");

    let key = rig.set_paged(NVME, root, 48, DOMAIN);
    rig.pages(root, 0x4000, 0x8000, 1);
    rig.unit.look_at(NVME, &[page(0x4000)]);
    assert_eq!(rig.listener.attached(NVME), Some(key));
    assert_eq!(rig.listener.reach(NVME), [mapping(0x4000, 0x8000, 0x1000, Perm::ReadWrite)]);

    // What nobody looks at is not found; a part of a page stands for it.
    rig.pages(root, 0x10_0000, 0x9000, 1);
    rig.pages(root, 0x20_0000, 0xa000, 1);
    rig.pages(root, 0x30_0000, 0xb000, 1);
    rig.listener.take_events();
    rig.unit.look_at(NVME, &[IovaRange::new(0x30_0010, 0x30_0020), page(0x10_0000)]);
    assert_eq!(rig.listener.take_ops(), [map(0x10_0000, 0x9000, 0x1000), map(0x30_0000, 0xb000, 0x1000)]);
    rig.unit.look_at(NVME, &[page(0x10_0000), page(0x30_0000), page(0x50_0000)]);
    assert_eq!(rig.listener.take_ops(), [], "that is known, and there is nothing");

    // What is taken away the guest says, with Caching Mode or without.
    rig.clear(root, 0x10_0000, 1);
    assert!(rig.submit(&[iotlb_pages(DOMAIN, 0x10_0000, 0)]));
    assert_eq!(rig.listener.take_ops(), [unmap(0x10_0000, 0x10_0fff)]);
    assert!(rig.fault_records().is_empty());
}

#[test]
fn a10_with_caching_mode_a_look_finds_nothing() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x4000, 0x8000, 1);
    rig.listener.take_events();
    rig.unit.look_at(NVME, &[page(0x4000)]);
    assert_eq!(rig.listener.take_ops(), []);
    assert!(rig.submit(&[iotlb_domain(DOMAIN)]));
    assert_eq!(rig.listener.take_ops(), [map(0x4000, 0x8000, 0x1000)]);
}

#[test]
fn a10_a_look_follows_a_function_that_is_passed_through_and_one_that_is_unknown_has_none() {
    let (mut rig, _) = silent();
    rig.set_pass_through(NVME, DOMAIN);
    rig.unit.look_at(NVME, &[page(0x4000)]);
    assert_eq!(rig.listener.attached(NVME), Some(SpaceKey::Identity));
    rig.unit.remove_requester(NVME);
    rig.listener.take_events();
    rig.unit.look_at(NVME, &[page(0x4000)]);
    assert_eq!(rig.listener.take_events(), []);
}

/// A step of a guest that keeps to section 6.1: what is not present it may map, what is it unmaps and says so.
#[derive(Clone, Copy, Debug)]
enum Step {
    Map(u64, u64),
    Unmap(u64),
    Look(u64, u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..24_u64, 0..64_u64).prop_map(|(page, target)| Step::Map(page, target)),
        (0..24_u64).prop_map(Step::Unmap),
        (0..24_u64, 0..4_u64).prop_map(|(page, more)| Step::Look(page, more)),
    ]
}

proptest! {
    /// After a look the listener has, of what was looked at, exactly what the tables say; elsewhere nothing that they
    /// do not.
    #[test]
    fn a10_what_was_looked_at_is_as_the_tables_say_and_nothing_is_stale(steps in prop::collection::vec(step(), 1..60)) {
        let (mut rig, root) = silent();
        rig.set_paged(NVME, root, 48, DOMAIN);
        let mut tables = BTreeMap::new();
        for step in steps {
            let mut looked = None;
            match step {
                Step::Map(page, target) => {
                    if let std::collections::btree_map::Entry::Vacant(entry) = tables.entry(page) {
                        entry.insert(target);
                        rig.pages(root, page << 12, target << 12, 1);
                    }
                }
                Step::Unmap(page) => {
                    if tables.remove(&page).is_some() {
                        rig.clear(root, page << 12, 1);
                        prop_assert!(rig.submit(&[iotlb_pages(DOMAIN, page << 12, 0)]));
                    }
                }
                Step::Look(page, more) => {
                    rig.unit.look_at(NVME, &[IovaRange::new(page << 12, ((page + more) << 12) + 0xfff)]);
                    looked = Some(page..=page + more);
                }
            }
            let mut held = BTreeMap::new();
            for run in rig.listener.reach(NVME) {
                held.extend((0..run.len >> 12).map(|page| ((run.iova.0 >> 12) + page, (run.gpa.0 >> 12) + page)));
            }
            prop_assert!(held.iter().all(|(page, target)| tables.get(page) == Some(target)), "{held:?} of {tables:?}");
            for page in looked.into_iter().flatten() {
                prop_assert_eq!(held.get(&page), tables.get(&page));
            }
        }
    }
}
