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

#[test]
fn f4_nothing_of_the_interrupts_outlives_a_reset() {
    for by_guest in [false, true] {
        let bench = Bench::running();
        let reset = || if by_guest { bench.config16(EXPRESS + 8, 0x8000) } else { bench.root.reset() };
        bench.config32(MSI + 4, 0xfee0_1000);
        bench.config32(MSI + 8, 1);
        bench.config32(MSI + 12, 0x4050);
        bench.config32(MSI + 16, 2);
        bench.config16(MSI + 2, 0x0011);
        reset();
        assert!(!bench.host.live(IrqKind::Msi) && bench.host.live(IrqKind::Intx));
        let registers = [0, 4, 8, 12, 16, 20].map(|offset| bench.config(MSI + offset));
        assert_eq!(registers, [0x0182_0005, 0, 0, 0, 0, 0]);

        bench.config32(0x14, 0x80);
        bench.command(COMMAND_MEMORY);
        bench.vector(1, 0x41, false);
        bench.config16(MSIX + 2, msix::CONTROL_ENABLE | msix::CONTROL_MASK);
        reset();
        assert_eq!(bench.interrupts.count(), 0);
        bench.config32(0x14, 0x80);
        bench.command(COMMAND_MEMORY);
        assert_eq!([0, 8, 12].map(|offset| bench.read(TABLE + 16 + offset)), [0, 0, 1]);
        // Nor is the mask of all.
        bench.vector(0, 0x40, false);
        bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
        bench.host.raise(IrqKind::Msix, 0);
        assert_eq!(bench.delivered(), [0x40]);
    }
}

#[test]
fn f4_a_reset_by_advanced_features_goes_the_same_way() {
    const ADVANCED: u16 = 0xc0;
    let bench = Bench::running_with(|host| {
        host.put(MSI + 1, &[ADVANCED as u8]);
        host.put(ADVANCED, &[CAP_ADVANCED, 0, 6, 3, 0, 0]);
    });
    bench.root.config_write(SID, ADVANCED + 4, &[0]);
    assert!(bench.host.resets.lock().unwrap().is_empty());
    bench.root.config_write(SID, ADVANCED + 4, &[1]);
    assert_eq!(*bench.host.resets.lock().unwrap(), [ResetScope::Function]);
    assert_eq!((bench.slots.mapped(), bench.host.command()), (vec![], 0));
    assert_eq!(bench.host.get(ADVANCED + 4, 1), [0], "the host never sees the reset bit");
}

#[test]
fn f4_without_function_level_reset_its_bit_is_the_hosts() {
    let bench = Bench::running_with(|host| host.put(EXPRESS + 7, &[0]));
    bench.config16(EXPRESS + 8, 0x8010);
    assert!(bench.host.resets.lock().unwrap().is_empty());
    assert_eq!(bench.host.get(EXPRESS + 8, 2), [0x10, 0x80]);
}

#[test]
fn f4_a_reset_that_fails_leaves_the_function_quiet_and_usable() {
    let bench = Bench::running();
    bench.host.no_reset.store(true, Ordering::SeqCst);
    bench.root.reset();
    assert_eq!((bench.slots.mapped(), bench.host.command()), (vec![], 0));
    bench.config32(0x14, 0x80);
    bench.command(COMMAND_MEMORY);
    assert_eq!((bench.slots.mapped(), bench.read(BAR_GPA)), (WINDOWS.to_vec(), 0));
}

#[test]
fn f4_at_first_the_function_is_quiet_whatever_the_host_left() {
    let bench = Bench::with(|host| host.put(COMMAND, &[0x07, 0x04]));
    assert_eq!((bench.host.command(), bench.config(4) & 0xffff), (0, 0));
    assert!(bench.host.live(IrqKind::Intx));
}

#[test]
fn f4_a_function_that_goes_away_leaves_nothing_behind() {
    let bench = Bench::running();
    let Bench { bus, host, slots, .. } = &bench;
    let (bus, host, slots) = (bus.clone(), host.clone(), slots.clone());
    let bar = bench.bar(0);
    drop(bench);
    assert_eq!((host.command(), slots.mapped()), (0, vec![]));
    let mut data = [0; 4];
    assert!(!bus.read(BAR_GPA, &mut data), "its BAR is off the bus");
    bar.read(0x100, &mut data);
    assert_eq!((data, host.accesses.load(Ordering::SeqCst)), ([0xff; 4], 0), "and its gate is closed");
}

#[test]
fn b11_a_quarantined_function_is_reset_alone() {
    let bench = Bench::running();
    bench.host.no_reset.store(true, Ordering::SeqCst);
    assert_eq!(bench.function.quarantine(), Ok(()), "Bus Master is what counts");
    assert_eq!(*bench.host.resets.lock().unwrap(), [ResetScope::Function]);
}

#[test]
fn b11_quarantine_leaves_the_other_bits_of_the_command_register() {
    let bench = Bench::running();
    bench.command(COMMAND_MEMORY | COMMAND_MASTER | 0x0400);
    assert_eq!(bench.function.quarantine(), Ok(()));
    assert_eq!(bench.host.command(), COMMAND_MEMORY | 0x0400);
}

#[test]
fn b11_quarantine_does_not_believe_a_read_or_a_write_that_failed() {
    for cannot_be_read in [true, false] {
        let bench = Bench::running();
        // Nothing to clear where it cannot be written: only the write tells that it is not known.
        bench.command(COMMAND_MEMORY);
        let fails = if cannot_be_read { &bench.host.gone } else { &bench.host.read_only };
        fails.store(true, Ordering::SeqCst);
        assert!(bench.function.quarantine().is_err(), "{cannot_be_read}");
        fails.store(false, Ordering::SeqCst);
    }
}

#[test]
fn f4_a_quiet_function_has_no_memory_no_mastery_and_no_interrupt() {
    for kind in [IrqKind::Intx, IrqKind::Msi, IrqKind::Msix] {
        let bench = Bench::running();
        match kind {
            IrqKind::Msi => bench.config16(MSI + 2, 1),
            IrqKind::Msix => bench.config16(MSIX + 2, msix::CONTROL_ENABLE),
            _ => {}
        }
        assert!(bench.host.live(kind));
        bench.function.quiesce();
        let command = bench.host.command();
        assert_eq!((command, bench.slots.mapped(), bench.host.live(kind)), (COMMAND_INTX_OFF, vec![], false));
        assert!(bench.host.resets.lock().unwrap().is_empty());
    }
}
