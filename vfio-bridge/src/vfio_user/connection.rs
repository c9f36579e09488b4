//! One connection to a server: calls with a deadline, and the thread that takes what comes.

use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use log::{debug, error, warn};
use vtd::Iova;
use vtd::spec::INTERRUPT_WINDOW;
use zerocopy::IntoBytes;

use vmm_sys_util::eventfd::EventFd;

use super::granted::{Granted, Missing};
use super::messages::{Asked, Messages};
use super::socket::{MAX_DATA, MAX_FDS, Message, receive, reply_to, send};
use super::wire::{
    Capabilities, DmaAccess, FLAG_ERROR, FLAG_NO_REPLY, FLAG_REPLY, Header, MAX_DMA_MAPS, TwinSocket, VERSION, command,
    parse_version, version_payload,
};
use crate::function::{DmaMessages, Requests};

/// How long a process may take to answer a call, before it is cut off.
pub const CALL_DEADLINE: Duration = Duration::from_secs(10);

/// Commands of the server that wait to be carried out; when there are more it is not listened to.
const COMMANDS_WAITING: usize = 64;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The socket.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The server does not answer as the protocol wants it.
    #[error("the process at the other end does not speak vfio-user: {0}")]
    Protocol(&'static str),
    /// The server speaks another version.
    #[error("the process at the other end speaks version {major} of vfio-user, and this program version 0")]
    Version {
        /// Its major version.
        major: u16,
    },
    /// A call that is needed failed.
    #[error("the process at the other end could not be asked what it is: {0}")]
    Call(#[from] CallError),
}

/// Why a call came to nothing.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CallError {
    /// The server refused, with this errno or 0.
    #[error("the process refused: {}", io::Error::from_raw_os_error(*.0))]
    Refused(i32),
    /// No answer came by the deadline, and the server was cut off.
    #[error("the process did not answer and was cut off")]
    NoAnswer,
    /// The connection is closed.
    #[error("the connection to the process is closed")]
    Closed,
    /// The answer makes no sense.
    #[error("the answer of the process makes no sense")]
    Garbage,
}

impl From<CallError> for io::Error {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Refused(errno) if errno > 0 => Self::from_raw_os_error(errno),
            CallError::Refused(_) | CallError::Garbage => Self::from_raw_os_error(libc::EIO),
            CallError::NoAnswer => Self::from_raw_os_error(libc::ETIMEDOUT),
            CallError::Closed => Self::from_raw_os_error(libc::ENOTCONN),
        }
    }
}

/// How a connection ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    /// The server closed it.
    Peer,
    /// We did, because of what the server did or did not do.
    CutOff,
}

#[derive(Default)]
struct Waiting {
    /// Who waits for the reply with which id.
    calls: BTreeMap<u16, SyncSender<Message>>,
    end: Option<End>,
    /// Signalled at the end.
    wakes: Option<EventFd>,
}

impl Waiting {
    fn wake(&self) {
        if let Some(event) = self.wakes.as_ref().filter(|_| self.end.is_some()) {
            // It can only fail where it is readable already.
            let _ = event.write(1);
        }
    }
}

struct Shared {
    name: String,
    stream: UnixStream,
    /// For the server's commands, if it wants another socket for them.
    twin: Option<UnixStream>,
    deadline: Duration,
    /// The last id; held while a message is sent.
    sending: Mutex<u16>,
    waiting: Mutex<Waiting>,
    granted: Granted,
    /// It was given no file of guest memory: what is not granted any more is revoked, whatever it does.
    confined: bool,
    messages: Messages,
    requests: OnceLock<Arc<dyn Requests>>,
}

/// A connection. Dropping it closes it and ends its threads.
pub(super) struct Connection {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    capabilities: Capabilities,
    peer: Option<OwnedFd>,
}

/// A call whose answer did not come yet.
pub(super) struct Call {
    id: u16,
    told: Receiver<Message>,
}

impl Connection {
    /// Agrees on a version with the server at the other end of `stream`. `name` is for messages. A `confined` one is to
    /// be given no file of guest memory.
    pub fn new(stream: UnixStream, name: String, deadline: Duration, confined: bool) -> Result<Self, ConnectError> {
        stream.set_write_timeout(Some(deadline))?;
        stream.set_read_timeout(Some(deadline))?;
        let wanted = Capabilities {
            max_msg_fds: MAX_FDS as u32,
            max_data_xfer_size: MAX_DATA as u64,
            max_dma_maps: MAX_DMA_MAPS,
            twin_socket: Some(TwinSocket { supported: true, fd_index: None }),
            ..Capabilities::default()
        };
        let header = Header { command: command::VERSION, ..Header::default() };
        send(&stream, header, &[&version_payload(VERSION, &wanted)], &[])?;
        let reply = receive(&stream).map_err(|e| match e.kind() {
            io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
            _ => e,
        });
        let reply = reply?.ok_or(ConnectError::Protocol("it closed the connection"))?;
        if reply.header.flags & FLAG_ERROR != 0 || reply.header.flags & 0xf != FLAG_REPLY {
            return Err(ConnectError::Protocol("its first message is not a version"));
        }
        let (version, capabilities) =
            parse_version(&reply.payload).ok_or(ConnectError::Protocol("its version cannot be read"))?;
        if version.major != VERSION.major {
            return Err(ConnectError::Version { major: version.major });
        }
        if version.minor > VERSION.minor {
            return Err(ConnectError::Protocol("it answers with a higher version than was proposed"));
        }
        if capabilities.pgsizes & 4096 == 0 {
            return Err(ConnectError::Protocol("it does not take mappings of 4 KiB"));
        }
        let twin = twin(&capabilities, reply.fds)?;
        // Who does not read its replies is not waited for here either.
        twin.iter().try_for_each(|twin| twin.set_write_timeout(Some(deadline)))?;
        stream.set_read_timeout(None)?;
        let peer = pidfd_of_peer(&stream);
        let shared = Arc::new(Shared {
            name,
            stream,
            twin,
            deadline,
            sending: Mutex::new(0),
            waiting: Mutex::default(),
            granted: Granted::default(),
            confined,
            messages: Messages::default(),
            requests: OnceLock::new(),
        });
        let (tell, commands) = sync_channel(COMMANDS_WAITING);
        let thread = |name: &str| std::thread::Builder::new().name(name.to_owned());
        let mut connection = Self { shared: shared.clone(), threads: Vec::new(), capabilities, peer };
        // Commands have a thread of their own: one may wait for something that waits for a reply.
        if shared.twin.is_some() {
            let server = shared.clone();
            connection.threads.push(thread("vfio-user-dma").spawn(move || server.serve_twin())?);
        }
        let server = shared.clone();
        connection.threads.push(thread("vfio-user-cmd").spawn(move || server.serve(&commands))?);
        connection.threads.push(thread("vfio-user").spawn(move || shared.take(&tell))?);
        Ok(connection)
    }

    /// What the server said of itself.
    pub fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// For messages.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// What the device may ask for by message.
    pub fn granted(&self) -> &Granted {
        &self.shared.granted
    }

    /// Whether it is given no file of guest memory.
    pub fn is_confined(&self) -> bool {
        self.shared.confined
    }

    /// What the device asked for by message.
    pub fn messages(&self) -> DmaMessages {
        self.shared.messages.so_far()
    }

    /// From now on `requests` hears of what the device asks for and was not granted. The first one stays.
    pub fn tell(&self, requests: Arc<dyn Requests>) {
        let _ = self.shared.requests.set(requests);
    }

    /// Whether whoever was at the other end can have none of our memory that is not granted: it never had any, it
    /// closed its end, or it is no more.
    pub fn is_released(&self) -> bool {
        if self.shared.confined {
            return true;
        }
        match self.shared.waiting().end {
            None => false,
            Some(End::Peer) => true,
            Some(End::CutOff) => self.peer.as_ref().is_some_and(has_exited),
        }
    }

    /// Whether it ended.
    pub fn has_ended(&self) -> bool {
        self.shared.waiting().end.is_some()
    }

    /// `event` is signalled when it ends, now if it did.
    pub fn wake_at_end(&self, event: EventFd) {
        let mut waiting = self.shared.waiting();
        waiting.wakes = Some(event);
        waiting.wake();
    }

    /// Asks, and waits for the answer.
    pub fn call(&self, command: u16, parts: &[&[u8]], fds: &[RawFd]) -> Result<Message, CallError> {
        let call = self.begin(command, parts, fds)?;
        self.end(call)
    }

    /// Asks; the answer is to be waited for with [`Connection::end`].
    pub fn begin(&self, command: u16, parts: &[&[u8]], fds: &[RawFd]) -> Result<Call, CallError> {
        self.shared.begin(command, parts, fds)
    }

    /// Waits for the answer, until the deadline.
    pub fn end(&self, call: Call) -> Result<Message, CallError> {
        self.shared.end(call)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // The end that is wanted needs no word.
        self.shared.waiting().end.get_or_insert(End::CutOff);
        self.shared.shut_down();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                error!("{}: a thread of the connection panicked", self.shared.name);
            }
        }
    }
}

/// What a write of `data` to `address` is for the bus, if it is a message.
fn interrupt_message(address: u64, data: &[u8]) -> Option<u32> {
    let inside = INTERRUPT_WINDOW.contains(address) && address.is_multiple_of(4);
    Some(u32::from_le_bytes(data.try_into().ok().filter(|_| inside)?))
}

fn twin(capabilities: &Capabilities, fds: Vec<OwnedFd>) -> Result<Option<UnixStream>, ConnectError> {
    let Some(TwinSocket { supported: true, fd_index }) = capabilities.twin_socket else { return Ok(None) };
    let fd = fd_index.and_then(|index| fds.into_iter().nth(index));
    let fd = fd.ok_or(ConnectError::Protocol("it offers a second socket and does not send it"))?;
    Ok(Some(UnixStream::from(fd)))
}

/// A file that becomes readable when the process at the other end exits. `None` where that cannot be told, for instance
/// because it is this process.
fn pidfd_of_peer(stream: &UnixStream) -> Option<OwnedFd> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: `peer` has the `len` bytes that the call writes.
    let result = unsafe {
        libc::getsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, (&raw mut peer).cast(), &raw mut len)
    };
    if result != 0 || peer.pid <= 0 || peer.pid.cast_unsigned() == std::process::id() {
        return None;
    }
    // SAFETY: the call takes two numbers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, peer.pid, 0) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: pidfd_open returned this descriptor just now, nobody else has it.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn has_exited(pidfd: &OwnedFd) -> bool {
    let mut poll = libc::pollfd { fd: pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: `poll` is the one structure that the call is told of.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sending(&self) -> MutexGuard<'_, u16> {
        self.sending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, command: u16, parts: &[&[u8]], fds: &[RawFd]) -> Result<Call, CallError> {
        let (tell, told) = sync_channel(1);
        let mut last = self.sending();
        let id = {
            let mut waiting = self.waiting();
            if waiting.end.is_some() {
                return Err(CallError::Closed);
            }
            // There are fewer threads than ids.
            *last = last.wrapping_add(1);
            while waiting.calls.contains_key(&last) {
                *last = last.wrapping_add(1);
            }
            waiting.calls.insert(*last, tell);
            *last
        };
        if let Err(e) = send(&self.stream, Header { id, command, ..Header::default() }, parts, fds) {
            self.waiting().calls.remove(&id);
            // Part of a message may have gone out: nothing after it would be understood.
            if e.kind() == io::ErrorKind::BrokenPipe || e.kind() == io::ErrorKind::ConnectionReset {
                self.close(End::Peer, "it closed the connection");
                return Err(CallError::Closed);
            }
            self.close(End::CutOff, &format!("command {command} could not be sent: {e}"));
            return Err(CallError::NoAnswer);
        }
        Ok(Call { id, told })
    }

    fn end(&self, call: Call) -> Result<Message, CallError> {
        match call.told.recv_timeout(self.deadline) {
            Ok(reply) if reply.header.flags & FLAG_ERROR != 0 => {
                Err(CallError::Refused(reply.header.error.cast_signed()))
            }
            Ok(reply) => Ok(reply),
            Err(RecvTimeoutError::Timeout) => {
                self.waiting().calls.remove(&call.id);
                self.close(End::CutOff, &format!("it did not answer for {} s", self.deadline.as_secs_f32()));
                Err(CallError::NoAnswer)
            }
            Err(RecvTimeoutError::Disconnected) => Err(CallError::Closed),
        }
    }

    /// Ends the connection, and everybody's wait. Said once.
    fn close(&self, end: End, why: &str) {
        let mut waiting = self.waiting();
        if waiting.end.is_none() {
            waiting.end = Some(end);
            match end {
                End::Peer => warn!("{}: {why}: the device is gone, and reads as ones", self.name),
                End::CutOff => error!("{}: the process is cut off: {why}", self.name),
            }
        }
        waiting.calls.clear();
        waiting.wake();
        self.shut_down();
    }

    /// Nothing comes or goes any more: whoever is cut off asks for nothing, either.
    fn shut_down(&self) {
        for stream in [&self.stream].into_iter().chain(&self.twin) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Takes what comes: answers to their callers, commands to `tell`.
    fn take(&self, tell: &SyncSender<Message>) {
        let (end, why) = loop {
            match receive(&self.stream) {
                Ok(None) => break (End::Peer, "it closed the connection".to_owned()),
                Err(e) if e.kind() == io::ErrorKind::InvalidData => break (End::CutOff, e.to_string()),
                Err(e) => break (End::Peer, e.to_string()),
                Ok(Some(message)) if message.header.flags & 0xf == FLAG_REPLY => {
                    // Nobody waits for it when the deadline passed.
                    let waits = self.waiting().calls.remove(&message.header.id);
                    if let Some(caller) = waits {
                        let _ = caller.send(message);
                    }
                }
                Ok(Some(message)) => {
                    if tell.send(message).is_err() {
                        break (End::CutOff, "its commands are not served any more".to_owned());
                    }
                }
            }
        };
        self.close(end, &why);
    }

    /// Serves commands that come among the replies.
    fn serve(&self, commands: &Receiver<Message>) {
        while let Ok(message) = commands.recv() {
            let (header, payload) = self.answer(&message);
            if message.header.flags & FLAG_NO_REPLY == 0 {
                let _one_at_a_time = self.sending();
                if let Err(e) = send(&self.stream, header, &[&payload], &[]) {
                    return self.not_replied(&e);
                }
            }
        }
    }

    /// Serves commands that come by the second socket.
    fn serve_twin(&self) {
        let Some(twin) = &self.twin else { return };
        while let Ok(Some(message)) = receive(twin) {
            let (header, payload) = self.answer(&message);
            let wanted = message.header.flags & FLAG_NO_REPLY == 0;
            if wanted && let Err(e) = send(twin, header, &[&payload], &[]) {
                return self.not_replied(&e);
            }
        }
    }

    /// A reply, or the rest of one, did not go out: nothing that is sent after it would be understood.
    fn not_replied(&self, error: &io::Error) {
        match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                debug!("{}: a reply could not be sent: {error}", self.name);
            }
            _ => self.close(End::CutOff, &format!("it does not take the replies to its requests: {error}")),
        }
    }

    /// What a command of the server is answered with.
    fn answer(&self, message: &Message) -> (Header, Vec<u8>) {
        let refused = |errno| {
            self.messages.count(Asked::Refused, 0);
            (reply_to(&message.header, Some(errno)), Vec::new())
        };
        let Ok((access, data)) = message.parse::<DmaAccess>() else { return refused(libc::EINVAL) };
        let Some(count) = usize::try_from(access.count).ok().filter(|count| *count <= MAX_DATA) else {
            return refused(libc::EINVAL);
        };
        let requests = self.requests.get();
        let mut payload = access.as_bytes().to_vec();
        let (done, write) = match message.header.command {
            command::DMA_READ => {
                let at = payload.len();
                payload.resize(at + count, 0);
                (self.granted.read(access.address, &mut payload[at..]), false)
            }
            command::DMA_WRITE if data.len() != count => return refused(libc::EINVAL),
            command::DMA_WRITE => match (interrupt_message(access.address, data), requests) {
                (Some(data), Some(requests)) => {
                    requests.message(access.address, data);
                    (Ok(()), true)
                }
                _ => (self.granted.write(access.address, data), true),
            },
            _ => return refused(libc::ENOTSUP),
        };
        let Err(Missing(before)) = done else {
            self.messages.count(if write { Asked::Write } else { Asked::Read }, count);
            return (reply_to(&message.header, None), payload);
        };
        self.messages.count(Asked::Blocked, 0);
        if let Some(requests) = requests {
            requests.blocked(Iova(access.address.wrapping_add(before as u64)), write);
        }
        (reply_to(&message.header, Some(libc::EFAULT)), Vec::new())
    }
}
