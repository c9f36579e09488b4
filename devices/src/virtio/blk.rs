//! The block device (H-4; section 5.2): a disk whose data the host's kernel moves into and out of guest memory.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::ring::{Broken, Chain, Part, read, slice, total, write};
use super::{Device, Dma, Kind, Work};

mod pool;

use pool::Pool;

/// Bytes of a sector.
pub const SECTOR: u64 = 512;
/// Entries of the queue.
const ENTRIES: u16 = 128;
/// Parts of the data of a request: what the queue has room for beside its header and status.
const PARTS: u32 = ENTRIES as u32 - 2;
/// Bytes that are moved at a time, so that a stop never waits for more. With [`PARTS`] parts they lie in no more than
/// 512 pages.
const PIECE: u64 = 1 << 20;
/// Bytes of a request that goes beside others. A larger one is done by itself, and can be stopped in the middle.
const BESIDE: u64 = 2 << 20;
/// Bytes of a read that is tried in the worker's thread first.
const AT_ONCE: u64 = 128 << 10;
/// Bytes that one range of a discard or of a write of zeroes has at most.
const MOST_CLEARED: u64 = 1 << 26;
/// Bytes of a request's header: type, reserved, sector.
const HEADER: u64 = 16;
/// Bytes of a range: sector, number of sectors, flags.
const RANGE: u64 = 16;

/// Calls of a [`Disk`] that are under way at a time, at most: of the threads, and of the worker.
pub const CALLS: usize = pool::MOST + 1;

/// It did not happen, or not all of it. Who says so has told the user what the user can change.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the disk's I/O failed")]
pub struct IoFailed;

/// Where a disk's data are. Several threads use it at a time.
pub trait Disk: Send + Sync + 'static {
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
    fn read(&self, offset: u64, parts: &[Part]) -> Result<(), IoFailed>;
    /// As [`Disk::read`] where that waits for nothing. `None`: it would, or that cannot be told; some of `parts` may
    /// have been written.
    fn read_at_once(&self, offset: u64, parts: &[Part]) -> Option<Result<(), IoFailed>> {
        let _ = (offset, parts);
        None
    }
    /// Writes them, as [`Disk::read`] reads.
    ///
    /// # Errors
    /// As there.
    fn write(&self, offset: u64, parts: &[Part]) -> Result<(), IoFailed>;
    /// What was written before this was called outlives the host's end when this returns.
    ///
    /// # Errors
    /// It might not.
    fn flush(&self) -> Result<(), IoFailed>;
    /// `len` bytes from `offset` on read as zeroes from now on. `unmap`: their room is given back, where that can be.
    ///
    /// # Errors
    /// They do not.
    fn clear(&self, offset: u64, len: u64, unmap: bool) -> Result<(), IoFailed>;
}

/// The device.
pub struct Blk<B> {
    disk: Arc<B>,
    pool: Pool<Job, Ended>,
}

/// What a request wants of the disk, in its bounds.
enum Wanted {
    Read(u64, Vec<Part>),
    Write(u64, Vec<Part>),
    Flush,
    Clear { offset: u64, len: u64, unmap: bool },
}

/// A request that is under way.
struct Job {
    chain: Chain,
    wanted: Wanted,
}

/// One that has ended: its status, and the bytes that were written into its buffer before that.
struct Ended {
    chain: Chain,
    status: u32,
    written: u64,
}

impl Ended {
    fn new(chain: Chain, done: Result<u64, IoFailed>) -> Self {
        match done {
            Ok(written) => Self { chain, status: VIRTIO_BLK_S_OK, written },
            // The driver may not believe any of the data.
            Err(IoFailed) => Self { chain, status: VIRTIO_BLK_S_IOERR, written: 0 },
        }
    }
}

/// What a request comes to when it is looked at.
enum Look {
    Wanted(Wanted),
    /// Nothing of the disk: a status, and the bytes that were written.
    Done(u32, u64),
}

impl Wanted {
    /// Bytes that are moved.
    fn len(&self) -> u64 {
        match self {
            Self::Read(_, data) | Self::Write(_, data) => total(data),
            Self::Flush | Self::Clear { .. } => 0,
        }
    }

    /// Does it, data a piece at a time. The bytes that were written into the buffer; `None` where it was told to stop
    /// in the middle: to be begun again.
    fn carry_out(&self, disk: &impl Disk, goes_on: impl Fn() -> bool) -> Option<Result<u64, IoFailed>> {
        let (offset, data, writes) = match self {
            Self::Read(offset, data) => (*offset, data, false),
            Self::Write(offset, data) => (*offset, data, true),
            Self::Flush => return Some(disk.flush().map(|()| 0)),
            Self::Clear { offset, len, unmap } => return Some(disk.clear(*offset, *len, *unmap).map(|()| 0)),
        };
        let (len, mut done) = (total(data), 0);
        while done < len {
            if !goes_on() {
                return None;
            }
            let piece = slice(data, done, PIECE);
            let moved = if writes { disk.write(offset + done, &piece) } else { disk.read(offset + done, &piece) };
            if let Err(e) = moved {
                return Some(Err(e));
            }
            done += PIECE.min(len - done);
        }
        Some(Ok(if writes { 0 } else { len }))
    }
}

impl<B: Disk> Blk<B> {
    /// The device of `disk`. What is behind its last whole sector is not there.
    ///
    /// # Errors
    /// The host gives no file for what the threads of its requests signal.
    pub fn new(disk: B) -> io::Result<Self> {
        let disk = Arc::new(disk);
        let of_threads = disk.clone();
        let pool = Pool::new(move |Job { chain, wanted }| {
            // It is not stopped in the middle, so it ends.
            let done = wanted.carry_out(&*of_threads, || true).unwrap_or(Err(IoFailed));
            Ended::new(chain, done)
        })?;
        Ok(Self { disk, pool })
    }

    /// `len` bytes at `sector`, as an offset, if the disk has them.
    fn offset(&self, sector: u64, len: u64) -> Option<u64> {
        let offset = sector.checked_mul(SECTOR)?;
        let end = offset.checked_add(len)?;
        (len.is_multiple_of(SECTOR) && end <= self.disk.size() / SECTOR * SECTOR).then_some(offset)
    }

    /// Data to move.
    fn transfer(&self, sector: u64, data: Vec<Part>, writes: bool) -> Look {
        match self.offset(sector, total(&data)) {
            Some(offset) if writes => Look::Wanted(Wanted::Write(offset, data)),
            Some(offset) => Look::Wanted(Wanted::Read(offset, data)),
            None => Look::Done(VIRTIO_BLK_S_IOERR, 0),
        }
    }

    /// One range to clear: of a discard, or of a write of zeroes.
    fn clear(&self, range: [u8; RANGE as usize], zeroes: bool) -> Look {
        let word = |at: usize| u32::from_le_bytes([range[at], range[at + 1], range[at + 2], range[at + 3]]);
        let sector = u64::from(word(0)) | u64::from(word(4)) << 32;
        let (sectors, flags) = (word(8), word(12));
        let known = if zeroes { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP } else { 0 };
        if flags & !known != 0 {
            return Look::Done(VIRTIO_BLK_S_UNSUPP, 0);
        }
        let len = u64::from(sectors) * SECTOR;
        match self.offset(sector, len).filter(|_| len <= MOST_CLEARED) {
            None => Look::Done(VIRTIO_BLK_S_IOERR, 0),
            Some(_) if len == 0 => Look::Done(VIRTIO_BLK_S_OK, 0),
            Some(offset) => Look::Wanted(Wanted::Clear { offset, len, unmap: !zeroes || flags != 0 }),
        }
    }

    fn look<D: Dma>(&self, chain: &Chain, room: u64, work: &mut Work<'_, D>) -> Result<Look, Broken> {
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
        Ok(match word(0) {
            VIRTIO_BLK_T_IN => self.transfer(sector, slice(&chain.writable, 0, room), false),
            VIRTIO_BLK_T_OUT if self.disk.is_read_only() => Look::Done(VIRTIO_BLK_S_IOERR, 0),
            VIRTIO_BLK_T_OUT => self.transfer(sector, slice(&chain.readable, HEADER, sent), true),
            VIRTIO_BLK_T_FLUSH => Look::Wanted(Wanted::Flush),
            VIRTIO_BLK_T_GET_ID => {
                let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
                id.iter_mut().zip(self.disk.serial().bytes()).for_each(|(to, byte)| *to = byte);
                let len = room.min(id.len() as u64);
                let parts = slice(&chain.writable, 0, len);
                work.with(0, |_, memory| write(memory, &parts, &id[..len as usize]))?;
                Look::Done(VIRTIO_BLK_S_OK, len)
            }
            kind @ (VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) if !self.disk.is_read_only() && sent == RANGE => {
                self.clear(range, kind == VIRTIO_BLK_T_WRITE_ZEROES)
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => Look::Done(VIRTIO_BLK_S_IOERR, 0),
            _ => Look::Done(VIRTIO_BLK_S_UNSUPP, 0),
        })
    }

    /// Gives requests back to the driver, which hears of them once.
    fn give_back<D: Dma>(ended: &[Ended], work: &mut Work<'_, D>) -> Result<(), Broken> {
        for Ended { chain, status, written } in ended {
            let room = total(&chain.writable).saturating_sub(1);
            work.with(0, |ring, memory| {
                write(memory, &slice(&chain.writable, room, 1), &[*status as u8])?;
                // With an error the count ends at the status all the same.
                ring.push(memory, chain.head, (written + 1).min(u32::MAX.into()) as u32)
            })?;
        }
        if ended.is_empty() { Ok(()) } else { work.interrupt(0) }
    }

    /// Begins the request of `chain`, or does it.
    fn serve<D: Dma>(&mut self, chain: Chain, work: &mut Work<'_, D>) -> Result<(), Broken> {
        let Some(room) = total(&chain.writable).checked_sub(1) else {
            return Err(Broken("a request has no room for its status"));
        };
        let wanted = match self.look(&chain, room, work)? {
            Look::Done(status, written) => return Self::give_back(&[Ended { chain, status, written }], work),
            Look::Wanted(wanted) => wanted,
        };
        if let Wanted::Read(offset, data) = &wanted
            && (1..=AT_ONCE).contains(&wanted.len())
            && let Some(done) = self.disk.read_at_once(*offset, data)
        {
            let len = wanted.len();
            return Self::give_back(&[Ended::new(chain, done.map(|()| len))], work);
        }
        if wanted.len() <= BESIDE {
            self.pool.begin(Job { chain, wanted });
            return Ok(());
        }
        // Only the last one that was taken can be put back.
        Self::give_back(&self.pool.finish(), work)?;
        match wanted.carry_out(&*self.disk, || work.goes_on()) {
            Some(done) => Self::give_back(&[Ended::new(chain, done)], work),
            None => {
                work.with(0, |ring, _| {
                    ring.put_back();
                    Ok(())
                })?;
                Ok(())
            }
        }
    }

    /// Serves what there is, until nothing is under way or it is to stop.
    fn serve_all<D: Dma>(&mut self, work: &mut Work<'_, D>) -> Result<(), Broken> {
        while work.goes_on() {
            Self::give_back(&self.pool.take(), work)?;
            let chain = if self.pool.has_room() { work.next(0)? } else { None };
            match chain {
                Some(chain) => self.serve(chain, work)?,
                None if self.pool.is_busy() => work.wait()?,
                None => break,
            }
        }
        Ok(())
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

    fn input(&self) -> Option<RawFd> {
        Some(self.pool.ended())
    }

    fn work(&mut self, work: &mut Work<'_, D>) -> Result<(), Broken> {
        let done = self.serve_all(work);
        // Whatever became of the ring: nothing is under way when this returns.
        let ended = self.pool.finish();
        done?;
        Self::give_back(&ended, work)
    }
}

#[cfg(test)]
#[path = "blk_test.rs"]
mod blk_test;
