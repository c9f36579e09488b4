//! A client of a machine's control socket.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::control_protocol::{MOST_UNREAD, Reply, Request, line};

/// A connection, over which requests are made one by one.
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects. An error means that no machine is there.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        UnixStream::connect(socket).map(|stream| Self { stream: BufReader::new(stream) })
    }

    /// Asks, and waits for the reply.
    pub fn ask(&mut self, request: &Request) -> io::Result<Reply> {
        // One that is not taken as a client was told why before it asked.
        let asked = self.stream.get_mut().write_all(&line(request));
        let mut reply = Vec::new();
        // A line more than a machine says.
        let read = self.stream.by_ref().take(MOST_UNREAD as u64 + 1).read_until(b'\n', &mut reply);
        if !reply.ends_with(b"\n") {
            asked?;
            read?;
            return Err(io::Error::new(ErrorKind::UnexpectedEof, "it ended before it replied"));
        }
        serde_json::from_slice(&reply)
            .map_err(|_| io::Error::new(ErrorKind::InvalidData, "what listens there speaks something else"))
    }
}
