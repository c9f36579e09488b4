//! What of configuration space is whose.

use super::test_bench::*;
use super::*;
use crate::pci::config::ROM_ENABLE;
use crate::pci::express::{ENDPOINT, INTEGRATED_ENDPOINT};

/// With an I/O BAR of 32 ports, and what is none: a reserved type of memory, one of I/O, and one without a region.
fn with_ports() -> Bench {
    Bench::with(|host| {
        let mut config = host.config.lock().unwrap();
        (config[0x18], config[0x1c], config[0x20], config[0x24]) = (0x0d, 0x02, 0x01, 0x03);
        drop(config);
        *host.other_bars.lock().unwrap() = [(2, 0x20), (3, 0x1000), (5, 0x20)].into();
    })
}

#[test]
fn f6_io_bars_are_sized_and_others_are_not_there() {
    let bench = with_ports();
    assert_eq!(bench.function.bar_sizes(), [(0, BarKind::Memory64, 0x4000), (2, BarKind::Io, 0x20)]);
    (2..6).for_each(|bar| bench.config32(0x10 + 4 * bar, u32::MAX));
    assert_eq!([2, 3, 4, 5].map(|bar| bench.config(0x10 + 4 * bar)), [0xffff_ffe1, 0, 0, 0]);
}

#[test]
fn f2_ports_are_reached_only_while_io_is_enabled() {
    let bench = with_ports();
    bench.config32(0x18, 0x3000);
    let read = |port: u64| {
        let mut data = [0; 4];
        bench.ports.read(port, &mut data);
        u32::from_le_bytes(data)
    };
    let bar = bench.bar(2);
    let direct = || {
        let mut data = [0; 4];
        bar.read(0x10, &mut data);
        bar.write(0x10, &[0x66; 4]);
        u32::from_le_bytes(data)
    };
    // Memory alone does not open them.
    bench.command(COMMAND_MEMORY);
    let before = bench.host.accesses.load(Ordering::SeqCst);
    assert_eq!((read(0x3000), direct()), (u32::MAX, u32::MAX));
    assert_eq!(bench.host.accesses.load(Ordering::SeqCst), before);
    bench.command(COMMAND_IO);
    assert_eq!(bench.host.command() & 3, COMMAND_IO);
    bench.ports.write(0x3004, &0x1234_5678u32.to_le_bytes());
    bench.ports.write(0x3020, &[0x55; 4]);
    assert_eq!((read(0x3004), read(0x3020), direct(), direct()), (0x1234_5678, u32::MAX, 0, 0x6666_6666));
    // Nor do they open memory.
    let mut memory = [0; 4];
    bench.bar(0).read(0, &mut memory);
    assert_eq!(memory, [0xff; 4]);
    // Asleep, moved, reset.
    bench.config16(POWER + 4, 3);
    assert_eq!((read(0x3004), direct()), (u32::MAX, u32::MAX));
    bench.config16(POWER + 4, 0);
    bench.config32(0x18, 0x4000);
    assert_eq!((read(0x3004), read(0x4004)), (u32::MAX, 0x1234_5678));
    bench.root.reset();
    assert_eq!((read(0x4004), direct(), bench.host.command() & 3, bench.config(0x18)), (u32::MAX, u32::MAX, 0, 1));
}

#[test]
fn f6_ports_that_a_machine_does_not_have_are_decoded_nowhere() {
    let bench = with_ports();
    bench.command(COMMAND_IO);
    for address in [0, 0x1_0000, 0xffff_fff0, 0x7000_3000] {
        bench.config32(0x18, address);
        for port in [0, 0x3000, 0xffe0, 0x1_0000, 0xffff_ffe0, 0x7000_3000] {
            assert!(!bench.ports.read(port, &mut [0]), "{address:#x} at {port:#x}");
        }
    }
    bench.config32(0x18, 0xffe0);
    assert!(bench.ports.read(0xffff, &mut [0]) && !bench.ports.read(0xffdf, &mut [0]));
}

#[test]
fn f6_io_enable_is_there_with_an_io_bar_only() {
    let bench = Bench::new();
    bench.command(COMMAND_IO | COMMAND_MEMORY);
    assert_eq!((bench.config(4) & 3, bench.host.command() & 3), (2, 2));
    let bench = with_ports();
    bench.command(COMMAND_IO | COMMAND_MEMORY);
    assert_eq!((bench.config(4) & 3, bench.host.command() & 3), (3, 3));
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
    assert_eq!(bars, [0xffff_c004, u32::MAX, 0, 0xffff_e001]);
    assert_eq!(bench.config(0x3c) & 0xffff, 0x0115);
}

const ROM_AT: u64 = 0xc080_0000;

#[test]
fn f6_the_rom_is_there_while_it_and_memory_are_enabled_and_is_read_once() {
    let bench = Bench::new();
    bench.config32(ROM, ROM_AT as u32 | ROM_ENABLE);
    assert_eq!((bench.config(ROM), bench.read(ROM_AT)), (ROM_AT as u32 | 1, u32::MAX), "memory is off");
    assert_eq!(bench.host.accesses.load(Ordering::SeqCst), 0);
    bench.command(COMMAND_MEMORY);
    assert_eq!([0, 0x1ffc, 0x2000].map(|at| bench.read(ROM_AT + at)), [0x0302_aa55, 0xfffe_fdfc, u32::MAX]);
    let before = bench.host.accesses.load(Ordering::SeqCst);
    bench.write(ROM_AT + 0x100, 0);
    let mut wide = [0; 8];
    bench.bus.read(ROM_AT + 0x100, &mut wide);
    assert_eq!((wide, bench.host.accesses.load(Ordering::SeqCst)), ([0, 1, 2, 3, 4, 5, 6, 7], before));
    bench.config32(ROM, ROM_AT as u32);
    assert_eq!(bench.read(ROM_AT), u32::MAX, "it is disabled");
    bench.config32(ROM, ROM_AT as u32 | ROM_ENABLE);
    bench.config16(POWER + 4, 3);
    assert_eq!(bench.read(ROM_AT), u32::MAX, "the function is asleep");
    bench.config16(POWER + 4, 0);
    assert_eq!(bench.read(ROM_AT), 0x0302_aa55);
    bench.root.reset();
    assert_eq!((bench.read(ROM_AT), bench.config(ROM)), (u32::MAX, 0));
}

#[test]
fn f2_a_rom_without_an_image_may_have_one_later() {
    let bench = Bench::with(|host| host.rom.lock().unwrap()[..2].fill(0xff));
    bench.config32(ROM, ROM_AT as u32 | ROM_ENABLE);
    bench.command(COMMAND_MEMORY);
    assert_eq!(bench.read(ROM_AT), 0x0302_ffff);
    bench.host.rom.lock().unwrap()[..2].copy_from_slice(&[0x55, 0xaa]);
    assert_eq!(bench.read(ROM_AT), 0x0302_aa55);
}

#[test]
fn f6_a_rom_that_cannot_be_read_is_not_there() {
    let refused: [fn(&FakeHost); 4] = [
        |host| host.rom.lock().unwrap().clear(),
        |host| host.rom.lock().unwrap().truncate(0x1800),
        |host| host.rom.lock().unwrap().truncate(0x400),
        |host| host.put(0, &[0xe4, 0x14, 0x8e, 0x16]),
    ];
    for prepare in refused {
        let bench = Bench::with(prepare);
        bench.config32(ROM, u32::MAX);
        assert_eq!(bench.config(ROM), 0);
    }
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
    // Behind a bridge that lets no requests through it is off in the host, whatever the guest writes.
    let above = |masters| bench.function.path_changed(&Path { masters, ..Path::of_root() });
    above(false);
    assert_eq!((bench.host.command() & COMMAND_MASTER, bench.config(4) & 0x4), (0, 0x4));
    bench.command(0);
    bench.command(COMMAND_MASTER);
    assert_eq!(bench.host.command() & COMMAND_MASTER, 0);
    above(true);
    assert_eq!(bench.host.command() & COMMAND_MASTER, COMMAND_MASTER);
    bench.root.config_write(SID, 0x03, &[0xaa, 0x00, 0x04, 0x00]);
    assert_eq!((bench.host.command(), bench.config(4) & 0xffff), (0x0400, 0x0400));
}

#[test]
fn f6_express_says_where_the_function_is_in_the_guest() {
    let kind = |upstream| {
        let bench = Bench::below(upstream);
        let mut at = bench.config(0x34) as u16 & 0xff;
        while at != 0 && bench.config(at) as u8 != CAP_EXPRESS {
            at = (bench.config(at) >> 8) as u16 & 0xff;
        }
        // What the guest writes there does not change it.
        if at != 0 {
            bench.config16(at + 2, 0);
        }
        (at != 0).then(|| bench.config(at) >> 20 & 0xf)
    };
    let kinds = [Upstream::RootComplex, Upstream::Port, Upstream::Bridge].map(kind);
    assert_eq!(kinds, [Some(INTEGRATED_ENDPOINT.into()), Some(ENDPOINT.into()), None]);
    // A reset that the guest does not see is one all the same.
    let bench = Bench::below(Upstream::Bridge);
    bench.config16(EXPRESS + 8, 0x8000);
    assert_eq!(bench.host.resets.lock().unwrap().len(), 1);
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
