//! One run of L1: a Linux host with KVM and VFIO inside QEMU's TCG, which runs one script and powers off.

use crate::cache::{Cache, progress};
use crate::children::{end_with_this_process, inherit};
use crate::cpio::{self, Archive};
use crate::l1::{self, Host, Images};
use crate::monitor::Monitor;
use crate::own_kernel;
use crate::programs::{self, Program};
use crate::topology::{Topology, drive, option};
use anyhow::{Context, Result, ensure};
use clap::Args;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// L1 has to be up by then; it takes 3 s on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// After the script: collecting what it left and powering off.
const END_LIMIT: Duration = Duration::from_secs(60);
const OUT_BYTES: u64 = 1 << 30;
/// The boot time that time limits are given for.
const NORMAL_BOOT: Duration = Duration::from_secs(5);
const LARGEST_SCALE: u32 = 6;
pub const TIME_LIMIT: u8 = 124;
pub const BENCH_FAILURE: u8 = 125;

/// How much memory L1 has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Memory {
    pub mib: u32,
}

pub const DEFAULT_MEMORY: Memory = Memory { mib: 4096 };

impl FromStr for Memory {
    type Err = String;

    /// Reads `4G` or `512M`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (number, unit) = text.split_at(text.len() - usize::from(text.ends_with(['G', 'M'])));
        let number = number.parse::<u32>().ok();
        let mib = number.and_then(|number| match unit {
            "G" => number.checked_mul(1024),
            "M" => Some(number),
            _ => None,
        });
        mib.filter(|mib| *mib >= 256)
            .map(|mib| Self { mib })
            .ok_or_else(|| format!("{text} is no size of 256M or more, such as 4G"))
    }
}

/// What is told apart between one L1 and another.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Machine {
    pub host: Host,
    pub memory: Memory,
    pub topology: Topology,
    /// Added to L1's kernel command line.
    pub append: String,
    pub cpu: String,
    pub kernel: Kernel,
}

/// What L1 boots.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kernel {
    Distribution,
    /// That of `cargo xtask own-kernel`.
    Own,
    File(PathBuf),
}

pub const DEFAULT_CPU: &str = "EPYC";

#[derive(Debug, Args)]
pub struct NestedArgs {
    /// The script, which L1 runs as root
    #[arg(long, value_name = "FILE", required_unless_present = "interactive")]
    script: Option<PathBuf>,
    /// A file for /causeway/files (its mode is kept); may be given more than once
    #[arg(long = "file", value_name = "PATH")]
    files: Vec<PathBuf>,
    /// Brings back what the script left in /causeway/out
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    #[arg(long, value_enum, default_value = "flat")]
    topology: Topology,
    /// Which QEMU and kernel L1 is made of
    #[arg(long, value_enum, default_value = "default")]
    host: Host,
    /// L1's memory, such as 4G or 512M
    #[arg(long, value_name = "SIZE", default_value = "4G")]
    memory: Memory,
    /// A kernel for L1 instead of the distribution's
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The kernel that `cargo xtask own-kernel` built, for L1; guests may boot /causeway/guest/vmlinuz-own
    #[arg(long, conflicts_with = "kernel")]
    own_kernel: bool,
    /// The programs as users have them, for what is measured
    #[arg(long)]
    release: bool,
    /// The model of L1's processor; SVM is added to it
    #[arg(long, value_name = "MODEL", default_value = DEFAULT_CPU)]
    cpu: String,
    /// More of L1's kernel command line
    #[arg(long, value_name = "STRING", default_value = "")]
    append: String,
    /// The script's time limit in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    timeout: u64,
    /// The script (or a shell) talks to this terminal
    #[arg(long)]
    interactive: bool,
    /// A static `causeway` that is built already
    #[arg(long, value_name = "FILE", env = "CAUSEWAY_BINARY")]
    causeway: Option<PathBuf>,
}

/// Files for L1: the path there (without the leading slash), and the file of this machine.
pub type Files = Vec<(String, PathBuf)>;

/// One script for one L1.
pub struct Job<'a> {
    pub machine: &'a Machine,
    /// Names L1's log and its folder: no two that run at the same time have the same.
    pub name: &'a str,
    pub script: &'a [u8],
    pub files: &'a [(String, PathBuf)],
    pub programs: &'a [Program],
    pub out: Option<&'a Path>,
    /// Of the script, after L1 is up.
    pub limit: Limit<'a>,
    pub interactive: bool,
    /// A socket that the script has as its standard input; nothing otherwise.
    pub input: Option<BorrowedFd<'a>>,
}

/// When a script has to be done.
pub enum Limit<'a> {
    After(Duration),
    /// So long after L1 was up, more with this L1's boot time.
    Scaled(Duration),
    /// Once this says so, which is given this L1's `scale`.
    When(&'a dyn Fn(u32) -> bool),
}

/// How a run ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    Exit(u8),
    TimeLimit,
    /// L1 did not come up, or ended before its script.
    Broken(String),
}

pub struct Report {
    pub end: End,
    /// From QEMU's start until L1's init had done its part.
    pub boot: Option<Duration>,
    pub console: PathBuf,
    /// After a time limit: what L1's processor was doing.
    pub processor: String,
}

/// Time limits are given for a machine on which L1 boots in 5 s. At least L1's own `BOOT_SCALE`, which counts from its
/// kernel's start.
pub fn scale(boot: Duration) -> u32 {
    (1..LARGEST_SCALE).find(|scale| boot <= NORMAL_BOOT * *scale).unwrap_or(LARGEST_SCALE)
}

pub fn command(args: &NestedArgs) -> Result<u8> {
    let script = match &args.script {
        Some(file) => std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?,
        None => b"#!/bin/sh\nexec sh -l\n".to_vec(),
    };
    let mut files = Files::new();
    for file in &args.files {
        let name = file.file_name().with_context(|| format!("{} has no name", file.display()))?;
        files.push((format!("causeway/files/{}", name.to_string_lossy()), file.clone()));
    }
    let profile = if args.release { programs::Profile::Release } else { programs::Profile::Programs };
    let programs = programs::build(args.causeway.as_deref(), profile)?;
    let cache = Cache::open()?;
    let images = l1::prepare(&cache, args.host)?;
    let kernel = match &args.kernel {
        _ if args.own_kernel => Kernel::Own,
        Some(file) => Kernel::File(file.clone()),
        None => Kernel::Distribution,
    };
    if kernel == Kernel::Own {
        let own = own_kernel::built(&images)?;
        let own = own.with_context(|| format!("run `{}` first", own_kernel::command_for(args.host)))?;
        let own = own_kernel::images(&images, &own)?;
        images.own.get_or_init(|| own);
    }
    let (append, cpu) = (args.append.clone(), args.cpu.clone());
    let machine = Machine { host: args.host, memory: args.memory, topology: args.topology, append, cpu, kernel };
    let report = run(
        &cache,
        &images,
        &Job {
            machine: &machine,
            name: "nested",
            script: &script,
            files: &files,
            programs: &programs,
            out: args.out.as_deref(),
            limit: Limit::After(Duration::from_secs(args.timeout)),
            interactive: args.interactive,
            input: None,
        },
        Box::new(std::io::stdout()),
    )?;
    if let Some(boot) = report.boot {
        progress(format_args!("L1 was up after {:.1} s", boot.as_secs_f64()));
    }
    Ok(match report.end {
        End::Exit(status) if status < TIME_LIMIT => status,
        // These two mean something else here.
        End::Exit(status) => {
            progress(format_args!("the script's status was {status}"));
            123
        }
        End::TimeLimit => {
            progress(format_args!("time limit; L1's processor:\n{}", report.processor.trim_end()));
            progress(format_args!("L1's console is in {}", report.console.display()));
            TIME_LIMIT
        }
        End::Broken(reason) => {
            show_console(&report.console);
            progress(reason);
            BENCH_FAILURE
        }
    })
}

/// Whether time limits cannot be stretched any further on this machine.
pub fn too_slow(boot: Duration) -> bool {
    boot > NORMAL_BOOT * LARGEST_SCALE
}

/// The last lines of L1's console.
pub fn console_end(log: &Path) -> String {
    let text = std::fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    format!("the end of L1's console, {}:\n{}\n", log.display(), lines[lines.len().saturating_sub(40)..].join("\n"))
}

pub fn show_console(log: &Path) {
    progress(console_end(log).trim_end());
}

/// Removes the run's folder whatever happens.
struct RunFolder(PathBuf);

impl RunFolder {
    fn new(cache: &Cache, name: &str) -> Result<Self> {
        let folder = cache.path("run").join(name);
        std::fs::create_dir_all(&folder)?;
        Ok(Self(folder))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            progress(format_args!("cannot remove {}: {error}", self.0.display()));
        }
    }
}

/// Ends QEMU whatever happens.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Gives the terminal back as it was: a QEMU that is ended cannot.
struct Terminal(String);

impl Terminal {
    fn save() -> Option<Self> {
        let settings = Command::new("stty").arg("-g").stdin(Stdio::inherit()).output().ok()?;
        settings.status.success().then(|| Self(String::from_utf8_lossy(&settings.stdout).trim().to_owned()))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // There is no more to be done about a terminal that is gone.
        let _ = Command::new("stty").arg(&self.0).stdin(Stdio::inherit()).status();
    }
}

/// Boots L1, runs the script, and copies its output to `output` as it comes.
pub fn run(cache: &Cache, images: &Images, job: &Job, mut output: Box<dyn Write + Send>) -> Result<Report> {
    let folder = RunFolder::new(cache, job.name)?;
    let console = cache.path(&format!("logs/{}.console.log", job.name));
    let messages = cache.path(&format!("logs/{}.qemu.log", job.name));
    File::create(&console)?;
    initramfs(images, job, &folder.path("initrd"))?;
    let out_disk = File::create(folder.path("out.img"))?;
    out_disk.set_len(OUT_BYTES)?;
    std::fs::write(folder.path("status"), "")?;

    let _terminal = job.interactive.then(Terminal::save);
    let mut command = qemu(images, job, &folder, &console)?;
    command.stderr(File::create(&messages)?);
    if job.interactive {
        command.stdin(Stdio::inherit()).stdout(Stdio::inherit());
    } else {
        command.stdout(Stdio::piped());
    }
    // A terminal's input is the terminal's.
    let mut monitor = (!job.interactive).then(|| Monitor::attach(&mut command, job.name)).transpose()?;
    end_with_this_process(&mut command, libc::SIGKILL);
    let start = Instant::now();
    let mut running = Running(command.spawn().context("cannot start QEMU")?);
    let copier = running.0.stdout.take().map(|mut from| {
        std::thread::spawn(move || -> std::io::Result<()> {
            let mut buffer = [0; 65536];
            // Nobody may be listening any more: L1 is still to be heard out, or it would wait for us.
            let mut heard = Ok(());
            loop {
                match from.read(&mut buffer)? {
                    0 => return heard,
                    size if heard.is_ok() => heard = output.write_all(&buffer[..size]).and_then(|()| output.flush()),
                    _ => {}
                }
            }
        })
    });

    let mut boot = None;
    let mut limit = BOOT_LIMIT;
    let mut processor = String::new();
    let mut watching_ended = false;
    let mut end = None;
    let ended = loop {
        if let Some(status) = running.0.try_wait()? {
            break Some(status);
        }
        let said = std::fs::read_to_string(folder.path("status"))?;
        if boot.is_none() && said.lines().any(|line| line.starts_with("up ")) {
            let took = start.elapsed();
            boot = Some(took);
            limit = match job.limit {
                Limit::After(limit) => took + limit,
                Limit::Scaled(limit) => took + limit * scale(took),
                Limit::When(_) => Duration::MAX,
            };
        }
        if end.is_none() && exit_status(&said).is_some() {
            end = exit_status(&said);
            limit = start.elapsed() + END_LIMIT;
        }
        let over = match (&job.limit, boot) {
            (Limit::When(is_over), Some(boot)) if end.is_none() => is_over(scale(boot)),
            _ => start.elapsed() > limit,
        };
        if over {
            processor = monitor.as_mut().map(Monitor::processor).unwrap_or_default();
            break None;
        }
        // One that does not answer any more has its say at the time limit.
        if monitor.as_mut().is_some_and(|monitor| !watching_ended && monitor.watch().is_err()) {
            watching_ended = true;
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    drop(running);
    if let Some(copier) = copier {
        copier
            .join()
            .map_err(|_| anyhow::anyhow!("the output's copier failed"))?
            .context("cannot pass the script's output on")?;
    }
    let said = std::fs::read_to_string(folder.path("status"))?;
    let end = match (exit_status(&said), ended) {
        (Some(status), _) => End::Exit(status),
        (None, None) if boot.is_some() => End::TimeLimit,
        (None, None) => End::Broken(format!("L1 was not up after {} s", BOOT_LIMIT.as_secs())),
        (None, Some(status)) => {
            let text = std::fs::read_to_string(&messages).unwrap_or_default();
            // TCG's list of what it lacks of a processor model is of no interest.
            let text: Vec<&str> = text.lines().filter(|line| !line.contains("TCG doesn't support")).collect();
            End::Broken(format!("L1 ended before its script did ({status}) {}", text.join("\n")))
        }
    };
    if let (Some(into), End::Exit(_)) = (job.out, &end) {
        std::fs::create_dir_all(into)?;
        let mut disk = BufReader::new(File::open(folder.path("out.img"))?);
        let mut first = [0; 6];
        disk.read_exact(&mut first)?;
        if first != [0; 6] {
            cpio::extract((&first[..]).chain(disk), into).context("what came back from L1")?;
        }
    }
    Ok(Report { end, boot, console, processor })
}

fn exit_status(said: &str) -> Option<u8> {
    said.lines().find_map(|line| line.strip_prefix("exit ")?.trim().parse().ok())
}

/// The images' base, followed by what this run brings.
fn initramfs(images: &Images, job: &Job, to: &Path) -> Result<()> {
    let mut file = BufWriter::new(File::create(to)?);
    std::io::copy(&mut File::open(&images.base)?, &mut file)?;
    if job.machine.kernel == Kernel::Own {
        std::io::copy(&mut File::open(&images.own()?.overlay)?, &mut file)?;
    }
    if job.machine.topology == Topology::Zoo {
        std::io::copy(&mut File::open(&images.zoo)?, &mut file)?;
    }
    let mut archive = Archive::new(file);
    archive.file("script", 0o755, job.script)?;
    let environment = format!(
        "CAUSEWAY=/causeway/bin/causeway\nKERNEL=/causeway/guest/vmlinuz-stored\nVMLINUZ=/causeway/guest/vmlinuz\nINITRD=/causeway/guest/base.cpio\nDISK_SHA256={}\n\
         DISKS='{}'\nQEMU_DISK=/dev/vda\nOUT_DISK=/dev/vdb\nexport QEMU_DISK OUT_DISK\n",
        images.content.sha256,
        job.machine.topology.contents(&images.content)
    );
    archive.file("etc/causeway.env", 0o644, environment.as_bytes())?;
    for program in job.programs {
        archive.copy(&format!("causeway/bin/{}", program.name), &program.file)?;
    }
    for (path, from) in job.files {
        archive.copy(path, from)?;
    }
    archive.finish()?;
    Ok(())
}

fn qemu(images: &Images, job: &Job, folder: &RunFolder, console: &Path) -> Result<Command> {
    let kernel = match &job.machine.kernel {
        Kernel::Distribution => &images.kernel,
        Kernel::Own => &images.own()?.kernel,
        Kernel::File(file) => file,
    };
    ensure!(kernel.is_file(), "no kernel {}", kernel.display());
    let khz = tsc_khz();
    let append = format!(
        "tsc_early_khz={khz} kvm.tsc_tolerance_ppm=100000 console=ttyS0 quiet intel_iommu=on mitigations=off nokaslr no_timer_check \
         tsc=reliable clocksource=tsc random.trust_cpu=on panic=-1 {}",
        job.machine.append
    );
    let mut command = images.qemu.command();
    command.args(["-name", "causeway-l1", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
    // With several, kernels die of what TCG's threads do to each other (docs/nested-bench.md).
    command.args(["-accel", "tcg,thread=multi,tb-size=1024", "-smp", "1", "-machine", "q35,kernel-irqchip=split"]);
    command.args(["-m", &format!("{}M", job.machine.memory.mib)]);
    command.args(["-cpu", &format!("{},+svm,+npt,+x2apic{}", job.machine.cpu, job.machine.topology.cpu())]);
    command.args(["-device", "intel-iommu,intremap=on,eim=on,caching-mode=on,aw-bits=48"]);
    command.arg("-kernel").arg(kernel).arg("-initrd").arg(folder.path("initrd")).args(["-append", append.trim()]);
    command
        .arg("-chardev")
        .arg(format!("file,id=console,path={}", option(console)?))
        .args(["-serial", "chardev:console"]);
    // igb keeps 1b.0 to 1c.7 for its virtual functions.
    command.args(["-device", "virtio-serial-pci,addr=1a.0"]);
    command.arg("-chardev").arg(format!("file,id=status,path={}", option(&folder.path("status"))?));
    command.args(["-device", "virtserialport,chardev=status,name=status"]);
    if job.interactive {
        command.args(["-chardev", "stdio,id=terminal,signal=off", "-device", "virtconsole,chardev=terminal"]);
    } else {
        // Not the stdio device: at the end of its input it would close the port.
        command.args([
            "-chardev",
            "file,id=output,path=/dev/stdout",
            "-device",
            "virtserialport,chardev=output,name=script",
        ]);
    }
    if let Some(input) = job.input {
        inherit(&mut command, input);
        command.args(["-chardev", &format!("socket,id=input,fd={}", input.as_raw_fd())]);
        command.args(["-device", "virtserialport,chardev=input,name=input"]);
    }
    drive(&mut command, "qemu", &images.qemu_disk, "readonly=on")?;
    command.args(["-device", "virtio-blk-pci,drive=qemu,addr=1d.0"]);
    drive(&mut command, "out", &folder.path("out.img"), "cache=unsafe")?;
    command.args(["-device", "virtio-blk-pci,drive=out,addr=1e.0"]);
    // Writes to the NVMe go to a file that is already deleted, in the run's folder.
    command.env("TMPDIR", &folder.0);
    drive(&mut command, "nvme", &images.nvme, "snapshot=on")?;
    job.machine.topology.add_to(&mut command, images)?;
    Ok(command)
}

/// The frequency of this machine's time stamp counter, measured. L1 must know it well: TCG's SVM has no TSC scaling,
/// and with an error above 250 ppm KVM in L1 loses the timers of its guests.
fn tsc_khz() -> u64 {
    static KHZ: OnceLock<u64> = OnceLock::new();
    *KHZ.get_or_init(|| {
        let (start, first) = now_and_ticks();
        std::thread::sleep(Duration::from_millis(100));
        let (end, last) = now_and_ticks();
        let khz = u128::from(last.wrapping_sub(first)) * 1_000_000 / (end - start).as_nanos();
        u64::try_from(khz).unwrap_or_default()
    })
}

/// The time and the counter at the same moment: of several tries, the one that took least, as others run in between.
fn now_and_ticks() -> (Instant, u64) {
    // SAFETY: rdtsc only reads a counter; every x86-64 processor has it.
    let ticks = || unsafe { std::arch::x86_64::_rdtsc() };
    let tries = (0..20).map(|_| {
        let (before, now, after) = (ticks(), Instant::now(), ticks());
        (after.wrapping_sub(before), (now, before))
    });
    tries.min_by_key(|(took, _)| *took).map_or_else(|| (Instant::now(), ticks()), |(_, read)| read)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_grow_with_a_slow_boot_but_not_without_end() {
        assert_eq!(scale(Duration::from_secs(2)), 1);
        assert_eq!(scale(Duration::from_secs(5)), 1);
        // As L1 itself, in whole numbers and upwards: a case's limit outside of L1 must not come before the one inside.
        assert_eq!(scale(Duration::from_millis(6600)), 2);
        assert_eq!(scale(Duration::from_secs(15)), 3);
        assert_eq!(scale(Duration::from_secs(100)), 6);
    }

    #[test]
    fn only_a_whole_line_is_a_status() {
        assert_eq!(exit_status("up 2.5\nexit 7\n"), Some(7));
        assert_eq!(exit_status("up 2.5\n"), None);
        assert_eq!(exit_status("exit \n"), None);
    }
}
