//! Goes on with a work tree: finds the blocks that only it has, and those it replaces (R19).
//!
//! Called by the hub's applier. The work tree is compared with the published trees pointer by
//! pointer: trees are copied on write, so a block that both have is at the same place of both, and so
//! is all below it. The walk reads at most the nodes that only one of them has: work by what differs.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::pool::Pool;
use crate::pool::error::PoolError;
use crate::pool::pointer::{Pointer, TreeRoot, VolumeKey};
use crate::pool::work::WorkRow;
use crate::pool::write_set::{Budget, WriteSet};
use crate::units::ids::SourceId;
use crate::units::numbers::VolumeNumber;

use super::error::VolumeError;
use super::geometry::Geometry;
use super::node::{Children, Node};

/// A work tree that is gone on with.
#[derive(Debug)]
pub struct Resumed {
    /// Publishes, keeps, or gives it up; dropped, it stays as it was kept.
    pub set: WriteSet,
    /// Its trees.
    pub trees: BTreeMap<VolumeNumber, TreeRoot>,
}

/// Goes on with the work tree of a source, if one is kept.
///
/// # Errors
/// A node of either tree cannot be read; another goes on with it.
pub fn resume(
    pool: &Arc<Pool>,
    source: SourceId,
    budget: Budget,
) -> Result<Option<Resumed>, VolumeError> {
    let Some((mut set, row)) = pool.begin_work(source, budget)? else { return Ok(None) };
    tell(pool, &mut set, &row)?;
    Ok(Some(Resumed { set, trees: row.trees.iter().copied().collect() }))
}

/// Gives the work tree of a source up, if one is kept: the next pass begins with the image. What
/// cannot be read is no reason to keep it.
pub fn give_up(pool: &Arc<Pool>, source: SourceId) -> Result<(), VolumeError> {
    match resume(pool, source, Budget::Reserve) {
        Ok(None) => Ok(()),
        Ok(Some(resumed)) => Ok(resumed.set.give_up()?),
        Err(VolumeError::Pool(error @ (PoolError::Device(_) | PoolError::WorkKept { .. }))) => {
            Err(error.into())
        }
        Err(error) => {
            tracing::error!(%source, %error, "the blocks of a work tree are lost");
            Ok(pool.forget_work(source)?)
        }
    }
}

fn tell(pool: &Pool, set: &mut WriteSet, row: &WorkRow) -> Result<(), VolumeError> {
    for (key, tree) in row.keyed() {
        let base = match &row.seed {
            Some(_) => TreeRoot::empty(tree.size),
            None => pool.catalog().volume(key)?.ok_or(PoolError::UnknownVolume { key })?.tree,
        };
        if base.size > tree.size {
            return Err(VolumeError::SizesDiffer { left: base.size, right: tree.size });
        }
        set.begin_tree(key, base);
        set.end_tree();
        Comparison { pool, key, set: &mut *set }.grown(&base, &tree)?;
    }
    Ok(())
}

/// The published tree against the work tree.
struct Comparison<'a> {
    pool: &'a Pool,
    key: VolumeKey,
    set: &'a mut WriteSet,
}

impl Comparison<'_> {
    /// The work tree may be of a volume that has grown: then the published one lies below its first
    /// children.
    fn grown(&mut self, base: &TreeRoot, work: &TreeRoot) -> Result<(), VolumeError> {
        let low = Geometry::of(base.size)?.height;
        let mut pointer = work.top;
        for level in (low..Geometry::of(work.size)?.height).rev() {
            if pointer.is_hole() {
                break;
            }
            self.set.adopt(pointer.pbn)?;
            let children = self.children(&pointer)?;
            for child in &children.0[1..] {
                self.compare(level, &Pointer::ZERO, child)?;
            }
            pointer = children.0[0];
        }
        self.compare(low, &base.top, &pointer)
    }

    /// Both pointers are for the same blocks of the volume. The depth is that of a tree.
    fn compare(&mut self, level: u8, base: &Pointer, work: &Pointer) -> Result<(), VolumeError> {
        let both_holes = base.is_hole() && work.is_hole();
        if both_holes || !base.is_hole() && !work.is_hole() && base.pbn == work.pbn {
            return Ok(());
        }
        if !base.is_hole() {
            self.set.free(self.key, base.pbn, base.birth)?;
        }
        if !work.is_hole() {
            self.set.adopt(work.pbn)?;
        }
        if level == 0 {
            return Ok(());
        }
        let (base, work) = (self.children(base)?, self.children(work)?);
        for (base, work) in base.0.iter().zip(work.0.iter()) {
            self.compare(level - 1, base, work)?;
        }
        Ok(())
    }

    fn children(&self, pointer: &Pointer) -> Result<Children, VolumeError> {
        if pointer.is_hole() {
            return Ok(Children::of_nothing());
        }
        Node::read(self.pool, pointer)?.children()
    }
}
