//! What can go wrong with a volume tree.

use std::fmt;
use std::io;

use crate::pool::error::PoolError;
use crate::pool::pointer::PointerError;
use crate::units::numbers::{BlockCount, ByteCount, CpNumber, Pbn, Vbn, VolumeNumber};

/// A node or a block (level 0) of a volume, named alike by both ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TreePlace {
    /// Which volume.
    pub volume: VolumeNumber,
    /// 0 for a block, the level of the node otherwise.
    pub level: u8,
    /// Which one of its level.
    pub index: u64,
}

impl fmt::Display for TreePlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { volume, level, index } = self;
        write!(f, "volume {volume} level {level} index {index}")
    }
}

/// What can go wrong with a volume tree.
#[derive(Debug, Clone, thiserror::Error)]
pub enum VolumeError {
    /// The pool below.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// A node whose checksum is right holds something that is no pointer.
    #[error("node {pbn}, child {child}: {error}")]
    Node { pbn: Pbn, child: usize, error: PointerError },
    /// Not a size that a volume can have.
    #[error("{size} bytes are no volume: a size is a multiple of 4096 and at most {max}")]
    Size { size: ByteCount, max: u64 },
    /// Blocks past the end.
    #[error("block {vbn} and {count} from there lie past the end of a volume of {blocks} blocks")]
    PastEnd { vbn: Vbn, count: u64, blocks: BlockCount },
    /// Bytes past the end.
    #[error("{length} bytes at {offset} lie past the end of a volume of {size} bytes")]
    OutOfRange { offset: u64, length: u64, size: ByteCount },
    /// More bytes in one read than there may be.
    #[error("read of {length} bytes, at most {max} at once")]
    TooLong { length: u64, max: u64 },
    /// Changes must come in rising order.
    #[error("block {vbn} comes after block {next} was passed")]
    Order { vbn: Vbn, next: Vbn },
    /// The tree to build on is younger than what is built.
    #[error("tree of CP {birth} is no base for CP {cp}")]
    BaseTooYoung { birth: CpNumber, cp: CpNumber },
    /// Trees of different sizes are not compared.
    #[error("volumes of {left} and {right} bytes have no common tree")]
    SizesDiffer { left: ByteCount, right: ByteCount },
}

/// Why a raw image has no root.
#[derive(Debug, thiserror::Error)]
pub enum HashError {
    /// Not a size that a volume can have.
    #[error("{size} bytes are no multiple of 4096, or too many")]
    Size { size: ByteCount },
    /// The image ends early.
    #[error("image ends at {met} bytes, {wanted} were announced")]
    Short { wanted: u64, met: u64 },
    /// The image goes on.
    #[error("image goes on behind the {wanted} bytes that were announced")]
    Long { wanted: u64 },
    /// It cannot be read.
    #[error("image cannot be read at {offset}: {error}")]
    Io { offset: u64, error: io::Error },
}
