//! The block device (H-4; section 5.2): a disk whose data the host's kernel moves into and out of guest memory.

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::ring::{Broken, Chain, Part, read, slice, total, write};
use super::{Device, Dma, Kind, Work};

/// Bytes of a sector.
pub const SECTOR: u64 = 512;
/// Entries of the queue.
const ENTRIES: u16 = 128;
/// Parts of the data of a request: what the queue has room for beside its header and status.
const PARTS: u32 = ENTRIES as u32 - 2;
/// Bytes that are moved at a time, so that a stop never waits for more. With [`PARTS`] parts they lie in no more than
/// 512 pages.
const PIECE: u64 = 1 << 20;
/// Bytes that one range of a discard or of a write of zeroes has at most.
const MOST_CLEARED: u64 = 1 << 26;
/// Bytes of a request's header: type, reserved, sector.
const HEADER: u64 = 16;
/// Bytes of a range: sector, number of sectors, flags.
const RANGE: u64 = 16;

/// It did not happen, or not all of it. Who says so has told the user what the user can change.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the disk's I/O failed")]
pub struct IoFailed;

/// Where a disk's data are.
pub trait Disk: Send + 'static {
    /// Bytes.
    fn size(&self) -> u64;
    /// Whether writes are refused.
    fn is_read_only(&self) -> bool;
    /// What the guest sees as its serial number.
    fn serial(&self) -> &str;
    /// Reads all bytes of `parts`, at most 512 pages, from `offset` on.
    ///
    /// # Errors
    /// Not all of it arrived: of the disk, or because the guest's tables do not grant all of `parts`, which is then a
    /// fault record.
    fn read(&mut self, offset: u64, parts: &[Part]) -> Result<(), IoFailed>;
    /// Writes them, as [`Disk::read`] reads.
    ///
    /// # Errors
    /// As there.
    fn write(&mut self, offset: u64, parts: &[Part]) -> Result<(), IoFailed>;
    /// What was written outlives the host's end when this returns.
    ///
    /// # Errors
    /// It might not.
    fn flush(&mut self) -> Result<(), IoFailed>;
    /// `len` bytes from `offset` on read as zeroes from now on. `unmap`: their room is given back, where that can be.
    ///
    /// # Errors
    /// They do not.
    fn clear(&mut self, offset: u64, len: u64, unmap: bool) -> Result<(), IoFailed>;
}

/// The device.
pub struct Blk<B> {
    disk: B,
}

/// What a request comes to.
enum Outcome {
    /// Its status, and the bytes that were written into its buffer before that.
    Done(u32, u64),
    /// It was told to stop in the middle: to be begun again.
    Stopped,
}

impl<B: Disk> Blk<B> {
    /// The device of `disk`. What is behind its last whole sector is not there.
    pub fn new(disk: B) -> Self {
        Self { disk }
    }

    /// `len` bytes at `sector`, as an offset, if the disk has them.
    fn offset(&self, sector: u64, len: u64) -> Option<u64> {
        let offset = sector.checked_mul(SECTOR)?;
        let end = offset.checked_add(len)?;
        (len.is_multiple_of(SECTOR) && end <= self.disk.size() / SECTOR * SECTOR).then_some(offset)
    }

    /// Moves `data`, a piece at a time.
    fn transfer(&mut self, sector: u64, data: &[Part], writes: bool, goes_on: &dyn Fn() -> bool) -> Outcome {
        let len = total(data);
        let Some(offset) = self.offset(sector, len) else { return Outcome::Done(VIRTIO_BLK_S_IOERR, 0) };
        let mut done = 0;
        while done < len {
            if !goes_on() {
                return Outcome::Stopped;
            }
            let piece = slice(data, done, PIECE);
            let moved = match writes {
                true => self.disk.write(offset + done, &piece),
                false => self.disk.read(offset + done, &piece),
            };
            if moved.is_err() {
                // The driver may not believe any of the data.
                return Outcome::Done(VIRTIO_BLK_S_IOERR, 0);
            }
            done += PIECE.min(len - done);
        }
        Outcome::Done(VIRTIO_BLK_S_OK, if writes { 0 } else { len })
    }

    /// Clears one range: of a discard, or of a write of zeroes.
    fn clear(&mut self, range: [u8; RANGE as usize], zeroes: bool) -> u32 {
        let word = |at: usize| u32::from_le_bytes([range[at], range[at + 1], range[at + 2], range[at + 3]]);
        let sector = u64::from(word(0)) | u64::from(word(4)) << 32;
        let (sectors, flags) = (word(8), word(12));
        let known = if zeroes { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP } else { 0 };
        if flags & !known != 0 {
            return VIRTIO_BLK_S_UNSUPP;
        }
        let len = u64::from(sectors) * SECTOR;
        match self.offset(sector, len).filter(|_| len <= MOST_CLEARED) {
            None => VIRTIO_BLK_S_IOERR,
            Some(_) if len == 0 => VIRTIO_BLK_S_OK,
            Some(offset) => match self.disk.clear(offset, len, !zeroes || flags != 0) {
                Ok(()) => VIRTIO_BLK_S_OK,
                Err(IoFailed) => VIRTIO_BLK_S_IOERR,
            },
        }
    }

    fn serve<D: Dma>(&mut self, chain: &Chain, work: &mut Work<'_, D>) -> Result<Outcome, Broken> {
        let mut header = [0; HEADER as usize];
        // What a driver may write behind the header of a request for zeroes.
        let mut range = [0; RANGE as usize];
        let sent = total(&chain.readable).saturating_sub(HEADER);
        work.with(0, |_, memory| {
            read(memory, &chain.readable, &mut header)?;
            if sent == RANGE { read(memory, &slice(&chain.readable, HEADER, RANGE), &mut range) } else { Ok(()) }
        })?;
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let sector = u64::from(word(8)) | u64::from(word(12)) << 32;
        let room = total(&chain.writable) - 1;
        let goes_on = || work.goes_on();
        Ok(match word(0) {
            VIRTIO_BLK_T_IN => self.transfer(sector, &slice(&chain.writable, 0, room), false, &goes_on),
            VIRTIO_BLK_T_OUT if self.disk.is_read_only() => Outcome::Done(VIRTIO_BLK_S_IOERR, 0),
            VIRTIO_BLK_T_OUT => self.transfer(sector, &slice(&chain.readable, HEADER, sent), true, &goes_on),
            VIRTIO_BLK_T_FLUSH => match self.disk.flush() {
                Ok(()) => Outcome::Done(VIRTIO_BLK_S_OK, 0),
                Err(IoFailed) => Outcome::Done(VIRTIO_BLK_S_IOERR, 0),
            },
            VIRTIO_BLK_T_GET_ID => {
                let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
                id.iter_mut().zip(self.disk.serial().bytes()).for_each(|(to, byte)| *to = byte);
                let len = room.min(id.len() as u64);
                let parts = slice(&chain.writable, 0, len);
                work.with(0, |_, memory| write(memory, &parts, &id[..len as usize]))?;
                Outcome::Done(VIRTIO_BLK_S_OK, len)
            }
            kind @ (VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) if !self.disk.is_read_only() && sent == RANGE => {
                Outcome::Done(self.clear(range, kind == VIRTIO_BLK_T_WRITE_ZEROES), 0)
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => Outcome::Done(VIRTIO_BLK_S_IOERR, 0),
            _ => Outcome::Done(VIRTIO_BLK_S_UNSUPP, 0),
        })
    }
}

impl<B: Disk, D: Dma> Device<D> for Blk<B> {
    fn kind(&self) -> Kind {
        let mut features = 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_FLUSH;
        features |= match self.disk.is_read_only() {
            true => 1 << VIRTIO_BLK_F_RO,
            false => 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES,
        };
        let mut config = vec![0; 0x3c];
        let mut put = |at: usize, value: &[u8]| config[at..at + value.len()].copy_from_slice(value);
        let cleared = ((MOST_CLEARED / SECTOR) as u32).to_le_bytes();
        put(0x00, &(self.disk.size() / SECTOR).to_le_bytes());
        put(0x0c, &PARTS.to_le_bytes());
        put(0x14, &(SECTOR as u32).to_le_bytes());
        put(0x22, &1u16.to_le_bytes());
        // Discard: how much, how many ranges, alignment; then zeroes: how much, how many, and that room is given back.
        put(0x24, &cleared);
        put(0x28, &1u32.to_le_bytes());
        put(0x2c, &1u32.to_le_bytes());
        put(0x30, &cleared);
        put(0x34, &1u32.to_le_bytes());
        put(0x38, &[1]);
        Kind { device: VIRTIO_ID_BLOCK as u16, class: 0x01_80_00, features, queues: &[ENTRIES], config }
    }

    fn work(&mut self, work: &mut Work<'_, D>) -> Result<(), Broken> {
        while work.goes_on() {
            let Some(chain) = work.next(0)? else { break };
            let Some(room) = total(&chain.writable).checked_sub(1) else {
                return Err(Broken("a request has no room for its status"));
            };
            match self.serve(&chain, work)? {
                Outcome::Done(status, written) => {
                    work.with(0, |ring, memory| {
                        write(memory, &slice(&chain.writable, room, 1), &[status as u8])?;
                        // With an error the count ends at the status all the same.
                        ring.push(memory, chain.head, (written + 1).min(u32::MAX.into()) as u32)
                    })?;
                    work.interrupt(0)?;
                }
                Outcome::Stopped => {
                    work.with(0, |ring, _| {
                        ring.put_back();
                        Ok(())
                    })?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "blk_test.rs"]
mod blk_test;
