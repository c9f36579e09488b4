//! Configuration space of an emulated function: 4 KiB with a mask of what software may write, and of what it clears
//! by writing ones. BAR sizing needs nothing else: the address bits below a BAR's size are simply not writable.

use crate::saved::Unfit;

/// Bytes of configuration space of one function.
pub const CONFIG_SIZE: usize = 4096;

/// Offset of the command register.
pub const COMMAND: u16 = 0x04;
/// Offset of the status register.
pub const STATUS: u16 = 0x06;
/// Offset of the header type.
pub const HEADER_TYPE: u16 = 0x0e;
/// Offset of BAR 0.
pub const BAR0: u16 = 0x10;
/// Offset of the expansion ROM's base address.
pub const ROM: u16 = 0x30;
/// Expansion ROM: it is decoded, while memory is.
pub const ROM_ENABLE: u32 = 1;
/// Offset of the pointer to the first capability.
pub const CAPABILITIES: u16 = 0x34;
/// Offset of the interrupt line.
pub const INTERRUPT_LINE: u16 = 0x3c;
/// Offset of the interrupt pin.
pub const INTERRUPT_PIN: u16 = 0x3d;

/// Command: I/O Space Enable.
pub const COMMAND_IO: u16 = 1 << 0;
/// Command: Memory Space Enable.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command: Bus Master Enable.
pub const COMMAND_MASTER: u16 = 1 << 2;
/// Command: Interrupt Disable (INTx).
pub const COMMAND_INTX_OFF: u16 = 1 << 10;
/// Status: Interrupt Status (INTx).
pub const STATUS_INTX: u16 = 1 << 3;
/// Status: there is a capability list.
pub const STATUS_CAPABILITIES: u16 = 1 << 4;

/// Capability id: power management.
pub const CAP_POWER: u8 = 0x01;
/// Capability id: message-signalled interrupts.
pub const CAP_MSI: u8 = 0x05;
/// Capability id: PCI Express.
pub const CAP_EXPRESS: u8 = 0x10;
/// Capability id: MSI-X.
pub const CAP_MSIX: u8 = 0x11;
/// Capability id: advanced features.
pub const CAP_ADVANCED: u8 = 0x13;

/// Who a function says it is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision id.
    pub revision: u8,
    /// Base class in bits 23:16, subclass in 15:8, programming interface in 7:0.
    pub class: u32,
    /// Subsystem vendor id and subsystem id.
    pub subsystem: (u16, u16),
}

/// What a BAR is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BarKind {
    /// 32-bit, not prefetchable.
    Memory32,
    /// 32-bit, prefetchable.
    Prefetchable32,
    /// 64-bit (takes the next BAR too), not prefetchable.
    Memory64,
    /// 64-bit, prefetchable.
    Prefetchable64,
    /// Ports.
    Io,
}

impl BarKind {
    /// What of the BAR software cannot write, whatever its size is: bits 3:0, or 1:0 of ports.
    pub(crate) const fn flags(self) -> u32 {
        match self {
            Self::Memory32 => 0x0,
            Self::Prefetchable32 => 0x8,
            Self::Memory64 => 0x4,
            Self::Prefetchable64 => 0xc,
            Self::Io => 0x1,
        }
    }
    /// The kind that bits 3:0 of a BAR say; `None` for reserved types.
    pub const fn of(bar: u32) -> Option<Self> {
        match bar & 0xf {
            // Bits 3:2 are bits of its address.
            0x1 | 0x5 | 0x9 | 0xd => Some(Self::Io),
            0x0 => Some(Self::Memory32),
            0x8 => Some(Self::Prefetchable32),
            0x4 => Some(Self::Memory64),
            0xc => Some(Self::Prefetchable64),
            _ => None,
        }
    }
    /// The bits of the register that are none of an address.
    const fn address_less(self) -> u32 {
        if matches!(self, Self::Io) { 0x3 } else { 0xf }
    }
    /// Whether the next BAR holds the upper half.
    pub const fn is_64(self) -> bool {
        matches!(self, Self::Memory64 | Self::Prefetchable64)
    }
    /// The smallest and the largest number of bytes that such a BAR has.
    pub const fn sizes(self) -> (u64, u64) {
        match self {
            Self::Memory32 | Self::Prefetchable32 => (16, 1 << 31),
            Self::Memory64 | Self::Prefetchable64 => (16, 1 << 63),
            // PCI allows 256 on behalf of other machines; a PC has 64 Ki ports.
            Self::Io => (4, 1 << 15),
        }
    }
}

/// Configuration space of an emulated function with a type 0 header.
pub struct ConfigSpace {
    bytes: Box<[u8; CONFIG_SIZE]>,
    writable: Box<[u8; CONFIG_SIZE]>,
    clear_on_one: Box<[u8; CONFIG_SIZE]>,
    bars: [Option<(BarKind, u64)>; 6],
    rom: Option<u64>,
    /// Requests get through the bridges above.
    gets_through: bool,
    next_capability: u16,
    last_link: u16,
}

impl ConfigSpace {
    /// An endpoint without BARs and capabilities. Memory Enable, Bus Master, Interrupt Disable, the error enables and
    /// the interrupt line are writable.
    pub fn new(id: &Identity) -> Self {
        let mut config = Self {
            bytes: Box::new([0; CONFIG_SIZE]),
            writable: Box::new([0; CONFIG_SIZE]),
            clear_on_one: Box::new([0; CONFIG_SIZE]),
            bars: [None; 6],
            rom: None,
            gets_through: true,
            next_capability: 0x40,
            last_link: CAPABILITIES,
        };
        config.put(0x00, &id.vendor.to_le_bytes());
        config.put(0x02, &id.device.to_le_bytes());
        config.put(0x08, &(id.class << 8 | u32::from(id.revision)).to_le_bytes());
        config.put(0x2c, &id.subsystem.0.to_le_bytes());
        config.put(0x2e, &id.subsystem.1.to_le_bytes());
        config.allow(COMMAND, &(COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_OFF | 0x0140).to_le_bytes());
        config.allow(0x0c, &[0xff]);
        config.allow(INTERRUPT_LINE, &[0xff]);
        config.clear_on_one(STATUS + 1, &[0xf9]);
        config
    }

    /// Says which of INTA (1) to INTD (4) the function uses, and what the interrupt line register holds at first.
    pub fn set_interrupt_pin(&mut self, pin: u8, line: u8) {
        self.put(INTERRUPT_PIN, &[pin]);
        self.put(INTERRUPT_LINE, &[line]);
    }

    /// Adds BAR `index` (0 to 5) of `size` bytes, a power of two that its kind [can have](BarKind::sizes).
    ///
    /// # Panics
    /// When the index or the size is not as said, or the BAR is there already: mistakes of the model's author.
    pub fn add_bar(&mut self, index: usize, kind: BarKind, size: u64) {
        let (smallest, largest) = kind.sizes();
        assert!(size.is_power_of_two() && (smallest..=largest).contains(&size) && self.bars[index].is_none());
        let at = BAR0 + 4 * index as u16;
        let mask = !(size - 1);
        self.put(at, &kind.flags().to_le_bytes());
        self.allow(at, &(mask as u32).to_le_bytes());
        if kind == BarKind::Io {
            self.writable[usize::from(COMMAND)] |= COMMAND_IO as u8;
        }
        if kind.is_64() {
            assert!(index < 5 && self.bars[index + 1].is_none());
            self.allow(at + 4, &((mask >> 32) as u32).to_le_bytes());
        }
        self.bars[index] = Some((kind, size));
    }

    /// Adds an expansion ROM of `size` bytes, a power of two of 2 KiB to 16 MiB.
    ///
    /// # Panics
    /// When the size is another: a mistake of the model's author.
    pub fn add_rom(&mut self, size: u64) {
        assert!(size.is_power_of_two() && (1 << 11..=1 << 24).contains(&size));
        self.allow(ROM, &(!(size as u32 - 1) | ROM_ENABLE).to_le_bytes());
        self.rom = Some(size);
    }

    /// Appends a capability with `body` after its two-byte header; `writable` masks what software may write of the body
    /// (bytes that it lacks are read-only). Gives the capability's offset.
    ///
    /// # Panics
    /// When the first 256 bytes are full: a mistake of the model's author.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        let at = self.next_capability;
        let end = (usize::from(at) + 2 + body.len()).next_multiple_of(4);
        assert!(end <= 256 && writable.len() <= body.len());
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        let link = self.last_link;
        self.put(link, &[at as u8]);
        self.last_link = at + 1;
        self.next_capability = end as u16;
        let status = self.u16(STATUS) | STATUS_CAPABILITIES;
        self.put(STATUS, &status.to_le_bytes());
        at
    }

    /// Sets bytes whatever software may write.
    pub fn put(&mut self, offset: u16, data: &[u8]) {
        let at = usize::from(offset);
        self.bytes[at..at + data.len()].copy_from_slice(data);
    }

    /// Lets software write the bits of `mask`.
    pub fn allow(&mut self, offset: u16, mask: &[u8]) {
        let at = usize::from(offset);
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    /// Lets software clear the bits of `mask` by writing ones.
    pub fn clear_on_one(&mut self, offset: u16, mask: &[u8]) {
        let at = usize::from(offset);
        self.clear_on_one[at..at + mask.len()].copy_from_slice(mask);
    }

    /// Reads as software does. What lies outside reads as ones.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(usize::from(offset) + i).copied().unwrap_or(0xff);
        }
    }

    /// Writes as software does: through the masks. What lies outside is dropped.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (i, new) in data.iter().enumerate() {
            let at = usize::from(offset) + i;
            let Some(byte) = self.bytes.get_mut(at) else { return };
            let (writable, clear) = (self.writable[at], self.clear_on_one[at]);
            *byte = (*byte & !writable | new & writable) & !(new & clear);
        }
    }

    /// The 16 bits at `offset`, which is at most 4094.
    pub fn u16(&self, offset: u16) -> u16 {
        let at = usize::from(offset);
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    /// The 32 bits at `offset`, which is at most 4092.
    pub fn u32(&self, offset: u16) -> u32 {
        u32::from(self.u16(offset)) | u32::from(self.u16(offset + 2)) << 16
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        self.u16(COMMAND)
    }

    /// Whether requests get through the bridges above: as long as nothing is said, they do. No register, and no reset
    /// changes it.
    pub fn set_gets_through(&mut self, gets_through: bool) {
        self.gets_through = gets_through;
    }

    /// Whether the function's requests reach anything: its Bus Master is set, and they get through the bridges above.
    pub fn is_master(&self) -> bool {
        self.command() & COMMAND_MASTER != 0 && self.gets_through
    }

    /// Where BAR `index` is decoded now, first and last address (of memory, or of ports): `None` while Memory Enable,
    /// or I/O Enable, is clear, when there is no such BAR, or when software has not given it an address.
    pub fn decoded(&self, index: usize) -> Option<(u64, u64)> {
        let (kind, size) = (*self.bars.get(index)?)?;
        let enable = if kind == BarKind::Io { COMMAND_IO } else { COMMAND_MEMORY };
        if self.command() & enable == 0 {
            return None;
        }
        let at = BAR0 + 4 * index as u16;
        let mut first = u64::from(self.u32(at) & !kind.address_less());
        if kind.is_64() {
            first |= u64::from(self.u32(at + 4)) << 32;
        }
        // Address 0 is what an unassigned BAR holds, and ones in all writable bits is a sizing probe.
        let last = first.checked_add(size - 1)?;
        let probed = if kind.is_64() { u64::MAX } else { u64::from(u32::MAX) };
        let exists = kind != BarKind::Io || last <= 0xffff;
        (first != 0 && last != probed && exists).then_some((first, last))
    }

    /// Where the expansion ROM is decoded now: `None` while Memory Enable or its own enable is clear, when there is
    /// none, or when software has not given it an address.
    pub fn decoded_rom(&self) -> Option<(u64, u64)> {
        let (register, size) = (self.u32(ROM), self.rom?);
        let first = u64::from(register & !0x7ff);
        let last = first + (size - 1);
        let enabled = register & ROM_ENABLE != 0 && self.command() & COMMAND_MEMORY != 0;
        // Ones in all bits is a sizing probe, without the enable in most guests.
        (enabled && first != 0 && last != u64::from(u32::MAX)).then_some((first, last))
    }

    /// Gives BAR `index` an address before the guest runs (a guest without its own PCI assignment needs that).
    pub fn assign(&mut self, index: usize, address: u64) {
        let at = BAR0 + 4 * index as u16;
        self.write(at, &(address as u32).to_le_bytes());
        if matches!(self.bars[index], Some((kind, _)) if kind.is_64()) {
            self.write(at + 4, &((address >> 32) as u32).to_le_bytes());
        }
    }

    /// What it holds, to be saved.
    pub fn bytes(&self) -> &[u8] {
        &*self.bytes
    }

    /// Puts back what [`ConfigSpace::bytes`] gave. `own` are the bits of which the function says what they are:
    /// offsets and masks.
    ///
    /// # Errors
    /// Other bits differ than those that software can write: these are of another function. Then nothing changed.
    pub fn restore(&mut self, bytes: &[u8], own: &[(u16, u16)]) -> Result<(), Unfit> {
        let wrong = Unfit::Value("configuration space");
        let bytes: &[u8; CONFIG_SIZE] = bytes.try_into().map_err(|_| wrong.clone())?;
        let is_own = |at: usize| {
            let of = |(offset, mask): &(u16, u16)| match at.wrapping_sub(usize::from(*offset)) {
                half @ 0..2 => mask.to_le_bytes()[half],
                _ => 0,
            };
            own.iter().fold(0, |bits, of_function| bits | of(of_function))
        };
        let fixed = |at: usize| !(self.writable[at] | self.clear_on_one[at] | is_own(at));
        if (0..CONFIG_SIZE).any(|at| (bytes[at] ^ self.bytes[at]) & fixed(at) != 0) {
            return Err(wrong);
        }
        *self.bytes = *bytes;
        Ok(())
    }

    /// Back to power-on: everything that software may write is cleared, but for the interrupt line.
    pub fn reset(&mut self) {
        let line = self.bytes[usize::from(INTERRUPT_LINE)];
        for (byte, (writable, clear)) in self.bytes.iter_mut().zip(self.writable.iter().zip(self.clear_on_one.iter())) {
            *byte &= !(writable | clear);
        }
        self.put(INTERRUPT_LINE, &[line]);
    }
}
