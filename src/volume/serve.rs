//! Answers a pull from a pinned CP.
//!
//! One request, one answer of one frame; work and memory are bounded by the bounds on a request
//! and the height of the tree. Everything is verified as it is read, data also against its
//! content hash: what cannot be read is said to be unreadable, by its place in the answer, and
//! told to the caller; wrong data is never sent. If the pin ended meanwhile, the answer is that
//! the CP is gone, whatever was read.

use std::borrow::Borrow;

use bytes::Bytes;

use crate::limits::NODE_CHILDREN;
use crate::pool::error::PoolError;
use crate::pool::pointer::{Pointer, TreeRoot};
use crate::pool::{Pin, Pool};
use crate::units::BLOCK_BYTES;
use crate::units::hash::ContentHash;
use crate::units::numbers::{CpNumber, VolumeNumber};
use crate::wire::message::{Frame, Message, PlaceContent, WantPlace};
use crate::wire::pull::{AnswerEncoder, ChildHashes, Pulled, WantBlocks, WantNodes};

use super::error::{TreePlace, VolumeError};
use super::geometry::Geometry;
use super::node::Node;
use super::root::leaf_hash;

/// Why a request is refused; the connection it came on is closed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ServeError {
    /// A node or block that the volume does not have.
    #[error("{place} is asked for, the volume has {blocks} blocks and {height} levels")]
    OutOfRange { place: TreePlace, blocks: u64, height: u8 },
    /// The caller pinned something else.
    #[error("volume {volume} of CP {cp} is asked for, pinned is {pinned_volume} of {pinned_cp}")]
    OtherTarget {
        volume: VolumeNumber,
        cp: CpNumber,
        pinned_volume: VolumeNumber,
        pinned_cp: CpNumber,
    },
    /// What is pinned has no shape.
    #[error(transparent)]
    Volume(#[from] VolumeError),
}

/// Something that could not be read.
#[derive(Debug, Clone)]
pub struct Problem {
    /// Node or block (level 0).
    pub place: TreePlace,
    /// Why.
    pub error: VolumeError,
}

/// An answer, and what it had to leave out.
#[derive(Debug)]
pub struct Served {
    /// To be sent.
    pub frame: Frame,
    /// What is unreadable here: for the log, the counters and the repair.
    pub problems: Vec<Problem>,
}

/// The answer to a request for a CP that is not held here any more.
pub fn gone_nodes(want: &WantNodes) -> Frame {
    let WantNodes { cp, volume, number, .. } = *want;
    Frame::new(&Message::Nodes(Pulled { cp, volume, number }), AnswerEncoder::gone().into())
}

/// The same for blocks.
pub fn gone_blocks(want: &WantBlocks) -> Frame {
    let WantBlocks { cp, volume, number, .. } = *want;
    Frame::new(&Message::Blocks(Pulled { cp, volume, number }), AnswerEncoder::gone().into())
}

/// Answers a request for nodes.
///
/// # Errors
/// The request names what cannot be there; nothing was read.
pub fn nodes(pin: &Pin, want: &WantNodes) -> Result<Served, ServeError> {
    let WantNodes { cp, volume, number, level, ref nodes } = *want;
    let geometry = check_target(pin, cp, volume)?;
    for index in nodes.places() {
        check_place(&geometry, TreePlace { volume, level, index }, 1)?;
    }
    let (pool, tree) = (pin.pool(), pin.tree());
    let mut answer = AnswerEncoder::default();
    let mut problems = Vec::new();
    for index in nodes.places() {
        match children(pool, &tree, &geometry, level, index) {
            Ok(children) => answer.node(&children),
            Err(error) => {
                answer.unreadable();
                problems.push(Problem { place: TreePlace { volume, level, index }, error });
            }
        }
    }
    if pin.check().is_err() {
        return Ok(Served { frame: gone_nodes(want), problems: Vec::new() });
    }
    let message = Message::Nodes(Pulled { cp, volume, number });
    Ok(Served { frame: Frame::new(&message, Bytes::from(answer.finish())), problems })
}

/// Answers a request for blocks.
///
/// # Errors
/// The request names what cannot be there; nothing was read.
pub fn blocks(pin: &Pin, want: &WantBlocks) -> Result<Served, ServeError> {
    let WantBlocks { cp, volume, number, ref blocks } = *want;
    let geometry = check_target(pin, cp, volume)?;
    for index in blocks.places() {
        check_place(&geometry, TreePlace { volume, level: 0, index }, 0)?;
    }
    let (pool, tree) = (pin.pool(), pin.tree());
    let mut reader = BlockReader { pool, run: Vec::new(), answer: AnswerEncoder::default() };
    let mut problems = Vec::new();
    for index in blocks.places() {
        let place = TreePlace { volume, level: 0, index };
        let pointer = find(pool, &tree, &geometry, 0, index);
        reader.push(place, pointer, &mut problems);
    }
    reader.read_run(&mut problems);
    if pin.check().is_err() {
        return Ok(Served { frame: gone_blocks(want), problems: Vec::new() });
    }
    let message = Message::Blocks(Pulled { cp, volume, number });
    Ok(Served { frame: Frame::new(&message, Bytes::from(reader.answer.finish())), problems })
}

/// Answers what the other end asks, from the first of these trees that has it. Blocks.
pub fn answer(pins: impl IntoIterator<Item = impl Borrow<Pin>>, want: &WantPlace) -> Frame {
    let found = pins.into_iter().find_map(|pin| {
        let pin = pin.borrow();
        place(pin.pool(), &pin.tree(), want).filter(|_| pin.check().is_ok())
    });
    let payload = Bytes::from(found.unwrap_or_else(no_place));
    Frame::new(&Message::PlaceContent(PlaceContent { token: want.token }), payload)
}

/// What a tree holds in a place, if that has the content asked for: one item, as in an answer of
/// `Blocks` or `Nodes`. `None` if it has another content there, or cannot be read.
pub fn place(pool: &Pool, tree: &TreeRoot, want: &WantPlace) -> Option<Vec<u8>> {
    let WantPlace { volume, level, index, hash, .. } = *want;
    let geometry = Geometry::of(tree.size).ok()?;
    check_place(&geometry, TreePlace { volume, level, index }, 0).ok()?;
    let pointer = find(pool, tree, &geometry, level, index).ok()?;
    if pointer.hash != hash || pointer.is_hole() {
        return None;
    }
    let mut answer = AnswerEncoder::default();
    if level > 0 {
        answer.node(&children(pool, tree, &geometry, level, index).ok()?);
    } else {
        let mut block = [0; BLOCK_BYTES];
        pool.read_block(pointer.pbn, pointer.crc, &mut block).ok()?;
        check_content(&pointer, &block).ok()?;
        answer.block(&block);
    }
    Some(answer.finish())
}

/// The item that says that a place cannot be had.
fn no_place() -> Vec<u8> {
    let mut answer = AnswerEncoder::default();
    answer.unreadable();
    answer.finish()
}

fn check_target(pin: &Pin, cp: CpNumber, volume: VolumeNumber) -> Result<Geometry, ServeError> {
    let (pinned_volume, pinned_cp) = (pin.key().volume, pin.cp());
    if (volume, cp) != (pinned_volume, pinned_cp) {
        return Err(ServeError::OtherTarget { volume, cp, pinned_volume, pinned_cp });
    }
    Ok(Geometry::of(pin.tree().size)?)
}

/// Both bounds before any arithmetic.
fn check_place(geometry: &Geometry, place: TreePlace, lowest: u8) -> Result<(), ServeError> {
    let Geometry { blocks, height } = *geometry;
    let TreePlace { level, index, .. } = place;
    let is_top = level == height && index == 0;
    let is_below =
        (lowest..=height).contains(&level) && index < blocks.div_ceil(Geometry::span(level));
    if is_top || is_below { Ok(()) } else { Err(ServeError::OutOfRange { place, blocks, height }) }
}

/// The pointer to a node or block; a hole if it lies in one.
fn find(
    pool: &Pool,
    tree: &TreeRoot,
    geometry: &Geometry,
    level: u8,
    index: u64,
) -> Result<Pointer, VolumeError> {
    let vbn = index * Geometry::span(level);
    let mut pointer = tree.top;
    for above in (level + 1..=geometry.height).rev() {
        if pointer.is_hole() {
            break;
        }
        let first = vbn - vbn % Geometry::span(above);
        pointer = Node::read(pool, &pointer)?.child(Geometry::slot(above, first, vbn))?;
    }
    Ok(pointer)
}

fn children(
    pool: &Pool,
    tree: &TreeRoot,
    geometry: &Geometry,
    level: u8,
    index: u64,
) -> Result<ChildHashes, VolumeError> {
    let mut hashes = [ContentHash::ZERO; NODE_CHILDREN];
    let pointer = find(pool, tree, geometry, level, index)?;
    if !pointer.is_hole() {
        let children = Node::read(pool, &pointer)?.children()?;
        for (hash, child) in hashes.iter_mut().zip(children.0.iter()) {
            *hash = child.hash;
        }
    }
    Ok(hashes)
}

/// Blocks side by side in the pool are read in one piece; each is verified on its own.
struct BlockReader<'a> {
    pool: &'a Pool,
    run: Vec<(TreePlace, Pointer)>,
    answer: AnswerEncoder,
}

impl BlockReader<'_> {
    fn push(
        &mut self,
        place: TreePlace,
        pointer: Result<Pointer, VolumeError>,
        problems: &mut Vec<Problem>,
    ) {
        let follows = |pointer: &Pointer| {
            self.run.last().is_none_or(|(_, last)| last.pbn.0 + 1 == pointer.pbn.0)
        };
        match pointer {
            Ok(pointer) if !pointer.is_hole() => {
                if !follows(&pointer) {
                    self.read_run(problems);
                }
                self.run.push((place, pointer));
            }
            Ok(_) => {
                self.read_run(problems);
                self.answer.block(&[0; BLOCK_BYTES]);
            }
            Err(error) => {
                self.read_run(problems);
                self.answer.unreadable();
                problems.push(Problem { place, error });
            }
        }
    }

    fn read_run(&mut self, problems: &mut Vec<Problem>) {
        let Some((_, first)) = self.run.first() else { return };
        let crcs: Vec<u32> = self.run.iter().map(|(_, pointer)| pointer.crc).collect();
        let mut bytes = vec![0; crcs.len() * BLOCK_BYTES];
        let is_whole = self.pool.read_run(first.pbn, &crcs, &mut bytes).is_ok();
        let (blocks, _) = bytes.as_chunks_mut::<BLOCK_BYTES>();
        for ((place, pointer), block) in self.run.drain(..).zip(blocks) {
            // One bad block of a run must not hide the others.
            let read = if is_whole {
                Ok(())
            } else {
                self.pool.read_block(pointer.pbn, pointer.crc, block)
            };
            match read.and_then(|()| check_content(&pointer, block)) {
                Ok(()) => self.answer.block(block),
                Err(error) => {
                    self.answer.unreadable();
                    problems.push(Problem { place, error: error.into() });
                }
            }
        }
    }
}

fn check_content(pointer: &Pointer, block: &[u8; BLOCK_BYTES]) -> Result<(), PoolError> {
    let (pbn, wanted, met) = (pointer.pbn, pointer.hash, leaf_hash(block));
    if wanted == met { Ok(()) } else { Err(PoolError::CorruptContent { pbn, wanted, met }) }
}
