//! `causeway run`: checks, the event loop, and how it ends.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use event_manager::{EventManager, MutEventSubscriber, SubscriberId, SubscriberOps};
use vfio_bridge::Trace;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vtd::Audit;

use crate::assign;
use crate::boot::image::Image;
use crate::boot::{self, Kernel, Payload};
use crate::commands::cli::RunArgs;
use crate::commands::options;
use crate::commands::verbs::Verbs;
use crate::config::{MachineConfig, Place};
use crate::console::Console;
use crate::exit::{CRASHED, ERROR, REFUSED, TIME_LIMIT, USAGE};
use crate::kvm::vm;
use crate::machine::audit;
use crate::machine::control::{Control, Stop};
use crate::machine::control_socket::{self, ControlSocket, SocketFile};
use crate::machine::events::{BlockedInterrupts, FunctionEvents, Outside, Wake};
use crate::machine::migration::{Arrived, Incoming};
use crate::machine::saving::Description;
use crate::machine::snapshot::Snapshot;
use crate::machine::stats::{self, Exit, Stats};
use crate::machine::{Machine, Parts};
use crate::messages::{Messages, say};
use crate::open_files;
use crate::output::Output;
use crate::signals::{self, Guard, Signals};
use crate::terminal;

/// The command line of a kernel that is given none.
const DEFAULT_CMDLINE: &str = "console=ttyS0";

/// How long a reader that is there may take for the guest's last output.
const LAST_OUTPUT: Duration = Duration::from_secs(1);
/// How long a guest that ended by itself waits for a reader of its output.
const UNREAD_OUTPUT: Duration = Duration::from_secs(30);

/// How a run ended, for the exit code and the statistics.
fn outcome(stop: &Stop) -> Exit {
    let (reason, code) = match stop {
        Stop::PowerOff => ("poweroff", 0),
        Stop::DebugExit(value) => ("debug-exit", (value << 1) as u8 | 1),
        Stop::Quit => ("quit", 0),
        Stop::Migrated => ("migrated", 0),
        Stop::Reset => ("reset", CRASHED),
        Stop::Crash(_) => ("crash", CRASHED),
        Stop::Error(_) => ("error", ERROR),
        Stop::TimeLimit => ("timeout", TIME_LIMIT),
        Stop::Signal(signal) => ("signal", 128 + *signal as u8),
    };
    Exit { reason, code: code.into() }
}

fn explain(stop: &Stop) {
    match stop {
        Stop::PowerOff | Stop::Quit | Stop::Migrated | Stop::DebugExit(_) => {}
        Stop::Reset => log::error!("the guest asked for a reset, which --no-reboot forbids"),
        Stop::Crash(why) => log::error!("the guest crashed: {why}"),
        Stop::Error(why) => log::error!("{why}"),
        Stop::TimeLimit => log::error!("the time limit is over, the guest was stopped"),
        Stop::Signal(signal) => log::info!("stopped by signal {signal}"),
    }
}

/// Where notifications and host operations are traced.
fn trace(args: &RunArgs) -> anyhow::Result<Option<Arc<Trace>>> {
    let Some(path) = &args.trace else { return Ok(None) };
    let file =
        File::create(path).map_err(|e| anyhow::anyhow!("the trace file {} cannot be written: {e}", path.display()))?;
    Ok(Some(Trace::new(Box::new(file))))
}

struct Run<'a> {
    args: &'a RunArgs,
    config: MachineConfig,
    names: Vec<String>,
    places: Vec<Place>,
    trace: Option<Arc<Trace>>,
    start: Instant,
    control: Arc<Control>,
    signals: Arc<Signals>,
    messages: Arc<Messages>,
    /// Who connects before the machine runs is served when it does.
    socket: Option<(UnixListener, Arc<SocketFile>)>,
    /// What the machine goes on from.
    saved: Option<Saved>,
}

/// Runs a guest to its end.
pub fn run(args: &RunArgs) -> ExitCode {
    let saved = match (&args.restore, &args.incoming) {
        (Some(path), _) => {
            Snapshot::open(path).map(|snapshot| Some(Saved::Folder(Box::new(snapshot)))).map_err(|e| e.to_string())
        }
        (None, Some(address)) => Incoming::wait(address).map(|incoming| Some(Saved::Incoming(incoming))),
        (None, None) => Ok(None),
    };
    let why = |why| format!("the options of the machine that was saved cannot be used: {why}");
    let opened = saved.and_then(|saved| match saved {
        None => Ok(run_machine(args, None)),
        Some(saved) => match args.of_machine(&saved.machine().options).map_err(why) {
            Ok(args) => Ok(run_machine(&args, Some(saved))),
            Err(why) => {
                saved.refuse(&why);
                Err(why)
            }
        },
    });
    opened.unwrap_or_else(|why| {
        say(format_args!("causeway: {why}"));
        ExitCode::from(REFUSED)
    })
}

/// What a machine goes on from.
enum Saved {
    Folder(Box<Snapshot>),
    Incoming(Incoming),
}

impl Saved {
    fn machine(&self) -> &Description {
        match self {
            Self::Folder(snapshot) => &snapshot.machine,
            Self::Incoming(incoming) => &incoming.machine,
        }
    }

    /// Tells a process that waits for it why it is not used.
    fn refuse(self, why: &str) {
        match self {
            Self::Folder(_) => {}
            Self::Incoming(incoming) => incoming.refuse(why),
        }
    }

    /// Gives the machine, which was made from it, its state. One that comes from another process is to be taken over
    /// then.
    fn put_into(self, machine: &mut Machine) -> anyhow::Result<Option<Arrived>> {
        match self {
            Self::Folder(snapshot) => Ok(machine.take_over(*snapshot).map(|()| None)?),
            Self::Incoming(incoming) => machine.arrive(incoming).map(Some).map_err(anyhow::Error::msg),
        }
    }
}

/// Runs a guest to its end, one that was saved or a new one.
fn run_machine(args: &RunArgs, saved: Option<Saved>) -> ExitCode {
    let start = Instant::now();
    let refused = |e: anyhow::Error| (REFUSED, e);
    let usage = |e: anyhow::Error| (USAGE, e);
    let run = || -> Result<Run<'_>, (u8, anyhow::Error)> {
        let names = options::name_devices(&args.devices).map_err(|e| usage(e.into()))?;
        let places = options::place_devices(&args.devices, args.root_ports).map_err(|e| usage(e.into()))?;
        let config = args.machine(&names, &places).map_err(|e| usage(e.into()))?;
        // Before any thread exists, so that none of them gets these signals.
        let signals = Arc::new(Signals::block().map_err(|e| refused(e.into()))?);
        // A pipe as a file to write waits for its reader.
        let guard = Guard::start(signals.clone(), |_, _| {}).map_err(|e| refused(e.into()))?;
        let messages = Arc::new(Messages::start(args.log.as_deref(), args.verbose).map_err(usage)?);
        let trace = trace(args).map_err(usage)?;
        if let Some(file) = &args.stats {
            stats::check(file)
                .map_err(|e| usage(anyhow::anyhow!("the statistics cannot be written to {}: {e}", file.display())))?;
        }
        let place = args.socket.as_deref().map(control_socket::Place::find).transpose().map_err(|e| usage(e.into()))?;
        drop(guard);
        // The next guard removes it.
        let socket = place.map(control_socket::Place::listen).transpose().map_err(|e| usage(e.into()))?;
        if let Err(e) = open_files::raise_limit() {
            log::debug!("the limit on open files could not be raised: {e}");
        }
        let control = Arc::new(Control::new(args.cpus.into()).map_err(|e| refused(e.into()))?);
        Ok(Run { args, config, names, places, trace, start, control, signals, messages, socket, saved })
    };
    let mut run = match run() {
        Ok(run) => run,
        Err((code, e)) => {
            say(format_args!("causeway: {e}"));
            return ExitCode::from(code);
        }
    };
    let result = run.guest();
    if let (Err(e), Some(saved)) = (&result, run.saved.take()) {
        saved.refuse(&e.to_string());
    }
    terminal::give_back();
    let code = match &result {
        Ok(stop) => outcome(stop).code as u8,
        Err(e) => {
            log::error!("{e}");
            REFUSED
        }
    };
    run.messages.finish(&run.signals);
    match result {
        Ok(Stop::Signal(signal)) => signals::die_by(signal),
        _ => ExitCode::from(code),
    }
}

type Subscriber = Box<dyn MutEventSubscriber>;

/// Who watches the events of which assigned function, by its id.
type Watched = BTreeMap<String, SubscriberId>;

impl Run<'_> {
    /// An error means that nothing ran.
    fn guest(&mut self) -> anyhow::Result<Stop> {
        let args = self.args;
        let messages = self.messages.clone();
        let socket = self.socket.take();
        let file = socket.as_ref().map(|(_, file)| file.clone());
        let guard = Guard::start(self.signals.clone(), move |signal, signals| {
            log::info!("stopped by signal {signal}, before the guest ran");
            if let Some(file) = file {
                file.remove();
            }
            messages.finish(signals);
        })?;
        let payload = self.payload()?;
        let config = &self.config;
        let checked = assign::check(&config.devices, config.vtd(), config.memory)?;
        let kvm = vm::open().map_err(vm::remedy)?;
        let socket = socket.map(ControlSocket::new).transpose()?;
        let drained = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let output = Output::start("output", io::stdout().as_fd())?;
        let trace = self.trace.clone();
        let parts = Parts {
            config,
            names: &self.names,
            places: &self.places,
            payload,
            checked: &checked,
            control: self.control.clone(),
            output: output.writer(),
            drained: drained.try_clone()?,
            trace: trace.clone(),
            saved: self.saved.as_ref().map(Saved::machine),
        };
        let made = Machine::new(&kvm, parts);
        let saved = self.saved.take();
        let (mut machine, arrived) = match (made, saved) {
            (Ok(machine), None) => (machine, None),
            (Ok(mut machine), Some(saved)) => match saved.put_into(&mut machine) {
                Ok(arrived) => (machine, arrived),
                Err(e) => {
                    machine.stop();
                    return Err(e);
                }
            },
            (Err(e), saved) => {
                if let Some(saved) = saved {
                    saved.refuse(&e.to_string());
                }
                return Err(e.into());
            }
        };

        let report = Arc::new(AtomicBool::new(false));
        let mut events: EventManager<Subscriber> =
            EventManager::new().map_err(|e| anyhow::anyhow!("no event loop: {e}"))?;
        let (signals, control) = (self.signals.clone(), self.control.clone());
        events.add_subscriber(Box::new(Outside::new(signals, args.timeout, control.clone(), report.clone())?));
        let blocked = BlockedInterrupts::new(machine.interrupts().clone(), self.control.clone());
        events.add_subscriber(Box::new(blocked));
        if let Some(socket) = &socket {
            events.add_subscriber(Box::new(Wake::new(socket.event(), self.control.clone())));
        }
        events.add_subscriber(Box::new(Wake::new(machine.plug_event().as_raw_fd(), self.control.clone())));
        for (id, _) in machine.assigned() {
            log::info!(
                "{id}: the device can reach all of the guest's memory until the guest turns translation on, as on hardware"
            );
        }
        let mut watched = Watched::new();
        self.watch_functions(&machine, &mut events, &mut watched);

        // From here on the event loop hears the signals.
        drop(guard);
        let typed = Console::start(machine.input(), drained, control, self.messages.terminal())?;
        // Last of all, when nothing can fail here any more.
        if let Some(Err(why)) = arrived.map(|arrived| machine.take_guest(arrived)) {
            machine.stop();
            return Err(anyhow::Error::msg(why));
        }
        machine.resume();
        let stop = self.watch(&mut machine, &mut events, &mut watched, &report, trace.as_deref(), socket);
        machine.halt();
        terminal::give_back();
        // Before the functions are torn down.
        let audit = self.args.stats.as_ref().map(|_| machine.audit(trace.as_deref()));
        machine.stop();
        if let Some(trace) = &trace {
            trace.flush();
        }
        let written = audit.map_or(Ok(()), |audit| {
            audit::say(&audit);
            self.write_stats(&machine, Some(outcome(&stop)), &audit)
        });
        let stop = match (stop, written) {
            // The guest did what it was to do, and what was asked for about it is missing.
            (stop, Err(why)) if outcome(&stop).code == 0 => Stop::Error(why),
            (stop, written) => {
                written.unwrap_or_else(|why| log::error!("{why}"));
                stop
            }
        };
        let stop = self.give_out(&output, stop);
        match typed.load(Ordering::Relaxed) {
            0 => {}
            lost => log::warn!("{lost} bytes that were typed were lost: the guest did not read them"),
        }
        Ok(stop)
    }

    /// Says why the guest stopped, behind its last output: what waits for a reader is given some time. Gives back why
    /// the program ends.
    fn give_out(&self, output: &Output, stop: Stop) -> Stop {
        let mut signal = output.finish(LAST_OUTPUT, &self.signals);
        explain(&stop);
        let by_itself = !matches!(stop, Stop::Quit | Stop::TimeLimit | Stop::Signal(_));
        let waiting = output.waiting();
        if signal.is_none() && by_itself && waiting > 0 {
            log::warn!(
                "{waiting} bytes of the guest's output wait for a reader, for {} s at most; a signal ends that",
                UNREAD_OUTPUT.as_secs()
            );
            signal = output.finish(UNREAD_OUTPUT, &self.signals);
        }
        let lost = output.lost();
        match (lost.bytes, lost.why) {
            (0, _) => {}
            (bytes, Some(why)) => log::warn!("{bytes} bytes of the guest's output were lost: {why}"),
            (bytes, None) => log::warn!("{bytes} bytes of the guest's output were lost: nobody read them"),
        }
        match signal {
            Some(signal) if by_itself => {
                let stop = Stop::Signal(signal);
                explain(&stop);
                stop
            }
            _ => stop,
        }
    }

    fn payload(&self) -> Result<Payload, boot::Error> {
        let RunArgs { kernel, image, initrd, cmdline, memory, .. } = self.args;
        let initrd = initrd.as_deref();
        match (kernel, image) {
            (Some(kernel), _) => {
                let cmdline = cmdline.as_deref().unwrap_or(DEFAULT_CMDLINE);
                Kernel::open(kernel, initrd, cmdline, *memory).map(Payload::Kernel)
            }
            (None, image) => {
                // The command line has one of the two.
                let image = image.as_deref().unwrap_or(Path::new(""));
                Image::open(image, initrd, cmdline.as_deref().unwrap_or_default(), *memory).map(Payload::Image)
            }
        }
    }

    fn watch(
        &self,
        machine: &mut Machine,
        events: &mut EventManager<Subscriber>,
        watched: &mut Watched,
        report: &AtomicBool,
        trace: Option<&Trace>,
        mut socket: Option<ControlSocket>,
    ) -> Stop {
        let verbs = Verbs {
            control: &self.control,
            trace: self.args.trace.as_deref().zip(trace),
            args: self.args,
            start: self.start,
        };
        let mut last_audit = stats::Audit::default();
        let mut more = false;
        loop {
            // For ever, unless a client has more.
            let timeout = if more { 0 } else { -1 };
            if let Err(e) = events.run_with_timeout(timeout) {
                return Stop::Error(format!("the event loop failed: {e}"));
            }
            if let Some(socket) = &mut socket {
                more = socket.serve(&mut |request| verbs.serve(request, machine, &mut last_audit));
            }
            machine.take_what_left();
            if let Err(why) = machine.give_back() {
                self.control.request(Stop::Error(why));
            }
            self.watch_functions(machine, events, watched);
            if report.swap(false, Ordering::Relaxed) {
                let audit = machine.audit(trace);
                audit::say(&audit);
                last_audit = (&audit).into();
                self.write_stats(machine, None, &audit).unwrap_or_else(|why| log::error!("{why}"));
                if let Some(trace) = trace {
                    trace.flush();
                }
            }
            match self.control.take_stop() {
                None => {}
                Some(Stop::Reset) if !self.args.no_reboot => {
                    if let Err(e) = machine.reset() {
                        return Stop::Error(format!("the guest could not be reset: {e}"));
                    }
                }
                Some(stop) => return stop,
            }
        }
    }

    /// Watches the events of the assigned functions that are there now, and of no others: what is watched stays open.
    fn watch_functions(&self, machine: &Machine, events: &mut EventManager<Subscriber>, watched: &mut Watched) {
        let there = |id: &String| machine.assigned().iter().any(|(other, _)| other == id);
        for (_, subscriber) in watched.extract_if(.., |id, _| !there(id)) {
            // It was added before.
            let _ = events.remove_subscriber(subscriber);
        }
        for (id, function) in machine.assigned() {
            watched.entry(id.clone()).or_insert_with(|| {
                let of = FunctionEvents::new(id.clone(), function.clone(), self.control.clone());
                events.add_subscriber(Box::new(of))
            });
        }
    }

    fn write_stats(&self, machine: &Machine, exit: Option<Exit>, audit: &Audit) -> Result<(), String> {
        let Some(file) = &self.args.stats else { return Ok(()) };
        let wall_ms = self.start.elapsed().as_millis() as u64;
        let stats = Stats { exit, wall_ms, audit: audit.into(), ..machine.stats() };
        stats.write(file).map_err(|e| format!("the statistics could not be written to {}: {e}", file.display()))
    }
}
