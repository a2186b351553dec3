//! Puts a damaged node right: what is left of it, and the hashes of its children.
//!
//! The hash of each child is known from the other end and proven by the parent's hash. With it the
//! child proves its own place: a pointer leads to where it should if what lies there has that
//! content, and its checksum follows from it. Only the birth has no such proof. All of it together
//! is proven by the checksum of the node, which the parent has: it is the node that was written.
//!
//! A damage of some bytes is undone so, wherever it is; of a pointer whose PBN or birth is wrong in
//! more than one byte nothing can be said.

use crate::pool::Pool;
use crate::pool::pointer::{POINTER_BYTES, Pointer};
use crate::units::BLOCK_BYTES;
use crate::units::hash::{ContentHash, crc32c};
use crate::units::numbers::Pbn;
use crate::volume::root::{leaf_hash, node_block_hash};
use crate::wire::pull::ChildHashes;

/// Where the fields of a pointer lie; see `pool::pointer`.
const PBN: std::ops::Range<usize> = 0..8;
const BIRTH: std::ops::Range<usize> = 8..12;
const CRC: std::ops::Range<usize> = 12..16;
const HASH: std::ops::Range<usize> = 16..32;

const _: () = assert!(HASH.end == POINTER_BYTES);

type Block = [u8; BLOCK_BYTES];

/// Where a child may lie, and the checksum of what lies there.
type Found = ([u8; 8], u32);

/// The node that `pointer` asks for, of that level; `None` if too much of it is lost.
pub(super) fn restore(
    pool: &Pool,
    pointer: &Pointer,
    level: u8,
    hashes: &ChildHashes,
) -> Option<Block> {
    let mut node = [0; BLOCK_BYTES];
    pool.read_unverified(pointer.pbn, &mut node).ok()?;
    let mut strays = Vec::new();
    for (slot, hash) in hashes.iter().enumerate() {
        let bytes = &mut node[slot * POINTER_BYTES..][..POINTER_BYTES];
        if !put_right(pool, bytes, level, hash) {
            strays.push((slot, elsewhere(pool, bytes, level, hash)));
        }
    }
    // What has the same content may lie in several places: the checksum knows which was meant. A
    // child that is bad itself is nowhere to be found, and its pointer may be right.
    for (slot, found) in strays.iter().skip(1) {
        found.first().into_iter().for_each(|found| enter(&mut node, *slot, found));
    }
    let mut right = (crc32c(&node) == pointer.crc).then_some(node);
    if let (None, Some((slot, found))) = (right, strays.first()) {
        right = found.iter().find_map(|found| {
            enter(&mut node, *slot, found);
            (crc32c(&node) == pointer.crc).then_some(node)
        });
    }
    let right = right.or_else(|| other_byte(pool, node, pointer, level, hashes))?;
    (node_block_hash(&right) == pointer.hash).then_some(right)
}

fn enter(node: &mut Block, slot: usize, (pbn, crc): &Found) {
    let bytes = &mut node[slot * POINTER_BYTES..][..POINTER_BYTES];
    bytes[PBN].copy_from_slice(pbn);
    bytes[CRC].copy_from_slice(&crc.to_le_bytes());
}

/// Puts one pointer right, as far as its child proves it; whether it does.
fn put_right(pool: &Pool, bytes: &mut [u8], level: u8, hash: &ContentHash) -> bool {
    bytes[HASH].copy_from_slice(&hash.0);
    if hash.is_zero() {
        bytes[PBN].fill(0);
        bytes[CRC].fill(0);
        return true;
    }
    let crc = there(pool, pbn_of(bytes), level, hash);
    if let Some(crc) = crc {
        bytes[CRC].copy_from_slice(&crc.to_le_bytes());
    }
    crc.is_some()
}

fn pbn_of(bytes: &[u8]) -> [u8; 8] {
    let mut pbn = [0; 8];
    pbn.copy_from_slice(&bytes[PBN]);
    pbn
}

/// Where the child lies, if one byte of its place is wrong.
fn elsewhere(pool: &Pool, bytes: &[u8], level: u8, hash: &ContentHash) -> Vec<Found> {
    let pbn = pbn_of(bytes);
    let mut found = Vec::new();
    for at in 0..pbn.len() {
        for byte in 0..=u8::MAX {
            let mut other = pbn;
            other[at] = byte;
            found.extend(there(pool, other, level, hash).map(|crc| (other, crc)));
        }
    }
    found
}

/// The checksum of the child, if it lies at `pbn`.
fn there(pool: &Pool, pbn: [u8; 8], level: u8, hash: &ContentHash) -> Option<u32> {
    let mut block = [0; BLOCK_BYTES];
    pool.read_unverified(Pbn(u64::from_le_bytes(pbn)), &mut block).ok()?;
    let met = if level == 1 { leaf_hash(&block) } else { node_block_hash(&block) };
    (met == *hash).then(|| crc32c(&block))
}

/// Tries another byte in each place that no child proves: the births, which are no later than the
/// node's own, and places that lead to another block of the same content.
fn other_byte(
    pool: &Pool,
    mut node: Block,
    pointer: &Pointer,
    level: u8,
    hashes: &ChildHashes,
) -> Option<Block> {
    for (slot, hash) in hashes.iter().enumerate() {
        let first = slot * POINTER_BYTES;
        for at in PBN.chain(BIRTH).map(|at| first + at) {
            let met = node[at];
            for byte in 0..=u8::MAX {
                node[at] = byte;
                if crc32c(&node) != pointer.crc {
                    continue;
                }
                let bytes = &node[first..first + POINTER_BYTES];
                let mut birth = [0; 4];
                birth.copy_from_slice(&bytes[BIRTH]);
                let old = u32::from_le_bytes(birth) <= pointer.birth.0;
                if old && (hash.is_zero() || there(pool, pbn_of(bytes), level, hash).is_some()) {
                    return Some(node);
                }
            }
            node[at] = met;
        }
    }
    None
}
