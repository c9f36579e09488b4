//! What L1 is made of: the unpacked packages, QEMU started out of them, and the images that it boots.

use crate::apt::{Apt, Pinned};
use crate::cache::{Cache, hex, progress, recipe};
use crate::cpio::Archive;
use crate::kernel_modules::{Module, ModuleTree, Selection};
use crate::stored_kernel;
use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use sha2::{Digest, Sha256};
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Which QEMU and kernel L1 is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Host {
    /// This machine's release: QEMU 10.0 or newer
    Default,
    /// Debian's newest backports: QEMU 11 or newer and a kernel as new
    New,
}

/// TCG of older ones aborts in nested guests, and their vIOMMU is 39 bits wide.
const OLDEST_QEMU: u32 = 10;
/// Of the newer host.
const OLDEST_NEW_QEMU: u32 = 11;
const FREE_BYTES: u64 = 3 << 30;
const DISK_BYTES: usize = 256 << 20;
/// The part of the disk that `DISK_SHA256` is about.
const CHECKED_BYTES: usize = 64 << 20;
/// Behind it are slices, which other disks have as their content: so each has its own.
pub const SLICES_FROM: usize = CHECKED_BYTES;
pub const SLICE_BYTES: usize = 8 << 20;
pub const SLICES: usize = (DISK_BYTES - SLICES_FROM) / SLICE_BYTES;
/// Of the whole and of a slice, what such a checksum is about: some of these disks are slow.
const CHECKED_SLICE_BYTES: usize = 1 << 20;

/// Loaded before the script: what a host with KVM and VFIO has. Nothing is bound, so no driver of an assigned function
/// is among them.
const L1_BOOT_MODULES: &[&str] = &["kvm-amd", "vfio-pci", "vfio_iommu_type1", "virtio_blk"];
pub const L1_MODULES: &[&str] = &[
    "kvm",
    "kvm-amd",
    "kvm-intel",
    "vfio",
    "vfio_iommu_type1",
    "vfio-pci",
    "uio_pci_generic",
    "virtio_blk",
    "virtio_net",
    "nvme",
    "e1000e",
    "igb",
    "igbvf",
    "crc32c_generic",
    "crc32c-intel",
    "ext4",
    "9p",
    "9pnet_virtio",
    "overlay",
    "virtio_console",
    "loop",
    "tun",
];
pub const GUEST_MODULES: &[&str] = &[
    "nvme",
    "vfio",
    "vfio_iommu_type1",
    "vfio-pci",
    "e1000e",
    "igb",
    "igbvf",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "kvm-amd",
    "kvm-intel",
    "crc32c_generic",
    "crc32c-intel",
    "ext4",
    "button",
    "evdev",
];

/// What guests have besides in the topology `zoo`: a driver for each kind of function, and what it stands on.
const ZOO_MODULES: &[&str] = &[
    "ahci",
    "sd_mod",
    "xhci-pci",
    "ehci-pci",
    "ohci-pci",
    "usb-storage",
    "sdhci-pci",
    "mmc_block",
    "e1000",
    "8139cp",
    "vmxnet3",
    "megaraid_sas",
    "snd-hda-intel",
    "snd-hda-codec-generic",
];

const L1_INIT: &str = include_str!("../../resources/l1/init");
const L1_PROGRAMS: &[(&str, &str)] = &[
    ("bind-vfio", include_str!("../../resources/l1/bin/bind-vfio")),
    ("unbind-vfio", include_str!("../../resources/l1/bin/unbind-vfio")),
    ("mkinitrd", include_str!("../../resources/l1/bin/mkinitrd")),
    ("qemu-system-x86_64", include_str!("../../resources/l1/bin/qemu-system-x86_64")),
];
const GUEST_INIT: &str = include_str!("../../resources/guest/init");
/// In L1 and in its guests.
const COMMON_PROGRAMS: &[(&str, &str)] = &[("wait-for", include_str!("../../resources/guest/wait-for"))];
/// What of QEMU's data a q35 machine without a display reads.
const FIRMWARE: &[&str] = &[
    "bios-256k.bin",
    "bios.bin",
    "kvmvapic.bin",
    "linuxboot_dma.bin",
    "linuxboot.bin",
    "pvh.bin",
    "multiboot_dma.bin",
    "multiboot.bin",
    "efi-e1000e.rom",
    "efi-e1000.rom",
    "efi-virtio.rom",
    "pxe-virtio.rom",
    "vgabios-stdvga.bin",
];

/// Everything that does not change from run to run.
pub struct Images {
    pub host: Host,
    /// Where all of it is.
    pub cache: Cache,
    pub qemu: Qemu,
    pub kernel: PathBuf,
    /// L1's initramfs without what a run brings.
    pub base: PathBuf,
    /// A guest's initramfs without a script.
    pub guest_base: PathBuf,
    /// QEMU for L1, a cpio archive on a disk.
    pub qemu_disk: PathBuf,
    /// Follows `base` in the topology `zoo`.
    pub zoo: PathBuf,
    pub nvme: PathBuf,
    /// Of `nvme`.
    pub content: Content,
    /// The package that `kernel` is from.
    pub kernel_package: Pinned,
    /// Stands for the content of all of these.
    pub recipe: String,
    /// What an L1 on the own kernel has besides, where that kernel is wanted.
    pub own: OnceLock<OwnImages>,
}

impl Images {
    /// The own kernel, which whoever wants it has put here.
    pub fn own(&self) -> Result<&OwnImages> {
        self.own.get().context("the own kernel was not made ready")
    }
}

/// Checksums of a disk's content.
#[derive(Debug, Clone)]
pub struct Content {
    /// Of the first 64 MiB.
    pub sha256: String,
    /// Of the first MiB.
    pub first: String,
    /// Of the first MiB of each slice.
    pub slices: Vec<String>,
}

/// The own kernel, ready for L1.
pub struct OwnImages {
    pub kernel: PathBuf,
    pub config: PathBuf,
    /// Follows `base`.
    pub overlay: PathBuf,
}

/// A QEMU and how to start it.
pub struct Qemu {
    program: PathBuf,
    /// The unpacked dynamic loader and the folders of its libraries; none for a QEMU that is installed.
    loader: Option<(PathBuf, OsString)>,
    data: Vec<PathBuf>,
    modules: Option<PathBuf>,
}

impl Qemu {
    pub fn command(&self) -> Command {
        let mut command = match &self.loader {
            Some((loader, libraries)) => {
                let mut command = Command::new(loader);
                command.arg("--library-path").arg(libraries).arg(&self.program);
                command
            }
            None => Command::new(&self.program),
        };
        for folder in &self.data {
            command.arg("-L").arg(folder);
        }
        if let Some(modules) = &self.modules {
            command.env("QEMU_MODULE_DIR", modules);
        }
        command
    }

    /// The QEMU of an unpacked tree.
    fn unpacked(tree: &Path) -> Result<Self> {
        let libraries: Vec<PathBuf> = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib", "lib"]
            .iter()
            .map(|below| tree.join(below))
            .filter(|folder| folder.is_dir())
            .collect();
        let loader = libraries
            .iter()
            .chain([&tree.join("usr/lib64"), &tree.join("lib64")])
            .map(|folder| folder.join("ld-linux-x86-64.so.2"))
            .find(|file| file.is_file())
            .context("the unpacked packages have no dynamic loader")?;
        let data = ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"].map(|below| tree.join(below));
        Ok(Self {
            program: tree.join("usr/bin/qemu-system-x86_64"),
            loader: Some((loader, std::env::join_paths(&libraries)?)),
            data: data.into_iter().filter(|folder| folder.is_dir()).collect(),
            modules: Some(tree.join("usr/lib/x86_64-linux-gnu/qemu")),
        })
    }

    /// `QEMU emulator version 10.0.2 (...)`.
    pub fn version(&self) -> Result<String> {
        let result = self.command().arg("--version").output().context("cannot start QEMU")?;
        ensure!(result.status.success(), "QEMU does not start: {}", String::from_utf8_lossy(&result.stderr));
        Ok(String::from_utf8_lossy(&result.stdout).lines().next().unwrap_or_default().to_owned())
    }

    fn check(&self) -> Result<()> {
        let text = self.version()?;
        let major = text.split("version ").nth(1).and_then(|rest| rest.split('.').next()?.parse::<u32>().ok());
        ensure!(major.is_some_and(|major| major >= OLDEST_QEMU), "QEMU {OLDEST_QEMU} or newer is needed, not: {text}");
        Ok(())
    }

    /// QEMU with its libraries and data as one archive for L1.
    fn pack(&self, to: &Path) -> Result<()> {
        let (loader, libraries) = match &self.loader {
            Some((loader, libraries)) => (loader.clone(), libraries.clone()),
            None => (PathBuf::from("/lib64/ld-linux-x86-64.so.2"), OsString::new()),
        };
        let listing =
            Command::new(&loader).arg("--library-path").arg(&libraries).arg("--list").arg(&self.program).output()?;
        ensure!(
            listing.status.success(),
            "the loader cannot list QEMU's libraries: {}",
            String::from_utf8_lossy(&listing.stderr)
        );
        let mut archive = Archive::new(BufWriter::new(File::create(to)?));
        for folder in ["lib", "share", "modules"] {
            archive.directory(folder)?;
        }
        archive.copy("qemu-system-x86_64", &self.program)?;
        archive.copy("ld.so", &loader)?;
        for line in String::from_utf8_lossy(&listing.stdout).lines() {
            // `\tlibz.so.1 => /path/libz.so.1 (0x...)`; a line without an arrow is the loader or the vDSO.
            if let Some((name, rest)) = line.split_once(" => ") {
                let path = rest.rsplit_once(" (").map_or(rest, |(path, _)| path);
                archive.copy(&format!("lib/{}", name.trim()), Path::new(path))?;
            }
        }
        let mut data = self.data.clone();
        data.extend(["/usr/share/qemu", "/usr/share/seabios", "/usr/lib/ipxe/qemu"].map(PathBuf::from));
        for name in FIRMWARE {
            if let Some(file) = data.iter().map(|folder| folder.join(name)).find(|file| file.is_file()) {
                archive.copy(&format!("share/{name}"), &file)?;
            }
        }
        archive.finish()?;
        Ok(())
    }
}

/// Makes whatever is missing or stale.
pub fn prepare(outer: &Cache, host: Host) -> Result<Images> {
    let cache = &match host {
        Host::Default => outer.clone(),
        Host::New => outer.inner("new")?,
    };
    let tree = cache.path("tree");
    let packages = unpack(cache, &tree, host)?;
    let qemu = match installed(host) {
        Some(qemu) if !tree.join("usr/bin/qemu-system-x86_64").is_file() => qemu,
        _ => Qemu::unpacked(&tree)?,
    };
    qemu.check()?;
    let kernel = kernel_image(&tree)?;
    let content = disk(cache)?;
    let mut parts = vec![packages.as_str(), content.sha256.as_str(), L1_INIT, GUEST_INIT, env!("CARGO_PKG_VERSION")];
    parts.extend([
        include_str!("l1.rs"),
        include_str!("cpio.rs"),
        include_str!("kernel_modules.rs"),
        include_str!("stored_kernel.rs"),
    ]);
    parts.extend(L1_PROGRAMS.iter().chain(COMMON_PROGRAMS).map(|(_, text)| *text));
    let recipe = recipe(&parts);
    let kernel_package = packages.lines().find(|package| package.starts_with("linux-image-"));
    let images = Images {
        host,
        cache: cache.clone(),
        qemu,
        kernel,
        base: cache.path("l1.cpio"),
        guest_base: cache.path("guest.cpio"),
        qemu_disk: cache.path("qemu.cpio"),
        zoo: cache.path("zoo.cpio"),
        nvme: cache.path("nvme.img"),
        kernel_package: kernel_package.context("no kernel among the unpacked packages")?.to_owned(),
        content,
        recipe,
        own: OnceLock::new(),
    };
    if !cache.is_fresh("images", &images.recipe) {
        progress("making L1's images");
        cache.forget("images")?;
        images.qemu.pack(&images.qemu_disk)?;
        l1_base(cache, &tree, &images)?;
        cache.stamp("images", &images.recipe)?;
    }
    Ok(images)
}

/// Unpacks QEMU, busybox and a kernel; gives what identifies them. A tree that stands is used as it is: the network is
/// not asked again.
fn unpack(cache: &Cache, tree: &Path, host: Host) -> Result<String> {
    let kind = recipe(&["packages 1", include_str!("apt.rs")]);
    if cache.is_fresh("tree", &kind) {
        return Ok(std::fs::read_to_string(cache.path("packages"))?);
    }
    cache.need_free(FREE_BYTES)?;
    cache.forget("tree")?;
    if tree.exists() {
        std::fs::remove_dir_all(tree)?;
    }
    progress("reading the package lists");
    let apt = apt(cache, host)?;
    let mut pinned: Vec<Pinned> = Vec::new();
    if installed(host).is_some() {
        pinned.extend(apt.closure(&["busybox-static"])?);
    } else {
        pinned.extend(apt.closure(&["qemu-system-x86", "busybox-static"])?);
    }
    pinned.extend(apt.kernel()?);
    progress(format_args!("unpacking {} packages (nothing is installed)", pinned.len()));
    apt.unpack(&pinned, tree)?;
    apt.discard_downloads()?;
    let packages = pinned.join("\n");
    std::fs::write(cache.path("packages"), &packages)?;
    cache.stamp("tree", &kind)?;
    Ok(packages)
}

/// The apt of the suite that QEMU and the kernel come from.
pub fn apt(cache: &Cache, host: Host) -> Result<Apt> {
    match host {
        Host::Default => Apt::open(&cache.path("apt"), if installed(host).is_some() { 0 } else { OLDEST_QEMU }),
        Host::New => Apt::open_newest(&cache.path("apt"), OLDEST_NEW_QEMU),
    }
}

/// A QEMU of this machine that is new enough; the newer host always has its own.
fn installed(host: Host) -> Option<Qemu> {
    if host == Host::New {
        return None;
    }
    let path = std::env::var_os("PATH")?;
    let program =
        std::env::split_paths(&path).map(|folder| folder.join("qemu-system-x86_64")).find(|file| file.is_file())?;
    let qemu = Qemu { program, loader: None, data: Vec::new(), modules: None };
    qemu.check().ok().map(|()| qemu)
}

fn kernel_image(tree: &Path) -> Result<PathBuf> {
    if let Some(file) =
        modules_folder(tree).ok().map(|(folder, _)| folder.join("vmlinuz")).filter(|file| file.is_file())
    {
        return Ok(file);
    }
    let mut found: Vec<PathBuf> = std::fs::read_dir(tree.join("boot"))
        .context("the kernel package has no boot folder")?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz")))
        .collect();
    found.sort();
    found.pop().context("the kernel package has no vmlinuz")
}

fn modules_folder(tree: &Path) -> Result<(PathBuf, String)> {
    for below in ["lib/modules", "usr/lib/modules"] {
        if let Some(folder) = std::fs::read_dir(tree.join(below)).ok().and_then(|mut entries| entries.next()?.ok()) {
            return Ok((folder.path(), folder.file_name().to_string_lossy().into_owned()));
        }
    }
    bail!("the kernel package has no modules")
}

fn busybox(tree: &Path) -> Result<PathBuf> {
    let places = ["usr/bin/busybox", "bin/busybox"].map(|below| tree.join(below));
    places.into_iter().find(|file| file.is_file()).context("the unpacked packages have no busybox")
}

/// Folders, busybox under all its names, and modules with their index.
fn user_space<W: Write>(
    archive: &mut Archive<W>,
    tree: &Path,
    release: &str,
    selection: &Selection,
    extra: &[&str],
) -> Result<()> {
    let folders = [
        "bin",
        "sbin",
        "proc",
        "sys",
        "dev",
        "tmp",
        "run",
        "mnt",
        "etc",
        "root",
        "lib",
        "lib/modules",
        "var",
        "usr",
        "usr/bin",
    ];
    for folder in folders.iter().chain(extra) {
        archive.directory(folder)?;
    }
    let busybox = busybox(tree)?;
    archive.copy("bin/busybox", &busybox)?;
    let applets = Command::new(&busybox).arg("--list").output().context("cannot run the unpacked busybox")?;
    ensure!(applets.status.success(), "busybox --list failed");
    for applet in String::from_utf8_lossy(&applets.stdout).lines().filter(|name| *name != "busybox") {
        archive.symlink(&format!("bin/{applet}"), "busybox")?;
    }
    archive.symlink("sbin/modprobe", "../bin/busybox")?;
    archive.symlink("usr/bin/env", "../../bin/busybox")?;
    archive.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/tmp:/bin/sh\n")?;
    archive.file("etc/group", 0o644, b"root:x:0:\nnogroup:x:65534:\n")?;
    put_modules(archive, release, selection)
}

/// A kernel's modules, and what modprobe wants to know of them.
pub fn put_modules<W: Write>(archive: &mut Archive<W>, release: &str, selection: &Selection) -> Result<()> {
    put_more_modules(archive, release, selection, &[])
}

/// As `put_modules`, for an archive that follows one in which the modules `before` are: these are only in the index.
fn put_more_modules<W: Write>(
    archive: &mut Archive<W>,
    release: &str,
    selection: &Selection,
    before: &[Module],
) -> Result<()> {
    let root = format!("lib/modules/{release}");
    let mut made: Vec<String> = vec![root.clone()];
    archive.directory(&root)?;
    for module in selection.modules.iter().filter(|module| before.iter().all(|other| other.name != module.name)) {
        let path = format!("{root}/{}", module.path);
        let parents: Vec<&Path> = Path::new(&path).ancestors().skip(1).collect();
        for parent in parents.into_iter().rev().map(|parent| parent.to_string_lossy().into_owned()) {
            if parent.len() > root.len() && !made.contains(&parent) {
                archive.directory(&parent)?;
                made.push(parent);
            }
        }
        archive.file(&path, 0o644, &module.content)?;
    }
    archive.file(&format!("{root}/modules.dep"), 0o644, selection.modules_dep().as_bytes())
}

fn guest_base(tree: &Path, release: &str, modules: &ModuleTree) -> Result<Vec<u8>> {
    let mut archive = Archive::new(Vec::new());
    user_space(&mut archive, tree, release, &modules.select(GUEST_MODULES)?, &["files"])?;
    archive.file("init", 0o755, GUEST_INIT.as_bytes())?;
    for (name, text) in COMMON_PROGRAMS {
        archive.file(&format!("bin/{name}"), 0o755, text.as_bytes())?;
    }
    archive.finish()
}

/// For L1: an archive that follows a guest's initramfs and has the modules of the zoo, with the index of all.
fn zoo_overlay(release: &str, modules: &ModuleTree) -> Result<Vec<u8>> {
    let names: Vec<&str> = GUEST_MODULES.iter().chain(ZOO_MODULES).copied().collect();
    let mut guest = Archive::new(Vec::new());
    put_more_modules(&mut guest, release, &modules.select(&names)?, &modules.select(GUEST_MODULES)?.modules)?;
    let mut archive = Archive::new(Vec::new());
    archive.file("causeway/guest/zoo.cpio", 0o644, &guest.finish()?)?;
    archive.finish()
}

fn l1_base(cache: &Cache, tree: &Path, images: &Images) -> Result<()> {
    let (folder, release) = modules_folder(tree)?;
    let modules = ModuleTree::open(&folder)?;
    let selection = modules.select(L1_MODULES)?;
    let temporary = cache.path("l1.cpio.new");
    let mut archive = Archive::new(BufWriter::new(File::create(&temporary)?));
    let folders = ["causeway", "causeway/bin", "causeway/guest", "causeway/files", "causeway/out"];
    user_space(&mut archive, tree, &release, &selection, &folders)?;
    archive.file("init", 0o755, L1_INIT.as_bytes())?;
    for (name, text) in L1_PROGRAMS.iter().chain(COMMON_PROGRAMS) {
        archive.file(&format!("causeway/bin/{name}"), 0o755, text.as_bytes())?;
    }
    archive.symlink("causeway/bin/busybox", "/bin/busybox")?;
    archive.copy("causeway/guest/vmlinuz", &images.kernel)?;
    match stored_kernel::stored(&std::fs::read(&images.kernel)?) {
        Ok(stored) => archive.file("causeway/guest/vmlinuz-stored", 0o644, &stored)?,
        // Guests boot it all the same, after they unpacked it themselves.
        Err(error) => {
            progress(format_args!(
                "guests take long to boot: {} cannot be unpacked: {error:#}",
                images.kernel.display()
            ));
            archive.symlink("causeway/guest/vmlinuz-stored", "vmlinuz")?;
        }
    }
    std::fs::write(&images.guest_base, guest_base(tree, &release, &modules)?)?;
    archive.copy("causeway/guest/base.cpio", &images.guest_base)?;
    std::fs::write(&images.zoo, zoo_overlay(&release, &modules)?)?;
    archive.file("etc/boot-modules", 0o644, (L1_BOOT_MODULES.join(" ") + "\n").as_bytes())?;
    archive.finish()?;
    std::fs::rename(temporary, &images.base)?;
    Ok(())
}

/// The NVMe's content: the same on every machine, from a seeded generator; gives the checksums of its parts.
fn disk(cache: &Cache) -> Result<Content> {
    let sizes = [DISK_BYTES, CHECKED_BYTES, SLICE_BYTES, CHECKED_SLICE_BYTES].map(|size| size.to_string());
    let mut parts = vec!["splitmix64 3"];
    parts.extend(sizes.iter().map(String::as_str));
    let stamp = recipe(&parts);
    let sums = cache.path("nvme.sha256");
    if !cache.is_fresh("nvme", &stamp) {
        progress("making the NVMe's disk");
        cache.need_free(FREE_BYTES)?;
        cache.forget("nvme")?;
        let mut state = 0x6361_7573_6577_6179_u64;
        let mut content = Vec::with_capacity(DISK_BYTES);
        while content.len() < DISK_BYTES {
            content.extend(splitmix64(&mut state).to_le_bytes());
        }
        std::fs::write(cache.path("nvme.img"), &content)?;
        let mut text = hex(&Sha256::digest(&content[..CHECKED_BYTES]));
        for from in std::iter::once(0).chain((0..SLICES).map(|slice| SLICES_FROM + slice * SLICE_BYTES)) {
            text += "\n";
            text += &hex(&Sha256::digest(&content[from..from + CHECKED_SLICE_BYTES]));
        }
        std::fs::write(&sums, text)?;
        cache.stamp("nvme", &stamp)?;
    }
    let text = std::fs::read_to_string(sums)?;
    let mut lines = text.lines().map(str::to_owned);
    let mut next = || lines.next().context("the disk has no checksum");
    Ok(Content { sha256: next()?, first: next()?, slices: lines.collect() })
}

fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
