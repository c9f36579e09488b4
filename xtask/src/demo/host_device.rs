//! The demonstration with an NVMe disk of this machine: bound to vfio-pci for as long as it takes, and given back.

use crate::cache::{Cache, progress};
use crate::demo::{self, Facts};
use crate::l1::Images;
use crate::programs::Program;
use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

const CHECKED_BYTES: u64 = 64 << 20;

pub struct HostDevice {
    bdf: String,
    folder: PathBuf,
}

/// Gives the function back to the driver it had, whatever happens.
struct Bound<'a> {
    device: &'a HostDevice,
    driver: String,
}

impl Drop for Bound<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.device.bind(&self.driver, "\n") {
            progress(format_args!("{} is not back at {}: {error:#}", self.device.bdf, self.driver));
        }
    }
}

impl HostDevice {
    /// Refuses what is not an NVMe disk or is in use.
    pub fn open(name: &str) -> Result<Self> {
        let bdf = if name.matches(':').count() == 1 { format!("0000:{name}") } else { name.to_owned() };
        let folder = Path::new("/sys/bus/pci/devices").join(&bdf);
        ensure!(folder.is_dir(), "this machine has no PCI function {bdf}");
        for needed in ["/dev/kvm", "/dev/vfio/vfio"] {
            ensure!(
                Path::new(needed).exists(),
                "this machine has no {needed}; without --device the demonstration brings its own"
            );
        }
        let class = fs::read_to_string(folder.join("class"))?;
        ensure!(class.trim() == "0x010802", "{bdf} is not an NVMe disk (its class is {})", class.trim());
        Ok(Self { bdf, folder })
    }

    fn driver(&self) -> Option<String> {
        let link = fs::read_link(self.folder.join("driver")).ok()?;
        Some(link.file_name()?.to_string_lossy().into_owned())
    }

    /// The disk's first part as this machine's driver reads it.
    fn checksum(&self) -> Result<String> {
        let disk = self
            .disk()
            .with_context(|| format!("{} must be bound to nvme, so that its content can be compared", self.bdf))?;
        let mounts = fs::read_to_string("/proc/mounts")? + &fs::read_to_string("/proc/swaps")?;
        let path = format!("/dev/{disk}");
        ensure!(!mounts.lines().any(|line| line.starts_with(&path)), "{path} is in use (mounted or swap)");
        for entry in fs::read_dir(Path::new("/sys/class/block"))? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name.starts_with(&disk) {
                let holders = fs::read_dir(Path::new("/sys/class/block").join(&name).join("holders"))?;
                ensure!(holders.count() == 0, "/dev/{name} is in use by another block device");
            }
        }
        let mut content = Vec::new();
        File::open(&path)
            .with_context(|| format!("cannot read {path}"))?
            .take(CHECKED_BYTES)
            .read_to_end(&mut content)?;
        ensure!(content.len() as u64 == CHECKED_BYTES, "{path} is smaller than 64 MiB");
        Ok(crate::cache::hex(&Sha256::digest(&content)))
    }

    fn disk(&self) -> Option<String> {
        let controller = fs::read_dir(self.folder.join("nvme")).ok()?.next()?.ok()?.path();
        let entries = fs::read_dir(controller).ok()?;
        let mut names = entries.filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()));
        names.find(|name| {
            name.starts_with("nvme") && name.contains('n') && Path::new("/sys/class/block").join(name).exists()
        })
    }

    /// Takes the function from its driver and gives it to `driver`; `override_with` stays as its override.
    fn bind(&self, driver: &str, override_with: &str) -> Result<()> {
        fs::write(self.folder.join("driver_override"), override_with)
            .context("cannot choose a driver (are you root?)")?;
        if self.folder.join("driver").exists() {
            fs::write(self.folder.join("driver/unbind"), &self.bdf)?;
        }
        fs::write("/sys/bus/pci/drivers_probe", &self.bdf)?;
        let bound = self.driver();
        if bound.as_deref() != Some(driver) {
            bail!("{} is bound to {}, not to {driver}", self.bdf, bound.as_deref().unwrap_or("nothing"));
        }
        Ok(())
    }

    /// The guests of the demonstration, one after the other.
    pub fn demo(&self, cache: &Cache, images: &Images, programs: &[Program], options: &str) -> Result<Vec<Facts>> {
        let expected_sha256 = self.checksum()?;
        let driver = self.driver().context("the function has no driver")?;
        let causeway = programs.iter().find(|program| program.name == "causeway").context("no causeway")?;
        let initrd = cache.path("demo.cpio");
        fs::write(&initrd, demo::initrd(images, programs)?)?;
        // The kernel loads vfio-pci for nobody: a machine that assigns devices has it loaded.
        ensure!(Path::new("/sys/bus/pci/drivers/vfio-pci").exists(), "vfio-pci is not loaded: modprobe vfio-pci");
        let _bound = Bound { device: self, driver };
        self.bind("vfio-pci", "vfio-pci\n")?;
        let guest = |(read, _)| -> Result<Facts> {
            let facts = self.guest(cache, images, [&causeway.file, &initrd], options, read)?;
            Ok(Facts { expected_sha256: expected_sha256.clone(), ..facts })
        };
        demo::GUESTS.into_iter().map(guest).collect()
    }

    fn guest(
        &self,
        cache: &Cache,
        images: &Images,
        files: [&Path; 2],
        options: &str,
        read: &'static str,
    ) -> Result<Facts> {
        let [causeway, initrd] = files;
        let (stats, messages) = (cache.path("demo.json"), cache.path("demo.err"));
        let _ = fs::remove_file(&stats);
        let faults_before = faults();
        let start = Instant::now();
        let mut child = Command::new(causeway)
            .arg("run")
            .arg("--kernel")
            .arg(&images.kernel)
            .arg("--initrd")
            .arg(initrd)
            .args(["--cmdline", &format!("console=ttyS0 quiet panic=-1 {options} reads={read},checksum")])
            .args(["--memory", "512M", "--timeout", "120", "--device", &format!("vfio,host={}", self.bdf), "--stats"])
            .arg(&stats)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&messages)?)
            .spawn()
            .context("cannot start causeway")?;
        let (mut log, mut init) = (String::new(), None);
        let output = child.stdout.take().context("causeway has no output")?;
        for line in BufReader::new(output).split(b'\n') {
            let line = String::from_utf8_lossy(&line?).into_owned();
            if demo::is_init(&line) {
                init.get_or_insert(start.elapsed());
            }
            log += line.trim_end();
            log.push('\n');
        }
        let status = child.wait()?;
        let mut outside: HashMap<String, String> = HashMap::new();
        outside.insert("status".to_owned(), status.code().map_or(status.to_string(), |code| code.to_string()));
        outside.insert("init".to_owned(), init.map_or("-".to_owned(), |time| format!("{:.2}", time.as_secs_f64())));
        outside.insert("host_faults".to_owned(), faults().saturating_sub(faults_before).to_string());
        outside.insert("host_device".to_owned(), self.bdf.clone());
        let text = fs::read_to_string(&messages).unwrap_or_default();
        Ok(Facts {
            read,
            guest: demo::words(&log),
            outside,
            stats: fs::read_to_string(&stats).ok().and_then(|text| serde_json::from_str(&text).ok()),
            expected_sha256: String::new(),
            logs: demo::logs(&log, &text),
        })
    }
}

/// The DMA faults in this machine's kernel log.
fn faults() -> usize {
    let Ok(result) = Command::new("dmesg").output() else { return 0 };
    let text = String::from_utf8_lossy(&result.stdout).into_owned();
    text.lines().filter(|line| line.contains("DMAR:") && line.contains("fault")).count()
}
