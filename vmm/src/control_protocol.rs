//! What is spoken over the control socket (`causeway run --socket`, `causeway ctl`): JSON lines.
//!
//! A request is an object such as `{"verb":"status"}`. Each has one reply, in order: `{"ok":{...}}`, or
//! `{"error":"..."}` with the cause and the remedy. Lines without text are skipped.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};

/// The longest request, without the end of its line: bytes.
pub const LONGEST_REQUEST: usize = 4 << 10;
/// What a client has not read of its replies, at most: bytes. No single reply is as long.
pub const MOST_UNREAD: usize = 1 << 20;

/// What a machine can be asked for.
#[derive(Serialize, Deserialize, ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "kebab-case")]
pub enum Verb {
    /// The statistics, with the last audit, and whether the machine runs
    Status,
    /// Compares the guest's tables, the shadow and what the host was handed
    Audit,
    /// The devices, with what the bridge did for each
    Devices,
    /// Writes what the host holds into the trace, and all of the trace to its file
    Trace,
    /// Holds the virtual CPUs; devices go on with their DMA
    Pause,
    /// Lets them run on
    Resume,
    /// Resets the machine, as the guest's own reset does
    Reset,
    /// Presses the power button, which a guest may hear
    PowerButton,
    /// Puts a device behind a root port: `add --device KIND[,KEY=VALUE]...`
    Add,
    /// Asks the guest to let go of a device behind a root port: `remove ID`
    Remove,
    /// Saves the machine, which goes on, as a folder that `causeway run --restore DIR` goes on from: `snapshot DIR`
    Snapshot,
    /// Moves the machine, while it runs, into a process that waits for it: `migrate unix:PATH|tcp:HOST:PORT`
    Migrate,
    /// Says which guest memory devices wrote: `dirty start`, `dirty read` and `dirty stop`
    Dirty,
    /// Shows the guest's tables, and what the host holds: `iommu tables` and `iommu mappings`
    Iommu,
    /// Shows what happens, on a screen that is drawn again each second
    Top,
    /// Ends the run, as Ctrl-A x does
    Quit,
}

/// What is done about guest memory that devices write, or shown of the IOMMU.
#[derive(Serialize, Deserialize, ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Of dirty: it is tracked from now on
    Start,
    /// Of dirty: what was written since the last read, or the start; that is clean then
    Read,
    /// Of dirty: it is tracked no longer
    Stop,
    /// Of iommu: the guest's own tables
    Tables,
    /// Of iommu: what functions were granted beside what the host holds
    Mappings,
}

/// A request.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// What is asked for.
    pub verb: Verb,
    /// Of `dirty`: what is done. Of `iommu`: what is shown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub action: Option<Action>,
    /// Of `dirty`, `iommu` and `remove`: the device, by its id; of `iommu`, also by its address. For `dirty` and
    /// `iommu` all of them where there is none. Of `add`: what `--device` of `causeway run` takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Of `dirty start`: whether an unmap may lose no write, whatever that costs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub close_race: Option<bool>,
    /// Of `dirty read`: not a new read, but the rest of the last one from this guest-physical address on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<u64>,
    /// Of `iommu`: the `next` of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub position: Option<String>,
    /// Of `snapshot`: the path of the folder, which is not there yet. Of `migrate`: where the other process waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// Of `migrate`: whether all of the memory is compared before the machine is handed over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verify: Option<bool>,
}

impl From<Verb> for Request {
    fn from(verb: Verb) -> Self {
        Self { verb, action: None, device: None, close_race: None, from: None, position: None, to: None, verify: None }
    }
}

impl Request {
    /// A request from its line. An error says what is wrong with it.
    pub fn parse(line: &[u8]) -> Result<Self, String> {
        // Its fields without their names would be taken, too.
        if !line.trim_ascii_start().starts_with(b"{") {
            return Err("a request is a JSON object in one line, such as {\"verb\":\"status\"}".to_owned());
        }
        let request: Self = serde_json::from_slice(line)
            .map_err(|e| format!("the request is not understood: {e}; write one such as {{\"verb\":\"status\"}}"))?;
        request.check().map(|()| request)
    }

    /// Whether its fields go together. An error says which do.
    pub fn check(&self) -> Result<(), String> {
        let Self { verb, action, device, close_race, from, position, to, verify } = self;
        let of_dirty = close_race.is_some() || from.is_some();
        let wrong = match (verb, action) {
            (Verb::Snapshot, None)
                if to.is_some() && device.is_none() && position.is_none() && verify.is_none() && !of_dirty =>
            {
                return Ok(());
            }
            (Verb::Snapshot, _) => "snapshot has a path and nothing else: snapshot DIR",
            (Verb::Migrate, None) if to.is_some() && device.is_none() && position.is_none() && !of_dirty => {
                return Ok(());
            }
            (Verb::Migrate, _) => "migrate has an address: migrate unix:PATH or tcp:HOST:PORT",
            _ if to.is_some() || verify.is_some() => "only snapshot has a path, and only migrate an address",
            (Verb::Iommu, Some(Action::Tables | Action::Mappings)) if !of_dirty => return Ok(()),
            (Verb::Iommu, Some(Action::Tables | Action::Mappings)) => "only dirty has a race and an address",
            (Verb::Iommu, _) => "iommu shows tables or mappings",
            _ if position.is_some() => "only iommu has a position",
            (Verb::Dirty, Some(Action::Start)) if from.is_none() => return Ok(()),
            (Verb::Dirty, Some(Action::Read)) if close_race.is_none() => return Ok(()),
            (Verb::Dirty, Some(Action::Stop)) if !of_dirty => return Ok(()),
            (Verb::Dirty, Some(Action::Start | Action::Read | Action::Stop)) => {
                "of dirty, only start can close the race, and only read goes on from an address"
            }
            (Verb::Dirty, _) => "dirty has an action: start, read or stop",
            (Verb::Add | Verb::Remove, None) if !of_dirty => match (verb, device) {
                (_, Some(_)) => return Ok(()),
                (Verb::Add, None) => "add has a device: add --device KIND[,KEY=VALUE]...",
                (_, None) => "remove has the id of a device: remove ID",
            },
            (_, None) if device.is_none() && !of_dirty => return Ok(()),
            _ => {
                "only dirty and iommu have an action, only dirty a race and an address, and only these, add and remove \
                 have a device"
            }
        };
        Err(format!("the request is not understood: {wrong}"))
    }
}

/// A reply.
#[derive(Serialize, Deserialize, Debug)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// What was asked for: an object.
    Ok(Box<RawValue>),
    /// Why it is refused, and what helps.
    Error(String),
}

impl Reply {
    /// The reply with this object.
    pub fn ok(object: &impl Serialize) -> Self {
        to_raw_value(object).map_or_else(|e| Self::Error(format!("the reply cannot be written: {e}")), Self::Ok)
    }
}

/// `message` as a line: a [`Request`] or a [`Reply`].
pub fn line(message: &impl Serialize) -> Vec<u8> {
    // Neither has a part that has no JSON.
    let mut line = serde_json::to_vec(message).unwrap_or_default();
    line.push(b'\n');
    line
}

/// A line that is longer than a request may be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a request has {LONGEST_REQUEST} bytes at most")]
pub struct TooLong;

/// Cuts what comes into lines, and keeps no more than one that is not whole.
#[derive(Default, Debug)]
pub struct Lines {
    bytes: Vec<u8>,
}

impl Lines {
    /// Takes what came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Whether [`Lines::take`] has something to give: a line, or one that is too long.
    pub fn is_ready(&self) -> bool {
        self.bytes.len() > LONGEST_REQUEST || self.bytes.contains(&b'\n')
    }

    /// The next whole line that has text, without its end.
    pub fn take(&mut self) -> Option<Result<Vec<u8>, TooLong>> {
        loop {
            let Some(end) = self.bytes.iter().position(|byte| *byte == b'\n') else {
                return (self.bytes.len() > LONGEST_REQUEST).then_some(Err(TooLong));
            };
            if end > LONGEST_REQUEST {
                return Some(Err(TooLong));
            }
            let rest = self.bytes.split_off(end + 1);
            let mut line = std::mem::replace(&mut self.bytes, rest);
            line.truncate(end);
            if !line.trim_ascii().is_empty() {
                return Some(Ok(line));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn control_each_verb_has_its_one_name_on_the_command_line_and_on_the_wire() {
        let names: Vec<String> = Verb::value_variants()
            .iter()
            .map(|verb| {
                let name = verb.to_possible_value().unwrap().get_name().to_owned();
                let action = match verb {
                    Verb::Dirty => Some(Action::Read),
                    Verb::Iommu => Some(Action::Tables),
                    _ => None,
                };
                let device = matches!(verb, Verb::Add | Verb::Remove).then(|| "edu0".to_owned());
                let to = matches!(verb, Verb::Snapshot | Verb::Migrate).then(|| "/a".to_owned());
                let whole = Request { action, device, to, ..(*verb).into() };
                let request = line(&whole);
                let more = match action {
                    Some(Action::Read) => ",\"action\":\"read\"",
                    Some(_) => ",\"action\":\"tables\"",
                    None => "",
                };
                let of = whole.device.as_ref().map_or("", |_| ",\"device\":\"edu0\"");
                let to = whole.to.as_ref().map_or("", |_| ",\"to\":\"/a\"");
                assert_eq!(request, format!("{{\"verb\":\"{name}\"{more}{of}{to}}}\n").into_bytes());
                assert_eq!(Request::parse(&request), Ok(whole));
                name
            })
            .collect();
        let all = "status audit devices trace pause resume reset power-button add remove snapshot migrate dirty iommu \
                   top quit";
        assert_eq!(names.join(" "), all);
    }

    #[test]
    fn control_requests_of_another_form_are_refused_with_what_is_wrong() {
        for (text, part) in [
            ("{}", "missing field `verb`"),
            ("{\"verb\":\"fly\"}", "unknown variant `fly`, expected one of `status`"),
            ("{\"verb\":\"quit\",\"now\":true}", "unknown field `now`"),
            ("{\"verb\":\"quit\",\"verb\":\"status\"}", "duplicate field"),
            ("{\"verb\":\"quit\"} {\"verb\":\"quit\"}", "trailing characters"),
            ("{\"verb\":\"quit\"", "EOF"),
            ("{\"verb\":\"Quit\"}", "unknown variant"),
            ("{\"verb\":[\"quit\"]}", "not understood"),
            ("[\"quit\"]", "is a JSON object"),
            ("\"quit\"", "is a JSON object"),
            ("quit", "is a JSON object"),
        ] {
            let why = Request::parse(text.as_bytes()).unwrap_err();
            assert!(why.contains(part) && why.contains("{\"verb\":\"status\"}"), "{text}: {why}");
        }
        assert_eq!(Request::parse(b" {\"verb\" : \"quit\"}\r"), Ok(Verb::Quit.into()));
    }

    #[test]
    fn e1_requests_about_dirty_memory_have_the_fields_of_their_action_and_no_others_have_them() {
        let fields = ["\"device\":\"vfio0\"", "\"close_race\":true", "\"from\":4096", "\"position\":\"28.0.-\""];
        for (head, allowed) in [
            ("\"verb\":\"dirty\",\"action\":\"start\"", [true, true, false, false]),
            ("\"verb\":\"dirty\",\"action\":\"read\"", [true, false, true, false]),
            ("\"verb\":\"dirty\",\"action\":\"stop\"", [true, false, false, false]),
            ("\"verb\":\"iommu\",\"action\":\"tables\"", [true, false, false, true]),
            ("\"verb\":\"iommu\",\"action\":\"mappings\"", [true, false, false, true]),
            ("\"verb\":\"status\"", [false; 4]),
        ] {
            assert!(Request::parse(format!("{{{head}}}").as_bytes()).is_ok(), "{head}");
            for (field, allowed) in fields.iter().zip(allowed) {
                let request = Request::parse(format!("{{{head},{field}}}").as_bytes());
                assert_eq!(request.is_ok(), allowed, "{head},{field}: {request:?}");
            }
        }
        for wrong in [
            "\"verb\":\"dirty\"",
            "\"verb\":\"quit\",\"action\":\"read\"",
            "\"verb\":\"dirty\",\"action\":\"fly\"",
            "\"verb\":\"dirty\",\"action\":\"tables\"",
            "\"verb\":\"iommu\"",
            "\"verb\":\"iommu\",\"action\":\"read\"",
        ] {
            assert!(Request::parse(format!("{{{wrong}}}").as_bytes()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn f6_requests_to_add_and_to_remove_name_a_device_and_nothing_else() {
        for verb in ["add", "remove"] {
            let request = |more: &str| Request::parse(format!("{{\"verb\":\"{verb}\"{more}}}").as_bytes());
            assert!(request(",\"device\":\"edu0\"").is_ok());
            assert!(request("").unwrap_err().contains(verb));
            for more in ["\"action\":\"read\"", "\"close_race\":true", "\"from\":4096"] {
                assert!(request(&format!(",\"device\":\"edu0\",{more}")).is_err(), "{more}");
            }
        }
    }

    #[test]
    fn a14_requests_for_a_snapshot_have_a_path_and_nothing_else() {
        let request = |more: &str| Request::parse(format!("{{\"verb\":\"snapshot\"{more}}}").as_bytes());
        assert!(request(",\"to\":\"/a\"").is_ok());
        assert!(request("").unwrap_err().contains("snapshot DIR"));
        for more in
            ["\"action\":\"read\"", "\"close_race\":true", "\"from\":1", "\"device\":\"a\"", "\"position\":\"a\""]
        {
            assert!(request(&format!(",\"to\":\"/a\",{more}")).is_err(), "{more}");
        }
        for verb in ["status", "remove", "dirty\",\"action\":\"read", "iommu\",\"action\":\"tables"] {
            let text = format!("{{\"verb\":\"{verb}\",\"device\":\"a\",\"to\":\"/a\"}}");
            assert!(
                Request::parse(text.as_bytes()).unwrap_err().contains("only snapshot has a path, and only migrate"),
                "{verb}"
            );
        }
    }

    #[test]
    fn control_replies_are_one_line_and_come_back_as_they_were() {
        let text = line(&Reply::ok(&serde_json::json!({"state": "paused"})));
        assert_eq!(text, b"{\"ok\":{\"state\":\"paused\"}}\n");
        let text = line(&Reply::Error("two\nlines".to_owned()));
        assert_eq!(text, b"{\"error\":\"two\\nlines\"}\n");
        assert!(matches!(serde_json::from_slice(&text), Ok(Reply::Error(why)) if why == "two\nlines"));
    }

    #[test]
    fn control_a_line_has_its_longest_length_and_no_more_is_kept() {
        let mut lines = Lines::default();
        lines.push(&[b'a'; LONGEST_REQUEST]);
        assert_eq!((lines.is_ready(), lines.take()), (false, None));
        lines.push(b"\nb\n");
        assert_eq!(lines.take(), Some(Ok(vec![b'a'; LONGEST_REQUEST])));
        assert_eq!(lines.take(), Some(Ok(b"b".to_vec())));
        lines.push(&[b'a'; LONGEST_REQUEST + 1]);
        assert_eq!((lines.is_ready(), lines.take()), (true, Some(Err(TooLong))));
        lines.push(b"\n");
        assert_eq!(lines.take(), Some(Err(TooLong)));
    }

    proptest! {
        /// However they are cut, the lines are those of the text.
        #[test]
        fn control_lines_are_the_same_in_whatever_pieces_they_come(
            text in prop::collection::vec(prop_oneof![Just(b'\n'), Just(b' '), Just(b'\r'), any::<u8>()], 0..600),
            pieces in prop::collection::vec(1usize..50, 1..20),
        ) {
            let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
            let wanted: Vec<Vec<u8>> = text[..whole]
                .split(|byte| *byte == b'\n')
                .filter(|line| !line.trim_ascii().is_empty())
                .map(<[u8]>::to_vec)
                .collect();
            let mut lines = Lines::default();
            let mut found = Vec::new();
            let (mut rest, mut sizes) = (&text[..], pieces.iter().cycle());
            while let Some(size) = sizes.next().filter(|_| !rest.is_empty()) {
                let (piece, after) = rest.split_at(rest.len().min(*size));
                rest = after;
                lines.push(piece);
                while let Some(line) = lines.take() {
                    found.push(line.unwrap());
                }
            }
            prop_assert_eq!(found, wanted);
            prop_assert!(!lines.is_ready());
        }

        /// Only requests are requests.
        #[test]
        fn control_no_garbage_is_a_request(line in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Request::parse(&line).is_err());
        }

        #[test]
        fn control_no_json_but_the_requests_is_one(
            key in "verb|verbs|arg|", value in "\"status\"|\"[a-z-]{0,12}\"|null|[0-9]{1,3}|\\{\\}|\\[\\]",
            more in prop::option::of("\"[a-z]{0,4}\":1"),
        ) {
            let more = more.map_or(String::new(), |more| format!(",{more}"));
            // Some have more than their verb.
            let more_than_a_verb = [Verb::Dirty, Verb::Iommu, Verb::Add, Verb::Remove, Verb::Snapshot, Verb::Migrate];
            let verbs = || Verb::value_variants().iter().filter(|verb| !more_than_a_verb.contains(verb));
            let known = verbs().any(|verb| {
                value.trim_matches('"') == verb.to_possible_value().unwrap().get_name() && value.starts_with('"')
            });
            let request = Request::parse(format!("{{\"{key}\":{value}{more}}}").as_bytes());
            prop_assert_eq!(request.is_ok(), known && key == "verb" && more.is_empty());
        }
    }
}
