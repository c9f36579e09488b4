//! MSI-X of a function that is emulated here (PCI Express base specification 6.0, section 7.7.2), and what of a virtio
//! device each vector is for (virtio 1.2, section 4.1.5.1).

use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use vtd::{Msi, Requester};

use crate::host::Interrupts;
use crate::saved::{Unfit, fits};

/// Control: MSI-X Enable.
const CONTROL_ENABLE: u16 = 1 << 15;
/// Control: Function Mask.
const CONTROL_MASK: u16 = 1 << 14;
/// Vector control: masked.
const VECTOR_MASKED: u32 = 1;
/// What is mapped to no vector.
pub const NO_VECTOR: u16 = 0xffff;
/// Bytes of an entry of the table.
const ENTRY: u64 = 16;

/// What a vector can be for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cause {
    /// A change of the device's configuration or status.
    Config,
    /// A queue has used buffers.
    Queue(usize),
}

/// The vectors. Messages are sent under its lock: one that is masked sends nothing any more when the write that masks
/// it is done.
pub struct Vectors {
    requester: Requester,
    interrupts: Arc<dyn Interrupts>,
    state: Mutex<State>,
}

struct State {
    entries: Vec<[u32; 4]>,
    pending: Vec<bool>,
    enabled: bool,
    masked: bool,
    /// A message is a memory write, so it needs Bus Master.
    master: bool,
    for_config: u16,
    for_queues: Vec<u16>,
}

/// The vectors as they are saved.
#[derive(Serialize, Deserialize, Debug)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    entries: Vec<[u32; 4]>,
    pending: Vec<bool>,
    for_config: u16,
    for_queues: Vec<u16>,
}

impl Vectors {
    /// One vector for the configuration and one for each of `queues` queues: disabled, masked, and for nothing.
    pub fn new(requester: Requester, interrupts: Arc<dyn Interrupts>, queues: usize) -> Self {
        let count = queues + 1;
        let state = State {
            entries: vec![[0, 0, 0, VECTOR_MASKED]; count],
            pending: vec![false; count],
            enabled: false,
            masked: false,
            master: false,
            for_config: NO_VECTOR,
            for_queues: vec![NO_VECTOR; queues],
        };
        Self { requester, interrupts, state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// How many vectors there are.
    pub fn count(&self) -> usize {
        self.lock().entries.len()
    }

    /// Back to power-on.
    pub fn reset(&self) {
        let State { entries, pending, enabled, masked, master, for_config, for_queues } = &mut *self.lock();
        entries.fill([0, 0, 0, VECTOR_MASKED]);
        pending.fill(false);
        (*enabled, *masked, *master) = (false, false, false);
        *for_config = NO_VECTOR;
        for_queues.fill(NO_VECTOR);
    }

    /// The device is reset: no vector is for anything, and none is pending.
    pub fn forget(&self) {
        let mut state = self.lock();
        state.for_config = NO_VECTOR;
        state.for_queues.fill(NO_VECTOR);
        state.pending.fill(false);
    }

    /// What is in the table, and what it is for.
    pub fn save(&self) -> Saved {
        let State { entries, pending, enabled: _, masked: _, master: _, for_config, for_queues } = &*self.lock();
        Saved {
            entries: entries.clone(),
            pending: pending.clone(),
            for_config: *for_config,
            for_queues: for_queues.clone(),
        }
    }

    /// Puts back what was saved, with the control register and Bus Master that were. Nothing is sent.
    ///
    /// # Errors
    /// It is of other vectors. Then nothing changed.
    pub fn restore(&self, saved: Saved, control: u16, is_master: bool) -> Result<(), Unfit> {
        let mut state = self.lock();
        let count = state.entries.len();
        let is_vector = |vector: &u16| *vector == NO_VECTOR || usize::from(*vector) < count;
        let sizes = (saved.entries.len(), saved.pending.len(), saved.for_queues.len());
        fits("vectors", sizes == (count, count, state.for_queues.len()))?;
        fits("vectors", is_vector(&saved.for_config) && saved.for_queues.iter().all(is_vector))?;
        fits("vectors", saved.entries.iter().all(|entry| entry[3] & !VECTOR_MASKED == 0))?;
        let Saved { entries, pending, for_config, for_queues } = saved;
        let (enabled, masked) = (control & CONTROL_ENABLE != 0, control & CONTROL_MASK != 0);
        *state = State { entries, pending, enabled, masked, master: is_master, for_config, for_queues };
        Ok(())
    }

    /// The control register, and whether Bus Master is set.
    pub fn set_control(&self, control: u16, master: bool) {
        let mut state = self.lock();
        state.enabled = control & CONTROL_ENABLE != 0;
        state.masked = control & CONTROL_MASK != 0;
        state.master = master;
        if !state.enabled {
            state.pending.fill(false);
        }
        self.send_pending(&mut state);
    }

    /// Which vector is for `cause`.
    pub fn vector_of(&self, cause: Cause) -> u16 {
        let state = self.lock();
        match cause {
            Cause::Config => state.for_config,
            Cause::Queue(queue) => state.for_queues.get(queue).copied().unwrap_or(NO_VECTOR),
        }
    }

    /// From now on `vector` is for `cause`; [`NO_VECTOR`], if there is no such vector.
    pub fn set_vector_of(&self, cause: Cause, vector: u16) {
        let mut state = self.lock();
        let vector = if usize::from(vector) < state.entries.len() { vector } else { NO_VECTOR };
        match cause {
            Cause::Config => state.for_config = vector,
            Cause::Queue(queue) => {
                if let Some(of_queue) = state.for_queues.get_mut(queue) {
                    *of_queue = vector;
                }
            }
        }
    }

    /// Something happened: the message of its vector is sent, or pends while that is masked.
    pub fn raise(&self, cause: Cause) {
        let mut state = self.lock();
        let vector = match cause {
            Cause::Config => Some(state.for_config),
            Cause::Queue(queue) => state.for_queues.get(queue).copied(),
        };
        let Some(index) = vector.map(usize::from).filter(|index| *index < state.entries.len()) else { return };
        if state.enabled {
            state.pending[index] = true;
            self.send_pending(&mut state);
        }
    }

    fn send_pending(&self, state: &mut State) {
        if !state.enabled || state.masked || !state.master {
            return;
        }
        for (entry, pending) in state.entries.iter().zip(&mut state.pending) {
            if entry[3] & VECTOR_MASKED == 0 && std::mem::take(pending) {
                let address = u64::from(entry[0] & !3) | u64::from(entry[1]) << 32;
                self.interrupts.signal(self.requester, Msi { address, data: entry[2] });
            }
        }
    }

    /// Reads 4 or 8 bytes, aligned, of the table. What is not there, or read otherwise, is 0.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let state = self.lock();
        if !is_access(offset, data.len()) {
            return;
        }
        for (at, word) in (offset..).step_by(4).zip(data.chunks_exact_mut(4)) {
            if let Some(entry) = state.entries.get((at / ENTRY) as usize) {
                word.copy_from_slice(&entry[(at / 4 % 4) as usize].to_le_bytes());
            }
        }
    }

    /// Writes 4 or 8 bytes, aligned, of the table; other writes are dropped.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        if !is_access(offset, data.len()) {
            return;
        }
        let mut state = self.lock();
        for (at, word) in (offset..).step_by(4).zip(data.chunks_exact(4)) {
            let Some(entry) = state.entries.get_mut((at / ENTRY) as usize) else { return };
            let value = word.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte));
            entry[(at / 4 % 4) as usize] = value;
            // Bits 31:1 of the vector control are reserved.
            entry[3] &= VECTOR_MASKED;
        }
        self.send_pending(&mut state);
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        for (at, byte) in (offset..).zip(data) {
            let bits = state.pending.iter().skip(8 * at as usize).take(8);
            *byte = bits.zip(0..).fold(0, |bits, (pending, bit)| bits | u8::from(*pending) << bit);
        }
    }
}

fn is_access(offset: u64, len: usize) -> bool {
    matches!(len, 4 | 8) && offset.is_multiple_of(len as u64)
}

#[cfg(test)]
#[path = "vectors_test.rs"]
mod vectors_test;
