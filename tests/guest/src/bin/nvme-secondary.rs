//! Gives flexible resources of an NVMe's primary controller to a secondary one, a virtual function, and brings that
//! online (NVMe Base Specification, section 8.26 "Virtualization Enhancements"): `nvme-secondary /dev/nvme0 CONTROLLER
//! QUEUES VECTORS`.
//!
//! A secondary controller can be used once it has an admin queue, an I/O queue and a vector. With `--release`, the
//! primary gives up its own share of the flexible ones first, which counts after its next reset.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Parser;

/// Assigns resources of an NVMe's primary controller.
#[derive(Parser)]
struct Arguments {
    /// The primary controller's character device.
    device: PathBuf,
    /// The secondary controller's identifier; 0 with `--release`.
    controller: u16,
    /// Queue pairs, the admin one among them.
    queues: u16,
    /// Interrupt vectors.
    vectors: u16,
    /// Sets how many of the flexible ones the primary keeps for itself, instead of giving some away.
    #[arg(long)]
    release: bool,
}

/// `struct nvme_passthru_cmd` of `linux/nvme_ioctl.h`.
#[repr(C)]
#[derive(Default)]
struct Command {
    opcode: u8,
    flags: u8,
    reserved: u16,
    namespace: u32,
    cdw2: u32,
    cdw3: u32,
    metadata: u64,
    address: u64,
    metadata_length: u32,
    data_length: u32,
    cdw10: u32,
    cdw11: u32,
    cdw12: u32,
    cdw13: u32,
    cdw14: u32,
    cdw15: u32,
    timeout_ms: u32,
    result: u32,
}

/// `NVME_IOCTL_ADMIN_CMD`: `_IOWR('N', 0x41, struct nvme_passthru_cmd)`.
const ADMIN_COMMAND: libc::c_ulong = 0xc048_4e41;
const _: () = assert!(size_of::<Command>() == 0x48);

/// Virtualization Management.
const OPCODE: u8 = 0x1c;

/// Dword 10, bits 3:0.
#[derive(Clone, Copy, Debug)]
enum Action {
    /// How many the primary keeps.
    PrimaryFlexible = 1,
    Offline = 7,
    Assign = 8,
    Online = 9,
}

/// Dword 10, bits 10:8.
#[derive(Clone, Copy, Debug)]
enum Resource {
    Queues = 0,
    Vectors = 1,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let device = File::open(&arguments.device).with_context(|| format!("opening {}", arguments.device.display()))?;
    let controller = arguments.controller;
    let (queues, vectors) = (arguments.queues, arguments.vectors);
    if arguments.release {
        manage(&device, controller, Action::PrimaryFlexible, Resource::Queues, queues)?;
        return manage(&device, controller, Action::PrimaryFlexible, Resource::Vectors, vectors);
    }
    manage(&device, controller, Action::Offline, Resource::Queues, 0)?;
    manage(&device, controller, Action::Assign, Resource::Queues, queues)?;
    manage(&device, controller, Action::Assign, Resource::Vectors, vectors)?;
    manage(&device, controller, Action::Online, Resource::Queues, 0)
}

fn manage(device: &File, controller: u16, action: Action, resource: Resource, number: u16) -> Result<()> {
    let mut command = Command {
        opcode: OPCODE,
        cdw10: u32::from(controller) << 16 | (resource as u32) << 8 | action as u32,
        cdw11: u32::from(number),
        ..Command::default()
    };
    // SAFETY: the kernel reads and writes one command, which is as large as the request's number says; it names no
    // other memory.
    let status = unsafe { libc::ioctl(device.as_raw_fd(), ADMIN_COMMAND, &raw mut command) };
    ensure!(status >= 0, "{action:?} {resource:?}: {}", io::Error::last_os_error());
    ensure!(status == 0, "{action:?} {resource:?} of controller {controller}: status {status:#x}");
    Ok(())
}
