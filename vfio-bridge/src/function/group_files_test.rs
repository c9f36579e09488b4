use std::fs::File;
use std::os::fd::AsRawFd;

use super::*;

fn reached(text: &str, owned_by: OwnedBy) -> Reached {
    Reached { bdf: text.parse().expect("an address"), owned_by }
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
fn f4_a_bus_reset_names_each_group_of_ours_once() {
    let files = GroupFiles::default();
    for group in [9, 7, 5] {
        files.lock().insert(GroupId(group), Arc::new(File::open("/dev/null").expect("a device").into()));
    }
    let file_of = |group| files.lock()[&GroupId(group)].as_raw_fd();
    let group = |group| OwnedBy::Group(GroupId(group));
    let bus = [("00:01.0", 9), ("00:02.0", 7), ("00:03.0", 9), ("00:04.0", 8)];
    let bus = bus.map(|(bdf, number)| reached(bdf, group(number)));
    assert_eq!(bus.map(|reached| files.owns(&reached)), [true, true, true, false]);
    let named: Vec<RawFd> = files.proof(&bus).iter().map(|file| file.as_raw_fd()).collect();
    assert_eq!(named, [file_of(7), file_of(9)]);
    assert_eq!(files.proof(&[]).len(), 0);
}

#[test]
fn f4_who_has_groups_owns_nothing_by_an_iommufd() {
    let files = GroupFiles::default();
    files.lock().insert(GroupId(1), Arc::new(File::open("/dev/null").expect("a device").into()));
    let reached = [OwnedBy::Iommufd, OwnedBy::Others].map(|owned_by| reached("00:01.0", owned_by));
    assert!(!reached.iter().any(|reached| files.owns(reached)));
    assert_eq!(files.proof(&reached).len(), 0);
}
