//! `cargo xtask own-kernel`: the kernel that no distribution has, with iommufd, VFIO's character devices and the
//! IOMMU's debugfs, built from the distribution's source package and `resources/kernel/fragment`.
//!
//! It is built in a folder that is removed at the end; what stays is the image, its configuration and its modules, a
//! few megabytes.

use crate::cache::{Cache, progress, recipe};
use crate::children::end_with_this_process;
use crate::cpio::Archive;
use crate::kernel_modules::ModuleTree;
use crate::l1::Host;
use crate::l1::{self, Images, OwnImages};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The whole configuration: what is not named there is off.
const FRAGMENT: &str = include_str!("../../resources/kernel/fragment");
/// What differs for the newer host's kernel: options that follow [`FRAGMENT`], and `# CONFIG_NAME is not set` for those
/// that it no longer has.
const FRAGMENT_NEW: &str = include_str!("../../resources/kernel/fragment-new");
/// Of the folder that stays; to be changed with [`collect`].
const LAYOUT: &str = "1";
const CONFIGURE: &[&str] = &["allnoconfig"];
const BUILD: &[&str] = &["bzImage", "modules"];
const FREE_BYTES: u64 = 8 << 30;
const PROGRESS: Duration = Duration::from_secs(20);
/// Programs that the build calls, and the packages that have them.
const PROGRAMS: &[(&str, &str)] = &[
    ("gcc", "gcc"),
    ("ld", "binutils"),
    ("make", "make"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("perl", "perl"),
    ("xz", "xz-utils"),
    ("tar", "tar"),
];
const HEADERS: &[(&str, &str)] = &[("stdio.h", "libc6-dev"), ("gelf.h", "libelf-dev")];
/// Of whoever calls this: a kernel's makefiles would obey them.
const FOREIGN_VARIABLES: &[&str] = &[
    "MAKEFLAGS",
    "MFLAGS",
    "MAKELEVEL",
    "ARCH",
    "CROSS_COMPILE",
    "KBUILD_OUTPUT",
    "KCONFIG_CONFIG",
    "KCFLAGS",
    "LLVM",
    "O",
];

#[derive(Debug, Args)]
pub struct OwnKernelArgs {
    /// Builds it again even if what is there is up to date
    #[arg(long)]
    again: bool,
    /// Leaves the build folder (2 GB) in the cache
    #[arg(long)]
    keep: bool,
    /// Whose kernel's version it is
    #[arg(long, value_enum, default_value = "default")]
    host: Host,
}

/// What the build leaves: `vmlinuz`, `config`, `release` and `modules`, in one folder.
#[derive(Debug, Clone)]
pub struct OwnKernel {
    folder: PathBuf,
}

impl OwnKernel {
    pub fn vmlinuz(&self) -> PathBuf {
        self.folder.join("vmlinuz")
    }
}

/// What builds the kernel of this host.
pub fn command_for(host: Host) -> &'static str {
    match host {
        Host::Default => "cargo xtask own-kernel",
        Host::New => "cargo xtask own-kernel --host new",
    }
}

pub fn command(args: &OwnKernelArgs) -> Result<u8> {
    let cache = Cache::open()?;
    let images = l1::prepare(&cache, args.host)?;
    if args.again {
        images.cache.forget("own-kernel")?;
    }
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let kernel = build(&images, args.keep, jobs)?;
    let release = fs::read_to_string(kernel.folder.join("release"))?;
    println!("{} is Linux {}", kernel.vmlinuz().display(), release.trim());
    Ok(0)
}

/// The kernel, if it was built and is what would be built now.
pub fn built(images: &Images) -> Result<Option<OwnKernel>> {
    let cache = &images.cache;
    let fresh = cache.is_fresh("own-kernel", &stamp(images));
    Ok(fresh.then(|| OwnKernel { folder: cache.path("own-kernel") }))
}

/// Everything that the result depends on, but for the compiler and the lines here: it takes too long to be made again
/// for each of them.
fn stamp(images: &Images) -> String {
    let fragment = fragment(images.host);
    let mut parts = vec![images.kernel_package.as_str(), fragment.as_str(), LAYOUT];
    parts.extend(CONFIGURE.iter().chain(BUILD));
    recipe(&parts)
}

/// Builds the kernel, unless it is there, in so many processes at a time.
pub fn build(images: &Images, keep: bool, jobs: usize) -> Result<OwnKernel> {
    let cache = &images.cache;
    if let Some(kernel) = built(images)? {
        return Ok(kernel);
    }
    have_packages()?;
    cache.need_free(FREE_BYTES)?;
    cache.forget("own-kernel")?;
    let work = Work::new(cache.path("own-kernel.build"), keep)?;
    let start = Instant::now();
    let source = source(images, &work.folder)?;
    let log = cache.path("logs/own-kernel.log");
    let mut make = Make { source, out: work.folder.join("out"), log: File::create(&log)?, start, jobs };
    fs::create_dir(&make.out)?;
    let done = configure(&mut make, &work.folder, &fragment(images.host)).and_then(|()| make.run(BUILD));
    done.with_context(|| format!("the kernel was not built; {} has the whole output", log.display()))?;
    let folder = cache.path("own-kernel");
    collect(&make.out, &folder)?;
    cache.stamp("own-kernel", &stamp(images))?;
    progress(format_args!("own kernel: built in {} s", start.elapsed().as_secs()));
    Ok(OwnKernel { folder })
}

/// The folder of the build, which goes with it.
struct Work {
    folder: PathBuf,
    keep: bool,
}

impl Work {
    fn new(folder: PathBuf, keep: bool) -> Result<Self> {
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::create_dir(&folder)?;
        Ok(Self { folder, keep })
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = fs::remove_dir_all(&self.folder)
        {
            progress(format_args!("cannot remove {}: {error}", self.folder.display()));
        }
    }
}

/// Installs what the build needs of this system, or says how.
fn have_packages() -> Result<()> {
    let missing = missing_packages();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    if fs::metadata("/proc/self")?.uid() != 0 {
        bail!(
            "building a kernel needs packages that are not installed: sudo apt-get install --no-install-recommends {names}"
        );
    }
    progress(format_args!("own kernel: installing {names}"));
    let apt_get = |arguments: &[&str]| -> Result<std::process::Output> {
        let mut command = Command::new("apt-get");
        command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null());
        command.output().context("cannot run apt-get")
    };
    let mut install = vec!["install", "-y", "-q", "--no-install-recommends"];
    install.extend(&missing);
    let mut result = apt_get(&install)?;
    if !result.status.success() {
        // A machine that has never read its package lists.
        apt_get(&["update", "-q"])?;
        result = apt_get(&install)?;
    }
    let text = String::from_utf8_lossy(&result.stderr).into_owned();
    ensure!(result.status.success(), "apt-get install {names}: {}", text.trim());
    let missing = missing_packages();
    ensure!(missing.is_empty(), "{} is installed and yet not to be found", missing.join(" "));
    Ok(())
}

fn missing_packages() -> Vec<&'static str> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let has = |program: &str| std::env::split_paths(&path).any(|folder| folder.join(program).is_file());
    let compiles = |header: &str| {
        let mut gcc = Command::new("gcc");
        gcc.args(["-E", "-x", "c", "-include", header, "/dev/null"]).stdout(Stdio::null()).stderr(Stdio::null());
        gcc.status().is_ok_and(|status| status.success())
    };
    let programs = PROGRAMS.iter().filter(|(program, _)| !has(program));
    let headers = HEADERS.iter().filter(|(header, _)| !compiles(header));
    programs.chain(headers).map(|(_, package)| *package).collect()
}

/// The source that the host's kernel was built from, unpacked below `folder`.
fn source(images: &Images, folder: &Path) -> Result<PathBuf> {
    progress("own kernel: fetching the source");
    let apt = l1::apt(&images.cache, images.host)?;
    let pinned = apt.kernel_source(&images.kernel_package)?;
    let unpacked = folder.join("package");
    apt.unpack(std::slice::from_ref(&pinned), &unpacked)?;
    apt.discard_downloads()?;
    progress(format_args!("own kernel: unpacking {pinned}"));
    let tarball = find(&unpacked.join("usr/src"), |name| name.contains(".tar."))?
        .with_context(|| format!("{pinned} has no archive in usr/src"))?;
    let tree = folder.join("source");
    fs::create_dir(&tree)?;
    let result =
        Command::new("tar").args(["--strip-components=1", "-xf"]).arg(&tarball).arg("-C").arg(&tree).output()?;
    ensure!(result.status.success(), "tar -xf {}: {}", tarball.display(), String::from_utf8_lossy(&result.stderr));
    fs::remove_dir_all(unpacked)?;
    Ok(tree)
}

fn find(folder: &Path, wanted: impl Fn(&str) -> bool + Copy) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_file() && wanted(&entry.file_name().to_string_lossy()) {
            return Ok(Some(entry.path()));
        }
        if kind.is_dir()
            && let Some(found) = find(&entry.path(), wanted)?
        {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// Kernel builds in one folder, with their output in a log.
struct Make {
    source: PathBuf,
    out: PathBuf,
    log: File,
    start: Instant,
    jobs: usize,
}

impl Make {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("make");
        command.arg("-C").arg(&self.source).arg(format!("O={}", self.out.display())).args(arguments);
        command
            .stdin(Stdio::null())
            .env("LC_ALL", "C")
            .env("KBUILD_BUILD_USER", "causeway")
            .env("KBUILD_BUILD_HOST", "causeway");
        FOREIGN_VARIABLES.iter().for_each(|name| {
            command.env_remove(name);
        });
        command
    }

    fn run(&mut self, arguments: &[&str]) -> Result<()> {
        let mut command = self.command(arguments);
        command.arg(format!("-j{}", self.jobs)).stdout(Stdio::piped()).stderr(self.log.try_clone()?);
        // make takes its compilers with it.
        end_with_this_process(&mut command, libc::SIGTERM);
        let mut child = command.spawn().context("cannot run make")?;
        let output = child.stdout.take().context("make has no output")?;
        let (mut compiled, mut said) = (0, Instant::now());
        for line in BufReader::new(output).split(b'\n') {
            let line = line?;
            self.log.write_all(&line)?;
            self.log.write_all(b"\n")?;
            let step = String::from_utf8_lossy(&line).into_owned();
            compiled += u32::from(step.trim_start().starts_with("CC "));
            if said.elapsed() > PROGRESS {
                said = Instant::now();
                progress(format_args!("own kernel: {compiled} files compiled, {} s", self.start.elapsed().as_secs()));
            }
        }
        let status = child.wait()?;
        ensure!(status.success(), "make {} failed ({status})", arguments.join(" "));
        Ok(())
    }
}

/// Makes the configuration, and sees to it that all of the fragment is in it.
fn configure(make: &mut Make, folder: &Path, fragment: &str) -> Result<()> {
    let file = folder.join("fragment");
    fs::write(&file, fragment)?;
    let all = format!("KCONFIG_ALLCONFIG={}", file.display());
    make.run(&[&[all.as_str()], CONFIGURE].concat())?;
    let config = fs::read_to_string(make.out.join(".config"))?;
    let missing = not_taken(fragment, &config);
    ensure!(missing.is_empty(), "this version's configuration does not take {}", missing.join(" "));
    Ok(())
}

/// The configuration of a host's kernel.
fn fragment(host: Host) -> String {
    let changes = match host {
        Host::Default => return FRAGMENT.to_owned(),
        Host::New => FRAGMENT_NEW,
    };
    let gone: std::collections::HashSet<&str> = changes
        .lines()
        .filter_map(|line| line.strip_prefix("# ").and_then(|line| line.strip_suffix(" is not set")))
        .collect();
    let name = |line: &str| line.split_once('=').map_or("", |(name, _)| name).to_owned();
    let kept = FRAGMENT.lines().filter(|line| !gone.contains(name(line).as_str()));
    kept.chain(changes.lines()).fold(String::new(), |text, line| text + line + "\n")
}

/// The lines of the fragment that are not in `config`.
fn not_taken<'a>(fragment: &'a str, config: &str) -> Vec<&'a str> {
    let taken: std::collections::HashSet<&str> = config.lines().collect();
    fragment.lines().filter(|line| line.starts_with("CONFIG_") && !taken.contains(line)).collect()
}

/// Takes what is worth keeping out of the build; the folder is there as a whole or not at all.
fn collect(out: &Path, folder: &Path) -> Result<()> {
    let new = folder.with_extension("new");
    for stale in [&new, folder] {
        if stale.exists() {
            fs::remove_dir_all(stale)?;
        }
    }
    fs::create_dir(&new)?;
    fs::copy(out.join("arch/x86/boot/bzImage"), new.join("vmlinuz"))?;
    fs::copy(out.join(".config"), new.join("config"))?;
    fs::copy(out.join("include/config/kernel.release"), new.join("release"))?;
    let order = fs::read_to_string(out.join("modules.order")).context("the build has no list of modules")?;
    // Names of objects up to some version, of modules since.
    for module in order.lines().filter_map(|line| line.rsplit_once('.').map(|(stem, _)| format!("{stem}.ko"))) {
        let to = new.join("modules/kernel").join(&module);
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::copy(out.join(&module), to).with_context(|| format!("cannot copy {module}"))?;
    }
    fs::rename(new, folder)?;
    Ok(())
}

/// What an L1 with this kernel has besides: the modules, the kernel for guests, and its modules in the guests'
/// initramfs.
pub fn images(images: &Images, kernel: &OwnKernel) -> Result<OwnImages> {
    let cache = &images.cache;
    let made = cache.path("own.cpio");
    let own = OwnImages { kernel: kernel.vmlinuz(), config: kernel.folder.join("config"), overlay: made.clone() };
    let recipe = recipe(&[&stamp(images), &images.recipe, include_str!("own_kernel.rs")]);
    if cache.is_fresh("own", &recipe) {
        return Ok(own);
    }
    cache.forget("own")?;
    let release = fs::read_to_string(kernel.folder.join("release"))?.trim().to_owned();
    let modules = ModuleTree::open(&kernel.folder.join("modules"))?;
    // Archives may follow each other in an initramfs.
    let mut guest = Archive::new(fs::read(&images.guest_base)?);
    l1::put_modules(&mut guest, &release, &modules.select(l1::GUEST_MODULES)?)?;
    let mut archive = Archive::new(BufWriter::new(File::create(&made)?));
    l1::put_modules(&mut archive, &release, &modules.select(l1::L1_MODULES)?)?;
    archive.copy("causeway/guest/vmlinuz-own", &kernel.vmlinuz())?;
    archive.file("causeway/guest/base.cpio", 0o644, &guest.finish()?)?;
    archive.finish()?;
    cache.stamp("own", &recipe)?;
    Ok(own)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_option_of_the_fragment_must_be_in_the_configuration() {
        let options: Vec<&str> = FRAGMENT.lines().filter(|line| line.starts_with("CONFIG_")).collect();
        assert!(options.len() > 100);
        assert!(not_taken(FRAGMENT, FRAGMENT).is_empty());
        let without = FRAGMENT.replace("CONFIG_IOMMUFD=m\n", "# CONFIG_IOMMUFD is not set\n");
        assert_eq!(not_taken(FRAGMENT, &without), ["CONFIG_IOMMUFD=m"]);
    }

    #[test]
    fn an_option_stands_in_the_fragment_once() {
        for host in [Host::Default, Host::New] {
            let fragment = fragment(host);
            let mut names: Vec<&str> =
                fragment.lines().filter_map(|line| line.split_once('=')).map(|(name, _)| name).collect();
            names.sort_unstable();
            let all = names.len();
            names.dedup();
            assert_eq!(names.len(), all);
        }
    }

    #[test]
    fn the_newer_hosts_fragment_has_what_is_added_and_lacks_what_is_gone() {
        let new = fragment(Host::New);
        let lines = |text: &str, line: &str| text.lines().filter(|other| *other == line).count();
        for line in FRAGMENT_NEW.lines().filter(|line| line.starts_with("CONFIG_")) {
            assert_eq!((lines(FRAGMENT, line), lines(&new, line)), (0, 1), "{line}");
        }
        for gone in FRAGMENT_NEW.lines().filter_map(|line| line.strip_prefix("# ")?.strip_suffix(" is not set")) {
            let has = |text: &str| text.lines().any(|line| line.starts_with(&format!("{gone}=")));
            assert!(has(FRAGMENT) && !has(&new), "{gone}");
        }
        assert_eq!(lines(&new, "CONFIG_IOMMUFD=m"), 1);
    }

    #[test]
    fn what_stays_is_whole_and_takes_the_place_of_what_was_there() {
        let base = std::env::temp_dir().join(format!("xtask-own-kernel-{}", std::process::id()));
        let (out, folder) = (base.join("out"), base.join("own-kernel"));
        let put = |name: &str, text: &str| {
            let file = out.join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        };
        put("arch/x86/boot/bzImage", "kernel");
        put(".config", FRAGMENT);
        put("include/config/kernel.release", "6.12.0-causeway\n");
        put("modules.order", "drivers/a/one.o\ntwo.ko\n");
        put("drivers/a/one.ko", "1");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("stale"), "").unwrap();
        // The second module is not there.
        assert!(collect(&out, &folder).is_err());
        assert!(!folder.exists());
        put("two.ko", "2");
        collect(&out, &folder).unwrap();
        let kept = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
        assert_eq!(kept("vmlinuz"), "kernel");
        assert_eq!((kept("modules/kernel/drivers/a/one.ko"), kept("modules/kernel/two.ko")), ("1".into(), "2".into()));
        assert!(!base.join("own-kernel.new").exists() && !folder.join("stale").exists());
        fs::remove_dir_all(base).unwrap();
    }
}
