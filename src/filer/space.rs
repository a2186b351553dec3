//! What an open CP interval may need of the pool: blocks and tree nodes, at worst (R18).
//!
//! Pure. `order` asks [`worst`] before an entry and keeps a [`Footprint`] of what was ordered.
//! Invariant: the tree that is written for the interval takes no more blocks than the interval's
//! dirty blocks and [`Footprint::nodes`].

use std::collections::HashSet;

use crate::units::numbers::VolumeNumber;

/// Children of a node as a shift: 128.
const CHILD_BITS: u32 = crate::limits::NODE_CHILDREN.trailing_zeros();

const _: () = assert!(crate::limits::NODE_CHILDREN.is_power_of_two());

/// Tree nodes that an interval changes.
#[derive(Debug, Clone, Default)]
pub struct Footprint {
    /// Volume, level from 1, index in the level.
    nodes: HashSet<(VolumeNumber, u8, u64)>,
}

/// Upper bound of blocks and nodes for `count` data blocks in a row in a tree of that height.
pub fn worst(count: u64, height: u8) -> u64 {
    let mut nodes = 0;
    let mut width = count;
    for _ in 0..height {
        // A row of children may begin and end inside a node.
        width = if width == 0 { 0 } else { (width.saturating_sub(1) >> CHILD_BITS) + 2 };
        nodes += width;
    }
    count + nodes
}

impl Footprint {
    /// Counts the nodes above `count` blocks from `vbn` on.
    pub fn add(&mut self, volume: VolumeNumber, height: u8, vbn: u64, count: u64) {
        if count == 0 {
            return;
        }
        let mut first = vbn;
        let mut last = vbn + count - 1;
        for level in 1..=height {
            first >>= CHILD_BITS;
            last >>= CHILD_BITS;
            let before = self.nodes.len();
            self.nodes.extend((first..=last).map(|index| (volume, level, index)));
            if self.nodes.len() == before {
                return;
            }
        }
    }

    /// Counts the nodes at the two ends of a range of holes: those inside become holes whole.
    pub fn add_holes(&mut self, volume: VolumeNumber, height: u8, vbn: u64, count: u64) {
        if count > 0 {
            self.add(volume, height, vbn, 1);
            self.add(volume, height, vbn + count - 1, 1);
        }
    }

    /// Nodes that are written anew, at most.
    pub fn nodes(&self) -> u64 {
        crate::units::convert::to_u64(self.nodes.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOLUME: VolumeNumber = VolumeNumber(0);

    #[test]
    fn paths_are_shared() {
        let mut footprint = Footprint::default();
        footprint.add(VOLUME, 3, 0, 1);
        assert_eq!(footprint.nodes(), 3);
        footprint.add(VOLUME, 3, 1, 127);
        assert_eq!(footprint.nodes(), 3);
        footprint.add(VOLUME, 3, 128, 1);
        assert_eq!(footprint.nodes(), 4, "another leaf node below the same parents");
        footprint.add(VolumeNumber(1), 1, 0, 1);
        assert_eq!(footprint.nodes(), 5);
        footprint.add_holes(VOLUME, 3, 1 << 14, 1 << 14);
        assert_eq!(footprint.nodes(), 5 + 3, "two leaf nodes and one above");
    }

    /// The bound before an entry is never below what it adds.
    #[test]
    fn the_bound_holds() {
        for height in 1..=4 {
            for vbn in [0, 1, 127, 128, 16_383, 16_384, 300_000] {
                for count in [1, 2, 64, 65, 128, 129, 200] {
                    let mut footprint = Footprint::default();
                    footprint.add(VOLUME, height, vbn, count);
                    assert!(footprint.nodes() + count <= worst(count, height));
                }
            }
        }
        assert_eq!(worst(0, 3), 0);
    }
}
