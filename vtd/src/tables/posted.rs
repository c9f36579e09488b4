//! Interrupt posting: how an interrupt is recorded in a posted interrupt descriptor, and who is notified (A-17).
//! Sections 5.2.2 to 5.2.4 and 9.12.
//!
//! ```text
//!  words 0 to 3: PIR     4: ON, SN, NV, NDST     5 to 7: reserved
//!
//!  hardware changes the whole descriptor at once. Here
//!   1. reserved fields are checked, before anything is written
//!   2. the bit of the vector is set in PIR
//!   3. ON is looked at, and SN: if a notification is owed, ON is set, where it is clear still
//!   4. whoever set ON sends the notification
//! ```
//!
//! Who takes interrupts out of a descriptor, a processor or a program, clears ON first and takes PIR after that; who
//! clears SN looks at PIR after that. So whatever sees ON set, or SN, at step 3 has its bit in PIR before they are
//! cleared, and it is found: no interrupt is lost. One can be taken out between the steps 2 and 3, and then the
//! notification finds an empty PIR, which software knows: an interrupt that comes while another one is taken out does
//! the same on hardware.

use crate::spec::fault::InterruptFaultReason;
use crate::spec::irte::PostedControl;
use crate::sync::fence_after_update;

/// Words of a descriptor.
pub(crate) const WORDS: usize = 8;
/// The word that is a [`PostedControl`].
pub(crate) const CONTROL: usize = 4;
/// Times that the control word is looked at again because a processor changed it meanwhile.
const ATTEMPTS: usize = 64;

/// The words of a descriptor in memory, which processors and other interrupts change at the same time.
pub(crate) trait DescriptorWords {
    /// The word at `index`, read once.
    fn get(&self, index: usize) -> Option<u64>;
    /// Sets `bits` at `index`, and leaves the others as they are.
    fn set_bits(&self, index: usize, bits: u64) -> Option<()>;
    /// Writes `new` at `index` if `old` is there, and says whether it was.
    fn exchange(&self, index: usize, old: u64, new: u64) -> Option<bool>;
}

/// Records `vector` in a descriptor. What is given back says whom to notify, if anybody is to be.
///
/// # Errors
/// The interrupt is blocked: a reserved field is not zero (nothing was written then), or there is no memory.
pub(crate) fn post(
    words: &impl DescriptorWords,
    vector: u8,
    urgent: bool,
    extended_mode: bool,
) -> Result<Option<PostedControl>, InterruptFaultReason> {
    let get = |index| words.get(index).ok_or(InterruptFaultReason::DescriptorAccess);
    let control = || get(CONTROL).map(PostedControl::from_bits);
    let first = control()?;
    let destination_reserved = !extended_mode && first.destination() & !0xff00 != 0;
    let mut reserved = destination_reserved || first.reserved() != 0 || first.reserved_middle() != 0;
    for index in CONTROL + 1..WORDS {
        reserved |= get(index)? != 0;
    }
    if reserved {
        return Err(InterruptFaultReason::DescriptorReserved);
    }
    let access = |done: Option<()>| done.ok_or(InterruptFaultReason::DescriptorAccess);
    access(words.set_bits(usize::from(vector / 64), 1 << (vector % 64)))?;
    // The bit is there before ON and SN are looked at.
    fence_after_update();
    let owed = |control: PostedControl| !control.outstanding() && (urgent || !control.suppressed());
    let mut seen = control()?;
    for _ in 0..ATTEMPTS {
        if !owed(seen) {
            return Ok(None);
        }
        let notified = seen.with_outstanding(true).into_bits();
        let exchanged = words.exchange(CONTROL, seen.into_bits(), notified);
        if exchanged.ok_or(InterruptFaultReason::DescriptorAccess)? {
            return Ok(Some(seen));
        }
        seen = control()?;
    }
    // A guest that does not stop changing it gets a notification too many rather than one too few.
    access(words.set_bits(CONTROL, PostedControl::new().with_outstanding(true).into_bits()))?;
    Ok(Some(seen))
}
