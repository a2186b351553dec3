//! Pull: makes a tree equal to one at the other end, by comparing hashes level by level.
//!
//! Resync with an unknown base, repair, and failback are this one machine. It is pure: who runs
//! it sends what [`Puller::asks`] returns, hands the answers to [`Puller::nodes`] and
//! [`Puller::blocks`], and writes what [`Puller::next_put`] yields, which comes in rising order.
//! A round is: take all puts, then ask; if there was neither and it is not
//! [`Puller::is_finished`], an answer is awaited. The answering side is [`super::serve`].
//!
//! Nothing a peer says is believed: the children of a node are hashed and compared with what the
//! parent promised, the top with the announced root, a block with its leaf hash. So a wrong or
//! hostile peer can end a pull with an error that names volume, level and index, and cannot make
//! a wrong tree; what was yielded before the error is part of the target. The first error holds.
//!
//! Where the own tree has the hash that the target has, nothing is asked and nothing yielded; so
//! resuming is to begin anew with the half-built tree as the own one (R19). Memory goes by the
//! window and the height of the tree: a bounded queue a level ([`parts`]).

pub mod cp;
pub mod error;
pub mod own;
mod parts;
pub mod terms;

use std::collections::VecDeque;

use crate::limits::{PULL_BLOCKS_MAX, PULL_NODES_MAX, PULL_PARTS_MIN};
use crate::pool::pointer::{Pointer, root_of};
use crate::units::convert::to_u64;
use crate::units::hash::ContentHash;
use crate::units::numbers::Vbn;
use crate::wire::message::Message;
use crate::wire::pull::{
    AnswerDecoder, ChildHashes, Item, Pulled, Spans, WantBlocks, WantNodes, blocks_bytes_max,
    nodes_bytes_max,
};

use super::error::{TreePlace, VolumeError};
use super::geometry::Geometry;
use super::node::Children;
use super::root::{leaf_hash, node_hash};
use error::PullError;
use own::OwnTree;
use parts::{Part, Queue, What};
use terms::{Held, PullCounters, Put, Target, Window};

/// A request that is not answered yet.
#[derive(Debug, Clone, Copy)]
struct Asked {
    number: u64,
    level: u8,
    count: u64,
}

impl Asked {
    fn bytes(&self) -> u64 {
        if self.level == 0 { blocks_bytes_max(self.count) } else { nodes_bytes_max(self.count) }
    }
}

/// The machine for one volume.
#[derive(Debug)]
pub struct Puller<O> {
    own: O,
    target: Target,
    geometry: Geometry,
    window: Window,
    /// From level 0 to the top.
    levels: Vec<Queue>,
    asked: VecDeque<Asked>,
    next_number: u64,
    bytes: u64,
    counters: PullCounters,
    failed: Option<PullError>,
}

impl<O: OwnTree> Puller<O> {
    /// Begins to make `own` equal to `target`. Requests are numbered from `number` on; on one
    /// connection no number is used twice.
    ///
    /// # Errors
    /// The two are of different size, or of one that no volume has.
    pub fn new(own: O, target: Target, window: Window, number: u64) -> Result<Self, PullError> {
        let least = nodes_bytes_max(1).max(blocks_bytes_max(1));
        assert!(window.bytes >= least && window.requests > 0, "{window:?} lets nothing through");
        assert!(window.parts >= PULL_PARTS_MIN, "{window:?} does not hold a node");
        let volume = target.volume;
        let error = |error| PullError::Own { volume, error };
        let (left, right) = (own.tree().size, target.size);
        if left != right {
            return Err(error(VolumeError::SizesDiffer { left, right }));
        }
        let geometry = Geometry::of(target.size).map_err(error)?;
        let above = (window.parts / 16).max(PULL_PARTS_MIN);
        let levels = (0..=geometry.height)
            .map(|level| Queue::new(if level == 0 { window.parts } else { above }))
            .collect();
        let mut puller = Self {
            own,
            target,
            geometry,
            window,
            levels,
            asked: VecDeque::new(),
            next_number: number,
            bytes: 0,
            counters: PullCounters::default(),
            failed: None,
        };
        puller.begin();
        Ok(puller)
    }

    /// The whole volume is one part, if it differs.
    fn begin(&mut self) {
        let Target { size, root, .. } = self.target;
        let own = self.own.tree();
        if own.root() == root {
            return;
        }
        let what = if root_of(size, ContentHash::ZERO) == root {
            What::Hole { count: self.geometry.blocks }
        } else {
            // Nothing is promised of the top but the root.
            What::Differs { hash: ContentHash::ZERO, own: own.top }
        };
        self.levels[usize::from(self.geometry.height)].push(Part { first: 0, what });
    }

    /// The target.
    pub fn target(&self) -> Target {
        self.target
    }

    /// What it has cost so far.
    pub fn counters(&self) -> PullCounters {
        self.counters
    }

    /// The number that the next request will have.
    pub fn next_number(&self) -> u64 {
        self.next_number
    }

    /// What it holds now.
    pub fn held(&self) -> Held {
        let parts = self.levels.iter().map(Queue::len).sum();
        Held { parts, bytes: self.bytes, requests: self.asked.len() }
    }

    /// Whether the target is reached: all that differed was yielded.
    pub fn is_finished(&self) -> bool {
        self.failed.is_none() && self.asked.is_empty() && self.levels.iter().all(|q| q.len() == 0)
    }

    /// The requests to send now, nodes before blocks.
    pub fn asks(&mut self) -> Vec<Message> {
        let mut asks = Vec::new();
        if self.failed.is_some() {
            return asks;
        }
        self.settle();
        for level in (0..=self.geometry.height).rev() {
            while let Some(ask) = self.ask(level) {
                asks.push(ask);
            }
        }
        asks
    }

    /// The next thing to write, in rising order.
    pub fn next_put(&mut self) -> Option<Put> {
        if self.levels[0].len() == 0 {
            self.settle();
        }
        let part = self.levels[0].take()?;
        let vbn = Vbn(part.first);
        match part.what {
            What::Hole { count } => Some(Put::Holes { vbn, count }),
            What::Data(block) => {
                self.bytes -= blocks_bytes_max(1);
                Some(Put::Data { vbn, block })
            }
            What::Differs { .. } => panic!("block {vbn} is yielded before it came"),
        }
    }

    /// Takes the payload of `Nodes`.
    pub fn nodes(&mut self, answer: &Pulled, payload: &[u8]) -> Result<(), PullError> {
        self.latched(|puller| {
            let asked = puller.expect(answer, true)?;
            puller.take_nodes(asked, payload)
        })
    }

    /// Takes the payload of `Blocks`.
    pub fn blocks(&mut self, answer: &Pulled, payload: &[u8]) -> Result<(), PullError> {
        self.latched(|puller| {
            let asked = puller.expect(answer, false)?;
            puller.take_blocks(asked, payload)
        })
    }

    fn latched(
        &mut self,
        take: impl FnOnce(&mut Self) -> Result<(), PullError>,
    ) -> Result<(), PullError> {
        if let Some(first) = &self.failed {
            return Err(first.clone());
        }
        let taken = take(self);
        if let Err(error) = &taken {
            self.failed = Some(error.clone());
        }
        taken
    }

    fn place(&self, level: u8, first: u64) -> TreePlace {
        let index = first / Geometry::span(level);
        TreePlace { volume: self.target.volume, level, index }
    }

    /// The next request of that level, if the window, the room below and the wish for full
    /// requests allow one.
    fn ask(&mut self, level: u8) -> Option<Message> {
        if self.asked.len() >= self.window.requests {
            return None;
        }
        let free = self.window.bytes - self.bytes;
        let (fit, max) = match level {
            0 => (free / blocks_bytes_max(1), PULL_BLOCKS_MAX),
            _ => (free / nodes_bytes_max(1), PULL_NODES_MAX),
        };
        let (lower, upper) = self.levels.split_at_mut(usize::from(level));
        let (queue, mut below) = (&mut upper[0], lower.last_mut());
        if below.as_ref().is_some_and(|below| !below.is_low()) {
            return None;
        }
        let batch = queue.batch(fit.min(max), below.as_deref());
        let count = to_u64(batch.firsts.len());
        // A request cut short by the window waits for the next answer to make room.
        let waits = count == fit && fit < max && !self.asked.is_empty();
        if count == 0 || waits {
            return None;
        }
        queue.pass(&batch);
        if let Some(below) = &mut below {
            below.promise(&batch);
        }
        let asked = Asked { number: self.next_number, level, count };
        self.next_number += 1;
        self.bytes += asked.bytes();
        self.asked.push_back(asked);
        self.counters.requests += 1;
        Some(self.request(asked, &batch.firsts))
    }

    fn request(&mut self, asked: Asked, firsts: &[u64]) -> Message {
        let Target { cp, volume, .. } = self.target;
        let Asked { number, level, count } = asked;
        if level == 0 {
            self.counters.blocks += count;
            let mut blocks = Spans::new();
            firsts.iter().for_each(|&vbn| blocks.push(vbn));
            return Message::WantBlocks(WantBlocks { cp, volume, number, blocks });
        }
        self.counters.nodes += count;
        let mut nodes = Spans::new();
        firsts.iter().for_each(|first| nodes.push(first / Geometry::span(level)));
        Message::WantNodes(WantNodes { cp, volume, number, level, nodes })
    }

    /// The request that an answer belongs to: none but the oldest.
    fn expect(&mut self, answer: &Pulled, nodes: bool) -> Result<Asked, PullError> {
        let Target { cp, volume, .. } = self.target;
        if (answer.cp, answer.volume) != (cp, volume) {
            let Pulled { cp: met_cp, volume: met_volume, .. } = *answer;
            return Err(PullError::OtherTarget { volume, cp, met_volume, met_cp });
        }
        let met = answer.number;
        let front = self.asked.front().copied();
        let Some(asked) = front.filter(|asked| asked.number == met) else {
            let wanted = front.map(|asked| asked.number);
            return Err(PullError::NotAsked { volume, wanted, met });
        };
        if nodes != (asked.level > 0) {
            return Err(PullError::OtherKind { volume, number: met });
        }
        self.asked.pop_front();
        Ok(asked)
    }

    fn content<T>(&self, place: TreePlace, item: Item<T>) -> Result<T, PullError> {
        let Target { cp, volume, .. } = self.target;
        match item {
            Item::Content(content) => Ok(content),
            Item::Unreadable => Err(PullError::Unreadable { place }),
            Item::Gone => Err(PullError::Gone { volume, cp }),
        }
    }

    fn take_nodes(&mut self, asked: Asked, payload: &[u8]) -> Result<(), PullError> {
        let level = asked.level;
        self.bytes -= asked.bytes();
        self.counters.answer_bytes += to_u64(payload.len());
        let mut answer = AnswerDecoder::new(payload);
        let mut place = self.place(level, 0);
        for _ in 0..asked.count {
            let (queue, below) = with_below(&mut self.levels, level);
            let (first, promised, own) = queue.answered(below);
            place = self.place(level, first);
            let item = answer.node().map_err(|error| PullError::Malformed { place, error })?;
            let children = self.content(place, item)?;
            self.check_node(place, promised, &children)?;
            self.enter(place, first, &own, &children)?;
            self.settle();
        }
        answer.finish().map_err(|error| PullError::Malformed { place, error })
    }

    fn take_blocks(&mut self, asked: Asked, payload: &[u8]) -> Result<(), PullError> {
        self.counters.answer_bytes += to_u64(payload.len());
        let mut answer = AnswerDecoder::new(payload);
        let mut place = self.place(0, 0);
        for _ in 0..asked.count {
            let (vbn, wanted) = self.levels[0].awaited();
            place = self.place(0, vbn);
            let item = answer.block().map_err(|error| PullError::Malformed { place, error })?;
            let block = self.content(place, item)?;
            let met = leaf_hash(block);
            if met != wanted {
                return Err(PullError::BlockHash { place, wanted, met });
            }
            self.levels[0].came(Box::new(*block));
        }
        answer.finish().map_err(|error| PullError::Malformed { place, error })
    }

    /// Children are those the parent promised, or those of the announced root.
    fn check_node(
        &self,
        place: TreePlace,
        promised: ContentHash,
        children: &ChildHashes,
    ) -> Result<(), PullError> {
        let hash = node_hash(children);
        if place.level < self.geometry.height {
            let (wanted, met) = (promised, hash);
            let same = wanted == met;
            return if same { Ok(()) } else { Err(PullError::NodeHash { place, wanted, met }) };
        }
        let (wanted, met) = (self.target.root, root_of(self.target.size, hash));
        if wanted == met { Ok(()) } else { Err(PullError::TopHash { place, wanted, met }) }
    }

    /// What differs below a proven node goes into the queue below.
    fn enter(
        &mut self,
        place: TreePlace,
        first: u64,
        own: &Pointer,
        children: &ChildHashes,
    ) -> Result<(), PullError> {
        let volume = self.target.volume;
        let own = if own.is_hole() {
            Children::of_hole(own.birth, place.level, first, &self.geometry)
        } else {
            let read = self.own.children(own, place.level, first);
            read.map_err(|error| PullError::Own { volume, error })?
        };
        let below = place.level - 1;
        let span = Geometry::span(below);
        for (child, (&hash, &own)) in children.iter().zip(own.0.iter()).enumerate() {
            let first = first + to_u64(child) * span;
            if first >= self.geometry.blocks && !hash.is_zero() {
                return Err(PullError::PastEnd { place, child });
            }
            if hash == own.hash {
                continue;
            }
            let what = if hash.is_zero() {
                What::Hole { count: span.min(self.geometry.blocks - first) }
            } else {
                What::Differs { hash, own }
            };
            self.levels[usize::from(below)].push(Part { first, what });
        }
        Ok(())
    }

    /// Holes that nothing stands before move down, from the top on.
    fn settle(&mut self) {
        for level in (1..=self.geometry.height).rev() {
            let (queue, below) = with_below(&mut self.levels, level);
            queue.settle(below);
        }
    }
}

/// The queue of a level above 0, and the one below it.
fn with_below(levels: &mut [Queue], level: u8) -> (&mut Queue, &mut Queue) {
    let (lower, upper) = levels.split_at_mut(usize::from(level));
    (&mut upper[0], &mut lower[usize::from(level) - 1])
}
