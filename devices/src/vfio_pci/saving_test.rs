//! A function whose process gives its state: what is ours of it leaves one machine and comes into another.

use serde_json::{Value, json};

use super::test_bench::*;
use super::*;
use crate::saved::{Saves, Unfit};

fn moving(prepare: impl FnOnce(&FakeHost)) -> Bench {
    Bench::with(|host| {
        *host.state.lock().unwrap() = Some(vec![1, 2, 3]);
        prepare(host);
    })
}

fn running() -> Bench {
    let bench = moving(|_| {});
    bench.config32(0x10, BAR_GPA as u32);
    bench.config32(0x14, (BAR_GPA >> 32) as u32);
    bench.command(COMMAND_MEMORY | COMMAND_MASTER);
    bench
}

fn saves(bench: &Bench) -> &dyn Saves {
    bench.function.saves().expect("its process has a state")
}

fn moves(bench: &Bench) -> Vec<&'static str> {
    std::mem::take(&mut *bench.host.moves.lock().unwrap())
}

/// The state of a function that is held.
fn saved(bench: &Bench) -> Value {
    saves(bench).hold().unwrap();
    saves(bench).gather().unwrap();
    saves(bench).save()
}

/// A new function with this state, that is held; that of its process is `of_process`.
fn restored(state: &Value) -> Bench {
    let bench = moving(|_| {});
    saves(&bench).restore(state).unwrap();
    assert_eq!(moves(&bench), ["load", "stop"]);
    bench
}

fn signals(bench: &Bench) -> Vec<usize> {
    bench.host.taken(IrqKind::Msix)
}

#[test]
fn a14_a_function_of_a_process_with_a_state_is_put_back_as_it_was() {
    let from = running();
    from.config16(0x3c, 0x33);
    let state = saved(&from);
    assert_eq!(moves(&from), ["stop", "state"]);
    assert_eq!(state["state"]["process"], "010203");
    // What is its process's own comes from there, and only from there.
    let to = moving(|host| *host.state.lock().unwrap() = Some(vec![9]));
    assert!(to.slots.mapped().is_empty());
    saves(&to).restore(&state).unwrap();
    assert_eq!(to.host.state.lock().unwrap().as_deref(), Some(&[1, 2, 3][..]));
    assert_eq!(to.slots.mapped(), WINDOWS);
    assert_eq!(to.host.command(), COMMAND_MEMORY | COMMAND_MASTER);
    for at in (0..0x100).step_by(4) {
        assert_eq!(to.config(at), from.config(at), "{at:#x}");
    }
    to.write(BAR_GPA, 7);
    assert_eq!(to.read(BAR_GPA), 7);
    moves(&to);
    saves(&to).go_on();
    saves(&to).go_on();
    assert_eq!(moves(&to), ["go on"], "once");
    // The first goes on as well.
    saves(&from).go_on();
    assert_eq!(moves(&from), ["go on"]);
    // One that sleeps stays asleep.
    from.config16(POWER + 4, 3);
    let to = restored(&saved(&from));
    assert!(to.slots.mapped().is_empty());
    to.config16(POWER + 4, 0);
    assert_eq!(to.slots.mapped(), WINDOWS);
}

#[test]
fn a14_vectors_deliver_nothing_while_they_are_held_and_lose_nothing() {
    let from = running();
    (0..4).for_each(|index| from.vector(index, 0x40 + index as u32, index == 2));
    from.config16(MSIX + 2, msix::CONTROL_ENABLE);
    // Taken and masked, with a signal; 3 is masked without one, 2 was never unmasked.
    from.vector(1, 0x41, true);
    from.vector(3, 0x43, true);
    from.host.raise(IrqKind::Msix, 1);
    assert_eq!(signals(&from), [0, 1, 3]);
    saves(&from).hold().unwrap();
    from.host.raise(IrqKind::Msix, 0);
    assert_eq!(from.delivered(), [0u32; 0]);
    saves(&from).go_on();
    assert_eq!(from.delivered(), [0x40]);
    let state = saved(&from);
    let to = restored(&state);
    assert_eq!(signals(&to), [0, 1, 3], "those that were taken, and no other");
    assert!(!to.host.live(IrqKind::Intx));
    assert_eq!(to.read(PBA) & 0xf, 2);
    to.host.raise(IrqKind::Msix, 0);
    to.host.raise(IrqKind::Msix, 3);
    assert_eq!(to.delivered(), [0u32; 0], "it is held");
    saves(&to).go_on();
    assert_eq!(to.delivered(), [0x40]);
    assert_eq!(to.read(PBA) & 0xf, 0xa);
    to.vector(1, 0x51, false);
    assert_eq!(to.delivered(), [0x51]);
    to.vector(2, 0x42, false);
    to.host.raise(IrqKind::Msix, 2);
    assert_eq!(to.delivered(), [0x42]);
    // What was signalled and not delivered, as where the unit blocks it, is sent where it goes on.
    saves(&from).go_on();
    from.host.raise(IrqKind::Msix, 0);
    let to = restored(&saved(&from));
    assert_eq!(to.delivered(), [0u32; 0]);
    saves(&to).go_on();
    assert_eq!(to.delivered(), [0x40]);
}

#[test]
fn a14_msi_is_put_back_with_its_masks() {
    let from = running();
    from.config32(MSI + 4, 0xfee0_0000);
    from.config16(MSI + 12, 0x60);
    from.config32(MSI + 16, 0);
    // Both vectors, then the second masked and signalled.
    from.config16(MSI + 2, 0x11);
    from.config32(MSI + 16, 2);
    from.host.raise(IrqKind::Msi, 1);
    let state = saved(&from);
    let to = restored(&state);
    assert_eq!(to.host.taken(IrqKind::Msi), [0, 1]);
    assert_eq!(to.config(MSI + 20), 2, "pending");
    assert_eq!(to.config(MSI + 2) & 0x71, 0x11);
    saves(&to).go_on();
    to.host.raise(IrqKind::Msi, 0);
    assert_eq!(to.delivered(), [0x60]);
    to.config32(MSI + 16, 0);
    assert_eq!(to.delivered(), [0x61]);
}

#[test]
fn a14_the_line_is_put_back_and_what_the_guest_heard_is_not_heard_twice() {
    let from = running();
    let to = restored(&saved(&from));
    assert!(!to.line.is_high() && to.host.live(IrqKind::Intx));
    saves(&from).go_on();
    // Signalled, and not looked at before it is held.
    from.host.raise(IrqKind::Intx, 0);
    let state = saved(&from);
    assert!(from.line.is_high());
    let to = moving(|_| {});
    // A process whose line is high says so when it has its state.
    to.host.raise(IrqKind::Intx, 0);
    saves(&to).restore(&state).unwrap();
    assert!(to.line.is_high());
    to.function.intx_fired();
    saves(&to).go_on();
    let unmasks = to.host.unmasks.load(Ordering::SeqCst);
    to.function.end_of_interrupt();
    assert!(!to.line.is_high(), "once");
    assert_eq!(to.host.unmasks.load(Ordering::SeqCst), unmasks + 1);
    // What it says anew is heard.
    let to = moving(|_| {});
    to.host.raise(IrqKind::Intx, 0);
    saves(&to).restore(&saved(&running())).unwrap();
    to.function.intx_fired();
    assert!(to.line.is_high());
}

#[test]
fn a14_a_state_of_another_function_or_one_that_its_process_refuses_is_refused() {
    let from = running();
    from.config16(MSIX + 2, msix::CONTROL_ENABLE);
    let state = saved(&from);
    let with = |path: &str, value: Value| {
        let mut state = state.clone();
        *state.pointer_mut(&format!("/state{path}")).expect(path) = value;
        state
    };
    for (state, name) in [
        (with("/identity/ids/0", json!(1)), "identity"),
        (with("/identity/regions/0", json!(0x2000)), "identity"),
        (with("/identity/vectors/2", json!(3)), "identity"),
        (with("/command", json!(0x800)), "command register"),
        (with("/command", json!(1)), "command register"),
        (with("/msi", Value::Null), "MSI"),
        (with("/msix", Value::Null), "MSI-X"),
        (with("/intx", Value::Null), "interrupt pin"),
        (with("/msix/entries/0/3", json!(2)), "MSI-X"),
        (with("/msix/entries", json!([])), "MSI-X"),
        (with("/config", json!("00")), "configuration space"),
        (with("/config", json!("ff".repeat(4096))), "configuration space"),
        (with("/process", json!("00".repeat(vfio_bridge::vfio_user::MOST_STATE + 1))), "process's state"),
    ] {
        let to = moving(|_| {});
        let before = (0..0x100).step_by(4).map(|at| to.config(at)).collect::<Vec<_>>();
        assert_eq!(saves(&to).restore(&state), Err(Unfit::Value(name)));
        assert_eq!(before, (0..0x100).step_by(4).map(|at| to.config(at)).collect::<Vec<_>>(), "{name}");
        assert_eq!(moves(&to), [""; 0], "its process hears nothing");
    }
    for broken in [with("/config", json!(1)), with("/msi", json!(1)), json!({"version": 2, "state": {}})] {
        let to = moving(|_| {});
        assert!(matches!(saves(&to).restore(&broken), Err(Unfit::Form(_) | Unfit::Version { .. })));
    }
    let to = moving(|_| {});
    assert!(matches!(saves(&to).restore(&with("/process", json!("bad0"))), Err(Unfit::Process(_))));
    assert_eq!(moves(&to), ["load", "stop"]);
    let to = moving(|_| {});
    to.host.gone.store(true, Ordering::SeqCst);
    assert!(matches!(saves(&to).restore(&state), Err(Unfit::Process(_))));
    assert!(to.slots.mapped().is_empty());
    // More vectors were saved than there are.
    assert_eq!(saves(&moving(|_| {})).restore(&with("/msix/vectors", json!([]))), Ok(()));
    let vectors: Value = (0..9).map(|_| json!({"taken": true, "pending": true})).collect();
    assert_eq!(saves(&moving(|_| {})).restore(&with("/msix/vectors", vectors)), Ok(()));
}

#[test]
fn a14_a_function_that_cannot_be_held_says_why_and_goes_on() {
    assert!(Bench::new().function.saves().is_none(), "its process has no state");
    let bench = running();
    bench.host.gone.store(true, Ordering::SeqCst);
    let why = saves(&bench).hold().unwrap_err().to_string();
    assert!(why.contains("does not stop"), "{why}");
    assert!(saves(&bench).gather().unwrap_err().to_string().contains("does not give its state"));
    bench.host.gone.store(false, Ordering::SeqCst);
    moves(&bench);
    saves(&bench).go_on();
    assert_eq!(moves(&bench), ["go on"], "it may have stopped");
    bench.function.quarantine().unwrap();
    let why = saves(&bench).hold().unwrap_err().to_string();
    assert!(why.contains("quarantined"), "{why}");
    assert_eq!(moves(&bench), [""; 0]);
}
