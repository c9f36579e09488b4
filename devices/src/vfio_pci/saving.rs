//! The state of an assigned function whose own state can be had (A-14): what is ours of it, and beside that what its
//! process gives, which only such a process understands.
//!
//! ```text
//!  held      its process stops ► what it signalled is delivered ► nothing is delivered
//!  put back  our registers ► its process's state ► BARs where they were, vectors ► its process stops, with the state,
//!            or refuses it ► the line; nothing is delivered
//!  goes on   vectors deliver, what is pending first ► its process goes on
//! ```

use std::sync::{MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vfio_bridge::vfio_user::MOST_STATE;
use vfio_bridge::{Function, IrqKind, RegionKind};

use super::capabilities::Snapshot;
use super::intx::{Intx, SavedIntx};
use super::msi::MsiCapability;
use super::msix::SavedMsix;
use super::vectors::SavedVector;
use super::{COMMAND_BITS, Config, VfioPci};
use crate::pci::BarKind;
use crate::pci::config::{COMMAND, COMMAND_IO};
use crate::saved::{CannotSave, Saves, Unfit, decode, encode, fits, hex};

/// What a function is, as its driver knows it: a state goes only into one that is the same.
#[derive(Serialize, Deserialize, PartialEq, Eq, Debug)]
#[serde(deny_unknown_fields)]
pub(super) struct Identity {
    /// Vendor and device id, revision and class, subsystem.
    ids: [u32; 3],
    /// Bytes of the BARs and of the ROM.
    regions: Vec<u64>,
    /// Vectors of the line, MSI and MSI-X.
    vectors: [u32; 3],
}

impl Identity {
    /// Of `host`, whose configuration space is `snapshot`.
    pub fn of(host: &dyn Function, snapshot: &Snapshot) -> Self {
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| snapshot[at + byte]));
        let regions = (0..6).map(RegionKind::Bar).chain([RegionKind::Rom]);
        Self {
            ids: [0x00, 0x08, 0x2c].map(word),
            regions: regions.map(|region| host.region(region).size).collect(),
            vectors: [IrqKind::Intx, IrqKind::Msi, IrqKind::Msix].map(|kind| host.irq_count(kind)),
        }
    }
}

/// Of a function that is held.
#[derive(Default)]
pub(super) struct Moving {
    held: bool,
    /// What its process gave.
    gathered: Vec<u8>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    identity: Identity,
    /// Our bytes of configuration space.
    #[serde(with = "hex")]
    config: Vec<u8>,
    command: u16,
    is_d0: bool,
    msi: Option<Vec<SavedVector>>,
    msix: Option<SavedMsix>,
    intx: Option<SavedIntx>,
    /// What its process gave.
    #[serde(with = "hex")]
    process: Vec<u8>,
}

impl VfioPci {
    fn moving(&self) -> MutexGuard<'_, Moving> {
        self.moving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bits of our bytes that are ours to say: the command register has a place of its own.
    fn own_bits(config: &Config) -> Vec<(u16, u16)> {
        let msi = config.msi.iter().flat_map(MsiCapability::own_bits);
        [(COMMAND, u16::MAX)].into_iter().chain(msi).collect()
    }
}

impl Saves for VfioPci {
    fn hold(&self) -> Result<(), CannotSave> {
        let host = self.host.migration().ok_or_else(|| CannotSave("its process has no state to give".to_owned()))?;
        if self.command.is_quarantined() {
            return Err(CannotSave("it was quarantined; remove it before".to_owned()));
        }
        // It may have stopped whatever it answers.
        self.moving().held = true;
        host.stop().map_err(|e| CannotSave(format!("its process does not stop ({e})")))?;
        if let Some(intx) = &self.intx {
            intx.fired();
        }
        if let Some(msi) = &mut self.config.lock().unwrap().msi {
            msi.hold();
        }
        if let Some(msix) = self.trapped.msix() {
            msix.lock().unwrap().hold();
        }
        Ok(())
    }

    fn go_on(&self) {
        if !std::mem::take(&mut *self.moving()).held {
            return;
        }
        if let Some(msi) = &mut self.config.lock().unwrap().msi {
            msi.go_on();
        }
        if let Some(msix) = self.trapped.msix() {
            msix.lock().unwrap().go_on();
        }
        if let Some(Err(e)) = self.host.migration().map(|host| host.go_on()) {
            log::error!("{}: its process does not go on ({e}); a reset may help, or `remove` it", self.requester);
        }
    }

    fn gather(&self) -> Result<(), CannotSave> {
        let host = self.host.migration().ok_or_else(|| CannotSave("its process has no state to give".to_owned()))?;
        let state = host.state().map_err(|e| CannotSave(format!("its process does not give its state ({e})")))?;
        self.moving().gathered = state;
        Ok(())
    }

    fn save(&self) -> Value {
        let config = &*self.config.lock().unwrap();
        let saved = Saved {
            identity: Identity { regions: self.identity.regions.clone(), ..self.identity },
            config: config.space.bytes().to_vec(),
            command: config.command,
            is_d0: config.is_d0,
            msi: config.msi.as_ref().map(MsiCapability::saved),
            msix: self.trapped.msix().map(|msix| msix.lock().unwrap().saved()),
            intx: self.intx.as_ref().map(Intx::saved),
            process: self.moving().gathered.clone(),
        };
        encode(1, &saved)
    }

    /// Of a function that is as new: it need not be held, and is afterwards. Where its process refuses the state at the
    /// end, the function is not to be used.
    fn restore(&self, state: &Value) -> Result<(), Unfit> {
        let Saved { identity, config: bytes, command, is_d0, msi, msix, intx, process } = decode(1, state)?;
        fits("identity", identity == self.identity)?;
        let has_io = self.bars.iter().any(|bar| bar.kind == BarKind::Io);
        let possible = if has_io { COMMAND_BITS } else { COMMAND_BITS & !COMMAND_IO };
        fits("command register", command & !possible == 0)?;
        fits("power state", is_d0 || self.places.power.is_some())?;
        fits("process's state", process.len() <= MOST_STATE)?;
        let config = &mut *self.config.lock().unwrap();
        fits("MSI", msi.is_some() == config.msi.is_some())?;
        fits("interrupt pin", intx.is_some() == self.intx.is_some())?;
        let can_be = match (&msix, self.trapped.msix()) {
            (Some(saved), Some(msix)) => msix.lock().unwrap().can_be(saved),
            (saved, there) => saved.is_none() && there.is_none(),
        };
        fits("MSI-X", can_be)?;
        let (own, before) = (Self::own_bits(config), config.space.bytes().to_vec());
        config.space.restore(&bytes, &own)?;
        let host = self.host.migration().ok_or(Unfit::Value("process"))?;
        let refused = |e: std::io::Error| Unfit::Process(e.to_string());
        if let Err(e) = host.load(&process) {
            // They were there.
            config.space.restore(&before, &own)?;
            return Err(refused(e));
        }
        self.moving().held = true;
        (config.command, config.is_d0) = (command, is_d0);
        Self::change(config, |change| self.write_host_command(command, change));
        // VFIO has one kind of interrupt at a time.
        let control = self.places.msix.map_or(0, |at| config.space.u16(at));
        let messages = config.msi.as_ref().is_some_and(|msi| msi.is_enabled(&config.space));
        if messages || control & super::msix::CONTROL_ENABLE != 0 {
            self.disable_intx();
        }
        if let (Some(saved), Some(msix)) = (msix, self.trapped.msix()) {
            msix.lock().unwrap().restore(saved, control);
        }
        let Config { msi: there, space, .. } = config;
        if let (Some(saved), Some(msi)) = (msi, there) {
            msi.restore(space, &saved);
        }
        self.enable_intx_without_messages(config);
        host.stop().map_err(refused)?;
        if let (Some(saved), Some(intx)) = (intx, &self.intx) {
            intx.restore(&saved);
        }
        Ok(())
    }
}
