use super::*;
use crate::function::sys::OwnedBy;
use crate::host::GroupId;

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

/// Has the files of these groups.
struct Groups(&'static [u32]);

impl ResetOwner for Groups {
    fn owns(&self, reached: &Reached) -> bool {
        matches!(reached.owned_by, OwnedBy::Group(group) if self.0.contains(&group.0))
    }
    fn proof(&self, _: &[Reached]) -> Vec<Arc<OwnedFd>> {
        Vec::new()
    }
}

/// Has no group: the kernel says what is bound to the same iommufd.
struct Iommufd;

impl ResetOwner for Iommufd {
    fn owns(&self, reached: &Reached) -> bool {
        reached.owned_by == OwnedBy::Iommufd
    }
    fn proof(&self, _: &[Reached]) -> Vec<Arc<OwnedFd>> {
        Vec::new()
    }
}

#[test]
fn f4_a_bus_is_reset_only_if_every_function_on_it_is_ours() {
    let (own, sibling) = (bdf("0000:3b:00.0"), bdf("0000:3b:00.1"));
    let of_group = |bdf, group| Reached { bdf, owned_by: OwnedBy::Group(GroupId(group)) };
    let both = [of_group(own, 7), of_group(sibling, 8)];
    assert_eq!(others(own, &both[..1], &Groups(&[])), Ok(vec![]), "its own group needs no proof");
    assert_eq!(others(own, &both, &Groups(&[8])), Ok(vec![sibling]));
    let refused = others(own, &both, &Groups(&[7])).expect_err("foreign");
    assert_eq!(refused, NoBusReset::Foreign(vec![sibling]));
    let said = ResetWay::PowerState(refused).to_string();
    assert!(said.contains("power state") && said.contains("0000:3b:00.1") && said.contains("assign"), "{said}");
}

#[test]
fn f4_a_bus_is_reset_without_a_group_if_every_function_on_it_is_the_iommufds() {
    let (own, sibling) = (bdf("0000:3b:00.0"), bdf("0000:3b:00.1"));
    let beside = |owned_by| [Reached { bdf: own, owned_by: OwnedBy::Iommufd }, Reached { bdf: sibling, owned_by }];
    assert_eq!(others(own, &beside(OwnedBy::Iommufd), &Iommufd), Ok(vec![sibling]));
    assert_eq!(others(own, &beside(OwnedBy::Others), &Iommufd), Err(NoBusReset::Foreign(vec![sibling])));
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
