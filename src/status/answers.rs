//! What the commands `checkpoint`, `verify`, `failover` and `pool-check` answer; also their `--json`.

use serde::{Deserialize, Serialize};

use crate::units::hash::Root;
use crate::units::names::{SourceName, VolumeName};

/// A CP that is published on the hub.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointAnswer {
    /// [`super::SCHEMA`].
    pub schema: u32,
    /// One of each source asked for, by name.
    pub sources: Vec<CheckpointOfSource>,
}

/// The CP of one source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointOfSource {
    /// Name.
    pub name: SourceName,
    /// Number of the CP that holds everything acknowledged before the command. An idle source
    /// makes none and answers its newest.
    pub cp: u32,
    /// Roots, equal on both ends.
    pub volumes: Vec<VolumeRoot>,
}

/// Root of one volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRoot {
    /// Name within its source.
    pub name: VolumeName,
    /// Root.
    pub root: Root,
}

/// Both ends have read every block of the last common CP and hashed it anew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyAnswer {
    /// [`super::SCHEMA`].
    pub schema: u32,
    /// Whether every volume is equal and without a bad block.
    pub equal: bool,
    /// One of each volume asked for.
    pub volumes: Vec<VerifyOfVolume>,
}

/// The comparison of one volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyOfVolume {
    /// Source.
    pub source: SourceName,
    /// Volume.
    pub volume: VolumeName,
    /// CP that was read.
    pub cp: u32,
    /// Whether the roots are equal and no block was bad.
    pub equal: bool,
    /// The source's end.
    pub source_end: VerifyOfEnd,
    /// The hub's end.
    pub hub_end: VerifyOfEnd,
}

/// What one end found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyOfEnd {
    /// Root recomputed from the data read; null if a block could not be read.
    pub root: Option<Root>,
    /// Blocks read; holes are known without reading.
    pub blocks_read: u64,
    /// Blocks that failed their checksum or could not be read.
    pub bad_blocks: u64,
}

/// A source was failed over, or would be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailoverAnswer {
    /// [`super::SCHEMA`].
    pub schema: u32,
    /// Source.
    pub source: SourceName,
    /// Nothing was done: this is what would be.
    pub dry_run: bool,
    /// `complete`, `up-to-gap` or `nothing-to-replay`; a refusal is an error.
    pub outcome: String,
    /// The epoch that fences the source.
    pub epoch: u32,
    /// The CP that shows everything that was replayed.
    pub cp: u32,
    /// The last write of the image.
    pub sequence: u64,
    /// Entries replayed.
    pub entries: u64,
    /// Bytes of client data in them.
    pub bytes: u64,
    /// Whether the loss of an acknowledged write is known or cannot be excluded.
    pub may_be_lost: bool,
    /// What was done and what cannot be excluded, in words.
    pub sentences: Vec<String>,
    /// What to do next.
    pub next_step: String,
}

/// The pool has been walked from its roots: `reachable + free = all`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolCheckAnswer {
    /// [`super::SCHEMA`].
    pub schema: u32,
    /// Whether nothing below is wrong.
    pub sound: bool,
    /// Blocks of the pool.
    pub all_blocks: u64,
    /// Blocks that some published or kept root, or the pool's own metadata, reaches.
    pub reachable_blocks: u64,
    /// Blocks that the free map calls free.
    pub free_blocks: u64,
    /// Blocks neither reachable nor free: lost space.
    pub leaked_blocks: u64,
    /// Blocks reachable and free at once: a danger to data.
    pub contested_blocks: u64,
    /// Blocks whose checksum or hash is wrong.
    pub bad_blocks: u64,
    /// The first faults in words, at most a hundred.
    pub faults: Vec<String>,
}
