//! Builds the next tree of a volume from its changed blocks, in one pass.
//!
//! Changes come in rising order of VBN. The writer keeps only the nodes on the path to the
//! current block open; a node is finished, hashed and queued for writing when the pass leaves it
//! (depth first, so memory goes by height). Data and nodes go to the write set's runs in the order
//! in which they are made: a CP is written in sequence.
//!
//! What does not change is shared: a block put with the content it has, or a hole put over a
//! hole, changes nothing, not even a birth. That a block has this content is read and not believed:
//! one that has rotted is written anew, so that putting back what could not be read mends it. It
//! costs one read of a block that is then not written. All-zero data is a hole. What was replaced is noted
//! in the write set as freed. Births follow R8: a hole that is split passes its birth on, a
//! subtree that becomes a hole gets the birth of this CP.
//!
//! After an error the write set must be dropped: it holds half a tree, and `publish` refuses it.

use std::sync::Arc;

use crate::pool::Pool;
use crate::pool::error::PoolError;
use crate::pool::pointer::{Pointer, TreeRoot, VolumeKey};
use crate::pool::write_set::WriteSet;
use crate::units::BLOCK_BYTES;
use crate::units::hash::{ContentHash, crc32c};
use crate::units::machine;
use crate::units::numbers::{ByteCount, CpNumber, Vbn};

use super::error::VolumeError;
use super::geometry::Geometry;
use super::node::{Children, Node};
use super::root::{leaf_hash, node_block_hash};

/// What a block becomes.
#[derive(Debug, Clone, Copy)]
pub enum Content<'a> {
    /// These bytes; a hole if they are all zero.
    Data(&'a [u8; BLOCK_BYTES]),
    /// All zero.
    Hole,
}

/// A node on the path to the current block.
#[derive(Debug)]
struct OpenNode {
    level: u8,
    first: u64,
    old: Pointer,
    children: Children,
    changed: bool,
}

impl OpenNode {
    fn covers(&self, vbn: u64) -> bool {
        (self.first..self.first + Geometry::span(self.level)).contains(&vbn)
    }

    fn child(&mut self, vbn: u64) -> &mut Pointer {
        &mut self.children.0[Geometry::slot(self.level, self.first, vbn)]
    }
}

/// A tree being built.
#[derive(Debug)]
pub struct TreeWriter<'a> {
    pool: Arc<Pool>,
    set: &'a mut WriteSet,
    key: VolumeKey,
    cp: CpNumber,
    size: ByteCount,
    geometry: Geometry,
    top: Pointer,
    open: Vec<OpenNode>,
    next: u64,
}

impl<'a> TreeWriter<'a> {
    /// Begins the tree of `cp` on `base`, which is the published tree of the volume or one that
    /// an earlier pass of the same CP built in the same write set.
    pub fn new(
        pool: &Arc<Pool>,
        set: &'a mut WriteSet,
        key: VolumeKey,
        base: TreeRoot,
        cp: CpNumber,
    ) -> Result<Self, VolumeError> {
        assert!(Arc::ptr_eq(pool, set.pool()), "a tree is written to the pool of its write set");
        let geometry = Geometry::of(base.size)?;
        let TreeRoot { size, top } = base;
        if top.birth > cp {
            return Err(VolumeError::BaseTooYoung { birth: top.birth, cp });
        }
        set.begin_tree(key, base);
        let pool = Arc::clone(pool);
        Ok(Self { pool, set, key, cp, size, geometry, top, open: Vec::new(), next: 0 })
    }

    /// Begins the tree of `cp` on `base` for a volume that has grown to `size`. What was there stays
    /// where it is, below nodes that are new; the rest was never written, and so is a hole of no CP.
    pub fn growing(
        pool: &Arc<Pool>,
        set: &'a mut WriteSet,
        key: VolumeKey,
        (base, size): (TreeRoot, ByteCount),
        cp: CpNumber,
    ) -> Result<Self, VolumeError> {
        if size < base.size {
            return Err(VolumeError::SizesDiffer { left: base.size, right: size });
        }
        let geometry = Geometry::of(size)?;
        let mut writer = Self::new(pool, set, key, base, cp)?;
        let below = std::mem::replace(&mut writer.geometry, geometry).height;
        writer.size = size;
        if !base.top.is_hole() {
            for level in (below + 1..=geometry.height).rev() {
                let mut children = Children::of_nothing();
                if level == below + 1 {
                    children.0[0] = base.top;
                }
                let (first, old, changed) = (0, Pointer::ZERO, true);
                writer.open.push(OpenNode { level, first, old, children, changed });
            }
        }
        Ok(writer)
    }

    /// Writes the node of that level which holds `vbn` to a new place, as it is: what the device
    /// holds of it is bad. A node comes before what is put below it.
    pub fn rewrite_node(&mut self, vbn: Vbn, level: u8) -> Result<(), VolumeError> {
        self.advance(vbn, 0)?;
        self.geometry.check(vbn, 1)?;
        let node = self.open_to(vbn.0, level.min(self.geometry.height))?;
        // A hole stands nowhere.
        node.changed |= !node.old.is_hole();
        Ok(())
    }

    /// Changes one block. Blocks come in rising order.
    pub fn put(&mut self, vbn: Vbn, content: Content<'_>) -> Result<(), VolumeError> {
        self.advance(vbn, 1)?;
        let hash = match content {
            Content::Data(block) => leaf_hash(block),
            Content::Hole => ContentHash::ZERO,
        };
        let old = *self.open_to(vbn.0, 1)?.child(vbn.0);
        if old.hash == hash && self.is_sound(&old, content)? {
            return Ok(());
        }
        let new = match content {
            Content::Data(block) if !hash.is_zero() => {
                let pbn = self.set.append(block)?;
                Pointer { pbn, birth: self.cp, crc: crc32c(block), hash }
            }
            Content::Data(_) | Content::Hole => Pointer::hole(self.cp),
        };
        self.free(old)?;
        self.replace(vbn.0, 1, new)
    }

    /// Makes `count` blocks holes. Takes time by what is freed, not by `count`.
    pub fn put_hole_range(&mut self, vbn: Vbn, count: u64) -> Result<(), VolumeError> {
        self.advance(vbn, count)?;
        let end = vbn.0 + count;
        let mut at = vbn.0;
        while at < end {
            let level = self.widest(at, end);
            if level == self.geometry.height {
                self.close_all()?;
                if !self.top.is_hole() {
                    self.free_subtree(self.top, level)?;
                    self.top = Pointer::hole(self.cp);
                }
            } else {
                let old = *self.open_to(at, level + 1)?.child(at);
                if !old.is_hole() {
                    self.free_subtree(old, level)?;
                    self.replace(at, level + 1, Pointer::hole(self.cp))?;
                }
            }
            at = at.saturating_add(Geometry::span(level));
        }
        Ok(())
    }

    /// Finishes the tree. Its blocks are on their way to the device and can be read; publishing
    /// makes them durable.
    pub fn finish(mut self) -> Result<TreeRoot, VolumeError> {
        self.close_all()?;
        self.set.flush_buffer()?;
        self.set.end_tree();
        Ok(TreeRoot { size: self.size, top: self.top })
    }

    fn advance(&mut self, vbn: Vbn, count: u64) -> Result<(), VolumeError> {
        if vbn.0 < self.next {
            return Err(VolumeError::Order { vbn, next: Vbn(self.next) });
        }
        self.geometry.check(vbn, count)?;
        self.next = vbn.0 + count;
        Ok(())
    }

    /// The level of the largest subtree that begins at `at` and ends before `end` or, where
    /// `end` is that of the volume, behind it.
    fn widest(&self, at: u64, end: u64) -> u8 {
        let covered = |level: u8| {
            let span = Geometry::span(level);
            at.is_multiple_of(span) && (at + span <= end || end == self.geometry.blocks)
        };
        (1..=self.geometry.height).take_while(|&level| covered(level)).last().unwrap_or(0)
    }

    /// Opens the node of that level on the path to `vbn`, and closes those that are not on it.
    fn open_to(&mut self, vbn: u64, level: u8) -> Result<&mut OpenNode, VolumeError> {
        while self.open.last().is_some_and(|node| !node.covers(vbn) || node.level < level) {
            self.close()?;
        }
        loop {
            let (pointer, child_level, first) = match self.open.last_mut() {
                Some(node) if node.level == level => break,
                Some(node) => {
                    let (pointer, below) = (*node.child(vbn), node.level - 1);
                    (pointer, below, vbn - vbn % Geometry::span(below))
                }
                None => (self.top, self.geometry.height, 0),
            };
            let children =
                Children::under(&self.pool, &pointer, child_level, first, &self.geometry)?;
            let changed = false;
            self.open.push(OpenNode { level: child_level, first, old: pointer, children, changed });
        }
        let lowest = self.open.len() - 1;
        Ok(&mut self.open[lowest])
    }

    fn replace(&mut self, vbn: u64, level: u8, new: Pointer) -> Result<(), VolumeError> {
        let unborn = new.is_hole() && machine::breaks(8);
        let node = self.open_to(vbn, level)?;
        *node.child(vbn) = if unborn { Pointer::hole(CpNumber(0)) } else { new };
        node.changed = true;
        Ok(())
    }

    fn close_all(&mut self) -> Result<(), VolumeError> {
        while !self.open.is_empty() {
            self.close()?;
        }
        Ok(())
    }

    /// Finishes the lowest open node and enters it into its parent.
    fn close(&mut self) -> Result<(), VolumeError> {
        let Some(node) = self.open.pop() else { return Ok(()) };
        if !node.changed {
            return Ok(());
        }
        let new = if node.children.are_holes() {
            Pointer::hole(self.cp)
        } else {
            let bytes = node.children.encode();
            let (crc, hash) = (crc32c(&bytes), node_block_hash(&bytes));
            let pointer = Pointer { pbn: self.set.append(&bytes)?, birth: self.cp, crc, hash };
            self.pool.keep_block(&pointer, bytes);
            pointer
        };
        self.free(node.old)?;
        match self.open.last_mut() {
            Some(parent) => {
                *parent.child(node.first) = new;
                parent.changed = true;
            }
            None => self.top = new,
        }
        Ok(())
    }

    /// Whether the block that is to have this content can be read and has it.
    fn is_sound(&self, old: &Pointer, content: Content<'_>) -> Result<bool, VolumeError> {
        let Content::Data(wanted) = content else { return Ok(true) };
        if old.is_hole() {
            return Ok(true);
        }
        let mut met = [0; BLOCK_BYTES];
        match self.pool.read_medium(old.pbn, old.crc, &mut met) {
            Ok(()) => Ok(met == *wanted),
            Err(error @ (PoolError::Corrupt { .. } | PoolError::Device(_))) => {
                tracing::warn!(%error, "a block is written anew with what it should hold");
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn free(&mut self, old: Pointer) -> Result<(), VolumeError> {
        if !old.is_hole() {
            self.set.free(self.key, old.pbn, old.birth)?;
        }
        Ok(())
    }

    /// Frees all that a pointer reaches; `level` is that of what it points to.
    fn free_subtree(&mut self, pointer: Pointer, level: u8) -> Result<(), VolumeError> {
        if pointer.is_hole() {
            return Ok(());
        }
        if level > 0 {
            let node = Node::read(&self.pool, &pointer)?;
            for child in node.children()?.0.iter() {
                self.free_subtree(*child, level - 1)?;
            }
        }
        self.free(pointer)
    }
}

/// The tree of a volume that has grown to `size`, as of `cp`; the same tree if it has that size.
pub fn grow(
    pool: &Arc<Pool>,
    set: &mut WriteSet,
    key: VolumeKey,
    (base, size): (TreeRoot, ByteCount),
    cp: CpNumber,
) -> Result<TreeRoot, VolumeError> {
    if base.size == size {
        return Ok(base);
    }
    TreeWriter::growing(pool, set, key, (base, size), cp)?.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::label::POOL_BYTES_MIN;
    use crate::volume::check::{Depth, check};
    use crate::volume::reader::read_into;
    use crate::volume::testing::{Put, cp, data, pool_with, slow_root, tree};

    /// End to end: what was put is read, hashed and checked after it was published.
    #[test]
    fn a_published_tree_reads_and_hashes_as_what_was_put() {
        for blocks in [1, 100, 128, 129, 20_000] {
            let (_, pool) = pool_with(2 * POOL_BYTES_MIN, blocks);
            let last = blocks - 1;
            let mut puts = vec![data(0, 1)];
            if last > 0 {
                puts.push(data(last, 2));
            }
            let published = cp(&pool, 1, &puts).unwrap();
            let mut image = vec![0; usize::try_from(blocks).unwrap() * BLOCK_BYTES];
            read_into(&pool, &tree(&pool), 0, &mut image[..BLOCK_BYTES]).unwrap();
            assert_eq!(image[0], 1);
            let end = image.len() - BLOCK_BYTES;
            let at = last * 4096;
            read_into(&pool, &tree(&pool), at, &mut image[end..]).unwrap();
            assert_eq!(published.roots[0].1, slow_root(&image), "{blocks} blocks");
            let report = check(&pool, Depth::Data).unwrap();
            assert!(report.is_clean(), "{:?}", report.findings);
            cp(&pool, 2, &[Put::Holes(0, blocks)]).unwrap();
            assert!(tree(&pool).top.is_hole());
            let report = check(&pool, Depth::Data).unwrap();
            assert!(report.is_clean() && report.reachable == 0, "{:?}", report.findings);
        }
    }
}
