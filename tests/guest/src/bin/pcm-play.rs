//! Plays a tone through an ALSA device and waits until all of it was heard: `pcm-play /dev/snd/pcmC0D0p
//! [MILLISECONDS]`.
//!
//! Prints `played FRAMES frames in SECONDS s`. The card takes frames from memory by DMA at its own pace, and says by
//! interrupts how far it is; without either, the kernel's drain ends with an error.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;

const RATE: u32 = 48_000;
const CHANNELS: u32 = 2;
/// A tone of 375 Hz: `RATE` over this many frames.
const WAVE: u32 = 128;

// `sound/asound.h`, of the protocol's version 2.
/// `SNDRV_PCM_IOCTL_HW_PARAMS`: `_IOWR('A', 0x11, struct snd_pcm_hw_params)`.
const HW_PARAMS: libc::c_ulong = 0xc260_4111;
/// `SNDRV_PCM_IOCTL_PREPARE`: `_IO('A', 0x40)`.
const PREPARE: libc::c_ulong = 0x4140;
/// `SNDRV_PCM_IOCTL_DRAIN`: `_IO('A', 0x44)`.
const DRAIN: libc::c_ulong = 0x4144;
/// `SNDRV_PCM_IOCTL_WRITEI_FRAMES`: `_IOW('A', 0x50, struct snd_xferi)`.
const WRITE_FRAMES: libc::c_ulong = 0x4018_4150;

const ACCESS_RW_INTERLEAVED: u32 = 3;
const FORMAT_S16_LE: u32 = 2;
const SUBFORMAT_STD: u32 = 0;
/// Intervals begin with this parameter; masks with number 0.
const FIRST_INTERVAL: usize = 8;
const PARAMETER_CHANNELS: usize = 10;
const PARAMETER_RATE: usize = 11;
const PARAMETER_PERIOD_SIZE: usize = 13;
const PARAMETER_BUFFER_SIZE: usize = 17;

/// `struct snd_interval`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Interval {
    min: u32,
    max: u32,
    /// Bit 2: a whole number.
    flags: u32,
}

/// `struct snd_pcm_hw_params`.
#[repr(C)]
struct HwParams {
    flags: u32,
    /// Access, format, subformat, and five reserved ones.
    masks: [[u32; 8]; 8],
    /// Sample bits, frame bits, channels, rate, ..., and nine reserved ones.
    intervals: [Interval; 21],
    requested: u32,
    changed: u32,
    info: u32,
    msbits: u32,
    rate_numerator: u32,
    rate_denominator: u32,
    fifo_size: libc::c_ulong,
    reserved: [u8; 64],
}

/// `struct snd_xferi`.
#[repr(C)]
struct Transfer {
    result: libc::c_long,
    frames: *const i16,
    count: libc::c_ulong,
}

const _: () = assert!(size_of::<HwParams>() == 0x260 && size_of::<Transfer>() == 0x18);

/// Plays a tone through an ALSA device.
#[derive(Parser)]
struct Arguments {
    device: PathBuf,
    #[arg(default_value_t = 500)]
    milliseconds: u32,
}

fn main() -> Result<()> {
    let Arguments { device: path, milliseconds } = Arguments::parse();
    ensure!(milliseconds <= 60_000, "at most a minute");
    let device = OpenOptions::new().write(true).open(&path).with_context(|| format!("opening {}", path.display()))?;
    let frames = RATE / 1000 * milliseconds;
    set_up(&device, frames)?;
    let tone = tone(frames);
    let start = Instant::now();
    let mut left = &tone[..];
    while !left.is_empty() {
        let written = write(&device, left)?;
        ensure!(written > 0, "the card takes nothing");
        left = &left[written * CHANNELS as usize..];
    }
    // SAFETY: this request takes no argument.
    ensure!(unsafe { libc::ioctl(device.as_raw_fd(), DRAIN) } == 0, "draining: {}", io::Error::last_os_error());
    let spent = start.elapsed();
    let least = Duration::from_millis(u64::from(milliseconds) / 2);
    ensure!(spent >= least, "{frames} frames cannot have been played in {} s", spent.as_secs_f64());
    println!("played {frames} frames in {:.3} s", spent.as_secs_f64());
    Ok(())
}

/// With a buffer for all `frames`, so that a slow writer leaves no gap, and an interrupt each 50 to 100 ms.
fn set_up(device: &File, frames: u32) -> Result<()> {
    let any = Interval { min: 0, max: u32::MAX, flags: 0 };
    let exactly = |value| Interval { min: value, max: value, flags: 1 << 2 };
    let mut params = HwParams {
        flags: 0,
        masks: [[u32::MAX; 8]; 8],
        intervals: [any; 21],
        requested: u32::MAX,
        changed: 0,
        info: u32::MAX,
        msbits: 0,
        rate_numerator: 0,
        rate_denominator: 0,
        fifo_size: 0,
        reserved: [0; 64],
    };
    for (mask, value) in params.masks.iter_mut().zip([ACCESS_RW_INTERLEAVED, FORMAT_S16_LE, SUBFORMAT_STD]) {
        *mask = [1 << value, 0, 0, 0, 0, 0, 0, 0];
    }
    params.intervals[PARAMETER_CHANNELS - FIRST_INTERVAL] = exactly(CHANNELS);
    params.intervals[PARAMETER_RATE - FIRST_INTERVAL] = exactly(RATE);
    params.intervals[PARAMETER_PERIOD_SIZE - FIRST_INTERVAL] = Interval { min: RATE / 20, max: RATE / 10, flags: 0 };
    params.intervals[PARAMETER_BUFFER_SIZE - FIRST_INTERVAL] = Interval { min: frames, ..any };
    // SAFETY: the kernel reads and writes one structure, which is as large as the request's number says and has no
    // pointers.
    let status = unsafe { libc::ioctl(device.as_raw_fd(), HW_PARAMS, &raw mut params) };
    ensure!(status == 0, "setting its parameters: {}", io::Error::last_os_error());
    // SAFETY: this request takes no argument.
    ensure!(unsafe { libc::ioctl(device.as_raw_fd(), PREPARE) } == 0, "preparing: {}", io::Error::last_os_error());
    Ok(())
}

/// Both channels, one after the other: a triangle.
fn tone(frames: u32) -> Vec<i16> {
    let quarter = i32::try_from(WAVE / 4).unwrap_or(1);
    (0..frames)
        .map(|frame| i32::try_from(frame % WAVE).unwrap_or_default())
        .map(|at| (at - 2 * quarter).abs() - quarter)
        .map(|level| i16::try_from(level * 256).unwrap_or_default())
        .flat_map(|sample| [sample; CHANNELS as usize])
        .collect()
}

/// Gives the number of frames that were taken.
fn write(device: &File, samples: &[i16]) -> Result<usize> {
    let count = samples.len() / CHANNELS as usize;
    let mut transfer = Transfer { result: 0, frames: samples.as_ptr(), count: count as libc::c_ulong };
    // SAFETY: the kernel reads `count` frames of two samples, all of which are in `samples`, and writes the result.
    let status = unsafe { libc::ioctl(device.as_raw_fd(), WRITE_FRAMES, &raw mut transfer) };
    ensure!(status == 0, "playing: {}", io::Error::last_os_error());
    Ok(usize::try_from(transfer.result)?)
}
