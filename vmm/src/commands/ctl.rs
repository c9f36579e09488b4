//! `causeway ctl`: one request to a machine's control socket, and its reply.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::control_protocol::{DirtyAction, MOST_UNREAD, Reply, Request, Verb, line};
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
    /// Of dirty: what is done, start, read or stop. Of remove: the device's id
    #[arg(value_name = "ACTION|ID")]
    what: Option<String>,
    /// Of add: the device, as `causeway run --device` takes it. Of dirty: this device alone, by its id, with those of
    /// its host group
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Of dirty start: an unmap loses no write, whatever that costs
    #[arg(long)]
    close_race: bool,
    /// Of dirty read: writes the bitmap there, a bit for each 4 KiB of guest-physical addresses from 0 on, the lowest
    /// first, instead of the ranges
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

impl CtlArgs {
    fn request(&self) -> Result<Request, String> {
        let Self { verb, what, device, .. } = self;
        let (mut action, mut device) = (None, device.clone());
        match (verb, what) {
            (_, None) => {}
            (Verb::Remove, Some(id)) if device.is_none() => device = Some(id.clone()),
            (Verb::Dirty, Some(text)) => {
                let parsed = DirtyAction::from_str(text, false);
                action = Some(parsed.map_err(|_| format!("`{text}` is not start, read or stop"))?);
            }
            (_, Some(text)) => return Err(format!("`{text}` is too much")),
        }
        let close_race = self.close_race.then_some(true);
        Ok(Request { action, device, close_race, ..(*verb).into() })
    }
}

/// Does what the command line says. Gives back the exit code.
pub fn run(args: &CtlArgs) -> ExitCode {
    let parsed = args.request();
    let wrong = parsed.as_ref().map_or_else(|why| Some(why.clone()), |request| request.check().err());
    let request = parsed.unwrap_or_else(|_| args.verb.into());
    let misplaced = args.out.is_some() && request.action != Some(DirtyAction::Read);
    let wrong = wrong.or_else(|| misplaced.then(|| "only dirty read has an --out".to_owned()));
    if let Some(wrong) = wrong {
        say(format_args!("causeway ctl: {wrong}"));
        return ExitCode::from(USAGE);
    }
    let asked = ask(&args.socket, &request).and_then(|reply| match (&args.out, reply) {
        (Some(file), Reply::Ok(first)) => write_bitmap(&args.socket, &first, file),
        (_, reply) => Ok(reply),
    });
    match asked {
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

/// What a machine says of dirty pages, as far as it is needed here.
#[derive(Deserialize)]
struct DirtyRanges {
    pages: u64,
    page_size: u64,
    ranges: Vec<(u64, u64)>,
    next: Option<u64>,
    devices: serde_json::Value,
}

/// Asks for what follows `first`, and writes all of it to `file`. Gives back what is told instead of the ranges.
fn write_bitmap(socket: &Path, first: &RawValue, file: &Path) -> io::Result<Reply> {
    let parse = |object: &RawValue| serde_json::from_str::<DirtyRanges>(object.get()).map_err(io::Error::from);
    let mut part = parse(first)?;
    let DirtyRanges { pages, page_size, devices, .. } = &part;
    let told = serde_json::json!({"pages": pages, "page_size": page_size, "devices": devices, "out": file});
    let mut bitmap = Vec::new();
    loop {
        for (gpa, len) in part.ranges {
            for page in gpa / part.page_size..(gpa + len) / part.page_size {
                let byte = (page / 8) as usize;
                bitmap.resize(bitmap.len().max(byte + 1), 0u8);
                bitmap[byte] |= 1 << (page % 8);
            }
        }
        let Some(from) = part.next else { break };
        let rest = Request { action: Some(DirtyAction::Read), from: Some(from), ..Verb::Dirty.into() };
        match ask(socket, &rest)? {
            Reply::Ok(next) => part = parse(&next)?,
            refused => return Ok(refused),
        }
    }
    let written = std::fs::write(file, bitmap);
    Ok(written.map_or_else(
        |e| Reply::Error(format!("{} cannot be written: {e}; what was read is lost", file.display())),
        |()| Reply::ok(&told),
    ))
}

fn ask(socket: &Path, request: &Request) -> io::Result<Reply> {
    let mut stream = UnixStream::connect(socket)?;
    // One that is not taken as a client was told why before it asked.
    let asked = stream.write_all(&line(request));
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
