//! What is shown of the guest's tables is what they have, page by page, whatever a guest puts there.

use proptest::prelude::*;
use vtd::inspect::{FunctionEntries, Leads, PageBounds, Position, Stage, TableItem, TableMode, TableRange};
use vtd::spec::fault::FaultReason;
use vtd::{DomainId, Gpa, Iova, IovaRange, Mapping, Pasid, Perm, SourceId, SpaceKey, Stages, UnitConfig};

use crate::pasid_tables::{config, first_stage, pass_through, second_stage};
use crate::rig::{NIC, NVME, Rig, joined};

/// All pages of a listing with these bounds; each begins behind the one before it.
fn list(rig: &Rig, only: Option<SourceId>, bounds: PageBounds) -> Vec<TableItem> {
    let mut items = Vec::new();
    let mut from = Position::default();
    for _ in 0..100_000 {
        let page = rig.unit.tables_page(only, from, bounds);
        assert!(page.items.len() <= bounds.items, "{} items", page.items.len());
        items.extend(page.items);
        let Some(next) = page.next else { return items };
        assert!(next > from, "{next} does not come after {from}");
        assert_eq!(next.to_string().parse(), Ok(next));
        from = next;
    }
    panic!("the listing does not end");
}

fn all(rig: &Rig) -> Vec<TableItem> {
    list(rig, None, PageBounds::default())
}

fn function(item: &TableItem) -> &FunctionEntries {
    match item {
        TableItem::Function(entries) => entries,
        TableItem::Range(range) => panic!("no function: {range:?}"),
    }
}

fn range(item: &TableItem) -> &TableRange {
    match item {
        TableItem::Range(range) => range,
        TableItem::Function(entries) => panic!("no range: {entries:?}"),
    }
}

/// What ranges of one function map, joined.
fn mapped<'a>(items: impl IntoIterator<Item = &'a TableItem>) -> Vec<Mapping> {
    let ranges = items.into_iter().filter_map(|item| match item {
        TableItem::Range(TableRange { range, leads: Leads::To { gpa, perm }, .. }) => {
            Some(Mapping { iova: Iova(range.first), gpa: *gpa, len: range.last - range.first + 1, perm: *perm })
        }
        _ => None,
    });
    joined(ranges)
}

#[test]
fn inspect_legacy_tables_are_shown_with_their_entries_and_neighbours_are_one_range() {
    let (mut rig, root) = Rig::with_nvme();
    rig.set_pass_through(NIC, 7);
    rig.pages(root, 0x3f_e000, 0x10_0000, 4);
    rig.leaf(root, 48, 0x4000_0000, 0x80_0000, Some(Perm::ReadWrite), 2);
    rig.leaf(root, 48, 0x4020_0000, 0xa0_0000, Some(Perm::ReadWrite), 2);
    // What is above them permits no write.
    let above = rig.entry_address(root, 48, 0x4000_0000, 3);
    rig.store(above, rig.load(above) & !2);
    let items = all(&rig);
    let nvme = function(&items[0]);
    assert_eq!((nvme.source, nvme.pasid, nvme.domain, nvme.fault), (NVME.sid, None, Some(DomainId(1)), None));
    assert_eq!(nvme.stage, Stage::Second { root: Gpa(root), levels: 4 });
    let context = rig.context_address(NVME);
    assert_eq!(nvme.context_entry, [rig.load(context), rig.load(context + 8)]);
    assert_eq!(nvme.root_entry, [rig.load(rig.root_table), 0]);
    // Over the end of a table, too.
    let pages = range(&items[1]);
    assert_eq!((pages.range, pages.level, pages.entries), (IovaRange::new(0x3f_e000, 0x40_1fff), 1, 4));
    assert_eq!(pages.leads, Leads::To { gpa: Gpa(0x10_0000), perm: Perm::ReadWrite });
    let path: Vec<u64> = (1..=4).rev().map(|level| rig.entry_address(root, 48, 0x3f_e000, level)).collect();
    assert_eq!(pages.path, path.iter().map(|at| rig.load(*at)).collect::<Vec<_>>());
    let large = range(&items[2]);
    assert_eq!((large.range, large.level, large.entries), (IovaRange::new(0x4000_0000, 0x403f_ffff), 2, 2));
    assert_eq!(large.leads, Leads::To { gpa: Gpa(0x80_0000), perm: Perm::Read });
    let nic = function(&items[3]);
    assert_eq!((nic.source, nic.stage, nic.domain), (NIC.sid, Stage::PassThrough, Some(DomainId(7))));
    assert_eq!(items.len(), 4);
    assert_eq!(list(&rig, Some(NIC.sid), PageBounds::default()), items[3..]);
    let page = rig.unit.tables_page(None, Position::default(), PageBounds::default());
    assert_eq!((page.enabled, page.mode, page.root, page.next), (true, TableMode::Legacy, Gpa(rig.root_table), None));
    // Nothing is looked at while translation is off.
    rig.command(|on| on.with_translation(false));
    let page = rig.unit.tables_page(None, Position::default(), PageBounds::default());
    assert_eq!((page.enabled, page.items), (false, Vec::new()));
}

#[test]
fn inspect_a_function_that_is_asked_for_and_not_there_is_shown_with_its_fault() {
    let (rig, _) = Rig::with_nvme();
    let other = SourceId::new(0, 9, 0);
    let items = list(&rig, Some(other), PageBounds::default());
    assert_eq!((function(&items[0]).fault, items.len()), (Some(FaultReason::ContextNotPresent), 1));
    let items = list(&rig, Some(NIC.sid), PageBounds::default());
    assert_eq!((function(&items[0]).fault, items.len()), (Some(FaultReason::RootNotPresent), 1));
    // A bus whose context table is nowhere is one item.
    rig.store(rig.root_table + 16, 0x7fff_ffff_f001);
    let items = all(&rig);
    let of_bus_1 = |item: &&TableItem| matches!(item, TableItem::Function(of) if of.source.bus() == 1);
    let broken: Vec<_> = items.iter().filter(of_bus_1).collect();
    assert_eq!((broken.len(), function(broken[0]).fault), (1, Some(FaultReason::ContextTableAccess)));
}

#[test]
fn inspect_scalable_tables_are_shown_by_pasid_in_either_stage() {
    let stages = UnitConfig { scalable: Some(Stages::Both), pasid_bits: 20, ..config(48) };
    let mut rig = Rig::scalable(stages);
    let (second, first) = (rig.table(), rig.table());
    rig.set_entry(NVME, 0, second_stage(second, 48, 1));
    rig.set_entry(NVME, 1, pass_through(2));
    rig.set_entry(NVME, 130, first_stage(first, 4, 3));
    rig.pages(second, 0x5000, 0x10_0000, 1);
    // A large page with PAT in the upper half of canonical addresses, which the supervisor has the next one of.
    let (upper, directory) = (rig.table(), rig.table());
    rig.store(first + 511 * 8, upper | 0x27);
    rig.store(upper + 511 * 8, directory | 0x7);
    rig.store(directory + 510 * 8, 0x40_0000 | 1 << 12 | 0x85);
    rig.store(directory + 511 * 8, 0x60_0000 | 0x83);
    let before = rig.load(directory + 510 * 8);
    let items = all(&rig);
    let heads: Vec<_> = items.iter().filter(|item| matches!(item, TableItem::Function(_))).map(function).collect();
    let said = |of: &FunctionEntries| (of.pasid, of.is_rid_pasid, of.domain, of.stage, of.fault);
    assert_eq!(
        heads.iter().map(|of| said(of)).collect::<Vec<_>>(),
        [
            (Some(Pasid(0)), true, Some(DomainId(1)), Stage::Second { root: Gpa(second), levels: 4 }, None),
            // Its context entry permits no requests with a PASID.
            (Some(Pasid(1)), false, Some(DomainId(2)), Stage::PassThrough, Some(FaultReason::PasidNotEnabled)),
            (
                Some(Pasid(130)),
                false,
                Some(DomainId(3)),
                Stage::First { root: Gpa(first), levels: 4 },
                Some(FaultReason::PasidNotEnabled)
            ),
        ]
    );
    assert_eq!(
        mapped(&items[1..2]),
        [Mapping { iova: Iova(0x5000), gpa: Gpa(0x10_0000), len: 4096, perm: Perm::ReadWrite }]
    );
    let large = range(&items[4]);
    assert_eq!(large.range, IovaRange::new(u64::MAX - 0x3f_ffff, u64::MAX - 0x20_0000));
    assert_eq!(large.leads, Leads::To { gpa: Gpa(0x40_0000), perm: Perm::Read });
    assert_eq!(range(&items[5]).leads, Leads::Nowhere("for the supervisor only"));
    assert_eq!(items.len(), 6);
    assert_eq!(rig.load(directory + 510 * 8), before, "looking sets no accessed flag");
    for (entries, count) in [(64, 1), (70, 2), (1 << 16, 1)] {
        assert_eq!(list(&rig, None, PageBounds { entries, items: count }), items);
    }
}

#[test]
fn inspect_tables_that_are_their_own_children_are_shown_page_by_page() {
    let (mut rig, root) = Rig::with_nvme();
    for entry in 0..512 {
        rig.store(root + entry * 8, root | 3);
    }
    let bounds = PageBounds { entries: 5000, items: 10 };
    let mut from = Position::default();
    for _ in 0..100 {
        let page = rig.unit.tables_page(None, from, bounds);
        assert!(page.items.len() <= 10);
        let next = page.next.expect("2^36 leaves have another page");
        assert!(next > from);
        from = next;
    }
    // Nothing but tables: entries are counted, too.
    let (upper, empty) = (rig.table(), rig.table());
    (0..512).for_each(|entry| rig.store(root + entry * 8, 0));
    rig.store(root, upper | 3);
    (0..512).for_each(|entry| rig.store(upper + entry * 8, empty | 3));
    let page = rig.unit.tables_page(None, Position::default(), bounds);
    let inside = page.next.is_some_and(|next| next.source == NVME.sid.0 && next.offset.is_some());
    assert!(page.items.len() == 1 && inside, "{page:?}");
    // A root beyond memory.
    rig.set_paged(NVME, 0x7fff_f000_0000, 48, 1);
    let items = all(&rig);
    assert_eq!(range(&items[1]).leads, Leads::Nowhere("there is no memory for a table"));
    assert_eq!(range(&items[1]).range, IovaRange::new(0, (1 << 48) - 1));
}

/// Leaves that do not touch the interrupt window.
fn leaf() -> impl Strategy<Value = (u64, u64, u8, Perm, bool)> {
    let perm = prop_oneof![4 => Just(Perm::ReadWrite), 1 => Just(Perm::Read), 1 => Just(Perm::Write)];
    let place = prop_oneof![
        6 => (0..40u64, 0..4u64).prop_map(|(page, span)| (page * 0x1000 + span * 0x1f_8000, 1u8)),
        2 => (0..8u64).prop_map(|n| ((n + 16) * 0x20_0000, 2)),
        1 => (2..4u64).prop_map(|n| (n * 0x4000_0000 + (1 << 40), 3)),
    ];
    let target = prop_oneof![Just(None), (0..3u64).prop_map(Some)];
    (place, target, perm, prop::bool::weighted(0.05)).prop_map(|((iova, level), target, perm, broken)| {
        let gpa = target.map_or(iova & 0x3fff_ffff, |n| n * 0x4000_0000);
        (iova, gpa & !((1u64 << (12 + 9 * (u64::from(level) - 1))) - 1), level, perm, broken)
    })
}

proptest! {
    /// The unit's own walk finds the same.
    #[test]
    fn inspect_what_is_shown_is_what_the_unit_walks(
        leaves in prop::collection::vec(leaf(), 0..80),
        bounds in (64..600u64, 1..6usize),
    ) {
        let (mut rig, root) = Rig::with_nvme();
        for (iova, gpa, level, perm, broken) in leaves {
            rig.leaf(root, 48, iova, gpa, Some(perm), level);
            if broken {
                let at = rig.entry_address(root, 48, iova, level);
                rig.store(at, rig.load(at) | 1 << 11);
            }
        }
        let SpaceKey::Paged(space) = rig.set_paged(NVME, root, 48, 1) else { unreachable!() };
        let walked = rig.unit.walk(&space).unwrap();
        let whole = all(&rig);
        prop_assert_eq!(&mapped(&whole[1..]), &walked);
        let (entries, items) = bounds;
        let paged = list(&rig, Some(NVME.sid), PageBounds { entries, items });
        prop_assert_eq!(mapped(&paged[1..]), walked);
    }

    #[test]
    fn inspect_no_position_but_those_that_were_said_is_one(text in "[0-9a-f.+-]{0,20}") {
        if let Ok(position) = text.parse::<Position>() {
            prop_assert_eq!(position.to_string().parse(), Ok(position));
        }
    }

    /// Whatever a client makes up, a page is a page.
    #[test]
    fn inspect_any_position_has_a_page(source: u16, pasid in 0..1u32 << 20, offset: Option<u64>) {
        let (mut rig, root) = Rig::with_nvme();
        rig.pages(root, 0x5000, 0x10_0000, 3);
        let from = Position { source, pasid, offset };
        let page = rig.unit.tables_page(None, from, PageBounds::default());
        prop_assert!(page.items.len() <= 2);
        let mut scalable = Rig::scalable(config(48));
        scalable.set_entry(NVME, 5, pass_through(2));
        let page = scalable.unit.tables_page(None, from, PageBounds::default());
        prop_assert!(page.items.len() <= 1);
    }
}
