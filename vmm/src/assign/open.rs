//! Functions are opened, and the bridge to their host IOMMU is made.

use std::collections::BTreeSet;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{kvm_create_device, kvm_device_type_KVM_DEV_TYPE_VFIO};
use kvm_ioctls::VmFd;
use vfio_bridge::vfio_user::{UserEndpoint, UserFunction, UserOptions, VfioUser};
use vfio_bridge::{
    Bdf, Bridge, Function, GroupId, GuestMap, HostIommu, Iommufd, Limits, Software, Trace, TracedHost, Type1,
    VfioDeviceFd,
};

use super::Error;
use super::check::{Checked, check_ram};
use super::quarantine::Breaker;
use crate::config::{Backend, MachineConfig, UserSocket, VtdOption};
use crate::kvm::memory::Ram;
use crate::kvm::vm::call;
use crate::machine::control::Control;

/// The functions, open, and the bridge to their host IOMMU.
pub struct Assigned {
    /// What the units tell of.
    pub bridge: Arc<Bridge>,
    /// The guest-physical map that it has: all RAM.
    pub guest: GuestMap,
    /// Open functions, in the order they were checked.
    pub functions: Vec<Arc<dyn Function>>,
    /// What the host allows, by group.
    pub limits: Vec<(GroupId, Limits)>,
    /// How often guest memory is pinned.
    pub pinning: Pinning,
    /// Stops functions.
    pub breaker: Arc<Breaker>,
    /// The host of devices of this process that pin.
    pub software: Arc<Software>,
    /// Opens more of them.
    pub opener: Opener,
}

/// Opens functions while the machine runs, and closes them.
pub struct Opener {
    type1: Arc<Type1>,
    /// Where the host has it, and a function is by it or one may come.
    iommufd: Option<Arc<Iommufd>>,
    user: Arc<VfioUser>,
    /// There is a KVM-VFIO device that groups are put into (F-7).
    in_kvm: bool,
    unit: Option<VtdOption>,
}

impl Opener {
    /// The unit's options, `None` without one.
    pub fn unit_option(&self) -> Option<&VtdOption> {
        self.unit.as_ref()
    }

    /// Opens one that was checked.
    pub fn open(&self, checked: &Checked) -> Result<Arc<dyn Function>, Error> {
        Ok(match (checked, &self.iommufd) {
            (Checked::Vfio(..), _) if !self.in_kvm => return Err(Error::NoKvmVfio),
            (Checked::Vfio(_, Backend::Iommufd), None) => return Err(Error::NoIommufd),
            (Checked::Vfio(function, Backend::Iommufd), Some(iommufd)) => Arc::new(iommufd.open(function)?),
            (Checked::Vfio(function, Backend::Type1), _) => Arc::new(self.type1.open(function)?),
            (Checked::User { socket, confine }, _) => Arc::new(open_user(&self.user, socket, *confine)?),
        })
    }

    /// What the host allows for a group that is open.
    pub fn limits_of(&self, group: GroupId) -> Option<Limits> {
        self.type1.limits_of(group).or_else(|| self.iommufd.as_ref()?.limits_of(group))
    }

    /// The function of the host, which is not behind the bridge any more, goes back to it when nobody here uses it.
    pub fn close(&self, function: Option<Bdf>) {
        if let Some(function) = function {
            self.type1.close(function);
            if let Some(iommufd) = &self.iommufd {
                iommufd.close(function);
            }
        }
    }
}

/// How often guest memory is pinned while functions are untranslated (B-12).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Pinning {
    /// Groups on type1, which pins it for each.
    pub type1: usize,
    /// Groups on iommufd.
    pub iommufd: usize,
    /// Whether that pins it once for all of its groups.
    pub once: bool,
}

/// Opens what was checked. Every group is in the KVM-VFIO device afterwards (F-7).
pub fn open(
    vm: &VmFd,
    ram: &Arc<Ram>,
    config: &MachineConfig,
    checked: &[Checked],
    control: &Arc<Control>,
    trace: Option<&Arc<Trace>>,
) -> Result<Assigned, Error> {
    let groups: BTreeSet<GroupId> = checked.iter().filter_map(Checked::group).collect();
    let make_kvm_vfio = || {
        let mut device = kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_VFIO, ..Default::default() };
        let device = vm.create_device(&mut device).map_err(call("KVM_CREATE_DEVICE of the VFIO device"));
        device.map(|device| Arc::new(VfioDeviceFd::new_from_kvm(device)))
    };
    let kvm_vfio = match groups.is_empty() {
        false => Some(make_kvm_vfio()?),
        // One may come later, where the host has VFIO.
        true if config.root_ports > 0 => make_kvm_vfio().ok(),
        true => None,
    };
    let in_kvm = kvm_vfio.is_some();
    let guest = GuestMap::of_memory(ram.clone())?;
    let by_iommufd = checked.iter().any(|checked| checked.is_by(Backend::Iommufd));
    let make_iommufd = || Iommufd::new(kvm_vfio.clone(), &guest).map(Arc::new);
    let iommufd = match by_iommufd {
        true => Some(make_iommufd()?),
        // One may come later, where the host has it.
        false if config.root_ports > 0 && in_kvm => make_iommufd().ok(),
        false => None,
    };
    let (type1, user) = (Arc::new(Type1::new(kvm_vfio)), Arc::new(VfioUser::default()));
    let unit = config.vtd().cloned();
    let opener = Opener { type1: type1.clone(), iommufd: iommufd.clone(), user: user.clone(), in_kvm, unit };
    let functions = checked.iter().map(|checked| opener.open(checked)).collect::<Result<Vec<_>, Error>>()?;
    let limits: Vec<(GroupId, Limits)> =
        groups.iter().filter_map(|group| Some((*group, opener.limits_of(*group)?))).collect();
    let on_type1 = groups.iter().filter(|group| type1.limits_of(**group).is_some()).count();
    let once = iommufd.as_ref().is_some_and(|iommufd| iommufd.pins_once());
    let pinning = Pinning { type1: on_type1, iommufd: groups.len() - on_type1, once };
    check_ram(&limits, config.memory)?;
    let breaker = Arc::new(Breaker::new(control.clone()));
    if let Some(trace) = trace {
        trace.memory(&guest);
    }
    let software = Arc::new(Software::default());
    let iommufd = iommufd.map(|iommufd| -> Arc<dyn HostIommu> { iommufd });
    let always: [Arc<dyn HostIommu>; 3] = [type1, user, software.clone()];
    let traced = |host: Arc<dyn HostIommu>| match trace {
        Some(trace) => Arc::new(TracedHost::new(host, trace.clone())) as Arc<dyn HostIommu>,
        None => host,
    };
    let hosts = always.into_iter().chain(iommufd).map(traced).collect();
    let bridge = Arc::new(Bridge::new(hosts, guest.clone(), breaker.clone()));
    Ok(Assigned { bridge, guest, functions, limits, pinning, breaker, software, opener })
}

fn open_user(user: &VfioUser, socket: &UserSocket, confined: bool) -> Result<UserFunction, Error> {
    let endpoint = match socket {
        UserSocket::Path(path) => UserEndpoint::Path(path.clone()),
        // SAFETY: it was checked to be an open socket. Whoever started this process gave it for this device, and only
        // for this one: two devices cannot name the same descriptor, and no descriptor of ours is named by the command
        // line.
        UserSocket::Fd(fd) => UserEndpoint::Connected(unsafe { OwnedFd::from_raw_fd(*fd) }),
    };
    let options = UserOptions { confined, ..UserOptions::default() };
    user.open_with(endpoint, &socket.to_string(), options)
        .map_err(|source| Error::User { socket: socket.clone(), source })
}
