//! Numbers with a meaning of their own.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::BLOCK_BYTES_U64;

macro_rules! number_type {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.0)
            }
        }
    };
}

number_type!(
    /// Volume block number: index of a 4 KiB block in its volume, as clients see it.
    Vbn(u64));
number_type!(
    /// Pool block number: where one side keeps a block. Never leaves that side. 0 is never data.
    Pbn(u64));
number_type!(
    /// A number of 4 KiB blocks.
    BlockCount(u64));
number_type!(
    /// A number of bytes.
    ByteCount(u64));
number_type!(
    /// Place of an entry in the one order of its source; the first entry has 1.
    SequenceNumber(u64));
number_type!(
    /// Number of a consistency point; 0 is the empty beginning, the first CP is 1.
    CpNumber(u32));
number_type!(
    /// Byte position in a ring or log since it was made; never restarts.
    LogPosition(u64));
number_type!(
    /// Stable number of a volume within its source, given by the source; never used twice.
    VolumeNumber(u32));

impl SequenceNumber {
    /// The one behind this.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl CpNumber {
    /// The one behind this. 2^32 CPs of one second each are 136 years: running out is our fault.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl LogPosition {
    /// The position `bytes` further on.
    #[must_use]
    pub const fn after(self, bytes: ByteCount) -> Self {
        Self(self.0 + bytes.0)
    }
}

impl BlockCount {
    /// Bytes in that many blocks, or `None` past 2^64.
    pub const fn bytes(self) -> Option<ByteCount> {
        match self.0.checked_mul(BLOCK_BYTES_U64) {
            Some(bytes) => Some(ByteCount(bytes)),
            None => None,
        }
    }
}

impl ByteCount {
    /// Whole blocks in that many bytes; a rest counts as one more.
    pub const fn blocks(self) -> BlockCount {
        BlockCount(self.0.div_ceil(BLOCK_BYTES_U64))
    }

    /// Whether it is a multiple of the block size.
    pub const fn is_whole_blocks(self) -> bool {
        self.0.is_multiple_of(BLOCK_BYTES_U64)
    }
}

impl Vbn {
    /// Offset of its first byte in the volume. A volume's size fits 64 bits, so this does.
    pub const fn byte_offset(self) -> u64 {
        self.0 * BLOCK_BYTES_U64
    }
}

/// Name of a transfer: the source's boot counter and a counter within it. Never used twice.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize,
)]
pub struct TransferId {
    /// Number of the generation (boot) that formed it; 0 means "none yet".
    pub generation: u32,
    /// Rising within the generation, from 1.
    pub counter: u64,
}

impl TransferId {
    /// Stands before the first transfer of a source.
    pub const NONE: Self = Self { generation: 0, counter: 0 };
}

impl fmt::Display for TransferId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.generation, self.counter)
    }
}

/// A source's boot counter and a random id, so that a clone is told from the original (R1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Generation {
    /// Counts boots from 1.
    pub number: u32,
    /// Random, made with the number.
    pub id: u64,
}

/// How often the primary of a source has changed, and a random id (R12).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Epoch {
    /// Counts changes of who is primary, from 1.
    pub number: u32,
    /// Random, made with the number.
    pub id: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transfer_ids_order_by_generation_first() {
        let old = TransferId { generation: 1, counter: 9 };
        let new = TransferId { generation: 2, counter: 1 };
        assert!(TransferId::NONE < old && old < new);
    }

    #[test]
    fn sizes_convert_both_ways() {
        assert_eq!(ByteCount(4097).blocks(), BlockCount(2));
        assert!(!ByteCount(4097).is_whole_blocks());
        assert_eq!(BlockCount(2).bytes(), Some(ByteCount(8192)));
        assert_eq!(BlockCount(u64::MAX).bytes(), None);
    }
}
