//! Functions are opened, and the bridge to their host IOMMU is made.

use std::collections::BTreeSet;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{kvm_create_device, kvm_device_type_KVM_DEV_TYPE_VFIO};
use kvm_ioctls::VmFd;
use vfio_bridge::vfio_user::{UserEndpoint, UserFunction, VfioUser};
use vfio_bridge::{
    Bridge, Function, GroupId, GuestMap, HostIommu, Limits, Software, Trace, TracedHost, Type1, VfioDeviceFd,
};

use super::Error;
use super::check::{Checked, check_ram};
use super::quarantine::Breaker;
use crate::config::UserSocket;
use crate::kvm::memory::Ram;
use crate::kvm::vm::call;
use crate::machine::control::Control;

/// The functions, open, and the bridge to their host IOMMU.
pub struct Assigned {
    /// What the units tell of.
    pub bridge: Arc<Bridge>,
    /// Open functions, in the order they were checked.
    pub functions: Vec<Arc<dyn Function>>,
    /// What the host allows, by group.
    pub limits: Vec<(GroupId, Limits)>,
    /// Stops functions.
    pub breaker: Arc<Breaker>,
    /// The host of devices of this process that pin.
    pub software: Arc<Software>,
}

/// Opens what was checked. Every group is in the KVM-VFIO device afterwards (F-7).
pub fn open(
    vm: &VmFd,
    ram: &Arc<Ram>,
    ram_size: u64,
    checked: &[Checked],
    control: &Arc<Control>,
    trace: Option<&Arc<Trace>>,
) -> Result<Assigned, Error> {
    let groups: BTreeSet<GroupId> = checked.iter().filter_map(Checked::group).collect();
    let kvm_vfio = if groups.is_empty() {
        None
    } else {
        let mut device = kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_VFIO, ..Default::default() };
        let device = vm.create_device(&mut device).map_err(call("KVM_CREATE_DEVICE of the VFIO device"))?;
        Some(Arc::new(VfioDeviceFd::new_from_kvm(device)))
    };
    let (type1, user) = (Arc::new(Type1::new(kvm_vfio)), Arc::new(VfioUser::default()));
    let open = |checked: &Checked| -> Result<Arc<dyn Function>, Error> {
        Ok(match checked {
            Checked::Vfio(function) => Arc::new(type1.open(function)?),
            Checked::User(socket) => Arc::new(open_user(&user, socket)?),
        })
    };
    let functions = checked.iter().map(open).collect::<Result<Vec<_>, Error>>()?;
    let limits: Vec<(GroupId, Limits)> =
        groups.into_iter().filter_map(|group| Some((group, type1.limits_of(group)?))).collect();
    check_ram(&limits, ram_size)?;
    let breaker = Arc::new(Breaker::new(control.clone()));
    let guest = GuestMap::of_memory(ram.clone())?;
    if let Some(trace) = trace {
        trace.memory(&guest);
    }
    let software = Arc::new(Software::default());
    let hosts: [Arc<dyn HostIommu>; 3] = [type1, user, software.clone()];
    let traced = |host| match trace {
        Some(trace) => Arc::new(TracedHost::new(host, trace.clone())),
        None => host,
    };
    let bridge = Arc::new(Bridge::new(hosts.map(traced).into(), guest, breaker.clone()));
    Ok(Assigned { bridge, functions, limits, breaker, software })
}

fn open_user(user: &VfioUser, socket: &UserSocket) -> Result<UserFunction, Error> {
    let endpoint = match socket {
        UserSocket::Path(path) => UserEndpoint::Path(path.clone()),
        // SAFETY: it was checked to be an open socket. Whoever started this process gave it for this device, and only
        // for this one: two devices cannot name the same descriptor, and no descriptor of ours is named by the command
        // line.
        UserSocket::Fd(fd) => UserEndpoint::Connected(unsafe { OwnedFd::from_raw_fd(*fd) }),
    };
    user.open(endpoint, &socket.to_string()).map_err(|source| Error::User { socket: socket.clone(), source })
}
