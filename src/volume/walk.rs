//! Visits a tree in order of VBN, pruned by range and by birth.
//!
//! One iterator serves readers, differences and `check`: it yields data blocks and holes, a hole
//! of any size as one item, and nodes if asked. With a birth given it passes over everything that
//! was not written after that CP: a pointer is at least as young as all below it. Memory goes by
//! height.
//!
//! A node that cannot be read is yielded as an error; the walk goes on behind its subtree.

use crate::limits::NODE_CHILDREN;
use crate::pool::Pool;
use crate::pool::pointer::{Pointer, TreeRoot};
use crate::units::numbers::{CpNumber, Vbn};

use super::error::VolumeError;
use super::geometry::Geometry;
use super::node::Node;

/// A part of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Item {
    /// Its first block; for a node that of its subtree, be it before the range.
    pub vbn: Vbn,
    /// Blocks it covers, within range and volume.
    pub count: u64,
    /// 0 for data, the level of the node otherwise. A hole has the level it stands for.
    pub level: u8,
    /// Where it is.
    pub pointer: Pointer,
}

#[derive(Debug)]
struct Frame {
    node: Node,
    level: u8,
    first: u64,
    slot: usize,
}

/// The iterator.
#[derive(Debug)]
pub struct Walk<'a> {
    pool: &'a Pool,
    start: u64,
    end: u64,
    since: Option<CpNumber>,
    with_nodes: bool,
    root: Option<(Pointer, u8)>,
    frames: Vec<Frame>,
}

impl<'a> Walk<'a> {
    /// All of a tree.
    pub fn new(pool: &'a Pool, tree: &TreeRoot) -> Result<Self, VolumeError> {
        let geometry = Geometry::of(tree.size)?;
        Ok(Self {
            pool,
            start: 0,
            end: geometry.blocks,
            since: None,
            with_nodes: false,
            root: Some((tree.top, geometry.height)),
            frames: Vec::new(),
        })
    }

    /// Only blocks `vbn..vbn + count`, which lie within the volume.
    #[must_use]
    pub fn range(mut self, vbn: Vbn, count: u64) -> Self {
        self.start = vbn.0;
        self.end = self.end.min(vbn.0.saturating_add(count));
        self
    }

    /// Only what was written after that CP.
    #[must_use]
    pub fn born_after(mut self, cp: CpNumber) -> Self {
        self.since = Some(cp);
        self
    }

    /// Nodes as well, each before what is below it.
    #[must_use]
    pub fn with_nodes(mut self) -> Self {
        self.with_nodes = true;
        self
    }

    /// Passes over what is below the node that was yielded last.
    pub fn skip_children(&mut self) {
        self.frames.pop();
    }

    /// What a pointer means to this walk: passed over, yielded, entered.
    fn visit(
        &mut self,
        pointer: Pointer,
        level: u8,
        first: u64,
    ) -> Option<Result<Item, VolumeError>> {
        let last = first.saturating_add(Geometry::span(level));
        let (from, to) = (first.max(self.start), last.min(self.end));
        if from >= to || self.since.is_some_and(|since| pointer.birth <= since) {
            return None;
        }
        let count = to - from;
        if pointer.is_hole() || level == 0 {
            return Some(Ok(Item { vbn: Vbn(from), count, level, pointer }));
        }
        match Node::read(self.pool, &pointer) {
            Ok(node) => self.frames.push(Frame { node, level, first, slot: 0 }),
            Err(error) => return Some(Err(error)),
        }
        self.with_nodes.then_some(Ok(Item { vbn: Vbn(first), count, level, pointer }))
    }
}

impl Iterator for Walk<'_> {
    type Item = Result<Item, VolumeError>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some((top, height)) = self.root.take()
            && let Some(item) = self.visit(top, height, 0)
        {
            return Some(item);
        }
        while let Some(frame) = self.frames.last_mut() {
            let span = Geometry::span(frame.level - 1);
            if frame.slot == 0 && self.start > frame.first {
                frame.slot = crate::units::convert::to_usize((self.start - frame.first) / span);
            }
            let first = frame.first + crate::units::convert::to_u64(frame.slot) * span;
            if frame.slot >= NODE_CHILDREN || first >= self.end {
                self.frames.pop();
                continue;
            }
            let (child, level) = (frame.node.child(frame.slot), frame.level - 1);
            frame.slot += 1;
            let item = match child {
                Ok(pointer) => self.visit(pointer, level, first),
                Err(error) => Some(Err(error)),
            };
            if item.is_some() {
                return item;
            }
        }
        None
    }
}
