//! A split virtqueue (H-2; section 2.7), held to what a driver may do: what it may not makes the ring [`Broken`].

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_queue::{Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory};

/// The driver's ring or buffer cannot be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct Broken(pub &'static str);

/// Bytes of a buffer that follow each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// IOVA of the first one.
    pub iova: u64,
    /// How many. `iova + len` may be beyond the last address: then the access fails.
    pub len: u32,
}

/// A buffer that the driver made available.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Chain {
    /// Its name in the ring.
    pub head: u16,
    /// What the device reads.
    pub readable: Vec<Part>,
    /// What the device writes.
    pub writable: Vec<Part>,
}

/// How many bytes `parts` have.
pub fn total(parts: &[Part]) -> u64 {
    parts.iter().map(|part| u64::from(part.len)).sum()
}

/// The bytes `skip` to `skip + len` of `parts`, as parts; less where they end.
pub fn slice(parts: &[Part], skip: u64, len: u64) -> Vec<Part> {
    let (mut skip, mut left) = (skip, len);
    let mut found = Vec::new();
    for part in parts {
        let from = skip.min(part.len.into());
        skip -= from;
        let take = (u64::from(part.len) - from).min(left);
        left -= take;
        if take > 0 {
            // Where the address space ends, what is asked for lies beyond it, and fails there.
            found.push(Part { iova: part.iova.saturating_add(from), len: take as u32 });
        }
    }
    found
}

/// Reads the first `data.len()` bytes of `parts`.
///
/// # Errors
/// They have less, or cannot be read; a fault has been recorded.
pub fn read(memory: &impl GuestMemory, parts: &[Part], data: &mut [u8]) -> Result<(), Broken> {
    let mut rest = data;
    for part in parts {
        let (now, later) = rest.split_at_mut(rest.len().min(part.len as usize));
        memory.read_slice(now, GuestAddress(part.iova)).map_err(|_| Broken("a buffer cannot be read"))?;
        rest = later;
    }
    if rest.is_empty() { Ok(()) } else { Err(Broken("a buffer is too short")) }
}

/// Writes `data` to the beginning of `parts`.
///
/// # Errors
/// They have less room, or cannot be written; a fault has been recorded.
pub fn write(memory: &impl GuestMemory, parts: &[Part], data: &[u8]) -> Result<(), Broken> {
    let mut rest = data;
    for part in parts {
        let (now, later) = rest.split_at(rest.len().min(part.len as usize));
        memory.write_slice(now, GuestAddress(part.iova)).map_err(|_| Broken("a buffer cannot be written"))?;
        rest = later;
    }
    if rest.is_empty() { Ok(()) } else { Err(Broken("a buffer is too short")) }
}

/// Where a driver put a queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// Entries.
    pub size: u16,
    /// IOVA of the descriptor table.
    pub descriptors: u64,
    /// IOVA of the available ring.
    pub available: u64,
    /// IOVA of the used ring.
    pub used: u64,
}

/// How far a queue is, modulo 2^16.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Positions {
    /// Buffers that were taken.
    pub available: u16,
    /// Buffers that were given back.
    pub used: u16,
}

/// A queue in use.
pub struct Ring {
    queue: Queue,
}

impl Ring {
    /// The queue at `place`, of at most `most` entries. `event_idx`: the driver says when it wants to be interrupted.
    ///
    /// # Errors
    /// Its size is no power of two or too large, or its parts are not aligned.
    pub fn new(most: u16, place: &Place, event_idx: bool) -> Result<Self, Broken> {
        let mut queue = Queue::new(most).map_err(|_| Broken("a queue cannot have that size"))?;
        queue.try_set_size(place.size).map_err(|_| Broken("a queue has a size that it cannot have"))?;
        let unaligned = |_| Broken("a part of a queue is not aligned");
        queue.try_set_desc_table_address(GuestAddress(place.descriptors)).map_err(unaligned)?;
        queue.try_set_avail_ring_address(GuestAddress(place.available)).map_err(unaligned)?;
        queue.try_set_used_ring_address(GuestAddress(place.used)).map_err(unaligned)?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        Ok(Self { queue })
    }

    /// The queue at `place`, as one that was saved with these positions.
    ///
    /// # Errors
    /// As those of [`Ring::new`].
    pub fn restored(most: u16, place: &Place, event_idx: bool, positions: Positions) -> Result<Self, Broken> {
        let mut ring = Self::new(most, place, event_idx)?;
        ring.queue.set_next_avail(positions.available);
        ring.queue.set_next_used(positions.used);
        Ok(ring)
    }

    /// How far it is.
    pub fn positions(&self) -> Positions {
        Positions { available: self.queue.next_avail(), used: self.queue.next_used() }
    }

    /// How many entries it has.
    pub fn entries(&self) -> u16 {
        self.queue.size()
    }

    /// The next buffer, if there is one.
    ///
    /// # Errors
    /// The ring cannot be reached, has more buffers than entries, or one that does not end within as many descriptors
    /// as the queue has entries, or what the device reads does not come before what it writes.
    pub fn pop<M: GuestMemory>(&mut self, memory: &M) -> Result<Option<Chain>, Broken> {
        let most = self.queue.size();
        let available = self.queue.avail_idx(memory, Ordering::Acquire).map_err(|e| broken(&e))?;
        if available.0 == self.queue.next_avail() {
            return Ok(None);
        }
        let mut buffers = self.queue.iter(memory).map_err(|e| broken(&e))?;
        let chain = buffers.next().ok_or(Broken("the available ring cannot be read"))?;
        let mut found = Chain { head: chain.head_index(), readable: Vec::new(), writable: Vec::new() };
        let mut ended = false;
        for (index, descriptor) in chain.enumerate() {
            if index >= usize::from(most) {
                return Err(Broken("a buffer has more descriptors than its queue has entries"));
            }
            let part = Part { iova: descriptor.addr().0, len: descriptor.len() };
            match (descriptor.is_write_only(), found.writable.is_empty()) {
                (true, _) => found.writable.push(part),
                (false, true) => found.readable.push(part),
                (false, false) => return Err(Broken("a buffer has parts to read behind parts to write")),
            }
            ended = !descriptor.has_next();
        }
        if ended { Ok(Some(found)) } else { Err(Broken("the descriptors of a buffer do not end, or cannot be read")) }
    }

    /// Puts the last buffer that was popped, and not put back, back.
    pub fn put_back(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a buffer to the driver, with how many bytes the device has written to it.
    ///
    /// # Errors
    /// The used ring cannot be written.
    pub fn push<M: GuestMemory>(&mut self, memory: &M, head: u16, written: u32) -> Result<(), Broken> {
        self.queue.add_used(memory, head, written).map_err(|e| broken(&e))
    }

    /// Asks for a kick when a buffer comes; `true` when one has come already.
    pub fn enable_kicks<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, Broken> {
        self.queue.enable_notification(memory).map_err(|e| broken(&e))
    }

    /// Whether the driver wants to hear of what was pushed since the last time this was asked.
    pub fn wants_interrupt<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, Broken> {
        self.queue.needs_notification(memory).map_err(|e| broken(&e))
    }
}

fn broken(error: &Error) -> Broken {
    Broken(match error {
        Error::InvalidAvailRingIndex => "the available ring has more buffers than entries",
        Error::InvalidDescriptorIndex => "a buffer begins at a descriptor that is not there",
        Error::QueueNotReady => "a queue has no available ring",
        _ => "a ring cannot be reached",
    })
}

#[cfg(test)]
#[path = "ring_test.rs"]
mod ring_test;
