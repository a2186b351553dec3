//! The pull: what one end asks of the other end's tree, and how that is answered.
//!
//! The asker compares its own tree with a target that the other end has pinned: it asks for nodes
//! ([`WantNodes`]) and descends where hashes differ, then asks for blocks ([`WantBlocks`]). One
//! request has one answer, whole, in the order asked; `number` ties them. A request names what it
//! wants as [`Spans`]: in MessagePack an array of `[gap, count]`, each gap counted from the end
//! of the span before, so they rise and nothing is asked twice. Their sum is bounded, so that an
//! answer fits its frame.
//!
//! The payload of `Nodes` holds one item for each node asked for, that of `Blocks` one for each
//! block; an item is one byte and what belongs to it:
//!
//! | kind | in `Nodes` | in `Blocks` |
//! | --- | --- | --- |
//! | 0 | 128 content hashes of 16 bytes, one a child | 4096 bytes |
//! | 1 | bitmap of 16 bytes (bit `c % 8` of byte `c / 8`: child `c` is no hole), then their hashes | |
//! | 2 | it cannot be read | it cannot be read |
//! | 3 | the CP is not held any more; this item is the whole payload | the same |
//!
//! A hole and a child past the end have the hash zero. Nothing here is believed: hashes are
//! judged by whoever asked, against what the parent promised.

use std::fmt;

use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::limits::{NODE_CHILDREN, PULL_BLOCKS_MAX, PULL_NODES_MAX};
use crate::units::BLOCK_BYTES;
use crate::units::convert::to_u64;
use crate::units::hash::ContentHash;
use crate::units::numbers::{CpNumber, VolumeNumber};

const KIND_WHOLE: u8 = 0;
const KIND_SOME: u8 = 1;
const KIND_UNREADABLE: u8 = 2;
const KIND_GONE: u8 = 3;
const HASH_BYTES: usize = 16;
const BITMAP_BYTES: usize = NODE_CHILDREN / 8;
/// A bitmap pays while fewer children than this are no holes.
const SOME_MAX: usize = NODE_CHILDREN - BITMAP_BYTES / HASH_BYTES;

/// Places side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The first.
    pub first: u64,
    /// How many.
    pub count: u64,
}

/// Rising places, at least 1 and at most `MAX` of them in all.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Spans<const MAX: u64> {
    spans: Vec<Span>,
    total: u64,
}

impl<const MAX: u64> Spans<MAX> {
    /// Nothing yet.
    pub const fn new() -> Self {
        Self { spans: Vec::new(), total: 0 }
    }

    /// Adds a place behind all others.
    pub fn push(&mut self, place: u64) {
        assert!(self.total < MAX, "{} places and one more in a request", self.total);
        match self.spans.last_mut() {
            Some(last) if last.first + last.count == place => last.count += 1,
            last => {
                let end = last.map_or(0, |last| last.first + last.count);
                assert!(place >= end, "place {place} is asked for behind {end}");
                self.spans.push(Span { first: place, count: 1 });
            }
        }
        self.total += 1;
    }

    /// How many places.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Each place, rising.
    pub fn places(&self) -> impl Iterator<Item = u64> + '_ {
        self.spans.iter().flat_map(|span| span.first..span.first + span.count)
    }

    /// Takes a span from outside; both bounds are checked before any arithmetic.
    fn take(&mut self, gap: u64, count: u64) -> Result<(), String> {
        let end = self.spans.last().map_or(0, |last| last.first + last.count);
        if count == 0 {
            return Err(format!("empty span behind {end}"));
        }
        if count > MAX - self.total {
            let total = self.total;
            return Err(format!("{count} places after {total}, at most {MAX} are taken"));
        }
        let first = end.checked_add(gap).filter(|first| first.checked_add(count).is_some());
        let Some(first) = first else {
            return Err(format!("span {gap} behind {end} leaves 64 bits"));
        };
        self.spans.push(Span { first, count });
        self.total += count;
        Ok(())
    }
}

impl<const MAX: u64> Serialize for Spans<MAX> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut end = 0;
        serializer.collect_seq(self.spans.iter().map(|span| {
            let gap = span.first - end;
            end = span.first + span.count;
            (gap, span.count)
        }))
    }
}

impl<'de, const MAX: u64> Deserialize<'de> for Spans<MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs<const MAX: u64>;
        impl<'de, const MAX: u64> Visitor<'de> for Pairs<MAX> {
            type Value = Spans<MAX>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "1 to {MAX} rising places as pairs of gap and count")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut pairs: A) -> Result<Spans<MAX>, A::Error> {
                let announced = to_u64(pairs.size_hint().unwrap_or(0));
                if announced > MAX {
                    return Err(de::Error::custom(format!("{announced} spans, at most {MAX}")));
                }
                let mut spans = Spans::new();
                while let Some((gap, count)) = pairs.next_element()? {
                    spans.take(gap, count).map_err(de::Error::custom)?;
                }
                if spans.total == 0 {
                    return Err(de::Error::custom("nothing is asked for"));
                }
                Ok(spans)
            }
        }
        deserializer.deserialize_seq(Pairs)
    }
}

/// Asks for the children of nodes of one level of the target's tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WantNodes {
    /// The CP that is pulled.
    pub cp: CpNumber,
    /// The volume.
    pub volume: VolumeNumber,
    /// Names the request; rising on a connection.
    pub number: u64,
    /// Level of the nodes: 1 is a node of 128 blocks.
    pub level: u8,
    /// Index of each node in its level: the node covers the blocks from index times 128^level.
    pub nodes: Spans<PULL_NODES_MAX>,
}

/// Asks for blocks of the target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WantBlocks {
    /// The CP that is pulled.
    pub cp: CpNumber,
    /// The volume.
    pub volume: VolumeNumber,
    /// Names the request; rising on a connection.
    pub number: u64,
    /// The blocks, by VBN. Their hashes are known to the asker and need not travel.
    pub blocks: Spans<PULL_BLOCKS_MAX>,
}

/// What is asked for in a pull.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Want {
    /// Children of nodes.
    Nodes(WantNodes),
    /// Blocks.
    Blocks(WantBlocks),
}

impl Want {
    /// The CP that is pulled.
    pub fn cp(&self) -> CpNumber {
        match self {
            Self::Nodes(want) => want.cp,
            Self::Blocks(want) => want.cp,
        }
    }

    /// The volume.
    pub fn volume(&self) -> VolumeNumber {
        match self {
            Self::Nodes(want) => want.volume,
            Self::Blocks(want) => want.volume,
        }
    }
}

/// Answers [`WantNodes`] or [`WantBlocks`], all of it, in the order asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pulled {
    /// From the request.
    pub cp: CpNumber,
    /// From the request.
    pub volume: VolumeNumber,
    /// From the request.
    pub number: u64,
}

/// Content hashes of the children of a node.
pub type ChildHashes = [ContentHash; NODE_CHILDREN];

/// What is said of one node or block that was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item<T> {
    /// What it holds; unproven.
    Content(T),
    /// The other end cannot read it.
    Unreadable,
    /// The other end does not hold that CP any more.
    Gone,
}

/// Why a payload is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AnswerError {
    /// Ends inside an item, or before all that was asked for.
    #[error("answer ends inside the item at byte {0}")]
    Short(u64),
    /// Not an item of that kind of answer.
    #[error("item at byte {at} has kind {kind}, which it cannot have")]
    Kind { at: u64, kind: u8 },
    /// The bitmap announces a child that is a hole.
    #[error("item at byte {at} announces child {child} and has it as a hole")]
    Announced { at: u64, child: usize },
    /// More than was asked for.
    #[error("answer goes on for {0} bytes behind what was asked for")]
    Trailing(u64),
}

/// Packs the items of one answer.
#[derive(Debug, Default)]
pub struct AnswerEncoder {
    bytes: Vec<u8>,
}

impl AnswerEncoder {
    /// The children of the next node.
    pub fn node(&mut self, children: &ChildHashes) {
        let some = children.iter().filter(|child| !child.is_zero()).count();
        if some < SOME_MAX {
            let mut bitmap = [0; BITMAP_BYTES];
            for (child, _) in children.iter().enumerate().filter(|(_, child)| !child.is_zero()) {
                bitmap[child / 8] |= 1 << (child % 8);
            }
            self.bytes.push(KIND_SOME);
            self.bytes.extend_from_slice(&bitmap);
        } else {
            self.bytes.push(KIND_WHOLE);
        }
        for child in children.iter().filter(|child| some >= SOME_MAX || !child.is_zero()) {
            self.bytes.extend_from_slice(&child.0);
        }
    }

    /// The next block.
    pub fn block(&mut self, block: &[u8; BLOCK_BYTES]) {
        self.bytes.push(KIND_WHOLE);
        self.bytes.extend_from_slice(block);
    }

    /// The next node or block cannot be read.
    pub fn unreadable(&mut self) {
        self.bytes.push(KIND_UNREADABLE);
    }

    /// The whole answer when the CP is not held any more.
    pub fn gone() -> Vec<u8> {
        vec![KIND_GONE]
    }

    /// The payload.
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

/// Reads the items of one answer, one for each place that was asked for.
#[derive(Debug)]
pub struct AnswerDecoder<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> AnswerDecoder<'a> {
    /// Reads from the first item on.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// What is said of the next node.
    pub fn node(&mut self) -> Result<Item<ChildHashes>, AnswerError> {
        let start = to_u64(self.at);
        let kind = self.take(start, 1)?[0];
        let mut children = [ContentHash::ZERO; NODE_CHILDREN];
        match kind {
            KIND_WHOLE => {
                for child in &mut children {
                    child.0.copy_from_slice(self.take(start, HASH_BYTES)?);
                }
            }
            KIND_SOME => {
                let bitmap = self.take(start, BITMAP_BYTES)?;
                let announced = |child: &usize| bitmap[child / 8] & 1 << (child % 8) != 0;
                for child in (0..NODE_CHILDREN).filter(announced) {
                    children[child].0.copy_from_slice(self.take(start, HASH_BYTES)?);
                    if children[child].is_zero() {
                        return Err(AnswerError::Announced { at: start, child });
                    }
                }
            }
            other => return Self::without_content(start, other),
        }
        Ok(Item::Content(children))
    }

    /// What is said of the next block.
    pub fn block(&mut self) -> Result<Item<&'a [u8; BLOCK_BYTES]>, AnswerError> {
        let start = to_u64(self.at);
        match self.take(start, 1)?[0] {
            KIND_WHOLE => {
                let rest = &self.bytes[self.at..];
                let block = rest.first_chunk().ok_or(AnswerError::Short(start))?;
                self.at += BLOCK_BYTES;
                Ok(Item::Content(block))
            }
            other => Self::without_content(start, other),
        }
    }

    /// Nothing may follow what was asked for.
    pub fn finish(self) -> Result<(), AnswerError> {
        let left = self.bytes.len() - self.at;
        if left > 0 { Err(AnswerError::Trailing(to_u64(left))) } else { Ok(()) }
    }

    fn without_content<T>(at: u64, kind: u8) -> Result<Item<T>, AnswerError> {
        match kind {
            KIND_UNREADABLE => Ok(Item::Unreadable),
            KIND_GONE if at == 0 => Ok(Item::Gone),
            kind => Err(AnswerError::Kind { at, kind }),
        }
    }

    fn take(&mut self, start: u64, bytes: usize) -> Result<&'a [u8], AnswerError> {
        let left = &self.bytes[self.at..];
        let taken = left.get(..bytes).ok_or(AnswerError::Short(start))?;
        self.at += bytes;
        Ok(taken)
    }
}

/// Bytes an answer about so many nodes has at most.
pub const fn nodes_bytes_max(nodes: u64) -> u64 {
    nodes * (1 + to_u64(NODE_CHILDREN * HASH_BYTES))
}

/// Bytes an answer about so many blocks has at most.
pub const fn blocks_bytes_max(blocks: u64) -> u64 {
    blocks * (1 + to_u64(BLOCK_BYTES))
}

const _: () = {
    use crate::limits::{CP_BYTES_BEFORE_TRANSFER_MAX, CP_FRAME_BYTES_MAX};
    /// Prefix and header of an answer.
    const HEAD_BYTES_MAX: u64 = 64;
    assert!(nodes_bytes_max(PULL_NODES_MAX) + HEAD_BYTES_MAX <= CP_FRAME_BYTES_MAX);
    assert!(blocks_bytes_max(PULL_BLOCKS_MAX) + HEAD_BYTES_MAX <= CP_FRAME_BYTES_MAX);
    assert!(nodes_bytes_max(PULL_NODES_MAX) + HEAD_BYTES_MAX <= CP_BYTES_BEFORE_TRANSFER_MAX);
    assert!(blocks_bytes_max(PULL_BLOCKS_MAX) + HEAD_BYTES_MAX <= CP_BYTES_BEFORE_TRANSFER_MAX);
};

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hash(byte: u8) -> ContentHash {
        ContentHash([byte; 16])
    }

    fn spans<const MAX: u64>(places: &[u64]) -> Spans<MAX> {
        let mut spans = Spans::new();
        places.iter().for_each(|&place| spans.push(place));
        spans
    }

    type Few = Spans<5>;

    fn read(pairs: &[(u64, u64)]) -> Result<Few, String> {
        let bytes = rmp_serde::to_vec(pairs).unwrap();
        rmp_serde::from_slice(&bytes).map_err(|error| error.to_string())
    }

    #[test]
    fn golden_request() {
        let want = WantNodes {
            cp: CpNumber(7),
            volume: VolumeNumber(1),
            number: 3,
            level: 2,
            nodes: spans(&[0, 5, 6, 300]),
        };
        let bytes = rmp_serde::to_vec(&want).unwrap();
        let wanted = [
            0x95, 7, 1, 3, 2, 0x93, // five fields, three spans
            0x92, 0, 1, 0x92, 4, 2, 0x92, 0xcd, 1, 37, 1,
        ];
        assert_eq!(bytes, wanted);
        assert_eq!(rmp_serde::from_slice::<WantNodes>(&bytes).unwrap(), want);
        assert_eq!(want.nodes.places().collect::<Vec<_>>(), [0, 5, 6, 300]);
        assert_eq!(want.nodes.total(), 4);
    }

    #[test]
    fn golden_answers() {
        let mut children = [ContentHash::ZERO; NODE_CHILDREN];
        (children[1], children[127]) = (hash(0xaa), hash(0xbb));
        let mut encoder = AnswerEncoder::default();
        encoder.node(&children);
        encoder.unreadable();
        let bytes = encoder.finish();
        let mut wanted = vec![1, 2];
        wanted.extend([0; 14]);
        wanted.push(0x80);
        wanted.extend([0xaa; 16]);
        wanted.extend([0xbb; 16]);
        wanted.push(2);
        assert_eq!(bytes, wanted);
        let mut decoder = AnswerDecoder::new(&bytes);
        assert_eq!(decoder.node(), Ok(Item::Content(children)));
        assert_eq!(decoder.node(), Ok(Item::Unreadable));
        assert_eq!(decoder.finish(), Ok(()));

        let mut encoder = AnswerEncoder::default();
        encoder.block(&[7; BLOCK_BYTES]);
        let bytes = encoder.finish();
        assert_eq!(bytes, [&[0][..], &[7; BLOCK_BYTES]].concat());
        assert_eq!(AnswerDecoder::new(&bytes).block(), Ok(Item::Content(&[7; BLOCK_BYTES])));
        assert_eq!(AnswerEncoder::gone(), [3]);
        assert_eq!(AnswerDecoder::new(&[3]).node(), Ok(Item::Gone));
        assert_eq!(AnswerDecoder::new(&[3]).block(), Ok(Item::Gone));
    }

    /// The coarser code is taken only where it is the smaller one.
    #[test]
    fn a_node_costs_what_it_holds() {
        for (some, wanted) in [(0, 17), (1, 33), (126, 2033), (127, 2049), (128, 2049)] {
            let mut children = [ContentHash::ZERO; NODE_CHILDREN];
            children[..some].fill(hash(1));
            let mut encoder = AnswerEncoder::default();
            encoder.node(&children);
            let bytes = encoder.finish();
            assert_eq!(bytes.len(), wanted, "{some} children");
            assert!(to_u64(bytes.len()) <= nodes_bytes_max(1));
            assert_eq!(AnswerDecoder::new(&bytes).node(), Ok(Item::Content(children)));
        }
    }

    #[test]
    fn each_bad_request_is_refused() {
        assert_eq!(read(&[(3, 2), (0, 1), (9, 2)]).unwrap().total(), 5);
        assert_eq!(read(&[(3, 2), (0, 1)]).unwrap().places().collect::<Vec<_>>(), [3, 4, 5]);
        assert!(read(&[]).unwrap_err().contains("nothing is asked for"));
        assert!(read(&[(1, 0)]).unwrap_err().contains("empty span"));
        assert!(read(&[(1, 6)]).unwrap_err().contains("at most 5"));
        assert!(read(&[(1, 3), (1, 3)]).unwrap_err().contains("3 places after 3"));
        assert!(read(&[(0, 1); 6]).unwrap_err().contains("6 spans"));
        assert!(read(&[(0, u64::MAX)]).is_err());
        assert!(read(&[(u64::MAX, 1)]).unwrap_err().contains("64 bits"));
        assert!(read(&[(5, 1), (u64::MAX - 5, 1)]).unwrap_err().contains("64 bits"));
        // An array that announces 2^32 - 1 spans and has none: refused before anything is made.
        let announced = [0xdd, 0xff, 0xff, 0xff, 0xff];
        let met = rmp_serde::from_slice::<Few>(&announced).unwrap_err().to_string();
        assert!(met.contains("4294967295 spans"), "{met}");
    }

    #[test]
    fn each_bad_answer_is_named() {
        let node = |bytes: &[u8]| AnswerDecoder::new(bytes).node();
        let block = |bytes: &[u8]| AnswerDecoder::new(bytes).block().map(|_| ());
        assert_eq!(node(&[]), Err(AnswerError::Short(0)));
        assert_eq!(node(&[0; 2048]), Err(AnswerError::Short(0)));
        assert_eq!(node(&[1; 16]), Err(AnswerError::Short(0)));
        assert_eq!(node(&[4]), Err(AnswerError::Kind { at: 0, kind: 4 }));
        let zero = [&[1, 1][..], &[0; 31]].concat();
        assert_eq!(node(&zero), Err(AnswerError::Announced { at: 0, child: 0 }));
        assert_eq!(block(&[0; 4096]), Err(AnswerError::Short(0)));
        assert_eq!(block(&[1]), Err(AnswerError::Kind { at: 0, kind: 1 }));
        // Gone says all that there is to say.
        let mut decoder = AnswerDecoder::new(&[2, 3]);
        assert_eq!(decoder.block(), Ok(Item::Unreadable));
        assert_eq!(decoder.block(), Err(AnswerError::Kind { at: 1, kind: 3 }));
        assert_eq!(AnswerDecoder::new(&[2, 3]).finish(), Err(AnswerError::Trailing(2)));
    }

    proptest! {
        #[test]
        fn requests_survive(gaps in prop::collection::vec(0..1_u64 << 40, 1..62)) {
            let mut next = 0;
            let places: Vec<u64> = gaps.iter().map(|gap| {
                let place = next + gap;
                next = place + 1;
                place
            }).collect();
            let wanted: Spans<PULL_NODES_MAX> = spans(&places);
            let bytes = rmp_serde::to_vec(&wanted).unwrap();
            let read: Spans<PULL_NODES_MAX> = rmp_serde::from_slice(&bytes).unwrap();
            prop_assert!(read.places().eq(places.iter().copied()));
            prop_assert_eq!(read, wanted);
        }

        /// Whatever bytes come, there is an answer or an error, and no cut passes for the whole.
        #[test]
        fn no_bytes_are_too_absurd(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut nodes = AnswerDecoder::new(&bytes);
            while nodes.node().is_ok() {}
            let mut blocks = AnswerDecoder::new(&bytes);
            while blocks.block().is_ok() {}
        }
    }
}
