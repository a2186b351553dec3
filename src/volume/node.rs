//! One node of a tree: 128 pointers in 4096 bytes.
//!
//! A node is read through the pool's cache, verified by checksum and by content hash, and its
//! pointers are checked as they are taken out: whatever is no pointer is an error with its place.

use std::sync::Arc;

use crate::limits::NODE_CHILDREN;
use crate::pool::Pool;
use crate::pool::pointer::{POINTER_BYTES, Pointer};
use crate::units::BLOCK_BYTES;
use crate::units::numbers::{CpNumber, Pbn};

use super::error::VolumeError;
use super::geometry::Geometry;
use super::root::node_block_hash;

/// A verified node.
#[derive(Debug, Clone)]
pub struct Node {
    pbn: Pbn,
    bytes: Arc<[u8; BLOCK_BYTES]>,
}

impl Node {
    /// Reads the node that `pointer` asks for, which is no hole.
    pub fn read(pool: &Pool, pointer: &Pointer) -> Result<Self, VolumeError> {
        let bytes = pool.cached_block(pointer, node_block_hash)?;
        Ok(Self { pbn: pointer.pbn, bytes })
    }

    /// One of its pointers.
    pub fn child(&self, child: usize) -> Result<Pointer, VolumeError> {
        let mut bytes = [0; POINTER_BYTES];
        bytes.copy_from_slice(&self.bytes[child * POINTER_BYTES..][..POINTER_BYTES]);
        let pbn = self.pbn;
        Pointer::decode(&bytes).map_err(|error| VolumeError::Node { pbn, child, error })
    }

    /// All of its pointers.
    pub fn children(&self) -> Result<Children, VolumeError> {
        let mut children = Children([Pointer::ZERO; NODE_CHILDREN].into());
        for (slot, child) in children.0.iter_mut().enumerate() {
            *child = self.child(slot)?;
        }
        Ok(children)
    }
}

/// The pointers of a node, to be changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Children(pub Box<[Pointer; NODE_CHILDREN]>);

impl Children {
    /// What a hole becomes when something is written under it: holes with its own birth (R8),
    /// and nothing behind the end of the volume.
    pub fn of_hole(birth: CpNumber, level: u8, first: u64, geometry: &Geometry) -> Self {
        let mut children = Self([Pointer::ZERO; NODE_CHILDREN].into());
        let starts = (first..geometry.blocks).step_by(step(level));
        for (child, _) in children.0.iter_mut().zip(starts) {
            *child = Pointer::hole(birth);
        }
        children
    }

    /// The children of the node of that level at `first`, where `pointer` leads; those of a hole
    /// are holes.
    pub fn under(
        pool: &Pool,
        pointer: &Pointer,
        level: u8,
        first: u64,
        geometry: &Geometry,
    ) -> Result<Self, VolumeError> {
        if pointer.is_hole() {
            return Ok(Self::of_hole(pointer.birth, level, first, geometry));
        }
        Node::read(pool, pointer)?.children()
    }

    /// What a tree without that volume has: nothing at all.
    pub fn of_nothing() -> Self {
        Self([Pointer::ZERO; NODE_CHILDREN].into())
    }

    /// Whether nothing is left.
    pub fn are_holes(&self) -> bool {
        self.0.iter().all(Pointer::is_hole)
    }

    /// The 4096 bytes of the node.
    pub fn encode(&self) -> [u8; BLOCK_BYTES] {
        let mut bytes = [0; BLOCK_BYTES];
        for (place, child) in bytes.chunks_exact_mut(POINTER_BYTES).zip(self.0.iter()) {
            place.copy_from_slice(&child.encode());
        }
        bytes
    }
}

/// Blocks under each child of a node of that level, as a step.
fn step(level: u8) -> usize {
    crate::units::convert::to_usize(Geometry::span(level - 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::numbers::ByteCount;

    #[test]
    fn a_split_hole_passes_its_birth_on_and_stops_at_the_end() {
        let geometry = Geometry::of(ByteCount(300 * 4096)).unwrap();
        let birth = CpNumber(5);
        let count = |children: &Children| {
            children.0.iter().filter(|child| **child == Pointer::hole(birth)).count()
        };
        let top = Children::of_hole(birth, 2, 0, &geometry);
        assert_eq!(count(&top), 3);
        assert_eq!(top.0[3], Pointer::ZERO);
        assert_eq!(count(&Children::of_hole(birth, 1, 128, &geometry)), 128);
        let last = Children::of_hole(birth, 1, 256, &geometry);
        assert_eq!(count(&last), 44);
        assert!(last.are_holes());
    }
}
