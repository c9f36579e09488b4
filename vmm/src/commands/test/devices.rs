//! The devices that the tests drive.

use super::list::Test;
use crate::config::{DeviceKind, DeviceOption, Slot};

/// What every machine of a run has.
#[derive(PartialEq, Eq, Debug)]
pub struct Devices {
    /// Values of `--device`.
    wanted: Vec<(String, DeviceOption)>,
    /// The user named none: each edu gets a process of its own.
    by_processes: bool,
    /// Those are given no file of the guest's memory.
    confine: bool,
}

/// The devices of one machine.
#[derive(PartialEq, Eq, Debug)]
pub struct Placed {
    /// Values of `--device`; of those in `processes`, with `edu` in place of where their process is.
    pub options: Vec<String>,
    /// Which of them are emulated by processes of their own.
    pub processes: Vec<usize>,
    /// Words for the image's command line, each after a space.
    pub words: String,
}

impl Devices {
    /// Those that the user asked for: each text, and what it means. If there are processes, they are given no file of
    /// the guest's memory under `confine`.
    pub fn new(wanted: Vec<(String, DeviceOption)>, confine: bool) -> Self {
        let by_processes = wanted.is_empty();
        Self { wanted, by_processes, confine }
    }

    /// `--device` for the edu of another process at the other end of descriptor `fd`, in place of `option`.
    pub fn of_process(&self, option: &str, fd: i32) -> String {
        let confine = if self.confine { ",confine=on" } else { "" };
        option.replacen("edu", &format!("vfio-user,fd={fd}{confine}"), 1)
    }

    /// Whether one machine at a time can have them.
    pub fn are_shared(&self) -> bool {
        self.wanted.iter().any(|(_, option)| !option.kind.is_emulated())
    }

    /// The devices of a machine for `test`.
    ///
    /// The image is told which functions are assigned (`assigned=DD.F`), and of which the host hears what their DMA
    /// does wrong (`unrecorded=DD.F`). Beside such there is an emulated edu, whose faults the guest's unit records.
    pub fn of(&self, test: &Test) -> Placed {
        let by_processes = self.by_processes && test.allows_assigned();
        let mut all = self.wanted.clone();
        if all.iter().all(|(_, option)| matches!(option.kind, DeviceKind::Vfio { .. })) {
            all.push(edu());
        }
        all.extend(test.devices.iter().cloned());
        let in_first = |option: &DeviceOption| option.addr.filter(|addr| addr.segment == 0).map(|addr| addr.slot);
        let taken: Vec<u8> = all.iter().filter_map(|(_, option)| in_first(option)).map(|slot| slot.device).collect();
        let mut free = (1..0x1f).filter(|device| !taken.contains(device)).map(|device| Slot { device, function: 0 });
        let mut placed = Placed { options: Vec::new(), processes: Vec::new(), words: String::new() };
        for (index, (mut text, option)) in all.into_iter().enumerate() {
            // What is in another segment the image finds there, emulated.
            let elsewhere = option.addr.is_some_and(|addr| addr.segment != 0);
            let is_process = by_processes && option.kind == DeviceKind::PLAIN_EDU && !elsewhere;
            if is_process {
                placed.processes.push(index);
            }
            // What is not on bus 0 the image finds behind its bridge.
            let on_root = option.port.is_none() && option.bus.is_none() && !elsewhere;
            if on_root && (is_process || !option.kind.is_emulated()) {
                // Where the image is told that it is. A bus without a free slot is refused at the start.
                if let Some(Slot { device, function }) = in_first(&option).or_else(|| free.next()) {
                    if option.addr.is_none() {
                        text.push_str(&format!(",addr={device:02x}.{function}"));
                    }
                    placed.words.push_str(&format!(" assigned={device:02x}.{function}"));
                    if let DeviceKind::Vfio { .. } = option.kind {
                        placed.words.push_str(&format!(" unrecorded={device:02x}.{function}"));
                    }
                }
            }
            placed.options.push(text);
        }
        placed
    }
}

fn edu() -> (String, DeviceOption) {
    ("edu".to_owned(), DeviceOption { id: None, addr: None, port: None, bus: None, kind: DeviceKind::PLAIN_EDU })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(texts: &[&str]) -> Vec<(String, DeviceOption)> {
        texts.iter().map(|text| (text.to_string(), text.parse().unwrap())).collect()
    }

    fn placed(wanted: &[&str], more: &[&str]) -> (Vec<String>, Vec<usize>, String) {
        let test = Test { devices: parse(more), ..Test::named("") };
        let Placed { options, processes, words } = Devices::new(parse(wanted), false).of(&test);
        (options, processes, words)
    }

    #[test]
    fn the_image_is_told_where_assigned_functions_are() {
        let host = "vfio,host=00:08.0";
        let (options, processes, words) = placed(&[host], &["edu"]);
        assert_eq!(options, ["vfio,host=00:08.0,addr=01.0", "edu", "edu"]);
        assert!(processes.is_empty());
        assert_eq!(words, " assigned=01.0 unrecorded=01.0");
        let (options, _, words) = placed(&["edu,addr=01.0", host, "vfio-user,socket=x,addr=1d.2"], &[]);
        assert_eq!(options, ["edu,addr=01.0", "vfio,host=00:08.0,addr=02.0", "vfio-user,socket=x,addr=1d.2"]);
        assert_eq!(words, " assigned=02.0 unrecorded=02.0 assigned=1d.2");
    }

    #[test]
    fn without_a_device_each_edu_is_a_process() {
        let (options, processes, words) = placed(&[], &["edu", "edu,addr=05.0"]);
        assert_eq!(options, ["edu,addr=01.0", "edu,addr=02.0", "edu,addr=05.0"]);
        assert_eq!(processes, [0, 1, 2]);
        assert_eq!(words, " assigned=01.0 assigned=02.0 assigned=05.0");
    }

    #[test]
    fn an_edu_behind_a_bridge_is_a_process_too_and_needs_no_slot() {
        let (options, processes, words) = placed(&[], &["pcie-pci-bridge,id=br,addr=08.0", "edu,bus=br", "edu,port=1"]);
        assert_eq!(options, ["edu,addr=01.0", "pcie-pci-bridge,id=br,addr=08.0", "edu,bus=br", "edu,port=1"]);
        assert_eq!((processes, words.as_str()), (vec![0, 2, 3], " assigned=01.0"));
    }

    #[test]
    fn a_process_is_confined_if_that_is_wanted() {
        let option = |confine| Devices::new(Vec::new(), confine).of_process("edu,addr=01.0", 7);
        assert_eq!(option(false), "vfio-user,fd=7,addr=01.0");
        assert_eq!(option(true), "vfio-user,fd=7,confine=on,addr=01.0");
    }

    #[test]
    fn emulated_devices_need_nothing_said() {
        let emulated = |texts: &[&str]| (texts.iter().map(|text| text.to_string()).collect(), vec![], String::new());
        assert_eq!(placed(&["edu,id=x"], &["edu"]), emulated(&["edu,id=x", "edu"]));
        // Without Caching Mode none could follow.
        let options = vec!["--iommu".to_owned(), "vtd,caching-mode=off".to_owned()];
        let test = Test { options, ..Test::named("") };
        assert!(Devices::new(Vec::new(), false).of(&test).processes.is_empty());
    }
}
