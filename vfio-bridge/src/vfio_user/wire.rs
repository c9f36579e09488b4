//! The messages: layouts only. Numbers are in the host's byte order.

use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// What a message asks for.
pub mod command {
    /// Proposes a version and capabilities; always the first.
    pub const VERSION: u16 = 1;
    /// Lets the server reach memory.
    pub const DMA_MAP: u16 = 2;
    /// Takes that back.
    pub const DMA_UNMAP: u16 = 3;
    /// Asks what the device is.
    pub const DEVICE_GET_INFO: u16 = 4;
    /// Asks what a region is.
    pub const DEVICE_GET_REGION_INFO: u16 = 5;
    /// Asks what a kind of interrupt is.
    pub const DEVICE_GET_IRQ_INFO: u16 = 7;
    /// Says where interrupts go.
    pub const DEVICE_SET_IRQS: u16 = 8;
    /// Reads a region.
    pub const REGION_READ: u16 = 9;
    /// Writes a region.
    pub const REGION_WRITE: u16 = 10;
    /// From the server: reads memory of the client.
    pub const DMA_READ: u16 = 11;
    /// From the server: writes memory of the client.
    pub const DMA_WRITE: u16 = 12;
    /// Resets the device.
    pub const DEVICE_RESET: u16 = 13;
    /// Reads or sets a feature of the device, such as DMA logging.
    pub const DEVICE_FEATURE: u16 = 16;
    /// Reads the next part of the device's state, while it is copied.
    pub const MIG_DATA_READ: u16 = 17;
    /// Writes the next part of a state, while the device resumes.
    pub const MIG_DATA_WRITE: u16 = 18;
}

/// Bits 3:0 of the flags: the message answers a command.
pub const FLAG_REPLY: u32 = 1;
/// Nobody waits for a reply.
pub const FLAG_NO_REPLY: u32 = 1 << 4;
/// The command failed; `error` says why.
pub const FLAG_ERROR: u32 = 1 << 5;

/// Before each message.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// Chosen by who sends the command, and echoed.
    pub id: u16,
    /// See [`command`].
    pub command: u16,
    /// Bytes of the message, this header included.
    pub size: u32,
    /// See [`FLAG_REPLY`] and the others.
    pub flags: u32,
    /// An errno, or 0 for one that is not known.
    pub error: u32,
}

/// Bytes of a [`Header`].
pub const HEADER_SIZE: usize = size_of::<Header>();

/// Of VERSION, both ways; JSON and a zero byte follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Version {
    /// The same on both sides.
    pub major: u16,
    /// The server answers with the smaller of its own and what the client proposed.
    pub minor: u16,
}

/// The highest version that is spoken here, and with it all smaller minor ones.
pub const VERSION: Version = Version { major: 0, minor: 1 };

/// Mappings that a server of ours holds at most, and what a client of ours proposes: as many as a guest can ask for
/// without being unreasonable. What is agreed on is the smaller number of both sides, since clients may know of a limit
/// of their own: QEMU's gives up a server that says more than it proposed, which is the specification's default of
/// 65,535.
pub const MAX_DMA_MAPS: u64 = 1 << 20;

/// Readable by the device.
pub const DMA_MAP_READ: u32 = 1;
/// Writable by the device.
pub const DMA_MAP_WRITE: u32 = 2;

/// Of DMA_MAP; the file comes beside it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DmaMap {
    /// Bytes of this structure.
    pub argsz: u32,
    /// See [`DMA_MAP_READ`].
    pub flags: u32,
    /// Where the memory is in the file.
    pub offset: u64,
    /// First IOVA.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

/// Flag of DMA_UNMAP: everything goes; address and size are 0. It is VFIO's (`VFIO_DMA_UNMAP_FLAG_ALL`); the protocol's
/// specification does not name it, and QEMU's client sends it when a device leaves an address space.
pub const DMA_UNMAP_ALL: u32 = 1 << 1;

/// Of DMA_UNMAP, both ways.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DmaUnmap {
    /// Bytes of this structure.
    pub argsz: u32,
    /// 0, or [`DMA_UNMAP_ALL`].
    pub flags: u32,
    /// First IOVA. The specification wants it to be that of one mapping, exactly; clients name ranges, as VFIO lets
    /// them.
    pub address: u64,
    /// Bytes of the range; in the reply those that were mapped there.
    pub size: u64,
}

/// Of DEVICE_FEATURE, both ways; what the feature has follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DeviceFeature {
    /// Bytes of this structure and what follows, also of the reply.
    pub argsz: u32,
    /// `VFIO_DEVICE_FEATURE_*`: which, and what is done.
    pub flags: u32,
}

/// Of the feature that says whether a device's state can be had, in the reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MigrationFlags {
    /// `VFIO_MIGRATION_*`.
    pub flags: u64,
}

/// Of the feature by which a device is stopped, copied and resumed, both ways.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MigrationState {
    /// `VFIO_DEVICE_STATE_*`.
    pub device_state: u32,
    /// Means nothing here: the data comes and goes by messages.
    pub data_fd: i32,
}

/// Of MIG_DATA_READ and MIG_DATA_WRITE; in the reply of the first and in the second, data follows. The second has no
/// payload in its reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MigrationData {
    /// Bytes of this structure and of the data.
    pub argsz: u32,
    /// Bytes of data. In a reply fewer than were asked for: these are the last.
    pub size: u32,
}

/// Of a start of DMA logging; its ranges follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct LoggingControl {
    /// Bytes of a page.
    pub page_size: u64,
    /// Ranges.
    pub num_ranges: u32,
    /// 0.
    pub reserved: u32,
}

/// What is logged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct LoggingRange {
    /// First IOVA.
    pub iova: u64,
    /// Bytes.
    pub length: u64,
}

/// Of a report of DMA logging, both ways; in the reply the bitmap follows, in words of 64 bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct LoggingReport {
    /// First IOVA.
    pub iova: u64,
    /// Bytes.
    pub length: u64,
    /// Bytes of a page.
    pub page_size: u64,
}

/// Of DEVICE_GET_INFO, both ways.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DeviceInfo {
    /// Bytes of this structure.
    pub argsz: u32,
    /// `VFIO_DEVICE_FLAGS_*`.
    pub flags: u32,
    /// Regions.
    pub num_regions: u32,
    /// Kinds of interrupts.
    pub num_irqs: u32,
}

/// Of DEVICE_GET_REGION_INFO, both ways; capabilities may follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RegionInfo {
    /// Bytes with the capabilities.
    pub argsz: u32,
    /// `VFIO_REGION_INFO_FLAG_*`.
    pub flags: u32,
    /// Which.
    pub index: u32,
    /// Where the first capability is in this structure; 0: there is none.
    pub cap_offset: u32,
    /// Bytes.
    pub size: u64,
    /// Where it starts in the file that comes with it.
    pub offset: u64,
}

/// Of DEVICE_GET_IRQ_INFO, both ways.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IrqInfo {
    /// Bytes of this structure.
    pub argsz: u32,
    /// `VFIO_IRQ_INFO_*`.
    pub flags: u32,
    /// Which.
    pub index: u32,
    /// Vectors.
    pub count: u32,
}

/// Of DEVICE_SET_IRQS; eventfds come beside it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IrqSet {
    /// Bytes of this structure.
    pub argsz: u32,
    /// `VFIO_IRQ_SET_*`.
    pub flags: u32,
    /// Kind.
    pub index: u32,
    /// First vector.
    pub start: u32,
    /// Vectors.
    pub count: u32,
}

/// Of REGION_READ and REGION_WRITE, both ways; data follows where it is carried.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RegionAccess {
    /// In the region.
    pub offset: u64,
    /// Which.
    pub region: u32,
    /// Bytes of data.
    pub count: u32,
}

/// Of DMA_READ and DMA_WRITE, both ways; data follows where it is carried.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DmaAccess {
    /// First IOVA.
    pub address: u64,
    /// Bytes of data.
    pub count: u64,
}

/// The JSON of VERSION.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct VersionData {
    /// What the sender can.
    #[serde(default)]
    pub capabilities: Capabilities,
}

/// What a sender can. What it does not name has the specification's default.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Capabilities {
    /// Files that it takes with one message.
    pub max_msg_fds: u32,
    /// Bytes of data that it takes with one message.
    pub max_data_xfer_size: u64,
    /// Mappings that it holds at a time.
    pub max_dma_maps: u64,
    /// Page sizes of mappings, one bit a size.
    pub pgsizes: u64,
    /// A second socket, for commands of the server.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub twin_socket: Option<TwinSocket>,
}

impl Default for Capabilities {
    fn default() -> Self {
        Self { max_msg_fds: 1, max_data_xfer_size: 1 << 20, max_dma_maps: 65_535, pgsizes: 4096, twin_socket: None }
    }
}

/// Of the second socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct TwinSocket {
    /// It is wanted, or given.
    pub supported: bool,
    /// Which of the files of the reply it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fd_index: Option<usize>,
}

/// The payload of a VERSION message.
pub fn version_payload(version: Version, capabilities: &Capabilities) -> Vec<u8> {
    let mut payload = version.as_bytes().to_vec();
    let data = VersionData { capabilities: capabilities.clone() };
    // Numbers and switches always have a text.
    payload.extend(serde_json::to_vec(&data).unwrap_or_default());
    payload.push(0);
    payload
}

/// What a VERSION message says; `None` for one that is none.
pub fn parse_version(payload: &[u8]) -> Option<(Version, Capabilities)> {
    let (version, text) = Version::read_from_prefix(payload).ok()?;
    let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
    if text.is_empty() {
        return Some((version, Capabilities::default()));
    }
    let data: VersionData = serde_json::from_slice(text).ok()?;
    Some((version, data.capabilities))
}
