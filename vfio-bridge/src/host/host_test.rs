use super::*;
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
