//! What this process writes to guest memory by a session, or as the unit, is in the log of that memory: E-1.

use std::collections::BTreeSet;

use proptest::prelude::*;
use vm_memory::bitmap::BS;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryRegion, Permissions};
use vtd::{DirtyLog, Iova};

use crate::rig::{Memory, NVME, Rig, STATUS, iotlb_pages};

/// Guest-physical pages that are dirty since the last time.
fn dirty(memory: &Memory) -> BTreeSet<u64> {
    let mut pages = BTreeSet::new();
    for region in memory.iter() {
        let slice: BS<'_, DirtyLog> = region.bitmap();
        for (at, word) in slice.log().take().enumerate() {
            let first = region.start_addr().0 / 4096 + at as u64 * 64;
            pages.extend((0..64).filter(|n| word & (1 << n) != 0).map(|n| first + n));
        }
    }
    pages
}

fn start(memory: &Memory) {
    memory.iter().for_each(|region| region.bitmap().log().start());
}

#[test]
fn e1_writes_of_an_endpoint_and_of_the_unit_are_dirty_and_reads_are_not() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x10_0000, 0x80_0000, 2);
    rig.pages(root, 0x10_2000, 0x90_0000, 1);
    let memory = rig.memory.clone();
    let endpoint = rig.unit.endpoint(NVME);
    endpoint.write(Iova(0x10_0000), &[1]).unwrap();
    assert_eq!(dirty(&memory), BTreeSet::new(), "nobody asked");
    start(&memory);
    endpoint.read(Iova(0x10_0000), &mut [0; 0x3000]).unwrap();
    assert_eq!(dirty(&memory), BTreeSet::new());
    // Over a page into one that leads elsewhere.
    endpoint.write(Iova(0x10_1ffc), &[2; 8]).unwrap();
    assert_eq!(dirty(&memory), [0x801, 0x900].into());
    assert!(endpoint.write(Iova(0x10_3000), &[3]).is_err());
    assert_eq!(dirty(&memory), BTreeSet::new(), "it was blocked");
    // As virtio does it, and an identity-mapped one.
    let session = endpoint.enter();
    let slices = GuestMemory::get_slices(&session, GuestAddress(0x10_0800), 0x1000, Permissions::Write).unwrap();
    let slices: Vec<_> = slices.map(Result::unwrap).collect();
    assert_eq!(dirty(&memory), BTreeSet::new(), "nothing is written yet");
    slices.iter().for_each(|slice| slice.write_obj(7u8, slice.len() - 1).unwrap());
    assert_eq!(dirty(&memory), [0x801].into());
    drop(slices);
    drop(session);
    // The status of a wait.
    assert!(rig.submit(&[iotlb_pages(1, 0x10_0000, 0)]));
    assert!(dirty(&memory).contains(&(STATUS / 4096)));
    memory.iter().for_each(|region| region.bitmap().log().stop());
    endpoint.write(Iova(0x10_0000), &[1]).unwrap();
    assert_eq!(dirty(&memory), BTreeSet::new());
}

#[derive(Clone, Debug)]
enum Act {
    /// So many bytes at an offset into the sixteen pages.
    Write(u64, usize),
    /// A page leads elsewhere, or nowhere.
    Lead(u64, Option<u64>),
    Read,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (0u64..16 * 4096, 1usize..9000).prop_map(|(at, len)| Act::Write(at, len)),
        3 => (0u64..16, prop::option::weighted(0.8, 0u64..40)).prop_map(|(page, to)| Act::Lead(page, to)),
        1 => Just(Act::Read),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// While a guest maps and unmaps: what was written is dirty, page by page, where it was when it was written.
    #[test]
    fn e4_what_emulated_devices_write_is_known_page_by_page(acts in prop::collection::vec(act(), 1..40)) {
        let (mut rig, root) = Rig::with_nvme();
        let memory = rig.memory.clone();
        let endpoint = rig.unit.endpoint(NVME);
        start(&memory);
        let mut leads: [Option<u64>; 16] = [None; 16];
        let mut written = BTreeSet::new();
        for act in acts.into_iter().chain([Act::Read]) {
            match act {
                Act::Lead(page, to) => {
                    rig.clear(root, 0x10_0000 + page * 4096, 1);
                    prop_assert!(rig.submit(&[iotlb_pages(1, 0x10_0000 + page * 4096, 0)]));
                    if let Some(to) = to {
                        rig.pages(root, 0x10_0000 + page * 4096, 0x100_0000 + to * 4096, 1);
                        prop_assert!(rig.submit(&[iotlb_pages(1, 0x10_0000 + page * 4096, 0)]));
                    }
                    leads[page as usize] = to;
                }
                Act::Write(at, len) => {
                    let pages = at / 4096..=(at + len as u64 - 1) / 4096;
                    let reached = pages.map_while(|page| leads.get(page as usize).copied().flatten());
                    written.extend(reached.map(|to| 0x1000 + to));
                    let _ = endpoint.write(Iova(0x10_0000 + at), &vec![1; len]);
                }
                Act::Read => {
                    let found: BTreeSet<u64> = dirty(&memory).into_iter().filter(|page| *page >= 0x1000).collect();
                    prop_assert_eq!(found, std::mem::take(&mut written));
                }
            }
        }
    }
}
