//! The control socket: where it is, and its clients. What is spoken there is [`crate::control_protocol`]'s.
//!
//! No client costs the machine more than its place: nothing here waits, what a client may send and leave unread is
//! bounded, and one request is served at a time, so that a signal or the time limit comes between any two.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, Permissions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::control_protocol::{Lines, MOST_UNREAD, Reply, Request, TooLong, line};

/// Clients at a time.
pub const MOST_CLIENTS: usize = 16;
/// The longest path of a socket: bytes (`sun_path`, and the zero at its end).
const LONGEST_PATH: usize = 107;
/// What is read at once: bytes.
const CHUNK: usize = 4 << 10;
/// What the epoll says of the listener; clients have numbers from 1.
const LISTENER: u64 = 0;

/// Why there can be no control socket.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It does not fit into a socket's address.
    #[error(
        "the control socket {path} cannot be made: its path has {len} bytes, and a socket's may have {LONGEST_PATH}; \
         use a shorter one, or one that begins in the working directory"
    )]
    TooLong {
        /// As it was given.
        path: PathBuf,
        /// Its length.
        len: usize,
    },
    /// A file that is not ours.
    #[error("the control socket {0} cannot be made: a file that is no socket is there; remove it, or use another path")]
    NoSocket(PathBuf),
    /// A socket that may be in use.
    #[error(
        "the control socket {path} cannot be made: another process has a socket there ({why}); end that process, or \
         use another path"
    )]
    Taken {
        /// As it was given.
        path: PathBuf,
        /// What a connection to it found.
        why: String,
    },
    /// The system does not want it.
    #[error(
        "the control socket {path} cannot be made: {source}; use a path in a folder that is there and that you \
         may write to"
    )]
    Io {
        /// As it was given.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Which file it is: device and inode.
type Identity = (u64, u64);

fn identity(path: &Path) -> io::Result<Identity> {
    fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

/// A path that can have the control socket.
#[derive(Debug)]
pub struct Place {
    path: PathBuf,
    /// The socket there, which nobody listens at any more.
    stale: Option<Identity>,
}

impl Place {
    /// Looks what is at `path`, and changes nothing. This may wait for whoever listens there.
    pub fn find(path: &Path) -> Result<Self, Error> {
        let len = path.as_os_str().as_bytes().len();
        let path = path.to_owned();
        if len > LONGEST_PATH {
            return Err(Error::TooLong { path, len });
        }
        let file = match fs::symlink_metadata(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Self { path, stale: None }),
            Err(source) => return Err(Error::Io { path, source }),
        };
        if !file.file_type().is_socket() {
            return Err(Error::NoSocket(path));
        }
        match UnixStream::connect(&path) {
            Err(e) if e.kind() == ErrorKind::ConnectionRefused => {
                Ok(Self { path, stale: Some((file.dev(), file.ino())) })
            }
            Err(e) => Err(Error::Taken { path, why: e.to_string() }),
            Ok(_) => Err(Error::Taken { path, why: "it takes connections".to_owned() }),
        }
    }

    /// Listens there, for processes of this user and of root alone. Called while no other thread makes files: the
    /// permissions of new ones are narrower for a moment.
    pub fn listen(self) -> Result<(UnixListener, Arc<SocketFile>), Error> {
        let Self { path, stale } = self;
        let listen = || {
            if stale.is_some() && stale == identity(&path).ok() {
                fs::remove_file(&path)?;
            }
            let listener = bind(&path)?;
            let file = SocketFile { path: path.clone(), identity: identity(&path)?, removed: AtomicBool::new(false) };
            fs::set_permissions(&path, Permissions::from_mode(0o600))?;
            listener.set_nonblocking(true)?;
            Ok((listener, Arc::new(file)))
        };
        listen().map_err(|source: io::Error| match source.kind() {
            // Made since we looked.
            ErrorKind::AddrInUse => Error::Taken { path: path.clone(), why: source.to_string() },
            _ => Error::Io { path: path.clone(), source },
        })
    }
}

/// A bind after which nobody else can connect, not even before the mode of the file is set.
fn bind(path: &Path) -> io::Result<UnixListener> {
    // SAFETY: the call takes a number and gives one back; it touches no memory.
    let before = unsafe { libc::umask(0o077) };
    let listener = crate::listening::listen(path);
    // SAFETY: as above.
    unsafe { libc::umask(before) };
    listener
}

/// The file of a socket. It goes when this is dropped, if it is still this one.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: Identity,
    removed: AtomicBool,
}

impl SocketFile {
    /// Removes it, once: the next file may have its number.
    pub fn remove(&self) {
        if self.removed.swap(true, Ordering::Relaxed) || identity(&self.path).ok() != Some(self.identity) {
            return;
        }
        if let Err(e) = fs::remove_file(&self.path) {
            log::warn!("the control socket {} could not be removed: {e}", self.path.display());
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        self.remove();
    }
}

/// One who is connected.
struct Client {
    stream: UnixStream,
    lines: Lines,
    /// Replies that the socket did not take yet.
    unread: VecDeque<u8>,
    /// It sends nothing more.
    ended: bool,
    /// What the epoll watches.
    watched: EventSet,
}

/// Why a client is not served any more.
struct Gone;

impl Client {
    /// Reads once.
    fn read(&mut self) -> Result<(), Gone> {
        let mut chunk = [0; CHUNK];
        match self.stream.read(&mut chunk) {
            Ok(0) => self.ended = true,
            Ok(len) => self.lines.push(&chunk[..len]),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => return Err(Gone),
        }
        Ok(())
    }

    /// Writes what the socket takes.
    fn write(&mut self) -> Result<(), Gone> {
        while !self.unread.is_empty() {
            match self.stream.write(self.unread.as_slices().0) {
                Ok(0) => return Err(Gone),
                Ok(len) => drop(self.unread.drain(..len)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Err(Gone),
            }
        }
        Ok(())
    }

    fn reply(&mut self, reply: &Reply) -> Result<(), Gone> {
        self.unread.extend(line(reply));
        self.write()?;
        if self.unread.len() > MOST_UNREAD {
            log::debug!("control socket: a client does not read its replies and is cut off");
            return Err(Gone);
        }
        Ok(())
    }

    /// Does what the epoll found.
    fn attend(&mut self, found: EventSet) -> Result<(), Gone> {
        self.write()?;
        let has_more = found.intersects(EventSet::IN | EventSet::HANG_UP | EventSet::ERROR);
        if has_more && !self.ended && !self.lines.is_ready() {
            self.read()?;
        }
        Ok(())
    }

    /// Whether nothing is to be done for it ever.
    fn is_done(&self) -> bool {
        self.ended && !self.lines.is_ready() && self.unread.is_empty()
    }

    /// What is to be watched: no more is read before what came is served.
    fn wanted(&self) -> EventSet {
        let mut wanted = EventSet::empty();
        wanted.set(EventSet::IN, !self.ended && !self.lines.is_ready());
        wanted.set(EventSet::OUT, !self.unread.is_empty());
        wanted
    }
}

/// The socket with its clients.
pub struct ControlSocket {
    listener: UnixListener,
    file: Arc<SocketFile>,
    /// All files below: readable when there is something to do.
    epoll: Epoll,
    /// Given up where no file can be opened, so that whoever connects is told.
    reserve: Option<UnixListener>,
    accepting: bool,
    clients: BTreeMap<u64, Client>,
    last_client: u64,
    last_served: u64,
    complained: bool,
}

impl ControlSocket {
    /// With what [`Place::listen`] gave. An error means that there are too few open files.
    pub fn new((listener, file): (UnixListener, Arc<SocketFile>)) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let socket = Self {
            reserve: Some(listener.try_clone()?),
            listener,
            file,
            epoll,
            accepting: true,
            clients: BTreeMap::new(),
            last_client: LISTENER,
            last_served: LISTENER,
            complained: false,
        };
        socket.watch_listener()?;
        Ok(socket)
    }

    /// Readable when [`ControlSocket::serve`] has something to do.
    pub fn event(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Does what there is to do, and serves one request with `answer`. Whether another one waits already.
    pub fn serve(&mut self, answer: &mut dyn FnMut(&Request) -> Reply) -> bool {
        self.accept_again();
        let mut found = [EpollEvent::default(); MOST_CLIENTS + 1];
        // What was interrupted is found the next time.
        let count = self.epoll.wait(0, &mut found).unwrap_or(0);
        // Whoever left makes room for whoever comes.
        for event in found[..count].iter().filter(|event| event.data() != LISTENER) {
            self.with(event.data(), |client| client.attend(event.event_set()));
        }
        if found[..count].iter().any(|event| event.data() == LISTENER) {
            self.accept();
        }
        self.serve_next(answer);
        self.clients.values().any(|client| client.lines.is_ready())
    }

    /// Serves a request of the client whose turn it is.
    fn serve_next(&mut self, answer: &mut dyn FnMut(&Request) -> Reply) {
        let (before, after) = (self.clients.range(..=self.last_served), self.clients.range(self.last_served + 1..));
        let Some(id) = after.chain(before).find(|(_, client)| client.lines.is_ready()).map(|(id, _)| *id) else {
            return;
        };
        self.last_served = id;
        self.with(id, |client| match client.lines.take() {
            None => Ok(()),
            Some(Ok(request)) => client.reply(&match Request::parse(&request) {
                Ok(request) => answer(&request),
                Err(why) => Reply::Error(why),
            }),
            Some(Err(TooLong)) => {
                let why = format!("{TooLong}, and this is a longer line; the connection is closed");
                client.reply(&Reply::Error(why))?;
                Err(Gone)
            }
        });
    }

    /// Does something for a client, and then either watches it for what it needs, or lets go of it.
    fn with(&mut self, id: u64, act: impl FnOnce(&mut Client) -> Result<(), Gone>) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        let fd = client.stream.as_raw_fd();
        let stays = act(client).is_ok() && !client.is_done() && {
            let wanted = client.wanted();
            let same = wanted == std::mem::replace(&mut client.watched, wanted);
            same || self.epoll.ctl(ControlOperation::Modify, fd, EpollEvent::new(wanted, id)).is_ok()
        };
        if !stays {
            // Closing it does that, too.
            let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
            self.clients.remove(&id);
        }
    }

    fn watch_listener(&self) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN, LISTENER);
        self.epoll.ctl(ControlOperation::Add, self.listener.as_raw_fd(), event)
    }

    fn accept(&mut self) {
        match self.listener.accept() {
            Ok((stream, _)) if self.clients.len() == MOST_CLIENTS => {
                refuse(
                    stream,
                    format!("too many clients: {MOST_CLIENTS} are connected; close one, then connect again"),
                );
            }
            Ok((stream, _)) => {
                if let Err(e) = self.add(stream) {
                    log::debug!("control socket: a client could not be taken: {e}");
                }
            }
            Err(e) => match e.kind() {
                ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::ConnectionAborted => {}
                _ => self.cannot_accept(&e),
            },
        }
    }

    fn add(&mut self, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        let (id, watched) = (self.last_client + 1, EventSet::IN);
        self.epoll.ctl(ControlOperation::Add, stream.as_raw_fd(), EpollEvent::new(watched, id))?;
        self.last_client = id;
        let client = Client { stream, lines: Lines::default(), unread: VecDeque::new(), ended: false, watched };
        self.clients.insert(id, client);
        Ok(())
    }

    /// There is no file for whoever waits. It is told so with the one in reserve; where that is gone, nobody is
    /// accepted until there is one again, else the loop would go on for ever.
    fn cannot_accept(&mut self, why: &io::Error) {
        if !std::mem::replace(&mut self.complained, true) {
            log::warn!("control socket: a client could not be accepted: {why}");
        }
        drop(self.reserve.take());
        if let Ok((stream, _)) = self.listener.accept() {
            refuse(stream, format!("the machine has no open file for another client ({why}); raise its ulimit -n"));
        }
        self.reserve = self.listener.try_clone().ok();
        if self.reserve.is_none() {
            let _ = self.epoll.ctl(ControlOperation::Delete, self.listener.as_raw_fd(), EpollEvent::default());
            self.accepting = false;
        }
    }

    fn accept_again(&mut self) {
        if !self.accepting {
            self.reserve = self.listener.try_clone().ok();
            self.accepting = self.reserve.is_some() && self.watch_listener().is_ok();
        }
    }
}

impl Drop for ControlSocket {
    /// Nobody finds it any more, whoever else still has the file.
    fn drop(&mut self) {
        self.file.remove();
    }
}

/// Says why to one who is not served.
fn refuse(mut stream: UnixStream, why: String) {
    // A new socket takes a line, and nobody waits for one that does not.
    let _ = stream.set_nonblocking(true).and_then(|()| stream.write_all(&line(&Reply::Error(why))));
}

#[cfg(test)]
#[path = "control_socket_test.rs"]
mod control_socket_test;
