//! `causeway ctl`: one request to a machine's control socket, and its reply.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use crate::control_protocol::{MOST_UNREAD, Reply, Request, Verb, line};
use crate::exit::{DENIED, REFUSED, USAGE};
use crate::messages::{say, tell};

/// `causeway ctl`.
#[derive(Args, Debug)]
#[command(after_help = "\
The reply is one JSON object on stdout. Exit codes: 0 it was done; 1 the machine refuses it; 2 usage;
4 no machine is there, or it ended before it replied.")]
pub struct CtlArgs {
    /// The socket of `causeway run --socket PATH`
    #[arg(value_name = "PATH")]
    socket: PathBuf,
    /// What is asked for
    #[arg(value_name = "VERB")]
    verb: Verb,
}

/// Does what the command line says. Gives back the exit code.
pub fn run(args: &CtlArgs) -> ExitCode {
    match ask(&args.socket, args.verb) {
        Ok(Reply::Ok(object)) => {
            tell(format_args!("{object}"));
            ExitCode::SUCCESS
        }
        Ok(Reply::Error(why)) => {
            say(format_args!("causeway ctl: {why}"));
            ExitCode::from(DENIED)
        }
        Err(e) => {
            let (code, remedy) = match e.kind() {
                ErrorKind::InvalidInput => (USAGE, "use a shorter path"),
                ErrorKind::PermissionDenied => (REFUSED, "the machine is another user's"),
                _ => (REFUSED, "the path is that of `causeway run --socket`"),
            };
            say(format_args!("causeway ctl: no machine replies at {}: {e}; {remedy}", args.socket.display()));
            ExitCode::from(code)
        }
    }
}

fn ask(socket: &Path, verb: Verb) -> io::Result<Reply> {
    let mut stream = UnixStream::connect(socket)?;
    // One that is not taken as a client was told why before it asked.
    let asked = stream.write_all(&line(&Request { verb }));
    let mut reply = Vec::new();
    // A line more than a machine says.
    let read = BufReader::new(stream.take(MOST_UNREAD as u64 + 1)).read_until(b'\n', &mut reply);
    if !reply.ends_with(b"\n") {
        asked?;
        read?;
        return Err(io::Error::new(ErrorKind::UnexpectedEof, "it ended before it replied"));
    }
    serde_json::from_slice(&reply)
        .map_err(|_| io::Error::new(ErrorKind::InvalidData, "what listens there speaks something else"))
}
