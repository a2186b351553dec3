//! What a pull knows to differ, in order of VBN, one queue a level.
//!
//! A node that differs becomes its differing children, one level down. Nodes are asked for from
//! the front, and answered in the order asked; so all that is in the queue of a level lies before
//! all that is in the queue above it, and the queue of level 0 is what to write, in order. A hole
//! stands between its siblings until those before it are answered; then it moves down.
//!
//! A queue has a bound. Nodes are passed (asked for) only while there is room below for all that
//! they can become, and for the holes behind them: that room is promised until they are answered.

use std::collections::VecDeque;

use crate::limits::NODE_CHILDREN;
use crate::pool::pointer::Pointer;
use crate::units::BLOCK_BYTES;
use crate::units::convert::to_u64;
use crate::units::hash::ContentHash;

/// A part of the volume that differs.
#[derive(Debug)]
pub(super) struct Part {
    /// Its first block.
    pub(super) first: u64,
    pub(super) what: What,
}

#[derive(Debug)]
pub(super) enum What {
    /// So many blocks become holes.
    Hole { count: u64 },
    /// A node or block of the target with that hash, where the own tree has `own`.
    Differs { hash: ContentHash, own: Pointer },
    /// A block that came and is proven.
    Data(Box<[u8; BLOCK_BYTES]>),
}

/// Parts that may be asked for in one request.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// First block of each.
    pub(super) firsts: Vec<u64>,
    /// Parts that are passed with it.
    passed: usize,
    /// Room that it takes below.
    weight: u64,
}

/// The parts of one level.
#[derive(Debug)]
pub(super) struct Queue {
    parts: VecDeque<Part>,
    /// Parts at the front that were asked for, and the holes among them.
    passed: usize,
    /// Parts at the front that are known, at level 0.
    known: usize,
    /// Room for what comes from the level above.
    promised: u64,
    max: u64,
}

impl Queue {
    pub(super) fn new(max: u64) -> Self {
        Self { parts: VecDeque::new(), passed: 0, known: 0, promised: 0, max }
    }

    pub(super) fn len(&self) -> u64 {
        to_u64(self.parts.len())
    }

    /// Whether it is time to get more from the level above.
    pub(super) fn is_low(&self) -> bool {
        self.len() + self.promised <= self.max / 2
    }

    pub(super) fn room(&self) -> u64 {
        self.max - self.len() - self.promised
    }

    /// Appends what lies behind all that is here. Holes side by side become one.
    pub(super) fn push(&mut self, part: Part) {
        if let (What::Hole { count }, Some(last)) = (&part.what, self.parts.back_mut())
            && let What::Hole { count: before } = &mut last.what
            && last.first + *before == part.first
        {
            *before += count;
            return;
        }
        assert!(self.room() > 0, "more parts than room was promised for");
        self.parts.push_back(part);
    }

    /// What may be asked for next: at most `most` parts, as far as `below` has room.
    pub(super) fn batch(&self, most: u64, below: Option<&Self>) -> Batch {
        let room = below.map_or(u64::MAX, Self::room);
        let weigh = |weight: u64| if below.is_some() { weight } else { 0 };
        let mut batch = Batch::default();
        for part in self.parts.iter().skip(self.passed) {
            let weight = match &part.what {
                What::Hole { .. } => weigh(1),
                What::Differs { .. } if to_u64(batch.firsts.len()) == most => break,
                What::Differs { .. } => weigh(to_u64(NODE_CHILDREN)),
                What::Data(_) => panic!("block {} came before it was asked for", part.first),
            };
            if batch.weight + weight > room {
                break;
            }
            if let What::Differs { .. } = &part.what {
                batch.firsts.push(part.first);
            }
            batch.weight += weight;
            batch.passed += 1;
        }
        batch
    }

    /// That batch of the level above is asked for.
    pub(super) fn promise(&mut self, batch: &Batch) {
        self.promised += batch.weight;
        assert!(self.len() + self.promised <= self.max, "more was promised than there is room");
    }

    /// That batch of this level is asked for.
    pub(super) fn pass(&mut self, batch: &Batch) {
        self.passed += batch.passed;
    }

    /// Takes the next node that was asked for, from the level above `below`.
    pub(super) fn answered(&mut self, below: &mut Self) -> (u64, ContentHash, Pointer) {
        match self.parts.pop_front() {
            Some(Part { first, what: What::Differs { hash, own } }) if self.passed > 0 => {
                self.passed -= 1;
                below.promised -= to_u64(NODE_CHILDREN);
                (first, hash, own)
            }
            other => panic!("{other:?} is in front of the nodes asked for"),
        }
    }

    /// Moves holes down that nothing stands before any more.
    pub(super) fn settle(&mut self, below: &mut Self) {
        while let Some(Part { what: What::Hole { .. }, .. }) = self.parts.front() {
            if self.passed > 0 {
                self.passed -= 1;
                below.promised -= 1;
            } else if below.room() == 0 {
                return;
            }
            self.parts.pop_front().into_iter().for_each(|hole| below.push(hole));
        }
    }

    /// The next block that was asked for and has not come: its number, the hash it must have.
    pub(super) fn awaited(&mut self) -> (u64, ContentHash) {
        loop {
            assert!(self.known < self.passed, "no block is awaited");
            match &self.parts[self.known] {
                Part { first, what: What::Differs { hash, .. } } => return (*first, *hash),
                Part { what: What::Hole { .. } | What::Data(_), .. } => self.known += 1,
            }
        }
    }

    /// The block awaited is here.
    pub(super) fn came(&mut self, block: Box<[u8; BLOCK_BYTES]>) {
        self.parts[self.known].what = What::Data(block);
        self.known += 1;
    }

    /// What is first, if it is known.
    pub(super) fn take(&mut self) -> Option<Part> {
        if let Some(Part { what: What::Differs { .. }, .. }) = self.parts.front() {
            return None;
        }
        let part = self.parts.pop_front()?;
        self.passed = self.passed.saturating_sub(1);
        self.known = self.known.saturating_sub(1);
        Some(part)
    }
}
