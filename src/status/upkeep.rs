//! Scrub and rebuild of a pool, in `status --json` and in the answers of `scrub`.

use serde::{Deserialize, Serialize};

/// The scrub of a pool.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ScrubStatus {
    /// Whether one is under way. Then the numbers below are its own, else those of the last one.
    pub running: bool,
    /// `never`, `running`, `stopped`, `clean`, `repaired` or `damaged`.
    pub state: String,
    /// Bytes read.
    pub done_bytes: u64,
    /// Of so many, as far as is known.
    pub total_bytes: u64,
    /// At the rate so far; null while unknown.
    pub seconds_left: Option<f64>,
    /// Blocks and nodes that were not right and were taken from another copy.
    pub repaired_blocks: u64,
    /// Copies and parity blocks that did not fit the proven data, and were rewritten.
    pub repaired_copies: u64,
    /// Blocks and nodes of which no copy here was right, and which the other end has given back.
    pub from_other_end_blocks: u64,
    /// Blocks and nodes of which no copy is right.
    pub lost_blocks: u64,
    /// The first of these, each a sentence that names the place.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lost: Vec<String>,
    /// What it met on each device.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<ScrubbedDevice>,
    /// Seconds that this pool was open since the last whole scrub; null if there was none.
    pub age_seconds: Option<f64>,
    /// Why it could not go on; not there if it could.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// When the last whole scrub ended, in seconds since 1970; not there where that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<i64>,
}

/// What a scrub met on one device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubbedDevice {
    /// Its path, as far as it is known.
    pub name: String,
    /// Reads that failed.
    pub read_errors: u64,
    /// Blocks that were rewritten on it.
    pub repaired_blocks: u64,
}

/// What `scrub` answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScrubAnswer {
    /// [`super::SCHEMA`].
    pub schema: u32,
    /// Whether this command began it.
    pub began: bool,
    /// How it is or how it ended.
    pub scrub: ScrubStatus,
}

/// The filling of devices that take the place of others.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RebuildStatus {
    /// Devices that are being filled.
    pub devices: u64,
    /// Bytes of one device that are done since the process began with it.
    pub done_bytes: u64,
    /// Of so many that are in use.
    pub total_bytes: u64,
    /// At the rate so far; null while unknown.
    pub seconds_left: Option<f64>,
    /// Blocks that could not be had from the other devices since the start.
    pub lost_blocks: u64,
    /// Why it could not go on; not there if it could.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// What `device list`, `device fail` and `device replace` answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DevicesAnswer {
    /// [`super::SCHEMA`].
    pub schema: u32,
    /// How the devices make one: `none`, `mirror`, `parity1` or `parity2`.
    pub raid: String,
    /// By place.
    pub devices: Vec<super::document::PoolDeviceStatus>,
    /// What is being filled; null if nothing is.
    pub rebuild: Option<RebuildStatus>,
    /// What to do next; empty if nothing.
    pub next_step: String,
}
