//! The network device (H-5; section 5.1): packets of a link of the host, which its kernel moves into and out of guest
//! memory.

use std::collections::VecDeque;
use std::os::fd::RawFd;

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MRG_RXBUF,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;

use super::ring::{Broken, Chain, Part, slice, total, write};
use super::{Device, Dma, Kind, Work};

/// Bytes before each packet: the header of section 5.1.6, with its count of buffers.
pub const HEADER: u64 = 12;
/// Where the count of buffers is.
const BUFFERS: u64 = 10;
/// The longest packet with its header: 64 KiB of IP, with an Ethernet header that may have a VLAN.
pub const LONGEST: u64 = HEADER + 18 + 0xffff;
/// The longest one that is no unfinished one, with its header.
const LONGEST_WHOLE: u64 = HEADER + 18 + 1500;
/// Entries of each queue.
const ENTRIES: u16 = 256;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Packets that one direction may have before it is the other one's turn.
const TURN: usize = 64;
/// Parts that one packet is received into, at most; with the bytes of [`LONGEST`] they lie in fewer than 512 pages.
const MOST_PARTS: usize = 240;

/// What a driver takes of packets that are not finished.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Offloads {
    /// Without their checksum.
    pub checksum: bool,
    /// TCP over IPv4, to be cut into segments.
    pub tcp4: bool,
    /// TCP over IPv6.
    pub tcp6: bool,
    /// With congestion notification.
    pub ecn: bool,
}

/// The guest's tables do not grant all of a packet's memory. It is a fault record.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the memory of a packet is not granted")]
pub struct NotGranted;

/// A link of the host. Packets have the header of the device.
pub trait Link: Send + 'static {
    /// Becomes readable when there is a packet.
    fn file(&self) -> RawFd;
    /// Whether it takes and gives packets that are not finished.
    fn has_offloads(&self) -> bool;
    /// It gives what the driver takes from now on.
    fn set_offloads(&mut self, offloads: Offloads);
    /// Whether there is a packet.
    fn has_packet(&mut self) -> bool;
    /// Sends a packet, or drops it.
    ///
    /// # Errors
    /// It cannot be read from the guest.
    fn send(&mut self, packet: &[Part]) -> Result<(), NotGranted>;
    /// Receives a packet into `room`, what does not fit there into `spill`, cut to both: its bytes. `None`: there was
    /// none.
    ///
    /// # Errors
    /// It cannot be written into the guest.
    fn receive(&mut self, room: &[Part], spill: &mut [u8]) -> Result<Option<u64>, NotGranted>;
}

/// The device.
pub struct Net<L> {
    link: L,
    mac: [u8; 6],
    /// The driver takes a packet in several buffers.
    merges: bool,
    longest: u64,
    /// Buffers that wait for packets.
    waiting: VecDeque<Chain>,
    /// Bytes that the next packet is thought to have, with its header. Only so much of the buffers is pinned for it:
    /// room for the longest one would be 17 pages, of which most packets use one.
    expected: u64,
    /// What a packet has beyond that, until it is copied to its buffers.
    spill: Box<[u8]>,
}

const fn bit(feature: u32) -> u64 {
    1 << feature
}

fn not_granted(_: NotGranted) -> Broken {
    Broken("the memory of a packet is not granted")
}

impl<L: Link> Net<L> {
    /// The device of `link`, with this address.
    pub fn new(link: L, mac: [u8; 6]) -> Self {
        let (waiting, spill) = (VecDeque::new(), vec![0; LONGEST as usize].into());
        Self { link, mac, merges: false, longest: LONGEST, waiting, expected: LONGEST_WHOLE, spill }
    }

    /// Sends what waits. Whether there may be more.
    fn transmit<D: Dma>(&mut self, work: &mut Work<'_, D>) -> Result<bool, Broken> {
        let mut sent = 0;
        while sent < TURN && work.goes_on() {
            let Some(chain) = work.next(TRANSMIT)? else { break };
            if !(HEADER..=LONGEST).contains(&total(&chain.readable)) {
                return Err(Broken("a packet has a length that none can have"));
            }
            self.link.send(&chain.readable).map_err(not_granted)?;
            work.with(TRANSMIT, |ring, memory| ring.push(memory, chain.head, 0))?;
            sent += 1;
        }
        if sent > 0 {
            work.interrupt(TRANSMIT)?;
        }
        Ok(sent == TURN)
    }

    /// Takes buffers until there is room for any packet: how many, and their parts. `None`: more have to come first.
    fn room<D: Dma>(&mut self, work: &mut Work<'_, D>) -> Result<Option<(usize, Vec<Part>)>, Broken> {
        let (mut count, mut parts, mut bytes) = (0, Vec::new(), 0);
        loop {
            if count == self.waiting.len() {
                match work.next(RECEIVE)? {
                    Some(chain) => self.waiting.push_back(chain),
                    // No more will come than a queue has entries.
                    None if count > 0 && count == work.entries(RECEIVE) => return Ok(Some((count, parts))),
                    None => return Ok(None),
                }
            }
            let chain = &self.waiting[count];
            if parts.len() + chain.writable.len() > MOST_PARTS && count > 0 {
                return Ok(Some((count, parts)));
            }
            bytes += total(&chain.writable);
            parts.extend(&chain.writable);
            count += 1;
            if bytes >= self.longest || !self.merges {
                return Ok(Some((count, slice(&parts, 0, LONGEST))));
            }
        }
    }

    /// Receives what there is room for. Whether there may be more.
    fn receive<D: Dma>(&mut self, work: &mut Work<'_, D>) -> Result<bool, Broken> {
        let mut received = 0;
        while received < TURN && work.goes_on() && self.link.has_packet() {
            let Some((count, room)) = self.room(work)? else { break };
            if total(&room) < HEADER {
                return Err(Broken("a buffer for packets has no room for a header"));
            }
            let Some(bytes) = self.receive_into(work, &room)? else { break };
            self.give(work, count, bytes)?;
            received += 1;
        }
        if received > 0 {
            work.interrupt(RECEIVE)?;
        }
        Ok(received == TURN)
    }

    /// Receives a packet into `room`: its bytes.
    fn receive_into<D: Dma>(&mut self, work: &mut Work<'_, D>, room: &[Part]) -> Result<Option<u64>, Broken> {
        let pinned = slice(room, 0, self.expected);
        let here = total(&pinned);
        let beyond = (total(room) - here).min(LONGEST) as usize;
        let Some(bytes) = self.link.receive(&pinned, &mut self.spill[..beyond]).map_err(not_granted)? else {
            return Ok(None);
        };
        let spilt = bytes.saturating_sub(here);
        if spilt > 0 {
            let spill = &self.spill[..spilt as usize];
            work.with(RECEIVE, |_, memory| write(memory, &slice(room, here, spilt), spill))?;
        }
        // As long as the last one, or not much shorter than those before.
        self.expected = bytes.max(self.expected - self.expected / 8);
        Ok(Some(bytes))
    }

    /// Gives the driver the first of the `count` buffers that waited, as many as have a part of the `bytes` bytes.
    fn give<D: Dma>(&mut self, work: &mut Work<'_, D>, count: usize, bytes: u64) -> Result<(), Broken> {
        let (mut left, mut used) = (bytes, Vec::new());
        while used.len() < count && (left > 0 || used.is_empty()) {
            let Some(chain) = self.waiting.pop_front() else { break };
            let here = total(&chain.writable).min(left);
            left -= here;
            used.push((chain, here as u32));
        }
        let parts: Vec<Part> = used.iter().flat_map(|(chain, _)| &chain.writable).copied().collect();
        let buffers = (used.len() as u16).to_le_bytes();
        work.with(RECEIVE, |ring, memory| {
            write(memory, &slice(&parts, BUFFERS, 2), &buffers)?;
            used.iter().try_for_each(|(chain, here)| ring.push(memory, chain.head, *here))
        })?;
        Ok(())
    }
}

impl<L: Link, D: Dma> Device<D> for Net<L> {
    fn kind(&self) -> Kind {
        let mut features = bit(VIRTIO_NET_F_MAC) | bit(VIRTIO_NET_F_MRG_RXBUF);
        if self.link.has_offloads() {
            features |= bit(VIRTIO_NET_F_CSUM) | bit(VIRTIO_NET_F_GUEST_CSUM);
            features |= bit(VIRTIO_NET_F_HOST_TSO4) | bit(VIRTIO_NET_F_HOST_TSO6) | bit(VIRTIO_NET_F_HOST_ECN);
            features |= bit(VIRTIO_NET_F_GUEST_TSO4) | bit(VIRTIO_NET_F_GUEST_TSO6) | bit(VIRTIO_NET_F_GUEST_ECN);
        }
        let (device, config) = (VIRTIO_ID_NET as u16, self.mac.to_vec());
        Kind { device, class: 0x02_00_00, features, queues: &[ENTRIES, ENTRIES], config }
    }

    fn input(&self) -> Option<RawFd> {
        Some(self.link.file())
    }

    fn start(&mut self, features: u64) {
        let has = |feature| features & bit(feature) != 0;
        let checksum = has(VIRTIO_NET_F_GUEST_CSUM);
        let offloads = Offloads {
            checksum,
            tcp4: checksum && has(VIRTIO_NET_F_GUEST_TSO4),
            tcp6: checksum && has(VIRTIO_NET_F_GUEST_TSO6),
            ecn: checksum && has(VIRTIO_NET_F_GUEST_ECN),
        };
        self.link.set_offloads(offloads);
        self.merges = has(VIRTIO_NET_F_MRG_RXBUF);
        self.longest = if offloads.tcp4 || offloads.tcp6 { LONGEST } else { LONGEST_WHOLE };
        self.waiting.clear();
        self.expected = LONGEST_WHOLE;
    }

    fn rest(&mut self, work: &mut Work<'_, D>) -> Result<Vec<u8>, Broken> {
        // They are the last that were taken.
        let waiting = std::mem::take(&mut self.waiting);
        work.with(RECEIVE, |ring, _| {
            waiting.iter().for_each(|_| ring.put_back());
            Ok(())
        })?;
        Ok(Vec::new())
    }

    fn work(&mut self, work: &mut Work<'_, D>) -> Result<(), Broken> {
        while work.goes_on() {
            let more = self.transmit(work)?;
            if !self.receive(work)? && !more {
                break;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "net_test.rs"]
mod net_test;
