//! How a function is reset (F-4).
//!
//! One of the host: `VFIO_DEVICE_RESET` uses the first of the kernel's methods that the function has. Where that is the
//! one by power state (D3hot and back), the function may keep everything that it was told before: the PCI Power
//! Management specification lets it say that it resets itself, and some say so that do not. A reset of its bus
//! (`VFIO_DEVICE_PCI_HOT_RESET`) is then the better way, if it reaches no function that is not ours.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use crate::function::check::{Bdf, CheckedFunction};
use crate::function::sys::{self, Reached};

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

/// In whose name a function is reset with its bus: the kernel resets no bus on which a function is somebody else's.
pub(crate) trait ResetOwner: Send + Sync {
    /// Whether a function is his.
    fn owns(&self, reached: &Reached) -> bool;

    /// The files that show the kernel whose the functions are: of each group one; none where it knows without.
    fn proof(&self, reached: &[Reached]) -> Vec<Arc<OwnedFd>>;
}

/// The others of `reached` beside `own`, if all of them are the `owner`'s. Its own function needs no proof.
fn others(own: Bdf, reached: &[Reached], owner: &dyn ResetOwner) -> Result<Vec<Bdf>, NoBusReset> {
    let beside = reached.iter().filter(|reached| reached.bdf != own);
    let foreign: Vec<Bdf> = beside.clone().filter(|reached| !owner.owns(reached)).map(|reached| reached.bdf).collect();
    if foreign.is_empty() { Ok(beside.map(|reached| reached.bdf).collect()) } else { Err(NoBusReset::Foreign(foreign)) }
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

/// Resets one function.
pub(crate) struct Resetter {
    own: Bdf,
    /// Whether `VFIO_DEVICE_RESET` can work.
    offered: bool,
    methods: PathBuf,
    owner: Arc<dyn ResetOwner>,
}

impl Resetter {
    pub fn new(checked: &CheckedFunction, device: &File, owner: Arc<dyn ResetOwner>) -> Self {
        let (own, offered) = (checked.bdf(), sys::is_resettable(device));
        Self { own, offered, methods: checked.path().join("reset_method"), owner }
    }

    /// How the function is reset: as things are now, for other functions of its bus may be opened later.
    pub fn way(&self, device: &File) -> ResetWay {
        let methods = fs::read_to_string(&self.methods).ok();
        choose(self.offered, methods.as_deref(), || {
            let reached = sys::reached_with(device).map_err(|_| NoBusReset::NotPossible)?;
            others(self.own, &reached, &*self.owner)
        })
    }

    pub fn reset(&self, device: &File, scope: ResetScope) -> io::Result<()> {
        let bus = || {
            let reached = sys::reached_with(device)?;
            sys::reset_bus(device, &self.owner.proof(&reached))
        };
        reset_by(self.own, &self.way(device), scope, self.offered, bus, || sys::reset(device))
    }
}

#[cfg(test)]
#[path = "reset_test.rs"]
mod reset_test;
