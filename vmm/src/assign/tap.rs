//! The link of a virtio-net: a tap of the host.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use devices::virtio::net::{HEADER, Link, NotGranted, Offloads};
use devices::virtio::ring::Part;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::ioctl_iow_nr;
use vtd::Perm;

use super::pinned_io::PinnedIo;

/// Bytes of an interface's name, with the zero behind it.
const NAME: usize = libc::IFNAMSIZ;
/// Of `struct ifreq`, what TUNSETIFF looks at.
#[repr(C)]
struct Request {
    name: [u8; NAME],
    flags: i16,
    rest: [u8; 22],
}

// linux/if_tun.h.
ioctl_iow_nr!(TUNSETIFF, 'T' as u32, 202, libc::c_int);
ioctl_iow_nr!(TUNSETOFFLOAD, 'T' as u32, 208, libc::c_uint);
ioctl_iow_nr!(TUNSETVNETHDRSZ, 'T' as u32, 216, libc::c_int);

/// The tap, not in use yet.
pub struct Tap {
    file: File,
    offloads: bool,
}

impl Tap {
    /// The tap with this name, which is there.
    ///
    /// # Errors
    /// It is not, or is somebody else's.
    pub fn open(name: &str) -> io::Result<Self> {
        // Else the kernel would make one, that nobody has brought up.
        if !Path::new("/sys/class/net").join(name).exists() {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("there is no such interface; make it first: ip tuntap add {name} mode tap user $USER vnet_hdr"),
            ));
        }
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
        let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
        let mut request = Request { name: [0; NAME], flags, rest: [0; 22] };
        // The configuration has only names that fit.
        request.name.iter_mut().take(NAME - 1).zip(name.bytes()).for_each(|(to, byte)| *to = byte);
        // SAFETY: TUNSETIFF reads and writes a struct ifreq, which `request` is as long as.
        check(unsafe { ioctl_with_mut_ref(&file, TUNSETIFF(), &mut request) })?;
        let header = HEADER as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads an int.
        check(unsafe { ioctl_with_ref(&file, TUNSETVNETHDRSZ(), &header) })?;
        let all = Offloads { checksum: true, tcp4: true, tcp6: true, ecn: true };
        let offloads = set_offloads(&file, all).is_ok();
        set_offloads(&file, Offloads::default())?;
        Ok(Self { file, offloads })
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn set_offloads(file: &File, offloads: Offloads) -> io::Result<()> {
    let Offloads { checksum, tcp4, tcp6, ecn } = offloads;
    let flags = [
        (checksum, libc::TUN_F_CSUM),
        (tcp4, libc::TUN_F_TSO4),
        (tcp6, libc::TUN_F_TSO6),
        // It goes with one of them only.
        (ecn && (tcp4 || tcp6), libc::TUN_F_TSO_ECN),
    ];
    let flags = flags.iter().filter(|(on, _)| *on).fold(0, |all, (_, flag)| all | flag);
    // SAFETY: TUNSETOFFLOAD takes a number.
    check(unsafe { ioctl_with_val(file, TUNSETOFFLOAD(), flags.into()) })
}

/// A tap in use.
pub struct TapLink {
    tap: Tap,
    io: PinnedIo,
}

impl TapLink {
    /// The link of `tap`, whose packets go by `io`.
    pub fn new(tap: Tap, io: PinnedIo) -> Self {
        Self { tap, io }
    }
}

impl Link for TapLink {
    fn file(&self) -> RawFd {
        self.tap.file.as_raw_fd()
    }

    fn has_offloads(&self) -> bool {
        self.tap.offloads
    }

    fn set_offloads(&mut self, offloads: Offloads) {
        if let Err(e) = set_offloads(&self.tap.file, offloads) {
            log::error!("a tap does not take what it was asked before whether it takes it: {e}");
        }
    }

    fn has_packet(&mut self) -> bool {
        let mut poll = libc::pollfd { fd: self.tap.file.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one descriptor, and no time.
        let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
        ready > 0 && poll.revents & libc::POLLIN != 0
    }

    fn send(&mut self, packet: &[Part]) -> Result<(), NotGranted> {
        let file = self.tap.file.as_raw_fd();
        let sent = self.io.with(packet, Perm::Read, |memory| {
            // SAFETY: each part lies in pages that are pinned for reading and stay so until this returns.
            unsafe { libc::writev(file, memory.as_ptr(), memory.len() as libc::c_int) }
        });
        // What the host does not take is lost, as packets are.
        sent.map(drop).map_err(|_| NotGranted)
    }

    fn receive(&mut self, room: &[Part], spill: &mut [u8]) -> Result<Option<u64>, NotGranted> {
        let file = self.tap.file.as_raw_fd();
        let received = self.io.with(room, Perm::Write, |memory| {
            let spill = libc::iovec { iov_base: spill.as_mut_ptr().cast(), iov_len: spill.len() };
            let into = [&*memory, &[spill]].concat();
            // SAFETY: each part lies in pages that are pinned for writing and stay so until this returns; they are the
            // guest's, so nobody here has a reference to them. The last one is `spill`, which is borrowed.
            unsafe { libc::readv(file, into.as_ptr(), into.len() as libc::c_int) }
        });
        let received = received.map_err(|_| NotGranted)?;
        Ok(u64::try_from(received).ok().filter(|bytes| *bytes >= HEADER))
    }
}
