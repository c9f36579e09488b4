//! Whole messages over a Unix socket, with the files that come beside them.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use libc::iovec;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use zerocopy::{FromBytes, IntoBytes};

use super::wire::{FLAG_ERROR, FLAG_REPLY, HEADER_SIZE, Header};

/// Data that one message may carry; both sides propose it.
pub const MAX_DATA: usize = 1 << 20;
/// Files that are taken with one message.
pub const MAX_FDS: usize = 16;
/// No message is longer: data, and what stands before it.
const MAX_MESSAGE: usize = MAX_DATA + 4096;

/// A message that came.
#[derive(Debug, Default)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// What follows the header.
    pub payload: Vec<u8>,
    /// The files that came beside it.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// The structure that the payload begins with, and the rest of it.
    pub fn parse<T: FromBytes>(&self) -> io::Result<(T, &[u8])> {
        T::read_from_prefix(&self.payload).map_err(|_| invalid("a message is too short for what it is"))
    }
}

/// `InvalidData`, with a reason.
pub fn invalid(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// Connects to whoever listens at `path`. `TimedOut` where nobody takes the connection in time: one whose queue is full
/// lets others wait for ever.
pub fn connect(path: &Path, deadline: Duration) -> io::Result<UnixStream> {
    let mut address = libc::sockaddr_un { sun_family: libc::AF_UNIX as libc::sa_family_t, sun_path: [0; 108] };
    let path = path.as_os_str().as_bytes();
    // One zero byte stays at the end.
    if path.is_empty() || path.len() >= address.sun_path.len() || path.contains(&0) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no path that a socket can have"));
    }
    for (to, from) in address.sun_path.iter_mut().zip(path) {
        *to = from.cast_signed();
    }
    // SAFETY: the call takes three numbers.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call made this descriptor just now, so nobody else has it.
    let stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
    // It is also the limit of how long a connection waits to be taken.
    stream.set_write_timeout(Some(deadline))?;
    loop {
        let len = size_of::<libc::sockaddr_un>() as libc::socklen_t;
        // SAFETY: `address` has the `len` bytes that the call reads.
        if unsafe { libc::connect(fd, (&raw const address).cast(), len) } == 0 {
            return Ok(stream);
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
            _ => return Err(error),
        }
    }
}

/// Sends one message. Whoever calls it keeps others from sending at the same time.
pub fn send(stream: &UnixStream, mut header: Header, parts: &[&[u8]], fds: &[RawFd]) -> io::Result<()> {
    let size = HEADER_SIZE + parts.iter().map(|part| part.len()).sum::<usize>();
    header.size = u32::try_from(size).map_err(|_| invalid("a message is too long"))?;
    let mut bytes = header.as_bytes().to_vec();
    parts.iter().for_each(|part| bytes.extend_from_slice(part));
    // The files go with the first byte.
    let sent = if fds.is_empty() { 0 } else { stream.send_with_fds(&[&bytes[..]], fds)? };
    let mut stream = stream;
    stream.write_all(&bytes[sent..])
}

/// The header of the reply to `command`.
pub fn reply_to(command: &Header, error: Option<i32>) -> Header {
    let failed = if error.is_some() { FLAG_ERROR } else { 0 };
    Header { flags: FLAG_REPLY | failed, error: error.map_or(0, i32::cast_unsigned), ..*command }
}

/// The next message; `None` when the other side closed the connection between two.
pub fn receive(stream: &UnixStream) -> io::Result<Option<Message>> {
    let mut bytes = [0; HEADER_SIZE];
    let mut fds = [-1; MAX_FDS];
    let (got, fd_count) = loop {
        let mut parts = [iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: HEADER_SIZE }];
        // SAFETY: `parts` describes `bytes`, to which anything may be written.
        match unsafe { stream.recv_with_fds(&mut parts, &mut fds) } {
            Ok(got) => break got,
            Err(e) if e.errno() == libc::EINTR => {}
            Err(e) => return Err(e.into()),
        }
    };
    // SAFETY: the kernel made these descriptors for this call just now, so nobody else has them.
    let fds: Vec<OwnedFd> = fds[..fd_count].iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }).collect();
    fds.iter().try_for_each(close_on_exec)?;
    if got == 0 {
        return Ok(None);
    }
    let mut from = stream;
    from.read_exact(&mut bytes[got..])?;
    let header = Header::read_from_bytes(&bytes).map_err(|_| invalid("a header of another size"))?;
    let len = (header.size as usize).checked_sub(HEADER_SIZE).filter(|_| header.size as usize <= MAX_MESSAGE);
    let mut payload = vec![0; len.ok_or_else(|| invalid("a message of an impossible size"))?];
    from.read_exact(&mut payload)?;
    Ok(Some(Message { header, payload, fds }))
}

fn close_on_exec(fd: &OwnedFd) -> io::Result<()> {
    // SAFETY: the descriptor is open, and the call touches no memory.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The payload's length, of a message that says to have `size` bytes, and has them.
    fn received(size: usize) -> io::Result<usize> {
        let (ours, mut theirs) = UnixStream::pair()?;
        let sender = std::thread::spawn(move || {
            let header = Header { size: size as u32, ..Header::default() };
            // Refused, the message has no reader.
            let _ = theirs.write_all(header.as_bytes()).and_then(|()| theirs.write_all(&vec![0; size - HEADER_SIZE]));
        });
        let message = receive(&ours);
        drop(ours);
        sender.join().expect("the sender does not panic");
        Ok(message?.map_or(0, |message| message.payload.len()))
    }

    #[test]
    fn rule5_no_room_is_made_for_what_is_longer_than_a_message() {
        assert_eq!(received(MAX_MESSAGE).unwrap(), MAX_MESSAGE - HEADER_SIZE);
        assert_eq!(received(MAX_MESSAGE + 1).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
