use super::*;

fn bdf(text: &str) -> Bdf {
    text.parse().expect("an address")
}

fn nobody() -> Result<Vec<Bdf>, NoBusReset> {
    Ok(Vec::new())
}

#[test]
fn f4_a_reset_by_power_state_is_the_last_choice() {
    let own = |method: &str| ResetWay::Function(method.to_owned());
    assert_eq!(choose(true, Some("flr pm bus\n"), nobody), own("flr"));
    assert_eq!(choose(true, Some("bus\n"), nobody), own("bus"));
    assert_eq!(choose(true, None, nobody), own(""), "a kernel that does not name its methods");
    assert_eq!(choose(true, Some("pm bus\n"), nobody), ResetWay::Bus(vec![]));
    assert_eq!(choose(false, Some("\n"), nobody), ResetWay::Bus(vec![]));
    let not = || Err(NoBusReset::NotPossible);
    assert_eq!(choose(true, Some("pm\n"), not), ResetWay::PowerState(NoBusReset::NotPossible));
    assert_eq!(choose(false, Some("pm\n"), not), ResetWay::None(Some(NoBusReset::NotPossible)));
    assert!(choose(true, Some("pm bus"), nobody).is_sure());
    assert!(!choose(true, Some("pm"), not).is_sure() && !choose(false, None, not).is_sure());
    assert!(ResetWay::Process.is_sure() && !ResetWay::None(None).is_sure());
}

#[test]
fn f4_a_bus_is_reset_only_if_every_function_on_it_is_ours() {
    let (own, sibling) = (bdf("0000:3b:00.0"), bdf("0000:3b:00.1"));
    let both = [(GroupId(7), own), (GroupId(8), sibling)];
    assert_eq!(others(own, &both[..1], |_| false), Ok(vec![]), "its own group needs no proof");
    assert_eq!(others(own, &both, |group| group == GroupId(8)), Ok(vec![sibling]));
    let refused = others(own, &both, |group| group == GroupId(7)).expect_err("foreign");
    assert_eq!(refused, NoBusReset::Foreign(vec![sibling]));
    let said = ResetWay::PowerState(refused).to_string();
    assert!(said.contains("power state") && said.contains("0000:3b:00.1") && said.contains("assign"), "{said}");
}

#[test]
fn f4_what_a_bus_reset_reaches_is_read_as_the_kernel_writes_it() {
    let device = |segment: u16, bus: u8, devfn: u8| {
        let [low, high] = segment.to_ne_bytes();
        u32::from_ne_bytes([low, high, bus, devfn])
    };
    let mut words = vec![76, 0, 2, 11, device(0, 0x3b, 0), 12, device(1, 0x3c, 0xfb)];
    // Room that was not needed.
    words.resize(19, 0);
    assert_eq!(reached(&words), [(GroupId(11), bdf("0000:3b:00.0")), (GroupId(12), bdf("0001:3c:1f.3"))]);
    assert_eq!(reached(&[12, 0, 5]), [], "fewer than it says");
    assert_eq!(reached(&[]), []);
}

#[test]
fn f4_the_file_of_a_group_is_found_among_the_open_ones() {
    let node = Path::new("/dev/full");
    assert!(open_file_of(node, &()).is_err(), "not open");
    let file = File::open(node).expect("a device");
    let found = File::from(open_file_of(node, &file).expect("open"));
    assert_eq!(found.metadata().expect("open").rdev(), file.metadata().expect("open").rdev());
}

#[test]
fn ioctl_numbers_are_the_kernels() {
    let numbers = [VFIO_DEVICE_RESET(), VFIO_DEVICE_GET_PCI_HOT_RESET_INFO(), VFIO_DEVICE_PCI_HOT_RESET()];
    assert_eq!(numbers, [0x3b6f, 0x3b70, 0x3b71]);
}

/// What is reset, in order, where the bus and the function answer as said.
fn done(way: &ResetWay, scope: ResetScope, offered: bool, bus: bool) -> (Vec<&'static str>, bool) {
    let done = std::cell::RefCell::new(Vec::new());
    let answer = |what, works: bool| {
        done.borrow_mut().push(what);
        if works { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EIO)) }
    };
    let result = reset_by(bdf("00:01.0"), way, scope, offered, || answer("bus", bus), || answer("function", true));
    (done.into_inner(), result.is_ok())
}

#[test]
fn f4_a_reset_of_one_function_takes_no_other_along() {
    use ResetScope::{Function, Machine};
    let shared = ResetWay::Bus(vec![bdf("0000:3b:00.1")]);
    let alone = ResetWay::Bus(vec![]);
    assert_eq!(done(&shared, Machine, true, true), (vec!["bus"], true));
    assert_eq!(done(&shared, Function, true, true), (vec!["function"], true));
    assert_eq!(done(&shared, Function, false, true), (vec![], false), "there is nothing else");
    assert_eq!(done(&alone, Function, true, true), (vec!["bus"], true));
    assert_eq!(done(&alone, Function, false, true), (vec!["bus"], true));
}

#[test]
fn f4_what_remains_when_a_bus_is_not_reset_is_the_functions_own_reset() {
    let alone = ResetWay::Bus(vec![]);
    assert_eq!(done(&alone, ResetScope::Machine, true, false), (vec!["bus", "function"], true));
    assert_eq!(done(&alone, ResetScope::Machine, false, false), (vec!["bus"], false));
    let own = ResetWay::Function("flr".to_owned());
    assert_eq!(done(&own, ResetScope::Machine, true, true), (vec!["function"], true));
    let power = ResetWay::PowerState(NoBusReset::NotPossible);
    assert_eq!(done(&power, ResetScope::Machine, true, true), (vec!["function"], true));
    let none = ResetWay::None(Some(NoBusReset::NotPossible));
    assert_eq!(done(&none, ResetScope::Machine, false, true), (vec![], false));
    let refused = reset_by(bdf("00:01.0"), &none, ResetScope::Machine, false, || Ok(()), || Ok(())).expect_err("none");
    assert_eq!(refused.kind(), io::ErrorKind::Unsupported);
    assert_eq!(refused.to_string(), "0000:00:01.0 cannot be reset (the host cannot reset its bus)");
}

#[test]
fn f4_a_bus_reset_names_each_group_of_ours_once() {
    let function = |group, text| (GroupId(group), bdf(text));
    let reached = [function(9, "00:01.0"), function(7, "00:02.0"), function(9, "00:03.0"), function(8, "00:04.0")];
    let file = |group: GroupId| (group != GroupId(8)).then_some(group.0 as RawFd * 10);
    assert_eq!(hot_reset(&reached, file), [20, 0, 2, 70, 90]);
    assert_eq!(hot_reset(&[], file), [12, 0, 0]);
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

#[test]
fn f4_each_way_of_a_reset_is_said() {
    let (one, two) = (bdf("0000:3b:00.0"), bdf("0000:3b:00.1"));
    for (way, said) in [
        (ResetWay::Function("flr".to_owned()), "is reset by itself (flr)"),
        (ResetWay::Function(String::new()), "is reset by itself"),
        (ResetWay::Bus(vec![]), "is reset with its bus"),
        (ResetWay::None(Some(NoBusReset::NotPossible)), "cannot be reset (the host cannot reset its bus)"),
        (ResetWay::None(None), "cannot be reset"),
        (ResetWay::Process, "is reset by its process"),
    ] {
        assert_eq!(way.to_string(), said);
    }
    let shared = ResetWay::Bus(vec![one, two]).to_string();
    assert!(shared.contains("0000:3b:00.0, 0000:3b:00.1") && shared.contains("with the machine only"), "{shared}");
}
