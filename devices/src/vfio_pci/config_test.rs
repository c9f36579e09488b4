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
