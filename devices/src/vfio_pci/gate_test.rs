//! BARs, the gate in front of them, and when they are mapped.

use std::sync::Barrier;

use super::test_bench::*;
use super::*;

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
fn f1_a_moved_bar_moves_its_windows() {
    let bench = Bench::running();
    bench.config32(0x14, 0x81);
    assert_eq!(bench.slots.mapped(), [(0x81_0000_0000, 0, 0x2000)]);
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
fn f2_while_memory_is_disabled_reads_are_ones_and_writes_are_dropped() {
    let bench = Bench::running();
    bench.write(BAR_GPA + 0x100, 0x1234_5678);
    assert_eq!(bench.read(BAR_GPA + 0x100), 0x1234_5678);
    // What a vCPU that was already on its way to the BAR reaches.
    let bar = bench.function.bars.memory[0].as_ref().unwrap().target.device.clone();
    bench.command(0);
    let before = bench.host.accesses.load(Ordering::SeqCst);
    let mut data = [0; 4];
    bar.read(0x100, &mut data);
    bar.write(0x100, &[0; 4]);
    bar.write(0x2000, &[0; 4]);
    assert_eq!(data, [0xff; 4]);
    assert_eq!(bench.host.accesses.load(Ordering::SeqCst), before);
    bench.command(COMMAND_MEMORY);
    assert_eq!(bench.read(BAR_GPA + 0x100), 0x1234_5678);
}

#[test]
fn f3_toggling_from_several_threads_lets_no_access_through() {
    const ACCESSORS: usize = 2;
    const TOGGLERS: u16 = 2;
    let bench = Bench::running();
    let bar = bench.function.bars.memory[0].as_ref().unwrap().target.device.clone();
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
