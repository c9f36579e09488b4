//! How a function is reset (F-4).
//!
//! One of the host: `VFIO_DEVICE_RESET` uses the first of the kernel's methods that the function has. Where that is the
//! one by power state (D3hot and back), the function may keep everything that it was told before: the PCI Power
//! Management specification lets it say that it resets itself, and some say so that do not. A reset of its bus
//! (`VFIO_DEVICE_PCI_HOT_RESET`) is then the better way, if it reaches no function that is not ours.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vfio_bindings::bindings::vfio::{VFIO_BASE, VFIO_TYPE};
use vfio_ioctls::VfioContainer;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ptr, ioctl_with_ptr};
use vmm_sys_util::ioctl_io_nr;

use crate::function::check::{Bdf, HostPaths};
use crate::host::GroupId;

ioctl_io_nr!(VFIO_DEVICE_RESET, VFIO_TYPE.into(), VFIO_BASE + 11);
ioctl_io_nr!(VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, VFIO_TYPE.into(), VFIO_BASE + 12);
ioctl_io_nr!(VFIO_DEVICE_PCI_HOT_RESET, VFIO_TYPE.into(), VFIO_BASE + 13);

/// Who else is idle while a function is reset.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ResetScope {
    /// Nobody: other functions go on working, so none of them may be reset along.
    Function,
    /// Every function of the virtual machine is quiet and is reset as well.
    Machine,
}

/// How a function is reset.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ResetWay {
    /// `VFIO_DEVICE_RESET`, by this method of the kernel (`flr`, `bus`, ...; empty where the kernel does not say).
    Function(String),
    /// A reset of its bus or slot, which these other functions share. With others, only when the whole machine is
    /// reset.
    Bus(Vec<Bdf>),
    /// `VFIO_DEVICE_RESET` by power state, which the function may survive unchanged.
    PowerState(NoBusReset),
    /// By the process that emulates it.
    Process,
    /// There is none; nor by its bus, where it is on one of the host.
    None(Option<NoBusReset>),
}

impl ResetWay {
    /// Whether the function is certainly as after power-on when it was reset in this way.
    pub fn is_sure(&self) -> bool {
        matches!(self, Self::Function(_) | Self::Bus(_) | Self::Process)
    }
}

impl fmt::Display for ResetWay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Function(method) if method.is_empty() => f.write_str("is reset by itself"),
            Self::Function(method) => write!(f, "is reset by itself ({method})"),
            Self::Bus(others) if others.is_empty() => f.write_str("is reset with its bus"),
            Self::Bus(others) => {
                write!(f, "is reset with its bus, which {} share(s), so with the machine only", list(others))
            }
            Self::PowerState(why) => {
                write!(f, "is reset by its power state only, which it may survive unchanged ({why})")
            }
            Self::Process => f.write_str("is reset by its process"),
            Self::None(None) => f.write_str("cannot be reset"),
            Self::None(Some(why)) => write!(f, "cannot be reset ({why})"),
        }
    }
}

/// Why the bus of a function is not reset.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NoBusReset {
    /// The host cannot: the function is on a root bus, for example.
    NotPossible,
    /// These functions would be reset as well, and are not ours.
    Foreign(Vec<Bdf>),
}

impl fmt::Display for NoBusReset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotPossible => f.write_str("the host cannot reset its bus"),
            Self::Foreign(others) => {
                write!(
                    f,
                    "a reset of its bus would reset {}, not assigned to this guest; assign them as well",
                    list(others)
                )
            }
        }
    }
}

fn list(functions: &[Bdf]) -> String {
    functions.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// The way to reset a function. `offered`: whether `VFIO_DEVICE_RESET` can work. `methods`: the kernel's, in the order
/// it tries them (`reset_method` in sysfs, Linux 5.15), if it says. `bus`: who else a reset of its bus reaches.
fn choose(offered: bool, methods: Option<&str>, bus: impl FnOnce() -> Result<Vec<Bdf>, NoBusReset>) -> ResetWay {
    let first = methods.map(|methods| methods.split_whitespace().next().unwrap_or_default());
    if offered && first != Some("pm") {
        return ResetWay::Function(first.unwrap_or_default().to_owned());
    }
    match bus() {
        Ok(others) => ResetWay::Bus(others),
        Err(why) if offered => ResetWay::PowerState(why),
        Err(why) => ResetWay::None(Some(why)),
    }
}

/// A function that a reset of a bus reaches.
type Reached = (GroupId, Bdf);

/// The devices of a `struct vfio_pci_hot_reset_info` { argsz, flags, count, devices }: each { group: u32, segment: u16,
/// bus: u8, devfn: u8 }.
fn reached(words: &[u32]) -> Vec<Reached> {
    let count = words.get(2).map_or(0, |count| *count as usize);
    let devices = words.get(3..).unwrap_or_default().chunks_exact(2);
    let bdf = |word: u32| {
        let [low, high, bus, devfn] = word.to_ne_bytes();
        Bdf { domain: u16::from_ne_bytes([low, high]), bus, device: devfn >> 3, function: devfn & 7 }
    };
    devices.take(count).map(|words| (GroupId(words[0]), bdf(words[1]))).collect()
}

/// The others of `reached` beside `own`, if the groups of all of them are `ours`.
fn others(own: Bdf, reached: &[Reached], ours: impl Fn(GroupId) -> bool) -> Result<Vec<Bdf>, NoBusReset> {
    let beside = reached.iter().filter(|(_, bdf)| *bdf != own);
    let foreign: Vec<Bdf> = beside.clone().filter(|(group, _)| !ours(*group)).map(|(_, bdf)| *bdf).collect();
    if foreign.is_empty() { Ok(beside.map(|(_, bdf)| *bdf).collect()) } else { Err(NoBusReset::Foreign(foreign)) }
}

/// Resets a function by `way`. With its bus only those are reset along that are quiet. Where that fails or may not be,
/// `VFIO_DEVICE_RESET` is what remains, if it is `offered`.
fn reset_by(
    own: Bdf,
    way: &ResetWay,
    scope: ResetScope,
    offered: bool,
    bus: impl FnOnce() -> io::Result<()>,
    function: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    if let ResetWay::Bus(others) = way
        && (others.is_empty() || scope == ResetScope::Machine)
    {
        match bus() {
            Err(e) if offered => log::debug!("{own}: its bus was not reset: {e}"),
            result => return result,
        }
    }
    if offered { function() } else { Err(io::Error::new(io::ErrorKind::Unsupported, format!("{own} {way}"))) }
}

/// `struct vfio_pci_hot_reset` { argsz, flags, count, group_fds }, all 32-bit words: with the file of each group that
/// is reached and ours, once.
fn hot_reset(reached: &[Reached], file: impl Fn(GroupId) -> Option<RawFd>) -> Vec<u32> {
    let files: BTreeMap<GroupId, u32> =
        reached.iter().filter_map(|(group, _)| Some((*group, file(*group)?.cast_unsigned()))).collect();
    // At most one a function, of which there are no more than 2^16.
    let count = files.len() as u32;
    [(3 + count) * 4, 0, count].into_iter().chain(files.into_values()).collect()
}

/// The files of the groups that this process has: by them the kernel knows whose functions a bus reset reaches.
#[derive(Debug, Default)]
pub(crate) struct GroupFiles(Mutex<BTreeMap<GroupId, OwnedFd>>);

impl GroupFiles {
    /// `group` is open, in `container`. Without its file no bus with a function of it can be reset.
    pub fn add(&self, group: GroupId, container: &VfioContainer) {
        let node = HostPaths::default().dev_vfio.join(group.to_string());
        match open_file_of(&node, container) {
            Ok(file) => {
                self.lock().insert(group, file);
            }
            Err(e) => log::debug!("the file of group {group} was not found, so no bus of it can be reset: {e}"),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<GroupId, OwnedFd>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A duplicate of the file that this process opened `node` as. A group can be opened once only, and vfio-ioctls keeps
/// its file to itself; `_owner` is what keeps that file open meanwhile.
fn open_file_of<T>(node: &Path, _owner: &T) -> io::Result<OwnedFd> {
    let device = fs::metadata(node)?.rdev();
    for entry in fs::read_dir("/proc/self/fd")? {
        let path = entry?.path();
        let Some(number) = path.file_name().and_then(|name| name.to_str()?.parse::<RawFd>().ok()) else { continue };
        // The folder's own file is among them, and others may be closed meanwhile.
        let Ok(metadata) = fs::metadata(&path) else { continue };
        if metadata.file_type().is_char_device() && metadata.rdev() == device {
            // SAFETY: the file of that number is open: it is a file of the device, and `_owner` holds the only one.
            let file = unsafe { BorrowedFd::borrow_raw(number) };
            return file.try_clone_to_owned();
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

/// Resets one function.
pub(crate) struct Resetter {
    own: Bdf,
    /// Whether `VFIO_DEVICE_RESET` can work.
    offered: bool,
    methods: std::path::PathBuf,
    groups: Arc<GroupFiles>,
}

impl Resetter {
    pub fn new(own: Bdf, folder: &Path, offered: bool, groups: Arc<GroupFiles>) -> Self {
        Self { own, offered, methods: folder.join("reset_method"), groups }
    }

    /// How the function is reset: as things are now, for other functions of its bus may be opened later.
    pub fn way(&self, device: &File) -> ResetWay {
        let methods = fs::read_to_string(&self.methods).ok();
        choose(self.offered, methods.as_deref(), || {
            let reached = reached_with(device).map_err(|_| NoBusReset::NotPossible)?;
            let groups = self.groups.lock();
            others(self.own, &reached, |group| groups.contains_key(&group))
        })
    }

    pub fn reset(&self, device: &File, scope: ResetScope) -> io::Result<()> {
        let function = || {
            // SAFETY: the call takes no argument.
            check(unsafe { ioctl(device, VFIO_DEVICE_RESET()) })
        };
        reset_by(self.own, &self.way(device), scope, self.offered, || self.reset_bus(device), function)
    }

    fn reset_bus(&self, device: &File) -> io::Result<()> {
        let reached = reached_with(device)?;
        let groups = self.groups.lock();
        let words = hot_reset(&reached, |group| Some(groups.get(&group)?.as_raw_fd()));
        // SAFETY: the words are `argsz` bytes that live until the call returns; the kernel only reads them.
        check(unsafe { ioctl_with_ptr(device, VFIO_DEVICE_PCI_HOT_RESET(), words.as_ptr()) })
    }
}

/// More than functions that one reset can reach: 32 devices with 8 functions on each of the 256 buses of a segment.
const MOST_REACHED: usize = 1 << 16;

/// Whom a reset of the function's bus reaches, itself included. An error where the host cannot reset it.
fn reached_with(device: &File) -> io::Result<Vec<Reached>> {
    reached_by(|words| {
        // SAFETY: `words` has `argsz` bytes, and the kernel writes no more than that.
        check(unsafe { ioctl_with_mut_ptr(device, VFIO_DEVICE_GET_PCI_HOT_RESET_INFO(), words.as_mut_ptr()) })
    })
}

/// Asks with ever more room for the answer, whose first word says how much there is.
fn reached_by(mut ask: impl FnMut(&mut [u32]) -> io::Result<()>) -> io::Result<Vec<Reached>> {
    let mut room = 8;
    loop {
        let mut words = vec![0u32; 3 + 2 * room];
        words[0] = u32::try_from(words.len() * 4).map_err(io::Error::other)?;
        match ask(&mut words) {
            Ok(()) => return Ok(reached(&words)),
            Err(e) if e.raw_os_error() == Some(libc::ENOSPC) && room < MOST_REACHED => {
                room = (words[2] as usize).max(2 * room).min(MOST_REACHED);
            }
            Err(e) => return Err(e),
        }
    }
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
#[path = "reset_test.rs"]
mod reset_test;
