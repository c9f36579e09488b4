//! `causeway run`: checks, the event loop, and how it ends.

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use vfio_bridge::Trace;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vtd::Audit;

use crate::boot::{self, Kernel, Payload};
use crate::cli::RunArgs;
use crate::console::Console;
use crate::control::{Control, Stop};
use crate::events::{self, BlockedInterrupts, FunctionEvents, Outside, Signals};
use crate::image::Image;
use crate::machine::{Machine, Parts};
use crate::stats::{Exit, Stats};
use crate::{assign, audit, options, terminal, vm};

/// Exit code of a usage error.
pub const USAGE: u8 = 2;
/// Exit code of a refused start.
pub const REFUSED: u8 = 4;
/// Exit code of an error of the host or of ours.
pub const ERROR: u8 = 6;
/// Exit code of a crashed guest.
pub const CRASHED: u8 = 8;
/// Exit code of the time limit.
pub const TIME_LIMIT: u8 = 10;

/// The command line of a kernel that is given none.
const DEFAULT_CMDLINE: &str = "console=ttyS0";

fn start_log(args: &RunArgs) -> anyhow::Result<()> {
    let level = match args.verbose {
        0 => log::LevelFilter::Info,
        1 => log::LevelFilter::Debug,
        _ => log::LevelFilter::Trace,
    };
    let mut builder = env_logger::Builder::new();
    builder.filter_level(level);
    if args.verbose == 0 {
        // It warns of interrupt kinds that a device simply does not have; what fails, we say ourselves.
        builder.filter_module("vfio_ioctls", log::LevelFilter::Error);
    }
    if let Ok(filters) = std::env::var("RUST_LOG") {
        builder.parse_filters(&filters);
    }
    let start = Instant::now();
    let timed = args.log.is_some() || args.verbose > 0;
    builder.format(move |out, record| {
        use std::io::Write;
        let level = record.level().as_str().to_ascii_lowercase();
        match timed {
            true => writeln!(out, "causeway [{:.6}] {level}: {}", start.elapsed().as_secs_f64(), record.args()),
            false => writeln!(out, "causeway: {level}: {}", record.args()),
        }
    });
    if let Some(path) = &args.log {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .map_err(|e| anyhow::anyhow!("the log file {} cannot be opened: {e}", path.display()))?;
        builder.target(env_logger::Target::Pipe(Box::new(file)));
    }
    builder.try_init()?;
    Ok(())
}

/// How a run ended, for the exit code and the statistics.
fn outcome(stop: &Stop) -> Exit {
    let (reason, code) = match stop {
        Stop::PowerOff => ("poweroff", 0),
        Stop::DebugExit(value) => ("debug-exit", (value << 1) as u8 | 1),
        Stop::Quit => ("quit", 0),
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
        Stop::PowerOff | Stop::Quit | Stop::DebugExit(_) => {}
        Stop::Reset => log::error!("the guest asked for a reset, which --no-reboot forbids"),
        Stop::Crash(why) => log::error!("the guest crashed: {why}"),
        Stop::Error(why) => log::error!("{why}"),
        Stop::TimeLimit => log::error!("the time limit is over, the guest was stopped"),
        Stop::Signal(signal) => log::info!("stopped by signal {signal}"),
    }
}

struct Run<'a> {
    args: &'a RunArgs,
    names: Vec<String>,
    start: Instant,
    control: Arc<Control>,
}

/// Runs a guest to its end.
pub fn run(args: &RunArgs) -> ExitCode {
    let start = Instant::now();
    let names = match options::name_devices(&args.devices) {
        Ok(names) => names,
        Err(e) => {
            eprintln!("causeway: {e}");
            return ExitCode::from(USAGE);
        }
    };
    let run = start_log(args).and_then(|()| {
        // Before any thread exists, so that none of them gets these signals.
        let signals = Signals::block()?;
        let control = Arc::new(Control::new(args.cpus.into())?);
        Ok((Run { args, names, start, control }, signals))
    });
    let (run, signals) = match run {
        Ok(run) => run,
        Err(e) => {
            eprintln!("causeway: {e}");
            return ExitCode::from(REFUSED);
        }
    };
    let stop = match run.guest(signals) {
        Ok(stop) => stop,
        Err(e) => {
            log::error!("{e}");
            return ExitCode::from(REFUSED);
        }
    };
    explain(&stop);
    match stop {
        Stop::Signal(signal) => events::die_by(signal),
        stop => ExitCode::from(outcome(&stop).code as u8),
    }
}

type Subscriber = Box<dyn MutEventSubscriber>;

impl Run<'_> {
    /// An error means that nothing ran.
    fn guest(&self, signals: Signals) -> anyhow::Result<Stop> {
        let args = self.args;
        let payload = self.payload()?;
        let checked = assign::check(&args.devices, args.vtd(), args.memory)?;
        let kvm = vm::open().map_err(remedy)?;
        let drained = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let trace = self.trace()?;
        let parts = Parts {
            args,
            names: &self.names,
            payload,
            checked: &checked,
            control: self.control.clone(),
            drained: drained.try_clone()?,
            trace: trace.clone(),
        };
        let mut machine = Machine::new(&kvm, parts)?;

        let report = Arc::new(AtomicBool::new(false));
        let mut events: EventManager<Subscriber> =
            EventManager::new().map_err(|e| anyhow::anyhow!("no event loop: {e}"))?;
        events.add_subscriber(Box::new(Outside::new(signals, args.timeout, self.control.clone(), report.clone())?));
        let raw = terminal::is_ours() && terminal::make_raw().is_ok();
        let console = Console::new(machine.serial().clone(), drained, self.control.clone(), raw);
        events.add_subscriber(Box::new(console));
        let blocked = BlockedInterrupts::new(machine.interrupts().clone(), self.control.clone());
        events.add_subscriber(Box::new(blocked));
        for (id, function) in machine.assigned() {
            log::info!(
                "{id}: the device can reach all of the guest's memory until the guest turns translation on, as on hardware"
            );
            let watched = FunctionEvents::new(id.clone(), function.clone(), self.control.clone());
            events.add_subscriber(Box::new(watched));
        }

        machine.resume();
        let stop = self.watch(&mut machine, &mut events, &report, trace.as_deref());
        machine.halt();
        terminal::restore();
        // Before the functions are torn down.
        let audit = self.args.stats.as_ref().map(|_| machine.audit(trace.as_deref()));
        machine.stop();
        if let Some(trace) = &trace {
            trace.flush();
        }
        if let Some(audit) = audit {
            audit::say(&audit);
            self.write_stats(&machine, Some(outcome(&stop)), &audit);
        }
        Ok(stop)
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

    /// Where notifications and host operations are traced.
    fn trace(&self) -> anyhow::Result<Option<Arc<Trace>>> {
        let Some(path) = &self.args.trace else { return Ok(None) };
        let file = File::create(path)
            .map_err(|e| anyhow::anyhow!("the trace file {} cannot be written: {e}", path.display()))?;
        Ok(Some(Trace::new(Box::new(file))))
    }

    fn watch(
        &self,
        machine: &mut Machine,
        events: &mut EventManager<Subscriber>,
        report: &AtomicBool,
        trace: Option<&Trace>,
    ) -> Stop {
        loop {
            if let Err(e) = events.run() {
                return Stop::Error(format!("the event loop failed: {e}"));
            }
            if report.swap(false, Ordering::Relaxed) {
                let audit = machine.audit(trace);
                audit::say(&audit);
                self.write_stats(machine, None, &audit);
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

    fn write_stats(&self, machine: &Machine, exit: Option<Exit>, audit: &Audit) {
        let Some(file) = &self.args.stats else { return };
        let wall_ms = self.start.elapsed().as_millis() as u64;
        let stats = Stats { exit, wall_ms, audit: audit.into(), ..machine.stats() };
        if let Err(e) = stats.write(file) {
            log::error!("the statistics could not be written to {}: {e}", file.display());
        }
    }
}

/// Adds to an error of KVM what the user can do.
pub fn remedy(error: vm::Error) -> anyhow::Error {
    match &error {
        vm::Error::Open(e) if e.kind() == std::io::ErrorKind::NotFound => anyhow::anyhow!(
            "{error}; turn virtualization on in the firmware and load the module: modprobe kvm-intel or modprobe kvm-amd"
        ),
        vm::Error::Open(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
            anyhow::anyhow!("{error}; give it to this user: usermod -aG kvm $USER, then log in again")
        }
        _ => error.into(),
    }
}
