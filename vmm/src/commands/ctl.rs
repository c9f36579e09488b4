//! `causeway ctl`: one request to a machine's control socket, and its reply.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::commands::client::Client;
use crate::commands::iommu::{self, Shown};
use crate::commands::top::{self, Ended};
use crate::control_protocol::{Action, Reply, Request, Verb};
use crate::exit::{DENIED, DIFFERS, REFUSED, USAGE};
use crate::machine::migration::Address;
use crate::messages::{say, tell};
use crate::signals;

/// `causeway ctl`.
#[derive(Args, Debug)]
#[command(after_help = "\
The reply is one JSON object on stdout; that of iommu is text, and with --json an object, too; top is a screen. Exit
codes: 0 it was done; 1 the machine refuses it; 2 usage; 4 no machine is there, or it ended before it replied; 8 iommu
mappings found differences.")]
pub struct CtlArgs {
    /// The socket of `causeway run --socket PATH`
    #[arg(value_name = "PATH")]
    socket: PathBuf,
    /// What is asked for
    #[arg(value_name = "VERB")]
    verb: Verb,
    /// Of dirty: what is done, start, read or stop. Of iommu: what is shown, tables or mappings. Of remove: the
    /// device's id. Of snapshot: the folder that is made. Of migrate: unix:PATH or tcp:HOST:PORT
    #[arg(value_name = "ACTION|ID|DIR|ADDRESS")]
    what: Option<String>,
    /// Of add: the device, as `causeway run --device` takes it. Of dirty: this device alone, with those of its host
    /// group. Of iommu: this one alone, by its id or its address in the guest
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Of dirty start: an unmap loses no write, whatever that costs
    #[arg(long)]
    close_race: bool,
    /// Of migrate: all of the memory is compared before the machine is handed over, while it stands still
    #[arg(long)]
    verify: bool,
    /// Of dirty read: writes the bitmap there, a bit for each 4 KiB of guest-physical addresses from 0 on, the lowest
    /// first, instead of the ranges
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Of iommu: one JSON object instead of text
    #[arg(long)]
    json: bool,
    /// Of top: one picture as text, as where stdout is no terminal
    #[arg(long)]
    once: bool,
}

impl CtlArgs {
    fn request(&self) -> Result<Request, String> {
        let Self { verb, what, device, .. } = self;
        let (mut action, mut device, mut to) = (None, device.clone(), None);
        match (verb, what) {
            (_, None) => {}
            (Verb::Remove, Some(id)) if device.is_none() => device = Some(id.clone()),
            (Verb::Dirty | Verb::Iommu, Some(text)) => {
                let parsed = Action::from_str(text, false);
                let actions = if *verb == Verb::Dirty { "start, read or stop" } else { "tables or mappings" };
                action = Some(parsed.map_err(|_| format!("`{text}` is not {actions}"))?);
            }
            (Verb::Snapshot, Some(folder)) => {
                // The machine has another working directory.
                let whole = std::path::absolute(folder).map_err(|e| format!("`{folder}` cannot be a path: {e}"))?;
                to = Some(whole.to_string_lossy().into_owned());
            }
            (Verb::Migrate, Some(address)) => {
                to = Some(match address.parse()? {
                    // The machine has another working directory.
                    Address::Unix(path) => {
                        let whole = std::path::absolute(&path).map_err(|e| format!("`{address}`: {e}"))?;
                        Address::Unix(whole).to_string()
                    }
                    address => address.to_string(),
                });
            }
            (_, Some(text)) => return Err(format!("`{text}` is too much")),
        }
        let close_race = self.close_race.then_some(true);
        let verify = self.verify.then_some(true);
        Ok(Request { action, device, close_race, to, verify, ..(*verb).into() })
    }
}

/// Does what the command line says. Gives back the exit code.
pub fn run(args: &CtlArgs) -> ExitCode {
    let parsed = args.request();
    let wrong = parsed.as_ref().map_or_else(|why| Some(why.clone()), |request| request.check().err());
    let request = parsed.unwrap_or_else(|_| args.verb.into());
    let misplaced = args.out.is_some() && request.action != Some(Action::Read);
    let wrong = wrong.or_else(|| misplaced.then(|| "only dirty read has an --out".to_owned()));
    let misplaced = args.json && args.verb != Verb::Iommu;
    let wrong = wrong.or_else(|| misplaced.then(|| "only iommu has --json: what else is said is JSON".to_owned()));
    if let Some(wrong) = wrong {
        say(format_args!("causeway ctl: {wrong}"));
        return ExitCode::from(USAGE);
    }
    let misplaced = args.once && args.verb != Verb::Top;
    if misplaced {
        say(format_args!("causeway ctl: only top has --once"));
        return ExitCode::from(USAGE);
    }
    if args.verb == Verb::Iommu {
        return match iommu::show(&args.socket, &request, args.json) {
            Ok(Shown::Differences(0)) => ExitCode::SUCCESS,
            Ok(Shown::Differences(_)) => ExitCode::from(DIFFERS),
            Ok(Shown::Refused(why)) => denied(&why),
            Err(e) => unanswered(&args.socket, &e),
        };
    }
    if args.verb == Verb::Top {
        return match top::run(&args.socket, args.once) {
            Ok(Ended::Left) => ExitCode::SUCCESS,
            Ok(Ended::Refused(why)) => denied(&why),
            Ok(Ended::Signal(signal)) => signals::die_by(signal),
            Err(e) => unanswered(&args.socket, &e),
        };
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
        Ok(Reply::Error(why)) => denied(&why),
        Err(e) => unanswered(&args.socket, &e),
    }
}

/// The machine refuses it.
fn denied(why: &str) -> ExitCode {
    say(format_args!("causeway ctl: {why}"));
    ExitCode::from(DENIED)
}

/// No machine replies.
fn unanswered(socket: &Path, e: &io::Error) -> ExitCode {
    let (code, remedy) = match e.kind() {
        ErrorKind::InvalidInput => (USAGE, "use a shorter path"),
        ErrorKind::PermissionDenied => (REFUSED, "the machine is another user's"),
        _ => (REFUSED, "the path is that of `causeway run --socket`"),
    };
    say(format_args!("causeway ctl: no machine replies at {}: {e}; {remedy}", socket.display()));
    ExitCode::from(code)
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
        let rest = Request { action: Some(Action::Read), from: Some(from), ..Verb::Dirty.into() };
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
    Client::connect(socket)?.ask(request)
}
