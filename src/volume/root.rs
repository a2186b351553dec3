//! The content hash: what names a block, a node, a volume.
//!
//! ```text
//! leaf(block)      = 16 zero bytes if the block is all zero, else BLAKE3(block)[0..16]
//! node(c0..c127)   = 16 zero bytes if all children are zero, else BLAKE3(c0 || ... || c127)[0..16]
//! root             = BLAKE3("mirrorhub root v1" || size in bytes, u64 LE || top node hash)
//! ```
//!
//! Pure; anyone can compute it from a raw image ([`hash_reader`], `mirrorhub hash`). Content
//! only: neither place nor birth.

use std::io::{ErrorKind, Read};

use crate::limits::NODE_CHILDREN;
use crate::pool::pointer::{POINTER_BYTES, root_of};
use crate::units::convert::{to_u64, to_usize};
use crate::units::hash::{ContentHash, Root};
use crate::units::numbers::ByteCount;
use crate::units::{BLOCK_BYTES, BLOCK_BYTES_U64};

use super::error::HashError;
use super::geometry::Geometry;

const ZEROES: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];
/// Bytes of an image read at once.
const READ_BYTES: u64 = 256 * 1024;

/// Whether a block is a hole.
pub fn is_zero(block: &[u8; BLOCK_BYTES]) -> bool {
    *block == ZEROES
}

fn first_half(hash: blake3::Hash) -> ContentHash {
    let mut half = [0; 16];
    half.copy_from_slice(&hash.as_bytes()[..16]);
    ContentHash(half)
}

/// The content hash of a data block.
pub fn leaf_hash(block: &[u8; BLOCK_BYTES]) -> ContentHash {
    if is_zero(block) { ContentHash::ZERO } else { first_half(blake3::hash(block)) }
}

/// The content hash of a node from those of its children; missing ones are zero.
pub fn node_hash(children: &[ContentHash]) -> ContentHash {
    assert!(children.len() <= NODE_CHILDREN);
    let mut bytes = [0; NODE_CHILDREN * 16];
    for (place, child) in bytes.chunks_exact_mut(16).zip(children) {
        place.copy_from_slice(&child.0);
    }
    hash_children(&bytes)
}

/// The content hash of a node from its 4096 bytes.
pub fn node_block_hash(node: &[u8; BLOCK_BYTES]) -> ContentHash {
    let mut bytes = [0; NODE_CHILDREN * 16];
    for (place, pointer) in bytes.chunks_exact_mut(16).zip(node.chunks_exact(POINTER_BYTES)) {
        place.copy_from_slice(&pointer[16..]);
    }
    hash_children(&bytes)
}

fn hash_children(bytes: &[u8; NODE_CHILDREN * 16]) -> ContentHash {
    if bytes.iter().all(|&byte| byte == 0) {
        ContentHash::ZERO
    } else {
        first_half(blake3::hash(bytes))
    }
}

/// The root of a volume of that size whose top node has that hash.
pub fn root(size: ByteCount, top: ContentHash) -> Root {
    root_of(size, top)
}

/// Hashes a volume block by block, from the first to the last, in memory by height.
#[derive(Debug)]
pub struct RootHasher {
    size: ByteCount,
    left: u64,
    /// For each level from 1 up, the hashes of the children seen of its open node.
    levels: Vec<Vec<ContentHash>>,
}

impl RootHasher {
    /// For a volume of that size, which must be one that a volume can have.
    pub fn new(size: ByteCount) -> Result<Self, HashError> {
        let shape = Geometry::of(size).map_err(|_| HashError::Size { size })?;
        Ok(Self { size, left: shape.blocks, levels: vec![Vec::new(); shape.height.into()] })
    }

    /// The hash of the next block.
    pub fn push(&mut self, leaf: ContentHash) {
        assert!(self.left > 0, "more blocks than the volume has");
        self.left -= 1;
        self.push_at(0, leaf);
    }

    /// So many blocks that are all zero. Takes time by the height of the tree: whole subtrees of
    /// zeroes are entered as such.
    pub fn push_holes(&mut self, count: u64) {
        assert!(count <= self.left, "more blocks than the volume has");
        self.left -= count;
        let mut left = count;
        while left > 0 {
            // A subtree begins here if no node below its own is open.
            let (mut level, mut span) = (0, 1);
            while level + 1 < self.levels.len() && self.levels[level].is_empty() {
                let wider = span * to_u64(NODE_CHILDREN);
                if wider > left {
                    break;
                }
                (level, span) = (level + 1, wider);
            }
            self.push_at(level, ContentHash::ZERO);
            left -= span;
        }
    }

    fn push_at(&mut self, level: usize, hash: ContentHash) {
        let top = level + 1 == self.levels.len();
        self.levels[level].push(hash);
        if self.levels[level].len() == NODE_CHILDREN && !top {
            let node = node_hash(&self.levels[level]);
            self.levels[level].clear();
            self.push_at(level + 1, node);
        }
    }

    /// The root, when all blocks were pushed.
    pub fn finish(mut self) -> Root {
        assert!(self.left == 0, "{} blocks of the volume are missing", self.left);
        for level in 0..self.levels.len() - 1 {
            if !self.levels[level].is_empty() {
                let node = node_hash(&self.levels[level]);
                self.push_at(level + 1, node);
            }
        }
        let top = self.levels.last().map_or(ContentHash::ZERO, |top| node_hash(top));
        root(self.size, top)
    }
}

/// The root of a raw image of `size` bytes. An image that ends early or goes on behind that is
/// an error: nothing is skipped, nothing is made up.
pub fn hash_reader(mut image: impl Read, size: ByteCount) -> Result<Root, HashError> {
    let mut hasher = RootHasher::new(size)?;
    let mut buffer = vec![0; to_usize(READ_BYTES.min(size.0).max(BLOCK_BYTES_U64))];
    let mut offset = 0;
    while offset < size.0 {
        let wanted = to_usize((size.0 - offset).min(to_u64(buffer.len())));
        let part = &mut buffer[..wanted];
        let met = fill(&mut image, part).map_err(|error| HashError::Io { offset, error })?;
        if met < wanted {
            return Err(HashError::Short { wanted: size.0, met: offset + to_u64(met) });
        }
        let (blocks, _) = part.as_chunks::<BLOCK_BYTES>();
        blocks.iter().for_each(|block| hasher.push(leaf_hash(block)));
        offset += to_u64(wanted);
    }
    let behind = fill(&mut image, &mut [0]).map_err(|error| HashError::Io { offset, error })?;
    if behind > 0 {
        return Err(HashError::Long { wanted: size.0 });
    }
    Ok(hasher.finish())
}

/// Fills the buffer as far as the image goes.
fn fill(image: &mut impl Read, mut buffer: &mut [u8]) -> std::io::Result<usize> {
    let wanted = buffer.len();
    while !buffer.is_empty() {
        match image.read(buffer) {
            Ok(0) => break,
            Ok(count) => buffer = &mut buffer[count..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(wanted - buffer.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::testing::{Chance, random_block};
    use crate::volume::testing::slow_root;

    type Filled = fn(u64) -> bool;

    fn image(blocks: u64, filled: impl Fn(u64) -> bool) -> Vec<u8> {
        let mut chance = Chance::new(blocks);
        let block = |vbn| if filled(vbn) { random_block(&mut chance) } else { ZEROES };
        (0..blocks).flat_map(block).collect()
    }

    /// Goal: the streamed root is the formula's, at every height and with every kind of rest.
    /// Method: an implementation straight from the formula, over the whole image in memory.
    #[test]
    fn the_streamed_root_is_the_formulas() {
        let sizes = [1, 2, 127, 128, 129, 300, 16_384, 16_385, 16_384 * 2 + 77];
        for blocks in sizes {
            let kinds: [(&str, Filled); 4] = [
                ("all", |_| true),
                ("none", |_| false),
                ("few", |vbn| vbn % 97 == 5),
                ("late", |vbn| vbn > 16_000),
            ];
            for (kind, filled) in kinds {
                if blocks > 1000 && kind == "all" {
                    continue;
                }
                let image = image(blocks, filled);
                let size = ByteCount(to_u64(image.len()));
                let met = hash_reader(&*image, size).unwrap();
                assert_eq!(met, slow_root(&image), "{blocks} blocks, {kind}");
            }
        }
    }

    /// Goal: holes entered by the run give the root that they give one by one. Method: runs of
    /// random lengths, long and short, of holes and of data, at four heights. Control: one block
    /// elsewhere gives another root.
    #[test]
    fn runs_of_holes_hash_like_their_blocks() {
        let mut chance = Chance::new(12);
        for blocks in [1, 127, 129, 16_385, 128 * 128 * 3 + 5, 128 * 128 * 130] {
            let size = ByteCount(blocks * BLOCK_BYTES_U64);
            let mut hashers = [(); 3].map(|()| RootHasher::new(size).unwrap());
            let [one, run, other] = &mut hashers;
            let (mut left, mut first) = (blocks, true);
            while left > 0 {
                let bound = [3, 200, 20_000, 400_000][to_usize(chance.below(4))];
                let holes = chance.below(bound).min(left);
                (0..holes).for_each(|_| one.push(ContentHash::ZERO));
                run.push_holes(holes);
                other.push_holes(holes);
                left -= holes;
                if left > 0 {
                    left -= 1;
                    let hash = ContentHash([1; 16]);
                    one.push(hash);
                    run.push(hash);
                    other.push(if first { ContentHash([2; 16]) } else { hash });
                    first = false;
                }
            }
            let [one, run, other] = hashers.map(RootHasher::finish);
            assert_eq!(one, run, "{blocks} blocks");
            assert_eq!(one == other, first, "{blocks} blocks, another one");
        }
    }

    /// The largest volume is hashed at once, and none is larger.
    #[test]
    fn the_largest_volume_is_a_few_steps() {
        use crate::limits::VOLUME_BYTES_MAX;
        let size = ByteCount(VOLUME_BYTES_MAX);
        let mut hasher = RootHasher::new(size).unwrap();
        hasher.push_holes(size.blocks().0 - 1);
        hasher.push(ContentHash::ZERO);
        assert_eq!(hasher.finish(), root(size, ContentHash::ZERO));
        let over = ByteCount(VOLUME_BYTES_MAX + BLOCK_BYTES_U64);
        assert!(matches!(RootHasher::new(over), Err(HashError::Size { .. })));
    }

    /// Pinned forever: a change of the formula would make all peers disagree. The values were
    /// computed with the Python package `blake3` from the formula.
    #[test]
    fn golden_roots() {
        let hash = |image: &[u8]| hash_reader(image, ByteCount(to_u64(image.len()))).unwrap();
        assert_eq!(hash(&[]).to_string(), GOLDEN_EMPTY);
        assert_eq!(hash(&ZEROES).to_string(), GOLDEN_ZERO);
        assert_eq!(hash(&[1; BLOCK_BYTES]).to_string(), GOLDEN_ONE);
        assert_eq!(hash(&vec![1; 129 * BLOCK_BYTES]).to_string(), GOLDEN_129);
    }
    const GOLDEN_EMPTY: &str = "59b365332cf91f95dc9e0bb1ad98394930ab237f0ff194d61c1b0dadd6f345a2";
    const GOLDEN_ZERO: &str = "608e8292a2b745489fd1b5fcfc8efc39d10402e206b276a7d01d9143c5c8ea49";
    const GOLDEN_ONE: &str = "79d0052c3f4bfd3576b6d8fc08273d964177cc6c4734629690d8f39fc1f56271";
    const GOLDEN_129: &str = "672ed45c3ffcfff333b4d0947ea1bb7c2b949fdeef06f27585ddb22ecd8fef98";

    #[test]
    fn a_wrong_size_is_an_error_and_never_a_hash() {
        let image = vec![1; 3 * BLOCK_BYTES];
        let hash = |size| hash_reader(&*image, ByteCount(size));
        assert!(matches!(hash(4097), Err(HashError::Size { .. })));
        assert!(matches!(hash(4 * 4096), Err(HashError::Short { met: 12_288, .. })));
        assert!(matches!(hash(2 * 4096), Err(HashError::Long { .. })));
        assert!(hash(3 * 4096).is_ok());
    }

    #[test]
    fn a_node_hashes_alike_from_its_children_and_from_its_bytes() {
        use crate::pool::pointer::Pointer;
        use crate::units::numbers::{CpNumber, Pbn};
        let hash = |n: u8| ContentHash([n; 16]);
        let mut block = [0; BLOCK_BYTES];
        let pointer = Pointer { pbn: Pbn(9), birth: CpNumber(3), crc: 7, hash: hash(5) };
        block[32..64].copy_from_slice(&pointer.encode());
        block[64..96].copy_from_slice(&Pointer::hole(CpNumber(8)).encode());
        assert_eq!(node_block_hash(&block), node_hash(&[hash(0), hash(5)]));
        assert!(node_hash(&[hash(0); 128]).is_zero());
        block[32..64].copy_from_slice(&Pointer::hole(CpNumber(8)).encode());
        assert!(node_block_hash(&block).is_zero(), "births are no content");
    }
}
