//! The legacy interrupt.

use super::test_bench::*;
use super::*;

#[test]
fn f5_intx_raises_the_line_until_the_end_of_interrupt_unmasks_it() {
    let bench = Bench::running();
    bench.host.raise(IrqKind::Intx, 0);
    bench.function.intx_fired();
    assert!(bench.line.is_high());
    assert_eq!(bench.host.unmasks.load(Ordering::SeqCst), 0);
    bench.function.end_of_interrupt();
    assert!(!bench.line.is_high());
    assert_eq!(bench.host.unmasks.load(Ordering::SeqCst), 1);
    bench.function.end_of_interrupt();
    assert_eq!(bench.host.unmasks.load(Ordering::SeqCst), 1, "an end that is another function's");
}

#[test]
fn f5_intx_that_fires_before_the_end_of_interrupt_is_not_lost() {
    // A server of vfio-user does not mask it, as VFIO does.
    let bench = Bench::running();
    for _ in 0..3 {
        bench.host.raise(IrqKind::Intx, 0);
        bench.function.intx_fired();
    }
    for high in [true, false] {
        bench.function.end_of_interrupt();
        assert_eq!(bench.line.is_high(), high, "once more, for all that came meanwhile");
    }
    assert_eq!(bench.host.unmasks.load(Ordering::SeqCst), 2);
}

#[test]
fn f5_the_function_cannot_raise_the_hosts_line_while_vfio_does_not_listen() {
    let bench = Bench::new();
    let holds = |bench: &Bench| (bench.host.holds_line(), bench.host.live(IrqKind::Intx));
    assert_eq!(holds(&bench), (false, true));
    // What the order of the two is in each of these, the host checks.
    bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
    assert_eq!(holds(&bench), (true, false));
    bench.command(COMMAND_MEMORY | COMMAND_MASTER);
    assert_eq!(holds(&bench), (true, false), "whatever the guest writes");
    assert_eq!(bench.config(COMMAND) & 0xffff, u32::from(COMMAND_MEMORY | COMMAND_MASTER), "who does not see it");
    bench.config16(MSIX + 2, 0);
    assert_eq!(holds(&bench), (false, true));
    assert_eq!(bench.host.command(), COMMAND_MEMORY | COMMAND_MASTER);
    bench.command(COMMAND_INTX_OFF);
    bench.root.quiesce();
    assert_eq!(holds(&bench), (true, false));
    bench.root.reset();
    assert_eq!(holds(&bench), (false, true));
    bench.command(COMMAND_INTX_OFF);
    assert_eq!(holds(&bench), (true, true), "the guest's own");
    bench.function.quarantine().unwrap();
    bench.command(0);
    assert_eq!(holds(&bench), (false, true));
    let refused = Bench::running_with(|host| host.host_vectors.store(0, Ordering::SeqCst));
    assert!(refused.host.holds_line());
}

#[test]
fn f5_enabling_messages_lowers_the_line() {
    let bench = Bench::running();
    bench.host.raise(IrqKind::Intx, 0);
    bench.function.intx_fired();
    bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
    assert!(!bench.line.is_high() && !bench.host.live(IrqKind::Intx));
    bench.config16(MSIX + 2, 0);
    assert!(bench.host.live(IrqKind::Intx));
}

#[test]
fn f5_intx_that_is_disabled_raises_no_line() {
    let bench = Bench::running();
    let event = bench.function.intx_event().unwrap().try_clone().unwrap();
    bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
    event.write(1).unwrap();
    bench.function.intx_fired();
    assert!(!bench.line.is_high());
    // What came before it was disabled is gone as well.
    bench.config16(MSIX + 2, 0);
    bench.function.intx_fired();
    assert!(!bench.line.is_high(), "nothing fired");
    bench.host.raise(IrqKind::Intx, 0);
    bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
    bench.config16(MSIX + 2, 0);
    bench.function.intx_fired();
    bench.function.end_of_interrupt();
    assert!(!bench.line.is_high());
    assert_eq!((*bench.line.rises.lock().unwrap(), bench.host.unmasks.load(Ordering::SeqCst)), (0, 0));
    bench.host.raise(IrqKind::Intx, 0);
    bench.function.intx_fired();
    assert!(bench.line.is_high());
}

#[test]
fn f5_intx_comes_back_only_when_neither_kind_of_message_is_enabled() {
    let bench = Bench::running();
    bench.config16(MSI + 2, 1);
    bench.config16(MSIX + 2, 0);
    assert!(bench.host.live(IrqKind::Msi) && !bench.host.live(IrqKind::Intx));
    bench.config16(MSI + 2, 0);
    bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
    bench.config16(MSI + 2, 0);
    assert!(bench.host.live(IrqKind::Msix) && !bench.host.live(IrqKind::Intx));
    bench.config16(MSIX + 2, 0);
    assert!(bench.host.live(IrqKind::Intx));
}

#[test]
fn f5_the_pin_is_one_of_four_and_only_if_the_host_serves_it() {
    let pin_of = |pin: u8, count| {
        let host = FakeHost::new(Arc::default());
        host.put(INTERRUPT_PIN, &[pin]);
        host.counts.lock().unwrap().push((IrqKind::Intx, count));
        VfioPci::pin_of(&host)
    };
    assert_eq!([0, 1, 4, 5, 0xff].map(|pin| pin_of(pin, 1)), [None, Some(1), Some(4), None, None]);
    assert_eq!(pin_of(1, 0), None);
}

#[test]
fn f5_without_a_line_the_guest_sees_no_pin() {
    let bench = Bench::new();
    let (_, host, sid) = second(&bench);
    let mut data = [0; 2];
    bench.root.config_read(sid, INTERRUPT_LINE, &mut data);
    assert_eq!((data, host.live(IrqKind::Intx)), ([0xff, 0], false));
}

#[test]
fn f5_the_guest_may_write_the_line_and_not_the_pin() {
    let bench = Bench::new();
    bench.config16(INTERRUPT_LINE, 0x070a);
    assert_eq!(bench.config(INTERRUPT_LINE) & 0xffff, 0x010a);
}

#[test]
fn f5_errors_and_requests_of_the_host_are_heard() {
    let bench = Bench::with(|host| host.counts.lock().unwrap().extend([(IrqKind::Error, 1), (IrqKind::Request, 1)]));
    for (kind, event) in
        [(IrqKind::Error, bench.function.error_event()), (IrqKind::Request, bench.function.request_event())]
    {
        let event = event.unwrap();
        assert!(event.read().is_err());
        bench.host.raise(kind, 0);
        assert!(event.read().is_ok(), "{kind:?}");
    }
    let without = Bench::new();
    assert!(without.function.error_event().is_none() && without.function.request_event().is_none());
}

#[test]
fn f5_intx_that_the_host_refuses_is_asked_for_again() {
    let bench = Bench::running_with(|host| host.host_vectors.store(0, Ordering::SeqCst));
    assert!(bench.host.taken(IrqKind::Intx).is_empty());
    bench.function.intx_event().unwrap().write(1).unwrap();
    bench.function.intx_fired();
    assert!(!bench.line.is_high());
    bench.host.host_vectors.store(1, Ordering::SeqCst);
    bench.root.reset();
    assert_eq!(bench.host.taken(IrqKind::Intx), [0]);
}
