//! DMA logging (E-1): what a function's process wrote, by VFIO's device feature of that name (version 0.9.2 on).
//!
//! Our server knows it exactly, page by page, also of what was unmapped: its log is of IOVAs and stays. Of others only
//! the protocol is known, which does not say what becomes of a log when its mapping goes. So an unmap asks before and
//! after, and what is written in between is lost where a server forgets it (E-3). A server without the feature cannot
//! tell.

use std::io;

use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
    VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_SET,
};
use vtd::IovaRange;
use zerocopy::IntoBytes;

use super::connection::Connection;
use super::granted::Granted;
use super::socket::{MAX_DATA, Message};
use super::wire::{DeviceFeature, LoggingControl, LoggingRange, LoggingReport, command};
use crate::bridge::guest_map::PAGE_SIZE;
use crate::host::dirty::{DirtyBitmap, DirtyKnowledge, DirtySupport, UnmapWindow};

const START: u32 = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_START;
const STOP: u32 = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP;
const REPORT: u32 = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT;

/// Bytes of the bitmap of a report at most: with what is before it, it fits into a message.
const MOST_BITMAP: u64 = (MAX_DATA / 2) as u64;

fn feature(flags: u32, argsz: usize) -> DeviceFeature {
    DeviceFeature { argsz: (size_of::<DeviceFeature>() + argsz) as u32, flags }
}

/// Has the process log, and logs what it writes by message.
pub(super) fn start(connection: &Connection) -> io::Result<DirtySupport> {
    let control = LoggingControl { page_size: PAGE_SIZE, num_ranges: 1, reserved: 0 };
    let range = LoggingRange { iova: 0, length: 0u64.wrapping_sub(PAGE_SIZE) };
    let feature = feature(START, size_of::<LoggingControl>() + size_of::<LoggingRange>());
    let parts = [feature.as_bytes(), control.as_bytes(), range.as_bytes()];
    connection.granted().start_log();
    let started = connection.call(command::DEVICE_FEATURE, &parts, &[]);
    if let Err(e) = started {
        connection.granted().stop_log();
        return Err(e.into());
    }
    Ok(DirtySupport { knowledge: DirtyKnowledge::Exact, window: UnmapWindow::Lost, holes: true })
}

/// Nobody logs any more.
pub(super) fn stop(connection: &Connection) -> io::Result<()> {
    connection.granted().stop_log();
    connection.call(command::DEVICE_FEATURE, &[feature(STOP, 0).as_bytes()], &[])?;
    Ok(())
}

/// Asks what was written in each of `mappings` since the last time, and marks it.
pub(super) fn report(connection: &Connection, mappings: &[IovaRange], bitmap: &mut DirtyBitmap) -> io::Result<()> {
    for mapping in mappings {
        connection.granted().take_log(*mapping).for_each(|page| bitmap.mark(page));
        let mut first = mapping.first;
        loop {
            let last = mapping.last.min(first.saturating_add(MOST_BITMAP * 8 * PAGE_SIZE - 1));
            let length = last - first + 1;
            let ask = LoggingReport { iova: first, length, page_size: PAGE_SIZE };
            let words = length.div_ceil(PAGE_SIZE).div_ceil(64) as usize;
            let feature = feature(REPORT, size_of::<LoggingReport>() + words * 8);
            let reply = connection.call(command::DEVICE_FEATURE, &[feature.as_bytes(), ask.as_bytes()], &[])?;
            let (_, rest) = reply.parse::<DeviceFeature>()?;
            let found = rest.get(size_of::<LoggingReport>()..).filter(|found| found.len() >= words * 8);
            let found = found.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
            let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap_or([0xff; 8]));
            let found: Vec<u64> = found[..words * 8].chunks_exact(8).map(word).collect();
            bitmap.mark_words(first, PAGE_SIZE, &found);
            if last == mapping.last {
                break;
            }
            first = last + 1;
        }
    }
    Ok(())
}

/// The server's side: the payload of the reply, or an errno.
pub(super) fn serve(granted: &Granted, message: &Message) -> Result<Vec<u8>, i32> {
    let short = |_| libc::EINVAL;
    let (feature, rest) = message.parse::<DeviceFeature>().map_err(short)?;
    match feature.flags {
        START => {
            let control = rest.get(..size_of::<LoggingControl>()).ok_or(libc::EINVAL)?;
            let page_size = u64::from_le_bytes(control[..8].try_into().map_err(|_| libc::EINVAL)?);
            if page_size != PAGE_SIZE {
                return Err(libc::EINVAL);
            }
            // All of it is logged, whatever the ranges.
            granted.start_log();
            Ok(feature.as_bytes().to_vec())
        }
        STOP => {
            granted.stop_log();
            Ok(feature.as_bytes().to_vec())
        }
        REPORT => {
            let word = |at: usize| rest.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes);
            let report = (word(0), word(8), word(16));
            let (Some(iova), Some(length), Some(page_size)) = report else { return Err(libc::EINVAL) };
            let last = length.checked_sub(1).and_then(|more| iova.checked_add(more)).ok_or(libc::EINVAL)?;
            let words = length.div_ceil(PAGE_SIZE).div_ceil(64);
            if page_size != PAGE_SIZE || !iova.is_multiple_of(PAGE_SIZE) || words > MOST_BITMAP / 8 || !granted.logs() {
                return Err(libc::EINVAL);
            }
            let mut found = vec![0u64; words as usize];
            for page in granted.take_log(IovaRange { first: iova, last }) {
                let at = (page.first.max(iova) - iova) / PAGE_SIZE;
                found[(at / 64) as usize] |= 1 << (at % 64);
            }
            let report = LoggingReport { iova, length, page_size };
            let bytes = found.into_iter().flat_map(u64::to_le_bytes);
            Ok(feature.as_bytes().iter().chain(report.as_bytes()).copied().chain(bytes).collect())
        }
        _ => Err(libc::ENOTTY),
    }
}
