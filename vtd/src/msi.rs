//! Messages: what a device writes to interrupt, and who delivers those of the unit itself.

use crate::spec::INTERRUPT_WINDOW;

/// A message-signalled interrupt: what a device writes, and where.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Msi {
    /// Address of the write, 0xfee00000 to 0xfeefffff in its low 32 bits.
    pub address: u64,
    /// The 32 bits written.
    pub data: u32,
}

impl Msi {
    /// Whether the write is an interrupt: below 4 GiB, to the interrupt address range, but for bits 31:8 of the
    /// destination in bits 63:40 of the address. Section 3.14; section 11.4.7.4 for the destination.
    pub(crate) const fn is_interrupt(&self) -> bool {
        const DESTINATION: u64 = 0xffff_ff00 << 32;
        let address = self.address & !DESTINATION;
        INTERRUPT_WINDOW.contains(address)
    }
}

/// Delivers the unit's own interrupts (fault event, invalidation completion). They are never remapped. An event whose
/// address registers name no interrupt is a write to guest memory, and does not come here.
pub trait MsiSink: Send + Sync {
    /// Deliver `msi` now.
    fn signal(&self, msi: Msi);
}
