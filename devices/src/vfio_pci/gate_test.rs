//! BARs, the gate in front of them, and when they are mapped.

use std::sync::Barrier;

use super::test_bench::*;
use super::*;
use crate::BusDevice;

#[test]
fn f1_bars_are_mapped_only_while_memory_is_enabled() {
    let bench = Bench::running();
    assert_eq!(bench.slots.mapped(), WINDOWS);
    bench.command(COMMAND_MASTER);
    assert_eq!(bench.slots.mapped(), []);
    bench.command(COMMAND_MEMORY);
    assert_eq!(bench.slots.mapped(), WINDOWS);
}

#[test]
fn f1_bars_are_not_mapped_outside_d0() {
    let bench = Bench::running();
    bench.config16(POWER + 4, 3);
    assert_eq!(bench.slots.mapped(), []);
    assert_eq!(bench.read(BAR_GPA), u32::MAX);
    bench.config16(POWER + 4, 0);
    assert_eq!(bench.slots.mapped(), WINDOWS);
    assert_eq!(bench.read(BAR_GPA), 0);
}

#[test]
fn f1_a_function_that_starts_asleep_has_no_memory_until_it_is_awake() {
    let bench = Bench::running_with(|host| host.put(POWER + 4, &[0x03]));
    assert_eq!((bench.slots.mapped(), bench.read(BAR_GPA)), (vec![], u32::MAX));
    let bar = bench.bar(0);
    let mut data = [0; 4];
    bar.read(0, &mut data);
    bar.write(0, &[0; 4]);
    assert_eq!((data, bench.host.accesses.load(Ordering::SeqCst)), ([0xff; 4], 0));
    bench.config16(POWER + 4, 0);
    assert_eq!((bench.slots.mapped(), bench.read(BAR_GPA)), (WINDOWS.to_vec(), 0));
}

#[test]
fn f1_windows_are_not_mapped_over_what_something_else_answers_for() {
    struct Other;
    impl BusDevice for Other {
        fn read(&self, _: u64, data: &mut [u8]) {
            data.fill(0x5a);
        }
        fn write(&self, _: u64, _: &[u8]) {}
    }
    let bench = Bench::new();
    bench.bus.insert(BAR_GPA + 0x3ff0, BAR_GPA + 0x4fff, Arc::new(Other)).unwrap();
    bench.config32(0x14, 0x80);
    bench.command(COMMAND_MEMORY);
    assert_eq!((bench.slots.mapped(), bench.read(BAR_GPA)), (vec![], u32::MAX));
    assert_eq!(bench.read(BAR_GPA + 0x3ff0), 0x5a5a_5a5a);
    bench.config32(0x14, 0x81);
    assert_eq!(bench.slots.mapped().len(), 1);
}

#[test]
fn f1_a_window_that_cannot_be_mapped_stays_trapped() {
    let bench = Bench::running_with(|host| host.no_file.store(true, Ordering::SeqCst));
    bench.host.bar.lock().unwrap()[4] = 0x33;
    assert_eq!((bench.slots.mapped(), bench.read(BAR_GPA + 4)), (vec![], 0x33));
}

#[test]
fn f1_a_window_says_whether_the_guest_may_write() {
    let bench = Bench::new();
    let config = bench.function.config.lock().unwrap();
    let windows = &config.reach.target(0).expect("a BAR").windows;
    assert!(windows.len() == 1 && windows[0].1.writable);
}

#[test]
fn b10_a_window_has_the_dma_buf_of_its_part_of_the_bar() {
    let bench = Bench::new();
    let config = bench.function.config.lock().unwrap();
    let windows = &config.reach.target(0).expect("a BAR").windows;
    for (offset, window) in windows.iter() {
        let dma_buf = window.dma_buf.as_ref().expect("the host makes one");
        assert_eq!(dma_buf.metadata().unwrap().len(), (offset >> 12) << 16 | window.len >> 12);
    }
}

#[test]
fn f1_a_moved_bar_moves_its_windows() {
    let bench = Bench::running();
    bench.config32(0x14, 0x81);
    assert_eq!(bench.slots.mapped(), [(0x81_0000_0000, WINDOWS[0].1, 0x2000)]);
    assert_eq!((bench.read(BAR_GPA), bench.read(0x81_0000_0000)), (u32::MAX, 0));
}

#[test]
fn f1_a_bar_that_waited_for_its_address_is_mapped_when_it_gets_it() {
    let bench = Bench::running();
    let (slots, host, sid) = second(&bench);
    bench.root.config_write(sid, 0x14, &0x80u32.to_le_bytes());
    bench.root.config_write(sid, COMMAND, &COMMAND_MEMORY.to_le_bytes());
    host.bar.lock().unwrap()[0x100] = 0x77;
    assert_eq!((slots.mapped(), bench.read(BAR_GPA + 0x100)), (vec![], 0), "the first has the address");
    bench.config32(0x14, 0x81);
    assert_eq!((slots.mapped(), bench.read(BAR_GPA + 0x100)), (WINDOWS.to_vec(), 0x77));
    // Back over the other one: now this one waits, and gets nothing when it goes away itself.
    bench.config32(0x14, 0x80);
    assert_eq!((bench.slots.mapped(), slots.mapped()), (vec![], WINDOWS.to_vec()));
    bench.command(0);
    bench.root.config_write(sid, COMMAND, &[0; 2]);
    assert_eq!((bench.slots.mapped(), slots.mapped(), bench.read(BAR_GPA)), (vec![], vec![], u32::MAX));
}

#[test]
fn f2_the_gate_is_closed_outside_d0_too() {
    let bench = Bench::running();
    let bar = bench.bar(0);
    bench.config16(POWER + 4, 3);
    let before = bench.host.accesses.load(Ordering::SeqCst);
    let mut data = [0; 4];
    bar.read(0x100, &mut data);
    bar.write(0x100, &[0; 4]);
    assert_eq!((data, bench.host.accesses.load(Ordering::SeqCst)), ([0xff; 4], before));
    // Whatever else is written meanwhile.
    bench.command(COMMAND_MEMORY);
    bench.config32(0x14, 0x81);
    bar.read(0x100, &mut data);
    assert_eq!((data, bench.host.accesses.load(Ordering::SeqCst)), ([0xff; 4], before));
}

#[test]
fn f2_wide_accesses_reach_the_device_once_and_whole() {
    let bench = Bench::running();
    let before = bench.host.accesses.load(Ordering::SeqCst);
    bench.bus.write(BAR_GPA + 0x108, &[1, 2, 3, 4, 5, 6, 7, 8]);
    let mut data = [0; 8];
    bench.bus.read(BAR_GPA + 0x108, &mut data);
    assert_eq!((data, bench.host.accesses.load(Ordering::SeqCst) - before), ([1, 2, 3, 4, 5, 6, 7, 8], 2));
}

#[test]
fn f3_closing_the_gate_waits_for_the_access_in_flight() {
    let bench = Bench::running();
    let bar = bench.bar(0);
    std::thread::scope(|scope| {
        let (inside, is_inside) = std::sync::mpsc::channel();
        let (go_on, goes_on) = std::sync::mpsc::channel::<()>();
        *bench.host.on_access.lock().unwrap() = Some(Box::new(move || {
            inside.send(()).unwrap();
            goes_on.recv().unwrap();
        }));
        scope.spawn(move || bar.read(0, &mut [0; 4]));
        is_inside.recv().unwrap();
        let (started, has_started) = std::sync::mpsc::channel();
        let closing = scope.spawn({
            let bench = &bench;
            move || {
                started.send(std::fs::read_link("/proc/thread-self").unwrap()).unwrap();
                bench.command(0);
            }
        });
        // Until it is through, or waits. The access would see in the first case that memory is off.
        let status = std::path::Path::new("/proc").join(has_started.recv().unwrap()).join("status");
        while !closing.is_finished() {
            let text = std::fs::read_to_string(&status).unwrap_or_default();
            if text.lines().any(|line| line.starts_with("State:") && line.contains("(sleeping)")) {
                break;
            }
            std::thread::yield_now();
        }
        assert!(bench.host.command() & COMMAND_MEMORY != 0, "the device lost its memory under an access");
        go_on.send(()).unwrap();
        closing.join().unwrap();
    });
    *bench.host.on_access.lock().unwrap() = None;
    assert_eq!(bench.host.command(), 0);
}

#[test]
fn f2_while_memory_is_disabled_reads_are_ones_and_writes_are_dropped() {
    let bench = Bench::running();
    bench.write(BAR_GPA + 0x100, 0x1234_5678);
    assert_eq!(bench.read(BAR_GPA + 0x100), 0x1234_5678);
    // What a vCPU that was already on its way to the BAR reaches.
    let bar = bench.bar(0);
    bench.command(0);
    let before = bench.host.accesses.load(Ordering::SeqCst);
    let mut data = [0; 4];
    bar.read(0x100, &mut data);
    bar.write(0x100, &[0; 4]);
    bar.write(0x2000, &[0x55; 4]);
    assert_eq!(data, [0xff; 4]);
    bar.read(0x2000, &mut data);
    assert_eq!(data, [0xff; 4], "the table, too");
    assert_eq!(bench.host.accesses.load(Ordering::SeqCst), before);
    bench.command(COMMAND_MEMORY);
    assert_eq!((bench.read(BAR_GPA + 0x100), bench.read(TABLE)), (0x1234_5678, 0));
}

#[test]
fn f1_what_may_stay_on_stays_on_in_the_host() {
    let bench = Bench::running();
    let mut config = bench.function.config.lock().unwrap();
    // Whatever is written, memory is on in the host's function while it is reached.
    VfioPci::change(&mut config, |change| bench.function.write_host_command(COMMAND_MASTER, change));
    assert_eq!(bench.host.command(), COMMAND_MASTER | COMMAND_MEMORY);
    let closed = config.reach.close();
    bench.function.write_host_command(COMMAND_MASTER, closed.change());
    assert_eq!((bench.host.command(), bench.slots.mapped()), (COMMAND_MASTER, vec![]));
}

#[test]
fn f3_toggling_from_several_threads_lets_no_access_through() {
    const ACCESSORS: usize = 2;
    const TOGGLERS: u16 = 2;
    let bench = Bench::running();
    let bar = bench.bar(0);
    let done = AtomicBool::new(false);
    // Reads of each accessor that reached the device.
    let reached: [AtomicU32; ACCESSORS] = Default::default();
    // Nobody toggles before everybody accesses: under load a thread can come to run when the others are done.
    let all_run = Barrier::new(ACCESSORS + usize::from(TOGGLERS));
    std::thread::scope(|scope| {
        for reached in &reached {
            scope.spawn(|| {
                let access = || {
                    let mut data = [0; 4];
                    bar.read(0x10, &mut data);
                    bar.write(0x2000, &[0; 4]);
                    bar.write(0x20, &[1; 4]);
                    reached.fetch_add(u32::from(data != [0xff; 4]), Ordering::SeqCst);
                };
                access();
                all_run.wait();
                while !done.load(Ordering::SeqCst) {
                    access();
                }
            });
        }
        let togglers: Vec<_> = (0..TOGGLERS)
            .map(|n| {
                let (bench, all_run) = (&bench, &all_run);
                scope.spawn(move || {
                    all_run.wait();
                    for round in 0..300 {
                        bench.command(COMMAND_MEMORY * ((round + n) & 1));
                        match round % 50 {
                            7 => bench.config16(POWER + 4, 3),
                            8 => bench.config16(POWER + 4, 0),
                            30 if n == 0 => bench.root.reset(),
                            31 => bench.config32(0x14, 0x80),
                            _ => {}
                        }
                    }
                })
            })
            .collect();
        togglers.into_iter().for_each(|t| t.join().unwrap());
        bench.config16(POWER + 4, 0);
        bench.config32(0x14, 0x80);
        bench.command(COMMAND_MEMORY);
        // With memory on, every accessor still gets to the device.
        let before = reached.each_ref().map(|reached| reached.load(Ordering::SeqCst));
        while reached.iter().zip(before).any(|(now, before)| now.load(Ordering::SeqCst) == before) {
            std::thread::yield_now();
        }
        done.store(true, Ordering::SeqCst);
    });
    assert_eq!(bench.slots.mapped(), WINDOWS);
}
