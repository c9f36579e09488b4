//! MSI and MSI-X.

use vtd::Msi;

use super::test_bench::*;
use super::*;

#[test]
fn f5_one_more_vector_loses_no_interrupt_of_the_others() {
    for noresize in [false, true] {
        let bench = Bench::running();
        bench.host.noresize.store(noresize, Ordering::SeqCst);
        bench.vector(0, 0x40, false);
        bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
        let enables = bench.host.enables.load(Ordering::SeqCst);
        bench.host.raise(IrqKind::Msix, 0);
        // What comes for the new one before it is taken is the device's to send.
        bench.host.raise(IrqKind::Msix, 3);
        bench.vector(3, 0x43, false);
        assert_eq!(bench.delivered(), [0x40, 0x43]);
        bench.host.raise(IrqKind::Msix, 3);
        assert_eq!(bench.delivered(), [0x43]);
        assert_eq!(bench.host.enables.load(Ordering::SeqCst), enables, "nothing is disabled to add one");
    }
}

#[test]
fn f5_a_vector_costs_nothing_until_the_guest_unmasks_it() {
    for noresize in [false, true] {
        let bench = Bench::running();
        bench.host.noresize.store(noresize, Ordering::SeqCst);
        let took = |vectors: &[usize]| {
            assert_eq!((bench.host.taken(IrqKind::Msix), bench.interrupts.count()), (vectors.to_vec(), vectors.len()));
        };
        bench.config16(MSIX + 2, msix::CONTROL_ENABLE | msix::CONTROL_MASK);
        bench.vector(2, 0x42, false);
        took(&[]);
        assert!(bench.host.live(IrqKind::Msix), "the function sees that MSI-X is enabled all the same");
        bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
        took(&[2]);
        bench.vector(2, 0x42, true);
        let (sets, enables) = (&bench.host.sets, &bench.host.enables);
        let before = (sets.load(Ordering::SeqCst), enables.load(Ordering::SeqCst));
        bench.vector(2, 0x42, false);
        took(&[2]);
        let after = (sets.load(Ordering::SeqCst), enables.load(Ordering::SeqCst));
        assert_eq!(before, after, "masking and unmasking is no business of the host's");
        bench.vector(0, 0x40, false);
        took(&[0, 2]);
        bench.config16(MSIX + 2, 0);
        took(&[]);
    }
}

#[test]
fn f5_all_that_is_unmasked_at_once_is_one_change() {
    let bench = Bench::running();
    (0..4).for_each(|index| bench.vector(index, 0x40, index == 1));
    let before = (bench.interrupts.changes.load(Ordering::SeqCst), bench.host.sets.load(Ordering::SeqCst));
    bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
    let after = (bench.interrupts.changes.load(Ordering::SeqCst), bench.host.sets.load(Ordering::SeqCst));
    // Of the host: the enabling, and one for each run of neighbours.
    assert_eq!((after.0 - before.0, after.1 - before.1), (1, 3));
    bench.config16(MSIX + 2, msix::CONTROL_ENABLE | msix::CONTROL_MASK);
    bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
    assert_eq!(bench.interrupts.changes.load(Ordering::SeqCst), after.0 + 2);
}

/// What a bench delivers when each of its four vectors fires.
fn all_fire(bench: &Bench) -> Vec<u32> {
    (0..4).for_each(|index| bench.host.raise(IrqKind::Msix, index));
    bench.delivered()
}

#[test]
fn f5_a_host_that_is_short_of_vectors_costs_only_those_beyond() {
    for noresize in [false, true] {
        for at_once in [false, true] {
            for (has, works) in [(0, &[][..]), (1, &[0x40]), (3, &[0x40, 0x41, 0x42])] {
                let bench = Bench::running();
                bench.host.noresize.store(noresize, Ordering::SeqCst);
                bench.host.host_vectors.store(has, Ordering::SeqCst);
                if !at_once {
                    bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
                }
                (0..4).for_each(|index| bench.vector(index, 0x40 + index as u32, false));
                bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
                if has > 0 {
                    assert_eq!(all_fire(&bench), works, "{noresize} {at_once} {has}");
                }
                assert_eq!(bench.interrupts.count(), works.len(), "what cannot be used is given back");
            }
        }
    }
}

#[test]
fn f5_a_shortage_of_routes_costs_only_the_vectors_beyond_and_is_over_when_there_are_some() {
    let bench = Bench::running();
    *bench.interrupts.left.lock().unwrap() = Some(2);
    bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
    (0..4).for_each(|index| bench.vector(index, 0x40 + index as u32, false));
    assert_eq!(all_fire(&bench), [0x40, 0x41]);
    assert_eq!(bench.read(PBA), 0b1100, "the device has the others pending");
    *bench.interrupts.left.lock().unwrap() = None;
    bench.vector(3, 0x43, true);
    bench.vector(3, 0x43, false);
    assert_eq!(bench.delivered(), [0x43], "that came meanwhile");
    assert_eq!(bench.read(PBA), 0b100);
}

#[test]
fn f5_a_masked_vector_is_pending_and_delivered_once_at_unmask() {
    // Never unmasked before: the device keeps it. Masked again: we do.
    for taken in [false, true] {
        let bench = Bench::running();
        bench.vector(1, 0x41, !taken);
        bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
        bench.vector(1, 0x41, true);
        assert_eq!(bench.read(PBA), 0);
        bench.host.raise(IrqKind::Msix, 1);
        assert_eq!(bench.read(PBA), 2);
        assert_eq!(bench.read(PBA), 2, "reading does not clear it");
        assert!(bench.delivered().is_empty());
        bench.write(TABLE + 16 + 12, 0);
        assert_eq!(bench.delivered(), [0x41]);
        assert_eq!(bench.read(PBA), 0);
        bench.write(TABLE + 16 + 12, 1);
        bench.write(TABLE + 16 + 12, 0);
        assert!(bench.delivered().is_empty());
    }
}

#[test]
fn f5_signals_before_and_after_a_look_at_the_pending_bits_are_one_message() {
    let bench = Bench::running();
    bench.vector(1, 0x41, false);
    bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
    bench.vector(1, 0x41, true);
    bench.host.raise(IrqKind::Msix, 1);
    assert_eq!(bench.read(PBA), 2);
    bench.host.raise(IrqKind::Msix, 1);
    bench.write(TABLE + 16 + 12, 0);
    assert_eq!(bench.delivered(), [0x41]);
}

#[test]
fn f5_the_function_mask_masks_all_and_keeps_what_came() {
    let bench = Bench::running();
    bench.vector(0, 0x40, false);
    bench.vector(1, 0x41, true);
    for taken in [false, true] {
        bench.config16(MSIX + 2, msix::CONTROL_ENABLE | msix::CONTROL_MASK);
        assert_eq!(bench.host.taken(IrqKind::Msix).contains(&0), taken);
        assert_eq!(bench.read(PBA), 2 * u32::from(taken));
        bench.host.raise(IrqKind::Msix, 0);
        bench.host.raise(IrqKind::Msix, 1);
        assert_eq!(bench.read(PBA), 3);
        assert!(bench.delivered().is_empty());
        bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
        assert_eq!(bench.delivered(), [0x40]);
        assert_eq!(bench.read(PBA), 2);
    }
}

#[test]
fn f5_the_table_is_ours_and_pieces_of_wide_accesses_find_their_owner() {
    let bench = Bench::running();
    let before = bench.host.accesses.load(Ordering::SeqCst);
    bench.bus.write(TABLE, &[0x00, 0x10, 0xe0, 0xfe, 0, 0, 0, 0]);
    let mut wide = [0; 8];
    bench.bus.read(TABLE, &mut wide);
    assert_eq!(wide, [0x00, 0x10, 0xe0, 0xfe, 0, 0, 0, 0]);
    assert_eq!(bench.read(TABLE + 12), 1, "comes up masked");
    bench.write(PBA, u32::MAX);
    assert_eq!(bench.read(PBA), 0);
    assert_eq!(bench.host.accesses.load(Ordering::SeqCst), before);
    bench.write(TABLE + 0x40, 7);
    assert_eq!(bench.read(TABLE + 0x40), 7, "past the table the device answers");
    assert_eq!(bench.host.accesses.load(Ordering::SeqCst), before + 2);
}

#[test]
fn f5_msi_vectors_are_in_the_low_bits_of_the_data_and_masks_hold() {
    let bench = Bench::running();
    bench.config32(MSI + 4, 0xfee0_1000);
    bench.config32(MSI + 12, 0x4050);
    bench.config32(MSI + 16, 0x2);
    bench.config16(MSI + 2, 0x0011);
    assert!(!bench.host.live(IrqKind::Intx));
    bench.host.raise(IrqKind::Msi, 0);
    bench.host.raise(IrqKind::Msi, 1);
    assert_eq!(bench.delivered(), [0x4050]);
    assert_eq!(bench.config(MSI + 20), 2);
    bench.config32(MSI + 16, 0);
    assert_eq!(bench.delivered(), [0x4051]);
    bench.config16(MSI + 2, 0);
    assert!(bench.host.live(IrqKind::Intx), "the legacy interrupt is back");
}

#[test]
fn f5_the_head_of_the_msi_capability_is_never_written_on_the_host() {
    let bench = Bench::running();
    let head = bench.config(MSI) & 0xffff;
    bench.config32(MSI + 4, 0xfee0_1000);
    for vector in [0x50, 0x60] {
        bench.config32(MSI + 12, vector);
        // Enable, in one access with the id and the link, which are read-only.
        bench.config32(MSI, 0x0001_0000 | !head & 0xffff);
        assert_eq!(bench.config(MSI) & 0x0001_ffff, 0x0001_0000 | head);
        assert!(bench.host.live(IrqKind::Msi));
        bench.host.raise(IrqKind::Msi, 0);
        assert_eq!(bench.delivered(), [vector]);
    }
}

#[test]
fn f5_disabling_forgets_what_was_pending() {
    let bench = Bench::running();
    bench.vector(0, 0x40, false);
    bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
    bench.vector(0, 0x40, true);
    bench.host.raise(IrqKind::Msix, 0);
    bench.config16(MSIX + 2, 0);
    bench.vector(0, 0x40, false);
    bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
    assert!(bench.delivered().is_empty());
}

#[test]
fn f5_msi_takes_no_more_vectors_than_there_are() {
    let bench = Bench::running();
    bench.config32(MSI + 4, 0xfee0_1000);
    bench.config32(MSI + 12, 0x40ff);
    // 32 of 2.
    bench.config16(MSI + 2, 0x0051);
    assert_eq!((bench.host.taken(IrqKind::Msi), bench.interrupts.count()), (vec![0, 1], 2));
    bench.host.raise(IrqKind::Msi, 0);
    bench.host.raise(IrqKind::Msi, 1);
    assert_eq!(bench.delivered(), [0x40fe, 0x40ff]);
    assert_eq!(bench.config(MSI) >> 16, 0x01d3, "it reads as written");
}

#[test]
fn f5_msi_can_be_used_with_fewer_vectors_and_changed() {
    let bench = Bench::running();
    bench.config32(MSI + 4, 0xfee0_1000);
    bench.config32(MSI + 12, 0x4051);
    bench.config16(MSI + 2, 0x0001);
    assert_eq!(bench.host.taken(IrqKind::Msi), [0]);
    bench.host.raise(IrqKind::Msi, 0);
    assert_eq!(bench.delivered(), [0x4051], "all of the data is the guest's");
    bench.config16(MSI + 2, 0x0011);
    assert_eq!(bench.host.taken(IrqKind::Msi), [0, 1]);
    bench.config32(MSI + 12, 0x4061);
    bench.host.raise(IrqKind::Msi, 0);
    bench.host.raise(IrqKind::Msi, 1);
    assert_eq!(bench.delivered(), [0x4060, 0x4061]);
}

#[test]
fn f5_msi_has_registers_where_its_kind_has_them() {
    // Neither 64-bit nor maskable; 64-bit; maskable; both. Where the data and the mask are.
    for (control, data_at, mask_at) in
        [(0x02u16, 8, None), (0x82, 12, None), (0x102, 8, Some(12)), (0x182, 12, Some(16))]
    {
        let bench = Bench::running_with(|host| host.put(MSI, &[CAP_MSI, 0, control as u8, (control >> 8) as u8]));
        bench.config32(MSI + 4, u32::MAX);
        assert_eq!(bench.config(MSI + 4), 0xffff_fffc);
        bench.config32(MSI + 4, 0xfee0_1000);
        if data_at == 12 {
            bench.config32(MSI + 8, 0x0000_0002);
        }
        bench.config16(MSI + data_at, 0x4050);
        if let Some(at) = mask_at {
            bench.config32(MSI + at, u32::MAX);
            assert_eq!(bench.config(MSI + at), 3, "two vectors");
            bench.config32(MSI + at + 4, u32::MAX);
            assert_eq!(bench.config(MSI + at + 4), 0, "read-only");
            bench.config32(MSI + at, 1);
        }
        bench.config16(MSI + 2, 0xff8f);
        assert_eq!(bench.config(MSI) >> 16, u32::from(control & 0x18e | 1), "only Enable and the number are writable");
        bench.config16(MSI + 2, 0x0011);
        bench.host.raise(IrqKind::Msi, 0);
        bench.host.raise(IrqKind::Msi, 1);
        let address = if data_at == 12 { 0x2_fee0_1000 } else { 0xfee0_1000 };
        let sent = |data| Msi { address, data };
        let wanted = if mask_at.is_some() { vec![sent(0x4051)] } else { vec![sent(0x4050), sent(0x4051)] };
        assert_eq!(bench.interrupts.take(), wanted, "{control:#x}");
    }
}

#[test]
fn f5_a_msi_capability_that_does_not_fit_is_the_hosts() {
    let bench = Bench::with(|host| {
        host.put(0x34, &[0xf0]);
        host.put(0xf0, &[CAP_MSI, 0, 0x82, 0x01]);
    });
    bench.config16(0xf2, 1);
    assert!(!bench.host.live(IrqKind::Msi));
}

#[test]
fn f5_each_kind_of_msi_capability_fits_up_to_the_end_of_the_space() {
    // Control register, and how long such a capability is.
    for (control, len) in [(0x02u16, 10), (0x82, 14), (0x102, 20), (0x182, 24)] {
        for at in (0xe0u16..0xf8).step_by(4) {
            let bench = Bench::with(|host| {
                host.put(0x34, &[at as u8]);
                host.put(at, &[CAP_MSI, 0, control as u8, (control >> 8) as u8]);
            });
            bench.config32(at + 4, 0xfee0_0000);
            bench.config16(at + 2, 1);
            assert_eq!(bench.host.live(IrqKind::Msi), at + len <= 0x100, "{control:#x} at {at:#x}");
        }
    }
}

#[test]
fn f5_a_message_is_what_the_entry_says() {
    let bench = Bench::running();
    bench.vector(0, 0x1234_5678, false);
    bench.write(TABLE, 0xfee0_1007);
    bench.write(TABLE + 4, 3);
    bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
    bench.host.raise(IrqKind::Msix, 0);
    assert_eq!(bench.interrupts.take(), [Msi { address: 0x3_fee0_1004, data: 0x1234_5678 }]);
    // Rewritten while it is unmasked.
    bench.write(TABLE + 8, 0x99);
    bench.host.raise(IrqKind::Msix, 0);
    assert_eq!(bench.delivered(), [0x99]);
}

#[test]
fn f5_the_table_takes_parts_of_words_and_keeps_reserved_bits_clear() {
    let bench = Bench::running();
    bench.write(TABLE + 0x18, 0x1111_1111);
    bench.bus.write(TABLE + 0x19, &[0xaa]);
    bench.bus.write(TABLE + 0x1a, &[0xcc, 0xdd]);
    assert_eq!(bench.read(TABLE + 0x18), 0xddcc_aa11);
    let mut part = [0; 2];
    bench.bus.read(TABLE + 0x1a, &mut part);
    assert_eq!(part, [0xcc, 0xdd]);
    bench.write(TABLE + 0x1c, 0xffff_fffe);
    assert_eq!(bench.read(TABLE + 0x1c), 0);
    bench.write(TABLE + 0x1c, u32::MAX);
    assert_eq!(bench.read(TABLE + 0x1c), 1);
    // Over its end: the last word of entry 3, and the device's first one behind.
    bench.bus.write(TABLE + 0x3c, &[0xfe, 0xff, 0xff, 0xff, 0x77, 0, 0, 0]);
    let mut wide = [0; 8];
    bench.bus.read(TABLE + 0x3c, &mut wide);
    assert_eq!(wide, [0, 0, 0, 0, 0x77, 0, 0, 0]);
    assert_eq!(bench.host.bar.lock().unwrap()[0x2040], 0x77);
}

#[test]
fn f5_the_table_is_in_its_bar_only() {
    let bench = Bench::running_with(|host| *host.other_bars.lock().unwrap() = [(2, 0x4000)].into());
    bench.host.bar.lock().unwrap()[0x2000..0x2004].copy_from_slice(&[1, 2, 3, 4]);
    let mut data = [0; 4];
    bench.bar(2).read(0x2000, &mut data);
    assert_eq!(data, [1, 2, 3, 4]);
    bench.bar(2).write(0x300c, &[9, 0, 0, 0]);
    assert_eq!(bench.host.bar.lock().unwrap()[0x300c], 9);
}

#[test]
fn f5_vectors_that_the_host_does_not_have_are_not_there() {
    let bench = Bench::running_with(|host| host.counts.lock().unwrap().push((IrqKind::Msix, 2)));
    for index in 0..4 {
        bench.vector(index, 0x40 + index as u32, false);
    }
    assert_eq!((bench.read(TABLE + 0x18), bench.read(TABLE + 0x28)), (0x41, u32::MAX));
    bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
    assert_eq!(bench.host.taken(IrqKind::Msix), [0, 1]);
    assert_eq!(bench.function.vectors(), (bench.root.requester(SID), 2));
}

#[test]
fn f5_pending_bits_of_many_vectors_are_where_they_belong() {
    let bench = Bench::running_with(|host| {
        host.put(MSIX + 2, &[69]);
        host.counts.lock().unwrap().push((IrqKind::Msix, 70));
    });
    assert_eq!(bench.function.vectors().1, 70);
    bench.vector(1, 0x41, false);
    bench.vector(66, 0x42, false);
    bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
    bench.vector(1, 0x41, true);
    bench.vector(66, 0x42, true);
    // Taken: ours. Not taken: the device's.
    for index in [1, 9, 66, 69] {
        bench.host.raise(IrqKind::Msix, index);
    }
    assert_eq!([0, 4, 8, 12].map(|offset| bench.read(PBA + offset)), [0x202, 0, 0x24, 0]);
    let mut byte = [0];
    bench.bus.read(PBA + 1, &mut byte);
    assert_eq!(byte, [2]);
    // What the device says of vectors that there are not is not seen.
    bench.host.bar.lock().unwrap()[0x3008..0x3010].fill(0xff);
    assert_eq!([8, 12].map(|offset| bench.read(PBA + offset)), [0x3f, 0]);
}

#[test]
fn f5_pending_bits_of_msi_are_ours_or_the_devices_and_none_while_it_is_off() {
    let bench = Bench::running();
    bench.config32(MSI + 12, 0x4050);
    bench.host.put(MSI + 20, &[3]);
    assert_eq!(bench.config(MSI + 20), 0, "it is off");
    bench.host.put(MSI + 20, &[0]);
    bench.config32(MSI + 16, 2);
    bench.config16(MSI + 2, 0x0011);
    bench.config32(MSI + 16, 3);
    assert_eq!(bench.config(MSI + 20), 0);
    bench.host.raise(IrqKind::Msi, 0);
    assert_eq!(bench.config(MSI + 20), 1);
    bench.host.raise(IrqKind::Msi, 1);
    assert_eq!(bench.config(MSI + 20), 3);
    bench.config32(MSI + 16, 0);
    let mut sent = bench.delivered();
    sent.sort_unstable();
    assert_eq!(sent, [0x4050, 0x4051]);
}

#[test]
fn f5_where_the_table_is_is_read_from_the_capability() {
    let layout = Layout::new(0xc000 | 64, 0x0000_2003, 0x0001_0005);
    assert_eq!(layout, Layout { count: 65, table: (3, 0x2000..0x2410), pba: (5, 0x1_0000..0x1_0010) });
    assert_eq!(layout.trapped(3).collect::<Vec<_>>(), [&(0x2000..0x2410)]);
    assert_eq!(layout.trapped(0).count(), 0);
    assert_eq!(Layout::new(0x07ff, 0, 0x8000).pba.1, 0x8000..0x8100);
}
