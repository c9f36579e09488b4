//! The state of a function, taken from one process and given to another (A-14), by VFIO's migration features (version
//! 0.9.2 on). The data goes through the connection: there is no other file.
//!
//! ```text
//!   RUNNING ◄──► STOP ──► STOP_COPY   data is read, until less comes than was asked for; then STOP again
//!                 └─────► RESUMING    data is written; the way back to STOP is where it is taken, or refused
//! ```
//!
//! Neither end believes the other: a state has at most [`MOST_STATE`] bytes in either direction, and what comes out of
//! its order is refused.

use std::io;

use log::warn;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_MASK, VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE,
    VFIO_DEVICE_FEATURE_MIGRATION, VFIO_DEVICE_FEATURE_PROBE, VFIO_DEVICE_FEATURE_SET, VFIO_MIGRATION_STOP_COPY,
    vfio_device_mig_state_VFIO_DEVICE_STATE_ERROR, vfio_device_mig_state_VFIO_DEVICE_STATE_RESUMING,
    vfio_device_mig_state_VFIO_DEVICE_STATE_RUNNING, vfio_device_mig_state_VFIO_DEVICE_STATE_STOP,
    vfio_device_mig_state_VFIO_DEVICE_STATE_STOP_COPY,
};
use zerocopy::IntoBytes;

use super::connection::Connection;
use super::socket::{MAX_DATA, Message, invalid};
use super::wire::{DeviceFeature, MigrationData, MigrationFlags, MigrationState, command};

/// Bytes of the state of one function, at most.
pub const MOST_STATE: usize = 4 << 20;

const OFFERED: u32 = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_MIGRATION;
const GET_STATE: u32 = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE;
const SET_STATE: u32 = VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE;

/// What a function is in, of the states that are known here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(super) enum State {
    /// A state was refused: a reset helps.
    Error = vfio_device_mig_state_VFIO_DEVICE_STATE_ERROR,
    /// Nothing of it is under way, and it begins nothing.
    Stop = vfio_device_mig_state_VFIO_DEVICE_STATE_STOP,
    /// At work.
    Running = vfio_device_mig_state_VFIO_DEVICE_STATE_RUNNING,
    /// As stopped, and its state can be read.
    StopCopy = vfio_device_mig_state_VFIO_DEVICE_STATE_STOP_COPY,
    /// As stopped, and a state can be written.
    Resuming = vfio_device_mig_state_VFIO_DEVICE_STATE_RESUMING,
}

impl State {
    fn of(number: u32) -> Option<Self> {
        let all = [Self::Error, Self::Stop, Self::Running, Self::StopCopy, Self::Resuming];
        all.into_iter().find(|state| *state as u32 == number)
    }
}

fn feature(flags: u32, more: usize) -> DeviceFeature {
    DeviceFeature { argsz: (size_of::<DeviceFeature>() + more) as u32, flags }
}

/// Whether the process says that it gives states away and takes them.
pub(super) fn is_offered(connection: &Connection) -> bool {
    let ask = feature(OFFERED, size_of::<MigrationFlags>());
    let Ok(reply) = connection.call(command::DEVICE_FEATURE, &[ask.as_bytes()], &[]) else { return false };
    let flags = reply.payload.get(size_of::<DeviceFeature>()..).and_then(|rest| rest.first_chunk::<8>());
    flags.is_some_and(|flags| u64::from_le_bytes(*flags) & u64::from(VFIO_MIGRATION_STOP_COPY) != 0)
}

/// Has the function go to `state`. When this returns it is there.
pub(super) fn go_to(connection: &Connection, state: State) -> io::Result<()> {
    let wanted = MigrationState { device_state: state as u32, data_fd: -1 };
    let ask = feature(SET_STATE, size_of::<MigrationState>());
    connection.call(command::DEVICE_FEATURE, &[ask.as_bytes(), wanted.as_bytes()], &[])?;
    Ok(())
}

/// Reads the state of a function that is stopped, `transfer` bytes at a time.
pub(super) fn read(connection: &Connection, transfer: usize) -> io::Result<Vec<u8>> {
    go_to(connection, State::StopCopy)?;
    let read = read_parts(connection, transfer);
    // Whatever came of it.
    let back = go_to(connection, State::Stop);
    read.and_then(|state| back.map(|()| state))
}

fn read_parts(connection: &Connection, transfer: usize) -> io::Result<Vec<u8>> {
    let mut state = Vec::new();
    loop {
        let ask = MigrationData { argsz: (size_of::<MigrationData>() + transfer) as u32, size: transfer as u32 };
        let reply = connection.call(command::MIG_DATA_READ, &[ask.as_bytes()], &[])?;
        let (MigrationData { size, .. }, rest) = reply.parse::<MigrationData>()?;
        let size = size as usize;
        let part = rest.get(..size).filter(|_| size <= transfer);
        state.extend_from_slice(part.ok_or_else(|| invalid("a part of the state is not as long as it says"))?);
        if state.len() > MOST_STATE {
            return Err(invalid("the state is longer than there can be"));
        }
        if size < transfer {
            return Ok(state);
        }
    }
}

/// Writes `state` into a function, which takes or refuses it when it is stopped next. Until then it may be told of
/// memory and of interrupts: servers on libvfio-user take neither while they are stopped.
pub(super) fn write(connection: &Connection, transfer: usize, state: &[u8]) -> io::Result<()> {
    go_to(connection, State::Resuming)?;
    for part in state.chunks(transfer) {
        let write = MigrationData { argsz: (size_of::<MigrationData>() + part.len()) as u32, size: part.len() as u32 };
        connection.call(command::MIG_DATA_WRITE, &[write.as_bytes(), part], &[])?;
    }
    Ok(())
}

/// What a served function has, if its state can be had.
pub trait ServedState {
    /// Comes to rest. When this returns, no DMA and no interrupt of it is under way, and it begins none, though its
    /// registers take what is written.
    fn stop(&self);
    /// Does what there is to do.
    fn go_on(&self);
    /// Its state, while it is stopped; at most [`MOST_STATE`] bytes.
    fn save(&self) -> Vec<u8>;
    /// Takes a state, while it is stopped.
    ///
    /// # Errors
    /// It is no state of this function; a sentence says why. Then nothing changed.
    fn load(&self, state: &[u8]) -> Result<(), String>;
}

/// What a client did with the state of the function that it is served.
#[derive(Debug)]
pub(super) struct Migration {
    state: State,
    /// What is read, or was written so far.
    data: Vec<u8>,
    /// How much of it was read.
    done: usize,
}

impl Default for Migration {
    fn default() -> Self {
        Self { state: State::Running, data: Vec::new(), done: 0 }
    }
}

impl Migration {
    /// Whether `message` asks for one of the two features that are served here.
    pub fn serves(message: &Message) -> bool {
        let index = message.parse::<DeviceFeature>().map(|(feature, _)| feature.flags & VFIO_DEVICE_FEATURE_MASK);
        index.is_ok_and(|index| [VFIO_DEVICE_FEATURE_MIGRATION, VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE].contains(&index))
    }

    /// Serves one of the two features: the payload of the reply, or an errno.
    pub fn feature(&mut self, function: Option<&dyn ServedState>, message: &Message) -> Result<Vec<u8>, i32> {
        let function = function.ok_or(libc::ENOTTY)?;
        let (feature, rest) = message.parse::<DeviceFeature>().map_err(|_| libc::EINVAL)?;
        let reply = |data: &[u8]| {
            let argsz = (size_of::<DeviceFeature>() + data.len()) as u32;
            [DeviceFeature { argsz, ..feature }.as_bytes(), data].concat()
        };
        match feature.flags {
            OFFERED => Ok(reply(MigrationFlags { flags: VFIO_MIGRATION_STOP_COPY.into() }.as_bytes())),
            GET_STATE => Ok(reply(MigrationState { device_state: self.state as u32, data_fd: -1 }.as_bytes())),
            SET_STATE => {
                let wanted = rest.first_chunk::<4>().map(|number| u32::from_le_bytes(*number));
                let wanted = wanted.and_then(State::of).filter(|state| *state != State::Error);
                self.go_to(function, wanted.ok_or(libc::EINVAL)?)?;
                Ok(message.payload.clone())
            }
            // Which of them are there at all.
            flags if flags & VFIO_DEVICE_FEATURE_PROBE != 0 => {
                let known = [OFFERED, GET_STATE, SET_STATE, GET_STATE | SET_STATE];
                let known = known.contains(&(flags & !VFIO_DEVICE_FEATURE_PROBE));
                if known { Ok(reply(&[])) } else { Err(libc::ENOTTY) }
            }
            _ => Err(libc::EINVAL),
        }
    }

    /// Goes there, by way of STOP: no path leads through a state in which data is copied.
    fn go_to(&mut self, function: &dyn ServedState, wanted: State) -> Result<(), i32> {
        if self.state == wanted {
            return Ok(());
        }
        let data = std::mem::take(&mut self.data);
        match self.state {
            State::Error => return Err(libc::EINVAL),
            State::Running => function.stop(),
            State::Resuming => {
                if let Err(why) = function.load(&data) {
                    warn!("a state that the client gave is refused: {why}");
                    self.state = State::Error;
                    return Err(libc::EINVAL);
                }
            }
            State::Stop | State::StopCopy => {}
        }
        self.done = 0;
        match wanted {
            State::Running => function.go_on(),
            State::StopCopy => self.data = function.save(),
            State::Stop | State::Resuming | State::Error => {}
        }
        self.state = wanted;
        Ok(())
    }

    /// The next part of what is read.
    pub fn read(&mut self, message: &Message) -> Result<Vec<u8>, i32> {
        let (MigrationData { argsz, size }, _) = message.parse::<MigrationData>().map_err(|_| libc::EINVAL)?;
        let size = size as usize;
        let room = (argsz as usize).checked_sub(size_of::<MigrationData>()).is_some_and(|room| room >= size);
        if self.state != State::StopCopy || size > MAX_DATA || !room {
            return Err(libc::EINVAL);
        }
        let end = self.data.len().min(self.done + size);
        let part = &self.data[self.done..end];
        let head = MigrationData { argsz: (size_of::<MigrationData>() + part.len()) as u32, size: part.len() as u32 };
        let reply = [head.as_bytes(), part].concat();
        self.done = end;
        Ok(reply)
    }

    /// One more part of what is written.
    pub fn write(&mut self, message: &Message) -> Result<Vec<u8>, i32> {
        let (MigrationData { size, .. }, part) = message.parse::<MigrationData>().map_err(|_| libc::EINVAL)?;
        if self.state != State::Resuming || part.len() != size as usize {
            return Err(libc::EINVAL);
        }
        if self.data.len() + part.len() > MOST_STATE {
            return Err(libc::EFBIG);
        }
        self.data.extend_from_slice(part);
        Ok(Vec::new())
    }

    /// The function was reset, or is served no longer: it is at work again.
    pub fn was_reset(&mut self, function: Option<&dyn ServedState>) {
        if let Some(function) = function.filter(|_| self.state != State::Running) {
            function.go_on();
        }
        *self = Self::default();
    }

    /// Whether the function is not at work.
    pub fn is_stopped(&self) -> bool {
        self.state != State::Running
    }
}
