use super::*;

fn held(extents: &[(u64, u64)]) -> Ledger {
    let mut ledger = Ledger::default();
    for &(first, last) in extents {
        ledger.insert(Extent { first, last, gpa: 0, hva: 0, perm: Perm::ReadWrite });
    }
    ledger
}

const WIDTHS: [(u8, u64); 4] = [(39, (1 << 39) - 1), (48, (1 << 48) - 1), (57, (1 << 57) - 1), (64, u64::MAX)];

#[test]
fn b3_an_unmap_ends_where_the_space_ends() {
    for (width, last) in WIDTHS {
        // As if something were held up to where 64 bits end: the width alone decides.
        let ledger = held(&[(0, 0xfff), (u64::MAX - 0xfff, u64::MAX)]);
        assert_eq!(ledger.clip(IovaRange::ALL, width), Some(IovaRange { first: 0, last }));
        let above = IovaRange { first: last, last: u64::MAX };
        assert_eq!(ledger.clip(above, width), Some(IovaRange { first: last, last }));
        if width < 64 {
            assert_eq!(ledger.clip(IovaRange { first: last + 1, last: u64::MAX }, width), None);
        }
        let inside = IovaRange { first: 0x1000, last: last - 1 };
        assert_eq!(ledger.clip(inside, width), Some(inside));
    }
}

#[test]
fn b3_an_unmap_ends_where_the_highest_mapping_does() {
    let ledger = held(&[(0, 0xfff), (0x8000, 0x1_0fff)]);
    assert_eq!(ledger.high_watermark(), Some(0x1_0fff));
    for (width, last) in WIDTHS {
        assert_eq!(ledger.clip(IovaRange::ALL, width), Some(IovaRange { first: 0, last: 0x1_0fff }));
        // Also what is narrower than the space, but not what ends before.
        assert_eq!(ledger.clip(IovaRange { first: 0x9000, last }, width).map(|r| r.last), Some(0x1_0fff));
        let before = IovaRange { first: 0, last: 0x1_0ffe };
        assert_eq!(ledger.clip(before, width), Some(before));
        assert_eq!(ledger.clip(IovaRange { first: 0x1_1000, last }, width), None);
        assert_eq!(Ledger::default().clip(IovaRange::ALL, width), None);
    }
}

#[test]
fn b3_the_lower_of_both_ends_counts() {
    for (width, last) in WIDTHS {
        let ledger = held(&[(last - 0x1fff, last - 0x1000)]);
        assert_eq!(ledger.clip(IovaRange::ALL, width), Some(IovaRange { first: 0, last: last - 0x1000 }));
        // One bit less than the space that holds it.
        assert_eq!(ledger.clip(IovaRange::ALL, width - 1), Some(IovaRange { first: 0, last: last / 2 }));
    }
}
