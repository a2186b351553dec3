//! The shape of a tree: which level covers how many blocks.
//!
//! Pure arithmetic. Level 0 is a data block, level 1 a node of 128 of them, level `height` the
//! top. A subtree of a level begins at a multiple of its span.

use crate::limits::{NODE_CHILDREN, TREE_HEIGHT_MAX, VOLUME_BYTES_MAX};
use crate::units::convert::{to_u64, to_usize};
use crate::units::numbers::{BlockCount, ByteCount, Vbn};

use super::error::VolumeError;

/// Children of a node, as a power of two.
const CHILDREN_BITS: u32 = 7;

const _: () = {
    assert!(1 << CHILDREN_BITS == NODE_CHILDREN);
    assert!(VOLUME_BYTES_MAX == Geometry::span(TREE_HEIGHT_MAX) * crate::units::BLOCK_BYTES_U64);
};

/// The shape of a volume's tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Blocks of the volume.
    pub blocks: u64,
    /// Level of the top: the least h >= 1 with 128^h >= blocks.
    pub height: u8,
}

impl Geometry {
    /// The shape for a volume of that size, which must be a multiple of 4096.
    pub fn of(size: ByteCount) -> Result<Self, VolumeError> {
        if !size.is_whole_blocks() || size.0 > VOLUME_BYTES_MAX {
            return Err(VolumeError::Size { size, max: VOLUME_BYTES_MAX });
        }
        let blocks = size.blocks().0;
        let height =
            (1..TREE_HEIGHT_MAX).find(|&h| Self::span(h) >= blocks).unwrap_or(TREE_HEIGHT_MAX);
        Ok(Self { blocks, height })
    }

    /// Blocks under a pointer that stands in a node of level `level + 1`.
    pub const fn span(level: u8) -> u64 {
        let mut span = 1;
        let mut n = 0;
        while n < level {
            span <<= CHILDREN_BITS;
            n += 1;
        }
        span
    }

    /// Which child of a node that begins at `first` and has that level covers `vbn`.
    pub fn slot(level: u8, first: u64, vbn: u64) -> usize {
        let slot = (vbn - first) / Self::span(level - 1);
        assert!(slot < to_u64(NODE_CHILDREN), "block {vbn} is not under a node at {first}");
        to_usize(slot)
    }

    /// Refuses blocks past the end.
    pub fn check(&self, vbn: Vbn, count: u64) -> Result<(), VolumeError> {
        let blocks = self.blocks;
        match vbn.0.checked_add(count) {
            Some(end) if end <= blocks => Ok(()),
            _ => Err(VolumeError::PastEnd { vbn, count, blocks: BlockCount(blocks) }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heights_change_at_the_powers_of_128() {
        let height = |blocks: u64| Geometry::of(ByteCount(blocks * 4096)).unwrap().height;
        assert_eq!([0, 1, 128, 129, 16_384, 16_385].map(height), [1, 1, 1, 2, 2, 3]);
        assert_eq!([1 << 21, (1 << 21) + 1, 1 << 42].map(height), [3, 4, 6]);
        assert!(Geometry::of(ByteCount(4095)).is_err());
        assert!(Geometry::of(ByteCount(VOLUME_BYTES_MAX + 4096)).is_err());
    }

    #[test]
    fn slots_and_spans() {
        assert_eq!([0, 1, 2].map(Geometry::span), [1, 128, 16_384]);
        assert_eq!(Geometry::slot(1, 256, 300), 44);
        assert_eq!(Geometry::slot(2, 0, 300), 2);
        let geometry = Geometry::of(ByteCount(10 * 4096)).unwrap();
        assert!(geometry.check(Vbn(9), 1).is_ok());
        assert!(geometry.check(Vbn(9), 2).is_err());
        assert!(geometry.check(Vbn(1), u64::MAX).is_err());
    }
}
