//! What a hub asks of a filer that is to become the home of a source, and the answer.
//!
//! `Adopt` goes to a filer in session, or to a new filer that follows with nothing of its own.
//! The filer looks whether it has room and makes what it needs, durably; then it answers, and
//! follows with `Follow` under the source's identity. Nothing is served before `TakeOver`.

use serde::{Deserialize, Serialize};

use super::message::VolumeOffer;
use crate::units::ids::{HubId, SourceId};
use crate::units::names::SourceName;
use crate::units::numbers::{BlockCount, Epoch};
use crate::units::policy::Policy;

/// A source that shall live on the filer that gets this.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adopt {
    /// Comes back in the answer.
    pub token: u64,
    /// The hub that asks.
    pub hub: HubId,
    /// The source.
    pub source: SourceId,
    /// Its name.
    pub name: SourceName,
    /// The epoch in which the hub serves it: until `TakeOver` names a higher one, nobody else does.
    pub epoch: Epoch,
    /// Its volumes.
    pub volumes: Vec<VolumeOffer>,
    /// Blocks that its image takes on the hub, nodes among them.
    pub used: BlockCount,
    /// What it promises.
    pub policy: Option<Policy>,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adopted {
    /// From the question.
    pub token: u64,
    /// Why it cannot be, and the next step; nothing if it can.
    pub refused: Option<(String, String)>,
}
