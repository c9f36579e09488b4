//! What `causeway run` does for a request at its control socket.

use std::path::Path;
use std::time::Instant;

use serde::Serialize;
use vfio_bridge::{DirtyRace, Trace};

use crate::commands::cli::RunArgs;
use crate::commands::describe;
use crate::config::DeviceOption;
use crate::control_protocol::{Action, Reply, Request, Verb};
use crate::machine::control::{Control, Stop};
use crate::machine::migration::{Address, NotMoved};
use crate::machine::stats::{self, Device, Port, Stats};
use crate::machine::{Machine, audit};

/// What the verbs need besides the machine.
pub struct Verbs<'a> {
    /// Ends the run.
    pub control: &'a Control,
    /// The trace and its file.
    pub trace: Option<(&'a Path, &'a Trace)>,
    /// Of the run.
    pub args: &'a RunArgs,
    /// Of the run.
    pub start: Instant,
}

/// Whether vCPUs run.
#[derive(Serialize, Clone, Copy, Debug)]
#[serde(rename_all = "kebab-case")]
enum State {
    Running,
    Paused,
}

/// The statistics, and the state.
#[derive(Serialize, Debug)]
struct Status {
    #[serde(flatten)]
    stats: Stats,
    state: State,
}

/// The devices, and the ports, alone.
#[derive(Serialize, Debug)]
struct Devices {
    devices: Vec<Device>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ports: Vec<Port>,
}

fn state(machine: &Machine) -> State {
    if machine.is_paused() { State::Paused } else { State::Running }
}

fn state_of(machine: &Machine) -> Reply {
    Reply::ok(&serde_json::json!({"state": state(machine)}))
}

impl Verbs<'_> {
    /// What there is to say now.
    fn stats(&self, machine: &Machine, last: &stats::Audit) -> Stats {
        let wall_ms = self.start.elapsed().as_millis() as u64;
        Stats { wall_ms, audit: last.clone(), ..machine.stats() }
    }

    /// Does what `request` says; `last` is the last audit of the run.
    pub fn serve(&self, request: &Request, machine: &mut Machine, last: &mut stats::Audit) -> Reply {
        log::debug!("control socket: {request:?}");
        match request.verb {
            Verb::Status => Reply::ok(&Status { stats: self.stats(machine, last), state: state(machine) }),
            Verb::Top => Reply::ok(&machine.top(self.stats(machine, last))),
            Verb::Audit => {
                let found = machine.audit(self.trace.map(|(_, trace)| trace));
                if found.differing() > 0 {
                    audit::say(&found);
                }
                *last = (&found).into();
                Reply::ok(last)
            }
            Verb::Devices => {
                let Stats { devices, ports, .. } = machine.stats();
                Reply::ok(&Devices { devices, ports })
            }
            Verb::Trace => match self.trace {
                Some((file, trace)) => {
                    machine.trace_ledgers(trace);
                    trace.flush();
                    Reply::ok(&serde_json::json!({"trace": file.to_string_lossy()}))
                }
                None => Reply::Error("this machine writes no trace: start it with --trace FILE".to_owned()),
            },
            Verb::Pause => {
                machine.pause();
                state_of(machine)
            }
            Verb::Resume => {
                machine.resume();
                state_of(machine)
            }
            Verb::Reset if self.args.no_reboot => Reply::Error(
                "this machine was started with --no-reboot, which forbids a reset: start it without, or use quit"
                    .to_owned(),
            ),
            Verb::Reset => match machine.reset() {
                Ok(()) => state_of(machine),
                Err(e) => {
                    let why = format!("the guest could not be reset: {e}");
                    self.control.request(Stop::Error(why.clone()));
                    Reply::Error(format!("{why}; the run ends"))
                }
            },
            Verb::PowerButton => {
                machine.press_power_button();
                state_of(machine)
            }
            Verb::Add => add(request, machine),
            Verb::Remove => {
                let id = request.device.as_deref().unwrap_or_default();
                machine.remove(id).map_or_else(Reply::Error, |port| {
                    Reply::ok(&serde_json::json!({"id": id, "port": port, "removing": true}))
                })
            }
            Verb::Migrate => self.migrate(request, machine),
            Verb::Snapshot => self.snapshot(request, machine),
            Verb::Dirty => dirty(request, machine),
            Verb::Iommu => iommu(request, machine),
            Verb::Quit => {
                self.control.request(Stop::Quit);
                Reply::ok(&serde_json::json!({"quit": true}))
            }
        }
    }
}

impl Verbs<'_> {
    /// The machine as a folder.
    fn snapshot(&self, request: &Request, machine: &mut Machine) -> Reply {
        let folder = Path::new(request.to.as_deref().unwrap_or_default());
        let options = describe::machine(self.args, machine);
        let taken = options.and_then(|options| machine.snapshot(folder, options).map_err(|e| e.to_string()));
        taken.map_or_else(|why| Reply::Error(format!("no snapshot was taken: {why}")), |taken| Reply::ok(&taken))
    }
}

impl Verbs<'_> {
    /// The machine moves, and this run ends.
    fn migrate(&self, request: &Request, machine: &mut Machine) -> Reply {
        let to: Result<Address, _> = request.to.as_deref().unwrap_or_default().parse();
        let wanted = to.and_then(|to| Ok((to, describe::machine(self.args, machine)?)));
        let moved = wanted
            .map_err(NotMoved::Here)
            .and_then(|(to, options)| machine.migrate(&to, options, request.verify == Some(true)));
        match moved {
            Ok(moved) => {
                self.control.request(Stop::Migrated);
                Reply::ok(&moved)
            }
            Err(NotMoved::Here(why)) => Reply::Error(format!("the machine did not move, and goes on here: {why}")),
            Err(NotMoved::Unsure(why)) => Reply::Error(format!(
                "it is not known whether the machine moved, and it is paused here: {why}; look there: if it runs, \
                 `quit` here, and `resume` here only if it does not and will not"
            )),
        }
    }
}

/// A device comes.
fn add(request: &Request, machine: &mut Machine) -> Reply {
    let text = request.device.as_deref().unwrap_or_default();
    let option: Result<DeviceOption, _> = text.parse();
    let added = option.map_err(|e| e.to_string()).and_then(|option| machine.add(&option));
    added.map_or_else(Reply::Error, |(id, port)| Reply::ok(&serde_json::json!({"id": id, "port": port})))
}

/// Which guest memory devices wrote.
fn dirty(request: &Request, machine: &mut Machine) -> Reply {
    let device = request.device.as_deref();
    let done = match request.action {
        Some(Action::Start) => {
            let race = if request.close_race == Some(true) { DirtyRace::Closed } else { DirtyRace::Open };
            machine.start_dirty(device, race).map(|known| Reply::ok(&known))
        }
        Some(Action::Read) => machine.read_dirty(device, request.from).map(|read| Reply::ok(&read)),
        Some(Action::Stop) => machine.stop_dirty(device).map(|()| Reply::ok(&serde_json::json!({"dirty": "stopped"}))),
        _ => Err("dirty start, dirty read or dirty stop".to_owned()),
    };
    done.unwrap_or_else(Reply::Error)
}

/// A page of what there is to see of the IOMMU.
fn iommu(request: &Request, machine: &Machine) -> Reply {
    let (device, position) = (request.device.as_deref(), request.position.as_deref());
    let done = match request.action {
        Some(Action::Tables) => machine.iommu_tables(device, position).map(|page| Reply::ok(&page)),
        Some(Action::Mappings) => machine.iommu_mappings(device, position).map(|page| Reply::ok(&page)),
        _ => Err("iommu tables or iommu mappings".to_owned()),
    };
    done.unwrap_or_else(Reply::Error)
}
