//! Mending: what the device lost of a tree is got from the other end, proven, and made to be read.
//!
//! Called by whoever met a block or node that fails its check. The tree is walked again over that
//! range; each place that cannot be read is asked for by its content hash ([`OtherEnd`]), which the
//! parent has proven. So no peer can have anything wrong be taken for right.
//!
//! A block is its content. A node's pointers say where *this* end keeps what is below, which
//! nobody else knows: the other end tells the hashes of its children, and with these what is left
//! of the node is put right ([`restore`]), until it has the checksum that the parent asks for: then
//! it is the very node that was written, births and all. Of a node that is lost whole nothing can be
//! restored, and that is said.
//!
//! Nothing is written here. What is mended is kept by the pool for its readers, and noted in a
//! [`Mender`]: the next CP writes it to a new place.

mod ledger;
mod questions;
mod restore;

pub use self::ledger::{MendFigures, Mender};
pub use self::questions::Questions;

use std::fmt;

use crate::limits::MEND_FAILURES_MAX;
use crate::pool::error::PoolError;
use crate::pool::pointer::{Pointer, TreeRoot, VolumeKey};
use crate::pool::{Pin, Pool};
use crate::units::BLOCK_BYTES;
use crate::units::convert::to_u64;
use crate::units::hash::ContentHash;
use crate::units::numbers::{Vbn, VolumeNumber};
use crate::wire::pull::ChildHashes;

use super::error::{TreePlace, VolumeError};
use super::geometry::Geometry;
use super::node::Node;
use super::root::{leaf_hash, node_hash};

/// What a place holds, as the other end says; unproven.
#[derive(Debug, Clone)]
pub enum Fetched {
    /// A block.
    Block(Box<[u8; BLOCK_BYTES]>),
    /// The content hashes of a node's children.
    Node(Box<ChildHashes>),
}

/// Whoever else may have what is lost here.
pub trait OtherEnd {
    /// Asks for a place that had that content; waits a bounded time. An error says why there is
    /// nothing to be had.
    fn fetch(&self, place: TreePlace, hash: ContentHash) -> Result<Fetched, String>;
}

/// Mends what a reader of a pinned volume has met.
pub trait Mends: fmt::Debug + Send + Sync {
    /// Mends these blocks, and the nodes above them; whether anything can be read again that could
    /// not be. Blocks, a bounded time.
    fn mend(&self, pin: &Pin, range: (Vbn, u64)) -> bool;
}

/// How much of a tree is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Nodes only.
    Nodes,
    /// Data as well.
    Data,
}

/// What a mending gave.
#[derive(Debug, Clone, Default)]
pub struct Mending {
    /// Places that can be read again.
    pub mended: Vec<TreePlace>,
    /// Places that cannot, and why.
    pub lost: Vec<(TreePlace, String)>,
}

/// Whether an error is about what the device holds, and so may be mended.
pub fn is_rot(error: &VolumeError) -> bool {
    let VolumeError::Pool(error) = error else { return false };
    let corrupt = matches!(error, PoolError::Corrupt { .. } | PoolError::CorruptContent { .. });
    corrupt || matches!(error, PoolError::Device(error) if error.is_of_read())
}

/// Reads `count` blocks of a tree from `vbn` on, and mends what cannot be read.
///
/// # Errors
/// The tree has no shape. What cannot be mended is in the result.
pub fn mend(
    pool: &Pool,
    (volume, tree): (VolumeNumber, &TreeRoot),
    (vbn, count): (Vbn, u64),
    depth: Depth,
    other: &dyn OtherEnd,
) -> Result<Mending, VolumeError> {
    let geometry = Geometry::of(tree.size)?;
    let end = vbn.0.saturating_add(count).min(geometry.blocks);
    let mending = Mending::default();
    let mut walk = Walk { pool, volume, range: vbn.0..end, depth, other, mending };
    walk.visit(&tree.top, geometry.height, 0);
    Ok(walk.mending)
}

struct Walk<'a> {
    pool: &'a Pool,
    volume: VolumeNumber,
    range: std::ops::Range<u64>,
    depth: Depth,
    other: &'a dyn OtherEnd,
    mending: Mending,
}

impl Walk<'_> {
    fn visit(&mut self, pointer: &Pointer, level: u8, first: u64) {
        let span = Geometry::span(level);
        let apart = first >= self.range.end || first.saturating_add(span) <= self.range.start;
        if pointer.is_hole() || apart || self.mending.lost.len() >= MEND_FAILURES_MAX {
            return;
        }
        let place = TreePlace { volume: self.volume, level, index: first / span };
        if level == 0 {
            if self.depth == Depth::Data {
                self.block(place, pointer);
            }
            return;
        }
        let Some(node) = self.node(place, pointer) else { return };
        let below = Geometry::span(level - 1);
        for (child, slot) in (0..crate::limits::NODE_CHILDREN).zip(0..) {
            let first = first.saturating_add(below.saturating_mul(slot));
            match node.child(child) {
                Ok(pointer) => self.visit(&pointer, level - 1, first),
                Err(error) => self.lose(place, error.to_string()),
            }
        }
    }

    fn lose(&mut self, place: TreePlace, reason: String) {
        self.mending.lost.push((place, reason));
    }

    fn block(&mut self, place: TreePlace, pointer: &Pointer) {
        let mut block = [0; BLOCK_BYTES];
        let read = self.pool.read_block(pointer.pbn, pointer.crc, &mut block);
        if read.is_ok() && leaf_hash(&block) == pointer.hash {
            return;
        }
        let mended = self.other.fetch(place, pointer.hash).and_then(|fetched| match fetched {
            Fetched::Block(block) if leaf_hash(&block) == pointer.hash => {
                let mended = self.pool.mend(pointer.pbn, pointer.crc, *block);
                mended.map_err(|error| error.to_string())
            }
            Fetched::Block(_) | Fetched::Node(_) => Err("the answer is not its content".to_owned()),
        });
        match mended {
            Ok(()) => self.mending.mended.push(place),
            Err(reason) => self.lose(place, reason),
        }
    }

    fn node(&mut self, place: TreePlace, pointer: &Pointer) -> Option<Node> {
        let error = match Node::read(self.pool, pointer) {
            Ok(node) => return Some(node),
            Err(error) if is_rot(&error) => error,
            Err(error) => {
                self.lose(place, error.to_string());
                return None;
            }
        };
        let mended = self.other.fetch(place, pointer.hash).and_then(|fetched| match fetched {
            Fetched::Node(hashes) if node_hash(&hashes[..]) == pointer.hash => {
                let restored = restore::restore(self.pool, pointer, place.level, &hashes);
                let node = restored.ok_or_else(|| format!("too much of it is lost: {error}"))?;
                let mended = self.pool.mend(pointer.pbn, pointer.crc, node);
                mended.map_err(|error| error.to_string())
            }
            Fetched::Node(_) | Fetched::Block(_) => Err("the answer is not its content".to_owned()),
        });
        match mended.and_then(|()| Node::read(self.pool, pointer).map_err(|e| e.to_string())) {
            Ok(node) => {
                self.mending.mended.push(place);
                Some(node)
            }
            Err(reason) => {
                self.lose(place, reason);
                None
            }
        }
    }
}

/// The first block of a place.
pub(super) fn first_of(place: &TreePlace) -> Vbn {
    Vbn(place.index.saturating_mul(Geometry::span(place.level)))
}

/// Blocks that `length` bytes at `offset` lie in.
pub fn blocks_of(offset: u64, length: u64) -> (Vbn, u64) {
    let block = to_u64(BLOCK_BYTES);
    let first = offset / block;
    (Vbn(first), offset.saturating_add(length).div_ceil(block) - first)
}

/// A volume's key and tree, to be read and mended.
pub type Whole = (VolumeKey, TreeRoot);
