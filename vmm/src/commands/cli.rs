//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand};

use crate::commands::ctl::CtlArgs;
use crate::commands::device::DeviceArgs;
use crate::commands::options::{self, BadOption};
use crate::commands::report::ReportArgs;
use crate::commands::test::TestArgs;
use crate::commands::units::{Named, units};
use crate::config::{DeviceKind, DeviceOption, IommuOption, MachineConfig, Place, UserSocket};
use crate::machine::migration::Address;

/// `causeway`.
#[derive(Parser, Debug)]
#[command(
    name = "causeway",
    version,
    about = "Boots guests with PCI devices assigned to them behind an emulated Intel VT-d."
)]
#[command(disable_help_subcommand = true, args_override_self = false)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Boots a guest
    Run(Box<RunArgs>),
    /// Asks a running machine for something, at its control socket
    Ctl(CtlArgs),
    /// Runs guest-side DMA test images, each test in a fresh guest
    Test(Box<TestArgs>),
    /// Emulates a device in this process for a virtual machine of another: a vfio-user server
    Device(DeviceArgs),
    /// Makes one page, with pictures, of a trace
    Report(ReportArgs),
}

/// `causeway run`.
#[derive(Args, Debug)]
#[command(after_help = "\
Option values are `kind[,key=value]...`; numbers decimal or 0x, sizes with K, M, G or T, switches on or off.

  --iommu vtd[,aw-bits=39|48|57][,caching-mode=on|off][,intremap=on|off][,eim=on|off][,pt=on|off][,ioapic-check=on|off]
              [,dma-translation=on|off]
              [,scalable=on|off][,stage=first|second|both][,nest=on|off][,slads=on|off][,pasid-bits=0..20]
              [,ats=on|off][,pri=on|off][,perf=on|off][,posted=on|off]
              [,devices=ID|DD.F|portN[+...]]   a further unit, with these functions, bridges and root ports
              [,segment=N]   a unit of that PCI segment
  --iommu none
  --device vfio,host=[DDDD:]BB:DD.F[,addr=DD.F][,backend=auto|type1|iommufd][,id=NAME]
  --device vfio-user,socket=PATH|fd=N[,confine=on|off][,addr=DD.F][,id=NAME]
  --device virtio-blk,file=PATH[,readonly=on|off][,addr=DD.F][,id=NAME]
  --device virtio-net,tap=NAME[,mac=XX:XX:XX:XX:XX:XX][,addr=DD.F][,id=NAME]
  --device virtio-console[,addr=DD.F][,id=NAME]
  --device virtio-rng[,addr=DD.F][,id=NAME]
  --device edu[,pasid=on|off][,ats=on|off][,pri=on|off][,addr=DD.F][,id=NAME]
  --device pinblk[,file=PATH[,direct=on]][,addr=DD.F][,id=NAME]
  --device pcie-pci-bridge[,addr=DD.F][,id=NAME]
  addr=SSSS:00:DD.F in place of addr=DD.F: in PCI segment SSSS, 0000 to 0007
  port=N in place of addr=DD.F: behind that root port
  bus=ID beside addr=DD.F: on the conventional bus below the pcie-pci-bridge with that id

Exit codes: 0 the guest powered off; 2 usage; 4 refused at start, nothing ran; 6 host or VMM error while running;
8 the guest crashed (triple fault, or reset under --no-reboot); 10 time limit; odd: an image wrote V to isa-debug-exit,
and the code is (V << 1) | 1.")]
pub struct RunArgs {
    /// Linux kernel (bzImage)
    #[arg(long, value_name = "FILE", conflicts_with = "image")]
    #[arg(required_unless_present_any = ["image", "restore", "incoming"])]
    pub kernel: Option<PathBuf>,
    /// Bare-metal image (PVH, multiboot 1); adds isa-debug-exit and fw_cfg
    #[arg(long, value_name = "FILE")]
    pub image: Option<PathBuf>,
    /// Initial RAM disk; the one module of an image
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Command line; `console=ttyS0` for a kernel that is given none
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// Guest memory
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = options::memory)]
    pub memory: u64,
    /// Virtual CPUs, 1 to 254
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=254))]
    pub cpus: u8,
    /// End, with code 8, when the guest asks for a reset
    #[arg(long)]
    pub no_reboot: bool,
    /// Stop the guest after this time, with code 10
    #[arg(long, value_name = "SECONDS", value_parser = options::seconds)]
    pub timeout: Option<Duration>,
    /// The IOMMU that the guest sees
    #[arg(long, value_name = "KIND[,KEY=VALUE]...", default_value = "vtd")]
    pub iommu: Vec<IommuOption>,
    /// A device, as often as wanted
    #[arg(long = "device", value_name = "KIND[,KEY=VALUE]...")]
    pub devices: Vec<DeviceOption>,
    /// PCI Express root ports, behind which devices come and go: 0 to 15
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=15))]
    pub root_ports: u8,
    /// Write statistics (JSON) at the end and on SIGUSR1
    #[arg(long, value_name = "FILE")]
    pub stats: Option<PathBuf>,
    /// Write a line for each IOMMU notification and each host operation
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Write messages to a file instead of stderr
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// More messages; up to three times
    #[arg(short = 'v', action = ArgAction::Count)]
    pub verbose: u8,
    /// Listen here for `causeway ctl`: whoever can connect (this user, and root) owns the machine
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Go on where `causeway ctl PATH snapshot DIR` saved a machine, with that machine's options
    #[arg(long, value_name = "DIR", conflicts_with_all = OF_THE_MACHINE)]
    pub restore: Option<PathBuf>,
    /// Wait there for a machine that `causeway ctl PATH migrate ADDRESS` sends: unix:PATH or tcp:HOST:PORT
    #[arg(long, value_name = "ADDRESS", conflicts_with_all = OF_THE_MACHINE, conflicts_with = "restore")]
    pub incoming: Option<Address>,
    /// Of a machine that was saved or comes: the process of its vfio-user device ID listens at PATH now
    #[arg(long = "user-socket", value_name = "ID=PATH", value_parser = options::user_socket)]
    #[arg(conflicts_with_all = ["kernel", "image"])]
    pub user_sockets: Vec<(String, PathBuf)>,
}

/// What describes a machine, which one that was saved has already.
const OF_THE_MACHINE: [&str; 9] =
    ["kernel", "image", "initrd", "cmdline", "memory", "cpus", "iommu", "devices", "root_ports"];

impl RunArgs {
    /// A run as this one, of the machine with these options, as they were saved.
    ///
    /// # Errors
    /// A sentence that says which option is none.
    pub fn of_machine(&self, options: &[String]) -> Result<Self, String> {
        let words = ["causeway", "run"].into_iter().chain(options.iter().map(String::as_str));
        let parsed = Cli::try_parse_from(words).map_err(|e| e.to_string())?;
        let Command::Run(mut machine) = parsed.command else { return Err("they are of another command".to_owned()) };
        for (id, path) in &self.user_sockets {
            let mut devices = machine.devices.iter_mut().filter(|device| device.id.as_ref() == Some(id));
            match devices.next().map(|device| &mut device.kind) {
                Some(DeviceKind::VfioUser { socket, .. }) => *socket = UserSocket::Path(path.clone()),
                _ => return Err(format!("it has no vfio-user device {id}, which --user-socket names")),
            }
        }
        let Self { no_reboot, timeout, stats, trace, log, verbose, socket, restore, incoming, user_sockets, .. } = self;
        let (stats, trace, log) = (stats.clone(), trace.clone(), log.clone());
        let (no_reboot, timeout, verbose) = (*no_reboot, *timeout, *verbose);
        let (socket, restore, incoming) = (socket.clone(), restore.clone(), incoming.clone());
        let user_sockets = user_sockets.clone();
        Ok(Self { no_reboot, timeout, stats, trace, log, verbose, socket, restore, incoming, user_sockets, ..*machine })
    }

    /// The machine that it describes, whose devices have these names and places.
    pub fn machine(&self, names: &[String], places: &[Place]) -> Result<MachineConfig, BadOption> {
        let Self { memory, cpus, iommu, devices, root_ports, .. } = self;
        let named = Named { devices, names, places, root_ports: *root_ports };
        let (iommu, further_units) = units(iommu, &named)?;
        let (devices, root_ports) = (devices.clone(), *root_ports);
        Ok(MachineConfig { memory: *memory, cpus: *cpus, iommu, further_units, devices, root_ports })
    }
}

#[cfg(test)]
#[path = "cli_test.rs"]
mod cli_test;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::VtdOption;

    fn parse(args: &[&str]) -> Result<RunArgs, clap::Error> {
        Cli::try_parse_from(["causeway", "run"].iter().chain(args)).map(|cli| match cli.command {
            Command::Run(run) => *run,
            _ => panic!("another command"),
        })
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn defaults() {
        let run = parse(&["--kernel", "k"]).unwrap();
        assert_eq!((run.memory, run.cpus, run.cmdline.as_deref()), (512 << 20, 1, None));
        assert_eq!(run.machine(&[], &[]).unwrap().vtd(), Some(&VtdOption::default()));
        assert!(!run.no_reboot && run.devices.is_empty() && run.timeout.is_none());
    }

    #[test]
    fn devices_repeat_and_keep_their_order() {
        let run = parse(&["--kernel", "k", "--device", "edu", "--device", "vfio,host=00:09.0", "-vv"]).unwrap();
        assert_eq!(run.devices.iter().map(|device| device.kind.name()).collect::<Vec<_>>(), ["edu", "vfio"]);
        assert_eq!(run.verbose, 2);
    }

    #[test]
    fn usage_errors_have_exit_code_2_and_say_why() {
        for (args, part) in [
            (&["--kernel", "k", "--cpus", "0"][..], "0"),
            (&["--kernel", "k", "--cpus", "255"], "255"),
            (&["--kernel", "k", "--memory", "1M"], "less than 16M"),
            (&["--kernel", "k", "--iommu", "vtd,foo=on"], "the keys are"),
            (&["--kernel", "k", "--device", "vfio"], "host=BDF is missing"),
            (&["--kernel", "k", "--socket", ""], "a value is required"),
            (&["--kernel", "k", "--image", "x"], "cannot be used with"),
            (&["--kernel", "k", "--kernel", "l"], "--kernel"),
            (&[], "--kernel"),
        ] {
            let error = parse(args).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(part), "{error}");
        }
    }
}
