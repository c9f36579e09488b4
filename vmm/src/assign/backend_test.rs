use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use vfio_bridge::HostPaths;
use vmm_sys_util::tempdir::TempDir;

use super::*;

/// A host whose functions 00:0N.0 are in group N; some are given by type1, some by iommufd.
struct Host(TempDir);

fn file(path: &Path) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, "").unwrap();
}

impl Host {
    fn new() -> Self {
        let host = Self(TempDir::new().unwrap());
        file(&host.0.as_path().join("dev/vfio/vfio"));
        file(&host.0.as_path().join("dev/iommu"));
        host
    }

    fn function(&self, number: u32, group: u32, type1: bool, iommufd: bool) -> Bdf {
        let (root, name) = (self.0.as_path(), format!("0000:00:{number:02x}.0"));
        let device = root.join("sys/bus/pci/devices").join(&name);
        let folder = root.join("sys/kernel/iommu_groups").join(group.to_string());
        fs::create_dir_all(folder.join("devices").join(&name)).unwrap();
        fs::create_dir_all(&device).unwrap();
        symlink(folder, device.join("iommu_group")).unwrap();
        symlink("/drivers/vfio-pci", device.join("driver")).unwrap();
        if type1 {
            file(&root.join(format!("dev/vfio/{group}")));
        }
        if iommufd {
            file(&device.join(format!("vfio-dev/vfio{number}/dev")));
            file(&root.join(format!("dev/vfio/devices/vfio{number}")));
        }
        name.parse().unwrap()
    }

    fn choose(&self, asked: &[(Bdf, Option<Backend>)]) -> Result<Vec<Chosen>, Error> {
        let root = self.0.as_path();
        let paths =
            HostPaths { sys: root.join("sys"), dev_vfio: root.join("dev/vfio"), dev_iommu: root.join("dev/iommu") };
        let candidate = |&(bdf, asked): &(Bdf, Option<Backend>)| Candidate {
            bdf,
            asked,
            type1: paths.check(bdf),
            iommufd: paths.check_for_iommufd(bdf),
        };
        choose(asked.iter().map(candidate).collect())
    }

    fn chosen(&self, asked: &[(Bdf, Option<Backend>)]) -> Vec<Backend> {
        self.choose(asked).unwrap().iter().map(|chosen| chosen.backend).collect()
    }
}

const TYPE1: Option<Backend> = Some(Backend::Type1);
const IOMMUFD: Option<Backend> = Some(Backend::Iommufd);

#[test]
fn b12_several_groups_share_one_pinning_and_one_group_has_the_cheaper_maps() {
    let host = Host::new();
    let [a, b] = [1, 2].map(|n| host.function(n, n, true, true));
    let same = host.function(3, 1, true, true);
    assert_eq!(host.chosen(&[(a, None)]), [Backend::Type1]);
    assert_eq!(host.chosen(&[(a, None), (same, None)]), [Backend::Type1; 2], "it is one group");
    assert_eq!(host.chosen(&[(a, None), (b, None)]), [Backend::Iommufd; 2]);
    // One that is asked for by type1 has its own pinning whatever the other has.
    assert_eq!(host.chosen(&[(a, TYPE1), (b, None)]), [Backend::Type1; 2]);
    assert_eq!(host.chosen(&[(a, IOMMUFD), (b, None)]), [Backend::Iommufd; 2]);
    assert_eq!(host.chosen(&[(a, IOMMUFD)]), [Backend::Iommufd]);
}

#[test]
fn b13_a_host_without_one_of_both_leaves_the_other() {
    let host = Host::new();
    let (a, b) = (host.function(1, 1, true, false), host.function(2, 2, false, true));
    let c = host.function(3, 3, true, false);
    assert_eq!(host.chosen(&[(a, None), (c, None)]), [Backend::Type1; 2]);
    assert_eq!(host.chosen(&[(a, None), (b, None)]), [Backend::Type1, Backend::Iommufd]);
    assert_eq!(host.choose(&[(b, None)]).unwrap()[0].why, "the host has no type1 for it");
    let refused = |asked: &[_]| host.choose(asked).unwrap_err().to_string();
    assert!(refused(&[(a, IOMMUFD)]).contains("no device file for 0000:00:01.0"));
    assert!(refused(&[(b, TYPE1)]).contains("dev/vfio/2 does not exist"));
    let neither = host.function(4, 4, false, false);
    assert!(refused(&[(neither, None)]).contains("dev/vfio/4 does not exist"));
    assert!(refused(&[(neither, IOMMUFD)]).contains("no device file"));
    assert!(refused(&[("00:1e.0".parse().unwrap(), None)]).contains("no PCI function 0000:00:1e.0"));
}

#[test]
fn c1_the_functions_of_a_group_are_assigned_by_one_interface() {
    let host = Host::new();
    let [a, b] = [1, 2].map(|n| host.function(n, 1, true, true));
    let refused = host.choose(&[(a, TYPE1), (b, IOMMUFD)]).unwrap_err().to_string();
    assert!(refused.contains("group 1") && refused.contains("backend="), "{refused}");
    assert_eq!(host.chosen(&[(a, None), (b, IOMMUFD)]), [Backend::Iommufd; 2]);
    // One of them has no device file, so the group has no iommufd.
    let c = host.function(3, 1, true, false);
    assert_eq!(host.chosen(&[(a, None), (c, None)]), [Backend::Type1; 2]);
}
