//! Seeds of a source, in `status --json` of a hub.

use serde::{Deserialize, Serialize};

use crate::units::names::VolumeName;

/// The seed of a volume. One that has ended is shown until the hub is started again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeedStatus {
    /// The volume, by the name that its source has for it.
    pub volume: VolumeName,
    /// `filling`, `unfinished`, `waiting` for its source, `unused` if that has an image without it, `adopted`
    /// as what the first image begins with, or `given-up`.
    pub state: String,
    /// Why: one sentence, lower case, no full stop.
    pub reason: String,
    /// What the administrator can do; empty when nothing is to be done.
    pub next_step: String,
    /// When something came to it last, in seconds since 1970; null where an older version has filled it.
    pub taken_at_seconds: Option<i64>,
    /// When it was adopted or given up; not there before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at_seconds: Option<i64>,
    /// Size of the volume.
    pub size_bytes: u64,
    /// What it takes of the pool, or took.
    pub pool_bytes: u64,
}
