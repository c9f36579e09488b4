//! Assigned functions: what is checked before anything runs, what the host allows, and what is said about it.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::sync::{Arc, Mutex, Weak};

use devices::host::Interrupts;
use devices::vfio_pci::{VfioPci, VfioPciError};
use kvm_bindings::{kvm_create_device, kvm_device_type_KVM_DEV_TYPE_VFIO};
use kvm_ioctls::VmFd;
use vfio_bridge::vfio_user::{ConnectError, UserEndpoint, UserFunction, VfioUser};
use vfio_bridge::{
    Bridge, CheckedFunction, Function, GroupId, GuestMap, GuestMapError, HostIommu, HostPaths, Hosts, Limits, Memlock,
    OpenError, Quarantine, RegisterError, Requests, Trace, TracedHost, Type1, VfioDeviceFd, check_memlock,
};
use vtd::{Access, AttachRefused, Endpoint, Iova, Msi, Requester};

use crate::boot::layout;
use crate::config::{DeviceKind, DeviceOption, UserSocket, VtdOption};
use crate::kvm::irq::KvmInterrupts;
use crate::kvm::memory::Ram;
use crate::kvm::vm::{self, call};
use crate::machine::control::{Control, Stop};

/// Guest address widths that a unit can have, the narrowest first.
const WIDTHS: [u8; 3] = [39, 48, 57];
/// What a unit has when nobody asks: 57 bits mean five levels, which cost a guest more than they give.
const WIDEST_BY_DEFAULT: u8 = 48;

/// Why functions cannot be assigned.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Without a unit nothing would confine the device.
    #[error(
        "--iommu none with a {kind} device is refused: nothing inside the guest could confine the device; leave --iommu out, or use \
         --iommu vtd"
    )]
    NoUnit {
        /// The device's.
        kind: &'static str,
    },
    /// Without Caching Mode the guest does not say what it maps.
    #[error(
        "caching-mode=off with a {kind} device is refused: the guest would not say what it maps, and the device could not follow; \
         use caching-mode=on"
    )]
    NoCachingMode {
        /// The device's.
        kind: &'static str,
    },
    /// The socket of a function of another process cannot be looked at.
    #[error("{socket}, where a vfio-user device should be, cannot be used: {source}; start its process first")]
    Socket {
        /// Which.
        socket: UserSocket,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is none.
    #[error("{0}, where a vfio-user device should be, is not a socket; give the path that its process listens at")]
    NoSocket(UserSocket),
    /// The process does not answer as it should.
    #[error("the vfio-user device at {socket} cannot be assigned: {source}")]
    User {
        /// Which.
        socket: UserSocket,
        /// Why.
        source: ConnectError,
    },
    /// The unit would be wider than the host.
    #[error("aw-bits={asked} is refused: the host IOMMU of group {group} maps {host} bits; use aw-bits={}", widest(*.host))]
    Width {
        /// What was asked for.
        asked: u8,
        /// What the host maps.
        host: u8,
        /// The group whose IOMMU is the narrowest.
        group: GroupId,
    },
    /// Not even the narrowest unit fits.
    #[error(
        "the host IOMMU of group {group} maps only {host} bits, and the narrowest unit has 39: the device cannot be assigned"
    )]
    TooNarrow {
        /// What the host maps.
        host: u8,
        /// Its group.
        group: GroupId,
    },
    /// The host keeps a range where the guest's RAM would be.
    #[error(
        "the host IOMMU of group {group} cannot map {first:#x}-{last:#x}, where guest memory would be: the device cannot be assigned \
         with {} MiB of memory; use a smaller --memory",
        .ram >> 20
    )]
    Reserved {
        /// Its group.
        group: GroupId,
        /// First address.
        first: u64,
        /// Last address.
        last: u64,
        /// Bytes of RAM.
        ram: u64,
    },
    /// What would be locked is not there.
    #[error(
        "an assigned device keeps the guest's {} MiB of memory locked, and the host has {} MiB left; use a smaller --memory",
        .ram >> 20, .available >> 20
    )]
    HostMemory {
        /// Bytes of RAM.
        ram: u64,
        /// Bytes that the host can still give.
        available: u64,
    },
    /// Guest memory is not as the bridge needs it.
    #[error(transparent)]
    GuestMap(#[from] GuestMapError),
    /// A function is there twice.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// The host did not take the identity mappings.
    #[error("{name} could not be given the guest's memory: {source}")]
    Attach {
        /// The function.
        name: String,
        /// Why.
        source: AttachRefused,
    },
    /// The function is not as PCI wants it.
    #[error("{name} cannot be assigned: {source}")]
    Function {
        /// The function.
        name: String,
        /// Why.
        source: VfioPciError,
    },
    /// KVM.
    #[error(transparent)]
    Vm(#[from] vm::Error),
}

/// The widest unit that a host of `bits` can follow.
fn widest(bits: u8) -> u8 {
    WIDTHS.into_iter().rev().find(|width| *width <= bits).unwrap_or(WIDTHS[0])
}

/// A function that can be assigned, as far as can be told without opening anything.
pub enum Checked {
    /// Of the host.
    Vfio(CheckedFunction),
    /// Of another process.
    User(UserSocket),
}

impl Checked {
    fn group(&self) -> Option<GroupId> {
        match self {
            Self::Vfio(function) => Some(function.group()),
            Self::User(_) => None,
        }
    }
}

/// Checks that open nothing: the functions among `devices`, in their order. `unit` is `None` under `--iommu none`.
pub fn check(devices: &[DeviceOption], unit: Option<&VtdOption>, ram: u64) -> Result<Vec<Checked>, Error> {
    let assigned = |device: &&DeviceOption| !matches!(device.kind, DeviceKind::Edu);
    let Some(first) = devices.iter().find(assigned) else { return Ok(Vec::new()) };
    let kind = first.kind.name();
    match unit {
        None => return Err(Error::NoUnit { kind }),
        Some(unit) if !unit.caching_mode => return Err(Error::NoCachingMode { kind }),
        Some(_) => {}
    }
    let paths = HostPaths::default();
    let checked = devices.iter().filter_map(|device| match &device.kind {
        DeviceKind::Vfio { host } => Some(paths.check(*host).map(Checked::Vfio).map_err(Error::from)),
        DeviceKind::VfioUser { socket } => Some(check_socket(socket).map(|()| Checked::User(socket.clone()))),
        DeviceKind::Edu => None,
    });
    let checked = checked.collect::<Result<Vec<_>, _>>()?;
    let groups: BTreeSet<GroupId> = checked.iter().filter_map(Checked::group).collect();
    if groups.is_empty() {
        // Nothing is locked for other processes.
        return Ok(checked);
    }
    check_memlock(Memlock::of_this_process(), ram, groups.len() as u64)?;
    let memory = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| available_memory(&text));
    match memory {
        Some(available) if ram > available => Err(Error::HostMemory { ram, available }),
        _ => Ok(checked),
    }
}

fn check_socket(socket: &UserSocket) -> Result<(), Error> {
    let metadata = std::fs::metadata(socket.path());
    let metadata = metadata.map_err(|source| Error::Socket { socket: socket.clone(), source })?;
    if metadata.file_type().is_socket() { Ok(()) } else { Err(Error::NoSocket(socket.clone())) }
}

/// Bytes that can be locked, from the text of /proc/meminfo: what is available, and what swapping makes so.
fn available_memory(meminfo: &str) -> Option<u64> {
    let field = |name: &str| {
        let value = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        value.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
    };
    Some(field("MemAvailable:")?.saturating_add(field("SwapFree:").unwrap_or(0)))
}

/// The unit's guest address width: what was asked for if every group's host can map it, else the widest that all can.
pub fn unit_width(asked: Option<u8>, hosts: &[(GroupId, Limits)]) -> Result<u8, Error> {
    let narrowest = hosts.iter().map(|(group, limits)| (limits.address_width(), *group)).min();
    let Some((host, group)) = narrowest else { return Ok(asked.unwrap_or(WIDEST_BY_DEFAULT)) };
    match asked {
        _ if host < WIDTHS[0] => Err(Error::TooNarrow { host, group }),
        Some(asked) if asked > host => Err(Error::Width { asked, host, group }),
        Some(asked) => Ok(asked),
        None => Ok(widest(host.min(WIDEST_BY_DEFAULT))),
    }
}

/// What a function of another process asks for and was not given is its unit's to judge, as every function's.
pub struct UserRequests {
    /// The way that its requests would take.
    pub endpoint: Endpoint<Ram>,
    /// Where its messages go.
    pub interrupts: Arc<KvmInterrupts>,
}

impl Requests for UserRequests {
    fn blocked(&self, iova: Iova, write: bool) {
        let access = if write { Access::Write } else { Access::Read };
        // The unit records the fault. Where it finds none, the guest mapped it a moment ago, or the bridge could not
        // map it.
        if self.endpoint.enter().translate(iova, access).is_ok() {
            log::debug!("{}: {iova} is not mapped for the device yet", self.endpoint.requester());
        }
    }

    fn message(&self, address: u64, data: u32) {
        self.interrupts.signal(self.endpoint.requester(), Msi { address, data });
    }
}

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
    for (group, limits) in &limits {
        for (first, len) in layout::ram_regions(ram_size) {
            if let Some(range) = limits.reserved_in(first, first + (len - 1)).first() {
                return Err(Error::Reserved { group: *group, first: range.first, last: range.last, ram: ram_size });
            }
        }
    }
    let breaker = Arc::new(Breaker { functions: Mutex::default(), control: control.clone() });
    let guest = GuestMap::of_memory(ram.clone())?;
    let hosts = Arc::new(Hosts::new(vec![type1, user]));
    let host: Arc<dyn HostIommu> = match trace {
        Some(trace) => {
            trace.memory(&guest);
            Arc::new(TracedHost::new(hosts, trace.clone()))
        }
        None => hosts,
    };
    let bridge = Arc::new(Bridge::new(host, guest, breaker.clone()));
    Ok(Assigned { bridge, functions, limits, breaker })
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

fn page_sizes(mask: u64) -> String {
    let names: Vec<String> = (12..64u32)
        .filter(|bit| mask >> bit & 1 != 0)
        .map(|bit| match bit {
            0..20 => format!("{}K", 1u64 << (bit - 10)),
            20..30 => format!("{}M", 1u64 << (bit - 20)),
            _ => format!("{}G", 1u64 << (bit - 30)),
        })
        .collect();
    names.join(", ")
}

/// Says what the host allows (B-13), and what it costs (B-12).
pub fn report(limits: &[(GroupId, Limits)], ram: u64) {
    for (group, limits) in limits {
        let ranges: Vec<String> = limits.iova_ranges.iter().map(ToString::to_string).collect();
        let memlock = limits.memlock.map_or_else(|| "unlimited".to_owned(), |bytes| format!("{} MiB", bytes >> 20));
        log::info!(
            "host group {group}: maps {} with pages of {}, {} mappings; locked memory {memlock}",
            ranges.join(" and "),
            page_sizes(limits.page_sizes),
            limits.entries
        );
    }
    if limits.len() > 1 {
        log::info!(
            "{} host groups pin the guest's memory once each while they are untranslated: {} MiB in all",
            limits.len(),
            (ram >> 20) * limits.len() as u64
        );
    }
}

/// Says how each function is reset (F-4); a warning where what the guest told it can outlive a reset of the guest. And
/// who is trusted.
pub fn report_functions(functions: &[Arc<dyn Function>]) {
    for function in functions {
        let (name, way) = (function.name(), function.reset_way());
        if function.is_emulated() {
            log::info!("{name}: its process is given the guest's memory and trusted to use only what is mapped");
        }
        if way.is_sure() {
            log::info!("{name} {way}");
        } else {
            log::warn!(
                "{name} {way}: DMA that the guest began before a reset may go on when its next driver enables bus mastering"
            );
        }
    }
}

/// Stops functions whose mappings the host did not take away (B-11).
pub struct Breaker {
    functions: Mutex<BTreeMap<Requester, Weak<VfioPci>>>,
    control: Arc<Control>,
}

impl Breaker {
    /// `function` is the function at `requester`.
    pub fn add(&self, requester: Requester, function: &Arc<VfioPci>) {
        self.functions.lock().unwrap().insert(requester, Arc::downgrade(function));
    }
}

impl Quarantine for Breaker {
    fn quarantine(&self, functions: &[Requester], why: &str) -> Result<(), String> {
        for requester in functions {
            let function = self.functions.lock().unwrap().get(requester).and_then(Weak::upgrade);
            // A function that is not plugged in yet, or not any more, has its Bus Master bit off.
            let Some(function) = function else { continue };
            log::error!("the function {requester} is stopped: {why}");
            function.quarantine()?;
        }
        Ok(())
    }

    fn stop_machine(&self, functions: &[Requester], why: &str) {
        let names: Vec<String> = functions.iter().map(ToString::to_string).collect();
        self.control.halt(Stop::Error(format!("{} could not be stopped: {why}", names.join(", "))));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vfio_bridge::IovaRange;

    fn host(group: u32, bits: u32) -> (GroupId, Limits) {
        let last = u64::MAX >> (64 - bits);
        let limits = Limits {
            iova_ranges: vec![IovaRange { first: 0, last: 0xfedf_ffff }, IovaRange { first: 0xfef0_0000, last }],
            page_sizes: 0x4020_1000,
            entries: 65_535,
            memlock: None,
            unmap_all: true,
        };
        (GroupId(group), limits)
    }

    #[test]
    fn the_unit_is_as_wide_as_every_host_can_follow() {
        assert_eq!(unit_width(None, &[]).unwrap(), 48);
        assert_eq!(unit_width(Some(57), &[]).unwrap(), 57);
        assert_eq!(unit_width(None, &[host(1, 48)]).unwrap(), 48);
        assert_eq!(unit_width(None, &[host(1, 57)]).unwrap(), 48);
        assert_eq!(unit_width(None, &[host(1, 48), host(2, 46)]).unwrap(), 39);
        assert_eq!(unit_width(Some(39), &[host(1, 48)]).unwrap(), 39);
    }

    #[test]
    fn a_unit_wider_than_the_host_is_refused_with_the_width_that_works() {
        let message = unit_width(Some(57), &[host(4, 48)]).unwrap_err().to_string();
        assert!(message.contains("aw-bits=57") && message.contains("48 bits; use aw-bits=48"), "{message}");
        assert!(matches!(unit_width(None, &[host(4, 38)]), Err(Error::TooNarrow { host: 38, .. })));
    }

    #[test]
    fn a_vfio_device_needs_a_unit_with_caching_mode() {
        for text in ["vfio,host=00:09.0", "vfio-user,socket=/nowhere"] {
            let devices = ["edu".parse().unwrap(), text.parse().unwrap()];
            assert!(matches!(check(&devices, None, 1 << 20), Err(Error::NoUnit { .. })));
            let off = VtdOption { caching_mode: false, ..Default::default() };
            assert!(matches!(check(&devices, Some(&off), 1 << 20), Err(Error::NoCachingMode { .. })));
            assert!(check(&devices[..1], None, 1 << 20).unwrap().is_empty());
        }
    }

    #[test]
    fn a_vfio_user_device_needs_a_socket_that_is_there() {
        let refused = |text: &str| {
            let devices = [text.parse().unwrap()];
            check(&devices, Some(&VtdOption::default()), 1 << 20).err().unwrap().to_string()
        };
        assert!(refused("vfio-user,socket=/nowhere/at/all").contains("start its process first"));
        assert!(refused("vfio-user,socket=/dev/null").contains("is not a socket"));
        assert!(refused("vfio-user,fd=1000000").contains("descriptor 1000000"));
    }

    #[test]
    fn available_memory_is_read_with_swap() {
        let text = "MemTotal: 100 kB\nMemAvailable:  3000 kB\nSwapFree:   96 kB\n";
        assert_eq!(available_memory(text), Some(3096 * 1024));
        assert_eq!(available_memory("MemTotal: 100 kB\n"), None);
    }

    #[test]
    fn page_sizes_are_named() {
        assert_eq!(page_sizes(0x4020_1000), "4K, 2M, 1G");
    }
}
