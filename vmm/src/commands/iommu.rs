//! `causeway ctl PATH iommu tables|mappings`: asks page after page, and prints them as they come.

use std::fmt;
use std::io::{self, BufWriter, Stdout, Write};
use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::commands::client::Client;
use crate::control_protocol::{Action, Reply, Request, Verb};
use crate::view::{mappings, tables};

/// Runs that are shown, and pages that are asked for, at most: what a guest has in its tables may have no end.
const MOST_RUNS: u64 = 1 << 16;
const MOST_PAGES: u64 = 1 << 12;

/// How it went.
pub enum Shown {
    /// All of it is out, and so many differences were in it.
    Differences(u64),
    /// The machine refuses it, for this reason.
    Refused(String),
}

/// What comes of a page, of either view.
trait Page: DeserializeOwned {
    /// The position of the next one, taken out.
    fn take_next(&mut self) -> Option<String>;
    /// Hands its items on.
    fn show(self, sink: &mut Sink) -> io::Result<()>;
}

/// Where functions and runs go: lines, or one object of JSON.
struct Sink {
    out: BufWriter<Stdout>,
    json: bool,
    /// Functions so far, for JSON.
    functions: Vec<Value>,
    head: Option<tables::Head>,
    /// The run that may go on in the next page.
    open: Option<Run>,
    runs: u64,
    differences: u64,
}

enum Run {
    OfTables(tables::Range),
    OfMappings(mappings::Range),
}

impl Run {
    fn join(&mut self, next: &Self) -> bool {
        match (self, next) {
            (Self::OfTables(open), Self::OfTables(next)) => open.join(next),
            (Self::OfMappings(open), Self::OfMappings(next)) => open.join(next),
            _ => false,
        }
    }
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OfTables(range) => range.fmt(f),
            Self::OfMappings(range) => range.fmt(f),
        }
    }
}

impl Sink {
    /// Puts out what waits.
    fn close(&mut self) -> io::Result<()> {
        let Some(run) = self.open.take() else { return Ok(()) };
        self.runs += 1;
        self.differences += u64::from(matches!(&run, Run::OfMappings(range) if range.differs));
        if !self.json {
            return writeln!(self.out, "{run}");
        }
        let value = match &run {
            Run::OfTables(range) => serde_json::to_value(range),
            Run::OfMappings(range) => serde_json::to_value(range),
        };
        self.add("ranges", value?);
        Ok(())
    }

    fn run(&mut self, run: Run) -> io::Result<()> {
        if self.open.as_mut().is_some_and(|open| open.join(&run)) {
            return Ok(());
        }
        self.close()?;
        self.open = Some(run);
        Ok(())
    }

    fn function(&mut self, function: &(impl serde::Serialize + fmt::Display)) -> io::Result<()> {
        self.close()?;
        if self.json {
            let mut value = serde_json::to_value(function)?;
            value["ranges"] = json!([]);
            self.functions.push(value);
            return Ok(());
        }
        writeln!(self.out, "{function}")
    }

    /// A difference in words.
    fn difference(&mut self, text: &str) -> io::Result<()> {
        self.close()?;
        self.differences += 1;
        if self.json {
            self.add("differences", text.into());
            return Ok(());
        }
        writeln!(self.out, "  ! {text}")
    }

    /// Adds to a list of the last function.
    fn add(&mut self, list: &str, value: Value) {
        let Some(function) = self.functions.last_mut() else { return };
        match function[list].as_array_mut() {
            Some(values) => values.push(value),
            None => function[list] = json!([value]),
        }
    }

    /// The end of it; `complete`: nothing was left off.
    fn finish(mut self, complete: bool, compared: bool) -> io::Result<u64> {
        self.close()?;
        let Self { mut out, json, functions, head, runs, differences, .. } = self;
        if json {
            let mut whole = match head {
                Some(head) => serde_json::to_value(head)?,
                None => json!({}),
            };
            whole["functions"] = functions.into();
            whole["complete"] = complete.into();
            if compared {
                whole["differences"] = differences.into();
            }
            writeln!(out, "{whole}")?;
        } else {
            if !complete {
                writeln!(out, "... there is more: {runs} runs are shown; --device shows one function")?;
            }
            if compared {
                writeln!(out, "{runs} runs, {differences} differences")?;
            }
        }
        out.flush()?;
        Ok(differences)
    }
}

impl Page for tables::Page {
    fn take_next(&mut self) -> Option<String> {
        self.next.take()
    }

    fn show(self, sink: &mut Sink) -> io::Result<()> {
        if sink.head.is_none() {
            if !sink.json {
                writeln!(sink.out, "{}", self.head)?;
            }
            sink.head = Some(self.head);
        }
        self.items.into_iter().try_for_each(|item| match item {
            tables::Item::Function(function) => sink.function(&function),
            tables::Item::Range(range) => sink.run(Run::OfTables(range)),
        })
    }
}

impl Page for mappings::Page {
    fn take_next(&mut self) -> Option<String> {
        self.next.take()
    }

    fn show(self, sink: &mut Sink) -> io::Result<()> {
        self.items.into_iter().try_for_each(|item| match item {
            mappings::Item::Function(function) => sink.function(&function),
            mappings::Item::Range(range) => sink.run(Run::OfMappings(range)),
            mappings::Item::Difference(text) => sink.difference(&text),
        })
    }
}

/// Shows what `request` asks for.
pub fn show(socket: &Path, request: &Request, json: bool) -> io::Result<Shown> {
    match request.action {
        Some(Action::Mappings) => pages::<mappings::Page>(socket, request, json, true),
        _ => pages::<tables::Page>(socket, request, json, false),
    }
}

fn pages<P: Page>(socket: &Path, request: &Request, json: bool, compared: bool) -> io::Result<Shown> {
    let mut client = Client::connect(socket)?;
    let mut sink = Sink {
        out: BufWriter::new(io::stdout()),
        json,
        functions: Vec::new(),
        head: None,
        open: None,
        runs: 0,
        differences: 0,
    };
    let mut position = None;
    let mut asked = 0;
    let complete = loop {
        let request =
            Request { action: request.action, device: request.device.clone(), position, ..Verb::Iommu.into() };
        let mut page: P = match client.ask(&request)? {
            Reply::Ok(object) => serde_json::from_str(object.get())?,
            Reply::Error(why) => return Ok(Shown::Refused(why)),
        };
        let next = page.take_next();
        // A reader that is gone wants nothing more.
        if let Err(e) = page.show(&mut sink) {
            return if e.kind() == io::ErrorKind::BrokenPipe {
                Ok(Shown::Differences(sink.differences))
            } else {
                Err(e)
            };
        }
        asked += 1;
        position = next;
        if position.is_none() {
            break true;
        }
        if sink.runs >= MOST_RUNS || asked >= MOST_PAGES {
            break false;
        }
    };
    sink.finish(complete, compared).map(Shown::Differences)
}
