//! What the commands `checkpoint`, `kept`, `drop`, `verify`, `failover` and `pool-check` answer;
//! also their `--json`.

use serde::{Deserialize, Serialize};

use crate::units::hash::Root;
use crate::units::names::{KeptName, SourceName, VolumeName};

/// A seed that was filled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeedAnswer {
    /// [`super::SCHEMA`].
    pub schema: u32,
    /// Source.
    pub source: SourceName,
    /// Volume.
    pub volume: VolumeName,
    /// Its size.
    pub size_bytes: u64,
    /// Root of what is in it, as `mirrorhub hash` prints it of the file.
    pub root: Root,
    /// What it takes of the pool.
    pub pool_bytes: u64,
    /// What to do.
    pub next_step: String,
}

/// Seeds whose sources have not come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeedsAnswer {
    /// [`super::SCHEMA`].
    pub schema: u32,
    /// One each.
    pub seeds: Vec<SeedEntry>,
}

/// A seed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeedEntry {
    /// Source.
    pub source: SourceName,
    /// Volume.
    pub volume: VolumeName,
    /// Its size; null for one that was given up.
    pub size_bytes: Option<u64>,
    /// What it takes, or has given back, of the pool.
    pub pool_bytes: u64,
    /// `finished`, `unfinished` (its source waits) or `given up`.
    pub state: String,
}

/// A CP that is published on the hub.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointAnswer {
    /// [`super::SCHEMA`].
    pub schema: u32,
    /// One of each source asked for, by name.
    pub sources: Vec<CheckpointOfSource>,
    /// Those of which none came, where several were asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed: Vec<CheckpointFailed>,
}

/// What happened at a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventsAnswer {
    /// [`super::SCHEMA`].
    pub schema: u32,
    /// This run of the process.
    pub boot: String,
    /// The number that the next event will have.
    pub next: u64,
    /// Events behind the one that was asked for which are not kept any more.
    pub passed_over: u64,
    /// The others, oldest first.
    pub events: Vec<Event>,
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Counted from 0 at the start of the process.
    pub number: u64,
    /// When, in seconds since 1970.
    pub at_seconds: i64,
    /// Who: the user of a command, a source, the files.
    pub who: String,
    /// What.
    pub what: String,
    /// What came of it.
    pub result: String,
}

/// A source without a new CP.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointFailed {
    /// Name.
    pub name: SourceName,
    /// Why.
    pub reason: String,
    /// What to do; may be empty.
    pub next_step: String,
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

/// What was given up of a retired source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForgetAnswer {
    /// [`super::SCHEMA`].
    pub schema: u32,
    /// Its name.
    pub source: SourceName,
    /// Volumes whose images are gone.
    pub volumes: u64,
    /// Kept CPs that are gone.
    pub kept: u64,
    /// Bytes that are free again.
    pub freed_bytes: u64,
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
    /// When it was kept, in seconds since 1970.
    pub kept_at: i64,
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

/// What reading both ends has shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Both ends were read whole and have one root.
    Equal,
    /// Both ends were read and differ, or a block of one is bad.
    Differ,
    /// An end was not read: nothing is said about the data.
    Unproven,
}

impl Verdict {
    /// The verdict on two ends of a volume.
    pub fn of(one: &VerifyOfEnd, other: &VerifyOfEnd) -> Self {
        if one.bad_blocks > 0 || other.bad_blocks > 0 {
            return Self::Differ;
        }
        match (&one.root, &other.root) {
            (Some(one), Some(other)) if one == other => Self::Equal,
            (Some(_), Some(_)) => Self::Differ,
            (None, _) | (_, None) => Self::Unproven,
        }
    }
}

/// Both ends have read every block of the last common CP and hashed it anew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyAnswer {
    /// [`super::SCHEMA`].
    pub schema: u32,
    /// `differ` if any volume does; `equal` if there is at least one and all of them are proven.
    pub verdict: Verdict,
    /// Whether the verdict is `equal`.
    pub equal: bool,
    /// One of each volume asked for that was read.
    pub volumes: Vec<VerifyOfVolume>,
    /// Sources that could not be read, or not whole.
    pub unproven: Vec<Unproven>,
}

impl VerifyAnswer {
    /// The answer to what was read. Nothing read is nothing proven.
    pub fn of(volumes: Vec<VerifyOfVolume>, unproven: Vec<Unproven>) -> Self {
        let any = |verdict| volumes.iter().any(|volume| volume.verdict == verdict);
        let verdict = if any(Verdict::Differ) {
            Verdict::Differ
        } else if volumes.is_empty() || !unproven.is_empty() || any(Verdict::Unproven) {
            Verdict::Unproven
        } else {
            Verdict::Equal
        };
        let equal = verdict == Verdict::Equal;
        Self { schema: super::SCHEMA, verdict, equal, volumes, unproven }
    }
}

/// A source about which nothing is proven.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unproven {
    /// Source.
    pub source: SourceName,
    /// Why: one sentence, lower case, no full stop.
    pub reason: String,
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
    /// What was found.
    pub verdict: Verdict,
    /// Whether the verdict is `equal`.
    pub equal: bool,
    /// The source's end.
    pub source_end: VerifyOfEnd,
    /// The hub's end.
    pub hub_end: VerifyOfEnd,
}

/// What one end found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyOfEnd {
    /// Root recomputed from the data read; null if a block could not be read, or if this end did
    /// not read at all: then `blocks_read` and `bad_blocks` are 0.
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
    /// `complete`, `up-to-gap`, `nothing-to-replay`, `taken-back` or `nvram-given-up`; a refusal is
    /// an error, but for what a dry run says of it.
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
    /// Whether the log is in the image. If not, and it is no dry run, clients are served over it
    /// while it is being applied.
    #[serde(default)]
    pub applied: bool,
    /// What was done and what cannot be excluded, in words.
    pub sentences: Vec<String>,
    /// What to do next.
    pub next_step: String,
}

/// A source was given back to its filer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailbackAnswer {
    /// [`super::SCHEMA`].
    pub schema: u32,
    /// Source.
    pub source: SourceName,
    /// Nothing was done: this is what would be.
    #[serde(default)]
    pub dry_run: bool,
    /// The epoch in which its filer is primary.
    pub epoch: u32,
    /// The CP that both ends have.
    pub cp: u32,
    /// Rounds in which the filer was brought up.
    pub rounds: u32,
    /// For how long writers were held, up to the filer's first word as primary.
    pub pause_ms: u64,
    /// Whether the filer has said that it is primary.
    pub serves: bool,
    /// The CP on the filer that keeps what it wrote by itself; null if it wrote nothing.
    pub kept: Option<KeptName>,
    /// The CP on the hub that keeps what was written there, with `--keep source`; else null.
    #[serde(default)]
    pub kept_on_hub: Option<KeptName>,
    /// What was done, in words.
    pub sentences: Vec<String>,
    /// What to do next; empty if nothing.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn end(root: Option<u8>, bad_blocks: u64) -> VerifyOfEnd {
        VerifyOfEnd { root: root.map(|byte| Root([byte; 32])), blocks_read: 1, bad_blocks }
    }

    fn volume(verdict: Verdict) -> VerifyOfVolume {
        let (source, volume) = ("filer-a".parse().unwrap(), "vol0".parse().unwrap());
        let (source_end, hub_end) = (end(None, 0), end(None, 0));
        let equal = verdict == Verdict::Equal;
        VerifyOfVolume { source, volume, cp: 1, verdict, equal, source_end, hub_end }
    }

    /// Only two roots that differ, or a bad block, are an alarm; an end that was not read is none.
    #[test]
    fn an_end_that_was_not_read_is_not_a_difference() {
        for (one, other, verdict) in [
            (end(Some(1), 0), end(Some(1), 0), Verdict::Equal),
            (end(Some(1), 0), end(Some(2), 0), Verdict::Differ),
            (end(None, 3), end(Some(1), 0), Verdict::Differ),
            (end(Some(1), 0), end(None, 0), Verdict::Unproven),
            (end(None, 0), end(None, 0), Verdict::Unproven),
        ] {
            assert_eq!(Verdict::of(&one, &other), verdict, "{one:?} {other:?}");
            assert_eq!(Verdict::of(&other, &one), verdict, "{other:?} {one:?}");
        }
    }

    #[test]
    fn equal_needs_a_volume_and_every_source() {
        let unproven = Unproven { source: "filer-b".parse().unwrap(), reason: "away".into() };
        for (volumes, unproven, verdict) in [
            (vec![], vec![], Verdict::Unproven),
            (vec![volume(Verdict::Equal)], vec![], Verdict::Equal),
            (vec![volume(Verdict::Equal)], vec![unproven.clone()], Verdict::Unproven),
            (vec![volume(Verdict::Equal), volume(Verdict::Unproven)], vec![], Verdict::Unproven),
            (vec![volume(Verdict::Differ), volume(Verdict::Unproven)], vec![], Verdict::Differ),
            (vec![volume(Verdict::Differ)], vec![unproven], Verdict::Differ),
        ] {
            let answer = VerifyAnswer::of(volumes, unproven);
            assert_eq!((answer.verdict, answer.equal), (verdict, verdict == Verdict::Equal));
        }
    }
}
