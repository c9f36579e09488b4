//! Where a PCI function's interrupt goes, and moving it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// An interrupt of this kernel.
#[derive(Clone, Copy, Debug)]
pub struct Interrupt(u32);

impl Interrupt {
    /// The first message-signalled interrupt of a function, which its driver must have enabled.
    ///
    /// # Errors
    /// If it has none.
    pub fn of_function(bdf: &str) -> Result<Self> {
        let folder = Path::new("/sys/bus/pci/devices").join(bdf).join("msi_irqs");
        let entries = fs::read_dir(&folder).with_context(|| format!("{bdf} has no MSI enabled"))?;
        let numbers = entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
        numbers.min().map(Self).with_context(|| format!("{} is empty", folder.display()))
    }

    fn file(self, name: &str) -> String {
        format!("/proc/irq/{}/{name}", self.0)
    }

    /// Asks for one processor. When the last move is not finished, the kernel makes this one at the next interrupt.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn ask_for(self, processor: usize) -> Result<()> {
        let file = self.file("smp_affinity");
        fs::write(&file, format!("{:x}", 1u64 << processor)).with_context(|| format!("writing {file}"))
    }

    /// Whether it goes to that processor now.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn is_at(self, processor: usize) -> Result<bool> {
        let file = self.file("effective_affinity");
        let mask = fs::read_to_string(&file).with_context(|| format!("reading {file}"))?;
        Ok(u64::from_str_radix(mask.trim(), 16) == Ok(1 << processor))
    }

    /// How many arrived at each processor so far.
    ///
    /// # Errors
    /// If the kernel does not list it.
    pub fn arrived(self) -> Result<Vec<u64>> {
        let table = fs::read_to_string("/proc/interrupts").context("reading /proc/interrupts")?;
        let prefix = format!("{}:", self.0);
        let row = table.lines().find_map(|line| line.trim_start().strip_prefix(&prefix));
        let row = row.with_context(|| format!("interrupt {} is not listed", self.0))?;
        Ok(row.split_whitespace().map_while(|count| count.parse().ok()).collect())
    }
}

/// Waits until every interrupt handler that is running now, on any processor, has returned: no processor is quiescent
/// inside one.
///
/// # Errors
/// If this kernel cannot.
pub fn wait_for_handlers() -> Result<()> {
    // SAFETY: the call takes numbers only.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_GLOBAL, 0, 0) };
    ensure!(result == 0, "membarrier: {}", std::io::Error::last_os_error());
    Ok(())
}
