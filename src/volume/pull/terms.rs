//! What a pull is told, yields and counts.

use crate::limits::{PULL_PARTS_MAX, PULL_REQUESTS_MAX, PULL_WINDOW_BYTES};
use crate::units::BLOCK_BYTES;
use crate::units::hash::Root;
use crate::units::numbers::{ByteCount, CpNumber, Vbn, VolumeNumber};
use crate::volume::error::VolumeError;
use crate::volume::writer::{Content, TreeWriter};
use crate::wire::pull::blocks_bytes_max;

/// What is pulled: a volume at a CP that the other end holds for us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// The CP.
    pub cp: CpNumber,
    /// The volume.
    pub volume: VolumeNumber,
    /// Its size.
    pub size: ByteCount,
    /// Its root.
    pub root: Root,
}

/// How much a pull may have under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Bytes of answers asked for, or come and not yet taken.
    pub bytes: u64,
    /// Requests not answered.
    pub requests: usize,
    /// Blocks and holes that are known to differ, [`PULL_PARTS_MIN`](crate::limits::PULL_PARTS_MIN)
    /// at least; levels above hold a sixteenth of that, or that minimum.
    pub parts: u64,
}

impl Default for Window {
    fn default() -> Self {
        Self { bytes: PULL_WINDOW_BYTES, requests: PULL_REQUESTS_MAX, parts: PULL_PARTS_MAX }
    }
}

/// What to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Put {
    /// A block gets this content.
    Data { vbn: Vbn, block: Box<[u8; BLOCK_BYTES]> },
    /// So many blocks become holes.
    Holes { vbn: Vbn, count: u64 },
}

impl Put {
    /// Hands it to the writer of the new tree.
    pub fn write(&self, writer: &mut TreeWriter<'_>) -> Result<(), VolumeError> {
        match self {
            Self::Data { vbn, block } => writer.put(*vbn, Content::Data(block)),
            Self::Holes { vbn, count } => writer.put_hole_range(*vbn, *count),
        }
    }
}

/// What a pull has cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PullCounters {
    /// Requests made.
    pub requests: u64,
    /// Nodes asked for.
    pub nodes: u64,
    /// Blocks asked for.
    pub blocks: u64,
    /// Bytes of payload in the answers that were taken.
    pub answer_bytes: u64,
}

/// What a pull holds at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Held {
    /// Nodes, blocks and holes that are known to differ.
    pub parts: u64,
    /// Bytes of answers asked for, or come and not yet taken.
    pub bytes: u64,
    /// Requests not answered.
    pub requests: usize,
}

const _: () = {
    use crate::limits::PULL_BLOCKS_MAX;
    assert!(PULL_WINDOW_BYTES >= 4 * blocks_bytes_max(PULL_BLOCKS_MAX), "a pipeline of requests");
};
