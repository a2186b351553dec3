//! What a scrub remembers in the pool's catalog, so that a restart goes on with it.
//!
//! Named fields as JSON, since it is read by nobody else. A note that is not understood, such as that
//! of another version, is none: the scrub begins again.

use serde::{Deserialize, Serialize};

use crate::limits::NOTE_BYTES_MAX;
use crate::pool::Pool;
use crate::pool::error::PoolError;
use crate::status::upkeep::ScrubbedDevice;
use crate::units::ids::SourceId;

const NAME: &str = "scrub";
const VERSION: u32 = 1;
/// Lost blocks that a note names, and bytes of each.
const LOST_MAX: usize = 32;
const LOST_BYTES_MAX: usize = 240;

/// Kinds of trees, in the order in which they are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) enum Kind {
    Published,
    Kept,
    Work,
}

/// The place of a tree in the order of a scrub.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Order {
    pub(super) kind: Kind,
    pub(super) source: SourceId,
    /// Newest first; 0 of what has one CP at a time.
    pub(super) age: u32,
    pub(super) volume: u32,
}

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Next {
    /// Of that tree, from that block on.
    Tree(Order, u64),
    /// All trees are read: every copy, from that stripe on.
    Stripe(u64),
}

/// How a scrub is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Word {
    #[default]
    Never,
    Running,
    Stopped,
    Clean,
    Repaired,
    Damaged,
}

impl Word {
    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Never => "never",
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Clean => "clean",
            Self::Repaired => "repaired",
            Self::Damaged => "damaged",
        }
    }
}

/// The note.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Note {
    version: u32,
    pub(super) word: Word,
    /// Null before the first slice.
    pub(super) next: Option<Next>,
    pub(super) blocks_read: u64,
    pub(super) blocks_total: u64,
    pub(super) repaired: u64,
    pub(super) copies: u64,
    pub(super) known: u64,
    pub(super) lost_count: u64,
    pub(super) lost: Vec<String>,
    pub(super) devices: Vec<ScrubbedDevice>,
    /// Seconds that the pool was open since the last whole one ended, or since it was made.
    pub(super) waited_seconds: u64,
    /// Whether one ever came to its end.
    pub(super) ever: bool,
    /// When it did, in seconds since 1970; a note of an older version does not say it.
    #[serde(default)]
    pub(super) ended_at: Option<i64>,
}

impl Note {
    /// What the pool has, or a new one.
    pub(super) fn load(pool: &Pool) -> Self {
        let bytes = pool.catalog().note(NAME).ok().flatten();
        let note = bytes.and_then(|bytes| serde_json::from_slice::<Self>(&bytes).ok());
        note.filter(|note| note.version == VERSION).unwrap_or_default()
    }

    /// Makes it durable.
    pub(super) fn save(&self, pool: &Pool) -> Result<(), PoolError> {
        let mut note = Self { version: VERSION, ..self.clone() };
        note.lost.truncate(LOST_MAX);
        for text in &mut note.lost {
            let end =
                (0..=LOST_BYTES_MAX.min(text.len())).rev().find(|at| text.is_char_boundary(*at));
            text.truncate(end.unwrap_or(0));
        }
        let bytes = serde_json::to_vec(&note)
            .map_err(|error| PoolError::Inconsistent { what: error.to_string() })?;
        assert!(bytes.len() <= NOTE_BYTES_MAX, "a note of {} bytes", bytes.len());
        pool.catalog().put_note(NAME, bytes)
    }

    /// A new scrub begins.
    pub(super) fn begin(&mut self, devices: Vec<ScrubbedDevice>) {
        let Self { waited_seconds, ever, ended_at, .. } = *self;
        let word = Word::Running;
        *self = Self { word, devices, waited_seconds, ever, ended_at, ..Self::default() };
    }
}
