//! The messages of section 8.
//!
//! A header is one byte, the kind, and the MessagePack of that kind's struct. Structs travel as
//! arrays: a later version only appends fields, with a default; what a peer understands is told
//! by the version in Hello and Welcome. Kinds 1 to 31 go from primary to mirror, 33 to 63 the
//! other way, 64 and up both ways.

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::frame::{FRAME_PREFIX_BYTES, FrameError, Lengths};
use super::homes::{Adopt, Adopted};
use super::pull::{Pulled, WantBlocks, WantNodes};
use crate::limits::SCAN_PROBLEM_BYTES_MAX;
use crate::record::marks::Place;
use crate::units::convert::{to_u64, to_usize};
use crate::units::hash::{ContentHash, Root, StreamHash};
use crate::units::ids::{HubId, SourceId, VolumeId};
use crate::units::names::{KeptName, SourceName, VolumeName};
use crate::units::numbers::{
    ByteCount, CpNumber, Epoch, Generation, SequenceNumber, TransferId, VolumeNumber,
};
use crate::units::policy::{AloneMark, Policy};

/// Newest protocol version; a peer accepts its own and the one before.
pub const PROTOCOL_VERSION: u16 = 2;
/// Oldest version still spoken.
pub const PROTOCOL_VERSION_MIN: u16 = 1;
/// From this version on transfers may be sent behind a pass, and [`Behind`] is spoken.
pub const BEHIND_VERSION: u16 = 2;

/// A place in a source's history, as it travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct WirePlace(pub TransferId, pub SequenceNumber, pub StreamHash);

impl From<Place> for WirePlace {
    fn from(place: Place) -> Self {
        Self(place.transfer, place.sequence, place.hash)
    }
}

impl From<WirePlace> for Place {
    fn from(place: WirePlace) -> Self {
        Self { transfer: place.0, sequence: place.1, hash: place.2 }
    }
}

/// A volume as its source announces it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeOffer {
    /// Number within the source.
    pub number: VolumeNumber,
    /// Its id.
    pub id: VolumeId,
    /// Its name.
    pub name: VolumeName,
    /// Its size.
    pub size: ByteCount,
}

/// First frame of a connection: who the source is and what it holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Newest version the source speaks.
    pub version: u16,
    /// Oldest version it speaks.
    pub version_min: u16,
    /// Its name, by which the hub finds its file.
    pub name: SourceName,
    /// Its id, by which it is known.
    pub source: SourceId,
    /// The hub it was joined to before, if any.
    pub hub: Option<HubId>,
    /// Its boot counter.
    pub generation: Generation,
    /// Epoch it believes in; number 0 before the first Welcome.
    pub epoch: Epoch,
    /// Its volumes.
    pub volumes: Vec<VolumeOffer>,
    /// The place before the first transfer it still holds.
    pub held_after: WirePlace,
    /// Its last transfer.
    pub last: WirePlace,
    /// Last transfer known durable in its own NVRAM.
    pub own_durable: TransferId,
    /// Its last own CP.
    pub own_cp: CpNumber,
    /// Highest CP number or birth it ever used.
    pub cp_max: CpNumber,
    /// Whether it already serves its clients (a reconnect), or asks before it serves (R1).
    pub serving: bool,
    /// What it promises; a source that does not say is believed to promise the least.
    #[serde(default)]
    pub policy: Policy,
    /// Since when it may have acknowledged writes without the hub (R4).
    #[serde(default)]
    pub alone: Option<AloneMark>,
    /// Which connection of this boot it is, from 1: an older one that comes late is told by it.
    #[serde(default)]
    pub connection: u64,
}

/// The hub takes the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// Version both speak.
    pub version: u16,
    /// The hub.
    pub hub: HubId,
    /// Epoch in force.
    pub epoch: Epoch,
    /// Published CP.
    pub applied_cp: CpNumber,
    /// Its roots.
    pub roots: Vec<VolumeRoot>,
    /// Place of that CP.
    pub applied: WirePlace,
    /// Last transfer of this source that is durable here.
    pub last: WirePlace,
    /// Highest CP number or birth ever used here for this source.
    pub cp_max: CpNumber,
    /// Bytes of transfers that may be under way.
    pub log_credit: u64,
    /// Bytes of CP data that may be under way.
    pub cp_credit: u64,
    /// Volumes that this session leaves out (R20): CPs are made of the others.
    #[serde(default)]
    pub refused: Vec<VolumeRefusal>,
    /// An image that was not brought up to its end is kept here: comparing goes on from it (R19).
    #[serde(default)]
    pub work: bool,
    /// The last transfer that one in the log here names as durable at the source: up to there it was
    /// acknowledged for sure (R1).
    #[serde(default)]
    pub own_durable: TransferId,
}

/// One volume that the hub does not mirror, while it does the source's others (R20).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRefusal {
    /// Which, by the source's number; of a volume that the source does not have, by the hub's.
    pub volume: VolumeNumber,
    /// Its name.
    pub name: VolumeName,
    /// What is wrong, for the administrator.
    pub reason: String,
    /// What to do about it.
    pub next_step: String,
}

/// The hub does not take the source; the connection closes behind it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// Stable code for the reason.
    pub code: RefusedCode,
    /// What is wrong, for the administrator.
    pub reason: String,
    /// What to do about it.
    pub next_step: String,
}

/// Reasons of [`Refused`], by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub enum RefusedCode {
    /// No common protocol version.
    Version,
    /// The hub has no file for that name.
    UnknownSource,
    /// The name belongs to another id.
    OtherSource,
    /// The source was joined to another hub.
    OtherHub,
    /// An older generation, or the same with another id: a clone or an old copy.
    Generation,
    /// The two histories went different ways.
    Diverged,
    /// The logs do not join: a resync is needed.
    Gap,
    /// A volume differs from what the hub knows.
    Volume,
    /// The source's log on the hub has failed.
    Faulted,
    /// The hub is stopping or too busy.
    Busy,
    /// The peer broke the protocol.
    Protocol,
    /// A higher epoch is in force: the source was failed over.
    Fenced,
}

impl RefusedCode {
    /// All codes, in the order of their numbers from 1.
    pub const ALL: [Self; 12] = [
        Self::Version,
        Self::UnknownSource,
        Self::OtherSource,
        Self::OtherHub,
        Self::Generation,
        Self::Diverged,
        Self::Gap,
        Self::Volume,
        Self::Faulted,
        Self::Busy,
        Self::Protocol,
        Self::Fenced,
    ];

    /// Stable word for logs, metrics and status.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Version => "version",
            Self::UnknownSource => "unknown_source",
            Self::OtherSource => "other_source",
            Self::OtherHub => "other_hub",
            Self::Generation => "generation",
            Self::Diverged => "diverged",
            Self::Gap => "gap",
            Self::Volume => "volume",
            Self::Faulted => "faulted",
            Self::Busy => "busy",
            Self::Protocol => "protocol",
            Self::Fenced => "fenced",
        }
    }
}

impl From<RefusedCode> for u8 {
    fn from(code: RefusedCode) -> Self {
        let at = RefusedCode::ALL.iter().position(|&known| known == code).unwrap_or_default();
        crate::units::convert::low_u8(to_u64(at)) + 1
    }
}

impl TryFrom<u8> for RefusedCode {
    type Error = String;

    fn try_from(number: u8) -> Result<Self, String> {
        let at = usize::from(number).checked_sub(1);
        at.and_then(|at| Self::ALL.get(at).copied())
            .ok_or_else(|| format!("refusal code {number} is unknown"))
    }
}

/// Root of one volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRoot {
    /// Which volume.
    pub volume: VolumeNumber,
    /// Its root.
    pub root: Root,
}

/// The source cut a CP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartitionFull {
    /// The CP.
    pub cp: CpNumber,
    /// Its last transfer.
    pub last: WirePlace,
    /// A pass: the data makes this CP out of the image of CP `base`, without the log, which goes
    /// on behind `last` once the CP is published (R4).
    #[serde(default)]
    pub base: Option<CpNumber>,
    /// No Updates follow, only CpEnd: the mirror applies the entries of its log, in order.
    #[serde(default)]
    pub replay: bool,
    /// Of a pass: what the mirror holds behind `last` is of this line and stays, since it was
    /// acknowledged (invariant 4).
    #[serde(default)]
    pub keeps_log: bool,
}

/// Changed blocks of one volume in a CP; the payload is [`super::updates`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Updates {
    /// The CP.
    pub cp: CpNumber,
    /// The volume.
    pub volume: VolumeNumber,
}

/// All updates were sent; these are the roots the source has committed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpEnd {
    /// The CP.
    pub cp: CpNumber,
    /// Place of the CP in the history (R5).
    pub place: WirePlace,
    /// Roots of exactly the volumes both ends agree on: all but those that Welcome refused.
    pub roots: Vec<VolumeRoot>,
    /// Bytes of Updates payload sent for this CP.
    pub update_bytes: u64,
}

/// Every transfer of this line up to `id` is durable on the hub (R7); credits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    /// Last durable transfer.
    pub id: TransferId,
    /// Bytes of transfers that may be under way.
    pub log_credit: u64,
    /// Bytes of Updates payload taken so far on this connection.
    pub cp_taken: u64,
}

/// The CP is published on the hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpDone {
    /// The CP.
    pub cp: CpNumber,
}

/// The CP was not published; the old image stays.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpRejected {
    /// The CP.
    pub cp: CpNumber,
    /// First volume whose root differs, with the root here.
    pub differs: Option<VolumeRoot>,
    /// Why.
    pub reason: String,
    /// Whether the hub lacks space.
    pub no_space: bool,
}

/// Somebody at the hub asks for a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WantCheckpoint {
    /// Comes back in [`CheckpointAt`].
    pub token: u64,
}

/// The CP that holds everything ordered when [`WantCheckpoint`] came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointAt {
    /// From the question.
    pub token: u64,
    /// That CP; it may be published already.
    pub cp: CpNumber,
}

/// A starting source asks for its own log behind `from`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WantLog {
    /// Its last transfer.
    pub from: WirePlace,
}

/// The end of what [`WantLog`] asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefillEnd {
    /// Last transfer of the refill.
    pub last: WirePlace,
}

/// Raised epoch: the receiver stops serving writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fenced {
    /// The epoch in force.
    pub epoch: Epoch,
    /// The hub that says so; one of an older version does not. Another hub's word fences nobody.
    #[serde(default)]
    pub hub: Option<HubId>,
}

/// The source's durable mark has changed since Hello (R4): what a failover would have to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// Since when it may have acknowledged writes without the hub.
    pub alone: Option<AloneMark>,
}

/// How what is sent behind a pass stands (R4); since version 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Behind {
    /// The pass's CP.
    pub cp: CpNumber,
    /// What is said of it.
    pub state: BehindState,
}

/// See [`Behind`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum BehindState {
    /// The hub has everything up to that transfer, aside: more may be sent. It is not acknowledged.
    Taken(TransferId),
    /// Just before CpDone, from the hub: it is the source's log there now.
    Joins,
    /// From either end: it is given up. A source that hears it says it as well, behind its last transfer.
    Over,
}

/// Asks the other end to read every block of its copy of that CP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scan {
    /// The CP; both ends have published it.
    pub cp: CpNumber,
    /// Names the question.
    pub token: u64,
}

/// What reading one volume gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeScan {
    /// Which volume.
    pub volume: VolumeNumber,
    /// Root recomputed from the data read; none if a block could not be read.
    pub root: Option<Root>,
    /// Data blocks read; holes are known without reading.
    pub blocks_read: u64,
    /// Blocks that could not be read or failed a check.
    pub bad_blocks: u64,
}

/// What reading gave.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scanned {
    /// The CP.
    pub cp: CpNumber,
    /// Names the question.
    pub token: u64,
    /// All volumes; empty if the CP is not here any more.
    pub volumes: Vec<VolumeScan>,
    /// What could not be read or failed its check, in words.
    pub problems: Vec<String>,
}

impl Scanned {
    /// The same with as many problems as a frame has room for, and how many more there are. The
    /// sender calls it: a damaged volume has a problem for each of its blocks.
    pub fn bounded(mut self) -> Self {
        let mut left = to_usize(SCAN_PROBLEM_BYTES_MAX);
        let fits = |problem: &&String| {
            let fits = problem.len() <= left;
            left = left.saturating_sub(problem.len().max(PROBLEM_COST_BYTES));
            fits && left > 0
        };
        let kept = self.problems.iter().take_while(fits).count();
        let more = self.problems.len() - kept;
        if more > 0 {
            self.problems.truncate(kept);
            self.problems.push(format!("and {more} more"));
        }
        self
    }
}

/// What a problem counts as at least: many empty ones fill a frame as well.
const PROBLEM_COST_BYTES: usize = 16;

/// Asks the other end for a block or node that could not be read here, by its content: whatever
/// tree it has there that holds it in that place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WantPlace {
    /// Names the question.
    pub token: u64,
    /// Which volume.
    pub volume: VolumeNumber,
    /// 0 for a block, the level of the node otherwise.
    pub level: u8,
    /// Which one of its level.
    pub index: u64,
    /// Its content hash.
    pub hash: ContentHash,
}

/// Answers [`WantPlace`]; the payload is one item as in `Blocks` or `Nodes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlaceContent {
    /// From the question.
    pub token: u64,
}

/// Heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ping {
    /// Last sequence number the sender has ordered.
    pub sequence: SequenceNumber,
    /// Comes back in Pong.
    pub token: u64,
}

/// Answer to a heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pong {
    /// From the Ping.
    pub token: u64,
}

/// The sender stops on purpose.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Going {
    /// Why.
    pub reason: String,
}

/// First frame of a source that was fenced: it asks to be brought up, and given its volumes back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Follow {
    /// Newest version the source speaks.
    pub version: u16,
    /// Oldest version it speaks.
    pub version_min: u16,
    /// Its name.
    pub name: SourceName,
    /// Its id.
    pub source: SourceId,
    /// The hub it was joined to.
    pub hub: Option<HubId>,
    /// Its boot counter.
    pub generation: Generation,
    /// Epoch in which it was primary.
    pub epoch: Epoch,
    /// Epoch that fenced it.
    pub fenced: Epoch,
    /// Its volumes.
    pub volumes: Vec<VolumeOffer>,
    /// Its last own CP.
    pub own_cp: CpNumber,
    /// Place of that CP.
    pub own: WirePlace,
    /// The last entry it has ordered; beyond `own` what only its NVRAM holds.
    pub last: SequenceNumber,
    /// Highest CP number that it ever used or may have begun to use.
    pub cp_max: CpNumber,
    /// What it promised.
    pub policy: Policy,
    /// Since when it may have acknowledged writes without the hub (R4).
    pub alone: Option<AloneMark>,
    /// Whose pool the source lies in: another id than the source's own where it lives on another
    /// filer than the one it was made on.
    #[serde(default)]
    pub filer: Option<SourceId>,
}

/// One volume of a [`PullTarget`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PullVolume {
    /// Which volume.
    pub volume: VolumeNumber,
    /// Its size.
    pub size: ByteCount,
    /// The root it shall have.
    pub root: Root,
}

/// A CP that the follower shall pull and publish under the same number; the hub holds it pinned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PullTarget {
    /// The CP, above every CP number of both ends.
    pub cp: CpNumber,
    /// Its place in the history.
    pub place: WirePlace,
    /// All volumes.
    pub volumes: Vec<PullVolume>,
    /// Clients are held until it is reached.
    pub last: bool,
    /// What the follower wrote by itself is kept as a CP of that name first.
    pub keep: Option<KeptName>,
    /// Nothing is pulled: what the follower has shall count, and all of it becomes an own CP.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub own: bool,
}

/// The source offers an own CP, which it holds pinned: the hub compares its image with it, pulls what
/// differs, and publishes it under that number. Answered with CpDone or CpRejected, as a pass is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compare {
    /// The CP.
    pub cp: CpNumber,
    /// The CP of the image, which is this source's past (R5).
    pub base: CpNumber,
    /// Its place in the history: the log goes on behind it once it is published (R4).
    pub place: WirePlace,
    /// All volumes.
    pub volumes: Vec<PullVolume>,
    /// As in [`PartitionFull`].
    #[serde(default)]
    pub keeps_log: bool,
}

/// The follower has published that CP, and its roots are those of the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reached {
    /// The CP.
    pub cp: CpNumber,
}

/// The hub has given up: the follower is primary from that CP on (R14). May be repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakeOver {
    /// The new epoch.
    pub epoch: Epoch,
    /// The CP that both ends have.
    pub cp: CpNumber,
    /// Its place: the line goes on behind it.
    pub place: WirePlace,
    /// Boots up to this number were used at the hub.
    pub generation: u32,
    /// The follower's own state becomes that CP; the hub's image is another, and is brought up.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub own: bool,
}

macro_rules! messages {
    ($($number:literal $name:ident $(($inner:ty))? payload $payload:literal;)*) => {
        /// A message without its payload.
        #[derive(Debug, Clone, PartialEq, Eq)]
        #[expect(missing_docs, reason = "each variant is the struct of its name, documented there")]
        pub enum Message { $($name $(($inner))?,)* }

        impl Message {
            /// Its name, for logs and errors.
            pub const fn name(&self) -> &'static str {
                match self { $(messages!(@pattern $name $(($inner))?) => stringify!($name),)* }
            }

            fn encode_header(&self) -> Result<Vec<u8>, rmp_serde::encode::Error> {
                match self { $(messages!(@bind $name body $(($inner))?) =>
                    messages!(@encode $number body $(($inner))?),)* }
            }

            /// Reads a header and checks that a payload is there exactly where one belongs.
            pub fn decode(header: &[u8], payload_bytes: u64) -> Result<Self, FrameError> {
                let Some((&kind, rest)) = header.split_first() else {
                    return Err(FrameError::NoHeader);
                };
                match kind {
                    $($number => {
                        let kind = stringify!($name);
                        if (payload_bytes > 0) != $payload {
                            return Err(FrameError::Payload { kind, bytes: payload_bytes });
                        }
                        messages!(@decode $name kind rest $(($inner))?)
                    })*
                    other => Err(FrameError::Kind(other)),
                }
            }
        }
    };
    (@pattern $name:ident ($inner:ty)) => { Self::$name(_) };
    (@pattern $name:ident) => { Self::$name };
    (@bind $name:ident $body:ident ($inner:ty)) => { Self::$name($body) };
    (@bind $name:ident $body:ident) => { Self::$name };
    (@encode $number:literal $body:ident ($inner:ty)) => {{
        let mut out = vec![$number];
        rmp_serde::encode::write(&mut out, $body)?;
        Ok(out)
    }};
    (@encode $number:literal $body:ident) => { Ok(vec![$number]) };
    (@decode $name:ident $kind:ident $rest:ident ($inner:ty)) => {
        decode_body::<$inner>($kind, $rest).map(Self::$name)
    };
    (@decode $name:ident $kind:ident $rest:ident) => {
        if $rest.is_empty() { Ok(Self::$name) } else {
            Err(FrameError::Trailing { kind: $kind, bytes: to_u64($rest.len()) })
        }
    };
}

messages! {
    1 Hello(Box<Hello>) payload false;
    2 Transfer payload true;
    3 PartitionFull(PartitionFull) payload false;
    4 Updates(Updates) payload true;
    5 CpEnd(CpEnd) payload false;
    6 WantLog(WantLog) payload false;
    7 CheckpointAt(CheckpointAt) payload false;
    8 Nodes(Pulled) payload true;
    9 Blocks(Pulled) payload true;
    10 Standing(Standing) payload false;
    11 PullTarget(PullTarget) payload false;
    12 TakeOver(TakeOver) payload false;
    16 Compare(Compare) payload false;
    17 Adopted(Adopted) payload false;
    33 Welcome(Welcome) payload false;
    34 Refused(Refused) payload false;
    35 Ack(Ack) payload false;
    36 WantCheckpoint(WantCheckpoint) payload false;
    37 CpDone(CpDone) payload false;
    38 CpRejected(CpRejected) payload false;
    39 Refill payload true;
    40 RefillEnd(RefillEnd) payload false;
    41 Fenced(Fenced) payload false;
    42 WantNodes(WantNodes) payload false;
    43 WantBlocks(WantBlocks) payload false;
    44 Follow(Box<Follow>) payload false;
    45 Reached(Reached) payload false;
    46 WantRewrite payload false;
    48 Adopt(Box<Adopt>) payload false;
    64 Ping(Ping) payload false;
    65 Pong(Pong) payload false;
    66 Going(Going) payload false;
    67 Scan(Scan) payload false;
    68 Scanned(Scanned) payload false;
    69 WantPlace(WantPlace) payload false;
    70 PlaceContent(PlaceContent) payload true;
    71 Behind(Behind) payload false;
}

fn decode_body<T: DeserializeOwned>(kind: &'static str, rest: &[u8]) -> Result<T, FrameError> {
    let mut cursor = std::io::Cursor::new(rest);
    let mut deserializer = rmp_serde::Deserializer::new(&mut cursor);
    let body = T::deserialize(&mut deserializer)
        .map_err(|error| FrameError::Malformed { kind, what: error.to_string() })?;
    let left = to_u64(rest.len()).saturating_sub(cursor.position());
    if left > 0 {
        return Err(FrameError::Trailing { kind, bytes: left });
    }
    Ok(body)
}

/// A message with its payload, ready for the wire.
#[derive(Debug, Clone)]
pub struct Frame {
    /// Prefix and header.
    pub head: Bytes,
    /// Raw payload, empty for most messages.
    pub payload: Bytes,
    /// Behind this one Acks may leave.
    pub is_welcome: bool,
}

impl Frame {
    /// Forms the frame of `message`; `payload` is empty where the message has none.
    pub fn new(message: &Message, payload: Bytes) -> Self {
        let header = match message.encode_header() {
            Ok(header) => header,
            // Writing to memory cannot fail, and every field has a MessagePack form.
            Err(error) => panic!("message {} cannot be encoded: {error}", message.name()),
        };
        let prefix = Lengths::encode(header.len(), payload.len());
        let mut head = Vec::with_capacity(FRAME_PREFIX_BYTES + header.len());
        head.extend_from_slice(&prefix);
        head.extend_from_slice(&header);
        let is_welcome = matches!(message, Message::Welcome(_));
        Self { head: head.into(), payload, is_welcome }
    }

    /// Bytes on the wire.
    pub fn bytes(&self) -> u64 {
        to_u64(self.head.len() + self.payload.len())
    }
}

#[cfg(test)]
mod tests {
    use super::super::pull::Spans;
    use super::*;
    use crate::units::numbers::BlockCount;
    use crate::units::policy::Mode;

    #[test]
    fn the_words_of_refusals_are_those_of_the_catalogue() {
        let words = RefusedCode::ALL.map(RefusedCode::word);
        assert_eq!(words.as_slice(), crate::metric::catalogue::REFUSALS);
    }

    fn round(message: Message, payload: &'static [u8]) {
        let frame = Frame::new(&message, Bytes::from_static(payload));
        let prefix = frame.head.first_chunk::<8>().unwrap();
        let lengths = Lengths::decode(*prefix).unwrap();
        assert_eq!(lengths.payload, payload.len());
        let header = &frame.head[8..];
        assert_eq!(lengths.header, header.len());
        let bytes = u64::try_from(payload.len()).unwrap();
        assert_eq!(Message::decode(header, bytes).unwrap(), message);
        let mut long = header.to_vec();
        long.push(0);
        assert!(Message::decode(&long, bytes).is_err(), "trailing byte in {}", message.name());
        for cut in 1..header.len() {
            assert!(Message::decode(&header[..cut], bytes).is_err(), "{} cut", message.name());
        }
    }

    fn place() -> WirePlace {
        WirePlace(TransferId { generation: 1, counter: 2 }, SequenceNumber(3), StreamHash([4; 16]))
    }

    #[test]
    fn messages_survive_the_wire_and_no_cut_passes() {
        let volume = VolumeNumber(1);
        let root = VolumeRoot { volume, root: Root([9; 32]) };
        round(Message::Transfer, b"x");
        let (last, base, replay, keeps_log) = (place(), None, true, true);
        let full = PartitionFull { cp: CpNumber(300), last, base, replay, keeps_log };
        round(Message::PartitionFull(full), b"");
        round(Message::Updates(Updates { cp: CpNumber(1), volume }), b"y");
        let end = CpEnd { cp: CpNumber(1), place: place(), roots: vec![root], update_bytes: 5 };
        round(Message::CpEnd(end), b"");
        let id = TransferId { generation: 1, counter: 70_000 };
        round(Message::Ack(Ack { id, log_credit: 1 << 22, cp_taken: 0 }), b"");
        let refused = Refused {
            code: RefusedCode::Gap,
            reason: "logs do not join".into(),
            next_step: "resync".into(),
        };
        round(Message::Refused(refused), b"");
        let (cp, number) = (CpNumber(70_000), 1 << 40);
        let mut nodes = Spans::new();
        [3, 4, 70_000].into_iter().for_each(|index| nodes.push(index));
        round(Message::WantNodes(WantNodes { cp, volume, number, level: 1, nodes }), b"");
        let mut blocks = Spans::new();
        [0, 1 << 40].into_iter().for_each(|vbn| blocks.push(vbn));
        round(Message::WantBlocks(WantBlocks { cp, volume, number, blocks }), b"");
        round(Message::Nodes(Pulled { cp, volume, number }), b"n");
        round(Message::Blocks(Pulled { cp, volume, number }), b"b");
        let volumes = vec![PullVolume { volume, size: ByteCount(1 << 30), root: Root([9; 32]) }];
        let (base, of, keeps_log) = (CpNumber(9), volumes.clone(), true);
        let compare = Compare { cp, base, place: place(), volumes: of, keeps_log };
        round(Message::Compare(compare), b"");
        let (keep, own) = (Some("split-2".parse().unwrap()), true);
        let target = PullTarget { cp, place: place(), volumes, last: true, keep, own };
        round(Message::PullTarget(target), b"");
        let epoch = Epoch { number: 3, id: 1 << 60 };
        round(Message::TakeOver(TakeOver { epoch, cp, place: place(), generation: 9, own }), b"");
        round(Message::Reached(Reached { cp }), b"");
        round(Message::WantRewrite, b"");
        let (token, hash) = (1 << 60, ContentHash([8; 16]));
        round(Message::WantPlace(WantPlace { token, volume, level: 2, index: 1 << 40, hash }), b"");
        round(Message::PlaceContent(PlaceContent { token }), b"p");
        let follow = Follow {
            version: 1,
            version_min: 1,
            name: "filer-a".parse().unwrap(),
            source: SourceId([1; 16]),
            hub: None,
            generation: Generation { number: 1, id: 2 },
            epoch: Epoch::default(),
            fenced: epoch,
            volumes: Vec::new(),
            own_cp: CpNumber(1),
            own: place(),
            last: SequenceNumber(9),
            cp_max: CpNumber(2),
            policy: Policy::default(),
            alone: None,
            filer: Some(SourceId([2; 16])),
        };
        round(Message::Follow(Box::new(follow)), b"");
    }

    #[test]
    fn the_question_for_another_home_survives_the_wire() {
        let adopt = Adopt {
            token: 7,
            hub: HubId([3; 16]),
            source: SourceId([1; 16]),
            name: "filer-a".parse().unwrap(),
            epoch: Epoch { number: 5, id: 6 },
            volumes: Vec::new(),
            used: BlockCount(300),
            policy: Some(Policy::default()),
        };
        round(Message::Adopt(Box::new(adopt)), b"");
        let refused = Some(("no room".to_owned(), "make some".to_owned()));
        round(Message::Adopted(Adopted { token: 7, refused }), b"");
    }

    /// The bounds on requests hold where frames are read: a list over its bound, rising again
    /// where it must not, or empty, is a malformed message.
    #[test]
    fn a_pull_asks_for_a_bounded_number_of_places() {
        let decode = |kind: u8, body: &[u8]| Message::decode(&[&[kind], body].concat(), 0);
        assert!(decode(42, &[0x95, 1, 1, 1, 1, 0x91, 0x92, 0, 62]).is_ok());
        let bad: [&[u8]; 4] = [
            &[0x95, 1, 1, 1, 1, 0x91, 0x92, 0, 63],
            &[0x95, 1, 1, 1, 1, 0x90],
            &[0x95, 1, 1, 1, 1, 0xdd, 0xff, 0xff, 0xff, 0xff],
            &[0x95, 1, 1, 1, 1, 0x91, 0x92, 0, 0],
        ];
        for body in bad {
            let met = decode(42, body);
            assert!(matches!(met, Err(FrameError::Malformed { kind: "WantNodes", .. })), "{met:?}");
        }
        assert!(decode(43, &[0x94, 1, 1, 1, 0x91, 0x92, 0, 31]).is_ok());
        assert!(decode(43, &[0x94, 1, 1, 1, 0x91, 0x92, 0, 32]).is_err());
        for kind in [8, 9] {
            let met = Message::decode(&[kind, 0x93, 1, 1, 1], 0);
            assert!(matches!(met, Err(FrameError::Payload { .. })), "{met:?}");
        }
    }

    /// A source of before says nothing of its promise: it is believed to promise the least.
    #[test]
    fn a_hello_grows_at_its_end() {
        let hello = Hello {
            version: 1,
            version_min: 1,
            name: "filer-a".parse().unwrap(),
            source: SourceId([1; 16]),
            hub: None,
            generation: Generation { number: 1, id: 2 },
            epoch: Epoch::default(),
            volumes: Vec::new(),
            held_after: place(),
            last: place(),
            own_durable: TransferId::NONE,
            own_cp: CpNumber(1),
            cp_max: CpNumber(2),
            serving: true,
            policy: Policy { mode: Mode::Async, ..Policy::default() },
            connection: 5,
            alone: Some((Epoch { number: 3, id: 4 }, SequenceNumber(5))),
        };
        round(Message::Hello(Box::new(hello.clone())), b"");
        let mut header = Message::Hello(Box::new(hello.clone())).encode_header().unwrap();
        // An array of 17 fields, from 0x00dc_0011 on; the last three are appended ones.
        assert_eq!(header[1..4], [0xdc, 0, 17]);
        let appended = rmp_serde::to_vec(&hello.policy).unwrap().len()
            + rmp_serde::to_vec(&hello.alone).unwrap().len()
            + rmp_serde::to_vec(&hello.connection).unwrap().len();
        header.truncate(header.len() - appended);
        header[3] = 14;
        let older = Hello { policy: Policy::default(), alone: None, connection: 0, ..hello };
        let decoded = Message::decode(&header, 0).unwrap();
        assert_eq!(decoded, Message::Hello(Box::new(older)));
    }

    /// A field that came later is absent in what an older peer says.
    #[test]
    fn a_partition_full_without_a_word_of_replay_has_updates() {
        let old = rmp_serde::to_vec(&(CpNumber(300), place())).unwrap();
        let header: Vec<u8> = std::iter::once(3).chain(old).collect();
        let full = PartitionFull {
            cp: CpNumber(300),
            last: place(),
            base: None,
            replay: false,
            keeps_log: false,
        };
        assert_eq!(Message::decode(&header, 0).unwrap(), Message::PartitionFull(full));
    }

    /// An acknowledgement is small: it is half of the wire's overhead at depth 1.
    #[test]
    fn an_ack_has_at_most_thirty_bytes() {
        let id = TransferId { generation: 100, counter: 1 << 40 };
        let ack = Ack { id, log_credit: 1 << 40, cp_taken: 0 };
        let frame = Frame::new(&Message::Ack(ack), Bytes::new());
        assert!(frame.bytes() <= 34, "{} bytes", frame.bytes());
    }

    #[test]
    fn payloads_and_kinds_are_held_to_the_table() {
        assert_eq!(Message::decode(&[200], 0), Err(FrameError::Kind(200)));
        assert_eq!(Message::decode(&[], 0), Err(FrameError::NoHeader));
        assert_eq!(
            Message::decode(&[2], 0),
            Err(FrameError::Payload { kind: "Transfer", bytes: 0 })
        );
        assert!(matches!(Message::decode(&[35], 9), Err(FrameError::Payload { .. })));
        assert!(matches!(Message::decode(&[35, 0x93], 0), Err(FrameError::Malformed { .. })));
    }

    /// A volume with a problem for each of its blocks still has an answer that fits a frame.
    #[test]
    fn an_answer_with_too_many_problems_is_bounded() {
        let scanned = |problems| Scanned { cp: CpNumber(1), token: 1, volumes: vec![], problems };
        let few = scanned(vec!["one".to_owned(), "two".to_owned()]);
        assert_eq!(few.clone().bounded(), few);
        for (length, count) in [(0, 20_000), (1, 20_000), (100, 20_000), (40_000, 9), (1 << 20, 2)]
        {
            let answer = scanned(vec!["x".repeat(length); count]).bounded();
            let last = answer.problems.last().unwrap();
            let kept = answer.problems.len() - 1;
            assert_eq!(*last, format!("and {} more", count - kept));
            assert!(kept > 0 || length >= 40_000);
            let frame = Frame::new(&Message::Scanned(answer), Bytes::new());
            assert!(frame.bytes() < SCAN_PROBLEM_BYTES_MAX * 2, "{length}");
        }
    }

    #[test]
    fn refusal_codes_keep_their_numbers() {
        for (at, code) in RefusedCode::ALL.into_iter().enumerate() {
            let number = u8::from(code);
            assert_eq!(usize::from(number), at + 1);
            assert_eq!(RefusedCode::try_from(number), Ok(code));
        }
        assert!(RefusedCode::try_from(0).is_err());
        assert!(RefusedCode::try_from(99).is_err());
    }
}
