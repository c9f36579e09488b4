//! Whether a function can be assigned, found out before anything is opened (B-13). Each refusal says the cause and the
//! command that cures it.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::bridge::limits::Memlock;
use crate::host::GroupId;

/// The address of a PCI function on the host: `[DDDD:]BB:DD.F`, hexadecimal.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Bdf {
    /// PCI domain (segment).
    pub domain: u16,
    /// Bus number.
    pub bus: u8,
    /// Device number, 0 to 31.
    pub device: u8,
    /// Function number, 0 to 7.
    pub function: u8,
}

/// Why a text is not the address of a PCI function.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{0}` is not a PCI address; write [DDDD:]BB:DD.F in hexadecimal, such as 0000:3b:00.0")]
pub struct BdfError(String);

impl FromStr for Bdf {
    type Err = BdfError;

    fn from_str(s: &str) -> Result<Self, BdfError> {
        let parse = || {
            let (rest, function) = s.rsplit_once('.')?;
            let (rest, device) = rest.rsplit_once(':')?;
            let (domain, bus) = rest.rsplit_once(':').unwrap_or(("0000", rest));
            let hex = |text: &str, digits: usize, max: u16| {
                let plain = !text.is_empty() && text.len() <= digits && text.bytes().all(|b| b.is_ascii_hexdigit());
                u16::from_str_radix(text, 16).ok().filter(|n| plain && *n <= max)
            };
            Some(Self {
                domain: hex(domain, 4, u16::MAX)?,
                bus: u8::try_from(hex(bus, 2, 0xff)?).ok()?,
                device: u8::try_from(hex(device, 2, 0x1f)?).ok()?,
                function: u8::try_from(hex(function, 1, 7)?).ok()?,
            })
        };
        parse().ok_or_else(|| BdfError(s.to_owned()))
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

/// The commands that give a function to vfio-pci.
fn bind_command(bdf: &Bdf) -> String {
    bind_commands(bdf).join("; ")
}

/// The same, one by one, as README.md shows them.
fn bind_commands(bdf: &Bdf) -> [String; 4] {
    let device = format!("/sys/bus/pci/devices/{bdf}");
    [
        "modprobe vfio-pci".to_owned(),
        format!("echo vfio-pci > {device}/driver_override"),
        format!("[ -e {device}/driver ] && echo {bdf} > {device}/driver/unbind"),
        format!("echo {bdf} > /sys/bus/pci/drivers_probe"),
    ]
}

fn bound(driver: &Option<String>) -> String {
    driver.as_ref().map_or_else(|| "has no driver".to_owned(), |d| format!("is bound to {d}, not to vfio-pci"))
}

fn list(members: &[(Bdf, String)]) -> String {
    let names: Vec<String> = members.iter().map(|(bdf, driver)| format!("{bdf} ({driver})")).collect();
    names.join(", ")
}

fn bind_all(members: &[(Bdf, String)]) -> String {
    let commands: Vec<String> = members.iter().map(|(bdf, _)| bind_command(bdf)).collect();
    commands.join("; ")
}

const MIB: u64 = 1 << 20;

/// Why a function cannot be assigned. Every message says what cures it.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No function has this address.
    #[error("the host has no PCI function {0}; `ls /sys/bus/pci/devices` shows those it has")]
    NoSuchDevice(Bdf),
    /// Another driver, or none, has the function.
    #[error("{bdf} {}; bind it with: {}", bound(.driver), bind_command(.bdf))]
    NotBound {
        /// The function.
        bdf: Bdf,
        /// Its driver, if it has one.
        driver: Option<String>,
    },
    /// The host has no IOMMU, or it is off.
    #[error(
        "{0} is in no IOMMU group, so the host cannot confine its DMA; turn on VT-d or AMD-Vi in the firmware and boot the \
         host with intel_iommu=on"
    )]
    NoGroup(Bdf),
    /// Other members of the group have drivers of the host.
    #[error(
        "group {group} of {bdf} is not viable, because the host's drivers use other members of it: {}; give these to vfio-pci too: {}",
        list(.others), bind_all(.others)
    )]
    NotViable {
        /// The function.
        bdf: Bdf,
        /// Its group.
        group: GroupId,
        /// The members in the way, with their drivers.
        others: Vec<(Bdf, String)>,
    },
    /// The kernel says that the group is not viable, and sysfs does not show why.
    #[error(
        "the kernel says that group {0} is not viable; bind all functions in /sys/kernel/iommu_groups/{0}/devices to vfio-pci"
    )]
    NotViableKernel(GroupId),
    /// VFIO is not there.
    #[error("{} does not exist, so the host has no VFIO; load it with: modprobe vfio-pci; modprobe vfio_iommu_type1", .0.display())]
    NoVfio(PathBuf),
    /// The host has VFIO, and this process is not given the node: sysfs shows the function bound to it.
    #[error(
        "{} does not exist here, although {bdf} is bound to vfio-pci: this looks like a container; give it the nodes of VFIO, \
         as with: docker run --device /dev/vfio/vfio --device /dev/vfio/{group}",
        .node.display()
    )]
    NoNode {
        /// The node that is missing.
        node: PathBuf,
        /// The function.
        bdf: Bdf,
        /// Its group.
        group: GroupId,
    },
    /// The same of the node that iommufd needs.
    #[error(
        "{} does not exist here, although {bdf} is bound to vfio-pci: this looks like a container; give it the nodes of VFIO and \
         iommufd, as with: docker run --device /dev/iommu --device {}",
        .node.display(), .node.display()
    )]
    NoDeviceNode {
        /// The node that is missing.
        node: PathBuf,
        /// The function.
        bdf: Bdf,
    },
    /// The type1 driver is not there.
    #[error("the host's VFIO has no type1 IOMMU driver; load it with: modprobe vfio_iommu_type1")]
    NoType1,
    /// Not allowed to open the group or the container.
    #[error("no permission to open {}; give it to this user with: sudo chown $USER {}", .0.display(), .0.display())]
    Permission(PathBuf),
    /// Another process has the group.
    #[error("group {0} is in use by another process; `fuser -v /dev/vfio/{0}` shows which")]
    GroupBusy(GroupId),
    /// The function is assigned already.
    #[error("{0} is assigned already; each function can be given once")]
    AssignedTwice(Bdf),
    /// The host cannot remap interrupts, so a device could forge them.
    #[error(
        "the host cannot remap interrupts, so {0} could forge them and VFIO refuses it; turn interrupt remapping on (intel_iommu=on, \
         intremap=on), or accept that with: echo 1 > /sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"
    )]
    UnsafeInterrupts(Bdf),
    /// The host has no iommufd.
    #[error(
        "{} does not exist, so the host has no iommufd (CONFIG_IOMMUFD, Linux 6.6); load it with: modprobe iommufd; or use backend=type1",
        .0.display()
    )]
    NoIommufd(PathBuf),
    /// The host's VFIO opens functions through their groups only.
    #[error(
        "the host's kernel has no device file for {0} (CONFIG_VFIO_DEVICE_CDEV, Linux 6.6), which iommufd needs; use backend=type1"
    )]
    NoDeviceFiles(Bdf),
    /// Another process has the function, or another of its group.
    #[error(
        "{bdf}, or another function of its group {group}, is in use by another process;          `fuser -v /dev/vfio/{group} /dev/vfio/devices/*` shows which"
    )]
    DeviceBusy {
        /// The function.
        bdf: Bdf,
        /// Its group.
        group: GroupId,
    },
    /// The host cannot remap interrupts, as iommufd says it.
    #[error(
        "the host cannot remap interrupts, so {0} could forge them and iommufd refuses it; turn interrupt remapping on (intel_iommu=on,          intremap=on), or accept that with: echo 1 > /sys/module/iommufd/parameters/allow_unsafe_interrupts"
    )]
    UnsafeInterruptsOfIommufd(Bdf),
    /// RLIMIT_MEMLOCK is too small.
    #[error(
        "assigned devices keep the guest's memory locked: {groups} host group(s) x {} MiB of RAM need {} MiB, and this process may lock \
         {} MiB; raise it with: ulimit -l {} (in KiB), or give the program CAP_IPC_LOCK",
        .ram.div_ceil(MIB), .needed.div_ceil(MIB), .limit / MIB, .needed.div_ceil(1024)
    )]
    Memlock {
        /// Groups that each pin all RAM.
        groups: u64,
        /// Bytes of guest RAM.
        ram: u64,
        /// Bytes that must be lockable, with what is locked already.
        needed: u64,
        /// RLIMIT_MEMLOCK in bytes.
        limit: u64,
    },
    /// A file of the host could not be read or opened.
    #[error("{} cannot be used: {source}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// VFIO refused a step.
    #[error("VFIO refused {bdf}: {reason}; see the host's kernel log")]
    Vfio {
        /// The function.
        bdf: Bdf,
        /// What it said.
        reason: String,
    },
}

/// Where the host's files are. Tests lay out their own.
#[derive(Clone, Debug)]
pub struct HostPaths {
    /// `/sys`.
    pub sys: PathBuf,
    /// `/dev/vfio`.
    pub dev_vfio: PathBuf,
    /// `/dev/iommu`.
    pub dev_iommu: PathBuf,
}

impl Default for HostPaths {
    fn default() -> Self {
        Self { sys: "/sys".into(), dev_vfio: "/dev/vfio".into(), dev_iommu: "/dev/iommu".into() }
    }
}

/// A function that sysfs shows to be assignable.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CheckedFunction {
    bdf: Bdf,
    group: GroupId,
    members: Vec<Bdf>,
    path: PathBuf,
}

impl CheckedFunction {
    /// Its address on the host.
    pub fn bdf(&self) -> Bdf {
        self.bdf
    }
    /// Its IOMMU group.
    pub fn group(&self) -> GroupId {
        self.group
    }
    /// All functions of the group, itself included, in ascending order.
    pub fn members(&self) -> &[Bdf] {
        &self.members
    }
    /// Its folder in sysfs.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Drivers of other members that leave a group viable, because they do no DMA of their own: Linux sets
/// `driver_managed_dma`.
const HARMLESS_DRIVERS: [&str; 3] = ["pci-stub", "pcieport", "shpchp"];

/// `vfio-pci` itself or a variant of it for one device (`mlx5_vfio_pci`).
fn is_vfio(driver: &str) -> bool {
    driver.contains("vfio")
}

impl HostPaths {
    /// Whether `bdf` can be assigned by type1, as far as sysfs and the permissions of /dev/vfio tell. Opens nothing.
    pub fn check(&self, bdf: Bdf) -> Result<CheckedFunction, OpenError> {
        let checked = self.check_group(bdf)?;
        for name in ["vfio".to_owned(), checked.group.to_string()] {
            accessible(&self.dev_vfio.join(name)).map_err(|error| not_given(error, &checked, false))?;
        }
        Ok(checked)
    }

    /// The same by iommufd, which opens a function by its own device file.
    pub fn check_for_iommufd(&self, bdf: Bdf) -> Result<CheckedFunction, OpenError> {
        let checked = self.check_group(bdf)?;
        accessible(&self.dev_iommu).map_err(|error| match error {
            OpenError::NoVfio(node) => OpenError::NoIommufd(node),
            error => error,
        })?;
        accessible(&self.device_file(bdf)?).map_err(|error| not_given(error, &checked, true))?;
        Ok(checked)
    }

    /// The device file of `bdf`, if the host's kernel has such.
    pub(crate) fn device_file(&self, bdf: Bdf) -> Result<PathBuf, OpenError> {
        let folder = self.sys.join("bus/pci/devices").join(bdf.to_string()).join("vfio-dev");
        // A kernel without device files names the device, too, but gives it no number.
        let mut named = fs::read_dir(&folder).into_iter().flatten().flatten();
        let named = named.find(|entry| entry.path().join("dev").exists()).ok_or(OpenError::NoDeviceFiles(bdf))?;
        Ok(self.dev_vfio.join("devices").join(named.file_name()))
    }

    /// What is to be said of a function by whatever way it will be opened: of all members of its group (C-1).
    fn check_group(&self, bdf: Bdf) -> Result<CheckedFunction, OpenError> {
        let path = self.sys.join("bus/pci/devices").join(bdf.to_string());
        if !path.exists() {
            return Err(OpenError::NoSuchDevice(bdf));
        }
        let driver = link_name(&path.join("driver"));
        if !driver.as_deref().is_some_and(is_vfio) {
            return Err(OpenError::NotBound { bdf, driver });
        }
        let group_link = path.join("iommu_group");
        let number = link_name(&group_link).and_then(|name| name.parse().ok());
        let group = GroupId(number.ok_or(OpenError::NoGroup(bdf))?);
        let members = self.members(&group_link)?;
        let others: Vec<(Bdf, String)> = members
            .iter()
            .filter(|member| **member != bdf)
            .filter_map(|member| Some((*member, self.driver_of(member)?)))
            .filter(|(_, driver)| !is_vfio(driver) && !HARMLESS_DRIVERS.contains(&driver.as_str()))
            .collect();
        if !others.is_empty() {
            return Err(OpenError::NotViable { bdf, group, others });
        }
        Ok(CheckedFunction { bdf, group, members, path })
    }

    fn driver_of(&self, bdf: &Bdf) -> Option<String> {
        link_name(&self.sys.join("bus/pci/devices").join(bdf.to_string()).join("driver"))
    }

    fn members(&self, group: &Path) -> Result<Vec<Bdf>, OpenError> {
        let path = group.join("devices");
        let entries = fs::read_dir(&path).map_err(|source| OpenError::File { path: path.clone(), source })?;
        // Members that are no PCI functions have no driver that could use their DMA in the group's way.
        let mut members: Vec<Bdf> = entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
        members.sort_unstable();
        Ok(members)
    }
}

/// The last part of where a symbolic link leads.
fn link_name(link: &Path) -> Option<String> {
    Some(fs::read_link(link).ok()?.file_name()?.to_str()?.to_owned())
}

/// The driver is loaded and makes the nodes; whose /dev has none is not the host itself.
fn not_given(error: OpenError, function: &CheckedFunction, by_iommufd: bool) -> OpenError {
    let CheckedFunction { bdf, group, .. } = *function;
    match error {
        OpenError::NoVfio(node) if by_iommufd => OpenError::NoDeviceNode { node, bdf },
        OpenError::NoVfio(node) => OpenError::NoNode { node, bdf, group },
        error => error,
    }
}

/// Whether this process may read and write `path`, without opening it: opening a group has effects.
fn accessible(path: &Path) -> Result<(), OpenError> {
    let Ok(name) = std::ffi::CString::new(path.as_os_str().as_bytes()) else {
        return Err(OpenError::NoVfio(path.into()));
    };
    // SAFETY: `name` is a NUL-terminated string that outlives the call.
    let result = unsafe { libc::faccessat(libc::AT_FDCWD, name.as_ptr(), libc::R_OK | libc::W_OK, libc::AT_EACCESS) };
    if result == 0 {
        return Ok(());
    }
    let source = io::Error::last_os_error();
    match source.kind() {
        io::ErrorKind::NotFound => Err(OpenError::NoVfio(path.into())),
        io::ErrorKind::PermissionDenied => Err(OpenError::Permission(path.into())),
        _ => Err(OpenError::File { path: path.into(), source }),
    }
}

/// Whether this process may lock `ram` bytes once for each of `groups` host groups. On type1 a group stays in its own
/// container, and each container pins all RAM in the identity space (B-12).
pub fn check_memlock(memlock: Memlock, ram: u64, groups: u64) -> Result<(), OpenError> {
    match (memlock.missing(ram, groups), memlock.limit) {
        (Some(missing), Some(limit)) => {
            Err(OpenError::Memlock { groups, ram, needed: limit.saturating_add(missing), limit })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
#[path = "check_test.rs"]
mod check_test;
