//! Many neighbouring pages at once: what is told of a table is what each of its entries says by itself (B-1, B-2).

use proptest::prelude::*;
use vtd::spec::second_stage::SecondStageEntry;
use vtd::{Access, Gpa, Iova, Perm, UnitConfig, UnitId};

use crate::rig::{NVME, Rig, iotlb_domain, iotlb_pages, joined, mapping};

const WIDTH: u8 = 46;
/// The table that has the interrupt range among its addresses.
const TABLE: u64 = 0xfee0_0000;

/// Pages that lead to neighbours, from one that may lead anywhere: also to the interrupt range, or out of the address
/// width and out of all bits of an address.
#[derive(Clone, Debug)]
struct Neighbours {
    page: u64,
    len: u64,
    /// Bits of the entry but for its address.
    bits: u64,
}

fn neighbours() -> impl Strategy<Value = Neighbours> {
    let page = prop_oneof![
        4 => 0..1u64 << 20,
        2 => 0xfedf0..0xfef10u64,
        2 => (1u64 << (WIDTH - 12)) - 80..1u64 << (WIDTH - 12),
        1 => (1u64 << 40) - 80..1u64 << 40,
    ];
    // Read and write; bits that are ignored; one that is reserved.
    let bits =
        prop_oneof![4 => Just(3), 1 => 0..4u64, 1 => Just(3 | 1 << 52), 1 => Just(3 | 1 << 10), 1 => Just(3 | 1 << 11)];
    (page, prop_oneof![1..4u64, 60..70u64, 1..300u64], bits).prop_map(|(page, len, bits)| Neighbours {
        page,
        len,
        bits,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn b2_neighbours_are_told_as_each_entry_says(
        runs in proptest::collection::vec(neighbours(), 1..8),
        from in 0..512u64,
        few in any::<bool>(),
        iova in prop_oneof![Just(0x4000_0000u64), Just(TABLE)],
    ) {
        let mut rig = Rig::with(UnitConfig { host_address_width: WIDTH, ..UnitConfig::new(UnitId(0), 48) });
        rig.enable_queue();
        rig.enable_translation();
        let root = rig.table();
        rig.set_paged(NVME, root, 48, 1);
        rig.unit.add_requester(NVME).unwrap();
        let table = rig.entry_address(root, 48, iova, 1);
        let entries: Vec<u64> = runs
            .iter()
            .flat_map(|run| (0..run.len).map(|page| ((run.page + page) << 12).wrapping_add(run.bits)))
            .take(512 - from as usize)
            .collect();
        for (entry, word) in (from..).zip(&entries) {
            rig.store(table + entry * 8, *word);
        }
        let said = if few { rig.submit(&[iotlb_pages(1, iova, 9)]) } else { rig.submit(&[iotlb_domain(1)]) };
        prop_assert!(said);
        let each = (from..).zip(&entries).filter_map(|(entry, word)| {
            let entry = (iova + (entry << 12), SecondStageEntry::from_bits(*word));
            let (at, gpa) = (entry.0, entry.1.page() << 12);
            let perm = Perm::from_bits(entry.1.read(), entry.1.write())?;
            let interrupts = 0xfee0_0000..0xfef0_0000;
            let there = gpa >> WIDTH == 0 && !entry.1.snoop() && !interrupts.contains(&at) && !interrupts.contains(&gpa);
            there.then(|| mapping(at, gpa, 4096, perm))
        });
        let expected = joined(each);
        prop_assert_eq!(rig.listener.reach(NVME), expected.clone());
        prop_assert_eq!(rig.unit.audit(&mut |_, _, _, _| {}).differing(), 0);
        // And so does a device that walks by itself, where there is something.
        let (endpoint, mut found) = (rig.unit.endpoint(NVME), Vec::new());
        for at in expected.iter().flat_map(|m| (m.iova.0..=m.last().0).step_by(4096).map(move |at| (at, m.perm))) {
            let access = if at.1.readable() { Access::Read } else { Access::Write };
            let gpa = endpoint.enter().translate(Iova(at.0), access);
            prop_assert!(gpa.is_ok(), "{:#x}", at.0);
            found.push(mapping(at.0, gpa.unwrap_or(Gpa(0)).0, 4096, at.1));
        }
        prop_assert_eq!(joined(found), expected);
    }
}
