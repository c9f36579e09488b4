//! A machine moves into another process while it runs: `causeway ctl PATH migrate ADDRESS`, and there
//! `causeway run --incoming unix:PATH`.
//!
//! ```text
//!  source                                    destination
//!  what the machine is made from         ►   makes it
//!  RAM, while the guest runs             ►   puts it in place
//!  what was written meanwhile, again     ►
//!  the machine is held: the rest, state  ►   takes it, and is ready
//!                                        ◄   ready, or what does not fit
//!  go on                                 ►
//!  the source ends                       ◄   it goes on here: the last word, and then it does
//! ```
//!
//! Nowhere runs a guest that may run elsewhere. Up to "go on" the source can: whatever fails, its guest runs. From
//! there on the destination may, and does, whatever becomes of its last word. The source runs its guest again only
//! where it is certain that this word was never said: the other end closed the connection without it. Where that is not
//! certain, because nothing comes or the connection broke on its way, the guest stays held here until somebody resumes
//! it who knows.
//!
//! What was written is what KVM says of vCPUs, the bridge of devices whose I/O is in the host, and RAM's own log of
//! emulated DMA and of the unit. A function of another process is stopped before the log of its DMA is read last.

use std::fmt;
use std::io::{self, BufWriter, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vfio_bridge::{DirtyPages, DirtyRace, PAGE_SIZE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::Machine;
use super::saving::{Description, Held, MachineState};
use super::snapshot::{RamDigest, nonzero_pages};
use crate::kvm::vm;
use crate::listening::listen;
use crate::signals::{self, Signals, Woken};

const FORM: &str = "causeway migration";
/// Of what is said, the only one that is understood.
const VERSION: u32 = 2;
/// The longest message but those of pages: bytes.
const MOST: u64 = 256 << 20;
/// How long the other end may take for what it is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pages that are left for when the machine is held, if they get as few.
const FEW: u64 = 256;
/// Rounds of pages that were written again, at most: a guest may write faster than they are sent.
const MOST_ROUNDS: u32 = 20;

const HELLO: u8 = 1;
const PAGE: u8 = 2;
const STATE: u8 = 3;
const READY: u8 = 4;
const REFUSED: u8 = 5;
const GO: u8 = 6;
const GOES_ON: u8 = 7;

/// Where the other process is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// Host and port.
    Tcp(String),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            Some(("tcp", place)) if place.contains(':') => Ok(Self::Tcp(place.to_owned())),
            _ => Err(format!("`{text}` is not unix:PATH or tcp:HOST:PORT")),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(place) => write!(f, "tcp:{place}"),
        }
    }
}

/// A connection.
enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    fn connect(to: &Address) -> io::Result<Self> {
        let stream = match to {
            Address::Unix(path) => Self::Unix(UnixStream::connect(path)?),
            Address::Tcp(place) => Self::Tcp(TcpStream::connect(place)?),
        };
        stream.with_patience()
    }

    fn with_patience(self) -> io::Result<Self> {
        match &self {
            Self::Unix(stream) => {
                stream.set_read_timeout(Some(PATIENCE)).and_then(|()| stream.set_write_timeout(Some(PATIENCE)))
            }
            Self::Tcp(stream) => {
                let timeouts =
                    stream.set_read_timeout(Some(PATIENCE)).and_then(|()| stream.set_write_timeout(Some(PATIENCE)));
                timeouts.and_then(|()| stream.set_nodelay(true))
            }
        }?;
        Ok(self)
    }
}

impl Read for Stream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(bytes),
            Self::Tcp(stream) => stream.read(bytes),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(bytes),
            Self::Tcp(stream) => stream.write(bytes),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Hello {
    form: String,
    version: u32,
    machine: Description,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Last {
    state: MachineState,
    /// The digest of all of RAM, if it was asked for.
    sha256: Option<String>,
}

fn send(to: &mut impl Write, kind: u8, payload: &[u8]) -> io::Result<()> {
    to.write_all(&[kind])?;
    to.write_all(&(payload.len() as u64).to_le_bytes())?;
    to.write_all(payload)
}

fn send_page(to: &mut impl Write, gpa: u64, page: &[u8]) -> io::Result<()> {
    to.write_all(&[PAGE])?;
    to.write_all(&(8 + page.len() as u64).to_le_bytes())?;
    to.write_all(&gpa.to_le_bytes())?;
    to.write_all(page)
}

/// The next message: its kind and its content.
fn receive(from: &mut impl Read) -> io::Result<(u8, Vec<u8>)> {
    let (mut kind, mut len) = ([0], [0; 8]);
    from.read_exact(&mut kind)?;
    from.read_exact(&mut len)?;
    let len = u64::from_le_bytes(len);
    let most = if kind[0] == PAGE { 8 + PAGE_SIZE } else { MOST };
    if len > most {
        return Err(io::Error::other(format!("a message of {len} bytes is longer than there can be")));
    }
    let mut content = Vec::new();
    from.take(len).read_to_end(&mut content)?;
    if content.len() as u64 == len { Ok((kind[0], content)) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// A machine that moved.
#[derive(Serialize, Debug)]
pub struct Moved {
    /// Where it is now.
    pub migrated: String,
    /// Rounds of pages that were written again while the guest ran.
    pub rounds: u32,
    /// Pages that were sent, in all.
    pub pages: u64,
    /// Those of them that were sent while the machine was held.
    pub last_pages: u64,
    /// Milliseconds from when the machine was held until the other one was told to go on.
    pub down_ms: u64,
}

/// Why a machine is not known to have moved: a sentence.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NotMoved {
    /// It goes on here.
    Here(String),
    /// It may run there, and is held here until it is resumed.
    Unsure(String),
}

impl From<String> for NotMoved {
    fn from(why: String) -> Self {
        Self::Here(why)
    }
}

/// What the last word of the destination means for the source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum LastWord {
    /// The guest runs there.
    Said,
    /// It was never said, and will not be.
    Never,
    /// Nobody knows.
    Unsure,
}

/// What came, or did not, after the destination was told to go on. What a Unix socket has is had by who reads, also
/// after the other end is gone; on the way through a network it may be lost.
fn last_word(came: &io::Result<(u8, Vec<u8>)>, is_unix: bool) -> LastWord {
    match came {
        Ok((GOES_ON, _)) => LastWord::Said,
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => LastWord::Never,
        Err(e) if e.kind() == io::ErrorKind::ConnectionReset && is_unix => LastWord::Never,
        _ => LastWord::Unsure,
    }
}

impl Machine {
    /// Moves the machine into the process that waits at `to`. When this returns `Ok`, the guest runs there, and this
    /// machine is held for good. `options` are those of its command line; `verify`: all of RAM is compared before.
    ///
    /// # Errors
    /// The reason, and where the guest is.
    pub fn migrate(&mut self, to: &Address, options: Vec<String>, verify: bool) -> Result<Moved, NotMoved> {
        self.can_be_saved()?;
        if self.dirty.is_on() {
            let why = "which memory devices write is tracked for somebody else; end that first (`dirty stop`)";
            return Err(NotMoved::Here(why.to_owned()));
        }
        let stream = Stream::connect(to).map_err(|e| {
            format!("nobody is reached at {to} ({e}); start `causeway run --incoming` with it there first")
        })?;
        self.start_dirty(None, DirtyRace::Closed)?;
        let logging = vm::log_dirty(&self.vm, &self.ram, true).map_err(|e| NotMoved::Here(e.to_string()));
        let moved = logging.and_then(|()| self.send_all(stream, to, options, verify));
        if moved.is_err() {
            // Nothing of it stays.
            vm::log_dirty(&self.vm, &self.ram, false).unwrap_or_else(|e| log::warn!("{e}"));
            self.stop_dirty(None).unwrap_or_else(|e| log::warn!("{e}"));
        }
        moved
    }

    fn send_all(
        &mut self,
        stream: Stream,
        to: &Address,
        options: Vec<String>,
        verify: bool,
    ) -> Result<Moved, NotMoved> {
        let mut stream = BufWriter::with_capacity(1 << 20, stream);
        let lost = |e: io::Error| format!("the connection to {to} is lost: {e}");
        let written = |e: serde_json::Error| format!("the state has no form: {e}");
        let hello = Hello { form: FORM.to_owned(), version: VERSION, machine: self.description(options) };
        send(&mut stream, HELLO, &serde_json::to_vec(&hello).map_err(written)?).map_err(lost)?;
        // What vCPUs and devices write from here on is in their logs.
        let mut pages = 0;
        let gpas: Vec<(u64, u64)> = self.ram.iter().map(|region| (region.start_addr().0, region.len())).collect();
        let gpa_of = |at: u64| {
            let mut base = 0;
            let of = gpas.iter().find_map(|(gpa, len)| {
                let found = (at - base < *len).then(|| gpa + (at - base));
                base += len;
                found
            });
            of.unwrap_or(at)
        };
        nonzero_pages(&self.ram, |at, page| {
            pages += 1;
            send_page(&mut stream, gpa_of(at), page)
        })
        .map_err(lost)?;
        let mut rounds = 0;
        loop {
            let dirty = self.written()?;
            pages += self.send_pages(&mut stream, &dirty).map_err(lost)?;
            stream.flush().map_err(lost)?;
            rounds += 1;
            if self.control.is_stopping() {
                return Err(NotMoved::Here("the guest ends or resets just now; ask again when it runs".to_owned()));
            }
            if dirty.count() <= FEW || rounds == MOST_ROUNDS {
                break;
            }
        }
        let start = Instant::now();
        let held = self.hold()?;
        let handed = self.state(&held).and_then(|state| {
            let dirty = self.written()?;
            let last_pages = self.send_pages(&mut stream, &dirty).map_err(lost)?;
            let sha256 = verify.then(|| {
                let mut digest = RamDigest::default();
                // It has no error of its own.
                let _ = nonzero_pages(&self.ram, |at, page| {
                    digest.add(at, page);
                    Ok::<(), ()>(())
                });
                digest.end()
            });
            let last = serde_json::to_vec(&Last { state, sha256 }).map_err(written)?;
            send(&mut stream, STATE, &last).and_then(|()| stream.flush()).map_err(lost)?;
            match receive(stream.get_mut()).map_err(lost)? {
                (READY, _) => {}
                (REFUSED, why) => return Err(format!("{to} refuses it: {}", String::from_utf8_lossy(&why))),
                _ => return Err(format!("{to} says what is not understood")),
            }
            // Whoever is told a part of it is not told.
            send(stream.get_mut(), GO, &[]).map_err(lost)?;
            Ok((last_pages, start.elapsed().as_millis() as u64))
        });
        let (last_pages, down_ms) = match handed {
            Ok(handed) => handed,
            Err(why) => {
                self.let_go(held);
                return Err(NotMoved::Here(why));
            }
        };
        let came = receive(stream.get_mut());
        let why = || match &came {
            Ok(_) => format!("{to} was told to go on, and says what is not understood"),
            Err(e) => format!("{to} was told to go on, and does not say that it does: {e}"),
        };
        match last_word(&came, matches!(to, Address::Unix(_))) {
            LastWord::Said => {
                let pages = pages + last_pages;
                self.paused = true;
                Ok(Moved { migrated: to.to_string(), rounds, pages, last_pages, down_ms })
            }
            LastWord::Never => {
                self.let_go(held);
                Err(NotMoved::Here(why()))
            }
            LastWord::Unsure => {
                self.paused = true;
                self.unsure = Some(held);
                Err(NotMoved::Unsure(why()))
            }
        }
    }

    /// What was written since the last time, by anybody.
    fn written(&self) -> Result<DirtyPages, String> {
        let mut pages = self.written_by_devices()?;
        for (slot, region) in (0..).zip(self.ram.iter()) {
            let log = self.vm.get_dirty_log(slot, region.len() as usize);
            let log = log.map_err(|e| format!("KVM_GET_DIRTY_LOG: {e}"))?;
            for (at, word) in (0u64..).zip(log) {
                for bit in (0..64).filter(|bit| word & (1 << bit) != 0) {
                    pages.mark(region.start_addr().0 + (at * 64 + bit) * PAGE_SIZE, PAGE_SIZE);
                }
            }
        }
        Ok(pages)
    }

    /// Sends these pages, as far as they are RAM. Gives back how many that are.
    fn send_pages(&self, to: &mut impl Write, pages: &DirtyPages) -> io::Result<u64> {
        let (mut sent, mut page) = (0, [0; PAGE_SIZE as usize]);
        for range in pages.ranges(PAGE_SIZE) {
            for gpa in (range.first..=range.last).step_by(PAGE_SIZE as usize) {
                if self.ram.read_slice(&mut page, GuestAddress(gpa)).is_ok() {
                    send_page(to, gpa, &page)?;
                    sent += 1;
                }
            }
        }
        Ok(sent)
    }

    /// Takes what `incoming` has for a machine that was made from its description, and has not run. Nothing of it runs
    /// yet, and the other one is held.
    ///
    /// # Errors
    /// A sentence with the reason. The machine is not to be run; the other one goes on.
    pub fn arrive(&mut self, mut incoming: Incoming) -> Result<Arrived, String> {
        match self.take_all(&mut incoming) {
            Ok(held) => Ok(Arrived { incoming, held }),
            Err(why) => {
                // It may be the connection that failed.
                let _ = send(&mut incoming.stream, REFUSED, why.as_bytes());
                Err(why)
            }
        }
    }

    /// Takes the guest over, now that nothing can fail here. When this returns, the vCPUs are to run, and the other
    /// machine does not any more.
    ///
    /// # Errors
    /// A sentence with the reason. The machine is not to be run; the other one goes on.
    pub fn take_guest(&mut self, arrived: Arrived) -> Result<(), String> {
        let Arrived { mut incoming, held } = arrived;
        let lost = |e: io::Error| format!("the connection is lost, and the machine goes on where it was: {e}");
        send(&mut incoming.stream, READY, &[]).map_err(lost)?;
        match receive(&mut incoming.stream).map_err(lost)? {
            (GO, _) => {}
            _ => return Err("the other process says what is not understood".to_owned()),
        }
        // The other one does not run until it has this or sees the end of the connection: so the guest is here,
        // whatever becomes of it.
        if let Err(e) = send(&mut incoming.stream, GOES_ON, &[]) {
            log::warn!("the guest goes on here, and the process that it comes from could not be told: {e}");
        }
        self.begin(held);
        Ok(())
    }

    fn take_all(&mut self, incoming: &mut Incoming) -> Result<Held, String> {
        let lost = |e: io::Error| format!("the connection is lost: {e}");
        let Last { state, sha256 } = loop {
            let (kind, content) = receive(&mut incoming.stream).map_err(lost)?;
            match (kind, content.split_first_chunk::<8>()) {
                (PAGE, Some((gpa, page))) => {
                    let gpa = GuestAddress(u64::from_le_bytes(*gpa));
                    self.ram.write_slice(page, gpa).map_err(|e| format!("a page cannot be put into RAM: {e}"))?;
                }
                (STATE, _) => {
                    break serde_json::from_slice(&content).map_err(|e| format!("the state is not understood: {e}"))?;
                }
                _ => return Err("a message is not understood".to_owned()),
            }
        };
        if let Some(wanted) = sha256 {
            let mut digest = RamDigest::default();
            // It has no error of its own.
            let _ = nonzero_pages(&self.ram, |at, page| {
                digest.add(at, page);
                Ok::<(), ()>(())
            });
            if digest.end() != wanted {
                return Err("the memory that arrived is not that of the machine".to_owned());
            }
        }
        self.restore(state)
    }
}

/// A machine that came, and does not run yet. The other one is held as long as this is there.
pub struct Arrived {
    incoming: Incoming,
    held: Held,
}

/// A machine that comes from another process.
pub struct Incoming {
    stream: Stream,
    /// What it is made from.
    pub machine: Description,
}

impl Incoming {
    /// Waits at `address` for a machine.
    ///
    /// # Errors
    /// A sentence with the reason.
    pub fn wait(address: &Address) -> Result<Self, String> {
        let failed = |e: io::Error| format!("{address} cannot be listened at: {e}; use another address");
        let stream = match address {
            Address::Unix(path) => {
                // What ends us is heard here: the file is not to stay.
                let signals = Signals::block().map_err(failed)?;
                let listener = listen(path).map_err(failed)?;
                let woken = signals.wait(Some(listener.as_raw_fd()), None);
                let stream = match woken {
                    Ok(Woken::Event) => listener.accept().map(|(stream, _)| Stream::Unix(stream)),
                    Ok(Woken::Ended(_)) | Err(_) => Err(io::ErrorKind::Interrupted.into()),
                    // There is no deadline.
                    Ok(Woken::TimedOut) => Err(io::ErrorKind::TimedOut.into()),
                };
                // Nobody else is to find it.
                let _ = std::fs::remove_file(path);
                if let Ok(Woken::Ended(signal)) = woken {
                    signals::die_by(signal);
                }
                stream
            }
            Address::Tcp(place) => {
                let listener = TcpListener::bind(place).map_err(failed)?;
                listener.accept().map(|(stream, _)| Stream::Tcp(stream))
            }
        };
        let mut stream = stream.and_then(Stream::with_patience).map_err(failed)?;
        let understood = |why: String| format!("what comes at {address} is no machine of causeway: {why}");
        let (kind, content) = receive(&mut stream).map_err(|e| understood(e.to_string()))?;
        let hello: Hello = match kind {
            HELLO => serde_json::from_slice(&content).map_err(|e| understood(e.to_string()))?,
            _ => return Err(understood("it does not say what it is".to_owned())),
        };
        if (hello.form.as_str(), hello.version) != (FORM, VERSION) {
            let why = format!("it has version {} of `{}`, and version {VERSION} is known", hello.version, hello.form);
            let _ = send(&mut stream, REFUSED, why.as_bytes());
            return Err(understood(why));
        }
        Ok(Self { stream, machine: hello.machine })
    }

    /// Tells the other process that the machine cannot be made here.
    pub fn refuse(mut self, why: &str) {
        // It may be gone.
        let _ = send(&mut self.stream, REFUSED, why.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a14_addresses_have_their_two_forms() {
        for text in ["unix:/a", "unix:a:b", "tcp:host:1", "tcp:[::1]:1"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        for text in ["", "unix:", "unix", "tcp:host", "udp:host:1", "/a"] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }

    #[test]
    fn a14_messages_come_back_and_none_is_longer_than_there_can_be() {
        let mut bytes = Vec::new();
        send(&mut bytes, STATE, b"abc").unwrap();
        send_page(&mut bytes, 0x5000, &[7; PAGE_SIZE as usize]).unwrap();
        let mut rest = &bytes[..];
        assert_eq!(receive(&mut rest).unwrap(), (STATE, b"abc".to_vec()));
        let (kind, content) = receive(&mut rest).unwrap();
        assert_eq!((kind, &content[..9], rest.len()), (PAGE, &[0, 0x50, 0, 0, 0, 0, 0, 0, 7][..], 0));
        for (kind, len) in [(PAGE, 9 + PAGE_SIZE), (STATE, MOST + 1), (0, u64::MAX)] {
            let head = [&[kind][..], &len.to_le_bytes()].concat();
            assert!(receive(&mut &head[..]).unwrap_err().to_string().contains("longer"), "{kind}");
        }
    }

    #[test]
    fn a14_a_source_goes_on_only_where_the_last_word_was_certainly_not_said() {
        let failed = |kind: io::ErrorKind| Err(io::Error::from(kind));
        for (came, unix, tcp) in [
            (Ok((GOES_ON, Vec::new())), LastWord::Said, LastWord::Said),
            (failed(io::ErrorKind::UnexpectedEof), LastWord::Never, LastWord::Never),
            // Data may have been lost with the connection.
            (failed(io::ErrorKind::ConnectionReset), LastWord::Never, LastWord::Unsure),
            (failed(io::ErrorKind::WouldBlock), LastWord::Unsure, LastWord::Unsure),
            (failed(io::ErrorKind::TimedOut), LastWord::Unsure, LastWord::Unsure),
            (failed(io::ErrorKind::Other), LastWord::Unsure, LastWord::Unsure),
            (Ok((READY, Vec::new())), LastWord::Unsure, LastWord::Unsure),
            (Ok((REFUSED, Vec::new())), LastWord::Unsure, LastWord::Unsure),
        ] {
            assert_eq!((last_word(&came, true), last_word(&came, false)), (unix, tcp), "{came:?}");
        }
    }

    proptest! {
        #[test]
        fn a14_no_garbage_is_a_whole_message_that_ends_early(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Ok((_, content)) = receive(&mut &bytes[..]) {
                prop_assert!(content.len() + 9 <= bytes.len());
            }
        }
    }
}
