//! What addresses mean to the DMA engine of an edu.

use vtd::spec::INTERRUPT_WINDOW;
use vtd::{Iova, Msi};

/// Where the buffer is, as the DMA engine sees it.
pub const BUFFER: u64 = 0x40000;
/// Bytes of the buffer.
pub const BUFFER_SIZE: usize = 4096;

/// The part of the buffer from `address` on, if all of it lies inside.
pub(super) fn in_buffer(address: u64, count: u64) -> Option<std::ops::Range<usize>> {
    let first = usize::try_from(address.checked_sub(BUFFER)?).ok()?;
    let end = first.checked_add(usize::try_from(count).ok()?)?;
    (end <= BUFFER_SIZE).then_some(first..end)
}

/// What a write of `data` to `to` is for the bus, if it is a message.
pub(super) fn message_of(to: Iova, data: &[u8]) -> Option<Msi> {
    let data = u32::from_le_bytes(data.try_into().ok()?);
    (INTERRUPT_WINDOW.contains(to.0) && to.0.is_multiple_of(4)).then_some(Msi { address: to.0, data })
}
