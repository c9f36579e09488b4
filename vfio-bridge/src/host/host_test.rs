use super::*;
use crate::bridge::guest_map::{GuestMap, Region};
use crate::host::model::{Kernel, Model};

#[test]
fn each_group_has_its_host() {
    let small = Kernel { entries: 1, ..Kernel::new(39) };
    let (one, two) = (Model::new(small, &[GroupId(1)]), Model::new(Kernel::new(48), &[GroupId(2)]));
    let hosts = Hosts::new(vec![one.clone(), two.clone()]);
    let [first, second, nobody] = [1, 2, 3].map(ContainerId);
    assert_eq!([1, 2, 3].map(|n| hosts.container(GroupId(n))), [Some(first), Some(second), None]);
    assert_eq!([first, second, nobody].map(|c| hosts.name(c)), ["model", "model", "none"]);
    assert_eq!([first, second, nobody].map(|c| hosts.limits(c).entries), [1, 65_535, 0]);

    // SAFETY: the model never uses the address.
    let guest = GuestMap::new(vec![unsafe { Region::ram(0, 1 << 20, 1 << 45, None) }.expect("whole pages")]);
    let guest = guest.expect("one region");
    let mem = guest.host_mem(0, 4096).expect("RAM");
    let maps = [0, 8192].map(|iova| Map { iova, mem, perm: Perm::Read });
    let mut told = Vec::new();
    hosts.map_all(second, &maps, &mut |result| told.push(result.map_err(|refused| refused.cause)));
    hosts.map_all(first, &maps, &mut |result| told.push(result.map_err(|refused| refused.cause)));
    hosts.map_all(nobody, &maps, &mut |result| told.push(result.map_err(|refused| refused.cause)));
    let (limit, other) = (Err(RefusalCause::Limit), Err(RefusalCause::Other));
    assert_eq!(told, [Ok(()), Ok(()), Ok(()), limit, other, other]);
    hosts.map(second, 16_384, mem, Perm::Read).expect("room");
    assert_eq!(hosts.map(nobody, 0, mem, Perm::Read).expect_err("nobody").cause, RefusalCause::Other);
    assert_eq!(hosts.unmap(second, UnmapRange::All).expect("unmapped"), 3 * 4096);
    assert_eq!(one.contents(GroupId(1)).len(), 1, "the other host's stay");
    assert!(hosts.unmap(nobody, UnmapRange::All).is_err());
}

#[test]
fn b11_each_errno_of_a_map_has_its_cause() {
    let causes = [libc::ENOSPC, libc::ENOMEM, libc::EINVAL, libc::EFAULT, libc::EEXIST, libc::EPERM];
    let expected = [
        RefusalCause::Limit,
        RefusalCause::Memlock,
        RefusalCause::Range,
        RefusalCause::Target,
        RefusalCause::Other,
        RefusalCause::Other,
    ];
    assert_eq!(causes.map(|errno| MapRefused::from_errno(errno).cause), expected);
    assert_eq!(MapRefused::from_errno(libc::EPERM).source.raw_os_error(), Some(libc::EPERM));
}

#[test]
fn groups_of_the_kernel_and_others_are_told_apart() {
    assert_eq!((GroupId(7).of_kernel(), GroupId(7).to_string()), (Some(7), "7".to_owned()));
    let user = GroupId::of_user_function(3);
    assert_eq!((user.of_kernel(), user.to_string()), (None, "vfio-user3".to_owned()));
}

#[test]
fn groups_of_processes_are_none_of_the_kernels() {
    let last_of_kernel = GroupId(FIRST_OF_USER_FUNCTIONS - 1);
    assert_eq!(last_of_kernel.of_kernel(), Some(u32::MAX >> 1));
    assert_eq!(GroupId::of_user_function(0).of_kernel(), None);
    assert_ne!(GroupId::of_user_function(0), GroupId::of_user_function(1));
}
