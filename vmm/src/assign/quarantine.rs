//! Functions that must not reach guest memory any more.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};

use devices::pinblk::PinBlk;
use devices::vfio_pci::VfioPci;
use devices::virtio::function::VirtioPci;
use vfio_bridge::Quarantine;
use vtd::Requester;

use crate::machine::control::{Control, Stop};

/// What has DMA that can be stopped.
pub trait Stoppable: Send + Sync {
    /// Stops its DMA for good. After `Ok` it does none.
    fn quarantine(&self) -> Result<(), String>;
}

impl Stoppable for VfioPci {
    fn quarantine(&self) -> Result<(), String> {
        self.quarantine()
    }
}

impl Stoppable for PinBlk {
    fn quarantine(&self) -> Result<(), String> {
        self.quarantine()
    }
}

impl Stoppable for VirtioPci {
    fn quarantine(&self) -> Result<(), String> {
        self.quarantine()
    }
}

/// Stops functions whose mappings the host did not take away (B-11).
pub struct Breaker {
    functions: Mutex<BTreeMap<Requester, Weak<dyn Stoppable>>>,
    control: Arc<Control>,
}

impl Breaker {
    /// Knows no function. `control` is that of the machine, which is stopped if a function cannot be.
    pub fn new(control: Arc<Control>) -> Self {
        Self { functions: Mutex::default(), control }
    }

    /// `function` is the function at `requester`.
    pub fn add<F: Stoppable + 'static>(&self, requester: Requester, function: &Arc<F>) {
        let function: Weak<dyn Stoppable> = Arc::<F>::downgrade(function);
        self.functions.lock().unwrap().insert(requester, function);
    }
}

impl Breaker {
    /// The function at `requester` is gone.
    pub fn remove(&self, requester: Requester) {
        self.functions.lock().unwrap().remove(&requester);
    }
}

impl Quarantine for Breaker {
    fn quarantine(&self, functions: &[Requester], why: &str) -> Result<(), String> {
        for requester in functions {
            let function = self.functions.lock().unwrap().get(requester).and_then(Weak::upgrade);
            // A function that is not plugged in yet, or not any more, has its Bus Master bit off.
            let Some(function) = function else { continue };
            log::error!("the function {requester} is stopped: {why}");
            function.quarantine()?;
        }
        Ok(())
    }

    fn stop_machine(&self, functions: &[Requester], why: &str) {
        let names: Vec<String> = functions.iter().map(ToString::to_string).collect();
        self.control.halt(Stop::Error(format!("{} could not be stopped: {why}", names.join(", "))));
    }
}
