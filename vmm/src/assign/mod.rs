//! Assigned functions: what is checked before anything runs, how they are opened, what is said about them, and how one
//! is stopped.

mod backend;
mod check;
mod disk;
mod open;
mod pinblk;
mod pinned_io;
pub mod pinned_reads;
mod quarantine;
mod report;
mod requests;
mod tap;
mod virtio;

use devices::vfio_pci::VfioPciError;
use vfio_bridge::vfio_user::ConnectError;
use vfio_bridge::{Bdf, GroupId, GuestMapError, OpenError, RegisterClientError, RegisterError};
use vtd::AttachRefused;

pub use self::check::check_ram;
use self::check::widest;
pub use self::check::{Checked, check, unit_width};
pub use self::open::{Opener, open};
pub use self::pinblk::{PinBlkWiring, plug_pinblk};
pub use self::quarantine::Breaker;
pub use self::report::{report, report_functions, report_groups};
pub use self::requests::UserRequests;
pub use self::virtio::{VirtioWiring, plug_virtio};
use crate::config::UserSocket;
use crate::kvm::vm;

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
    /// A unit that translates nothing would not confine the device either.
    #[error(
        "dma-translation=off with a {kind} device is refused: nothing inside the guest could confine the device; \
         use dma-translation=on"
    )]
    NoTranslation {
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
    /// In the first stage the guest does not say what it maps, in Caching Mode either.
    #[error(
        "stage=first or stage=both with a {kind} device is refused: the guest does not say what it maps in a first stage, and the device \
         could not follow; use stage=second"
    )]
    FirstStage {
        /// The device's.
        kind: &'static str,
    },
    /// Nothing would take its requests with a PASID.
    #[error("edu,pasid=on needs a unit with PASIDs: use --iommu vtd,scalable=on,pasid-bits=20")]
    NoPasids,
    /// Nothing would take its translation requests.
    #[error("edu,ats=on needs a unit with device-TLBs: use --iommu vtd,ats=on")]
    NoDeviceTlbs,
    /// Nothing would take its page requests.
    #[error("edu,pri=on needs a unit with page requests: use --iommu vtd,scalable=on,ats=on,pri=on")]
    NoPageRequests,
    /// The host's IOMMU sets no flags in the guest's tables.
    #[error(
        "slads=on with a {kind} device is refused: what the device writes would leave no dirty flag in the guest's tables; \
         use slads=off"
    )]
    SecondStageDirty {
        /// The device's.
        kind: &'static str,
    },
    /// Two functions of one host group, and two backends.
    #[error(
        "{bdf} and another function of host group {group} are given different backends, and the kernel gives a group to one; write the \
         same backend= for both, or none"
    )]
    TwoBackends {
        /// One of them.
        bdf: Bdf,
        /// Their group.
        group: GroupId,
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
    /// A device of this process cannot pin.
    #[error(transparent)]
    RegisterClient(#[from] RegisterClientError),
    /// The file that a pinblk reads cannot be used.
    #[error("the file {name} of a pinblk device cannot be read: {source}")]
    PinBlkFile {
        /// Which.
        name: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A thread that reads for a pinblk could not be started.
    #[error("a thread of a pinblk device could not be started: {0}")]
    PinBlkThread(std::io::Error),
    /// What a virtio device needs of the host is not there.
    #[error("{name} cannot be had: {source}")]
    Virtio {
        /// Which, and what of it.
        name: String,
        /// What the system said.
        source: std::io::Error,
    },
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
    /// The function would not be in the KVM-VFIO device.
    #[error("the host's KVM has no VFIO device for this machine: a vfio device cannot be added to it")]
    NoKvmVfio,
    /// There is no iommufd here.
    #[error("this machine has no iommufd: a vfio device cannot be added by it; use backend=type1")]
    NoIommufd,
    /// KVM.
    #[error(transparent)]
    Vm(#[from] vm::Error),
}
