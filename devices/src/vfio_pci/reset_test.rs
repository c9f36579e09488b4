//! Resets, and the end of a function that the host does not hold back.

use super::test_bench::*;
use super::*;

#[test]
fn f4_a_guest_reset_takes_the_mappings_and_quiesces_before_it_resets() {
    let bench = Bench::running();
    bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
    bench.root.reset();
    assert_eq!(bench.slots.mapped(), []);
    assert_eq!(*bench.host.resets.lock().unwrap(), [ResetScope::Machine]);
    assert_eq!((bench.host.command(), bench.config(4) & 0xffff, bench.config(0x14)), (0, 0, 0));
    assert_eq!(bench.config(MSIX) >> 16, 3, "MSI-X is disabled");
    assert!(bench.host.live(IrqKind::Intx) && !bench.host.live(IrqKind::Msix));
}

#[test]
fn f4_a_function_level_reset_goes_the_same_way() {
    let bench = Bench::running();
    bench.config16(EXPRESS + 8, 0x8010);
    assert_eq!(*bench.host.resets.lock().unwrap(), [ResetScope::Function], "no other function is reset along");
    assert_eq!(bench.slots.mapped(), []);
    assert_eq!(bench.config(EXPRESS + 8) & 0xffff, 0x0010, "the host never sees the reset bit");
}

#[test]
fn f4_all_functions_are_quiet_before_the_first_is_reset() {
    let bench = Bench::running();
    let (slots, host, sid) = second(&bench);
    bench.root.config_write(sid, 0x14, &0x90u32.to_le_bytes());
    bench.root.config_write(sid, COMMAND, &(COMMAND_MEMORY | COMMAND_MASTER).to_le_bytes());
    bench.root.config_write(sid, MSIX + 2, &msix::CONTROL_ENABLE.to_le_bytes());
    assert!(!slots.mapped().is_empty() && host.live(IrqKind::Msix));
    // The reset of each is one of their bus.
    bench.host.bus.lock().unwrap().push(host.clone());
    bench.root.reset();
    assert_eq!(*host.resets.lock().unwrap(), [ResetScope::Machine]);
}

#[test]
fn f4_a_sleeping_function_is_awake_after_a_reset() {
    let bench = Bench::running();
    bench.config16(POWER + 4, 0x8003);
    let power = || bench.host.config.lock().unwrap()[usize::from(POWER) + 4..][..2].to_vec();
    bench.host.config.lock().unwrap()[usize::from(POWER) + 5] = 0x81;
    assert_eq!(power(), [3, 0x81]);
    bench.root.reset();
    // The fake's reset changes nothing, as one that the device ignores. PME Status is not cleared by waking it.
    assert_eq!(power(), [0, 0x81]);
    bench.config32(0x14, 0x80);
    bench.command(COMMAND_MEMORY);
    assert_eq!(bench.read(BAR_GPA), 0);
}

#[test]
fn b11_a_quarantined_function_never_masters_the_bus_again() {
    let bench = Bench::running();
    assert_eq!(bench.function.quarantine(), Ok(()));
    assert_eq!(bench.host.command() & COMMAND_MASTER, 0);
    bench.command(COMMAND_MEMORY | COMMAND_MASTER);
    assert_eq!(bench.host.command() & COMMAND_MASTER, 0);
    bench.root.reset();
    bench.command(COMMAND_MEMORY | COMMAND_MASTER);
    assert_eq!(bench.host.command() & COMMAND_MASTER, 0);
}

#[test]
fn b11_quarantine_from_inside_an_unmap_does_not_deadlock() {
    let bench = Bench::running();
    let function = Arc::downgrade(&bench.function);
    let hook = move || assert_eq!(function.upgrade().unwrap().quarantine(), Ok(()));
    *bench.slots.on_unmap.lock().unwrap() = Some(Box::new(hook));
    bench.command(COMMAND_MASTER);
    assert_eq!(bench.host.command(), 0);
    *bench.slots.on_unmap.lock().unwrap() = None;
}

#[test]
fn b11_a_bus_master_bit_that_stays_set_is_an_error() {
    let bench = Bench::running();
    bench.host.stuck.store(true, Ordering::SeqCst);
    assert!(bench.function.quarantine().is_err());
}
