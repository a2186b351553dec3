//! What the actor of a source is told and asked.

use std::sync::Arc;

use actix::Message as ActorMessage;
use bytes::Bytes;
use tokio::sync::oneshot;

use super::peer::Peer;
use crate::hub::lane::Lane;
use crate::record::marks::Place;
use crate::record::transfer::Transfer;
use crate::units::numbers::{CpNumber, Epoch, VolumeNumber};
use crate::wire::message::{Hello, Message, Scanned, VolumeRoot, WantPlace};
use crate::wire::pull::Pulled;

/// A connection that has said Hello.
#[derive(Debug, ActorMessage)]
#[rtype(result = "()")]
pub struct Connected {
    /// What it said.
    pub hello: Hello,
    /// How to reach it.
    pub peer: Peer,
}

/// A frame of the connection with that number.
#[derive(Debug, ActorMessage)]
#[rtype(result = "()")]
pub struct FrameIn {
    /// The connection.
    pub number: u64,
    /// Bytes of the frame, its headers included.
    pub bytes: u64,
    /// What came.
    pub content: Content,
}

/// What a frame held, checked as far as the connection can.
#[derive(Debug)]
pub enum Content {
    /// A transfer with right checksums.
    Transfer(Transfer),
    /// Updates of a CP.
    Updates { cp: CpNumber, volume: VolumeNumber, payload: Bytes },
    /// An answer to a comparison: children of nodes.
    Nodes(Pulled, Bytes),
    /// The same: blocks.
    Blocks(Pulled, Bytes),
    /// The answer to a question about a place.
    Place { token: u64, payload: Bytes },
    /// Anything else.
    Other(Message),
    /// Something else than a frame: the reason to close.
    Bad(String),
    /// The connection is gone.
    Gone(String),
}

/// The lane's bell rang.
#[derive(Debug, ActorMessage)]
#[rtype(result = "()")]
pub struct Progress;

/// The catalog has recorded what the session asked for.
#[derive(Debug, ActorMessage)]
#[rtype(result = "()")]
pub struct Recorded {
    /// For which connection.
    pub number: u64,
    /// The lane, or why it was not recorded.
    pub result: Result<Arc<Lane>, String>,
}

/// A refill was sent, or could not be.
#[derive(Debug, ActorMessage)]
#[rtype(result = "()")]
pub struct LogSent {
    /// To which connection.
    pub number: u64,
    /// Up to where.
    pub upto: Option<Place>,
}

/// The administrator asks for a checkpoint: answered when it is published.
#[derive(Debug, ActorMessage)]
#[rtype(result = "oneshot::Receiver<Result<(CpNumber, Vec<VolumeRoot>), String>>")]
pub struct WantCheckpoint;

/// The administrator asks the source to read a CP; `None` asks which CP is published.
#[derive(Debug, ActorMessage)]
#[rtype(result = "oneshot::Receiver<Result<Scanned, String>>")]
pub struct WantScan(pub CpNumber);

/// A place that could not be read is asked of the source.
#[derive(Debug, ActorMessage)]
#[rtype(result = "()")]
pub struct AskPlace(pub WantPlace);

/// Something was mended: the source is asked for a CP, with which it is written.
#[derive(Debug, ActorMessage)]
#[rtype(result = "()")]
pub struct AskRewrite;

/// The source's epoch was raised: it is told, its connection ends, a CP under way is given up.
/// Answered with the highest CP number that is known to be used.
#[derive(Debug, ActorMessage)]
#[rtype(result = "CpNumber")]
pub struct Fence(pub Epoch);

/// A step of a failover is done: what is known durably has changed.
#[derive(Debug, ActorMessage)]
#[rtype(result = "()")]
pub struct Changed;

/// The hub stops: the source is told and let go. Says when its connection has ended, if there
/// is one.
#[derive(Debug, ActorMessage)]
#[rtype(result = "Option<oneshot::Receiver<()>>")]
pub struct Goodbye;

/// The source was given back with that CP and place: its lane goes on there, and so does the session
/// (R14). Both at once: nobody looks in between.
#[derive(Debug, ActorMessage)]
#[rtype(result = "()")]
pub struct HandedOver(pub CpNumber, pub Place);

/// The source's file has changed, is gone, or is there again.
#[derive(Debug, ActorMessage)]
#[rtype(result = "()")]
pub struct FileChanged;

/// The source is forgotten: the actor ends.
#[derive(Debug, ActorMessage)]
#[rtype(result = "()")]
pub struct Forgotten;

/// A test asks for a panic in this actor's handler.
#[derive(Debug, ActorMessage)]
#[rtype(result = "()")]
pub struct Panic;
