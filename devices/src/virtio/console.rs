//! The console device (H-6; section 5.3) with one port: bytes for whoever looks at the guest, and bytes from there.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard};

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::ring::{Broken, read, slice, total, write};
use super::{Device, Dma, Kind, Work};

/// Input that waits for the guest, at most: bytes.
const INPUT: usize = 4096;
/// Bytes that are moved at a time.
const PIECE: u64 = 4096;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// Where the guest's input goes in.
pub struct Input {
    state: Mutex<State>,
    /// Wakes the device.
    came: EventFd,
    /// Signalled when there is room again, or the driver came or went.
    taken: EventFd,
}

#[derive(Default)]
struct State {
    bytes: VecDeque<u8>,
    ready: bool,
}

impl Input {
    /// Signals `taken` when there is room again, or the driver came or went.
    ///
    /// # Errors
    /// The host has no file descriptors left.
    pub fn new(taken: EventFd) -> io::Result<Arc<Self>> {
        let came = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Arc::new(Self { state: Mutex::default(), came, taken }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Gives the guest input: how many bytes of it there was room for. `None`: its driver is not there.
    pub fn enqueue(&self, input: &[u8]) -> Option<usize> {
        let mut state = self.lock();
        if !state.ready {
            return None;
        }
        let fits = input.len().min(INPUT - state.bytes.len());
        state.bytes.extend(&input[..fits]);
        drop(state);
        signal(&self.came);
        Some(fits)
    }

    fn set_ready(&self, ready: bool) {
        // What a driver left is not the next one's.
        *self.lock() = State { bytes: VecDeque::new(), ready };
        signal(&self.taken);
    }

    fn take(&self, most: usize) -> Vec<u8> {
        let mut state = self.lock();
        let fits = most.min(state.bytes.len());
        let bytes = state.bytes.drain(..fits).collect();
        drop(state);
        signal(&self.taken);
        bytes
    }
}

fn signal(event: &EventFd) {
    // A counter that is full wakes as well.
    let _ = event.write(1);
}

/// The device.
pub struct Console<W> {
    output: W,
    input: Arc<Input>,
}

impl<W: Write> Console<W> {
    /// Writes what the guest sends to `output`, which never waits.
    pub fn new(output: W, input: Arc<Input>) -> Self {
        Self { output, input }
    }

    fn transmit<D: Dma>(&mut self, work: &mut Work<'_, D>) -> Result<(), Broken> {
        while work.goes_on() {
            let Some(chain) = work.next(TRANSMIT)? else { break };
            let len = total(&chain.readable);
            let mut done = 0;
            while done < len && work.goes_on() {
                let piece = slice(&chain.readable, done, PIECE);
                let mut bytes = vec![0; total(&piece) as usize];
                work.with(TRANSMIT, |_, memory| read(memory, &piece, &mut bytes))?;
                // Whoever does not read loses it, and is told elsewhere.
                let _ = self.output.write_all(&bytes);
                done += bytes.len() as u64;
            }
            work.with(TRANSMIT, |ring, memory| ring.push(memory, chain.head, 0))?;
            work.interrupt(TRANSMIT)?;
        }
        Ok(())
    }

    fn receive<D: Dma>(&mut self, work: &mut Work<'_, D>) -> Result<(), Broken> {
        // Signals of before are for what is looked at now.
        let _ = self.input.came.read();
        while work.goes_on() && !self.input.lock().bytes.is_empty() {
            let Some(chain) = work.next(RECEIVE)? else { break };
            let bytes = self.input.take(total(&chain.writable).min(PIECE) as usize);
            work.with(RECEIVE, |ring, memory| {
                write(memory, &chain.writable, &bytes)?;
                ring.push(memory, chain.head, bytes.len() as u32)
            })?;
            work.interrupt(RECEIVE)?;
        }
        Ok(())
    }
}

impl<W: Write + Send + 'static, D: Dma> Device<D> for Console<W> {
    fn kind(&self) -> Kind {
        let device = VIRTIO_ID_CONSOLE as u16;
        // Columns, rows, ports and emergency write are there, and of no feature that is offered.
        Kind { device, class: 0x07_80_00, features: 0, queues: &[64, 64], config: vec![0; 12] }
    }

    fn input(&self) -> Option<RawFd> {
        Some(self.input.came.as_raw_fd())
    }

    fn start(&mut self, _: u64) {
        self.input.set_ready(true);
    }

    fn reset(&mut self) {
        self.input.set_ready(false);
    }

    fn rest(&mut self, _: &mut Work<'_, D>) -> Result<Vec<u8>, Broken> {
        Ok(self.input.lock().bytes.iter().copied().collect())
    }

    fn restored(&mut self, _: u64, more: &[u8]) {
        self.input.set_ready(true);
        self.input.enqueue(more);
    }

    fn work(&mut self, work: &mut Work<'_, D>) -> Result<(), Broken> {
        self.transmit(work)?;
        self.receive(work)
    }
}

#[cfg(test)]
#[path = "console_test.rs"]
mod console_test;
