//! The control socket without a machine: what clients do to it and to each other.

use super::*;
use crate::control_protocol::Verb;
use proptest::prelude::*;
use std::net::Shutdown;
use std::time::{Duration, Instant};

use vmm_sys_util::tempdir::TempDir;

/// A socket, and what was asked of it.
struct Rig {
    socket: ControlSocket,
    asked: Vec<Verb>,
    path: PathBuf,
    _dir: TempDir,
}

impl Rig {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("control");
        let socket = ControlSocket::new(Place::find(&path).unwrap().listen().unwrap()).unwrap();
        Self { socket, asked: Vec::new(), path, _dir: dir }
    }

    /// A client that waits for what it reads.
    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    fn serve(&mut self) -> bool {
        let asked = &mut self.asked;
        self.socket.serve(&mut |request| {
            asked.push(request.verb);
            Reply::ok(&serde_json::json!({"number": asked.len()}))
        })
    }

    /// Whether its event says that there is something to do.
    fn is_woken(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.socket.event(), events: libc::POLLIN, revents: 0 };
        // SAFETY: the call is told of this one structure.
        unsafe { libc::poll(&raw mut poll, 1, 0) > 0 }
    }

    /// Turns as the event loop does, until there is nothing to do.
    fn settle(&mut self) {
        let end = Instant::now() + Duration::from_secs(60);
        let mut more = true;
        while more || self.is_woken() {
            let before = self.asked.len();
            more = self.serve();
            assert!(self.asked.len() <= before + 1, "one request is served at a time");
            assert!(Instant::now() < end, "it is never done");
        }
    }
}

/// Lines that are there, without waiting for others.
fn replies(stream: &mut UnixStream) -> Vec<String> {
    stream.set_nonblocking(true).unwrap();
    let mut text = Vec::new();
    // Ends at what would wait, or at the end.
    let _ = stream.read_to_end(&mut text);
    String::from_utf8(text).unwrap().lines().map(str::to_owned).collect()
}

fn number(n: usize) -> String {
    format!("{{\"ok\":{{\"number\":{n}}}}}")
}

#[test]
fn control_requests_of_a_client_are_answered_in_order_one_a_turn_and_each_client_has_its_turn() {
    let mut rig = Rig::new();
    let (mut many, mut one) = (rig.connect(), rig.connect());
    many.write_all(b"{\"verb\":\"pause\"}\n\n  \nfly\n{\"verb\":\"status\"}\n").unwrap();
    one.write_all(b"{\"verb\":\"audit\"}\n").unwrap();
    rig.settle();
    assert_eq!(rig.asked, [Verb::Pause, Verb::Audit, Verb::Status]);
    assert_eq!(replies(&mut one), [number(2)]);
    let got = replies(&mut many);
    assert_eq!((&got[0], &got[2], got.len()), (&number(1), &number(3), 3));
    assert!(got[1].starts_with("{\"error\":\"a request is a JSON object"), "{}", got[1]);
}

#[test]
fn control_a_request_in_pieces_is_one_and_what_is_cut_off_is_none() {
    let mut rig = Rig::new();
    let mut client = rig.connect();
    for byte in b"{\"verb\":\"status\"}\n" {
        assert!(rig.asked.is_empty());
        client.write_all(&[*byte]).unwrap();
        rig.settle();
    }
    assert_eq!(rig.asked, [Verb::Status]);
    client.write_all(b"{\"verb\":\"quit\"}").unwrap();
    drop(client);
    rig.settle();
    assert_eq!((rig.asked.len(), rig.socket.clients.len()), (1, 0));
}

#[test]
fn control_a_client_that_ends_its_sending_is_answered_first() {
    let mut rig = Rig::new();
    let mut client = rig.connect();
    client.write_all(b"{\"verb\":\"pause\"}\n{\"verb\":\"resume\"}\n").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    rig.settle();
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    assert_eq!(text.lines().collect::<Vec<_>>(), [number(1), number(2)]);
    assert!(rig.socket.clients.is_empty() && !rig.is_woken());
    // One that is gone when it is served is let go of.
    let mut client = rig.connect();
    client.write_all(b"{\"verb\":\"pause\"}\n").unwrap();
    drop(client);
    rig.settle();
    assert_eq!((rig.asked.len(), rig.socket.clients.len()), (3, 0));
}

#[test]
fn control_a_line_without_an_end_is_one_error_and_the_end_of_its_connection() {
    let mut rig = Rig::new();
    let (mut endless, mut other) = (rig.connect(), rig.connect());
    rig.settle();
    // It may write on meanwhile.
    endless.write_all(&[b'a'; 3 * LONGEST]).unwrap();
    rig.settle();
    let got = replies(&mut endless);
    assert_eq!(got.len(), 1);
    assert!(got[0].starts_with("{\"error\":\"a request has 4096 bytes at most"), "{}", got[0]);
    assert!(endless.write_all(b"a").is_err());
    assert_eq!(rig.socket.clients.len(), 1);
    other.write_all(b"{\"verb\":\"status\"}\n").unwrap();
    rig.settle();
    assert_eq!(replies(&mut other), [number(1)]);
}

/// The longest request.
const LONGEST: usize = crate::control_protocol::LONGEST_REQUEST;

#[test]
fn control_one_more_than_the_most_clients_is_told_so_and_the_others_are_served() {
    let mut rig = Rig::new();
    let mut clients: Vec<UnixStream> = (0..MOST_CLIENTS).map(|_| rig.connect()).collect();
    rig.settle();
    for _ in 0..3 {
        let mut more = rig.connect();
        rig.settle();
        let mut text = String::new();
        more.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("{\"error\":\"too many clients: 16 are connected"), "{text}");
    }
    clients[3].write_all(b"{\"verb\":\"status\"}\n").unwrap();
    rig.settle();
    assert_eq!(replies(&mut clients[3]), [number(1)]);
    // One place is free again, and nobody has looked since.
    drop(clients.pop());
    let mut next = rig.connect();
    next.write_all(b"{\"verb\":\"status\"}\n").unwrap();
    rig.settle();
    assert_eq!(replies(&mut next), [number(2)]);
    assert_eq!(rig.socket.clients.len(), MOST_CLIENTS);
}

#[test]
fn control_a_client_that_does_not_read_is_cut_off_and_holds_up_nobody() {
    let mut rig = Rig::new();
    let (mut deaf, mut other) = (rig.connect(), rig.connect());
    deaf.set_nonblocking(true).unwrap();
    let requests = b"{\"verb\":\"status\"}\n".repeat(1000);
    let mut most = 0;
    let mut rounds = 0;
    loop {
        // As much as is taken.
        let _ = deaf.write(&requests);
        rig.serve();
        let Some(client) = rig.socket.clients.get(&1) else { break };
        most = most.max(client.unread.len());
        rounds += 1;
        assert!(rounds < 100_000, "it is never cut off");
        if rounds % 10_000 == 0 {
            other.write_all(b"{\"verb\":\"audit\"}\n").unwrap();
            rig.serve();
            rig.serve();
            assert_eq!(replies(&mut other).len(), 1);
        }
    }
    assert!(most > MOST_UNREAD / 2 && most <= MOST_UNREAD, "{most} bytes were kept");
    assert_eq!(rig.socket.clients.len(), 1);
    rig.settle();
}

#[test]
fn control_a_slow_reader_gets_every_reply() {
    let mut rig = Rig::new();
    let mut client = rig.connect();
    client.set_nonblocking(true).unwrap();
    // Several times what a socket takes, and less than is kept.
    let asked = 20_000;
    let text = b"{\"verb\":\"status\"}\n".repeat(asked);
    let mut rest = &text[..];
    while !rest.is_empty() {
        rest = &rest[client.write(rest).unwrap_or(0)..];
        rig.settle();
    }
    assert!(!rig.socket.clients[&1].unread.is_empty(), "the socket took it all");
    let mut got = 0;
    while got < asked {
        let mut piece = [0; 1000];
        match client.read(&mut piece) {
            Ok(len) => got += piece[..len].iter().filter(|byte| **byte == b'\n').count(),
            Err(_) => rig.settle(),
        }
    }
    rig.settle();
    assert!(rig.socket.clients[&1].unread.is_empty() && !rig.is_woken());
}

#[test]
fn control_nobody_else_can_connect_and_the_file_goes_if_it_is_ours() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("control");
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
    // Not even before its mode is set.
    let early = dir.as_path().join("early");
    drop(bind(&early).unwrap());
    assert_eq!(mode(&early) & 0o077, 0);
    let socket = Place::find(&path).unwrap().listen().unwrap();
    assert_eq!(mode(&path), 0o600);
    drop(socket);
    assert!(!path.exists());

    // Somebody else's by now.
    let socket = Place::find(&path).unwrap().listen().unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(&path, "theirs").unwrap();
    drop(socket);
    assert_eq!(fs::read(&path).unwrap(), b"theirs");
}

#[test]
fn control_a_socket_that_was_left_behind_is_replaced_and_everything_else_is_left_alone() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.as_path().join(name);
    drop(UnixListener::bind(at("stale")).unwrap());
    let place = Place::find(&at("stale")).unwrap();
    // Found, and not touched yet.
    assert_eq!(place.stale, identity(&at("stale")).ok());
    let socket = place.listen().unwrap();
    UnixStream::connect(at("stale")).unwrap();
    // One that is not stale any more when it would be removed.
    let place = Place { path: at("stale"), stale: Some((0, 0)) };
    assert!(matches!(place.listen(), Err(Error::Taken { .. })));
    UnixStream::connect(at("stale")).unwrap();
    drop(socket);

    let _listener = UnixListener::bind(at("live")).unwrap();
    let _datagrams = std::os::unix::net::UnixDatagram::bind(at("datagrams")).unwrap();
    fs::write(at("file"), "mine").unwrap();
    fs::create_dir(at("folder")).unwrap();
    std::os::unix::fs::symlink(at("nowhere"), at("link")).unwrap();
    let long = dir.as_path().join("x".repeat(LONGEST_PATH));
    for (path, part) in [
        (at("live"), "it takes connections); end that process"),
        (at("datagrams"), "another process has a socket there"),
        (at("file"), "a file that is no socket is there; remove it"),
        (at("folder"), "a file that is no socket is there"),
        (at("link"), "a file that is no socket is there"),
        (at("file").join("control"), "use a path in a folder that is there"),
        (at("none").join("control"), "use a path in a folder that is there"),
        (long, "use a shorter one"),
    ] {
        let before = fs::read_dir(dir.as_path()).unwrap().count();
        let why = Place::find(&path).and_then(Place::listen).unwrap_err().to_string();
        assert!(why.contains(part) && why.contains(path.to_str().unwrap()), "{why}");
        assert_eq!(fs::read_dir(dir.as_path()).unwrap().count(), before);
    }
    assert_eq!(fs::read(at("file")).unwrap(), b"mine");
}

#[test]
fn control_the_longest_path_that_there_is_works() {
    let dir = TempDir::new().unwrap();
    let folder = dir.as_path().as_os_str().len();
    for (len, fits) in [(LONGEST_PATH, true), (LONGEST_PATH + 1, false)] {
        let path = dir.as_path().join("x".repeat(len - folder - 1));
        assert_eq!(path.as_os_str().len(), len);
        assert_eq!(Place::find(&path).and_then(Place::listen).is_ok(), fits);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever comes in whatever pieces: one error for each line with text, and nothing is done.
    #[test]
    fn control_garbage_is_an_error_a_line_and_changes_nothing(
        lines in prop::collection::vec(
            prop::collection::vec(any::<u8>().prop_filter("no end", |byte| *byte != b'\n'), 0..80), 0..40,
        ),
        piece in 1usize..200,
    ) {
        let mut rig = Rig::new();
        let mut client = rig.connect();
        let text: Vec<u8> = lines.iter().flat_map(|line| line.iter().copied().chain([b'\n'])).collect();
        for piece in text.chunks(piece) {
            client.write_all(piece).unwrap();
            rig.serve();
        }
        rig.settle();
        let got = replies(&mut client);
        let wanted = lines.iter().filter(|line| !line.trim_ascii().is_empty()).count();
        prop_assert_eq!(got.len(), wanted);
        prop_assert!(got.iter().all(|reply| matches!(serde_json::from_str(reply), Ok(Reply::Error(_)))));
        prop_assert!(rig.asked.is_empty());
        client.set_nonblocking(false).unwrap();
        client.write_all(b"{\"verb\":\"status\"}\n").unwrap();
        rig.settle();
        prop_assert_eq!(replies(&mut client), [number(1)]);
    }
}
