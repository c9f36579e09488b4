//! What a machine is made from, as plain data. The command line is turned into it in [`crate::commands`].

use std::fmt;
use std::path::PathBuf;

use vfio_bridge::Bdf;
use vtd::{Requester, SourceId, Stages};

/// A machine as the user described it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MachineConfig {
    /// Guest memory in bytes, a multiple of 4096.
    pub memory: u64,
    /// Virtual CPUs, 1 to 254.
    pub cpus: u8,
    /// The IOMMU that the guest sees.
    pub iommu: IommuOption,
    /// The units besides the first, which is of segment 0 and has all functions there that no other names. The units
    /// offer the same.
    pub further_units: Vec<FurtherUnit>,
    /// The devices, in the order in which they were given.
    pub devices: Vec<DeviceOption>,
    /// Root ports, at most [`MAX_ROOT_PORTS`].
    pub root_ports: u8,
}

/// As many root ports as a machine can have.
pub const MAX_ROOT_PORTS: u8 = 15;

/// Where root port `number` (1 to [`MAX_ROOT_PORTS`]) is on bus 0: the upper half of it.
pub fn slot_of_port(number: u8) -> Slot {
    Slot { device: 0x0f + number, function: 0 }
}

impl MachineConfig {
    /// The unit's options, `None` without one.
    pub fn vtd(&self) -> Option<&VtdOption> {
        match &self.iommu {
            IommuOption::None => None,
            IommuOption::Vtd(vtd) => Some(vtd),
        }
    }
}

/// `--iommu`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum IommuOption {
    /// No unit.
    None,
    /// An emulated VT-d unit.
    Vtd(VtdOption),
}

/// The keys of `--iommu vtd`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VtdOption {
    /// Whether DMA remapping is offered. Never without it: scalable mode, device-TLBs, performance counters. Never
    /// without either it or interrupt remapping.
    pub dma_translation: bool,
    /// Guest address width in bits: 39, 48 or 57. `None`: the widest that the host can map, up to 48.
    pub aw_bits: Option<u8>,
    /// Caching Mode.
    pub caching_mode: bool,
    /// Whether pass-through translation is offered.
    pub pass_through: bool,
    /// Whether interrupt remapping is offered.
    pub interrupt_remapping: bool,
    /// Whether interrupt remapping has destinations of 32 bits, which x2APIC needs. Never without interrupt remapping.
    pub extended_interrupt_mode: bool,
    /// Whether posted interrupts are offered. Never without interrupt remapping.
    pub posted_interrupts: bool,
    /// The stages of scalable mode; `None`: it is not offered.
    pub scalable: Option<Stages>,
    /// Whether nested translation is offered. Never without both stages.
    pub nested: bool,
    /// Whether accessed and dirty flags of the second stage are offered. Never without a second stage.
    pub second_stage_dirty: bool,
    /// Bits of a PASID, 0 to 20. 0: there are none. Never without scalable mode.
    pub pasid_bits: u8,
    /// Whether device-TLBs are offered.
    pub device_tlb: bool,
    /// Whether page requests are offered. Never without device-TLBs and scalable mode.
    pub page_requests: bool,
    /// Whether performance monitoring is offered.
    pub performance_counters: bool,
    /// Whether a thread of its own serves the queue.
    pub worker: WorkerOption,
    /// Whether the source of the IOAPIC's interrupts is validated, as that of every other's.
    pub ioapic_check: bool,
    /// The functions that it has, by id or slot; none: all that no other unit has.
    pub devices: Vec<String>,
    /// The segment of its functions.
    pub segment: u16,
}

impl VtdOption {
    /// Whether a guest may give a function to the first stage, whose mappings it does not announce.
    pub fn has_first_stage(&self) -> bool {
        matches!(self.scalable, Some(Stages::First | Stages::Both))
    }
}

impl Default for VtdOption {
    fn default() -> Self {
        Self {
            dma_translation: true,
            aw_bits: None,
            caching_mode: true,
            pass_through: true,
            interrupt_remapping: true,
            extended_interrupt_mode: true,
            posted_interrupts: false,
            scalable: None,
            nested: false,
            second_stage_dirty: false,
            pasid_bits: 0,
            device_tlb: false,
            page_requests: false,
            performance_counters: false,
            worker: WorkerOption::Off,
            ioapic_check: true,
            devices: Vec::new(),
            segment: 0,
        }
    }
}

/// `worker`: whether a thread serves a unit's queue, so that an invalidation is no exit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WorkerOption {
    /// None: the vCPU that moves the tail serves it.
    Off,
    /// While that is faster.
    On,
    /// All the time, for a host that keeps a processor for it.
    Always,
}

/// As many segments as a machine can have: 0 to one less. It is what there is room for below 4 GiB.
pub const MAX_SEGMENTS: u16 = 8;

/// A slot of a bus.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Slot {
    /// Device number, 1 to 0x1e.
    pub device: u8,
    /// Function number, 0 to 7.
    pub function: u8,
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}.{:x}", self.device, self.function)
    }
}

/// A slot of bus 0 of a segment.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct RootSlot {
    /// The segment, below [`MAX_SEGMENTS`].
    pub segment: u16,
    /// The slot.
    pub slot: Slot,
}

impl RootSlot {
    /// Of segment 0.
    pub const fn first(slot: Slot) -> Self {
        Self { segment: 0, slot }
    }

    /// With its segment, whichever that is: `0000:00:02.0`.
    pub fn in_full(self) -> String {
        format!("{:04x}:00:{}", self.segment, self.slot)
    }

    /// The name of what is there, as every function has one.
    pub fn requester(self) -> Requester {
        Requester { segment: self.segment, sid: SourceId::new(0, self.slot.device, self.slot.function) }
    }
}

/// `02.0`, and in another segment than 0 `0001:00:02.0`: as it is given.
impl fmt::Display for RootSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.segment {
            0 => self.slot.fmt(f),
            _ => f.write_str(&self.in_full()),
        }
    }
}

/// A function's address, as it is shown: of another segment than 0 with the segment.
pub fn shown(address: Requester) -> String {
    match address.segment {
        0 => address.sid.to_string(),
        _ => address.to_string(),
    }
}

/// The segments of a machine, 0 and those that devices are in, in order.
pub fn segments(places: &[Place]) -> std::collections::BTreeSet<u16> {
    let of_place = |place: &Place| match place {
        Place::Root(at) => at.segment,
        Place::Port(_) | Place::Bridge { .. } => 0,
    };
    std::iter::once(0).chain(places.iter().map(of_place)).collect()
}

/// Where a device is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// On bus 0 of a segment.
    Root(RootSlot),
    /// Behind the root port of this number, which is in segment 0 as bridges are.
    Port(u8),
    /// Behind a bridge.
    Bridge {
        /// Its place in the list of devices.
        bridge: usize,
        /// Where on its bus.
        slot: Slot,
    },
}

/// What a unit that names its functions has (VT-d specification, section 8.3.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UnitPart {
    /// A function of bus 0.
    Function(RootSlot),
    /// A bridge of bus 0, with all that is behind it.
    Bridge {
        /// Its place in the list of devices.
        bridge: usize,
        /// Where it is.
        slot: Slot,
    },
    /// The root port of this number, with all that is or comes behind it.
    Port(u8),
}

impl UnitPart {
    /// The segment that it is in.
    pub fn segment(self) -> u16 {
        match self {
            Self::Function(at) => at.segment,
            Self::Bridge { .. } | Self::Port(_) => 0,
        }
    }
}

/// A unit besides the first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FurtherUnit {
    /// The segment of its functions.
    pub segment: u16,
    /// Those that it names; none: all of the segment that no other one names.
    pub parts: Vec<UnitPart>,
}

/// The numbers of buses in the names of functions, which a guest that numbers its buses itself need not give them.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct BusNumbers {
    /// Of the bus below each root port, in order.
    pub ports: Vec<u8>,
    /// Of the bus below a bridge, by the bridge's place in the list of devices.
    pub bridges: std::collections::BTreeMap<usize, u8>,
    /// The highest of them, 0 without any.
    pub last: u8,
}

impl BusNumbers {
    /// Of a machine with so many root ports, and these devices in these places: each port, with a bridge behind it
    /// right after it; then the bridges on bus 0. What is below a bridge follows it, as type 1 headers need it.
    pub fn new(root_ports: u8, devices: &[DeviceOption], places: &[Place]) -> Self {
        let mut numbers = Self::default();
        let bridges = || devices.iter().zip(places).enumerate().filter(|(_, (it, _))| it.kind == DeviceKind::PciBridge);
        for port in 1..=root_ports {
            numbers.last += 1;
            numbers.ports.push(numbers.last);
            for (index, _) in bridges().filter(|(_, (_, place))| **place == Place::Port(port)) {
                numbers.last += 1;
                numbers.bridges.insert(index, numbers.last);
            }
        }
        for (index, _) in bridges().filter(|(_, (_, place))| matches!(place, Place::Root(_))) {
            numbers.last += 1;
            numbers.bridges.insert(index, numbers.last);
        }
        numbers
    }
}

/// `--device`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeviceOption {
    /// `id=`, or given when all options are known.
    pub id: Option<String>,
    /// `addr=`; the lowest free slot of segment 0 otherwise.
    pub addr: Option<RootSlot>,
    /// `port=`: behind that root port instead.
    pub port: Option<u8>,
    /// `bus=`: on the bus below the bridge with this id.
    pub bus: Option<String>,
    /// Which device.
    pub kind: DeviceKind,
}

/// Which device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DeviceKind {
    /// A function of the host.
    Vfio {
        /// Its address there.
        host: Bdf,
        /// By what its memory is mapped; `None`: what is best.
        backend: Option<Backend>,
    },
    /// A function that another process emulates.
    VfioUser {
        /// Where that is.
        socket: UserSocket,
        /// It is given no file of the guest's memory, and asks for each access by message.
        confine: bool,
    },
    /// A bridge from PCI Express to conventional PCI, for devices with `bus=`.
    PciBridge,
    /// The educational device of QEMU, emulated in this process.
    Edu {
        /// It has a PASID capability.
        pasid: bool,
        /// It has an ATS capability, and a device-TLB.
        ats: bool,
        /// It has a PRI capability. Never without ATS.
        pri: bool,
    },
    /// A device, emulated in this process, that reads a file into pinned pages.
    PinBlk {
        /// The file; none: a pattern in memory.
        file: Option<PathBuf>,
        /// Past the host's page cache: the host's kernel has pages of the guest pinned while the disk writes to them.
        direct: bool,
    },
    /// A virtio device, emulated in this process.
    Virtio(VirtioKind),
}

/// Which virtio device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum VirtioKind {
    /// Entropy of the host.
    Rng,
    /// A disk.
    Blk {
        /// Its data: a file, or a block device.
        file: PathBuf,
        /// Writes are refused.
        read_only: bool,
    },
    /// A network interface.
    Net {
        /// The name of the tap: 1 to 15 bytes, no `/`.
        tap: String,
        /// Its address; `None`: one that goes by its slot.
        mac: Option<[u8; 6]>,
    },
    /// A console, at stdout and stdin as the serial port.
    Console,
}

/// By which of the host's interfaces a function's memory is mapped.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Backend {
    /// A container of VFIO for each host group.
    Type1,
    /// iommufd.
    Iommufd,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Type1 => "type1",
            Self::Iommufd => "iommufd",
        })
    }
}

/// Where the process that emulates a function is.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum UserSocket {
    /// It listens here.
    Path(PathBuf),
    /// It is at the other end of this descriptor, which this process was started with.
    Fd(i32),
}

impl UserSocket {
    /// The file to look at.
    pub fn path(&self) -> PathBuf {
        match self {
            Self::Path(path) => path.clone(),
            Self::Fd(fd) => format!("/proc/self/fd/{fd}").into(),
        }
    }
}

impl fmt::Display for UserSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Fd(fd) => write!(f, "descriptor {fd}"),
        }
    }
}

impl DeviceKind {
    /// An edu without capabilities that QEMU's has not.
    pub const PLAIN_EDU: Self = Self::Edu { pasid: false, ats: false, pri: false };

    /// As statistics and default ids name it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Vfio { .. } => "vfio",
            Self::VfioUser { .. } => "vfio-user",
            Self::PciBridge => "pcie-pci-bridge",
            Self::Edu { .. } => "edu",
            Self::PinBlk { .. } => "pinblk",
            Self::Virtio(VirtioKind::Rng) => "virtio-rng",
            Self::Virtio(VirtioKind::Console) => "virtio-console",
            Self::Virtio(VirtioKind::Blk { .. }) => "virtio-blk",
            Self::Virtio(VirtioKind::Net { .. }) => "virtio-net",
        }
    }

    /// What it is outside, which two devices cannot share: the host's function, the socket, a disk that
    /// both write, a tap, or stdin.
    pub fn outside(&self) -> Option<String> {
        match self {
            Self::Vfio { host, .. } => Some(format!("host={host}")),
            Self::VfioUser { socket: UserSocket::Path(path), .. } => Some(format!("socket={}", path.display())),
            Self::VfioUser { socket: UserSocket::Fd(fd), .. } => Some(format!("fd={fd}")),
            Self::Virtio(VirtioKind::Blk { file, read_only: false }) => Some(format!("file={}", file.display())),
            Self::Virtio(VirtioKind::Net { tap, .. }) => Some(format!("tap={tap}")),
            Self::Virtio(VirtioKind::Console) => Some("stdin".to_owned()),
            Self::PciBridge | Self::Edu { .. } | Self::PinBlk { .. } => None,
            Self::Virtio(VirtioKind::Blk { .. } | VirtioKind::Rng) => None,
        }
    }

    /// Whether it needs nothing from outside but what can be read.
    pub fn is_emulated(&self) -> bool {
        matches!(self, Self::PciBridge | Self::Edu { .. } | Self::PinBlk { .. } | Self::Virtio(VirtioKind::Rng))
    }

    /// Whether its DMA follows what the guest's unit tells: it is refused without a unit.
    pub fn follows_unit(&self) -> bool {
        match self {
            Self::Vfio { .. } | Self::VfioUser { .. } | Self::PinBlk { .. } => true,
            Self::Virtio(VirtioKind::Blk { .. } | VirtioKind::Net { .. }) => true,
            Self::PciBridge | Self::Edu { .. } | Self::Virtio(VirtioKind::Rng | VirtioKind::Console) => false,
        }
    }

    /// Whether it has to be told what the guest maps, before it needs it: it is refused without Caching Mode.
    pub fn needs_caching_mode(&self) -> bool {
        self.follows_unit() && !matches!(self, Self::Virtio(_))
    }
}
