//! The messages of the admin socket and their lines of JSON. Pure: no socket, no clock.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::Value;
use tokio::sync::watch;

use crate::status::SCHEMA;
use crate::units::names::{KeptName, NameError, SourceName, VolumeName};

/// What can be asked of a running process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// A [`crate::status::document::StatusDocument`], whole or with one source only.
    Status {
        /// Only this one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        source: Option<SourceName>,
    },
    /// Make a CP of everything acknowledged so far and wait until the hub has published it:
    /// a [`crate::status::answers::CheckpointAnswer`].
    Checkpoint {
        /// Only this one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        source: Option<SourceName>,
        /// Keep it under this name; a hub only.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        keep: Option<KeptName>,
    },
    /// The CPs kept by name: a [`crate::status::answers::KeptAnswer`]; a hub only.
    Kept {
        /// Only this one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        source: Option<SourceName>,
    },
    /// Give up a kept CP: a [`crate::status::answers::DropAnswer`]; a hub only.
    Drop {
        /// Which.
        target: KeptTarget,
    },
    /// Read the last common CP at both ends and compare roots:
    /// a [`crate::status::answers::VerifyAnswer`].
    Verify {
        /// Only this source or volume.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        target: Option<Target>,
    },
    /// Fence a source and bring its image up to its last write; on a hub only:
    /// a [`crate::status::answers::FailoverAnswer`].
    Failover {
        /// Which.
        source: SourceName,
        /// Only say what would be.
        #[serde(default)]
        dry_run: bool,
        /// Do not wait until a source that is cut off holds its reads.
        #[serde(default)]
        now: bool,
        /// Give up what lies behind a gap in the log.
        #[serde(default)]
        accept_gap: bool,
        /// Of a source that was failed over: give up what its lost NVRAM held.
        #[serde(default)]
        accept_lost_nvram: bool,
    },
    /// Give a source that was failed over back to its filer; on a hub only:
    /// a [`crate::status::answers::FailbackAnswer`].
    Failback {
        /// Which.
        source: SourceName,
        /// Whose writes stay, if both sides have written.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        keep: Option<Side>,
        /// To another filer.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        to: Option<SourceName>,
        /// Do nothing, say what would be.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        dry_run: bool,
    },
    /// Give up the images of a retired source: a [`crate::status::answers::ForgetAnswer`]; a hub
    /// only.
    Forget {
        /// Which.
        source: SourceName,
    },
    /// Fill the image of a volume with a file, whose pieces follow ([`super::feed`]):
    /// a [`crate::status::answers::SeedAnswer`]; a hub only.
    Seed {
        /// Which.
        target: Target,
        /// Size of the file, if it is known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        size_bytes: Option<u64>,
    },
    /// Give a seed up: a [`crate::status::answers::SeedsAnswer`] of that one; a hub only.
    SeedDiscard {
        /// Which.
        target: Target,
    },
    /// The seeds whose sources have not come: a [`crate::status::answers::SeedsAnswer`]; a hub only.
    Seeds {},
    /// What a reload would do: a [`crate::status::config::ConfigDiffAnswer`].
    ConfigDiff {},
    /// Scrub the pool, or say how far it is: a [`crate::status::upkeep::ScrubAnswer`].
    Scrub {
        /// Answer when it has ended.
        #[serde(default)]
        wait: bool,
        /// End the one under way.
        #[serde(default)]
        stop: bool,
    },
    /// How each device of the pool is: a [`crate::status::upkeep::DevicesAnswer`].
    DeviceList {},
    /// Take a device out: the same answer.
    DeviceFail {
        /// Its path, place or id.
        device: String,
    },
    /// Fill a new device in the place of one: the same answer.
    DeviceReplace {
        /// Path, place or id of the one.
        old: String,
        /// Path of the new one.
        new: String,
        /// Answer when it is filled.
        #[serde(default)]
        wait: bool,
    },
    /// Add devices, which are used when this is answered: the same answer.
    DeviceAdd {
        /// Their paths.
        devices: Vec<String>,
    },
    /// Walk the pool: a [`crate::status::answers::PoolCheckAnswer`].
    PoolCheck {},
    /// Who did what: a [`crate::status::answers::EventsAnswer`]. Answered by the socket's server itself.
    Events {
        /// The process that was asked before.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        boot: Option<String>,
        /// How many of its events are known.
        #[serde(default)]
        since: u64,
        /// Wait some seconds for one.
        #[serde(default)]
        wait: bool,
    },
}

/// One of two sides that have both written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The hub's.
    Hub,
    /// The filer's.
    Source,
}

/// `SOURCE` or `SOURCE/VOLUME`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The source.
    pub source: SourceName,
    /// One volume of it, or all.
    pub volume: Option<VolumeName>,
}

impl FromStr for Target {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let (source, volume) = match text.split_once('/') {
            Some((source, volume)) => (source, Some(volume.parse()?)),
            None => (text, None),
        };
        Ok(Self { source: source.parse()?, volume })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.volume {
            Some(volume) => write!(f, "{}/{volume}", self.source),
            None => write!(f, "{}", self.source),
        }
    }
}

impl Serialize for Target {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Target {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// `SOURCE@NAME`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptTarget {
    /// The source.
    pub source: SourceName,
    /// Name of the kept CP.
    pub name: KeptName,
}

/// Why a text names no kept CP.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeptTargetError {
    /// There is no `@`.
    #[error("a kept CP is named SOURCE@NAME")]
    NoName,
    /// One part is no name.
    #[error(transparent)]
    Name(#[from] NameError),
}

impl FromStr for KeptTarget {
    type Err = KeptTargetError;

    fn from_str(text: &str) -> Result<Self, KeptTargetError> {
        let (source, name) = text.split_once('@').ok_or(KeptTargetError::NoName)?;
        Ok(Self { source: source.parse()?, name: name.parse()? })
    }
}

impl fmt::Display for KeptTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.source, self.name)
    }
}

impl Serialize for KeptTarget {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for KeptTarget {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// What the numbers of a [`Progress`] count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProgressUnit {
    /// Bytes.
    Bytes,
    /// 4 KiB blocks.
    Blocks,
    /// Steps of the command.
    Steps,
}

/// How far a command is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// What is being done, such as `reading`.
    pub what: String,
    /// To what, such as `filer-a/vol0`.
    pub object: String,
    /// Done so far.
    pub done: u64,
    /// Of how much; null while unknown.
    pub total: Option<u64>,
    /// Unit of both.
    pub unit: ProgressUnit,
}

/// Where a command reports its progress. Never waits and never fails: only the newest report is
/// kept, and a caller that has gone is not the command's business.
#[derive(Debug, Clone)]
pub struct ProgressSender(watch::Sender<Option<Progress>>);

impl ProgressSender {
    /// A sender and the end that sees its newest report.
    pub fn new() -> (Self, watch::Receiver<Option<Progress>>) {
        let (sender, receiver) = watch::channel(None);
        (Self(sender), receiver)
    }

    /// Replaces the newest report.
    pub fn send(&self, progress: Progress) {
        self.0.send_replace(Some(progress));
    }
}

/// Stable codes of [`AdminError`].
pub mod code {
    /// The request cannot be read.
    pub const BAD_REQUEST: &str = "bad-request";
    /// No such source here.
    pub const UNKNOWN_SOURCE: &str = "unknown-source";
    /// No such volume in that source.
    pub const UNKNOWN_VOLUME: &str = "unknown-volume";
    /// No such kept CP of that source.
    pub const UNKNOWN_KEPT: &str = "unknown-kept";
    /// The name keeps another CP already.
    pub const NAME_TAKEN: &str = "name-taken";
    /// It is done at the hub, not here.
    pub const HUB_ONLY: &str = "hub-only";
    /// Something else is in the way; later it may work.
    pub const BUSY: &str = "busy";
    /// The other end is not there.
    pub const HUB_LOST: &str = "hub-lost";
    /// The source is not there.
    pub const SOURCE_OFFLINE: &str = "source-offline";
    /// The process is stopping.
    pub const STOPPING: &str = "stopping";
    /// The answer is larger than an answer may be.
    pub const TOO_LARGE: &str = "too-large";
    /// It must not be done as things are; nothing or not all of it was done.
    pub const REFUSED: &str = "refused";
    /// It was tried and failed.
    pub const FAILED: &str = "failed";
    /// A fault of the program.
    pub const INTERNAL: &str = "internal";
}

/// Why a request was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct AdminError {
    /// What failed, with its object and cause: lower case, no full stop.
    pub message: String,
    /// What to do; may be empty.
    pub next_step: String,
    /// One of [`code`].
    pub code: String,
}

impl AdminError {
    /// From its three parts.
    pub fn new(code: &str, message: impl Into<String>, next_step: impl Into<String>) -> Self {
        Self { message: message.into(), next_step: next_step.into(), code: code.into() }
    }
}

/// One line of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AnswerLine {
    /// More will follow.
    Progress(Progress),
    /// A part of a line that is too long to be one: the texts of all parts, one behind the other, are
    /// that line.
    Part {
        /// The text.
        text: String,
        /// No other follows.
        last: bool,
    },
    /// Done; the last line.
    Result(Value),
    /// Not done; the last line.
    Error(AdminError),
}

/// A request as one line with its newline.
pub fn request_line(request: &Request) -> Result<Vec<u8>, serde_json::Error> {
    #[derive(Serialize)]
    struct Message<'a> {
        schema: u32,
        #[serde(flatten)]
        request: &'a Request,
    }
    with_newline(&Message { schema: SCHEMA, request })
}

/// What a command answers, as the socket carries it.
pub fn answer(value: &impl Serialize) -> Result<Value, AdminError> {
    serde_json::to_value(value)
        .map_err(|error| AdminError::new(code::INTERNAL, error.to_string(), "report this"))
}

/// An answer line with its newline.
pub fn answer_line(answer: &AnswerLine) -> Result<Vec<u8>, serde_json::Error> {
    with_newline(answer)
}

fn with_newline(message: &impl Serialize) -> Result<Vec<u8>, serde_json::Error> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}

/// Reads a request. Everything that is wrong with it comes back as a `bad-request`.
pub fn parse_request(line: &[u8]) -> Result<Request, AdminError> {
    let bad = |message: String| {
        let next = "send one line such as {\"schema\":1,\"command\":\"status\"}";
        AdminError::new(code::BAD_REQUEST, message, next)
    };
    let value: Value = serde_json::from_slice(line)
        .map_err(|error| bad(format!("the request is no JSON: {error}")))?;
    let Value::Object(mut fields) = value else {
        return Err(bad("the request is no JSON object".into()));
    };
    match fields.remove("schema") {
        Some(schema) if schema == SCHEMA => {}
        Some(other) => return Err(bad(format!("schema {SCHEMA} is spoken here, not {other}"))),
        None => return Err(bad(format!("the request has no \"schema\": {SCHEMA}"))),
    }
    serde_json::from_value(Value::Object(fields))
        .map_err(|error| bad(format!("the request is not understood: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_text_of_the_contract() {
        let cases = [
            (Request::Status { source: None }, r#"{"schema":1,"command":"status"}"#),
            (
                Request::Checkpoint { source: Some("filer-a".parse().unwrap()), keep: None },
                r#"{"schema":1,"command":"checkpoint","source":"filer-a"}"#,
            ),
            (
                Request::Checkpoint { source: None, keep: Some("mon".parse().unwrap()) },
                r#"{"schema":1,"command":"checkpoint","keep":"mon"}"#,
            ),
            (Request::Kept { source: None }, r#"{"schema":1,"command":"kept"}"#),
            (
                Request::Drop { target: "filer-a@mon".parse().unwrap() },
                r#"{"schema":1,"command":"drop","target":"filer-a@mon"}"#,
            ),
            (
                Request::Verify { target: Some("filer-a/vol0".parse().unwrap()) },
                r#"{"schema":1,"command":"verify","target":"filer-a/vol0"}"#,
            ),
            (
                Request::Failover {
                    source: "filer-a".parse().unwrap(),
                    dry_run: true,
                    now: false,
                    accept_gap: false,
                    accept_lost_nvram: false,
                },
                r#"{"schema":1,"command":"failover","source":"filer-a","dry_run":true,"now":false,"accept_gap":false,"accept_lost_nvram":false}"#,
            ),
            (
                Request::Failback {
                    source: "filer-a".parse().unwrap(),
                    keep: Some(Side::Hub),
                    to: None,
                    dry_run: false,
                },
                r#"{"schema":1,"command":"failback","source":"filer-a","keep":"hub"}"#,
            ),
            (
                Request::Failback {
                    source: "filer-a".parse().unwrap(),
                    keep: Some(Side::Source),
                    to: None,
                    dry_run: true,
                },
                r#"{"schema":1,"command":"failback","source":"filer-a","keep":"source","dry_run":true}"#,
            ),
            (Request::PoolCheck {}, r#"{"schema":1,"command":"pool-check"}"#),
            (
                Request::Scrub { wait: true, stop: false },
                r#"{"schema":1,"command":"scrub","wait":true,"stop":false}"#,
            ),
        ];
        for (request, text) in cases {
            assert_eq!(request_line(&request).unwrap(), format!("{text}\n").into_bytes());
            assert_eq!(parse_request(text.as_bytes()).unwrap(), request);
        }
    }

    #[test]
    fn answers_have_the_text_of_the_contract() {
        let error = AdminError::new(code::HUB_LOST, "the hub is away", "bring it back");
        let text = r#"{"error":{"message":"the hub is away","next_step":"bring it back","code":"hub-lost"}}"#;
        let line = answer_line(&AnswerLine::Error(error)).unwrap();
        assert_eq!(line, format!("{text}\n").into_bytes());
        let progress = Progress {
            what: "reading".into(),
            object: "filer-a".into(),
            done: 1,
            total: None,
            unit: ProgressUnit::Bytes,
        };
        let line = answer_line(&AnswerLine::Progress(progress)).unwrap();
        assert!(line.starts_with(br#"{"progress":{"what":"reading","object":"filer-a","done":1,"#));
    }

    #[test]
    fn bad_requests_are_answered_with_their_reason() {
        let cases = [
            ("", "no JSON"),
            ("[]", "no JSON object"),
            ("{}", "has no \"schema\""),
            (r#"{"schema":2,"command":"status"}"#, "schema 1 is spoken here, not 2"),
            (r#"{"schema":1}"#, "missing field `command`"),
            (r#"{"schema":1,"command":"reboot"}"#, "unknown variant `reboot`"),
            (r#"{"schema":1,"command":"status","sauce":1}"#, "unknown field `sauce`"),
            (r#"{"schema":1,"command":"pool-check","x":1}"#, "unknown field `x`"),
            (r#"{"schema":1,"command":"status","source":"../x"}"#, "a name is made of"),
            (r#"{"schema":1,"command":"verify","target":"a/b/c"}"#, "not '/'"),
            (r#"{"schema":1,"command":"drop","target":"a"}"#, "named SOURCE@NAME"),
            (r#"{"schema":1,"command":"drop","target":"a@b@c"}"#, "not '@'"),
            (r#"{"schema":1,"command":"drop"}"#, "missing field `target`"),
        ];
        for (text, part) in cases {
            let error = parse_request(text.as_bytes()).unwrap_err();
            assert_eq!(error.code, code::BAD_REQUEST);
            assert!(error.message.contains(part), "{text}: {}", error.message);
        }
        let deep = "[".repeat(100_000);
        assert!(parse_request(deep.as_bytes()).is_err(), "deep nesting is refused, no overflow");
    }

    #[test]
    fn only_the_newest_progress_is_kept() {
        let (sender, mut receiver) = ProgressSender::new();
        for done in 0..1000 {
            let (what, object) = (String::new(), String::new());
            sender.send(Progress { what, object, done, total: None, unit: ProgressUnit::Steps });
        }
        assert_eq!(receiver.borrow_and_update().as_ref().unwrap().done, 999);
        drop(receiver);
        let (what, object) = (String::new(), String::new());
        sender.send(Progress { what, object, done: 0, total: None, unit: ProgressUnit::Steps });
    }
}
