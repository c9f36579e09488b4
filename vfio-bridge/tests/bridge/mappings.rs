//! What a function was granted beside what the host holds for it, part by part.

use vfio_bridge::Mappings;
use vfio_bridge::model::Kernel;
use vtd::audit::Target;
use vtd::{Gpa, IovaRange, Mapping, Perm, SpaceKey};

use crate::world::{GIB, KIB4, MIB2, Ram, World, map, mapping, requester};

/// All parts, each with at most `most` mappings a side.
fn all(world: &World, space: &SpaceKey, granted: &[Mapping], most: usize) -> Mappings {
    let mut whole = Mappings::default();
    let mut from = 0;
    for _ in 0..1000 {
        let mut rest = granted.iter().copied().filter(|mapping| mapping.last().0 >= from);
        let part = world.bridge.mappings(requester(1), space, &mut rest, from, most).unwrap();
        assert!(part.pieces.len() <= 2 * most, "{part:?}");
        for piece in part.pieces {
            let last = whole.pieces.last().map_or(-1, |last| i128::from(last.range.last));
            assert!(i128::from(piece.range.first) > last, "{piece:?}");
            // The rest of a run that a part ended in.
            match whole.pieces.last_mut() {
                Some(open)
                    if open.range.last + 1 == piece.range.first
                        && open.agrees()
                        && piece.agrees()
                        && open.left.zip(piece.left).is_some_and(|(from, to)| {
                            from.gpa.0 + (piece.range.first - open.range.first) == to.gpa.0 && from.perm == to.perm
                        }) =>
                {
                    open.range.last = piece.range.last;
                }
                _ => whole.pieces.push(piece),
            }
        }
        whole.differences.extend(part.differences);
        whole.refused.extend(part.refused);
        let Some(next) = part.next else { return whole };
        assert!(next > from);
        from = next;
    }
    panic!("it does not end");
}

#[test]
fn mappings_are_runs_of_both_books_in_parts_of_any_size() {
    let (world, space) = World::one(Kernel::new(48), 48);
    world.done(&space, &[map(0, 0, KIB4), map(KIB4, KIB4, 3 * KIB4), map(MIB2, 0, KIB4)]);
    let granted = [mapping(0, 0, 2 * KIB4), mapping(2 * KIB4, 2 * KIB4, 2 * KIB4), mapping(MIB2, 0, KIB4)];
    for most in 1..5 {
        let found = all(&world, &space, &granted, most);
        let ranges: Vec<IovaRange> = found.pieces.iter().map(|piece| piece.range).collect();
        assert_eq!(ranges, [IovaRange::new(0, 4 * KIB4 - 1), IovaRange::new(MIB2, MIB2 + KIB4 - 1)], "{most}");
        assert!(found.pieces.iter().all(|piece| piece.agrees()) && found.differences.is_empty());
    }
}

#[test]
fn mappings_that_differ_are_runs_of_their_own() {
    let (world, space) = World::one(Kernel::new(48), 48);
    world.done(&space, &[map(0, 0, 4 * KIB4), map(MIB2, MIB2, KIB4)]);
    let granted = [mapping(0, 0, KIB4), mapping(2 * KIB4, 8 * KIB4, KIB4), mapping(2 * MIB2, 0, KIB4)];
    for most in 1..5 {
        let found = all(&world, &space, &granted, most);
        let said: Vec<_> = found.pieces.iter().map(|piece| (piece.range.first, piece.left, piece.right)).collect();
        let to = |gpa: u64| Some(Target { gpa: Gpa(gpa), perm: Perm::ReadWrite });
        let expected = [
            (0, to(0), to(0)),
            (KIB4, None, to(KIB4)),
            (2 * KIB4, to(8 * KIB4), to(2 * KIB4)),
            (3 * KIB4, None, to(3 * KIB4)),
            (MIB2, None, to(MIB2)),
            (2 * MIB2, to(0), None),
        ];
        assert_eq!(said, expected, "{most}");
    }
}

#[test]
fn mappings_in_identity_are_all_ram_without_the_interrupt_window() {
    let world = World::new(Kernel::new(48), Ram { low: 4 * GIB - MIB2, high: GIB }, &[(1, 1)]);
    world.attach(1, &SpaceKey::Identity, &[]).expect("attached");
    let found = all(&world, &SpaceKey::Identity, &[], 8);
    assert!(found.pieces.iter().all(|piece| piece.agrees() && piece.left.is_some()), "{found:?}");
    let window = IovaRange::new(0xfee0_0000, 0xfeef_ffff);
    assert!(found.pieces.iter().all(|piece| piece.range.intersection(window).is_none()));
    let len = |range: IovaRange| range.last - range.first + 1;
    assert_eq!(found.pieces.iter().map(|piece| len(piece.range)).sum::<u64>(), 5 * GIB - MIB2 - len(window));
    // One that the bridge has elsewhere, and one that it does not know.
    let found = all(&world, &SpaceKey::Blocked, &[], 8);
    assert_eq!(found.differences, ["the unit attached it to blocked, the bridge has it in identity"]);
    assert!(found.pieces.iter().all(|piece| piece.left.is_none()) && !found.pieces.is_empty());
    assert_eq!(world.bridge.mappings(requester(9), &SpaceKey::Identity, &mut std::iter::empty(), 0, 8), None);
}

#[test]
fn mappings_that_the_host_holds_in_part_are_cut_where_it_ends() {
    let (world, space) = World::one(Kernel::new(48), 48);
    world.done(&space, &[map(0, 0, KIB4)]);
    let found = all(&world, &space, &[mapping(0, 0, 2 * KIB4)], 8);
    assert_eq!(found.pieces.iter().map(|piece| piece.agrees()).collect::<Vec<_>>(), [true, false]);
    assert_eq!(found.pieces[1].range, IovaRange::new(KIB4, 2 * KIB4 - 1));
}
