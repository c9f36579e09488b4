//! Has this kernel load another one with kexec_file_load, and starts it: at once, or when this kernel panics.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;

/// The file is loaded as what runs after a panic, into the memory that `crashkernel=` keeps for it (`linux/kexec.h`).
const KEXEC_FILE_ON_CRASH: libc::c_ulong = 2;

/// Loads a kernel and starts it in place of the one that runs.
#[derive(Parser)]
struct Arguments {
    /// Only loads it: it starts when this kernel panics.
    #[arg(long)]
    panic: bool,
    /// The kernel, a bzImage.
    kernel: PathBuf,
    /// Its initramfs.
    initrd: PathBuf,
    /// Its command line.
    cmdline: CString,
}

fn main() -> Result<()> {
    let Arguments { panic, kernel, initrd, cmdline } = Arguments::parse();
    let open = |path: &PathBuf| File::open(path).with_context(|| format!("opening {}", path.display()));
    let (kernel, initrd) = (open(&kernel)?, open(&initrd)?);
    let flags = if panic { KEXEC_FILE_ON_CRASH } else { 0 };
    let cmdline = cmdline.as_bytes_with_nul();
    // SAFETY: two open files, and a string whose length includes its terminating zero; the kernel only reads them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            libc::c_long::from(kernel.as_raw_fd()),
            libc::c_long::from(initrd.as_raw_fd()),
            cmdline.len(),
            cmdline.as_ptr(),
            flags,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error()).context("kexec_file_load");
    }
    println!("kexec: loaded");
    if panic {
        return Ok(());
    }
    // SAFETY: takes no memory. The machine goes down orderly: the kernel shuts every device down before it leaves.
    unsafe { libc::reboot(libc::LINUX_REBOOT_CMD_KEXEC) };
    Err(io::Error::last_os_error()).context("reboot into the loaded kernel")
}
