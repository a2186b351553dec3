//! What the commands `checkpoint`, `kept`, `drop`, `verify` and `pool-check` answer; also their `--json`.

use serde::{Deserialize, Serialize};

use crate::units::hash::Root;
use crate::units::names::{KeptName, SourceName, VolumeName};

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

/// The CPs kept by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptAnswer {
    /// [`super::SCHEMA`].
    pub schema: u32,
    /// One of each source asked for, by name.
    pub sources: Vec<KeptOfSource>,
}

/// What is kept of one source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptOfSource {
    /// Name.
    pub name: SourceName,
    /// Its kept CPs, oldest first.
    pub kept: Vec<KeptCp>,
}

/// One kept CP.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptCp {
    /// Its name.
    pub name: KeptName,
    /// Its number.
    pub cp: u32,
    /// Bytes that neither the image nor a newer kept CP has. The oldest gives back as much when it
    /// is dropped, others less: the rest is older kept CPs', too.
    pub held_bytes: u64,
    /// Roots of its volumes.
    pub volumes: Vec<VolumeRoot>,
}

/// A kept CP is gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DropAnswer {
    /// [`super::SCHEMA`].
    pub schema: u32,
    /// Source.
    pub source: SourceName,
    /// Its name.
    pub name: KeptName,
    /// Its number.
    pub cp: u32,
    /// Bytes that came back.
    pub freed_bytes: u64,
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
