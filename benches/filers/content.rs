//! What simulated sources write, and what their volumes come to.
//!
//! Blocks come from a small stock whose checksums and hashes are known, so that a write costs the
//! bench little. A volume is its hashes only: the root of a CP follows from them.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use mirrorhub::limits::{CP_FRAME_BYTES_MAX, NODE_CHILDREN};
use mirrorhub::record::entry::{Entry, EntryKind};
use mirrorhub::units::BLOCK_BYTES;
use mirrorhub::units::convert::{low_u32, to_u64, to_usize};
use mirrorhub::units::hash::{ContentHash, Root, crc32c};
use mirrorhub::units::numbers::{ByteCount, TransferId, Vbn, VolumeNumber};
use mirrorhub::volume::root::{leaf_hash, node_hash, root};
use mirrorhub::wire::updates::Encoder;

use super::scattered;

/// Blocks of the stock, one behind the other.
const STOCK_BLOCKS: usize = 128;
/// The longest write.
pub const BLOCKS_MAX: u64 = 64;

/// The stock.
#[derive(Debug)]
pub struct Payloads {
    data: Bytes,
    leaves: Vec<ContentHash>,
    /// Checksums of one block, and of [`BLOCKS_MAX`] from there.
    checksums: Vec<(u32, u32)>,
}

impl Payloads {
    /// Makes it.
    pub fn new() -> Self {
        let words = to_u64(STOCK_BLOCKS * BLOCK_BYTES / 8);
        let data: Vec<u8> = (0..words).flat_map(|at| scattered(at + 1).to_le_bytes()).collect();
        let blocks = data.as_chunks::<BLOCK_BYTES>().0;
        let leaves = blocks.iter().map(leaf_hash).collect();
        let checksums = (0..=STOCK_BLOCKS - to_usize(BLOCKS_MAX)).map(|first| {
            let from = |count: usize| &data[first * BLOCK_BYTES..(first + count) * BLOCK_BYTES];
            (crc32c(from(1)), crc32c(from(to_usize(BLOCKS_MAX))))
        });
        let checksums = checksums.collect();
        Self { data: data.into(), leaves, checksums }
    }

    /// A write of `blocks` at `vbn`, one or [`BLOCKS_MAX`], and the hashes of its blocks.
    pub fn entry(&self, chance: u64, vbn: u64, blocks: u64) -> (Entry, Bytes, &[ContentHash]) {
        assert!(blocks == 1 || blocks == BLOCKS_MAX, "a write of {blocks} blocks");
        let first = to_usize(chance % to_u64(self.checksums.len()));
        let count = to_usize(blocks);
        let bytes = count * BLOCK_BYTES;
        let data = self.data.slice(first * BLOCK_BYTES..first * BLOCK_BYTES + bytes);
        let (one, many) = self.checksums[first];
        let entry = Entry {
            kind: EntryKind::Write,
            volume: VolumeNumber(0),
            offset: Vbn(vbn).byte_offset(),
            length: low_u32(to_u64(bytes)),
            crc: if blocks == 1 { one } else { many },
        };
        (entry, data, &self.leaves[first..first + count])
    }
}

/// The hashes of a volume of two levels.
#[derive(Debug)]
pub struct Volume {
    leaves: Vec<ContentHash>,
    nodes: Vec<ContentHash>,
    changed: BTreeSet<usize>,
    /// Blocks changed since the last CP, and where the hub has each.
    dirty: BTreeMap<u64, (TransferId, u64)>,
}

impl Volume {
    /// An empty one.
    pub fn new(blocks: u64) -> Self {
        let count = to_usize(blocks);
        let two = count > NODE_CHILDREN && count <= NODE_CHILDREN * NODE_CHILDREN;
        assert!(two, "a volume of {blocks} blocks has not two levels");
        let leaves = vec![ContentHash::ZERO; count];
        let nodes = vec![ContentHash::ZERO; count.div_ceil(NODE_CHILDREN)];
        Self { leaves, nodes, changed: BTreeSet::new(), dirty: BTreeMap::new() }
    }

    /// Its size.
    pub fn size(&self) -> ByteCount {
        ByteCount(to_u64(self.leaves.len() * BLOCK_BYTES))
    }

    /// Blocks at `vbn` are those of the transfer from its `ordinal` on.
    pub fn put(&mut self, vbn: u64, leaves: &[ContentHash], transfer: TransferId, ordinal: u64) {
        let first = to_usize(vbn);
        self.leaves[first..first + leaves.len()].copy_from_slice(leaves);
        for at in 0..leaves.len() {
            self.changed.insert((first + at) / NODE_CHILDREN);
            self.dirty.insert(vbn + to_u64(at), (transfer, ordinal + to_u64(at)));
        }
    }

    /// Whether a CP would say nothing.
    pub fn is_clean(&self) -> bool {
        self.dirty.is_empty()
    }

    /// Cuts a CP: what changed, by reference, and the root.
    pub fn freeze(&mut self) -> (Bytes, Root) {
        for node in std::mem::take(&mut self.changed) {
            let first = node * NODE_CHILDREN;
            let end = (first + NODE_CHILDREN).min(self.leaves.len());
            self.nodes[node] = node_hash(&self.leaves[first..end]);
        }
        let mut encoder = Encoder::new(CP_FRAME_BYTES_MAX);
        let mut dirty = std::mem::take(&mut self.dirty).into_iter().peekable();
        while let Some((vbn, (transfer, ordinal))) = dirty.next() {
            let mut count = 1;
            let joins = |next: &(u64, (TransferId, u64)), count| {
                *next == (vbn + count, (transfer, ordinal + count))
            };
            while dirty.next_if(|next| joins(next, count)).is_some() {
                count += 1;
            }
            assert!(encoder.has_room(), "the updates of a small volume fit a frame");
            encoder.reference(Vbn(vbn), count, transfer, ordinal);
        }
        (encoder.finish().into(), root(self.size(), node_hash(&self.nodes)))
    }
}
