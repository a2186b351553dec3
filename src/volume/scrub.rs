//! Reads what trees reach from the medium and proves it, slice by slice.
//!
//! Called by the scrub, which decides what is read when. Every node and block is compared with the
//! full content hash in its parent, so that a write that was lost, or went to another place, is
//! found although what lies there was right once. What is wrong is taken from another copy and
//! rewritten by the pool; what cannot be had is listed with its place.
//!
//! A node whose subtree was read whole is remembered: a tree that shares it does not read it
//! again. Whoever calls keeps the tree from being given up; a tree that is given up nevertheless
//! is not an error, since its blocks may be others' by now.

use std::fmt;
use std::ops::Range;

use crate::limits::{NODE_CHILDREN, POOL_LEASE_BLOCKS, SCRUB_LOST_NAMED_MAX};
use crate::pool::Pool;
use crate::pool::bitmap::Bitmap;
use crate::pool::pointer::{Pointer, TreeRoot, VolumeKey};
use crate::pool::scrub::Scrubbed;
use crate::units::convert::to_u64;
use crate::units::numbers::{CpNumber, Pbn, Vbn};

use super::error::VolumeError;
use super::geometry::Geometry;
use super::node::Node;
use super::root::{leaf_hash, node_block_hash};

/// Something of which no copy is right.
#[derive(Debug, Clone)]
pub struct Lost {
    /// Of which volume.
    pub key: VolumeKey,
    /// At which CP.
    pub cp: CpNumber,
    /// The first block.
    pub vbn: Vbn,
    /// How many: more than one if it is the node above them.
    pub count: u64,
    /// How it is asked for.
    pub pointer: Pointer,
    /// What was met.
    pub error: String,
}

impl Lost {
    /// Whether it is a node.
    pub fn is_node(&self) -> bool {
        self.count > 1
    }
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cp, vbn, count, error, .. } = self;
        match count {
            1 => write!(f, "block {vbn} at CP {cp}: {error}"),
            _ => write!(f, "node above blocks {vbn} to {} at CP {cp}: {error}", vbn.0 + count - 1),
        }
    }
}

/// What was read and found.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    /// Blocks and nodes read.
    pub blocks_read: u64,
    /// Blocks and nodes that were not right and had another copy.
    pub repaired: u64,
    /// Blocks and nodes without a right copy here that the other end has given back.
    pub known: u64,
    /// Blocks and nodes without a right copy.
    pub lost_count: u64,
    /// The first of them.
    pub lost: Vec<Lost>,
}

/// How much of a tree is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// All of it.
    Everything,
    /// Nodes only, from wherever they are: to remember what was read before.
    Nodes,
}

/// A walk over one slice of one tree.
pub struct Sweep<'a> {
    pool: &'a Pool,
    key: VolumeKey,
    cp: CpNumber,
    range: Range<u64>,
    extent: Extent,
    /// PBN of the first bit of `reached`.
    first: u64,
    reached: &'a mut Bitmap,
    /// Subtrees that were read whole by another tree are passed over.
    shares: bool,
    /// Told of blocks read; `false` ends the walk.
    paced: &'a mut dyn FnMut(u64) -> bool,
    run: Vec<(Vbn, Pointer)>,
    goes_on: bool,
    tally: Tally,
}

impl fmt::Debug for Sweep<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sweep").field("key", &self.key).field("range", &self.range).finish()
    }
}

/// Of which tree, and how.
#[derive(Debug, Clone, Copy)]
pub struct Tree {
    /// The volume.
    pub key: VolumeKey,
    /// The CP.
    pub cp: CpNumber,
    /// Its tree.
    pub tree: TreeRoot,
    /// Whether it shares blocks with trees that were read before.
    pub shares: bool,
}

impl<'a> Sweep<'a> {
    /// Reads blocks `range` of a tree. Says what was found, and whether it came to its end.
    pub fn run(
        pool: &'a Pool,
        tree: Tree,
        (range, extent): (Range<u64>, Extent),
        (first, reached): (u64, &'a mut Bitmap),
        paced: &'a mut dyn FnMut(u64) -> bool,
    ) -> Result<(Tally, bool), VolumeError> {
        let geometry = Geometry::of(tree.tree.size)?;
        let Tree { key, cp, shares, .. } = tree;
        let range = range.start..range.end.min(geometry.blocks);
        let mut sweep = Self {
            pool,
            key,
            cp,
            range,
            extent,
            first,
            reached,
            shares,
            paced,
            run: Vec::new(),
            goes_on: true,
            tally: Tally::default(),
        };
        sweep.visit(&tree.tree.top, geometry.height, 0);
        sweep.end_run();
        Ok((sweep.tally, sweep.goes_on))
    }

    fn index(&self, pbn: Pbn) -> Option<u64> {
        pbn.0.checked_sub(self.first).filter(|index| *index < self.reached.blocks())
    }

    fn was_reached(&self, pbn: Pbn) -> bool {
        self.index(pbn).is_some_and(|index| self.reached.get(index))
    }

    fn reach(&mut self, pbn: Pbn) {
        if let Some(index) = self.index(pbn) {
            self.reached.insert(index);
        }
    }

    fn visit(&mut self, pointer: &Pointer, level: u8, first: u64) {
        let last = first.saturating_add(Geometry::span(level));
        let apart = first >= self.range.end || last <= self.range.start;
        if pointer.is_hole() || apart || !self.goes_on {
            return;
        }
        if self.shares && self.was_reached(pointer.pbn) {
            return;
        }
        if level == 0 {
            self.block(Vbn(first), pointer);
            return;
        }
        if self.extent == Extent::Everything && !self.node(pointer, level, first) {
            return;
        }
        let Ok(node) = Node::read(self.pool, pointer) else { return };
        let below = Geometry::span(level - 1);
        for (child, slot) in (0..NODE_CHILDREN).zip(0..) {
            let first = first.saturating_add(below.saturating_mul(slot));
            match node.child(child) {
                Ok(pointer) => self.visit(&pointer, level - 1, first),
                Err(error) => self.lose((Vbn(first), below.max(2)), pointer, error.to_string()),
            }
        }
        // Only what was read whole: another slice comes for the rest.
        if self.goes_on && first >= self.range.start && last <= self.range.end {
            self.reach(pointer.pbn);
        }
    }

    /// Reads a node; whether it can be entered.
    fn node(&mut self, pointer: &Pointer, level: u8, first: u64) -> bool {
        let found = self.pool.scrub_block(pointer, node_block_hash);
        self.tally.blocks_read += 1;
        self.goes_on &= (self.paced)(1);
        match found {
            None => true,
            Some(Scrubbed::Lost(error)) => {
                let count = Geometry::span(level).min(self.range.end.saturating_sub(first));
                self.lose((Vbn(first), count.max(2)), pointer, error.to_string());
                false
            }
            Some(found @ (Scrubbed::Repaired | Scrubbed::Known)) => {
                self.count(&found);
                true
            }
        }
    }

    fn count(&mut self, found: &Scrubbed) {
        match found {
            Scrubbed::Repaired => self.tally.repaired += 1,
            Scrubbed::Known => self.tally.known += 1,
            Scrubbed::Lost(_) => {}
        }
    }

    fn lose(&mut self, (vbn, count): (Vbn, u64), pointer: &Pointer, error: String) {
        self.tally.lost_count += 1;
        if self.tally.lost.len() < SCRUB_LOST_NAMED_MAX {
            let (key, cp, pointer) = (self.key, self.cp, *pointer);
            self.tally.lost.push(Lost { key, cp, vbn, count, pointer, error });
        }
    }

    /// Gathers blocks side by side, and reads them at once.
    fn block(&mut self, vbn: Vbn, pointer: &Pointer) {
        if self.extent == Extent::Nodes {
            self.reach(pointer.pbn);
            return;
        }
        let follows = self.run.last().is_some_and(|(_, last)| last.pbn.0 + 1 == pointer.pbn.0);
        if !follows || to_u64(self.run.len()) >= POOL_LEASE_BLOCKS {
            self.end_run();
        }
        self.run.push((vbn, *pointer));
    }

    fn end_run(&mut self) {
        let run = std::mem::take(&mut self.run);
        if run.is_empty() || !self.goes_on {
            return;
        }
        let pointers: Vec<Pointer> = run.iter().map(|(_, pointer)| *pointer).collect();
        for (at, found) in self.pool.scrub_run(&pointers, leaf_hash) {
            let (vbn, pointer) = run[at];
            match found {
                Scrubbed::Lost(error) => self.lose((vbn, 1), &pointer, error.to_string()),
                Scrubbed::Repaired | Scrubbed::Known => self.count(&found),
            }
        }
        pointers.iter().for_each(|pointer| self.reach(pointer.pbn));
        let blocks = to_u64(run.len());
        self.tally.blocks_read += blocks;
        self.goes_on = (self.paced)(blocks);
    }
}

/// Reads one place again; whether it is right now, or known.
pub fn is_right(pool: &Pool, lost: &Lost) -> bool {
    let found = if lost.is_node() {
        pool.scrub_block(&lost.pointer, node_block_hash)
    } else {
        pool.scrub_block(&lost.pointer, leaf_hash)
    };
    !matches!(found, Some(Scrubbed::Lost(_)))
}

/// Finds who asks for some blocks: visits every node of a tree, from wherever it is, and calls
/// `found` with volume block, level and pointer of each that leads to one of them.
pub fn owners(
    pool: &Pool,
    tree: &TreeRoot,
    wanted: &dyn Fn(Pbn) -> bool,
    found: &mut dyn FnMut(Vbn, u8, Pointer),
) -> Result<(), VolumeError> {
    let geometry = Geometry::of(tree.size)?;
    let mut open = vec![(tree.top, geometry.height, 0)];
    while let Some((pointer, level, first)) = open.pop() {
        if pointer.is_hole() {
            continue;
        }
        if wanted(pointer.pbn) {
            found(Vbn(first), level, pointer);
        }
        if level == 0 {
            continue;
        }
        // What is below a node that cannot be read is not known; the scrub of the trees says so.
        let Ok(node) = Node::read(pool, &pointer) else { continue };
        let below = Geometry::span(level - 1);
        for (child, slot) in (0..NODE_CHILDREN).zip(0..) {
            if let Ok(child) = node.child(child) {
                open.push((child, level - 1, first + below * slot));
            }
        }
    }
    Ok(())
}

/// Reads a place that [`owners`] found from the medium; whether it is right.
pub fn prove(pool: &Pool, level: u8, pointer: &Pointer) -> Option<Scrubbed> {
    match level {
        0 => pool.scrub_block(pointer, leaf_hash),
        _ => pool.scrub_block(pointer, node_block_hash),
    }
}
