//! What of configuration space is whose.

use super::test_bench::*;
use super::*;

#[test]
fn f6_io_bars_are_not_offered_and_named() {
    let bench = Bench::with(|host| {
        let mut config = host.config.lock().unwrap();
        // An I/O BAR, and a type that is reserved; BAR 4 says I/O and has nothing behind it.
        config[0x18] = 0x01;
        config[0x1c] = 0x02;
        config[0x20] = 0x01;
        drop(config);
        *host.other_bars.lock().unwrap() = [(2, 0x20), (3, 0x1000)].into();
    });
    assert_eq!(bench.function.io_bars(), [2]);
    assert_eq!(bench.function.bar_sizes(), [(0, BarKind::Memory64, 0x4000)]);
    bench.config32(0x18, u32::MAX);
    assert_eq!(bench.config(0x18), 0);
}

#[test]
fn f6_identity_is_the_hosts_and_bars_rom_line_and_topology_are_ours() {
    let bench = Bench::new();
    assert_eq!(bench.config(0), 0x0010_1b36);
    assert_eq!(bench.config(0x0c) >> 16 & 0x80, 0, "not multi-function here");
    for offset in [0x10, 0x14, 0x18, 0x30] {
        bench.config32(offset, u32::MAX);
    }
    let bars = [0x10, 0x14, 0x18, 0x30].map(|offset| bench.config(offset));
    assert_eq!(bars, [0xffff_c004, u32::MAX, 0, 0]);
    assert_eq!(bench.config(0x3c) & 0xffff, 0x0115);
}

#[test]
fn f6_ats_is_hidden() {
    let bench = Bench::new();
    assert_eq!((bench.config(0x100), bench.config(0x140), bench.config(0x144)), (0x0001_0001, 0, 0));
}

#[test]
fn f6_bus_master_is_forwarded_and_an_unaligned_write_reaches_every_field() {
    let bench = Bench::new();
    bench.command(COMMAND_MASTER);
    assert_eq!(bench.host.command() & COMMAND_MASTER, COMMAND_MASTER);
    bench.root.config_write(SID, 0x03, &[0xaa, 0x00, 0x04, 0x00]);
    assert_eq!((bench.host.command(), bench.config(4) & 0xffff), (0x0400, 0x0400));
}

#[test]
fn f6_capabilities_that_the_host_does_not_serve_are_hidden() {
    let bench = Bench::with(|host| host.counts.lock().unwrap().extend([(IrqKind::Msi, 0), (IrqKind::Msix, 0)]));
    let mut seen = Vec::new();
    let mut at = bench.config(0x34) as u16 & 0xff;
    while at != 0 {
        let header = bench.config(at);
        seen.push(header as u8);
        at = (header >> 8) as u16 & 0xff;
    }
    assert_eq!(seen, [CAP_POWER, CAP_EXPRESS]);
    bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
    bench.config16(MSI + 2, 1);
    assert!(bench.host.live(IrqKind::Intx));
}

#[test]
fn f6_a_bar_that_pci_does_not_allow_is_refused() {
    // The register of the BAR, its number, its size.
    for (register, bar, size) in [(0x00, 2, 0x18), (0x00, 2, 0x8), (0x00, 2, 0x1_0000_0000), (0x0c, 5, 0x1000)] {
        let host = FakeHost::new(Arc::default());
        host.put(BAR0 + 4 * u16::from(bar), &[register]);
        host.other_bars.lock().unwrap().insert(bar, size);
        match function_of(host) {
            Err(VfioPciError::BarSize { bar: b, size: s }) => assert_eq!((b, s), (bar, size)),
            other => panic!("{:?}", other.map(drop)),
        }
    }
    for (register, bar, size) in [(0x00, 5, 0x10), (0x08, 2, 0x8000_0000), (0x0c, 4, 0x20_0000_0000)] {
        let host = FakeHost::new(Arc::default());
        host.put(BAR0 + 4 * u16::from(bar), &[register]);
        host.other_bars.lock().unwrap().insert(bar, size);
        let function = function_of(host).unwrap();
        assert_eq!(function.bar_sizes()[1], (bar, BarKind::of(register.into()).unwrap(), size));
    }
}

#[test]
fn f6_the_upper_half_of_a_bar_is_no_bar() {
    let bench = Bench::with(|host| {
        host.other_bars.lock().unwrap().insert(1, 0x1000);
    });
    assert_eq!(bench.function.bar_sizes().len(), 1);
}

#[test]
fn f6_reads_across_ours_and_the_hosts_find_both() {
    let bench = Bench::new();
    bench.host.put(0x3c, &[0x66, 0x77, 0x88, 0x99]);
    assert_eq!(bench.config(0x3c), 0x9988_0115);
    bench.host.put(STATUS, &[0x10, 0x20]);
    bench.command(COMMAND_MASTER);
    assert_eq!(bench.config(4), 0x2010_0004);
    let mut part = [0];
    bench.root.config_read(SID, 5, &mut part);
    assert_eq!(part, [0]);
}

#[test]
fn f6_a_write_across_command_and_status_reaches_both() {
    let bench = Bench::new();
    bench.config32(COMMAND, 0x5678_ffff);
    assert_eq!(bench.host.get(STATUS, 2), [0x78, 0x56]);
    assert_eq!(bench.config(4) & 0xffff, 0x07fe, "no I/O, and nothing that is reserved");
    assert_eq!(bench.host.command(), 0x07fe);
    bench.root.config_write(SID, COMMAND + 1, &[0]);
    assert_eq!(bench.host.command(), 0x00fe);
}

#[test]
fn f6_what_is_not_ours_is_forwarded_as_it_is() {
    let bench = Bench::new();
    bench.config32(0x2c, 0x1122_3344);
    bench.root.config_write(SID, 0xe1, &[1, 2]);
    bench.root.config_write(SID, 0x145, &[7]);
    assert_eq!((bench.host.get(0x2c, 4), bench.host.get(0xe1, 2)), (vec![0x44, 0x33, 0x22, 0x11], vec![1, 2]));
    assert_eq!(bench.host.get(0x145, 1), [0x55], "hidden");
    assert_eq!(bench.host.get(MSIX + 3, 1), [0], "nor does the host see our MSI-X");
    bench.config16(MSIX + 2, 0xffff);
    assert_eq!((bench.config(MSIX) >> 16, bench.host.get(MSIX + 2, 2)), (0xc003, vec![3, 0]));
}

#[test]
fn f6_a_small_configuration_space_ends_where_it_ends() {
    let bench = Bench::with(|host| host.config_size.store(0x100, Ordering::SeqCst));
    // Nothing of what would be a list of extended capabilities is looked at, and nothing of it is ours.
    assert_eq!(bench.config(0x140), 0x0001_000f);
}

#[test]
fn f6_parts_of_registers_that_do_something_do_it() {
    let bench = Bench::running();
    bench.root.config_write(SID, MSIX + 3, &[0x80]);
    assert!(bench.host.live(IrqKind::Msix));
    bench.root.config_write(SID, MSIX + 2, &[0xff]);
    assert!(bench.host.live(IrqKind::Msix), "the size is read-only");
    bench.root.config_write(SID, MSIX + 3, &[0]);
    assert!(!bench.host.live(IrqKind::Msix));

    bench.root.config_write(SID, POWER + 5, &[0x03]);
    assert_eq!(bench.slots.mapped(), WINDOWS, "that is no power state");
    bench.config32(POWER + 4, 0x0000_0001);
    assert_eq!(bench.slots.mapped(), [], "D1 is not D0");
    bench.config32(POWER + 4, 0);

    bench.root.config_write(SID, EXPRESS + 8, &[0x80]);
    assert!(bench.host.resets.lock().unwrap().is_empty());
    bench.root.config_write(SID, EXPRESS + 9, &[0x80]);
    assert_eq!(*bench.host.resets.lock().unwrap(), [ResetScope::Function]);
}

#[test]
fn f6_the_first_of_two_equal_capabilities_counts() {
    let bench = Bench::running_with(|host| {
        host.put(MSI + 1, &[0xc0]);
        host.put(0xc0, &[CAP_MSIX, 0xd0, 3, 0, 0, 0x10, 0, 0, 0, 0x18, 0, 0]);
        host.put(0xd0, &[CAP_MSI, 0, 0x00, 0x00]);
    });
    bench.config16(0xc2, msix::CONTROL_ENABLE);
    bench.config16(0xd2, 1);
    assert!(bench.host.live(IrqKind::Intx));
    bench.vector(0, 0x40, false);
    assert_eq!(bench.read(TABLE + 8), 0x40);
}
