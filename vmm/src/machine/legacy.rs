//! What every PC has had since the AT: the interval timer, the clock, the keyboard controller's reset, and the
//! registers of the two 8259A. KVM has none of them where its interrupt chip is split.

use std::sync::Arc;

use devices::ioapic::IoApic;
use devices::legacy::I8042;
use devices::pic::Pic;
use devices::pit::{Pit, SystemPort};
use devices::pm::PmBlock;
use devices::rtc::Rtc;
use devices::saved::Saves;
use devices::timers::{Alarm, HostClock, Timed, Timers};
use devices::{Bus, BusDevice};

use super::Error;
use crate::machine::control::Control;

/// These devices, and the thread that makes their interrupts.
pub struct Legacy {
    pit: Arc<Pit>,
    rtc: Arc<Rtc>,
    pics: [Arc<Pic>; 2],
    timers: Timers,
}

impl Legacy {
    /// Puts them on the port bus. Their lines are pins of `ioapic`, which the ACPI tables name; the clock's is an event
    /// of `power`, too.
    pub fn add(ports: &Bus, ioapic: &Arc<IoApic>, power: &Arc<PmBlock>, control: &Arc<Control>) -> Result<Self, Error> {
        let (clock, alarm) = (Arc::new(HostClock::new()), Arc::new(Alarm::default()));
        let pit = Pit::new(clock.clone(), alarm.clone(), ioapic.line(Pit::GSI));
        let rtc = Rtc::new(clock.clone(), alarm.clone(), power.clock_line(ioapic.line(Rtc::GSI)));
        let pics = [Arc::new(Pic::new()), Arc::new(Pic::new())];
        let keyboard = I8042::new(control.clone(), SystemPort::new(pit.clone()));
        let [master, slave] = pics.clone();
        let placed: [(u64, u64, Arc<dyn BusDevice>); 5] = [
            (Pic::MASTER, Pic::MASTER + 1, master),
            (Pit::FIRST, Pit::LAST, pit.clone()),
            (I8042::FIRST, I8042::LAST, Arc::new(keyboard)),
            (Rtc::FIRST, Rtc::LAST, rtc.clone()),
            (Pic::SLAVE, Pic::SLAVE + 1, slave),
        ];
        for (first, last, device) in placed {
            ports.insert(first, last, device)?;
        }
        let timed: Vec<Arc<dyn Timed>> = vec![pit.clone(), rtc.clone()];
        let timers = Timers::start(clock, alarm, timed).map_err(Error::Thread)?;
        Ok(Self { pit, rtc, pics, timers })
    }

    /// The devices that are saved, by name.
    pub fn saves(&self) -> [(&'static str, &dyn Saves); 4] {
        let [master, slave] = &self.pics;
        [("pit", &*self.pit), ("rtc", &*self.rtc), ("pic-master", &**master), ("pic-slave", &**slave)]
    }

    /// When this returns they make no interrupt, until [`Legacy::go_on`].
    pub fn hold(&self) {
        self.timers.hold();
    }

    /// They make interrupts again.
    pub fn go_on(&self) {
        self.timers.go_on();
    }

    /// Back to power-on, but for what the clock's battery keeps.
    pub fn reset(&self) {
        self.pit.reset();
        self.rtc.reset();
        self.pics.iter().for_each(|pic| pic.reset());
    }
}
