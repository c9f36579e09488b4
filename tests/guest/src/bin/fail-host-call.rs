//! Starts a program some of whose VFIO calls fail: `fail-host-call --call unmap-dma --nth 30 --way refused=22 --
//! PROGRAM ARGUMENTS...`.
//!
//! The program knows nothing of it: a seccomp filter hands each of its VFIO and iommufd ioctls to this process, which
//! lets the kernel go on with all but those. An unmap can also be carried out and said to have failed, or to have taken
//! away more or less than it did; then this process asks the kernel, by a descriptor that it takes from the program.
//! The end of the run is told on stderr: how often each call was made, and which failed.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use libc::{c_int, c_ulong, seccomp_notif, seccomp_notif_resp, sock_filter};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Starts a program some of whose VFIO calls fail.
#[derive(Parser)]
struct Arguments {
    /// Which call; all are counted together without it.
    #[arg(long)]
    call: Option<String>,
    /// Which of them, counted from 1, with commas between. Without it none fails.
    #[arg(long, value_delimiter = ',')]
    nth: Vec<u64>,
    /// How: `refused=ERRNO`; for an unmap also `done=ERRNO` (it is done all the same), `more=BYTES` and `less=BYTES`
    /// (it is done, and says that it took away so many more or fewer).
    #[arg(long, default_value = "refused=22", value_parser = way)]
    way: Way,
    /// The program and its arguments.
    #[arg(last = true, required = true)]
    program: Vec<String>,
}

#[derive(Clone, Copy, Debug)]
enum Way {
    Refused(i32),
    Done(i32),
    Miscounted(i64),
}

fn way(text: &str) -> Result<Way> {
    let (name, value) = text.split_once('=').context("a way is name=number")?;
    let value: u32 = value.parse()?;
    Ok(match name {
        "refused" => Way::Refused(value as i32),
        "done" => Way::Done(value as i32),
        "more" => Way::Miscounted(value.into()),
        "less" => Way::Miscounted(-i64::from(value)),
        _ => bail!("the ways are refused, done, more and less"),
    })
}

/// `_IO(';', 100 + n)` of VFIO, and `_IO(';', 0x80 + n)` of iommufd.
const CALLS: [(c_ulong, &str); 25] = [
    (0x3b64, "get-api-version"),
    (0x3b65, "check-extension"),
    (0x3b66, "set-iommu"),
    (0x3b67, "group-status"),
    (0x3b68, "set-container"),
    (0x3b6a, "get-device"),
    (0x3b6b, "device-info"),
    (0x3b6c, "region-info"),
    (0x3b6d, "irq-info"),
    (0x3b6e, "set-irqs"),
    (0x3b6f, "reset"),
    (0x3b70, "iommu-info"),
    (MAP_DMA, "map-dma"),
    (UNMAP_DMA, "unmap-dma"),
    (0x3b75, "device-feature"),
    (0x3b76, "bind-iommufd"),
    (0x3b77, "attach"),
    (0x3b78, "detach"),
    (0x3b80, "destroy"),
    (0x3b81, "ioas-alloc"),
    (0x3b83, "ioas-copy"),
    (0x3b84, "iova-ranges"),
    (0x3b85, "ioas-map"),
    (0x3b86, "ioas-unmap"),
    (0x3b89, "hwpt-alloc"),
];
/// On a container; on a device the number is that of a hot reset.
const MAP_DMA: c_ulong = 0x3b71;
/// On a container; on a device the number is that of an ioeventfd.
const UNMAP_DMA: c_ulong = 0x3b72;
const IOAS_UNMAP: c_ulong = 0x3b86;

/// Where the size is in the arguments of an unmap that can be done here, and how long they are.
fn unmap_layout(command: c_ulong) -> Option<(usize, usize)> {
    match command {
        // argsz, flags, iova, size.
        UNMAP_DMA => Some((16, 24)),
        // size, ioas_id, iova, length.
        IOAS_UNMAP => Some((16, 24)),
        _ => None,
    }
}

/// A filter that hands every ioctl of type `;` to the listener.
fn install_filter() -> io::Result<RawFd> {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let op = |code, k, jt, jf| sock_filter { code, jt, jf, k };
    // The number of the system call is at 0, the low half of the second argument at 24 of struct seccomp_data.
    let mut filter = [
        op(LOAD, 0, 0, 0),
        op(IF_EQUAL, libc::SYS_ioctl as u32, 0, 4),
        op(LOAD, 24, 0, 0),
        op(AND, 0xff00, 0, 0),
        op(IF_EQUAL, 0x3b00, 0, 1),
        op(RETURN, libc::SECCOMP_RET_USER_NOTIF, 0, 0),
        op(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the calls take numbers and one program, which lives until they return.
    let fd = unsafe {
        if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 {
            return Err(io::Error::last_os_error());
        }
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(fd as RawFd) }
}

/// What is seen of the program.
struct Supervisor {
    listener: OwnedFd,
    arguments: Arguments,
    /// By name.
    calls: BTreeMap<String, u64>,
    matching: u64,
    failed: Vec<String>,
}

impl Supervisor {
    /// Until the program and all that it started ended.
    fn serve(&mut self) -> Result<()> {
        loop {
            let mut poll = libc::pollfd { fd: self.listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: `poll` is the one structure that the call is told of.
            if unsafe { libc::poll(&raw mut poll, 1, -1) } < 0 {
                let error = io::Error::last_os_error();
                ensure!(error.kind() == io::ErrorKind::Interrupted, "poll: {error}");
                continue;
            }
            if poll.revents & libc::POLLIN == 0 {
                return Ok(());
            }
            // SAFETY: the structure is numbers.
            let mut request: seccomp_notif = unsafe { std::mem::zeroed() };
            // SAFETY: the call fills the structure that its number is made of.
            if unsafe { libc::ioctl(self.listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut request) } != 0
            {
                let error = io::Error::last_os_error();
                // The thread ended meanwhile.
                ensure!(error.raw_os_error() == Some(libc::ENOENT), "SECCOMP_IOCTL_NOTIF_RECV: {error}");
                continue;
            }
            let mut reply = self.judge(&request)?;
            // SAFETY: the call reads the structure that its number is made of.
            if unsafe { libc::ioctl(self.listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut reply) } != 0 {
                let error = io::Error::last_os_error();
                ensure!(error.raw_os_error() == Some(libc::ENOENT), "SECCOMP_IOCTL_NOTIF_SEND: {error}");
            }
        }
    }

    fn judge(&mut self, request: &seccomp_notif) -> Result<seccomp_notif_resp> {
        let command = request.data.args[1] & 0xffff;
        let name = name_of(request.pid, request.data.args[0], command);
        *self.calls.entry(name.clone()).or_default() += 1;
        let mut reply = seccomp_notif_resp {
            id: request.id,
            val: 0,
            error: 0,
            flags: libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
        };
        if self.arguments.call.as_ref().is_some_and(|call| *call != name) {
            return Ok(reply);
        }
        self.matching += 1;
        if !self.arguments.nth.contains(&self.matching) {
            return Ok(reply);
        }
        reply.flags = 0;
        match (self.arguments.way, unmap_layout(command)) {
            (Way::Refused(errno), _) => reply.error = -errno,
            (_, None) => bail!("{name} cannot be done in part"),
            (Way::Done(errno), Some(layout)) => {
                unmap(request, command, layout, 0)?;
                reply.error = -errno;
            }
            (Way::Miscounted(more), Some(layout)) => unmap(request, command, layout, more)?,
        }
        self.failed.push(name);
        Ok(reply)
    }
}

/// The call; numbers of VFIO mean one thing on a container and another on a device.
fn name_of(pid: u32, fd: u64, command: c_ulong) -> String {
    let known = CALLS.iter().find(|(number, _)| *number == command).map(|(_, name)| *name);
    let on_container = || {
        let file = std::fs::read_link(format!("/proc/{pid}/fd/{fd}"));
        file.is_ok_and(|file| file.as_os_str() == "/dev/vfio/vfio")
    };
    match known {
        Some("map-dma") if !on_container() => "hot-reset".to_owned(),
        Some("unmap-dma") if !on_container() => "ioeventfd".to_owned(),
        Some("iommu-info") if !on_container() => "hot-reset-info".to_owned(),
        Some(name) => name.to_owned(),
        None => format!("{command:#x}"),
    }
}

/// Carries out the unmap for the program, which hears of so many bytes more.
fn unmap(request: &seccomp_notif, command: c_ulong, (size_at, len): (usize, usize), more: i64) -> Result<()> {
    let pid = request.pid as libc::pid_t;
    let mut bytes = vec![0u8; len];
    copy(pid, request.data.args[2], &mut bytes, false).context("reading the call's arguments")?;
    // The request names the thread, and a descriptor is of a process.
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).context("the thread's status")?;
    let process: libc::pid_t = status
        .lines()
        .find_map(|line| line.strip_prefix("Tgid:"))
        .and_then(|number| number.trim().parse().ok())
        .context("the thread has no process")?;
    // SAFETY: the calls take numbers; what they return is a new descriptor or an error.
    let file = unsafe {
        let pidfd = libc::syscall(libc::SYS_pidfd_open, process, 0);
        ensure!(pidfd >= 0, "pidfd_open: {}", io::Error::last_os_error());
        let pidfd = OwnedFd::from_raw_fd(pidfd as RawFd);
        let fd = libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), request.data.args[0] as c_int, 0);
        ensure!(fd >= 0, "pidfd_getfd: {}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd as RawFd)
    };
    // SAFETY: the arguments are as long as the program, whose call it is, says.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), command as _, bytes.as_mut_ptr()) };
    ensure!(result == 0, "the unmap: {}", io::Error::last_os_error());
    let size = u64::from_ne_bytes(bytes[size_at..size_at + 8].try_into()?).wrapping_add_signed(more);
    bytes[size_at..size_at + 8].copy_from_slice(&size.to_ne_bytes());
    copy(pid, request.data.args[2], &mut bytes, true).context("writing the call's result")
}

/// Copies from or to the program's memory.
fn copy(pid: libc::pid_t, address: u64, bytes: &mut [u8], write: bool) -> io::Result<()> {
    let here = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let there = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: bytes.len() };
    // SAFETY: `here` describes `bytes`; `there` is of the other process, and the kernel checks it.
    let done = unsafe {
        if write {
            libc::process_vm_writev(pid, &raw const here, 1, &raw const there, 1, 0)
        } else {
            libc::process_vm_readv(pid, &raw const here, 1, &raw const there, 1, 0)
        }
    };
    if done == bytes.len() as isize { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if let Some(call) = &arguments.call {
        let on_devices = ["hot-reset", "hot-reset-info", "ioeventfd"];
        let known = CALLS.iter().any(|(_, name)| name == call) || on_devices.contains(&call.as_str());
        ensure!(known, "no call is named {call}");
    }
    let (ours, theirs) = UnixStream::pair()?;
    let mut command = Command::new(&arguments.program[0]);
    command.args(&arguments.program[1..]);
    // SAFETY: between fork and exec there are system calls only.
    unsafe {
        command.pre_exec(move || {
            let listener = install_filter()?;
            theirs.send_with_fd(&[0u8][..], listener).map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
            Ok(())
        });
    }
    let mut program = command.spawn().context("starting the program")?;
    drop(command);
    let mut byte = [0];
    let (_, listener) = ours.recv_with_fd(&mut byte).context("no listener came")?;
    let listener = OwnedFd::from(listener.context("no listener came")?);
    let mut seen = Supervisor { listener, arguments, calls: BTreeMap::new(), matching: 0, failed: Vec::new() };
    let served = seen.serve();
    if served.is_err() {
        // Whoever waits for an answer would wait for ever.
        let _ = program.kill();
    }
    let status = program.wait()?;
    served?;
    let counts: Vec<String> = seen.calls.iter().map(|(name, count)| format!("{name}={count}")).collect();
    eprintln!("fail-host-call: calls: {}", counts.join(" "));
    eprintln!(
        "fail-host-call: failed: {}",
        if seen.failed.is_empty() { "none".to_owned() } else { seen.failed.join(" ") }
    );
    Ok(match status.code() {
        Some(code) => ExitCode::from(code as u8),
        None => ExitCode::from(128 + status.signal().unwrap_or(0) as u8),
    })
}
