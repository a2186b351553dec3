//! Drops a kept CP: finds the blocks that only its trees have, and gives them back.
//!
//! Called by the hub. The pool says which trees are to be compared and commits what is found
//! (`pool::kept` says why that is all). A pointer of the dropped tree is passed over, with all
//! below it, if an older kept CP has it (birth) or the next newer tree has the same block at the
//! same place; any other is given back. So every node that is read here is given back, beside at
//! most one of the newer tree for each. Memory goes by the blocks that come back: two bytes each
//! where they are scattered, a bit where they are dense.
//!
//! A node that cannot be read or does not hold what its pointer says ends the drop with that
//! error; the CP stays kept.

use std::sync::Arc;

use crate::pool::Pool;
use crate::pool::error::PoolError;
use crate::pool::kept::{DropTree, Dropped, KeptDrop};
use crate::pool::pointer::{Pointer, TreeRoot, VolumeKey};
use crate::units::ids::SourceId;
use crate::units::names::KeptName;

use super::error::VolumeError;
use super::geometry::Geometry;
use super::node::{Children, Node};

/// Drops a CP that a source keeps under that name.
pub fn drop_kept(
    pool: &Arc<Pool>,
    source: SourceId,
    name: &KeptName,
) -> Result<Dropped, VolumeError> {
    let mut dropping = pool.begin_drop(source, name)?;
    compare(pool, &mut dropping)?;
    Ok(dropping.commit()?)
}

/// Finds what is given back.
pub(super) fn compare(pool: &Pool, dropping: &mut KeptDrop) -> Result<(), VolumeError> {
    for DropTree { key, tree, newer } in dropping.trees().to_vec() {
        if newer.is_some_and(|newer| newer.size < tree.size) {
            let what = format!("volume {} is smaller than when it was kept", key.volume);
            return Err(PoolError::Inconsistent { what }.into());
        }
        let geometry = Geometry::of(tree.size)?;
        let newer = newer.map_or(Ok(Pointer::ZERO), |newer| within(pool, &newer, geometry.height));
        let newer = newer?;
        let mut comparison = Comparison { pool, key, dropping: &mut *dropping };
        comparison.compare(geometry.height, &tree.top, &newer)?;
    }
    Ok(())
}

/// What a tree has of the blocks that one of that height, before the volume has grown, covers.
fn within(pool: &Pool, tree: &TreeRoot, height: u8) -> Result<Pointer, VolumeError> {
    let mut pointer = tree.top;
    for _ in height..Geometry::of(tree.size)?.height {
        if pointer.is_hole() {
            return Ok(Pointer::ZERO);
        }
        pointer = Node::read(pool, &pointer)?.child(0)?;
    }
    Ok(pointer)
}

/// One tree against the next newer one.
struct Comparison<'a> {
    pool: &'a Pool,
    key: VolumeKey,
    dropping: &'a mut KeptDrop,
}

impl Comparison<'_> {
    /// Both pointers are for the same blocks of the volume. The depth is that of a tree.
    fn compare(&mut self, level: u8, old: &Pointer, new: &Pointer) -> Result<(), VolumeError> {
        let older_has_it = old.birth <= self.dropping.older();
        let newer_has_it = !new.is_hole() && new.pbn == old.pbn;
        if old.is_hole() || older_has_it || newer_has_it {
            return Ok(());
        }
        self.dropping.free(self.key, old.pbn, old.birth)?;
        if level == 0 {
            return Ok(());
        }
        let old = Node::read(self.pool, old)?.children()?;
        let new = if new.is_hole() {
            Children::of_nothing()
        } else {
            Node::read(self.pool, new)?.children()?
        };
        for (old, new) in old.0.iter().zip(new.0.iter()) {
            self.compare(level - 1, old, new)?;
        }
        Ok(())
    }
}
