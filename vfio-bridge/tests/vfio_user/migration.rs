//! The state of a function leaves one process and comes into another, and nobody is believed meanwhile: A-14.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use vfio_bridge::vfio_user::MOST_STATE;
use vfio_bridge::{Function, Migrates, RegionKind, ResetScope};

use super::messages::{ask_for, client};
use super::misbehaving::{ERROR, REPLY, message, next, orderly, server, words};
use super::rig::{Asked, PATIENT, Rig, Serving, event, serving, was_signalled};

const DEVICE_FEATURE: u16 = 16;
const MIG_DATA_READ: u16 = 17;
const MIG_DATA_WRITE: u16 = 18;
const OFFERED: u32 = 1 << 16 | 1;
const GET: u32 = 1 << 16 | 2;
const SET: u32 = 1 << 17 | 2;
const PROBE: u32 = 1 << 18;
const ERROR_STATE: u32 = 0;
const STOP: u32 = 1;
const RUNNING: u32 = 2;
const STOP_COPY: u32 = 3;
const RESUMING: u32 = 4;

fn moving(state: Vec<u8>) -> (Rig, Serving) {
    let (stream, serving) = serving();
    *serving.device.state.lock().unwrap() = Some(state);
    (Rig::connect(stream, PATIENT).unwrap(), serving)
}

fn of(rig: &Rig) -> &dyn Migrates {
    rig.function.migration().expect("it can be had")
}

#[test]
fn a14_a_state_goes_from_one_process_into_another_as_it_is() {
    // None at all, one that ends with a message, and one of several messages.
    for len in [0, 1, 1 << 20, MOST_STATE] {
        let state: Vec<u8> = (0..len).map(|at| ((at * 7) >> 3) as u8).collect();
        let ((from, first), (to, second)) = (moving(state.clone()), moving(vec![1]));
        of(&from).stop().unwrap();
        let taken = of(&from).state().unwrap();
        assert!(taken == state, "{len}");
        assert_eq!(first.device.take(), [Asked::Stop, Asked::Save]);
        of(&to).load(&taken).unwrap();
        assert_eq!(second.device.take(), [Asked::Stop]);
        of(&to).stop().unwrap();
        assert_eq!(second.device.take(), [Asked::Load]);
        of(&to).go_on().unwrap();
        assert_eq!(second.device.take(), [Asked::GoOn]);
        assert!(second.device.state.lock().unwrap().as_ref() == Some(&state), "{len}");
        // The first can go on all the same, and give it away once more.
        of(&from).go_on().unwrap();
        of(&from).stop().unwrap();
        assert!(of(&from).state().unwrap() == state);
        drop(from);
        drop(to);
        first.thread.join().unwrap().unwrap();
        second.thread.join().unwrap().unwrap();
    }
}

#[test]
fn a14_a_state_that_is_longer_than_there_can_be_is_refused_and_the_function_goes_on() {
    let (rig, serving) = moving(vec![7; MOST_STATE + 1]);
    of(&rig).stop().unwrap();
    assert!(of(&rig).state().is_err());
    of(&rig).go_on().unwrap();
    assert_eq!(serving.device.take(), [Asked::Stop, Asked::Save, Asked::GoOn]);
}

#[test]
fn a14_a_process_without_a_state_to_give_says_so() {
    let (stream, _serving) = serving();
    assert!(Rig::connect(stream, PATIENT).unwrap().function.migration().is_none());
    // One that answers with nothing, with an error, or without the one way that is known here.
    for answer in [
        message(0, DEVICE_FEATURE, REPLY, 0, &[]),
        message(0, DEVICE_FEATURE, REPLY | ERROR, 25, &[]),
        message(0, DEVICE_FEATURE, REPLY, 0, &words(&[16, OFFERED, 2, 0])),
        message(0, DEVICE_FEATURE, REPLY, 0, &words(&[16, OFFERED, 1])),
    ] {
        let stream = server(move |id, command, _| {
            let mut answer = answer.clone();
            answer[..2].copy_from_slice(&id.to_ne_bytes());
            (command == DEVICE_FEATURE).then_some(answer)
        });
        let rig = Rig::connect(stream, PATIENT).unwrap();
        assert!(rig.function.migration().is_none());
        let mut data = [0; 4];
        rig.function.read(RegionKind::Config, 0, &mut data);
    }
}

#[test]
fn a14_who_is_gone_has_no_state_any_more() {
    let (stream, mut other) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        while let Some((id, command, payload)) = next(&mut other) {
            let answer =
                if command == DEVICE_FEATURE { words(&[16, OFFERED, 1, 0]) } else { orderly(command, &payload) };
            other.write_all(&message(id, command, REPLY, 0, &answer)).unwrap();
            if command == DEVICE_FEATURE {
                return;
            }
        }
    });
    let rig = Rig::connect(stream, PATIENT).unwrap();
    let event = event();
    rig.function.wake_when_gone(event.try_clone().unwrap());
    rig.function.migration();
    thread.join().unwrap();
    while !was_signalled(&event) {
        std::thread::yield_now();
    }
    assert!(rig.function.migration().is_none());
}

#[test]
fn a14_a_state_that_is_refused_leaves_a_function_that_does_nothing_until_it_is_reset() {
    let (rig, serving) = moving(vec![1, 2]);
    of(&rig).load(&[0xba, 0xd0, 1]).unwrap();
    assert!(of(&rig).stop().is_err());
    assert_eq!(*serving.device.state.lock().unwrap(), Some(vec![1, 2]));
    assert!(of(&rig).go_on().is_err() && of(&rig).state().is_err() && of(&rig).load(&[3]).is_err());
    serving.device.take();
    rig.function.reset(ResetScope::Function).unwrap();
    assert_eq!(serving.device.take(), [Asked::Reset, Asked::GoOn]);
    of(&rig).load(&[3]).unwrap();
    of(&rig).stop().unwrap();
    // Longer than there can be: its process says so while it is written.
    assert!(of(&rig).load(&vec![0; MOST_STATE + 1]).is_err());
    assert_eq!(*serving.device.state.lock().unwrap(), Some(vec![3]));
}

#[test]
fn a14_a_function_whose_client_is_gone_while_it_was_stopped_is_reset_and_works_for_the_next() {
    let (rig, serving) = moving(vec![1]);
    of(&rig).stop().unwrap();
    serving.device.take();
    drop(rig);
    serving.thread.join().unwrap().unwrap();
    let last: Vec<_> = serving.device.take().into_iter().filter(|a| !matches!(a, Asked::Disable(_))).collect();
    assert_eq!(last, [Asked::Reset, Asked::GoOn]);
}

fn set(client: &mut UnixStream, state: u32) -> Result<Vec<u8>, u32> {
    ask_for(client, DEVICE_FEATURE, &words(&[16, SET, state, u32::MAX]))
}

#[test]
fn a14_the_protocol_of_a_state_is_kept_and_what_comes_out_of_order_is_refused() {
    const EINVAL: u32 = libc::EINVAL.cast_unsigned();
    const ENOTTY: u32 = libc::ENOTTY.cast_unsigned();
    let (mut client, serving) = client();
    let client = &mut client;
    assert_eq!(ask_for(client, DEVICE_FEATURE, &words(&[16, OFFERED])), Err(ENOTTY), "it has no state");
    *serving.device.state.lock().unwrap() = Some(vec![1, 2, 3, 4, 5]);
    assert_eq!(ask_for(client, DEVICE_FEATURE, &words(&[16, OFFERED])), Ok(words(&[16, OFFERED, 1, 0])));
    for known in [OFFERED, GET, SET, 2 | 3 << 16] {
        let asked = words(&[8, known | PROBE]);
        assert_eq!(ask_for(client, DEVICE_FEATURE, &asked), Ok(asked.clone()));
    }
    for (payload, error) in [
        (words(&[16, 1 | 1 << 17]), EINVAL),
        (words(&[16, 1 | 1 << 17 | PROBE]), ENOTTY),
        (words(&[16, SET]), EINVAL),
        (words(&[16, SET, ERROR_STATE, 0]), EINVAL),
        (words(&[16, SET, 5, 0]), EINVAL),
        (words(&[16, SET, 6, 0]), EINVAL),
        (words(&[16, SET, 0xabcd, 0]), EINVAL),
        (words(&[16]), EINVAL),
    ] {
        assert_eq!(ask_for(client, DEVICE_FEATURE, &payload), Err(error), "{payload:x?}");
    }
    let state_is = |client: &mut UnixStream, state: u32| {
        let reply = ask_for(client, DEVICE_FEATURE, &words(&[16, GET])).unwrap();
        assert_eq!(reply, words(&[16, GET, state, u32::MAX]));
    };
    state_is(client, RUNNING);
    assert_eq!(ask_for(client, MIG_DATA_READ, &words(&[8 + 4, 4])), Err(EINVAL), "it runs");
    assert_eq!(ask_for(client, MIG_DATA_WRITE, &words(&[8 + 4, 4, 0])), Err(EINVAL), "it runs");
    assert_eq!(serving.device.take(), []);
    // Through STOP, although nobody says so; the reply is what was asked.
    assert_eq!(set(client, STOP_COPY), Ok(words(&[16, SET, STOP_COPY, u32::MAX])));
    assert_eq!(serving.device.take(), [Asked::Stop, Asked::Save]);
    assert_eq!(ask_for(client, MIG_DATA_READ, &words(&[8 + 4, 4])), Ok([words(&[12, 4]), vec![1, 2, 3, 4]].concat()));
    assert_eq!(ask_for(client, MIG_DATA_READ, &words(&[8 + 4, 5])), Err(EINVAL), "no room for the reply");
    assert_eq!(ask_for(client, MIG_DATA_READ, &words(&[4, 0])), Err(EINVAL));
    assert_eq!(ask_for(client, MIG_DATA_READ, &words(&[u32::MAX, (1 << 20) + 1])), Err(EINVAL));
    assert_eq!(ask_for(client, MIG_DATA_WRITE, &words(&[12, 4, 0])), Err(EINVAL), "it is read");
    assert_eq!(set(client, STOP_COPY), Ok(words(&[16, SET, STOP_COPY, u32::MAX])), "it goes on where it is");
    assert_eq!(ask_for(client, MIG_DATA_READ, &words(&[8 + 4, 4])), Ok([words(&[9, 1]), vec![5]].concat()));
    assert_eq!(ask_for(client, MIG_DATA_READ, &words(&[8 + 4, 4])), Ok(words(&[8, 0])));
    assert_eq!(serving.device.take(), []);
    set(client, RESUMING).unwrap();
    assert_eq!(ask_for(client, MIG_DATA_READ, &words(&[8 + 4, 4])), Err(EINVAL), "it is written");
    assert_eq!(ask_for(client, MIG_DATA_WRITE, &words(&[12, 3, 0])), Err(EINVAL), "not as long as it says");
    assert_eq!(ask_for(client, MIG_DATA_WRITE, &[words(&[11, 3]), vec![7, 8, 9]].concat()), Ok(vec![]));
    assert_eq!(ask_for(client, MIG_DATA_WRITE, &[words(&[9, 1]), vec![10]].concat()), Ok(vec![]));
    assert_eq!(serving.device.take(), []);
    set(client, RUNNING).unwrap();
    assert_eq!(serving.device.take(), [Asked::Load, Asked::GoOn]);
    assert_eq!(*serving.device.state.lock().unwrap(), Some(vec![7, 8, 9, 10]));
    state_is(client, RUNNING);
    // What was written before is gone.
    set(client, RESUMING).unwrap();
    ask_for(client, MIG_DATA_WRITE, &[words(&[10, 2]), vec![0xba, 0xd0]].concat()).unwrap();
    assert_eq!(set(client, STOP), Err(EINVAL));
    state_is(client, ERROR_STATE);
    assert_eq!(set(client, RUNNING), Err(EINVAL));
    ask_for(client, 13, &[]).unwrap();
    state_is(client, RUNNING);
    // A state of more than there can be.
    set(client, RESUMING).unwrap();
    let part = [words(&[8 + (1 << 20), 1 << 20]), vec![0; 1 << 20]].concat();
    for _ in 0..MOST_STATE >> 20 {
        ask_for(client, MIG_DATA_WRITE, &part).unwrap();
    }
    assert_eq!(ask_for(client, MIG_DATA_WRITE, &[words(&[9, 1]), vec![0]].concat()), Err(libc::EFBIG.cast_unsigned()));
}

/// A server that is orderly, offers states, and answers what is asked of a state with one of `payloads` after another,
/// and the last again and again.
fn answering(payloads: Vec<Vec<u8>>, feature: Option<Vec<u8>>) -> Rig {
    let answered = AtomicUsize::new(0);
    let stream = server(move |id, command, asked| match command {
        DEVICE_FEATURE if asked.get(4..8) == Some(&words(&[OFFERED])) => {
            Some(message(id, command, REPLY, 0, &words(&[16, OFFERED, 1, 0])))
        }
        DEVICE_FEATURE => feature.as_ref().map(|payload| message(id, command, REPLY, 0, payload)),
        MIG_DATA_READ | MIG_DATA_WRITE => {
            let next = answered.fetch_add(1, Ordering::Relaxed).min(payloads.len() - 1);
            Some(message(id, command, REPLY, 0, &payloads[next]))
        }
        _ => None,
    });
    Rig::connect(stream, PATIENT).unwrap()
}

#[test]
fn a14_a_process_that_gives_no_state_that_makes_sense_is_refused() {
    for payload in [
        vec![],
        words(&[8]),
        // Longer than what came, and longer than what was asked for.
        words(&[12, 4]),
        [words(&[u32::MAX, u32::MAX]), vec![1; 64]].concat(),
        [words(&[8 + (1 << 20) + 1, (1 << 20) + 1]), vec![1; (1 << 20) + 1]].concat(),
        // Without end.
        [words(&[8 + (1 << 20), 1 << 20]), vec![1; 1 << 20]].concat(),
    ] {
        let rig = answering(vec![payload], None);
        assert!(of(&rig).state().is_err());
    }
    let longer = [words(&[8 + (1 << 20) + 1, (1 << 20) + 1]), vec![1; (1 << 20) + 1]].concat();
    assert!(of(&answering(vec![longer, words(&[8, 0])], None)).state().is_err());
    let rig = answering(vec![[words(&[10, 2]), vec![1, 2, 3]].concat()], None);
    assert_eq!(of(&rig).state().unwrap(), [1, 2], "what is behind it is not of it");
}

fn garbage() -> impl Strategy<Value = Vec<u8>> {
    let word = prop_oneof![Just(0u32), 1u32..20, Just(OFFERED), Just(GET), Just(SET), any::<u32>()];
    (prop::collection::vec(word, 0..6), prop::collection::vec(any::<u8>(), 0..4))
        .prop_map(|(head, tail)| [words(&head), tail].concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a process answers, each call ends, and what it gives is no longer than there can be.
    #[test]
    fn a14_no_answer_of_a_process_is_believed(payload in garbage(), feature in garbage()) {
        let rig = answering(vec![payload], Some(feature));
        if let Some(function) = rig.function.migration() {
            let _ = function.stop();
            if let Ok(state) = function.state() {
                prop_assert!(state.len() <= MOST_STATE);
            }
            let _ = function.load(&[1, 2, 3]);
            let _ = function.go_on();
        }
    }

    /// Whatever a client says, it is answered, and the function is stopped and goes on by turns.
    #[test]
    fn a14_no_client_brings_a_function_out_of_order(
        said_by in prop::collection::vec((13u16..19, garbage(), prop::option::of(0u32..6)), 1..24),
    ) {
        let (mut client, serving) = client();
        *serving.device.state.lock().unwrap() = Some(vec![1, 2, 3]);
        for (command, payload, state) in said_by {
            let _ = match state {
                Some(state) => set(&mut client, state),
                None => ask_for(&mut client, command, &payload),
            };
        }
        drop(client);
        serving.thread.join().unwrap().unwrap();
        let mut stopped = false;
        for asked in serving.device.take() {
            match asked {
                Asked::Stop => prop_assert!(!std::mem::replace(&mut stopped, true)),
                Asked::GoOn => prop_assert!(std::mem::replace(&mut stopped, false)),
                Asked::Save | Asked::Load => prop_assert!(stopped),
                _ => {}
            }
        }
        prop_assert!(!stopped, "the next client finds it at work");
    }
}
