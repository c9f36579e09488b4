use super::*;

#[test]
fn ioctl_numbers_are_the_kernels() {
    assert_eq!((VFIO_DEVICE_GET_INFO(), VFIO_DEVICE_SET_IRQS()), (0x3b6b, 0x3b6e));
    let numbers = [VFIO_DEVICE_RESET(), VFIO_DEVICE_GET_PCI_HOT_RESET_INFO(), VFIO_DEVICE_PCI_HOT_RESET()];
    assert_eq!(numbers, [0x3b6f, 0x3b70, 0x3b71]);
}

#[test]
fn f5_fewer_vectors_than_were_asked_for_is_an_error() {
    assert!(irqs_were_set(0).is_ok());
    for only in [1, 7, i32::MAX] {
        assert_eq!(irqs_were_set(only).expect_err("fewer").raw_os_error(), Some(libc::ENOSPC));
    }
    assert!(irqs_were_set(-1).is_err());
}

#[test]
fn f5_a_request_for_interrupts_is_laid_out_as_the_kernel_reads_it() {
    // argsz, flags, index, start, count, and an eventfd or -1 for each vector.
    let set = irq_set(IrqKind::Msix, SIGNAL, 3, 2, &[9, -1]);
    assert_eq!(set, Some(vec![28, 0x24, 2, 3, 2, 9, u32::MAX]));
    assert_eq!(irq_set(IrqKind::Msi, DISABLE, 0, 0, &[]), Some(vec![20, 0x21, 1, 0, 0]));
    assert_eq!(irq_set(IrqKind::Intx, MASK, 0, 1, &[]), Some(vec![20, 0x09, 0, 0, 1]));
    assert_eq!(irq_set(IrqKind::Intx, UNMASK, 0, 1, &[]), Some(vec![20, 0x11, 0, 0, 1]));
    assert_eq!(irq_set(IrqKind::Intx, UNMASK, 0, usize::MAX, &[]), None);
}

fn device(segment: u16, bus: u8, devfn: u8) -> u32 {
    let [low, high] = segment.to_ne_bytes();
    u32::from_ne_bytes([low, high, bus, devfn])
}

fn bdf(text: &str) -> Bdf {
    text.parse().expect("an address")
}

#[test]
fn f4_what_a_bus_reset_reaches_is_read_as_the_kernel_writes_it() {
    let of_group = |text, group| Reached { bdf: bdf(text), owned_by: OwnedBy::Group(GroupId(group)) };
    let mut words = vec![76, 0, 2, 11, device(0, 0x3b, 0), 12, device(1, 0x3c, 0xfb)];
    // Room that was not needed.
    words.resize(19, 0);
    assert_eq!(reached(&words), [of_group("0000:3b:00.0", 11), of_group("0001:3c:1f.3", 12)]);
    assert_eq!(reached(&[12, 0, 5]), [], "fewer than it says");
    assert_eq!(reached(&[]), []);
}

#[test]
fn f4_what_a_bus_reset_reaches_is_told_by_devids_to_who_has_an_iommufd() {
    // VFIO_PCI_HOT_RESET_FLAG_DEV_ID. An id of the iommufd; bound by nobody, in a group of the iommufd's; of others.
    let words = [36, 1, 3, 5, device(0, 1, 0), 0, device(0, 1, 1), u32::MAX, device(0, 1, 2)];
    let owned_by: Vec<OwnedBy> = reached(&words).iter().map(|reached| reached.owned_by).collect();
    assert_eq!(owned_by, [OwnedBy::Iommufd, OwnedBy::Iommufd, OwnedBy::Others]);
    // VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED besides: all are its own.
    assert_eq!(reached(&[20, 3, 1, 5, device(0, 1, 0)])[0].owned_by, OwnedBy::Iommufd);
}

#[test]
fn f4_a_bus_reset_is_laid_out_as_the_kernel_reads_it() {
    assert_eq!(hot_reset(&[70, 90]), [20, 0, 2, 70, 90]);
    assert_eq!(hot_reset(&[]), [12, 0, 0]);
}

#[test]
fn f4_a_bus_with_many_functions_is_asked_for_with_more_room() {
    let mut rooms = Vec::new();
    let many = reached_by(|words| {
        assert_eq!(words[0] as usize, 4 * words.len());
        rooms.push(words.len());
        words[2] = 100;
        if words.len() < 203 {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        words[3..].chunks_exact_mut(2).take(100).for_each(|device| device[0] = 5);
        Ok(())
    });
    assert_eq!((many.expect("all").len(), rooms), (100, vec![19, 203]));
    // A host that never has enough is not asked for ever, and another error ends it at once.
    let mut asked = 0;
    let never = reached_by(|words| {
        asked += 1;
        words[2] = 0;
        Err(io::Error::from_raw_os_error(libc::ENOSPC))
    });
    assert!(never.is_err() && asked < 20, "{asked} times");
    let mut asked = 0;
    let refused = reached_by(|_| {
        asked += 1;
        Err(io::Error::from_raw_os_error(libc::ENODEV))
    });
    assert_eq!((refused.expect_err("none").raw_os_error(), asked), (Some(libc::ENODEV), 1));
}
