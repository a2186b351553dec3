//! The tree that a pull compares with: nodes of our own, verified as they are read.

use std::sync::Arc;

use crate::pool::Pool;
use crate::pool::pointer::{Pointer, TreeRoot};
use crate::volume::error::VolumeError;
use crate::volume::geometry::Geometry;
use crate::volume::node::Children;

/// Where the nodes of an own tree come from.
pub trait OwnTree {
    /// Size and top.
    fn tree(&self) -> TreeRoot;

    /// The children of the node of that level that begins at block `first`, where `pointer`
    /// leads; those of a hole are holes.
    fn children(&self, pointer: &Pointer, level: u8, first: u64) -> Result<Children, VolumeError>;
}

/// A tree in a pool. Whoever pulls keeps it pinned, or is the one who publishes the volume.
#[derive(Debug, Clone)]
pub struct PoolTree {
    pool: Arc<Pool>,
    tree: TreeRoot,
    geometry: Geometry,
}

impl PoolTree {
    /// The tree of that root; an empty volume is [`TreeRoot::empty`].
    pub fn new(pool: &Arc<Pool>, tree: TreeRoot) -> Result<Self, VolumeError> {
        Ok(Self { pool: Arc::clone(pool), tree, geometry: Geometry::of(tree.size)? })
    }
}

impl OwnTree for PoolTree {
    fn tree(&self) -> TreeRoot {
        self.tree
    }

    fn children(&self, pointer: &Pointer, level: u8, first: u64) -> Result<Children, VolumeError> {
        Children::under(&self.pool, pointer, level, first, &self.geometry)
    }
}
