use std::os::unix::fs::symlink;

use vmm_sys_util::tempdir::TempDir;

use super::*;

/// A host with its files in a folder.
struct Host {
    dir: TempDir,
}

impl Host {
    fn new() -> Self {
        let host = Self { dir: TempDir::new().expect("a folder") };
        fs::create_dir_all(host.paths().sys.join("bus/pci/devices")).expect("a folder");
        host.file("dev/vfio/vfio");
        host
    }

    fn paths(&self) -> HostPaths {
        let root = self.dir.as_path();
        HostPaths { sys: root.join("sys"), dev_vfio: root.join("dev/vfio"), dev_iommu: root.join("dev/iommu") }
    }

    fn file(&self, path: &str) {
        let path = self.dir.as_path().join(path);
        fs::create_dir_all(path.parent().expect("it has one")).expect("a folder");
        fs::write(path, "").expect("a file");
    }

    fn function(&self, bdf: &str, driver: Option<&str>, group: Option<u32>) -> Bdf {
        let sys = self.paths().sys;
        let device = sys.join("bus/pci/devices").join(bdf);
        fs::create_dir_all(&device).expect("a folder");
        if let Some(driver) = driver {
            symlink(sys.join("bus/pci/drivers").join(driver), device.join("driver")).expect("a link");
        }
        if let Some(group) = group {
            let folder = sys.join("kernel/iommu_groups").join(group.to_string());
            fs::create_dir_all(folder.join("devices").join(bdf)).expect("a folder");
            symlink(&folder, device.join("iommu_group")).expect("a link");
            self.file(&format!("dev/vfio/{group}"));
        }
        bdf.parse().expect("an address")
    }

    fn refusal(&self, bdf: Bdf) -> String {
        self.paths().check(bdf).expect_err("a refusal").to_string()
    }
}

#[test]
fn bdf_with_and_without_a_domain_parses_and_prints() {
    for (text, shown) in [("00:09.0", "0000:00:09.0"), ("1:2.3", "0000:01:02.3"), ("abcd:EF:1f.7", "abcd:ef:1f.7")] {
        assert_eq!(text.parse::<Bdf>().map(|b| b.to_string()), Ok(shown.to_owned()));
    }
    for text in ["", "9.0", "00:20.0", "00:1f.8", "00:09", "0:0:0:0.0", "00000:00:00.0", "+1:00.0", ":00.0", "00:00.00"]
    {
        assert!(text.parse::<Bdf>().is_err(), "{text}");
    }
}

#[test]
fn b13_an_assignable_function_is_found_with_its_group() {
    let host = Host::new();
    let bdf = host.function("0000:00:09.0", Some("vfio-pci"), Some(3));
    let checked = host.paths().check(bdf).expect("assignable");
    assert_eq!((checked.bdf(), checked.group(), checked.members()), (bdf, GroupId(3), &[bdf][..]));
}

#[test]
fn b13_each_refusal_says_the_cause_and_the_remedy() {
    let host = Host::new();
    let none = "00:1e.0".parse().expect("an address");
    let nvme = host.function("0000:00:09.0", Some("nvme"), Some(3));
    let bare = host.function("0000:00:0a.0", None, Some(4));
    let alone = host.function("0000:00:0b.0", Some("vfio-pci"), None);
    let says = |bdf, words: &[&str]| {
        let message = host.refusal(bdf);
        for word in words {
            assert!(message.contains(word), "`{word}` is not in: {message}");
        }
    };
    says(none, &["no PCI function 0000:00:1e.0", "ls /sys/bus/pci/devices"]);
    says(nvme, &["0000:00:09.0 is bound to nvme", "vfio-pci > /sys/bus/pci/devices/0000:00:09.0/driver_override"]);
    says(bare, &["has no driver", "drivers_probe"]);
    says(alone, &["no IOMMU group", "intel_iommu=on"]);

    let gone = host.function("0000:00:0c.0", Some("vfio-pci"), Some(5));
    fs::remove_file(host.paths().dev_vfio.join("5")).expect("a file");
    says(gone, &["dev/vfio/5 does not exist here", "0000:00:0c.0 is bound", "container", "--device /dev/vfio/5"]);
    fs::remove_file(host.paths().dev_vfio.join("vfio")).expect("a file");
    says(gone, &["dev/vfio/vfio does not exist here", "0000:00:0c.0 is bound", "container"]);
    assert!(!host.refusal(gone).contains("modprobe"), "the driver is loaded");
}

#[test]
fn the_readme_binds_a_function_as_the_message_does() {
    let bdf = "0000:03:00.0".parse().expect("an address");
    let readme = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md"));
    let commands = bind_commands(&bdf).join("\n");
    assert!(readme.contains(&format!("```sh\n{commands}\n")), "README.md lacks:\n{commands}");
}

#[test]
fn the_commands_that_bind_a_function_do_it_with_and_without_a_driver() {
    // The kernel's part is played by files.
    let host = Host::new();
    let sys = host.paths().sys;
    fs::write(sys.join("bus/pci/drivers_probe"), "").expect("a file");
    for (address, driver) in [("0000:00:09.0", Some("nvme")), ("0000:00:0a.0", None)] {
        let bdf = host.function(address, driver, Some(3));
        let device = sys.join("bus/pci/devices").join(address);
        if driver.is_some() {
            let folder = sys.join("bus/pci/drivers/nvme");
            fs::create_dir_all(&folder).expect("a folder");
            fs::remove_file(device.join("driver")).expect("a link");
            symlink(&folder, device.join("driver")).expect("a link");
        }
        let script = bind_command(&bdf).replace("modprobe", "true").replace("/sys/", &format!("{}/", sys.display()));
        let done = std::process::Command::new("sh").args(["-c", &script]).output().expect("a shell");
        assert!(done.status.success() && done.stderr.is_empty(), "{done:?}");
        let read = |path: PathBuf| fs::read_to_string(path).expect("a file");
        assert_eq!(read(device.join("driver_override")), "vfio-pci\n");
        assert_eq!(read(sys.join("bus/pci/drivers_probe")), format!("{address}\n"));
        if driver.is_some() {
            assert_eq!(read(device.join("driver/unbind")), format!("{address}\n"));
        }
    }
}

#[test]
fn b13_c1_a_group_is_viable_only_if_all_its_members_are() {
    let host = Host::new();
    let first = host.function("0000:01:00.0", Some("vfio-pci"), Some(7));
    let second = host.function("0000:01:01.0", None, Some(7));
    host.function("0000:00:1c.0", Some("pcieport"), Some(7));
    let checked = host.paths().check(first).expect("a member without a driver keeps it viable");
    assert_eq!(checked.members().len(), 3);

    let driver = host.paths().sys.join("bus/pci/devices").join(second.to_string()).join("driver");
    symlink("uio_pci_generic", driver).expect("a link");
    let message = host.refusal(first);
    assert!(message.contains("group 7 of 0000:01:00.0 is not viable"), "{message}");
    assert!(message.contains("0000:01:01.0 (uio_pci_generic)"), "{message}");
    assert!(message.contains("echo 0000:01:01.0 > /sys/bus/pci/devices/0000:01:01.0/driver/unbind"), "{message}");
    assert!(!message.contains("pcieport"), "{message}");
}

#[test]
fn b13_memlock_too_small_says_how_much_is_needed() {
    let memlock = Memlock { limit: Some(64 << 20), locked: 1 << 20 };
    assert!(check_memlock(memlock, 63 << 20, 1).is_ok());
    let message = check_memlock(memlock, 512 << 20, 2).expect_err("too small").to_string();
    for word in ["2 host group(s) x 512 MiB", "need 1025 MiB", "may lock 64 MiB", "ulimit -l 1049600", "CAP_IPC_LOCK"] {
        assert!(message.contains(word), "`{word}` is not in: {message}");
    }
    assert!(check_memlock(Memlock { limit: None, locked: 0 }, u64::MAX, 9).is_ok());
}

#[test]
fn b13_a_function_for_iommufd_needs_its_device_file_and_no_group_file() {
    let host = Host::new();
    let bdf = host.function("0000:00:09.0", Some("vfio-pci"), Some(3));
    let refusal = || host.paths().check_for_iommufd(bdf).expect_err("a refusal").to_string();
    assert!(refusal().contains("dev/iommu does not exist") && refusal().contains("backend=type1"), "{}", refusal());
    host.file("dev/iommu");
    assert!(refusal().contains("no device file for 0000:00:09.0"), "{}", refusal());
    // A kernel without CONFIG_VFIO_DEVICE_CDEV.
    let named = "sys/bus/pci/devices/0000:00:09.0/vfio-dev/vfio4";
    host.file(&format!("{named}/uevent"));
    assert!(refusal().contains("no device file"), "{}", refusal());
    host.file(&format!("{named}/dev"));
    assert!(refusal().contains("vfio/devices/vfio4 does not exist here"), "{}", refusal());
    host.file("dev/vfio/devices/vfio4");
    fs::remove_file(host.paths().dev_vfio.join("3")).expect("removed");
    let checked = host.paths().check_for_iommufd(bdf).expect("assignable");
    assert_eq!((checked.bdf(), checked.group()), (bdf, GroupId(3)));
    assert!(host.refusal(bdf).contains("docker run"), "type1 needs the group's");
}

#[test]
fn c1_iommufd_too_wants_the_whole_group() {
    let host = Host::new();
    let bdf = host.function("0000:00:09.0", Some("vfio-pci"), Some(3));
    host.function("0000:00:09.1", Some("e1000e"), Some(3));
    for file in ["dev/iommu", "sys/bus/pci/devices/0000:00:09.0/vfio-dev/vfio4/dev", "dev/vfio/devices/vfio4"] {
        host.file(file);
    }
    fs::create_dir_all(host.paths().sys.join("kernel/iommu_groups/3/devices/0000:00:09.1")).expect("a folder");
    let refused = host.paths().check_for_iommufd(bdf).expect_err("a refusal").to_string();
    assert!(refused.contains("0000:00:09.1 (e1000e)"), "{refused}");
}
