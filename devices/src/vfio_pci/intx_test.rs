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
fn f5_enabling_messages_lowers_the_line() {
    let bench = Bench::running();
    bench.host.raise(IrqKind::Intx, 0);
    bench.function.intx_fired();
    bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
    assert!(!bench.line.is_high() && !bench.host.live(IrqKind::Intx));
    bench.config16(MSIX + 2, 0);
    assert!(bench.host.live(IrqKind::Intx));
}
