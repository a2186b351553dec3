//! What changed since a CP, and where two trees differ.
//!
//! [`born_since`] needs one tree and no other side: births prune it to what was written after
//! the CP. It may name more than differs (a hole that swallowed older holes is young as a whole,
//! a block may have been written back), never less. [`compare`] needs two trees and no history:
//! it descends only where hashes differ, and names exactly what does.

use crate::limits::NODE_CHILDREN;
use crate::pool::Pool;
use crate::pool::pointer::{Pointer, TreeRoot};
use crate::units::convert::to_u64;
use crate::units::numbers::{CpNumber, Vbn};

use super::error::VolumeError;
use super::geometry::Geometry;
use super::node::Children;
use super::walk::Walk;

/// The blocks and holes of `tree` written after `cp`, in order.
pub fn born_since<'a>(
    pool: &'a Pool,
    tree: &TreeRoot,
    cp: CpNumber,
) -> Result<Walk<'a>, VolumeError> {
    Ok(Walk::new(pool, tree)?.born_after(cp))
}

/// A block that is not the same in two trees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Difference {
    /// Which one.
    pub vbn: Vbn,
    /// What the left tree has.
    pub left: Pointer,
    /// What the right tree has.
    pub right: Pointer,
}

/// The differences of two trees of one size, in order.
#[derive(Debug)]
pub struct Compare<'a> {
    left_pool: &'a Pool,
    right_pool: &'a Pool,
    geometry: Geometry,
    /// Pairs still to be looked at, the next one last.
    pairs: Vec<(u64, u8, Pointer, Pointer)>,
}

/// Compares two trees of one size, each in its pool, by hash.
pub fn compare<'a>(
    left_pool: &'a Pool,
    left: &TreeRoot,
    right_pool: &'a Pool,
    right: &TreeRoot,
) -> Result<Compare<'a>, VolumeError> {
    if left.size != right.size {
        return Err(VolumeError::SizesDiffer { left: left.size, right: right.size });
    }
    let geometry = Geometry::of(left.size)?;
    let pairs = vec![(0, geometry.height, left.top, right.top)];
    Ok(Compare { left_pool, right_pool, geometry, pairs })
}

impl Compare<'_> {
    fn descend(
        &mut self,
        first: u64,
        level: u8,
        left: &Pointer,
        right: &Pointer,
    ) -> Result<(), VolumeError> {
        let left = Children::under(self.left_pool, left, level, first, &self.geometry)?;
        let right = Children::under(self.right_pool, right, level, first, &self.geometry)?;
        let span = Geometry::span(level - 1);
        for slot in (0..NODE_CHILDREN).rev() {
            let (left, right) = (left.0[slot], right.0[slot]);
            if left.hash != right.hash {
                self.pairs.push((first + to_u64(slot) * span, level - 1, left, right));
            }
        }
        Ok(())
    }
}

impl Iterator for Compare<'_> {
    type Item = Result<Difference, VolumeError>;

    fn next(&mut self) -> Option<Self::Item> {
        while let Some((first, level, left, right)) = self.pairs.pop() {
            if left.hash == right.hash {
                continue;
            }
            if level == 0 {
                return Some(Ok(Difference { vbn: Vbn(first), left, right }));
            }
            if let Err(error) = self.descend(first, level, &left, &right) {
                return Some(Err(error));
            }
        }
        None
    }
}
