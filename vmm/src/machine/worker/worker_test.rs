use super::*;

const QUEUE: QueueShape = QueueShape { descriptors: 256, descriptor: 16 };

fn guest(queue: QueueShape, widths: &[u8]) -> Guest {
    let mut guest = Guest { queue: Some(queue), ..Guest::default() };
    widths.iter().for_each(|width| guest.wrote_tail((*width).into()));
    guest
}

#[test]
fn a6_a_guest_that_was_watched_gets_bells_for_what_it_writes() {
    let watched = WATCHED as usize;
    for width in [4, 8] {
        assert_eq!(guest(QUEUE, &vec![width; watched]).fitting(), Some(Hanging { queue: QUEUE, width }));
        assert_eq!(guest(QUEUE, &vec![width; watched - 1]).fitting(), None);
    }
    let mixed: Vec<u8> = [4, 8].into_iter().cycle().take(watched).collect();
    assert_eq!(guest(QUEUE, &mixed).fitting(), None);
    // There are more tails than bells: it is not watched either.
    let large = QueueShape { descriptors: 512, ..QUEUE };
    let large = guest(large, &vec![4; watched]);
    assert_eq!((large.fitting(), large.is_watched()), (None, false));
    assert_eq!((guest(QUEUE, &[4]).is_watched(), Guest::default().is_watched()), (true, false));
}

#[test]
fn a6_a_guest_that_goes_by_the_tail_register_gets_none() {
    let mut guest = guest(QUEUE, &[4; WATCHED as usize]);
    guest.reads_tail = true;
    assert_eq!(guest.fitting(), None);
}
