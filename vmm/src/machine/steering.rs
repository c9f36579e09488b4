//! What somebody outside of the guest asks a machine for, while it runs or is paused.

use vfio_bridge::Trace;

use crate::machine::Machine;

impl Machine {
    /// No vCPU runs guest code until [`Machine::resume`], through resets as well. Returns when none does. Devices and
    /// clocks go on.
    pub fn pause(&mut self) {
        self.paused = true;
        self.control.pause();
        self.serve_units();
    }

    /// Whether it is paused.
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// Lets the vCPUs run; and the devices of a machine of which it was not known whether it had moved.
    pub fn resume(&mut self) {
        self.paused = false;
        if let Some(held) = self.unsure.take() {
            self.begin(held);
        }
        self.control.resume();
    }

    /// Presses the power button. What a guest does then is its own affair; one that is paused finds it when it runs on.
    pub fn press_power_button(&self) {
        self.platform.power.press_power_button();
    }

    /// Writes what the host holds into the trace, as an audit does.
    pub fn trace_ledgers(&self, trace: &Trace) {
        self.bridge.trace_ledgers(trace);
    }
}
