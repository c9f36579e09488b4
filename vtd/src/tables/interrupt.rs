//! Interrupt remapping: what becomes of a message that a device sends (A-9, A-17). Sections 5.1 and 5.2.
//!
//! Pure logic: nothing is cached and nothing is recorded here. A message is looked up when it is programmed, to make a
//! route of it, and again when the guest invalidates its entry; whether it faults is told to the guest only when it
//! fires. One whose entry is posted has no route: it is posted when it fires.
//!
//! ```text
//!  device --Msi--> outside 0xfeexxxxx?  no interrupt
//!                  IRE off?             as it is
//!                  compatibility?       as it is with CFIS and without EIME, else fault 0x25
//!                  remappable?          handle (+ subhandle) -> IRTE: present, reserved, source -> Msi, or Posting
//! ```

use std::sync::atomic::{Ordering, fence};

use vm_memory::GuestMemoryBackend;

use crate::config::UnitConfig;
use crate::ids::{Gpa, Requester};
use crate::memory::Words;
use crate::msi::Msi;
use crate::spec::INTERRUPT_WINDOW;
use crate::spec::fault::InterruptFaultReason;
use crate::spec::irte::{
    CompatibilityAddress, CompatibilityData, DeliveryMode, Irte, IrteHigh, IrteLow, PostedControl, PostedIrteHigh,
    PostedIrteLow, RemappableAddress, RemappableData, SourceValidation,
};
use crate::spec::registers::InterruptTableAddress;
use crate::tables::posted::{self, DescriptorWords};

/// How often an entry is read at most, when the guest changes it meanwhile.
const READS: usize = 8;

/// An interrupt that the unit blocked. It is told to the guest when the interrupt fires, and never before.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
#[error("an interrupt of {requester} was blocked at entry {index}: {reason:?} ({:#x})", .reason.code())]
pub struct RemapFault {
    /// Who sent it.
    pub requester: Requester,
    /// Index into the interrupt remapping table, 0 if the request has none, 0xffff if it is beyond that.
    pub index: u16,
    /// Why it was blocked.
    pub reason: InterruptFaultReason,
    /// FPD of the entry silences it: it is not recorded.
    pub silenced: bool,
}

/// Why a message is not delivered.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum RemapError {
    /// The unit blocked it.
    #[error(transparent)]
    Fault(#[from] RemapFault),
    /// Its address (the value) is outside the interrupt address range: to a bus it is a write to memory.
    #[error("a message to {0:#x} is no interrupt: the address is outside 0xfee00000 to 0xfeefffff")]
    NotAnInterrupt(u64),
    /// No unit is in the segment of who sent it.
    #[error("no unit is in segment {0}, whose message it is")]
    NoUnit(u16),
}

/// What becomes of a message that is not blocked.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Remapped {
    /// The processors get this one.
    Message(Msi),
    /// It is posted when it fires.
    Posted(Posting),
}

impl From<Msi> for Remapped {
    fn from(msi: Msi) -> Self {
        Self::Message(msi)
    }
}

/// A message whose entry is posted, as the entry was when it was looked up. [`crate::Unit::post`] posts it. Section
/// 5.2.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Posting {
    /// Who sends it.
    pub requester: Requester,
    /// Index into the interrupt remapping table.
    pub index: u16,
    /// FPD of the entry: faults of its descriptor are not recorded.
    pub silenced: bool,
    /// PDA: where its descriptor is, a multiple of 64.
    pub descriptor: Gpa,
    /// VV: its bit in the descriptor.
    pub vector: u8,
    /// URG: it is notified of even where notifications are suppressed.
    pub urgent: bool,
    /// EIME: the descriptor names the processor by 32 bits.
    pub extended_mode: bool,
}

impl<M: GuestMemoryBackend> DescriptorWords for Words<'_, M> {
    fn get(&self, index: usize) -> Option<u64> {
        self.get(index)
    }
    fn set_bits(&self, index: usize, bits: u64) -> Option<()> {
        self.set_bits(index, bits)
    }
    fn exchange(&self, index: usize, old: u64, new: u64) -> Option<bool> {
        self.exchange(index, old, new)
    }
}

impl Posting {
    /// Posts it now. Gives the notification, if one is owed.
    pub(crate) fn post<M: GuestMemoryBackend>(&self, memory: &M) -> Result<Option<Msi>, RemapFault> {
        let &Self { requester, index, silenced, descriptor, vector, urgent, extended_mode } = self;
        Words::at(memory, descriptor, posted::WORDS)
            .ok_or(InterruptFaultReason::DescriptorAccess)
            .and_then(|words| posted::post(&words, vector, urgent, extended_mode))
            .map(|notified| notified.map(|control| notification(control, extended_mode)))
            .map_err(|reason| RemapFault { requester, index, reason, silenced })
    }
}

/// The notification of a descriptor: physical, fixed, by its edge. Section 5.2.3.
fn notification(control: PostedControl, extended_mode: bool) -> Msi {
    let address = to_processor(CompatibilityAddress::new(), control.destination(), extended_mode);
    let data = CompatibilityData::new().with_vector(control.vector()).with_delivery_mode(DeliveryMode::Fixed as u8);
    Msi { address: address.into_bits(), data: data.into_bits() }
}

/// `address` with this destination of 32 bits, or, without EIME, of which bits 15:8 count.
fn to_processor(address: CompatibilityAddress, destination: u32, extended_mode: bool) -> CompatibilityAddress {
    let id = if extended_mode { destination } else { destination >> 8 & 0xff };
    address.with_destination(id as u8).with_destination_high(id >> 8)
}

/// Which entries of the interrupt remapping table a guest invalidated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EntriesChanged {
    /// All of them, or how they are used: every message is to be remapped again, compatibility format too.
    All,
    /// Those from `first` on.
    Range {
        /// First index.
        first: u16,
        /// Number of entries, 1 to 65536; `first + count` is at most 65536.
        count: u32,
    },
}

impl EntriesChanged {
    /// The `2^mask` entries around `index`, as an index-selective invalidation names them; `mask` is 0 to 15.
    pub(crate) fn masked(index: u16, mask: u8) -> Self {
        let count = 1u32 << mask;
        Self::Range { first: index & !((count - 1) as u16), count }
    }

    /// Both, and what lies between them.
    pub(crate) fn join(self, other: Self) -> Self {
        match (self, other) {
            (Self::Range { first: a, count: of_a }, Self::Range { first: b, count: of_b }) => {
                let end = (u32::from(a) + of_a).max(u32::from(b) + of_b);
                let first = a.min(b);
                Self::Range { first, count: end - u32::from(first) }
            }
            _ => Self::All,
        }
    }

    /// Whether a route that was made of `msi` is to be made again.
    pub fn concerns(&self, msi: Msi) -> bool {
        match *self {
            Self::All => true,
            Self::Range { first, count } => interrupt_index(msi)
                .and_then(|index| index.checked_sub(u32::from(first)))
                .is_some_and(|offset| offset < count),
        }
    }
}

/// Hears of changes to interrupt remapping.
pub trait RemapListener: Send + Sync {
    /// The guest invalidated `changed`, or interrupt remapping was turned on or off. Routes that it
    /// [concerns](EntriesChanged::concerns) must be made again with [`crate::Unit::remap`] before this returns, all of
    /// them at once: the guest is told that nothing reaches the old target. What fired before and is to be posted is
    /// given to [`crate::Unit::post`] before this returns, too.
    ///
    /// Called with the queue of the unit held, never twice at once: the listener may ask the unit to remap, to post and
    /// to record faults, and must not access its registers. A route that another thread is making at the same time must
    /// be made under a lock that this call takes, too, from the look-up on: else a look-up from before the invalidation
    /// could win.
    fn entries_changed(&self, changed: EntriesChanged);
}

/// The index that a request in remappable format computes, up to 2 * 65535; `None` for any other message.
pub fn interrupt_index(msi: Msi) -> Option<u32> {
    let address = RemappableAddress::from_bits(in_range(msi)?);
    let data = RemappableData::from_bits(msi.data);
    let subhandle = if address.subhandle_valid() { data.subhandle() } else { 0 };
    // Not 16 bits wide: a sum that wrapped would lead to somebody else's entry.
    address.remappable().then(|| u32::from(address.handle()) + u32::from(subhandle))
}

/// Bits 31:0 of the address, if it is in the interrupt address range.
fn in_range(msi: Msi) -> Option<u32> {
    INTERRUPT_WINDOW.contains(msi.address).then_some(msi.address as u32)
}

/// Who sends a message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Sender {
    /// With the source id that the message carries.
    pub(crate) requester: Requester,
    /// The id is the sender's alone. If not, no entry that asks for a source lets the message pass.
    pub(crate) known: bool,
    /// Entries that ask for a source look at it.
    pub(crate) checked: bool,
}

impl From<Requester> for Sender {
    fn from(requester: Requester) -> Self {
        Self { requester, known: true, checked: true }
    }
}

/// How interrupts are remapped now: what the guest's last commands left.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Remapping {
    /// IRES.
    pub(crate) enabled: bool,
    /// CFIS.
    pub(crate) compatibility: bool,
    /// IRTA as it was when SIRTP was last given.
    pub(crate) table: InterruptTableAddress,
    /// Posted entries are offered, and addresses of descriptors have this many bits.
    pub(crate) posted_within: Option<u8>,
}

impl Remapping {
    /// Off, as at power-on.
    pub(crate) fn off(config: &UnitConfig) -> Self {
        let posted_within = config.posted_interrupts.then_some(config.host_address_width);
        Self { posted_within, ..Self::default() }
    }

    /// What becomes of it when `sender` sends `msi`.
    pub(crate) fn remap<M: GuestMemoryBackend>(
        &self,
        memory: &M,
        sender: impl Into<Sender>,
        msi: Msi,
    ) -> Result<Remapped, RemapError> {
        let sender = sender.into();
        let address = RemappableAddress::from_bits(in_range(msi).ok_or(RemapError::NotAnInterrupt(msi.address))?);
        if !self.enabled {
            return Ok(Remapped::Message(msi));
        }
        let fault = |index: u32, reason, silenced| {
            let index = u16::try_from(index).unwrap_or(u16::MAX);
            RemapError::Fault(RemapFault { requester: sender.requester, index, reason, silenced })
        };
        let Some(index) = interrupt_index(msi) else {
            // With EIME the processors have ids that this format cannot name. Section 5.1.4.
            return if self.compatibility && !self.table.extended_mode() {
                Ok(Remapped::Message(msi))
            } else {
                Err(fault(0, InterruptFaultReason::CompatibilityBlocked, false))
            };
        };
        if address.subhandle_valid() && RemappableData::from_bits(msi.data).reserved() != 0 {
            return Err(fault(0, InterruptFaultReason::RequestReserved, false));
        }
        if index >= self.table.entries() {
            return Err(fault(index, InterruptFaultReason::IndexBeyondTable, false));
        }
        let entry = self.read(memory, index).ok_or_else(|| fault(index, InterruptFaultReason::TableAccess, false))?;
        let silenced = entry.low.fault_processing_disable();
        self.apply(&entry, index as u16, sender).map_err(|reason| fault(index, reason, silenced))
    }

    /// The entry at `index`, as it stood in memory at one moment; as not present if the guest does not stop changing
    /// it. `None` where there is no memory.
    ///
    /// Hardware reads the 16 bytes at once. Of the two words, Linux writes the lower one first, both to set an entry up
    /// and to clear it, so no order of two reads is safe: the upper word of a cleared entry asks for no source
    /// validation, and must not be taken together with the lower word from before. If the lower word is the same before
    /// and after the upper one was read, the two belong together.
    fn read<M: GuestMemoryBackend>(&self, memory: &M, index: u32) -> Option<Irte> {
        let address = (self.table.page() << 12).checked_add(u64::from(index) * Irte::SIZE)?;
        let words = Words::at(memory, Gpa(address), 2)?;
        read_whole(|word| {
            let value = words.get(word);
            fence(Ordering::Acquire);
            value
        })
    }

    /// What `entry`, that at `index`, says about a request of `sender`.
    fn apply(&self, entry: &Irte, index: u16, sender: Sender) -> Result<Remapped, InterruptFaultReason> {
        let (low, high) = (entry.low, entry.high);
        if !low.present() {
            return Err(InterruptFaultReason::EntryNotPresent);
        }
        match self.posted_within {
            Some(width) if low.posted() => self.apply_posted(entry, index, sender, width).map(Remapped::Posted),
            _ => self.apply_remapped(low, high, sender).map(Remapped::Message),
        }
    }

    /// The same of one that is present and posted; addresses have `width` bits.
    fn apply_posted(
        &self,
        entry: &Irte,
        index: u16,
        sender: Sender,
        width: u8,
    ) -> Result<Posting, InterruptFaultReason> {
        let low = PostedIrteLow::from_bits(entry.low.into_bits());
        let high = PostedIrteHigh::from_bits(entry.high.into_bits());
        let descriptor = u64::from(high.descriptor_high()) << 32 | u64::from(low.descriptor_low()) << 6;
        let beyond = descriptor >> width != 0;
        let reserved = high.reserved() != 0 || low.reserved_high() != 0 || low.reserved_middle() != 0;
        if beyond || reserved || low.reserved() != 0 {
            return Err(InterruptFaultReason::EntryReserved);
        }
        let validation = SourceValidation::from_bits(high.validation()).ok_or(InterruptFaultReason::EntryReserved)?;
        if !may_use(validation, entry.high, sender) {
            return Err(InterruptFaultReason::SourceBlocked);
        }
        Ok(Posting {
            requester: sender.requester,
            index,
            silenced: low.fault_processing_disable(),
            descriptor: Gpa(descriptor),
            vector: low.vector(),
            urgent: low.urgent(),
            extended_mode: self.table.extended_mode(),
        })
    }

    /// The same of one that is present and remapped.
    fn apply_remapped(&self, low: IrteLow, high: IrteHigh, sender: Sender) -> Result<Msi, InterruptFaultReason> {
        let extended_mode = self.table.extended_mode();
        let destination_reserved = !extended_mode && low.destination() & !0xff00 != 0;
        // Where posted interrupts are not offered (CAP.PI is 0), IM is reserved.
        if low.posted() || low.reserved() != 0 || low.reserved_high() != 0 || destination_reserved {
            return Err(InterruptFaultReason::EntryReserved);
        }
        let validation = SourceValidation::from_bits(high.validation()).filter(|_| high.reserved() == 0);
        let validation = validation.ok_or(InterruptFaultReason::EntryReserved)?;
        let mode = DeliveryMode::from_bits(low.delivery_mode()).ok_or(InterruptFaultReason::EntryReserved)?;
        if !may_use(validation, high, sender) {
            return Err(InterruptFaultReason::SourceBlocked);
        }
        let address =
            CompatibilityAddress::new().with_logical(low.logical()).with_redirection_hint(low.redirection_hint());
        let address = to_processor(address, low.destination(), extended_mode);
        let data = CompatibilityData::new()
            .with_vector(low.vector())
            .with_delivery_mode(mode as u8)
            .with_assert(low.level())
            .with_level(low.level());
        Ok(Msi { address: address.into_bits(), data: data.into_bits() })
    }
}

/// An entry of which `word` reads the lower (0) and the upper (1) half.
fn read_whole(mut word: impl FnMut(usize) -> Option<u64>) -> Option<Irte> {
    let mut low = word(0)?;
    for _ in 0..READS {
        let high = word(1)?;
        let again = word(0)?;
        if again == low {
            return Some(Irte { low: IrteLow::from_bits(low), high: IrteHigh::from_bits(high) });
        }
        low = again;
    }
    Some(Irte { low: IrteLow::from_bits(low).with_present(false), high: IrteHigh::new() })
}

/// Whether an entry may be used by `sender`.
fn may_use(validation: SourceValidation, entry: IrteHigh, sender: Sender) -> bool {
    let Sender { requester, known, checked } = sender;
    match validation {
        SourceValidation::None => true,
        _ if !checked => true,
        _ if !known => false,
        SourceValidation::SourceId => {
            let ignored = [0, 0b100, 0b110, 0b111][usize::from(entry.source_qualifier() & 3)];
            (entry.source() ^ requester.sid.0) & !ignored == 0
        }
        SourceValidation::BusRange => {
            let [first, last] = entry.source().to_be_bytes();
            (first..=last).contains(&requester.sid.bus())
        }
    }
}

#[cfg(test)]
#[path = "interrupt_test.rs"]
mod tests;
